"""Evaluation: metrics, validation while training, and the benchmark commands.

python eval.py retrieval --checkpoint runs/pretrain/model.safetensors               held-out stories
python eval.py retrieval --checkpoint runs/pretrain/model.safetensors --history clip.mp4    frames of your own clip
python eval.py continuation --checkpoint runs/finetune/model.safetensors            held-out stories
python eval.py table1 runs/t1/*                stage 1 runs side by side: the paper's Table 1, with pictures
python eval.py table2 runs/t2/*                stage 2 runs side by side: Table 2
python eval.py story runs/t2/*                 accuracy by how long a character was away
python eval.py solvers --checkpoint runs/finetune/model.safetensors     quality by the number of passes of the DiT
python eval.py budget --preset wan-14b         parameters, tokens, FLOPs and memory of a preset, predicted
python eval.py speed                           this machine, timed
python eval.py judge --videos a.mp4 --endpoint URL --model NAME     ask a vision-language model
python eval.py elo votes.csv                   ratings from votes between pairs
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from model import add_noise
from sample import sample
from util.cli import UserError, run_command, run_main
from util.device import autocast
from util.sheets import save_preview
from util.video import to_frames

COMMANDS = {
    "retrieval": "bench.retrieval.retrieval",
    "continuation": "bench.retrieval.continuation",
    "table1": "bench.table1.table1",
    "table2": "bench.table2.table2",
    "story": "bench.story.story",
    "solvers": "bench.solvers.solvers",
    "budget": "bench.budget.budget",
    "speed": "bench.speed.speed",
    "judge": "bench.judge.judge",
    "elo": "bench.elo.elo",
}

# ---------------------------------------------------------------------------------------------------------------------
# Metrics (LPIPS: bench/lpips.py)


def psnr(a, b):
    """Peak signal-to-noise ratio of uint8 frames (..., H, W, 3), data range 255: dB per frame, (...); 100 if equal."""
    mse = (a.float() - b.float()).square().flatten(-3).mean(-1)
    return (10 * torch.log10(255**2 / mse)).clamp(max=100)


def ssim(a, b):
    """Structural similarity (Wang et al. 2004) of uint8 frames (F, H, W, 3): one value per frame, (F,).

    Gaussian window of 11 x 11, σ 1.5, data range 255, population covariance, mean over the channels and over the pixels
    whose window lies inside: scikit-image's structural_similarity with gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False. Raises UserError for smaller frames.
    """
    if min(a.shape[1:3]) < 11:
        raise UserError(f"SSIM needs frames of at least 11 x 11 pixels, these are {a.shape[1]} x {a.shape[2]}")
    a, b = (x.permute(0, 3, 1, 2).double() for x in (a, b))  # (F, 3, H, W)
    x = torch.arange(-5, 6, dtype=torch.float64, device=a.device)
    window = torch.exp(-(x**2) / (2 * 1.5**2))
    window = window / window.sum()
    kernel = (window[:, None] * window)[None, None].expand(3, 1, 11, 11)

    def mean(y):
        return F.conv2d(y, kernel, groups=3)

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b, cov = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2, mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    index = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return index.mean((1, 2, 3))


# ---------------------------------------------------------------------------------------------------------------------
# Validation while training

LEVELS = (0.25, 0.5, 0.75, 0.95, 0.99)  # noise levels at which the loss is reported


@torch.no_grad()
def validate_batch(config, base, model, draw, clips, rows, device):
    """({name: sum over these rows of held-out clips of one size}, (truth, result) frames or None).

    loss_t*: the training loss at fixed noise levels. psnr*: dB, against the original pixels or, without them, against
    the codec's reconstruction; latent_mse* where there is no decoder. _one_step: one step from pure noise, the
    conditional mean; else the full sampler. _wrong_memory: with the memory of the next clip, which should be clearly
    worse if the model reads its memory.
    """
    batch, sums, (low, high) = draw(clips, rows, 0).to(device), {}, base.noise_range(config.expert)
    with autocast(device):
        memory = model.remember(batch.high, batch.low)
        for level in (t for t in LEVELS if low <= t <= high):
            t = torch.full_like(batch.t, level)
            v = model.dit(add_noise(batch.target, batch.noise, t), 1000 * t, batch.text, batch.times, memory)
            sums[f"loss_t{level}"] = (batch.noise - batch.target - v).square().flatten(1).mean(1).sum()

        if config.expert:  # without the other one it cannot sample
            return sums, None

        def generate(memory, steps=config.sample_steps):
            x = sample(model.dit, batch.noise, batch.text, batch.times, memory, steps, config.sample_shift)
            return x.float()

        made = {"_one_step": generate(memory, 1), "": generate(memory)}
        if memory is not None and len(clips) > 1:
            other = draw(clips, [(row + 1) % len(clips) for row in rows], 0).to(device)
            wrong = model.remember(other.high, other.low)
            made |= {"_one_step_wrong_memory": generate(wrong, 1), "_wrong_memory": generate(wrong)}
    if not base.codec.decodes:
        for name, x in made.items():
            sums[f"latent_mse{name}"] = (x - batch.target).square().flatten(1).mean(1).sum()
        return sums, None

    def decode(x):
        return to_frames(base.codec.show(batch.high, x, batch.times))

    truth = decode(batch.target) if batch.truth is None else batch.truth
    frames = {name: decode(x) for name, x in made.items()}
    for name, x in frames.items():
        sums[f"psnr{name}"] = psnr(x, truth).mean(1).sum()
    return sums, (truth.cpu(), frames[""].cpu())


def validate(config, base, model, draw, clips, step, processes):
    """{name: mean over all held-out clips}, see validate_batch(). The ranks share the clips; rank 0 writes a preview.

    draw(clips, rows, step) makes a batch, the same at every call.
    """
    totals, counts, pictures = {}, {}, None
    for members in clips.buckets.values():
        mine = range(processes.rank, len(members), processes.world_size)
        for i in range(0, len(mine), config.micro_batch):
            rows = mine[i : i + config.micro_batch]
            some = [clips[k] for k in members]
            sums, made = validate_batch(config, base, model, draw, some, rows, processes.device)
            for name, value in sums.items():
                totals[name] = totals.get(name, 0) + value.item()
                counts[name] = counts.get(name, 0) + len(rows)
            pictures = pictures or made
    totals, counts = processes.sum_dicts([totals, counts])
    if processes.rank == 0 and pictures:
        save_preview(Path(config.out) / f"preview_{step + 1:06d}.png", *pictures, replace=True)
    return {name: round(totals[name] / counts[name], 4) for name in totals}


def main():
    run_command("eval.py", COMMANDS, __doc__)


if __name__ == "__main__":
    run_main(main)
