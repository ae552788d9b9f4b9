"""Train the codec of nano and small: an autoencoder of pictures from the paper-doll world and from your videos.

    python -m bases.codec                        stories alone
    python -m bases.codec --videos my_videos     stories, and one crop of a video in sixteen pictures

Every encoder has its own latents: DiTs have to be trained anew, with --vae FILE. --init FILE trains the decoder alone.
The shipped codec is checkpoints/codec.safetensors.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from bases.autoencoder import Autoencoder
from bases.nano import PRESETS
from dolls.drawing import render
from dolls.stories import make_story, world_seed
from util.checkpoint import resume, save
from util.cli import UserError, check_numbers, parse_flags, run_main
from util.device import autocast
from util.distributed import start_processes
from util.folder import find_videos, read_clip, report_skipped, split_videos, why_unusable
from util.optim import EMA, make_optimizers, set_learning_rate
from util.run import Run, claim_folder
from util.sheets import save_contact_sheet
from util.video import to_frames, to_pixels
from util.weights import load_weights

SIDE = 128  # pixels of the crops that are trained on
LEVELS = 0.0, 0.1, 0.2, 0.3  # noise on the latents when validating
HELD_OUT = 32  # stories


@dataclass
class CodecConfig:
    videos: str = ""  # a folder of videos to train on too; one in ten is held out
    held: str = ""  # names of the videos to hold out instead, separated by blanks
    init: str = ""  # a codec whose encoder stays as it is: the decoder alone is trained
    out: str = "runs/codec"  # codec.safetensors (float16), model.safetensors, state.pt, log.jsonl, previews
    stories: int = 1024  # to train on, a frame per section
    steps: int = 2400  # optimizer steps
    batch: int = 8  # pictures per step
    noise: float = 0.06  # most noise on a picture's latents, whose standard deviation is 1
    lr: float = 0.02  # peak learning rate of Muon; AdamW's parameters get a tenth
    warmup: int = 50  # steps of linear warm-up; then a cosine down to zero
    ema: float = 0.998  # decay of the weight average that is saved
    seed: int = 0  # of weights, data order and noise
    save_every: int = 500  # steps between checkpoints, validations and previews
    device: str = "auto"  # auto, cpu, cuda, mps
    resume: bool = False  # continue the run in --out


def story_frames(split, count):
    """One frame of each section of the first stories of a split: uint8 (n, 128, 128, 3)."""
    frames = []
    for i in tqdm(range(count), desc=f"drawing {split} stories"):
        rendered = render(make_story(world_seed(split, i), 13), None, 4, SIDE, SIDE)[0]
        frames.append(rendered.reshape(-1, 4, SIDE, SIDE, 3)[np.arange(13), (np.arange(13) + i) % 4])
    return np.concatenate(frames)


def video_frames(config):
    """Two frames per second of a folder of videos, as the preset small sees them: ([frames (F, H, W, 3)] to train on,
    the same of held-out videos)."""
    if not config.videos:
        return [], []
    base, held = SimpleNamespace(**PRESETS["small"]), config.held.split()
    paths = {p.relative_to(config.videos).as_posix(): p for p in find_videos(config.videos)}
    if unknown := set(held) - set(paths):
        raise UserError(f"--held {sorted(unknown)[0]}: --videos {config.videos} has no such file")
    train, held_out = ([n for n in paths if n not in held], held) if held else split_videos(paths)
    clips, skipped = {}, []
    for name, path in tqdm(paths.items(), desc="reading videos"):
        try:
            clips[name] = read_clip(path, base)[::4]
        except Exception as e:
            skipped.append(why_unusable(path, e))
    report_skipped(skipped, len(paths), config.videos)
    return tuple([clips[name] for name in names if name in clips] for names in (train, held_out))


def crop(clip, rng):
    """A random crop (SIDE, SIDE, 3) of a random frame."""
    frame = clip[rng.integers(len(clip))]
    top, left = (rng.integers(size - SIDE + 1) for size in frame.shape[:2])
    return frame[top : top + SIDE, left : left + SIDE]


def draw(config, stories, clips, step):
    """Pictures (B, 3, H, W) of a step and the noise (B, 16, H/8, W/8) for their latents.

    Videos, where there are any, give an eighth of every second batch: more of them cost stories too much. Every
    sixteenth batch is made smaller by 2 or 4, as the LR branch sees videos.
    """
    rng = np.random.default_rng((config.seed, step))
    g = torch.Generator().manual_seed(int(rng.integers(2**63)))  # of any --seed
    n_crops = -(-config.batch // 8) if clips and step % 2 else 0
    pictures = [stories[i] for i in rng.integers(len(stories), size=config.batch - n_crops)]
    pictures += [crop(clips[rng.integers(len(clips))], rng) for _ in range(n_crops)]
    pixels = to_pixels(np.stack(pictures)).transpose(0, 1)  # (B, 3, H, W)
    if step % 16 == 14:
        pixels = F.avg_pool2d(pixels, 2 if step % 32 == 14 else 4)
    size = SIDE // Autoencoder.stride * pixels.shape[-1] // SIDE
    level = config.noise * torch.rand(config.batch, 1, 1, 1, generator=g) ** 2
    return pixels, level * torch.randn(config.batch, Autoencoder.channels, size, size, generator=g)


@torch.no_grad()
def validate(net, held_out, device):
    """({name: dB of held-out pictures, and of their latents with noise}, rows of a contact sheet)."""
    found, rows = {}, []
    for name, frames in held_out.items():
        made = {level: [] for level in LEVELS}
        for piece in np.array_split(frames, -(-len(frames) // 8)):
            pixels = to_pixels(piece).transpose(0, 1).to(device)
            with autocast(device):
                z = net.encode(pixels)
                noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(device)
                for level in LEVELS:
                    made[level].append(net.decode(z + level * noise).float().clamp(-1, 1).cpu())
        for level, pictures in made.items():
            mse = (torch.cat(pictures) - to_pixels(frames).transpose(0, 1)).square().mean((1, 2, 3)) / 4
            found[f"{name}_{level:g}" if level else name] = -10 * mse.log10().mean().item()
        rows += [(name, frames[:: len(frames) // 6 + 1])]
        shown = torch.cat(made[0.0])[:: len(frames) // 6 + 1].transpose(0, 1)
        rows += [("decoded", to_frames(shown[None])[0])]
    return found, rows


def setup(config):
    """(processes, frames of stories, [frames of each clip], {name: held-out frames})."""
    check_numbers(config, "stories steps batch save_every", 1)
    check_numbers(config, "lr", 0, above=True)
    check_numbers(config, "noise warmup", 0)
    check_numbers(config, "ema", 0, 1)
    processes = start_processes(config.device)
    if processes.world_size > 1:
        raise UserError("the codec is trained by one process: start it with python")
    claim_folder(config.out, config.resume, processes)
    clips, held_clips = video_frames(config)
    held_out = {"stories": story_frames("held-out", HELD_OUT)[::4]}
    for h, w in sorted({clip.shape[1:3] for clip in held_clips}):
        chosen = [clip[:: len(clip) // 8 + 1] for clip in held_clips if clip.shape[1:3] == (h, w)]
        held_out[f"videos_{h}x{w}"] = np.concatenate(chosen)
    return processes, story_frames("train", config.stories), clips, held_out


def main():
    """Train, validate, save; see util.run and util.checkpoint."""
    config = parse_flags(CodecConfig, __doc__)
    processes, stories, clips, held_out = setup(config)
    device = processes.device
    torch.manual_seed(config.seed)
    net = Autoencoder().to(device)
    if config.init:
        load_weights(net, [config.init], dtype=lambda name, tensor: torch.float32)
        net.encoder.requires_grad_(False)
    ema, optimizers = EMA(net, config.ema), make_optimizers(net, "muon", config.lr)
    first = resume(config, "codec", net, ema, optimizers) if config.resume else 0
    run = Run("codec", config.out, first, config.steps, processes)
    half = lambda tensors: {"codec.safetensors": {name: tensor.half() for name, tensor in tensors.items()}}
    for step in run.bar:
        set_learning_rate(optimizers, step, config.steps, config.warmup)
        pixels, noise = (x.to(device) for x in draw(config, stories, clips, step))
        with autocast(device):
            made = net.train(not config.init)(pixels, noise)  # training mode: the batch standardizes the latents
        difference = made.float() - pixels
        loss = difference.square().mean() + 0.1 * difference.abs().mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(ema.params, 1.0).item()
        if run.is_finite(norm, step):
            for optimizer in optimizers:
                optimizer.step()
            ema.update(step)
        net.zero_grad(set_to_none=True)
        record = {"step": step + 1, "loss": loss.item(), "grad_norm": norm}
        if due := step + 1 == config.steps or (step + 1) % config.save_every == 0:
            with ema.swapped():
                found, rows = validate(net.eval(), held_out, device)
            record |= found
            save_contact_sheet(rows, Path(config.out) / f"preview_{step + 1:06d}.png", replace=True)
        run.log(record, due)
        stop = run.signals[-1] if run.signals else 0
        if (due or stop) and not run.gave_up:
            save(config, "codec", step + 1, net, ema, optimizers, half)
        if stop or run.gave_up:
            break
    run.finish(step + 1, stop)


if __name__ == "__main__":
    run_main(main)
