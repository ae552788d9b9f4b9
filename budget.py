"""What it costs, predicted from shapes before anything is trained: parameters, tokens, FLOPs, memory. No weights are
allocated. (speed.py measures.)

    python eval.py budget --preset wan-14b --gpus 8

Letters as in model.py: N noisy tokens, M memory tokens, D width. A multiply-add is 2 FLOPs, a GiB 2^30 bytes.
"""
import math
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from codec import DCTCodec
from encoder import MemoryDiT, parse_rate
from flags import parse_flags
from model import PRESETS, UserError, get_preset
from pretrain import PretrainConfig
from wan import WanCodec

STRIDES = {"dct": DCTCodec.stride, "wan": WanCodec.stride}  # pixels a latent: frames, rows, columns
RATES = ("4x4x2", "2x2x2", "2x2x4", "2x2x1")                # the paper's
# GiB, the only figures that are estimated, not counted: a CUDA context with its libraries and fragmentation, and NCCL's
# buffers
CONTEXT, NCCL = 1.0, 1.0
# Wan's VAE, float32, traced by a test. Bytes of its weights; and bytes for each pixel of a frame: what its decoder
# carries from one latent to the next, and the most that decoding needs, that included
VAE_WEIGHTS, VAE_CARRIES, VAE_DECODES = 507_570_124, 9_545, 19_940

# ---------------------------------------------------------------------------------------------------------------------
# Counting


def frame_tokens(preset, size, h=1, w=1):
    """Tokens of a latent frame of size (height, width) pixels, each h x w of the DiT's; padded up."""
    return math.prod(-(-n // (s * p * r)) for n, s, p, r in
                     zip(size, STRIDES[preset.codec][1:], preset.dit.patch[1:], (h, w)))


def memory_tokens(preset, size, rate, latents):
    """φ's tokens for so many latents of history: a causal codec's lone first one, whole segments at the rate, and the
    frames of an unfinished segment uncompressed."""
    t, h, w = parse_rate(rate)
    lone = min(latents, int(preset.codec == "wan"))
    waiting = (latents - lone) % preset.section
    compressed = lone + (latents - lone - waiting) // t
    return compressed * frame_tokens(preset, size, h, w) + waiting * frame_tokens(preset, size)


def paper_tokens(size=(480, 832), latents=120, rate="4x4x2"):
    """The paper's nominal count, which rounds down: 60x104 latents / 8 -> 7x13, for 60 pairs of frames."""
    t, h, w = parse_rate(rate)
    return latents // t * (size[0] // (16 * h)) * (size[1] // (16 * w))


def lora_parameters(c, rank):
    """LoRA on q, k, v, o of both attentions and on both layers of the feed-forward, in every block."""
    return c.layers * rank * (8 * (c.dim + c.dim) + 2 * (c.dim + c.ffn_dim))


def flops(c, tokens, memory=0):
    """FLOPs of a DiT forward, one sample: `tokens` noisy ones and `memory` clean ones before them, which skip the patch
    embedding and the head. With memory the time embedding runs for two timesteps. Elementwise work is left out."""
    N, D, T = tokens + memory, c.dim, c.text_len
    # q, k, v, o and cross q, o; self-attention's products; cross k, v; cross-attention's products; feed-forward
    block = 12 * N * D**2 + 4 * N**2 * D + 4 * T * D**2 + 4 * N * T * D + 4 * N * D * c.ffn_dim
    ends = 2 * tokens * math.prod(c.patch) * (c.in_dim + c.out_dim) * D
    times = 2 if memory else 1
    return c.layers * block + ends + 2 * T * (c.text_dim * D + D**2) + 2 * times * (c.freq_dim * D + 7 * D**2)


def random_history(preset, rate, latents, device, start=0):
    """Random (hr, lr) for the memory encoder, of the default size: (1, C, F, H, W) and what the rate leaves of it."""
    t, h, w = parse_rate(rate)
    lone = int(preset.codec == "wan" and start == 0)
    rows, columns = (n // s for n, s in zip(preset.sizes[0], STRIDES[preset.codec][1:]))
    shape = lone + (latents - lone) // t, -(-rows // h), -(-columns // w)
    return [torch.randn(1, preset.dit.in_dim, *s, device=device) for s in ((latents, rows, columns), shape)]


def encoder_cost(encoder, preset, rate, latents, start=0):
    """Of φ on the meta device: FLOPs of its forward, and bytes that it keeps for its backward (in float32; autocast
    keeps less)."""
    held = {}       # by storage, so that views are counted once

    def keep(x):
        held[x.untyped_storage()._cdata] = x
        return x

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        encoder(*random_history(preset, rate, latents, "meta", start), start)
    for p in encoder.parameters():
        held.pop(p.untyped_storage()._cdata, None)
    return counter.get_total_flops(), sum(x.untyped_storage().nbytes() for x in held.values())


def block_bytes(c, tokens, lora):
    """What a block keeps for its backward under bf16 autocast with a flash kernel, one sample.

    (N, D) float32: x at three places; q, k, cross q before RMSNorm; unless base weights are frozen, the three after it
    and two layer norms too. (N, D) bf16: inputs of q, k and v (the same), o, cross q, cross o, ffn.0; rotated q and k,
    v, cross q, an attention's output; unless frozen, two gated outputs too. (N, F) bf16: before and after GELU.
    """
    float32, bf16 = (6, 10) if lora else (11, 12)
    return tokens * (c.dim * (4 * float32 + 2 * bf16) + c.ffn_dim * 2 * 2)


def base_bytes(c, frozen):
    """{what: bytes} of a frozen base of so many parameters (or 0), see frozen_dtype()."""
    matrices = c.layers * (8 * c.dim**2 + 2 * c.dim * c.ffn_dim)        # of the blocks
    return {"base DiT, frozen: bf16, outside its blocks float32": frozen and 4 * frozen - 2 * matrices}


def trained_bytes(n):
    """{what: bytes} of n parameters that are trained, as a forward pass needs them."""
    return {"trained weights, float32": 4 * n, "their copies for autocast, bf16": 2 * n}


def training_memory(c, frozen, trained, tokens, gpus, encoder_bytes):
    """Bytes on each GPU: ({what: bytes} at any batch, {what: bytes} a sample). DDP has all weights on every GPU. Above
    a frozen base, activation checkpointing keeps only the stream between blocks."""
    fixed = {**base_bytes(c, frozen), **trained_bytes(trained),
             "gradients": 4 * trained, "AdamW, two moments": 8 * trained, "average of weights (EMA)": 4 * trained,
             "NCCL's buffers (estimate)": NCCL * 2**30 * (gpus > 1), "CUDA context (estimate)": CONTEXT * 2**30}
    block = block_bytes(c, tokens, lora=frozen > 0)
    sample = {"stream between blocks, float32": 4 * tokens * c.dim * c.layers * (frozen > 0),
              "inside one block, recomputed" if frozen else "inside all blocks": block * (1 if frozen else c.layers),
              "gradients of stream and GELU": tokens * (6 * c.dim + 4 * c.ffn_dim), "φ, float32": encoder_bytes}
    return fixed, sample


def sampling_memory(c, frozen, trained, tokens, pixels):
    """({what: bytes}, the same of decoding) at batch 1, a LoRA not merged. pixels: of a frame that Wan's VAE decodes,
    or 0. Largest inside a block, as traced, is attention (x and its norm; q, k and v; q and k normalised and rotated in
    float32) or the feed-forward (x, its norm; before and after GELU, or what a LoRA adds and the sum, in bf16)."""
    context = {"CUDA context (estimate)": CONTEXT * 2**30}
    denoising = {**base_bytes(c, frozen), **trained_bytes(trained),
                 "inside one block": tokens * max(31 * c.dim, 13 * c.dim + (6 if frozen else 4) * c.ffn_dim), **context}
    if not pixels:                                                  # cosines: nothing to speak of
        return denoising, {}
    vae = lambda bytes_a_pixel: {"VAE": VAE_WEIGHTS, "what it carries on, or decodes with": bytes_a_pixel * pixels}
    return denoising | vae(VAE_CARRIES), vae(VAE_DECODES) | context     # the DiT waits in host memory meanwhile


# ---------------------------------------------------------------------------------------------------------------------
# python eval.py budget


@dataclass
class BudgetConfig:
    preset: str = "wan-14b"       # nano, small, wan-1.3b, wan-14b
    rate: str = None              # compression on the DiT's token grid, rows x columns x frames [the preset's]
    gpus: int = 8                 # GPUs to train on
    memory_gb: float = 79.0       # memory of each, GiB; a card of 80 GB has about so much


def table(title, rows):
    """Print rows of strings in columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    print(f"\n{title}")
    for first, *rest in rows:
        print("  ".join(["", first.ljust(widths[0]), *(x.rjust(n) for x, n in zip(rest, widths[1:]))]).rstrip())


def short(n):
    """FLOPs in three digits: 95.3 TFLOP."""
    k = min(6, int(math.log10(n)) // 3)
    return f"{n / 1000**k:.3g} {' kMGTPE'[k]}FLOP"


def gib(values):
    return [f"{n / 2**30:.3g}" for n in values]


def print_tokens(preset):
    """The table of history tokens: a line for each rate and each uncompressed baseline, two columns a size."""
    latents, a_second = preset.history, preset.fps / STRIDES[preset.codec][0]
    frame = lambda *rate: [frame_tokens(preset, size, *rate) for size in preset.sizes]
    pairs = lambda seconds, totals: [x for pair in zip(seconds, totals) for x in pair]
    rows = [["", *pairs([f"{h}x{w}: 1 s" for h, w in preset.sizes], [f"{latents} latents"] * len(preset.sizes))]]
    for rate in RATES:
        t, h, w = parse_rate(rate)
        rows.append([rate, *pairs([f"{n * a_second / t:,g}" for n in frame(h, w)],
                                  [f"{memory_tokens(preset, size, rate, latents):,}" for size in preset.sizes])])
    for name, n in ("sliding-window, 1 latent", 1), ("sliding-window, 8 latents", 8), ("keyframes", 2):
        rows.append([name, *pairs([""] * len(preset.sizes), [f"{n * m:,}" for m in frame()])])
    rows.append(["full", *pairs([f"{m * a_second:,g}" for m in frame()], [f"{latents * m:,}" for m in frame()])])
    table("tokens of history; large-patchifier and token-merging have as many at a rate as proposed", rows)
    print(f"  The paper prints {paper_tokens():,} for 120 latents of 480x832 at 4x4x2: it rounds down. Padded up, "
          f"121 are {memory_tokens(PRESETS['wan-14b'], (480, 832), '4x4x2', 121):,}.")


def print_flops(preset, encoder, rate, N, M, factor):
    """N: noisy tokens of each stage; factor: a training step's cost in forwards."""
    c, steps, first = preset.dit, preset.steps, int(preset.codec == "wan")
    phi, section = (encoder_cost(encoder, preset, rate, *x)[0] for x in ((preset.history,), (preset.section, first)))
    forward = [flops(c, n, M) for n in N]
    full = preset.history * frame_tokens(preset, preset.sizes[0])
    table("FLOPs of a sample", [
        ["", f"stage 1: {PretrainConfig.queries} query latents", f"stage 2: a section of {preset.section}"],
        ["noisy + memory tokens", *(f"{n:,} + {M:,}" for n in N)], ["DiT forward", *map(short, forward)],
        [f"φ forward, {preset.history} latents", *[short(phi)] * 2],
        [f"training step: DiT x {factor}, φ x 3", *(short(factor * f + 3 * phi) for f in forward)]])
    if factor == 4:
        print("  x 4: recomputed in the backward; an upper bound, as frozen weights need no gradients.")
    table(f"FLOPs of a generated section: {steps} steps x 2 for guidance", [
        ["memory", "tokens", "DiT", "φ of the section"],
        [rate, f"{M:,}", short(2 * steps * forward[1]), short(section)],
        ["full, uncompressed", f"{full:,}", short(2 * steps * flops(c, N[1], full)), "–"]])


def print_memory(config, preset, encoder, frozen, trained, tokens):
    """tokens: N + M of each stage."""
    _, kept = encoder_cost(encoder, preset, config.rate, preset.history)
    plans = [training_memory(preset.dit, frozen, trained, n, config.gpus, kept) for n in tokens]
    fixed, samples = plans[0][0], [sample for _, sample in plans]
    batch = [max(0, int((config.memory_gb * 2**30 - sum(fixed.values())) // sum(s.values()))) for s in samples]
    table(f"training memory of each of {config.gpus} GPUs, GiB", [
        ["", "stage 1", "stage 2"], ["tokens of a sample, at most", *(f"{n:,}" for n in tokens)],
        *([k, *gib([v] * 2)] for k, v in fixed.items() if v),
        ["= at any batch", *gib([sum(fixed.values())] * 2)],
        *([f"a sample: {k}", *gib(s[k] for s in samples)] for k, v in samples[0].items() if v),
        ["= a sample", *gib(sum(s.values()) for s in samples)],
        [f"largest batch in {config.memory_gb:g} GiB", *(str(n or "does not fit") for n in batch)],
        [f"on {config.gpus} GPUs", *(str(n * config.gpus) for n in batch)]])
    print("  DDP splits the batch, not the weights. Muon keeps one moment of a matrix, half of AdamW's two.")


def budget(argv):
    """Predict parameters, tokens, FLOPs and memory of a preset from shapes alone; no weights are allocated."""
    config = parse_flags(BudgetConfig, budget.__doc__, argv)
    preset = get_preset(config.preset)
    config.rate = preset.rate if config.rate is None else config.rate
    if config.gpus < 1 or not 0 < config.memory_gb < math.inf:
        raise UserError(f"--gpus {config.gpus} --memory_gb {config.memory_gb}: give at least 1 GPU and memory above 0")
    with torch.device("meta"):
        model = MemoryDiT(config.preset, "proposed", config.rate)
    dit, phi = (sum(p.numel() for p in m.parameters()) for m in (model.dit, model.encoder))
    wan = preset.codec == "wan"             # Wan's DiT is frozen and has a LoRA; any other is trained
    lora = lora_parameters(preset.dit, preset.lora)
    frozen, trained = (dit, lora + phi) if wan else (0, dit + phi)
    print(f"{config.preset} at {config.rate}: predictions from shapes, not measurements; GPUs with bf16; "
          f"{preset.sizes[0][0]}x{preset.sizes[0][1]} where no size is named")
    counts = {"DiT": dit, "memory encoder φ": phi, f"LoRA, rank {preset.lora}": lora, "all": dit + phi + lora,
              "trained": trained}
    table("parameters", [[k, f"{v:,}"] for k, v in counts.items() if v])
    print_tokens(preset)
    N = [n * frame_tokens(preset, preset.sizes[0]) for n in (PretrainConfig.queries, preset.section)]
    M = memory_tokens(preset, preset.sizes[0], config.rate, preset.history)
    print_flops(preset, model.encoder, config.rate, N, M, factor=4 if wan else 3)
    # but for a causal codec up to a segment but one frame waits uncompressed, in stage 2 and when sampling
    most = max(memory_tokens(preset, preset.sizes[0], config.rate, preset.history - k)
               for k in range(1 if wan else preset.section))
    print_memory(config, preset, model.encoder, frozen, trained, [N[0] + M, N[1] + most])
    phases = sampling_memory(preset.dit, frozen, trained, N[1] + most, math.prod(preset.sizes[0]) if wan else 0)
    totals = [sum(needs.values()) for needs in phases if needs]
    table("sampling memory, GiB: batch 1, prompts encoded before", [
        ["", "denoising", "decoding"][:1 + len(totals)],
        *([k, *gib(needs.get(k, 0) for needs in phases if needs)] for k, n in phases[0].items() if n),
        ["= in all", *gib(totals)], ["fits 12 GiB", *("yes" if n <= 12 * 2**30 else "no" for n in totals)]])
