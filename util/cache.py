"""A cache of latents: a folder of videos encoded once, to train on. `python data.py cache` writes it.

OUT/windows/KEY-N.safetensors   a window of a 20 s history and a section: latents, `low` of each rate, prompts. KEY
                                begins the hash of all it depends on: a name never comes to stand for other content
                                while a training reads it
OUT/videos/ID.json              what was made of one video, or why it was skipped; as long as its key is right, it is
                                not made again. ID begins the hash of the video's name
OUT/manifest.json               what a complete cache holds; written last
"""

import functools
import hashlib
import json
import re
import sys
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from util.cli import UserError, warn
from util.files import LOCK, RECORD, atomic_write, file_hash, is_a, lock_folder, parse_json, read_text, remove_leftovers
from util.folder import check_skipped, find_videos, name_digest, nearest_size, warn_longer, why_unusable
from util.storyboard import BESIDE, parse_entries, prompt_at, storyboard_beside
from util.video import READING, read_video, to_pixels, video_info
from util.weights import open_safetensors

# Raise it when a change makes other latents or embeddings of a file, or other files of them: caches are then made
# again. (For read_video() raise READING.)
VERSION = 3
WINDOW_NAME = re.compile(r"[0-9a-f]{24}-\d+\.safetensors")


def cache_settings(base):
    """What the windows of a cache depend on, apart from the videos and prompts themselves."""
    settings = dict(version=VERSION, codec=base.codec.settings, fps=base.fps, sizes=base.sizes)
    settings |= dict(section=base.section, history=base.history, reading=READING)
    return json.loads(json.dumps(settings))


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def low_name(rate):
    """The name in a window's file of `low` of a rate (t, h, w)."""
    return "low.{1}x{2}x{0}".format(*rate)


def read_manifest(folder, base, rate=None):
    """{video: [(file, frames, height, width) of each of its windows]} of a complete cache made for this base, with
    `low` of this rate.

    Raises UserError.
    """
    folder, path = Path(folder), Path(folder) / "manifest.json"
    advice = "delete it, then run data.py cache again"
    manifest = parse_json(path.read_bytes(), path, advice, settings=dict)
    theirs, videos = manifest["settings"], manifest.get("videos")
    ours = cache_settings(base) | {"prompts": base.prompts.settings}
    for key, value in ours.items():
        if not agrees(value, theirs.get(key)):
            raise UserError(
                f"--data {folder} was cached with {key} {theirs.get(key)}, not {value}: give the preset that it "
                "was made for, or run data.py cache again"
            )
    lows = theirs.get("lows")
    if not isinstance(lows, list):
        raise UserError(f"{path} is damaged: {advice}")
    if rate and low_name(rate) not in lows:
        raise UserError(
            f"--data {folder} holds {', '.join(map(str, lows))}, not {low_name(rate)}: run data.py cache again with "
            "--rates, or train with a --rate that is there"
        )
    if not isinstance(videos, dict) or not all(are_windows(windows) for windows in videos.values()):
        raise UserError(f"{path} is damaged: {advice}")
    found = {}
    for video, windows in videos.items():
        found[video] = [(folder / "windows" / name, *shape) for name, _, *shape in windows]
        for (file, *_), (_, size, *_) in zip(found[video], windows):
            if not is_complete(file, size):
                raise UserError(
                    f"{file} is missing or cut short: run data.py cache again, it makes only what is not there"
                )
    return found


def are_windows(entries):
    """Whether this is [[file name, bytes, frames, height, width], ...], each a file of ours in its place."""
    return isinstance(entries, list) and all(
        isinstance(entry, list)
        and len(entry) == 5
        and isinstance(entry[0], str)
        and WINDOW_NAME.fullmatch(entry[0])
        and all(is_a(n, int) and n > 0 for n in entry[1:])
        for entry in entries
    )


def agrees(ours, theirs):
    """Equal, or unknown here: None stands for weights that are not at hand."""
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return all(agrees(a, b) for a, b in zip(ours, theirs))
    return ours is None or ours == theirs


def is_complete(path, size):
    """Is this file there, with all of its bytes?"""
    return path.is_file() and path.stat().st_size == size


@contextmanager
def open_window(path):
    """Open a window of a cache for reading. Raises UserError if it is gone or damaged, or lacks what the body reads."""
    damaged = f"{path} is damaged: delete it, run data.py cache, then train on with --resume"
    try:
        file = open_safetensors(path)
    except (UserError, SafetensorError):
        gone = f"{path} is gone (was the cache made again?): run data.py cache, then train on with --resume"
        raise UserError(damaged if path.is_file() else gone) from None
    try:
        with file:
            yield file
    except UserError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError):
        raise UserError(damaged) from None


def read_tensor(path, name, shape, part=slice(None)):
    """A tensor of a window, or a `part` of its second dimension, float32. shape: sizes, or ranges of them.

    Raises UserError if its shape is another, or if it holds anything but finite floating-point numbers.
    """
    sizes = [want if isinstance(want, range) else (want,) for want in shape]
    with open_window(path) as file:
        stored = file.get_slice(name)
        fits = len(sizes) == len(stored.get_shape()) and all(n in want for n, want in zip(stored.get_shape(), sizes))
        tensor = stored[:, part] if fits else None
        if tensor is None or not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(name)
        return tensor.float()


# ---------------------------------------------------------------------------------------------------------------------
# Captions


def read_captions(path):
    """{video: storyboard} of a JSONL file. Raises UserError naming the line."""
    captions = {}
    try:
        lines = read_text(path).split("\n")  # a caption may hold U+2028
    except (OSError, UnicodeDecodeError):
        raise UserError(f"--captions {path} cannot be read: give a JSONL file in UTF-8") from None
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            board = entry["storyboard"] if "storyboard" in entry else [[0, entry["caption"]]]
            name = entry["video"] + ""  # not null or a number
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f'{path}, line {n}: expected {{"video": "a.mp4", "caption": "a text"}}') from None
        if name in captions:
            raise UserError(f"{path}, line {n}: {name} stands on an earlier line too: give each video one line")
        captions[name] = parse_entries(board, f"{path}, line {n}")
    return captions


def find_captions(folder, captions_file, names):
    """{video: storyboard} of --captions. Warns of captions that belong to no video; refuses them if that is so for
    all."""
    captions = read_captions(captions_file)
    unknown = captions.keys() - set(names)
    if unknown and len(unknown) == len(captions):
        raise UserError(
            f"--captions {captions_file} names no video of {folder}: it has {min(unknown)}, where a path inside that "
            "folder is expected"
        )
    if unknown:
        warn(f"{len(unknown)} captions belong to no video of {folder}, such as {min(unknown)}")
    return captions


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_cache(videos, out, captions_file, base, rates, processes):
    """Encode the videos of a folder into a cache. Resumes; the processes share the work. Raises UserError."""
    out, paths = Path(out), find_videos(videos)
    if processes.rank == 0:
        check_folder(out)
        lock_folder(out)
    names = {path: path.relative_to(videos).as_posix() for path in paths}
    captions = find_captions(videos, captions_file, names.values()) if captions_file else None
    if captions or captions is None and any(path.with_suffix(s).is_file() for path in paths for s in BESIDE):
        base.prompts("a prompt")  # no text encoder? Say so now, not after hours
    settings = cache_settings(base) | {"prompts": base.prompts.settings, "lows": [low_name(rate) for rate in rates]}
    mine = paths[processes.rank :: processes.world_size]
    n_skipped, longer = processes.running_sum(), []
    for path in tqdm(mine, desc="caching videos", disable=processes.rank > 0):
        entry = cache_video(out, path, names[path], captions, settings, base, rates)
        if "skipped" in entry:
            tqdm.write(f"skipped: {entry['skipped']}", file=sys.stderr)
        longer += [path] if entry.get("longer") else []
        # counted over all processes: above the limit there is no need to encode the rest
        check_skipped(n_skipped(int("skipped" in entry)), len(paths), videos)
    warn_longer(longer)
    processes.shutdown()
    if processes.rank == 0:
        finish_cache(out, list(names.values()), settings)


def check_folder(out):
    """Raise UserError unless a folder is new, empty, or holds a cache and nothing else."""
    if not out.exists():
        return
    ours = {"manifest.json", "windows", "videos", RECORD, LOCK}
    foreign = sorted(path.name for path in out.iterdir() if path.name not in ours and not path.name.endswith(".part"))
    if foreign:
        raise UserError(f"--out {out} holds {foreign[0]}, which is not a cache's: give a new folder or an empty one")
    manifest = out / "manifest.json"
    if manifest.exists():
        advice = "it is not a cache's manifest; give a new folder or an empty one"
        parse_json(manifest.read_bytes(), manifest, advice, settings=dict, videos=dict)


def index_of(out, name):
    """The path of a video's index."""
    return out / "videos" / (f"{name_digest(name):064x}"[:24] + ".json")


def cache_video(out, path, name, captions, settings, base, rates):
    """Make a video's windows and its index, unless they are there -> the index.

    {"key": ..., "windows": [(file name, bytes, frames, height, width)], "longer": does its storyboard go on after its
    end?} or {"key": ..., "skipped": why}. Raises UserError if the index is damaged, OSError if the disk does not take
    the files.
    """
    index, advice = index_of(out, name), "delete it, then run data.py cache again"
    made = parse_json(index.read_bytes(), index, advice) if index.is_file() else {}
    if not are_windows(made.get("windows", [])):
        raise UserError(f"{index} is damaged: {advice}")
    try:
        board = (captions.get(name) if captions is not None else storyboard_beside(path)) or []
        key = hashlib.sha256(repr((settings, name, file_hash(path), board)).encode()).hexdigest()
    except Exception as e:  # it may be readable next time: no key
        return write_index(index, dict(skipped=why_unusable(path, e)))
    complete = all(is_complete(out / "windows" / file, size) for file, size, *_ in made.get("windows", ()))
    if made.get("key") == key and complete:
        return made
    try:
        windows, seconds = write_windows(out / "windows", path, board, key, base, rates)
    except Exception as e:
        return write_index(index, dict(key=key, skipped=why_unusable(path, e)))
    if not board:
        warn(f"no caption for {path}: trained without a prompt")
    return write_index(index, dict(key=key, windows=windows, longer=bool(board) and board[-1][0] >= seconds))


def write_index(path, entry):
    """Write what was made of a video, and return it."""
    with atomic_write(path, replace=True) as part:
        part.write_text(json.dumps(entry))
    return entry


def write_windows(folder, path, board, key, base, rates):
    """Encode a video window by window -> ([(file name, bytes, frames, height, width)], seconds of video in them).

    A window's file has latents (C, F, h, w) bfloat16, `low` of each rate, text.K (L, text_dim) for each of its prompts,
    and the latents at which these start.
    """
    per_second, written, end = base.fps / base.codec.stride[0], [], 0.0  # latents per second

    @functools.lru_cache(8)  # most windows share their prompts with the next
    def embed(prompt):
        rows = base.prompts(prompt)  # kept without the zeros after its last word
        return rows[: int(rows.any(1).nonzero().max()) + 1 if rows.any() else 1].bfloat16()

    for start, frames in video_windows(path, base):
        end = start + len(frames) / base.fps
        pixels = to_pixels(frames)[None]
        encoded = {"latents": base.codec.encode(pixels)}
        encoded |= {low_name(rate): base.codec.encode_low(pixels, rate) for rate in rates}
        tensors = {name: x[0].bfloat16().contiguous() for name, x in encoded.items()}
        prompts = [(0, prompt_at(board, start))] if board else []
        prompts += [
            (round((seconds - start) * per_second), prompt) for seconds, prompt in board if start < seconds < end
        ]
        tensors |= {f"text.{k}": embed(prompt).clone() for k, (_, prompt) in enumerate(prompts)}
        file = folder / f"{key[:24]}-{len(written)}.safetensors"
        with atomic_write(file, replace=True) as part:
            save_file(tensors, part, {"starts": json.dumps([first for first, _ in prompts])})
        written.append((file.name, file.stat().st_size, *tensors["latents"].shape[1:]))
    return written, end


def video_windows(path, base):
    """Yield (start in seconds, frames (F, H, W, 3) uint8) of windows of a history and a section, one after another.

    F is whole latents. The last window ends with the video, so it may overlap with the one before, or is shorter if it
    is the only one. Raises UserError before the first window, or not at all.
    """
    codec = base.codec
    in_frames = lambda n: (n - 1) * codec.stride[0] + 1 if codec.causal else n * codec.stride[0]
    most = in_frames(base.history + base.section)
    least = in_frames(2 * base.section + codec.causal)
    info, length = video_info(path), most / base.fps
    size, start = nearest_size(base.sizes, info), 0.0
    while start == 0 or start + (least - 1) / base.fps < info["seconds"]:
        start = max(0.0, min(start, info["seconds"] - length))
        try:
            frames = read_video(path, base.fps, *size, start=start, seconds=length)
        except UserError:  # cut short: keep the windows before
            if start == 0:
                raise
            return
        if len(frames) < least:
            if start == 0:
                raise UserError(f"{path} is shorter than one segment and one section, {least / base.fps:g} s")
            return
        yield start, frames[: codec.frames(len(frames))]
        start += length


def finish_cache(out, names, settings):
    """Write the manifest from the indices of these videos, then delete windows of ours that it does not name."""
    videos, n_skipped = {}, 0
    for name in names:
        index = index_of(out, name)
        made = parse_json(index.read_bytes(), index, "delete it, then run data.py cache again")
        n_skipped += "skipped" in made
        if made.get("windows"):
            videos[name] = made["windows"]
    with atomic_write(out / "manifest.json", replace=True) as part:
        part.write_text(json.dumps(dict(settings=settings, videos=videos)))
    files = {file for windows in videos.values() for file, *_ in windows}
    for path in (out / "windows").glob("*.safetensors"):
        if path.name not in files and WINDOW_NAME.fullmatch(path.name):
            path.unlink()
    for folder in (out, out / "windows", out / "videos"):
        remove_leftovers(folder)
    n_windows = sum(len(windows) for windows in videos.values())
    print(f"{out} holds {n_windows} clips of {len(videos)} videos; {n_skipped} skipped")
