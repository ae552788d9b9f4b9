"""Broken and hostile files are named, and neither run code nor take memory."""

import json
import math
import os
import shutil
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
from PIL import Image

import data
import pretrain
from data import story_clips
from encoder import MemoryDiT
from tests.common import ROOT, flags, greys, tiny_base, write_raw, write_sound, write_video
from util.cli import UserError
from util.video_writer import VideoWriter


class Bomb:
    """A pickle of this makes a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


# ---------------------------------------------------------------------------------------------------------------------
# Videos


def write_huge(path):
    """A small gif that claims to be of 16000 x 16000 pixels."""
    with VideoWriter(path, 2, 32, 32) as w:
        w.write(greys(10, 32, 32))
    content = bytearray(path.read_bytes())
    content[6:10] = struct.pack("<HH", 16000, 16000)
    path.write_bytes(content)


def write_thin(path):
    """A video whose pixels are 20 times as high as wide."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=2)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(1, 20)
        for frame in greys(10, 32, 32).numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode(None))


def write_broken(folder):
    """Ten files that are no usable videos -> their names."""
    good = (folder / "good0.mp4").read_bytes()
    Image.new("RGB", (32, 32)).save(folder / "picture.mp4", format="png")
    (folder / "truncated.mp4").write_bytes(good[: len(good) // 8])
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("not a video\n" * 50)
    write_video(folder / "one.mp4", 1)
    write_sound(folder / "sound.mp4")
    write_huge(folder / "huge.gif")
    torch.save(Bomb(), folder / "pickle.mp4")
    write_thin(folder / "thin.mp4")
    write_raw(folder / "late.mkv", greys(12, 32, 32), "ffv1", "bgr0", times=[*range(0, 5500, 500), 10**9])
    mp4 = {f"{name}.mp4" for name in ("picture", "truncated", "empty", "text", "one", "sound", "pickle", "thin")}
    return mp4 | {"huge.gif", "late.mkv"}


def test_a_folder_of_broken_videos(tmp_path, capsys):
    folder, base = tmp_path / "videos", tiny_base()
    for i in range(40):  # the same few under many names
        if i < 4:
            write_video(folder / f"good{i}.mp4", 10 + i, i)
        else:
            shutil.copy(folder / f"good{i % 4}.mp4", folder / f"good{i}.mp4")
    write_raw(folder / "odd.mkv", greys(12, 33, 35), "ffv1", "bgr0", times=[500 * i for i in range(12)])
    broken = write_broken(folder)
    write_cache = ["--videos", str(folder), "--out", "cache", "--preset", "tiny"]

    def check_skipped():
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped: ")]
        assert len(lines) == 10 and all(any(name in line for line in lines) for name in broken), lines

    train, held_out = data.video_clips(folder, base, tmp_path / "latents")
    check_skipped()
    frames = sorted(clip.frames for clip in [*train.clips, *held_out.clips])
    assert frames == sorted([*range(10, 14)] * 10 + [12])  # nothing in the place of what was skipped
    data.cache(write_cache)
    check_skipped()
    train, held_out = data.cached_clips("cache", base, 99)
    assert sorted(clip.frames for clip in [*train.clips, *held_out.clips]) == frames
    for i in range(10):
        (folder / f"good{i}.mp4").unlink()
    with pytest.raises(UserError, match="10 of 41 videos"):
        data.video_clips(folder, base, tmp_path / "latents")
    with pytest.raises(UserError, match="9 of 41 videos"):
        data.cache(write_cache)
    assert not Path("exploded").exists()


def test_a_damaged_cache_is_named(cache):
    shutil.copytree(cache, "cache")
    for path in Path("cache").glob("world-train-8-*"):  # of latents, and of `low` at several rates
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="world-train-8-.* is damaged: delete it"):
        story_clips("train", 8, tiny_base(), "cache", (2, 4, 4))


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def lying_header(shape, size):
    """The start of a safetensors file whose header claims a tensor of this shape."""
    header = json.dumps({"head.head.bias": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header


READ_LIARS = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import bases, model
from util.cli import UserError
from util.weights import read_config

base = bases.open_base("nano")

def load(path):
    base.load_dit(model.DiT(base.dit), path)

held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 2**28, held + 2**28))
for i in range(4):
    for read in read_config, load:
        try:
            read(f"{i}.safetensors")
        except UserError as e:
            print(e)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads the memory in use from /proc")
def test_weights_that_claim_terabytes_take_no_memory():
    """In a process of its own that may take 256 MiB more than it holds."""
    contents = [struct.pack("<Q", 2**42) + b"{}", struct.pack("<Q", 2**63 - 1) + b" " * 99]
    contents += [lying_header([2**40], 2**42) + bytes(64), lying_header([2**40], 64) + bytes(64)]
    for i, content in enumerate(contents):
        Path(f"{i}.safetensors").write_bytes(content)
    command = [sys.executable, "-c", READ_LIARS, str(ROOT)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is not a readable safetensors file") == 8, done.stdout


BIAS = "dit.head.head.bias"


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda s: s["model"].pop(BIAS), BIAS),
        (lambda s: s["model"].update(spare=torch.ones(2)), "spare"),
        (lambda s: s["model"].update({BIAS: torch.ones(1).expand(2**40)}), BIAS),
        (lambda s: s["model"][BIAS].fill_(math.nan), BIAS),
        (lambda s: s.pop("ema"), "its ema is missing or no list"),
        (lambda s: s.update(bomb=Bomb()), "cannot be read"),
        ("truncated", "cannot be read"),
        ("empty", "cannot be read"),
    ],
)
def test_a_hostile_state_changes_nothing(damage, says, stage1, refused, cache, monkeypatch):
    shutil.copytree(stage1, "run")
    path = Path("run/state.pt")
    if callable(damage):
        state = torch.load(path)
        damage(state)
        torch.save(state, path)
    else:
        path.write_bytes(path.read_bytes()[:-100] if damage == "truncated" else b"")
    loaded = []
    monkeypatch.setattr(MemoryDiT, "load_state_dict", lambda *a, **k: loaded.append(a))
    assert says in refused(pretrain.main, *flags(cache, out="run", steps=41, resume=True))
    assert not loaded and not Path("exploded").exists()
