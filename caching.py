"""python data.py cache: a folder of videos -> shards of latents and prompt embeddings, once, to train on.

A video becomes windows of a 20 s history and a section each. shard-K.safetensors holds the windows of some videos;
shard-K.json beside it what they are, and a key of all that they depend on, so that only what has changed is made again;
manifest.json, written last, says that the cache is whole. data.py reads it: cached_clips().
"""
import functools
import hashlib
import json
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file
from tqdm import tqdm

from codec import make_codec, make_prompts, to_pixels
from data import name_digest, nearest_size, read_index, report_skipped, too_many, warn_past_end, window_settings
from distributed import leave, start_processes
from flags import parse_flags, warn
from model import UserError, get_preset
from storyboard import parse_entries, prompt_at, storyboard_beside
from video import file_hash, find_videos, read_video, remove_leftovers, video_info, whole_file


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


def shard_of(name, n):
    """Which of n shards a video belongs to, by its name (linear hashing, Litwin 1980): one video more changes its own
    shard alone, one shard more splits one other."""
    number, power = name_digest(name) // 10, 1 << n.bit_length()    # the last digit says which are held out
    return number % power if number % power < n else number % (power // 2)


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
    bar, skipped = tqdm(total=sum(len(shards[k]) for k in mine), desc="caching videos", disable=rank > 0), []
    for k in mine:
        shard = out / f"shard-{k:05}.safetensors"
        videos, content = read_shard(shards[k], config, captions)
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
    leave(world_size)
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
