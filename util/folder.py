"""A folder of videos: what is in it, which are held out, which cannot be used."""

import hashlib
import math
import sys
from pathlib import Path

from util.cli import UserError, warn
from util.video import read_video, video_info

VIDEO_SUFFIXES = {".mp4", ".mov", ".webm", ".mkv", ".gif", ".avi", ".m4v"}
LONE_VIDEO = "the only video is trained on and held out too: its figures say nothing about other videos"


def find_videos(folder):
    """All video files below a folder, sorted; hidden ones (macOS leaves ._x.mp4) are not. Raises UserError if none."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is not a folder: give a folder of videos")
    found = sorted(
        path
        for path in Path(folder).rglob("*")
        if path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not found:
        raise UserError(f"{folder} holds no video: put files in it that end in {' '.join(sorted(VIDEO_SUFFIXES))}")
    return found


def nearest_size(sizes, info):
    """The (height, width) whose shape is nearest to that of a video; info: of video_info()."""
    shape = math.log(info["height"] / info["width"])
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - shape))


def read_clip(path, base):
    """A whole video at the base's frame rate and nearest size, uint8 (F, H, W, 3)."""
    return read_video(path, base.fps, *nearest_size(base.sizes, video_info(path)))


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
    held = [name for name in order if name_digest(name) % 10 == 0][: max(1, len(order) - 1)] or order[:1]
    return [name for name in order if name not in set(held)] or order, held
