"""python data.py story: a held-out story as a video, to try things on."""

from dataclasses import dataclass
from pathlib import Path

from bases import open_base
from dolls.dataset import HISTORY_SECTIONS, STORY_SECTIONS, story_pixels
from util.cli import UserError, parse_flags
from util.files import atomic_write, check_output
from util.video_writer import VideoWriter


@dataclass
class StoryConfig:
    index: int = 0  # which held-out story
    preset: str = "nano"  # its size and frame rate
    out: str = "out/story.mp4"  # the video; its storyboard goes beside it, 3 sections longer than the video
    truth: bool = False  # write those 3 sections too: the true continuation


def story(argv):
    """Write a held-out story of the paper-doll world as a video, with its storyboard beside it."""
    config = parse_flags(StoryConfig, story.__doc__, argv)
    base = open_base(config.preset)
    if base.needs_cache:
        raise UserError(f"--preset {config.preset}: the paper-doll world is made for nano and small")
    if config.index < 0:
        raise UserError(f"--index {config.index}: stories are numbered from 0")
    storyboard = Path(config.out).with_suffix(".txt")
    check_output(storyboard)
    told, frames = story_pixels("held-out", config.index, base)
    shown = len(frames) if config.truth else HISTORY_SECTIONS * base.section
    lines = [f"{k * base.section / base.fps:g}s: {told.caption(k)}\n" for k in range(STORY_SECTIONS)]
    # both files or none: the storyboard gets its name after the video was written
    with atomic_write(storyboard) as part, VideoWriter(config.out, base.fps, *base.sizes[0]) as writer:
        part.write_text("".join(lines))
        writer.write(frames[:shown])
    advice = "" if config.truth else f"; continue it: python sample.py --history {config.out}"
    print(f"wrote {config.out} and {storyboard}{advice}")
