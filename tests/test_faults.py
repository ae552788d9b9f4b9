"""What users ran into, one test per kind of fault: the smallest input of each, and others of the same kind."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import finetune
import pretrain
import sample
from eval import main as eval_main
from tests.common import (
    ROOT,
    flags,
    greys,
    listing,
    losses,
    run,
    tiny_base,
    write_checkpoint,
    write_raw,
    write_video,
)
from util import files
from util.cli import UserError, protect_output
from util.files import LOCK, atomic_write, parse_json
from util.folder import copy_history, find_videos
from util.storyboard import parse_storyboard
from util.video import read_video, video_info
from util.weights import load_weights, read_config, weight_files

DEEP = "[" * 100_000
LONG = "9" * 5000


def content(*paths):
    return [Path(path).read_bytes() for path in paths]


# ---------------------------------------------------------------------------------------------------------------------
# 1. A file of the user's is never written over or deleted


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".gif"])
def test_the_contact_sheet_spares_a_picture_of_that_name(suffix, refused):
    Image.fromarray(greys(1, 32, 32).numpy()[0]).save("photo.png")
    Image.fromarray(greys(1, 32, 32).numpy()[0]).save("photo2.png")
    write_video("clip.mp4")
    common = "--checkpoint", write_checkpoint(), "--seconds=2", "--steps=1"
    assert "photo.png would be written over" in refused(
        sample.main, *common, "--history=photo.png", f"--save_file=photo{suffix}"
    )
    for name in ("photo2.png", "kept" + suffix):
        Path(name).touch()
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


# ---------------------------------------------------------------------------------------------------------------------
# 4. No wrong result without a word


@pytest.mark.parametrize(
    "text, board",
    [
        ("[0s: a] [4s: b]", [(0, "a"), (4, "b")]),
        ("a [1s: b]", [(0, "a"), (1, "b")]),
        ("0s-3s: a", [(0, "a")]),
        ("0-3s: a / 3 - 6.5 s: b", [(0, "a"), (3, "b")]),
        ("0s: a, 4s: b", [(0, "a"), (4, "b")]),
        ("0s: a man, tall, / 4s: b", [(0, "a man, tall,"), (4, "b")]),
        ("00:04 a", [(4, "a")]),
        ("0:00 a\n1:04.5 b", [(0, "a"), (64.5, "b")]),
        ("[00:00] a\n[00:04] b", [(0, "a"), (4, "b")]),
        ("00:00 - 00:04 a\n00:04 - 00:08 b", [(0, "a"), (4, "b")]),
        ("1\n00:00:01,000 --> 00:00:04,000\na\nb\n\n2\n00:01:05,500 --> 00:01:06,000\nc", [(1, "a b"), (65.5, "c")]),
        ("WEBVTT\n\n00:01.000 --> 00:04.000\na", [(1, "a")]),
        ("a 16:9 picture of a clock", [(0, "a 16:9 picture of a clock")]),
        ("10:30 in the morning, a train arrives", [(0, "10:30 in the morning, a train arrives")]),
        ("a 5s exposure, then a 3s one", [(0, "a 5s exposure, then a 3s one")]),
        ("0s: a/4s: b", [(0, "a"), (4, "b")]),
        ("0s: a // 4s: b", [(0, "a"), (4, "b")]),
        ("0s a / 4s b", [(0, "a"), (4, "b")]),
        ("0s - a / 4s - b", [(0, "a"), (4, "b")]),
        ("0: a / 4: b", [(0, "a"), (4, "b")]),
        ("0 to 4 seconds: a\n4 to 8 seconds: b", [(0, "a"), (4, "b")]),
        ("4 sec: a", [(4, "a")]),
        ("0s: a; 4s: b | 8s: c", [(0, "a"), (4, "b"), (8, "c")]),
        ("00:00: a / 00:04: b", [(0, "a"), (4, "b")]),
        ("[0-4s] a", [(0, "a")]),
        ("[0-4s] a [4-8s] b", [(0, "a"), (4, "b")]),
        ("(2s) a (4s) b", [(2, "a"), (4, "b")]),
        ("[1:02:03] a", [(3723, "a")]),
        ('[[0, "a"], [4, "b"]]', [(0, "a"), (4, "b")]),
        ('[{"start": 0, "text": "a"}]', [(0, "a")]),
        ("1 00:00:01,000 --> 00:00:04,000 a 2 00:00:05,000 --> 00:00:06,000 b", [(1, "a"), (5, "b")]),
        ("0s: a 1/4s exposure (30), 16:9 / 4s: b", [(0, "a 1/4s exposure (30), 16:9"), (4, "b")]),
        ("0.5s exposure of a street", [(0, "0.5s exposure of a street")]),
        ("a 3:2 clip (10s) of 2 dogs / 3 cats", [(0, "a 3:2 clip (10s) of 2 dogs / 3 cats")]),
        ("1. a man\n2. a dog", [(0, "1. a man 2. a dog")]),
        ("24/7 diner, 5s-long shot", [(0, "24/7 diner, 5s-long shot")]),
    ],
)
def test_prompts_by_time_in_other_notations(text, board):
    assert parse_storyboard(text) == board


@pytest.mark.parametrize(
    "text",
    ["at 3 sec: a then 5 sec: b", "1m: a", "from 00:10 a to 00:20 b", "0s a, 4s b", "0s a 4s b", "1: a / 2: b"]
    + ["a [4s] b", "0-4s a. 4-8s b"],
)
def test_texts_that_seem_to_hold_times_are_refused(text):
    with pytest.raises(UserError, match="seems to hold times"):
        parse_storyboard(text)


@pytest.mark.parametrize("transfer, name", [("smpte2084", "PQ"), ("arib-std-b67", "HLG")])
def test_hdr_is_named(transfer, name, capsys):
    options = {"color_trc": transfer}
    with av.open("hdr.mkv", "w") as container:
        stream = container.add_stream("ffv1", rate=2)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p10le"
        stream.codec_context.color_trc = {"smpte2084": 16, "arib-std-b67": 18}[transfer]
        for _ in range(2):
            frame = av.VideoFrame(32, 32, "yuv420p10le")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    read_video("hdr.mkv", 2, 32, 32)
    error = capsys.readouterr().err
    assert error.count("warning") == 1 and f"hdr.mkv is HDR, {name}" in error, options


def test_interlaced_clips_are_named(capsys):
    with av.open("tv.mpg", "w") as container:
        stream = container.add_stream("mpeg2video", rate=25, options={"flags": "+ilme+ildct"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for frame in greys(5, 64, 64).numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode(None))
    read_video("tv.mpg", 25, 32, 32)
    assert "tv.mpg is interlaced" in capsys.readouterr().err


def test_untagged_hd_is_read_as_players_show_it():
    """BT.709 from 720 rows on, BT.601 below: the same numbers are another green."""
    for height in (720, 718):
        frame = np.zeros((height, 1280, 3), np.uint8) + np.array([0, 255, 0], np.uint8)
        write_raw(f"{height}.mkv", [frame], "ffv1", "yuv444p")  # written by FFmpeg's default, BT.601
    hd, sd = (read_video(f"{height}.mkv", 1, 4, 4)[0, 0, 0].int() for height in (720, 718))
    assert (sd - torch.tensor([0, 255, 0])).abs().max() <= 2 and (hd - sd).abs().max() > 10


def test_sound_is_said_to_be_dropped(capsys):
    write_video("clip.mp4", 12)
    write_with_sound("with.mkv")
    run(sample.main, "--history=with.mkv", "--checkpoint", write_checkpoint(), "--seconds=2", "--steps=1")
    assert "the sound of with.mkv is not copied" in capsys.readouterr().err
    run(sample.main, "--history=clip.mp4", "--checkpoint=tiny.safetensors", "--seconds=2", "--steps=1")
    assert "sound" not in capsys.readouterr().err


def write_with_sound(path):
    """A small video beside a moment of silence."""
    with av.open(path, "w") as container:
        video, sound = (
            container.add_stream("ffv1", rate=2),
            container.add_stream("pcm_s16le", rate=16000, layout="mono"),
        )
        video.width, video.height, video.pix_fmt = 32, 32, "bgr0"
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        silence.sample_rate = 16000
        for frame in greys(12, 32, 32).numpy():
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(sound.encode(silence))
        for stream in (video, sound):
            container.mux(stream.encode(None))


def test_rates_are_normalised(cache):
    run(pretrain.main, *flags(cache, out="a", rate="2X2X02", steps=1))
    assert read_config("a/model.safetensors")["rate"] == "2x2x2"
    run(finetune.main, *flags(cache, out="b", encoder="a", rate="2x2x2", steps=1))


def test_more_queries_than_frames_are_refused(refused, cache):
    checkpoint = write_checkpoint("m.safetensors", stage="pretrain")
    given = eval_main, "retrieval", f"--checkpoint={checkpoint}", f"--cache={cache}", "--clips=2"
    assert "--queries 100: a history has 40 frames" in refused(*given, "--queries=100")


DAMAGED_STATES = {
    "nan in ema": lambda s: s["ema"][0].fill_(math.nan),
    "shape in ema": lambda s: s["ema"].__setitem__(0, torch.zeros(3)),
    "short ema": lambda s: s["ema"].pop(),
    "no optimizers": lambda s: s.update(optimizers=[]),
    "optimizers none": lambda s: s.update(optimizers=None),
    "optimizers dict": lambda s: s.update(optimizers={}),
    "empty optimizer": lambda s: s["optimizers"].__setitem__(0, {}),
    "nan in optimizer": lambda s: next(iter(s["optimizers"][0]["state"].values()))["momentum"].fill_(math.nan),
    "shape in optimizer": lambda s: next(iter(s["optimizers"][0]["state"].values())).update(momentum=torch.ones(1, 2)),
    "no stage": lambda s: s.pop("stage"),
    "step x": lambda s: s.update(step="x"),
    "step -5": lambda s: s.update(step=-5),
    "step 1.5": lambda s: s.update(step=1.5),
    "step true": lambda s: s.update(step=True),
    "config list": lambda s: s.update(config=[1]),
    "model none": lambda s: s.update(model=None),
}


@pytest.mark.parametrize("kind", DAMAGED_STATES)
def test_a_damaged_state_is_refused(kind, stage1, refused, cache):
    shutil.copytree(stage1, "run")
    state = torch.load("run/state.pt")
    DAMAGED_STATES[kind](state)
    torch.save(state, "run/state.pt")
    assert "run/state.pt" in refused(pretrain.main, *flags(cache, out="run", steps=41, resume=True))


def test_a_resume_takes_another_path_of_the_same_file(cache, refused):
    run(finetune.main, *flags(cache, out="base", method="none", steps=1))
    run(pretrain.main, *flags(cache, out="r", init="base/model.safetensors", steps=1))
    shutil.copytree("base", "other")
    given = dict(out="r", steps=2, resume=True)
    assert "--init base/model.safetensors, not other" in refused(
        pretrain.main, *flags(cache, init="other/model.safetensors", **given)
    )
    run(pretrain.main, *flags(cache, init=Path("base/model.safetensors").resolve(), **given))
    assert len(losses("r")) == 2


def test_a_wrong_size_in_a_manifest_is_named(cache, capsys):
    for i in range(2):
        write_video(Path("videos") / f"{i}.mp4", 40, i)
    run(data.main, "cache", "--videos=videos", "--preset=tiny", "--device=cpu", "--out=c")
    manifest = json.loads(Path("c/manifest.json").read_text())
    for windows in manifest["videos"].values():
        windows[0][3:] = 16, 4
    Path("c/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit) as stop:
        run(pretrain.main, *flags(cache, data="c", out="r", batch=1))
    assert stop.value.code == 2 and "the manifest says (40, 16, 4)" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# 5. No traceback for odd data


@pytest.mark.parametrize(
    "text", [DEEP, LONG, f'{{"step": {LONG}}}', b"\xff\xfe", "null", "[1]", '{"step": "one"}', "{}"]
)
def test_odd_json_is_one_line(text):
    with pytest.raises(UserError, match="log.jsonl is damaged: delete it"):
        parse_json(text, "log.jsonl", "delete it", step=int)


@pytest.mark.parametrize("line", [b"\xff\n", b'{"step": "one"}\n', b"null\n", b"[1]\n", b'{"step": true}\n'])
def test_an_odd_log_is_one_line(line, stage1, refused, cache):
    shutil.copytree(stage1, "run")
    with open("run/log.jsonl", "ab") as log:
        log.write(line)
    assert "log.jsonl is damaged" in refused(pretrain.main, *flags(cache, out="run", steps=41, resume=True))


ODD_MANIFESTS = [5, [[5]], [["a.safetensors", 5]], {"a": 1}, None]
ODD_MANIFESTS += [[["0" * 24 + "-0.safetensors", 9, frames, 8, 8]] for frames in ("x", -3, 10**6, 1.5, True, None)]


@pytest.mark.parametrize("entry", ODD_MANIFESTS, ids=str)
def test_odd_manifests_are_one_line(entry, refused, cache):
    for i in range(2):
        write_video(Path("videos") / f"{i}.mp4", 40, i)
    run(data.main, "cache", "--videos=videos", "--preset=tiny", "--device=cpu", "--out=c")
    manifest = json.loads(Path("c/manifest.json").read_text())
    manifest["videos"][next(iter(manifest["videos"]))] = entry
    Path("c/manifest.json").write_text(json.dumps(manifest))
    assert "error: " in refused(pretrain.main, *flags(cache, data="c", out="r"))


ODD_CLAIMS = [dict(preset=["nano"]), dict(preset=5), dict(rate=4), dict(rate="axb"), dict(seed=None), dict(seed="a")]
ODD_CLAIMS += [dict(window="w"), dict(step=0.5), dict(method=None), dict(method="magic")]


@pytest.mark.parametrize("claims", ODD_CLAIMS, ids=str)
def test_odd_metadata_is_one_line(claims, refused):
    write_video("clip.mp4", 12)
    state, config = load_file(write_checkpoint()), read_config("tiny.safetensors")
    save_file(state, "odd.safetensors", {"config": json.dumps(config | claims)})
    assert "error: " in refused(sample.main, "--history=clip.mp4", "--checkpoint=odd.safetensors", "--steps=1")


@pytest.mark.parametrize("config", ["", "[]", "5", DEEP, '{"stage": 1, "preset": "tiny"}'])
def test_odd_configs_are_one_line(config, refused):
    write_video("clip.mp4", 12)
    save_file({"a": torch.zeros(1)}, "odd.safetensors", {"config": config})
    assert "odd.safetensors" in refused(sample.main, "--history=clip.mp4", "--checkpoint=odd.safetensors", "--steps=1")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.int8, torch.bool])
def test_weights_in_other_dtypes_are_refused(dtype):
    module = torch.nn.Linear(2, 2)
    save_file({"weight": torch.ones(2, 2).to(dtype), "bias": torch.ones(2)}, "w.safetensors")
    with pytest.raises(UserError, match="weight is .*, which is not read: give the file in bf16, fp16 or fp32"):
        load_weights(module, ["w.safetensors"])


def test_a_process_without_its_group(refused, cache, monkeypatch):
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert "RANK is set but WORLD_SIZE is not" in refused(pretrain.main, *flags(cache, out="r"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes pipes and links")
def test_paths_that_are_no_files(refused):
    os.mkfifo("pipe")
    os.symlink("nowhere", "broken")
    os.symlink("loop", "loop")
    for name in ("pipe", "broken", "loop"):
        assert f"{name} is no regular file" in refused(
            sample.main, "--checkpoint", write_checkpoint(), f"--history={name}"
        )
    os.mkfifo("pipe.txt")
    write_video("clip.mp4", 12)
    common = sample.main, "--history=clip.mp4"
    assert "pipe.txt cannot be read (it is no file)" in refused(
        *common, "--checkpoint=tiny.safetensors", "--prompt=pipe.txt"
    )
    assert "pipe is a pipe" in refused(*common, "--checkpoint=pipe")


def test_prompts_that_may_be_meant_otherwise_are_named(capsys):
    Path("beach").mkdir()
    Path("empty.txt").write_text("# nothing yet\n")
    assert parse_storyboard("beach") == [(0, "beach")]
    assert "the prompt beach is taken as words, not as the file or folder" in capsys.readouterr().err
    assert parse_storyboard("empty.txt") == []
    assert "empty.txt holds no prompt" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# 6. Printing never ends a run


def shell(*argv, env=None, **more):
    """A script in a process of its own, at the project's root."""
    return subprocess.run(
        [sys.executable, *map(str, argv)], env={**os.environ, **(env or {})}, cwd=ROOT, capture_output=True, **more
    )


@pytest.mark.parametrize(
    "env", [dict(PYTHONIOENCODING="cp1252"), dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")], ids=str
)
def test_terminals_that_are_not_utf8(env):
    for script in ("finetune.py", "pretrain.py", "sample.py"):
        done = shell(script, "--help", env=env)
        assert done.returncode == 0 and b"--preset" in done.stdout and not done.stderr, done.stderr


@pytest.mark.skipif(os.name == "nt", reason="closes streams as a shell does")
@pytest.mark.parametrize("closing", ["2>&-", ">&-", ">&- 2>&-", "| true"])
def test_closed_streams(closing):
    command = f"{sys.executable} sample.py --help {closing}"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=ROOT, stderr=subprocess.PIPE)
    assert done.returncode == 0 and b"Traceback" not in done.stderr


def test_printing_what_no_terminal_has(capfdbinary, monkeypatch):
    class Broken:
        def write(self, text):
            raise OSError("no space left")

        flush = write

    monkeypatch.setattr(sys, "stdout", Broken())
    protect_output()
    print("φ")


# ---------------------------------------------------------------------------------------------------------------------
# 8. Refused at the start


def test_the_default_checkpoint_is_found_from_anywhere(capsys):
    write_video("clip.mp4", 12)
    config = sample.SampleConfig(history="clip.mp4")
    base, trained = sample.check(config)
    assert base.name == trained["preset"] == "nano" and Path(config.checkpoint) == ROOT / sample.SampleConfig.checkpoint


def test_outputs_that_cannot_be_written_are_refused_before_the_work(refused, stage1_runs, stage2_runs, monkeypatch):
    monkeypatch.setattr("bench.runs.measure_runs", None)  # nothing may be measured
    Path("file").touch()
    for command, runs in ("table1", stage1_runs), ("table2", stage2_runs), ("story", stage2_runs):
        assert "file" in refused(eval_main, command, *sorted(runs.iterdir())[:1], "--out=file/out")


TOO_LONG = "x" * 300


@pytest.mark.parametrize(
    "main, given",
    [
        (sample.main, ["--history=clip.mp4", "--checkpoint=BAD"]),
        (sample.main, ["--history=clip.mp4", "--checkpoint=tiny.safetensors", "--save_file=BAD.mp4"]),
        (sample.main, ["--history=BAD.mp4", "--checkpoint=tiny.safetensors"]),
        (sample.main, ["--history=clip.mp4", "--checkpoint=tiny.safetensors", "--prompt=BAD.txt"]),
        (pretrain.main, ["--out=BAD"]),
        (pretrain.main, ["--out=BAD", "--resume"]),
        (pretrain.main, ["--init=BAD"]),
        (pretrain.main, ["--data=BAD"]),
        (pretrain.main, ["--cache=BAD"]),
        (finetune.main, ["--encoder=BAD"]),
        (data.main, ["story", "--out=BAD.mp4"]),
        (data.main, ["cache", "--videos=videos", "--out=BAD", "--preset=tiny"]),
        (data.main, ["cache", "--videos=BAD", "--out=out", "--preset=tiny"]),
        (eval_main, ["elo", "BAD"]),
        (eval_main, ["elo", "votes.csv", "--out=BAD.md"]),
        (eval_main, ["retrieval", "--checkpoint=BAD"]),
        (eval_main, ["table1", "BAD"]),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
@pytest.mark.parametrize("bad", [TOO_LONG, "file/inside", "broken/inside", "loop/inside"])
def test_paths_that_can_never_be_are_one_line(bad, main, given, refused, monkeypatch):
    monkeypatch.setattr("dolls.dataset.encode_frames", None)  # no story may be drawn first
    write_checkpoint()
    write_video("clip.mp4", 12)
    write_video("videos/clip.mp4", 40)
    for name in ("file", "votes.csv"):
        Path(name).write_text("a,b,winner\nx,y,x\n")
    os.symlink("nowhere", "broken")
    os.symlink("loop", "loop")
    if main in (pretrain.main, finetune.main):
        usual = dict(zip(*[iter(flags("cache", out="out"))] * 2))
        given = [*(f"{flag}={value}" for flag, value in usual.items()), *given]
    said = refused(main, *(flag.replace("BAD", bad) for flag in given))
    assert "[Errno" not in said and (bad[:9] in said or "broken" in said)


def test_a_folder_that_may_not_be_entered_is_one_line(refused, cache, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)  # as root may enter any
    assert "videos/manifest.json cannot be used (Permission denied): give another path" in refused(
        pretrain.main, *flags(cache, data="videos", out="r")
    )


def test_no_video_is_blamed_for_a_cache_that_cannot_be_written(capsys):
    for i in range(12):
        write_video(Path("videos") / f"{i}.mp4", 40, i)
    Path("file").touch()
    with pytest.raises(SystemExit) as stop:
        run(pretrain.main, *flags("file", data="videos", out="r"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("file is no folder") == 1 and "skipped" not in error


def test_a_run_folder_that_vanishes_is_one_line(cache, capsys, monkeypatch):
    def vanish(*given, real=pretrain.set_learning_rate):
        if given[1] == 1:
            shutil.rmtree("r")
        return real(*given)

    monkeypatch.setattr(pretrain, "set_learning_rate", vanish)
    with pytest.raises(SystemExit) as stop:
        run(pretrain.main, *flags(cache, out="r"))
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 1 and len(error) == 1 and "r cannot be written any more" in error[0]


# ---------------------------------------------------------------------------------------------------------------------
# Two runs with one --out


@pytest.fixture
def another_run(tmp_path):
    """another_run(statement): a process that runs it, prints a line and waits."""
    started = []

    def start(statement):
        script = f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\nfrom util.files import *\n{statement}\n"
        script += "print('locked', flush=True); time.sleep(60)"
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=tmp_path)
        started.append(process)
        assert process.stdout.readline() == b"locked\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_second_run_with_the_same_out_is_refused_before_its_work(cache, refused, another_run, monkeypatch):
    first = another_run("lock_folder('r')")
    for i in range(2):
        write_video(Path("videos") / f"{i}.mp4", 40, i)
    with monkeypatch.context() as m:
        m.setattr(pretrain, "make_model", None)
        m.setattr("util.cache.cache_video", None)
        assert "--out r is being written by another run" in refused(pretrain.main, *flags(cache, out="r"))
        common = data.main, "cache", "--videos=videos", "--preset=tiny", "--device=cpu"
        assert "--out r is being written by another run" in refused(*common, "--out=r")
    first.kill()  # the lock dies with its process
    first.wait()
    run(pretrain.main, *flags(cache, out="r", steps=1))
    assert len(losses("r")) == 1 and not Path("r", LOCK).exists()


def test_a_second_run_with_the_same_file_is_refused(refused, another_run):
    write_video("clip.mp4", 12)
    common = "--history=clip.mp4", "--checkpoint", write_checkpoint(), "--seconds=2", "--steps=1", "--save_file=o/a.mp4"
    first = another_run("writing = atomic_write('o/a.mp4'); writing.__enter__()")
    assert "o/a.mp4 is being written by another run" in refused(sample.main, *common)
    first.kill()
    first.wait()
    run(sample.main, *common)
    assert len(read_video("o/a.mp4", 2, 32, 32)) == 12 + 4


def test_a_refused_run_leaves_no_folder(cache, refused):
    refused(pretrain.main, *flags(cache, out="r", data="nowhere"))
    assert not Path("r").exists()
