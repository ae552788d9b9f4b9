"""The video diffusion transformer (DiT) of Wan 2.1, and rectified flow.

Letters:  B batch, C channels, F frames, H height, W width, N noisy tokens, M memory tokens, L text tokens, D width.
Videos and latents are (B, C, F, H, W). Pixels are floats in [-1, 1], (B, 3, F, H, W); frames are uint8, (F, H, W, 3).
Flow:     x_t = (1 - t) x_0 + t ε with t in [0, 1], so noise is at t = 1. Target v = ε - x_0. The DiT is fed 1000 t.
          Timestep shift t' = s t / (1 + (s - 1) t).
Tokens:   every token has a real-valued position (frame, row, column) on the DiT's token grid: time in latent frames,
          space in patches. RoPE is computed from positions, not looked up, so length is unlimited.

Architecture and parameter names are exactly those of Wan 2.1's text-to-video model, so its weights load strictly. Two
additions do nothing unless used: positions are an argument, and memory tokens, which are clean (t = 0), precede the
noisy ones and take part in self-attention.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint

from util.attention import attention
from util.device import to_autocast_dtype


@dataclass
class DiTConfig:
    dim: int  # D, width
    ffn_dim: int  # hidden width of the feed-forward layers
    heads: int
    layers: int
    in_dim: int = 16  # latent channels
    out_dim: int = 16
    text_dim: int = 4096  # width of the prompt embeddings (umT5-xxl)
    text_len: int = 512  # prompts are zero-padded to this many tokens
    freq_dim: int = 256  # width of the sinusoidal timestep embedding
    patch: tuple = (1, 2, 2)  # latent frames, rows, columns per token
    eps: float = 1e-6
    rotate_values: bool = False  # turn values by their positions too, and back at the query; not in Wan


# ---------------------------------------------------------------------------------------------------------------------
# Positions


def pad_replicate(x, multiples):
    """Pad (B, C, F, H, W) up to multiples (f, h, w) by replication.

    Space is padded at the bottom and right, time at the front: only a causal codec's lone first latent needs it.
    """
    f, h, w = (-size % m for size, m in zip(x.shape[2:], multiples))
    return F.pad(x, (0, w, 0, h, f, 0), mode="replicate") if f or h or w else x


def token_positions(times, rows, columns):
    """Positions (..., F*rows*columns, 3) of a video's tokens, ordered frame, row, column (column fastest).

    times: (F,) or (B, F) in latent frames; rows, columns: size of the token grid.
    """
    times = torch.as_tensor(times, dtype=torch.float32)
    row = torch.arange(rows, device=times.device).float()[:, None]
    column = torch.arange(columns, device=times.device).float()
    return torch.stack(torch.broadcast_tensors(times[..., None, None], row, column), dim=-1).flatten(-4, -2)


def rope(positions, head_dim, axes=None, theta=10000.0):
    """Rotations of 3D rotary embeddings for positions (B, N, 3): (cos, sin) pairs (B, N, 1, head_dim / 2, 2).

    axes: how many of the head_dim channels belong to time, rows, columns; by default 2 * (head_dim // 6) to rows, as
    many to columns, the rest to time. Each axis has its own frequencies theta^(-2j / axis_dim).
    """
    spatial = 2 * (head_dim // 6)
    # float64 as in Wan (MPS has none): at frame 1000 a float32 angle is already off by 1e-4
    dtype = torch.float32 if positions.device.type == "mps" else torch.float64
    angles = []
    for axis, dim in enumerate(axes or (head_dim - 2 * spatial, spatial, spatial)):
        frequencies = theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=dtype) / dim)
        angles.append(positions[..., axis, None].to(dtype) * frequencies)
    angles = torch.cat(angles, dim=-1)[:, :, None]  # (B, N, 1, head_dim / 2)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


def rotate(x, rotations):
    """Rotate the channel pairs (a, b) of x (B, N, heads, head_dim), float32, to (a cos - b sin, a sin + b cos).

    rotations: from rope().
    """
    x = x.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # the compiler fuses this, but knows no complex numbers
        (a, b), (cos, sin) = x.unbind(-1), rotations.unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    # (a + ib)(cos + i sin): one kernel instead of seven
    return torch.view_as_real(torch.view_as_complex(x) * torch.view_as_complex(rotations)).flatten(-2)


# ---------------------------------------------------------------------------------------------------------------------
# The transformer


class PatchEmbedding(nn.Module):
    """A convolution whose kernel is its stride, computed as one matrix product. Weight (D, C, *patch), as Wan's."""

    def __init__(self, in_dim, dim, patch):
        super().__init__()
        self.patch = tuple(patch)
        self.weight = nn.Parameter(torch.empty(dim, in_dim, *patch))
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.xavier_uniform_(self.weight.view(dim, -1))

    def forward(self, x):
        """(B, C, F, H, W) -> (B, N, D). F, H, W must be multiples of the patch."""
        pt, ph, pw = self.patch
        x = rearrange(x, "b c (f pt) (h ph) (w pw) -> b (f h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)
        return F.linear(x, self.weight.flatten(1), self.bias)


class Attention(nn.Module):
    """Multi-head attention over x itself or over a context; queries and keys are RMS-normalised over all heads."""

    def __init__(self, dim, heads, eps, rotate_values=False):
        super().__init__()
        self.heads, self.rotate_values = heads, rotate_values
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = nn.RMSNorm(dim, eps)
        self.norm_k = nn.RMSNorm(dim, eps)

    def forward(self, x, context=None, rotations=None, context_rotations=None, cached=None):
        """x (B, N, D), context (B, L, D) or None for self-attention -> (B, N, D).

        rotations and context_rotations: of x and of the context, from rope(), or None for no positions. cached: further
        keys_values(), read too.
        """
        x = to_autocast_dtype(x)
        q = self.norm_q(self.q(x).float())  # float32 until the product of queries and keys, as in Wan
        q = q.unflatten(-1, (self.heads, -1))  # (B, N, heads, head_dim)
        if rotations is not None:
            q = rotate(q, rotations)
        k, v = self.keys_values(x, rotations) if context is None else self.keys_values(context, context_rotations)
        if cached is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(cached, (k, v)))
        y = attention(q.type_as(x).transpose(1, 2), k, v).transpose(1, 2)
        if self.rotate_values:
            y = rotate(y.float(), rotations * rotations.new_tensor([1, -1])).type_as(x)
        return self.o(y.flatten(-2))  # (B, N, D)

    def keys_values(self, context, rotations=None):
        """Keys and values of a context (B, L, D), each (B, heads, L, head_dim)."""
        context = to_autocast_dtype(context)
        k, v = self.norm_k(self.k(context).float()), self.v(context)
        k, v = (y.unflatten(-1, (self.heads, -1)) for y in (k, v))  # (B, L, heads, head_dim)
        if rotations is not None:
            k = rotate(k, rotations)
        if self.rotate_values:  # back at the query: what is read depends on where it lies from there
            v = rotate(v.float(), rotations)
        return tuple(y.type_as(context).transpose(1, 2) for y in (k, v))


def modulate(x, shift, scale, sizes):
    """x * (1 + scale) + shift. x (B, M + N, D) has P parts of these sizes; shift and scale (B, P, D) have a row for
    each.

    Returns the autocast dtype, since linear layers come next.
    """
    parts = [
        to_autocast_dtype(torch.addcmul(b, y, 1 + a))
        for y, b, a in zip(x.split(sizes, dim=1), shift.split(1, dim=1), scale.split(1, dim=1))
    ]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def add_gated(x, y, gate, sizes):
    """x + gate * y with gate (B, P, D), parts as in modulate(). float32, like the residual stream x."""
    parts = [
        torch.addcmul(a, b, g) for a, b, g in zip(x.split(sizes, dim=1), y.split(sizes, dim=1), gate.split(1, dim=1))
    ]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


class Block(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; modulated by the timestep (adaLN)."""

    def __init__(self, c):
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 6, c.dim) / c.dim**0.5)
        self.norm1 = nn.LayerNorm(c.dim, c.eps, elementwise_affine=False)
        self.self_attn = Attention(c.dim, c.heads, c.eps, c.rotate_values)
        self.norm3 = nn.LayerNorm(c.dim, c.eps)
        self.cross_attn = Attention(c.dim, c.heads, c.eps)
        self.norm2 = nn.LayerNorm(c.dim, c.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(c.dim, c.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(c.ffn_dim, c.dim))
        self.memory_attn = None  # see DiT.add_cross_attention

    def forward(self, x, e, text, rotations, M, memory=None, cached=None):
        """x (B, M + N, D) float32 -> the same.

        e (B, 2, 6, D): modulation at t = 0 for the M memory tokens and at t for the others; (B, 1, 6, D) if M is 0.
        text (B, L, D); rotations from rope(). memory (B, M, D): the memory tokens as φ made them, for memory_attn.
        cached: keys and values of memory in this block, where it has no tokens here.
        """
        sizes = [M, x.shape[1] - M] if M else [x.shape[1]]
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation[:, None].float() + e).unbind(2)
        # no names for what comes between: at full size each would hold hundreds of megabytes
        x = add_gated(
            x,
            self.self_attn(modulate(self.norm1(x), shift1, scale1, sizes), rotations=rotations, cached=cached),
            gate1,
            sizes,
        )
        if self.memory_attn is not None and M:
            places = dict(rotations=rotations[:, M:], context_rotations=rotations[:, :M])
            read = self.memory_attn(self.norm_memory(x[:, M:]), memory, **places)
            x = torch.cat([x[:, :M], x[:, M:] + read], dim=1)
        x = x + self.cross_attn(self.norm3(x), context=text)
        return add_gated(x, self.ffn(modulate(self.norm2(x), shift2, scale2, sizes)), gate2, sizes)

    def keys_values(self, x, e, rotations):
        """Keys and values that self-attention has for tokens x (B, M, D), each (B, heads, M, head_dim)."""
        shift, scale, *_ = (self.modulation[:, None].float() + e).unbind(2)
        return self.self_attn.keys_values(modulate(self.norm1(x), shift, scale, [x.shape[1]]), rotations)


class Head(nn.Module):
    """The modulated norm and the projection to patches."""

    def __init__(self, c):
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 2, c.dim) / c.dim**0.5)
        self.norm = nn.LayerNorm(c.dim, c.eps, elementwise_affine=False)
        self.head = nn.Linear(c.dim, math.prod(c.patch) * c.out_dim)

    def forward(self, x, e):
        """x (B, N, D), e (B, D) timestep embedding -> (B, N, pt * ph * pw * C), float32 as in Wan."""
        shift, scale = (self.modulation.float() + e[:, None]).chunk(2, dim=1)  # (B, 1, D) each
        y = self.norm(x) * (1 + scale) + shift
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(y.float(), self.head.weight.float(), self.head.bias.float())


class DiT(nn.Module):
    """Wan 2.1's text-to-video transformer, with memory."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.patch_embedding = PatchEmbedding(c.in_dim, c.dim, c.patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(c.text_dim, c.dim), nn.GELU(approximate="tanh"), nn.Linear(c.dim, c.dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(c.freq_dim, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 6 * c.dim))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.head = Head(c)
        self.recompute = False  # activation checkpointing, set for training
        self.init_weights()

    def init_weights(self):
        for m in self.modules():
            if isinstance(m, nn.Linear):
                m.weight.data.copy_(nn.init.xavier_uniform_(m.weight.data.float()))  # the same in any dtype
                nn.init.zeros_(m.bias)
        for m in (*self.text_embedding, *self.time_embedding):
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    def add_cross_attention(self):
        """Let every block read the memory tokens once more, as φ made them, through cross-attention of its own. It
        starts at zero. (Later version of the paper.)"""
        c = self.config
        for block in self.blocks:
            block.norm_memory = nn.LayerNorm(c.dim, c.eps)
            block.memory_attn = Attention(c.dim, c.heads, c.eps, c.rotate_values)
            nn.init.zeros_(block.memory_attn.o.weight)
            nn.init.zeros_(block.memory_attn.o.bias)

    def embed_timesteps(self, t):
        """(B,) timesteps 0..1000 -> embedding (B, D) and modulation (B, 6, D), float32 whatever the weights' dtype."""
        c = self.config
        with torch.autocast(t.device.type, enabled=False):
            dtype = torch.float32 if t.device.type == "mps" else torch.float64
            half = torch.arange(c.freq_dim // 2, device=t.device, dtype=dtype)
            angles = t.to(dtype)[:, None] * 10000.0 ** (-half / (c.freq_dim // 2))
            y = torch.cat([angles.cos(), angles.sin()], dim=-1).float()  # (B, freq_dim), cosines first
            linear = lambda m, y: F.linear(y, m.weight.float(), m.bias.float())
            e = linear(self.time_embedding[2], F.silu(linear(self.time_embedding[0], y)))
            return e, linear(self.time_projection[1], F.silu(e)).unflatten(-1, (6, -1))

    def embed_text(self, text):
        """(B, L, text_dim) -> (B, text_len, D), zero-padded first: padding is attended to, as in Wan."""
        missing = self.config.text_len - text.shape[1]
        if missing < 0:
            raise ValueError(f"{text.shape[1]} text tokens; at most {self.config.text_len} are expected")
        return self.text_embedding(F.pad(text, (0, 0, 0, missing)))

    def forward(self, x, t, text, times=None, memory=None):
        """The velocity ε - x_0, float32, shaped like x.

        x       (B, C, F, H, W) noisy latents; H and W multiples of the patch
        t       (B,) timesteps, 0..1000
        text    (B, L, text_dim) prompt embeddings; all zeros for no prompt
        times   (F,) or (B, F) times of the frames of x, in latent frames; default 0..F-1
        memory  None, (tokens (B, M, D), positions (M, 3) or (B, M, 3)): clean context, seen at t = 0, or what
                cache_memory() returned
        """
        c = self.config
        B, _, n_frames, height, width = x.shape
        rows, columns = height // c.patch[1], width // c.patch[2]
        times = torch.arange(n_frames, device=x.device) if times is None else times
        positions = token_positions(times, rows, columns).expand(B, -1, -1)  # (B, N, 3)
        x = self.patch_embedding(x).float()  # (B, N, D)
        M, levels, tokens, cached = 0, [t], None, [None] * c.layers
        if isinstance(memory, list):
            cached = memory
        elif memory is not None and memory[0].shape[1]:
            tokens, places = memory
            M, levels = tokens.shape[1], [torch.zeros_like(t), t]
            x = torch.cat([tokens.float(), x], dim=1)  # (B, M + N, D)
            positions = torch.cat([places.expand(B, -1, -1), positions], dim=1)
        rotations = rope(positions, c.dim // c.heads)
        embedding, modulation = self.embed_timesteps(torch.cat(levels))
        modulation = torch.stack(modulation.chunk(len(levels)), dim=1)  # (B, 1 or 2, 6, D)
        text = self.embed_text(text)  # (B, text_len, D)
        for block, keys_values in zip(self.blocks, cached):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, modulation, text, rotations, M, tokens, keys_values, use_reentrant=False)
            else:
                x = block(x, modulation, text, rotations, M, tokens, keys_values)
        x = self.head(x[:, M:], embedding[-B:])  # only the noisy tokens are read out
        # unlike the input, the output has channels last inside a patch
        pt, ph, pw = c.patch
        return rearrange(
            x, "b (f h w) (pt ph pw c) -> b c (f pt) (h ph) (w pw)", h=rows, w=columns, pt=pt, ph=ph, pw=pw
        )

    def cache_memory(self, tokens, positions):
        """Keys and values of memory tokens (B, M, D) at positions (M, 3) or (B, M, 3), which see each other alone: a
        list with a pair (B, heads, M, head_dim) per block.

        No prompt and t = 0, so these hold for all denoising steps of all later sections. (Later version of the paper.)
        """
        B, c = len(tokens), self.config
        rotations = rope(positions.expand(B, -1, -1), c.dim // c.heads)
        modulation = self.embed_timesteps(torch.zeros(B, device=tokens.device))[1][:, None]  # (B, 1, 6, D)
        text = self.embed_text(tokens.new_zeros(B, 1, c.text_dim))
        x, cached = tokens.float(), []
        for block in self.blocks:
            cached.append(block.keys_values(x, modulation, rotations))
            if block is not self.blocks[-1]:  # nothing reads what the last one makes of memory
                x = block(x, modulation, text, rotations, 0)
        return cached


# ---------------------------------------------------------------------------------------------------------------------
# Rectified flow


def noise_levels(quantiles, mean, std=1.0, between=(0.0, 1.0)):
    """Logit-normal noise levels: sigmoid(N(mean, std)) at these quantiles in (0, 1), any shape; none outside `between`.

    A timestep shift s adds log(s) to the mean.
    """
    low, high = torch.special.ndtr((torch.tensor(between).logit() - mean) / std)
    return torch.sigmoid(mean + std * torch.special.ndtri(low + (high - low) * quantiles)).clamp(*between)


def add_noise(x0, noise, t):
    """x_t = (1 - t) x_0 + t ε, with t (B,) broadcast over x0 (B, ...)."""
    t = t.view(-1, *[1] * (x0.ndim - 1)).to(x0)
    return (1 - t) * x0 + t * noise
