"""Evaluation: metrics, how well frames of the history are retrieved, and how well the next section continues it.

    python eval.py retrieval --checkpoint runs/pretrain/model.safetensors               held-out stories
    python eval.py retrieval --checkpoint runs/pretrain/model.safetensors --history clip.mp4    frames of one's own clip
    python eval.py continuation --checkpoint runs/finetune/model.safetensors            held-out stories
    python eval.py budget --preset wan-14b         parameters, tokens, FLOPs and memory of a preset, predicted
    python eval.py speed                           this machine, timed
    python eval.py judge --videos a.mp4 --endpoint URL --model NAME     ask a vision-language model (judge.py)
    python eval.py elo votes.csv                                        ratings from votes between pairs (judge.py)
    python eval.py table1 runs/t1/*                      stage-1 runs side by side: the paper's Table 1, with pictures
    python eval.py table2 runs/t2/*                      stage-2 runs side by side: Table 2 (consistency.py)
    python eval.py story runs/t2/*                       accuracy by how long a character was away (consistency.py)

Every figure is printed with what produced it: checkpoint, step, seed, clips, sampler.
"""
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import tqdm

import budget
import consistency
import judge
import speed
from codec import make_codec, make_prompts, psnr, to_frames, to_pixels
from data import HISTORY_SECTIONS, Clip, Clips, held_out_videos, read_clip
from devices import autocast, pick_device
from encoder import MemoryEncoder
from figures import preview
from finetune import ask
from flags import run_command, run_main
from model import UserError, euler, first_line, get_preset
from pretrain import PretrainConfig, Tools, collate, downsample, draw_retrieval, generator
from tables import (EvalConfig, Row, compare, describe_machine, describe_runs, expected_pairs, first_seeds, interval,
                    markdown, measure_runs, open_checkpoint, parse, parse_runs, plot, question, read_runs, stories,
                    write_table)
from video import contact_strip

# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def ssim(a, b):
    """Structural similarity (Wang et al. 2004) of uint8 frames (F, H, W, 3): one value a frame, (F,).

    Gaussian window of 11 x 11, σ 1.5, data range 255, population covariance, mean over the channels and over the pixels
    whose window lies inside: scikit-image's structural_similarity with gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False.
    """
    if min(a.shape[1:3]) < 11:
        raise UserError(f"SSIM needs frames of at least 11 x 11 pixels, these are {a.shape[1]} x {a.shape[2]}")
    a, b = (x.permute(0, 3, 1, 2).double() for x in (a, b))                     # (F, 3, H, W)
    x = torch.arange(-5, 6, dtype=torch.float64, device=a.device)
    window = torch.exp(-x**2 / (2 * 1.5**2))
    window = window / window.sum()
    kernel = (window[:, None] * window)[None, None].expand(3, 1, 11, 11)
    mean = lambda y: F.conv2d(y, kernel, groups=3)
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b, cov = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2, mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255)**2, (0.03 * 255)**2
    index = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return index.mean((1, 2, 3))


def load_published(module, folder, pattern, rename):
    """Load weights as others publish them from the one .pth or .safetensors file in `folder` that fits `pattern`;
    rename(name in file) gives the name here, or None to skip it. Strictly, and no code in the file can run.
    Raises UserError."""
    files = sorted(path for path in Path(folder).glob(pattern) if path.suffix in (".pth", ".safetensors"))
    if len(files) != 1:
        raise UserError(f"--lpips {folder} holds {len(files)} files {pattern} (.pth or .safetensors), not one: give a "
                        "folder with torchvision's alexnet-owt-*.pth and the lpips package's alex.pth")
    path = files[0]
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        found = {rename(name): value.float() for name, value in state.items() if rename(name)}
    except Exception as e:
        raise UserError(f"{path} is no file of weights ({first_line(e)}): download it again") from None
    wanted = module.state_dict()
    for name in {**wanted, **found}:
        here, there = (tuple(x[name].shape) if name in x else "not there" for x in (wanted, found))
        if here != there or not found[name].isfinite().all():
            raise UserError(f"{path}: {name} is {there}, expected {here} and finite; is this another network's file?")
    module.load_state_dict(found)


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018; version 0.1, AlexNet) of uint8 frames (F, H, W, 3): one value a
    frame, (F,), smaller is nearer. Weights are the user's: see load_published(). Raises UserError."""

    # place in torchvision's `features`: channels in and out, kernel, stride, padding
    convolutions = {0: (3, 64, 11, 4, 2), 3: (64, 192, 5, 1, 2), 6: (192, 384, 3, 1, 1), 8: (384, 256, 3, 1, 1),
                    10: (256, 256, 3, 1, 1)}
    pooled = (3, 6)                     # max-pooling stands before these

    def __init__(self, folder):
        super().__init__()
        self.features = nn.ModuleDict({str(i): nn.Conv2d(*sizes) for i, sizes in self.convolutions.items()})
        self.linear = nn.ModuleDict({f"lin{k}": nn.Conv2d(sizes[1], 1, 1, bias=False)
                                     for k, sizes in enumerate(self.convolutions.values())})
        backbone = lambda name: name.removeprefix("features.") if name.startswith("features.") else None
        load_published(self.features, folder, "alexnet-owt-*", backbone)
        load_published(self.linear, folder, "alex.*", lambda name: name.replace(".model.1.", "."))

    @torch.no_grad()
    def forward(self, a, b):
        """See the class."""
        if min(a.shape[1:3]) < 31:
            raise UserError(f"LPIPS needs frames of at least 31 x 31 pixels, these are {a.shape[1]} x {a.shape[2]}: "
                            "leave out --lpips")
        device = self.features["0"].weight.device
        x = torch.cat([a, b]).to(device).permute(0, 3, 1, 2) / 127.5 - 1        # (2F, 3, H, W) in [-1, 1]
        shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]], device=device)[..., None, None]
        x, distance = (x - shift) / scale, 0
        for (i, convolution), linear in zip(self.features.items(), self.linear.values()):
            x = F.max_pool2d(x, 3, 2) if int(i) in self.pooled else x
            x = F.relu(convolution(x))
            unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
            of_a, of_b = unit.chunk(2)
            distance = distance + linear((of_a - of_b).square()).mean((1, 2, 3))
        return distance.cpu()


def open_lpips(config):
    """The LPIPS of --lpips on its device, or None."""
    return LPIPS(config.lpips).to(pick_device(config.device)) if config.lpips else None


def measure(frames, truth, lpips):
    """{metric: (n, F), a value a frame} of uint8 frames (n, F, H, W, 3); lpips: an LPIPS, or None to leave it out."""
    metrics = dict(psnr=psnr, ssim=ssim) | ({"lpips": lpips} if lpips else {})
    return {name: torch.stack([metric(a, b) for a, b in zip(frames, truth)]) for name, metric in metrics.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Frame retrieval and continuation


@dataclass
class PictureConfig(EvalConfig):
    init: str = ""                # Wan: the base DiT under the checkpoint's LoRA
    vae: str = ""                 # Wan: local folder of its VAE in the diffusers layout
    lpips: str = ""               # folder with alexnet-owt-*.pth (torchvision) and alex.pth (lpips): measure LPIPS too


@dataclass
class RetrievalConfig(PictureConfig):
    checkpoint: str = "runs/pretrain/model.safetensors"    # weights from pretrain.py
    history: str = ""             # a clip of one's own; without it, held-out stories of the paper-doll world
    queries: int = 4              # frames retrieved of each
    out: str = "out/retrieval.png"     # picture: original, model and difference rows


@dataclass
class ContinuationConfig(PictureConfig):
    checkpoint: str = "checkpoints/nano.safetensors"       # weights from finetune.py
    out: str = "out/continuation.png"  # picture: original, model and difference rows


@dataclass
class Table1Config(PictureConfig):
    clips: int = 256              # held-out stories; of a folder, all held-out videos
    queries: int = 4              # frames retrieved of each
    data: str = "world"           # "world" (the paper-doll world) or a folder of videos: its held-out part
    out: str = "assets"           # folder for table1.md, .csv, .png, ...; with --data FOLDER, table1_video.md, ...


def own_clip(config, tools):
    """The video --history as a dataset of one clip, with its original pixels."""
    preset, codec = tools.preset, tools.codec
    frames = read_clip(config.history, preset)
    frames = frames[:codec.frames(len(frames))]
    least = preset.section * codec.stride[0] + codec.causal
    if len(frames) < least:
        raise UserError(f"{config.history} has {len(frames)} frames at {preset.fps} fps; at least {least} are needed: "
                        "give a longer clip")
    return Clips([Clip(codec.encode(to_pixels(frames)[None])[0], [], frames[::codec.stride[0]])])   # as codec.show()


def clean_retrieval(config, tools, clips):
    """draw(rows) of reconstruct(): --queries frames of each clean history, without a prompt, so that only memory can
    answer."""
    settings = PretrainConfig(mask="none", text_drop=1.0, queries=config.queries, seed=config.seed)
    return lambda rows: draw_retrieval(settings, tools, clips, rows, 0)


@torch.no_grad()
def reconstruct(model, tools, draw, n_clips, config, controls=True):
    """Denoise the targets of draw(rows) with several memories. Returns {name: frames uint8 (n, F', H, W, 3)}: truth;
    codec, its ceiling; one_step, from pure noise at once; model, the full sampler; and, as controls, the same with
    no_memory, and with wrong_memory, that of the next clip (if there is one). And age (n, F'), how many latent frames
    before the newest of the history each belongs. model: None for truth, codec and age alone."""
    results = {}
    for first in tqdm(range(0, n_clips, config.batch), desc="evaluating"):
        rows = range(first, min(first + config.batch, n_clips))
        batch = draw(rows).to(tools.device)
        made = {"truth": batch.truth, "age": batch.hr.shape[2] - 1 - batch.frames, "codec": batch.target}
        with autocast(tools.device):
            def sample(memory, steps=config.steps):
                return euler(model.dit, batch.noise, batch.text, batch.frames, memory, steps, config.shift).float()
            if model:
                memory = model.encode(batch.hr, batch.lr)
                made.update(one_step=sample(memory, 1), model=sample(memory))
            if controls:
                made["no_memory"] = sample(None)
            if controls and n_clips > 1:
                other = draw([(row + 1) % n_clips for row in rows]).to(tools.device)
                made["wrong_memory"] = sample(model.encode(other.hr, other.lr))
        for name, x in made.items():
            x = x if name in ("truth", "age") else to_frames(tools.codec.show(batch.hr, x, batch.frames))
            results.setdefault(name, []).append(x.cpu())
    return {name: torch.cat(x) for name, x in results.items()}


def report(made, trained, config, what, lpips):
    """Print a row for each result of reconstruct(), and draw the first clips."""
    truth, _ = made.pop("truth"), made.pop("age")
    print(f"{config.checkpoint}: {trained['method']} {trained['rate']}, step {trained['step']}, "
          f"seed {trained['seed']}; {len(truth)} clips x {truth.shape[1]} frames, {what}, noise seed {config.seed}, "
          f"{config.steps} Euler steps, shift {config.shift:g}")
    print(f"{'':14}{'PSNR dB':>18}{'SSIM':>16}{'LPIPS':>16}     mean over clips with its 95 % interval")
    for name, frames in made.items():
        cells = {"psnr": f"{'':18}", "ssim": f"{'':16}", "lpips": f"{'n/a':>16}"}
        for metric, values in measure(frames, truth, lpips).items():
            mean, half = interval(values.mean(1))
            digits, width = (2, 18) if metric == "psnr" else (3, 16)
            cells[metric] = f"{mean:.{digits}f}" + (f" ± {half:5.{digits}f}" if len(values) > 1 else "")
            cells[metric] = f"{cells[metric]:>{width}}"
        print(f"{name:14}" + "".join(cells.values()))
    preview(Path(config.out), truth, made["model"])
    print(f"wrote {config.out}")


def retrieval(argv):
    """Retrieve frames of the history from memory: PSNR, SSIM and a picture."""
    config = parse(RetrievalConfig, retrieval, argv)
    lpips = open_lpips(config)
    model, tools, trained = open_checkpoint(config.checkpoint, config, "pretrain")
    clips = own_clip(config, tools) if config.history else stories(config, tools.preset, tools.codec)
    made = reconstruct(model, tools, clean_retrieval(config, tools, clips), len(clips), config)
    report(made, trained, config, "no prompts", lpips)


def continuation(argv):
    """Write the section after a full history of held-out stories: PSNR and SSIM against the true one; a picture."""
    config = parse(ContinuationConfig, continuation, argv)
    lpips = open_lpips(config)
    model, tools, trained = open_checkpoint(config.checkpoint, config, "finetune")
    clips = stories(config, tools.preset, tools.codec)
    begin = min(tools.preset.history, HISTORY_SECTIONS * tools.preset.section)
    draw = lambda rows: collate([ask(tools, clips[row], 0, begin, clips[row].text(begin, tools.prompts), torch.ones(1),
                                     generator(config.seed, row)) for row in rows])
    report(reconstruct(model, tools, draw, len(clips), config), trained, config, "with prompts", lpips)


# ---------------------------------------------------------------------------------------------------------------------
# Table 1: the methods side by side

# PSNR, SSIM and LPIPS of the paper's first version: Wan and Hunyuan on its own videos
PAPER = {("large-patchifier", "4x4x2"): (12.93, 0.412, 0.365), ("only-lr", "4x4x2"): (15.21, 0.472, 0.212),
         ("without-lr", "4x4x2"): (15.73, 0.423, 0.198), ("proposed", "4x4x2"): (17.41, 0.596, 0.171),
         ("proposed", "2x2x2"): (19.12, 0.683, 0.152), ("proposed", "2x2x1"): (20.19, 0.705, 0.121)}
EXPECTED = (*([(method, rate) for method in ("proposed", "without-lr", "only-lr", "large-patchifier")]
              for rate in ("4x4x2", "2x2x2")),
            *([("proposed", rate), ("token-merging", rate)] for rate in ("4x4x2", "2x2x2")),
            [("proposed", rate) for rate in ("2x2x1", "2x2x2", "4x4x2")])           # best first


def retrieve(model, tools, clips, config, lpips):
    """Retrieve the query frames of all clips, without prompts. Returns ({one_step, model: {metric: (n, F)}}, age (n, F)
    of each frame in latent frames, {truth, codec, model: frames of the first clips}); with model None, codec in place
    of one_step and model."""
    values, ages, pictures = {}, [], None
    groups = {}                                 # a batch is of one size and one length of history
    for clip in clips:
        groups.setdefault((clip.size, min(clip.frames, tools.preset.history)), []).append(clip)
    for some in groups.values():
        made = reconstruct(model, tools, clean_retrieval(config, tools, some), len(some), config, controls=False)
        ages.append(made.pop("age"))
        pictures = pictures or {name: frames[:2] for name, frames in made.items()}
        truth = made.pop("truth")
        for name in ("one_step", "model") if model else ("codec",):
            frames = made[name]
            for metric, x in measure(frames, truth, lpips).items():
                values.setdefault(name, {}).setdefault(metric, []).append(x)
    values = {name: {metric: torch.cat(x) for metric, x in parts.items()} for name, parts in values.items()}
    return values, torch.cat(ages), pictures


def costs(model, tools, size):
    """{column: value} of φ of a full history of latents of this size: tokens, parameters, and time (median of 5, on one
    clip; the low-resolution history included for methods that read it)."""
    p, device = tools.preset, tools.device
    hr = torch.randn(1, p.dit.in_dim, p.history, *size, device=device)
    lr = downsample(tools, hr)

    def encode():
        return model.encode(hr, downsample(tools, hr) if model.method in ("proposed", "only-lr") else lr)
    with torch.no_grad(), autocast(device):
        tokens = encode()[0].shape[1]
        seconds = speed.alternate({"φ": encode}, 5, device)["φ"]
    return {"tokens_per_second": tokens * p.fps / (p.history * tools.codec.stride[0]),
            "channels_per_latent_value": tokens * p.dit.dim / hr.numel(),
            "encoder_parameters": sum(x.numel() for x in model.encoder.parameters()),
            "encoder_ms": round(1000 * statistics.median(seconds), 2)}


def differences(rows, everything):
    """Lines of Markdown: paired differences between neighbours of the table, then between what the paper puts in order.
    rows: without the codec, best first; everything: the rows of all seeds."""
    theirs = {"paper's difference": {row: figures[0] for row, figures in PAPER.items()}}
    order = expected_pairs(rows, EXPECTED)
    return [line for title, pairs, metric, papers in (
                ("Neighbours in the table: difference in PSNR", list(zip(rows, rows[1:])), "psnr", theirs),
                ("The paper's order: difference in PSNR", order, "psnr", theirs),
                ("The paper's order: difference in PSNR of one step from noise", order, "psnr_one_step", {}))
            for line in compare(f"{title} on the same clips, dB", pairs, [metric], papers, everything)]


def record(row):
    """{column: value} of a row of the CSV: "" where there is none."""
    columns = {"method": row.method, "rate": row.rate, "tokens_per_second": row.costs.get("tokens_per_second", "")}
    for metric in "psnr", "ssim", "lpips", "psnr_one_step":
        mean, half = interval(row.values[metric].mean(1)) if metric in row.values else (math.nan,) * 2
        absent = "n/a" if metric == "lpips" else ""
        for column, value in (metric, mean), (f"{metric}_low", mean - half), (f"{metric}_high", mean + half):
            columns[column] = value if metric in row.values else absent
    columns |= {key: row.costs.get(key, "") for key in
                ("channels_per_latent_value", "encoder_parameters", "encoder_ms")}
    theirs = PAPER.get((row.method, row.rate), ("", "", ""))
    return columns | dict(zip(("paper_psnr", "paper_ssim", "paper_lpips"), theirs))


def table(rows):
    """Lines of Markdown: a row each."""
    heads = ("method", "rate", "tokens/s", "PSNR, dB", "SSIM", "LPIPS", "PSNR, one step", "channels a latent value",
             "φ, parameters", "φ of 20 s, ms", "*paper: PSNR*", "*SSIM*", "*LPIPS*")
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


def describe(rows, everything, config, n_clips):
    """The Markdown file: the table, paired differences, the spread over seeds, and what produced it all."""
    trained = everything[0].trained
    return ["# Frame retrieval", "",
            f"{n_clips} held-out clips x {config.queries} frames of {config.data}, clean histories, no prompts; "
            f"{config.steps} Euler steps, shift {config.shift:g}, seed {config.seed} of queries and noise. Mean over "
            "clips ± 95 % interval, against the original pixels; `codec` is the ceiling. Trained alike: "
            f"{trained['steps']} steps of {trained['batch']} clips of {trained['data']}, from {trained['init']}, "
            f"--mask {trained['mask']}, preset {trained['preset']}.", "", *table(rows), "",
            "*In italics: the figures of the paper's first version. Other data, another base, another codec: only the "
            "order can be compared.*", *differences(rows[1:], everything),
            *describe_runs(everything, "psnr", "PSNR", "dB")]


def by_age(values, ages, section):
    """{sections back, 0 for the newest: mean} of values (n, F) of frames of these ages (n, F)."""
    bins = ages.long() // section
    return {k: values[bins == k].mean().item() for k in bins.unique().tolist()}


def draw_ages(path, rows, ages, section, seconds):
    """PSNR by how long before the end of the history a frame was seen, in bins of a section, so many seconds long."""
    with plot(path, "age of the frame, s", "PSNR, dB") as (axes,):
        for row in rows:
            found = by_age(row.values["psnr"], ages, section)
            axes.plot([(k + 0.5) * seconds for k in found], found.values(), marker=".", label=row.name)


def table1(argv):
    """RUN...: retrieve the same frames with finished runs of pretrain.py; a table, paired differences, pictures."""
    folders, config = parse_runs(Table1Config, table1, argv)
    stem = Path(config.out) / ("table1" if config.data == "world" else "table1_video")
    runs, lpips = read_runs(folders, "table1", "pretrain", stem.name), open_lpips(config)
    if (Path(config.data) / "manifest.json").is_file():
        raise UserError(f"--data {config.data} is a cache of latents: give the folder of the videos themselves")
    name = next(iter(runs.values()))["preset"]
    preset = get_preset(name)
    codec = make_codec(preset, config.vae, pick_device(config.device))
    if not codec.decodes:
        raise UserError("--vae is needed: a local folder of Wan's VAE in the diffusers layout")
    if config.data == "world":
        clips = stories(config, preset, codec)
    else:
        clips = held_out_videos(config.data, preset, codec, config.cache)
    # an encoder that is there for its segments alone
    segments = MemoryEncoder("full", "1x1x1", name)
    shortest = min(segments.whole(min(clip.frames, preset.history)) for clip in clips)
    if config.queries > shortest:
        raise UserError(f"--queries {config.queries}: the shortest held-out clip has {shortest} latents to choose from")

    def measure_run(folder):
        print(f"measuring {folder}")
        model, tools, _ = open_checkpoint(Path(folder) / "model.safetensors", config, "pretrain")
        values, _, pictures = retrieve(model, tools, clips, config, lpips)
        return (values["model"] | {"psnr_one_step": values["one_step"]["psnr"]}, pictures["model"],
                costs(model, tools, clips[0].latents.shape[2:]))
    asked = question(config, codec, clips, "steps", "shift", "seed", "queries", lpips=bool(lpips))
    everything = measure_runs(runs, stem.name, asked, describe_machine(pick_device(config.device)), measure_run)
    tools = Tools(preset, codec, make_prompts(preset), segments, pick_device(config.device))
    ceiling, ages, pictures = retrieve(None, tools, clips, config, lpips)
    rows = [Row("codec", "", ceiling["codec"], pictures["codec"], {}),
            *sorted(first_seeds(everything), key=lambda row: row.psnr.mean(), reverse=True)]

    write_table(stem, describe(rows, everything, config, len(clips)), rows, everything, record,
                ("psnr", "psnr_low", "psnr_high", "ssim", "lpips", "psnr_one_step"))
    seconds = codec.stride[0] / preset.fps                          # a latent frame
    draw_ages(f"{stem}_age.png", rows[1:], ages, preset.section, preset.section * seconds)
    heading = lambda row: row.name.replace(" ", "\n") + f"\n{row.psnr.mean():.1f} dB"
    age = ages[:len(pictures["truth"])].flatten() * seconds
    strips = [("original", pictures["truth"]), *((heading(row), row.pictures) for row in rows)]
    contact_strip([(name, frames.flatten(0, 1)) for name, frames in strips], f"{stem}.png",
                  [f"{x:g} s ago" for x in age.tolist()])
    print(f"wrote {stem}.md, .csv, .png, _seeds.csv, _curves.png and _age.png")


COMMANDS = {"retrieval": retrieval, "continuation": continuation, "table1": table1, "table2": consistency.table2,
            "story": consistency.story, "budget": budget.budget, "speed": speed.speed, "judge": judge.judge,
            "elo": judge.elo}


def main():
    run_command("eval.py", COMMANDS, __doc__)


if __name__ == "__main__":
    run_main(main)
