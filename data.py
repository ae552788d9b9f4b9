"""The clips to train on: stories of the paper-doll world, folders of videos, caches of latents (see caching.py).

    python data.py story                          a held-out story as a video, to try things on
    python data.py cache --videos DIR --out DIR   encode a folder of videos once
"""
import functools
import hashlib
import json
import math
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

import world
from codec import make_prompts, to_pixels
from flags import parse_flags, run_command, run_main, warn
from model import PRESETS, UserError, get_preset
from storyboard import prompt_at, storyboard_beside
from video import READING, VideoWriter, file_hash, find_videos, read_video, video_info, whole_file
from weights import open_safetensors, parse_json

# raise it when nearest_size(), caching.py, WanCodec or wan.clean() come to make other latents or embeddings of a file,
# or caching.py other files of them: caches are then made again (for read_video() raise READING)
ENCODING = 1

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
    key = repr((preset.fps, preset.sizes, codec.settings, READING, ENCODING, file_hash(path)))
    key = hashlib.sha256(key.encode()).hexdigest()
    file = Path(cache) / "videos" / f"{key[:24]}.safetensors"
    if not file.exists():
        frames = read_clip(path, preset)
        latents = codec.encode(to_pixels(frames[:codec.frames(len(frames))])[None])[0]
        with whole_file(file) as part:
            save_file({"latents": latents.half().contiguous()}, part)
    return load_tensor(file)


LONE_VIDEO = "one video alone is trained on and held out too: its figures say nothing of other videos"


def check_skipped(count, total, folder):
    """Raises UserError above 20 % of videos that cannot be used."""
    if count > 0.2 * total:
        raise UserError(f"{count} of {total} videos in {folder} cannot be used, above 20 %: the reasons are above")


def report_skipped(skipped, total, folder):
    """List the files that could not be used. Raises UserError above 20 % of them."""
    for message in skipped:
        print(f"skipped: {message}", file=sys.stderr)
    check_skipped(len(skipped), total, folder)


def warn_past_end(path, seconds, end):
    warn(f"{path}: its storyboard goes on to {seconds:g} s, but the video ends at {end:g} s")


def name_digest(name):
    """A large number that depends on a video's name alone."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)


def split_videos(videos):
    """(names of videos to train on, of held-out ones): about one in ten is held out, each by its own name, so that of
    many videos one that is added changes nothing for the others; at least one, and never all; of a single one, both."""
    order = sorted(videos, key=name_digest)
    held = [name for name in order if name_digest(name) % 10 == 0][:max(1, len(order) - 1)] or order[:1]
    return [name for name in order if name not in set(held)] or order, held


def encode_videos(folder, paths, preset, codec, cache):
    """({name in the folder: Clip}, [why a file cannot be used]) of some videos of a folder."""
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
    return clips, skipped


def gather(folder, clips, names, preset, codec, pixels=False):
    """Clips of these names of {name: Clip}, with their original pixels if they are asked for."""
    for name in names if pixels else ():
        frames = read_clip(Path(folder) / name, preset)
        clips[name].pixels = frames[:codec.frames(len(frames)):codec.stride[0]]     # as codec.show() shows latents
    return Clips([clips[name] for name in names], preset.history + preset.section)


def video_clips(folder, preset, codec, cache):
    """(clips to train on, held-out clips) of a folder of videos, see split_videos(). Files that cannot be used are
    counted and listed, never replaced by another; above 20 % of them it stops."""
    paths = find_videos(folder)
    clips, skipped = encode_videos(folder, paths, preset, codec, cache)
    report_skipped(skipped, len(paths), folder)
    train, held_out = split_videos(clips)
    print(f"{len(train)} videos to train on, {len(held_out)} held out ({', '.join(held_out)}), {len(skipped)} skipped")
    if len(clips) < 2:
        warn(LONE_VIDEO)
    return gather(folder, clips, train, preset, codec), gather(folder, clips, held_out, preset, codec, pixels=True)


def held_out_videos(folder, preset, codec, cache):
    """The held-out clips of video_clips(), without encoding those to train on."""
    names = split_videos([path.relative_to(folder).as_posix() for path in find_videos(folder)])[1]
    clips, skipped = encode_videos(folder, [Path(folder) / name for name in names], preset, codec, cache)
    if skipped:                                                     # another may be held out in its place
        return video_clips(folder, preset, codec, cache)[1]
    print(f"{len(names)} held-out videos: {', '.join(names)}")
    return gather(folder, clips, names, preset, codec, pixels=True)


# ---------------------------------------------------------------------------------------------------------------------
# Clips from a cache on disk: python data.py cache


@contextmanager
def open_cached(path):
    """A file of a cache, open. Raises UserError where it is gone or damaged."""
    try:
        with open_safetensors(path) as f:
            yield f
    except (UserError, SafetensorError):
        found = "damaged: delete it," if path.is_file() else "gone (was the cache made again?):"
        raise UserError(f"{path} is {found} run data.py cache, then train on with --resume") from None


class CachedClip(Clip):
    """A window of a video in a cache, whose latents and prompts are read when they are asked for. It has of a Clip what
    training needs: frames, size, cut(), text(), truth(), targets()."""

    def __init__(self, file, number, frames, size):
        self.file, self.number, self.length, self.shape = file, number, frames, size
        self.pixels = self.story = None

    @property
    def frames(self):
        return self.length

    @property
    def size(self):
        return self.shape

    def cut(self, first, last):
        """Latents of the frames first..last-1, (1, C, F, h, w) float32."""
        with open_cached(self.file) as f:
            return f.get_slice(f"{self.number}.latents")[:, first:last][None].float()

    def text(self, frame, prompts):
        """The embedding of a latent frame's prompt, (1, L, text_dim)."""
        with open_cached(self.file) as f:
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
    todo = "delete it, then run data.py cache again"
    index = parse_json(path.read_bytes(), path, todo, *keys)
    if not isinstance(index.get("files", {}), dict):
        raise UserError(f"{path} is damaged: {todo}")
    return index


def is_whole(path, size):
    """Is this file of a cache there, with all of its bytes?"""
    return path.is_file() and path.stat().st_size == size


def cached_clips(folder, preset, codec, held_out):
    """(clips to train on, at most `held_out` held-out clips) of a folder that `data.py cache` wrote."""
    folder = Path(folder)
    manifest = read_index(folder / "manifest.json", "settings")
    ours, theirs = window_settings(preset, codec), manifest["settings"]
    if not isinstance(theirs, dict) or not isinstance(theirs.get("codec"), list):
        raise UserError(f"{folder}/manifest.json is damaged: delete it, then run data.py cache again")
    if preset.codec == "dct":                                       # a training on Wan's has no text encoder to compare
        ours["prompts"] = make_prompts(preset).settings
    for key, value in ours.items():
        if value != theirs.get(key) and not (key == "codec" and value == ["wan", None] and theirs[key][:1] == ["wan"]):
            raise UserError(f"--data {folder} was cached with {key} {theirs.get(key)}, not {value}: "
                            "give the preset that it was made for, or run data.py cache again")
    videos = {}
    for name, (size, clips) in manifest.get("files", {}).items():
        if not is_whole(folder / name, size):
            raise UserError(f"{folder / name} is missing or cut short: run data.py cache again, "
                            "it makes only what is not there")
        for i, (video, frames, *shape) in enumerate(clips):
            videos.setdefault(video, []).append(CachedClip(folder / name, i, frames, tuple(shape)))
    if not videos:
        raise UserError(f"--data {folder} holds no clip: give data.py cache longer videos")
    names, held_names = split_videos(videos)
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
    return json.loads(json.dumps(dict(version=ENCODING, codec=codec.settings, fps=preset.fps, sizes=preset.sizes,
                                      section=preset.section, history=preset.history, reading=READING)))


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
    from caching import cache_videos    # it imports from here
    commands = {"story": write_story, "cache": cache_videos}
    run_command("data.py", commands, "Data: clips to try, and the cache of latents.\n")


if __name__ == "__main__":
    run_main(main)
