"""The memory encoder φ: a long history of latents in, a short sequence of DiT tokens out.
And the DiT + φ that is trained.

Two branches over the same blocks of the history, summed (paper, section 3.3). A rate HxWxT says how many tokens of the
DiT's grid one memory token stands for:

    HR  latents (B, C, F, H, W) -> strided 3D convolutions, attention -> projection to the DiT's width D; plus one
        linear map of the block
    LR  codec.downsample(latents, rate) -> a patch embedding of its own, begun from the DiT's (start_from)

φ sees one segment at a time (segments are folded into the batch), so a new section costs one section:
φ([H; X]) = [φ(H); φ(X)]. Letters as in model.py, but t, h, w are the rate in time, rows and columns.

What the paper compares it with goes through the same interface:

    only-lr, without-lr     one of the two branches
    large-patchifier        one linear map a block, the DiT's patchify made larger (FramePack)
    token-merging           the DiT's tokens, the most similar of a segment averaged (ToMe)
    full                    all of the DiT's tokens: the upper bound
    sliding-window          those of the newest frames alone
    keyframes               those of the first and the newest frame
    none                    no memory
"""
import contextlib
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat

from model import (PRESETS, Attention, DiT, PatchEmbedding, UserError, add_lora, flow_loss, get_preset, pad_replicate,
                   rope, token_positions)
from weights import load_base, load_weights, read_metadata

# these keep a few frames as they are and forget the rest: nothing to retrieve for stage 1
FRAME_METHODS = ("sliding-window", "keyframes")
# one token a block of the history; only the frames of an unfinished segment stay uncompressed
BLOCK_METHODS = ("proposed", "only-lr", "without-lr", "large-patchifier")
METHODS = (*BLOCK_METHODS, "token-merging", *FRAME_METHODS, "full", "none")


def parse_rate(text):
    """'4x4x2' (rows x columns x frames, as the paper writes it) -> (t, h, w) = (2, 4, 4)."""
    try:
        h, w, t = (int(n) for n in text.lower().split("x"))
    except ValueError:
        raise UserError(f"--rate {text}: expected HxWxT, as in 4x4x2") from None
    if any(n < 1 or n & (n - 1) for n in (h, w, t)):
        raise UserError(f"--rate {text}: each number must be a power of two")
    return t, h, w


class HighRes(nn.Module):
    """The HR branch: 3D convolutions + SiLU, striding time first, then space; attention inside the segment at the last
    width; a projection to D that never passes through the codec's channels. Around all that, one linear map of the
    block, as a ResNet has around its strided blocks: without it the branch is slow to train (EXPERIMENTS.md).

    A strided axis has kernel 4, stride 2, padding 1, any other one kernel 3: each output sits at its block's centre.
    """

    def __init__(self, in_dim, widths, rate, dim, patch):
        super().__init__()
        self.block = tuple(r * p for r, p in zip(rate, patch))                  # latents per memory token (f, h, w)
        in_time, *in_space = (int(math.log2(n)) for n in self.block)
        strides = [(2, 1, 1)] * in_time
        strides += [(1, *(2 if i < n else 1 for n in in_space)) for i in range(max(in_space))]
        strides += [(1, 1, 1)] * (len(widths) - len(strides))                   # fine rates: same depth
        widths = [in_dim, *widths, *[widths[-1]] * (len(strides) - len(widths))]
        self.convs = nn.ModuleList(
            nn.Conv3d(c_in, c_out, tuple(4 if s == 2 else 3 for s in stride), stride)
            for c_in, c_out, stride in zip(widths[:-1], widths[1:], strides))
        self.norm = nn.LayerNorm(widths[-1])
        self.attention = Attention(widths[-1], max(1, widths[-1] // 64), eps=1e-6)
        self.norm_out = nn.LayerNorm(widths[-1])
        self.proj = nn.Linear(widths[-1], dim)
        self.shortcut = PatchEmbedding(in_dim, dim, self.block)

    def forward(self, x):
        """One segment a row: (B, C, F, H, W), a multiple of the block -> (B, M, D)."""
        shortcut = self.shortcut(x)                                             # (B, M, D)
        for conv in self.convs:
            x = F.silu(conv(F.pad(x, (1,) * 6, mode="replicate")))
        f, h, w = x.shape[2:]
        x = rearrange(x, "b c f h w -> b (f h w) c")
        head_dim = self.attention.o.in_features // self.attention.heads
        rotations = rope(token_positions(torch.arange(f, device=x.device), h, w)[None], head_dim)
        x = x + self.attention(self.norm(x), rotations=rotations)
        return self.proj(self.norm_out(x)) + shortcut


def group_sums(x, groups, count):
    """Sums of the tokens x (B, N, D) of each group; groups (B, N) holds numbers below count -> (B, count, D)."""
    rows = groups + count * torch.arange(len(x), device=x.device)[:, None]
    sums = x.new_zeros(len(x) * count, x.shape[2]).index_add(0, rows.flatten(), x.flatten(0, 1))
    return sums.unflatten(0, (-1, count))


@torch.no_grad()
def bipartite_matching(x, count):
    """Which of `count` groups each token of x (B, N, D) joins, (B, N): bipartite soft matching of ToMe (Bolya et al.
    2023), by the cosine of the tokens themselves, in rounds.

    A round: every second token, or mean of a group, looks for the most similar of the others; the closest pairs merge,
    at most a quarter of what is left. (Half, the most that a round could merge, forces tokens together that are not
    alike.)
    """
    groups = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    sums, n = x, x.shape[1]                                         # of each group: their cosines are those of its mean
    while n > count:
        unit = F.normalize(sums, dim=-1)
        likeness, partner = (unit[:, ::2] @ unit[:, 1::2].mT).max(-1)           # (B, n / 2) each, rounded up
        merged = min(max(1, n // 4), n - count)
        goes = likeness.argsort(dim=1, descending=True, stable=True)[:, :merged]
        goes, partner = 2 * goes, 2 * partner.gather(1, goes) + 1   # numbers among all n
        stays = groups.new_ones(len(x), n).scatter(1, goes, 0)
        number = stays.cumsum(1) - 1                                # of each group after this round
        number = number.scatter(1, goes, number.gather(1, partner))
        groups, n = number.gather(1, groups), n - merged
        sums = group_sums(sums, number, n)
    return groups


def join(parts):
    """One memory of several (tokens (B, M, D), positions (M, 3) or (B, M, 3))."""
    tokens, positions = zip(*parts)
    if any(p.ndim == 3 for p in positions):
        positions = [p.expand(len(tokens[0]), -1, -1) for p in positions]
    return torch.cat(tokens, dim=1), torch.cat(positions, dim=-2)


class MemoryEncoder(nn.Module):
    """φ. forward(hr, lr, start=0) -> (tokens (B, M, D), positions (M, 3); of token-merging (B, M, 3)).

    hr     (B, C, F, H, W) latents, whole segments (with a causal codec and start = 0: one latent, then whole segments)
    lr     codec.downsample(hr, rate)
    start  the first frame's place in time, in latent frames
    A token's position is the centre of its block on the DiT's token grid, at its true source time.
    window: how many latent frames sliding-window keeps. The methods that keep frames have no segments: see choose().
    """

    def __init__(self, method, rate, preset, window=1):
        super().__init__()
        p = PRESETS[preset]
        self.method, self.rate, self.segment, self.causal = method, parse_rate(rate), p.section, p.codec == "wan"
        self.patch, self.window = p.dit.patch, window
        if self.rate[0] > self.segment:
            raise UserError(f"--rate {rate}: time may be divided by at most {self.segment}, the frames of a segment")
        self.block = tuple(r * n for r, n in zip(self.rate, self.patch))
        if method in ("proposed", "without-lr"):
            self.hr = HighRes(p.dit.in_dim, p.widths, self.rate, p.dit.dim, self.patch)
        if method == "proposed":            # the LR branch carries the signal from the first step
            for layer in (self.hr.proj, self.hr.shortcut):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
        if method == "large-patchifier":
            self.large_patch = PatchEmbedding(p.dit.in_dim, p.dit.dim, self.block)
        if method in ("proposed", "only-lr"):
            self.lr_embedding = PatchEmbedding(p.dit.in_dim, p.dit.dim, p.dit.patch)
        # φ's own copy of the DiT's patch embedding, for frames kept as they are, full and token-merging: φ means the
        # same whatever DiT reads it later
        self.patch_embedding = PatchEmbedding(p.dit.in_dim, p.dit.dim, p.dit.patch)

    @torch.no_grad()
    def start_from(self, dit, averages):
        """Take over what φ begins with from the base DiT. The large patchifier begins as the base's patchify of
        latents averaged over boxes of the rate, as FramePack's does. LR begins with the base's weights for the latent
        channels `averages`, those that mean the same at every scale (see the codecs), and with zeros elsewhere: the
        base would take the detail of a small picture for detail of its own scale."""
        self.patch_embedding.load_state_dict(dit.patch_embedding.state_dict())
        if self.method in ("proposed", "only-lr"):
            nn.init.zeros_(self.lr_embedding.weight)
            self.lr_embedding.weight[:, averages] = dit.patch_embedding.weight[:, averages]
            self.lr_embedding.bias.copy_(dit.patch_embedding.bias)
        if self.method == "large-patchifier":
            t, h, w = self.rate
            kernel = repeat(dit.patch_embedding.weight, "d c f i j -> d c (f t) (i h) (j w)", t=t, h=h, w=w)
            self.large_patch.weight.copy_(kernel / math.prod(self.rate))
            self.large_patch.bias.copy_(dit.patch_embedding.bias)

    def lone(self, start):
        """How many latents before the first segment stand alone: a causal codec's very first one."""
        return 1 if self.causal and start == 0 else 0

    def whole(self, n_frames, start=0):
        """How many of n_frames latents are whole segments."""
        if self.method in FRAME_METHODS:
            return 0
        lone = self.lone(start)
        return n_frames if n_frames < lone else lone + (n_frames - lone) // self.segment * self.segment

    def choose(self, n_frames, most=None):
        """Which of n_frames uncompressed frames stay in memory, in order: all, but of sliding-window the newest (at
        most `most`), of keyframes the first and the newest. Choosing from what was chosen before and the frames since
        then gives the same, so a growing history need keep no more."""
        frames = torch.arange(n_frames)
        if self.method == "sliding-window":
            return frames[-min(self.window, most or self.window):]
        return frames[[0, -1]] if self.method == "keyframes" and n_frames > 1 else frames

    def forward(self, hr, lr, start=0):
        """See the class. Raises ValueError if hr is not whole segments."""
        if self.whole(hr.shape[2], start) != hr.shape[2]:
            raise ValueError(f"{hr.shape[2]} latents from {start} are not whole segments of {self.segment}")
        lone = self.lone(start)
        parts = [self.encode_segments(hr[:, :, :lone], lr[:, :, :lone], start, 1)] if lone else []
        if hr.shape[2] > lone:
            parts.append(self.encode_segments(hr[:, :, lone:], lr[:, :, lone:], start + lone, self.segment))
        return join(parts)

    def encode_segments(self, hr, lr, start, length):
        """Segments of `length` latents, each alone: (B, C, F, H, W) -> (tokens (B, M, D), positions)."""
        if self.method == "full":
            return self.embed_frames(hr, start + torch.arange(hr.shape[2]))
        if self.method == "token-merging":
            return self.merge_segments(hr, start, length)
        tokens = 0
        if self.method in ("proposed", "only-lr"):
            tokens = self.lr_embedding(pad_replicate(lr, self.patch))           # (B, M, D)
        if self.method in ("proposed", "without-lr"):
            n = hr.shape[2] // length
            folded = rearrange(hr, "b c (n f) h w -> (b n) c f h w", n=n)
            tokens = tokens + rearrange(self.hr(pad_replicate(folded, self.block)), "(b n) m d -> b (n m) d", n=n)
        if self.method == "large-patchifier":
            tokens = self.large_patch(pad_replicate(hr, self.block))
        return tokens, self.block_centres(hr.shape[2:], start)

    def block_centres(self, size, start):
        """Positions (M, 3) of the centres of the blocks of `size` (F, H, W) latents."""
        t, h, w = self.rate
        t = min(t, size[0])                                         # a causal codec's lone latent keeps its own time
        f, rows, columns = (-(-n // b) for n, b in zip(size, (t, *self.block[1:])))
        positions = token_positions(torch.arange(f), rows, columns) * torch.tensor([t, h, w])
        positions = positions + torch.tensor([start + (t - 1) / 2, (h - 1) / 2, (w - 1) / 2])
        return positions.to(self.patch_embedding.weight.device)

    def merge_segments(self, hr, start, length):
        """As encode_segments(): as many tokens a segment as the rate gives, with positions (B, M, 3) because what is
        merged depends on the picture. A token's position is the mean of those it is made of."""
        n = hr.shape[2] // length
        count = len(self.block_centres((length, *hr.shape[3:]), start))
        tokens, positions = self.embed_frames(hr, start + torch.arange(hr.shape[2]))
        tokens = rearrange(tokens.float(), "b (n k) d -> (b n) k d", n=n)
        positions = repeat(positions, "(n k) c -> (b n) k c", n=n, b=len(hr))
        with torch.autocast(hr.device.type, enabled=False):         # bf16 similarities would tie
            groups = bipartite_matching(tokens, count)
        sizes = group_sums(torch.ones_like(tokens[..., :1]), groups, count)     # averages are weighted by size
        means = (group_sums(x, groups, count) / sizes for x in (tokens, positions))
        return tuple(rearrange(x, "(b n) m d -> b (n m) d", n=n) for x in means)

    def embed_frames(self, latents, times):
        """Uncompressed tokens of single frames: (B, C, F, H, W) that belong at times (F,) -> (tokens
        (B, F*rows*columns, D), positions (F*rows*columns, 3))."""
        latents = pad_replicate(latents, self.patch)
        rows, columns = (size // p for size, p in zip(latents.shape[3:], self.patch[1:]))
        return self.patch_embedding(latents), token_positions(times.to(latents.device), rows, columns)


class MemoryDiT(nn.Module):
    """What is trained: the DiT and the memory that it reads.

    rate: None for the preset's.
    empty: the DiT is not allocated yet (meta device), since weights will be loaded into it.
    """

    def __init__(self, preset, method="proposed", rate=None, window=1, empty=False):
        super().__init__()
        if method not in METHODS:
            raise UserError(f"--method {method}: choose one of {', '.join(METHODS)}")
        rate = get_preset(preset).rate if rate is None else rate
        self.preset, self.method, self.rate = preset, method, rate
        with torch.device("meta") if empty else contextlib.nullcontext():
            self.dit = DiT(get_preset(preset).dit)
        self.encoder = None if method == "none" else MemoryEncoder(method, rate, preset, window)

    def saved_names(self):
        """The tensors that a checkpoint holds: all, but for those of a frozen base under a LoRA."""
        names = list(self.state_dict())
        lora = any(".lora_" in name for name in names)
        return [name for name in names if not (lora and name.startswith("dit.") and ".lora_" not in name)]

    def encode(self, hr, lr, start=0):
        """φ of a history (B, C, F, H, W): its whole segments, which lr covers; an unfinished one stays uncompressed."""
        if self.encoder is None:
            return None
        n = self.encoder.whole(hr.shape[2], start)
        parts = [self.encoder(hr[:, :, :n], lr, start)] if n else []
        if n < hr.shape[2]:
            frames = n + self.encoder.choose(hr.shape[2] - n)
            parts.append(self.encoder.embed_frames(hr[:, :, frames], start + frames))
        return join(parts)

    def forward(self, hr, lr, target, frames, noise, t, text):
        """The loss of both stages, a mean per sample (B,): denoise `target` (B, C, F', H, W), which belongs at times
        `frames` (B, F') or (F',), given φ(hr)."""
        return flow_loss(self.dit, target, noise, t, text, frames, self.encode(hr, lr))


class Memory:
    """φ(H) of a growing history: append() encodes what is new and never what was encoded before.

    most: keep at most this many of the newest whole segments (None: all). A causal codec's lone first latent stays
    until the first segment has to go. codec gives the low-resolution history.
    The two pictures of --method keyframes stay whatever `most` is: the first is the point of that method. (sample.py
    appends the newest --memory_seconds of a clip alone, so the first is the first of those.)
    """

    def __init__(self, model, codec, most=None):
        self.model, self.codec, self.most = model, codec, most
        self.segments = []              # (tokens (B, m, D), positions, frames) of each segment that is kept
        self.waiting = None             # latents (B, C, F, H, W) of an unfinished segment, or of frames kept as such
        self.times = torch.arange(0)    # and their times (F,)
        self.frames = 0                 # latent frames appended so far: the time of the next one

    @torch.no_grad()
    def append(self, latents):
        """Add latents (B, C, F, H, W) to the end of the history."""
        encoder = self.model.encoder
        times = torch.cat([self.times, self.frames + torch.arange(latents.shape[2])])
        self.frames += latents.shape[2]
        if encoder is None:
            return
        latents = latents if self.waiting is None else torch.cat([self.waiting, latents], dim=2)
        while encoder.whole(len(times), start := self.frames - len(times)):
            n = encoder.lone(start) or encoder.segment              # one at a time: convolutions need memory
            hr = latents[:, :, :n]
            self.segments.append((*encoder(hr, self.codec.downsample(hr, encoder.rate), start), n))
            latents, times = latents[:, :, n:], times[n:]
        kept = encoder.choose(len(times), self.most and self.most * encoder.segment)
        self.waiting, self.times = latents[:, :, kept], times[kept]
        if self.most is not None:
            while sum(n for *_, n in self.segments) > self.most * encoder.segment + encoder.causal:
                del self.segments[0]

    @torch.no_grad()
    def context(self):
        """What the DiT reads: (tokens (B, M, D), positions (M, 3) or (B, M, 3)), or None for a model without memory."""
        parts = [segment[:2] for segment in self.segments]
        if len(self.times):
            parts.append(self.model.encoder.embed_frames(self.waiting, self.times))
        return join(parts) if parts else None

    @property
    def uncompressed(self):
        """How many tokens the remembered frames would be without compression."""
        if self.waiting is None:
            return 0
        rows, columns = (-(-size // p) for size, p in zip(self.waiting.shape[3:], self.model.encoder.patch[1:]))
        return (sum(n for *_, n in self.segments) + len(self.times)) * rows * columns


def load_model(path, base="", device=torch.device("cpu")):
    """(MemoryDiT, config) of a checkpoint written by pretrain.py or finetune.py. base: the weights of the DiT that its
    LoRA belongs to, if it has one."""
    config = read_metadata(path)
    try:
        model = MemoryDiT(config["preset"], config["method"], config["rate"], config["window"], empty=True)
    except KeyError as e:
        raise UserError(f"{path}: its config has no usable {e}; train it again") from None
    if base and not config.get("lora"):
        raise UserError(f"--init {base} does nothing: {path} holds its own DiT; drop it")
    if config.get("lora"):
        if not base:
            raise UserError(f"{path} holds a LoRA and a memory encoder alone: give the base DiT too, --init")
        load_base(model.dit, base, device, frozen=True)
        add_lora(model.dit, config["lora"])
    load_weights(model, [path], names=model.saved_names(), device=device)
    return model.to(device).eval(), config
