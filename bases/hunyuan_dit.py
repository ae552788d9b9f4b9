"""HunyuanVideo's text-to-video transformer, 13B, with memory.

Architecture and parameter names are exactly those of Tencent's model, so its weights load strictly. Double blocks have
weights of their own for video and text, single blocks share them; both attend over video and text together.
A prompt is one tensor (L, text_dim), as for any base: row 0 is the pooled vector (CLIP), zero-padded; then a row per
token (LLaVA). Rows of zeros are padding, which nothing reads; a prompt of zeros alone is none. Letters as in model.py.
"""

import functools
import math
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint

from model import PatchEmbedding, add_gated, modulate, rope, rotate, token_positions
from util.attention import attention


@dataclass
class HunyuanConfig:
    dim: int = 3072  # D, width
    ffn_dim: int = 12288  # hidden width of the feed-forward layers
    heads: int = 24
    layers: int = 20  # double blocks
    single_layers: int = None  # single blocks [twice as many]
    in_dim: int = 16  # latent channels
    out_dim: int = 16
    text_dim: int = 4096  # width of a prompt's rows
    text_len: int = 257  # rows of a prompt, the pooled vector first
    pooled_dim: int = 768  # numbers of the pooled vector
    guided: bool = True  # takes guidance as an input, as the released weights do
    freq_dim: int = 256  # width of the sinusoidal embeddings of timestep and guidance
    patch: tuple = (1, 2, 2)  # latent frames, rows, columns per token
    eps: float = 1e-6
    theta: float = 256.0  # of RoPE
    axes: tuple = None  # channels of a head for time, rows, columns [an eighth, the rest in halves: 16, 56, 56]

    def __post_init__(self):
        self.pooled_dim = min(self.pooled_dim, self.text_dim)  # a row of the prompt holds it

    @property
    def singles(self):
        return 2 * self.layers if self.single_layers is None else self.single_layers

    @property
    def rope_axes(self):
        d = self.dim // self.heads
        spatial = 2 * (7 * d // 32)
        return self.axes or (d - 2 * spatial, spatial, spatial)


# ---------------------------------------------------------------------------------------------------------------------
# Parts


class ModulationLinear(nn.Linear):
    """Reads one vector per sample and level, no tokens; a LoRA leaves it alone. Starts at zero."""

    def reset_parameters(self):
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


def two_layers(in_dim, hidden, out_dim, names=("0", "1", "2"), activation=None):
    """Linear, activation (SiLU), Linear under these names."""
    layers = nn.Linear(in_dim, hidden), activation or nn.SiLU(), nn.Linear(hidden, out_dim)
    return nn.Sequential(OrderedDict(zip(names, layers)))


def embedder(c):
    return nn.Sequential(OrderedDict(mlp=two_layers(c.freq_dim, c.dim, c.dim)))


def modulation(dim, n):
    return nn.Sequential(OrderedDict(act=nn.SiLU(), linear=ModulationLinear(dim, n * dim)))


def vectors(module, e, n):
    """The n vectors (B, P, D) that a modulation makes of e (B, P, D), float32."""
    return module(e).float().unflatten(-1, (n, -1)).unbind(2)


def normalise(x, eps):
    """LayerNorm without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


@functools.cache
def frequencies(n):
    """10000^(-i/n), i = 0..n-1, (n,) on the CPU, from float32 exponents as the original's. The exponential is rounded
    once: its last bit, which else depends on the processor, shows at a guidance of 6016."""
    exponents = -math.log(10000) * torch.arange(n, dtype=torch.float32, device="cpu") / n
    return exponents.double().exp().float()


def sinusoid(x, dim):
    """(B,) numbers -> (B, dim), cosines first. The angles are float32, not float64 as Wan's."""
    angles = x.float()[:, None] * frequencies(dim // 2).to(x.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def guidance_input(scale):
    """What the guidance embedding sees of a scale: 1000 times it in bf16, as officially. So 6 is 6016, not 6000."""
    return (1000 * scale.bfloat16()).float()


def text_time(times):
    """When text is, for RoPE: at the first of the noisy frames' times (F,) or (B, F) -> (1, 1, 1) or (B, 1, 1).

    Text is not rotated: to what attends to it, it is at frame 0. These weights know 33 latents after that, not hours.
    """
    return times.float().amin(-1).reshape(-1, 1, 1)


def split_heads(y, heads, norm_q=None, norm_k=None):
    """q, k, v of a fused product y (B, N, 3 D), each (B, N, heads, head_dim); norms: RMS over each head."""
    q, k, v = y.unflatten(-1, (3, heads, -1)).unbind(2)
    return (q, k, v) if norm_q is None else (norm_q(q.float()), norm_k(k.float()), v)


def attend(q, k, v, mask, rotations=None):
    """Attention of q, k, v (B, N, heads, head_dim), rotated first -> (B, N, D). mask: see attention()."""
    if rotations is not None:
        q, k = (rotate(x, rotations).type_as(v) for x in (q, k))
    return attention(*(x.transpose(1, 2) for x in (q, k, v)), mask).transpose(1, 2).flatten(-2)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks. x (B, M + N + L, D), float32: memory, noisy and text tokens; sizes: (M, N, L). e (B, 2, D): what modulates,
# at t = 0 for memory and at t for all others; (B, 1, D) if M is 0. rotations from rope(); mask: see attention().


class DoubleBlock(nn.Module):
    """Attention over video and text together; all else is apart, with weights of its own for either."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.eps, D = c.heads, c.eps, c.dim
        for kind in ("img", "txt"):
            parts = dict(mod=modulation(D, 6), attn_qkv=nn.Linear(D, 3 * D), attn_proj=nn.Linear(D, D))
            parts |= {f"attn_{x}_norm": nn.RMSNorm(D // c.heads, c.eps) for x in "qk"}
            parts["mlp"] = two_layers(D, c.ffn_dim, D, ("fc1", "act", "fc2"), nn.GELU(approximate="tanh"))
            for name, part in parts.items():
                self.add_module(f"{kind}_{name}", part)

    def forward(self, x, e, rotations, sizes, mask):
        M, N, L = sizes
        img, txt = x.split([M + N, L], dim=1)
        parts = [M, N] if M else [N]
        qkv, rest = self.before("img", img, e, parts)
        txt_qkv, txt_rest = self.before("txt", txt, e[:, -1:], [L])
        y = attend(*(torch.cat(pair, dim=1) for pair in zip(qkv, txt_qkv)), mask, rotations)
        img = self.after("img", img, y[:, : M + N], rest, parts)
        return torch.cat([img, self.after("txt", txt, y[:, M + N :], txt_rest, [L])], dim=1)

    def before(self, kind, x, e, parts):
        """(q, k, v) of one kind of tokens, and the vectors that after() takes."""
        its = lambda name: self.get_submodule(f"{kind}_{name}")
        shift, scale, *rest = vectors(its("mod"), e, 6)
        y = its("attn_qkv")(modulate(normalise(x, self.eps), shift, scale, parts))
        return split_heads(y, self.heads, its("attn_q_norm"), its("attn_k_norm")), rest

    def after(self, kind, x, y, rest, parts):
        """x with what attention read, y, and then the feed-forward's output added."""
        gate1, shift2, scale2, gate2 = rest
        x = add_gated(x, self.get_submodule(f"{kind}_attn_proj")(y), gate1, parts)
        y = modulate(normalise(x, self.eps), shift2, scale2, parts)
        return add_gated(x, self.get_submodule(f"{kind}_mlp")(y), gate2, parts)


class SingleBlock(nn.Module):
    """Attention and feed-forward side by side, with the same weights for video and text."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.eps, D = c.heads, c.eps, c.dim
        self.widths = 3 * D, c.ffn_dim
        self.linear1 = nn.Linear(D, sum(self.widths))
        self.linear2 = nn.Linear(D + c.ffn_dim, D)
        self.q_norm, self.k_norm = (nn.RMSNorm(D // c.heads, c.eps) for _ in "qk")
        self.modulation = modulation(D, 3)

    def forward(self, x, e, rotations, sizes, mask):
        M, N, L = sizes
        parts, (shift, scale, gate) = [M, N + L] if M else [N + L], vectors(self.modulation, e, 3)
        y = self.linear1(modulate(normalise(x, self.eps), shift, scale, parts))
        qkv, hidden = y.split(self.widths, dim=-1)
        y = attend(*split_heads(qkv, self.heads, self.q_norm, self.k_norm), mask, rotations)
        return add_gated(x, self.linear2(torch.cat([y, F.gelu(hidden, approximate="tanh")], dim=-1)), gate, parts)


class RefinerBlock(nn.Module):
    """A block of the token refiner: text alone, gates alone."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        self.norm1, self.norm2 = (nn.LayerNorm(c.dim, c.eps) for _ in range(2))
        self.self_attn_qkv, self.self_attn_proj = nn.Linear(c.dim, 3 * c.dim), nn.Linear(c.dim, c.dim)
        self.mlp = two_layers(c.dim, 4 * c.dim, c.dim, ("fc1", "act", "fc2"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ModulationLinear(c.dim, 2 * c.dim))

    def forward(self, x, e, mask):
        """x (B, L, D), e (B, 1, D) -> like x."""
        gate1, gate2 = vectors(self.adaLN_modulation, e, 2)
        y = attend(*split_heads(self.self_attn_qkv(self.norm1(x)), self.heads), mask)
        x = add_gated(x, self.self_attn_proj(y), gate1, [x.shape[1]])
        return add_gated(x, self.mlp(self.norm2(x)), gate2, [x.shape[1]])


class TokenRefiner(nn.Module):
    """From a prompt's rows to text tokens. It sees the timestep, but not the guidance."""

    def __init__(self, c):
        super().__init__()
        self.freq_dim = c.freq_dim
        self.input_embedder = nn.Linear(c.text_dim, c.dim)
        self.t_embedder = embedder(c)
        self.c_embedder = two_layers(c.text_dim, c.dim, c.dim, ("linear_1", "act", "linear_2"))
        blocks = nn.ModuleList(RefinerBlock(c) for _ in range(2))
        self.individual_token_refiner = nn.ModuleDict(dict(blocks=blocks))

    def forward(self, text, t, valid):
        """text (B, L, text_dim) at timesteps t (B,) -> (B, L, D); valid (B, L): which rows are no padding."""
        mean = (text * valid[..., None]).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)
        with torch.autocast(text.device.type, enabled=False):
            e = (self.t_embedder(sinusoid(t, self.freq_dim)) + self.c_embedder(mean.float()))[:, None]
        keys = valid | (torch.arange(valid.shape[1], device=valid.device) == 0)  # with none, padding would become NaN
        x = self.input_embedder(text).float()
        for block in self.individual_token_refiner["blocks"]:
            x = block(x, e, keys[:, None, None])
        return x


class FinalLayer(nn.Module):
    """The modulated norm and the projection to patches, in float32."""

    def __init__(self, c):
        super().__init__()
        self.eps = c.eps
        self.linear = ModulationLinear(c.dim, math.prod(c.patch) * c.out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ModulationLinear(c.dim, 2 * c.dim))

    def forward(self, x, e):
        """x (B, N, D), e (B, 1, D) -> (B, N, C * pt * ph * pw)."""
        with torch.autocast(x.device.type, enabled=False):
            shift, scale = vectors(self.adaLN_modulation, e, 2)
            return self.linear(normalise(x, self.eps) * (1 + scale) + shift)


# ---------------------------------------------------------------------------------------------------------------------
# The whole


class HunyuanDiT(nn.Module):
    """HunyuanVideo's text-to-video transformer, with memory; used as model.DiT is."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.img_in = nn.ModuleDict(dict(proj=PatchEmbedding(c.in_dim, c.dim, c.patch)))
        self.txt_in = TokenRefiner(c)
        self.time_in = embedder(c)
        self.vector_in = two_layers(c.pooled_dim, c.dim, c.dim, ("in_layer", "act", "out_layer"))
        self.guidance_in = embedder(c) if c.guided else None
        self.double_blocks = nn.ModuleList(DoubleBlock(c) for _ in range(c.layers))
        self.single_blocks = nn.ModuleList(SingleBlock(c) for _ in range(c.singles))
        self.final_layer = FinalLayer(c)
        self.recompute = False  # activation checkpointing, set for training

    @property
    def patch_embedding(self):
        return self.img_in["proj"]

    @property
    def blocks(self):
        return nn.ModuleList([*self.double_blocks, *self.single_blocks])

    def take_guidance(self, g):
        """(this DiT with a sample.Guidance as its input, what is left to a second pass): all or nothing. A negative
        prompt and CFG-Zero* need that pass; the input is then 1, as in training."""
        if not self.config.guided or g.scale == 1 or g.zero_star or (g.negative is not None and g.negative.any()):
            return self, g

        def guided(x, t, *args):
            inside = g.interval[0] <= t[0].item() / 1000 <= g.interval[1]
            return self(x, t, *args, guidance=g.scale if inside else 1.0)

        return guided, replace(g, scale=1.0)

    def embed_vector(self, t, pooled, guidance):
        """Timesteps (B,), pooled prompts (B, pooled_dim), scale of guidance -> (B, D) float32."""
        n = self.config.freq_dim
        with torch.autocast(t.device.type, enabled=False):
            e = self.time_in(sinusoid(t, n)) + self.vector_in(pooled.float())
            if self.guidance_in is not None:
                scale = torch.as_tensor(guidance, dtype=torch.float32, device=t.device).expand(len(t))
                e = e + self.guidance_in(sinusoid(guidance_input(scale), n))
        return e

    def split_prompt(self, text):
        """(B, L, text_dim) -> pooled (B, pooled_dim), tokens (B, l, text_dim) without the padding that all samples
        have, which of them are no padding (B, l)."""
        pooled, tokens = text[:, 0, : self.config.pooled_dim], text[:, 1:]
        valid = tokens.ne(0).any(-1)
        if not text.is_meta:  # on which FLOPs are counted
            longest = int(valid.any(0).nonzero().max()) + 1 if valid.any() else 0
            tokens, valid = tokens[:, :longest], valid[:, :longest]
        return pooled, tokens, valid

    def forward(self, x, t, text, times=None, memory=None, guidance=1.0):
        """The velocity ε - x_0, float32, shaped like x. Arguments as in model.DiT.forward, and

        text      (B, L, text_dim) prompts: the pooled vector, then tokens; zeros are padding
        guidance  scale, or (B,) of them: how much the prompt is amplified. 1 is not at all, as training data are
        """
        c = self.config
        B, _, n_frames, height, width = x.shape
        rows, columns = height // c.patch[1], width // c.patch[2]
        times = torch.arange(n_frames, device=x.device) if times is None else torch.as_tensor(times)
        places = [token_positions(times, rows, columns).expand(B, -1, -1)]  # (B, N, 3)
        parts, levels = [self.patch_embedding(x).float()], [t]
        if memory is not None and memory[0].shape[1]:
            parts, levels = [memory[0].float(), *parts], [torch.zeros_like(t), t]
            places = [memory[1].expand(B, -1, -1), *places]
        pooled, tokens, valid = self.split_prompt(text)
        parts.append(self.txt_in(tokens, t, valid))
        places = torch.cat(places, dim=1) - F.pad(text_time(times), (0, 2))  # (B, M + N, 3)
        places = F.pad(places, (0, 0, 0, tokens.shape[1]))  # at 0, where nothing is rotated
        M, N, L = sizes = [0] * (3 - len(parts)) + [part.shape[1] for part in parts]
        # Memory has the guidance of all other tokens. HunyuanVideo-I2V's clean frame has none, but these weights never
        # saw a vector without it
        e = torch.stack([self.embed_vector(level, pooled, guidance) for level in levels], dim=1)  # (B, 1 or 2, D)
        rotations = rope(places, c.dim // c.heads, c.rope_axes, c.theta)
        all_valid = text.is_meta or valid.all()  # then no mask, see attention()
        mask = None if all_valid else F.pad(valid, (M + N, 0), value=True)[:, None, None]
        x = torch.cat(parts, dim=1)  # (B, M + N + L, D)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, e, rotations, sizes, mask, use_reentrant=False)
            else:
                x = block(x, e, rotations, sizes, mask)
        x = self.final_layer(x[:, M : M + N], e[:, -1:])  # only the noisy tokens are read out
        patch = dict(zip(("pt", "ph", "pw"), c.patch), h=rows, w=columns)
        return rearrange(x, "b (f h w) (c pt ph pw) -> b c (f pt) (h ph) (w pw)", **patch)
