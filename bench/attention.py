"""Attention in bf16 on a CPU: util/attention.py beside what it could choose, by one thread's processor time.

python -m bench.attention
"""

from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F

from bench.budget import print_table
from bench.speed import alternate, ratio
from util.attention import attention, by_products
from util.cli import UserError, parse_flags, run_main
from util.device import compute_dtype

# name: B, heads, queries, keys, head_dim, whether it is trained at this length on a CPU
SHAPES = {
    "nano": (16, 4, 336, 336, 64, True),
    "nano, its text": (16, 4, 336, 16, 64, True),
    "nano at 128x128 pixels": (4, 4, 896, 896, 64, True),
    "1.3B, 3,120 tokens": (1, 12, 3120, 3120, 128, True),
    "1.3B, 16,744 tokens (1,024 queries)": (1, 12, 1024, 16744, 128, False),
}


@dataclass
class AttentionConfig:
    repeats: int = 5  # rounds; their medians are printed


def in_pieces(q, k, v):
    """All heads, 256 queries at once."""
    return torch.cat([by_products(piece, k, v) for piece in q.split(256, dim=2)], dim=2)


RULES = {"chosen": attention, "SDPA": F.scaled_dot_product_attention, "in pieces": in_pieces}


def run(rule, inputs, backward):
    """[output, and with the backward pass the gradients of q, k and v]."""
    if not backward:
        with torch.no_grad():
            return [rule(*inputs)]
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = rule(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, torch.ones_like(y))]


def error(ours, exact):
    """The largest difference between two lists of tensors, each as a share of the exact one's largest value."""
    return max((x - y).abs().max() / y.abs().max() for x, y in zip(ours, exact)).item()


def measure(name, backward, repeats):
    """A row of the table."""
    B, heads, N, M, width, _ = SHAPES[name]
    inputs = [torch.randn(B, n, heads, width).bfloat16().transpose(1, 2) for n in (N, M, M)]
    jobs = {rule: lambda f=f: run(f, inputs, backward) for rule, f in RULES.items()}
    times = alternate(jobs, repeats, torch.device("cpu"), clock="process_time")
    exact = run(F.scaled_dot_product_attention, [x.float() for x in inputs], backward)
    ratios = [f"{ratio(times[rule], times['chosen']):.2f}" for rule in list(RULES)[1:]]
    errors = [f"{error(jobs[rule](), exact):.4f}" for rule in ("chosen", "SDPA")]
    return [name + ", with backward" * backward, f"{1000 * median(times['chosen']):.0f}", *ratios, *errors]


def main():
    config = parse_flags(AttentionConfig, __doc__)
    if compute_dtype("cpu") != torch.bfloat16:
        raise UserError("this processor has no bf16 instructions, so attention is SDPA in float32: nothing to compare")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [measure(x, trained, config.repeats) for x in SHAPES for trained in {False, SHAPES[x][-1]}]
    heads = ["", "ms", *list(RULES)[1:], "error", "SDPA's"]
    print_table("Attention in bf16: ms; times of the others / this; errors against float32", [heads, *rows])


if __name__ == "__main__":
    run_main(main)
