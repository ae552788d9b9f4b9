"""Nothing is lost: killed runs, signals, full disks, folders that are read-only or gone."""

import functools
import json
import os
import shutil
import signal
from pathlib import Path

import pretrain
import util.checkpoint
from tests.common import flags, losses
from tests.processes import Processes, assert_same_run, crash, finish, posix, stop_at
from util.files import remove_leftovers

# A signal to one of two processes: test_distributed.py. Many kills: test_stress.py.


@posix
def test_a_killed_run_goes_on(cache):
    killed_in_save, _ = crash(pretrain, {}, cache, times=2, in_saves=2, steps=6)
    assert killed_in_save >= 1


def limit_files(most, rank):
    """No file may grow beyond `most` bytes, which fails in the kernel as a full disk does."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


@posix
def test_a_full_disk_leaves_the_old_checkpoint(cache):
    given, out = flags(cache, steps=4, save_every=2, out="run"), Path("run")
    finish(pretrain.main, *given, "--out", "whole")
    stop = functools.partial(stop_at, 1, signal.SIGTERM)
    assert Processes(pretrain.main, *given, prepare=[stop]).wait() == [143]
    before = (out / "state.pt").read_bytes()
    for file in "model.safetensors", "state.pt":  # half of state.pt has room for model.safetensors
        limit = functools.partial(limit_files, (out / file).stat().st_size // 2)
        processes = Processes(pretrain.main, *given, "--resume", prepare=[limit])
        assert processes.wait() == [1] and "Traceback" not in processes.output[0]
        (line,) = [line for line in processes.output[0].splitlines() if line.startswith("error: ")]
        assert file in line and "File too large" in line
        assert (out / "state.pt").read_bytes() == before and not list(out.glob(".*.part"))
    finish(pretrain.main, *given, "--resume")
    assert_same_run(Path("whole"), out)


def become_nobody(rank):
    """Root may write anywhere."""
    if os.geteuid() == 0:
        os.setuid(65534)


def remove_run(rank, draw=pretrain.draw_retrieval):
    """The run folder disappears while the run goes on."""

    def draw_retrieval(*given):
        shutil.rmtree("run", ignore_errors=True)
        return draw(*given)

    pretrain.draw_retrieval = draw_retrieval


@posix
def test_a_folder_that_is_read_only_or_gone(cache, tmp_path):
    shutil.copytree(cache, "cache")
    for folder in tmp_path, Path("cache"):
        folder.chmod(0o755)
    given, out = flags("cache", steps=4, out="run"), Path("run")
    finish(pretrain.main, *given, "--steps", 2)
    for file in [*Path("cache").iterdir(), *out.iterdir()]:
        file.chmod(0o644)
    out.chmod(0o555)
    before = {p: p.read_bytes() for p in out.iterdir()}
    processes = Processes(pretrain.main, *given, "--resume", prepare=[become_nobody])
    assert processes.wait() == [2], processes.output
    assert "Permission denied" in processes.output[0] and "Traceback" not in processes.output[0]
    assert {p: p.read_bytes() for p in out.iterdir()} == before
    out.chmod(0o755)

    processes = Processes(pretrain.main, *given, "--resume", prepare=[remove_run])
    assert processes.wait() == [1] and "Traceback" not in processes.output[0]
    assert "error: run cannot be written any more" in processes.output[0]


# ---------------------------------------------------------------------------------------------------------------------
# The run folder


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    for name in ".state.pt.123.part", ".model.safetensors.7.part":
        (tmp_path / name).mkdir()
        (tmp_path / name / ".tmpAbC").touch()
    keep = {".hidden.12.txt", "a.12.part", ".git", ".x.part", "log.jsonl"}
    for name in keep:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert set(os.listdir(tmp_path)) == keep


def test_the_log_is_cut_to_the_checkpoint(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": i}) + "\n" for i in (1, 2, 3)))  # step 3 will be done again
    util.checkpoint.start_log(tmp_path, 2)
    assert losses(tmp_path, "step") == [1, 2]
    log.write_text('{"step": 1}\n{"step": 2}\n{"st')  # a line that a kill cut short
    util.checkpoint.start_log(tmp_path, 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'
