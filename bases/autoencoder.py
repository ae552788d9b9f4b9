"""The codec of nano and small: a small convolutional autoencoder, 8x8 pixels <-> 16 channels (training: codec.py).

Every frame is encoded alone. There are no norms over a picture, so a region's latents do not depend on the rest of it.
"""

import hashlib

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from bases.base import Codec
from util.device import autocast
from util.files import shipped
from util.weights import load_weights

WEIGHTS = "checkpoints/codec.safetensors"
WIDTHS = 176, 64, 56  # channels at an eighth, a quarter and half of the pixels' resolution
PIECE = 2**22  # pixels encoded or decoded at once


class ResBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x):
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class Autoencoder(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] <-> latents (B, 16, H/8, W/8), each channel of zero mean and unit variance."""

    channels, stride = 16, 8

    def __init__(self):
        super().__init__()
        wide, middle, fine = WIDTHS
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(3 * 16, middle, 3, padding=1),
            ResBlock(middle),
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * middle, wide, 1),
            ResBlock(wide),
            nn.Conv2d(wide, self.channels, 1),
        )
        self.register_buffer("mean", torch.zeros(self.channels))  # of latents before they are standardized
        self.register_buffer("variance", torch.ones(self.channels))
        self.decoder = nn.Sequential(
            nn.Conv2d(self.channels, wide, 3, padding=1),
            *(ResBlock(wide) for _ in range(2)),
            nn.Conv2d(wide, 4 * middle, 1),
            nn.PixelShuffle(2),
            *(ResBlock(middle) for _ in range(2)),
            nn.Conv2d(middle, 4 * fine, 1),
            nn.PixelShuffle(2),
            *(ResBlock(fine) for _ in range(2)),
            nn.Conv2d(fine, 3 * 4, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def encode(self, pixels):
        """(B, 3, H, W), H and W multiples of 8 -> (B, 16, H/8, W/8), float32."""
        z = self.encoder(pixels).float()
        if self.training:  # by the batch, as batch norm does
            mean, variance = z.mean((0, 2, 3)), z.var((0, 2, 3))
            self.mean.lerp_(mean.detach(), 0.02)
            self.variance.lerp_(variance.detach(), 0.02)
        else:
            mean, variance = self.mean, self.variance
        return (z - mean[:, None, None]) * (variance[:, None, None] + 1e-5).rsqrt()

    def decode(self, latents):
        """(B, 16, h, w) -> (B, 3, 8h, 8w), not clamped."""
        return self.decoder(latents)

    def latents_hash(self):
        """SHA-256 of what decides the latents: all weights but the decoder's."""
        kept = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("decoder.")}
        return hashlib.sha256(b"".join(x.cpu().numpy().tobytes() for x in kept.values())).hexdigest()

    def saved_names(self):
        """The tensors of a checkpoint."""
        return list(self.state_dict())

    def forward(self, pixels, noise):
        """Reconstruct pixels from latents with some noise (B, 16, H/8, W/8) on them."""
        return self.decode(self.encode(pixels) + noise)


class LearnedCodec(Codec):
    """The shipped autoencoder, or one of your own in a file."""

    channels, stride = Autoencoder.channels, (1, Autoencoder.stride, Autoencoder.stride)

    def __init__(self, path="", device="cpu"):
        path = shipped(path or WEIGHTS)
        self.device, self.net = torch.device(device), Autoencoder()
        load_weights(self.net, [path], dtype=lambda name, tensor: torch.float32)
        self.net.eval().requires_grad_(False).to(device)
        self.identity = self.net.latents_hash()
        self.settings = ["autoencoder", self.identity]

    def encode(self, pixels):
        return self.map_frames(self.net.encode, pixels, pixels[0, 0, 0].numel())

    def decode(self, latents):
        return self.map_frames(self.net.decode, latents, latents[0, 0, 0].numel() * self.stride[1] * self.stride[2])

    @torch.no_grad()
    def map_frames(self, net, video, pixels):
        """A network for pictures on a video (B, C, F, H, W), some frames at a time. pixels: in a frame."""
        frames = rearrange(video, "b c f h w -> (b f) c h w")
        n = max(1, PIECE // pixels)
        with autocast(self.device):
            pictures = [net(piece.to(self.device)).float() for piece in frames.split(n)]
        return rearrange(torch.cat(pictures), "(b f) c h w -> b c f h w", b=len(video)).to(video.device)
