"""Continue held-out stories with finished runs and score what they wrote: what Table 2 and the story test share.

How a section is scored: dolls/scores.py.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from bases import open_base
from bench.costs import flops
from bench.runs import EvalConfig, describe_machine, measure_runs, open_checkpoint, question
from bench.speed import alternate
from bench.stats import per_clip
from dolls.scores import MAIN, score
from pretrain import generator
from sample import Memory, euler, sample
from util.cli import UserError
from util.device import autocast, pick_device
from util.video import to_frames, to_pixels


@dataclass
class StoryConfig(EvalConfig):
    guidance: float = 1.5  # classifier-free guidance: 1 is none
    vae: str = ""  # the codec file that the runs were trained with, if it is one of your own
    out: str = "out"  # folder for table2_story.csv, .png and _strip.png


def story_base(runs, config):
    """(base of the runs, sections of its history). Raises UserError for a base without stories."""
    base = open_base(next(iter(runs.values()))["preset"], config.vae)
    if base.needs_cache:
        raise UserError(f"--preset {base.name}: stories of the paper-doll world are for runs of nano and small")
    return base, base.history // base.section


@torch.no_grad()
def continue_stories(model, base, clips, first, sections, config, solver=euler):
    """Write sections from number `first` on, each from all before it: uint8 (n, S, F, H, W, 3)."""
    device, made = pick_device(config.device), []
    for start in tqdm(range(0, len(clips), config.batch), desc=f"continuing, {type(model.encoder).__name__}"):
        rows = range(start, min(start + config.batch, len(clips)))
        history = torch.cat([clips[row].cut(0, first * base.section) for row in rows]).to(device)
        memory = Memory(model, base.codec, base.history // base.section)  # as much as training showed it
        pixels = to_pixels(torch.stack([clips[row].pixels[: first * base.section] for row in rows])).to(device)
        with autocast(device):
            memory.append(history, pixels)
        shape = 1, history.shape[1], base.section, *history.shape[3:]
        for k in range(first, first + sections):
            times = k * base.section + torch.arange(base.section, device=device)
            noise = [torch.randn(shape, generator=generator(config.seed, row, k)) for row in rows]
            text = [clips[row].text(k * base.section, base.prompts) for row in rows]
            noise, text = torch.cat(noise).to(device), torch.cat(text).to(device)
            settings = config.steps, config.shift, config.guidance, solver
            with autocast(device):
                x = sample(model.dit, noise, text, times, memory.context(), *settings).float()
                pixels = base.codec.decode(x)
                memory.append(x, pixels)
            made.append(to_frames(pixels).cpu())  # (B, F, H, W, 3)
    return torch.cat([torch.stack(made[i : i + sections], 1) for i in range(0, len(made), sections)])


def costs(model, base, clip, config):
    """{column: value} of writing a section after a full history of one clip.

    Memory tokens; FLOPs and milliseconds of all the sampler's forward passes (one is timed, the median of 5) and of φ
    of the new section.
    """
    encoder, codec, device = model.encoder, base.codec, pick_device(config.device)
    calls = config.steps * (1 if config.guidance == 1 else 2)
    high = clip.cut(0, base.history).to(device)
    new, pixels = high[:, :, -base.section :], to_pixels(clip.pixels[None, : base.history]).to(device)

    def remember(latents):
        n = latents.shape[2]
        low = codec.low_encoder(encoder.rate)(pixels[:, :, :n]) if encoder.reads_low else latents[:, :, :0]
        return model.remember(latents, low)

    with torch.no_grad(), autocast(device), FlopCounterMode(display=False) as counter:
        memory = remember(high)
        before = counter.get_total_flops()
        remember(new)
        of_encoder = counter.get_total_flops() - before
    tokens = model.count(memory)
    noisy = math.prod(new.shape[2:]) // math.prod(base.dit.patch)
    options = dict(cached=model.config.cache_memory, cross_attention=model.config.cross_attention)
    text, t = clip.text(base.history, base.prompts).to(device), torch.full((1,), 500.0, device=device)
    times = base.history + torch.arange(base.section, device=device)
    jobs = {"section": partial(model.dit, new, t, text, times, memory), "φ": partial(remember, new)}
    with torch.no_grad(), autocast(device):
        spent = {name: 1000 * median(x) for name, x in alternate(jobs, 5, device).items()}
    return {
        "tokens": tokens,
        "flops_per_section": calls * flops(base.dit, noisy, tokens, **options) + of_encoder,
        "ms_per_section": round(calls * spent["section"] + spent["φ"], 1),
    }


def score_sections(made, clips, first):
    """{score: (n, S)} of sections uint8 (n, S, F, H, W, 3) from number `first` on; and consistency, the mean of the
    four main scores, (n, 1)."""
    values = {name: x[0] for name, x in score(made[None], [clip.story for clip in clips], first).items()}
    return values | {"consistency": torch.stack([per_clip(values[name]) for name in MAIN]).mean(0)[:, None]}


def continue_runs(runs, name, base, clips, first, sections, config, select):
    """[Row]: the same clips continued with each run, and scored.

    name: of the file that keeps this in a run's folder; select: (n, S, F, H, W, 3) -> the pictures of a Row, (k, F', H,
    W, 3).
    """

    def measure(folder):
        model, base, _ = open_checkpoint(Path(folder) / "model.safetensors", config, "finetune")
        made = continue_stories(model, base, clips, first, sections, config)
        return score_sections(made, clips, first), select(made).contiguous(), costs(model, base, clips[0], config)

    asked = question(config, base.codec, clips, "steps", "shift", "guidance", "seed", first=first, sections=sections)
    return measure_runs(runs, name, asked, describe_machine(pick_device(config.device)), measure)
