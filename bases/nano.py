"""nano and small: DiTs trained from scratch, with a codec and prompts that need no weights."""

import functools
import hashlib
import math
import re

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from bases.base import Base, Codec
from model import DiTConfig
from util.cli import UserError, warn

TEXT = dict(text_dim=64, text_len=24)
PRESETS = {
    "nano": dict(
        dit=DiTConfig(dim=256, ffn_dim=1024, heads=4, layers=5, **TEXT),
        sizes=((64, 64),),
        fps=2,
        section=4,
        history=40,
        widths=(32, 64, 128, 256),
        rate="2x2x2",
    ),
    "small": dict(
        dit=DiTConfig(dim=512, ffn_dim=2048, heads=8, layers=12, **TEXT),
        sizes=((128, 224), (224, 128)),
        fps=8,
        section=8,
        history=160,
        widths=(64, 128, 256, 512),
    ),
}


def open_base(name, vae="", t5="", device="cpu"):
    """The Base nano or small."""
    for flag, folder in dict(vae=vae, t5=t5).items():
        if folder:
            raise UserError(f"--{flag} {folder} does nothing: --preset {name} needs no such weights; drop it")
    preset = PRESETS[name]
    prompts = HashPrompts(preset["dit"].text_dim, preset["dit"].text_len)
    return Base(name=name, codec=DCTCodec(), prompts=prompts, **preset)


class DCTCodec(Codec):
    """The 16 lowest coefficients (10 luma, 3 + 3 chroma) of a 4x4 block DCT in an orthonormal opponent colour space.

    Each coefficient is divided by the square root of its deviation, and all by one number that makes the overall
    variance 1: full whitening would give the finest detail too much weight.
    """

    channels, stride = 16, (1, 4, 4)
    averages = (0, 10, 13)  # latent channels that are means over the pixels of a block
    # standard deviation of each coefficient over frames of the paper-doll world and of real clips
    deviations = (2.6, 0.6, 0.3, 0.18, 0.59, 0.28, 0.17, 0.3, 0.17, 0.18, 1.18, 0.27, 0.26, 0.73, 0.16, 0.16)

    def __init__(self):
        k = np.arange(4)
        norm = np.where(k[:, None] == 0, 0.5, math.sqrt(0.5))
        dct = np.cos(np.pi * (2 * k[None] + 1) * k[:, None] / 8) * norm  # (frequency, pixel)
        # luma, red-blue, green-magenta
        colour = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
        chosen = [(c, u, v) for c, most in ((0, 3), (1, 1), (2, 1)) for u in k for v in k if u + v <= most]
        basis = [np.einsum("c,y,x->cyx", colour[c], dct[u], dct[v]).ravel() for c, u, v in chosen]
        self.basis = torch.tensor(np.stack(basis), dtype=torch.float32)  # (16, 48), orthonormal rows
        deviations = torch.tensor(self.deviations)
        self.scale = deviations.sqrt() * deviations.mean().sqrt()  # variance of latent k: deviation_k / mean

    @property
    def settings(self):
        rounded = [round(x, 5) for x in (self.basis * self.scale[:, None]).flatten().tolist()]
        return ["dct", hashlib.sha256(repr(rounded).encode()).hexdigest()]

    def encode(self, pixels):
        """(B, 3, F, H, W) in [-1, 1], H and W multiples of 4 -> (B, 16, F, H/4, W/4)."""
        blocks = rearrange(pixels, "b c f (h y) (w x) -> b f h w (c y x)", y=4, x=4)
        latents = F.linear(blocks, (self.basis / self.scale[:, None]).to(pixels))
        return rearrange(latents, "b f h w c -> b c f h w")

    def decode(self, latents):
        """(B, 16, F, h, w) -> pixels (B, 3, F, 4h, 4w), not clamped."""
        matrix = (self.basis * self.scale[:, None]).T.to(latents)
        blocks = F.linear(rearrange(latents, "b c f h w -> b f h w c"), matrix)
        return rearrange(blocks, "b f h w (c y x) -> b c f (h y) (w x)", c=3, y=4, x=4)

    def low_encoder(self, rate):
        """See Codec; here means over time too, as the shipped weights know it."""
        t, *space = rate
        return lambda pixels: F.avg_pool3d(self.encode(self.shrink(pixels, space)), (t, 1, 1))

    def cut_low(self, low, first, last, t):
        """See Codec; the codec is linear, so latents may be averaged instead of pixels."""
        return F.avg_pool3d(low[:, :, first:last], (t, 1, 1))


@functools.lru_cache(maxsize=4096)
def hash_word(word, dim):
    """A fixed random vector of unit variance for a word, the same on every machine."""
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal(dim).astype(np.float32)


class HashPrompts:
    """Prompt embeddings without weights: each word is a fixed random vector plus a fixed code of its position."""

    def __init__(self, dim, length):
        self.dim, self.length = dim, length

    @property
    def settings(self):
        return ["hash", self.dim, self.length]

    def __call__(self, prompt):
        """A text -> (length, dim), zero after its last word; all zeros for an empty prompt."""
        rows = np.zeros((self.length, self.dim), np.float32)
        words = re.findall(r"\w+", prompt.lower())
        if len(words) > self.length:
            warn(f'a prompt of {len(words)} words is cut to {self.length}: "{prompt[:60]}..."')
        for i, word in enumerate(words[: self.length]):
            rows[i] = hash_word(word, self.dim) + 0.5 * hash_word(f"position {i}", self.dim)
        return torch.from_numpy(rows)
