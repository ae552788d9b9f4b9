"""What the tables of eval.py share: finished runs side by side, intervals, paired differences, files and plots."""
import ast
import csv
import hashlib
import io
import json
import math
import platform
import statistics
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from cycler import cycler
from einops import rearrange
from matplotlib import rcParams
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file, save_file

from codec import make_codec, make_prompts
from data import world_clips
from devices import pick_device, product_dtype
from encoder import FRAME_METHODS, load_model
from flags import parse_flags, warn
from model import PRESETS, UserError
from pretrain import Tools
from saving import read_log
from video import file_hash, whole_file
from weights import open_safetensors, parse_json, read_metadata, weight_files

# what all rows share; they differ in method, rate and seed, and each may have the learning rate that suits it
SAME = ("preset", "init", "data", "clips", "steps", "batch", "mask", "queries", "text_drop", "t_mean", "t_std", "lora",
        "optimizer", "warmup", "clip_grad", "ema", "held_out", "sample_steps", "sample_shift")
# what a measurement depends on besides the weights: changed, a run is measured again
SOURCES = [f"{name}.py" for name in ("model", "devices", "weights", "encoder", "codec", "data", "world", "wan", "video",
                                     "pretrain", "eval", "consistency", "scores", "budget", "speed", "tables",
                                     "storyboard")]


@dataclass
class EvalConfig:
    """What all share."""
    clips: int = 64               # held-out stories
    steps: int = 20               # Euler steps
    shift: float = 3.0            # timestep shift of the sampler
    seed: int = 0                 # of the noise, and of the frames asked for
    batch: int = 8                # stories at once
    device: str = "auto"          # auto, cpu, cuda, mps
    cache: str = "cache"          # folder for encoded clips


def parse(cls, command, argv):
    """The config of a command from its flags, checked."""
    config = parse_flags(cls, command.__doc__, argv)
    for key in ("clips", "steps", "batch", "queries", "sections"):
        if getattr(config, key, 1) < 1:
            raise UserError(f"--{key} {getattr(config, key)}: must be at least 1")
    if not 0 < config.shift < math.inf:
        raise UserError(f"--shift {config.shift}: must be above 0")
    if not 0 <= getattr(config, "guidance", 1) < math.inf:
        raise UserError(f"--guidance {config.guidance}: must be at least 0")
    return config


def parse_runs(cls, command, argv):
    """(run folders, config) of a command whose line begins with folders."""
    n = next((i for i, arg in enumerate(argv) if arg.startswith("-")), len(argv))
    return argv[:n], parse(cls, command, argv[n:])


def open_checkpoint(path, config, stage):
    """(model on its device, tools, training config) of a checkpoint, which must be of this stage."""
    device = pick_device(config.device)
    wan = {key: getattr(config, key, "") for key in ("init", "vae")}            # commands for paper dolls have none
    model, trained = load_model(path, wan["init"], device)
    if trained["stage"] != stage:
        raise UserError(f"{path} is of stage {trained['stage']}: give one of {stage}.py")
    preset = PRESETS[model.preset]
    tools = Tools(preset, make_codec(preset, wan["vae"], device), make_prompts(preset), model.encoder, device)
    return model, tools, trained


def stories(config, preset, codec):
    """The held-out stories that are asked for, encoded, with their pixels."""
    if preset.codec != "dct":
        raise UserError("the held-out stories are paper dolls, for presets nano and small: give clips of your own, "
                        "with --history (retrieval) or --data FOLDER (table1)")
    return world_clips("held-out", config.clips, preset, codec, config.cache, keep_pixels=True)


# ---------------------------------------------------------------------------------------------------------------------
# Runs and rows


def label(config):
    """(method, rate) of a run as the tables name it; the rate is "" where there is none, and a window's its length."""
    method, fresh = config["method"], config.get("encoder") == "none"
    if config.get("freeze_encoder") or fresh and method not in (*FRAME_METHODS, "none"):
        kind = "frozen" if config["freeze_encoder"] else "without-pretrain"
        method = kind if method == "proposed" else f"{method}-{kind}"
    rates = {"full": "", "keyframes": "", "none": "", "sliding-window": str(config.get("window"))}
    return method, rates.get(config["method"], config["rate"])


def read_runs(folders, command, stage, kept):
    """{folder: training config} of finished runs of a stage that may stand in one table; `kept` is what
    measure_runs() keeps in them. Raises UserError naming the first difference."""
    if not folders:
        raise UserError(f"eval.py {command} needs finished runs of {stage}.py: give their folders, before the flags")
    runs = {}
    for folder in folders:
        weights, measurement = (Path(folder) / f"{name}.safetensors" for name in ("model", kept))
        others = [path.name for path in sorted(Path(folder).glob("*.safetensors"))]
        if others and weights.name not in others and measurement.name not in others:
            raise UserError(f"{folder} has neither {weights.name} nor {measurement.name}, but {', '.join(others)}: ask "
                            "for the table of that name (table1_video: eval.py table1 with --data FOLDER)")
        config = read_metadata(weights if weights.exists() or not measurement.exists() else measurement)
        if config["stage"] != stage:
            raise UserError(f"{folder} is of stage {config['stage']}: give runs of {stage}.py")
        if config["step"] < config["steps"]:
            raise UserError(f"{folder} stopped at step {config['step']} of {config['steps']}: "
                            f"finish it with {stage}.py --resume")
        if command != "story" and weights.exists() and not (Path(folder) / "log.jsonl").is_file():
            raise UserError(f"{folder} has no log.jsonl: give the whole run folder, its curve is drawn")
        for other, theirs in runs.items():
            for key in SAME:
                if config.get(key) != theirs.get(key):
                    raise UserError(f"{folder} has --{key} {config.get(key)} but {other} has {theirs.get(key)}: "
                                    "the rows of one table must be trained alike")
            if len({(*label(c), c["seed"]) for c in (config, theirs)}) == 1:
                raise UserError(f"{folder} and {other} are both {' '.join(label(config))} with seed "
                                f"{config['seed']}: give one of them")
        runs[folder] = config
    return runs


@dataclass
class Row:
    """What is known of one run, or of the codec."""
    method: str
    rate: str                     # "" where there is none
    values: dict                  # {metric: (n, F), a value a frame (or a section) of each clip; nan: does not count}
    pictures: torch.Tensor        # of the first clips, (k, F, H, W, 3) uint8
    costs: dict                   # {column: figure}
    folder: str = ""              # the run
    trained: dict = None          # its config
    curve: list = None            # [[step, PSNR]] of its log
    machine: str = ""             # what it was measured on
    code: str = ""                # a hash of what measured it

    @property
    def name(self):
        return f"{self.method} {self.rate}".strip()

    @property
    def psnr(self):
        """A clip's mean, (n,), dB."""
        return self.each("psnr")

    def each(self, metric):
        """A value a clip, (n,): see per_clip()."""
        return per_clip(self.values[metric])


def question(config, codec, clips, *keys, **more):
    """All that a measurement depends on besides the run and the code, as JSON: these keys of the config and `more`; the
    codec, a LoRA's base, and what the clips show (stories by what was drawn: pixels may differ in a last bit between
    machines)."""
    digest = hashlib.sha256()
    for clip in clips:
        digest.update(repr((clip.storyboard, clip.story)).encode() if clip.story else clip.pixels.numpy().tobytes())
    init = getattr(config, "init", "")
    base = [file_hash(file) for file in weight_files(init)] if init else None
    asked = {key: getattr(config, key) for key in keys} | more
    asked |= {"clips": len(clips), "content of the clips": digest.hexdigest(), "codec": codec.settings, "base": base}
    return json.loads(json.dumps(asked))


def describe_machine(device):
    """What costs are measured on: the device, threads, and what products are computed in."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {device.type}"
    return f"{name}, {torch.get_num_threads()} threads, {str(product_dtype(device)).removeprefix('torch.')}"


def recall(folder, trained, name, asked):
    """(the Row that FOLDER/NAME.safetensors holds, or None where it is not of what is `asked`, of these weights and of
    this code; the key that it is kept under). A folder without weights must hold what is asked, by whatever code.
    Raises UserError if it was asked something else."""
    folder, key = Path(folder), {"asked": asked}
    file, weights = folder / f"{name}.safetensors", folder / "model.safetensors"
    # parsed, so that a comment more is no other code
    code = hashlib.sha256("".join(ast.unparse(ast.parse(Path(__file__).with_name(source).read_text(encoding="utf-8")))
                                  for source in SOURCES).encode()).hexdigest()
    if weights.exists():
        key |= {"weights": file_hash(weights), "code": code}
    if not file.exists():
        return None, key
    with open_safetensors(file) as f:
        known = parse_json((f.metadata() or {}).get("measured"), file, "delete it, then it is made again",
                           "asked", "costs", "curve", "machine", "pictures")
    if all(known.get(part) == value for part, value in key.items()):
        if known.get("code") != code:
            warn(f"{name}: rows without weights were measured by another version of this code")
        values = load_file(file)
        pictures = unpack(values.pop("pictures"), *known["pictures"])
        return Row(*label(trained), values, pictures, known["costs"], str(folder), trained, known["curve"],
                   known["machine"], known.get("code", "")), key
    if not weights.exists():
        kept = known["asked"]
        other = [f"{k} {kept.get(k)!s:.20}, not {v!s:.20}" for k, v in asked.items() if kept.get(k) != v]
        raise UserError(f"{file} was measured with {'; '.join(other)}: ask for the same, or give the run with its "
                        "weights")
    return None, key


def pack(pictures):
    """(k, F, H, W, 3) uint8 -> (n,) uint8, the bytes of one PNG: half the room, so that results can be shared."""
    png = io.BytesIO()
    Image.fromarray(rearrange(pictures, "k f h w c -> (k h) (f w) c").numpy()).save(png, "PNG")
    return torch.tensor(list(png.getvalue()), dtype=torch.uint8)


def unpack(png, k, f):
    """pack() reversed."""
    sheet = np.array(Image.open(io.BytesIO(png.numpy().tobytes())))
    return rearrange(torch.from_numpy(sheet), "(k h) (f w) c -> k f h w c", k=k, f=f)


def measure_runs(runs, name, asked, machine, measure):
    """[Row] of these runs. measure(folder) gives (values, pictures, costs), and they are kept in
    FOLDER/NAME.safetensors, where recall() finds them. So a table that was stopped goes on, and a folder that holds
    this file alone, no weights, is a row too: whoever has a new method need not train all others again."""
    known = {folder: recall(folder, trained, name, asked) for folder, trained in runs.items()}
    rows = []
    for folder, (row, key) in known.items():
        if row is None:
            log = read_log(Path(folder) / "log.jsonl")
            curve = [[step, entry["psnr"]] for step, entry in log.items() if "psnr" in entry]
            values, pictures, costs = measure(folder)
            row = Row(*label(runs[folder]), values, pictures, costs, folder, runs[folder], curve, machine, key["code"])
            metadata = {"config": json.dumps(row.trained),
                        "measured": json.dumps(key | {"costs": costs, "curve": curve, "machine": machine,
                                                      "pictures": pictures.shape[:2]})}
            try:
                with whole_file(Path(folder) / f"{name}.safetensors") as part:
                    save_file(values | {"pictures": pack(pictures)}, part, metadata)
            except (OSError, UserError) as e:                       # a run of someone else's, say
                warn(f"{e}: this measurement is not kept")
        rows.append(row)
    return rows


def first_seeds(everything):
    """Sort rows by name and seed, in place; returns those of the lowest seed of each name."""
    everything.sort(key=lambda row: (row.name, row.trained["seed"]))
    found = {}
    for row in everything:
        found.setdefault(row.name, row)
    return list(found.values())


def by_seed(everything, metric):
    """{name: [mean of a metric of each run]}."""
    found = {}
    for row in everything:
        found.setdefault(row.name, []).append(interval(row.each(metric))[0])
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Intervals and paired differences


def per_clip(values):
    """(n, F) -> (n,), a figure a clip: their mean is that of all values that count, and their spread that of this mean
    over clips, each of which brings all of its values (the usual linear form of a ratio). If all count: the means."""
    counts = ~values.isnan()
    mean = values.nanmean()
    return mean + torch.where(counts, values - mean, 0).sum(1) * len(values) / counts.sum()


def interval(values):
    """Mean of a 1-D tensor and the half-width of its 95 % interval, by Student's t."""
    values, n = values.double(), len(values) - 1
    if n < 1:
        return values.mean().item(), math.nan
    # the 97.5 % quantile of t with n degrees of freedom from the normal one (Abramowitz and Stegun 26.7.5): for n = 2
    # within 3.1 %, from 4 on within 0.3 %
    z = 1.959964
    t = (z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
         + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3))
    return values.mean().item(), (t * values.std() / (n + 1)**0.5).item()


def wilson(right, n):
    """95 % interval (low, high) of a share of which `right` of n were seen (Wilson 1927)."""
    z2 = 1.959964**2
    centre, half = (right + z2 / 2) / (n + z2), (z2 * (right * (n - right) / n + z2 / 4))**0.5 / (n + z2)
    return centre - half, centre + half


def bootstrap(difference, resamples=10_000):
    """Mean of paired differences (n,), one a clip, and its 95 % interval over resampled clips: (mean, low, high)."""
    if len(difference) < 2:
        return difference.mean().item(), math.nan, math.nan
    picks = torch.randint(len(difference), (resamples, len(difference)), generator=torch.Generator().manual_seed(0))
    means = difference.double()[picks].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return difference.mean().item(), low, high


def flip_test(difference, flips=10_000):
    """How often a random choice of signs brings the sum of paired differences (n,), one a clip, as far from zero as it
    is: a two-sided p-value that holds for few clips, and for scores that rarely differ, too."""
    difference = difference.double()
    signs = torch.randint(2, (flips, len(difference)), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    as_far = (signs @ difference).abs() >= difference.sum().abs() - 1e-9
    return (as_far.sum().item() + 1) / (flips + 1)


def expected_pairs(rows, chains):
    """[(row, row)] of what is expected to be above what: each chain of (method, rate) is in order, best first."""
    found = {(row.method, row.rate): row for row in rows}
    return [(found[a], found[b]) for chain in chains for a, b in combinations(chain, 2) if {a, b} <= set(found)]


def compare(title, pairs, metrics, papers, everything):
    """Lines of Markdown: paired differences of rows in the mean of these metrics, if there are any pairs, and the same
    of the other training seeds that both rows have. papers: {head of a column: {(method, rate): the paper's figure}};
    everything: the rows of all seeds."""
    if not pairs:
        return []
    lines = ["", f"{title}, with its 95 % interval (bootstrap over clips, 10,000 resamples); decided if p < 0.05 "
             "(random signs of the clips' differences, two-sided; where it and the interval disagree, it decides). "
             "They tell luck of the clips alone, not of the training, which the column of seeds shows; of many rows, "
             "one in twenty is decided by chance.", ""]
    cells = []
    for a, b in pairs:
        mean, low, high = bootstrap(sum(a.each(m) - b.each(m) for m in metrics) / len(metrics))
        decisions = [a.values[m] - b.values[m] for m in metrics]    # what does not count is no difference
        p = flip_test(sum(x.nansum(1) / (~x.isnan()).sum().clamp(min=1) for x in decisions))
        theirs = [[paper.get((row.method, row.rate), math.nan) for row in (a, b)] for paper in papers.values()]
        gaps = ["–" if math.isnan(x - y) else f"{x - y:+.2f}" for x, y in theirs]
        holds = "undecided" if p >= 0.05 else "yes" if mean > 0 else "no"
        of_seeds = [{row.trained["seed"]: sum(row.each(m).mean().item() for m in metrics) / len(metrics)
                     for row in everything if row.name == name} for name in (a.name, b.name)]
        both = sorted(of_seeds[0].keys() & of_seeds[1].keys())
        seeds = ", ".join(f"{of_seeds[0][s] - of_seeds[1][s]:+.2f}" for s in both) if len(both) > 1 else "–"
        cells.append([f"{a.name} above {b.name}", f"{mean:+.2f}", f"{low:+.2f} to {high:+.2f}", f"{p:.2g}", holds,
                      seeds, *gaps])
    return lines + markdown(["A above B", "difference", "interval", "p", "holds", "seed by seed", *papers], cells)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def markdown(heads, rows):
    """Lines of a table in Markdown, of rows of strings."""
    return ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows)]


def describe_runs(everything, metric, title, unit):
    """Lines of Markdown: where each row comes from, and the spread over seeds."""
    heads = ["row", "run", "φ of", "step", "seed", "learning rate", title, "measured on", "by code"]
    share = lambda trained: f", φ {trained['lr'] * x:g}" if (x := trained.get("encoder_lr", 1)) != 1 else ""
    phi = lambda trained: "–" if trained["method"] in (*FRAME_METHODS, "none") else trained.get("encoder", "–")
    lines = ["", *markdown(heads, [
        [row.name, row.folder, phi(row.trained), str(row.trained["step"]), str(row.trained["seed"]),
         f"{row.trained['lr']:g}{share(row.trained)}", f"{interval(row.each(metric))[0]:.2f}", row.machine,
         row.code[:7]] for row in everything])]
    spreads = [f"{name} {statistics.stdev(x):.2f} ({len(x)} seeds)" for name, x in by_seed(everything, metric).items()
               if len(x) > 1]
    return [*lines, "", "By code: a hash of the sources that measured it.", "",
            f"Standard deviation of {title} over training seeds, {unit}: {'; '.join(spreads) or 'one seed only'}."]


def write_csv(path, records):
    """A line a record, floats with six digits."""
    rounded = lambda x: float(f"{x:.6g}") if isinstance(x, float) else x
    records = [{key: rounded(x) for key, x in record.items()} for record in records]
    with whole_file(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)


def write_seeds(path, everything, record, metrics):
    """A CSV of all runs, with these columns of record(row), and of the first of them the spread over the seeds of each
    method and rate."""
    records, main = [], metrics[0]
    for row in everything:
        values, columns = by_seed(everything, main)[row.name], record(row)
        records.append({"method": row.method, "rate": row.rate, "seed": row.trained["seed"],
                        "step": row.trained["step"], **{key: columns[key] for key in metrics}, "seeds": len(values),
                        f"{main}_mean_of_seeds": statistics.mean(values),
                        f"{main}_deviation_of_seeds": statistics.stdev(values) if len(values) > 1 else ""})
    write_csv(path, records)


@contextmanager
def plot(path, x, *labels):
    """Axes to draw labelled lines on, one for each label of a y axis, side by side; written to `path` at the end."""
    columns = min(len(labels), 3)
    figure = Figure(figsize=(8, 5) if columns == 1 else (4.5 * columns, 3.5 * -(-len(labels) // columns) + 0.5),
                    layout="constrained")
    every = figure.subplots(-(-len(labels) // columns), columns, squeeze=False).flatten()
    for axes in every:                                              # of more than ten lines no two look the same
        axes.set_prop_cycle(cycler(linestyle=["-", "--", ":"]) * rcParams["axes.prop_cycle"])
    yield every[:len(labels)]
    for axes, y in zip(every, labels):
        axes.set(xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
    if every[0].lines:
        figure.legend(*every[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    for axes in every[len(labels):]:
        axes.remove()
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=130)
    with whole_file(path) as part:                                  # few colours: a palette takes a third of the room
        Image.open(drawn).convert("RGB").quantize(256).save(part, "PNG")


def draw_curves(path, rows, everything):
    """PSNR over the steps of every run, from its log; a colour a row, thin for the seeds that are not in the table."""
    trained = everything[0].trained
    what = f"PSNR, dB ({trained['held_out']} clips, {trained['sample_steps']} Euler steps)"
    with plot(path, "step", what) as (axes,):
        for row in (row for row in rows if row.curve):              # a log may have no figures
            line, = axes.plot(*zip(*row.curve), marker=".", linewidth=1.6, label=row.name)
            for one in (one for one in everything if one.name == row.name and one is not row and one.curve):
                axes.plot(*zip(*one.curve), marker=".", linewidth=0.6, color=line.get_color(),
                          linestyle=line.get_linestyle())


def write_table(stem, lines, rows, everything, record, metrics):
    """What both tables write: stem.md of these lines, which are printed too; stem.csv, a record(row) each;
    stem_seeds.csv of all runs, metrics[0] being what their spread is shown of; stem_curves.png."""
    text = "\n".join(lines) + "\n"
    with whole_file(f"{stem}.md") as part:
        part.write_text(text, encoding="utf-8")
    write_csv(f"{stem}.csv", [record(row) for row in rows])
    write_seeds(f"{stem}_seeds.csv", everything, record, metrics)
    draw_curves(f"{stem}_curves.png", rows, everything)
    print(text)
