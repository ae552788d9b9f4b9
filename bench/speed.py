"""The speed of this machine: the DiT beside diffusers' and plain matrix products, φ, a training step, and a section as
the history grows.

    python eval.py speed
"""

import re
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from bases import open_base
from bench.budget import encoder_cost, flops, frame_tokens, memory_tokens, print_table, random_history, short
from bench.nets import compiled_twin, diffusers_dit
from bench.plots import plot
from bench.report import write_csv
from bench.runs import describe_machine
from encoder import MemoryDiT, find_method
from model import add_noise
from util.cli import UserError, parse_flags
from util.device import autocast, compute_dtype, peak_memory, pick_device
from util.distributed import compile_blocks
from util.files import check_outputs

GROWTH = (2, 4, 8, 16, 20, 40, 80)  # seconds of history
PATIENCE = 60  # seconds; what would take longer is skipped


@dataclass
class SpeedConfig:
    preset: str = "nano"  # nano or small; with a GPU also wan-1.3b, wan-14b, hunyuan
    rate: str = None  # compression on the DiT's token grid, rows x columns x frames [the preset's]
    batch: int = 1  # sections at once, in the timings of the DiT and of a training step
    repeats: int = 5  # rounds; their medians are printed
    device: str = "auto"  # auto, cpu, cuda, mps
    out: str = "out/speed.png"  # plot of seconds per section; its figures are written beside it as .csv


# ---------------------------------------------------------------------------------------------------------------------
# Clocks


def alternate(jobs, repeats, device, clock="perf_counter"):
    """Time jobs {name: function} in turns: {name: seconds in each round}.

    Every round runs every job once, so that all meet the same state of the machine; the first round is not counted.
    """
    wait = getattr(torch, device.type).synchronize
    times = {name: [] for name in jobs}
    for _ in range(repeats + 1):
        for name, job in jobs.items():
            wait()
            started = getattr(time, clock)()
            job()
            wait()
            times[name].append(getattr(time, clock)() - started)
    return {name: seconds[1:] for name, seconds in times.items()}


def ratio(a, b):
    """The median over the rounds of a / b."""
    return median(x / y for x, y in zip(a, b))


def peak_cell(job, device):
    """A cell for a table, ["12.3"]: the GPU's peak memory while it runs a job, GiB. [] on other devices."""
    if device.type != "cuda":
        return []
    torch.cuda.reset_peak_memory_stats()
    job()
    return [f"{peak_memory(device):.3g}"]


# kind of operation -> regular expression of its names in torch's profiler
KINDS = {
    "attention": "attention|softmax|bmm",
    "matrix products": "mm|conv",
    "norms": "norm",
    "GELU": "gelu",
    "copies": "copy|cat|clone",
}


def time_shares(job, device):
    """{kind of operation: its share of a job's time, by torch's profiler}; what is of no kind is "other"."""
    job()
    with torch.profiler.profile() as profiler:
        job()
    spent = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in profiler.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU:  # a kernel: its time is that of the operation too
            continue
        kind = next((kind for kind, names in KINDS.items() if re.search(names, event.key)), "other")
        spent[kind] += event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: x / total for kind, x in spent.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The DiT and φ


def dit_jobs(nets, x, t, text):
    """{name: forward pass, "name, with backward": forward and backward pass} of nets {name: module}."""

    def forward(net):
        y = net(x, t, text)
        return y if torch.is_tensor(y) else y[0]  # diffusers wraps it

    def train(net):
        forward(net).float().square().mean().backward()
        net.zero_grad()

    jobs = {name: partial(torch.no_grad()(forward), net) for name, net in nets.items()}
    return jobs | {f"{name}, with backward": partial(train, net) for name, net in nets.items()}


def open_nets(dit):
    """{name: DiT} to time side by side, which share their weights: ours, diffusers' if it is installed, and on a GPU
    ours compiled."""
    nets, theirs = {"DiT": dit}, diffusers_dit(dit)
    if theirs:
        nets["diffusers"] = theirs
    if next(dit.parameters()).device.type == "cuda":
        nets["compiled"] = compiled_twin(dit)
    return nets


def measure_dit(config, base, model):
    """Time the DiT, φ and a matrix product, and print how they compare. Returns the rate of matrix products, FLOP/s."""
    device, c = next(model.parameters()).device, base.dit
    n = 8192 if device.type == "cuda" else 1024  # of the square matrices
    a, b = torch.randn(2, n, n, device=device, dtype=compute_dtype(device))
    high, low = random_history(base, config.rate, base.history, device)
    x = high[:, :, : base.section].repeat(config.batch, 1, 1, 1, 1)
    t = torch.full((config.batch,), 500.0, device=device)
    text = torch.randn(config.batch, c.text_len, c.text_dim, device=device)
    nets = open_nets(model.dit)
    jobs = dit_jobs(nets, x, t, text)
    if "diffusers" in nets:
        print(f"largest difference from diffusers' output: {(jobs['DiT']() - jobs['diffusers']()).abs().max():.1e}")
    else:
        print("diffusers: n/a (pip install diffusers; Wan's architecture alone)")
    jobs["φ of the history"] = torch.no_grad()(lambda: model.encoder.encode(high, low))
    jobs["matrix product"] = lambda: a @ b
    peaks = {name: peak_cell(job, device) for name, job in jobs.items()}
    times = alternate(jobs, config.repeats, device)
    rows = [["", "ms", *["peak GiB"] * (device.type == "cuda")]]
    rows += [[name, f"{1000 * median(seconds):,.2f}", *peaks[name]] for name, seconds in times.items()]
    tokens = base.section * frame_tokens(base, base.sizes[0])
    rounds = f"medians of {config.repeats} rounds, in turns"
    print_table(f"{config.batch} x {tokens:,} noisy tokens, no memory; {rounds}", rows)
    compare_times(config, base, list(nets), times, n)
    for name in ("DiT", "DiT, with backward"):
        shares = [f"{kind} {100 * x:.0f} %" for kind, x in time_shares(jobs[name], device).items()]
        print(f"  the time of {name}: {', '.join(shares)}")
    print(f"  φ of {base.history} latents takes {ratio(times['φ of the history'], times['DiT']):.2f} forward passes")
    return 2 * n**3 / median(times["matrix product"])


def compare_times(config, base, names, times, n):
    """Print the DiT's time as a ratio of the other nets', and how near it comes to the rate of matrix products.

    names: of the nets, the DiT first; times: from alternate(); n: size of the square matrices.
    """
    train, product = times["DiT, with backward"], times["matrix product"]
    for name in names[1:]:
        print(
            f"  DiT's time / {name}: forward {ratio(times['DiT'], times[name]):.2f}, with backward "
            f"{ratio(train, times[f'{name}, with backward']):.2f}"
        )
    print(f"  matrix product {n} x {n}: {short(2 * n**3 / median(product))}/s")
    step = 3 * config.batch * flops(base.dit, base.section * frame_tokens(base, base.sizes[0]))
    note = ", what is recomputed in the backward pass not counted" * base.recompute
    for name in names:
        if name != "diffusers":
            share = step / (2 * n**3) * ratio(product, times[f"{name}, with backward"])
            print(f"  {name} with its backward pass reaches {100 * share:.0f} % of that{note}")


# ---------------------------------------------------------------------------------------------------------------------
# A training step


def training_step(config, base, model, latents=None, update=lambda: None):
    """A function that runs a training step after a full history: forward and backward pass of the DiT and φ on random
    data, then update().

    latents: how many are denoised; by default a section, as in stage 2.
    """
    device, c, B = next(model.parameters()).device, base.dit, config.batch
    high, low = (x.expand(B, *x.shape[1:]) for x in random_history(base, config.rate, base.history, device))
    target, t = high[:, :, : latents or base.section], torch.full((B,), 0.5, device=device)
    noise, text = torch.randn_like(target), torch.randn(B, c.text_len, c.text_dim, device=device)
    times = base.history + torch.arange(target.shape[2], device=device)
    x_t = add_noise(target, noise, t)

    def step():
        with autocast(device):
            v = model(high, low, x_t, t, text, times)
        (noise - target - v).square().flatten(1).mean(1).sum().backward()
        update()
        model.zero_grad()

    return step


def step_flops(base, rate, latents, batch):
    """FLOPs that a training step needs which denoises this many latents; what is recomputed is not counted."""
    noisy, memory = latents * frame_tokens(base, base.sizes[0]), memory_tokens(base, base.sizes[0], rate, base.history)
    with torch.device("meta"):
        phi, _ = encoder_cost(find_method("proposed")(base, rate), base, rate, base.history)
    # a frozen base needs gradients of its activations, not of its weights
    return batch * ((2 if base.lora else 3) * flops(base.dit, noisy, memory) + 3 * phi)


def measure_training(config, base, model, rate):
    """Time a training step of stage 2 and print it. rate: of matrix products, FLOP/s.

    The model gets the base's LoRA, if it has one, and on a GPU its blocks are compiled in place in the end.
    """
    device = next(model.parameters()).device
    if base.lora:
        base.add_lora(model.dit, base.lora)
        model.to(device)
    noisy = base.section * frame_tokens(base, base.sizes[0])
    memory = memory_tokens(base, base.sizes[0], config.rate, base.history)
    needed = step_flops(base, config.rate, base.section, config.batch)
    step = training_step(config, base, model)
    rows = [["", "ms", "share of the matrix products' rate", *["peak GiB"] * (device.type == "cuda")]]
    for name in ("eager", "compiled") if device.type == "cuda" else ("eager",):
        if name == "compiled":
            compile_blocks(model.dit)
        peak = peak_cell(step, device)
        seconds = median(alternate({name: step}, config.repeats, device)[name])
        rows.append([name, f"{1000 * seconds:,.2f}", f"{100 * needed / seconds / rate:.0f} %", *peak])
    note = ", what is recomputed not counted" * base.recompute
    tokens = f"{config.batch} x ({noisy:,} noisy + {memory:,} memory tokens)"
    print_table(f"a training step of stage 2, {tokens}, no optimizer{note}", rows)


# ---------------------------------------------------------------------------------------------------------------------
# A section as the history grows


def time_memories(config, base, dit, encoder, latents, kinds):
    """{kind: seconds of each round} of the DiT denoising a section after a history of this many latents.

    kinds: of "compressed" and "uncompressed"; the memory tokens are random ones at their real positions.
    """
    c, device = base.dit, next(dit.parameters()).device
    high, low = random_history(base, config.rate, latents, device)
    x, times = high[:, :, : base.section], latents + torch.arange(base.section, device=device)
    text, t = torch.randn(1, c.text_len, c.text_dim, device=device), torch.full((1,), 500.0, device=device)
    jobs = {}
    for kind in kinds:
        compressed = kind == "compressed"
        memory = encoder.encode(high, low) if compressed else encoder.embed_frames(high, torch.arange(latents))
        jobs[kind] = partial(dit, x, t, text, times, memory)
    return alternate(jobs, config.repeats, device)


@torch.no_grad()
def measure_growth(config, base, dit, rate):
    """Seconds per section after 2 to 80 s of history, compressed or not: a list of records for write_growth().

    One forward pass with that many memory tokens is timed, times the sampler's passes; φ and the codec are left out.
    What would take too long, at this rate of matrix products (FLOP/s), or too much memory is None.
    """
    frame, calls = frame_tokens(base, base.sizes[0]), base.passes * base.steps
    # the cheapest φ: only the number of its tokens matters
    encoder = find_method("only-lr")(base, config.rate).to(next(dit.parameters()).device)
    records = []
    for seconds in tqdm(GROWTH, desc="seconds of history"):
        segments = max(1, round(seconds * base.fps / base.codec.stride[0] / base.section))
        latents = int(base.codec.causal) + segments * base.section
        compressed = memory_tokens(base, base.sizes[0], config.rate, latents)
        tokens = {"compressed": compressed, "uncompressed": latents * frame}
        needs = {k: (config.repeats + 1) * flops(base.dit, base.section * frame, n) / rate for k, n in tokens.items()}
        patient = [kind for kind in tokens if needs[kind] <= PATIENCE]
        try:
            times = time_memories(config, base, dit, encoder, latents, patient)
        except torch.OutOfMemoryError:  # of the uncompressed history
            times = {}
        if not times and patient:  # not inside `except`: the error holds on to what did not fit
            times = time_memories(config, base, dit, encoder, latents, ["compressed"])
        spent = {kind: calls * median(times[kind]) if kind in times else None for kind in tokens}
        for kind in (kind for kind in tokens if kind not in times):
            least = f"at least {needs[kind]:,.0f} s"
            tqdm.write(f"skipped: {seconds} s of history as {tokens[kind]:,} tokens, too much memory or time ({least})")
        records.append(
            {
                "history_seconds": seconds,
                "tokens": tokens["compressed"],
                "section_seconds": spent["compressed"],
                "tokens_uncompressed": tokens["uncompressed"],
                "section_seconds_uncompressed": spent["uncompressed"],
            }
        )
    return records


def growth_cells(record):
    """The cells of a line of the printed table; a dash for what was not measured."""
    seconds, tokens, spent, tokens_full, spent_full = record.values()
    slower = f"{spent_full / spent:.1f}" if spent and spent_full else "–"
    spent, spent_full = ("–" if x is None else f"{x:,.2f}" for x in (spent, spent_full))
    return [str(seconds), f"{tokens:,}", spent, f"{tokens_full:,}", spent_full, slower]


def write_growth(config, records, title):
    """Print a table of measure_growth()'s records; write them as a CSV and as a plot."""
    head = ["history, s", "tokens", "s", "uncompressed", "s", "times slower"]
    print_table(f"seconds per section: {title}", [head, *map(growth_cells, records)])
    out = Path(config.out)
    write_csv(out.with_suffix(".csv"), records)
    with plot(out, "seconds of history", "seconds per section") as (axes,):
        for end, label in ("_uncompressed", "uncompressed"), ("", f"compressed, {config.rate}"):
            points = [(r["history_seconds"], r[f"section_seconds{end}"]) for r in records]
            points = [(x, y) for x, y in points if y is not None]
            axes.plot([x for x, _ in points], [y for _, y in points], "o-", label=label)
        axes.set(yscale="log", title=title)
    print(f"wrote {out} and {out.with_suffix('.csv')}")


# ---------------------------------------------------------------------------------------------------------------------
# python eval.py speed


def check_flags(config, base, device):
    """Refuse what cannot be measured, before anything is allocated. Raises UserError."""
    if config.repeats < 1 or config.batch < 1:
        raise UserError(f"--repeats {config.repeats} --batch {config.batch}: must be at least 1")
    if Path(config.out).suffix != ".png":
        raise UserError(f"--out {config.out}: give a name that ends in .png")
    check_outputs(Path(config.out).with_suffix(""), (".png", ".csv"))
    if device.type != "cuda" and flops(base.dit, base.section * frame_tokens(base, base.sizes[0])) > 1e13:
        raise UserError(f"--preset {config.preset} is too large to time on {device}, it needs CUDA; give --preset nano")


def speed(argv):
    """Time the DiT beside diffusers' and plain matrix products, φ, a training step, and a section as the history grows
    (a plot)."""
    config = parse_flags(SpeedConfig, speed.__doc__, argv)
    device = pick_device(config.device)
    base = open_base(config.preset)
    config.rate = base.rate if config.rate is None else config.rate
    check_flags(config, base, device)
    title = f"{config.preset} on {describe_machine(device)}"
    print(f"{title}, torch {torch.__version__}")
    torch.manual_seed(0)
    with device, base.random_frozen(device):  # the dtypes in which it is sampled from and trained beside a LoRA
        model = MemoryDiT(base, "proposed", config.rate)
        for p in model.dit.parameters():
            if not p.any():  # what starts at zero would hide errors
                torch.nn.init.normal_(p, std=0.02)
    model.dit.recompute = base.recompute
    try:
        with autocast(device):
            rate = measure_dit(config, base, model)
            records = measure_growth(config, base, model.dit, rate)
        measure_training(config, base, model, rate)
    except torch.OutOfMemoryError:
        raise UserError(f"--preset {config.preset} --batch {config.batch} does not fit {device}: give less") from None
    write_growth(config, records, f"{title}: {base.steps} steps, guidance")
