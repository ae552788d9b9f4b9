"""The outside world: pixels <-> latents (codecs), prompts -> embeddings, the paper-doll world, folders of videos, video
files, and the command line.

Pixels are (B, 3, F, H, W) floats in [-1, 1]; latents (B, C, f, h, w);
uint8 frames (F, H, W, 3) only at the file boundary.
"""
import argparse
import difflib
import functools
import hashlib
import inspect
import math
import re
import sys
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import world
from model import PRESETS, UserError, get_preset, pad_replicate
from video import VideoWriter, find_videos, prompt_at, read_video, storyboard_beside, video_info, whole_file

# ---------------------------------------------------------------------------------------------------------------------
# Codecs


class DCTCodec:
    """A weights-free codec: the 16 lowest coefficients (10 luma, 3 + 3 chroma) of a 4x4 block DCT in an orthonormal
    opponent colour space. Linear, so that downsampling in pixels is one linear map of latents.

    Each coefficient is divided by the square root of its deviation, and all by one number that makes the overall
    variance 1: full whitening would weight the finest detail too much.
    """
    channels, stride, causal = 16, (1, 4, 4), False
    # standard deviation of each coefficient over frames of the paper-doll world and of real clips
    deviations = (2.6, 0.6, 0.3, 0.18, 0.59, 0.28, 0.17, 0.3, 0.17, 0.18, 1.18, 0.27, 0.26, 0.73, 0.16, 0.16)

    def __init__(self):
        k = np.arange(4)
        norm = np.where(k[:, None] == 0, 0.5, math.sqrt(0.5))
        dct = np.cos(np.pi * (2 * k[None] + 1) * k[:, None] / 8) * norm         # (frequency, pixel)
        # luma, red-blue, green-magenta
        colour = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
        chosen = [(c, u, v) for c, most in ((0, 3), (1, 1), (2, 1)) for u in k for v in k if u + v <= most]
        basis = [np.einsum("c,y,x->cyx", colour[c], dct[u], dct[v]).ravel() for c, u, v in chosen]
        self.basis = torch.tensor(np.stack(basis), dtype=torch.float32)         # (16, 48), orthonormal rows
        deviations = torch.tensor(self.deviations)
        self.scale = deviations.sqrt() * deviations.mean().sqrt()               # latent k: variance deviation_k / mean

    def encode(self, pixels):
        """(B, 3, F, H, W) in [-1, 1], H and W multiples of 4 -> (B, 16, F, H/4, W/4)."""
        blocks = rearrange(pixels, "b c f (h y) (w x) -> b f h w (c y x)", y=4, x=4)
        latents = F.linear(blocks, (self.basis / self.scale[:, None]).to(pixels))
        return rearrange(latents, "b f h w c -> b c f h w")

    def decode(self, latents):
        """(B, 16, F, h, w) -> pixels (B, 3, F, 4h, 4w), not clamped."""
        matrix = (self.basis * self.scale[:, None]).T.to(latents)
        blocks = F.linear(rearrange(latents, "b c f h w -> b f h w c"), matrix)
        return rearrange(blocks, "b f h w (c y x) -> b c f (h y) (w x)", c=3, y=4, x=4)

    @functools.lru_cache
    def downsampling_kernel(self, rate):
        """Decode, area mean in pixels over (t, h, w), encode, as one convolution (16, 16, t, h, w): what it does to
        each latent of a block."""
        t, h, w = rate
        impulses = torch.eye(16 * t * h * w).view(-1, 16, t, h, w)
        response = self.encode(F.avg_pool3d(self.decode(impulses), rate))       # (16 * t * h * w, 16, 1, 1, 1)
        return response.view(16, t, h, w, 16).permute(4, 0, 1, 2, 3).contiguous()

    def downsample(self, latents, rate):
        """The latents of the video made smaller by rate (t, h, w): (B, 16, F, h', w') -> (B, 16, F/t, ...), sizes
        padded up to whole tokens by replication."""
        with torch.autocast(latents.device.type, enabled=False):                # exact in float32
            latents = pad_replicate(latents.float(), (rate[0], 2 * rate[1], 2 * rate[2]))
            return F.conv3d(latents, self.downsampling_kernel(rate).to(latents), stride=rate)


def make_codec(name):
    if name != "dct":
        raise UserError(f"codec {name}: only dct is built in so far")
    return DCTCodec()


def to_pixels(frames):
    """uint8 (..., F, H, W, 3) -> float (..., 3, F, H, W) in [-1, 1]."""
    return rearrange(torch.as_tensor(frames).float() / 127.5 - 1, "... f h w c -> ... c f h w")


def to_frames(pixels):
    """float (..., 3, F, H, W) in [-1, 1] -> uint8 (..., F, H, W, 3), clamped."""
    return rearrange(((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), "... c f h w -> ... f h w c")


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


@functools.lru_cache(maxsize=4096)
def hash_word(word, dim):
    """A fixed random vector of unit variance for a word, the same on every machine."""
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal(dim).astype(np.float32)


@functools.lru_cache
def warn(message):
    """Say it once."""
    print(f"warning: {message}", file=sys.stderr)


class HashPrompts:
    """Prompt embeddings without weights: each word a fixed random vector plus a fixed code of its position."""

    def __init__(self, dim, length):
        self.dim, self.length = dim, length

    def __call__(self, prompt):
        """A text -> (length, dim), zero rows after its last word; all zeros for an empty prompt."""
        rows = np.zeros((self.length, self.dim), np.float32)
        words = re.findall(r"\w+", prompt.lower())
        if len(words) > self.length:
            warn(f'a prompt of {len(words)} words is cut to {self.length}: "{prompt[:60]}..."')
        for i, word in enumerate(words[:self.length]):
            rows[i] = hash_word(word, self.dim) + 0.5 * hash_word(f"position {i}", self.dim)
        return torch.from_numpy(rows)


def make_prompts(preset):
    if preset.codec == "wan":
        raise UserError("prompts for Wan need umT5 embeddings, which are not supported yet; use --preset nano or small")
    return HashPrompts(preset.dit.text_dim, preset.dit.text_len)


# ---------------------------------------------------------------------------------------------------------------------
# Clips to train on


@dataclass
class Clip:
    """One encoded video. latents (C, F, h, w) float16; storyboard [(first latent frame, prompt)]; pixels uint8
    (F, H, W, 3) or None; story: the world.Story that it shows, which tells what each section asks for, or None."""
    latents: torch.Tensor
    storyboard: list
    pixels: object = None
    story: object = None

    @property
    def frames(self):
        return self.latents.shape[1]

    def prompt(self, frame):
        """The prompt of a latent frame: the nearest at or before it."""
        return prompt_at(self.storyboard, frame)

    def truth(self, frames):
        """Original pixels of these frames, (1, F, H, W, 3), or None."""
        return None if self.pixels is None else self.pixels[frames][None]

    def targets(self, sections, section):
        """First frames of the sections that may be asked for after a history of `sections` sections. In the paper-doll
        world: where all that the prompt asks to remember was seen in this history."""
        if self.story is None:
            return list(range(sections * section, self.frames - section + 1))
        return [k * section for k in range(sections, len(self.story.shots))
                if world.askable(self.story, k, k - sections)]


class Clips:
    """Clips in a fixed random order per epoch; every batch is of one size (height x width)."""

    def __init__(self, clips):
        self.clips = clips
        self.sizes = {}
        for i, clip in enumerate(clips):
            self.sizes.setdefault(tuple(clip.latents.shape[2:]), []).append(i)

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        return self.clips[i]

    @functools.lru_cache(maxsize=2)
    def epoch(self, number, size, seed):
        """The batches of an epoch, each a list of `size` clip numbers. What does not fill a batch waits for the next
        epoch; a bucket smaller than a batch repeats its clips."""
        rng = np.random.default_rng((seed, number))
        batches = []
        for members in self.sizes.values():
            order = rng.permutation(members).tolist()
            order *= -(-size // len(order)) if len(order) < size else 1
            batches += [order[i:i + size] for i in range(0, len(order) - size + 1, size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def batch(self, step, size, seed):
        """The clip numbers of a step's global batch: a function of the step alone, so nothing to save for a resume."""
        per_epoch = len(self.epoch(0, size, seed))
        return self.epoch(step // per_epoch, size, seed)[step % per_epoch]


STORY_SECTIONS = 13     # 10 of history and 3 to continue


def story_pixels(split, index, preset):
    """A story of the paper-doll world and its frames (F, H, W, 3) uint8."""
    story = world.make_story(world.world_seed(split, index), STORY_SECTIONS)
    return story, world.render(story, None, preset.section, *preset.sizes[0])[0]


def encode_story(split, index, preset, codec):
    pixels = story_pixels(split, index, preset)[1]
    return codec.encode(to_pixels(pixels)[None])[0].half()


def world_clips(split, count, preset, codec, cache, keep_pixels=False):
    """`count` stories, encoded. Latents are cached in a file named after all that they depend on."""
    settings = (preset.sizes[0], preset.section, preset.codec, codec.scale.tolist(), STORY_SECTIONS)
    source = Path(world.__file__).read_bytes() + repr(settings).encode()
    path = Path(cache) / f"world-{split}-{count}-{hashlib.sha256(source).hexdigest()[:12]}.safetensors"
    if not path.exists():
        latents = [encode_story(split, i, preset, codec) for i in tqdm(range(count), desc=f"drawing {split} stories")]
        with whole_file(path) as part:
            save_file({"latents": torch.stack(latents)}, part)
    latents = load_file(path)["latents"]                                        # (count, C, F, h, w)
    clips = []
    for i in range(count):
        story = world.make_story(world.world_seed(split, i), STORY_SECTIONS)
        storyboard = [(k * preset.section, world.caption(story, k)) for k in range(STORY_SECTIONS)]
        pixels = torch.from_numpy(story_pixels(split, i, preset)[1]) if keep_pixels else None
        clips.append(Clip(latents[i], storyboard, pixels, story))
    return Clips(clips)


def nearest_size(preset, info):
    """The bucket (height, width) whose shape is nearest to a video's."""
    shape = math.log(info["height"] / info["width"])
    return min(preset.sizes, key=lambda size: abs(math.log(size[0] / size[1]) - shape))


def encode_video(path, preset, codec, cache):
    """Latents (C, F, h, w) float16 of a whole video, cached under its content and all settings that matter."""
    key = hashlib.sha256(repr((preset.fps, preset.sizes, preset.codec, codec.scale.tolist())).encode())
    key.update(Path(path).read_bytes())
    file = Path(cache) / "videos" / f"{key.hexdigest()[:24]}.safetensors"
    if not file.exists():
        frames = read_video(path, preset.fps, *nearest_size(preset, video_info(path)))
        with whole_file(file) as part:
            save_file({"latents": codec.encode(to_pixels(frames)[None])[0].half().contiguous()}, part)
    return load_file(file)["latents"]


def video_clips(folder, preset, codec, cache):
    """(clips to train on, held-out clips) of a folder of videos. One in ten, chosen by file name, is held out. Files
    that cannot be used are counted and listed, never replaced by another; above 20 % of them it stops."""
    paths = find_videos(folder)
    clips, skipped = {}, []
    for path in tqdm(paths, desc="encoding videos"):
        try:
            latents = encode_video(path, preset, codec, cache)
            if latents.shape[1] < 2 * preset.section:
                raise UserError(f"{path} is shorter than one segment and one section, "
                                f"{2 * preset.section * codec.stride[0] / preset.fps:g} s")
            prompts = storyboard_beside(path)
        except UserError as e:
            skipped.append(str(e))
            continue
        if prompts is None:
            warn(f"no caption beside {path} (.txt or .json): trained without a prompt")
        board = [(round(seconds * preset.fps / codec.stride[0]), prompt) for seconds, prompt in prompts or []]
        clips[path] = Clip(latents, board)
    for message in skipped:
        print(f"skipped: {message}", file=sys.stderr)
    if len(skipped) > 0.2 * len(paths):
        raise UserError(f"{len(skipped)} of {len(paths)} videos in {folder} cannot be used, above 20 %: "
                        "the reasons are above")
    order = sorted(clips, key=lambda path: hashlib.sha256(path.name.encode()).digest())
    held_out, train = order[:max(1, len(order) // 10)], order[max(1, len(order) // 10):] or order
    print(f"{len(train)} videos to train on, {len(held_out)} held out ({', '.join(p.name for p in held_out)}), "
          f"{len(skipped)} skipped")
    if len(clips) < 2:
        warn("one video alone is trained on and held out too: its figures say nothing of other videos")
    for path in held_out:
        clips[path].pixels = read_video(path, preset.fps, *nearest_size(preset, video_info(path)))
    return Clips([clips[p] for p in train]), Clips([clips[p] for p in held_out])


def open_dataset(config, codec):
    """(clips to train on, held-out clips) of --data."""
    preset = PRESETS[config.preset]
    if config.data != "world":
        return video_clips(config.data, preset, codec, config.cache)
    return (world_clips("train", config.clips, preset, codec, config.cache),
            world_clips("held-out", config.held_out, preset, codec, config.cache, keep_pixels=True))


def psnr(a, b):
    """Peak signal-to-noise ratio of uint8 frames (..., H, W, 3), data range 255: dB a frame, (...); 100 if equal."""
    mse = (a.float() - b.float()).square().flatten(-3).mean(-1)
    return (10 * torch.log10(255**2 / mse)).clamp(max=100)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def field_help(cls):
    """{field: its trailing comment}, so that a flag is described where it is defined."""
    text = "".join(inspect.getsource(c) for c in reversed(cls.__mro__) if is_dataclass(c))
    return dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.*)$", text, re.M))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def parse_flags(cls, description, argv=None, aliases={}):
    """An instance of the dataclass `cls` from the command line: a flag per field, with the field's default and comment.
    Unknown flags are refused, with the nearest name that exists."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    comments = field_help(cls)
    for f in fields(cls):
        names = [f"--{f.name}", *aliases.get(f.name, ())]
        extra = dict(action="store_true") if f.type is bool else dict(type=f.type, metavar=f.type.__name__)
        parser.add_argument(*names, dest=f.name, default=f.default,
                            help=f"{comments.get(f.name, '')} [{f.default}]", **extra)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        near = difflib.get_close_matches(flag, parser._option_string_actions, 3, 0.5)
        raise UserError(f"unknown flag {flag}" + (f"; did you mean {' or '.join(near)}?" if near else "; see --help"))
    return cls(**vars(known))


def run_main(main):
    """Run a script's main: 0 done, 2 the user's mistake, 1 ours or the machine's, 130 and 143 stopped by a signal."""
    try:
        main()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# ---------------------------------------------------------------------------------------------------------------------
# python data.py story: clips to try


@dataclass
class StoryConfig:
    index: int = 0                # which held-out story
    preset: str = "nano"          # its size and frame rate
    out: str = "out/story.mp4"    # the video; its storyboard goes beside it, 3 sections longer than the video
    truth: bool = False           # write those 3 sections too: the one right continuation


def write_story(argv):
    """Write a held-out story of the paper-doll world as a video, with its storyboard beside it."""
    config = parse_flags(StoryConfig, write_story.__doc__, argv)
    preset = get_preset(config.preset)
    if config.index < 0:
        raise UserError(f"--index {config.index}: stories are numbered from 0")
    story, frames = story_pixels("held-out", config.index, preset)
    shown = len(frames) if config.truth else preset.history
    with VideoWriter(config.out, preset.fps, *preset.sizes[0]) as writer:
        writer.write(frames[:shown])
    lines = [f"{k * preset.section / preset.fps:g}s: {world.caption(story, k)}\n" for k in range(STORY_SECTIONS)]
    storyboard = Path(config.out).with_suffix(".txt")
    storyboard.write_text("".join(lines))
    print(f"wrote {config.out} and {storyboard}")


def main():
    if sys.argv[1:2] != ["story"]:
        raise UserError("python data.py needs a command: story (writes a held-out story to try; --help for its flags)")
    write_story(sys.argv[2:])


if __name__ == "__main__":
    run_main(main)
