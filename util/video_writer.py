"""Write video files. With PyAV, because imageio.v3's pyav plugin can set neither colour tags nor the quality (crf)."""

import math
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from util.cli import UserError, uninterrupted
from util.files import atomic_write, check_output


class VideoWriter:
    """Writes a video section by section: `with VideoWriter(path, fps, height, width) as w: w.write(frames)`.

    path           ends in .mp4, .mov or .mkv (H.264, which plays everywhere) or in .gif
    height, width  of the frames to write
    scale          whole factor to enlarge by (nearest neighbour); by default the largest that keeps the short side
                   within 512
    The file appears at `path`, which may change by then, when it is complete, and not at all after an exception. Raises
    UserError.
    """

    def __init__(self, path, fps, height, width, scale=None):
        self.path, self.size, self.gif = Path(path), (height, width), Path(path).suffix.lower() == ".gif"
        self.scale = scale or max(1, 512 // min(height, width))
        if not self.gif and self.path.suffix.lower() not in {".mp4", ".mov", ".mkv"}:
            raise UserError(f"{path}: a video is written as .mp4, .mov, .mkv or .gif; change the suffix")
        if not 0 < fps <= (50 if self.gif else 1000):
            raise UserError(f"fps is {fps}: give a number above 0" + ", at most 50 for a gif" * self.gif)
        check_output(self.path)  # fail now, not after hours of sampling
        # At the 2 frames per second of nano, players stutter or drop the last picture: repeat each frame.
        self.repeats = 1 if self.gif else math.ceil(8 / fps)
        self.rate = Fraction(fps).limit_denominator(1001) * self.repeats
        self.count = 0

    def __enter__(self):
        """Open a temporary file and its encoder. Raises UserError or OSError."""
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_write(self.path, final=lambda: self.path))
            options = {"movflags": "faststart"} if self.path.suffix.lower() in {".mp4", ".mov"} else {}
            self.container = stack.enter_context(av.open(f"file:{temporary}", "w", options=options))
            height, width = (n * self.scale if self.gif else n * self.scale + n * self.scale % 2 for n in self.size)
            self.stream = self.container.add_stream("gif" if self.gif else "libx264", rate=self.rate)
            self.stream.height, self.stream.width = height, width
            self.stream.pix_fmt = "pal8" if self.gif else "yuv420p"
            if not self.gif:
                self.stream.options = {"crf": "16"}
                context = self.stream.codec_context  # BT.709, 16-235: without these tags, players guess
                context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
            self.stack = stack.pop_all()
        return self

    def write(self, frames):
        """Append frames (F, H, W, 3) uint8, a tensor or an array."""
        frames = torch.as_tensor(frames)
        if frames.dtype != torch.uint8 or tuple(frames.shape[1:]) != (*self.size, 3):
            raise ValueError(f"frames are {tuple(frames.shape)} {frames.dtype}, expected (F, {self.size}, 3) uint8")
        for frame in frames.cpu().numpy():
            picture = self.gif_frame(frame) if self.gif else self.h264_frame(frame)
            picture.time_base = 1 / self.rate
            for _ in range(self.repeats):
                picture.pts = self.count
                self.count += 1
                self.container.mux(self.stream.encode(picture))

    def h264_frame(self, frame):
        """(H, W, 3) uint8 -> enlarged av.VideoFrame."""
        frame = frame.repeat(self.scale, 0).repeat(self.scale, 1)
        frame = np.pad(frame, [(0, n % 2) for n in frame.shape[:2]] + [(0, 0)], mode="edge")  # 4:2:0 needs even sizes
        return av.VideoFrame.from_ndarray(frame).reformat(
            format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG", interpolation="AREA"
        )  # the default interpolation lets colour leak into the next enlarged pixel

    def gif_frame(self, frame):
        """(H, W, 3) uint8 -> enlarged av.VideoFrame."""
        small = Image.fromarray(frame).quantize(256)  # the best 256 colours of this frame
        colours = np.array(small.getpalette("RGB"), np.uint8).reshape(-1, 3)
        palette = np.full((256, 4), 255, np.uint8)  # alpha, red, green, blue
        palette[: len(colours), 1:] = colours
        pixels = np.array(small).repeat(self.scale, 0).repeat(self.scale, 1)
        return av.VideoFrame.from_ndarray((pixels, palette), "pal8")

    def __exit__(self, *exception):
        if exception[0] is not None:
            return self.stack.__exit__(*exception)
        with uninterrupted(), self.stack:  # closes the container, then renames the file
            if not self.count:
                raise ValueError(f"no frame was written to {self.path}")
            self.container.mux(self.stream.encode(None))
