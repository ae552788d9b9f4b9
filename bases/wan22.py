"""Wan 2.2: TI2V-5B with a causal video VAE of its own; T2V A14B, two experts with Wan 2.1's. All DiTs have the
architecture of Wan 2.1's.

TI2V-5B: pixels are (B, 3, F, H, W) floats in [-1, 1], F = 1 + 4k; latents (B, C, 1 + k, h, w), the first of one frame:
C = 48, h = H/16, w = W/16.
"""

from bases import wan
from bases.base import Base
from bases.experts import TwoExperts
from model import DiTConfig

PRESETS = {
    # It was trained on images to continue too: the first latent frame's tokens clean, at t = 0, all others at t. Memory
    # at t = 0 looks like that to it.
    "wan2.2-5b": wan.SHARED
    | dict(
        dit=DiTConfig(dim=3072, ffn_dim=14336, heads=24, layers=30, in_dim=48, out_dim=48),
        sizes=((704, 1280), (1280, 704), (480, 832)),
        fps=24,
        history=121,
    ),
    "wan2.2-a14b": wan.PRESETS["wan-14b"]
    | dict(boundary=0.875, steps=40, shift=12.0, guidance=4.0, low_guidance=3.0, t_mean=2.5),  # ln 12
}

MEAN = (-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891)
MEAN += (0.157, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502)
MEAN += (-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123, -0.0313, -0.1649, 0.0117, 0.0723)
MEAN += (-0.2839, -0.2083, -0.052, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667)
STD = (0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901)
STD += (0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659)
STD += (0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944)
STD += (0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744)


def open_base(name, vae="", t5="", device="cpu"):
    """The Base wan2.2-5b or wan2.2-a14b."""
    preset = PRESETS[name]
    codec = {kind.channels: kind for kind in (wan.WanCodec, Wan22Codec)}[preset["dit"].in_dim]
    kind = TwoExperts if "boundary" in preset else Base
    return wan.make_base(name, preset, codec(vae, device), t5, device, kind)


class Wan22Codec(wan.WanCodec):
    """Wan 2.2's VAE: its networks see 2x2 pixels as channels, and have shortcuts around each level."""

    version, channels, stride = "2.2", 48, (4, 16, 16)
    mean, std = MEAN, STD
    architecture = dict(
        base_dim=160,
        decoder_base_dim=256,
        z_dim=48,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=MEAN,
        latents_std=STD,
    )
    weight_bytes, carried_per_pixel, decoding_per_pixel = 2_818_754_672, 7_145, 21_920
