"""Evaluation: metrics, how well frames of the history are retrieved, and how well the next section continues it.

    python eval.py retrieval --checkpoint runs/pretrain/model.safetensors               held-out stories
    python eval.py retrieval --checkpoint runs/pretrain/model.safetensors --history clip.mp4    frames of one's own clip
    python eval.py continuation --checkpoint runs/finetune/model.safetensors            held-out stories

Every figure is printed with what produced it: checkpoint, step, seed, clips, sampler.
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import tqdm

from data import (Clip, Clips, make_codec, make_prompts, nearest_size, parse_flags, psnr, run_main, to_frames,
                  to_pixels, world_clips)
from encoder import load_model
from finetune import FinetuneConfig, ask
from model import PRESETS, UserError, autocast, euler, pick_device
from pretrain import PretrainConfig, Tools, collate, draw_retrieval, generator, preview
from video import read_video, video_info

# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def ssim(a, b):
    """Structural similarity (Wang et al. 2004) of uint8 frames (F, H, W, 3): one value a frame, (F,).

    Gaussian window of 11 x 11, σ 1.5, data range 255, population covariance, mean over the channels and over the pixels
    whose window lies inside: scikit-image's structural_similarity with gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False.
    """
    if min(a.shape[1:3]) < 11:
        raise UserError(f"SSIM needs frames of at least 11 x 11 pixels, these are {a.shape[1]} x {a.shape[2]}")
    a, b = (x.permute(0, 3, 1, 2).double() for x in (a, b))                     # (F, 3, H, W)
    x = torch.arange(-5, 6, dtype=torch.float64, device=a.device)
    window = torch.exp(-x**2 / (2 * 1.5**2))
    window = window / window.sum()
    kernel = (window[:, None] * window)[None, None].expand(3, 1, 11, 11)
    mean = lambda y: F.conv2d(y, kernel, groups=3)
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b, cov = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2, mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255)**2, (0.03 * 255)**2
    index = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return index.mean((1, 2, 3))


def load_published(module, folder, pattern, rename):
    """Load weights as others publish them from the one .pth or .safetensors file in `folder` that fits `pattern`;
    rename(name in file) gives the name here, or None to skip it. Strictly, and no code in the file can run.
    Raises UserError."""
    files = sorted(path for path in Path(folder).glob(pattern) if path.suffix in (".pth", ".safetensors"))
    if len(files) != 1:
        raise UserError(f"--lpips {folder} holds {len(files)} files {pattern} (.pth or .safetensors), not one: give a "
                        "folder with torchvision's alexnet-owt-*.pth and the lpips package's alex.pth")
    path = files[0]
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        found = {rename(name): value.float() for name, value in state.items() if rename(name)}
    except Exception as e:
        raise UserError(f"{path} is no file of weights ({str(e).splitlines()[0]}): download it again") from None
    wanted = module.state_dict()
    for name in {**wanted, **found}:
        here, there = (tuple(x[name].shape) if name in x else "not there" for x in (wanted, found))
        if here != there or not found[name].isfinite().all():
            raise UserError(f"{path}: {name} is {there}, expected {here} and finite; is this another network's file?")
    module.load_state_dict(found)


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018; version 0.1, AlexNet) of uint8 frames (F, H, W, 3): one value a
    frame, (F,), smaller is nearer. Weights are the user's: see load_published(). Raises UserError."""

    # place in torchvision's `features`: channels in and out, kernel, stride, padding
    convolutions = {0: (3, 64, 11, 4, 2), 3: (64, 192, 5, 1, 2), 6: (192, 384, 3, 1, 1), 8: (384, 256, 3, 1, 1),
                    10: (256, 256, 3, 1, 1)}
    pooled = (3, 6)                     # max-pooling stands before these

    def __init__(self, folder):
        super().__init__()
        self.features = nn.ModuleDict({str(i): nn.Conv2d(*sizes) for i, sizes in self.convolutions.items()})
        self.linear = nn.ModuleDict({f"lin{k}": nn.Conv2d(sizes[1], 1, 1, bias=False)
                                     for k, sizes in enumerate(self.convolutions.values())})
        backbone = lambda name: name.removeprefix("features.") if name.startswith("features.") else None
        load_published(self.features, folder, "alexnet-owt-*", backbone)
        load_published(self.linear, folder, "alex.*", lambda name: name.replace(".model.1.", "."))

    @torch.no_grad()
    def forward(self, a, b):
        """See the class."""
        if min(a.shape[1:3]) < 31:
            raise UserError(f"LPIPS needs frames of at least 31 x 31 pixels, these are {a.shape[1]} x {a.shape[2]}: "
                            "leave out --lpips")
        device = self.features["0"].weight.device
        x = torch.cat([a, b]).to(device).permute(0, 3, 1, 2) / 127.5 - 1        # (2F, 3, H, W) in [-1, 1]
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


def measure(frames, truth, lpips):
    """{metric: (n, F), a value a frame} of uint8 frames (n, F, H, W, 3); lpips: an LPIPS, or None to leave it out."""
    metrics = dict(psnr=psnr, ssim=ssim) | ({"lpips": lpips} if lpips else {})
    return {name: torch.stack([metric(a, b) for a, b in zip(frames, truth)]) for name, metric in metrics.items()}


def interval(values):
    """Mean of a 1-D tensor and the half-width of its 95 % interval."""
    values = values.double()
    return values.mean().item(), (1.96 * values.std() / len(values)**0.5).item() if len(values) > 1 else math.nan


# ---------------------------------------------------------------------------------------------------------------------
# Frame retrieval and continuation


@dataclass
class EvalConfig:
    """What all share."""
    clips: int = 64               # held-out stories
    steps: int = 20               # Euler steps
    shift: float = 3.0            # timestep shift of the sampler
    seed: int = 0                 # of the query frames and the noise
    batch: int = 8                # stories at once
    lpips: str = ""               # folder with alexnet-owt-*.pth (torchvision) and alex.pth (lpips): measure LPIPS too
    device: str = "auto"          # auto, cpu, cuda, mps
    cache: str = "cache"          # folder for encoded clips


@dataclass
class RetrievalConfig(EvalConfig):
    checkpoint: str = "runs/pretrain/model.safetensors"    # weights from pretrain.py
    history: str = ""             # a clip of one's own; without it, held-out stories of the paper-doll world
    queries: int = 4              # frames retrieved of each
    out: str = "out/retrieval.png"     # picture: original, model and difference rows


@dataclass
class ContinuationConfig(EvalConfig):
    checkpoint: str = "checkpoints/nano.safetensors"       # weights from finetune.py
    out: str = "out/continuation.png"  # picture: original, model and difference rows


def open_checkpoint(config, stage):
    """(model on its device, tools, training config) of --checkpoint, which must be of this stage."""
    for key in ("clips", "steps", "batch"):
        if getattr(config, key) < 1:
            raise UserError(f"--{key} {getattr(config, key)}: must be at least 1")
    model, trained = load_model(config.checkpoint)
    if trained["stage"] != stage:
        raise UserError(f"{config.checkpoint} is of stage {trained['stage']}: give one of {stage}.py")
    model.to(pick_device(config.device))
    preset = PRESETS[model.preset]
    return model, Tools(preset, make_codec(preset.codec), make_prompts(preset), model.encoder), trained


def own_clip(config, tools):
    """The video --history as a dataset of one clip, with its original pixels."""
    preset, codec = tools.preset, tools.codec
    frames = read_video(config.history, preset.fps, *nearest_size(preset, video_info(config.history)))
    if len(frames) < preset.section * codec.stride[0]:
        raise UserError(f"{config.history} has {len(frames)} frames at {preset.fps} fps; "
                        f"at least {preset.section * codec.stride[0]} are needed: give a longer clip")
    return Clips([Clip(codec.encode(to_pixels(frames)[None])[0], [], frames)])


@torch.no_grad()
def reconstruct(model, tools, draw, n_clips, config):
    """Denoise the targets of draw(rows) with several memories. Returns {name: frames uint8 (n, F', H, W, 3)}: truth;
    codec, its ceiling; one_step, from pure noise at once; model, the full sampler; the same with no_memory, and with
    wrong_memory, that of the next clip (if there is one)."""
    device = next(model.parameters()).device
    results = {}
    for first in tqdm(range(0, n_clips, config.batch), desc="evaluating"):
        rows = range(first, min(first + config.batch, n_clips))
        batch, other = draw(rows).to(device), draw([(row + 1) % n_clips for row in rows]).to(device)
        made = {"truth": batch.truth, "codec": batch.target}
        with autocast(device):
            def sample(memory, steps=config.steps):
                return euler(model.dit, batch.noise, batch.text, batch.frames, memory, steps, config.shift).float()
            memory = model.encode(batch.hr, batch.lr)
            made.update(one_step=sample(memory, 1), model=sample(memory), no_memory=sample(None))
            if n_clips > 1:
                made["wrong_memory"] = sample(model.encode(other.hr, other.lr))
        for name, x in made.items():
            results.setdefault(name, []).append((x if name == "truth" else to_frames(tools.codec.decode(x))).cpu())
    return {name: torch.cat(x) for name, x in results.items()}


def report(made, trained, config, what, lpips):
    """Print a row for each result of reconstruct(), and draw the first clips."""
    truth = made.pop("truth")
    print(f"{config.checkpoint}: {trained['method']} {trained['rate']}, step {trained['step']}, "
          f"seed {trained['seed']}; {len(truth)} clips x {truth.shape[1]} frames, {what}, noise seed {config.seed}, "
          f"{config.steps} Euler steps, shift {config.shift:g}")
    print(f"{'':14}{'PSNR dB':>18}{'SSIM':>16}{'LPIPS':>16}     mean over clips with its 95 % interval")
    for name, frames in made.items():
        p, s, *rest = (interval(values.mean(1)) for values in measure(frames, truth, lpips).values())
        last = f"{rest[0][0]:8.3f} ± {rest[0][1]:5.3f}" if rest else f"{'n/a':>16}"
        print(f"{name:14}{p[0]:10.2f} ± {p[1]:5.2f}{s[0]:8.3f} ± {s[1]:5.3f}{last}")
    preview(Path(config.out), truth, made["model"])
    print(f"wrote {config.out}")


def retrieval(argv):
    """Retrieve frames of the history from memory: PSNR, SSIM and a picture."""
    config = parse_flags(RetrievalConfig, retrieval.__doc__, argv)
    lpips = open_lpips(config)
    model, tools, trained = open_checkpoint(config, "pretrain")
    clips = own_clip(config, tools) if config.history else world_clips(
        "held-out", config.clips, tools.preset, tools.codec, config.cache, keep_pixels=True)
    settings = PretrainConfig(mask="none", text_drop=1.0, queries=config.queries, seed=config.seed)
    made = reconstruct(model, tools, lambda rows: draw_retrieval(settings, tools, clips, rows, 0), len(clips), config)
    report(made, trained, config, "no prompts", lpips)


def continuation(argv):
    """Write the section after a full history of held-out stories: PSNR and SSIM against the true one; a picture."""
    config = parse_flags(ContinuationConfig, continuation.__doc__, argv)
    lpips = open_lpips(config)
    model, tools, trained = open_checkpoint(config, "finetune")
    clips = world_clips("held-out", config.clips, tools.preset, tools.codec, config.cache, keep_pixels=True)
    begin = tools.preset.history
    settings = FinetuneConfig(seed=config.seed)
    draw = lambda rows: collate([ask(settings, tools, clips[row], 0, begin, clips[row].prompt(begin),
                                     generator(config.seed, row)) for row in rows])
    report(reconstruct(model, tools, draw, len(clips), config), trained, config, "with prompts", lpips)


COMMANDS = {"retrieval": retrieval, "continuation": continuation}


def main():
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
        print("\n".join(f"eval.py {k}: {f.__doc__}" for k, f in COMMANDS.items()))
        return
    if name not in COMMANDS:
        raise UserError(f"eval.py {name}: choose one of {', '.join(COMMANDS)}")
    COMMANDS[name](sys.argv[2:])


if __name__ == "__main__":
    run_main(main)
