"""How well frames of the history are retrieved from memory, and how well the next section continues it.

python eval.py retrieval --checkpoint runs/pretrain/model.safetensors               held-out stories
python eval.py retrieval --checkpoint runs/pretrain/model.safetensors --history clip.mp4    frames of your own clip
python eval.py continuation --checkpoint runs/finetune/model.safetensors            held-out stories
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from bench.lpips import open_lpips
from bench.runs import EvalConfig, open_checkpoint, parse, stories
from bench.stats import interval
from data import Clip, Clips
from dolls.dataset import HISTORY_SECTIONS
from eval import psnr, save_preview, ssim
from finetune import section_batch
from pretrain import PretrainConfig, collate, draw_retrieval, generator
from sample import sample
from util.cli import UserError, warn
from util.device import autocast, pick_device
from util.files import check_output
from util.folder import read_clip
from util.video import to_frames, to_pixels


@dataclass
class PictureConfig(EvalConfig):
    init: str = ""  # Wan: the base DiT under the checkpoint's LoRA
    vae: str = ""  # Wan: local folder of its VAE in the diffusers layout; nano and small: a codec file
    lpips: str = ""  # folder with alexnet-owt-*.pth (torchvision) and alex.pth (lpips): measure LPIPS too


@dataclass
class RetrievalConfig(PictureConfig):
    checkpoint: str = "runs/pretrain/model.safetensors"  # weights from pretrain.py
    history: str = ""  # your own clip; without it, held-out stories of the paper-doll world
    queries: int = 4  # frames retrieved of each
    out: str = "out/retrieval.png"  # picture: original, model and difference rows


@dataclass
class ContinuationConfig(PictureConfig):
    checkpoint: str = "checkpoints/nano.safetensors"  # weights from finetune.py
    out: str = "out/continuation.png"  # picture: original, model and difference rows


# ---------------------------------------------------------------------------------------------------------------------
# Reconstruct and measure


@torch.no_grad()
def reconstruct_batch(model, base, draw, rows, n_clips, config, controls):
    """reconstruct() for some rows: {name: frames}, but age and truth as they are in the batch."""
    device = pick_device(config.device)
    batch = draw(rows).to(device)

    def generate(memory, steps=config.steps):
        return sample(model.dit, batch.noise, batch.text, batch.times, memory, steps, config.shift).float()

    made = {"codec": batch.target}
    with autocast(device):
        if model:
            memory = model.remember(batch.high, batch.low)
            made |= {"one_step": generate(memory, 1), "model": generate(memory)}
        if controls:
            made["no_memory"] = generate(None)
        if controls and n_clips > 1:
            other = draw([(row + 1) % n_clips for row in rows]).to(device)
            made["wrong_memory"] = generate(model.remember(other.high, other.low))
    frames = {name: to_frames(base.codec.show(batch.high, x, batch.times)) for name, x in made.items()}
    return {"truth": batch.truth, "age": batch.high.shape[2] - 1 - batch.times, **frames}


def reconstruct(model, base, draw, n_clips, config, controls=True):
    """Denoise the targets of draw(rows) -> Batch with several memories: {name: frames uint8 (n, F', H, W, 3)}.

    truth; codec, its ceiling; one_step, from pure noise in a single step; model, the full sampler; and, as controls,
    the same with no_memory, and with wrong_memory, that of the next clip (if there is one). And age (n, F'), how many
    latent frames before the newest of the history each frame is. model: None for truth, codec and age alone.
    """
    results = {}
    for first in tqdm(range(0, n_clips, config.batch), desc="evaluating"):
        rows = range(first, min(first + config.batch, n_clips))
        for name, x in reconstruct_batch(model, base, draw, rows, n_clips, config, controls).items():
            results.setdefault(name, []).append(x.cpu())
    return {name: torch.cat(x) for name, x in results.items()}


def measure(frames, truth, lpips):
    """{metric: (n, F), one value per frame} of uint8 frames (n, F, H, W, 3); lpips: an LPIPS, or None to skip it."""
    metrics = dict(psnr=psnr, ssim=ssim) | ({"lpips": lpips} if lpips else {})
    return {name: torch.stack([metric(a, b) for a, b in zip(frames, truth)]) for name, metric in metrics.items()}


def metric_cells(frames, truth, lpips):
    """The columns of a printed line: PSNR, SSIM and LPIPS, means over clips with their 95 % intervals."""
    cells = {"psnr": " " * 18, "ssim": " " * 16, "lpips": f"{'n/a':>16}"}
    for metric, values in measure(frames, truth, lpips).items():
        mean, half = interval(values.mean(1))
        digits, width = (2, 18) if metric == "psnr" else (3, 16)
        cell = f"{mean:.{digits}f}" + (f" ± {half:5.{digits}f}" if len(values) > 1 else "")
        cells[metric] = f"{cell:>{width}}"
    return "".join(cells.values())


def report(made, trained, config, what, lpips):
    """Print a line for each result of reconstruct(), and write a picture of the first clips."""
    truth = made["truth"]
    print(
        f"{config.checkpoint}: {trained['method']} {trained['rate']}, step {trained['step']}, seed {trained['seed']}; "
        f"{len(truth)} clips x {truth.shape[1]} frames, {what}, noise seed {config.seed}, {config.steps} Euler steps, "
        f"shift {config.shift:g}"
    )
    print(f"{'':14}{'PSNR dB':>18}{'SSIM':>16}{'LPIPS':>16}     mean over clips with its 95 % interval")
    for name, frames in made.items():
        if name not in ("truth", "age"):
            print(f"{name:14}{metric_cells(frames, truth, lpips)}")
    if "wrong_memory" not in made:
        warn("no row wrong_memory: that would be the memory of another clip, and there is only one")
    save_preview(Path(config.out), truth, made["model"])
    print(f"wrote {config.out}")


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def own_clip(config, base, encoder):
    """The video --history as a dataset of one clip, with its original pixels. Raises UserError if it is too short."""
    codec, frames = base.codec, read_clip(config.history, base)
    frames = frames[: codec.frames(len(frames))]
    least = base.section * codec.stride[0] + codec.causal
    if len(frames) < least:
        raise UserError(
            f"{config.history} has {len(frames)} frames at {base.fps} fps; at least {least} are needed: give a longer "
            "clip"
        )
    # one frame per latent, as codec.show() returns
    pixels, rate = to_pixels(frames)[None], encoder.low_rate
    low = codec.encode_low(pixels, rate)[0] if rate else None
    return Clips([Clip(codec.encode(pixels)[0], [], frames[:: codec.stride[0]], low=low)])


def clean_retrieval(config, base, encoder, clips):
    """draw(rows) for reconstruct(): --queries frames of each clean history, without a prompt, so that only memory can
    answer."""
    settings = PretrainConfig(mask="none", text_drop=1.0, queries=config.queries, seed=config.seed)
    return lambda rows: draw_retrieval(settings, base, encoder, clips, rows, 0)


def retrieval(argv):
    """Retrieve frames of the history from memory: PSNR, SSIM and a picture."""
    config = parse(RetrievalConfig, retrieval, argv)
    check_output(config.out, [config.history, config.checkpoint])
    lpips = open_lpips(config)
    model, base, trained = open_checkpoint(config.checkpoint, config, "pretrain")
    clips = own_clip(config, base, model.encoder) if config.history else stories(config, base, model.encoder.low_rate)
    frames = min(model.encoder.whole(min(clip.frames, base.history)) for clip in clips)
    if config.queries > frames:
        raise UserError(f"--queries {config.queries}: a history has {frames} frames to choose from; give fewer")
    draw = clean_retrieval(config, base, model.encoder, clips)
    made = reconstruct(model, base, draw, len(clips), config)
    report(made, trained, config, "no prompts", lpips)


def continuation(argv):
    """Write the section after a full history of held-out stories: PSNR and SSIM against the true one; a picture."""
    config = parse(ContinuationConfig, continuation, argv)
    check_output(config.out, [config.checkpoint])
    lpips = open_lpips(config)
    model, base, trained = open_checkpoint(config.checkpoint, config, "finetune")
    clips = stories(config, base, model.encoder.low_rate)
    begin = min(base.history, HISTORY_SECTIONS * base.section)

    def draw(rows):
        batches = []
        for row in rows:
            text, g = clips[row].text(begin, base.prompts), generator(config.seed, row)
            batches.append(section_batch(base, model.encoder, clips[row], 0, begin, text, torch.ones(1), g))
        return collate(batches)

    report(reconstruct(model, base, draw, len(clips), config), trained, config, "with prompts", lpips)
