"""Long tests, each prints its figures: python -m pytest -q -n 0 -m stress tests/test_stress.py

They kill runs many times, watch the memory of long runs, and time what saving costs.
"""

import os
import time
from pathlib import Path

import numpy as np
import pytest

import finetune
import pretrain
import sample
from sample import Memory
from tests.common import flags, run, write_checkpoint, write_video
from tests.processes import crash, loss_gaps, posix

pytestmark = pytest.mark.stress
linux = pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads the memory in use from /proc")
STAGES = [(pretrain, {}), (finetune, {"encoder": "none"})]


@pytest.fixture
def report(capsys):
    """Print a line despite pytest."""

    def print_line(line):
        with capsys.disabled():
            print(f"\n{line}")

    return print_line


def resident():
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------------------------------------------------------------
# Killed runs, equal gradients


@posix
@pytest.mark.parametrize("stage, more", STAGES)
def test_20_killed_runs_go_on(stage, more, cache, report):
    started = time.time()
    in_saves, resumed = crash(stage, more, cache, times=20, in_saves=8, seed=1)
    assert in_saves >= 5
    report(
        f"crash resume, {stage.__name__}: 20 of 20 killed runs ended bit-identical, {in_saves} killed inside a save, "
        f"{resumed} with a checkpoint to go on from; {time.time() - started:.0f} s"
    )


@posix
def test_killed_runs_of_two_processes_go_on(cache, report):
    started = time.time()
    in_saves, resumed = crash(pretrain, {}, cache, times=6, in_saves=3, world=2, seed=2)
    report(
        f"crash resume, 2 processes: 6 of 6 ended bit-identical, {in_saves} killed inside a save, {resumed} with a "
        f"checkpoint to go on from; {time.time() - started:.0f} s"
    )


@posix
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_equal_gradients_for_50_steps(optimizer, cache, report):
    found = loss_gaps(cache, optimizer, 50, worlds=[2, 4], micro_batches=[1])
    line = "; ".join(f"{name} {a:.1e}, {b:.1e}, {c:.1e}" for name, (a, b, c) in found.items())
    report(f"equal gradients, {optimizer}: differences of the loss at step 1, step 50, most: {line}")
    for first, last, _ in found.values():
        assert first < 1e-6 and (optimizer == "muon" or last < 1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Memory and time


def watch_steps(monkeypatch, measure):
    """A list that gets what measure() returns at the start of every training step."""
    found = []

    def start_step(*given, real=pretrain.set_learning_rate):
        found.append(measure())
        real(*given)

    monkeypatch.setattr(pretrain, "set_learning_rate", start_step)
    return found


@linux
@pytest.mark.parametrize("stage, more", STAGES)
def test_memory_of_1000_steps(stage, more, cache, monkeypatch, report):
    found = watch_steps(monkeypatch, resident)
    run(stage.main, *flags(cache, out="run", steps=1200, batch=2, save_every=100, **more))
    growth = max(found[-100:]) / max(found[100:200]) - 1
    report(
        f"memory, {stage.__name__}: {growth:+.2%} from steps 101 to 200 on to steps 1101 to 1200, 12 saves among them "
        f"({max(found) / 2**20:.0f} MiB)"
    )
    assert growth < 0.01


@linux
@pytest.mark.parametrize("seconds", [20, 0])
def test_memory_of_200_sections(seconds, monkeypatch, report):
    found, tokens = [], []

    def append(memory, latents, pixels, real=Memory.append):
        real(memory, latents, pixels)
        found.append(resident())
        tokens.append(memory.context()[0].shape[1])

    monkeypatch.setattr(Memory, "append", append)
    write_video("clip.mp4", 40)
    given = "--history", "clip.mp4", "--checkpoint", write_checkpoint(), "--seconds", 400, "--steps", 1
    run(sample.main, *given, "--memory_seconds", seconds, "--save_file", "a.mp4")
    growth = max(found[-20:]) - max(found[10:30])
    report(
        f"memory of {len(found) - 1} sections, --memory_seconds {seconds}: {growth / 2**20:+.2f} MiB of "
        f"{max(found) / 2**20:.0f} from sections 10-30 to the last 20; {tokens[10]} to {tokens[-1]} tokens"
    )
    assert len(found) == 201 and growth < 0.01 * max(found)
    assert seconds == 0 or tokens[10] == tokens[-1]


def test_saving_costs_little(cache, monkeypatch, report):
    """At the defaults of stage 1: the nano preset, a batch of 8, a save every 250 steps."""
    saves, started = [], watch_steps(monkeypatch, time.time)

    def save(*given, real=pretrain.save):
        begun = time.time()
        real(*given)
        saves.append(time.time() - begun)

    monkeypatch.setattr(pretrain, "save", save)
    monkeypatch.setattr(pretrain, "validate", lambda *given: {})
    run(pretrain.main, *flags(cache, preset="nano", out="run", steps=8, batch=8, save_every=4))
    step = np.median(np.diff(started)[[0, 1, 2, 4, 5, 6]])  # without the one with the save
    report(f"cost of saving: {max(saves):.2f} s every 250 steps of {step:.2f} s, {max(saves) / (250 * step):.2%}")
    assert len(saves) == 2 and max(saves) < 0.05 * 250 * step
