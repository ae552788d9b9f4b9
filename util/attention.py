"""Softmax attention: SDPA, but for bf16 on a CPU, where its kernel is slow."""

import torch
import torch.nn.functional as F

PIECE = 2**21  # attention weights computed at once on a CPU in bf16: they stay in the cache
MOST_WEIGHTS = 2**28  # the backward pass keeps all of them: above this many, SDPA


def attention(q, k, v):
    """Softmax attention of q, k, v (B, heads, N, head_dim) -> like q. No mask, so SDPA picks its flash kernel on a
    GPU."""
    n_weights = q.shape[:3].numel() * k.shape[2]
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or (n_weights > MOST_WEIGHTS and torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(q, k, v)
    if torch.compiler.is_compiling():
        return _by_products(q, k, v)
    # SDPA's CPU kernel for bf16 has half the speed of plain products over pieces this small
    weights_per_row = n_weights // len(q)
    n_rows = max(1, PIECE // weights_per_row)
    n_queries = max(16, PIECE * q.shape[2] // weights_per_row)
    rows = []
    for some_q, some_k, some_v in zip(*(x.contiguous().split(n_rows) for x in (q, k, v))):
        pieces = [_by_products(queries, some_k, some_v) for queries in some_q.split(n_queries, dim=2)]
        rows.append(torch.cat(pieces, dim=2))
    return torch.cat(rows)


def _by_products(q, k, v):
    weights = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1)
    return weights.type_as(v) @ v
