"""Table 2: does what follows keep the clothes, faces, things and places of the history?

    python eval.py table2 runs/t2/*       continue held-out stories with finished runs of finetune.py: a table, pictures
    python eval.py story runs/t2/*        a character leaves and returns: accuracy by seconds of absence

How a section is scored: scores.py.
"""
import csv
import math
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import budget
import speed
import world
from codec import make_codec, to_frames, to_pixels
from data import STORY_SECTIONS, Clip, Clips, world_clips
from devices import autocast, pick_device
from encoder import Memory
from model import UserError, euler, get_preset
from pretrain import downsample, generator
from scores import MAIN, score
from tables import (EvalConfig, compare, describe_machine, describe_runs, expected_pairs, first_seeds, interval,
                    label, markdown, measure_runs, open_checkpoint, parse_runs, per_clip, plot, question, read_runs,
                    wilson, write_csv, write_table)
from video import VideoWriter, contact_sheet, contact_strip

# ---------------------------------------------------------------------------------------------------------------------
# Generating


@torch.no_grad()
def continue_stories(model, tools, clips, first, sections, config):
    """Write sections from number `first` on, each from all before it: uint8 (n, S, F, H, W, 3)."""
    preset, codec, device, made = tools.preset, tools.codec, tools.device, []
    for start in tqdm(range(0, len(clips), config.batch), desc=f"continuing, {model.method}"):
        rows = range(start, min(start + config.batch, len(clips)))
        history = torch.cat([clips[row].cut(0, first * preset.section) for row in rows]).to(device)
        memory = Memory(model, codec, preset.history // preset.section)         # as much as training showed it
        with autocast(device):
            memory.append(history)
        shape = (1, *history.shape[1:2], preset.section, *history.shape[3:])
        for k in range(first, first + sections):
            frames = k * preset.section + torch.arange(preset.section, device=device)
            noise = torch.cat([torch.randn(shape, generator=generator(config.seed, row, k)) for row in rows]).to(device)
            text = torch.cat([clips[row].text(k * preset.section, tools.prompts) for row in rows]).to(device)
            with autocast(device):
                x = euler(model.dit, noise, text, frames, memory.context(), config.steps, config.shift,
                          config.guidance).float()
                memory.append(x)
            made.append(to_frames(codec.decode(x)).cpu())                       # (B, F, H, W, 3)
    return torch.cat([torch.stack(made[i:i + sections], 1) for i in range(0, len(made), sections)])


def costs(model, tools, clip, config):
    """{column: value} of writing a section after a full history of one clip: memory tokens; FLOPs and milliseconds of
    all the sampler's forwards (one is timed, the median of 5) and of φ of the new section."""
    preset, device = tools.preset, tools.device
    hr, calls = clip.cut(0, preset.history).to(device), config.steps * (1 if config.guidance == 1 else 2)
    new = hr[:, :, -preset.section:]
    with torch.no_grad(), autocast(device), FlopCounterMode(display=False) as counter:
        memory = model.encode(hr, downsample(tools, hr))
        before = counter.get_total_flops()
        model.encode(new, downsample(tools, new))
        of_encoder = counter.get_total_flops() - before
    tokens, noisy = 0 if memory is None else memory[0].shape[1], math.prod(new.shape[2:]) // math.prod(preset.dit.patch)
    text = clip.text(preset.history, tools.prompts).to(device)
    frames, t = preset.history + torch.arange(preset.section, device=device), torch.full((1,), 500.0, device=device)
    jobs = {"section": lambda: model.dit(new, t, text, frames, memory),
            "φ": lambda: model.encode(new, downsample(tools, new))}
    with torch.no_grad(), autocast(device):
        times = {name: 1000 * median(x) for name, x in speed.alternate(jobs, 5, device).items()}
    return {"tokens": tokens, "flops_per_section": calls * budget.flops(preset.dit, noisy, tokens) + of_encoder,
            "ms_per_section": round(calls * times["section"] + times["φ"], 1)}


# ---------------------------------------------------------------------------------------------------------------------
# Table 2

# the paper's own figures, by models that judged its own videos: cloth, identity and object of its first version
PAPER = {("proposed", "4x4x2"): (96.12, 70.73, 89.89), ("proposed", "2x2x2"): (96.71, 72.12, 90.27),
         ("only-lr", "4x4x2"): (91.98, 69.22, 85.32), ("without-pretrain", "4x4x2"): (87.12, 66.99, 81.13),
         ("keyframes", ""): (95.09, 68.22, 91.19)}
# and cloth, character, object and scene of its sixth, which has another judge and more rows
PAPER_6 = {("proposed", "2x2x1"): (85.54, 93.78, 84.56, 92.59), ("proposed", "2x2x2"): (87.74, 85.90, 85.45, 87.11),
           ("proposed", "4x4x2"): (77.40, 80.19, 74.38, 72.21), ("only-lr", "4x4x2"): (76.12, 74.29, 67.03, 65.06),
           ("without-lr", "4x4x2"): (54.86, 67.73, 64.57, 58.01), ("frozen", "4x4x2"): (58.39, 61.42, 58.33, 62.69),
           ("without-pretrain", "4x4x2"): (50.37, 52.64, 52.53, 52.84),
           ("sliding-window", "8"): (45.00, 46.65, 48.52, 57.02)}
EXPECTED = ([("proposed", rate) for rate in ("2x2x1", "2x2x2", "4x4x2")],       # best first
            *([("proposed", rate), other] for rate in ("2x2x2", "4x4x2") for other in (
                *((method, rate) for method in ("without-pretrain", "frozen", "only-lr", "without-lr",
                                                "large-patchifier", "token-merging")),
                ("sliding-window", "1"), ("sliding-window", "8"), ("keyframes", ""), ("none", ""))))
METRICS = ("cloth", "identity", "object", "scene", "psnr", "cloth_hard", "object_hard", "obeys", "position_error",
           "consistency")


@dataclass
class StoryConfig(EvalConfig):
    guidance: float = 1.5         # classifier-free guidance: 1 is none
    out: str = "assets"           # folder for table2_story.csv, .png and _strip.png


@dataclass
class Table2Config(StoryConfig):
    clips: int = 256              # held-out stories
    sections: int = 3             # written after a full history of each
    out: str = "assets"           # folder for table2.md, .csv, .png, .mp4, ...; table1.csv there is read


def world_preset(runs, sections=1):
    """(preset of the runs, sections of its history): the paper-doll world must have so many, and `sections` more."""
    name = next(iter(runs.values()))["preset"]
    preset = get_preset(name)
    first = preset.history // preset.section
    if preset.codec != "dct" or first + sections > STORY_SECTIONS:
        raise UserError(f"{sections} sections after the {first} of a history of --preset {name}: stories of the paper-"
                        f"doll world have {STORY_SECTIONS}; give runs of --preset nano and fewer --sections")
    return preset, first


def score_sections(made, clips, first):
    """{score: (n, S)} of sections uint8 (n, S, F, H, W, 3) from number `first` on; and consistency, the mean of the
    four main scores, (n, 1)."""
    values = {name: x[0] for name, x in score(made[None], [clip.story for clip in clips], first).items()}
    return values | {"consistency": torch.stack([per_clip(values[name]) for name in MAIN]).mean(0)[:, None]}


def continue_runs(runs, name, codec, clips, first, sections, config, show):
    """[Row]: the same clips continued with each run, and scored. name: of the file that keeps this in a run's
    folder; show: (n, S, F, H, W, 3) -> the pictures of a Row, (k, F', H, W, 3)."""
    def measure(folder):
        model, tools, _ = open_checkpoint(Path(folder) / "model.safetensors", config, "finetune")
        made = continue_stories(model, tools, clips, first, sections, config)
        return score_sections(made, clips, first), show(made).contiguous(), costs(model, tools, clips[0], config)
    asked = question(config, codec, clips, "steps", "shift", "guidance", "seed", first=first, sections=sections)
    return measure_runs(runs, name, asked, describe_machine(pick_device(config.device)), measure)


def record(row):
    """{column: value} of a row of the CSV: percent; position error in pixels, PSNR in dB; "" where there is none."""
    preset = get_preset(row.trained["preset"])                      # of the paper-doll world: a frame is a latent
    columns = {"method": row.method, "rate": row.rate,
               "tokens_per_second": row.costs["tokens"] * preset.fps / preset.history}
    figures = {metric: interval(row.each(metric)) for metric in METRICS}
    columns |= {metric: mean for metric, (mean, _) in figures.items()} | row.costs
    for metric, (mean, half) in figures.items():
        columns |= {f"{metric}_low": mean - half, f"{metric}_high": mean + half}
    for version, paper, names in ("paper", PAPER, MAIN[:3]), ("paper_6", PAPER_6, MAIN):
        columns |= dict(zip([f"{version}_{name}" for name in names], paper.get((row.method, row.rate), ("",) * 4)))
    return columns


def table(rows):
    """Lines of Markdown: a row each."""
    heads = ("method", "rate", "cloth", "identity", "object", "scene", "PSNR, dB", "cloth, hard", "object, hard",
             "obeys", "position error, px", "mean of the four", "tokens", "GFLOP a section", "ms a section")
    lines = []
    for row in rows:
        c = record(row)
        cells = [row.method, row.rate]
        cells += [f"{c[m]:.{1 + (m == 'psnr')}f} ± {c[f'{m}_high'] - c[m]:.{1 + (m == 'psnr')}f}" for m in METRICS]
        cells += [f"{c['tokens']:,}", f"{c['flops_per_section'] / 1e9:,.1f}", f"{c['ms_per_section']:,.0f}"]
        lines.append(cells)
    return markdown(heads, lines)


def papers_table(rows):
    """Lines of Markdown: the paper's figures of these rows, where it has any."""
    heads = ["method", "rate", *(f"version 1: {name}" for name in MAIN[:3]), *(f"version 6: {name}" for name in MAIN)]
    lines = []
    for row in rows:
        key = row.method, row.rate
        if key in PAPER | PAPER_6:
            lines.append([*key, *map(str, PAPER.get(key, ("",) * 3)), *map(str, PAPER_6.get(key, ("",) * 4))])
    return ["", "The paper's figures, by models that judged its own videos: only the order can be compared. (Version 6 "
            "names faces and bodies together *character*; its FramePack has other numbers of tokens than a row "
            "here.)", "", *markdown(heads, lines)] if lines else []


def papers_means(paper, metrics):
    """{(method, rate): the mean of its figures in these of MAIN}, where it has all of them."""
    found = {row: dict(zip(MAIN, figures)) for row, figures in paper.items()}
    return {row: fmean(known[m] for m in metrics) for row, known in found.items() if set(metrics) <= set(known)}


def describe(rows, everything, config, ceiling):
    """The Markdown file: the table, paired differences, the spread over seeds, and what produced it all.
    ceiling: {score: (n, S)} of the truth after the codec."""
    trained, n = everything[0].trained, len(rows[0].values["psnr"])
    shown = {name: int((~ceiling[name].isnan()).sum()) for name in MAIN}
    lines = ["# Consistency of what follows", "",
             f"{n} held-out stories of the paper-doll world, continued for {config.sections} sections after the "
             f"full history, with prompts; {config.steps} Euler steps, shift {config.shift:g}, guidance "
             f"{config.guidance:g}, seed {config.seed} of the noise. Trained alike: {trained['steps']} steps of "
             f"{trained['batch']} clips of {trained['data']}, from {trained['init']}, preset {trained['preset']}.", "",
             "Scores: percent of sections whose region of cloth, face (identity), object or scene is nearest to the "
             "true rendering among 16 (chance 6.25), ± 95 % interval over stories. Sections that count: "
             + ", ".join(f"{count} for {name}" for name, count in shown.items()) + ", where it is shown and was shown "
             "whole in the history that is still remembered. Hard: the 15 others have the same palette, so that emblem "
             "and pattern decide (faces and scenes have none). Obeys: nearest "
             "to the place asked for among the three of the story (chance 33.3; the caption tells it, without memory). "
             "Position error: of the best match of the whole character. PSNR: against the one right continuation. "
             "(Both say how well it is drawn, more than what is remembered: a blurred mean of all worlds with the "
             "right caption has a good PSNR, and scores at chance.) The truth after the codec scores "
             + ", ".join(f"{ceiling[name].nanmean():.1f} ({name})" for name in MAIN)
             + f", PSNR {ceiling['psnr'].nanmean():.2f} dB.", "", *table(rows), "",
             "`keyframes` stands in for WanI2V + QwenEdit (2p), which needs two other models.", *papers_table(rows)]
    pairs = {"Neighbours in the table": list(zip(rows, rows[1:])), "Expected": expected_pairs(rows, EXPECTED)}
    for title, metrics in (("Neighbours in the table", MAIN), *(("Expected", m) for m in (MAIN, *zip(MAIN)))):
        theirs = {"paper's, version 1": papers_means(PAPER, metrics),
                  "paper's, version 6": papers_means(PAPER_6, metrics)}
        name = "the mean of the four" if metrics == MAIN else metrics[0]
        lines += compare(f"{title}: difference in {name} on the same stories, percentage points", pairs[title], metrics,
                         theirs, everything)
    return lines + describe_runs(everything, "consistency", "the mean of the four", "percentage points")


def draw_sections(path, rows):
    """Each score by the number of the section after the history."""
    names = [name for name in METRICS if name != "consistency"]
    units = {"position_error": "position error, pixels", "psnr": "PSNR, dB"}
    labels = [units.get(name, f"{name.replace('_', ', ')}, %") for name in names]
    with plot(path, "section after the history", *labels) as panels:
        for axes, name in zip(panels, names):
            for row in rows:
                means = row.values[name].nanmean(0).tolist()
                axes.plot(range(1, len(means) + 1), means, marker=".", label=row.name)
            axes.set_xticks(range(1, len(means) + 1))


def ranks(x):
    """Ranks from 1, the mean rank where values are equal."""
    x = np.asarray(x)
    return (x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) + 1) / 2


def rank_correlation(x, y, orders=10_000):
    """(Spearman's rank correlation, the share of random orders that reach it): nan where fewer than 3 or all equal."""
    a, b = ((r - r.mean()) / (r.std() or math.nan) for r in (ranks(x), ranks(y)))
    rho, rng = (a * b).mean(), np.random.default_rng(0)
    if len(a) < 3 or math.isnan(rho):
        return math.nan, math.nan
    return rho, np.mean([(a * rng.permutation(b)).mean() >= rho - 1e-9 for _ in range(orders)])


def read_table1(path):
    """{(method, rate): PSNR} of a table1.csv, empty if there is none. Raises UserError if it is something else."""
    if not path.is_file():
        return {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return {(c["method"], c["rate"]): float(c["psnr"]) for c in csv.DictReader(file)}
    except (KeyError, TypeError, ValueError, csv.Error):
        raise UserError(f"{path} is not what eval.py table1 writes (method, rate, psnr, ...): make it again, or move "
                        "it away") from None


def draw_claim(path, rows, found):
    """The paper's central claim: what retrieves frames better writes more consistent sections. A dot a method that both
    tables hold. found: of read_table1(). Returns what was found, a line, or None if there is no dot."""
    dots = [(found[row.method, row.rate], row.each("consistency").mean().item(), row.name) for row in rows
            if (row.method, row.rate) in found]
    if not dots:
        return None
    rho, chance = rank_correlation(*list(zip(*dots))[:2])
    title = f"dots: {len(dots)}, " + ("too few or too alike for a rank correlation" if math.isnan(rho) else
                                      f"rank correlation {rho:.2f} ({100 * chance:.1f} % of random orders reach it)")
    with plot(path, "frame retrieval (Table 1): PSNR, dB", "consistency (Table 2): mean of the four, %") as (axes,):
        axes.set_title(title)
        for i, dot in enumerate(dots):
            axes.plot(*dot[:2], "os^"[i // 10 % 3], label=dot[2])
    return title


def draw_pictures(stem, rows, clip, first, section, fps):
    """stem.png: a story's history, what each row wrote, and the truth. stem.mp4: the newest sections of the history and
    what follows, side by side."""
    n, begin, before = rows[0].pictures.shape[1], first * section, 2 * section
    names, truth = [row.name.replace(" ", "\n") for row in rows] + ["truth"], clip.pixels[:begin + n]   # (F, H, W, 3)
    made = [*(row.pictures[0] for row in rows), truth[begin:]]      # of an older measurement there may be more stories
    contact_strip([("history,\na frame a section", truth[section // 2:begin:section]), *zip(names, made)],
                  f"{stem}.png")
    made = list(zip(names, (torch.cat([truth[begin - before:begin], x]) for x in made)))
    columns = [made[i:i + 6] for i in range(0, len(made), 6)]       # 6 below one another fit a screen

    def sheet(f):
        heading = ["history" if f < before else f"section {1 + (f - before) // section}"]
        sheets = [contact_sheet([(name, x[f:f + 1]) for name, x in column], heading) for column in columns]
        pad = lambda x: np.pad(x, ((0, len(sheets[0]) - len(x)), (0, 0), (0, 0)), constant_values=255)
        return np.concatenate([pad(x) for x in sheets], axis=1)
    sheets = np.stack([sheet(f) for f in range(before + n)])
    with VideoWriter(f"{stem}.mp4", fps, *sheets.shape[1:3], scale=1) as writer:
        writer.write(sheets)


def table2(argv):
    """RUN...: continue the same stories with finished runs of finetune.py; scores, paired differences, pictures."""
    folders, config = parse_runs(Table2Config, table2, argv)
    runs, retrieved = read_runs(folders, "table2", "finetune", "table2"), read_table1(Path(config.out) / "table1.csv")
    preset, first = world_preset(runs, config.sections)
    codec = make_codec(preset)
    clips = world_clips("held-out", config.clips, preset, codec, config.cache, keep_pixels=True)
    everything = continue_runs(runs, "table2", codec, clips, first, config.sections, config,
                               lambda made: made[:1].flatten(1, 2))
    true = torch.cat([clip.cut(first * preset.section, (first + config.sections) * preset.section) for clip in clips])
    true = to_frames(codec.decode(true)).unflatten(1, (config.sections, preset.section))
    ceiling = score_sections(true, clips, first)
    rows = sorted(first_seeds(everything), key=lambda row: row.each("consistency").mean(), reverse=True)

    stem = Path(config.out) / "table2"
    write_table(stem, describe(rows, everything, config, ceiling), rows, everything, record,
                ("consistency", *METRICS[:-1]))
    draw_sections(f"{stem}_sections.png", rows)
    draw_pictures(stem, rows, clips[0], first, preset.section, preset.fps)
    print(f"wrote {stem}.md, .csv, .png, .mp4, _seeds.csv, _curves.png and _sections.png")
    if found := draw_claim(f"{stem}_claim.png", rows, retrieved):
        print(f"wrote {stem}_claim.png: {found}")


# ---------------------------------------------------------------------------------------------------------------------
# The story test

MOST_ABSENT = 7     # sections


def make_absence_story(seed, absence, sections=10):
    """A world.Story whose only character leaves for the last `absence` of the `sections` and returns in the section
    after, in a known place. It is shown twice before, whole: first of all, and last before it leaves; the thing is
    shown meanwhile. The first three sections introduce the places. What is asked for is the same for every absence, and
    so is how much was shown of the character: to have seen less of it is not to have seen it long ago."""
    rng, story, shots = np.random.default_rng(seed), world.make_story(seed, 1), []
    for k in range(sections + 1):
        scene, framing = (k, 0) if k < 3 else rng.integers((3, len(world.FRAMINGS))).tolist()
        here = k in (0, sections - 1 - absence, sections)
        framing = 0 if here and k < sections else framing
        shots.append(world.make_shot(rng, scene, 0 if here else None, None if here else 0, framing, k < 3))
    return replace(story, shots=tuple(shots))


def absence_clips(n, preset, codec, sections):
    """n held-out stories with every absence from 0 to MOST_ABSENT, encoded: Clips, the absence running fastest."""
    clips = []
    for i in range(n):
        for absence in range(MOST_ABSENT + 1):
            story = make_absence_story(world.world_seed("held-out", i), absence, sections)
            pixels = torch.from_numpy(world.render(story, None, preset.section, *preset.sizes[0])[0])
            board = [(k * preset.section, world.caption(story, k)) for k in range(sections + 1)]
            clips.append(Clip(codec.encode(to_pixels(pixels)[None])[0], board, pixels, story))
    return Clips(clips)


def story(argv):
    """RUN...: a character leaves and returns; how often are clothes and face right, by seconds of absence? (The
    position error tells whether it is drawn at all.)"""
    folders, config = parse_runs(StoryConfig, story, argv)
    runs = read_runs(folders, "story", "finetune", "story")
    lowest = {}                                                     # of several seeds, that of the curve
    for folder, trained in sorted(runs.items(), key=lambda run: (label(run[1]), run[1]["seed"])):
        lowest.setdefault(label(trained), (folder, trained))
    runs = dict(lowest.values())
    preset, first = world_preset(runs)
    codec = make_codec(preset)
    clips, middle = absence_clips(config.clips, preset, codec, first), preset.section // 2
    rows, records = continue_runs(runs, "story", codec, clips, first, 1, config,
                                  lambda made: made[:MOST_ABSENT + 1, 0, middle:middle + 1]), []
    seconds = [k * preset.section * codec.stride[0] / preset.fps for k in range(MOST_ABSENT + 1)]
    stem = Path(config.out) / "table2_story"
    labels = "cloth, %", "identity, %", "position error, pixels"
    with plot(f"{stem}.png", "absence, s", *labels) as panels:
        for row in rows:
            by_absence = {name: row.values[name].view(config.clips, -1).T
                          for name in ("cloth", "identity", "position_error")}
            ends = {name: [[100 * end for end in wilson((right == 100).sum().item(), config.clips)]
                           for right in by_absence[name]] for name in ("cloth", "identity")}    # right or wrong
            for axes, (name, x) in zip(panels, by_absence.items()):
                line, = axes.plot(seconds, x.mean(1), marker=".", label=row.name)
                if len(rows) <= 6 and name in ends:                 # of more, bands would hide the lines
                    axes.fill_between(seconds, *zip(*ends[name]), color=line.get_color(), alpha=0.1, linewidth=0)
            for k, s in enumerate(seconds):
                r = {"method": row.method, "rate": row.rate, "run": row.folder, "step": row.trained["step"],
                     "seed": row.trained["seed"], "seconds_absent": s, "clips": config.clips}
                r |= {name: x[k].mean().item() for name, x in by_absence.items()}
                for name in ends:
                    r |= {f"{name}_low": ends[name][k][0], f"{name}_high": ends[name][k][1]}
                records.append(r)
        for axes in panels[:2]:
            axes.axhline(100 / 16, color="grey", linestyle=":", label="chance")
    write_csv(f"{stem}.csv", records)
    truth = clips[0].pixels[None, first * preset.section + middle].expand(MOST_ABSENT + 1, -1, -1, -1)
    contact_strip([*((row.name.replace(" ", "\n"), row.pictures[:, 0]) for row in rows), ("truth", truth)],
                  f"{stem}_strip.png", [f"{s:g} s" for s in seconds])
    for r in records:
        print(f"{r['method']:18}{r['rate']:8}step {r['step']}, seed {r['seed']}, {r['seconds_absent']:4g} s absent: "
              + ", ".join(f"{name} {r[name]:5.1f} % ({r[f'{name}_low']:.0f} to {r[f'{name}_high']:.0f})"
                          for name in ("cloth", "identity")) + f", position error {r['position_error']:.1f} px")
    print(f"{config.clips} stories, {config.steps} Euler steps, guidance {config.guidance:g}, seed {config.seed}; "
          f"wrote {stem}.csv, .png and _strip.png")
