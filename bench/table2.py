"""Table 2: do the sections that follow keep the clothes, faces, things and places of the history?

python eval.py table2 runs/t2/*       finished runs of finetune.py side by side: a table, differences, pictures
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from bases import open_base
from bench.consistency import StoryConfig, continue_runs, score_sections, story_base
from bench.plots import plot
from bench.report import compare, describe_runs, expected_pairs, markdown, write_table
from bench.runs import first_seeds, parse_runs, read_runs, stories
from bench.stats import interval, rank_correlation
from dolls.dataset import STORY_SECTIONS
from dolls.scores import MAIN
from util.cli import UserError
from util.files import check_outputs
from util.sheets import contact_sheet, save_contact_sheet
from util.video import to_frames
from util.video_writer import VideoWriter

# the paper's own figures, by models that judged its own videos: cloth, identity and object of its first version
PAPER = {
    ("proposed", "4x4x2"): (96.12, 70.73, 89.89),
    ("proposed", "2x2x2"): (96.71, 72.12, 90.27),
    ("only-lr", "4x4x2"): (91.98, 69.22, 85.32),
    ("without-pretrain", "4x4x2"): (87.12, 66.99, 81.13),
    ("keyframes", ""): (95.09, 68.22, 91.19),
}
# and cloth, character, object and scene of its sixth, which has another judge and more rows
PAPER_6 = {
    ("proposed", "2x2x1"): (85.54, 93.78, 84.56, 92.59),
    ("proposed", "2x2x2"): (87.74, 85.90, 85.45, 87.11),
    ("proposed", "4x4x2"): (77.40, 80.19, 74.38, 72.21),
    ("only-lr", "4x4x2"): (76.12, 74.29, 67.03, 65.06),
    ("without-lr", "4x4x2"): (54.86, 67.73, 64.57, 58.01),
    ("frozen", "4x4x2"): (58.39, 61.42, 58.33, 62.69),
    ("without-pretrain", "4x4x2"): (50.37, 52.64, 52.53, 52.84),
    ("sliding-window", "8"): (45.00, 46.65, 48.52, 57.02),
}
SAME_RATE = ("without-pretrain", "frozen", "only-lr", "without-lr", "large-patchifier", "token-merging")
NO_RATE = (("sliding-window", "1"), ("sliding-window", "8"), ("keyframes", ""), ("none", ""))
EXPECTED = [  # chains of (method, rate), best first
    [("proposed", rate) for rate in ("2x2x1", "2x2x2", "4x4x2")],
    *[
        [("proposed", rate), other]
        for rate in ("2x2x2", "4x4x2")
        for other in (*((method, rate) for method in SAME_RATE), *NO_RATE)
    ],
]
METRICS = (*MAIN, "psnr", "cloth_hard", "object_hard", "obeys", "position_error", "consistency")


@dataclass
class Table2Config(StoryConfig):
    clips: int = 256  # held-out stories
    sections: int = 3  # written after a full history of each
    out: str = "out"  # folder for table2.md, .csv, .png, .mp4, ...; if table1.csv is there, it is read


# ---------------------------------------------------------------------------------------------------------------------
# The table


def record(row):
    """{column: value} of a row of the CSV: percent; position error in pixels, PSNR in dB; "" where there is none."""
    base, key = open_base(row.trained["preset"]), (row.method, row.rate)
    columns = {"method": row.method, "rate": row.rate}
    columns["tokens_per_second"] = row.costs["tokens"] * base.fps / (base.history * base.codec.stride[0])
    figures = {metric: interval(row.each(metric)) for metric in METRICS}
    columns |= {metric: mean for metric, (mean, _) in figures.items()} | row.costs
    for metric, (mean, half) in figures.items():
        columns |= {f"{metric}_low": mean - half, f"{metric}_high": mean + half}
    for version, paper, names in ("paper", PAPER, MAIN[:3]), ("paper_6", PAPER_6, MAIN):
        columns |= dict(zip([f"{version}_{name}" for name in names], paper.get(key, ("",) * 4)))
    return columns


def table(rows):
    """Lines of Markdown: one per row."""
    heads = ["method", "rate", *MAIN, "PSNR, dB", "cloth, hard", "object, hard", "obeys", "position error, px"]
    heads += ["mean of the four", "tokens", "GFLOP per section", "ms per section"]
    lines = []
    for row in rows:
        c, cells = record(row), [row.method, row.rate]
        for metric in METRICS:
            digits = 2 if metric == "psnr" else 1
            cells.append(f"{c[metric]:.{digits}f} ± {c[f'{metric}_high'] - c[metric]:.{digits}f}")
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
    explanation = (
        "The paper's figures, by models that judged its own videos: only the order can be compared. (Version 6 names "
        "faces and bodies together *character*; its FramePack has other numbers of tokens than a row here.)"
    )
    return ["", explanation, "", *markdown(heads, lines)] if lines else []


def papers_means(paper, metrics):
    """{(method, rate): the mean of its figures in these of MAIN}, where it has all of them."""
    found = {row: dict(zip(MAIN, figures)) for row, figures in paper.items()}
    return {row: fmean(known[m] for m in metrics) for row, known in found.items() if set(metrics) <= set(known)}


def differences(rows, everything):
    """Lines of Markdown: paired differences between neighbours of the table, then between what is expected to be in
    order. rows: best first; everything: the rows of all seeds."""
    neighbours, expected = list(zip(rows, rows[1:])), expected_pairs(rows, EXPECTED)
    lines = []
    for title, pairs, metrics in (
        ("Neighbours in the table", neighbours, MAIN),
        ("Expected", expected, MAIN),
        *(("Expected", expected, (name,)) for name in MAIN),
    ):
        theirs = {
            "paper's, version 1": papers_means(PAPER, metrics),
            "paper's, version 6": papers_means(PAPER_6, metrics),
        }
        name = "the mean of the four" if metrics == MAIN else metrics[0]
        title = f"{title}: difference in {name} on the same stories, percentage points"
        lines += compare(title, pairs, metrics, theirs, everything)
    return lines


def drift(rows, sections):
    """Lines of Markdown: how the scores of the last 15 % of the sections differ from those of the first 15 %."""
    n = round(0.15 * sections)
    if n == 0:
        return []
    lines = []
    for row in rows:
        cells = []
        for metric in (*MAIN, "psnr", "position_error"):
            values = row.values[metric]  # (stories, sections), nan where nothing is asked
            first, last = values[:, :n].nanmean().item(), values[:, -n:].nanmean().item()
            cells.append(f"{first:.1f} → {last:.1f} ({last - first:+.1f})")
        lines.append([row.name, *cells])
    title = f"Drift over {sections} sections: mean of the first {n} → of the last {n}"
    return ["", title, "", *markdown(["method", *MAIN, "PSNR, dB", "position error, px"], lines)]


def explain_scores(ceiling):
    """The paragraph of the Markdown file that says what the scores are. ceiling: see describe()."""
    counts = [f"{int((~ceiling[name].isnan()).sum())} for {name}" for name in MAIN]
    highest = [f"{ceiling[name].nanmean():.1f} ({name})" for name in MAIN]
    return (
        "Scores: percent of sections whose region of cloth, face (identity), object or scene is nearest to the true "
        "rendering among 16 (chance 6.25), ± 95 % interval over stories. Sections that count: "
        f"{', '.join(counts)}, where it is shown and was shown whole in the history that is still remembered. Hard: "
        "the 15 others have the same palette, so that emblem and pattern decide (faces and scenes have none). Obeys: "
        "nearest to the place asked for among the three of the story (chance 33.3; the caption tells it, without "
        "memory). Position error: of the best match of the whole character. PSNR: against the one right continuation. "
        "(Both say how well it is drawn, more than what is remembered: a blurred mean of all worlds with the right "
        "caption has a good PSNR, and scores at chance.) The truth after the codec scores "
        f"{', '.join(highest)}, PSNR {ceiling['psnr'].nanmean():.2f} dB."
    )


def describe(rows, everything, config, ceiling):
    """The Markdown file: the table, paired differences, the spread over seeds, and what produced it all.

    ceiling: {score: (n, S)} of the truth after the codec.
    """
    trained, n = everything[0].trained, len(rows[0].values["psnr"])
    return [
        "# Consistency of what follows",
        "",
        f"{n} held-out stories of the paper-doll world, continued for {config.sections} sections after the full "
        f"history, with prompts; {config.steps} Euler steps, shift {config.shift:g}, guidance {config.guidance:g}, "
        f"seed {config.seed} of the noise. Trained alike: {trained['steps']} steps of {trained['batch']} clips of "
        f"{trained['data']}, from {trained['init']}, preset {trained['preset']}.",
        "",
        explain_scores(ceiling),
        "",
        *table(rows),
        "",
        "`keyframes` stands in for WanI2V + QwenEdit (2p), which needs two other models.",
        *papers_table(rows),
        *differences(rows, everything),
        *drift(rows, config.sections),
        *describe_runs(everything, "consistency", "the mean of the four", "percentage points"),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def draw_sections(path, rows):
    """Plot each score by the number of the section after the history."""
    names = [name for name in METRICS if name != "consistency"]
    units = {"position_error": "position error, pixels", "psnr": "PSNR, dB"}
    labels = [units.get(name, f"{name.replace('_', ', ')}, %") for name in names]
    with plot(path, "section after the history", *labels) as panels:
        for axes, name in zip(panels, names):
            for row in rows:
                means = row.values[name].nanmean(0).tolist()
                axes.plot(range(1, len(means) + 1), means, marker=".", label=row.name)
            axes.set_xticks(range(1, len(means) + 1))


def read_table1(path):
    """{(method, rate): PSNR} of a table1.csv, {} if there is none. Raises UserError if it is something else."""
    if not path.is_file():
        return {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return {(c["method"], c["rate"]): float(c["psnr"]) for c in csv.DictReader(file)}
    except (KeyError, TypeError, ValueError, csv.Error):
        raise UserError(
            f"{path} is not what eval.py table1 writes (method, rate, psnr, ...): make it again, or move it away"
        ) from None


def draw_claim(path, rows, found):
    """Plot the paper's central claim: what retrieves frames better writes more consistent sections.

    One dot per method that both tables hold. found: of read_table1(). Returns a line that says what was found, or None
    if there is no dot.
    """
    dots = [
        (found[row.method, row.rate], row.each("consistency").mean().item(), row.name)
        for row in rows
        if (row.method, row.rate) in found
    ]
    if not dots:
        return None
    rho, chance = rank_correlation([x for x, _, _ in dots], [y for _, y, _ in dots])
    title = f"dots: {len(dots)}, "
    if math.isnan(rho):
        title += "too few or too alike for a rank correlation"
    else:
        title += f"rank correlation {rho:.2f} ({100 * chance:.1f} % of random orders reach it)"
    with plot(path, "frame retrieval (Table 1): PSNR, dB", "consistency (Table 2): mean of the four, %") as (axes,):
        axes.set_title(title)
        for i, (x, y, name) in enumerate(dots):
            axes.plot(x, y, "os^"[i // 10 % 3], label=name)
    return title


def side_by_side(named, heading):
    """A picture of one frame per name, in columns of six (which fit a screen): [(name, (1, H, W, 3))] -> (H, W, 3)."""
    sheets = [contact_sheet(named[i : i + 6], [heading]) for i in range(0, len(named), 6)]
    height = len(sheets[0])
    padded = [np.pad(x, ((0, height - len(x)), (0, 0), (0, 0)), constant_values=255) for x in sheets]
    return np.concatenate(padded, axis=1)


def draw_pictures(stem, rows, clip, first, base):
    """stem.png: a story's history, what each row wrote after its `first` sections, and the truth. stem.mp4: the newest
    two sections of the history and what follows, side by side."""
    section, n = base.section, rows[0].pictures.shape[1]
    begin, before = first * section, 2 * section
    truth = clip.pixels[: begin + n]  # (F, H, W, 3)
    # an older measurement may have kept more than one story
    made = [(row.name.replace(" ", "\n"), row.pictures[0]) for row in rows] + [("truth", truth[begin:])]
    history = "history,\none frame per section", truth[section // 2 : begin : section]
    every = -(-n // 12)  # at most twelve frames in a row
    save_contact_sheet([history, *((name, frames[::every]) for name, frames in made)], f"{stem}.png")
    videos = [(name, torch.cat([truth[begin - before : begin], x])) for name, x in made]
    pictures = []
    for f in range(before + n):
        heading = "history" if f < before else f"section {1 + (f - before) // section}"
        pictures.append(side_by_side([(name, x[f : f + 1]) for name, x in videos], heading))
    pictures = np.stack(pictures)
    with VideoWriter(f"{stem}.mp4", base.fps, *pictures.shape[1:3], scale=1) as writer:
        writer.write(pictures)


# ---------------------------------------------------------------------------------------------------------------------
# python eval.py table2


def score_truth(clips, first, sections, base):
    """score_sections() of the true sections after the codec."""
    true = torch.cat([clip.cut(first * base.section, (first + sections) * base.section) for clip in clips])
    true = to_frames(base.codec.decode(true)).unflatten(1, (sections, base.section))
    return score_sections(true, clips, first)


def table2(argv):
    """RUN...: continue the same stories with finished runs of finetune.py; scores, paired differences, pictures."""
    folders, config = parse_runs(Table2Config, table2, argv)
    runs, retrieved = read_runs(folders, "table2", "finetune", "table2"), read_table1(Path(config.out) / "table1.csv")
    check_outputs(Path(config.out) / "table2", (".md", ".csv", ".png", ".mp4"))
    check_outputs(Path(config.out) / "table2", ("_seeds.csv", "_curves.png", "_sections.png", "_claim.png"))
    base, first = story_base(runs, config)
    clips = stories(config, base, sections=max(STORY_SECTIONS, first + config.sections))

    def select(made):
        return made[:1].flatten(1, 2)  # of the first story

    everything = continue_runs(runs, "table2", base, clips, first, config.sections, config, select)
    ceiling = score_truth(clips, first, config.sections, base)
    rows = sorted(first_seeds(everything), key=lambda row: row.each("consistency").mean(), reverse=True)

    stem, metrics = Path(config.out) / "table2", ("consistency", *METRICS[:-1])
    write_table(stem, describe(rows, everything, config, ceiling), rows, everything, record, metrics)
    draw_sections(f"{stem}_sections.png", rows)
    draw_pictures(stem, rows, clips[0], first, base)
    print(f"wrote {stem}.md, .csv, .png, .mp4, _seeds.csv, _curves.png and _sections.png")
    if found := draw_claim(f"{stem}_claim.png", rows, retrieved):
        print(f"wrote {stem}_claim.png: {found}")
