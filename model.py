"""The video diffusion transformer (DiT) of Wan 2.1, and rectified flow: its loss and its sampler.

Letters:  B batch, C channels, F frames, H height, W width, N noisy tokens, M memory tokens, L text tokens, D width.
Videos and latents are (B, C, F, H, W). Pixels are floats in [-1, 1]; uint8 only in files.
Flow:     x_t = (1 - t) x_0 + t ε with t in [0, 1], so noise is at t = 1. Target v = ε - x_0. The DiT is fed 1000 t.
          Timestep shift t' = s t / (1 + (s - 1) t).
Tokens:   every token has a real position (frame, row, column) on the DiT's token grid, in units of latent frames and
          of 2x2 latents. RoPE is computed from positions, not looked up, so there is no longest video.

Architecture and parameter names are exactly Wan 2.1's text-to-video model, so its weights load with strict=True. Two
things are added that change nothing when unused: positions are given, not assumed; and memory tokens, which are clean
(t = 0), stand before the noisy ones (t) in the sequence and take part in every self-attention.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint


class UserError(ValueError):
    """A mistake of the user's: shown as one line (what was given, what is expected, what to do), exit code 2."""


def first_line(error):
    """What an exception says, in one line."""
    return str(error).partition("\n")[0] or type(error).__name__


@dataclass
class DiTConfig:
    dim: int                      # D, width
    ffn_dim: int                  # hidden width of the feed-forward layers
    heads: int
    layers: int
    in_dim: int = 16              # latent channels
    out_dim: int = 16
    text_dim: int = 4096          # width of the prompt embeddings (umT5-xxl)
    text_len: int = 512           # prompts are zero-padded to this many tokens
    freq_dim: int = 256           # width of the sinusoidal timestep embedding
    patch: tuple = (1, 2, 2)      # latent frames, rows, columns a token
    eps: float = 1e-6


@dataclass
class Preset:
    dit: DiTConfig
    codec: str                    # "dct" or "wan", see codec.py and wan.py
    sizes: tuple                  # (height, width) of the aspect-ratio buckets, pixels; the first is the default
    fps: float                    # frames a second
    section: int                  # latent frames generated at once = encoded at once
    history: int                  # latent frames of history, about 20 s
    widths: tuple                 # channels of the memory encoder's convolutions
    rate: str = "4x4x2"           # compression of the history, rows x columns x frames, on the DiT's token grid
    lora: int = 0                 # rank of the trained update of a frozen DiT; 0: the whole DiT is trained
    optimizer: str = "muon"       # muon or adamw, see optim.py
    lr: float = 0.04              # its peak learning rate
    recompute: bool = False       # compute activations again in the backward pass: a third more time, far less memory
    # frames of a section of nano are so alike that prompt and memory are needed only near t = 1: go there often
    t_mean: float = 2.5           # noise levels that the base and stage 2 train on: sigmoid of N(t_mean, t_std)
    t_std: float = 2.0            # their spread
    steps: int = 20               # Euler steps of sample.py
    guidance: float = 1.5         # its classifier-free guidance
    shift: float = 3.0            # its timestep shift


WAN = dict(codec="wan", sizes=((480, 832), (832, 480), (624, 624)), fps=16, section=8, history=81,
           widths=(64, 128, 256, 512), lora=128, optimizer="adamw", lr=1e-4, recompute=True, t_mean=1.3, t_std=1.0,
           steps=50, guidance=5.0, shift=5.0)       # the sampler as in Wan's own
PRESETS = {
    "nano": Preset(DiTConfig(dim=256, ffn_dim=1024, heads=4, layers=5, text_dim=64, text_len=24),
                   "dct", ((64, 64),), fps=2, section=4, history=40, widths=(32, 64, 128, 256), rate="2x2x2"),
    "small": Preset(DiTConfig(dim=512, ffn_dim=2048, heads=8, layers=12, text_dim=64, text_len=24),
                    "dct", ((128, 224), (224, 128)), fps=8, section=8, history=160, widths=(64, 128, 256, 512)),
    "wan-1.3b": Preset(DiTConfig(dim=1536, ffn_dim=8960, heads=12, layers=30), **WAN),
    "wan-14b": Preset(DiTConfig(dim=5120, ffn_dim=13824, heads=40, layers=40), **WAN),
}


def get_preset(name):
    """The preset of this name."""
    if name not in PRESETS:
        raise UserError(f"--preset {name}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


# ---------------------------------------------------------------------------------------------------------------------
# Sizes and positions

def pad_replicate(x, multiples):
    """Pad (B, C, F, H, W) up to multiples (f, h, w) by replication: time at the front (only a causal codec's lone first
    latent needs it), space at the bottom and right."""
    f, h, w = (-size % m for size, m in zip(x.shape[2:], multiples))
    return F.pad(x, (0, w, 0, h, f, 0), mode="replicate") if f or h or w else x


def token_positions(frames, rows, columns):
    """Positions of the tokens of a video, ordered frame, row, column (column fastest).

    frames: (F,) or (B, F) times in latent frames; rows, columns: size of the token grid.
    Returns (..., F*rows*columns, 3).
    """
    frames = torch.as_tensor(frames, dtype=torch.float32)
    shape = (*frames.shape, rows, columns)
    return torch.stack([
        frames[..., None, None].expand(shape),
        torch.arange(rows, device=frames.device).float()[:, None].expand(shape),
        torch.arange(columns, device=frames.device).float().expand(shape),
    ], dim=-1).flatten(-4, -2)


def rope(positions, head_dim):
    """Rotations of 3D rotary embeddings, (cos, sin) in the last dimension of (B, N, 1, head_dim / 2, 2), for positions
    (B, N, 3).

    Of the head_dim channels, 2 * (head_dim // 6) belong to rows, as many to columns, the rest to time; each axis has
    its own frequencies 10000^(-2j / axis_dim).
    """
    spatial = 2 * (head_dim // 6)
    # float64 as in Wan (MPS has none): at frame 1000 a float32 angle is already off by 1e-4
    dtype = torch.float32 if positions.device.type == "mps" else torch.float64
    angles = []
    for axis, dim in enumerate((head_dim - 2 * spatial, spatial, spatial)):
        frequencies = 10000.0 ** (-torch.arange(0, dim, 2, device=positions.device, dtype=dtype) / dim)
        angles.append(positions[..., axis, None].to(dtype) * frequencies)
    angles = torch.cat(angles, dim=-1)[:, :, None]                              # (B, N, 1, head_dim / 2)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


def rotate(x, rotations):
    """Rotate the channel pairs (a, b) = (2j, 2j + 1) of x (B, N, heads, head_dim), float32, to (a cos - b sin,
    a sin + b cos), with rotations from rope(). Compiled, the result has all first halves of the pairs before all second
    ones: a product of two vectors so rotated is the same in any order of channels."""
    x = x.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():       # fuses this, but knows no complex numbers
        (a, b), (cos, sin) = x.unbind(-1), rotations.unbind(-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    # (a + ib)(cos + i sin): one kernel instead of seven
    return torch.view_as_real(torch.view_as_complex(x) * torch.view_as_complex(rotations)).flatten(-2)


def cast(x):
    """x in what autocast computes products in: once here, instead of in each linear layer that reads it."""
    kind = x.device.type            # the meta device, on which costs are counted, has no autocast
    return x.to(torch.get_autocast_dtype(kind)) if kind != "meta" and torch.is_autocast_enabled(kind) else x


PIECE = 2**21       # attention weights computed at once by attend(), on a CPU in bf16


def attend(q, k, v):
    """Softmax attention, (B, heads, N, head_dim) each. No mask, so that SDPA chooses its flash kernel on a GPU."""
    weights = q.shape[:3].numel() * k.shape[2]
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or weights > 2**28 and torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v)
    # SDPA's CPU kernel for bf16 has half the speed of products by hand, if these are of pieces so small that their
    # weights stay in the processor's cache. But the backward pass needs them all: where they are too many, SDPA
    by_hand = lambda q, k, v: ((q * q.shape[-1]**-0.5) @ k.mT).softmax(-1).type_as(v) @ v
    if torch.compiler.is_compiling():
        return by_hand(q, k, v)
    row = weights // len(q)                                                     # weights of one row of the batch
    n_rows, n_queries = max(1, PIECE // row), max(16, PIECE * q.shape[2] // row)
    return torch.cat([torch.cat([by_hand(x, k, v) for x in q.split(n_queries, dim=2)], dim=2)
                      for q, k, v in zip(*(z.contiguous().split(n_rows) for z in (q, k, v)))])


# ---------------------------------------------------------------------------------------------------------------------
# The transformer

class PatchEmbedding(nn.Module):
    """A convolution whose kernel is its stride, computed as one matrix product.
    Weight (D, C, *patch), as Wan's Conv3d."""

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


class RMSNorm(nn.Module):
    """Root-mean-square norm over all heads together, in float32."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps)


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys: over x itself, or over a context."""

    def __init__(self, dim, heads, eps):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)

    def forward(self, x, context=None, rotations=None):
        """x (B, N, D), context (B, L, D) or None for self-attention, rotations from rope() or None -> (B, N, D)."""
        x = cast(x)
        context = x if context is None else cast(context)
        split = lambda y: y.unflatten(-1, (self.heads, -1))                     # (B, N, D) -> (B, N, heads, head_dim)
        q, k, v = split(self.norm_q(self.q(x))), split(self.norm_k(self.k(context))), split(self.v(context))
        if rotations is not None:
            q, k = rotate(q, rotations), rotate(k, rotations)
        y = attend(*(z.type_as(v).transpose(1, 2) for z in (q, k, v)))          # float32 until here, as in Wan
        return self.o(y.transpose(1, 2).flatten(-2))                            # (B, N, D)


def modulate(x, shift, scale, sizes):
    """x (B, M + N, D) scaled and shifted by (B, P, D) each, one for each of its P parts of these sizes: the tokens of a
    part have one timestep, so that modulation is computed once for all. Returns what products are computed in."""
    parts = [cast(torch.addcmul(b, y, 1 + a)) for y, b, a in
             zip(x.split(sizes, dim=1), shift.split(1, dim=1), scale.split(1, dim=1))]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def add_gated(x, y, gate, sizes):
    """x + gate * y, with gate (B, P, D) as in modulate(). In float32, like the residual stream x."""
    parts = [torch.addcmul(a, b, g) for a, b, g in
             zip(x.split(sizes, dim=1), y.split(sizes, dim=1), gate.split(1, dim=1))]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


class Block(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward. Modulation by the timestep as in adaLN."""

    def __init__(self, c):
        super().__init__()
        self.dim, self.eps = c.dim, c.eps
        self.modulation = nn.Parameter(torch.randn(1, 6, c.dim) / c.dim**0.5)
        self.self_attn = Attention(c.dim, c.heads, c.eps)
        self.norm3 = nn.LayerNorm(c.dim, c.eps)
        self.cross_attn = Attention(c.dim, c.heads, c.eps)
        self.ffn = nn.Sequential(nn.Linear(c.dim, c.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(c.ffn_dim, c.dim))

    def forward(self, x, e, text, rotations, M):
        """x (B, M + N, D) in float32, e (B, 2, 6, D) modulation at t = 0 and at t, or without memory (B, 1, 6, D) at t,
        text (B, L, D), rotations from rope() -> like x."""
        sizes = [M, x.shape[1] - M] if M else [x.shape[1]]
        s1, c1, g1, s2, c2, g2 = (self.modulation[:, None].float() + e).unbind(2)       # (B, 1 or 2, D) each
        norm = lambda y: F.layer_norm(y, (self.dim,), eps=self.eps)
        x = add_gated(x, self.self_attn(modulate(norm(x), s1, c1, sizes), rotations=rotations), g1, sizes)
        x = x + self.cross_attn(self.norm3(x), context=text)
        return add_gated(x, self.ffn(modulate(norm(x), s2, c2, sizes)), g2, sizes)


class Head(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.dim, self.eps = c.dim, c.eps
        self.modulation = nn.Parameter(torch.randn(1, 2, c.dim) / c.dim**0.5)
        self.head = nn.Linear(c.dim, math.prod(c.patch) * c.out_dim)

    def forward(self, x, e):
        """x (B, N, D), e (B, D) timestep embedding -> (B, N, patch * C)."""
        shift, scale = (self.modulation.float() + e[:, None]).chunk(2, dim=1)   # (B, 1, D) each
        y = F.layer_norm(x, (self.dim,), eps=self.eps) * (1 + scale) + shift
        with torch.autocast(x.device.type, enabled=False):                      # in float32, as Wan's
            return F.linear(y.float(), self.head.weight.float(), self.head.bias.float())


class DiT(nn.Module):
    """Wan 2.1 text-to-video transformer, with memory.

    forward(x, t, text, frames=None, memory=None):
        x       (B, C, F, H, W) noisy latents; H and W even
        t       (B,) timesteps, 0..1000
        text    (B, L, text_dim) prompt embeddings, zero-padded to text_len here if shorter (padding is attended, as
                in Wan); all zeros for no prompt
        frames  (F,) or (B, F) times of the frames of x, in latent frames; default 0..F-1
        memory  None or (tokens (B, M, D), positions (M, 3) or (B, M, 3)): clean context, seen at t = 0
        returns the velocity ε - x_0, float32, shaped as x
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.patch_embedding = PatchEmbedding(c.in_dim, c.dim, c.patch)
        self.text_embedding = nn.Sequential(nn.Linear(c.text_dim, c.dim), nn.GELU(approximate="tanh"),
                                            nn.Linear(c.dim, c.dim))
        self.time_embedding = nn.Sequential(nn.Linear(c.freq_dim, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 6 * c.dim))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.head = Head(c)
        self.recompute = False      # set by training: activations are computed again in the backward pass
        self.init_weights()

    def init_weights(self):
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        for m in (*self.text_embedding, *self.time_embedding):
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    def embed_timesteps(self, t):
        """(B,) timesteps 0..1000 -> embedding (B, D) and modulation (B, 6, D),
        in float32 whatever the weights' dtype."""
        c = self.config
        with torch.autocast(t.device.type, enabled=False):
            dtype = torch.float32 if t.device.type == "mps" else torch.float64
            half = torch.arange(c.freq_dim // 2, device=t.device, dtype=dtype)
            angles = t.to(dtype)[:, None] * 10000.0 ** (-half / (c.freq_dim // 2))
            y = torch.cat([angles.cos(), angles.sin()], dim=-1).float()         # (B, freq_dim), cosines first
            linear = lambda m, y: F.linear(y, m.weight.float(), m.bias.float())
            e = linear(self.time_embedding[2], F.silu(linear(self.time_embedding[0], y)))
            return e, linear(self.time_projection[1], F.silu(e)).unflatten(-1, (6, -1))

    def forward(self, x, t, text, frames=None, memory=None):
        """See the class."""
        c = self.config
        B, _, n_frames, height, width = x.shape
        rows, columns = height // c.patch[1], width // c.patch[2]
        frames = torch.arange(n_frames, device=x.device) if frames is None else frames
        positions = token_positions(frames, rows, columns)
        positions = positions.expand(B, -1, -1)                                 # (B, N, 3)
        x = self.patch_embedding(x).float()                                     # (B, N, D)
        M, times = 0, [t]
        if memory is not None and memory[0].shape[1]:
            M, times = memory[0].shape[1], [t * 0, t]                           # memory is clean: t = 0
            x = torch.cat([memory[0].float(), x], dim=1)                        # (B, M + N, D)
            positions = torch.cat([memory[1].expand(B, -1, -1), positions], dim=1)
        rotations = rope(positions, c.dim // c.heads)
        embedding, modulation = self.embed_timesteps(torch.cat(times))
        modulation = torch.stack(modulation.chunk(len(times)), dim=1)           # (B, 1 or 2, 6, D)
        if text.shape[1] > c.text_len:
            raise ValueError(f"{text.shape[1]} text tokens; at most {c.text_len} are expected")
        text = self.text_embedding(F.pad(text, (0, 0, 0, c.text_len - text.shape[1])))
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, modulation, text, rotations, M, use_reentrant=False)
            else:
                x = block(x, modulation, text, rotations, M)
        x = self.head(x[:, M:], embedding[-B:]).float()                         # only the noisy tokens are read out
        # unlike the input, the output has channels last inside a patch
        return rearrange(x, "b (f h w) (pt ph pw c) -> b c (f pt) (h ph) (w pw)", h=rows, w=columns,
                         pt=c.patch[0], ph=c.patch[1], pw=c.patch[2])


# ---------------------------------------------------------------------------------------------------------------------
# LoRA


class LoRALinear(nn.Linear):
    """W x + b + B A x: a linear layer that stays as it is, plus a trained update of low rank (Hu et al. 2021).
    B starts at zero, so at first nothing changes."""

    def __init__(self, base, rank):
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.bias = base.weight, base.bias
        # drawn on the CPU: the same for every device, so on every process
        self.lora_A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, base.in_features), a=5**0.5)
                                   .to(base.bias.device))
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
    """Put make(m) in the place of every m in `module` that is of exactly this kind."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is kind:
                setattr(parent, name, make(child))


def add_lora(dit, rank):
    """Freeze the DiT; put an update of this rank beside every attention and feed-forward linear of its blocks."""
    dit.requires_grad_(False)
    replace_linears(dit.blocks, nn.Linear, lambda m: LoRALinear(m, rank))


@torch.no_grad()
def merge_lora(dit):
    """Add the updates to the weights: the same function without the extra products."""
    replace_linears(dit.blocks, LoRALinear, LoRALinear.merged)


# ---------------------------------------------------------------------------------------------------------------------
# Rectified flow

def sample_t(quantile, mean, std=1.0):
    """Noise levels in (0, 1), logit-normal: sigmoid of N(mean, std), at quantiles in (0, 1). A timestep shift s adds
    log(s) to the mean. Any shape -> the same."""
    return torch.sigmoid(mean + std * torch.special.ndtri(quantile))


def add_noise(x0, noise, t):
    """x_t = (1 - t) x_0 + t ε, with t (B,) broadcast over x0 (B, ...)."""
    t = t.view(-1, *[1] * (x0.ndim - 1)).to(x0)
    return (1 - t) * x0 + t * noise


def flow_loss(dit, x0, noise, t, text, frames, memory):
    """‖(ε - x_0) - G(x_t, t, c, φ)‖², the loss of both stages (paper, sections 3.1 and 3.2): a mean per sample, (B,).

    x0, noise (B, C, F, H, W): the queried frames of the history in stage 1, the next section in stage 2; t (B,) in
    [0, 1]; text, frames, memory as DiT.forward has them.
    """
    v = dit(add_noise(x0, noise, t), 1000 * t, text, frames, memory)
    return (noise - x0 - v).square().flatten(1).mean(1)


@torch.no_grad()
def euler(dit, noise, text, frames, memory, steps, shift=1.0, guidance=1.0):
    """Integrate dx = v dt from noise (t = 1) to data (t = 0) in `steps` Euler steps; with steps=1, shift is idle and
    the result is the conditional mean. Classifier-free guidance drops the prompt alone: memory stays in both passes.

    noise (B, C, F, H, W); text, frames, memory as DiT.forward has them. Returns x_0, shaped as noise.
    """
    t = torch.linspace(1, 0, steps + 1)
    t = shift * t / (1 + (shift - 1) * t)
    x = noise
    for now, then in zip(t[:-1], t[1:]):
        timestep = torch.full((len(x),), 1000 * float(now), device=x.device)
        v = dit(x, timestep, text, frames, memory)
        if guidance != 1:
            without = dit(x, timestep, torch.zeros_like(text), frames, memory)
            v = without + guidance * (v - without)
        x = x + float(then - now) * v
    return x
