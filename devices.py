"""Where and in what numbers is computed."""
import torch

from model import UserError


def pick_device(name):
    """torch.device of auto, cpu, cuda or mps."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name not in available:
        raise UserError(f"--device {name}: choose one of auto, {', '.join(available)}")
    if not available[name]:
        raise UserError(f"--device {name}: this PyTorch finds none here; use --device cpu")
    return torch.device(name)


def product_dtype(device):
    """What matrix products are computed in: bf16 on GPUs (Ampere and newer) and CPUs (AVX-512 BF16, AMX) that have
    instructions for it. Others emulate it; a CPU is then about ten times slower than in float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def autocast(device):
    """Matrix products in product_dtype; weights, norms and the residual stream stay float32."""
    dtype = product_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
