"""Evaluation: metrics, and how well frames of the history are retrieved from memory.

    python eval.py retrieval --checkpoint runs/pretrain/model.safetensors               held-out stories
    python eval.py retrieval --checkpoint runs/pretrain/model.safetensors --history clip.mp4    frames of one's own clip

Every figure is printed with what produced it: checkpoint, step, seed, clips, sampler.
"""
import math
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import (Clip, Clips, make_codec, make_prompts, nearest_size, parse_flags, psnr, run_main, to_frames,
                  to_pixels, world_clips)
from encoder import load_model
from model import PRESETS, UserError, autocast, euler, pick_device
from pretrain import PretrainConfig, Tools, draw_retrieval
from video import contact_strip, read_video, video_info

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


def interval(values):
    """Mean of a 1-D tensor and the half-width of its 95 % interval."""
    values = values.double()
    return values.mean().item(), (1.96 * values.std() / len(values)**0.5).item() if len(values) > 1 else math.nan


# ---------------------------------------------------------------------------------------------------------------------
# Frame retrieval


@dataclass
class RetrievalConfig:
    checkpoint: str = "runs/pretrain/model.safetensors"    # weights from pretrain.py
    history: str = ""             # a clip of one's own; without it, held-out stories of the paper-doll world
    clips: int = 64               # held-out stories
    queries: int = 4              # frames retrieved of each
    steps: int = 20               # Euler steps
    seed: int = 0                 # of the query frames and the noise
    batch: int = 8                # stories at once
    out: str = "out/retrieval.png"     # picture: original, retrieved and difference rows
    device: str = "auto"          # auto, cpu, cuda, mps
    cache: str = "cache"          # folder for encoded clips


def retrieval_clips(config, preset, codec):
    """The held-out stories, or the windows of one's own clip, with their original pixels."""
    if not config.history:
        return world_clips("held-out", config.clips, preset, codec, config.cache, keep_pixels=True)
    frames = read_video(config.history, preset.fps, *nearest_size(preset, video_info(config.history)))
    if len(frames) < preset.section * codec.stride[0]:
        raise UserError(f"{config.history} has {len(frames)} frames at {preset.fps} fps; "
                        f"at least {preset.section} are needed: give a longer clip")
    return Clips([Clip(codec.encode(to_pixels(frames)[None])[0], [], frames)])


@torch.no_grad()
def retrieve(model, tools, clips, config, device):
    """Retrieve query frames of clips from their memories, without prompts.
    Returns {name: frames uint8 (n, F', H, W, 3)}: truth; codec, its ceiling; retrieved; one_step, from pure noise at
    once; wrong_memory, given that of the next clip; no_memory."""
    settings = PretrainConfig(mask="none", text_drop=1.0, queries=config.queries, seed=config.seed)
    results = {}
    for first in tqdm(range(0, len(clips), config.batch), desc="retrieving"):
        rows = range(first, min(first + config.batch, len(clips)))
        batch = draw_retrieval(settings, tools, clips, rows, 0).to(device)
        other = draw_retrieval(settings, tools, clips, [(row + 1) % len(clips) for row in rows], 0).to(device)
        made = {"truth": batch.truth, "codec": batch.target}
        with autocast(device):
            memories = {"retrieved": model.encode(batch.hr, batch.lr), "no_memory": None}
            if len(clips) > 1:
                memories["wrong_memory"] = model.encode(other.hr, other.lr)
            sample = lambda memory, steps: euler(model.dit, batch.noise, batch.text, batch.frames, memory,
                                                 steps).float()
            made["one_step"] = sample(memories["retrieved"], 1)
            made.update({name: sample(memory, config.steps) for name, memory in memories.items()})
        for name, x in made.items():
            results.setdefault(name, []).append((x if name == "truth" else to_frames(tools.codec.decode(x))).cpu())
    return {name: torch.cat(x) for name, x in results.items()}


def retrieval(argv):
    """Retrieve frames from memory: PSNR and SSIM against the original pixels, and a picture."""
    config = parse_flags(RetrievalConfig, retrieval.__doc__, argv)
    model, trained = load_model(config.checkpoint)
    if trained["stage"] != "pretrain":
        raise UserError(f"{config.checkpoint} is of stage {trained['stage']}: retrieval needs one of pretrain.py")
    device = pick_device(config.device)
    preset = PRESETS[model.preset]
    codec = make_codec(preset.codec)
    tools = Tools(preset, codec, make_prompts(preset), model.to(device).encoder)
    clips = retrieval_clips(config, preset, codec)
    made = retrieve(model, tools, clips, config, device)
    truth = made.pop("truth")
    print(f"{config.checkpoint}: {trained['method']} {trained['rate']}, step {trained['step']}, "
          f"seed {trained['seed']}; {len(clips)} clips x {truth.shape[1]} frames, query seed {config.seed}, "
          f"{config.steps} Euler steps, no prompts")
    print(f"{'':14}{'PSNR dB':>18}{'SSIM':>20}     mean over clips with its 95 % interval")
    for name, frames in made.items():
        p = interval(psnr(frames, truth).mean(1))
        s = interval(ssim(frames.flatten(0, 1), truth.flatten(0, 1)).view(len(truth), -1).mean(1))
        print(f"{name:14}{p[0]:10.2f} ± {p[1]:5.2f}{s[0]:12.3f} ± {s[1]:5.3f}")
    rows = []
    for i in range(min(len(truth), 4)):
        difference = (truth[i].int() - made["retrieved"][i].int()).abs().to(torch.uint8)
        rows += [("original", truth[i]), ("retrieved", made["retrieved"][i]), ("difference", difference)]
    contact_strip(rows, config.out)
    print(f"wrote {config.out}")


COMMANDS = {"retrieval": retrieval}


def main():
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
        print("commands: " + "; ".join(f"{k}: {f.__doc__.splitlines()[0]}" for k, f in COMMANDS.items()))
        return
    if name not in COMMANDS:
        raise UserError(f"eval.py {name}: choose one of {', '.join(COMMANDS)}")
    COMMANDS[name](sys.argv[2:])


if __name__ == "__main__":
    run_main(main)
