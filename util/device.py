"""Device and compute dtype."""

import math
import sys
from contextlib import contextmanager

import torch

from util.cli import UserError


def pick_device(name):
    """The torch.device for "auto", "cpu", "cuda" or "mps". Raises UserError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name not in available:
        raise UserError(f"--device {name}: choose one of auto, {', '.join(available)}")
    if not available[name]:
        raise UserError(f"--device {name}: this PyTorch finds none here; use --device cpu")
    return torch.device(name)


def compute_dtype(device):
    """bf16 on GPUs (Ampere or newer) and CPUs (AVX-512 BF16, AMX) with bf16 instructions, else float32.

    A processor without them emulates bf16; on a CPU that is about ten times slower than float32.
    """
    device = torch.device(device)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def autocast(device):
    """Autocast matrix products to compute_dtype(); weights, norms and the residual stream stay float32."""
    dtype = compute_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def to_autocast_dtype(x):
    """Cast x to the autocast dtype once instead of in every linear layer that reads it."""
    kind = x.device.type  # the meta device, on which FLOPs are counted, has no autocast
    return x.to(torch.get_autocast_dtype(kind)) if kind != "meta" and torch.is_autocast_enabled(kind) else x


def peak_memory(device):
    """Peak memory of this process so far, GiB: of the GPU if it uses one, else of the host (nan on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


@contextmanager
def make_room(model, codec):
    """Let the model wait in host memory while a large codec works: side by side they would not fit 12 GB."""
    device = next(model.parameters()).device
    if device.type == "cuda" and codec.large:
        model.to("cpu")
        torch.cuda.empty_cache()
    yield
    model.to(device)
