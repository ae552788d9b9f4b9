"""Command lines: a user's mistake is one line, exit code 2, and leaves no file; help; exit codes."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import finetune
import pretrain
import sample
from model import DiT
from tests.common import ROOT, flags, randomize, run, script, tiny_base, write_checkpoint, write_sound, write_video
from tests.test_hostile import Bomb
from util.cli import field_help

data_main, eval_main = script("data"), script("eval")


# ---------------------------------------------------------------------------------------------------------------------
# sample.py


def write_bad_videos():
    """Files that are no usable videos -> their names, with those of a folder and of a file that is not there."""
    write_video("good.mp4")
    Path("text.mp4").write_text("not a video\n" * 50)
    Path("text.txt").write_text("not a video\n" * 50)  # FFmpeg would draw it
    Path("empty.mp4").touch()
    Path("cut.mp4").write_bytes(Path("good.mp4").read_bytes()[:300])
    write_sound("sound.mp4")
    return "missing.mp4", "text.mp4", "text.txt", "empty.mp4", "cut.mp4", "sound.mp4", "."


def test_sample_refuses_bad_histories(refused):
    checkpoint = write_checkpoint()
    for name in write_bad_videos():
        assert name in refused(sample.main, "--checkpoint", checkpoint, "--history", name)
    assert "--history" in refused(sample.main, "--checkpoint", checkpoint)
    for file, says in ("./good.mp4", "is an input"), ("a.avi", "a.avi"):
        given = "--checkpoint", checkpoint, "--history", "good.mp4", "--save_file", file
        assert says in refused(sample.main, *given)


def test_sample_refuses_bad_settings(refused):
    write_video("good.mp4")
    Path("times.txt").write_text("0s: a cat\n0s: a dog")
    common = [sample.main, "--checkpoint", write_checkpoint(), "--history", "good.mp4"]
    assert "times.txt, line 2" in refused(*common, "--prompt", "times.txt")
    assert "none.txt" in refused(*common, "--prompt", "none.txt")
    assert "--guidance" in refused(*common, "--guidence", "2")
    settings = [("--steps", 0), ("--seconds", 0), ("--seconds", "nan"), ("--shift", 0), ("--guidance", -1)]
    settings += [("--memory_seconds", -1), ("--seconds", 1e9), ("--preset", "small"), ("--steps", "ten")]
    settings += [("--solver", "runge"), ("--device", "abacus"), ("--device", "")]
    for flag, value in settings:
        assert flag.strip("-") in refused(*common, f"{flag}={value}")
    for low, high in (0.9, 0.2), (0.5, 0.5), (-0.1, 1), (0, 1.5), ("nan", 1), (0, "high"):
        assert "--guidance_interval" in refused(*common, "--guidance_interval", low, high)
    assert "expected 2" in refused(*common, "--guidance_interval", 0.5)
    for given in ("--negative", "x"), ("--cfg_zero",), ("--guidance_interval", 0, 0.5):
        assert f"{given[0]} does nothing with --guidance 1" in refused(*common, "--guidance", 1, *given)


def test_sample_refuses_bad_checkpoints(refused):
    write_video("good.mp4")
    torch.save(Bomb(), "pickle.safetensors")

    def damage(state):
        state["dit.head.head.bias"].fill_(math.nan)

    for path, says in (
        (write_checkpoint("nan.safetensors", change=damage), "dit.head.head.bias"),
        (write_checkpoint("rate.safetensors", rate="2x2x2"), "encoder.hr.convs"),
        (write_checkpoint("width.safetensors", preset="nano"), "has shape (48,), expected (256,)"),
        (write_checkpoint("stage.safetensors", stage="pretrain"), "pretrain"),
        ("pickle.safetensors", "pickle.safetensors"),
        ("missing.safetensors", "missing.safetensors"),
        (".", "is a folder"),
    ):
        assert says in refused(sample.main, "--checkpoint", path, "--history", "good.mp4")
    assert not Path("exploded").exists()


def test_sample_refuses_flags_that_do_nothing(refused):
    write_video("a.mp4")
    common = [sample.main, "--history", "a.mp4"]
    trained = [*common, "--checkpoint", write_checkpoint()]
    for given in ("--init", "base"), ("--merge",), ("--vae", "vae"), ("--t5", "t5"):
        assert " ".join((*given, "does nothing")) in refused(*trained, *given)
    assert "suffix" in refused(*trained, "--save_file", "a.png")
    # before the model is loaded
    assert "a.mp4/b.mp4 cannot be written" in refused(*trained, "--save_file", "a.mp4/b.mp4", "--device", "cpu")
    assert "drop one" in refused(*common, "--init", "random", "--checkpoint", "b")
    given = "--init", "random", "--preset", "tiny", "--prompt", "x"
    assert "--prompt does nothing for random weights" in refused(*common, *given)
    given = "--init", "random", "--preset", "tiny", "--negative", "x"
    assert "--negative does nothing for random weights" in refused(*common, *given)
    assert "--seed" in refused(*common, "--seed", 2**64)


def run_out_of_memory(*given):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nA second line")


def test_what_does_not_fit_the_memory_is_one_line(capsys, monkeypatch):
    write_video("good.mp4")
    monkeypatch.setitem(sample.SOLVERS, "euler", "tests.test_refusals.run_out_of_memory")
    with pytest.raises(SystemExit) as stop:
        run(sample.main, "--history", "good.mp4", "--checkpoint", write_checkpoint(), "--save_file", "made/a.mp4")
    said = capsys.readouterr().err
    assert stop.value.code == 1 and "error: CUDA out of memory. Tried to allocate 9 GiB. Train with" in said
    assert "Traceback" not in said and not [p for p in Path("made").rglob("*") if p.is_file()]


def test_the_model_waits_elsewhere_while_a_large_codec_works(monkeypatch):
    """What is moved where, and when; the GPU is only a name here."""
    moved, gpu, cpu = [], SimpleNamespace(type="cuda"), SimpleNamespace(type="cpu")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: moved.append("room"))
    for large, device in (True, gpu), (False, gpu), (True, cpu):
        model = SimpleNamespace(
            to=lambda where: moved.append(getattr(where, "type", where)),
            parameters=lambda device=device: iter([SimpleNamespace(device=device)]),
        )
        with sample.make_room(model, SimpleNamespace(large=large)):
            moved.append("decode")
    assert moved == ["cpu", "room", "decode", "cuda", "decode", "cuda", "decode", "cpu"]


def test_sample_writes_nothing_that_is_not_finite(capsys):
    write_video("good.mp4")
    checkpoint = write_checkpoint(change=lambda state: state["dit.head.head.weight"].fill_(3e38))
    with pytest.raises(SystemExit) as stop:
        run(sample.main, "--history", "good.mp4", "--checkpoint", checkpoint, "--save_file", "made/a.mp4")
    assert (
        stop.value.code == 1 and f"error: {checkpoint} generated numbers that are not finite" in capsys.readouterr().err
    )
    assert not [p for p in Path("made").rglob("*") if p.is_file()]


# ---------------------------------------------------------------------------------------------------------------------
# pretrain.py, finetune.py


@pytest.mark.parametrize(
    "flag, value, says",
    [
        ("preset", "nanoo", "nano"),
        ("method", "propsed", "proposed"),
        ("method", "sliding-window", "finetune.py"),
        ("method", "keyframes", "finetune.py"),
        ("method", "none", "finetune.py"),
        ("rate", "3x3x3", "--rate"),
        ("rate", "4x4x2+2x2x8", "--rate 2x2x8"),
        ("rate", "4x4x2+2x2x2+1x1x1", "takes two, joined by +"),
        ("window", -1, "--window"),
        ("window", 3, "finetune.py"),
        ("steps", 0, "--steps"),
        ("step", 3, "--steps"),
        ("batch", 0, "--batch"),
        ("mask", "blur", "--mask"),
        ("init", "nowhere", "nowhere"),
        ("data", "nowhere", "nowhere"),
        ("device", "abacus", "abacus"),
        ("vae", "v", "drop it"),
        ("lora", -1, "--lora"),
        ("lora", 2, "--lora 0"),
        ("lr", "fast", "lr"),
        ("lr", -1, "--lr"),
        ("warmup", -1, "--warmup"),
        ("clip_grad", "inf", "--clip_grad"),
        ("t_mean", "nan", "--t_mean"),
        ("t_std", "nan", "--t_std"),
        ("text_drop", 7, "--text_drop"),
        ("ema", 3, "--ema"),
        ("sample_shift", 0, "--sample_shift"),
        ("seed", -1, "--seed -1"),
        ("queries", 41, "--queries 41: a history has 40 frames"),
        ("data", "", "--data is empty"),
        ("method", "", "--method is empty"),
    ],
)
def test_pretrain_refuses_bad_settings(flag, value, says, refused, cache):
    assert says in refused(pretrain.main, *flags(cache, out="out", **{flag: value}))


def test_an_empty_path_is_not_the_current_folder(refused, cache):
    assert "--cache is empty" in refused(pretrain.main, *flags("", out="out"))
    assert "--out is empty" in refused(pretrain.main, *flags(cache, out=""))
    assert "--checkpoint is empty" in refused(sample.main, "--checkpoint=")


def test_stages_refuse_settings_that_do_not_fit_together(refused, cache):
    assert "nowhere" in refused(pretrain.main, *flags("fresh", init="nowhere"))  # and no stories were drawn for it
    assert "8x8 tokens" in refused(pretrain.main, *flags(cache, preset="nano", rate="32x1x1"))
    assert "drop it" in refused(finetune.main, *flags(cache, method="keyframes", encoder="runs/other"))
    assert "--freeze_encoder" in refused(finetune.main, *flags(cache, out="out", method="none", freeze_encoder=True))
    for says, given in {
        "--window": dict(method="none", window=2),
        "--anchor": dict(method="full", anchor=True),
        "which --cache_memory does not keep": dict(cross_attention=True, cache_memory=True),
        "--window 41: a history has 40 latent frames": dict(window=41),
        "--history_noise --method none": dict(method="none", history_noise=0.1),
        "--history_noise": dict(history_noise=1.5),
    }.items():
        assert says in refused(finetune.main, *flags(cache, out="out", **given))
    used = Path("used")
    used.mkdir()
    (used / "state.pt").touch()
    assert "--resume" in refused(pretrain.main, *flags(cache, out=used))
    (used / "state.pt").rename(used / "model.safetensors")
    assert "model.safetensors" in refused(pretrain.main, *flags(cache, out=used))


def test_stages_refuse_checkpoints_of_another_kind(refused, cache, stage1):
    wide = randomize(DiT(tiny_base().dit)).state_dict()
    save_file({k: torch.cat([v, v]) if v.ndim == 1 else v for k, v in wide.items()}, "wide.safetensors")
    torch.save(Bomb(), "pickle.safetensors")

    def refusal(stage, **changes):
        return refused(stage.main, *flags(cache, **{"out": "out"} | changes))

    assert "shape" in refusal(pretrain, init="wide.safetensors")
    assert "pickle.safetensors" in refusal(pretrain, init="pickle.safetensors")
    said = refusal(pretrain, init=stage1 / "model.safetensors", preset="nano")
    assert "was trained with --preset tiny, not nano" in said
    for damage in "{", "[]", "{}":
        save_file({"x": torch.zeros(1)}, "damaged.safetensors", {"config": damage})
        assert "header of damaged.safetensors is damaged" in refusal(finetune, encoder="damaged.safetensors")
    assert "is of pretrain.py" in refusal(finetune, out=stage1, encoder="none", resume=True)
    assert "with --method proposed, not without-lr" in refusal(pretrain, out=stage1, method="without-lr", resume=True)
    for given in dict(encoder=stage1, rate="2x2x2"), dict(encoder=stage1, method="only-lr"):
        assert "--encoder" in refusal(finetune, **given)
    assert "nowhere" in refusal(finetune, encoder="nowhere")
    assert not Path("exploded").exists()


# ---------------------------------------------------------------------------------------------------------------------
# eval.py, data.py, all of them


def test_eval_refuses_unknown_commands_and_flags(refused):
    assert "retrieval" in refused(eval_main, "retrievel")
    for given, says in (
        (("retrieval", "--chekpoint", "x"), "--checkpoint"),
        (("retrieval", "--checkpoint", "missing.safetensors"), "missing.safetensors"),
        (("retrieval", "--checkpoint", write_checkpoint(stage="finetune")), "finetune"),
        (("table1", "--clips", 4, "runs/a"), "runs/a follows no flag"),
        (("budget", "--preset", "wan"), "wan-14b"),
        (("budget", "--gpus", 0), "--gpus 0"),
        (("budget", "--memory_gb", "nan"), "--memory_gb nan"),
        (("budget", "--rate", "4x4x16"), "--rate 4x4x16"),
        (("speed", "--repeats", 0), "--repeats 0"),
        (("speed", "--out", "plot.csv"), ".png"),
        (("speed", "--preset", "wan-14b", "--device", "cpu"), "CUDA"),
    ):
        assert says in refused(eval_main, *given)


def test_retrieval_refuses_bad_histories(refused):
    checkpoint = write_checkpoint(stage="pretrain")
    names = write_bad_videos()
    write_video("short.mp4", 2)
    for name in (*names, "short.mp4"):
        assert name in refused(eval_main, "retrieval", "--checkpoint", checkpoint, "--history", name)


def test_unknown_presets_are_refused_everywhere(refused):
    for main, *command in (
        (pretrain.main,),
        (finetune.main,),
        (data_main, "story"),
        (eval_main, "speed"),
        (sample.main, "--history=a", "--init=random"),
        (data_main, "cache", "--videos=a", "--out=b"),
    ):
        assert "--preset giant" in refused(main, *command, "--preset", "giant")
    assert "nano and small" in refused(data_main, "story", "--preset", "wan-1.3b")
    assert "--NAME a.mp4" in refused(sample.main, "a.mp4")


@pytest.mark.parametrize("stage", [pretrain, finetune, sample])
def test_help_describes_every_flag(stage, capsys):
    run(stage.main, "--help")
    said = capsys.readouterr().out
    assert "--seed" in said and "python" in said
    config = {pretrain: pretrain.PretrainConfig, finetune: finetune.FinetuneConfig, sample: sample.SampleConfig}[stage]
    comments = field_help(config)
    assert all(comments.get(f.name) and f"--{f.name}" in said for f in dataclasses.fields(config))


@pytest.mark.parametrize("name", ["data.py cache", "data.py story", "eval.py elo", "eval.py retrieval"])
def test_help_of_a_command_names_it(name, capsys):
    script_name, command = name.split(".py ")
    run(script(script_name), command, "--help")
    assert f"usage: {name} [-h]" in capsys.readouterr().out


def test_exit_code_of_the_real_process():
    command = [sys.executable, str(ROOT / "sample.py"), "--history", "missing.mp4", "--init", "random"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
