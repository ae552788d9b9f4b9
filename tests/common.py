"""What tests share: tiny presets, command lines, small files. (Fixtures: conftest.py.)"""

import csv
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import save_file

import bases
import finetune
import pretrain
from bases import nano, open_base, wan
from bases.base import Base, Codec
from bases.experts import TwoExperts
from encoder import MemoryDiT
from model import DiTConfig
from util.cli import UserError, run_main
from util.files import LOCK, RECORD
from util.video_writer import VideoWriter

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"  # what the project does not need; tests that use it are skipped without it
TINY = dict(
    dit=DiTConfig(dim=48, ffn_dim=64, heads=2, layers=1, text_dim=16, text_len=24),
    sizes=((32, 32),),
    fps=2,
    section=4,
    history=40,
    widths=(8, 8, 16, 16),
)
wan.PRESETS["tiny-wan"] = TINY | dict(history=9, lora=4, optimizer="adamw", lr=1e-3, recompute=True, needs_cache=True)


class DCTCodec(Codec):
    """The 16 lowest coefficients (10 luma, 3 + 3 chroma) of a 4x4 block DCT in an orthonormal opponent colour space.

    Each coefficient is divided by the square root of its deviation, and all by one number that makes the overall
    variance 1: full whitening would give the finest detail too much weight.
    """

    channels, stride, settings = 16, (1, 4, 4), ["dct"]
    # standard deviation of each coefficient over frames of the paper-doll world and of real clips
    deviations = (2.6, 0.6, 0.3, 0.18, 0.59, 0.28, 0.17, 0.3, 0.17, 0.18, 1.18, 0.27, 0.26, 0.73, 0.16, 0.16)

    def __init__(self):
        k = np.arange(4)
        norm = np.where(k[:, None] == 0, 0.5, math.sqrt(0.5))
        dct = np.cos(np.pi * (2 * k[None] + 1) * k[:, None] / 8) * norm  # (frequency, pixel)
        # luma, red-blue, green-magenta
        colour = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
        chosen = [(c, u, v) for c, most in ((0, 3), (1, 1), (2, 1)) for u in k for v in k if u + v <= most]
        basis = [np.einsum("c,y,x->cyx", colour[c], dct[u], dct[v]).ravel() for c, u, v in chosen]
        self.basis = torch.tensor(np.stack(basis), dtype=torch.float32)  # (16, 48), orthonormal rows
        deviations = torch.tensor(self.deviations)
        self.scale = deviations.sqrt() * deviations.mean().sqrt()  # variance of latent k: deviation_k / mean

    def encode(self, pixels):
        """(B, 3, F, H, W) in [-1, 1], H and W multiples of 4 -> (B, 16, F, H/4, W/4)."""
        blocks = rearrange(pixels, "b c f (h y) (w x) -> b f h w (c y x)", y=4, x=4)
        latents = F.linear(blocks, (self.basis / self.scale[:, None]).to(pixels))
        return rearrange(latents, "b f h w c -> b c f h w")

    def decode(self, latents):
        """(B, 16, F, h, w) -> pixels (B, 3, F, 4h, 4w), not clamped."""
        matrix = (self.basis * self.scale[:, None]).T.to(latents)
        blocks = F.linear(rearrange(latents, "b c f h w -> b f h w c"), matrix)
        return rearrange(blocks, "b f h w (c y x) -> b c f (h y) (w x)", c=3, y=4, x=4)


class TinyPresets:
    """As a module of bases: nano with a codec that needs no weights; the same with two DiTs, as Wan 2.2 A14B."""

    PRESETS = {
        "tiny": TINY,
        "tiny-experts": TINY
        | dict(
            boundary=0.875, guidance=4.0, low_guidance=3.0, lora=4, optimizer="adamw", lr=1e-3, t_mean=1.3, t_std=1.0
        ),
    }

    @staticmethod
    def open_base(name, vae="", t5="", device="cpu"):
        for flag, folder in dict(vae=vae, t5=t5).items():
            if folder:
                raise UserError(f"--{flag} {folder} does nothing: --preset {name} needs no such weights; drop it")
        kind = TwoExperts if name == "tiny-experts" else Base
        return kind(name=name, codec=DCTCodec(), prompts=nano.HashPrompts(16, 24), **TinyPresets.PRESETS[name])


bases.BASES |= {"tiny": TinyPresets, "tiny-experts": TinyPresets, "tiny-wan": wan}

SETTINGS = dict(
    pretrain=pretrain.PretrainConfig(preset="tiny"),
    finetune=finetune.FinetuneConfig(preset="tiny", t_mean=2.5, t_std=2.0),
)


def tiny_base(name="tiny"):
    base = open_base(name)
    if base.codec.causal:
        base.codec = BlockCodec(base.codec)  # Wan's own needs weights
    return base


class BlockCodec(wan.WanCodec):
    """Wan's codec with linear maps in place of its networks: one latent for a frame, then for every four.

    like: the codec whose channels and stride it has.
    """

    decodes, settings, lookback = True, ["blocks"], 1

    def __init__(self, like=wan.WanCodec):
        super().__init__()
        self.channels, self.stride = like.channels, like.stride
        self.matrix = randn(self.channels, 3)

    def encoder(self):
        started = False

        def encode(pixels):
            nonlocal started
            x, lone, started = F.avg_pool3d(pixels, (1, *self.stride[1:])), 0 if started else 1, True
            parts = [x[:, :, :lone]] + ([F.avg_pool3d(x[:, :, lone:], (4, 1, 1))] if x.shape[2] > lone else [])
            return torch.einsum("kc,bcfhw->bkfhw", self.matrix, torch.cat(parts, dim=2))

        return encode

    def decoder(self):
        started = False

        def decode(latents):
            nonlocal started
            x = torch.einsum("ck,bkfhw->bcfhw", torch.linalg.pinv(self.matrix), latents)
            for axis, n in enumerate(self.stride, 2):
                x = x.repeat_interleave(n, axis)
            x, started = x if started else x[:, :, 3:], True
            return x.clamp(-1, 1)

        return decode


def smaller(high, rate, later=False):
    """Something of the shape of `low` for latents high (B, C, F, H, W); rate: (t, h, w); later: of a causal codec, and
    not from its first latent on."""
    t, h, w = rate
    return high[:, :, t - 1 if later else 0 :: t, ::h, ::w]


def tiny_encoder(method="proposed", rate="4x4x2", preset="tiny"):
    return MemoryDiT(tiny_base(preset), method, rate).encoder


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomize(module, seed=0):
    """Random weights everywhere: a weight that starts at zero or one must not hide a mistake."""
    g = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        scale = 0.1 if p.ndim == 1 else p[0].numel() ** -0.5
        p.data = (p.ndim == 1 and name.endswith("weight")) + scale * torch.randn(p.shape, generator=g)
    return module.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Command lines and runs


def run(main, *flags):
    """A script's main with these flags, in this process."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, "argv", ["script", *map(str, flags)])
        run_main(main)


def stop_in_step(number, module, train):
    """Call train(), which gets SIGTERM in step `number` of a module's training loop: it saves, then exits with 143."""

    def set_learning_rate(optimizers, step, *rest, real=module.set_learning_rate):
        if step == number:
            os.kill(os.getpid(), signal.SIGTERM)
        real(optimizers, step, *rest)

    with pytest.MonkeyPatch.context() as m, pytest.raises(SystemExit) as stop:
        m.setattr(module, "set_learning_rate", set_learning_rate)
        train()
    assert stop.value.code == 143


def script(name):
    """The main of data.py or eval.py, whose commands are chosen by the first flag: run(script("eval"), "elo", ...)."""
    import data
    import eval as evaluation
    from util.cli import run_command

    if name == "data":
        return lambda: run_command("data.py", data.COMMANDS, data.__doc__)
    return lambda: run_command("eval.py", evaluation.COMMANDS, evaluation.__doc__)


def flags(cache, **changes):
    """The command line of a tiny training run."""
    given = dict(preset="tiny", init="random", cache=cache, clips=8, held_out=2, batch=4, steps=3, warmup=2)
    given |= dict(save_every=99, sample_steps=1, device="cpu") | changes
    return [x for k, v in given.items() for x in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]


def losses(folder, key="loss"):
    return [json.loads(line)[key] for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def listing(folder):
    """The names in a folder, sorted, without the record of what was written there and the lock."""
    return sorted(path.name for path in Path(folder).iterdir() if path.name not in (RECORD, LOCK))


def read_csv(path):
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def torchrun(module, *argv):
    """The main of a module on two processes that know the tiny presets."""
    Path("tiny.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        f"import tests.common\nimport {module}\nfrom util.cli import run_main\nrun_main({module}.main)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "tiny.py"]
    done = subprocess.run(
        [*command, *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def write_checkpoint(path="tiny.safetensors", stage="finetune", method="proposed", change=None, **claims):
    """A checkpoint of random weights, written as train() does; its config may claim something else."""
    state = randomize(MemoryDiT(tiny_base(), method)).state_dict()
    if change is not None:
        change(state)
    config = finetune.FinetuneConfig(preset="tiny", method=method, rate="4x4x2")
    config = {**dataclasses.asdict(config), "stage": stage, "step": 7}
    save_file(state, path, {"config": json.dumps({**config, **claims})})
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Small videos


def write_video(path, n=10, seed=0, size=32):
    """A small video of a soft moving pattern, 2 frames per second."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    waves = [torch.sin(x / 5 + y / (4 + c) + 0.5 * f + seed) for f in range(n) for c in range(3)]
    frames = (100 + 80 * torch.stack(waves)).view(n, 3, size, size).permute(0, 2, 3, 1).to(torch.uint8)
    with VideoWriter(path, 2, size, size, scale=4) as w:
        w.write(frames)
    return frames


def greys(n, h=16, w=24):
    """n flat frames, each 20 levels lighter than the one before."""
    return (20 * torch.arange(n)).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, h, w, 3)


def levels(frames):
    """The mean grey of each frame, in steps of 20."""
    return (frames.float().mean((1, 2, 3)) / 20).round().int().tolist()


def write_raw(path, frames, codec="libx264", pix_fmt="yuv420p", times=None, options=None, source="rgb24"):
    """Write arrays with any codec and any time stamps (milliseconds; by default 10 frames per second)."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pix_fmt
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.asarray(frame), format=source)
            picture.pts, picture.time_base = times[i] if times else 100 * i, Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def write_sound(path):
    """A file with sound but no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
