"""The folder of a training run: model.safetensors, state.pt to resume from, log.jsonl."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from util.cli import UserError
from util.files import atomic_write, parse_json, remove_leftovers
from util.weights import read_config

# flags that may change on --resume
FREE = ("steps", "out", "device", "compile", "resume", "cache", "save_every", "micro_batch", "held_out")
FREE += ("sample_steps", "sample_shift", "vae")


def save(config, stage, step, model, ema, optimizers, exports):
    """Write model.safetensors, the averaged weights that sample.py and eval.py read, and state.pt for --resume.

    exports(tensors) -> {file name: {name: tensor}}: further files of these weights, for other programs.
    state.pt comes last: a run killed between two files resumes from the older one and writes the others again.
    """
    out, names = Path(config.out), model.saved_names()

    def tensors():
        return {name: tensor for name, tensor in model.state_dict().items() if name in names}

    metadata = {"config": json.dumps({**asdict(config), "stage": stage, "step": step})}
    with ema.swapped():
        with atomic_write(out / "model.safetensors") as path:
            save_file(tensors(), path, metadata)
        for name, exported in exports(tensors()).items():
            with atomic_write(out / name) as path:
                save_file(exported, path)
    state = {"stage": stage, "step": step, "config": asdict(config), "model": tensors(), "ema": ema.shadow}
    state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    # an open Python file: its errors say why it cannot be written
    with atomic_write(out / "state.pt") as path, open(path, "wb") as f:
        torch.save(state, f)


def resume(config, stage, model, ema, optimizers):
    """Load state.pt from --out; returns the step to go on from.

    0 if nothing was saved yet, so that a script of many runs can be started again as it is. Raises UserError.
    """
    path = Path(config.out) / "state.pt"
    if not path.is_file():
        tqdm.write(f"--resume: no {path} yet, so this is the start")
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        step, theirs, tensors, shadow, saved = (state[k] for k in ("step", "config", "model", "ema", "optimizers"))
    except Exception as e:
        raise UserError(
            f"--resume: {path} cannot be read ({type(e).__name__}); start again in another folder"
        ) from None
    if state["stage"] != stage:
        raise UserError(f"--resume: {path} is of {state['stage']}.py: give another folder")
    for key, value in theirs.items():
        if key not in FREE and value != getattr(config, key, None):
            raise UserError(
                f"--resume: {path} was made with --{key} {value}, not {getattr(config, key, None)}; give the same flags"
            )
    check_state(path, model, tensors)
    model.load_state_dict({**model.state_dict(), **tensors})
    torch._foreach_copy_(ema.shadow, shadow)
    for optimizer, its in zip(optimizers, saved):
        optimizer.load_state_dict(its)
    return step


def check_state(path, model, tensors):
    """Raise UserError naming a tensor of state.pt that does not fit the model."""
    held = model.state_dict()
    ours = {name: held[name] for name in model.saved_names()}
    for name in ours | tensors:
        fits = name in ours and name in tensors and ours[name].shape == tensors[name].shape
        if not fits or not tensors[name].isfinite().all():
            raise UserError(
                f"--resume: {path}: {name} is missing, unexpected, of another shape or not finite; start again in "
                "another folder"
            )


def read_log(path):
    """{step: entry} of a run's log.jsonl; {} if there is none. The last line of a killed run may be cut off.

    Raises UserError.
    """
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    advice = "delete it (its curve is lost, the weights are not)"
    entries = [parse_json(line, path, advice, "step") for line in lines if line.endswith("\n")]
    return {entry["step"]: entry for entry in entries}


def start_log(out, step):
    """Make the run folder; keep the log's entries up to this step. Weights without a state are kept under another
    name."""
    remove_leftovers(out)
    log, weights = out / "log.jsonl", out / "model.safetensors"
    if step == 0 and weights.is_file():
        kept = weights.with_stem(f"model-step{read_config(weights)['step']}")
        weights.replace(kept)
        tqdm.write(f"the weights that lay there are {kept} now")
    entries = [entry for logged, entry in read_log(log).items() if logged <= step]
    with atomic_write(log) as path:
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
