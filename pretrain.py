"""Stage 1: pretrain the memory encoder φ by frame retrieval. Also holds the training loop of both stages.

The DiT must denoise randomly chosen frames of a 20 s history given φ(H) (paper, section 3.1, equation 1):

    ‖(ε - H_Ω) - G_θ((H_Ω)_t, t, c, φ(H))‖²     Ω: the chosen frames; c: the caption of one of them, often dropped

    python pretrain.py                            one process, with or without a GPU
    torchrun --nproc_per_node=8 pretrain.py       the same global batch on eight GPUs
"""

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch

from bases import open_base
from data import open_dataset
from encoder import MemoryConfig, MemoryDiT, find_method
from eval import validate
from model import add_noise, noise_levels
from util.checkpoint import resume, save
from util.cli import UserError, check_numbers, parse_flags, run_main
from util.device import autocast
from util.distributed import compile_blocks, start_processes
from util.files import shipped
from util.optim import EMA, make_optimizers, set_learning_rate
from util.run import Run, check_init, claim_folder, describe


@dataclass
class Config(MemoryConfig):
    """Settings of both stages."""

    preset: str = "nano"  # base, model and data sizes: nano, small, wan-1.3b, wan-14b, wan2.2-5b, wan2.2-a14b, hunyuan
    data: str = "world"  # "world" (paper dolls), a folder of videos, a data.py cache, or a dataset as NAME:ARGUMENT
    init: str = "checkpoints/nano-base.safetensors"  # base DiT: a file or folder of weights, or "random"
    expert: str = None  # wan2.2-a14b: which of its two DiTs to train, high or low, on that one's noise levels
    lora: int = None  # LoRA rank; 0 trains the whole DiT [the preset's]
    vae: str = ""  # local folder of the base's VAE, for PSNR and previews; nano and small: a codec file of your own
    steps: int = 250  # optimizer steps
    batch: int = 8  # clips per step, over all processes
    micro_batch: int = 8  # clips per forward pass on one process; gradients are accumulated up to the batch
    optimizer: str = None  # muon (for matrices; AdamW for the rest, see util/optim.py) or adamw [the preset's]
    lr: float = None  # peak learning rate; with muon, AdamW's parameters get a tenth or a hundredth [the preset's]
    encoder_lr: float = 1.0  # φ's learning rate, as a fraction of --lr
    warmup: int = 50  # steps of linear warm-up; then a cosine down to zero
    clip_grad: float = 1.0  # clip the gradient to this norm
    ema: float = 0.995  # decay of the weight average that is saved and sampled from
    seed: int = 0  # of weights, data order and noise
    clips: int = 2048  # stories of the paper-doll world to train on
    held_out: int = 16  # at most this many validation clips (of a folder of videos: one in ten)
    sample_steps: int = 10  # sampler steps in validation
    sample_shift: float = 3.0  # timestep shift of that sampler
    save_every: int = 125  # steps between checkpoints, validations and previews
    compile: bool = False  # torch.compile the DiT's blocks
    device: str = "auto"  # auto, cpu, cuda, mps
    resume: bool = False  # continue the run in --out
    cache: str = "cache"  # folder for encoded clips


@dataclass
class PretrainConfig(Config):
    out: str = "runs/pretrain"  # run folder: model.safetensors, state.pt, log.jsonl, previews
    text_drop: float = 0.5  # fraction of samples without a prompt
    t_mean: float = 1.3  # noise levels that the DiT trains on: sigmoid of N(t_mean, t_std)
    t_std: float = 1.0  # their spread
    mask: str = "none"  # what φ sees outside Ω: "noise" (the paper's later version) or "none" (clean frames)
    queries: int = 4  # frames in Ω, retrieved together


# ---------------------------------------------------------------------------------------------------------------------
# What to denoise


@dataclass
class Batch:
    """One clip per row: denoise `target`, which belongs at `times`, given φ(high, low)."""

    high: torch.Tensor  # (B, C, F, H, W) history as φ sees it
    low: torch.Tensor  # latents of the smaller video (whole segments only)
    target: torch.Tensor  # (B, C, F', H, W) clean
    times: torch.Tensor  # (B, F') in latent frames, 0 at the start of the history
    noise: torch.Tensor  # like target
    t: torch.Tensor  # (B,) noise levels
    text: torch.Tensor  # (B, L, text_dim)
    truth: torch.Tensor = None  # (B, F', height, width, 3) original pixels, uint8, of held-out clips

    def pin(self):
        return Batch(**{k: v if v is None else v.pin_memory() for k, v in vars(self).items()})

    def to(self, device):
        return Batch(**{k: v if v is None else v.to(device, non_blocking=True) for k, v in vars(self).items()})


def collate(batches):
    """Concatenate batches of one row each."""
    columns = {k: [getattr(batch, k) for batch in batches] for k in vars(batches[0])}
    return Batch(**{k: None if v[0] is None else torch.cat(v) for k, v in columns.items()})


def generator(*key):
    """A random generator for this key alone, e.g. (seed, step, row): the same for any number of processes and after a
    resume, with no state to carry."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def noise_level(config, base, step, row):
    """Noise level, shape (1,), of one row of the global batch.

    Evenly spaced quantiles with one random offset per step, so every step covers all levels (the low-discrepancy
    sampler of Kingma et al. 2021).
    """
    offset = torch.rand(1, generator=generator(config.seed, step, "t"))
    quantile, between = (row / config.batch + offset) % 1, base.noise_range(config.expert)
    return noise_levels(quantile, config.t_mean, config.t_std, between)


def draw_retrieval(config, base, encoder, clips, rows, step):
    """Stage 1: choose Ω in a history of each clip; the target is H_Ω. clips: the global batch; rows: which of them to
    return."""
    history = min(base.history, *(encoder.whole(clip.frames) for clip in clips))
    batches = []
    for row in rows:
        clip, g = clips[row], generator(config.seed, step, row)
        # a causal codec's first latent is unlike all others, so its history begins where the clip does
        first = 0 if base.codec.causal else int(torch.randint(clip.frames - history + 1, (), generator=g))
        high, low = clip.history(first, first + history, encoder, base.codec)  # (1, C, F, H, W)
        omega = torch.randperm(history, generator=g)[: config.queries].sort().values
        target = high[:, :, omega]
        if config.mask == "noise":
            high, low = mask_history(high, low, omega, encoder.rate[0], g)
        captioned = omega[torch.randint(len(omega), (), generator=g)]
        prompted = torch.rand((), generator=g) >= config.text_drop
        text = clip.text(first + int(captioned), base.prompts) if prompted else base.prompts("")[None]
        noise = torch.randn(target.shape, generator=g)
        t, times = noise_level(config, base, step, row), omega[None].float()
        batches.append(Batch(high, low, target, times, noise, t, text, clip.truth(first + omega)))
    return collate(batches)


def mask_history(high, low, omega, rt, g):
    """mask(H, Ω): frames in Ω stay clean, all others get noise of one level, sigmoid(N(0.2, 1)); low gets its own
    noise, and is clean where any of its rt frames is in Ω (paper, section 3.1)."""
    level = noise_levels(torch.rand(1, generator=g), 0.2)
    clean = torch.zeros(high.shape[2], dtype=torch.bool)
    clean[omega] = True
    padded = torch.cat([clean[:1].expand(-len(clean) % rt), clean])  # as pad_replicate does
    clean_low = padded.view(-1, rt).any(1)

    def keep(x, clean):
        return torch.where(clean[:, None, None], x, add_noise(x, torch.randn(x.shape, generator=g), level))

    return keep(high, clean), keep(low, clean_low) if low.shape[2] else low


# ---------------------------------------------------------------------------------------------------------------------
# The training loop of both stages


def train(config, stage, model, base, processes, clips, held_out, draw, draw_held_out):
    """Train `model` on `clips`. draw(clips, rows, step) -> Batch makes a training batch, draw_held_out a validation
    batch."""
    device, main = processes.device, processes.rank == 0
    ema = EMA(model, config.ema)
    optimizers = make_optimizers(model, config.optimizer, config.lr, config.encoder_lr)
    first = resume(config, stage, model, ema, optimizers) if config.resume else 0
    processes.same_start(first, [*ema.params, *ema.shadow])
    if config.compile:
        compile_blocks(model.dit)
    ddp = processes.wrap(model, find_unused_parameters=model.encoder.may_skip_weights)
    run = Run(stage, config.out, first, config.steps, processes)
    if main:
        describe(config.batch, config.micro_batch, model, base, processes)
    step, stop, batches = first, 0, draw_ahead(config, processes, clips, draw, first)
    for step in run.bar:
        set_learning_rate(optimizers, step, config.steps, config.warmup)
        total, last = torch.zeros((), device=device), False
        while not last:  # accumulate the gradient of the global batch's mean loss
            batch, last = next(batches)
            batch = batch.to(device)
            x_t = add_noise(batch.target, batch.noise, batch.t)
            with processes.accumulate(ddp, last):
                with autocast(device):
                    v = ddp(batch.high, batch.low, x_t, batch.t, batch.text, batch.times)  # G(x_t, t, c, φ(H))
                loss = (batch.noise - batch.target - v).square().flatten(1).mean(1).sum()
                (loss * processes.world_size / config.batch).backward()  # DDP averages over processes: undo it
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(ema.params, config.clip_grad)
        mean_loss, norm, stop = processes.sum_loss(total / config.batch, norm, run.signals)
        if run.is_finite(norm, step):
            for optimizer in optimizers:
                optimizer.step()
            ema.update(step)
        ddp.zero_grad(set_to_none=True)
        record = {"step": step + 1, "loss": mean_loss, "grad_norm": norm}
        due = step + 1 == config.steps or (step + 1) % config.save_every == 0
        if due:
            with ema.swapped():
                record |= validate(config, base, model, draw_held_out, held_out, step, processes)
        run.log(record, due)
        if main and (due or stop) and not run.gave_up:
            save(config, stage, step + 1, model, ema, optimizers, base.exports, base.codec.identity)
        if stop or run.gave_up:
            break
    del ddp  # freed here: destroying the process group from DDP's destructor can deadlock on the GIL
    run.finish(step + 1, stop)


def draw_ahead(config, processes, clips, draw, first):
    """Yield this rank's micro-batches from step `first` on, each with whether it is the last of its step.

    A thread draws the next one while the current one is computed.
    """
    mine = range(processes.rank, config.batch, processes.world_size)  # this rank's rows of the global batch
    micro_batches = [mine[i : i + config.micro_batch] for i in range(0, len(mine), config.micro_batch)]

    def make(step, rows):
        chosen = [clips[i] for i in clips.batch(step, config.batch, config.seed)]
        batch = draw(chosen, rows, step)
        if processes.device.type == "cuda":  # pinned, it is copied while the GPU computes
            with torch.cuda.device(processes.device):  # a new thread would use the first GPU
                batch = batch.pin()
        return batch, rows is micro_batches[-1]

    tasks = ((step, rows) for step in range(first, config.steps) for rows in micro_batches)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(make, *next(tasks))
        for task in tasks:
            ready, coming = coming, pool.submit(make, *task)
            yield ready.result()
        yield coming.result()


# ---------------------------------------------------------------------------------------------------------------------
# Start


def check(config):
    """Fill in the preset's defaults and reject invalid settings, before anything is loaded. Raises UserError."""
    base = open_base(config.preset)
    for key in ("lora", "optimizer", "lr", "t_mean", "t_std"):
        if getattr(config, key) is None:
            setattr(config, key, getattr(base, key))
    config.check_memory(base)
    check_numbers(config, "steps batch micro_batch save_every held_out sample_steps clips queries", 1)
    if getattr(config, "queries", 1) > base.history:
        raise UserError(f"--queries {config.queries}: a history has {base.history} frames to choose from; give fewer")
    check_numbers(config, "lr encoder_lr clip_grad t_std sample_shift", 0, above=True)
    check_numbers(config, "lora warmup", 0)
    check_numbers(config, "text_drop ema history_noise", 0, 1)
    if not math.isfinite(config.t_mean):
        raise UserError(f"--t_mean {config.t_mean}: give a number")
    if config.optimizer not in ("muon", "adamw"):
        raise UserError(f"--optimizer {config.optimizer}: choose muon or adamw")
    check_init(config, base)


def make_model(config, base, device):
    """The DiT with the base's weights, frozen under a fresh LoRA if one is asked for, and a fresh φ."""
    torch.manual_seed(config.seed)
    model = MemoryDiT(base, **config.memory(), empty=config.init != "random")
    if config.init != "random":
        weights = base.expert_weights(shipped(config.init), config.expert)
        base.load_dit(model.dit, weights, device, frozen=bool(config.lora))
    model.to(device)  # φ too, before it takes weights over from the DiT
    model.encoder.start_from(model.dit)
    if config.lora:
        base.add_lora(model.dit, config.lora)
    if config.cross_attention:
        model.dit.add_cross_attention()
        model.to(device)
    model.dit.recompute = base.recompute
    return model


def setup(config):
    """(model, base, processes, clips, held-out clips) of a config that check() has seen. Raises UserError."""
    processes = start_processes(config.device)
    base = open_base(config.preset, config.vae, device=processes.device)
    if config.batch < processes.world_size:
        raise UserError(f"--batch {config.batch}: must be at least the number of processes, {processes.world_size}")
    claim_folder(config.out, config.resume, processes)
    model = make_model(config, base, processes.device)
    with processes.main_first():  # rank 0 fills the cache
        sizes = config.clips, config.held_out
        clips, held_out = open_dataset(config.data, base, config.cache, *sizes, model.encoder.low_rate)
    return model, base, processes, clips, held_out


def main():
    """Check the flags, build model and data, train."""
    config = parse_flags(PretrainConfig, __doc__)
    check(config)
    if config.mask not in ("none", "noise"):
        raise UserError(f"--mask {config.mask}: choose none or noise")
    if config.window or config.anchor:
        raise UserError("--window, --anchor: stage 1 asks for frames that these show; give them to finetune.py")
    if not find_method(config.method).has_stage1:
        raise UserError(f"--method {config.method} keeps too few frames to retrieve, so no stage 1: run finetune.py")
    model, base, processes, clips, held_out = setup(config)
    draw = partial(draw_retrieval, config, base, model.encoder)
    # validate on clean histories, without prompts: only memory can answer
    draw_held_out = partial(draw_retrieval, replace(config, mask="none", text_drop=1.0), base, model.encoder)
    train(config, "pretrain", model, base, processes, clips, held_out, draw, draw_held_out)


if __name__ == "__main__":
    run_main(main)
