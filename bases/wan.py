"""Wan 2.1 T2V, 1.3B and 14B: presets and the causal video VAE, from a local folder through diffusers.

Pixels are (B, 3, F, H, W) floats in [-1, 1], F = 1 + 4k; latents (B, 16, 1 + k, H/8, W/8), the first of one frame.
"""

import math

import torch

from bases.base import Base, CausalCodec
from bases.pretrained import fingerprint, from_pretrained, subfolder
from bases.umt5 import NoPrompts, UMT5Prompts
from model import DiTConfig
from util.cli import UserError

SHARED = dict(
    sizes=((480, 832), (832, 480), (624, 624)),
    fps=16,
    section=8,
    history=81,
    widths=(64, 128, 256, 512),
    lora=128,
    optimizer="adamw",
    lr=1e-4,
    recompute=True,
    t_mean=1.3,
    t_std=1.0,
    steps=50,  # the sampler as in Wan's own code
    guidance=5.0,
    shift=5.0,
    needs_cache=True,
)
PRESETS = {
    "wan-1.3b": dict(dit=DiTConfig(dim=1536, ffn_dim=8960, heads=12, layers=30), **SHARED),
    "wan-14b": dict(dit=DiTConfig(dim=5120, ffn_dim=13824, heads=40, layers=40), **SHARED),
}

# mean and standard deviation of the VAE's latents, per channel
MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508)
MEAN += (0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743)
STD += (3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


OLDEST_DIFFUSERS = 0, 35


def open_base(name, vae="", t5="", device="cpu"):
    """The Base wan-1.3b or wan-14b."""
    preset = PRESETS[name]
    dim, length = preset["dit"].text_dim, preset["dit"].text_len
    prompts = UMT5Prompts(t5, dim, length, device) if t5 else NoPrompts(dim, length)
    return Base(name=name, codec=WanCodec(vae, device), prompts=prompts, **preset)


def open_vae(folder):
    """(diffusers' AutoencoderKLWan, its folder) from a local folder; random weights for "random", to measure speed."""
    try:
        from diffusers import AutoencoderKLWan, __version__
    except ImportError:
        raise UserError("Wan's VAE needs the package diffusers: pip install diffusers") from None
    if tuple(map(int, __version__.split(".")[:2])) < OLDEST_DIFFUSERS:
        oldest = ".".join(map(str, OLDEST_DIFFUSERS))
        raise UserError(
            f"diffusers {__version__} decodes Wan's latents wrongly piece by piece: pip install diffusers>={oldest}"
        )
    if folder == "random":
        return AutoencoderKLWan(), None
    path = subfolder(folder, "vae", "--vae")
    vae = from_pretrained(AutoencoderKLWan, path, f"--vae {folder}", torch.float32)
    c = vae.config
    space = 2 ** (len(c.dim_mult) - 1) * (c.patch_size or 1)
    same_shape = (c.z_dim, 2 ** sum(c.temperal_downsample), space) == (WanCodec.channels, *WanCodec.stride[:2])
    # Wan 2.2's small models have another VAE
    if not same_shape or not torch.allclose(torch.tensor([c.latents_mean, c.latents_std]), torch.tensor([MEAN, STD])):
        raise UserError(
            f"--vae {folder} is another VAE ({c.z_dim} channels, {space} pixels per latent) than Wan 2.1's, whose "
            "latents the DiT knows: give that one"
        )
    return vae, path


class WanCodec(CausalCodec):
    """Wan's VAE, one or four frames at a time: its causal convolutions carry what they need in a cache, so a video of
    any length takes the memory of four frames. Without a folder, only what needs no weights works."""

    channels, stride, large = 16, (4, 8, 8), True
    # float32, traced by a test: bytes of the weights; per pixel of a frame, what the decoder carries from one latent to
    # the next, and the most that decoding needs, that included
    weight_bytes, carried_per_pixel, decoding_per_pixel = 507_570_124, 9_545, 19_940

    def __init__(self, folder="", device="cpu"):
        self.device = device
        self.vae, self.folder = open_vae(folder) if folder else (None, None)
        if self.vae is not None:
            self.vae.eval().requires_grad_(False).to(device)

    @property
    def decodes(self):
        return self.vae is not None

    @property
    def settings(self):
        return ["wan", fingerprint(self.folder) if self.folder else None]

    def memory(self, pixels):
        what = "what it carries on, or decodes with"
        return tuple(
            {"VAE": self.weight_bytes, what: per_pixel * pixels}
            for per_pixel in (self.carried_per_pixel, self.decoding_per_pixel)
        )

    def check_weights(self):
        if self.vae is None:
            raise UserError("latents of Wan need its VAE: give --vae, a local folder in the diffusers layout")

    def statistics(self, like):
        return (torch.tensor(x).view(1, 16, 1, 1, 1).to(like) for x in (MEAN, STD))

    def encoder(self):
        """A function that encodes a video piece by piece, (B, 3, 1 + 4k, H, W), later (B, 3, 4k, H, W), to the mean of
        its latents, normalised. Pieces joined equal the whole encoded at once."""
        self.check_weights()
        cache, started = [None] * self.vae._cached_conv_counts["encoder"], False

        @torch.no_grad()
        def encode(pixels):
            nonlocal started
            lone = 0 if started else 1
            if (pixels.shape[2] - lone) % 4:
                raise ValueError(f"{pixels.shape[2]} frames are not {'1 + ' * lone}4k")
            parts = []
            for part in (pixels[:, :, :lone], *pixels[:, :, lone:].split(4, dim=2)):
                if part.shape[2]:
                    x = self.vae.encoder(part.to(self.device), feat_cache=cache, feat_idx=[0])
                    parts.append(self.vae.quant_conv(x)[:, :16].to(pixels.device))
            started = True
            latents = torch.cat(parts, dim=2)
            mean, std = self.statistics(latents)
            return (latents - mean) / std

        return encode

    def decoder(self):
        """A function that decodes a video piece by piece, (B, 16, f, h, w) -> (B, 3, F, 8h, 8w), clamped.

        The very first latent becomes one frame, every other four. Pieces joined equal the whole decoded at once.
        """
        self.check_weights()
        cache, started = [None] * self.vae._cached_conv_counts["decoder"], False

        @torch.no_grad()
        def decode(latents):
            nonlocal started
            mean, std = self.statistics(latents)
            z = self.vae.post_quant_conv((latents * std + mean).float().to(self.device))
            parts = []
            for piece in z.split(1, dim=2):
                x = self.vae.decoder(piece, feat_cache=cache, feat_idx=[0], first_chunk=not started)
                parts.append(x.clamp(-1, 1).to(latents.device))
                started = True
            return torch.cat(parts, dim=2)

        return decode

    @property
    def lookback(self):
        """See Codec: each causal convolution of the decoder looks two frames back, and each `time_conv` doubles the
        frames per latent."""
        latents, density = 0.0, 1
        for name, module in self.vae.decoder.named_modules():
            if isinstance(module, torch.nn.Conv3d):
                latents += (module.kernel_size[0] - 1) / density
            if name.endswith("time_conv"):
                density *= 2
        return math.ceil(latents)

    def show(self, history, target, times):
        """Pixels (B, 3, F', H, W): the last of the four frames of each latent of `target` (B, 16, F', h, w).

        They are put at `times` (B, F') into a video that begins with `history` and decoded with all before them, since
        the VAE is causal.
        """
        shown = []
        for h, x, at in zip(history, target, times.long()):
            video = h.new_zeros(h.shape[0], max(h.shape[1], int(at.max()) + 1), *h.shape[2:])
            video[:, : h.shape[1]] = h
            video[:, at] = x.to(video)
            decode, kept = self.decoder(), {}
            for k in range(int(at.max()) + 1):  # of 20 s, keep only the frames that are shown
                pixels = decode(video[None, :, k : k + 1])[0]  # (3, 1 or 4, H, W)
                if k in at:
                    kept[k] = pixels[:, -1]
            shown.append(torch.stack([kept[k] for k in at.tolist()], dim=1))
        return torch.stack(shown)
