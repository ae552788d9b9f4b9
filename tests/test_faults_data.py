"""What users ran into, one test per kind of fault: the smallest input of each, and others of the same kind.

What would give a wrong result, and odd data.
"""

import json
import math
import os
import shutil
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
import finetune
import pretrain
import sample
from eval import main as eval_main
from tests.common import flags, greys, losses, run, tiny_base, tiny_encoder, write_checkpoint, write_raw, write_video
from util.cli import UserError
from util.files import parse_json
from util.video import read_video
from util.weights import load_weights, read_config

DEEP = "[" * 100_000
LONG = "9" * 5000


# ---------------------------------------------------------------------------------------------------------------------
# 4. No wrong result without a word


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
    assert stop.value.code == 2 and "is damaged: delete it, run data.py cache" in capsys.readouterr().err


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


ODD_WINDOWS = {
    "channels": lambda t: t.update(latents=t["latents"][:8]),
    "nan": lambda t: t["latents"].fill_(math.nan),
    "whole numbers": lambda t: t.update(latents=t["latents"].long()),
    "frames of low": lambda t: t.update({"low.4x4x2": t["low.4x4x2"][:, :5]}),
    "size of low": lambda t: t.update({"low.4x4x2": t["low.4x4x2"][..., :1]}),
    "dimensions of low": lambda t: t.update({"low.4x4x2": t["low.4x4x2"][0]}),
    "no low": lambda t: t.pop("low.4x4x2"),
    "words": lambda t: t.update({"text.0": torch.zeros(25, 16)}),
    "no words": lambda t: t.update({"text.0": torch.zeros(0, 16)}),
    "width of words": lambda t: t.update({"text.0": torch.zeros(2, 15)}),
    "infinite words": lambda t: t["text.0"].fill_(math.inf),
}


@pytest.mark.parametrize("kind", ODD_WINDOWS)
def test_odd_windows_are_one_line(kind):
    write_video("videos/0.mp4", 40)
    Path("videos/0.txt").write_text("waves")
    run(data.main, "cache", "--videos=videos", "--preset=tiny", "--device=cpu", "--out=c")
    clip, base, phi = data.cached_clips("c", tiny_base(), 1)[0][0], tiny_base(), tiny_encoder()

    def read():
        return clip.cut(0, 40), clip.load_low(phi), clip.text(0, base.prompts)

    assert [x.shape for x in read()] == [(1, 16, 40, 8, 8), (1, 16, 40, 2, 2), (1, 24, 16)]
    with safe_open(clip.file, framework="pt") as f:
        tensors, metadata = {name: f.get_tensor(name) for name in f.keys()}, f.metadata()
    ODD_WINDOWS[kind](tensors)
    save_file({name: x.contiguous() for name, x in tensors.items()}, clip.file, metadata)
    with pytest.raises(UserError, match="is damaged: delete it, run data.py cache"):
        read()


@pytest.mark.parametrize("rate, says", [("32x4x2", "more than twice a frame"), ("4x4x8", "T may be at most 4")])
def test_rates_too_large_for_a_cache_are_refused(rate, says, refused):
    given = "--videos=nowhere", "--out=c", "--preset=tiny", "--device=cpu"
    assert says in refused(data.main, "cache", *given, f"--rates=4x4x2 {rate}")


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
    assert "pipe cannot be read (it is no file)" in refused(eval_main, "elo", "pipe")
    given = "--videos=.", "--out=c", "--preset=tiny", "--device=cpu"
    assert "--captions pipe cannot be read" in refused(data.main, "cache", *given, "--captions=pipe")
    os.mkfifo(".clip2.mp4.lock")
    save = "--checkpoint=tiny.safetensors", "--save_file=clip2.mp4", "--seconds=2", "--steps=1"
    assert ".clip2.mp4.lock is no file" in refused(*common, *save)
