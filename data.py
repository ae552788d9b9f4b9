"""The outside world: pixels <-> latents (codecs), prompts -> embeddings, and the clips to train on (stories of the
paper-doll world, folders of videos, caches of latents).

Pixels are (B, 3, F, H, W) floats in [-1, 1]; latents (B, C, f, h, w);
uint8 frames (F, H, W, 3) only at the file boundary.
"""
import functools
import hashlib
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

import world
from flags import parse_flags, run_command, run_main
from model import PRESETS, UserError, get_preset, pad_replicate, pick_device
from storyboard import parse_entries, prompt_at, storyboard_beside
from video import READING, VideoWriter, file_hash, find_videos, read_video, remove_leftovers, video_info, whole_file
from wan import UMT5Prompts, WanCodec, ZeroPrompts
from weights import open_safetensors, parse_json

# ---------------------------------------------------------------------------------------------------------------------
# Codecs


class DCTCodec:
    """A weights-free codec: the 16 lowest coefficients (10 luma, 3 + 3 chroma) of a 4x4 block DCT in an orthonormal
    opponent colour space. Linear, so that downsampling in pixels is one linear map of latents.

    Each coefficient is divided by the square root of its deviation, and all by one number that makes the overall
    variance 1: full whitening would weight the finest detail too much.
    """
    channels, stride, causal, decodes = 16, (1, 4, 4), False, True
    averages = (0, 10, 13)          # latent channels that are means over the pixels of a block
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

    @property
    def settings(self):
        """What a cache of latents depends on."""
        rounded = [round(x, 5) for x in (self.basis * self.scale[:, None]).flatten().tolist()]
        return ["dct", hashlib.sha256(repr(rounded).encode()).hexdigest()]

    def frames(self, n):
        """The most frames, of n, that are whole latents: any number."""
        return n

    def decoder(self):
        """A function that decodes a video piece by piece."""
        return self.decode

    def show(self, history, target, frames):
        """Pixels (B, 3, F', H, W) of latents (B, 16, F', h, w) that belong at `frames` of a history."""
        return self.decode(target)

    @functools.lru_cache
    def downsampling_kernel(self, rate):
        """Decode, area mean in pixels over (t, h, w), encode, as one matrix (16, 16 * t * h * w): what it does to each
        latent of a block."""
        t, h, w = rate
        impulses = torch.eye(16 * t * h * w).view(-1, 16, t, h, w)
        response = self.encode(F.avg_pool3d(self.decode(impulses), rate))       # (16 * t * h * w, 16, 1, 1, 1)
        return response.view(-1, 16).T.contiguous()

    def downsample(self, latents, rate):
        """The latents of the video made smaller by rate (t, h, w): (B, 16, F, h', w') -> (B, 16, F/t, ...), sizes
        padded up to whole tokens by replication."""
        with torch.autocast(latents.device.type, enabled=False):                # exact in float32
            latents = pad_replicate(latents.float(), (rate[0], 2 * rate[1], 2 * rate[2]))
            blocks = rearrange(latents, "b c (f t) (y h) (x w) -> b f y x (c t h w)", **dict(zip("thw", rate)))
            return rearrange(F.linear(blocks, self.downsampling_kernel(rate).to(latents)), "b f y x c -> b c f y x")


def make_codec(preset, vae="", device="cpu"):
    """The codec of a preset. vae: the local folder of Wan's, which only Wan's presets have."""
    if preset.codec == "dct":
        if vae:
            raise UserError(f"--vae {vae} does nothing: the codec of nano and small has no weights; drop it")
        return DCTCodec()
    return WanCodec(vae, device)


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
    """Say it once, above any progress bar."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


class HashPrompts:
    """Prompt embeddings without weights: each word a fixed random vector plus a fixed code of its position."""

    def __init__(self, dim, length):
        self.dim, self.length = dim, length

    @property
    def settings(self):
        """What a cache of prompts depends on."""
        return ["hash", self.dim, self.length]

    def __call__(self, prompt):
        """A text -> (length, dim), zero rows after its last word; all zeros for an empty prompt."""
        rows = np.zeros((self.length, self.dim), np.float32)
        words = re.findall(r"\w+", prompt.lower())
        if len(words) > self.length:
            warn(f'a prompt of {len(words)} words is cut to {self.length}: "{prompt[:60]}..."')
        for i, word in enumerate(words[:self.length]):
            rows[i] = hash_word(word, self.dim) + 0.5 * hash_word(f"position {i}", self.dim)
        return torch.from_numpy(rows)


def make_prompts(preset, t5="", device="cpu"):
    """The prompt embedder of a preset. t5: the local folder of umT5, for Wan's presets, which runs on `device`; without
    it, only the empty prompt and those in a cache are known."""
    if preset.codec == "dct":
        if t5:
            raise UserError(f"--t5 {t5} does nothing: the prompts of nano and small need no weights; drop it")
        return HashPrompts(preset.dit.text_dim, preset.dit.text_len)
    if t5:
        return UMT5Prompts(t5, preset.dit.text_dim, preset.dit.text_len, device)
    return ZeroPrompts(preset.dit.text_dim, preset.dit.text_len)


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

    @property
    def size(self):
        return tuple(self.latents.shape[2:])

    def cut(self, first, last):
        """Latents of the frames first..last-1, (1, C, F, h, w) float32."""
        return self.latents[None, :, first:last].float()

    def prompt(self, frame):
        """The prompt of a latent frame: the nearest at or before it."""
        return prompt_at(self.storyboard, frame)

    def text(self, frame, prompts):
        """The embedding of that prompt, (1, L, text_dim)."""
        return prompts(self.prompt(frame))[None]

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
    """Clips in a fixed random order per epoch. Every batch is of one size (height x width); and, since the shortest
    clip of a batch decides how long its histories are, of clips of `full` latent frames or of shorter ones."""

    def __init__(self, clips, full=0):
        self.clips = clips
        self.buckets = {}
        for i, clip in enumerate(clips):
            self.buckets.setdefault((clip.size, clip.frames >= full), []).append(i)

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        return self.clips[i]

    @functools.lru_cache(maxsize=2)
    def epoch(self, number, size, seed):
        """The batches of an epoch, each a list of `size` clip numbers. What does not fill a batch waits for the next
        epoch; a bucket smaller than a batch repeats its clips, or is left out if it is smaller than a quarter (if not
        all are): else a few clips of a rare size would be seen much more often than all others."""
        rng = np.random.default_rng((seed, number))
        batches = []
        large = [members for members in self.buckets.values() if 4 * len(members) >= size]
        if large and len(large) < len(self.buckets):
            warn(f"{len(self.clips) - sum(map(len, large))} clips of a rare size or length, fewer than a quarter of a "
                 "batch of their kind, are left out")
        for members in large or self.buckets.values():
            order = rng.permutation(members).tolist()
            order *= -(-size // len(order)) if len(order) < size else 1
            batches += [order[i:i + size] for i in range(0, len(order) - size + 1, size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def batch(self, step, size, seed):
        """The clip numbers of a step's global batch: a function of the step alone, so nothing to save for a resume."""
        per_epoch = len(self.epoch(0, size, seed))
        return self.epoch(step // per_epoch, size, seed)[step % per_epoch]


HISTORY_SECTIONS, STORY_SECTIONS = 10, 13       # of a story: the first ten, and with three more to continue them


def story_pixels(split, index, preset):
    """A story of the paper-doll world and its frames (F, H, W, 3) uint8."""
    story = world.make_story(world.world_seed(split, index), STORY_SECTIONS)
    return story, world.render(story, None, preset.section, *preset.sizes[0])[0]


def encode_story(split, index, preset, codec):
    pixels = story_pixels(split, index, preset)[1]
    return codec.encode(to_pixels(pixels)[None])[0].half()


def load_tensor(path, name="latents"):
    """A tensor in a cache file."""
    try:
        with open_safetensors(path) as f:
            return f.get_tensor(name)
    except (UserError, SafetensorError):
        raise UserError(f"{path} is damaged: delete it, then it is made again") from None


def world_clips(split, count, preset, codec, cache, keep_pixels=False):
    """`count` stories, encoded. Latents are cached in a file named after all that they depend on."""
    settings = (preset.sizes[0], preset.section, codec.settings, STORY_SECTIONS)
    source = Path(world.__file__).read_bytes() + repr(settings).encode()
    path = Path(cache) / f"world-{split}-{count}-{hashlib.sha256(source).hexdigest()[:12]}.safetensors"
    if not path.exists():
        latents = [encode_story(split, i, preset, codec) for i in tqdm(range(count), desc=f"drawing {split} stories")]
        with whole_file(path) as part:
            save_file({"latents": torch.stack(latents)}, part)
    latents = load_tensor(path)                                                # (count, C, F, h, w)
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


def read_clip(path, preset):
    """A whole video at the preset's frame rate and nearest size, uint8 (F, H, W, 3)."""
    return read_video(path, preset.fps, *nearest_size(preset, video_info(path)))


def encode_video(path, preset, codec, cache):
    """Latents (C, F, h, w) float16 of a whole video, cached under its content and all settings that matter."""
    key = repr((preset.fps, preset.sizes, codec.settings, READING, file_hash(path)))
    key = hashlib.sha256(key.encode()).hexdigest()
    file = Path(cache) / "videos" / f"{key[:24]}.safetensors"
    if not file.exists():
        frames = read_clip(path, preset)
        latents = codec.encode(to_pixels(frames[:codec.frames(len(frames))])[None])[0]
        with whole_file(file) as part:
            save_file({"latents": latents.half().contiguous()}, part)
    return load_tensor(file)


LONE_VIDEO = "one video alone is trained on and held out too: its figures say nothing of other videos"


def too_many(skipped, total):
    return len(skipped) > 0.2 * total


def report_skipped(skipped, total, folder):
    """List the files that could not be used. Raises UserError above 20 % of them."""
    for message in skipped:
        print(f"skipped: {message}", file=sys.stderr)
    if too_many(skipped, total):
        raise UserError(f"{len(skipped)} of {total} videos in {folder} cannot be used, above 20 %: "
                        "the reasons are above")


def warn_past_end(path, seconds, end):
    warn(f"{path}: its storyboard goes on to {seconds:g} s, but the video ends at {end:g} s")


def split(videos):
    """(names of videos to train on, of held-out ones): about one in ten is held out, each by its own name, so that of
    many videos one that is added changes nothing for the others; at least one, and never all; of a single one, both."""
    digest = lambda name: int(hashlib.sha256(name.encode()).hexdigest(), 16)
    order = sorted(videos, key=digest)
    held = [name for name in order if digest(name) % 10 == 0][:max(1, len(order) - 1)] or order[:1]
    return [name for name in order if name not in set(held)] or order, held


def video_clips(folder, preset, codec, cache):
    """(clips to train on, held-out clips) of a folder of videos, see split(). Files that cannot be used are counted and
    listed, never replaced by another; above 20 % of them it stops."""
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
        if board and board[-1][0] >= latents.shape[1]:
            warn_past_end(path, prompts[-1][0], latents.shape[1] * codec.stride[0] / preset.fps)
        clips[path.relative_to(folder).as_posix()] = Clip(latents, board)
    report_skipped(skipped, len(paths), folder)
    train, held_out = split(clips)
    print(f"{len(train)} videos to train on, {len(held_out)} held out ({', '.join(held_out)}), {len(skipped)} skipped")
    if len(clips) < 2:
        warn(LONE_VIDEO)
    for name in held_out:
        path = Path(folder) / name
        pixels = read_clip(path, preset)
        clips[name].pixels = pixels[:codec.frames(len(pixels)):codec.stride[0]]     # as codec.show() shows latents
    full = preset.history + preset.section
    return Clips([clips[name] for name in train], full), Clips([clips[name] for name in held_out], full)


def psnr(a, b):
    """Peak signal-to-noise ratio of uint8 frames (..., H, W, 3), data range 255: dB a frame, (...); 100 if equal."""
    mse = (a.float() - b.float()).square().flatten(-3).mean(-1)
    return (10 * torch.log10(255**2 / mse)).clamp(max=100)


# ---------------------------------------------------------------------------------------------------------------------
# Clips from a cache on disk: python data.py cache


class CachedClip(Clip):
    """A window of a video in a shard; its latents and prompts are read when they are asked for."""

    def __init__(self, shard, number, frames, size):
        self.shard, self.number, self.length, self.shape = shard, number, frames, size
        self.pixels = self.story = None

    @property
    def frames(self):
        return self.length

    @property
    def size(self):
        return self.shape

    def cut(self, first, last):
        """Latents of the frames first..last-1, (1, C, F, h, w) float32."""
        with open_safetensors(self.shard) as f:
            return f.get_slice(f"{self.number}.latents")[:, first:last][None].float()

    def text(self, frame, prompts):
        """The embedding of a latent frame's prompt, (1, L, text_dim)."""
        with open_safetensors(self.shard) as f:
            starts = json.loads(f.metadata()["starts"])[self.number]
            if not starts:
                return prompts("")[None]
            k = max((k for k, start in enumerate(starts) if start <= frame), default=0)
            rows = f.get_tensor(f"{self.number}.text.{k}").float()                      # (words or tokens, text_dim)
        return F.pad(rows, (0, 0, 0, prompts.length - len(rows)))[None]


def read_index(path, *keys):
    """The JSON with these keys that `data.py cache` wrote."""
    if not path.is_file():
        raise UserError(f"{path} is missing: run data.py cache again, it makes only what is not there")
    return parse_json(path.read_bytes(), path, "delete it, then run data.py cache again", *keys)


def cached_clips(folder, preset, codec, held_out):
    """(clips to train on, at most `held_out` held-out clips) of a folder that `data.py cache` wrote."""
    folder = Path(folder)
    manifest = read_index(folder / "manifest.json", "settings", "bytes")
    ours, theirs = window_settings(preset, codec), manifest["settings"]
    if preset.codec == "dct":                                       # a training on Wan's has no text encoder to compare
        ours["prompts"] = make_prompts(preset).settings
    for key, value in ours.items():
        if value != theirs.get(key) and not (key == "codec" and value == ["wan", None] and theirs[key][0] == "wan"):
            raise UserError(f"--data {folder} was cached with {key} {theirs.get(key)}, not {value}: "
                            "give the preset that it was made for, or run data.py cache again")
    videos = {}
    for k, size in enumerate(manifest["bytes"]):
        shard = folder / f"shard-{k:05}.safetensors"
        if not shard.is_file() or shard.stat().st_size != size:
            raise UserError(f"{shard} is missing or cut short: run data.py cache again, "
                            "it makes only what is not there")
        for i, (video, frames, *shape) in enumerate(read_index(shard.with_suffix(".json"), "clips")["clips"]):
            videos.setdefault(video, []).append(CachedClip(shard, i, frames, tuple(shape)))
    if not videos:
        raise UserError(f"--data {folder} holds no clip: give data.py cache longer videos")
    names, held_names = split(videos)
    if len(videos) < 2:
        warn(LONE_VIDEO)
    train = [clip for name in names for clip in videos[name]]
    # the first window of every held-out video, then the second: few clips are then of different videos
    rounds = zip_longest(*(videos[name] for name in held_names))
    held = [clip for windows in rounds for clip in windows if clip is not None][:held_out]
    print(f"{len(train)} clips of {len(names)} videos to train on, {len(held)} of {len(held_names)} held out")
    full = preset.history + preset.section
    return Clips(train, full), Clips(held, full)


def window_settings(preset, codec):
    """What the windows of a cache depend on, but for the videos themselves."""
    return json.loads(json.dumps(dict(codec=codec.settings, fps=preset.fps, sizes=preset.sizes,
                                      section=preset.section, history=preset.history, reading=READING)))


@dataclass
class CacheConfig:
    videos: str = ""              # folder of videos, captions beside them
    out: str = ""                 # folder for the shards
    preset: str = "wan-1.3b"      # sizes, frame rate and codec; wan-1.3b and wan-14b share theirs
    captions: str = ""            # a JSONL file instead: {"video": path in the folder, "caption" or "storyboard": ...}
    vae: str = ""                 # Wan: local folder of its VAE in the diffusers layout
    t5: str = ""                  # Wan: local folder of umT5 in the diffusers layout
    shard: int = 32               # videos a shard
    device: str = "auto"          # auto, cpu, cuda, mps; where the VAE and umT5 run


def read_captions(path):
    """{video: storyboard} of a JSONL file."""
    captions = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"--captions {path} cannot be read: give a JSONL file in UTF-8") from None
    for n, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            board = entry["storyboard"] if "storyboard" in entry else [[0, entry["caption"]]]
            captions[entry["video"] + ""] = parse_entries(board, f"{path}, line {n}")   # a name, not null or a number
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(f'{path}, line {n}: expected {{"video": "a.mp4", "caption": "a text"}}') from None
    return captions


def find_captions(config, paths):
    """What --captions says, {video: storyboard}, or None. Warns of captions that belong to no video of `paths`; refuses
    them if that is so for all."""
    if not config.captions:
        return None
    captions = read_captions(config.captions)
    unknown = captions.keys() - {path.relative_to(config.videos).as_posix() for path in paths}
    if unknown and len(unknown) == len(captions):
        raise UserError(f"--captions {config.captions} names no video of {config.videos}: it has {min(unknown)}, where "
                        "a path inside that folder is expected")
    if unknown:
        warn(f"{len(unknown)} captions belong to no video of {config.videos}, such as {min(unknown)}")
    return captions


def video_windows(path, preset, codec):
    """Windows of a history and a section each, one after another; the last one ends with the video and so may overlap
    with the one before, or is shorter if it is the only one: yields (start in seconds, frames (F, H, W, 3) uint8), F
    being whole latents."""
    in_frames = lambda latents: (latents - 1) * codec.stride[0] + 1 if codec.causal else latents * codec.stride[0]
    most = in_frames(preset.history + preset.section)
    least = in_frames(2 * preset.section + codec.causal)
    info, length = video_info(path), most / preset.fps
    size, start = nearest_size(preset, info), 0.0
    while start == 0 or start + (least - 1) / preset.fps < info["seconds"]:
        start = max(0.0, min(start, info["seconds"] - length))
        try:
            frames = read_video(path, preset.fps, *size, start=start, seconds=length)
        except UserError:                                           # cut short: keep the windows before
            if start == 0:
                raise
            return
        if len(frames) < least:
            if start == 0:
                raise UserError(f"{path} is shorter than one segment and one section, {least / preset.fps:g} s")
            return
        yield start, frames[:codec.frames(len(frames))]
        start += length


def cache_video(path, storyboard, preset, codec, prompts):
    """[(latents (C, F, h, w) bfloat16, first latent of each prompt, prompt embeddings)] of a video's windows."""
    rate = preset.fps / codec.stride[0]                             # latents a second

    @functools.cache                                                # most windows of a video share their prompts
    def embed(prompt):
        rows = prompts(prompt)                                      # kept without the zeros after its last word
        return rows[:int(rows.any(1).nonzero().max()) + 1 if rows.any() else 1].bfloat16()
    windows, end = [], 0.0
    for start, frames in video_windows(path, preset, codec):
        end = start + len(frames) / preset.fps
        latents = codec.encode(to_pixels(frames)[None])[0].bfloat16().contiguous()
        board = [(0, prompt_at(storyboard, start))] if storyboard else []
        board += [(round((seconds - start) * rate), prompt) for seconds, prompt in storyboard if start < seconds < end]
        windows.append((latents, [first for first, _ in board], [embed(prompt).clone() for _, prompt in board]))
    if storyboard and storyboard[-1][0] >= end:
        warn_past_end(path, storyboard[-1][0], end)
    return windows


def cache_shard(shard, videos, key, config, preset, codec, prompts, bar):
    """Encode {path: storyboard or error} into one shard with its index beside it. Nothing appears half-written, and
    the index, which carries the key, last."""
    tensors, starts, clips, skipped = {}, [], [], []
    for path, storyboard in videos.items():
        bar.update()
        try:
            if isinstance(storyboard, UserError):
                raise storyboard
            windows = cache_video(path, storyboard, preset, codec, prompts)
            if not storyboard:
                warn(f"no caption for {path}: trained without a prompt")
            for latents, firsts, texts in windows:
                i = len(clips)
                tensors.update({f"{i}.latents": latents, **{f"{i}.text.{k}": t for k, t in enumerate(texts)}})
                starts.append(firsts)
                clips.append((path.relative_to(config.videos).as_posix(), *latents.shape[1:]))
        except UserError as e:
            skipped.append(str(e))
    shard.with_suffix(".json").unlink(missing_ok=True)
    with whole_file(shard) as part:
        save_file(tensors, part, {"starts": json.dumps(starts)})
    index = dict(key=key, clips=clips, skipped=skipped, bytes=shard.stat().st_size)
    with whole_file(shard.with_suffix(".json")) as part:
        part.write_text(json.dumps(index))


def cache_videos(argv):
    """Encode a folder of videos, once, into shards to train on: windows of a history and a section each. Goes on where
    it was stopped; under torchrun the processes share the work."""
    config = parse_flags(CacheConfig, cache_videos.__doc__, argv)
    if not config.videos or not config.out:
        raise UserError("--videos and --out are needed: a folder of videos, and one for the shards")
    preset, device = get_preset(config.preset), pick_device(config.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    codec, prompts = make_codec(preset, config.vae, device), make_prompts(preset, config.t5, device)
    if not codec.decodes:
        raise UserError(f"--preset {config.preset} needs --vae: a local folder of Wan's VAE in the diffusers layout "
                        "(nano and small need none)")
    if config.shard < 1:
        raise UserError(f"--shard {config.shard}: must be at least 1")
    if Path(config.out).exists() and not Path(config.out).is_dir():
        raise UserError(f"--out {config.out} is a file: give a folder for the shards")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # the slowest is waited for
    paths, out = find_videos(config.videos), Path(config.out)
    captions = find_captions(config, paths)
    if captions is None and any(path.with_suffix(s).is_file() for path in paths for s in (".txt", ".json")) or captions:
        prompts("a prompt")                                         # no text encoder? Say so now, not after hours
    (out / "manifest.json").unlink(missing_ok=True)                 # a cache is whole when it has one
    if world_size > 1:
        dist.barrier()
    settings = window_settings(preset, codec) | {"prompts": prompts.settings}
    shards = [paths[i:i + config.shard] for i in range(0, len(paths), config.shard)]
    mine = range(rank, len(shards), world_size)
    bar, skipped = tqdm(total=sum(len(shards[k]) for k in mine), desc="caching videos", disable=rank > 0), []
    for k in mine:
        videos, content, shard = {}, [], out / f"shard-{k:05}.safetensors"
        for path in shards[k]:
            name = path.relative_to(config.videos).as_posix()
            try:
                videos[path] = (captions.get(name) if captions is not None else storyboard_beside(path)) or []
                content.append((name, file_hash(path), str(videos[path])))
            except (UserError, OSError) as e:
                videos[path] = UserError(str(e))
                content.append((name, str(e)))
        key = hashlib.sha256(repr((settings, content)).encode()).hexdigest()
        index = shard.with_suffix(".json")
        made = read_index(index, "key", "bytes") if index.is_file() and shard.is_file() else {}
        if (made.get("key"), made.get("bytes")) == (key, shard.stat().st_size if made else None):
            bar.update(len(videos))
        else:
            cache_shard(shard, videos, key, config, preset, codec, prompts, bar)
        skipped += read_index(index, "skipped")["skipped"]
        if too_many(skipped, len(paths)):                           # whatever else comes: do not encode it
            report_skipped(skipped, len(paths), config.videos)
    bar.close()
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        finish_cache(config, out, len(shards), settings, len(paths))


def finish_cache(config, out, shards, settings, videos):
    """Write the manifest that training asks for, unless too many videos were skipped."""
    indices = [read_index(out / f"shard-{k:05}.json", "clips", "skipped", "bytes") for k in range(shards)]
    skipped = [message for index in indices for message in index["skipped"]]
    report_skipped(skipped, videos, config.videos)
    with whole_file(out / "manifest.json") as part:
        part.write_text(json.dumps(dict(settings=settings, bytes=[index["bytes"] for index in indices])))
    remove_leftovers(out)
    clips = sum(len(index["clips"]) for index in indices)
    print(f"{out} holds {clips} clips of {videos - len(skipped)} videos in {shards} shards; {len(skipped)} skipped")


def open_dataset(config, codec):
    """(clips to train on, held-out clips) of --data."""
    preset = PRESETS[config.preset]
    if config.data == "world" and preset.codec == "dct":
        return (world_clips("train", config.clips, preset, codec, config.cache),
                world_clips("held-out", config.held_out, preset, codec, config.cache, keep_pixels=True))
    if (Path(config.data) / "manifest.json").is_file():
        return cached_clips(config.data, preset, codec, config.held_out)
    if preset.codec != "dct":
        raise UserError(f"--data {config.data} is not a cache of latents, which --preset {config.preset} trains on: "
                        "make one with data.py cache")
    return video_clips(config.data, preset, codec, config.cache)


# ---------------------------------------------------------------------------------------------------------------------
# python data.py story: clips to try; and the other commands


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
    if preset.codec != "dct":
        raise UserError(f"--preset {config.preset}: the paper-doll world is made for nano and small")
    if config.index < 0:
        raise UserError(f"--index {config.index}: stories are numbered from 0")
    story, frames = story_pixels("held-out", config.index, preset)
    shown = len(frames) if config.truth else HISTORY_SECTIONS * preset.section
    with VideoWriter(config.out, preset.fps, *preset.sizes[0]) as writer:
        writer.write(frames[:shown])
    lines = [f"{k * preset.section / preset.fps:g}s: {world.caption(story, k)}\n" for k in range(STORY_SECTIONS)]
    storyboard = Path(config.out).with_suffix(".txt")
    storyboard.write_text("".join(lines))
    print(f"wrote {config.out} and {storyboard}"
          + ("" if config.truth else f"; continue it: python sample.py --history {config.out}"))


def main():
    commands = {"story": write_story, "cache": cache_videos}
    run_command("data.py", commands, "Data: clips to try, and the cache of latents.\n")


if __name__ == "__main__":
    run_main(main)
