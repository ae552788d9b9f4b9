"""Wan 2.1 T2V, 1.3B and 14B: presets and the causal video VAE, from a local folder through diffusers.

Pixels are (B, 3, F, H, W) floats in [-1, 1], F = 1 + 4k; latents (B, C, 1 + k, h, w), the first of one frame: C = 16,
h = H/8, w = W/8.
"""

import math

import torch
from einops import rearrange

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
    return make_base(name, PRESETS[name], WanCodec(vae, device), t5, device)


def make_base(name, preset, codec, t5, device, kind=Base):
    """A Base, or another kind of one, whose prompts are those of umT5."""
    dim, length = preset["dit"].text_dim, preset["dit"].text_len
    prompts = UMT5Prompts(t5, dim, length, device) if t5 else NoPrompts(dim, length)
    return kind(name=name, codec=codec, prompts=prompts, **preset)


def open_vae(folder, codec):
    """(diffusers' AutoencoderKLWan, its folder) from a local folder; random weights for "random", to measure speed.

    codec: the class of codec that it must fit. Raises UserError.
    """
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
        return AutoencoderKLWan(**codec.architecture), None
    path = subfolder(folder, "vae", "--vae")
    vae = from_pretrained(AutoencoderKLWan, path, f"--vae {folder}", torch.float32)
    c = vae.config
    space = 2 ** (len(c.dim_mult) - 1) * (c.patch_size or 1)
    same_shape = (c.z_dim, 2 ** sum(c.temperal_downsample), space) == (codec.channels, *codec.stride[:2])
    theirs, ours = torch.tensor([*c.latents_mean, *c.latents_std]), torch.tensor([*codec.mean, *codec.std])
    if not same_shape or theirs.shape != ours.shape or not torch.allclose(theirs, ours):
        raise UserError(
            f"--vae {folder} is another VAE ({c.z_dim} channels, {space} pixels per latent) than Wan "
            f"{codec.version}'s, whose latents the DiT knows: give that one"
        )
    return vae, path


class WanCodec(CausalCodec):
    """Wan's VAE, one or four frames at a time: its causal convolutions carry what they need in a cache, so a video of
    any length takes the memory of four frames. Without a folder, only what needs no weights works."""

    version, channels, stride, large = "2.1", 16, (4, 8, 8), True
    mean, std = MEAN, STD
    architecture = {}  # arguments of diffusers' AutoencoderKLWan
    # float32, traced by a test: bytes of the weights; per pixel of a frame, what the decoder carries from one latent to
    # the next, and the most that decoding needs, that included
    weight_bytes, carried_per_pixel, decoding_per_pixel = 507_570_124, 9_545, 19_940

    def __init__(self, folder="", device="cpu"):
        self.device = device
        self.vae, self.folder = open_vae(folder, type(self)) if folder else (None, None)
        if self.vae is not None:
            self.vae.eval().requires_grad_(False).to(device)

    @property
    def settings(self):
        return ["wan", fingerprint(self.folder) if self.folder else None]

    @property
    def patch(self):
        """This many rows and columns of pixels are channels of the VAE's networks, column before row."""
        return self.vae.config.patch_size or 1

    def check_weights(self):
        if self.vae is None:
            raise UserError("latents of Wan need its VAE: give --vae, a local folder in the diffusers layout")

    def statistics(self, like):
        return (torch.tensor(x).view(1, -1, 1, 1, 1).to(like) for x in (self.mean, self.std))

    def encoder(self):
        """A function that encodes a video piece by piece, (B, 3, 1 + 4k, H, W), later (B, 3, 4k, H, W), to the mean of
        its latents, normalised. Pieces joined equal the whole encoded at once."""
        self.check_weights()
        cache, started, p = [None] * self.vae._cached_conv_counts["encoder"], False, self.patch

        @torch.no_grad()
        def encode(pixels):
            nonlocal started
            lone = 0 if started else 1
            if (pixels.shape[2] - lone) % 4:
                raise ValueError(f"{pixels.shape[2]} frames are not {'1 + ' * lone}4k")
            parts = []
            for part in (pixels[:, :, :lone], *pixels[:, :, lone:].split(4, dim=2)):
                if part.shape[2]:
                    x = rearrange(part.to(self.device), "b c f (h r) (w q) -> b (c q r) f h w", r=p, q=p)
                    x = self.vae.encoder(x, feat_cache=cache, feat_idx=[0])
                    parts.append(self.vae.quant_conv(x)[:, : self.channels].to(pixels.device))
            started = True
            latents = torch.cat(parts, dim=2)
            mean, std = self.statistics(latents)
            return (latents - mean) / std

        return encode

    def decoder(self):
        """A function that decodes a video piece by piece, (B, C, f, h, w) -> (B, 3, F, H, W), clamped.

        The very first latent becomes one frame, every other four. Pieces joined equal the whole decoded at once.
        """
        self.check_weights()
        cache, started, p = [None] * self.vae._cached_conv_counts["decoder"], False, self.patch

        @torch.no_grad()
        def decode(latents):
            nonlocal started
            mean, std = self.statistics(latents)
            z = self.vae.post_quant_conv((latents * std + mean).float().to(self.device))
            parts = []
            for piece in z.split(1, dim=2):
                x = self.vae.decoder(piece, feat_cache=cache, feat_idx=[0], first_chunk=not started)
                x = rearrange(x, "b (c q r) f h w -> b c f (h r) (w q)", r=p, q=p)
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
        """Pixels (B, 3, F', H, W): the last of the four frames of each latent of `target` (B, C, F', h, w).

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
