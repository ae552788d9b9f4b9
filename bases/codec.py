"""Train the codec of nano and small (bases/autoencoder.py) to draw what it has seen in 16 numbers per 8 x 8 pixels.

    python -m bases.codec                      on stories of the paper-doll world
    python -m bases.codec --data my_videos     a quarter of it on these videos

‖x - D(E(x) + σ ε)‖² + 0.1 |x - D(E(x) + σ ε)|     σ: noise on the latents, as the DiT's own errors will be
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bases.autoencoder import PATCH, Autoencoder
from bases.nano import PRESETS
from dolls.drawing import render
from dolls.stories import make_story, world_seed
from util.checkpoint import resume, save
from util.cli import UserError, parse_flags, run_main
from util.distributed import start_processes
from util.folder import find_videos, nearest_size, report_skipped, split_videos, why_unusable
from util.optim import EMA, make_optimizers, set_learning_rate
from util.run import Run, claim_folder
from util.sheets import save_contact_sheet
from util.video import read_video, to_frames, to_pixels, video_info

SIZE = 128  # pixels: the side of what is trained on, a frame of nano or a part of one of small
HELD_OUT = 16  # pictures of each kind
NOISE = 0.0, 0.1, 0.2, 0.3  # on the latents, in validation


@dataclass
class CodecConfig:
    out: str = "runs/codec"  # run folder
    data: str = ""  # a folder of videos, to train on beside the stories
    steps: int = 1500  # optimizer steps
    batch: int = 8  # pictures per step
    lr: float = 0.02  # peak learning rate of the matrices; all else gets a tenth
    noise: float = 0.2  # the most noise on the latents
    warmup: int = 50  # steps of linear warm-up; then a cosine down to zero
    ema: float = 0.995  # decay of the weight average that is saved
    seed: int = 0  # of weights, pictures and noise
    save_every: int = 250  # steps between checkpoints, validations and previews
    device: str = "auto"  # auto, cpu, cuda, mps
    resume: bool = False  # continue the run in --out


def story_pictures(split, seed, count, size):
    """`count` frames, uint8 (count, height, width, 3), of stories of the paper-doll world: two of each story."""
    rng, pictures = np.random.default_rng(seed), []
    for index in rng.integers(2**30, size=-(-count // 2)):
        story = make_story(world_seed(split, int(index)), 11)
        sections = rng.integers(11, size=2).tolist()
        pictures += list(render(story, sections, 4, *size)[0][rng.integers(4, size=2) + [0, 4]])
    return np.stack(pictures[:count])


def crop(pictures, rng):
    """A random part, SIZE x SIZE, of each picture (height, width, 3) -> (N, SIZE, SIZE, 3)."""
    parts = []
    for picture in pictures:
        y, x = (int(rng.integers(n - SIZE + 1)) for n in picture.shape[:2])
        parts.append(picture[y : y + SIZE, x : x + SIZE])
    return np.stack(parts)


def draw(config, videos, step):
    """The pictures of a step, uint8 (batch, SIZE, SIZE, 3): a function of the step alone."""
    rng = np.random.default_rng((config.seed, step))
    n_videos = config.batch // 4 if videos else 0
    large = PRESETS["small"]["sizes"][step % 2]
    n_large = max(1, (config.batch - n_videos) // 4)
    parts = [story_pictures("train", (config.seed, step), config.batch - n_videos - n_large, (SIZE, SIZE))]
    parts.append(crop(story_pictures("train", (config.seed, step, 1), n_large, large), rng))
    if videos:
        frames = [videos[rng.integers(len(videos))] for _ in range(n_videos)]
        parts.append(crop([some[rng.integers(len(some))] for some in frames], rng))
    return torch.from_numpy(np.concatenate(parts))


def read_videos(folder):
    """(frames to train on, held-out frames) of a folder of videos: lists of uint8 (F, height, width, 3), two frames a
    second."""
    paths, frames, skipped = find_videos(folder), {}, []
    for path in paths:
        try:
            size = nearest_size(PRESETS["small"]["sizes"], video_info(path))
            frames[path.relative_to(folder).as_posix()] = read_video(path, 2, *size)
        except Exception as e:
            skipped.append(why_unusable(path, e))
    report_skipped(skipped, len(paths), folder)
    train, held_out = split_videos(frames)
    print(f"{len(train)} videos to train on, {len(held_out)} held out ({', '.join(held_out)})")
    return [frames[name] for name in train], [frames[name] for name in held_out]


def loss_function(model, pictures, levels, noise):
    """Squared error + 0.1 absolute error of pictures (B, 3, H, W), drawn from latents with noise of levels (B,)."""
    latents = model.encode(pictures)
    error = model.decode(latents + levels[:, None, None, None] * noise) - pictures
    return error.square().mean() + 0.1 * error.abs().mean()


@torch.no_grad()
def psnr(model, pictures, level, device):
    """(dB, mean over pictures uint8 (N, H, W, 3); what they became), with noise of this level on the latents."""
    made = []
    for i, frame in enumerate(pictures):
        x = to_pixels(frame[None])[:, 0][None].to(device)  # (1, 3, H, W)
        noise = torch.randn(1, 16, *(n // PATCH for n in x.shape[2:]), generator=torch.Generator().manual_seed(i))
        y = model.decode(model.encode(x) + level * noise.to(device))
        made.append(to_frames(y[:, :, None])[0, 0].cpu())
    mse = torch.stack([(a.float() - b.float()).square().mean() for a, b in zip(made, pictures)])
    return (10 * torch.log10(255**2 / mse)).mean().item(), made


def validate(config, model, held_out, step, device):
    """{name: dB} of held-out pictures, by kind and noise; writes a preview."""
    model.eval()
    found, rows = {}, []
    for kind, pictures in held_out.items():
        for level in NOISE:
            found[f"psnr_{kind}_{level:g}"], made = psnr(model, pictures, level, device)
            if level in (0.0, 0.2):
                rows += [(f"{kind}, noise {level:g}", torch.stack(made[::2]))]
        rows.append((kind, torch.stack(list(pictures[::2]))))
    save_contact_sheet(rows, Path(config.out) / f"preview_{step + 1:06d}.png", scale=1, replace=True)
    model.train()
    return {name: round(value, 2) for name, value in found.items()}


def halve(tensors):
    """{file name: tensors}: the weights in float16, as they are shipped."""
    return {"codec.safetensors": {name: tensor.half() for name, tensor in tensors.items()}}


def train(config, model, processes, videos, held_out):
    """Train, validate and save."""
    device, ema = processes.device, EMA(model, config.ema)
    optimizers = make_optimizers(model, "muon", config.lr)
    first = resume(config, "codec", model, ema, optimizers) if config.resume else 0
    run = Run("codec", config.out, first, config.steps, processes)
    step, stop = first, 0
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(draw, config, videos, first)
        for step in run.bar:
            pictures, coming = coming.result(), pool.submit(draw, config, videos, step + 1)
            set_learning_rate(optimizers, step, config.steps, config.warmup)
            g = torch.Generator().manual_seed(config.seed * 2**32 + step)
            # none for half of the pictures
            levels = config.noise * (2 * torch.rand(config.batch, generator=g) - 1).clamp(min=0)
            noise = torch.randn(config.batch, 16, SIZE // PATCH, SIZE // PATCH, generator=g)
            x = to_pixels(pictures).transpose(0, 1)  # (B, 3, SIZE, SIZE)
            loss = loss_function(model, *(y.to(device) for y in (x, levels, noise)))
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(ema.params, 1.0)
            loss, norm, stop = processes.sum_loss(loss.detach(), norm, run.signals)
            if run.is_finite(norm, step):
                for optimizer in optimizers:
                    optimizer.step()
                ema.update(step)
            model.zero_grad(set_to_none=True)
            record = {"step": step + 1, "loss": loss, "grad_norm": norm}
            due = step + 1 == config.steps or (step + 1) % config.save_every == 0
            if due:
                with ema.swapped():
                    record |= validate(config, model, held_out, step, device)
            run.log(record, due)
            if (due or stop) and not run.gave_up:
                save(config, "codec", step + 1, model, ema, optimizers, halve)
            if stop or run.gave_up:
                break
    run.finish(step + 1, stop)


def main():
    """Check the flags, read the videos, train."""
    config = parse_flags(CodecConfig, __doc__)
    most = dict(steps=math.inf, batch=math.inf, save_every=math.inf, lr=1, noise=10, ema=1, warmup=math.inf)
    least = dict(steps=1, batch=4, save_every=1)
    for key in most:
        if not least.get(key, 0) <= getattr(config, key) <= most[key]:
            limits = f"at least {least.get(key, 0)}" + f", at most {most[key]}" * (most[key] < math.inf)
            raise UserError(f"--{key} {getattr(config, key)}: must be {limits}")
    processes = start_processes(config.device)
    claim_folder(config.out, config.resume, processes)
    videos, held_videos = read_videos(config.data) if config.data else ([], [])
    held_out = {"stories": torch.from_numpy(story_pictures("held-out", 0, HELD_OUT, (SIZE, SIZE)))}
    if held_videos:
        held_out["videos"] = [frames[len(frames) * i // 6] for frames in held_videos for i in range(1, 6)]
    torch.manual_seed(config.seed)
    model = Autoencoder().to(processes.device)
    train(config, model, processes, videos, held_out)


if __name__ == "__main__":
    run_main(main)
