"""nano and small: DiTs trained from scratch, with a learned codec and prompts that need no weights."""

import functools
import hashlib
import re

import numpy as np
import torch

from bases.autoencoder import LearnedCodec
from bases.base import Base
from model import DiTConfig
from util.cli import UserError, warn

SHARED = dict(text_dim=64, text_len=24, rotate_values=True)
PRESETS = {
    "nano": dict(
        dit=DiTConfig(dim=256, ffn_dim=1024, heads=4, layers=5, **SHARED),
        sizes=((128, 128),),
        fps=2,
        section=4,
        history=40,
        widths=(32, 64, 128, 256),
        rate="2x2x2",
    ),
    "small": dict(
        dit=DiTConfig(dim=512, ffn_dim=2048, heads=8, layers=12, **SHARED),
        sizes=((256, 448), (448, 256)),
        fps=8,
        section=8,
        history=160,
        widths=(64, 128, 256, 512),
    ),
}


def open_base(name, vae="", t5="", device="cpu"):
    """The Base nano or small. vae: weights of another codec of your own."""
    if t5:
        raise UserError(f"--t5 {t5} does nothing: --preset {name} needs no such weights; drop it")
    preset = PRESETS[name]
    prompts = HashPrompts(preset["dit"].text_dim, preset["dit"].text_len)
    return Base(name=name, codec=LearnedCodec(vae, device), prompts=prompts, **preset)


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
