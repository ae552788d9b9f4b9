"""LPIPS with weights that the user brings."""

from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

from util.cli import UserError, first_line
from util.device import pick_device


def read_published(path):
    """{name: tensor} of a .pth or .safetensors file. No code in it can run. Raises UserError."""
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        return {str(name): value.float() for name, value in state.items()}
    except Exception as e:
        raise UserError(f"{path} is no file of weights ({first_line(e)}): download it again") from None


def load_published(module, folder, pattern, rename):
    """Load weights as others publish them, strictly, from the one .pth or .safetensors file in `folder` that matches
    `pattern`.

    rename(name in the file) -> name here, or None to skip it. Raises UserError.
    """
    files = sorted(path for path in Path(folder).glob(pattern) if path.suffix in (".pth", ".safetensors"))
    if len(files) != 1:
        raise UserError(
            f"--lpips {folder} holds {len(files)} files {pattern} (.pth or .safetensors), not one: give a folder with "
            "torchvision's alexnet-owt-*.pth and the lpips package's alex.pth"
        )
    path, wanted = files[0], module.state_dict()
    found = {rename(name): value for name, value in read_published(path).items() if rename(name)}
    for name in {**wanted, **found}:
        here, there = (tuple(x[name].shape) if name in x else "not there" for x in (wanted, found))
        if here != there or not found[name].isfinite().all():
            raise UserError(f"{path}: {name} is {there}, expected {here} and finite; is this another network's file?")
    module.load_state_dict(found)


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018; version 0.1, AlexNet) of uint8 frames (F, H, W, 3): one value per
    frame, (F,); smaller is nearer. The user brings the weights, see load_published(). Raises UserError."""

    # {index in torchvision's `features`: (channels in, channels out, kernel, stride, padding)}
    convolutions = {
        0: (3, 64, 11, 4, 2),
        3: (64, 192, 5, 1, 2),
        6: (192, 384, 3, 1, 1),
        8: (384, 256, 3, 1, 1),
        10: (256, 256, 3, 1, 1),
    }
    pooled = (3, 6)  # max-pooling comes before these

    def __init__(self, folder):
        super().__init__()
        self.features = nn.ModuleDict({str(i): nn.Conv2d(*sizes) for i, sizes in self.convolutions.items()})
        widths = [sizes[1] for sizes in self.convolutions.values()]
        self.linear = nn.ModuleDict({f"lin{k}": nn.Conv2d(n, 1, 1, bias=False) for k, n in enumerate(widths)})

        def rename(name):
            return name.removeprefix("features.") if name.startswith("features.") else None

        load_published(self.features, folder, "alexnet-owt-*", rename)
        load_published(self.linear, folder, "alex.*", lambda name: name.replace(".model.1.", "."))

    @torch.no_grad()
    def forward(self, a, b):
        """See the class."""
        if min(a.shape[1:3]) < 31:
            raise UserError(
                f"LPIPS needs frames of at least 31 x 31 pixels, these are {a.shape[1]} x {a.shape[2]}: leave out "
                "--lpips"
            )
        device = self.features["0"].weight.device
        x = torch.cat([a, b]).to(device).permute(0, 3, 1, 2) / 127.5 - 1  # (2F, 3, H, W) in [-1, 1]
        shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]], device=device)[..., None, None]
        x, distance = (x - shift) / scale, 0
        for (i, convolution), linear in zip(self.features.items(), self.linear.values()):
            x = F.max_pool2d(x, 3, 2) if int(i) in self.pooled else x
            x = F.relu(convolution(x))
            unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
            of_a, of_b = unit.chunk(2)
            distance = distance + linear((of_a - of_b).square()).mean((1, 2, 3))
        return distance.cpu()


def open_lpips(config):
    """The LPIPS of --lpips on its device, or None."""
    return LPIPS(config.lpips).to(pick_device(config.device)) if config.lpips else None
