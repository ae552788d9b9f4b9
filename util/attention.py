"""Softmax attention: SDPA, but for short trainings in bf16 on a CPU, where its backward pass is slow."""

import torch
import torch.nn.functional as F

SHORT = 2**20  # queries x keys: above, the backward pass of SDPA is as fast, and keeps no weights
PIECE = 2**21  # attention weights computed at once: they stay in the cache


def attention(q, k, v, mask=None):
    """Softmax attention of q, k, v (B, heads, N, head_dim) -> like q. mask: (B, 1, 1, N), which keys are there, or
    None, with which SDPA picks its flash kernel on a GPU."""
    n_weights = q.shape[2] * k.shape[2]
    in_bf16 = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if mask is not None or not in_bf16 or not torch.is_grad_enabled() or n_weights > SHORT:
        return F.scaled_dot_product_attention(q, k, v, mask)
    n_rows = len(q) if torch.compiler.is_compiling() else max(1, PIECE // (q.shape[1] * n_weights))
    return torch.cat([by_products(*rows) for rows in zip(*(x.split(n_rows) for x in (q, k, v)))])


def by_products(q, k, v):
    """attention() by two matrix products, with all weights in memory."""
    weights = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1)
    return weights.type_as(v) @ v
