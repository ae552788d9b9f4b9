"""The clips to train on: stories of the paper-doll world, folders of videos, caches of latents.

python data.py story                          a held-out story as a video, to try things on
python data.py cache --videos DIR --out DIR   encode a folder of videos once (util/cache.py)
"""

import functools
import json
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import dolls.dataset as dolls
from bases import open_base
from encoder import parse_rate
from util.cache import low_name, open_window, read_manifest, read_tensor, write_cache
from util.cli import UserError, load_object, parse_flags, run_command, run_main, warn
from util.distributed import start_processes
from util.folder import find_videos, read_clip, report_skipped, split_videos
from util.latents import encode_videos
from util.storyboard import prompt_at

# ---------------------------------------------------------------------------------------------------------------------
# Clips


@dataclass
class Clip:
    """One encoded video. Its methods and properties are the interface that training and evaluation use."""

    latents: torch.Tensor  # (C, F, h, w) float16
    storyboard: list  # [(first latent frame, prompt)]
    pixels: torch.Tensor = None  # (F, H, W, 3) uint8, one frame per latent, of held-out clips
    story: object = None  # the dolls.stories.Story that it shows, which knows what each section asks for
    low: torch.Tensor = None  # latents of the smaller video, from Codec.encode_low(), for methods that read them

    @property
    def frames(self):
        return self.latents.shape[1]

    @property
    def size(self):
        return tuple(self.latents.shape[2:])

    def cut(self, first, last):
        """Latents of the frames first..last-1, (1, C, F, h, w) float32."""
        return self.latents[None, :, first:last].float()

    def history(self, first, last, encoder, codec):
        """What φ reads of a history: (high, low), see MemoryEncoder.encode()."""
        high = self.cut(first, last)
        if not encoder.reads_low:
            return high, high[:, :, :0]
        return high, codec.cut_low(self.load_low(encoder), first, first + encoder.whole(last - first), encoder.rate[0])

    def load_low(self, encoder):
        """`low` of the whole clip, (1, C, f, h, w) float32."""
        return self.low[None].float()

    def prompt(self, frame):
        """The prompt of a latent frame: the latest that starts at or before it."""
        return prompt_at(self.storyboard, frame)

    def text(self, frame, prompts):
        """The embedding of that prompt, (1, L, text_dim)."""
        return prompts(self.prompt(frame))[None]

    def truth(self, frames):
        """Original pixels of these frames, (1, F, H, W, 3), or None."""
        return None if self.pixels is None else self.pixels[frames][None]

    def targets(self, sections, section):
        """Frames at which a target may start, after `sections` sections of history.

        In the paper-doll world: where the history has shown all that the prompt asks to remember.
        """
        if self.story is None:
            return list(range(sections * section, self.frames - section + 1))
        shots = range(sections, len(self.story.shots))
        return [k * section for k in shots if self.story.askable(k, k - sections)]


class CachedClip(Clip):
    """A window of a cache, whose latents and prompts are read when they are asked for."""

    def __init__(self, file, shape):
        self.file, self.shape = file, shape  # (C, F, h, w)
        self.low = self.pixels = self.story = None

    @property
    def frames(self):
        return self.shape[1]

    @property
    def size(self):
        return self.shape[2:]

    def cut(self, first, last):
        return read_tensor(self.file, "latents", self.shape, slice(first, last))[None]

    def load_low(self, encoder):
        (channels, frames, *size), (t, *space) = self.shape, encoder.rate
        frames = range(1 + (frames - 1) // t, frames + 1)  # the codec decides, see Codec.encode_low()
        shape = channels, frames, *(-(-n // r) for n, r in zip(size, space))
        return read_tensor(self.file, low_name(encoder.rate), shape)[None]

    def text(self, frame, prompts):
        with open_window(self.file) as f:
            starts = json.loads(f.metadata()["starts"])
            if not starts:
                return prompts("")[None]
            k = max((k for k, start in enumerate(starts) if start <= frame), default=0)
        length, dim = prompts("").shape
        rows = read_tensor(self.file, f"text.{k}", (range(1, length + 1), dim))
        return F.pad(rows, (0, 0, 0, length - len(rows)))[None]


class Clips:
    """Clips in a fixed random order per epoch.

    The clips of a batch share one size (height x width), and have all at least `full` latent frames or all fewer,
    because the shortest clip limits the histories of a batch.
    """

    def __init__(self, clips, full=0):
        self.clips = list(clips)
        self.buckets = {}
        for i, clip in enumerate(self.clips):
            self.buckets.setdefault((clip.size, clip.frames >= full), []).append(i)

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        return self.clips[i]

    @functools.lru_cache(maxsize=2)  # noqa: B019 (datasets live as long as the process)
    def epoch(self, number, size, seed):
        """The batches of an epoch, each a list of `size` clip numbers; a remainder is left out of the epoch.

        A bucket smaller than a batch repeats its clips, or is left out if it is smaller than a quarter of one (unless
        all are): otherwise a few clips of a rare size would be seen much more often than all others.
        """
        rng = np.random.default_rng((seed, number))
        large = [members for members in self.buckets.values() if 4 * len(members) >= size]
        if large and len(large) < len(self.buckets):
            warn(
                f"{len(self.clips) - sum(map(len, large))} clips are left out: there are too few of their size or "
                "length to fill a quarter of a batch"
            )
        batches = []
        for members in large or self.buckets.values():
            order = rng.permutation(members).tolist()
            order *= -(-size // len(order)) if len(order) < size else 1
            batches += [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def batch(self, step, size, seed):
        """The clip numbers of a step's global batch: a function of the step alone, so a resume needs no state."""
        per_epoch = len(self.epoch(0, size, seed))
        return self.epoch(step // per_epoch, size, seed)[step % per_epoch]


# ---------------------------------------------------------------------------------------------------------------------
# Datasets


# --data NAME or NAME:ARGUMENT -> a function with the arguments of open_stories(); add new datasets here
DATASETS = {"world": "data.open_stories"}


def open_dataset(data, base, cache, n_clips, n_held_out, rate=None):
    """(clips to train on, held-out clips) of --data: a name in DATASETS, a cache of latents, or a folder of videos.

    cache: folder for encoded clips; n_clips: stories to train on; n_held_out: held-out stories, or the most held-out
    clips of a cache; rate: (t, h, w) of `low`, or None for a method that does not read it. Raises UserError.
    """
    name, _, argument = data.partition(":")
    if name in DATASETS:
        found = load_object(DATASETS[name])(argument, base, cache, n_clips, n_held_out, rate)
    elif (Path(data) / "manifest.json").is_file():
        found = cached_clips(data, base, n_held_out, rate)
    elif not Path(data).is_dir():
        raise UserError(f"--data {data} is no folder: give one of videos, a cache, or a dataset: {', '.join(DATASETS)}")
    else:
        refuse_uncached(data, base)
        found = video_clips(data, base, cache, rate)
    least = 2 * base.section + base.codec.causal
    for clips, purpose in zip(found, ("to train on", "to hold out")):
        if not len(clips) or min(clip.frames for clip in clips) < least:
            raise UserError(f"--data {data}: expected clips {purpose}, each of at least {least} latent frames")
    if len(found[1]) == 1:
        warn("one clip is held out, so there is no other whose memory could serve as the wrong one")
    return found


def refuse_uncached(data, base):
    """Raise UserError if this base only trains on caches of latents."""
    if base.needs_cache:
        raise UserError(
            f"--data {data} is not a cache of latents, which --preset {base.name} trains on: make one with data.py "
            "cache"
        )


def open_stories(argument, base, cache, n_clips, n_held_out, rate):
    """(clips to train on, held-out clips) of the paper-doll world."""
    refuse_uncached("world", base)
    held_out = story_clips("held-out", n_held_out, base, cache, rate, keep_pixels=True)
    return story_clips("train", n_clips, base, cache, rate), held_out


def story_clips(split, count, base, cache, rate=None, **kind):
    """Stories of the paper-doll world as Clips; split: "train" or "held-out"; kind: see load_stories()."""
    return Clips([Clip(**story) for story in dolls.load_stories(split, count, base, cache, rate, **kind)])


def check_prompts(data, prompts):
    """Warn about words in these prompts that a model trained on this dataset has never seen."""
    words = dolls.unknown_words(prompts) if data == "world" else []
    if words:
        warn(dolls.UNKNOWN_WORDS.format(", ".join(words[:8])))


def cached_clips(folder, base, n_held_out, rate=None):
    """(clips to train on, at most n_held_out held-out clips) of a folder that `data.py cache` wrote."""
    videos = {
        name: [CachedClip(file, (base.codec.channels, *shape)) for file, *shape in windows]
        for name, windows in read_manifest(folder, base, rate).items()
    }
    if not videos:
        raise UserError(f"--data {folder} holds no clip: give data.py cache longer videos")
    names, held_names = split_videos(videos)
    train = [clip for name in names for clip in videos[name]]
    # the first window of every held-out video, then the second: a few clips then come from different videos
    rounds = zip_longest(*(videos[name] for name in held_names))
    held_out = [clip for windows in rounds for clip in windows if clip is not None][:n_held_out]
    print(f"clips to train on: {len(train)}, of {len(names)} videos; held out: {len(held_out)}, of {len(held_names)}")
    full = base.history + base.section
    return Clips(train, full), Clips(held_out, full)


def video_clips(folder, base, cache, rate=None):
    """(clips to train on, held-out clips) of a folder of videos, see split_videos().

    Unusable files are counted and listed, never replaced. Raises UserError if more than 20 % are unusable.
    """
    paths = find_videos(folder)
    encoded, skipped = encode_videos(folder, paths, base, cache, rate)
    report_skipped(skipped, len(paths), folder)
    train, held_out = split_videos(encoded)
    print(f"{len(train)} videos to train on, {len(held_out)} held out ({', '.join(held_out)}), {len(skipped)} skipped")
    return collect(folder, encoded, train, base), collect(folder, encoded, held_out, base, pixels=True)


def collect(folder, encoded, names, base, pixels=False):
    """Clips of these names out of what encode_videos() returns; pixels: with their original pixels."""
    clips = {name: Clip(**encoded[name]) for name in names}
    for name in names if pixels else ():
        frames = read_clip(Path(folder) / name, base)
        clips[name].pixels = frames[: base.codec.frames(len(frames)) : base.codec.stride[0]]  # as codec.show() does
    return Clips(clips.values(), base.history + base.section)


# ---------------------------------------------------------------------------------------------------------------------
# Commands


@dataclass
class CacheConfig:
    videos: str = ""  # folder of videos, captions beside them
    out: str = ""  # folder for the cache
    preset: str = "wan-1.3b"  # sizes, frame rate and codec; wan-1.3b, wan-14b and wan2.2-a14b share theirs
    captions: str = ""  # a JSONL file instead: {"video": path in the folder, "caption" or "storyboard": ...}
    rates: str = None  # of methods that will train on it, as in "4x4x2 2x2x2": `low` is kept for each [the preset's]
    vae: str = ""  # local folder of the base's VAE in the diffusers layout; nano and small: a codec file
    t5: str = ""  # local folder of the base's text encoders in the diffusers layout, such as umT5
    device: str = "auto"  # auto, cpu, cuda, mps; where the VAE and umT5 run


def cache(argv):
    """Encode a folder of videos, once, into a cache to train on: windows of a history and a section each. Resumes where
    it stopped; under torchrun the processes share the work."""
    config = parse_flags(CacheConfig, cache.__doc__, argv)
    if missing := [f"--{key}" for key in ("videos", "out") if not getattr(config, key)]:
        raise UserError(
            f"{' and '.join(missing)} missing: give --videos, a folder of videos, and --out, one for the cache"
        )
    # the others wait for the slowest process
    processes = start_processes(config.device, timeout=timedelta(days=7), tensors=False)
    base = open_base(config.preset, config.vae, config.t5, processes.device)
    if not base.codec.decodes:
        raise UserError(f"--preset {config.preset} needs --vae: a local folder of its VAE in the diffusers layout")
    rates = sorted({parse_rate(rate, base) for rate in (config.rates or "").split() or [base.rate]})
    write_cache(config.videos, config.out, config.captions, base, rates, processes)


COMMANDS = {"story": "dolls.command.story", "cache": cache}


def main():
    run_command("data.py", COMMANDS, __doc__)


if __name__ == "__main__":
    run_main(main)
