"""The figures and pictures of held-out clips that both stages make while they train."""
from pathlib import Path

import torch
import torch.distributed as dist

from codec import psnr, to_frames
from devices import autocast
from model import euler, flow_loss
from video import contact_strip

LOSS_TIMES = (0.25, 0.5, 0.75, 0.95, 0.99)


@torch.no_grad()
def evaluate(config, tools, draw, model, clips, rows):
    """Sums of the figures over some rows of held-out clips of one size, the same at every call: the loss at fixed t;
    PSNR (dB, against the original pixels, or if they are not at hand against what the codec makes of them; without a
    decoder the squared error of latents) of one step from pure noise (the conditional mean), of the full sampler, and
    of both with the memory of the next clip, which must be clearly worse if the memory is read at all.
    And (truth, result) frames, or None."""
    batch = draw(config, tools, clips, rows, 0).to(tools.device)
    with autocast(tools.device):
        def sample(memory, steps=config.sample_steps):
            return euler(model.dit, batch.noise, batch.text, batch.frames, memory, steps, config.sample_shift).float()
        memory = model.encode(batch.hr, batch.lr)
        sums = {f"loss_t{t}": flow_loss(model.dit, batch.target, batch.noise, torch.full_like(batch.t, t), batch.text,
                                        batch.frames, memory).sum() for t in LOSS_TIMES}
        made = {"_one_step": sample(memory, 1), "": sample(memory)}
        if model.encoder and len(clips) > 1:
            other = draw(config, tools, clips, [(row + 1) % len(clips) for row in rows], 0).to(tools.device)
            wrong = model.encode(other.hr, other.lr)
            made |= {"_one_step_wrong_memory": sample(wrong, 1), "_wrong_memory": sample(wrong)}
    if not tools.codec.decodes:
        sums |= {f"latent_mse{name}": (x - batch.target).square().flatten(1).mean(1).sum() for name, x in made.items()}
        return sums, None
    show = lambda x: to_frames(tools.codec.show(batch.hr, x, batch.frames))
    truth = show(batch.target) if batch.truth is None else batch.truth
    frames = {name: show(x) for name, x in made.items()}
    sums |= {f"psnr{name}": psnr(x, truth).mean(1).sum() for name, x in frames.items()}
    return sums, (truth.cpu(), frames[""].cpu())


def evaluate_all(config, tools, draw, model, clips):
    """Means of the figures over all held-out clips, which the processes share; and pictures of this process's first
    ones."""
    totals, counts, pictures = {}, {}, None
    for members in clips.buckets.values():                          # a batch is of one size, and full or shorter
        mine = range(tools.rank, len(members), tools.world_size)
        for i in range(0, len(mine), config.micro_batch):
            rows = mine[i:i + config.micro_batch]
            sums, made = evaluate(config, tools, draw, model, [clips[i] for i in members], rows)
            for name, value in sums.items():
                totals[name] = totals.get(name, 0) + value.item()
                counts[name] = counts.get(name, 0) + len(rows)
            pictures = pictures or made
    if tools.world_size > 1:
        gathered = [None] * tools.world_size
        dist.all_gather_object(gathered, (totals, counts))
        names = dict.fromkeys(name for part, _ in gathered for name in part)
        totals, counts = ({name: sum(part[k].get(name, 0) for part in gathered) for name in names} for k in (0, 1))
    return {name: totals[name] / counts[name] for name in totals}, pictures


def preview(path, truth, result, n_clips=4):
    """A PNG with three rows a clip: original frames, what the model made, their difference."""
    rows = []
    for a, b in zip(truth[:n_clips], result[:n_clips]):
        difference = (a.int() - b.int()).abs().clamp(max=255).to(torch.uint8)
        rows += [("original", a), ("model", b), ("difference", difference)]
    contact_strip(rows, path)


def look(config, tools, draw, model, held_out, step):
    """{name: figure} of the held-out clips, and a preview of the first ones."""
    figures, pictures = evaluate_all(config, tools, draw, model, held_out)
    if tools.rank == 0 and pictures:
        preview(Path(config.out) / f"preview_{step + 1:06d}.png", *pictures)
    return {name: round(value, 4) for name, value in figures.items()}
