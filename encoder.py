"""The memory encoder φ: a long history of latents in, a short sequence of DiT tokens out. Also MemoryDiT, what is
trained, and Memory, what grows while sampling.

Two branches over the same blocks of the history, summed (paper, section 3.3). A rate HxWxT says how many tokens of the
DiT's grid one memory token stands for:

    HR  `high`, latents (B, C, F, H, W) -> strided 3D convolutions, attention -> projection to the DiT's width D
    LR  `low`, the smaller video's latents -> a patch embedding of its own, initialised from the DiT's (start_from)

φ sees one segment at a time (segments are folded into the batch), so appending a section encodes only that section:
φ([H; X]) = [φ(H); φ(X)]. Letters as in model.py; t, h, w are the rate in time, rows and columns.
"""

import contextlib
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from model import Attention, DiT, PatchEmbedding, pad_replicate, rope, token_positions
from util.cli import UserError, load_object
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
    """Concatenate memories (tokens (B, M, D), positions (M, 3) or (B, M, 3)) into one."""
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
    may_skip_weights = True  # for DDP: some batches may not use patch_embedding
    has_window = False  # --window says how many frames it keeps
    reads_low = False  # forward() reads `low`

    def __init__(self, base, rate, window=1):
        super().__init__()
        self.rate, self.segment, self.causal = parse_rate(rate, base), base.section, base.codec.causal
        self.patch, self.window = base.dit.patch, window
        self.block = tuple(r * n for r, n in zip(self.rate, self.patch))  # latents per memory token (f, h, w)
        self.build(base)
        # φ's own copy of the DiT's patch embedding, for uncompressed frames: so memory does not depend on the DiT's own
        self.patch_embedding = PatchEmbedding(base.dit.in_dim, base.dit.dim, self.patch)

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
        Whole segments are compressed; any remaining frames stay uncompressed.
        """
        n = self.whole(high.shape[2], start)
        memories = [self.encode_whole(high[:, :, :n], low, start)] if n else []
        if n < high.shape[2]:
            frames = n + self.choose(high.shape[2] - n)
            memories.append(self.embed_frames(high[:, :, frames], start + frames))
        return join(memories)

    def encode_whole(self, high, low, start):
        """encode() of whole segments. Raises ValueError for anything else."""
        if self.whole(high.shape[2], start) != high.shape[2]:
            raise ValueError(f"{high.shape[2]} latents from {start} are not whole segments of {self.segment}")
        lone = self.lone(start)
        memories = [self.encode_segments(high[:, :, :lone], low[:, :, :lone], start, 1)] if lone else []
        if high.shape[2] > lone:
            memories.append(self.encode_segments(high[:, :, lone:], low[:, :, lone:], start + lone, self.segment))
        return join(memories)

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
        frames = torch.arange(f, device=self.patch_embedding.weight.device)  # nothing is copied from the host
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

    def choose(self, n_frames, most=None):
        """Indices of the uncompressed frames to keep, at most `most` if the method can drop frames.

        Incremental: choosing from the frames kept so far and the new ones equals choosing from all."""
        return torch.arange(n_frames)


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

    empty: create the DiT on the meta device; weights are loaded later.
    """

    def __init__(self, base, method="proposed", rate=None, window=1, empty=False):
        super().__init__()
        with torch.device("meta") if empty else contextlib.nullcontext():
            self.dit = DiT(base.dit)
        self.encoder = find_method(method)(base, rate or base.rate, window)

    def forward(self, high, low, x_t, t, text, times):
        """The velocity G(x_t, t, c, φ(H)), shaped like x_t (B, C, F', H, W), whose frames belong at `times` (B, F').

        high, low: the history, see MemoryEncoder.encode; t (B,) noise levels in [0, 1]; text (B, L, text_dim).
        """
        memory = self.encoder.encode(high, low)
        return self.dit(x_t, 1000 * t, text, times, memory)

    def saved_names(self):
        """The tensors of a checkpoint: all but those of a frozen base under a LoRA."""
        names = list(self.state_dict())
        lora = any(".lora_" in name for name in names)
        return [name for name in names if not (lora and name.startswith("dit.") and ".lora_" not in name)]


class Memory:
    """φ(H) of a growing history: append() encodes only new frames.

    most: keep at most this many of the newest whole segments (None: all). A causal codec's lone first latent stays
    until the first segment has to go.
    """

    def __init__(self, model, codec, most=None):
        self.encoder, self.codec, self.most = model.encoder, codec, most
        self.encode_low = self.encoder.low_rate and codec.low_encoder(self.encoder.rate)
        self.segments = []  # (tokens (B, m, D), positions, number of frames) of each segment kept
        self.waiting = None  # latents (B, C, F, H, W) of frames kept uncompressed
        self.pixels = None  # what they show, (B, 3, F', height, width)
        self.times = torch.arange(0)  # and their times (F,)
        self.frames = 0  # latent frames appended so far: the time of the next one

    @torch.no_grad()
    def append(self, latents, pixels):
        """Add latents (B, C, F, H, W), which show `pixels` (B, 3, F', height, width), to the end of the history."""
        encoder = self.encoder
        pixels = pixels if self.pixels is None else torch.cat([self.pixels, pixels], dim=2)
        times = torch.cat([self.times, self.frames + torch.arange(latents.shape[2])])
        self.frames += latents.shape[2]
        latents = latents if self.waiting is None else torch.cat([self.waiting, latents], dim=2)
        while encoder.whole(len(times), start := self.frames - len(times)):
            n = encoder.lone(start) or encoder.segment  # one segment at a time, to bound activation memory
            high = latents[:, :, :n]
            shown = 1 if encoder.lone(start) else n * self.codec.stride[0]  # frames
            low = self.encode_low(pixels[:, :, :shown]).to(high) if encoder.reads_low else high[:, :, :0]
            self.segments.append((*encoder.encode_whole(high, low, start), n))
            latents, times, pixels = latents[:, :, n:], times[n:], pixels[:, :, shown:]
        kept = encoder.choose(len(times), self.most and self.most * encoder.segment)
        self.waiting, self.times = latents[:, :, kept], times[kept]
        self.pixels = pixels if encoder.reads_low else None
        if self.most is not None:
            while sum(n for *_, n in self.segments) > self.most * encoder.segment + encoder.causal:
                del self.segments[0]

    @torch.no_grad()
    def context(self):
        """What the DiT reads: (tokens (B, M, D), positions (M, 3) or (B, M, 3)), or None if nothing is kept."""
        memories = [segment[:2] for segment in self.segments]
        if len(self.times):
            memories.append(self.encoder.embed_frames(self.waiting, self.times))
        return join(memories) if memories else None

    @property
    def uncompressed(self):
        """How many tokens the remembered frames would be without compression."""
        if self.waiting is None:
            return 0
        rows, columns = (-(-size // p) for size, p in zip(self.waiting.shape[3:], self.encoder.patch[1:]))
        return (sum(n for *_, n in self.segments) + len(self.times)) * rows * columns


def load_model(path, base, init="", device="cpu"):
    """The MemoryDiT of a checkpoint written by pretrain.py or finetune.py, in eval mode.

    base: of the checkpoint's preset. init: weights of the DiT that its LoRA belongs to, if it has one. Raises
    UserError.
    """
    config = read_config(path)
    try:
        model = MemoryDiT(base, config["method"], config["rate"], config["window"], empty=True)
    except KeyError as e:
        raise UserError(f"{path}: its config lacks {e}; train it again") from None
    if init and not config.get("lora"):
        raise UserError(f"--init {init} does nothing: {path} holds its own DiT; drop it")
    if config.get("lora"):
        if not init:
            raise UserError(f"{path} holds only a LoRA and a memory encoder: give the base DiT too, --init")
        base.load_dit(model.dit, init, device, frozen=True)
        base.add_lora(model.dit, config["lora"])
    load_weights(model, [path], names=model.saved_names(), device=device)
    return model.to(device).eval()
