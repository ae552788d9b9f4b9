"""What users ran into, one test per kind of fault: the smallest input of each, and others of the same kind.

Printing, what is refused at the start, two runs at once.
"""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import data
import finetune
import pretrain
import sample
from eval import main as eval_main
from tests.common import ROOT, flags, losses, run, write_checkpoint, write_video
from util.cli import protect_output
from util.files import LOCK
from util.video import read_video

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
