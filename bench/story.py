"""The story test: a character leaves and returns. How well is it remembered, by seconds of absence?

python eval.py story runs/t2/*        finished runs of finetune.py side by side: a plot, a CSV, pictures
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bench.consistency import StoryConfig, continue_runs, story_base
from bench.plots import plot
from bench.report import write_csv
from bench.runs import label, parse_runs, read_runs
from bench.stats import wilson
from data import Clip, Clips
from dolls.drawing import render
from dolls.stories import FRAMINGS, make_shot, make_story, world_seed
from util.files import check_outputs
from util.sheets import save_contact_sheet
from util.video import to_pixels

MOST_ABSENT = 7  # sections
SHOWN = ("cloth", "identity", "position_error")  # the scores that are plotted; the first two are right or wrong


def make_absence_story(seed, absence, sections=10):
    """A Story whose only character leaves for the last `absence` of the `sections`, and returns in the section after,
    in a known place.

    The character is shown twice before, whole: in the first section, and in the last before it leaves; the thing is
    shown meanwhile. The first three sections introduce the places. What is asked for is the same for every absence, and
    so is how much of the character was shown: having seen less of it is not having seen it long ago.
    """
    rng, story, shots = np.random.default_rng(seed), make_story(seed, 1), []
    for k in range(sections + 1):
        scene, framing = (k, 0) if k < 3 else rng.integers((3, len(FRAMINGS))).tolist()
        here = k in (0, sections - 1 - absence, sections)
        framing = 0 if here and k < sections else framing
        shots.append(make_shot(rng, scene, 0 if here else None, None if here else 0, framing, k < 3))
    return replace(story, shots=tuple(shots))


def absence_clips(n, base, sections):
    """n held-out stories, each with every absence from 0 to MOST_ABSENT, encoded: Clips, all absences of the first
    story before the second."""
    clips = []
    for i in range(n):
        for absence in range(MOST_ABSENT + 1):
            story = make_absence_story(world_seed("held-out", i), absence, sections)
            pixels = torch.from_numpy(render(story, None, base.section, *base.sizes[0])[0])
            storyboard = [(k * base.section, story.caption(k)) for k in range(sections + 1)]
            clips.append(Clip(base.codec.encode(to_pixels(pixels)[None])[0], storyboard, pixels, story))
    return Clips(clips)


def lowest_seeds(runs):
    """{folder: config} of the lowest seed of each method and rate, sorted by them."""
    found = {}
    for folder, trained in sorted(runs.items(), key=lambda run: (label(run[1]), run[1]["seed"])):
        found.setdefault(label(trained), (folder, trained))
    return dict(found.values())


def by_absence(row, n):
    """({score: (absences, n)}, {score: [(low, high)] of each absence, percent}) of a row; n stories."""
    values = {name: row.values[name].view(n, -1).T for name in SHOWN}
    ends = {}
    for name in SHOWN[:2]:
        intervals = [wilson((right == 100).sum().item(), n) for right in values[name]]
        ends[name] = [(100 * low, 100 * high) for low, high in intervals]
    return values, ends


def make_records(row, seconds, n):
    """The lines of the CSV of a row: one dict per absence, of so many seconds."""
    values, ends = by_absence(row, n)
    records = []
    for k, absent in enumerate(seconds):
        record = {"method": row.method, "rate": row.rate, "run": row.folder}
        record |= {"step": row.trained["step"], "seed": row.trained["seed"], "seconds_absent": absent, "clips": n}
        record |= {name: x[k].mean().item() for name, x in values.items()}
        for name, intervals in ends.items():
            record |= {f"{name}_low": intervals[k][0], f"{name}_high": intervals[k][1]}
        records.append(record)
    return records


def draw_absences(path, rows, seconds, n):
    """Plot the scores of all rows by seconds of absence."""
    with plot(path, "absence, s", "cloth, %", "identity, %", "position error, pixels") as panels:
        for row in rows:
            values, ends = by_absence(row, n)
            for axes, (name, x) in zip(panels, values.items()):
                (line,) = axes.plot(seconds, x.mean(1), marker=".", label=row.name)
                if len(rows) <= 6 and name in ends:  # more bands would hide the lines
                    band = dict(color=line.get_color(), alpha=0.1, linewidth=0)
                    axes.fill_between(seconds, *zip(*ends[name]), **band)
        for axes in panels[:2]:
            axes.axhline(100 / 16, color="grey", linestyle=":", label="chance")


def draw_strip(path, rows, truth, seconds):
    """Write a contact sheet: what each row drew when the character returned. truth: the true frame (1, H, W, 3)."""
    sheet = [(row.name.replace(" ", "\n"), row.pictures[:, 0]) for row in rows]
    sheet.append(("truth", truth.expand(MOST_ABSENT + 1, -1, -1, -1)))
    save_contact_sheet(sheet, path, [f"{s:g} s" for s in seconds])


def print_record(r):
    """Print a line of the CSV."""
    scores = [f"{name} {r[name]:5.1f} % ({r[f'{name}_low']:.0f} to {r[f'{name}_high']:.0f})" for name in SHOWN[:2]]
    scores.append(f"position error {r['position_error']:.1f} px")
    run = f"{r['method']:18}{r['rate']:8}step {r['step']}, seed {r['seed']}"
    print(f"{run}, {r['seconds_absent']:4g} s absent: {', '.join(scores)}")


def story(argv):
    """RUN...: a character leaves and returns; how often are clothes and face right, by seconds of absence? (The
    position error tells whether it is drawn at all.)"""
    folders, config = parse_runs(StoryConfig, story, argv)
    runs = lowest_seeds(read_runs(folders, "story", "finetune", "story"))
    check_outputs(Path(config.out) / "table2_story", (".csv", ".png", "_strip.png"))
    base, first = story_base(runs, config)
    clips, middle = absence_clips(config.clips, base, first), base.section // 2

    def select(made):
        return made[: MOST_ABSENT + 1, 0, middle : middle + 1]  # of the first story

    rows = continue_runs(runs, "story", base, clips, first, 1, config, select)
    seconds = [k * base.section * base.codec.stride[0] / base.fps for k in range(MOST_ABSENT + 1)]
    records = [record for row in rows for record in make_records(row, seconds, config.clips)]
    stem = Path(config.out) / "table2_story"
    draw_absences(f"{stem}.png", rows, seconds, config.clips)
    write_csv(f"{stem}.csv", records)
    draw_strip(f"{stem}_strip.png", rows, clips[0].pixels[None, first * base.section + middle], seconds)
    for record in records:
        print_record(record)
    print(
        f"{config.clips} stories, {config.steps} Euler steps, guidance {config.guidance:g}, seed {config.seed}; "
        f"wrote {stem}.csv, .png and _strip.png"
    )
