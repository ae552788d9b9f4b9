"""Read video files by their time stamps. With PyAV, because imageio's readers go by frame numbers.

Pixels are floats (..., 3, F, H, W) in [-1, 1]; frames, as read from and written to files, are uint8 (..., F, H, W, 3).
"""

import math
import os
import re
from collections import deque
from contextlib import contextmanager
from itertools import chain

import av
import numpy as np
import torch
from av.video.reformatter import Interpolation
from einops import rearrange
from PIL import Image

from util.cli import UserError, warn

# FFmpeg's default conversion from YUV is fast but 1 level of 255 too dark; this one is off by at most 1.
EXACT = Interpolation.POINT | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
UNSPECIFIED = 2  # FFmpeg's number for a colour space that the file does not name
HDR = {16: "PQ (SMPTE 2084)", 18: "HLG (ARIB STD-B67)"}  # FFmpeg's numbers for transfer functions
MOST_PIXELS = 2**26  # per frame, 8192 x 8192: a header may claim any size, and decoding needs several copies of a frame
READING = 1  # raise it when read_video() comes to return other frames for the same file, so that caches are rebuilt
LONGEST_STILL = 3600  # seconds one frame may stay on screen: a broken time stamp would fill the memory with copies
VIDEO_SUFFIXES = {".mp4", ".mov", ".webm", ".mkv", ".gif", ".avi", ".m4v"}


def to_pixels(frames):
    """uint8 (..., F, H, W, 3) -> float (..., 3, F, H, W) in [-1, 1]."""
    return rearrange(torch.as_tensor(frames).float() / 127.5 - 1, "... f h w c -> ... c f h w")


def to_frames(pixels):
    """float (..., 3, F, H, W) in [-1, 1] -> uint8 (..., F, H, W, 3), clamped."""
    return rearrange(((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), "... c f h w -> ... f h w c")


def open_container(path):
    """Open a video file -> av container. Raises UserError."""
    if not os.path.isfile(path):
        exists = "is no regular file, or a link that leads nowhere" if os.path.lexists(path) else "does not exist"
        what = "is a folder" if os.path.isdir(path) else exists
        raise UserError(f"{path} {what}: give the path of a video file")
    try:  # "file:" keeps FFmpeg from reading "12:30.mp4" as a network address
        container = av.open(f"file:{path}", metadata_errors="replace")
    except (av.FFmpegError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as a video ({error.strerror or error}): "
            "give a complete video file, for example .mp4"
        ) from None
    if container.format.name == "tty":  # FFmpeg renders a .txt as a picture
        container.close()
        raise UserError(f"{path} is a text file, not a video: give a video file, for example .mp4")
    return container


def find_stream(container, path):
    """The first video stream of a container. Raises UserError if none can be decoded."""
    cover = av.stream.Disposition.attached_pic  # the cover picture of a music file
    streams = [s for s in container.streams.video if s.codec_context and not s.disposition & cover]
    if not streams:
        raise UserError(f"{path} has no video stream that can be decoded (only sound?): give another file")
    size = streams[0].codec_context.width, streams[0].codec_context.height
    if math.prod(size) > MOST_PIXELS:
        raise UserError(f"{path} is {size[0]} x {size[1]} pixels, too many to decode: make it smaller")
    aspect = streams[0].sample_aspect_ratio
    if aspect and not 0.1 < aspect < 10:
        raise UserError(f"{path} has pixels {float(aspect):g} times as wide as high: it is damaged")
    return streams[0]


class VideoFrames:
    """Decodes the frames of one file in temporal order. Damage is counted, not raised:

    decoded     frames decoded
    unreadable  packets that could not be decoded
    missing     seconds cut off at the end
    """

    def __init__(self, path):
        """Open a video file. Raises UserError if it cannot be opened or has no video stream."""
        self.path, self.origin, self.first = path, None, None
        self.open()

    def open(self):
        """Open the file and its decoder. Raises UserError."""
        self.container = open_container(self.path)
        try:
            self.stream = find_stream(self.container, self.path)
        except UserError:
            self.close()
            raise
        self.stream.thread_type = "AUTO"
        self.decoder = self.stream.codec_context
        keeps_alpha = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(self.decoder.name)  # FFmpeg's own decoders drop alpha
        if keeps_alpha and self.stream.metadata.get("alpha_mode") == "1":
            self.decoder = av.CodecContext.create(keeps_alpha, "r")
        self.tick = float(self.stream.time_base)
        # the average of an avi with a tick of 1 ms is 1000; the guess for a phone's uneven rate is too high
        self.rate = float(min(filter(None, (self.stream.average_rate, self.stream.guessed_rate)), default=25))
        self.stated = self.stated_seconds()
        # Time stamps are rounded to ticks (10 ms in a gif), so half a tick late still counts as on time; but at most
        # 5 ms, since a tick of an avi is a whole frame.
        self.tolerance = min(self.tick / 2, 0.005) + 1e-6

    def close(self):
        self.container.close()

    def stated_seconds(self):
        """The stream's length in seconds as stated in the file, or None. (The container's includes the sound.)"""
        if self.stream.duration:
            return self.stream.duration * self.tick
        end = self.stream.metadata.get("DURATION", "")  # in mkv and webm, despite its name
        tag = re.fullmatch(r"(\d+):(\d+):([\d.]+)", end)
        if tag:
            hours, minutes, seconds = map(float, tag.groups())
            return 3600 * hours + 60 * minutes + seconds - (self.stream.start_time or 0) * self.tick

    def packets(self):
        """Yield the compressed packets, then an empty one, which flushes the decoder."""
        self.covered = 0.0  # seconds of the stream that are actually in the file
        spacing = before = None
        try:
            for packet in self.container.demux(self.stream):
                spacing, before = packet.dts - before if None not in (packet.dts, before) else spacing, packet.dts
                # mp4 states its length in decoding time, mkv in presentation time
                self.first = self.first or (packet.pts, packet.dts)
                length = packet.duration or spacing or 0  # an avi's packets have none
                for stamp, first in zip((packet.pts, packet.dts), self.first):
                    if stamp is not None and first is not None:
                        self.covered = max(self.covered, (stamp - first + length) * self.tick)
                yield packet
        except av.FFmpegError:
            self.unreadable += 1
            yield None

    def decode(self):
        """Yield (seconds since the first frame, av.VideoFrame) from the current position on, then (end, None)."""
        self.decoded, self.unreadable, self.missing = 0, 0, 0.0
        now, gap = 0.0, 1 / self.rate
        for packet in self.packets():
            try:
                frames = self.decoder.decode(packet)
            except av.FFmpegError:
                self.unreadable += 1
                continue
            for frame in frames:
                time = now + gap * (self.decoded > 0) if frame.time is None else frame.time - (self.origin or 0.0)
                if self.origin is None:
                    self.origin, time = frame.time or 0.0, 0.0
                time = max(time, now)  # a stamp that goes back in time is broken
                gap, now = (time - now) or gap, time
                length = (frame.duration or 0) * self.tick or gap
                self.decoded += 1
                yield now, frame
        if self.decoded == 0:
            return
        end = now + length
        if self.stated is not None and not self.unreadable:
            missing = self.stated - self.covered
            if missing > max(0.1, 2 / self.rate):
                self.missing = missing
            else:  # if the frame rate varies, a frame's own duration is unreliable; the stream's is not
                end = min(self.stated, self.covered)
        yield max(end - self.tolerance, now + 2 * self.tolerance), None  # the end is rounded, too

    def decode_from(self, start):
        """decode() from a frame at or before `start` seconds on, by seeking if the file allows it. Raises UserError."""
        decoded = self.decode()
        first = next(decoded, None)
        if first is None:
            raise UserError(f"not one frame of {self.path} can be decoded: the file is damaged or cut off")
        if start > 1:
            try:
                self.container.seek(int((self.origin + start) / self.tick), stream=self.stream)
                self.decoder.flush_buffers()
                after_seeking = self.decode()
                landed = next(after_seeking, None)
            except av.FFmpegError:
                landed = None
            if landed is not None and landed[0] <= start:
                return chain([landed], after_seeking)
            self.close()  # no index, or a wrong one: decode from the beginning
            self.open()
            decoded = self.decode()
            first = next(decoded)
        return chain([first], decoded)


@contextmanager
def open_frames(path):
    """The VideoFrames of a file, closed at the end. FFmpeg's errors become UserErrors."""
    frames = VideoFrames(path)
    try:
        yield frames
    except av.FFmpegError as error:
        raise UserError(f"{path} cannot be decoded ({error.strerror}): give another file") from None
    finally:
        frames.close()


def orientation(frame):
    """How to show a frame: (transposed, mirrored, upside down). Phones store this as a display matrix.

    frame.rotation will not do: it takes a mirrored picture for one turned by 180 degrees.
    """
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV knows not all kinds of side data, and then shows none: EXIF of a JPEG, say
        return {90: (True, False, True), -90: (True, True, False), 180: (False, True, True)}.get(
            round(frame.rotation), (False, False, False)
        )
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()  # x' = a x + c y, y' = b x + d y
    return (True, c < 0, b < 0) if abs(b) > abs(a) else (False, a < 0, d < 0)


def crop_and_resize(frame, height, width, pixel_aspect):
    """av.VideoFrame -> (height, width, 3) uint8: upright, on white, scaled to fill the frame, cropped to the middle.

    pixel_aspect: width / height of one stored pixel. White, because web pages show transparent pictures on white.
    """
    # players take an untagged picture of HD size for BT.709; FFmpeg would take it for BT.601
    untagged = frame.colorspace == UNSPECIFIED and frame.height >= 720
    source = dict(src_colorspace="ITU709") if untagged else {}
    picture = over_white(frame.to_ndarray(format="rgba", interpolation=EXACT, **source))
    transposed, mirrored, upside_down = orientation(frame)
    if transposed:
        picture, pixel_aspect = picture.swapaxes(0, 1), 1 / pixel_aspect
    picture = picture[:: -1 if upside_down else 1, :: -1 if mirrored else 1]
    h, w = picture.shape[:2]
    scale = max(height / h, width / (w * pixel_aspect))
    crop_h, crop_w = height / scale, width / scale / pixel_aspect
    top, left = int((h - crop_h) / 2), int((w - crop_w) / 2)
    # Where a whole number of pixels becomes one, as in videos that VideoWriter enlarged, a box filter takes the exact
    # mean. For other factors it would leave steps; Pillow's bicubic filter, widened by the factor, does not.
    whole = all(abs(n / m - round(n / m)) < 1e-6 and n > m - 1e-6 for n, m in ((crop_h, height), (crop_w, width)))
    resampling = Image.Resampling.BOX if whole else Image.Resampling.BICUBIC
    box = (left, top, min(w, left + crop_w), min(h, top + crop_h))
    return np.array(Image.fromarray(np.ascontiguousarray(picture)).resize((width, height), resampling, box=box))


def over_white(picture):
    """Lay a picture with alpha over white: (H, W, 4) uint8 -> (H, W, 3) uint8."""
    alpha = picture[..., 3:]
    if alpha.min() == 255:
        return picture[..., :3]
    return (picture[..., :3] * (alpha / 255) + (255 - alpha) + 0.5).astype(np.uint8)


def read_video(path, fps, height, width, start=0.0, seconds=None):
    """stream_video() as one tensor (F, height, width, 3) uint8."""
    return torch.from_numpy(np.stack(list(stream_video(path, fps, height, width, start, seconds))))


def stream_video(path, fps, height, width, start=0.0, seconds=None):
    """Yield the frames of a video, (height, width, 3) uint8 arrays, one at a time. Frame k is what is on screen `start
    + k / fps` seconds after the first frame, by the time stamps, never by the nominal frame rate.

    seconds: read at most this many; a shorter file gives fewer frames, a still picture one. A damaged file gives what
    can be decoded, and a warning on stderr. Raises UserError if the file cannot be read or ends before `start`.
    """
    for name, value in {"fps": fps, "height": height, "width": width, "seconds": seconds}.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name} is {value}: give a number above 0")
    if not 0 <= start < math.inf:
        raise UserError(f"start is {start}: give a number of seconds, 0 or more")
    count = math.inf if seconds is None else max(1, math.ceil(seconds * fps - 1e-6))
    with open_frames(path) as frames:
        yield from sample_frames(frames, fps, height, width, start, count)
        if frames.unreadable or frames.missing:
            lost = frames.unreadable + round(frames.missing * frames.rate)
            warn(f"{path} is damaged or cut off: {frames.decoded} frames decoded, about {lost} lost")


def sample_frames(frames, fps, height, width, start, count):
    """Yield at most `count` pictures (height, width, 3): what is on screen at start, start + 1 / fps, ... seconds."""
    aspect = float(frames.stream.sample_aspect_ratio or 1)
    k, shown, shown_since, picture = 0, None, 0.0, None
    for time, frame in frames.decode_from(start):
        if shown is None and frame is not None:
            warn_of_misreading(frames.path, frame)
        if frame is None and shown_since == 0:
            count = 1  # the file is a still picture
        if shown is not None and time - shown_since > LONGEST_STILL:
            seconds = time - shown_since
            raise UserError(f"{frames.path} shows one frame for {seconds:.0f} s: its time stamps are damaged")
        while shown is not None and k < count and start + k / fps < time - frames.tolerance:
            picture = crop_and_resize(shown, height, width, aspect) if picture is None else picture
            yield picture
            k += 1
        if k == count:
            break
        shown, shown_since, picture = frame, time, None
    if k == 0:
        raise UserError(
            f"{frames.path} lasts {time:.2f} s, so nothing is on screen at start = {start} s: start earlier"
        )


def warn_of_misreading(path, frame):
    """Warn if the first frame of a video says that it will be read wrongly."""
    if frame.color_trc in HDR:
        kind = HDR[frame.color_trc]
        warn(f"{path} is HDR, {kind}, and is read as if it were SDR: convert it first, or colours are wrong")
    if frame.interlaced_frame:
        warn(f"{path} is interlaced, and is read as it is: deinterlace it first, or moving edges look like combs")


def has_sound(path):
    """Whether a video has a sound track. Raises UserError."""
    container = open_container(path)
    with container:
        return bool(container.streams.audio)


def video_info(path):
    """dict(seconds float, frames int or None, height int, width int, fps float) of a video. Raises UserError.

    height and width are as shown: after rotation, with square pixels. fps is the average. Decodes one frame.
    """
    with open_frames(path) as frames:
        _, frame = next(frames.decode_from(0.0))
        seconds = frames.stated or (frames.container.duration or 0) / av.time_base
        if not seconds:  # not stated, as in a browser's recording: read all packets
            deque(frames.packets(), maxlen=0)
            seconds = frames.covered
        height, width = frame.height, round(frame.width * float(frames.stream.sample_aspect_ratio or 1))
        if orientation(frame)[0]:
            height, width = width, height
        return dict(seconds=seconds, frames=frames.stream.frames or None, height=height, width=width, fps=frames.rate)
