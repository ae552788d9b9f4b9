"""How fast this machine is: the DiT beside diffusers' and plain matrix products, φ, a training step, and a section as
the history grows.

    python eval.py speed
"""
import re
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from budget import STRIDES, encoder_cost, flops, frame_tokens, gib, memory_tokens, random_history, short, table
from devices import autocast, pick_device, product_dtype
from encoder import MemoryDiT, MemoryEncoder
from flags import parse_flags
from model import DiT, UserError, add_lora, get_preset
from tables import describe_machine, plot, write_csv
from weights import wan_name

GROWTH = (2, 4, 8, 16, 20, 40, 80)                          # seconds of history
PATIENCE = 60                                               # seconds; what would take longer is skipped


@dataclass
class SpeedConfig:
    preset: str = "nano"          # nano or small; with a GPU also wan-1.3b, wan-14b
    rate: str = None              # compression on the DiT's token grid, rows x columns x frames [the preset's]
    batch: int = 1                # sections at once, where the DiT is timed alone
    repeats: int = 5              # rounds; medians are shown
    device: str = "auto"          # auto, cpu, cuda, mps
    out: str = "out/speed.png"    # plot of seconds a section; its figures go beside it as .csv


def alternate(jobs, repeats, device):
    """{name: seconds in each round}. A round runs every job once, so that all meet the same machine; the first round is
    not counted."""
    wait = getattr(torch, device.type).synchronize
    times = {name: [] for name in jobs}
    for _ in range(repeats + 1):
        for name, job in jobs.items():
            wait()
            started = time.perf_counter()
            job()
            wait()
            times[name].append(time.perf_counter() - started)
    return {name: seconds[1:] for name, seconds in times.items()}


def ratio(a, b):
    """Median over the rounds of a / b."""
    return median(x / y for x, y in zip(a, b))


def diffusers_dit(dit):
    """diffusers' WanTransformer3DModel with the weights of `dit`, not a copy of them, or None where diffusers is not
    installed."""
    try:
        from diffusers import WanTransformer3DModel
    except ImportError:
        return None
    c, weights = dit.config, dit.state_dict()
    with torch.device("meta"):
        theirs = WanTransformer3DModel(
            patch_size=c.patch, num_attention_heads=c.heads, attention_head_dim=c.dim // c.heads, in_channels=c.in_dim,
            out_channels=c.out_dim, text_dim=c.text_dim, freq_dim=c.freq_dim, ffn_dim=c.ffn_dim, num_layers=c.layers,
            cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=c.eps, rope_max_seq_len=1024)
    theirs.load_state_dict({name: weights[wan_name(name)] for name in theirs.state_dict()}, assign=True)
    theirs.rope = type(theirs.rope)(c.dim // c.heads, c.patch, 1024)            # its tables are no weights
    if dit.recompute:
        theirs.enable_gradient_checkpointing()
    return theirs.to(dit.head.head.weight.device)


def compiled_twin(dit):
    """A DiT with the same weights, not a copy of them, whose blocks are compiled."""
    with torch.device("meta"):
        twin = DiT(dit.config)
    twin.load_state_dict(dit.state_dict(), assign=True)
    twin.recompute = dit.recompute
    for block in twin.blocks:
        block.compile()
    return twin


def dit_jobs(nets, x, t, text):
    """{name: job}: forward, and forward + backward, of each of nets {name: module}."""
    def forward(net):
        y = net(x, t, text)
        return y if torch.is_tensor(y) else y[0]        # diffusers wraps it

    def both(net):
        forward(net).float().square().mean().backward()
        net.zero_grad()

    return ({name: lambda net=net: torch.no_grad()(forward)(net) for name, net in nets.items()}
            | {f"{name}, with backward": lambda net=net: both(net) for name, net in nets.items()})


KINDS = {"attention": "attention|softmax|bmm", "matrix products": "mm|conv", "norms": "norm", "GELU": "gelu",
         "copies": "copy|cat|clone"}


def shares(job, device):
    """{kind of operation: its share of the time that a job takes, by torch's profiler}, the rest as "other"."""
    job()
    with torch.profiler.profile() as profiler:
        job()
    spent = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in profiler.key_averages():
        kind = next((kind for kind, names in KINDS.items() if re.search(names, event.key)), "other")
        spent[kind] += event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: x / total for kind, x in spent.items()}


def measure_dit(config, preset, model, dtype):
    """Print how fast the DiT and φ are. Returns the rate of plain matrix products, FLOP/s."""
    device, c = next(model.parameters()).device, preset.dit
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    hr, lr = random_history(preset, config.rate, preset.history, device)
    x = hr[:, :, :preset.section].repeat(config.batch, 1, 1, 1, 1)
    t = torch.full((config.batch,), 500.0, device=device)
    text = torch.randn(config.batch, c.text_len, c.text_dim, device=device)
    nets, theirs = {"DiT": model.dit}, diffusers_dit(model.dit)
    if theirs:
        nets["diffusers"] = theirs
    if device.type == "cuda":
        nets["compiled"] = compiled_twin(model.dit)
    jobs = dit_jobs(nets, x, t, text)
    if theirs:
        print(f"largest difference from diffusers' output: {(jobs['DiT']() - jobs['diffusers']()).abs().max():.1e}")
    else:
        print("diffusers: n/a (pip install diffusers)")
    jobs["φ of the history"] = torch.no_grad()(lambda: model.encoder(hr, lr))
    jobs["matrix product"] = lambda: a @ b
    peaks = {}
    for name, job in jobs.items() if device.type == "cuda" else ():
        torch.cuda.reset_peak_memory_stats()
        job()
        peaks[name] = gib([torch.cuda.max_memory_allocated()])
    times = alternate(jobs, config.repeats, device)
    tokens = preset.section * frame_tokens(preset, preset.sizes[0])
    table(f"{config.batch} x {tokens:,} noisy tokens, no memory; medians of {config.repeats} rounds, in turns", [
        ["", "ms", *["peak GiB"] * bool(peaks)],
        *([k, f"{1000 * median(v):,.2f}", *peaks.get(k, [])] for k, v in times.items())])
    train, product = times["DiT, with backward"], times["matrix product"]
    for name in list(nets)[1:]:
        print(f"  DiT's time / {name}: forward {ratio(times['DiT'], times[name]):.2f}, with backward "
              f"{ratio(train, times[f'{name}, with backward']):.2f}")
    print(f"  matrix product {n} x {n}: {short(2 * n**3 / median(product))}/s")
    for name in ("DiT", "compiled") if "compiled" in nets else ("DiT",):
        share = 3 * config.batch * flops(c, tokens) / (2 * n**3) * ratio(product, times[f"{name}, with backward"])
        print(f"  {name} with its backward reaches {100 * share:.0f} % of that" +
              ", what is computed again in the backward pass not counted" * preset.recompute)
    for name in ("DiT", "DiT, with backward"):
        print(f"  the time of {name}: "
              + ", ".join(f"{kind} {100 * x:.0f} %" for kind, x in shares(jobs[name], device).items()))
    print(f"  φ of {preset.history} latents takes {ratio(times['φ of the history'], times['DiT']):.2f} forwards")
    return 2 * n**3 / median(product)


def measure_training(config, preset, model, rate):
    """Print what a training step of stage 2 takes at this batch: forward and backward of the DiT and φ after a full
    history, the optimizer left out. The model gets the preset's LoRA and, on a GPU, is compiled in place at last.
    rate: of plain matrix products, FLOP/s."""
    device, c, B = next(model.parameters()).device, preset.dit, config.batch
    if preset.lora:
        model.encoder.float()                                       # trained in full
        add_lora(model.dit, preset.lora)
        model.to(device)
    repeat = lambda x: x.expand(B, *x.shape[1:])
    hr, lr = map(repeat, random_history(preset, config.rate, preset.history, device))
    target, t = hr[:, :, :preset.section], torch.full((B,), 0.5, device=device)
    noise, text = torch.randn_like(target), torch.randn(B, c.text_len, c.text_dim, device=device)
    frames = preset.history + torch.arange(preset.section, device=device)

    def step():
        with autocast(device):
            loss = model(hr, lr, target, frames, noise, t, text).sum()
        loss.backward()
        model.zero_grad()
    noisy = preset.section * frame_tokens(preset, preset.sizes[0])
    memory = memory_tokens(preset, preset.sizes[0], config.rate, preset.history)
    with torch.device("meta"):
        phi = encoder_cost(MemoryEncoder(model.method, config.rate, config.preset), preset, config.rate,
                           preset.history)[0]
    # a frozen base needs gradients of what goes through it, not of its weights
    needed = B * ((2 if preset.lora else 3) * flops(c, noisy, memory) + 3 * phi)
    rows = [["", "ms", "share of the matrix products' rate", *["peak GiB"] * (device.type == "cuda")]]
    for name in ("eager", "compiled") if device.type == "cuda" else ("eager",):
        if name == "compiled":
            for block in model.dit.blocks:
                block.compile()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = median(alternate({name: step}, config.repeats, device)[name])
        peak = gib([torch.cuda.max_memory_allocated()]) if device.type == "cuda" else []
        rows.append([name, f"{1000 * seconds:,.2f}", f"{100 * needed / seconds / rate:.0f} %", *peak])
    table(f"a training step of stage 2, {B} x ({noisy:,} noisy + {memory:,} memory tokens), no optimizer"
          + ", what is computed again not counted" * preset.recompute, rows)


@torch.no_grad()
def measure_growth(config, preset, dit, rate):
    """Seconds a section after 2 to 80 s of history, compressed or not: one forward with that many memory tokens (random
    ones at their real positions) is timed, times the sampler's steps, times 2 for guidance; φ and the codec are left
    out. Returns rows of (seconds, tokens, seconds a section, tokens uncompressed, seconds a section uncompressed), with
    None for what would take too long or too much memory."""
    device, c, frame = next(dit.parameters()).device, preset.dit, frame_tokens(preset, preset.sizes[0])
    encoder, calls = MemoryEncoder("only-lr", config.rate, config.preset).to(device), 2 * preset.steps
    text, t = torch.randn(1, c.text_len, c.text_dim, device=device), torch.full((1,), 500.0, device=device)
    rows = []
    for seconds in tqdm(GROWTH, desc="seconds of history"):
        segments = max(1, round(seconds * preset.fps / STRIDES[preset.codec][0] / preset.section))
        latents = int(preset.codec == "wan") + segments * preset.section
        tokens = [memory_tokens(preset, preset.sizes[0], config.rate, latents), latents * frame]
        needs = [(config.repeats + 1) * flops(c, preset.section * frame, n) / rate for n in tokens]
        hr, lr = random_history(preset, config.rate, latents, device)
        x, frames = hr[:, :, :preset.section], latents + torch.arange(preset.section, device=device)
        embed = lambda: encoder(hr, lr), lambda: encoder.embed_frames(hr, torch.arange(hr.shape[2]))

        def clock(kinds):
            memory = {i: embed[i]() for i in kinds}
            jobs = {i: lambda i=i: dit(x, t, text, frames, memory[i]) for i in kinds}
            return alternate(jobs, config.repeats, device)
        patient = [i for i in (0, 1) if needs[i] <= PATIENCE]
        try:
            times = clock(patient)
        except torch.OutOfMemoryError:      # of the uncompressed history
            times = {}
        if not times and patient:           # not inside `except`: the error holds on to what did not fit
            times = clock([0])
        for i in {0, 1} - set(times):
            tqdm.write(f"skipped: {seconds} s of history as {tokens[i]:,} tokens, too much memory or time "
                       f"(at least {needs[i]:,.0f} s)")
        spent = [calls * median(times[i]) if i in times else None for i in (0, 1)]
        rows.append((seconds, tokens[0], spent[0], tokens[1], spent[1]))
    return rows


def write_growth(config, rows, title):
    """Table, CSV and plot of measure_growth()'s rows."""
    head = ("history_seconds", "tokens", "section_seconds", "tokens_uncompressed", "section_seconds_uncompressed")
    table(f"seconds a section: {title}", [
        ["history, s", "tokens", "s", "uncompressed", "s", "times slower"],
        *([str(s), f"{m:,}", a and f"{a:,.2f}" or "–", f"{n:,}", b and f"{b:,.2f}" or "–",
           a and b and f"{b / a:.1f}" or "–"] for s, m, a, n, b in rows)])
    out = Path(config.out)
    write_csv(out.with_suffix(".csv"), [dict(zip(head, row)) for row in rows])
    with plot(out, "seconds of history", "seconds a section") as (axes,):
        for column, label in (4, "uncompressed"), (2, f"compressed, {config.rate}"):
            some = [row for row in rows if row[column]]
            axes.plot([row[0] for row in some], [row[column] for row in some], "o-", label=label)
        axes.set(yscale="log", title=title)
    print(f"wrote {out} and {out.with_suffix('.csv')}")


def speed(argv):
    """Time the DiT beside diffusers' and plain matrix products, φ, a training step, and a section as the history grows
    (a plot)."""
    config = parse_flags(SpeedConfig, speed.__doc__, argv)
    preset, device = get_preset(config.preset), pick_device(config.device)
    config.rate = preset.rate if config.rate is None else config.rate
    if config.repeats < 1 or config.batch < 1:
        raise UserError(f"--repeats {config.repeats} --batch {config.batch}: must be at least 1")
    if Path(config.out).suffix != ".png":
        raise UserError(f"--out {config.out}: give a name that ends in .png")
    if device.type != "cuda" and flops(preset.dit, preset.section * frame_tokens(preset, preset.sizes[0])) > 1e13:
        raise UserError(f"--preset {config.preset} is too large to time on {device}, it needs CUDA; give --preset nano")
    dtype = product_dtype(device)
    title = f"{config.preset} on {describe_machine(device)}"
    print(f"{title}, torch {torch.__version__}")
    torch.manual_seed(0)
    with device:
        model = MemoryDiT(config.preset, "proposed", config.rate)
        torch.nn.init.normal_(model.dit.head.head.weight, std=0.02)         # it starts at zero, which would hide errors
    model.dit.recompute = preset.recompute
    if preset.codec == "wan" and device.type == "cuda":
        model.to(dtype)                     # as it is kept when it is sampled from or has a LoRA
    try:
        with autocast(device):
            rate = measure_dit(config, preset, model, dtype)
            rows = measure_growth(config, preset, model.dit, rate)
        measure_training(config, preset, model, rate)
    except torch.OutOfMemoryError:
        raise UserError(f"--preset {config.preset} --batch {config.batch} does not fit the memory of {device}: "
                        "give a smaller one") from None
    write_growth(config, rows, f"{title}: {preset.steps} steps, guidance")
