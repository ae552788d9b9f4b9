"""bench.gpu: every part at its tiny size on the CPU, the report, failures, the time budget."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import bases
from bench import gpu, gpu_parts, gpu_wan
from bench.gpu_parts import NOT_ON_CPU, Row
from model import DiT
from tests.common import randn, randomize, run, tiny_base
from util.distributed import compile_blocks

TINY = "--device", "cpu", "--tiny"


@pytest.fixture(autouse=True)
def presets_as_before(monkeypatch):
    """Tiny presets are registered in this process."""
    for module in set(bases.BASES.values()):
        monkeypatch.setattr(module, "PRESETS", dict(module.PRESETS))
    monkeypatch.setattr(bases, "BASES", dict(bases.BASES))


def figures(folder="gpu"):
    """{part: rows} of report.json."""
    return {part["part"]: part["rows"] for part in json.loads(Path(folder, "report.json").read_text())["parts"]}


@pytest.mark.parametrize("part", gpu.PARTS, ids=lambda part: part.name)
def test_a_part_runs_on_a_cpu(part, capsys):
    run(gpu.main, *TINY, "--parts", f" {part.name}, {part.name}")
    rows = figures()[part.name]
    assert rows and all(row["what"] not in ("failed", "skipped") and row["met"] is not False for row in rows), rows
    report = Path("gpu/report.md").read_text()
    assert "models tiny (--tiny)" in report
    assert f"## {part.title}" in report and all(f"| {row['what']} | " in report for row in rows)
    assert Path("gpu/log.txt").read_text() == "" and "wrote gpu/report.md" in capsys.readouterr().out


def part(name, run, minutes=0.1):
    return gpu.Part(name, f"Title of {name}", run, minutes)


def test_a_part_that_fails_does_not_stop_the_rest(monkeypatch, capsys):
    def broken(bench):
        raise RuntimeError("too bad\nand more")

    seen = []

    def sound(bench):
        seen.append(Path("gpu/report.md").read_text())  # the report so far is there already
        speed = Row("speed", 2.0, "s", "below 1", False, dict(peak=float("nan")))
        return [speed, Row("kernel", NOT_ON_CPU), Row("gap", 1e-5, met=True)]

    monkeypatch.setattr(gpu, "PARTS", [part("broken", broken), part("sound", sound)])
    with pytest.raises(SystemExit) as stop:
        run(gpu.main, *TINY)
    assert stop.value.code == 1 and "some parts failed, see gpu/report.md" in capsys.readouterr().err
    assert "| failed | RuntimeError: too bad |  | **no** |" in seen[0] and "sound" not in seen[0]
    report = Path("gpu/report.md").read_text()
    assert "| speed | 2 s | below 1 | **no** |" in report and "| gap | 1e-05 |  | yes |" in report
    assert "4 lines, 1 targets met, 2 not met or failed." in report
    log = Path("gpu/log.txt").read_text()
    assert log.startswith("broken\nTraceback") and "and more" in log
    assert [row["value"] for row in figures()["sound"]] == [2.0, NOT_ON_CPU, 1e-5]
    assert figures()["sound"][0]["figures"] == {"peak": None}  # JSON has no nan
    run(gpu.main, *TINY, "--parts", "sound")  # over its own report


def test_all_parts_fit_the_minutes():
    assert sum(part.minutes for part in gpu.PARTS) <= gpu.GPUConfig.minutes


def test_a_block_that_takes_no_time_is_named(monkeypatch):
    times = iter([2.0, 1.0])
    monkeypatch.setattr(gpu_parts.Bench, "seconds", lambda *given: next(times))
    rows = gpu_wan.two_blocks(gpu_parts.Bench(torch.device("cpu"), True, "cache"))
    assert len(rows) == 1 and "less than the clock's noise" in rows[0].text


def test_what_no_longer_fits_is_skipped_and_said_so(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: now[0])

    def slow(bench):
        now[0] += 60
        return [Row("done", True)]

    monkeypatch.setattr(gpu, "PARTS", [part("a", slow, 5), part("b", slow, 12), part("c", slow, 5)])
    run(gpu.main, *TINY, "--minutes", 2)  # tiny ones take a tenth: 0.5, 1.2 and 0.5 minutes
    assert {name: rows[0]["what"] for name, rows in figures().items()} == {"a": "done", "b": "skipped", "c": "done"}
    assert "| skipped | it may take 1.2 minutes, 1 are left |" in Path("gpu/report.md").read_text()


def test_a_signal_stops_it_and_keeps_the_report(monkeypatch):
    def stopped(bench):
        raise SystemExit(143)

    monkeypatch.setattr(gpu, "PARTS", [part("a", lambda bench: [Row("done", True)]), part("b", stopped)])
    with pytest.raises(SystemExit) as stop:
        run(gpu.main, *TINY)
    assert stop.value.code == 143 and list(figures()) == ["a"]


def test_mistakes_are_refused(refused):
    assert "give --tiny" in refused(gpu.main, "--device", "cpu")
    assert "--parts kernels,nothing: nothing is none of kernels" in refused(
        gpu.main, *TINY, "--parts", "kernels,nothing"
    )
    assert "--minutes 0" in refused(gpu.main, *TINY, "--minutes", 0)
    Path("gpu").mkdir()
    Path("gpu/report.md").write_text("mine")
    assert "was not written by this program" in refused(gpu.main, *TINY)


@pytest.mark.parametrize("option", ["", "cross_attention", "cache_memory"])
def test_blocks_are_compiled_once_however_long_the_memory_is(option):
    """The number of memory tokens is dynamic from the start; training and sampling each have their graph, as have
    blocks that only cache memory."""
    torch._dynamo.reset()
    counters.clear()
    base = tiny_base()
    dit = DiT(replace(base.dit, layers=2))
    if option == "cross_attention":
        dit.add_cross_attention()
    compile_blocks(randomize(dit), "aot_eager")
    x, t, text = randn(2, 16, 4, 8, 8), torch.tensor([300.0, 900.0]), randn(2, 24, 16)
    for M in 8, 24, 40:
        memory = randn(2, M, 48, seed=M), randn(M, 3)
        memory = dit.cache_memory(*memory) if option == "cache_memory" else memory
        dit(x, t, text, memory=memory).square().mean().backward()
    assert counters["stats"]["unique_graphs"] == (2 if option == "cache_memory" else 1)
    torch._dynamo.reset()


def test_training_steps_are_timed_and_signals_given_back():
    import signal

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="not finite"), gpu_parts.signals_kept():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(1)
    assert signal.getsignal(signal.SIGTERM) == before
    clock = gpu_parts.Clock(torch.device("cpu"))
    clock.ends = [0.0, 10.0, 11.0, 12.0, 14.0]
    assert clock.rate == pytest.approx(2 / 3)  # the first half warms up
