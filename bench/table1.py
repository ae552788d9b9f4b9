"""Table 1: how well each method's memory keeps the frames of a history.

python eval.py table1 runs/t1/*       finished runs of pretrain.py side by side: a table, differences, pictures
"""

import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bases import open_base
from bench.lpips import open_lpips
from bench.plots import plot
from bench.report import compare, describe_runs, expected_pairs, markdown, write_table
from bench.retrieval import PictureConfig, clean_retrieval, measure, reconstruct
from bench.runs import (
    Row,
    describe_machine,
    first_seeds,
    measure_runs,
    open_checkpoint,
    parse_runs,
    question,
    read_runs,
    stories,
)
from bench.speed import alternate
from bench.stats import interval
from data import collect, video_clips
from encoder import find_method
from util.cli import UserError
from util.device import autocast, pick_device
from util.files import check_outputs
from util.folder import find_videos, split_videos
from util.latents import encode_videos
from util.sheets import save_contact_sheet

# PSNR, SSIM and LPIPS in the paper's first version: Wan and Hunyuan on its own videos
PAPER = {
    ("large-patchifier", "4x4x2"): (12.93, 0.412, 0.365),
    ("only-lr", "4x4x2"): (15.21, 0.472, 0.212),
    ("without-lr", "4x4x2"): (15.73, 0.423, 0.198),
    ("proposed", "4x4x2"): (17.41, 0.596, 0.171),
    ("proposed", "2x2x2"): (19.12, 0.683, 0.152),
    ("proposed", "2x2x1"): (20.19, 0.705, 0.121),
}
EXPECTED = [  # chains of (method, rate), best first
    *[
        [(method, rate) for method in ("proposed", "without-lr", "only-lr", "large-patchifier")]
        for rate in ("4x4x2", "2x2x2")
    ],
    *[[("proposed", rate), ("token-merging", rate)] for rate in ("4x4x2", "2x2x2")],
    [("proposed", rate) for rate in ("2x2x1", "2x2x2", "4x4x2")],
]


@dataclass
class Table1Config(PictureConfig):
    clips: int = 256  # held-out stories; of a folder, all held-out videos
    queries: int = 4  # frames retrieved of each
    data: str = "world"  # "world" (the paper-doll world) or a folder of videos: its held-out part
    out: str = "out"  # folder for table1.md, .csv, .png, ...; with --data FOLDER, table1_video.md, ...


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def retrieve(model, base, encoder, clips, config, lpips):
    """Retrieve the query frames of all clips, without prompts.

    Returns ({"one_step", "model": {metric: (n, F)}}, age (n, F) of each frame in latent frames, {"truth", "codec",
    "model": frames of the first clips}); with model None, "codec" in place of "one_step" and "model". encoder: it says
    what whole segments are.
    """
    values, ages, pictures = {}, [], None
    groups = {}  # a batch is of one size and one length of history
    for clip in clips:
        groups.setdefault((clip.size, min(clip.frames, base.history)), []).append(clip)
    for group in groups.values():
        draw = clean_retrieval(config, base, encoder, group)
        made = reconstruct(model, base, draw, len(group), config, controls=False)
        ages.append(made.pop("age"))
        pictures = pictures or {name: frames[:2] for name, frames in made.items()}
        for name in ("one_step", "model") if model else ("codec",):
            for metric, x in measure(made[name], made["truth"], lpips).items():
                values.setdefault(name, {}).setdefault(metric, []).append(x)
    values = {name: {metric: torch.cat(x) for metric, x in parts.items()} for name, parts in values.items()}
    return values, torch.cat(ages), pictures


def costs(model, base, size, device):
    """{column: value} of φ of a full history of latents of this size: tokens, parameters, and time.

    The time is the median of 5, for one clip; making `low` counts for methods that read it.
    """
    encoder = model.encoder
    codec, in_frames = base.codec, base.codec.stride[0]
    high = torch.randn(1, base.dit.in_dim, base.history, *size, device=device)
    frames = (base.history - 1) * in_frames + 1 if codec.causal else base.history * in_frames
    pixels = torch.rand(1, 3, frames, *(n * s for n, s in zip(size, codec.stride[1:])), device=device) * 2 - 1

    def encode():
        low = codec.low_encoder(encoder.rate)(pixels) if encoder.reads_low else high[:, :, :0]
        return encoder.encode(high, low)

    with torch.no_grad(), autocast(device):
        tokens = encode()[0].shape[1]
        seconds = alternate({"φ": encode}, 5, device)["φ"]
    return {
        "tokens_per_second": tokens * base.fps / (base.history * base.codec.stride[0]),
        "channels_per_latent_value": tokens * base.dit.dim / high.numel(),
        "encoder_parameters": sum(x.numel() for x in encoder.parameters()),
        "encoder_ms": round(1000 * statistics.median(seconds), 2),
    }


def measure_run(config, lpips, folder):
    """(values, pictures, costs) of a run, for measure_runs()."""
    print(f"measuring {folder}")
    model, base, _ = open_checkpoint(Path(folder) / "model.safetensors", config, "pretrain")
    clips = open_clips(config, base, model.encoder)
    values, _, pictures = retrieve(model, base, model.encoder, clips, config, lpips)
    spent = costs(model, base, clips[0].size, pick_device(config.device))
    return values["model"] | {"psnr_one_step": values["one_step"]["psnr"]}, pictures["model"], spent


# ---------------------------------------------------------------------------------------------------------------------
# The table


def record(row):
    """{column: value} of a row of the CSV; "" where there is none."""
    columns = {"method": row.method, "rate": row.rate, "tokens_per_second": row.costs.get("tokens_per_second", "")}
    for metric in "psnr", "ssim", "lpips", "psnr_one_step":
        absent = "n/a" if metric == "lpips" else ""
        columns |= dict.fromkeys((metric, f"{metric}_low", f"{metric}_high"), absent)
        if metric in row.values:
            mean, half = interval(row.values[metric].mean(1))
            columns |= {metric: mean, f"{metric}_low": mean - half, f"{metric}_high": mean + half}
    for key in "channels_per_latent_value", "encoder_parameters", "encoder_ms":
        columns[key] = row.costs.get(key, "")
    theirs = PAPER.get((row.method, row.rate), ("", "", ""))
    return columns | dict(zip(("paper_psnr", "paper_ssim", "paper_lpips"), theirs))


def table(rows):
    """Lines of Markdown: one per row."""
    heads = ["method", "rate", "tokens/s", "PSNR, dB", "SSIM", "LPIPS", "PSNR, one step", "channels per latent value"]
    heads += ["φ, parameters", "φ of 20 s, ms", "*paper: PSNR*", "*SSIM*", "*LPIPS*"]
    lines = []
    for row in rows:
        c = record(row)
        cells = [row.method, row.rate, c["tokens_per_second"]]
        for metric, digits in ("psnr", 2), ("ssim", 3), ("lpips", 3), ("psnr_one_step", 2):
            half = c[f"{metric}_high"] - c[metric] if metric in row.values else None
            cells.append(c[metric] if half is None else f"{c[metric]:.{digits}f} ± {half:.{digits}f}")
        cells += [c[key] for key in ("channels_per_latent_value", "encoder_parameters", "encoder_ms")]
        cells += [f"*{c[key]}*" if c[key] else "" for key in ("paper_psnr", "paper_ssim", "paper_lpips")]
        lines.append([f"{x:.4g}" if isinstance(x, float) else f"{x:,}" if isinstance(x, int) else x for x in cells])
    return markdown(heads, lines)


def differences(rows, everything):
    """Lines of Markdown: paired differences between neighbours of the table, then between what the paper puts in order.

    rows: without the codec, best first; everything: the rows of all seeds.
    """
    neighbours, order = list(zip(rows, rows[1:])), expected_pairs(rows, EXPECTED)
    theirs = {"paper's difference": {row: values[0] for row, values in PAPER.items()}}
    clips = "on the same clips, dB"
    return [
        *compare(f"Neighbours in the table: difference in PSNR {clips}", neighbours, ["psnr"], theirs, everything),
        *compare(f"The paper's order: difference in PSNR {clips}", order, ["psnr"], theirs, everything),
        *compare(
            f"The paper's order: difference in PSNR of one step from noise {clips}",
            order,
            ["psnr_one_step"],
            {},
            everything,
        ),
    ]


def describe(rows, everything, config, n_clips):
    """The Markdown file: the table, paired differences, the spread over seeds, and what produced it all."""
    trained = everything[0].trained
    return [
        "# Frame retrieval",
        "",
        f"{n_clips} held-out clips x {config.queries} frames of {config.data}, clean histories, no prompts; "
        f"{config.steps} Euler steps, shift {config.shift:g}, seed {config.seed} of queries and noise. Mean over "
        "clips ± 95 % interval, against the original pixels; `codec` is the ceiling. Trained alike: "
        f"{trained['steps']} steps of {trained['batch']} clips of {trained['data']}, from {trained['init']}, "
        f"--mask {trained['mask']}, preset {trained['preset']}.",
        "",
        *table(rows),
        "",
        "*In italics: the figures of the paper's first version. Other data, another base, another codec: only the "
        "order can be compared.*",
        *differences(rows[1:], everything),
        *describe_runs(everything, "psnr", "PSNR", "dB"),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def by_age(values, ages, section):
    """{sections back, 0 for the newest: mean} of values (n, F) of frames of these ages (n, F)."""
    bins = ages.long() // section
    return {k: values[bins == k].mean().item() for k in bins.unique().tolist()}


def draw_ages(path, rows, ages, section, seconds):
    """Plot PSNR by how long before the end of the history a frame was seen, in bins of a section of so many seconds."""
    with plot(path, "age of the frame, s", "PSNR, dB") as (axes,):
        for row in rows:
            found = by_age(row.values["psnr"], ages, section)
            axes.plot([(k + 0.5) * seconds for k in found], found.values(), marker=".", label=row.name)


def draw_pictures(path, rows, truth, seconds):
    """Write a contact sheet: the original frames (k, F, H, W, 3) of the first clips, and what each row retrieved.

    seconds: the age of each frame, a list.
    """
    sheet = [("original", truth.flatten(0, 1))]
    for row in rows:
        heading = row.name.replace(" ", "\n") + f"\n{row.psnr.mean():.1f} dB"
        sheet.append((heading, row.pictures.flatten(0, 1)))
    save_contact_sheet(sheet, path, [f"{x:g} s ago" for x in seconds])


# ---------------------------------------------------------------------------------------------------------------------
# python eval.py table1


def open_clips(config, base, encoder):
    """The held-out clips of --data. Raises UserError if one is too short for --queries frames."""
    if not base.codec.decodes:
        raise UserError("--vae is needed: a local folder of Wan's VAE in the diffusers layout")
    if config.data == "world":
        clips = stories(config, base, encoder.low_rate)
    else:
        clips = held_out_videos(config.data, base, config.cache, encoder.low_rate)
    shortest = min(encoder.whole(min(clip.frames, base.history)) for clip in clips)
    if config.queries > shortest:
        raise UserError(f"--queries {config.queries}: the shortest held-out clip has {shortest} latents to choose from")
    return clips


def held_out_videos(folder, base, cache, rate=None):
    """The held-out clips of video_clips(), without encoding those to train on."""
    names = split_videos([path.relative_to(folder).as_posix() for path in find_videos(folder)])[1]
    encoded, skipped = encode_videos(folder, [Path(folder) / name for name in names], base, cache, rate)
    if skipped:  # another may be held out in its place
        return video_clips(folder, base, cache, rate)[1]
    print(f"{len(names)} held-out videos: {', '.join(names)}")
    return collect(folder, encoded, names, base, pixels=True)


def table1(argv):
    """RUN...: retrieve the same frames with finished runs of pretrain.py; a table, paired differences, pictures."""
    folders, config = parse_runs(Table1Config, table1, argv)
    stem = Path(config.out) / ("table1" if config.data == "world" else "table1_video")
    runs, lpips = read_runs(folders, "table1", "pretrain", stem.name), open_lpips(config)
    check_outputs(stem, (".md", ".csv", ".png", "_seeds.csv", "_curves.png", "_age.png"))
    if (Path(config.data) / "manifest.json").is_file():
        raise UserError(f"--data {config.data} is a cache of latents: give the folder of the videos themselves")
    device = pick_device(config.device)
    base = open_base(next(iter(runs.values()))["preset"], config.vae, device=device)
    encoder = find_method("full")(base, "1x1x1")  # any would do: for the codec's row it only says what segments are
    clips = open_clips(config, base, encoder)
    asked = question(config, base.codec, clips, "steps", "shift", "seed", "queries", lpips=bool(lpips))
    measure_one = partial(measure_run, config, lpips)
    everything = measure_runs(runs, stem.name, asked, describe_machine(device), measure_one)
    ceiling, ages, pictures = retrieve(None, base, encoder, clips, config, lpips)
    rows = sorted(first_seeds(everything), key=lambda row: row.psnr.mean(), reverse=True)
    rows = [Row("codec", "", ceiling["codec"], pictures["codec"], {}), *rows]

    metrics = "psnr", "psnr_low", "psnr_high", "ssim", "lpips", "psnr_one_step"
    write_table(stem, describe(rows, everything, config, len(clips)), rows, everything, record, metrics)
    seconds = base.codec.stride[0] / base.fps  # of a latent frame
    draw_ages(f"{stem}_age.png", rows[1:], ages, base.section, base.section * seconds)
    shown = ages[: len(pictures["truth"])].flatten() * seconds
    draw_pictures(f"{stem}.png", rows, pictures["truth"], shown.tolist())
    print(f"wrote {stem}.md, .csv, .png, _seeds.csv, _curves.png and _age.png")
