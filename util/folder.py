"""A folder of videos: find them, read them, hold some out, report those that cannot be used."""

import errno
import hashlib
import math
import os
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from util.cli import UserError, first_line, is_out_of_memory, warn
from util.files import NotWritable
from util.sheets import COLUMNS
from util.video import VIDEO_SUFFIXES, read_video, stream_video, video_info


def find_videos(folder):
    """All video files below a folder, sorted, without hidden ones (macOS writes ._x.mp4). Raises UserError if none."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is not a folder: give a folder of videos (or a name in DATASETS, see data.py)")
    found = sorted(
        path
        for path in Path(folder).rglob("*")
        if path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not found:
        raise UserError(f"{folder} holds no video: put files in it that end in {' '.join(sorted(VIDEO_SUFFIXES))}")
    return found


def nearest_size(sizes, info):
    """The (height, width) in `sizes` whose aspect ratio is nearest to a video's. info: from video_info()."""
    aspect = math.log(info["height"] / info["width"])
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - aspect))


def stream_clip(path, base):
    """((height, width), frames): a whole video at the base's frame rate and nearest size, frame by frame."""
    size = nearest_size(base.sizes, video_info(path))
    return size, stream_video(path, base.fps, *size)


def read_clip(path, base):
    """A whole video at the base's frame rate and nearest size, uint8 (F, H, W, 3)."""
    return read_video(path, base.fps, *nearest_size(base.sizes, video_info(path)))


@dataclass
class History:
    """The clip to continue. Only its newest frames are held, so RAM use does not grow with its length."""

    newest: torch.Tensor  # (F, H, W, 3) uint8: the newest frames, for memory and contact sheet
    remembered: torch.Tensor  # the part of them that memory gets
    frames: int  # of the whole clip


def copy_history(frames, writer, base, most):
    """Write the frames of a clip, one at a time, if there are any -> History. most: sections to remember, or None for
    all."""
    section = base.section * base.codec.stride[0]
    held = deque(maxlen=most and max(most * section + base.codec.causal, COLUMNS * section))
    n_frames = 0
    for frame in frames:
        writer.write(frame[None])
        held.append(frame)
        n_frames += 1
    # beside whole sections, a causal codec has one frame that stands alone
    n = n_frames if most is None else min(n_frames, most * section + base.codec.causal)
    if base.codec.causal and n > section:
        # keep whole segments only: waiting frames would outnumber all memory tokens; the oldest frames are dropped
        n = 1 + (n - 1) // section * section
    newest = torch.from_numpy(np.stack(held)) if held else torch.zeros(0, 1, 1, 3, dtype=torch.uint8)
    return History(newest, newest[-base.codec.frames(n) :], n_frames)


def check_skipped(count, total, folder):
    """Raise UserError if more than 20 % of the videos cannot be used."""
    if count > 0.2 * total:
        raise UserError(f"{count} of {total} videos in {folder} cannot be used, above 20 %: the reasons are above")


def why_unusable(path, error):
    """What to say of a file whose reading raised this exception, whatever its kind: one bad file must not end a run of
    thousands. Raises it again if it is not the file's fault: too little memory, a full disk."""
    disk = isinstance(error, OSError) and error.errno in (None, errno.ENOSPC, errno.EROFS)
    if disk or isinstance(error, NotWritable) or is_out_of_memory(error):
        raise error
    if isinstance(error, UserError):
        return str(error)
    return f"{path} cannot be read ({type(error).__name__}: {first_line(error)})"


def report_skipped(skipped, total, folder):
    """Print on stderr why files cannot be used. Raises UserError if these are more than 20 %."""
    for message in skipped:
        print(f"skipped: {message}", file=sys.stderr)
    check_skipped(len(skipped), total, folder)


def warn_past_end(path, seconds, end):
    """Warn that the last prompt of a storyboard starts, at `seconds`, after its video ends, at `end` seconds."""
    warn(f"{path}: its storyboard goes on to {seconds:g} s, but the video ends at {end:g} s")


def warn_longer(paths):
    """Warn of videos that end before the last prompt of their storyboards starts."""
    if paths:
        warn(f"{len(paths)} storyboards go on after their videos end (as that of {paths[0]}): the rest is not used")


def name_digest(name):
    """A large number that depends on a video's name alone."""
    return int(hashlib.sha256(os.fsencode(name)).hexdigest(), 16)


def split_videos(videos):
    """Split video names -> (names to train on, held-out names).

    About one in ten is held out, at least one and never all; a single video is in both lists. The name of each decides,
    so a video added to many leaves the others where they are. Warns of a single one.
    """
    if len(videos) == 1:
        warn("there is only one video, so it is also the held-out one: its scores say nothing about other videos")
    order = sorted(videos, key=name_digest)
    held = [name for name in order if name_digest(name) % 10 == 0][: max(1, len(order) - 1)] or order[:1]
    return [name for name in order if name not in set(held)] or order, held
