"""What sample.py continues, section by section: how many, with which prompts, into which file."""

import math
from pathlib import Path

from tqdm import tqdm

from util.cli import UserError, warn
from util.files import check_output, same_path, shipped
from util.folder import warn_past_end
from util.sheets import sheet_path
from util.storyboard import parse_storyboard, prompt_at, storyboard_beside
from util.weights import read_config


def read_trained(config):
    """The config of --checkpoint, a checkpoint of finetune.py; {} for random weights. Raises UserError."""
    random, defaults = config.init == "random", type(config)
    if not random and config.preset != defaults.preset:
        raise UserError(f"--preset {config.preset} is for --init random alone: a checkpoint has its own, leave it out")
    if random and config.checkpoint != defaults.checkpoint:
        raise UserError(
            f"--checkpoint {config.checkpoint} --init random: random or trained weights, drop one of the two"
        )
    config.checkpoint = shipped(config.checkpoint)
    trained = {} if random else read_config(config.checkpoint)
    if not random and trained.get("stage") != "finetune":
        raise UserError(
            f"{config.checkpoint} was trained by {trained.get('stage')}.py: continuing a clip needs a "
            "checkpoint of finetune.py"
        )
    return trained


def check_sampler(config, solvers):
    """Raise UserError for settings of the sampler that make no sense."""
    if config.solver not in solvers:
        raise UserError(f"--solver {config.solver}: choose one of {', '.join(solvers)}")
    if config.steps < 1 or not 0 <= config.guidance < math.inf or not 0 < config.shift < math.inf:
        raise UserError(
            f"--steps {config.steps} --guidance {config.guidance} --shift {config.shift}: expected steps of at least "
            "1, guidance of at least 0, shift above 0"
        )
    if not 0 <= (config.low_guidance or 0) < math.inf:
        raise UserError(f"--low_guidance {config.low_guidance}: expected a number of at least 0")
    low, high = config.guidance_interval
    if not 0 <= low < high <= 1:
        raise UserError(f"--guidance_interval {low:g} {high:g}: give two noise levels, 0 <= LOW < HIGH <= 1")
    for key in ("negative", "guidance_interval", "cfg_zero"):
        none = config.guidance == 1 and config.low_guidance in (None, 1)
        if none and getattr(config, key) != getattr(type(config), key):
            raise UserError(f"--{key} does nothing with --guidance 1, which is none: drop one of the two")
    if not 0 <= config.memory_seconds < math.inf:
        raise UserError(f"--memory_seconds {config.memory_seconds}: give seconds of history to keep, or 0 for all")


def sections_remembered(config, base):
    """How many sections of history --memory_seconds keeps, or None for all."""
    section_seconds = base.section * base.codec.stride[0] / base.fps
    return math.ceil(config.memory_seconds / section_seconds) if config.memory_seconds else None


def n_sections(config, base):
    """How many sections --seconds makes, rounded up."""
    return math.ceil(config.seconds * base.fps / (base.section * base.codec.stride[0]) - 1e-6)


def section_prompts(config, base, clip_seconds):
    """(storyboard with 0 s at the end of the clip, the prompt of each section to generate)."""
    section_seconds = base.section * base.codec.stride[0] / base.fps
    starts = [k * section_seconds for k in range(n_sections(config, base))]
    if config.init == "random":
        return [], [""] * len(starts)
    if config.prompt is not None:
        storyboard = parse_storyboard(config.prompt)
        if storyboard and storyboard[-1][0] >= len(starts) * section_seconds:
            warn_past_end("--prompt", storyboard[-1][0], len(starts) * section_seconds)
    else:
        beside = storyboard_beside(config.history) or []
        if len(beside) > 1 and beside[-1][0] < clip_seconds:
            warn(
                f"the storyboard beside {config.history} ends before the clip does: its last prompt is used for all "
                "that is generated, or give --prompt"
            )
        storyboard = [(start - clip_seconds, prompt) for start, prompt in beside]
    return storyboard, [prompt_at(storyboard, start + 1e-6) for start in starts]


def warn_limits(config, base, frames, context):
    """Warn of a history of so many frames that is shorter than any in training, or that the model cannot see, since
    its `context` is None."""
    length = base.section * base.codec.stride[0]
    if frames < length + base.codec.causal and config.init != "random":
        seen, given = length / base.fps, frames / base.fps
        warn(f"{config.checkpoint} was trained on histories of at least {seen:g} s, and this one has {given:g} s")
    if context is None and frames:
        warn(f"{config.checkpoint} is a model without memory: what it generates does not know the history")


def output_file(config):
    """--save_file or its default. Raises UserError if it, or the contact sheet beside it, may not be written."""
    history = Path(config.history)
    file = Path(config.save_file or f"out/{history.stem or 'text'}.mp4")
    if not config.save_file and any(same_path(path, history) for path in (file, sheet_path(file))):
        file = file.with_stem(file.stem + "_continued")
    for path in (file, sheet_path(file)):
        check_output(path, [history, config.checkpoint, config.low_checkpoint, config.prompt])
    return file


def write_sections(writer, sheet, generated, sections):
    """Write the generated sections -> (seconds it took to generate them, what stopped it early or None).
    Whatever stops it, a signal, a lack of memory, numbers that are not finite, the sections so far are kept."""
    seconds = 0.0
    try:
        for frames, took in tqdm(generated, total=sections, desc="sections"):
            writer.write(frames)
            sheet.add(frames)
            seconds += took
    except BaseException as stopped:  # main raises it again, once the sections so far are safe
        if not sheet.kept:
            raise
        return seconds, stopped
    return seconds, None
