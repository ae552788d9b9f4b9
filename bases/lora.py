"""LoRA (Hu et al. 2021): a frozen linear layer plus a trained update of low rank."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class LoRALinear(nn.Linear):
    """W x + b + B A x: W and b are frozen; B starts at zero, so at first nothing changes. No scale."""

    def __init__(self, base, rank):
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.bias = base.weight, base.bias
        # drawn on the CPU, so that every device and every process starts from the same values
        A = nn.init.kaiming_uniform_(torch.empty(rank, base.in_features), a=5**0.5)
        self.lora_A = nn.Parameter(A.to(base.bias.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.bias.device))

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.lora_A), self.lora_B)

    def merged(self):
        """A plain linear layer that computes the same, up to the rounding of a base in bf16."""
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        linear.weight = nn.Parameter((self.weight.float() + self.lora_B @ self.lora_A).to(self.weight.dtype))
        linear.bias = self.bias
        return linear


def replace_linears(module, kind, make):
    """Replace every submodule m of exactly this kind by make(m)."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is kind:
                setattr(parent, name, make(child))


def add_lora(dit, rank):
    """Freeze the DiT; add an update of this rank to every attention and feed-forward linear of its blocks."""
    dit.requires_grad_(False)
    replace_linears(dit.blocks, nn.Linear, lambda m: LoRALinear(m, rank))


@torch.no_grad()
def merge_lora(dit):
    """Add the updates to the weights: the same function without the extra products."""
    replace_linears(dit.blocks, LoRALinear, LoRALinear.merged)
