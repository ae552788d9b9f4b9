"""One command that checks this project on a GPU and writes the tables of docs/gpu.md. For one card of 80 GB:

    python -m bench.gpu --minutes 9 --out gpu
    python -m bench.gpu --device cpu --tiny --out gpu      the same path with tiny models, on a CPU, in about a minute

What is checked is a list of parts, the most telling first. A part that fails is reported with its reason, one that no
longer fits the minutes is skipped, and report.md, report.json (figures) and log.txt (tracebacks) are
written after each, so that a check that is stopped loses nothing. To add a part, write a function that returns rows and
name it in PARTS.
"""

import gc
import json
import platform
import time
import traceback
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bench import gpu_parts, gpu_wan
from bench.gpu_parts import Bench, Row
from bench.report import markdown
from bench.runs import describe_machine
from util.cli import Failure, UserError, first_line, parse_flags, run_main
from util.device import pick_device
from util.files import atomic_write, check_output

FILES = ("report.md", "report.json", "log.txt")
TINY = 0.1  # share of its minutes that a part of tiny models is expected to take


@dataclass
class Part:
    name: str
    title: str
    run: object  # function of a Bench -> rows
    minutes: float  # that it may take on one card of 80 GB: estimates, not measurements


PARTS = [
    Part("kernels", "Kernels, dtypes, optimizer", gpu_parts.kernels, 0.3),
    Part("compile", "Compiled blocks while the history grows", gpu_parts.recompilations, 0.8),
    Part("nano", "nano: both stages, 200 steps each", gpu_parts.nano, 2.1),
    Part("wan-steps", "Wan 1.3B: training steps, 480x832, 20 s of history", gpu_wan.steps, 1.9),
    Part("wan-sections", "Wan 1.3B: sections one after another", gpu_wan.sections, 0.7),
    Part("diffusers", "Our DiT beside diffusers' WanTransformer3DModel", gpu_wan.beside_diffusers, 1.2),
    Part("wan-12gb", "Wan 1.3B: sampling on a card of 12 GB", gpu_wan.within_12_gb, 0.4),
    Part("wan-vae", "Wan's VAE", gpu_wan.vae, 0.3),
    Part("wan-14b", "Wan 14B: two blocks at full width", gpu_wan.two_blocks, 0.4),
    Part("processes", "Two processes on one card", gpu_parts.two_processes, 0.8),
]


@dataclass
class GPUConfig:
    minutes: float = 9.0  # time for all parts
    out: str = "gpu"  # folder for the report
    device: str = "auto"  # auto, cpu, cuda
    tiny: bool = False  # tiny models, to try this command out
    parts: str = ""  # only these parts, their names separated by commas [all]
    cache: str = "cache"  # folder for encoded clips


def check(config):
    """(device, parts to run) of a config. Raises UserError before anything is allocated or written."""
    if not config.minutes > 0:
        raise UserError(f"--minutes {config.minutes}: must be above 0")
    names = [part.name for part in PARTS]
    chosen = [name.strip() for name in config.parts.split(",")] if config.parts else names
    if unknown := [name for name in chosen if name not in names]:
        raise UserError(f"--parts {config.parts}: {unknown[0]} is none of {', '.join(names)}")
    device = pick_device(config.device)
    if device.type != "cuda" and not config.tiny:
        raise UserError(f"--device {device}: at full size this needs CUDA; give --tiny to try the command out")
    for file in FILES:
        check_output(Path(config.out) / file)
    return device, [part for part in PARTS if part.name in chosen]


# ---------------------------------------------------------------------------------------------------------------------
# Running


@contextmanager
def freed(device):
    """Give back all that the body took: memory, its limit, compiled code."""
    try:
        yield
    finally:
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
            torch.cuda.empty_cache()


def run_part(part, bench, minutes_left):
    """(rows of a part, its traceback or ""). It never raises, unless the user or a signal stops it."""
    needed = part.minutes * (TINY if bench.tiny else 1)
    if needed > minutes_left:
        return [Row("skipped", f"it may take {needed:.2g} minutes, {max(0, minutes_left):.2g} are left")], ""
    with freed(bench.device):
        try:
            return part.run(bench), ""
        except Exception as e:
            return [Row("failed", f"{type(e).__name__}: {first_line(e)}", met=False)], traceback.format_exc()


# ---------------------------------------------------------------------------------------------------------------------
# The report


def describe(device):
    """{what: value} of the machine and of the packages that matter here."""
    about = {"machine": describe_machine(device), "Python": platform.python_version(), "PyTorch": torch.__version__}
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        about |= {"CUDA": torch.version.cuda, "memory": f"{memory:.1f} GiB"}
    for package in ("triton", "diffusers"):
        try:
            about[package] = version(package)
        except PackageNotFoundError:
            about[package] = "not installed"
    return about


def report_lines(about, results):
    """Lines of Markdown: a table for each of `results` [(part, rows, seconds)]."""
    lines = ["; ".join(f"{what} {value}" for what, value in about.items()), ""]
    rows = [row for _, rows, _ in results for row in rows]
    missed = sum(row.met is False for row in rows)
    lines += [f"{len(rows)} lines, {sum(bool(row.met) for row in rows)} targets met, {missed} not met or failed.", ""]
    for part, rows, seconds in results:
        lines += [f"## {part.title}", "", f"`{part.name}`, {seconds:.0f} s", ""]
        verdicts = {True: "yes", False: "**no**", None: ""}
        cells = [[row.what, row.text.replace("|", "/"), row.target, verdicts[row.met]] for row in rows]
        lines += [*markdown(["", "measured", "target", "met"], cells), ""]
    return lines


def write_report(folder, about, results, log):
    """Write the three FILES."""
    figures = [
        {"part": part.name, "seconds": round(seconds, 2), "rows": [asdict(row) for row in rows]}
        for part, rows, seconds in results
    ]
    content = json.loads(json.dumps({"about": about, "parts": figures}), parse_constant=lambda nan: None)
    texts = "\n".join(report_lines(about, results)), json.dumps(content, indent=1), log
    for name, text in zip(FILES, texts):
        with atomic_write(Path(folder) / name) as part:
            part.write_text(text, encoding="utf-8")


def main():
    """Run the parts and write the report after each. Raises Failure if one of them failed."""
    config = parse_flags(GPUConfig, __doc__)
    device, parts = check(config)
    about, started = describe(device), time.perf_counter()
    about |= {"models": "tiny (--tiny), so these figures are of no use"} if config.tiny else {}
    bench = Bench(device, config.tiny, config.cache)
    results, log = [], ""
    for part in parts:
        begun = time.perf_counter()
        rows, trace = run_part(part, bench, config.minutes - (begun - started) / 60)
        results.append((part, rows, time.perf_counter() - begun))
        log += f"{part.name}\n{trace}\n" if trace else ""
        write_report(config.out, about, results, log)
        for row in rows:
            print(f"{part.name}: {row.what}: {row.text}")
    print(f"wrote {', '.join(str(Path(config.out) / name) for name in FILES)}")
    if log:
        raise Failure(f"some parts failed, see {Path(config.out) / FILES[0]}")


if __name__ == "__main__":
    run_main(main)
