"""Continue a clip: read it into memory, then generate section after section and append each to the memory.

    python sample.py --history clip.mp4
    python sample.py --history clip.mp4 --prompt "0s: she opens the door / 4s: she steps outside"
    python sample.py --prompt "she opens the door"        from text alone; or from a picture: --history picture.png

Without --prompt, the storyboard beside the clip is used (clip.json, .txt or .srt; its times count from its start).
Writes the history with its continuation to --save_file, and a contact sheet beside it.
"""

import time
from dataclasses import dataclass

import torch

from bases import open_base
from data import check_prompts
from encoder import MemoryDiT, load_model
from util.cli import Failure, UserError, load_object, parse_flags, run_main, warn
from util.device import autocast, make_room, peak_memory, pick_device
from util.files import unused
from util.folder import copy_history, stream_clip
from util.sections import (
    check_sampler,
    n_sections,
    output_file,
    read_trained,
    section_prompts,
    sections_remembered,
    warn_limits,
    write_sections,
)
from util.sheets import SectionSheet, sheet_path
from util.storyboard import parse_storyboard
from util.video import has_sound, to_frames, to_pixels
from util.video_writer import VideoWriter
from util.weights import weight_files

SOLVERS = {"euler": "sample.euler", "unipc": "util.unipc.unipc"}  # add new ones here
# the same flags as Wan's generate.py calls them
WAN_FLAGS = dict(steps="--sample_steps", shift="--sample_shift", guidance="--sample_guide_scale", seed="--base_seed")
WAN_FLAGS |= dict(solver="--sample_solver")


@dataclass
class SampleConfig:
    history: str = ""  # the clip to continue, or a picture; without it, a video from --prompt alone
    checkpoint: str = "checkpoints/nano.safetensors"  # weights from finetune.py
    low_checkpoint: str = ""  # wan2.2-a14b: those of the low expert; without, it is not trained and sees no memory
    prompt: str = None  # a text, "0s: ... / 4s: ...", or a .txt, .srt or .json file; 0 s is where the clip ends
    seconds: float = 6.0  # length of what is generated, rounded up to whole sections
    steps: int = None  # solver steps per section [the preset's]
    guidance: float = None  # classifier-free guidance: 1 is none [the preset's]
    low_guidance: float = None  # wan2.2-a14b: that of the low expert [--guidance, or the preset's]
    negative: str = ""  # a text to guide away from, instead of from no prompt
    guidance_interval: tuple = (0.0, 1.0)  # the lowest and the highest noise level with guidance
    cfg_zero: bool = False  # CFG-Zero*: scale the velocity that is guided away from; skip the first 4 % of the steps
    shift: float = None  # timestep shift: above 1, more steps at high noise [the preset's]
    solver: str = "euler"  # how the flow is integrated: euler, unipc
    seed: int = 0  # of the noise
    save_file: str = ""  # the video to write [out/NAME.mp4 (text.mp4); out/NAME_continued.mp4 if that is the history]
    memory_seconds: float = 20.0  # how much history is kept in memory; 0: all
    device: str = "auto"  # auto, cpu, cuda, mps
    init: str = ""  # the base DiT under the checkpoint's LoRA; "random": random weights of --preset
    merge: bool = False  # add the LoRA to the base's weights first: faster, but rounded to the base's dtype
    lora: str = ""  # LoRAs by others to add to the base's weights: FILE or FILE:strength, separated by blanks
    vae: str = ""  # local folder of the base's VAE ("random": random weights, for timing); nano, small: a codec file
    t5: str = ""  # local folder of the base's text encoders in the diffusers layout, such as umT5
    preset: str = "nano"  # of --init random, which needs no checkpoint: to measure speed and memory


# ---------------------------------------------------------------------------------------------------------------------
# From noise to latents


def euler(velocity, x, levels):
    """A solver: integrate dx = v dt from noise x (B, ...) at t = 1 to data at t = 0 along `levels` (S + 1,).

    velocity(x, t) is called once per step, t a float. Other solvers take the same arguments.
    """
    for t, t_next in zip(levels[:-1], levels[1:]):
        x = x + float(t_next - t) * velocity(x, float(t))
    return x


@dataclass
class Guidance:
    """Classifier-free guidance: v = v_other + scale (v_prompt - v_other). Both passes of the DiT read the memory."""

    scale: float = 1.0  # 1: none, v_prompt alone
    negative: torch.Tensor = None  # the prompt of v_other, (L, text_dim), in place of no prompt
    interval: tuple = (0.0, 1.0)  # noise levels outside of which there is none (Kynkäänniemi et al. 2024)
    # CFG-Zero* (Fan et al. 2025): v_other is scaled to be nearest to v_prompt, and v is zero in the first 4 % of the
    # steps, rounded down: of fewer than 25 steps each is too large to go without
    zero_star: bool = False
    below: tuple = (0.0, None)  # a noise level, and the scale below it: for a base of two experts


@torch.no_grad()
def sample(dit, noise, text, times, memory, steps, shift=1.0, guidance=1.0, solver=euler):
    """Generate x_0, shaped like noise (B, C, F, H, W); text, times, memory as in DiT.forward.

    With one Euler step, shift has no effect and the result is the conditional mean. guidance: a Guidance, or its scale.
    """
    g = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    if hasattr(dit, "take_guidance"):  # as an input of its own: then one pass is enough
        dit, g = dit.take_guidance(g)
    other_text = torch.zeros_like(text) if g.negative is None else g.negative.to(text).expand_as(text)

    def velocity(x, t):
        timestep = torch.full((len(x),), 1000 * t, device=x.device)
        v = dit(x, timestep, text, times, memory)
        scale = g.scale if t >= g.below[0] or g.below[1] is None else g.below[1]
        if scale == 1 or not g.interval[0] <= t <= g.interval[1]:
            return v
        other = dit(x, timestep, other_text, times, memory)
        if g.zero_star:  # <v, other> / |other|²
            dims = tuple(range(1, v.ndim))
            other = other * (v * other).sum(dims, True) / other.square().sum(dims, True).clamp(min=1e-8)
        return other + scale * (v - other)

    levels = torch.linspace(1, 0, steps + 1)
    levels = shift * levels / (1 + (shift - 1) * levels)
    if g.zero_star and g.scale != 1:
        levels = levels[steps // 25 :]  # while v is zero, x stays the noise
    return solver(velocity, noise, levels)


# ---------------------------------------------------------------------------------------------------------------------
# Memory that grows, section by section


class Memory:
    """φ(H) of a growing history: append() encodes only new frames.

    most: keep at most this many of the newest whole segments (None: all). A causal codec's lone first latent stays
    until the first segment has to go.
    """

    def __init__(self, model, codec, most=None):
        self.model, self.encoder, self.codec, self.most = model, model.encoder, codec, most
        self.encode_low = self.encoder.low_rate and codec.low_encoder(self.encoder.rate)
        self.segments = []  # (what the DiT reads of it, number of frames) of each segment kept
        self.latents = None  # latents (B, C, F, H, W) of frames kept uncompressed
        self.times = torch.arange(0)  # and their times (F,)
        self.pixels = None  # what the frames show that wait for a whole segment, (B, 3, F', height, width)
        self.frames = 0  # latent frames appended so far: the time of the next one
        self.compressed = 0  # how many of them are in segments

    @torch.no_grad()
    def append(self, latents, pixels):
        """Add latents (B, C, F, H, W), which show `pixels` (B, 3, F', height, width), to the end of the history."""
        encoder = self.encoder
        pixels = pixels if self.pixels is None else torch.cat([self.pixels, pixels], dim=2)
        times = torch.cat([self.times, self.frames + torch.arange(latents.shape[2])])
        self.frames += latents.shape[2]
        latents = latents if self.latents is None else torch.cat([self.latents, latents], dim=2)
        waiting = latents[:, :, (times >= self.compressed).nonzero()[:, 0]]
        while encoder.whole(waiting.shape[2], self.compressed):
            n = encoder.lone(self.compressed) or encoder.segment  # one at a time, to bound activation memory
            high, waiting = waiting[:, :, :n], waiting[:, :, n:]
            shown = 1 if encoder.lone(self.compressed) else n * self.codec.stride[0]  # frames
            low = self.encode_low(pixels[:, :, :shown]).to(high) if encoder.reads_low else high[:, :, :0]
            made = encoder.encode_whole(high, low, self.compressed)
            self.segments.append((self.model.join([self.model.prepare(*part) for part in made]), n))
            self.compressed, pixels = self.compressed + n, pixels[:, :, shown:]
        kept = encoder.kept(times, self.compressed, self.frames, self.most and self.most * encoder.segment)
        self.latents, self.times = latents[:, :, kept], times[kept]
        self.pixels = pixels if encoder.reads_low else None
        if self.most is not None:
            while sum(n for _, n in self.segments) > self.most * encoder.segment + encoder.causal:
                del self.segments[0]

    @torch.no_grad()
    def context(self):
        """What the DiT reads, see MemoryDiT.remember; None if nothing is kept."""
        memories = [memory for memory, _ in self.segments]
        if len(self.times):
            memories.append(self.model.prepare(self.encoder.embed_frames(self.latents, self.times)))
        return self.model.join(memories)

    @property
    def uncompressed(self):
        """How many tokens the remembered frames would be without compression."""
        if self.latents is None:
            return 0
        rows, columns = (-(-size // p) for size, p in zip(self.latents.shape[3:], self.encoder.patch[1:]))
        return (sum(n for _, n in self.segments) + int((self.times >= self.compressed).sum())) * rows * columns


@torch.no_grad()
def continue_video(model, base, memory, decode, texts, config, size, negative=None):
    """Generate one section for each of `texts` (L, text_dim) and append it to `memory`, which may be empty.

    decode: the codec's decoder, which carries on from the history; size: (height, width) in pixels; negative: see
    Guidance. Yields (frames uint8 (F, H, W, 3), seconds it took). Raises Failure.
    """
    codec, device = base.codec, next(model.parameters()).device
    g = torch.Generator().manual_seed(config.seed)
    space = size[0] // codec.stride[1], size[1] // codec.stride[2]
    solver = load_object(SOLVERS[config.solver])
    for text in texts:
        started = time.perf_counter()
        n = base.section + memory.encoder.lone(memory.frames)  # a causal codec's video begins with a lone latent
        times = memory.frames + torch.arange(n, device=device)
        noise = torch.randn(1, codec.channels, n, *space, generator=g).to(device)
        same = torch.equal(text, torch.zeros_like(text) if negative is None else negative)  # for both passes
        scale, low_scale = (1, 1) if same else (config.guidance, config.low_guidance)
        guidance = Guidance(scale, negative, config.guidance_interval, config.cfg_zero, (base.boundary, low_scale))
        with autocast(device):
            settings = config.steps, config.shift, guidance, solver
            x = sample(model.dit, noise, text[None].to(device), times, memory.context(), *settings).float()
        if not x.isfinite().all():
            raise Failure(f"{config.checkpoint} generated numbers that are not finite: use another checkpoint")
        with make_room(model, codec):
            pixels = decode(x).clamp(-1, 1)
        with autocast(device):
            memory.append(x, pixels)
        yield to_frames(pixels)[0].cpu(), time.perf_counter() - started


# ---------------------------------------------------------------------------------------------------------------------
# History, prompts, model


def embed_prompts(config, base, prompts):
    """Embeddings (L, text_dim) of these prompts. All at once, so a large text encoder is freed before the DiT is
    loaded."""
    embedded = {prompt: base.prompts(prompt) for prompt in set(prompts)}
    texts = [embedded[prompt] for prompt in prompts]
    base.prompts = None  # umT5 is larger than a DiT of 1.3B
    # to measure speed and memory: any prompt, with no text encoder
    return [*map(torch.randn_like, texts[:-1]), texts[-1]] if config.init == "random" else texts


def open_model(config, base, device):
    """The trained MemoryDiT, or one with random weights."""
    if config.init != "random":
        model = load_model(config.checkpoint, base, config.init, device)
        if config.merge:
            base.merge_lora(model.dit)
        base.apply_loras(model.dit, config.lora)
        model.dit = base.add_low(model.dit, config)
        return model
    with base.random_frozen(device):
        model = MemoryDiT(base)
    if base.lora:
        base.add_lora(model.dit, base.lora)  # as in a trained model
    return model.to(device).eval()


def remember(config, base, history, device):
    """(model, Memory of the history, the codec's decoder, which carries on from the history)."""
    decode = base.codec.decoder()
    if history.frames:
        pixels = to_pixels(history.remembered)[None]
        latents = base.codec.encode(pixels).to(device)
        for piece in latents[:, :, -base.codec.lookback :].split(base.section, dim=2) if base.codec.lookback else ():
            decode(piece)
    model = open_model(config, base, device)
    memory = Memory(model, base.codec, sections_remembered(config, base))
    with autocast(device):
        if history.frames:
            memory.append(latents, pixels)
        context = memory.context()
    warn_limits(config, base, history.frames, context)
    print(
        f"history: {history.frames / base.fps:g} s, {history.frames} frames; memory: {model.count(context)} tokens for "
        f"its newest {len(history.remembered) / base.fps:g} s (uncompressed: {memory.uncompressed})"
    )
    return model, memory, decode


def check(config):
    """Fill in the preset's defaults and reject invalid settings. Raises UserError.

    Returns (base without weights, config of the checkpoint, {} for random weights).
    """
    if not config.history and not config.prompt:
        raise UserError("--history is missing: give the clip to continue, or --prompt for a video from text alone")
    if not 0 < config.seconds <= 86400:  # the prompt of each section is looked up first
        raise UserError(f"--seconds {config.seconds}: give a number above 0, at most 86400 (a day)")
    random, trained = config.init == "random", read_trained(config)
    base = open_base(config.preset if random else trained["preset"])
    base.check_low(config, trained)
    for key in ("steps", "guidance", "shift"):
        if getattr(config, key) is None:
            setattr(config, key, getattr(base, key))
    check_sampler(config, SOLVERS)
    parse_storyboard(config.prompt or "")  # refused now, not after the clip was read
    if n_sections(config, base) < 1:
        raise UserError(f"--seconds {config.seconds} makes no section: give at least {base.section / base.fps:g}")
    if config.init and trained.get("lora"):
        weight_files(config.init)  # not there? Say so before the VAE's work
    does_nothing = dict.fromkeys(("prompt", "negative", "t5", "lora"), random) | {"merge": not trained.get("lora")}
    for key, useless in does_nothing.items():
        if useless and getattr(config, key):
            raise UserError(f"--{key} does nothing for {'random weights' if random else config.checkpoint}: drop it")
    if config.lora:  # do they fit? On the meta device this costs only reading them
        base.apply_loras(MemoryDiT(base, empty=True).dit, config.lora)
    return base, trained


def main():
    """Open, read, remember, continue, write."""
    config = parse_flags(SampleConfig, __doc__, aliases=WAN_FLAGS)
    base, trained = check(config)
    device, file = pick_device(config.device), output_file(config)
    size, frames = stream_clip(config.history, base) if config.history else (base.sizes[0], ())
    if config.history and has_sound(config.history):
        warn(f"the sound of {config.history} is not copied")
    with VideoWriter(file, base.fps, *size) as writer:
        history = copy_history(frames, writer, base, sections_remembered(config, base))
        storyboard, prompts = section_prompts(config, base, history.frames / base.fps)
        check_prompts(trained.get("data"), [prompt for _, prompt in storyboard] + [config.negative])
        base = open_base(base.name, config.vae, config.t5, device)
        *texts, negative = embed_prompts(config, base, [*prompts, config.negative])
        model, memory, decode = remember(config, base, history, device)
        generated = continue_video(model, base, memory, decode, texts, config, size, negative)
        length = base.section * base.codec.stride[0]
        sheet = SectionSheet(history.newest, history.frames, length, len(texts), base.fps)
        seconds, stopped = write_sections(writer, sheet, generated, len(texts))
        if stopped:  # a video from before stays
            file = writer.path = unused(file, "stopped")
    sheet.save(sheet_path(file))
    made, peak = len(sheet.kept), peak_memory(device)
    print(f"{seconds / made:.2f} s per section of {length / base.fps:g} s; peak memory {peak:.2f} GiB")
    print(f"wrote {file} and {sheet_path(file)}")
    if stopped:
        print(f"stopped after {made} of {len(texts)} sections, which are kept")
        raise stopped


if __name__ == "__main__":
    run_main(main)
