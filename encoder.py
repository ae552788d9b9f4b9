"""The memory encoder φ: a long history of latents in, a short sequence of DiT tokens out. Also MemoryDiT, what is
trained.

Two branches over the same blocks of the history, summed (paper, section 3.3). A rate HxWxT says how many tokens of the
DiT's grid one memory token stands for:

    HR  `high`, latents (B, C, F, H, W) -> strided 3D convolutions, attention -> projection to the DiT's width D
    LR  `low`, the smaller video's latents -> a patch embedding of its own, initialised from the DiT's (start_from)

φ sees one segment at a time (segments are folded into the batch), so appending a section encodes only that section:
φ([H; X]) = [φ(H); φ(X)]. Letters as in model.py; t, h, w are the rate in time, rows and columns.
"""

import contextlib
import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from model import Attention, PatchEmbedding, pad_replicate, rope, token_positions
from util.cli import UserError, check_numbers, load_object
from util.weights import load_weights, read_config

METHODS = {  # method -> its class; add new ones here
    "proposed": "encoder.Proposed",
    "only-lr": "encoder.OnlyLR",
    "without-lr": "encoder.WithoutLR",
    "large-patchifier": "bench.baselines.LargePatchifier",
    "token-merging": "bench.baselines.TokenMerging",
    "sliding-window": "bench.baselines.SlidingWindow",
    "keyframes": "bench.baselines.Keyframes",
    "full": "bench.baselines.Full",
    "none": "bench.baselines.NoMemory",
}


@dataclass
class MemoryConfig:
    """What a model's memory is. A checkpoint carries it."""

    method: str = "proposed"  # the kind of memory: a key of METHODS in encoder.py
    rate: str = None  # compression on the DiT's token grid, rows x columns x frames; A+B: two encoders [the preset's]
    window: int = 0  # stage 2: newest latent frames that memory also has uncompressed (sliding-window: has at all)
    anchor: bool = False  # stage 2: the first one too
    cross_attention: bool = False  # the DiT's blocks also read φ's tokens through cross-attention of their own
    cache_memory: bool = False  # memory sees its own segment alone, so its keys and values are computed only once

    def memory(self):
        """These fields of a config that has more."""
        return {field.name: getattr(self, field.name) for field in fields(MemoryConfig)}

    def check_memory(self, base):
        """Fill in the base's rate. Raises UserError."""
        rates = [parse_rate(rate, base) for rate in (self.rate or base.rate).split("+")]
        self.rate = "+".join(f"{h}x{w}x{t}" for t, h, w in rates)  # as checkpoints and tables name it
        method = find_method(self.method)
        most, words = (2, "two, joined by +") if "second_rate" in method.options else (1, "one")
        if len(rates) > most:
            raise UserError(f"--rate {self.rate}: --method {self.method} takes {words}; give fewer")
        check_numbers(self, "window", 0)
        self.window = max(self.window, method.least_window)
        if self.window > base.history:
            raise UserError(f"--window {self.window}: a history has {base.history} latent frames; give fewer")
        for key in ("window", "anchor", "cross_attention", "cache_memory"):
            if getattr(self, key) and (key not in method.options or key in base.lacks):
                raise UserError(f"--{key} does not work with --method {self.method} and --preset {base.name}: drop it")
        if self.cross_attention and self.cache_memory:
            raise UserError("--cross_attention reads tokens, which --cache_memory does not keep: drop one of the two")


def find_method(name):
    """The class of a method. Raises UserError."""
    if name not in METHODS:
        raise UserError(f"--method {name}: choose one of {', '.join(METHODS)}")
    return load_object(METHODS[name])


def parse_rate(text, base=None):
    """'4x4x2' (rows x columns x frames, as the paper writes it) -> (t, h, w) = (2, 4, 4). Raises UserError, also if a
    block is too large for `base`."""
    try:
        h, w, t = (int(n) for n in text.lower().split("x"))
    except ValueError:
        raise UserError(f"--rate {text}: expected HxWxT, as in 4x4x2") from None
    if any(n < 1 or n & (n - 1) for n in (h, w, t)):
        raise UserError(f"--rate {text}: each number must be a power of two")
    if base and t > base.section:
        raise UserError(f"--rate {text}: T may be at most {base.section}, the latents of a segment")
    grid = [n // (s * p) for n, s, p in zip(base.sizes[0], base.codec.stride[1:], base.dit.patch[1:])] if base else []
    if any(r > 2 * n for r, n in zip((h, w), grid)):  # frames are padded up to whole blocks
        raise UserError(f"--rate {text}: a block is more than twice a frame ({grid[0]}x{grid[1]} tokens)")
    return t, h, w


def join(memories):
    """Concatenate memories (tokens (B, M, D), positions (M, 3) or (B, M, 3)) into one; None if there are none."""
    if not memories:
        return None
    tokens, positions = zip(*memories)
    if any(p.ndim == 3 for p in positions):
        positions = [p.expand(len(tokens[0]), -1, -1) for p in positions]
    return torch.cat(tokens, dim=1), torch.cat(positions, dim=-2)


# ---------------------------------------------------------------------------------------------------------------------
# φ


class HighRes(nn.Module):
    """The HR branch: 3D convolutions + SiLU that stride time first, then space; attention within the segment at the
    last width; a projection straight to D, not via the codec's channels. A linear shortcut per block, as in a ResNet:
    without it the branch learns slowly (docs/experiments.md).

    A strided axis has kernel 4, stride 2, padding 1, every other axis kernel 3, so every output sits at its block's
    centre.
    """

    def __init__(self, in_dim, widths, block, dim):
        super().__init__()
        strides = self.strides(block, len(widths))
        widths = [in_dim, *widths, *[widths[-1]] * (len(strides) - len(widths))]
        self.convs = nn.ModuleList(
            nn.Conv3d(c_in, c_out, tuple(s + 2 for s in stride), stride, padding=1, padding_mode="replicate")
            for c_in, c_out, stride in zip(widths[:-1], widths[1:], strides)
        )
        self.norm = nn.LayerNorm(widths[-1])
        self.attention = Attention(widths[-1], max(1, widths[-1] // 64), eps=1e-6)
        self.norm_out = nn.LayerNorm(widths[-1])
        self.proj = nn.Linear(widths[-1], dim)
        self.shortcut = PatchEmbedding(in_dim, dim, block)

    @staticmethod
    def strides(block, depth):
        """Strides (f, h, w) of at least `depth` convolutions that together stride a block (f, h, w) of latents."""
        in_time, *in_space = (int(math.log2(n)) for n in block)
        strides = [(2, 1, 1)] * in_time
        strides += [(1, *(2 if i < n else 1 for n in in_space)) for i in range(max(in_space))]
        return strides + [(1, 1, 1)] * (depth - len(strides))  # fine rates are padded to the same depth

    def forward(self, x):
        """One segment per row: (B, C, F, H, W), a multiple of the block -> (B, M, D)."""
        shortcut = self.shortcut(x)  # (B, M, D)
        for conv in self.convs:
            x = F.silu(conv(x))
        f, h, w = x.shape[2:]
        x = rearrange(x, "b c f h w -> b (f h w) c")
        head_dim = self.attention.o.in_features // self.attention.heads
        rotations = rope(token_positions(torch.arange(f, device=x.device), h, w)[None], head_dim)
        x = x + self.attention(self.norm(x), rotations=rotations)
        return self.proj(self.norm_out(x)) + shortcut


class MemoryEncoder(nn.Module):
    """What all methods share: segments, positions, frames that stay uncompressed.

    encode() is φ. A method is a subclass: build() makes its layers, forward() turns single segments into tokens. Class
    attributes say what it needs:
    """

    has_stage1 = True  # it keeps something of every frame, which can be retrieved
    has_rate = True  # the rate decides how many tokens it has
    has_segments = True  # frames are compressed as soon as they are a whole segment
    may_skip_weights = True  # for DDP: some batches may not use patch_embedding
    reads_low = False  # forward() reads `low`
    least_window = 0  # of --window
    options = ("window", "anchor", "cross_attention", "cache_memory", "second_rate")  # of MemoryConfig, that make sense

    def __init__(self, base, rate, window=0, anchor=False):
        super().__init__()
        rate, *second = rate.split("+")
        self.rate, self.segment, self.causal = parse_rate(rate, base), base.section, base.codec.causal
        self.patch, self.window, self.anchor = base.dit.patch, window, anchor
        if window or anchor:
            self.may_skip_weights = False
        self.block = tuple(r * n for r, n in zip(self.rate, self.patch))  # latents per memory token (f, h, w)
        self.build(base)
        # φ's own copy of the DiT's patch embedding, for uncompressed frames: so memory does not depend on the DiT's own
        self.patch_embedding = PatchEmbedding(base.dit.in_dim, base.dit.dim, self.patch)
        # the second encoder of a rate A+B: its tokens lie beside the first's
        self.second = WithoutLR(base, *second) if second else None
        if second:
            self.second.patch_embedding = None  # uncompressed frames are there already

    def build(self, base):
        """Make the method's layers."""

    @property
    def low_rate(self):  # (t, h, w) of the `low` that forward() reads, or None
        return self.rate if self.reads_low else None

    @torch.no_grad()
    def start_from(self, dit):
        """Initialise from the base DiT."""
        self.patch_embedding.load_state_dict(dit.patch_embedding.state_dict())

    def forward(self, high, low):
        """One segment per row: high (B, C, F, H, W), low (B, C, F/t, H/h, W/w) -> tokens (B, M, D)."""
        raise NotImplementedError

    def encode(self, high, low, start=0):
        """φ of a history -> memory: (tokens (B, M, D), positions (M, 3) or (B, M, 3)), or None if it keeps nothing.

        high   (B, C, F, H, W) latents
        low    latents (B, C, f, h, w) of the smaller video, of its whole segments; unread by most methods
        start  time of the first frame, in latent frames
        Whole segments are compressed; the remaining frames, the window and the anchor are kept uncompressed.
        """
        return join([memory for memory, _ in self.parts(high, low, start)])

    def parts(self, high, low, start=0):
        """encode() in parts: [(memory, how many segments of equal length it consists of)]."""
        end, n = start + high.shape[2], self.whole(high.shape[2], start)
        parts = self.encode_whole(high[:, :, :n], low, start) if n else []
        times = torch.arange(start, end, device="cpu")
        kept = self.kept(times, start + n, end)
        if len(kept):
            parts.append((self.embed_frames(high[:, :, kept], times[kept]), 1))
        return parts

    def encode_whole(self, high, low, start):
        """parts() of whole segments. Raises ValueError for anything else."""
        if self.whole(high.shape[2], start) != high.shape[2]:
            raise ValueError(f"{high.shape[2]} latents from {start} are not whole segments of {self.segment}")
        lone, n = self.lone(start), high.shape[2] // self.segment
        parts = [(self.encode_segments(high[:, :, :lone], low[:, :, :lone], start, 1), 1)] if lone else []
        if n:
            rest = self.encode_segments(high[:, :, lone:], low[:, :, lone:], start + lone, self.segment)
            parts.append((rest, n))
        return parts + (self.second.encode_whole(high, low, start) if self.second else [])

    def encode_segments(self, high, low, start, length):
        """Segments of `length` latents, each alone: (B, C, F, H, W) -> (tokens (B, M, D), positions (M, 3))."""
        n = high.shape[2] // length
        fold = lambda x: rearrange(x, "b c (n f) h w -> (b n) c f h w", n=n)
        tokens = self(fold(high), fold(low))
        return rearrange(tokens, "(b n) m d -> b (n m) d", n=n), self.block_centres(high.shape[2:], start)

    def block_centres(self, size, start):
        """Centres (M, 3) of the blocks of (F, H, W) latents."""
        t, h, w = self.rate
        t = min(t, size[0])  # a causal codec's lone latent keeps its own time
        f, rows, columns = (-(-n // b) for n, b in zip(size, (t, *self.block[1:])))
        frames = torch.arange(f, device=next(self.parameters()).device)  # nothing is copied from the host
        axes = token_positions(frames, rows, columns).unbind(-1)
        return torch.stack([x * n + (n - 1) / 2 + first for x, n, first in zip(axes, (t, h, w), (start, 0, 0))], -1)

    def embed_frames(self, latents, times):
        """Uncompressed frames (B, C, F, H, W) at times (F,) -> (tokens (B, F*rows*columns, D), positions (M, 3))."""
        latents = pad_replicate(latents, self.patch)
        rows, columns = (size // p for size, p in zip(latents.shape[3:], self.patch[1:]))
        return self.patch_embedding(latents), token_positions(times.to(latents.device), rows, columns)

    def lone(self, start):
        """1 for a causal codec's first latent, which is encoded alone, else 0."""
        return 1 if self.causal and start == 0 else 0

    def whole(self, n_frames, start=0):
        """How many of the first n_frames latents form whole segments."""
        lone = self.lone(start)
        return n_frames if n_frames < lone else lone + (n_frames - lone) // self.segment * self.segment

    def kept(self, times, compressed, end, most=None):
        """Which of the frames at `times` (F,) stay uncompressed, as indices: those from the time `compressed` on, which
        wait for their segment to be whole; the newest `window`, at most `most`, before `end`; the anchor."""
        newest = times >= end - min(self.window, most or self.window)
        waiting, first = self.has_segments & (times >= compressed), self.anchor & (times == 0)
        return (waiting | newest | first).nonzero()[:, 0]


class Proposed(MemoryEncoder):
    """The paper's φ: HR + LR."""

    reads_low = True

    def build(self, base):
        self.hr = HighRes(base.dit.in_dim, base.widths, self.block, base.dit.dim)
        for layer in (self.hr.proj, self.hr.shortcut):  # HR starts at zero, so φ starts as its LR branch
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.lr_embedding = PatchEmbedding(base.dit.in_dim, base.dit.dim, self.patch)

    @torch.no_grad()
    def start_from(self, dit):
        """LR begins as the base's patch embedding, which reads the smaller video as any other."""
        super().start_from(dit)
        self.lr_embedding.load_state_dict(dit.patch_embedding.state_dict())

    def forward(self, high, low):
        return self.lr_embedding(pad_replicate(low, self.patch)) + self.hr(pad_replicate(high, self.block))


class OnlyLR(Proposed):
    """The LR branch alone."""

    def build(self, base):
        self.lr_embedding = PatchEmbedding(base.dit.in_dim, base.dit.dim, self.patch)

    def forward(self, high, low):
        return self.lr_embedding(pad_replicate(low, self.patch))


class WithoutLR(MemoryEncoder):
    """The HR branch alone."""

    def build(self, base):
        self.hr = HighRes(base.dit.in_dim, base.widths, self.block, base.dit.dim)

    def forward(self, high, low):
        return self.hr(pad_replicate(high, self.block))


# ---------------------------------------------------------------------------------------------------------------------
# The model


class MemoryDiT(nn.Module):
    """What is trained: the DiT and the memory encoder it reads.

    memory: a MemoryConfig, or some of its fields. empty: create the DiT on the meta device; weights are loaded later,
    and what is added to them.
    """

    def __init__(self, base, method="proposed", rate=None, empty=False, **memory):
        super().__init__()
        self.config = MemoryConfig(method, rate, **memory)
        self.config.check_memory(base)
        with torch.device("meta") if empty else contextlib.nullcontext():
            self.dit = base.make_dit()
        window = dict(window=self.config.window, anchor=self.config.anchor)
        self.encoder = find_method(method)(base, self.config.rate, **window)

    def forward(self, high, low, x_t, t, text, times):
        """The velocity G(x_t, t, c, φ(H)), shaped like x_t (B, C, F', H, W), whose frames belong at `times` (B, F').

        high, low: the history, see MemoryEncoder.encode; t (B,) noise levels in [0, 1]; text (B, L, text_dim).
        """
        return self.dit(x_t, 1000 * t, text, times, self.remember(high, low))

    def remember(self, high, low):
        """What the DiT reads of a history, see MemoryEncoder.encode."""
        return self.join([self.prepare(*part) for part in self.encoder.parts(high, low)])

    def prepare(self, memory, n=1):
        """What the DiT reads of a memory of n segments: its tokens, or their keys and values."""
        if not self.config.cache_memory:
            return memory
        tokens, positions = memory
        fold = lambda x: rearrange(x, "b (n m) d -> (b n) m d", n=n)
        cached = self.dit.cache_memory(fold(tokens), fold(positions.expand(len(tokens), -1, -1)))
        return [[rearrange(x, "(b n) a m d -> b a (n m) d", n=n) for x in keys_values] for keys_values in cached]

    def join(self, memories):
        """Concatenate what prepare() returned."""
        if not self.config.cache_memory or not memories:
            return join(memories)
        return [[torch.cat(x, dim=2) for x in zip(*keys_values)] for keys_values in zip(*memories)]

    def count(self, memory):
        """How many tokens there are in what prepare() or join() returned."""
        return 0 if memory is None else memory[0][0].shape[2] if self.config.cache_memory else memory[0].shape[1]

    def saved_names(self):
        """The tensors of a checkpoint: all but those of a frozen base under a LoRA."""
        names = list(self.state_dict())
        lora = any(".lora_" in name for name in names)
        ours = (".lora_", "memory") if lora else ("",)
        return [name for name in names if not name.startswith("dit.") or any(part in name for part in ours)]


def load_model(path, base, init="", device="cpu"):
    """The MemoryDiT of a checkpoint written by pretrain.py or finetune.py, in eval mode.

    base: of the checkpoint's preset. init: weights of the DiT that its LoRA belongs to, if it has one. Raises
    UserError.
    """
    config = read_config(path)
    base.check_codec(path, config)
    model = MemoryDiT(base, **{f.name: config[f.name] for f in fields(MemoryConfig)}, empty=True)
    if init and not config.get("lora"):
        raise UserError(f"--init {init} does nothing: {path} holds its own DiT; drop it")
    if config.get("lora"):
        if not init:
            raise UserError(f"{path} holds only a LoRA and a memory encoder: give the base DiT too, --init")
        base.load_dit(model.dit, base.expert_weights(init, config.get("expert")), device, frozen=True)
        base.add_lora(model.dit, config["lora"])
    if model.config.cross_attention:
        model.dit.add_cross_attention()
    load_weights(model, [path], names=model.saved_names(), device=device)
    return model.to(device).eval()
