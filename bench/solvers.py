"""Quality by the number of passes of the DiT: which solver, how many steps, with or without guidance?

python eval.py solvers --checkpoint runs/finetune/model.safetensors
"""

from dataclasses import dataclass, replace
from pathlib import Path

from bench.consistency import StoryConfig, continue_stories, score_sections, story_base
from bench.plots import plot
from bench.report import write_csv
from bench.runs import open_checkpoint, parse, stories
from bench.stats import interval, per_clip
from dolls.dataset import STORY_SECTIONS
from dolls.scores import MAIN
from sample import SOLVERS
from util.cli import load_object
from util.files import check_outputs
from util.weights import read_config

STEPS = (1, 2, 4, 6, 10, 20, 40)
METRICS = ("consistency", *MAIN, "psnr")


@dataclass
class SolversConfig(StoryConfig):
    checkpoint: str = "checkpoints/nano.safetensors"  # weights from finetune.py
    sections: int = 1  # written after a full history of each
    steps: int = 40  # the most solver steps; 1, 2, 4, 6, 10, 20 and 40 are measured up to it
    shift: float = None  # timestep shift of the sampler [the preset's]
    guidance: float = None  # classifier-free guidance, measured beside none [the preset's]
    out: str = "out"  # folder for solvers.csv and .png


def settings(config):
    """[(solver, steps, guidance, passes of the DiT per section)], the cheapest first."""
    steps = [n for n in STEPS if n <= config.steps]
    found = [(solver, n, guidance) for guidance in sorted({1.0, config.guidance}) for solver in SOLVERS for n in steps]
    return sorted([(*setting, setting[1] * (1 if setting[2] == 1 else 2)) for setting in found], key=lambda x: x[3])


def measure(model, base, clips, first, config, solver, steps, guidance, passes):
    """{column: value} of one setting: percent, PSNR in dB, each with its 95 % interval over stories."""
    config = replace(config, steps=steps, guidance=guidance)
    made = continue_stories(model, base, clips, first, config.sections, config, load_object(SOLVERS[solver]))
    values = score_sections(made, clips, first)
    record = {"solver": solver, "steps": steps, "guidance": guidance, "passes": passes, "clips": len(clips)}
    for name in METRICS:
        mean, half = interval(per_clip(values[name]))
        record |= {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}
    return record


def draw(path, records):
    """Plot consistency and PSNR by passes: a line for each solver and guidance, of the same stories and noise."""
    labels = "passes of the DiT per section", "consistency, mean of the four, %", "PSNR, dB"
    with plot(path, *labels) as panels:
        for axes, name in zip(panels, ("consistency", "psnr")):
            for solver, guidance in dict.fromkeys((r["solver"], r["guidance"]) for r in records):
                line = [r for r in records if (r["solver"], r["guidance"]) == (solver, guidance)]
                label = solver + (f", guidance {guidance:g}" if guidance != 1 else "")
                axes.plot([r["passes"] for r in line], [r[name] for r in line], marker=".", label=label)
            ticks = sorted({r["passes"] for r in records})
            axes.set_xscale("log")
            axes.set_xticks(ticks, ticks)
            axes.minorticks_off()


def solvers(argv):
    """Continue held-out stories with each solver, in few and in many steps, with and without guidance: the scores of
    Table 2 and PSNR against the one right continuation, by passes of the DiT."""
    config = parse(SolversConfig, solvers, argv)
    stem = Path(config.out) / "solvers"
    check_outputs(stem, (".csv", ".png"), [config.checkpoint])
    base, first = story_base({config.checkpoint: read_config(config.checkpoint)}, config)
    config.shift = base.shift if config.shift is None else config.shift
    config.guidance = base.guidance if config.guidance is None else config.guidance
    model, base, _ = open_checkpoint(config.checkpoint, config, "finetune")
    clips = stories(config, base, sections=max(STORY_SECTIONS, first + config.sections))
    records = []
    for setting in settings(config):
        records.append(r := measure(model, base, clips, first, config, *setting))
        print(
            f"{r['passes']:3} passes: {r['solver']:6}{r['steps']:3} steps, guidance {r['guidance']:g}: consistency "
            f"{r['consistency']:.1f} % ({r['consistency_low']:.1f} to {r['consistency_high']:.1f}), "
            f"PSNR {r['psnr']:.2f} dB"
        )
    write_csv(f"{stem}.csv", records)
    draw(f"{stem}.png", records)
    print(
        f"{config.checkpoint}: {config.clips} stories, {config.sections} sections of each, shift {config.shift:g}, "
        f"seed {config.seed} of the noise; wrote {stem}.csv and .png"
    )
