"""speed: its clock, its shares of the time, and the command. Where figures are checked, time is made up."""

import contextlib
import importlib.util
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.autograd import DeviceType

from bench import budget, speed
from encoder import MemoryDiT
from model import DiT
from tests.common import randn, randomize, read_csv, run, script, tiny_base

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------------------
# Clocks


def test_alternate_takes_turns_and_leaves_out_the_first_round(monkeypatch):
    now, calls = 0, []
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now)

    def job(name, seconds):
        nonlocal now
        calls.append(name)
        now += seconds * len(calls)

    times = speed.alternate({"a": lambda: job("a", 1), "b": lambda: job("b", 10)}, 3, CPU)
    assert calls == list("abababab")
    assert times == {"a": [3, 5, 7], "b": [40, 60, 80]}


def test_ratio_is_the_median_over_the_rounds():
    assert speed.ratio([1, 4, 9], [1, 2, 3]) == 2


def test_time_shares_sorts_operations_by_kind():
    a = torch.ones(64, 64)
    product = speed.time_shares(lambda: a @ a, CPU)
    gelu = speed.time_shares(lambda: F.gelu(a), CPU)
    assert list(product) == ["attention", "matrix products", "norms", "GELU", "copies", "other"]
    assert sum(product.values()) == pytest.approx(1) and sum(gelu.values()) == pytest.approx(1)
    assert product["matrix products"] > 0 == product["GELU"] and gelu["GELU"] > 0 == gelu["matrix products"]


@pytest.mark.parametrize("device, expected", [("cpu", [0.1, 0.4, 0.2, 0, 0, 0.3]), ("cuda", [0.5, 0, 0, 0, 0.5, 0])])
def test_time_shares_adds_up_what_the_profiler_finds(device, expected, monkeypatch):
    names = (
        "aten::_softmax",
        "aten::mm",
        "aten::addmm",
        "aten::native_layer_norm",
        "aten::copy_",
        "aten::add",
        "kernel",
    )
    cpu_times, gpu_times = (1, 3, 1, 2, 0, 3, 0), (4, 0, 0, 0, 4, 0, 8)
    events = [
        SimpleNamespace(key=name, self_cpu_time_total=cpu_time, self_device_time_total=gpu_time, device_type=kind)
        for name, cpu_time, gpu_time, kind in zip(names, cpu_times, gpu_times, [DeviceType.CPU] * 6 + [DeviceType.CUDA])
    ]  # the last one is the kernel of an operation above

    profiler = SimpleNamespace(key_averages=lambda: events)
    monkeypatch.setattr(torch.profiler, "profile", lambda: contextlib.nullcontext(profiler))
    assert list(speed.time_shares(lambda: None, torch.device(device)).values()) == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------------------------
# What is timed


@pytest.fixture
def float32(monkeypatch):
    """As on a CPU without bf16 instructions."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)


@pytest.mark.optional
@pytest.mark.parametrize("recompute", [False, True])
def test_diffusers_dit_shares_the_weights_and_computes_the_same(recompute):
    pytest.importorskip("diffusers")
    base = tiny_base("tiny-wan")
    dit = randomize(DiT(base.dit))
    dit.recompute = recompute
    theirs = speed.diffusers_dit(dit)
    assert {p.data_ptr() for p in theirs.parameters()} == {p.data_ptr() for p in dit.parameters()}
    x, t, text = randn(1, 16, 4, 8, 8), torch.tensor([500.0]), randn(1, 24, 16)
    jobs = speed.dit_jobs({"ours": dit, "theirs": theirs}, x, t, text)
    ours = jobs["ours"]()
    assert (ours - jobs["theirs"]()).abs().max() < 1e-5 * ours.abs().max() and not ours.requires_grad
    jobs["theirs, with backward"]()
    assert all(p.grad is None for p in theirs.parameters())


@pytest.mark.optional
def test_diffusers_dit_has_one_dtype_beside_a_frozen_dit(monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    base = tiny_base("tiny-wan")
    with base.random_frozen(CPU):
        dit = DiT(base.dit)
    theirs = speed.diffusers_dit(dit)
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    assert theirs.blocks[0].attn1.to_q.weight.data_ptr() == dit.blocks[0].self_attn.q.weight.data_ptr()
    assert dit.blocks[0].self_attn.norm_q.weight.dtype == torch.float32  # ours stays as it is


def test_diffusers_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # as if it were not installed
    dit = DiT(tiny_base().dit)
    assert speed.diffusers_dit(dit) is None and speed.open_nets(dit) == {"DiT": dit}


@pytest.mark.parametrize("preset", ["tiny", "tiny-wan"])
def test_a_training_step_reaches_all_that_is_trained(preset, float32, monkeypatch):
    base = tiny_base(preset)
    net = randomize(MemoryDiT(base))
    if base.lora:
        base.add_lora(net.dit, base.lora)
    step = speed.training_step(speed.SpeedConfig(rate="4x4x2", batch=2), base, net)
    reached = set()
    monkeypatch.setattr(
        net, "zero_grad", lambda: reached.update(n for n, p in net.named_parameters() if p.grad is not None)
    )
    step()
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert reached == trained - {"encoder.patch_embedding.weight", "encoder.patch_embedding.bias"}  # no frame waits
    assert any("lora_A" in n for n in reached) == (preset == "tiny-wan")


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def half_seconds(monkeypatch):
    """Every job runs once and is said to take half a second in every round."""

    def alternate(jobs, repeats, device):
        for job in jobs.values():
            job()
        return {name: [0.5] * repeats for name in jobs}

    monkeypatch.setattr(speed, "alternate", alternate)


@pytest.mark.parametrize("preset", ["tiny", "tiny-wan"])
def test_the_command(preset, capsys, monkeypatch, float32, half_seconds):
    monkeypatch.setattr(speed, "GROWTH", (2, 8))
    run(script("eval"), "speed", "--preset", preset, "--repeats", 1, "--device", "cpu", "--out", "plot.png")
    printed, base = capsys.readouterr().out, tiny_base(preset)
    lines = {line.split("  ")[1]: line.split()[1:] for line in printed.splitlines() if line.startswith("  ")}
    latents = {"tiny": (4, 16), "tiny-wan": (5, 5)}[preset]  # whole segments of 2 and of 0.5 latents per second
    frame = budget.frame_tokens(base, (32, 32))
    assert [list(row.values()) for row in read_csv("plot.csv")] == [
        [str(seconds), str(budget.memory_tokens(base, (32, 32), "4x4x2", n)), "20.0", str(n * frame), "20.0"]
        for seconds, n in zip((2, 8), latents)  # 20 steps, twice for guidance, half a second each
    ]
    assert Image.open("plot.png").size == (1040, 650)

    rate = 2 * 1024**3 / 0.5  # of matrix products
    memory = budget.memory_tokens(base, (32, 32), "4x4x2", base.history)
    phi, _ = budget.encoder_cost(MemoryDiT(base).encoder.to("meta"), base, "4x4x2", base.history)
    needed = (2 if base.lora else 3) * budget.flops(base.dit, 4 * frame, memory) + 3 * phi
    assert f"a training step of stage 2, 1 x ({4 * frame:,} noisy + {memory:,} memory tokens)" in printed
    assert lines["eager"] == ["500.00", f"{100 * needed / 0.5 / rate:.0f}", "%"]
    assert "  φ of {} latents takes 1.00 forward passes".format(base.history) in printed
    if importlib.util.find_spec("diffusers"):
        difference = re.search("largest difference from diffusers' output: (.*)", printed)[1]
        assert 0 <= float(difference) < 1e-5
        assert "DiT's time / diffusers: forward 1.00, with backward 1.00" in printed
    else:
        assert "diffusers: n/a" in printed
    shares = re.findall(r"the time of (?:DiT|DiT, with backward): (.*)", printed)
    assert [re.sub(r" \d+ %", "", line) for line in shares] == [", ".join([*speed.KINDS, "other"])] * 2


@pytest.fixture
def growth(monkeypatch):
    """growth(rate) -> measure_growth()'s records after 2 s and 8 s, at a rate of matrix products, FLOP/s."""
    monkeypatch.setattr(speed, "GROWTH", (2, 8))
    config, base = speed.SpeedConfig(preset="tiny", rate="4x4x2", repeats=1, out="plot.png"), tiny_base()

    def measure(rate):
        records = speed.measure_growth(config, base, DiT(base.dit), rate)
        speed.write_growth(config, records, "title")
        assert [[x == "" for x in row.values()] for row in read_csv("plot.csv")] == missing(records)
        return records

    return measure


def missing(records):
    return [[x is None for x in record.values()] for record in records]


def test_what_takes_too_long_is_skipped(growth, capsys):
    base = tiny_base()
    slow = 2 * budget.flops(base.dit, 64, 8 * 16) / speed.PATIENCE  # at which 8 latents fit the patience; 8 s are 16
    assert missing(growth(slow)) == [[False] * 5, [False] * 4 + [True]]
    assert capsys.readouterr().out.count("skipped") == 1
    assert missing(growth(slow / 100)) == [[False, False, True, False, True]] * 2  # not even what is compressed


def test_what_takes_too_much_memory_is_skipped(growth, monkeypatch):
    measured = speed.time_memories

    def time_memories(config, base, dit, encoder, latents, kinds):
        if latents == 16 and "uncompressed" in kinds:
            raise torch.OutOfMemoryError
        return measured(config, base, dit, encoder, latents, kinds)

    monkeypatch.setattr(speed, "time_memories", time_memories)
    assert missing(growth(1e12)) == [[False] * 5, [False] * 4 + [True]]


def test_what_cannot_be_measured_is_refused(refused):
    assert "--repeats 0" in refused(script("eval"), "speed", "--repeats", 0)
    assert "--batch 0" in refused(script("eval"), "speed", "--batch", 0)
    assert ".png" in refused(script("eval"), "speed", "--out", "plot.csv")
    assert "CUDA" in refused(script("eval"), "speed", "--preset", "wan-14b", "--device", "cpu")
