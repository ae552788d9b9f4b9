"""Reading and writing video files, finding them, and contact sheets."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests.common import greys, levels, listing, write_raw, write_sound
from util.cli import UserError
from util.folder import find_videos, nearest_size, split_videos
from util.sheets import contact_sheet, save_contact_sheet
from util.video import read_video, to_frames, to_pixels, video_info
from util.video_writer import VideoWriter


def test_pixels_survive_the_file_boundary():
    frames = torch.arange(256).to(torch.uint8).view(1, 16, 16, 1).repeat(1, 1, 1, 3)
    pixels = to_pixels(frames)
    assert pixels.shape == (3, 1, 16, 16) and pixels.aminmax() == (-1, 1) and torch.equal(to_frames(pixels), frames)
    outside = torch.tensor([-5.0, -1, 1, 5]).view(1, 4, 1, 1).expand(3, 4, 1, 1)
    assert to_frames(outside)[:, 0, 0, 1].tolist() == [0, 0, 255, 255]


# ---------------------------------------------------------------------------------------------------------------------
# Time


@pytest.mark.parametrize("suffix", ["mp4", "gif", "mkv"])
@pytest.mark.parametrize("fps", [2, 8, 16, 30000 / 1001])
def test_what_is_written_is_read(tmp_path, suffix, fps):
    frames = torch.randint(0, 200, (12, 15, 18, 1), dtype=torch.uint8, generator=torch.manual_seed(0))
    frames = frames + torch.tensor([50, 20, 0], dtype=torch.uint8)
    path = tmp_path / "new" / f"a.{suffix}"  # the folder is made
    with VideoWriter(path, fps, 15, 18, scale=4) as w:
        w.write(frames[:5])
        w.write(frames[5:].numpy())
    again = read_video(path, fps, 15, 18)
    assert again.shape == frames.shape and again.dtype == torch.uint8
    assert (again.float() - frames.float()).abs().mean() < 2.5
    assert (again.float() - frames.float()).mean().abs() < 0.5  # FFmpeg's default conversion is 1.2 too dark
    assert listing(path.parent) == [f"a.{suffix}"]


@pytest.mark.parametrize("name", ["vfr.mp4", "vfr.mkv"])
def test_frames_are_sampled_by_time_stamps(tmp_path, name):
    """On screen from 0, 0.1, 1.1 and 1.2 s; the first stamp is not zero."""
    write_raw(tmp_path / name, greys(4), times=[500, 600, 1600, 1700])
    assert levels(read_video(tmp_path / name, 10, 16, 24)) == [0] + [1] * 10 + [2, 3]
    assert levels(read_video(tmp_path / name, 4, 16, 24, start=0.05, seconds=1.25)) == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
@pytest.mark.parametrize("step", [100, 500])
def test_an_avi_with_a_tick_of_a_millisecond_is_whole(codec, step, capsys):
    """Its packets have no durations, and its average rate is 1000."""
    write_raw("a.avi", greys(12), codec, times=[step * i for i in range(12)])
    assert len(read_video("a.avi", 1000 / step, 16, 24)) == 12
    assert video_info("a.avi")["fps"] == 1000 / step and not capsys.readouterr().err


def test_seeking_finds_the_same_frames(tmp_path):
    write_raw(tmp_path / "a.mp4", [greys(12)[i // 5 % 12] for i in range(60)], options={"g": "7"})
    whole = read_video(tmp_path / "a.mp4", 10, 16, 24)
    assert len(whole) == 60
    for k in (5, 23, 59):
        assert torch.equal(read_video(tmp_path / "a.mp4", 10, 16, 24, start=k / 10), whole[k:])
    with pytest.raises(UserError, match="6.00 s"):
        read_video(tmp_path / "a.mp4", 10, 16, 24, start=6.1)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def set_display_matrix(path, matrix):
    """Write (a, b, c, d), as phones do: x' = a x + c y, y' = b x + d y."""
    data = bytearray(path.read_bytes())
    a, b, c, d = (n << 16 for n in matrix)
    at = data.index(b"tkhd") + 44
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


TURNS = [
    ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
    ((0, -1, 1, 0), np.rot90),
    ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
    ((-1, 0, 0, 1), np.fliplr),
]


@pytest.mark.parametrize("matrix, turn", TURNS, ids=["right", "left", "upside-down", "mirrored"])
def test_rotation_and_mirroring(tmp_path, matrix, turn):
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:16, :32], picture[:16, 32:], picture[16:, :32] = 240, 160, 80
    write_raw(tmp_path / "a.mp4", [picture] * 2)
    set_display_matrix(tmp_path / "a.mp4", matrix)
    upright, info = turn(picture), video_info(tmp_path / "a.mp4")
    assert (info["height"], info["width"]) == upright.shape[:2]
    again = read_video(tmp_path / "a.mp4", 10, *upright.shape[:2])
    assert np.abs(again[0].numpy().astype(int) - upright).mean() < 4


@pytest.mark.parametrize("height, width", [(27, 33), (4, 4)])
@pytest.mark.parametrize(
    "name, codec, pix_fmt",
    [
        ("a.mkv", "ffv1", "gray"),
        ("a.mkv", "ffv1", "yuv420p10le"),
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
    ],
)
def test_formats_and_odd_and_tiny_sizes(tmp_path, name, codec, pix_fmt, height, width):
    write_raw(tmp_path / name, greys(4, height, width), codec, pix_fmt)
    assert levels(read_video(tmp_path / name, 10, 20, 8)) == [0, 1, 2, 3]
    info = video_info(tmp_path / name)
    assert (info["height"], info["width"]) == (height, width)


@pytest.mark.parametrize(
    "name, codec, pix_fmt",
    [("a.webm", "libvpx-vp9", "yuva420p"), ("a.mov", "qtrle", "argb"), ("a.gif", None, None)],
)
def test_alpha_is_laid_over_white(tmp_path, name, codec, pix_fmt):
    picture = np.zeros((16, 32, 4), np.uint8)
    picture[:, :16] = 200, 0, 0, 255
    if codec:
        write_raw(tmp_path / name, [picture] * 3, codec, pix_fmt, source="rgba")
    else:
        second = Image.fromarray(picture[:, ::-1])
        Image.fromarray(picture).save(tmp_path / name, save_all=True, append_images=[second])
    frame = read_video(tmp_path / name, 10, 16, 32)[0].int()
    assert (frame[8, 4] - torch.tensor([200, 0, 0])).abs().max() < 8 and frame[8, 28].min() > 247


@pytest.mark.parametrize("size", [20, 14])  # a whole factor, and none: either way the stripes must melt into grey
def test_resizing_fills_the_frame_and_crops_to_the_middle(tmp_path, size):
    picture = np.zeros((40, 100, 3), np.uint8)
    picture[:, 30:70] = np.where(np.arange(40) % 2, 255, 1)[None, :, None]  # stripes of one pixel, around the middle
    write_raw(tmp_path / "a.mkv", [picture], "ffv1", "bgr0")
    frame = read_video(tmp_path / "a.mkv", 30, size, size)
    assert frame.shape == (1, size, size, 3)  # and one picture is one frame
    assert (frame[:, :, 1:-1].float() - 128).abs().max() < 12


def test_pixels_that_are_not_square(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        picture = np.zeros((64, 32, 3), np.uint8)
        picture[:, :4] = 240  # a crop that took the pixels for square would keep this edge 4 wide, or lose it
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode(None))
    assert video_info(tmp_path / "a.mp4")["width"] == 64
    assert 7 <= (read_video(tmp_path / "a.mp4", 1, 64, 64)[0, 32, :, 0] > 120).sum() <= 9


# ---------------------------------------------------------------------------------------------------------------------
# Damage and errors


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_what_is_left_of_a_cut_file_is_read(tmp_path, name, capsys):
    noise = torch.randint(0, 256, (20, 32, 32, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
    if name == "a.mp4":
        with VideoWriter(tmp_path / name, 10, 32, 32, scale=1) as w:
            w.write(noise)
    else:
        write_raw(tmp_path / name, noise)
    data = (tmp_path / name).read_bytes()
    assert len(read_video(tmp_path / name, 10, 32, 32)) == 20 and not capsys.readouterr().err
    (tmp_path / f"cut_{name}").write_bytes(data[: len(data) * 6 // 10])
    assert 5 < len(read_video(tmp_path / f"cut_{name}", 10, 32, 32)) < 16
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and f"cut_{name}" in warning and "frames decoded" in warning
    (tmp_path / f"stub_{name}").write_bytes(data[:300])
    check_unreadable(tmp_path / f"stub_{name}")


def check_unreadable(path):
    for read in (lambda path: read_video(path, 2, 8, 8)), video_info:
        with pytest.raises(UserError) as error:
            read(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_video_is_named(tmp_path):
    write_sound(tmp_path / "sound.mp4")
    (tmp_path / "text.mp4").write_text("not a video\n" * 50)
    (tmp_path / "empty.mp4").touch()
    for name in "sound.mp4", "text.mp4", "empty.mp4", "missing.mp4", ".":
        check_unreadable(tmp_path / name)


@pytest.mark.parametrize("wrong", [dict(fps=0), dict(start=-1), dict(seconds=0), dict(seconds=float("nan"))])
def test_arguments_that_make_no_sense(tmp_path, wrong):
    write_raw(tmp_path / "a.mp4", greys(3))
    with pytest.raises(UserError, match=next(iter(wrong))):
        read_video(tmp_path / "a.mp4", **{"fps": 2, "height": 8, "width": 8, **wrong})


def test_nothing_is_left_half_written(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 2, 16, 24) as w:
        w.write(greys(1))
    before = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        with VideoWriter(tmp_path / "a.mp4", 2, 16, 24) as w:
            w.write(greys(3))
            raise KeyboardInterrupt
    assert listing(tmp_path) == ["a.mp4"] and (tmp_path / "a.mp4").read_bytes() == before
    (tmp_path / "b.mp4").write_text("somebody else's")
    with pytest.raises(UserError, match="was not written by this program"):
        VideoWriter(tmp_path / "b.mp4", 2, 16, 24)


def test_what_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "a.mp4").touch()
    for path in tmp_path / "a.mp4" / "b.mp4", tmp_path / "a.txt":  # a folder that is a file; an unknown suffix
        with pytest.raises(UserError):
            VideoWriter(path, 2, 16, 24)
    assert listing(tmp_path) == ["a.mp4"]


def test_the_writer_enlarges_and_refuses_other_sizes(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 2, 16, 24) as w:
        w.write(greys(2))
        with pytest.raises(ValueError, match="expected"):
            w.write(greys(2, 24, 16))
    info = video_info(tmp_path / "a.mp4")
    assert (info["height"], info["width"], info["seconds"]) == (512, 768, 1.0)
    assert info["fps"] >= 8  # players stutter at 2 frames per second


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def test_videos_are_found_below_a_folder(tmp_path):
    with pytest.raises(UserError, match="holds no video"):
        find_videos(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in "b.MP4", "sub/a.webm", "._b.mp4", "notes.txt":
        (tmp_path / name).touch()
    assert find_videos(tmp_path) == [tmp_path / "b.MP4", tmp_path / "sub" / "a.webm"]
    with pytest.raises(UserError, match="not a folder"):
        find_videos(tmp_path / "notes.txt")


def test_the_nearest_size_is_that_of_the_nearest_aspect_ratio():
    sizes = (480, 832), (832, 480), (624, 624)
    for height, width, nearest in ((1080, 1920, 0), (1920, 1080, 1), (100, 90, 2), (90, 100, 2)):
        assert nearest_size(sizes, dict(height=height, width=width)) == sizes[nearest]


def test_one_video_in_ten_is_held_out():
    assert split_videos(["a"]) == (["a"], ["a"])  # a lone one is in both
    for n in (2, 5, 200):
        names = [f"{i}.mp4" for i in range(n)]
        train, held_out = split_videos(names)
        assert sorted([*train, *held_out]) == sorted(names) and train and held_out
    assert 10 <= len(held_out) <= 30
    assert set(held_out) <= set(split_videos([*names, "another.mp4"])[1])  # it does not move the others


# ---------------------------------------------------------------------------------------------------------------------
# Contact sheets


def test_a_contact_sheet_shows_every_frame_in_its_row_and_column():
    sheet = contact_sheet([("one", greys(3)), ("two", greys(5))], columns=["0 s", "1 s"], scale=2)
    assert sheet.dtype == np.uint8 and (sheet[[0, -1]] == 255).all() and (sheet[:, [0, -1]] == 255).all()

    def places(level):
        """(top, left) of the frames of this level of grey, each 32 x 48 pixels."""
        shown = (sheet == 20 * level).all(-1)
        corners = shown & ~np.roll(shown, 1, 0) & ~np.roll(shown, 1, 1)
        return [(y, x) for y, x in np.argwhere(corners).tolist() if shown[y : y + 32, x : x + 48].all()]

    lefts = []
    for level in (1, 2):
        (top1, left1), (top2, left2) = places(level)
        assert left1 == left2 and top2 > top1 + 32
        lefts.append(left1)
    for level in (3, 4):
        ((top, left),) = places(level)
        assert top == top2
        lefts.append(left)
    steps = np.diff(lefts)
    assert steps.min() == steps.max() > 48  # the columns are evenly spaced


def test_a_contact_sheet_is_saved_as_it_is(tmp_path):
    rows, path = [("one\nof two lines", greys(3))], tmp_path / "new" / "a.png"
    save_contact_sheet(rows, path)
    assert np.array_equal(np.array(Image.open(path).convert("RGB")), contact_sheet(rows))
    assert listing(path.parent) == ["a.png"]
