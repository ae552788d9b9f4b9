"""HunyuanVideo T2V, 13B: preset and video VAE, from a local folder through diffusers. (DiT: hunyuan_dit.py; names:
hunyuan_names.py; prompts: llava.py.)

Pixels are (B, 3, F, H, W) floats in [-1, 1], F = 1 + 4k; latents (B, 16, 1 + k, H/8, W/8), the first of one frame.
"""

import copy

import torch

from bases.base import Base, CausalCodec
from bases.hunyuan_dit import DoubleBlock, HunyuanConfig, HunyuanDiT, RefinerBlock, SingleBlock
from bases.hunyuan_names import hunyuan_name
from bases.llava import LlavaPrompts
from bases.pretrained import fingerprint, from_pretrained, subfolder
from bases.umt5 import NoPrompts
from util.cli import UserError

PRESETS = {
    "hunyuan": dict(
        dit=HunyuanConfig(),
        sizes=((480, 832), (832, 480), (544, 960), (960, 544)),
        fps=24,
        section=8,
        history=121,
        widths=(64, 128, 256, 512),
        lora=128,
        optimizer="adamw",
        lr=1e-4,
        recompute=True,
        t_mean=1.95,  # as Tencent trains LoRAs: a shift of 7 adds log(7)
        t_std=1.0,
        steps=50,  # the sampler as in Tencent's own code
        guidance=6.0,
        passes=1,
        shift=7.0,
        needs_cache=True,
    )
}
SCALE = 0.476986  # of the VAE's latents


class HunyuanBase(Base):
    """What differs from a base with Wan's architecture."""

    rename = staticmethod(hunyuan_name)
    architecture, blocks = HunyuanDiT, (DoubleBlock, SingleBlock, RefinerBlock)
    lacks = ("cross_attention", "cache_memory")


def open_base(name, vae="", t5="", device="cpu"):
    """The Base hunyuan. t5: the folder of its two text encoders."""
    preset = PRESETS[name]
    c = preset["dit"]
    if t5:
        prompts = LlavaPrompts(t5, c.text_dim, c.text_len, c.pooled_dim, device)
    else:
        prompts = NoPrompts(c.text_dim, c.text_len, "HunyuanVideo need its text encoders")
    return HunyuanBase(name=name, codec=HunyuanCodec(vae, device), prompts=prompts, **preset)


def open_vae(folder, dtype):
    """(diffusers' AutoencoderKLHunyuanVideo, its folder) from a local folder; random weights for "random"."""
    try:
        from diffusers import AutoencoderKLHunyuanVideo
    except ImportError:
        raise UserError("HunyuanVideo's VAE needs the package diffusers: pip install diffusers") from None
    if folder == "random":
        return AutoencoderKLHunyuanVideo().to(dtype), None
    path = subfolder(folder, "vae", "--vae")
    vae = from_pretrained(AutoencoderKLHunyuanVideo, path, f"--vae {folder}", dtype)
    c = vae.config
    found = c.latent_channels, c.temporal_compression_ratio, c.spatial_compression_ratio, c.scaling_factor
    if found != (HunyuanCodec.channels, *HunyuanCodec.stride[:2], SCALE):
        raise UserError(
            f"--vae {folder} is another VAE ({found[0]} channels, {found[1]}x{found[2]} pixels per latent, scale "
            f"{found[3]:g}) than HunyuanVideo's, whose latents the DiT knows: give that one"
        )
    return vae, path


class HunyuanCodec(CausalCodec):
    """HunyuanVideo's VAE, in blocks. Its norms look at all frames they are given, so what comes later would change what
    went before. So a video is cut: its first frame alone, then blocks of a few latents, each seen with the last two
    latents before it (the first of them as a single frame), as diffusers cuts it. Whole sections are whole blocks, so
    appending one changes nothing. Without a folder, only what needs no weights works."""

    channels, stride, large = 16, (4, 8, 8), True
    block, lookback = 4, 2  # latents
    # float16, traced by a test: bytes of the weights; per pixel of a frame, what the decoder carries from one block to
    # the next, and the most that decoding needs
    weight_bytes, carried_per_pixel, decoding_per_pixel = 492_957_606, 20, 48_600

    def __init__(self, folder="", device="cpu"):
        self.device = torch.device(device)
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32  # float16 as in Tencent's own code
        self.vae, self.folder = open_vae(folder, dtype) if folder else (None, None)
        if self.vae is not None:
            self.vae.eval().requires_grad_(False).to(device)

    @property
    def settings(self):
        return ["hunyuan", fingerprint(self.folder) if self.folder else None]

    def check_weights(self):
        if self.vae is None:
            raise UserError("latents of HunyuanVideo need its VAE: give --vae, a local folder in the diffusers layout")

    def run(self, net, x):
        """A part of the VAE on x, on its device and in its dtype -> float32, where x was."""
        return net(x.to(self.device, self.vae.dtype)).float().to(x.device)

    def stream(self, convert, per_latent, kept):
        """A function that converts a video (B, ..., F, H, W) piece by piece, see encoder() and decoder().

        convert(tile, n): a block with the n frames before it -> what it makes of the block. per_latent: frames per
        latent; kept: how many frames the next block sees again.
        """
        before = None

        @torch.no_grad()
        def step(x):
            nonlocal before
            lone = 1 if before is None else 0
            if (x.shape[2] - lone) % per_latent:
                raise ValueError(f"{x.shape[2]} frames are not {'1 + ' * lone}{per_latent}k")
            parts = []
            for part in (x[:, :, :lone], *x[:, :, lone:].split(per_latent * self.block, dim=2)):
                if part.shape[2]:
                    before = part[:, :, :0] if before is None else before
                    tile = torch.cat([before, part], dim=2)
                    parts.append(convert(tile, before.shape[2]))
                    before = tile[:, :, -kept:]
            return torch.cat(parts, dim=2)

        return step

    def encoder(self):
        """A function that encodes a video piece by piece, (B, 3, 1 + 4k, H, W), later (B, 3, 4k, H, W), to the mean of
        its latents, scaled. Pieces of whole blocks joined equal the whole encoded at once."""
        self.check_weights()

        def convert(tile, n):
            latents = self.run(lambda x: self.vae.quant_conv(self.vae.encoder(x)), tile)[:, :16]
            return SCALE * latents[:, :, -(-n // 4) :]

        return self.stream(convert, 4, kept=5)

    def decoder(self):
        """A function that decodes a video piece by piece, (B, 16, f, h, w) -> (B, 3, F, 8h, 8w), clamped. Pieces of
        whole blocks joined equal the whole decoded at once."""
        self.check_weights()

        def convert(tile, n):
            pixels = self.run(lambda x: self.vae.decoder(self.vae.post_quant_conv(x)), tile / SCALE)
            return pixels[:, :, max(0, 4 * n - 3) :].clamp(-1, 1)

        return self.stream(convert, 1, kept=self.lookback)

    def show(self, history, target, times):
        """Pixels (B, 3, F', H, W): the last of the four frames of each latent of `target` (B, 16, F', h, w).

        They are put at `times` (B, F') into a video that begins with `history`; the blocks that hold them are decoded.
        """
        shown = []
        for h, x, at in zip(history, target, times.long()):
            video = h.new_zeros(h.shape[0], max(h.shape[1], int(at.max()) + 1), *h.shape[2:])
            video[:, : h.shape[1]] = h
            video[:, at] = x.to(video)
            kept = {}
            for k in at.tolist():
                first = 1 + (k - 1) // self.block * self.block  # of the latent's block
                decode, before = self.decoder(), video[None, :, max(0, first - self.lookback) : first]
                if k:
                    decode(before)
                kept[k] = decode(video[None, :, first : first + self.block] if k else video[None, :, :1])
                kept[k] = kept[k][0, :, 4 * (k - first) + 3 if k else 0]
            shown.append(torch.stack([kept[k] for k in at.tolist()], dim=1))
        return torch.stack(shown)

    def low_encoder(self, rate):
        """See Codec. A block of the smaller video covers the time of a block, or a latent if that is longer."""
        codec = copy.copy(self)
        codec.block = max(1, self.block // rate[0])
        return super(HunyuanCodec, codec).low_encoder(rate)
