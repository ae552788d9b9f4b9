"""Costs predicted from shapes before anything is trained: parameters, tokens, FLOPs, memory. No weights are allocated.
(speed.py measures.)

    python eval.py budget --preset wan-14b --gpus 8

Letters as in model.py: N noisy tokens, M memory tokens, D width. A multiply-add is 2 FLOPs, a GiB 2^30 bytes.
"""

import math
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from bases import open_base
from bench.costs import block_bytes, flops, inference_bytes, lora_parameters, matrices, n_blocks, text_tokens
from encoder import MemoryDiT, parse_rate
from pretrain import PretrainConfig
from util.cli import UserError, parse_flags

RATES = ("4x4x2", "2x2x2", "2x2x4", "2x2x1")  # the paper's
PAPER_PRESET, PAPER_SIZE, PAPER_RATE = "wan-14b", (480, 832), "4x4x2"  # of the token count that it prints
# GiB; the only figures that are estimated, not counted: a CUDA context with its libraries and fragmentation, and NCCL's
# buffers
CONTEXT, NCCL = 1.0, 1.0

# ---------------------------------------------------------------------------------------------------------------------
# Tokens and parameters


def frame_tokens(base, size, h=1, w=1):
    """Tokens of one latent frame of size (height, width) pixels, each of h x w DiT tokens; padded up."""
    strides = zip(size, base.codec.stride[1:], base.dit.patch[1:], (h, w))
    return math.prod(-(-pixels // (stride * patch * rate)) for pixels, stride, patch, rate in strides)


def memory_tokens(base, size, rate, latents):
    """φ's tokens for a history of this many latents, at size (height, width) pixels.

    A causal codec's lone first latent is one frame of tokens, whole segments are compressed by the rate, and the frames
    of an unfinished segment stay uncompressed.
    """
    t, h, w = parse_rate(rate)
    lone = min(latents, int(base.codec.causal))
    waiting = (latents - lone) % base.section
    compressed = lone + (latents - lone - waiting) // t
    return compressed * frame_tokens(base, size, h, w) + waiting * frame_tokens(base, size)


def most_memory_tokens(base, size, rate):
    """φ's largest token count, in stage 2 and in sampling, for a history of about base.history latents.

    The history of a codec that is not causal may end inside a segment, with up to base.section - 1 frames uncompressed.
    """
    lengths = [base.history - k for k in range(1 if base.codec.causal else base.section)]
    return max(memory_tokens(base, size, rate, latents) for latents in lengths)


def paper_tokens(size=PAPER_SIZE, latents=120, rate=PAPER_RATE):
    """The paper's nominal count, which rounds down: 60x104 latents / 8 -> 7x13, for 60 pairs of frames."""
    t, h, w = parse_rate(rate)
    return latents // t * (size[0] // (16 * h)) * (size[1] // (16 * w))


# ---------------------------------------------------------------------------------------------------------------------
# φ


def random_history(base, rate, latents, device, start=0):
    """Random (high, low) for φ at the default size: high (1, C, F, H, W), low smaller by the rate.

    start: time of the first latent; at 0 a causal codec's first latent stands alone.
    """
    t, h, w = parse_rate(rate)
    rows, columns = (pixels // stride for pixels, stride in zip(base.sizes[0], base.codec.stride[1:]))
    high = torch.randn(1, base.dit.in_dim, latents, rows, columns, device=device)
    return high, high[:, :, ::t, ::h, ::w]


def encoder_cost(encoder, base, rate, latents, start=0):
    """(FLOPs of φ's forward pass, bytes it keeps for the backward pass) for this many latents.

    encoder: on the meta device. The bytes are those of float32; under autocast fewer are kept.
    """
    kept = {}  # keyed by storage, so that views are counted once

    def keep(x):
        kept[x.untyped_storage()._cdata] = x
        return x

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        encoder.encode(*random_history(base, rate, latents, "meta", start), start)
    for p in encoder.parameters():
        kept.pop(p.untyped_storage()._cdata, None)
    return counter.get_total_flops(), sum(x.untyped_storage().nbytes() for x in kept.values())


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def frozen_bytes(c, n):
    """{what: bytes} of a frozen base DiT of n parameters (0: it is trained); its dtypes: bases.base.frozen_dtype()."""
    return {"base DiT, frozen: bf16, outside its blocks float32": n and 4 * n - 2 * matrices(c)}


def trained_bytes(n):
    """{what: bytes} that n trained parameters take in a forward pass."""
    return {"trained weights, float32": 4 * n, "their copies for autocast, bf16": 2 * n}


def training_memory(base, frozen, trained, tokens, gpus, encoder_bytes):
    """Bytes on each GPU: ({what: bytes} whatever the batch, {what: bytes} per sample).

    frozen, trained: numbers of parameters; DDP has all of them on every GPU. tokens: of one sample. encoder_bytes: what
    φ keeps for its backward pass. A DiT that recomputes keeps only the residual stream between its blocks.
    """
    c = base.dit
    tokens += text_tokens(c)
    fixed = {
        **frozen_bytes(c, frozen),
        **trained_bytes(trained),
        "gradients": 4 * trained,
        "AdamW, two moments": 8 * trained,
        "average of weights (EMA)": 4 * trained,
        "NCCL's buffers (estimate)": NCCL * 2**30 * (gpus > 1),
        "CUDA context (estimate)": CONTEXT * 2**30,
    }
    block = block_bytes(c, tokens, lora=frozen > 0)
    if base.recompute:
        blocks = {
            "stream between blocks, float32": 4 * tokens * c.dim * n_blocks(c),
            "inside one block, recomputed": block,
        }
    else:
        blocks = {"inside all blocks": block * n_blocks(c)}
    sample = {
        **blocks,
        "gradients of stream and GELU": tokens * (6 * c.dim + 4 * c.ffn_dim),
        "φ, float32": encoder_bytes,
    }
    return fixed, sample


def sampling_memory(base, frozen, trained, tokens):
    """Bytes at batch 1, a LoRA not merged: ({what: bytes} of denoising, {what: bytes} of decoding; empty if the codec
    takes nothing to speak of)."""
    c = base.dit
    context = {"CUDA context (estimate)": CONTEXT * 2**30}
    weights = frozen_bytes(c, frozen) | trained_bytes(trained)
    inside = inference_bytes(c, tokens + text_tokens(c), frozen > 0)
    denoising = weights | {"inside one block": inside} | context
    between, decoding = base.codec.memory(math.prod(base.sizes[0]))
    if decoding:  # while a large codec decodes, the DiT waits in host memory
        decoding = ({} if base.codec.large else weights) | decoding | context
    return denoising | between, decoding


# ---------------------------------------------------------------------------------------------------------------------
# Printing


def print_table(title, rows):
    """Print rows of strings in columns: the first aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    print(f"\n{title}")
    for first, *rest in rows:
        cells = [x.rjust(n) for x, n in zip(rest, widths[1:])]
        print("  ".join(["", first.ljust(widths[0]), *cells]).rstrip())


def short(n):
    """FLOPs with three digits: 95.3 TFLOP."""
    k = min(6, int(math.log10(n)) // 3)
    return f"{n / 1000**k:.3g} {' kMGTPE'[k]}FLOP"


def gib(values):
    return [f"{n / 2**30:.3g}" for n in values]


def print_tokens(base):
    """Print the tokens of a history: one line per rate and per uncompressed baseline, two columns per size."""
    latents, per_second = base.history, base.fps / base.codec.stride[0]
    frames = [frame_tokens(base, size) for size in base.sizes]

    def row(name, seconds, totals):
        return [name, *(cell for pair in zip(seconds, totals) for cell in pair)]

    rows = [row("", [f"{h}x{w}: 1 s" for h, w in base.sizes], [f"{latents} latents"] * len(base.sizes))]
    for rate in RATES:
        t, h, w = parse_rate(rate)
        seconds = [f"{frame_tokens(base, size, h, w) * per_second / t:,g}" for size in base.sizes]
        rows.append(row(rate, seconds, [f"{memory_tokens(base, size, rate, latents):,}" for size in base.sizes]))
    for name, n in ("sliding-window, 1 latent", 1), ("sliding-window, 8 latents", 8), ("keyframes", 2):
        rows.append(row(name, [""] * len(frames), [f"{n * tokens:,}" for tokens in frames]))
    seconds = [f"{tokens * per_second:,g}" for tokens in frames]
    rows.append(row("full", seconds, [f"{latents * tokens:,}" for tokens in frames]))
    print_table(
        "tokens of a history; at the same rate, large-patchifier and token-merging have as many as proposed", rows
    )
    padded = memory_tokens(open_base(PAPER_PRESET), PAPER_SIZE, PAPER_RATE, 121)
    print(
        f"  The paper prints {paper_tokens():,} for 120 latents of 480x832 at 4x4x2: it rounds down. Padded up, "
        f"121 are {padded:,}."
    )


def print_flops(base, encoder, rate, noisy, memory):
    """Print the FLOPs of a training step and of a generated section.

    noisy: tokens of a sample, one number per stage; memory: φ's tokens. A training step of the DiT costs three forward
    passes, and one more if it recomputes.
    """
    c, steps, passes = base.dit, base.steps, 4 if base.recompute else 3
    phi, _ = encoder_cost(encoder, base, rate, base.history)
    section, _ = encoder_cost(encoder, base, rate, base.section, start=int(base.codec.causal))
    forward = [flops(c, n, memory) for n in noisy]
    full, (t, h, w) = base.history * frame_tokens(base, base.sizes[0]), parse_rate(rate)
    rows = [
        ["", f"stage 1: {PretrainConfig.queries} query latents", f"stage 2: a section of {base.section}"],
        ["noisy + memory tokens", *(f"{n:,} + {memory:,}" for n in noisy)],
        ["DiT forward", *map(short, forward)],
        [f"φ forward, {base.history} latents", short(phi), short(phi)],
        [f"training step: DiT x {passes}, φ x 3", *(short(passes * f + 3 * phi) for f in forward)],
    ]
    print_table("FLOPs per sample", rows)
    notes = ["x 4: recomputed in the backward pass"] if base.recompute else []
    notes += ["an upper bound, as frozen weights need no gradients"] if base.lora else []
    if notes:
        print(f"  {'; '.join(notes)}.")
    calls = base.passes * steps
    rows = [
        ["memory", "tokens", "DiT", "φ of the section"],
        [rate, f"{memory:,}", short(calls * forward[1]), short(section)],
        ["full, uncompressed", f"{full:,}", short(calls * flops(c, noisy[1], full)), "–"],
    ]
    if not base.boundary and "cache_memory" not in base.lacks:  # of two DiTs, only one would have what is cached
        once = short(flops(c, base.section // t * frame_tokens(base, base.sizes[0], h, w)))
        cached = short(calls * flops(c, noisy[1], memory, cached=True))
        rows.insert(2, [f"{rate}, --cache_memory", f"{memory:,}", cached, f"{short(section)} + {once}"])
    guided = " x 2 for guidance" * (base.passes == 2)
    print_table(f"FLOPs per generated section: {steps} steps{guided}", rows)


def print_training_memory(config, base, encoder, frozen, trained, tokens):
    """Print what fills a GPU in training, and the largest batch. tokens: N + M of a sample, one number per stage."""
    _, kept = encoder_cost(encoder, base, config.rate, base.history)
    plans = [training_memory(base, frozen, trained, n, config.gpus, kept) for n in tokens]
    fixed, samples = plans[0][0], [sample for _, sample in plans]
    free = config.memory_gb * 2**30 - sum(fixed.values())
    batches = [max(0, int(free // sum(sample.values()))) for sample in samples]
    rows = [
        ["", "stage 1", "stage 2"],
        ["tokens of a sample, at most", *(f"{n:,}" for n in tokens)],
        *([what, *gib([n, n])] for what, n in fixed.items() if n),
        ["= whatever the batch", *gib([sum(fixed.values())] * 2)],
        *([f"per sample: {what}", *gib(sample[what] for sample in samples)] for what, n in samples[0].items() if n),
        ["= per sample", *gib(sum(sample.values()) for sample in samples)],
        [f"largest batch in {config.memory_gb:g} GiB", *(str(n or "does not fit") for n in batches)],
        [f"on {config.gpus} GPUs", *(str(n * config.gpus) for n in batches)],
    ]
    print_table(f"training memory of each of {config.gpus} GPUs, GiB", rows)
    print("  DDP splits the batch, not the weights. Muon keeps one moment per matrix, half of AdamW's two.")


def print_sampling_memory(base, frozen, trained, tokens):
    """Print what fills a GPU in sampling. tokens: N + M of a section."""
    phases = [needs for needs in sampling_memory(base, frozen, trained, tokens) if needs]
    totals = [sum(needs.values()) for needs in phases]
    rows = [
        ["", "denoising", "decoding"][: 1 + len(phases)],
        *([what, *gib(needs.get(what, 0) for needs in phases)] for what, n in phases[0].items() if n),
        ["= total", *gib(totals)],
        ["fits 12 GiB", *("yes" if n <= 12 * 2**30 else "no" for n in totals)],
    ]
    print_table("sampling memory, GiB: batch 1, prompts encoded beforehand", rows)


# ---------------------------------------------------------------------------------------------------------------------
# python eval.py budget


@dataclass
class BudgetConfig:
    preset: str = "wan-14b"  # nano, small, wan-1.3b, wan-14b, wan2.2-5b, wan2.2-a14b, hunyuan
    rate: str = None  # compression on the DiT's token grid, rows x columns x frames [the preset's]
    gpus: int = 8  # GPUs to train on
    memory_gb: float = 79.0  # memory of each, GiB; an 80 GB card has about this much


def budget(argv):
    """Predict parameters, tokens, FLOPs and memory of a preset from shapes alone; no weights are allocated."""
    config = parse_flags(BudgetConfig, budget.__doc__, argv)
    base = open_base(config.preset)
    config.rate = base.rate if config.rate is None else config.rate
    if config.gpus < 1 or not 0 < config.memory_gb < math.inf:
        raise UserError(f"--gpus {config.gpus} --memory_gb {config.memory_gb}: give at least 1 GPU and memory above 0")
    with torch.device("meta"):
        model = MemoryDiT(base, "proposed", config.rate)
    dit, phi = (sum(p.numel() for p in module.parameters()) for module in (model.dit, model.encoder))
    lora = lora_parameters(base.dit, base.lora)
    frozen, trained = (dit, lora + phi) if base.lora else (0, dit + phi)
    size = base.sizes[0]
    print(
        f"{config.preset} at {config.rate}: predictions from shapes, not measurements; GPUs with bf16; "
        f"{size[0]}x{size[1]} where no size is named"
    )
    counts = {
        "DiT": dit,
        "memory encoder φ": phi,
        f"LoRA, rank {base.lora}": lora,
        "all": dit + phi + lora,
        "trained": trained,
    }
    print_table("parameters", [[what, f"{n:,}"] for what, n in counts.items() if n])
    if base.boundary:
        (waiting,) = gib([sum(frozen_bytes(base.dit, dit).values()) + 4 * lora])
        print(
            f"  Two DiTs of this size, together {2 * dit:,}: one is trained at a time; in sampling the other waits\n"
            f"  in host memory, {waiting} GiB with its LoRA."
        )
    print_tokens(base)
    noisy = [n * frame_tokens(base, size) for n in (PretrainConfig.queries, base.section)]
    memory, most = memory_tokens(base, size, config.rate, base.history), most_memory_tokens(base, size, config.rate)
    print_flops(base, model.encoder, config.rate, noisy, memory)
    print_training_memory(config, base, model.encoder, frozen, trained, [noisy[0] + memory, noisy[1] + most])
    print_sampling_memory(base, frozen, trained, noisy[1] + most)
