"""The parts of bench/gpu.py on Wan's sizes, at random weights: 480x832, 20 s of history. See bench/gpu_parts.py."""

import math
from dataclasses import replace
from statistics import median

import torch

from bench.budget import (
    CONTEXT,
    encoder_cost,
    frame_tokens,
    lora_parameters,
    memory_tokens,
    random_history,
    sampling_memory,
    training_memory,
)
from bench.gpu_parts import NOT_ON_CPU, Row
from bench.nets import compiled_twin, diffusers_dit
from bench.speed import SpeedConfig, alternate, dit_jobs, ratio, step_flops, time_memories, training_step
from encoder import MemoryDiT
from pretrain import PretrainConfig
from sample import Memory, SampleConfig, continue_video
from util.device import autocast, compute_dtype, peak_memory
from util.optim import EMA, make_optimizers

GB12 = 12 * 2**30
# dense bf16 FLOP/s that the makers print, by a part of the card's name; the first that fits
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


def product_rate(bench):
    """(FLOP/s of a square matrix product, the peak that the card's maker prints or nan)."""
    n = 8192 if bench.cuda else 512
    a, b = torch.randn(2, n, n, device=bench.device, dtype=compute_dtype(bench.device))
    name = torch.cuda.get_device_name(bench.device) if bench.cuda else ""
    return 2 * n**3 / bench.seconds(lambda: a @ b), next((x for key, x in PEAKS.items() if key in name), math.nan)


def predicted_gib(base, model, latents, batch):
    """What `eval.py budget` predicts for a training step, without the CUDA context, GiB."""
    frozen, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad is kind) for kind in (False, True))
    size, phi = base.sizes[0], MemoryDiT(base, empty=True).encoder.to("meta")
    tokens = latents * frame_tokens(base, size) + memory_tokens(base, size, base.rate, base.history)
    kept = encoder_cost(phi, base, base.rate, base.history)[1]
    fixed, sample = training_memory(base, frozen, trained, tokens, 1, kept)
    return (sum(fixed.values()) + batch * sum(sample.values())) / 2**30 - CONTEXT


def steps(bench):
    """Training steps, complete with the optimizer: time, utilisation, memory."""
    base, (product, peak) = bench.base("wan-1.3b"), product_rate(bench)
    model = bench.model(base)
    optimizers, ema = make_optimizers(model, base.optimizer, base.lr), EMA(model, 0.99)

    def update():
        torch.nn.utils.clip_grad_norm_(ema.params, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        ema.update(0)

    def measure(name, latents, batch, recompute):
        model.dit.recompute = recompute
        step = training_step(SpeedConfig(rate=base.rate, batch=batch), base, model, latents, update)
        seconds, needed = bench.seconds(step), step_flops(base, base.rate, latents, batch)
        gib, predicted = bench.peak(step), predicted_gib(replace(base, recompute=recompute), model, latents, batch)
        mfu, of_peak = needed / seconds / product, needed / seconds / peak
        memory = f"{gib:.3g} GiB" if bench.cuda else f"memory {NOT_ON_CPU}"
        words = f"{seconds:.3g} s, {100 * mfu:.0f} % of the matrix product"
        words += "" if math.isnan(peak) else f", {100 * of_peak:.0f} % of the peak"
        figures = dict(seconds=seconds, mfu=mfu, mfu_of_peak=of_peak, gib=gib, predicted=predicted)
        aimed = name == "stage 1, compiled" and bench.cuda
        what = f"{name}, batch {batch}, recompute {'on' if recompute else 'off'}"
        target = ("55 %", mfu >= 0.55) if aimed else ("", None)
        rows.append(Row(what, f"{words}; {memory} (predicted {predicted:.3g} GiB)", "", *target, figures))
        return seconds

    rows = [Row("matrix product", product / 1e12, "TFLOP/s")]
    rows.append(Row("peak of the card", "not known" if math.isnan(peak) else peak / 1e12, "TFLOP/s"))
    stages = {"stage 1": (PretrainConfig.queries, 8), "stage 2": (base.section, 4)}  # latents, the docs' micro-batch
    for kind in ("eager", "compiled") if bench.cuda else ("eager",):  # for a CPU, compiling takes minutes
        if kind == "compiled":
            bench.compile(model.dit)
        for stage, (latents, _) in stages.items():
            step = [measure(f"{stage}, {kind}", latents, 1, recompute) for recompute in (True, False)][0]
    high, low = random_history(base, base.rate, base.history, bench.device)

    def phi():
        with autocast(bench.device):
            tokens, _ = model.encoder.encode(high, low)
        tokens.float().square().mean().backward()

    share = bench.seconds(phi) / step
    rows.append(
        Row(f"φ, share of a step of stage 2, {kind}", share, "", "at most 0.05", share <= 0.05 if bench.cuda else None)
    )
    for stage, (latents, batch) in stages.items():
        measure(f"{stage}, {kind}, the docs' micro-batch", latents, 2 if bench.tiny else batch, True)
    return rows


def without_vae(base):
    """Put stand-ins in place of the VAE: random latents of the smaller video, black pixels."""

    def low_encoder(rate):
        (t, h, w), (frames, *_) = rate, base.codec.stride
        rows, columns = (-(-n // (s * r)) for n, s, r in zip(base.sizes[0], base.codec.stride[1:], (h, w)))
        return lambda pixels: torch.randn(1, base.dit.in_dim, max(1, pixels.shape[2] // (frames * t)), rows, columns)

    base.codec.low_encoder = low_encoder
    base.codec.decoder = lambda: lambda x: torch.zeros(1, 3, x.shape[2] * base.codec.stride[0], *base.sizes[0])
    return base


def remember(bench, base, model):
    """Memory of random latents of a whole history, whose pixels are black."""
    memory = Memory(model, base.codec, (base.history - base.codec.causal) // base.section)
    high, _ = random_history(base, base.rate, base.history, bench.device)
    frames = 1 + (base.history - 1) * base.codec.stride[0]
    with autocast(bench.device):
        memory.append(high, torch.zeros(1).expand(1, 3, frames, *base.sizes[0]))
    return memory


@torch.no_grad()
def sections(bench):
    """Sections one after another, with two solver steps each and without the VAE; one pass of the DiT with φ and with
    every token."""
    base = without_vae(bench.base("wan-1.3b"))
    model, count = bench.model(base).eval(), 3 if bench.tiny else 10
    memory, decode = remember(bench, base, model), base.codec.decoder()
    config = SampleConfig(steps=2, guidance=base.guidance, shift=base.shift)
    texts = [torch.randn(base.dit.text_len, base.dit.text_dim)] * (count + 1)  # the first one warms up
    spent = []
    for _, seconds in continue_video(model, base, memory, decode, texts, config, base.sizes[0]):
        spent.append(seconds)
    first, last = spent[1], spent[-1]
    rows = [
        Row("section 1, 2 solver steps", first, "s", figures=dict(sections=spent)),
        Row(f"section {count}", last, "s", "as section 1 within 5 %", last < 1.05 * first if bench.cuda else None),
    ]
    kinds = ["compressed", "uncompressed"]
    settings = SpeedConfig(rate=base.rate, repeats=1)
    with autocast(bench.device):
        times = time_memories(settings, base, model.dit, model.encoder, base.history, kinds)
    calls = base.steps * (1 if base.guidance == 1 else 2)
    a, b = (calls * median(times[kind]) for kind in kinds)
    return [*rows, Row(f"{base.steps} solver steps with φ", a, "s"), Row("with every token of the history", b, "s")]


@torch.no_grad()
def vae(bench):
    """Wan's VAE with random weights: seconds per second of video."""
    if not has_diffusers():
        return [Row("VAE", "diffusers is not installed")]
    base = bench.base("wan-1.3b", vae="random")
    seconds = 0.25 if bench.tiny else 1.0
    frames = int(seconds * base.fps) + 1
    pixels = torch.rand(1, 3, frames, *base.sizes[0], device=bench.device) * 2 - 1
    latents = base.codec.encode(pixels)
    encode, decode = bench.seconds(lambda: base.codec.encode(pixels)), bench.seconds(lambda: base.codec.decode(latents))
    return [
        Row(f"{name}, per second of video", x / seconds, "s") for name, x in (("encode", encode), ("decode", decode))
    ]


@torch.no_grad()
def within_12_gb(bench):
    """A section after 20 s of history and its decoding on a card that has 12 GiB, less its context."""
    base = bench.base("wan-1.3b", vae="random") if has_diffusers() else without_vae(bench.base("wan-1.3b"))
    if bench.cuda:
        total = torch.cuda.get_device_properties(bench.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (GB12 - CONTEXT * 2**30) / total))
        torch.cuda.reset_peak_memory_stats()
    model = bench.model(base).eval()
    memory, decode = remember(bench, base, model), base.codec.decoder()
    config = SampleConfig(steps=1, guidance=base.guidance, shift=base.shift)
    text = torch.randn(base.dit.text_len, base.dit.text_dim)
    list(continue_video(model, base, memory, decode, [text], config, base.sizes[0]))
    dit = sum(p.numel() for name, p in model.dit.named_parameters() if ".lora_" not in name)
    trained = lora_parameters(base.dit, base.lora) + sum(p.numel() for p in model.encoder.parameters())
    tokens = sum(model.count(segment) for segment, _ in memory.segments) + base.section * frame_tokens(
        base, base.sizes[0]
    )
    phases = sampling_memory(base, dit, trained, tokens)
    predicted = max(sum(phase.values()) for phase in phases) / 2**30
    done = "a section" + (" and the VAE" if base.codec.decodes else "; no VAE, diffusers is not installed")
    peak = f"{peak_memory(bench.device):.3g} GiB" if bench.cuda else NOT_ON_CPU
    words = f"{done}; peak {peak} and {CONTEXT:g} GiB for the context (predicted {predicted:.3g} GiB)"
    return [Row("sampling in 12 GiB", words, "", "done", True if bench.cuda else None)]


# ---------------------------------------------------------------------------------------------------------------------
# Wan 14B, diffusers


def two_blocks(bench):
    """A training step with one and with two blocks at full width, extrapolated to all."""
    base, times = bench.base("wan-14b"), []
    for layers in 1, 2:
        cut = replace(base, dit=replace(base.dit, layers=layers))
        model = bench.model(cut)
        times.append(bench.seconds(training_step(SpeedConfig(rate=base.rate), cut, model)))
        del model
    block, what = times[1] - times[0], "a block, forward and backward, recomputed"
    if block <= 0:
        return [Row(what, "less than the clock's noise: two blocks took no longer than one", figures=dict(times=times))]
    whole, rate = times[0] + (base.dit.layers - 1) * block, product_rate(bench)[0]
    mfu = step_flops(base, base.rate, base.section, 1) / whole / rate
    figures = dict(one=times[0], two=times[1], mfu=mfu)
    words = f"{whole:.3g} s, {100 * mfu:.0f} % of the matrix product"
    return [
        Row(what, block, "s"),
        Row("stage 2, extrapolated", words, figures=figures),
    ]


def has_diffusers():
    try:
        import diffusers  # noqa: F401
    except ImportError:
        return False
    return True


def beside_diffusers(bench):
    """Our DiT and diffusers' with the same weights, in turns."""
    if not has_diffusers():
        return [Row("diffusers", "not installed")]
    base = bench.base("wan-1.3b")
    dit = bench.model(base, lora=False).dit
    nets, pairs = {"ours": dit, "diffusers": diffusers_dit(dit)}, [("ours", "diffusers", 1.0)]
    if bench.cuda:  # for a CPU, compiling takes minutes
        nets |= {"ours, compiled": compiled_twin(dit), "diffusers, compiled": diffusers_dit(dit)}
        bench.compile(nets["diffusers, compiled"])
        pairs += [("ours, compiled", "diffusers, compiled", 1.0), ("ours, compiled", "diffusers", 1 / 1.2)]
    x, _ = random_history(base, base.rate, base.section, bench.device)
    text = torch.randn(1, base.dit.text_len, base.dit.text_dim, device=bench.device)
    jobs = dit_jobs(nets, x, torch.full((1,), 500.0, device=bench.device), text)
    with autocast(bench.device):
        a, b = jobs["ours"]().float(), jobs["diffusers"]().float()
        times = alternate(jobs, 1 if bench.tiny else 5, bench.device)
    rows = [Row("outputs, largest difference by the largest value", ((a - b).abs().max() / a.abs().max()).item())]
    for ours, theirs, most in pairs:
        for passes in "", ", with backward":
            share = ratio(times[ours + passes], times[theirs + passes])
            what, met = f"time of {ours} / {theirs}{passes}", share <= most if bench.cuda else None
            rows.append(Row(what, share, "", f"at most {most:.2f}", met))
    return rows
