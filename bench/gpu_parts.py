"""The parts of bench/gpu.py: each a function of a Bench that returns rows. (Wan's: bench/gpu_wan.py.)

Where a part needs CUDA alone, its row says so on a CPU. FLOPs are those of bench/budget.py, clocks and shared networks
those of bench/speed.py.
"""

import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean, median

import torch
from torch._dynamo.utils import counters

import bases
from bench.budget import memory_tokens, random_history
from bench.speed import SpeedConfig, alternate, compiled_twin, training_step
from encoder import MemoryDiT
from finetune import FinetuneConfig, draw_continuation
from pretrain import PretrainConfig, check, draw_retrieval, setup, train
from util.device import autocast, compute_dtype, peak_memory
from util.distributed import Processes, compile_blocks
from util.optim import make_optimizers
from util.run import load_encoder

NOT_ON_CPU = "not on a CPU"


@dataclass
class Row:
    """A line of the report."""

    what: str
    value: object  # a number or words
    unit: str = ""
    target: str = ""
    met: bool = None  # is the target met? None where there is none
    figures: dict = field(default_factory=dict)  # raw figures behind the words

    @property
    def text(self):
        number = isinstance(self.value, int | float) and not isinstance(self.value, bool)
        return f"{self.value:.4g} {self.unit}".strip() if number else str(self.value)


class Bench:
    """What the parts share: the device, the size, clocks."""

    def __init__(self, device, tiny, cache):
        self.device, self.tiny, self.cache = device, tiny, str(Path(cache).resolve())
        self.cuda = device.type == "cuda"

    def base(self, preset, vae=""):
        return bases.open_base(tiny_preset(preset) if self.tiny else preset, vae, device=self.device)

    def model(self, base, lora=True):
        """A MemoryDiT of random weights on the device, with a LoRA where it would be trained with one."""
        torch.manual_seed(0)
        with self.device, base.random_frozen(self.device):
            model = MemoryDiT(base)
            torch.nn.init.normal_(model.dit.head.head.weight, std=0.02)  # at zero it would hide errors
        if base.lora and lora:
            base.add_lora(model.dit, base.lora)
        model.dit.recompute = base.recompute
        return model

    def compile(self, dit):
        compile_blocks(dit, "inductor" if self.cuda else "aot_eager")  # compiling C++ would take minutes

    def seconds(self, job):
        return median(alternate({"": job}, 1 if self.tiny else 3, self.device)[""])

    def peak(self, job):
        """Peak memory of a job, GiB; nan on a CPU."""
        if not self.cuda:
            return math.nan
        torch.cuda.reset_peak_memory_stats()
        job()
        return peak_memory(self.device)


def tiny_preset(preset):
    """Register a preset like this one with a tiny DiT and tiny pictures; returns its name."""
    module, name = bases.BASES[preset], f"tiny-{preset}"
    its = module.PRESETS[preset]
    dit = replace(its["dit"], dim=48, ffn_dim=64, heads=2, layers=2, text_dim=16, text_len=24)
    module.PRESETS[name] = its | dict(dit=dit, sizes=((32, 32),), widths=(8, 8, 16, 16))
    bases.BASES[name] = module
    return name


def profile(job):
    """The averaged events of a job's second run."""
    job()
    with torch.profiler.profile() as profiler:
        job()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return profiler.key_averages()


# ---------------------------------------------------------------------------------------------------------------------
# What is really used


def kernels(bench):
    """Attention, dtypes and the optimizer of a training step with one block."""
    base = bench.base("wan-1.3b")
    base = replace(base, dit=replace(base.dit, layers=1))
    model, dtypes = bench.model(base), {}
    for name, module in ("products", model.dit.blocks[0].self_attn.q), ("residual stream", model.dit.blocks[0]):
        module.register_forward_hook(lambda m, given, y, name=name: dtypes.update({name: str(y.dtype)[6:]}))
    (optimizer,) = make_optimizers(model, "adamw", base.lr)
    events = profile(training_step(SpeedConfig(rate=base.rate), base, model, update=optimizer.step))
    names = {event.key for event in events}
    ops = sorted(name[7:] for name in names if name.startswith("aten::_scaled_dot_product") and "backward" not in name)
    cuda_kernels = sorted(name[:60] for name in names if "flash" in name and "aten::" not in name)
    fast = bool(ops) and all("flash" in name or "cudnn" in name for name in ops)
    fused = any("_fused_adam" in name for name in names)
    wanted = {"products": "bfloat16", "residual stream": "float32"}
    words = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
    return [
        Row("attention, chosen by SDPA", ", ".join(ops) or "none", "", "flash or cuDNN", fast if bench.cuda else None),
        Row("its CUDA kernels", "; ".join(cuda_kernels) if bench.cuda else NOT_ON_CPU),
        Row("autocast", words, "", "bfloat16, stream float32", dtypes == wanted if bench.cuda else None),
        Row("AdamW", fused if bench.cuda else NOT_ON_CPU, "", "fused", fused if bench.cuda else None),
    ]


def recompilations(bench):
    """Compiled blocks against eager ones while the history grows: graphs counted, results compared."""
    base = bench.base("nano")
    dit, size = bench.model(base).dit, base.sizes[0]
    counters.clear()
    twin, gap, graphs = compiled_twin(dit, bench.compile), 0.0, []
    lengths = [base.section * n for n in (2, 3, 5, 7)]
    for latents in lengths:
        memory = memory_tokens(base, size, base.rate, latents)
        high, _ = random_history(base, base.rate, base.section, bench.device)
        x, text = high.repeat(2, 1, 1, 1, 1), torch.randn(2, base.dit.text_len, base.dit.text_dim, device=bench.device)
        context = (torch.randn(2, memory, base.dit.dim, device=bench.device), torch.randn(memory, 3).to(bench.device))
        t = torch.full((2,), 500.0, device=bench.device)
        with autocast(bench.device):
            a, b = (net(x, t, text, memory=context) for net in (dit, twin))
        b.square().mean().backward()
        gap = max(gap, ((a - b).abs().max() / a.abs().max()).item())
        graphs.append(counters["stats"]["unique_graphs"])
    most = 0.02 if compute_dtype(bench.device) == torch.bfloat16 else 1e-4
    what = f"graphs after histories of {', '.join(map(str, lengths))} latents"
    return [
        Row(what, ", ".join(map(str, graphs)), "", "1 each", graphs[-1] == 1, dict(graphs=graphs)),
        Row("compiled against eager, share of the largest value", gap, "", f"below {most}", gap < most),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# nano, by the scripts' own training loop

STAGES = {"pretrain": (PretrainConfig, draw_retrieval), "finetune": (FinetuneConfig, draw_continuation)}


@dataclass
class Clock(Processes):
    """Notes when each step ends, and its loss."""

    def __post_init__(self):
        self.ends, self.losses = [], []

    def sum_loss(self, *given):
        summed = super().sum_loss(*given)
        self.ends.append(time.perf_counter())
        self.losses.append(summed[0])
        return summed

    @property
    def rate(self):
        """Steps per second, of the second half."""
        ends = self.ends[len(self.ends) // 2 :]
        return (len(ends) - 1) / (ends[-1] - ends[0])


@contextmanager
def signals_kept():
    """Training has handlers of its own; a run that gives up is an error here."""
    kept = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except SystemExit as e:
        if e.code != 1:
            raise  # stopped by a signal
        raise RuntimeError("the gradient was not finite 10 times in a row") from None
    finally:
        for s, handler in kept.items():
            signal.signal(s, handler)


def train_stage(bench, stage, out, steps, device, **changes):
    """Run a stage as its script does -> Clock. Stage 2 takes φ of stage 1 from beside `out`."""
    make, draw = STAGES[stage]
    clips, init = (8, "random") if bench.tiny else (256, PretrainConfig.init)
    given = dict(preset=bench.base("nano").name, init=init, clips=clips, held_out=2, device=device, cache=bench.cache)
    given |= (
        dict(steps=steps, save_every=steps, batch=4, sample_steps=1)
        if bench.tiny
        else dict(steps=steps, save_every=steps)
    )
    config = make(**given, out=str(out / stage), **changes)
    check(config)
    model, base, processes, clips, held_out = setup(config)
    if stage == "finetune":
        load_encoder(model.encoder, out / "pretrain" / "model.safetensors", processes.device)
    clock, draw = Clock(**vars(processes)), partial(draw, config, base, model.encoder)
    with signals_kept():
        train(config, stage, model, base, clock, clips, held_out, draw, draw)
    return clock


def nano(bench):
    """Both stages on the device, eager and compiled, and their first steps on the CPU again."""
    steps, again, rows = (6, 3, []) if bench.tiny else (200, 8, [])
    with tempfile.TemporaryDirectory() as folder:
        device = bench.device.type
        for stage in STAGES:
            here = train_stage(bench, stage, Path(folder, "here"), steps, device)
            cpu = train_stage(bench, stage, Path(folder, "cpu"), again, "cpu")
            gap = max(abs(a - b) / b for a, b in zip(here.losses, cpu.losses))
            late = mean(here.losses[-max(1, steps // 4) :])
            figures = dict(losses=here.losses, cpu=cpu.losses)
            rows += [
                Row(
                    f"{stage}: loss of step 1, of the last quarter",
                    f"{here.losses[0]:.3f}, {late:.3f}",
                    figures=figures,
                ),
                Row(f"{stage}: from the CPU, first {again} steps, at most", gap, "", "below 0.02", gap < 0.02),
                Row(f"{stage}: eager", here.rate, "steps/s"),
            ]
            if bench.cuda:
                compiled = train_stage(bench, stage, Path(folder, "compiled"), steps, device, compile=True)
                rows.append(Row(f"{stage}: compiled", compiled.rate, "steps/s"))
            else:
                rows.append(Row(f"{stage}: compiled", NOT_ON_CPU))
    return [*rows, nano_limit(bench)]


def nano_limit(bench):
    """What limits a training step of nano: how long kernels run in it."""
    base = bench.base("nano")
    step = training_step(SpeedConfig(rate=base.rate, batch=8), base, bench.model(base))
    seconds, what = bench.seconds(step), "share of a step in which the GPU is busy"
    if not bench.cuda:
        return Row(what, NOT_ON_CPU)
    events = [e for e in profile(step) if e.device_type == torch.autograd.DeviceType.CUDA]
    share = sum(e.self_device_time_total for e in events) / 1e6 / seconds
    words = f"{100 * share:.0f} %, {'limited by launches' if share < 0.8 else 'limited by the GPU'}"
    return Row(what, words, figures=dict(share=share, kernels=sum(e.count for e in events), seconds=seconds))


def two_processes(bench):
    """pretrain.py under torchrun: two processes on this device (gloo) against one."""
    root, losses = Path(__file__).resolve().parent.parent, {}
    small = dict(clips=4, batch=2, steps=2) if bench.tiny else dict(clips=256, batch=8, steps=10)
    given = dict(small, held_out=2, sample_steps=1, device=bench.device.type, cache=bench.cache)
    with tempfile.TemporaryDirectory() as folder:
        for world in 1, 2:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
            flags = [x for key, value in given.items() for x in (f"--{key}", str(value))]
            command += [str(root / "pretrain.py"), *flags, "--out", str(world)]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
            if done.returncode:
                raise RuntimeError(f"{world} processes: {done.stderr.strip().splitlines()[-1]}\n{done.stderr[-3000:]}")
            log = Path(folder, str(world), "log.jsonl").read_text().splitlines()
            losses[world] = [json.loads(line)["loss"] for line in log]
    gap = max(abs(a - b) for a, b in zip(*losses.values()))
    what = f"largest difference of the loss in {len(losses[1])} steps"
    return [Row(what, gap, "", "below 0.005", gap < 0.005, dict(one=losses[1], two=losses[2]))]
