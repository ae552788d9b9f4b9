"""Finished runs side by side: may they stand in one table, what is measured of each, and where that is kept.

A measurement is kept in the run's folder, so a table that was stopped continues, and a folder that holds this file
alone, no weights, is a row too: whoever has a new method need not train all others again.
"""

import hashlib
import io
import json
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, save_file

from bases import open_base
from bench.stats import interval, per_clip
from data import story_clips
from dolls.dataset import STORY_SECTIONS
from encoder import find_method, load_model
from util.checkpoint import read_log
from util.cli import UserError, check_numbers, parse_flags, warn
from util.device import compute_dtype, pick_device
from util.files import atomic_write, file_hash, parse_json
from util.weights import open_safetensors, read_config, weight_files

# Raise it whenever a change to the code makes a measurement different: runs are then measured again.
MEASUREMENT_VERSION = 1
# What all rows of a table share. They differ in method, rate and seed, and each may have the learning rate that suits
# it.
SAME = ("preset", "init", "data", "clips", "steps", "batch", "mask", "queries", "text_drop", "t_mean", "t_std", "lora")
SAME += ("optimizer", "warmup", "clip_grad", "ema", "held_out", "sample_steps", "sample_shift")

# ---------------------------------------------------------------------------------------------------------------------
# Command lines


@dataclass
class EvalConfig:
    """What all these commands share."""

    clips: int = 64  # held-out stories
    steps: int = 20  # Euler steps
    shift: float = 3.0  # timestep shift of the sampler
    seed: int = 0  # of the noise, and of which frames are retrieved
    batch: int = 8  # stories at once
    device: str = "auto"  # auto, cpu, cuda, mps
    cache: str = "cache"  # folder for encoded clips


def parse(cls, command, argv):
    """The config of a command, an instance of the dataclass `cls`, from its flags. Raises UserError."""
    config = parse_flags(cls, command.__doc__, argv)
    check_numbers(config, "clips steps batch queries sections", 1)
    check_numbers(config, "shift", 0, above=True)
    check_numbers(config, "guidance", 0)
    return config


def parse_runs(cls, command, argv):
    """(run folders, config) of a command line that begins with folders. Raises UserError."""
    n = next((i for i, arg in enumerate(argv) if arg.startswith("-")), len(argv))
    return argv[:n], parse(cls, command, argv[n:])


def open_checkpoint(path, config, stage):
    """(model on its device, base, training config) of a checkpoint, which must be of this stage. Raises UserError."""
    trained = read_config(path)
    if trained["stage"] != stage:
        raise UserError(f"{path} is of stage {trained['stage']}: give one of {stage}.py")
    device = pick_device(config.device)
    base = open_base(trained["preset"], getattr(config, "vae", ""), device=device)
    if base.boundary:
        raise UserError(f"{path} is one of two DiTs, which sample together: only sample.py does that; give it to that")
    return load_model(path, base, getattr(config, "init", ""), device), base, trained


def stories(config, base, rate=None, sections=STORY_SECTIONS):
    """The first --clips held-out stories, encoded, with their pixels; with `low` of a rate (t, h, w). Raises UserError
    for a base not made for them."""
    if base.needs_cache:
        raise UserError(
            "the held-out stories are paper dolls, for presets nano and small: give your own clips, with --history "
            "(retrieval) or --data FOLDER (table1)"
        )
    return story_clips("held-out", config.clips, base, config.cache, rate, keep_pixels=True, sections=sections)


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def label(config):
    """(method, rate) of a run as the tables name it: with what it has beside φ; the rate is "" for methods that have
    none, and the window's length for a sliding window."""
    name, method = config["method"], find_method(config["method"])
    frozen, fresh = config.get("freeze_encoder"), config.get("encoder") == "none" and method.has_stage1
    if frozen or fresh:
        kind = "frozen" if frozen else "without-pretrain"
        name = kind if name == "proposed" else f"{name}-{kind}"
    if not method.has_rate:
        return name, str(config["window"]) if "window" in method.options else ""
    beside = [key if config[key] is True else f"{key}-{config[key]}" for key in method.options if config.get(key)]
    return "+".join([name, *beside]), config["rate"]


def read_run(folder, command, stage, kept):
    """The training config of a finished run of a stage. Raises UserError."""
    weights, measurement = (Path(folder) / f"{name}.safetensors" for name in ("model", kept))
    others = [path.name for path in sorted(Path(folder).glob("*.safetensors"))]
    if others and weights.name not in others and measurement.name not in others:
        raise UserError(
            f"{folder} has neither {weights.name} nor {measurement.name}, but {', '.join(others)}: make the table of "
            "that name (table1_video: eval.py table1 with --data FOLDER)"
        )
    config = read_config(weights if weights.exists() or not measurement.exists() else measurement)
    if config["stage"] != stage:
        raise UserError(f"{folder} is of stage {config['stage']}: give runs of {stage}.py")
    if config["step"] < config["steps"]:
        raise UserError(
            f"{folder} stopped at step {config['step']} of {config['steps']}: finish it with {stage}.py --resume"
        )
    if command != "story" and weights.exists() and not (Path(folder) / "log.jsonl").is_file():
        raise UserError(f"{folder} has no log.jsonl: give the whole run folder, as its curve is plotted")
    return config


def read_runs(folders, command, stage, kept):
    """{folder: training config} of finished runs of a stage that may stand in one table.

    kept: the name of what measure_runs() keeps in them. Raises UserError naming the first difference.
    """
    if not folders:
        raise UserError(f"eval.py {command} needs finished runs of {stage}.py: give their folders, before the flags")
    runs = {}
    for folder in folders:
        config = read_run(folder, command, stage, kept)
        for other, theirs in runs.items():
            for key in SAME:
                if config.get(key) != theirs.get(key):
                    raise UserError(
                        f"{folder} has --{key} {config.get(key)} but {other} has {theirs.get(key)}: the rows of one "
                        "table must be trained alike: leave one out, or train it again"
                    )
            if (*label(config), config["seed"]) == (*label(theirs), theirs["seed"]):
                raise UserError(
                    f"{folder} and {other} are both {' '.join(label(config))} with seed {config['seed']}: give one of "
                    "them"
                )
        runs[folder] = config
    return runs


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@dataclass
class Row:
    """What is known of one run, or of the codec."""

    method: str
    rate: str  # "" if it has none
    values: dict  # {metric: (n, F), one value per frame (or section) of each clip; nan: does not count}
    pictures: torch.Tensor  # of the first clips, (k, F, H, W, 3) uint8
    costs: dict  # {column: value}
    folder: str = ""  # the run
    trained: dict = None  # its config
    curve: list = None  # [[step, PSNR]] of its log
    machine: str = ""  # what it was measured on
    version: int = MEASUREMENT_VERSION  # of the code that measured it

    @property
    def name(self):
        return f"{self.method} {self.rate}".strip()

    @property
    def psnr(self):
        """The mean of each clip, (n,), dB."""
        return self.each("psnr")

    def each(self, metric):
        """One value per clip, (n,): see per_clip()."""
        return per_clip(self.values[metric])


def first_seeds(everything):
    """Sort rows by name and seed, in place; returns the row with the lowest seed of each name."""
    everything.sort(key=lambda row: (row.name, row.trained["seed"]))
    found = {}
    for row in everything:
        found.setdefault(row.name, row)
    return list(found.values())


def by_seed(everything, metric):
    """{name: [the mean of a metric of each run]}."""
    found = {}
    for row in everything:
        found.setdefault(row.name, []).append(interval(row.each(metric))[0])
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Kept measurements


def question(config, codec, clips, *keys, **more):
    """All that a measurement depends on besides the run and the code, as JSON types.

    These keys of the config, `more`, the codec, the base of a LoRA, and what the clips show: of stories what was drawn,
    as their pixels may differ in a last bit between machines.
    """
    digest = hashlib.sha256()
    for clip in clips:
        digest.update(repr((clip.storyboard, clip.story)).encode() if clip.story else clip.pixels.numpy().tobytes())
    init = getattr(config, "init", "")
    base = [file_hash(file) for file in weight_files(init)] if init else None
    asked = {key: getattr(config, key) for key in keys} | more
    asked |= {"clips": len(clips), "content of the clips": digest.hexdigest(), "codec": codec.settings, "base": base}
    return json.loads(json.dumps(asked))


def describe_machine(device):
    """What costs are measured on: device, threads and compute dtype."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {device.type}"
    return f"{name}, {torch.get_num_threads()} threads, {str(compute_dtype(device)).removeprefix('torch.')}"


def pack(pictures):
    """(k, F, H, W, 3) uint8 -> the bytes of one PNG, (n,) uint8: half the size, so that results can be shared."""
    png = io.BytesIO()
    Image.fromarray(rearrange(pictures, "k f h w c -> (k h) (f w) c").numpy()).save(png, "PNG")
    return torch.tensor(list(png.getvalue()), dtype=torch.uint8)


def unpack(png, k, f):
    """pack() reversed."""
    sheet = np.array(Image.open(io.BytesIO(png.numpy().tobytes())))
    return rearrange(torch.from_numpy(sheet), "(k h) (f w) c -> k f h w c", k=k, f=f)


def recall(folder, trained, name, asked):
    """(the Row kept in FOLDER/NAME.safetensors, the key to keep a new one under).

    The Row is None if it does not answer `asked`, or belongs to other weights or another MEASUREMENT_VERSION. A folder
    without weights must hold what is asked, of whatever version. Raises UserError if it was asked something else.
    """
    folder, key = Path(folder), {"asked": asked}
    file, weights = folder / f"{name}.safetensors", folder / "model.safetensors"
    if weights.exists():
        key |= {"weights": file_hash(weights), "version": MEASUREMENT_VERSION}
    if not file.exists():
        return None, key
    with open_safetensors(file) as f:
        fields = dict(asked=dict, costs=dict, curve=list, machine=str, pictures=list)
        known = parse_json((f.metadata() or {}).get("measured"), file, "delete it, then it is made again", **fields)
    known.setdefault("version", 0)  # files from before versions were counted
    if all(known.get(part) == value for part, value in key.items()):
        if known["version"] != MEASUREMENT_VERSION:
            warn(f"{name}: rows without weights were measured by another version of this code")
        values = load_file(file)
        pictures = unpack(values.pop("pictures"), *known["pictures"])
        measured = known["costs"], str(folder), trained, known["curve"], known["machine"], known["version"]
        return Row(*label(trained), values, pictures, *measured), key
    if not weights.exists():
        kept = known["asked"]
        other = [f"{k} {kept.get(k)!s:.20}, not {v!s:.20}" for k, v in asked.items() if kept.get(k) != v]
        raise UserError(
            f"{file} was measured with {'; '.join(other)}: ask for the same, or give the run with its weights"
        )
    return None, key


def keep(row, name, key):
    """Write a Row to NAME.safetensors in its run's folder, under a key of recall()."""
    measured = key | {"costs": row.costs, "curve": row.curve, "machine": row.machine}
    measured["pictures"] = row.pictures.shape[:2]
    metadata = {"config": json.dumps(row.trained), "measured": json.dumps(measured)}
    try:
        with atomic_write(Path(row.folder) / f"{name}.safetensors", replace=True) as part:
            save_file(row.values | {"pictures": pack(row.pictures)}, part, metadata)
    except (OSError, UserError) as e:  # someone else's run, for example
        warn(f"{e}: this measurement is not kept")


def measure_runs(runs, name, asked, machine, measure):
    """[Row] of {folder: training config}, each as recall() finds it, or else measured and kept.

    name: of the files that keep them. measure(folder) -> (values, pictures, costs), as in Row.
    """
    known = {folder: recall(folder, trained, name, asked) for folder, trained in runs.items()}
    rows = []
    for folder, (row, key) in known.items():
        if row is None:
            log = read_log(Path(folder) / "log.jsonl")
            curve = [[step, entry["psnr"]] for step, entry in log.items() if "psnr" in entry]
            row = Row(*label(runs[folder]), *measure(folder), folder, runs[folder], curve, machine)
            keep(row, name, key)
        rows.append(row)
    return rows
