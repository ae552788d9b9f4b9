"""The memory encoder φ: a long history of latents in, a short sequence of DiT tokens out.
And the DiT + φ that is trained.

Two branches over the same blocks of the history, summed (paper, section 3.3). A rate HxWxT says how many tokens of the
DiT's grid one memory token stands for:

    HR  latents (B, C, F, H, W) -> strided 3D convolutions, attention -> 1x1 projection to the DiT's width D
    LR  codec.downsample(latents, rate)            -> the DiT's own patch embedding (a trained copy of it)

φ sees one segment at a time (segments are folded into the batch), so a new section costs one section:
φ([H; X]) = [φ(H); φ(X)]. Letters as in model.py; M memory tokens; t, h, w the rate in time, rows and columns.
"""
import contextlib
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from model import (PRESETS, Attention, DiT, PatchEmbedding, UserError, add_lora, flow_loss, get_preset, load_base,
                   load_weights, pad_replicate, read_metadata, rope, token_positions)

METHODS = ("proposed", "only-lr", "without-lr", "none")


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
    width; a projection to D that never passes through the codec's channels.

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

    def forward(self, x):
        """One segment a row: (B, C, F, H, W), a multiple of the block -> (B, M, D)."""
        for conv in self.convs:
            x = F.silu(conv(F.pad(x, (1,) * 6, mode="replicate")))
        f, h, w = x.shape[2:]
        x = rearrange(x, "b c f h w -> b (f h w) c")
        head_dim = self.attention.o.in_features // self.attention.heads
        angles = rope(token_positions(torch.arange(f, device=x.device), h, w)[None], head_dim)
        x = x + self.attention(self.norm(x), angles=angles)
        return self.proj(self.norm_out(x))


class MemoryEncoder(nn.Module):
    """φ. forward(hr, lr, start=0) -> (tokens (B, M, D), positions (M, 3)).

    hr     (B, C, F, H, W) latents, whole segments (with a causal codec and start = 0: one latent, then whole segments)
    lr     codec.downsample(hr, rate)
    start  the first frame's place in time, in latent frames
    A token's position is the centre of its block on the DiT's token grid, at its true source time.
    """

    def __init__(self, method, rate, preset):
        super().__init__()
        p = PRESETS[preset]
        self.method, self.rate, self.segment, self.causal = method, parse_rate(rate), p.section, p.codec == "wan"
        self.patch = p.dit.patch
        if self.rate[0] > self.segment:
            raise UserError(f"--rate {rate}: time may be divided by at most {self.segment}, the frames of a segment")
        self.block = tuple(r * n for r, n in zip(self.rate, self.patch))
        if method in ("proposed", "without-lr"):
            self.hr = HighRes(p.dit.in_dim, p.widths, self.rate, p.dit.dim, self.patch)
        if method == "proposed":            # the LR branch carries the signal from the first step
            nn.init.zeros_(self.hr.proj.weight)
            nn.init.zeros_(self.hr.proj.bias)
        # φ's own copy of the DiT's patch embedding: φ means the same whatever DiT reads it later. Also embeds the
        # frames of an unfinished segment, which wait uncompressed.
        self.patch_embedding = PatchEmbedding(p.dit.in_dim, p.dit.dim, p.dit.patch)

    def start_from(self, dit):
        """Take over what φ begins with from the base DiT."""
        self.patch_embedding.load_state_dict(dit.patch_embedding.state_dict())

    def whole(self, n_frames, start=0):
        """How many of n_frames latents are whole segments."""
        lone = 1 if self.causal and start == 0 else 0
        return n_frames if n_frames < lone else lone + (n_frames - lone) // self.segment * self.segment

    def forward(self, hr, lr, start=0):
        """See the class. Raises ValueError if hr is not whole segments."""
        if self.whole(hr.shape[2], start) != hr.shape[2]:
            raise ValueError(f"{hr.shape[2]} latents from {start} are not whole segments of {self.segment}")
        lone = 1 if self.causal and start == 0 else 0
        parts = [self.encode_segments(hr[:, :, :lone], lr[:, :, :lone], 1)] if lone else []
        if hr.shape[2] > lone:
            parts.append(self.encode_segments(hr[:, :, lone:], lr[:, :, lone:], self.segment))
        t, h, w = self.rate
        times = torch.arange(hr.shape[2], device=hr.device)[lone:].float()
        times = times.view(-1 if hr.shape[2] > lone else 0, t).mean(1)
        times = start + torch.cat([times.new_zeros(lone), times])               # the lone latent stays at its own time
        rows, columns = (-(-size // b) for size, b in zip(hr.shape[3:], self.block[1:]))
        positions = token_positions(times, rows, columns)
        centre = positions.new_tensor([1, h, w]) * positions + positions.new_tensor([0, (h - 1) / 2, (w - 1) / 2])
        return torch.cat(parts, dim=1), centre

    def encode_segments(self, hr, lr, length):
        """Segments of `length` latents, folded into the batch: (B, C, F, H, W) -> (B, M, D)."""
        tokens = 0
        n = hr.shape[2] // length
        if self.method != "without-lr":
            tokens = self.patch_embedding(pad_replicate(lr, self.patch))        # (B, M, D)
        if self.method != "only-lr":
            folded = rearrange(hr, "b c (n f) h w -> (b n) c f h w", n=n)
            tokens = tokens + rearrange(self.hr(pad_replicate(folded, self.block)), "(b n) m d -> b (n m) d", n=n)
        return tokens

    def embed_frames(self, latents, start):
        """Uncompressed tokens of single frames: (B, C, F, H, W) -> (tokens (B, F*rows*columns, D), positions)."""
        latents = pad_replicate(latents, self.patch)
        times = start + torch.arange(latents.shape[2], device=latents.device)
        rows, columns = (size // p for size, p in zip(latents.shape[3:], self.patch[1:]))
        return self.patch_embedding(latents), token_positions(times, rows, columns)


class MemoryDiT(nn.Module):
    """What is trained: the DiT and the memory that it reads.

    empty: the DiT takes no memory yet (meta device), since weights will be loaded into it.
    """

    def __init__(self, preset, method="proposed", rate="4x4x2", empty=False):
        super().__init__()
        if method not in METHODS:
            raise UserError(f"--method {method}: choose one of {', '.join(METHODS)}")
        self.preset, self.method, self.rate = preset, method, rate
        with torch.device("meta") if empty else contextlib.nullcontext():
            self.dit = DiT(get_preset(preset).dit)
        self.encoder = None if method == "none" else MemoryEncoder(method, rate, preset)

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
            parts.append(self.encoder.embed_frames(hr[:, :, n:], start + n))
        return torch.cat([p[0] for p in parts], dim=1), torch.cat([p[1] for p in parts])

    def forward(self, hr, lr, target, frames, noise, t, text):
        """The loss of both stages, a mean per sample (B,): denoise `target` (B, C, F', H, W), which belongs at times
        `frames` (B, F') or (F',), given φ(hr)."""
        return flow_loss(self.dit, target, noise, t, text, frames, self.encode(hr, lr))


class Memory:
    """φ(H) of a growing history: append() encodes what is new and never what was encoded before.

    most: keep at most this many of the newest whole segments (None: all), and while it is young a causal codec's lone
    first latent. codec gives the low-resolution history.
    """

    def __init__(self, model, codec, most=None):
        self.model, self.codec, self.most = model, codec, most
        self.segments = []              # (tokens (1, m, D), positions (m, 3), frames) of each segment that is kept
        self.waiting = None             # latents of an unfinished segment, (1, C, F, H, W)
        self.frames = 0                 # latent frames appended so far: the time of the next one

    @torch.no_grad()
    def append(self, latents):
        """Add latents (1, C, F, H, W) to the end of the history."""
        encoder = self.model.encoder
        self.frames += latents.shape[2]
        if encoder is None:
            return
        latents = latents if self.waiting is None else torch.cat([self.waiting, latents], dim=2)
        start = self.frames - latents.shape[2]
        while encoder.whole(latents.shape[2], start):       # one segment at a time bounds what the convolutions need
            n = 1 if encoder.causal and start == 0 else encoder.segment
            hr = latents[:, :, :n]
            self.segments.append((*encoder(hr, self.codec.downsample(hr, encoder.rate), start), n))
            latents, start = latents[:, :, n:], start + n
        self.waiting = latents
        if self.most is not None:
            lone = self.segments[:1] if encoder.causal and len(self.segments) == self.most + 1 else []
            self.segments = lone + self.segments[-self.most:]

    @torch.no_grad()
    def context(self):
        """What the DiT reads: (tokens (1, M, D), positions (M, 3)), or None for a model without memory."""
        parts = [segment[:2] for segment in self.segments]
        if self.waiting is not None and self.waiting.shape[2]:
            parts.append(self.model.encoder.embed_frames(self.waiting, self.frames - self.waiting.shape[2]))
        if not parts:
            return None
        return torch.cat([p[0] for p in parts], dim=1), torch.cat([p[1] for p in parts])

    @property
    def uncompressed(self):
        """How many tokens the remembered frames would be without compression."""
        if self.waiting is None:
            return 0
        rows, columns = (-(-size // p) for size, p in zip(self.waiting.shape[3:], self.model.encoder.patch[1:]))
        return (sum(n for *_, n in self.segments) + self.waiting.shape[2]) * rows * columns


def load_model(path, base="", device=torch.device("cpu")):
    """(MemoryDiT, config) of a checkpoint written by pretrain.py or finetune.py. base: the weights of the DiT that its
    LoRA belongs to, if it has one."""
    config = read_metadata(path)
    try:
        model = MemoryDiT(config["preset"], config["method"], config["rate"], empty=True)
    except KeyError as e:
        raise UserError(f"{path}: its config has no usable {e}; train it again") from None
    if config.get("lora"):
        if not base:
            raise UserError(f"{path} holds a LoRA and a memory encoder alone: give the base DiT too, --init")
        load_base(model.dit, base, device, frozen=True)
        add_lora(model.dit, config["lora"])
    load_weights(model, [path], names=model.saved_names(), device=device)
    return model.to(device).eval(), config
