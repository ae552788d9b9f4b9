"""What users ran into, one test per kind of fault: the smallest input of each, and others of the same kind.

Files of the user's, one bad file among many, sampling.
"""

import json
import math
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import pretrain
import sample
from eval import main as eval_main
from tests.common import flags, greys, listing, losses, run, tiny_base, write_checkpoint, write_video
from util import files
from util.cli import UserError
from util.files import atomic_write
from util.folder import copy_history, find_videos
from util.video import read_video, video_info
from util.weights import weight_files

DEEP = "[" * 100_000
LONG = "9" * 5000


def content(*paths):
    return [Path(path).read_bytes() for path in paths]


# ---------------------------------------------------------------------------------------------------------------------
# 1. A file of the user's is never written over or deleted


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".gif"])
def test_the_contact_sheet_spares_a_picture_of_that_name(suffix, refused):
    photo, photo2 = (f"{name}{suffix}.png".replace(".mp4", "") for name in ("photo", "photo2"))  # p.gif has p.gif.png
    for name in (photo, photo2):
        Image.fromarray(greys(1, 32, 32).numpy()[0]).save(name)
    write_video("clip.mp4")
    common = "--checkpoint", write_checkpoint(), "--seconds=2", "--steps=1"
    assert f"{photo} would be written over" in refused(
        sample.main, *common, f"--history={photo}", f"--save_file=photo{suffix}"
    )
    Path(f"kept{suffix}").touch()
    for save in (f"photo2{suffix}", f"kept{suffix}"):
        assert "was not written by this program" in refused(
            sample.main, *common, "--history=clip.mp4", f"--save_file={save}"
        )


def test_commands_spare_their_inputs_and_what_they_did_not_write(refused):
    write_video("c.mp4", 40)
    checkpoint = write_checkpoint("m.safetensors", stage="pretrain")
    Path("v.md").write_text("a,b,winner\nx,y,x\n")
    Path("story.mp4").write_text("mine")
    Path("p.txt").write_text("mine")
    before = content("c.mp4", "m.safetensors", "v.md", "story.mp4", "p.txt")
    common = eval_main, "retrieval", "--history=c.mp4", f"--checkpoint={checkpoint}"
    assert "is an input" in refused(*common, "--out=c.mp4")
    assert "is an input" in refused(*common, "--out=m.safetensors")
    assert "v.md" in refused(eval_main, "elo", "v.md", "--out", "v.md")
    assert "story.mp4" in refused(data.main, "story", "--preset=nano", "--out=story.mp4")
    assert "p.txt" in refused(data.main, "story", "--preset=nano", "--out=p.mp4")
    assert content("c.mp4", "m.safetensors", "v.md", "story.mp4", "p.txt") == before


def test_a_long_prompt_is_no_path():
    write_video("clip.mp4", 12)
    common = "--history=clip.mp4", "--checkpoint", write_checkpoint(), "--seconds=2", "--steps=1"
    run(sample.main, *common, "--prompt", "she opens the door and steps outside " * 20)
    assert len(read_video("out/clip.mp4", 2, 32, 32)) == 12 + 4


def test_what_was_written_here_may_be_written_again_unless_it_was_changed():
    for text in ("one", "two"):
        with atomic_write("a.txt") as part:
            part.write_text(text)
    assert Path("a.txt").read_text() == "two"
    Path("a.txt").write_text("my own words")
    with pytest.raises(UserError, match="was changed since"):
        with atomic_write("a.txt") as part:
            part.write_text("three")
    assert Path("a.txt").read_text() == "my own words"


def test_a_cache_spares_a_folder_that_is_not_its_own(refused):
    for i in range(2):
        write_video(Path("videos") / f"{i}.mp4", 40, i)
    given = data.main, "cache", "--videos=videos", "--preset=tiny", "--device=cpu", "--out=out"
    Path("out").mkdir()
    Path("out/manifest.json").write_text('{"name": "a web page"}')
    assert "not a cache's manifest" in refused(*given)
    Path("out/manifest.json").unlink()
    Path("out/shard-0001-of-2.safetensors").touch()
    assert "shard-0001-of-2.safetensors" in refused(*given)
    assert listing("out") == ["shard-0001-of-2.safetensors"]


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", "..", "a/../../b.safetensors"])
def test_paths_in_a_manifest_or_an_index_stay_inside(name, refused, cache):
    for i in range(2):
        write_video(Path("videos") / f"{i}.mp4", 40, i)
    run(data.main, "cache", "--videos=videos", "--preset=tiny", "--device=cpu", "--out=c")
    manifest = json.loads(Path("c/manifest.json").read_text())
    next(iter(manifest["videos"].values()))[0][0] = name
    Path("c/manifest.json").write_text(json.dumps(manifest))
    assert "c/manifest.json is damaged" in refused(pretrain.main, *flags(cache, data="c", out="r"))
    Path("w").mkdir()
    Path("w/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="leads out of w|not found in w"):
        weight_files("w")


# ---------------------------------------------------------------------------------------------------------------------
# 2. One bad file does not end a run of thousands


BAD_CAPTIONS = {
    "deep": DEEP,
    "long": f'[[{LONG}, "x"]]',
    "huge": f'[[1{"0" * 400}, "x"]]',
    "far": '[[0, "a"], [1e308, "x"]]',
    "nan": '[[NaN, "x"]]',
    "bytes": b"\xff\xfe\x00",
    "object": '{"a": 1}',
    "nothing": "",
}


@pytest.mark.parametrize("command", ["train", "cache"])
@pytest.mark.parametrize("kind", [*BAD_CAPTIONS, "error"])
def test_one_bad_file_is_counted_and_the_run_goes_on(kind, command, monkeypatch, capsys):
    for i in range(6):
        write_video(Path("videos") / f"{i}.mp4", 10, i)
        Path("videos", f"{i}.txt").write_text("waves")
    if kind == "error":  # any exception while one frame is read

        def fail(*given, real=data.read_clip, **more):
            if "3.mp4" in str(given[0]):
                raise ValueError("a frame of another kind")
            return real(*given, **more)

        monkeypatch.setattr("util.latents.read_clip", fail)
        monkeypatch.setattr("util.cache.video_info", fail_info)
    else:
        text = BAD_CAPTIONS[kind]
        Path("videos/3.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    if command == "train":
        run(pretrain.main, *flags("c0", data="videos", out="r", steps=1, batch=2))
        assert len(losses("r")) == 1
    else:
        run(data.main, "cache", "--videos=videos", "--preset=tiny", "--device=cpu", "--out=c")
        assert len(json.loads(Path("c/manifest.json").read_text())["videos"]) == 5
    error = capsys.readouterr().err
    assert error.count("skipped: ") == 1 and "3." in error.split("skipped: ")[1].split("\n")[0]


def fail_info(path):
    if "3.mp4" in str(path):
        raise ValueError("a stream of another kind")
    return video_info(path)


def test_a_file_name_that_is_not_utf8(cache, capsys):
    for i in range(6):
        write_video(Path("videos") / f"{i}.mp4", 10, i)
    try:
        os.rename(b"videos/3.mp4", b"videos/v\xff.mp4")
    except OSError:
        pytest.skip("this file system wants UTF-8")
    assert len(find_videos("videos")) == 6
    run(pretrain.main, *flags(cache, data="videos", out="r", steps=1, batch=2))
    run(data.main, "cache", "--videos=videos", "--preset=tiny", "--device=cpu", "--out=c")
    assert len(losses("r")) == 1 and Path("c/manifest.json").is_file()


def test_side_data_of_an_unknown_kind():
    """EXIF in an MJPEG: PyAV raises ValueError on frame.side_data."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3)).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 1
    picture.save("a.jpg", exif=exif)
    assert read_video("a.jpg", 2, 32, 48).shape == (1, 32, 48, 3)


# ---------------------------------------------------------------------------------------------------------------------
# 3. and 7. Sampling loses nothing, and its memory does not grow with the history


@pytest.mark.skipif(os.name == "nt", reason="sends signals")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_sampling_keeps_its_sections(number, code, capsys, monkeypatch):
    write_video("clip.mp4", 12)
    sections = []

    def interrupt(*given, real=sample.to_frames):
        sections.append(1)
        if len(sections) == 3:
            os.kill(os.getpid(), number)
        return real(*given)

    monkeypatch.setattr(sample, "to_frames", interrupt)
    with pytest.raises(SystemExit) as stop:
        run(sample.main, "--history=clip.mp4", "--checkpoint", write_checkpoint(), "--seconds=60", "--steps=1")
    assert stop.value.code == code and "stopped after 2 of 30 sections" in capsys.readouterr().out
    assert len(read_video("out/clip.mp4", 2, 32, 32)) == 12 + 2 * 4 and Path("out/clip.png").is_file()


@pytest.mark.parametrize(
    "error, says",
    [
        (torch.OutOfMemoryError("no room."), "no room."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."), "can't allocate memory"),
        (MemoryError("no room."), "no room."),
        (None, "not finite"),
    ],
)
def test_a_failing_sampling_keeps_its_sections(error, says, capsys, monkeypatch):
    write_video("clip.mp4", 12)
    made = []

    def fail(*given, real=sample.sample):
        made.append(1)
        if len(made) == 3:
            if error:
                raise error
            return real(*given) * math.nan
        return real(*given)

    monkeypatch.setattr(sample, "sample", fail)
    with pytest.raises(SystemExit) as stop:
        run(sample.main, "--history=clip.mp4", "--checkpoint", write_checkpoint(), "--seconds=60", "--steps=1")
    printed = capsys.readouterr()
    assert stop.value.code == 1 and says in printed.err and "stopped after 2 of 30 sections" in printed.out
    assert len(read_video("out/clip.mp4", 2, 32, 32)) == 12 + 2 * 4


@pytest.mark.skipif(os.name == "nt", reason="sends signals")
def test_a_stopped_sampling_spares_the_video_from_before(capsys, monkeypatch):
    write_video("clip.mp4", 12)
    common = "--history=clip.mp4", "--checkpoint", write_checkpoint(), "--steps=1"
    run(sample.main, *common, "--seconds=2")
    before = content("out/clip.mp4", "out/clip.png")

    def interrupt(*given, real=sample.SectionSheet.add):
        real(*given)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(sample.SectionSheet, "add", interrupt)
    for name in ("clip_stopped", "clip_stopped2"):
        with pytest.raises(SystemExit) as stop:
            run(sample.main, *common, "--seconds=60")
        printed = capsys.readouterr()
        assert stop.value.code == 130 and f"wrote out/{name}.mp4 and out/{name}.png" in printed.out
        assert "stopped by Ctrl-C" in printed.err
        assert len(read_video(f"out/{name}.mp4", 2, 32, 32)) == 12 + 4 and Path(f"out/{name}.png").is_file()
    assert content("out/clip.mp4", "out/clip.png") == before


@pytest.mark.skipif(os.name == "nt", reason="sends signals")
def test_a_signal_while_the_video_gets_its_name_waits(capsys, monkeypatch):
    """A second Ctrl-C, say."""

    def interrupt(path, real=files._record):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # Python runs the handler now
        real(path)

    monkeypatch.setattr(files, "_record", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_video("clip.mp4", 12)
    assert len(read_video("clip.mp4", 2, 32, 32)) == 12 and listing(".") == ["clip.mp4"]


def test_seconds_that_make_no_section_are_refused_first(refused):
    write_video("clip.mp4", 12)
    Path("keep.mp4").write_text("mine")
    common = sample.main, "--history=clip.mp4", "--checkpoint", write_checkpoint(), "--save_file=keep.mp4"
    for seconds in ("1e-7", "1e-300", "0"):
        assert "--seconds" in refused(*common, f"--seconds={seconds}")


def test_memory_does_not_grow_with_the_history():
    """No more frames are held than memory and contact sheet need, however long the clip; all are written."""
    base, held, written = tiny_base(), [], []
    frame = np.zeros((32, 32, 3), np.uint8)

    class Writer:
        def write(self, frames):
            written.append(len(frames))

    class Frame(np.ndarray):
        alive = 0

        def __array_finalize__(self, other):
            Frame.alive += 1

        def __del__(self):
            Frame.alive -= 1

    def frames(n):
        for _ in range(n):
            held.append(Frame.alive)
            yield frame.view(Frame).copy()

    history = copy_history(frames(2000), Writer(), base, 10)
    assert history.frames == sum(written) == 2000 and len(history.remembered) == 40
    assert max(held) < 120 and len(history.newest) == 48  # 12 sections of 4 frames
