"""What the models see: pixels <-> latents (codecs), prompts -> embeddings. Here those without weights, and PSNR; Wan's
are in wan.py.

Pixels are (B, 3, F, H, W) floats in [-1, 1]; latents (B, C, f, h, w);
uint8 frames (F, H, W, 3) only at the file boundary.
"""
import functools
import hashlib
import math
import re

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from flags import warn
from model import UserError, pad_replicate
from wan import UMT5Prompts, WanCodec, ZeroPrompts

# ---------------------------------------------------------------------------------------------------------------------
# Codecs


class DCTCodec:
    """A weights-free codec: the 16 lowest coefficients (10 luma, 3 + 3 chroma) of a 4x4 block DCT in an orthonormal
    opponent colour space. Linear, so that downsampling in pixels is one linear map of latents.

    Each coefficient is divided by the square root of its deviation, and all by one number that makes the overall
    variance 1: full whitening would weight the finest detail too much.
    """
    channels, stride, causal, decodes = 16, (1, 4, 4), False, True
    averages = (0, 10, 13)          # latent channels that are means over the pixels of a block
    # standard deviation of each coefficient over frames of the paper-doll world and of real clips
    deviations = (2.6, 0.6, 0.3, 0.18, 0.59, 0.28, 0.17, 0.3, 0.17, 0.18, 1.18, 0.27, 0.26, 0.73, 0.16, 0.16)

    def __init__(self):
        k = np.arange(4)
        norm = np.where(k[:, None] == 0, 0.5, math.sqrt(0.5))
        dct = np.cos(np.pi * (2 * k[None] + 1) * k[:, None] / 8) * norm         # (frequency, pixel)
        # luma, red-blue, green-magenta
        colour = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
        chosen = [(c, u, v) for c, most in ((0, 3), (1, 1), (2, 1)) for u in k for v in k if u + v <= most]
        basis = [np.einsum("c,y,x->cyx", colour[c], dct[u], dct[v]).ravel() for c, u, v in chosen]
        self.basis = torch.tensor(np.stack(basis), dtype=torch.float32)         # (16, 48), orthonormal rows
        deviations = torch.tensor(self.deviations)
        self.scale = deviations.sqrt() * deviations.mean().sqrt()               # latent k: variance deviation_k / mean

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

    @property
    def settings(self):
        """What a cache of latents depends on."""
        rounded = [round(x, 5) for x in (self.basis * self.scale[:, None]).flatten().tolist()]
        return ["dct", hashlib.sha256(repr(rounded).encode()).hexdigest()]

    def frames(self, n):
        """The most frames, of n, that are whole latents: any number."""
        return n

    def decoder(self):
        """A function that decodes a video piece by piece."""
        return self.decode

    def show(self, history, target, frames):
        """Pixels (B, 3, F', H, W) of latents (B, 16, F', h, w) that belong at `frames` of a history."""
        return self.decode(target)

    @functools.lru_cache
    def downsampling_kernel(self, rate):
        """Decode, area mean in pixels over (t, h, w), encode, as one matrix (16, 16 * t * h * w): what it does to each
        latent of a block."""
        t, h, w = rate
        impulses = torch.eye(16 * t * h * w).view(-1, 16, t, h, w)
        response = self.encode(F.avg_pool3d(self.decode(impulses), rate))       # (16 * t * h * w, 16, 1, 1, 1)
        return response.view(-1, 16).T.contiguous()

    def downsample(self, latents, rate):
        """The latents of the video made smaller by rate (t, h, w): (B, 16, F, h', w') -> (B, 16, F/t, ...), sizes
        padded up to whole tokens by replication."""
        with torch.autocast(latents.device.type, enabled=False):                # exact in float32
            latents = pad_replicate(latents.float(), (rate[0], 2 * rate[1], 2 * rate[2]))
            blocks = rearrange(latents, "b c (f t) (y h) (x w) -> b f y x (c t h w)", **dict(zip("thw", rate)))
            return rearrange(F.linear(blocks, self.downsampling_kernel(rate).to(latents)), "b f y x c -> b c f y x")


def make_codec(preset, vae="", device="cpu"):
    """The codec of a preset. vae: the local folder of Wan's, which only Wan's presets have."""
    if preset.codec == "dct":
        if vae:
            raise UserError(f"--vae {vae} does nothing: the codec of nano and small has no weights; drop it")
        return DCTCodec()
    return WanCodec(vae, device)


def to_pixels(frames):
    """uint8 (..., F, H, W, 3) -> float (..., 3, F, H, W) in [-1, 1]."""
    return rearrange(torch.as_tensor(frames).float() / 127.5 - 1, "... f h w c -> ... c f h w")


def to_frames(pixels):
    """float (..., 3, F, H, W) in [-1, 1] -> uint8 (..., F, H, W, 3), clamped."""
    return rearrange(((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), "... c f h w -> ... f h w c")


def psnr(a, b):
    """Peak signal-to-noise ratio of uint8 frames (..., H, W, 3), data range 255: dB a frame, (...); 100 if equal."""
    mse = (a.float() - b.float()).square().flatten(-3).mean(-1)
    return (10 * torch.log10(255**2 / mse)).clamp(max=100)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


@functools.lru_cache(maxsize=4096)
def hash_word(word, dim):
    """A fixed random vector of unit variance for a word, the same on every machine."""
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal(dim).astype(np.float32)


class HashPrompts:
    """Prompt embeddings without weights: each word a fixed random vector plus a fixed code of its position."""

    def __init__(self, dim, length):
        self.dim, self.length = dim, length

    @property
    def settings(self):
        """What a cache of prompts depends on."""
        return ["hash", self.dim, self.length]

    def __call__(self, prompt):
        """A text -> (length, dim), zero rows after its last word; all zeros for an empty prompt."""
        rows = np.zeros((self.length, self.dim), np.float32)
        words = re.findall(r"\w+", prompt.lower())
        if len(words) > self.length:
            warn(f'a prompt of {len(words)} words is cut to {self.length}: "{prompt[:60]}..."')
        for i, word in enumerate(words[:self.length]):
            rows[i] = hash_word(word, self.dim) + 0.5 * hash_word(f"position {i}", self.dim)
        return torch.from_numpy(rows)


def make_prompts(preset, t5="", device="cpu"):
    """The prompt embedder of a preset. t5: the local folder of umT5, for Wan's presets, which runs on `device`; without
    it, only the empty prompt and those in a cache are known."""
    if preset.codec == "dct":
        if t5:
            raise UserError(f"--t5 {t5} does nothing: the prompts of nano and small need no weights; drop it")
        return HashPrompts(preset.dit.text_dim, preset.dit.text_len)
    if t5:
        return UMT5Prompts(t5, preset.dit.text_dim, preset.dit.text_len, device)
    return ZeroPrompts(preset.dit.text_dim, preset.dit.text_len)
