"""The folder of a training run: model.safetensors, state.pt to resume from, log.jsonl."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from util.cli import UserError
from util.files import atomic_write, is_a, parse_json, remove_leftovers, same_path, shipped
from util.weights import read_config

# flags that may change on --resume
FREE = ("steps", "out", "device", "compile", "resume", "cache", "save_every", "micro_batch", "held_out")
FREE += ("sample_steps", "sample_shift", "vae")


def save(config, stage, step, model, ema, optimizers, exports, codec=None):
    """Write model.safetensors, the averaged weights that sample.py and eval.py read, and state.pt for --resume.

    exports(tensors) -> {file name: {name: tensor}}: further files of these weights, for other programs. codec: its
    identity.
    state.pt comes last: a run killed between two files resumes from the older one and writes the others again.
    """
    out, names = Path(config.out), model.saved_names()

    def tensors():
        return {name: tensor for name, tensor in model.state_dict().items() if name in names}

    metadata = {"config": json.dumps({**asdict(config), "stage": stage, "step": step, "codec": codec})}
    with ema.swapped():
        with atomic_write(out / "model.safetensors", replace=True) as path:
            save_file(tensors(), path, metadata)
        for name, exported in exports(tensors()).items():
            with atomic_write(out / name, replace=True) as path:
                save_file(exported, path)
    state = {"stage": stage, "step": step, "config": asdict(config), "model": tensors(), "ema": ema.shadow}
    state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    # an open Python file: its errors say why it cannot be written
    with atomic_write(out / "state.pt", replace=True) as path, open(path, "wb") as f:
        torch.save(state, f)


def resume(config, stage, model, ema, optimizers):
    """Load state.pt from --out; returns the step to go on from.

    0 if nothing was saved yet, so that a script of many runs can be started again as it is. Raises UserError.
    """
    path = Path(config.out) / "state.pt"
    if not path.is_file():
        tqdm.write(f"--resume: no {path} yet, so this is the start")
        return 0
    state = read_state(path, config, stage, model, ema, optimizers)
    model.load_state_dict({**model.state_dict(), **state["model"]})
    torch._foreach_copy_(ema.shadow, state["ema"])
    for optimizer, its in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(its)
    return state["step"]


def check_flags(path, state, config, stage):
    """Raise UserError unless a state was made by this stage with these flags."""
    if state["stage"] != stage:
        raise UserError(f"--resume: {path} is of {state['stage']}.py: give another folder")
    for key, value in state["config"].items():
        ours = getattr(config, key, None)
        same_file = isinstance(value, str) and isinstance(ours, str) and same_path(shipped(value), shipped(ours))
        if key not in FREE and value != ours and not same_file:
            raise UserError(f"--resume: {path} was made with --{key} {value}, not {ours}; give the same flags")


def read_state(path, config, stage, model, ema, optimizers):
    """The content of a state.pt, which must have these flags and fit this model to the last tensor. Raises UserError
    naming what does not."""

    def refuse(what):
        raise UserError(f"--resume: {path}: {what}; start again in another folder") from None

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        refuse(f"it cannot be read ({type(e).__name__})")
    types = dict(stage=str, step=int, config=dict, model=dict, ema=list, optimizers=list)
    for key, kind in types.items():
        if not isinstance(state, dict) or not is_a(state.get(key), kind):
            refuse(f"its {key} is missing or no {kind.__name__}")
    if state["step"] < 0:
        refuse(f"its step is {state['step']}")
    check_flags(path, state, config, stage)  # first: other flags make other tensors
    ours = {name: tensor for name, tensor in model.state_dict().items() if name in set(model.saved_names())}
    for name in ours | state["model"]:
        if not alike(ours.get(name), state["model"].get(name)):
            refuse(f"{name} is missing, unexpected, of another shape or not finite")
    averaged = [name for name, p in model.named_parameters() if p.requires_grad]
    if len(state["ema"]) != len(ema.shadow):
        refuse(f"its ema has {len(state['ema'])} tensors, expected {len(ema.shadow)}")
    for name, a, b in zip(averaged, ema.shadow, state["ema"]):
        if not alike(a, b):
            refuse(f"the average of {name} is of another shape or not finite")
    check_optimizers(state["optimizers"], optimizers, refuse)
    return state


def alike(a, b):
    """Are both tensors of one shape, and is b finite?"""
    return torch.is_tensor(a) and torch.is_tensor(b) and a.shape == b.shape and bool(b.isfinite().all())


def check_optimizers(saved, optimizers, refuse):
    """Call refuse(what) unless the saved states are those of these optimizers."""
    if len(saved) != len(optimizers):
        refuse(f"it has {len(saved)} optimizers, expected {len(optimizers)}")
    for optimizer, its in zip(optimizers, saved):
        ours = [[p for p in group["params"]] for group in optimizer.param_groups]
        try:
            numbers = [group["params"] for group in its["param_groups"]]
            states = [[its["state"].get(k, {}) for k in group] for group in numbers]
        except (KeyError, TypeError, AttributeError):
            refuse("the state of an optimizer is damaged")
        if [len(group) for group in numbers] != [len(group) for group in ours]:
            refuse("an optimizer has other parameter groups")
        for p, state in ((p, s) for group in zip(ours, states) for p, s in zip(*group)):
            tensors = [x for x in state.values() if torch.is_tensor(x)]
            if not all(x.isfinite().all() and x.shape in (p.shape, torch.Size([])) for x in tensors):
                refuse("the state of an optimizer is of another shape or not finite")


def read_log(path):
    """{step: entry} of a run's log.jsonl; {} if there is none. The last line of a killed run may be cut off.

    Raises UserError.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    advice = "delete it (its curve is lost, the weights are not)"
    entries = [parse_json(line, path, advice, step=int) for line in lines if line.endswith(b"\n")]
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
    with atomic_write(log, replace=True) as path:
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
