"""Stage 1: pretrain the memory encoder φ by frame retrieval. And the one training loop that both stages use.

The DiT must denoise randomly chosen frames of a 20 s history given φ of it (paper, section 3.1, equation 1):

    ‖(ε - H_Ω) - G_θ((H_Ω)_t, t, c, φ(H))‖²     Ω: the chosen frames; c: the caption of one of them, often dropped

    python pretrain.py                            one process, with a GPU or without
    torchrun --nproc_per_node=8 pretrain.py       the same global batch on eight
"""
import contextlib
import hashlib
import json
import math
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from codec import make_codec, make_prompts
from data import open_dataset
from devices import autocast
from distributed import first_before_others, leave, same_start, share, start_processes, wrap
from encoder import FRAME_METHODS, METHODS, MemoryDiT, parse_rate
from figures import look
from flags import parse_flags, run_main, warn
from model import PRESETS, Preset, UserError, add_lora, add_noise, get_preset, sample_t
from optim import EMA, learning_rate, make_optimizers
from saving import resume, save, start_log
from weights import load_base, own_config, weight_files


@dataclass
class Config:
    """What both stages share."""
    preset: str = "nano"          # model and data sizes: nano, small, wan-1.3b, wan-14b
    method: str = "proposed"      # what memory is: encoder.py lists the methods, and an unknown name prints them
    rate: str = None              # compression on the DiT's token grid, rows x columns x frames [the preset's]
    window: int = 1               # latent frames that --method sliding-window keeps
    data: str = "world"           # "world" (paper dolls), a folder of videos with captions, or one of data.py cache
    init: str = "checkpoints/nano-base.safetensors"    # base DiT: a file or folder of weights, or "random"
    lora: int = None              # rank of the update of a frozen DiT; 0 trains all of it [the preset's]
    vae: str = ""                 # Wan: local folder of its VAE, for figures in pixels and pictures while it trains
    steps: int = 250              # optimizer steps
    batch: int = 8                # clips a step, over all processes
    micro_batch: int = 8          # clips a forward pass on one process; gradients are accumulated up to the batch
    optimizer: str = None         # muon (for matrices; AdamW for the rest, see optim.py) or adamw [the preset's]
    lr: float = None              # peak learning rate; of muon, the rest has a tenth or a hundredth [the preset's]
    encoder_lr: float = 1.0       # φ's, as a share of it
    warmup: int = 50              # steps of linear warm-up; then a cosine down to zero
    clip_grad: float = 1.0        # largest norm of the gradient
    ema: float = 0.995            # decay of the weight average that is saved and sampled from
    seed: int = 0                 # of weights, data order and noise
    clips: int = 3072             # stories of the paper-doll world to train on
    held_out: int = 16            # at most so many clips for the figures in the log; of a folder of videos, one in ten
    sample_steps: int = 10        # Euler steps of the sampler in the log
    sample_shift: float = 3.0     # and its timestep shift
    save_every: int = 125         # steps between checkpoints, figures and previews
    compile: bool = False         # torch.compile the DiT's blocks
    device: str = "auto"          # auto, cpu, cuda, mps
    resume: bool = False          # go on in --out
    cache: str = "cache"          # folder for encoded clips


@dataclass
class PretrainConfig(Config):
    out: str = "runs/pretrain"    # run folder: model.safetensors, state.pt, log.jsonl, previews
    text_drop: float = 0.5        # share of samples without a prompt
    t_mean: float = 1.3           # noise levels that the DiT trains on: sigmoid of N(t_mean, t_std)
    t_std: float = 1.0            # their spread
    mask: str = "none"            # frames outside Ω that φ sees: "noise" (the paper's later version) or "none" (clean)
    queries: int = 4              # frames in Ω, retrieved together


# ---------------------------------------------------------------------------------------------------------------------
# What to denoise


@dataclass
class Batch:
    """A clip a row: denoise `target`, which belongs at `frames`, given φ(hr, lr)."""
    hr: torch.Tensor        # (B, C, F, H, W) history as φ sees it
    lr: torch.Tensor        # the same, downsampled (its whole segments only)
    target: torch.Tensor    # (B, C, F', H, W) clean
    frames: torch.Tensor    # (B, F') times in latent frames, 0 at the start of the history
    noise: torch.Tensor     # like target
    t: torch.Tensor         # (B,) noise levels
    text: torch.Tensor      # (B, L, text_dim)
    truth: object = None    # (B, F', height, width, 3) original pixels, uint8, of held-out clips

    def pin(self):
        return Batch(**{k: v if v is None else v.pin_memory() for k, v in vars(self).items()})

    def to(self, device):
        return Batch(**{k: v if v is None else v.to(device, non_blocking=True) for k, v in vars(self).items()})


def generator(*key):
    """A random generator for this key alone, e.g. (seed, step, row): the same for any number of processes, and after a
    resume, with no state to carry."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


@dataclass
class Tools:
    """What turns clips into batches, and which of the processes this one is."""
    preset: Preset
    codec: object
    prompts: object             # text -> (L, text_dim)
    encoder: object             # φ, or None for --method none
    device: torch.device
    rank: int = 0
    world_size: int = 1         # number of processes


def downsample(tools, hr):
    """The low-resolution history of whole segments of hr (B, C, F, H, W)."""
    n = tools.encoder.whole(hr.shape[2]) if tools.encoder else 0
    return tools.codec.downsample(hr[:, :, :n], tools.encoder.rate) if n else hr[:, :, :0]


def noise_level(config, step, row):
    """The t (1,) of a row of the global batch. One random offset a step for evenly spaced quantiles, so that every step
    meets low and high levels alike (the low-discrepancy sampler of Kingma et al. 2021)."""
    offset = torch.rand(1, generator=generator(config.seed, step, "t"))
    return sample_t((row / config.batch + offset) % 1, config.t_mean, config.t_std)


def draw_retrieval(config, tools, clips, rows, step):
    """Stage 1: choose Ω in a history of each clip; the target is H_Ω.
    clips: the global batch; rows: those to return."""
    history = min(tools.preset.history, *(tools.encoder.whole(clip.frames) for clip in clips))
    parts = []
    for row in rows:
        clip, g = clips[row], generator(config.seed, step, row)
        # a causal codec's first latent is unlike all others, so that its history begins where the clip does
        first = 0 if tools.codec.causal else int(torch.randint(clip.frames - history + 1, (), generator=g))
        hr = clip.cut(first, first + history)                                   # (1, C, F, H, W)
        omega = torch.randperm(history, generator=g)[:config.queries].sort().values
        lr, target = downsample(tools, hr), hr[:, :, omega]
        if config.mask == "noise":
            hr, lr = mask_history(hr, lr, omega, tools.encoder.rate[0], g)
        asked = omega[torch.randint(len(omega), (), generator=g)]
        shown = torch.rand((), generator=g) >= config.text_drop
        text = clip.text(first + int(asked), tools.prompts) if shown else tools.prompts("")[None]
        parts.append(Batch(hr, lr, target, omega[None].float(), torch.randn(target.shape, generator=g),
                           noise_level(config, step, row), text, clip.truth(first + omega)))
    return collate(parts)


def mask_history(hr, lr, omega, t, g):
    """mask(H, Ω): frames in Ω stay clean, all others get noise of one level, sigmoid(N(0.2, 1)); lr gets its own noise,
    and is clean where any of its t frames is in Ω (paper, section 3.1)."""
    level = sample_t(torch.rand(1, generator=g), 0.2)
    clean = torch.zeros(hr.shape[2], dtype=torch.bool)
    clean[omega] = True
    padded = torch.cat([clean[:1].expand(-len(clean) % t), clean])              # as pad_replicate does
    clean_lr = padded.view(-1, t).any(1)
    keep = lambda x, c: torch.where(c[:, None, None], x, add_noise(x, torch.randn(x.shape, generator=g), level))
    return keep(hr, clean), keep(lr, clean_lr)


def collate(parts):
    joined = {k: [getattr(p, k) for p in parts] for k in vars(parts[0])}
    return Batch(**{k: None if v[0] is None else torch.cat(v) for k, v in joined.items()})


# ---------------------------------------------------------------------------------------------------------------------
# The training loop of both stages


def describe(config, model, tools):
    """Print what is about to be trained."""
    count = lambda module: sum(p.numel() for p in module.parameters() if p.requires_grad) / 1e6
    print(f"training {count(model.dit):.1f} M parameters of the DiT" +
          (f", {count(model.encoder):.1f} M of the memory encoder" if model.encoder else ""))
    n = tools.world_size
    print(f"batch {config.batch} = {n} process{'es' * (n > 1)} x {config.batch / n:g} clips, "
          f"at most {config.micro_batch} at once")
    if model.encoder:
        p = tools.preset
        height, width = (size // stride for size, stride in zip(p.sizes[0], tools.codec.stride[1:]))    # of a latent
        history = torch.zeros(1, p.dit.in_dim, p.history, height, width, device=tools.device)
        with torch.no_grad():
            tokens = model.encode(history, downsample(tools, history))[0].shape[1]
        print(f"memory: {tokens} tokens for a history of {p.history} latents of {height}x{width} (uncompressed: "
              f"{p.history * math.prod(-(-size // n) for size, n in zip((height, width), p.dit.patch[1:]))}); "
              f"{p.dit.dim * tokens / history.numel():.3g} channels a latent value")


def draws(config, tools, draw, clips, first):
    """Yield this process's micro-batches from step `first` on, each with whether it is the last of its step. A thread
    draws the next one while one is computed."""
    mine = range(tools.rank, config.batch, tools.world_size)        # rows of the global batch that are this process's
    micros = [mine[i:i + config.micro_batch] for i in range(0, len(mine), config.micro_batch)]

    def make(step, rows):
        batch = draw(config, tools, [clips[i] for i in clips.batch(step, config.batch, config.seed)], rows, step)
        if tools.device.type == "cuda":                             # a copy then runs beside what the GPU computes
            with torch.cuda.device(tools.device):                   # a thread begins with the first GPU
                batch = batch.pin()
        return batch, rows is micros[-1]
    tasks = ((step, rows) for step in range(first, config.steps) for rows in micros)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(make, *next(tasks))
        for task in tasks:
            ready, coming = coming, pool.submit(make, *task)
            yield ready.result()
        yield coming.result()


def accumulate_gradients(config, tools, ddp, batches):
    """Gradients of the mean loss over the global batch, whatever the number of processes and micro-batches: the next
    ones of `batches`, see draws(). Returns the sum of this process's losses."""
    total, last = torch.zeros((), device=tools.device), False
    while not last:
        batch, last = next(batches)
        batch = batch.to(tools.device)
        with contextlib.nullcontext() if tools.world_size == 1 or last else ddp.no_sync():
            with autocast(tools.device):
                loss = ddp(batch.hr, batch.lr, batch.target, batch.frames, batch.noise, batch.t, batch.text).sum()
            (loss * tools.world_size / config.batch).backward()     # DDP averages over processes: undo it
        total += loss.detach()
    return total


def take_step(config, tools, ddp, optimizers, ema, batches, step):
    """One step, skipped where the gradient is not finite (the same on every process: gradients are shared). Returns
    (the sum of this process's losses, the norm of the gradient)."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(step, config)
    total = accumulate_gradients(config, tools, ddp, batches)
    norm = torch.nn.utils.clip_grad_norm_(ema.params, config.clip_grad)
    if norm.isfinite():
        for optimizer in optimizers:
            optimizer.step()
        ema.update(step)
    ddp.zero_grad(set_to_none=True)
    return total, norm


MOST_SKIPPED = 10       # steps in a row without a finite gradient, then a run is given up


def train(config, stage, draw, model, clips, held_out, tools, look_config, look_draw):
    """Train `model` on `clips`: draw(config, tools, clips, rows, step) says what to denoise. One loop, both stages.
    look_config, look_draw: what the figures on `held_out` are made with."""
    out, rank, world_size = Path(config.out), tools.rank, tools.world_size
    ema = EMA(model, config.ema)
    optimizers = make_optimizers(model, config)
    first = resume(config, stage, model, ema, optimizers) if config.resume else 0
    same_start(first, ema, world_size)
    ddp = wrap(config, model, tools)
    if rank == 0:
        if first >= config.steps:
            warn(f"{out} has {first} steps already: --steps {config.steps} asks for no more")
        start_log(out, first)
        describe(config, model, tools)
    signals = []                                                    # Ctrl-C and SIGTERM: finish the step, save, leave
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda number, frame: signals.append(number))

    skipped = 0                                                     # steps in a row without a finite gradient
    bar = tqdm(range(first, config.steps), initial=first, total=config.steps, desc=stage, disable=rank > 0)
    started, batches = time.time(), draws(config, tools, draw, clips, first)
    for step in bar:
        total, norm = take_step(config, tools, ddp, optimizers, ema, batches, step)
        skipped = 0 if norm.isfinite() else skipped + 1
        if skipped and rank == 0:
            tqdm.write(f"step {step + 1}: the gradient is not finite, the step is skipped")
        loss, stop = share(total / config.batch, signals, world_size)
        record = {"step": step + 1, "loss": loss, "grad_norm": norm.item()} | ({"skipped": skipped} if skipped else {})
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

        due = step + 1 == config.steps or (step + 1) % config.save_every == 0
        if due:
            record["minutes"] = round((time.time() - started) / 60, 2)     # of this start, after a --resume too
            with ema.swapped():
                record |= look(look_config, tools, look_draw, model, held_out, step)
            if rank == 0:
                tqdm.write("  ".join(f"{k} {v:.4g}" for k, v in record.items()))
        if rank == 0:
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
        if skipped == MOST_SKIPPED:                                 # the checkpoint stays that of a better time
            if rank == 0:
                tqdm.write(f"error: the gradient was not finite {skipped} times in a row, up to step {step + 1}; "
                           f"{out} stays as it was last saved", file=sys.stderr)
            leave(world_size)
            raise SystemExit(1)
        if rank == 0 and (due or stop):                             # last: what belongs to a saved step is all there
            save(config, stage, model, ema, optimizers, step + 1)
        if stop:
            if rank == 0:
                tqdm.write(f"stopped by a signal after step {step + 1}, saved in {out}; go on with --resume")
            leave(world_size)
            raise SystemExit(128 + stop)
    if rank == 0:
        print(f"{stage} done: weights {out / 'model.safetensors'}, figures {out / 'log.jsonl'}, "
              f"pictures {out}/preview_*.png")
    leave(world_size)


def check(config):
    """Refuse what cannot work before anything is loaded; what was left open is the preset's."""
    preset = get_preset(config.preset)
    for key in ("rate", "lora", "optimizer", "lr", "t_mean", "t_std"):
        if getattr(config, key) is None:
            setattr(config, key, getattr(preset, key))
    parse_rate(config.rate)
    for key in ("steps", "batch", "micro_batch", "save_every", "held_out", "sample_steps", "clips", "window"):
        if getattr(config, key) < 1:
            raise UserError(f"--{key} {getattr(config, key)}: must be at least 1")
    if not math.isfinite(config.t_mean):
        raise UserError(f"--t_mean {config.t_mean}: give a number")
    for key in ("lr", "encoder_lr", "clip_grad", "t_std", "sample_shift"):
        if not 0 < getattr(config, key) < math.inf:
            raise UserError(f"--{key} {getattr(config, key)}: must be above 0")
    for key, most in dict(lora=math.inf, warmup=math.inf, text_drop=1, ema=1).items():
        if not 0 <= getattr(config, key) <= most:
            raise UserError(f"--{key} {getattr(config, key)}: must be at least 0" + " and at most 1" * (most == 1))
    if config.method not in METHODS:
        raise UserError(f"--method {config.method}: choose one of {', '.join(METHODS)}")
    if config.optimizer not in ("muon", "adamw"):
        raise UserError(f"--optimizer {config.optimizer}: choose muon or adamw")
    if config.init != "random":
        base = own_config(weight_files(config.init)[0])
        if base and base["preset"] != config.preset:
            raise UserError(f"--init {config.init} is of --preset {base['preset']}, not {config.preset}: give a base "
                            "of that preset, or train one with finetune.py --method none --init random")
    elif config.lora:
        raise UserError(f"--init random --lora {config.lora}: an update of random weights, which no checkpoint would "
                        "hold; give --init a base, or --lora 0")
    if config.window != Config.window and config.method != "sliding-window":
        raise UserError(f"--window {config.window}: it is for --method sliding-window alone, drop it")


def make_model(config, preset, codec, device):
    """The DiT with the base's weights, frozen under a fresh LoRA if one is asked for, and a fresh φ."""
    torch.manual_seed(config.seed)
    model = MemoryDiT(config.preset, config.method, config.rate, config.window, empty=config.init != "random")
    if config.init != "random":
        load_base(model.dit, config.init, device, frozen=bool(config.lora))
    model.to(device)                                                # φ too, before it takes weights over from the DiT
    if model.encoder:
        model.encoder.start_from(model.dit, codec.averages)
    if config.lora:
        add_lora(model.dit, config.lora)
    model.dit.recompute = preset.recompute
    return model


def setup(config):
    """All that both stages build first, of a config that check() has seen: processes, model with the base DiT in it,
    data."""
    preset = PRESETS[config.preset]
    rank, world_size, device = start_processes(config.device)
    codec, prompts = make_codec(preset, config.vae, device), make_prompts(preset)
    if config.batch < world_size:
        raise UserError(f"--batch {config.batch}: must be at least the number of processes, {world_size}")
    _, *rate = parse_rate(config.rate)
    grid = [n // (s * p) for n, s, p in zip(preset.sizes[0], codec.stride[1:], preset.dit.patch[1:])]
    if any(r > 2 * n for r, n in zip(rate, grid)):                 # frames are padded up to whole blocks
        raise UserError(f"--rate {config.rate}: a block is more than twice a frame of {grid[0]}x{grid[1]} tokens")
    for file in ("state.pt", "model.safetensors") if not config.resume else ():
        if (Path(config.out) / file).exists():
            raise UserError(f"--out {config.out} holds a {file} already: go on with --resume, or give another folder")
    model = make_model(config, preset, codec, device)
    with first_before_others(rank, world_size):                     # the first one fills the cache
        clips, held_out = open_dataset(config, codec)
    return model, clips, held_out, Tools(preset, codec, prompts, model.encoder, device, rank, world_size)


def main():
    """Check the flags, build model and data, train."""
    config = parse_flags(PretrainConfig, __doc__)
    check(config)
    if config.mask not in ("none", "noise"):
        raise UserError(f"--mask {config.mask}: choose none or noise")
    if config.queries < 1 or config.method == "none":
        raise UserError(f"--queries {config.queries} --method {config.method}: "
                        "frame retrieval needs queries and a memory")
    if config.method in FRAME_METHODS:
        raise UserError(f"--method {config.method}: it forgets most frames, so there is nothing to retrieve; "
                        f"it has no stage 1, go on with finetune.py --method {config.method}")
    model, *rest = setup(config)
    # figures are for clean histories, without prompts: only memory can answer
    train(config, "pretrain", draw_retrieval, model, *rest, replace(config, mask="none", text_drop=1.0), draw_retrieval)


if __name__ == "__main__":
    run_main(main)
