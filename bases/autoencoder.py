"""The codec of nano and small, learned by bases/codec.py: 8 x 8 pixels of a frame <-> 16 numbers, every frame alone."""

import functools

import torch
import torch.nn as nn
from einops import rearrange

from bases.base import Codec
from util.files import file_hash, shipped
from util.weights import load_weights

WEIGHTS = "checkpoints/codec.safetensors"
PATCH, CHANNELS = 8, 16


class Mixer(nn.Module):
    """What a token is, from its neighbours (a depthwise convolution) and from its own channels (an MLP), added."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))

    def forward(self, x):
        """(B, h, w, D) -> the same."""
        y = self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.mlp(self.norm(y))


class Standardize(nn.Module):
    """(N, D) -> mean 0 and variance 1 in every channel, by the batch in training, else by what training has seen."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))

    def forward(self, x):
        var, mean = torch.var_mean(x, dim=0) if self.training else (self.var, self.mean)
        if self.training:
            self.mean.lerp_(mean.detach(), 0.01)
            self.var.lerp_(var.detach(), 0.01)
        return (x - mean) * (var + 1e-6).rsqrt()


class Autoencoder(nn.Module):
    """Pixels in [-1, 1] (B, 3, H, W), H and W multiples of 8, <-> latents (B, 16, H/8, W/8) of mean 0 and variance 1.

    The encoder is light, since all of a history goes through it; the decoder, which draws, has three times its weights.
    """

    def __init__(self, dims=(192, 256), layers=(2, 4), hidden=(384, 768)):
        super().__init__()
        self.patchify = nn.Linear(3 * PATCH**2, dims[0])
        self.encoder = nn.Sequential(*(Mixer(dims[0], hidden[0]) for _ in range(layers[0])))
        self.to_latents = nn.Linear(dims[0], CHANNELS)
        self.standardize = Standardize(CHANNELS)
        self.from_latents = nn.Linear(CHANNELS, dims[1])
        self.decoder = nn.Sequential(*(Mixer(dims[1], hidden[1]) for _ in range(layers[1])))
        self.unpatchify = nn.Linear(dims[1], 3 * PATCH**2)

    def encode(self, pixels):
        x = rearrange(pixels, "b c (h p) (w q) -> b h w (c p q)", p=PATCH, q=PATCH)
        x = self.to_latents(self.encoder(self.patchify(x)))  # (B, h, w, 16)
        return self.standardize(x.flatten(0, 2)).view_as(x).permute(0, 3, 1, 2)

    def decode(self, latents):
        x = self.unpatchify(self.decoder(self.from_latents(latents.permute(0, 2, 3, 1))))
        return rearrange(x, "b h w (c p q) -> b c (h p) (w q)", p=PATCH, q=PATCH)

    def saved_names(self):
        """The tensors of a checkpoint."""
        return list(self.state_dict())


@functools.lru_cache(2)
def load_autoencoder(path):
    """(Autoencoder with the weights of a file, the file's hash)."""
    model = Autoencoder()
    load_weights(model, [path], dtype=lambda name, tensor: tensor.dtype)
    return model.eval().requires_grad_(False), file_hash(path)


class LearnedCodec(Codec):
    """The Autoencoder, frame by frame."""

    channels, stride = CHANNELS, (1, PATCH, PATCH)
    at_once = 16  # frames, to bound memory

    def __init__(self, device="cpu", path=WEIGHTS):
        model, digest = load_autoencoder(shipped(path))
        self.model, self.device, self.settings = model.to(device), device, ["learned", digest]

    def map_frames(self, function, x):
        """Apply a function of (B, C, H, W) to the frames of x (B, C, F, H, W), in float32."""
        frames = x.float().transpose(1, 2).flatten(0, 1)
        with torch.no_grad(), torch.autocast(torch.device(self.device).type, enabled=False):
            made = [function(part.to(self.device)).to(x.device) for part in frames.split(self.at_once)]
        return torch.cat(made).unflatten(0, (len(x), -1)).transpose(1, 2)

    def encode(self, pixels):
        """(B, 3, F, H, W) in [-1, 1], H and W multiples of 8 -> (B, 16, F, H/8, W/8)."""
        return self.map_frames(self.model.encode, pixels)

    def decode(self, latents):
        """(B, 16, F, h, w) -> pixels (B, 3, F, 8h, 8w), not clamped."""
        return self.map_frames(self.model.decode, latents)
