"""The folder of a training run: model.safetensors and state.pt, how to go on from them, and log.jsonl."""
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from model import UserError
from video import remove_leftovers, whole_file
from wan import comfy_name
from weights import parse_json, read_metadata


def save(config, stage, model, ema, optimizers, step):
    """model.safetensors, the averaged weights that sample.py and eval.py read; with a LoRA that alone too, under the
    names that ComfyUI reads; state.pt, all that --resume needs. It comes last: what it says is done is all on the disk,
    and a run killed between two files goes on from the older state.pt and writes the others again."""
    out = Path(config.out)
    names = model.saved_names()
    tensors = lambda: {name: tensor for name, tensor in model.state_dict().items() if name in names}
    metadata = {"config": json.dumps({**asdict(config), "stage": stage, "step": step})}
    with ema.swapped():
        with whole_file(out / "model.safetensors") as path:
            save_file(tensors(), path, metadata)
        if config.lora:
            with whole_file(out / "lora.safetensors") as path:
                save_file({comfy_name(name): tensor for name, tensor in tensors().items() if ".lora_" in name}, path)
    state = {"stage": stage, "step": step, "config": asdict(config), "model": tensors(), "ema": ema.shadow,
             "optimizers": [o.state_dict() for o in optimizers]}
    with whole_file(out / "state.pt") as path, open(path, "wb") as f:   # a Python file says why it cannot be written
        torch.save(state, f)


def resume(config, stage, model, ema, optimizers):
    """Load state.pt of --out; returns the step to go on from: 0 if nothing was saved yet, so that a script of many runs
    may be started again as it is."""
    path = Path(config.out) / "state.pt"
    if not path.is_file():
        tqdm.write(f"--resume: no {path} yet, so this is the start")
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        step, theirs, tensors, shadow, saved = (state[k] for k in ("step", "config", "model", "ema", "optimizers"))
    except Exception as e:
        raise UserError(f"--resume: {path} cannot be read ({type(e).__name__}); "
                        "start again in another folder") from None
    if state["stage"] != stage:
        raise UserError(f"--resume: {path} is of {state['stage']}.py: give another folder")
    free = ("steps", "out", "device", "compile", "resume", "cache", "save_every", "micro_batch", "held_out",
            "sample_steps", "sample_shift", "vae")
    for key, value in theirs.items():
        if key not in free and value != getattr(config, key, None):
            raise UserError(f"--resume: {path} was made with --{key} {value}, not {getattr(config, key, None)}; "
                            "give the same flags")
    held = model.state_dict()
    ours = {name: held[name] for name in model.saved_names()}
    for name in ours | tensors:
        if (name not in ours or name not in tensors or ours[name].shape != tensors[name].shape
                or not tensors[name].isfinite().all()):
            raise UserError(f"--resume: {path}: {name} is missing, unexpected, of another shape or not finite; "
                            "start again in another folder")
    model.load_state_dict({**held, **tensors})
    torch._foreach_copy_(ema.shadow, shadow)
    for optimizer, its in zip(optimizers, saved):
        optimizer.load_state_dict(its)
    return step


def read_log(path):
    """{step: entry} of a run's log.jsonl; {} where there is none. Of a run that was killed, the last line may be half
    of one. Raises UserError."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    advice = "delete it (its curve is lost, the weights are not)"
    entries = [parse_json(line, path, advice, "step") for line in lines if line.endswith("\n")]
    return {entry["step"]: entry for entry in entries}


def start_log(out, first):
    """Make the run folder; of a log that is there, keep the steps that are not done again. Weights without a state to
    go on from are kept under another name."""
    remove_leftovers(out)
    log, weights = out / "log.jsonl", out / "model.safetensors"
    if first == 0 and weights.is_file():
        kept = weights.with_stem(f"model-step{read_metadata(weights)['step']}")
        weights.replace(kept)
        tqdm.write(f"the weights that lay there are {kept} now")
    entries = read_log(log)
    with whole_file(log) as path:
        path.write_text("".join(json.dumps(entry) + "\n" for step, entry in entries.items() if step <= first))
