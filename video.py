"""Video files: reading, writing, finding; files that appear whole; and the strips of frames that previews are."""
import errno
import hashlib
import math
import os
import re
import shutil
from collections import deque
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import Interpolation
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError

from flags import warn
from model import UserError

# FFmpeg's default conversion from YUV is fast and 1 level of 255 too dark; this one is right within 1.
EXACT = Interpolation.POINT | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
MOST_PIXELS = 2**26     # of a frame, 8192 x 8192: a header may claim any size, and memory holds a frame several times
READING = 1             # raise it when read_video() makes other frames of a file: caches are then made again
LONGEST_STILL = 3600    # seconds that one frame may stay: a broken time stamp would fill the memory with copies of it
VIDEO_SUFFIXES = {".mp4", ".mov", ".webm", ".mkv", ".gif", ".avi", ".m4v"}

# ---------------------------------------------------------------------------------------------------------------------
# Reading


class _Frames:
    """The decoded frames of one file, in order of time. Damage is counted, not raised.

    decoded, unreadable: frames decoded and packets that could not be; missing: seconds cut off at the end.
    """

    def __init__(self, path):
        """path: a video file. Raises UserError if it cannot be opened or holds no moving picture."""
        self.path, self.origin, self.first = path, None, None
        self._open()

    def _open(self):
        if not os.path.isfile(self.path):
            what = "is a folder" if os.path.isdir(self.path) else "does not exist"
            raise UserError(f"{self.path} {what}: give the path of a video file")
        try:  # "file:" keeps FFmpeg from reading "12:30.mp4" as a network address
            self.container = av.open(f"file:{self.path}", metadata_errors="replace")
        except (av.FFmpegError, OSError) as error:
            raise UserError(f"{self.path} cannot be read as a video ({error.strerror or error}): "
                            "give a complete video file, for example .mp4") from None
        if self.container.format.name == "tty":  # FFmpeg draws a .txt as a picture
            self.close()
            raise UserError(f"{self.path} is a text, not a video: give a video file, for example .mp4")
        cover = av.stream.Disposition.attached_pic  # the cover of a music file is no video
        streams = [s for s in self.container.streams.video if s.codec_context and not s.disposition & cover]
        if not streams:
            self.close()
            raise UserError(f"{self.path} has no video stream that can be decoded (only sound?): give another file")
        self.stream = streams[0]
        self.stream.thread_type = "AUTO"
        self.decoder = self.stream.codec_context
        if self.decoder.width * self.decoder.height > MOST_PIXELS:
            self.close()
            raise UserError(f"{self.path} is {self.decoder.width} x {self.decoder.height} pixels, too many to decode: "
                            "make it smaller")
        aspect = self.stream.sample_aspect_ratio
        if aspect and not 0.1 < aspect < 10:
            self.close()
            raise UserError(f"{self.path} has pixels {float(aspect):g} times as wide as high: it is damaged")
        keeps_alpha = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(self.decoder.name)  # FFmpeg's own decoders drop it
        if keeps_alpha and self.stream.metadata.get("alpha_mode") == "1":
            self.decoder = av.CodecContext.create(keeps_alpha, "r")
        self.tick = float(self.stream.time_base)
        self.rate = float(self.stream.average_rate or self.stream.guessed_rate or 25)
        self.stated = self._stated_seconds()
        # Time stamps are rounded to ticks (10 ms in a gif), so half a tick late is not late. An avi's tick is a
        # whole frame, hence the limit.
        self.grace = min(self.tick / 2, 0.005) + 1e-6

    def close(self):
        self.container.close()

    def _stated_seconds(self):
        """How long the file says the stream is, in seconds, or None. (The container's figure counts the sound too.)"""
        if self.stream.duration:
            return self.stream.duration * self.tick
        tag = re.fullmatch(r"(\d+):(\d+):([\d.]+)", self.stream.metadata.get("DURATION", ""))  # mkv, webm: its end
        if tag:
            hours, minutes, seconds = map(float, tag.groups())
            return 3600 * hours + 60 * minutes + seconds - (self.stream.start_time or 0) * self.tick

    def packets(self):
        """Compressed packets, then an empty one, on which the decoder gives out the frames it still holds."""
        self.covered = 0.0  # seconds of the stream that were really there
        try:
            for packet in self.container.demux(self.stream):
                # mp4 states its length in decoding times, mkv in showing times
                self.first = self.first or (packet.pts, packet.dts)
                for stamp, first in zip((packet.pts, packet.dts), self.first):
                    if stamp is not None and first is not None:
                        self.covered = max(self.covered, (stamp - first + (packet.duration or 0)) * self.tick)
                yield packet
        except av.FFmpegError:
            self.unreadable += 1
            yield None

    def walk(self):
        """Yield (seconds since the file's first frame, av.VideoFrame) from here on, and at last (end, None)."""
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
                time = max(time, now)  # a stamp that runs backwards is a broken one
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
            else:  # a frame's own duration is unreliable where times vary; the whole stream's is not
                end = min(self.stated, self.covered)
        yield max(end - self.grace, now + 2 * self.grace), None  # the end is rounded too

    def near(self, start):
        """walk() from a frame at or before `start` seconds, by a jump where the file allows one."""
        walk = self.walk()
        first = next(walk, None)
        if first is None:
            raise UserError(f"not one frame of {self.path} can be decoded: the file is damaged or cut off")
        if start > 1:
            try:
                self.container.seek(int((self.origin + start) / self.tick), stream=self.stream)
                self.decoder.flush_buffers()
                jumped = self.walk()
                landed = next(jumped, None)
            except av.FFmpegError:
                landed = None
            if landed is not None and landed[0] <= start:
                return chain([landed], jumped)
            self.close()  # no index, or a wrong one: from the beginning, then
            self._open()
            walk = self.walk()
            first = next(walk)
        return chain([first], walk)


@contextmanager
def _frames_of(path):
    """A _Frames that is closed at the end, its errors being the user's."""
    frames = _Frames(path)
    try:
        yield frames
    except av.FFmpegError as error:
        raise UserError(f"{path} cannot be decoded ({error.strerror}): give another file") from None
    finally:
        frames.close()


def _upright(frame):
    """Is the frame shown (transposed, flipped left-right, flipped upside down)? Phones say so in a display matrix.

    frame.rotation is not used: it takes a mirrored picture for one turned by 180 degrees.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()  # x' = a x + c y, y' = b x + d y
    return (True, c < 0, b < 0) if abs(b) > abs(a) else (False, a < 0, d < 0)


def _fit(frame, height, width, pixel_aspect):
    """av.VideoFrame -> (height, width, 3) uint8: upright, alpha over white, covering the size, the middle kept.

    pixel_aspect: width / height of one stored pixel. White, since pages are where transparent pictures are seen.
    """
    picture = frame.to_ndarray(format="rgba", interpolation=EXACT)
    alpha = picture[..., 3:]
    if alpha.min() < 255:
        picture = (picture[..., :3] * (alpha / 255) + (255 - alpha) + 0.5).astype(np.uint8)
    picture = picture[..., :3]
    transposed, mirrored, upside_down = _upright(frame)
    if transposed:
        picture, pixel_aspect = picture.swapaxes(0, 1), 1 / pixel_aspect
    picture = picture[::-1 if upside_down else 1, ::-1 if mirrored else 1]
    h, w = picture.shape[:2]
    scale = max(height / h, width / (w * pixel_aspect))
    crop_h, crop_w = height / scale, width / scale / pixel_aspect
    top, left = int((h - crop_h) / 2), int((w - crop_w) / 2)
    # Box = the exact mean where a whole number of pixels becomes one, as in what VideoWriter enlarged; elsewhere it
    # would leave steps, and bicubic (widened by the factor, so antialiased) does not.
    whole = all(abs(n / m - round(n / m)) < 1e-6 and n > m - 1e-6 for n, m in ((crop_h, height), (crop_w, width)))
    picture = Image.fromarray(np.ascontiguousarray(picture)).resize(
        (width, height), Image.Resampling.BOX if whole else Image.Resampling.BICUBIC,
        box=(left, top, min(w, left + crop_w), min(h, top + crop_h)))
    return np.array(picture)


def read_video(path, fps, height, width, start=0.0, seconds=None):
    """Read a video -> (F, height, width, 3) uint8, frame k being what was on screen `start + k / fps` seconds in.

    Time counts from the first frame and is taken from the time stamps, never from the nominal rate. seconds: read at
    most so much. Where the file is shorter, fewer frames come back (a still gives one). A damaged file gives what can
    be decoded and a warning on stderr.
    Raises UserError (a ValueError) for a file that cannot be read, or that ends before `start`.
    """
    for name, value in {"fps": fps, "height": height, "width": width, "seconds": seconds}.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name} is {value}: give a number above 0")
    if not 0 <= start < math.inf:
        raise UserError(f"start is {start}: give a number of seconds, 0 or more")
    count = math.inf if seconds is None else max(1, math.ceil(seconds * fps - 1e-6))
    kept = []
    with _frames_of(path) as frames:
        aspect = float(frames.stream.sample_aspect_ratio or 1)
        k, shown, shown_since, picture = 0, None, 0.0, None
        for time, frame in frames.near(start):
            if frame is None and shown_since == 0:
                count = 1  # the file is one picture
            if shown is not None and time - shown_since > LONGEST_STILL:
                raise UserError(f"{path} shows one frame for {time - shown_since:.0f} s: its time stamps are damaged")
            while shown is not None and k < count and start + k / fps < time - frames.grace:
                picture = _fit(shown, height, width, aspect) if picture is None else picture
                kept.append(picture)
                k += 1
            if k == count:
                break
            shown, shown_since, picture = frame, time, None
        if not kept:
            raise UserError(f"{path} lasts {time:.2f} s, so nothing is on screen at start = {start} s: start earlier")
        if frames.unreadable or frames.missing:
            lost = frames.unreadable + round(frames.missing * frames.rate)
            warn(f"{path} is damaged or cut off: {frames.decoded} frames decoded, about {lost} lost")
    return torch.from_numpy(np.stack(kept))


def video_info(path):
    """A video's dict(seconds, frames, height, width, fps), decoding one frame: float, int or None, int, int, float.

    height and width are as shown (after rotation, with square pixels); fps is the average. Raises UserError.
    """
    with _frames_of(path) as frames:
        _, frame = next(frames.near(0.0))
        seconds = frames.stated or (frames.container.duration or 0) / av.time_base
        if not seconds:  # recorded by a browser, say: add up the packets
            deque(frames.packets(), maxlen=0)
            seconds = frames.covered
        height, width = frame.height, round(frame.width * float(frames.stream.sample_aspect_ratio or 1))
        if _upright(frame)[0]:
            height, width = width, height
        return dict(seconds=seconds, frames=frames.stream.frames or None, height=height, width=width, fps=frames.rate)


def find_videos(folder):
    """All video files below a folder, sorted; hidden ones (macOS leaves ._x.mp4) are not. Raises UserError if none."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is not a folder: give a folder of videos")
    found = sorted(path for path in Path(folder).rglob("*")
                   if path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith(".") and path.is_file())
    if not found:
        raise UserError(f"{folder} holds no video: put files in it that end in {' '.join(sorted(VIDEO_SUFFIXES))}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def file_hash(path):
    """SHA-256 of a file's content, as hexadecimal text."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def part_folder(path):
    """Make the folder of `path`, and one in it for a temporary file. Raises UserError where nothing can be written."""
    folder = path.with_name(f".{path.name}.{os.getpid()}.part")     # of its own: safetensors has temporary files too
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise UserError(f"{path} cannot be written ({error.strerror}): give one in a folder you may write to") from None
    return folder


@contextmanager
def whole_file(path):
    """Makes the folder and gives a temporary path near `path`: flushed and renamed at the end, removed on an exception,
    so that `path` is always the old file or the whole new one. Raises OSError where the disk does not take it."""
    path = Path(path)
    folder = part_folder(path)
    temporary = folder / f".{path.name}"
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        temporary.chmod(folder.stat().st_mode & 0o666)              # as any new file; safetensors makes private ones
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        # safetensors has a name of its own for a full disk; PyTorch closes its file, which fails once more
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, (OSError, SafetensorError)):
            raise
        raise OSError(f"{path} cannot be written ({getattr(cause, 'strerror', None) or cause}); "
                      "what was there stays as it was") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder):
    """Remove what processes that were killed in whole_file() left in a folder that nobody else writes to now."""
    for part in Path(folder).glob(".*.[0-9]*.part"):
        shutil.rmtree(part, ignore_errors=True)


class VideoWriter:
    """Writes a video section by section: `with VideoWriter(path, fps, height, width) as w: w.write(frames)`.

    path ends in .mp4, .mov or .mkv (H.264, plays everywhere) or .gif. height, width: of the frames given. scale: the
    whole factor to enlarge by (nearest neighbour); by default the largest that keeps the short side within 512.
    Nothing appears at `path` before the end, and nothing at all on an exception. Raises UserError.
    """

    def __init__(self, path, fps, height, width, scale=None):
        self.path, self.size, self.gif = Path(path), (height, width), Path(path).suffix.lower() == ".gif"
        self.scale = scale or max(1, 512 // min(height, width))
        if not self.gif and self.path.suffix.lower() not in {".mp4", ".mov", ".mkv"}:
            raise UserError(f"{path}: a video is written as .mp4, .mov, .mkv or .gif; change the suffix")
        if not 0 < fps <= (50 if self.gif else 1000):
            raise UserError(f"fps is {fps}: give a number above 0" + ", at most 50 for a gif" * self.gif)
        part_folder(self.path).rmdir()              # refuse now what cannot be written, not after hours of sampling
        # Players stutter, or drop the last picture, at the 2 fps of the nano preset: show each frame several times.
        self.times = 1 if self.gif else math.ceil(8 / fps)
        self.rate = Fraction(fps).limit_denominator(1001) * self.times
        self.count = 0

    def __enter__(self):
        with ExitStack() as stack:
            temporary = stack.enter_context(whole_file(self.path))
            options = {"movflags": "faststart"} if self.path.suffix.lower() in {".mp4", ".mov"} else {}
            self.container = stack.enter_context(av.open(f"file:{temporary}", "w", options=options))
            height, width = (n * self.scale if self.gif else n * self.scale + n * self.scale % 2 for n in self.size)
            self.stream = self.container.add_stream("gif" if self.gif else "libx264", rate=self.rate)
            self.stream.height, self.stream.width = height, width
            self.stream.pix_fmt = "pal8" if self.gif else "yuv420p"
            if not self.gif:
                self.stream.options = {"crf": "16"}
                context = self.stream.codec_context  # say what the numbers mean, or players guess: BT.709, 16-235
                context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
            self.stack = stack.pop_all()
        return self

    def write(self, frames):
        """frames: (F, H, W, 3) uint8, tensor or array; may be called many times."""
        frames = torch.as_tensor(frames)
        if frames.dtype != torch.uint8 or tuple(frames.shape[1:]) != (*self.size, 3):
            raise ValueError(f"frames are {tuple(frames.shape)} {frames.dtype}, expected (F, {self.size}, 3) uint8")
        for frame in frames.cpu().numpy():
            picture = self._gif_frame(frame) if self.gif else self._h264_frame(frame)
            picture.time_base = 1 / self.rate
            for _ in range(self.times):
                picture.pts = self.count
                self.count += 1
                self.container.mux(self.stream.encode(picture))

    def _h264_frame(self, frame):
        """(H, W, 3) uint8 -> enlarged av.VideoFrame."""
        frame = frame.repeat(self.scale, 0).repeat(self.scale, 1)
        frame = np.pad(frame, [(0, n % 2) for n in frame.shape[:2]] + [(0, 0)], mode="edge")  # 4:2:0 needs even sizes
        return av.VideoFrame.from_ndarray(frame).reformat(
            format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG",
            interpolation="AREA")  # the default lets colour leak into the next enlarged pixel

    def _gif_frame(self, frame):
        """(H, W, 3) uint8 -> enlarged av.VideoFrame."""
        small = Image.fromarray(frame).quantize(256)  # every frame has its own best 256 colours
        colours = np.array(small.getpalette("RGB"), np.uint8).reshape(-1, 3)
        palette = np.full((256, 4), 255, np.uint8)  # alpha, red, green, blue
        palette[:len(colours), 1:] = colours
        pixels = np.array(small).repeat(self.scale, 0).repeat(self.scale, 1)
        return av.VideoFrame.from_ndarray((pixels, palette), "pal8")

    def __exit__(self, *exception):
        if exception[0] is not None:
            return self.stack.__exit__(*exception)
        with self.stack:  # closes the container, then gives the file its name
            if not self.count:
                raise ValueError(f"no frame was written to {self.path}")
            self.container.mux(self.stream.encode(None))


def contact_sheet(rows, columns=None, scale=None):
    """A picture of labelled rows of frames on white, each label at the left of its row: uint8 (H, W, 3) array.

    rows: list of (label, frames (F, H, W, 3) uint8); columns: a caption above each column; scale: the whole factor to
    enlarge by (nearest neighbour), by default the largest that keeps a frame's short side within 128.
    """
    labels, captions = [str(label) for label, _ in rows], [str(caption) for caption in columns or []]
    rows = [torch.as_tensor(frames).cpu().numpy() for _, frames in rows]
    scale = scale or max(1, 128 // min(min(frames.shape[1:3]) for frames in rows))
    cell_h, cell_w = (scale * max(frames.shape[axis] for frames in rows) for axis in (1, 2))
    font = ImageFont.load_default(size=min(40, max(14, cell_h // 8)))
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    label_w, caption_w = (max([0, *(math.ceil(ruler.multiline_textbbox((0, 0), text, font=font)[2]) for text in texts)])
                          for texts in (labels, captions))
    gap, margin = max(2, cell_h // 40), max(6, cell_h // 16)
    step_x, step_y = max(cell_w, caption_w + margin) + gap, cell_h + gap
    left = margin + (label_w + margin if label_w else 0)
    top = margin + (font.size + margin if captions else 0)
    n = max([len(captions), *map(len, rows)])
    sheet = Image.new("RGB", (left + n * step_x - gap + margin, top + len(rows) * step_y - gap + margin), "white")
    draw = ImageDraw.Draw(sheet)
    for i, caption in enumerate(captions):
        draw.text((left + i * step_x + (step_x - gap) / 2, margin), caption, "black", font, anchor="ma")
    for r, (label, frames) in enumerate(zip(labels, rows)):
        draw.multiline_text((margin, top + r * step_y + cell_h / 2), label, "black", font, anchor="lm")
        for i, frame in enumerate(frames):
            picture = Image.fromarray(frame.repeat(scale, 0).repeat(scale, 1))
            sheet.paste(picture, (left + i * step_x + (step_x - gap - picture.width) // 2,
                                  top + r * step_y + (cell_h - picture.height) // 2))
    return np.array(sheet)


def contact_strip(rows, path, columns=None, scale=None):
    """Write a contact_sheet() as a PNG. Raises UserError."""
    sheet = Image.fromarray(contact_sheet(rows, columns, scale))
    with whole_file(path) as temporary:
        sheet.save(temporary, format="PNG")
