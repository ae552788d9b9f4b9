"""python data.py cache: a folder of videos -> shards of latents and prompt embeddings, once, to train on.

A video becomes windows of a 20 s history and a section each. A shard holds those of some videos, in files
shard-K-KEY-N.safetensors. KEY begins the hash of all that they depend on: a name never comes to stand for other content
while a training reads it. shard-K.json says what the files hold; as long as its key is right they are not made again.
manifest.json, written last, says what a whole cache holds. data.py reads it: cached_clips().
"""
import functools
import hashlib
import json
import sys
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file
from tqdm import tqdm

from codec import make_codec, make_prompts, to_pixels
from data import check_skipped, is_whole, name_digest, nearest_size, read_index, warn_past_end, window_settings
from distributed import leave, shared_count, start_processes
from flags import parse_flags, warn
from model import UserError, get_preset
from storyboard import parse_entries, prompt_at, storyboard_beside
from video import file_hash, find_videos, read_video, remove_leftovers, video_info, whole_file

PIECE = 2**30                     # bytes of windows that memory holds before they are written: a film has gigabytes


@dataclass
class CacheConfig:
    videos: str = ""              # folder of videos, captions beside them
    out: str = ""                 # folder for the shards
    preset: str = "wan-1.3b"      # sizes, frame rate and codec; wan-1.3b and wan-14b share theirs
    captions: str = ""            # a JSONL file instead: {"video": path in the folder, "caption" or "storyboard": ...}
    vae: str = ""                 # Wan: local folder of its VAE in the diffusers layout
    t5: str = ""                  # Wan: local folder of umT5 in the diffusers layout
    shard: int = 32               # about so many videos a shard
    device: str = "auto"          # auto, cpu, cuda, mps; where the VAE and umT5 run


def read_captions(path):
    """{video: storyboard} of a JSONL file. Raises UserError that names the line."""
    captions = {}
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")          # a caption may hold U+2028
    except (OSError, UnicodeDecodeError):
        raise UserError(f"--captions {path} cannot be read: give a JSONL file in UTF-8") from None
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            board = entry["storyboard"] if "storyboard" in entry else [[0, entry["caption"]]]
            name = entry["video"] + ""                              # not null or a number
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(f'{path}, line {n}: expected {{"video": "a.mp4", "caption": "a text"}}') from None
        if name in captions:
            raise UserError(f"{path}, line {n}: {name} stands on an earlier line too: give each video one line")
        captions[name] = parse_entries(board, f"{path}, line {n}")
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
    """Of each of a video's windows, one at a time: latents (C, F, h, w) bfloat16, first latent of each prompt, prompt
    embeddings. Raises UserError before the first one, or not at all."""
    rate = preset.fps / codec.stride[0]                             # latents a second

    @functools.lru_cache(8)                                         # most windows share their prompts with the next
    def embed(prompt):
        rows = prompts(prompt)                                      # kept without the zeros after its last word
        return rows[:int(rows.any(1).nonzero().max()) + 1 if rows.any() else 1].bfloat16()
    end = 0.0
    for start, frames in video_windows(path, preset, codec):
        end = start + len(frames) / preset.fps
        latents = codec.encode(to_pixels(frames)[None])[0].bfloat16().contiguous()
        board = [(0, prompt_at(storyboard, start))] if storyboard else []
        board += [(round((seconds - start) * rate), prompt) for seconds, prompt in storyboard if start < seconds < end]
        yield latents, [first for first, _ in board], [embed(prompt).clone() for _, prompt in board]
    if storyboard and storyboard[-1][0] >= end:
        warn_past_end(path, storyboard[-1][0], end)


def shard_of(name, n):
    """Which of n shards a video belongs to, by its name (linear hashing, Litwin 1980): one video more changes its own
    shard alone, one shard more splits one other."""
    number, power = name_digest(name) // 10, 1 << n.bit_length()    # the last digit says which are held out
    return number % power if number % power < n else number % (power // 2)


def shard_windows(videos, config, preset, codec, prompts, skipped, bar):
    """Yield (video, *what cache_video() yields) of the windows of {path: storyboard or error}; errors go to skipped."""
    for path, storyboard in videos.items():
        bar.update()
        try:
            if isinstance(storyboard, UserError):
                raise storyboard
            for window in cache_video(path, storyboard, preset, codec, prompts):
                yield path.relative_to(config.videos).as_posix(), *window
            if not storyboard:
                warn(f"no caption for {path}: trained without a prompt")
        except UserError as e:
            skipped.append(str(e))


def write_piece(path, windows):
    """Write windows as one file. Returns (its bytes, its clips: [(video, latent frames, height, width)])."""
    tensors = {}
    for i, (_, latents, _, texts) in enumerate(windows):
        tensors.update({f"{i}.latents": latents, **{f"{i}.text.{k}": t for k, t in enumerate(texts)}})
    with whole_file(path) as part:
        save_file(tensors, part, {"starts": json.dumps([firsts for _, _, firsts, _ in windows])})
    return path.stat().st_size, [(video, *latents.shape[1:]) for video, latents, _, _ in windows]


def cache_shard(index, windows, key, skipped):
    """Write what shard_windows() yields as the files of one shard, each of about PIECE bytes, then their index, which
    carries the key and is returned. Nothing appears half-written. skipped: filled by shard_windows() meanwhile."""
    files, held, size = {}, [], 0
    for window in chain(windows, [None]):                           # None: there are no more
        if window:
            held.append(window)
            size += sum(x.nbytes for x in (window[1], *window[3]))
        if size >= PIECE or held and not window:
            path = index.with_name(f"{index.stem}-{key[:16]}-{len(files)}.safetensors")
            files[path.name] = write_piece(path, held)
            held, size = [], 0
    made = dict(key=key, files=files, skipped=skipped)
    with whole_file(index) as part:
        part.write_text(json.dumps(made))
    return made


def read_shard(paths, config, captions):
    """({path: storyboard, or the error that reading it gave}, what the videos and captions of a shard hold)."""
    videos, content = {}, []
    for path in paths:
        name = path.relative_to(config.videos).as_posix()
        try:
            videos[path] = (captions.get(name) if captions is not None else storyboard_beside(path)) or []
            content.append((name, file_hash(path), str(videos[path])))
        except (UserError, OSError) as e:
            videos[path] = UserError(str(e))
            content.append((name, str(e)))
    return videos, content


def cache_videos(argv):
    """Encode a folder of videos, once, into shards to train on: windows of a history and a section each. Goes on where
    it was stopped; under torchrun the processes share the work."""
    config = parse_flags(CacheConfig, cache_videos.__doc__, argv)
    if missing := [f"--{key}" for key in ("videos", "out") if not getattr(config, key)]:
        raise UserError(f"{' and '.join(missing)} missing: give --videos, a folder of videos, and --out, one for the "
                        "shards")
    preset = get_preset(config.preset)
    if config.shard < 1:
        raise UserError(f"--shard {config.shard}: must be at least 1")
    if Path(config.out).exists() and not Path(config.out).is_dir():
        raise UserError(f"--out {config.out} is a file: give a folder for the shards")
    # the slowest is waited for
    rank, world_size, device = start_processes(config.device, wait=timedelta(days=7), tensors=False)
    codec, prompts = make_codec(preset, config.vae, device), make_prompts(preset, config.t5, device)
    if not codec.decodes:
        raise UserError(f"--preset {config.preset} needs --vae: a local folder of Wan's VAE in the diffusers layout "
                        "(nano and small need none)")
    paths, out = find_videos(config.videos), Path(config.out)
    captions = find_captions(config, paths)
    if captions is None and any(path.with_suffix(s).is_file() for path in paths for s in (".txt", ".json")) or captions:
        prompts("a prompt")                                         # no text encoder? Say so now, not after hours
    (out / "manifest.json").unlink(missing_ok=True)                 # a cache is whole when it has one
    if world_size > 1:
        dist.barrier()
    settings = window_settings(preset, codec) | {"prompts": prompts.settings}
    shards = [[] for _ in range(-(-len(paths) // config.shard))]
    for path in paths:
        shards[shard_of(path.relative_to(config.videos).as_posix(), len(shards))].append(path)
    mine = range(rank, len(shards), world_size)
    bar = tqdm(total=sum(len(shards[k]) for k in mine), desc="caching videos", disable=rank > 0)
    skipped = shared_count(world_size)
    for k in mine:
        index = out / f"shard-{k:05}.json"
        videos, content = read_shard(shards[k], config, captions)
        key = hashlib.sha256(repr((settings, content)).encode()).hexdigest()
        made = read_index(index, "key") if index.is_file() else {}
        if made.get("key") == key and all(is_whole(out / name, size) for name, (size, _) in made["files"].items()):
            bar.update(len(videos))
        else:
            errors = []
            windows = shard_windows(videos, config, preset, codec, prompts, errors, bar)
            made = cache_shard(index, windows, key, errors)
        for message in made["skipped"]:
            tqdm.write(f"skipped: {message}", file=sys.stderr)
        # of all processes: above the limit there is no need to encode the rest, whatever else comes
        check_skipped(skipped(len(made["skipped"])), len(paths), config.videos)
    bar.close()
    leave(world_size)
    if rank == 0:
        finish_cache(out, len(shards), settings, len(paths))


def finish_cache(out, shards, settings, videos):
    """Write the manifest that training asks for, then delete the files of earlier caches, which it does not name."""
    indices = [read_index(out / f"shard-{k:05}.json", "files", "skipped") for k in range(shards)]
    files = {name: file for index in indices for name, file in index["files"].items()}
    with whole_file(out / "manifest.json") as part:
        part.write_text(json.dumps(dict(settings=settings, files=files)))
    for path in out.glob("shard-[0-9]*.safetensors"):
        if path.name not in files:
            path.unlink()
    remove_leftovers(out)
    clips, skipped = sum(len(clips) for _, clips in files.values()), sum(len(index["skipped"]) for index in indices)
    print(f"{out} holds {clips} clips of {videos - skipped} videos in {shards} shards; {skipped} skipped")
