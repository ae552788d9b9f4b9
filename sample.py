r"""Continue a clip: read it into memory, then generate section after section, appending each to the history and to φ.

    python sample.py --history clip.mp4
    python sample.py --history clip.mp4 \
        --prompt "0s: beach wide tall person left to right with nothing nowhere to nowhere / 2s: ..."

Without --prompt, the storyboard beside the clip is used (clip.txt or clip.json; its times count from the clip's start).
Writes the history and what continues it to --save_file, and a strip of pictures beside it.
"""
import math
import re
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import world
from codec import make_codec, make_prompts, to_frames, to_pixels
from data import read_clip, warn_past_end
from devices import autocast, pick_device
from encoder import Memory, MemoryDiT, load_model
from flags import parse_flags, run_main, warn
from model import PRESETS, UserError, add_lora, euler, get_preset, merge_lora
from storyboard import parse_storyboard, prompt_at, storyboard_beside
from video import VideoWriter, contact_strip
from weights import frozen_dtype, read_metadata, weight_files


@dataclass
class SampleConfig:
    history: str = ""             # the clip to continue
    checkpoint: str = "checkpoints/nano.safetensors"   # weights from finetune.py
    prompt: str = None            # a text, "0s: ... / 4s: ...", or a .txt or .json file; 0 s is where the clip ends
    seconds: float = 6.0          # length of what is generated, rounded up to whole sections
    steps: int = None             # Euler steps a section [the preset's]
    guidance: float = None        # classifier-free guidance: 1 is none [the preset's]
    shift: float = None           # timestep shift: above 1, more steps at high noise [the preset's]
    seed: int = 0                 # of the noise
    save_file: str = ""           # the video to write [out/NAME.mp4, or out/NAME_continued.mp4 if that is the history]
    memory_seconds: float = 20.0  # how much history is kept in memory; 0: all
    device: str = "auto"          # auto, cpu, cuda, mps
    init: str = ""                # Wan: the base DiT under the checkpoint's LoRA; "random": random weights of --preset
    merge: bool = False           # add the LoRA to the base's weights first: fewer products, rounded with the base
    vae: str = ""                 # Wan: local folder of its VAE in the diffusers layout ("random": to measure)
    t5: str = ""                  # Wan: local folder of umT5 in the diffusers layout
    preset: str = "nano"          # of --init random, which needs no checkpoint: to measure speed and memory


def storyboard_of(config, clip_seconds, seconds):
    """[(seconds, prompt)], 0 s being the end of the clip; `seconds` are written after it."""
    if config.prompt is not None:
        storyboard = parse_storyboard(config.prompt)
        if storyboard and storyboard[-1][0] >= seconds:
            warn_past_end("--prompt", storyboard[-1][0], seconds)
        return storyboard
    beside = storyboard_beside(config.history) or []
    if len(beside) > 1 and beside[-1][0] < clip_seconds:
        warn(f"the storyboard beside {config.history} ends before the clip does: its last prompt is used for all that "
             "is written, or give --prompt")
    return [(start - clip_seconds, prompt) for start, prompt in beside]


def check_words(storyboard):
    """Warn of words that no caption of the paper-doll world has: a model trained there alone has never seen them."""
    known = {*world.KINDS, *world.FRAMINGS, *world.BUILDS, *world.SHAPES, *world.SLOTS,
             *"person to with nobody there nothing nowhere".split()}
    words = dict.fromkeys(word for _, prompt in storyboard for word in re.findall(r"\w+", prompt.lower()))
    if unknown := [word for word in words if word not in known]:
        warn(f"this model has never seen {', '.join(unknown[:8])}; it knows captions like "
             '"beach wide tall person left to right with ball nowhere to nowhere"')


def embed(prompts, storyboard, sections, preset, codec):
    """The prompt of each section, (L, text_dim). All at once: a large text encoder can go before the DiT comes."""
    times = [k * preset.section * codec.stride[0] / preset.fps for k in range(sections)]
    texts = {prompt: prompts(prompt) for prompt in {prompt_at(storyboard, t + 1e-6) for t in times}}
    return [texts[prompt_at(storyboard, t + 1e-6)] for t in times]


@torch.no_grad()
def continue_video(model, codec, texts, memory, config, size):
    """Generate a section for each of `texts` and append each to `memory`. Yields (latents (1, C, F, h, w), seconds it
    took)."""
    preset, device = PRESETS[model.preset], next(model.parameters()).device
    g = torch.Generator().manual_seed(config.seed)
    shape = (1, codec.channels, preset.section, size[0] // codec.stride[1], size[1] // codec.stride[2])
    for text in texts:
        started = time.perf_counter()
        frames = memory.frames + torch.arange(preset.section, device=device)
        noise = torch.randn(shape, generator=g).to(device)
        guidance = config.guidance if text.any() else 1             # without a prompt both passes are the same
        with autocast(device):
            x = euler(model.dit, noise, text[None].to(device), frames, memory.context(), config.steps, config.shift,
                      guidance).float()
            if not x.isfinite().all():
                raise UserError(f"{config.checkpoint} makes numbers that are not finite: train it again, or name "
                                "another")
            memory.append(x)
        yield x, time.perf_counter() - started


def open_model(config, preset, device):
    """The trained model, or one of random weights."""
    if config.init == "random":
        model = MemoryDiT(config.preset)
        if preset.lora:
            for name, p in model.dit.named_parameters():
                p.data = p.data.to(frozen_dtype(device)(name, p))
            add_lora(model.dit, preset.lora)                        # as trained ones have it
        return model.to(device).eval()
    model, _ = load_model(config.checkpoint, config.init, device)
    if config.merge:
        merge_lora(model.dit)
    return model


def read_history(config, preset, codec, most):
    """(all frames of the clip, its newest that are remembered), uint8 (F, H, W, 3) each. most: sections, or None."""
    history, section = read_clip(config.history, preset), preset.section * codec.stride[0]
    n = len(history)
    if most is not None:            # beside whole sections a causal codec has one frame that stands alone
        n = min(n, most * section + codec.causal)
    if codec.causal and n > section:
        # whole segments alone: up to seven latents of 480p would wait uncompressed, now and after every section, and
        # be more tokens than all the rest; the oldest frames that do not fill a segment are left out
        n = 1 + (n - 1) // section * section
    return history, history[-codec.frames(n):]


@contextmanager
def set_aside(model, codec, device):
    """Let the model wait in host memory while Wan's VAE works: side by side they would not fit 12 GB."""
    if device.type == "cuda" and codec.causal:
        model.to("cpu")
        torch.cuda.empty_cache()
    yield
    model.to(device)


def peak_memory(device):
    """Peak memory of this process so far, GiB: of the GPU if there is one, else of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:         # Windows has none
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def check(config):
    """Refuse what cannot work; what was left open is the preset's. Returns (preset, config of the checkpoint), the
    latter {} for random weights."""
    if not config.history:
        raise UserError("--history is missing: give the clip to continue, for example --history assets/clip.mp4")
    if not 0 < config.seconds <= 86400:         # the prompt of each section is looked up first
        raise UserError(f"--seconds {config.seconds}: give a number above 0, at most 86400 (a day)")
    random = config.init == "random"
    if not random and config.preset != SampleConfig.preset:
        raise UserError(f"--preset {config.preset} is for --init random alone: a checkpoint has its own, leave it out")
    if random and config.checkpoint != SampleConfig.checkpoint:
        raise UserError(f"--checkpoint {config.checkpoint} --init random: random weights or trained ones, drop one of "
                        "the two")
    trained = {} if random else read_metadata(config.checkpoint)
    if not random and trained.get("stage") != "finetune":
        raise UserError(f"{config.checkpoint} is of stage {trained.get('stage')}: "
                        "continuing a clip needs one of finetune.py")
    preset = get_preset(config.preset if random else trained["preset"])
    for key in ("steps", "guidance", "shift"):
        if getattr(config, key) is None:
            setattr(config, key, getattr(preset, key))
    if config.steps < 1 or not 0 <= config.guidance < math.inf or not 0 < config.shift < math.inf:
        raise UserError(f"--steps {config.steps} --guidance {config.guidance} --shift {config.shift}: "
                        "expected steps of at least 1, guidance of at least 0, shift above 0")
    if not 0 <= config.memory_seconds < math.inf:
        raise UserError(f"--memory_seconds {config.memory_seconds}: give seconds of history to keep, or 0 for all")
    if config.init and trained.get("lora"):
        weight_files(config.init)                                   # not there? Say so before the VAE's work
    idle = {"prompt": random, "t5": random, "merge": not trained.get("lora")}
    for key, nothing in idle.items():
        if nothing and getattr(config, key):
            raise UserError(f"--{key} does nothing for {'random weights' if random else config.checkpoint}: drop it")
    return preset, trained


def main():
    """Read the history into memory, continue it section by section, write the video and a strip."""
    config = parse_flags(SampleConfig, __doc__, aliases={           # Wan's own names
        "steps": ["--sample_steps"], "shift": ["--sample_shift"], "guidance": ["--sample_guide_scale"],
        "seed": ["--base_seed"]})
    (preset, trained), device = check(config), pick_device(config.device)
    codec = make_codec(preset, config.vae, device)
    section_seconds = preset.section * codec.stride[0] / preset.fps
    most = math.ceil(config.memory_seconds / section_seconds) if config.memory_seconds else None
    history, kept = read_history(config, preset, codec, most)
    sections = math.ceil(config.seconds / section_seconds - 1e-6)
    save_file = Path(config.save_file or f"out/{Path(config.history).stem}.mp4")
    if not config.save_file and save_file.resolve() == Path(config.history).resolve():
        save_file = save_file.with_stem(save_file.stem + "_continued")
    if save_file.resolve() == Path(config.history).resolve():
        raise UserError(f"--save_file {save_file} is the history itself: give another name")
    size, length = history.shape[1:3], preset.section * codec.stride[0]         # frames a section
    writer, clip_seconds = VideoWriter(save_file, preset.fps, *size), len(history) / preset.fps
    storyboard = [] if config.init == "random" else storyboard_of(config, clip_seconds, sections * section_seconds)
    if trained.get("data") == "world":
        check_words(storyboard)
    prompts = make_prompts(preset, config.t5, device if device.type == "cuda" else "cpu")
    texts = embed(prompts, storyboard, sections, preset, codec)
    if config.init == "random":     # to measure speed and memory: any prompt, with no text encoder
        texts = [torch.randn_like(text) for text in texts]
    del prompts                     # umT5 is larger than a DiT of 1.3B

    latents = codec.encode(to_pixels(kept)[None]).to(device)
    decode = codec.decoder()
    if codec.causal:                # what the decoder carries on must come from the history
        for piece in latents.split(preset.section, dim=2):
            decode(piece)
    model = open_model(config, preset, device)
    memory = Memory(model, codec, most)
    with autocast(device):
        memory.append(latents)
        context = memory.context()
    if context is None:
        warn(f"{config.checkpoint} is a model without memory: what it writes does not know the history")
    tokens = 0 if context is None else context[0].shape[1]
    print(f"history: {len(history) / preset.fps:g} s, {len(history)} frames; memory: {tokens} tokens for "
          f"{len(kept) / preset.fps:g} s (uncompressed: {memory.uncompressed})")

    made, times = [], []
    every = max(1, length // 4, math.ceil(sections * length / 48))              # for the strip: at most 48 frames stay
    with writer:
        writer.write(history)
        for latents, seconds in tqdm(continue_video(model, codec, texts, memory, config, size), total=sections,
                                     desc="sections"):
            with set_aside(model, codec, device):
                frames = to_frames(decode(latents))[0].cpu()                    # (F, H, W, 3)
            writer.write(frames)
            # every so many frames, counted on across sections: this one begins at frame len(times) * length
            made.append(frames[-len(times) * length % every::every].clone())
            times.append(seconds)
    strip = save_file.with_suffix(".png")
    draw_strip(strip, history, length, torch.cat(made), every / preset.fps)
    print(f"{sum(times) / len(times):.2f} s a section of {section_seconds:g} s; "
          f"peak memory {peak_memory(device):.2f} GiB")
    print(f"wrote {save_file} and {strip}")


def draw_strip(path, history, length, made, seconds):
    """A labelled picture: the newest 12 sections (of `length` frames) of the history above, a frame each; below the new
    frames `made`, which are `seconds` apart."""
    rows = [("history,\na frame a section", history[len(history) % length // 2::length][-12:])]
    for first in range(0, len(made), 12):
        rows.append((f"new, from {first * seconds:g} s\nafter its end", made[first:first + 12]))
    contact_strip(rows, path)


if __name__ == "__main__":
    run_main(main)
