"""LoRAs by others, added to the weights of a DiT: files of ComfyUI, diffusers, PEFT, musubi-tuner (kohya), lightx2v."""

import re

import torch

from util.cli import UserError
from util.files import is_a, parse_json
from util.weights import open_safetensors, read_tensor

ENDINGS = {  # of a tensor's name, after that of a module -> (what it is, which parameter of the module it changes)
    ".lora_A.weight": ("A", ".weight"),
    ".lora_down.weight": ("A", ".weight"),
    ".lora_B.weight": ("B", ".weight"),
    ".lora_up.weight": ("B", ".weight"),
    ".alpha": ("alpha", ".weight"),
    ".diff": ("difference", ".weight"),  # of the whole tensor, as in lightx2v's files
    ".diff_b": ("difference", ".bias"),
    ".diff_m": ("difference", ".modulation"),
}


@torch.no_grad()
def apply_loras(dit, text, rename):
    """Add LoRAs to the weights: W + strength * (alpha / rank * B A + difference), in float32, rounded once.

    text: "FILE:strength FILE ..."; rename(name in the file) -> name here. Raises UserError; nothing changes unless all
    of them fit. What follows a colon and is no number belongs to the path.
    """
    parameters = dict(dit.named_parameters())
    changes = {}  # parameter -> [(scale, its tensors)]
    for given in text.split():
        path, strength = re.fullmatch(r"(.+?)(?::(-?\d*\.?\d+))?", given).groups()
        for name, scale, tensors in read_lora(path, parameters, rename):
            changes.setdefault(name, []).append((float(strength or 1) * scale, tensors))
    for name, parts in changes.items():
        p = parameters[name]
        total = p.float()
        for scale, tensors in parts:
            tensors = [x.to(p.device, torch.float32) for x in tensors]
            update = torch.mm(*(x.reshape(len(x), -1) for x in tensors)) if len(tensors) > 1 else tensors[0]
            total = total + scale * update.view_as(p)
        p.copy_(total)


def read_lora(path, parameters, rename):
    """[(parameter, scale, [B, A] or [difference])] of a file. Raises UserError unless all of it fits `parameters`."""
    changes = []
    with open_safetensors(path) as f:
        stated = stated_alpha(f, path)
        for (name, whole), keys in group_tensors(f, path, parameters, rename).items():
            kinds, (rows, *rest) = ["difference"] if whole else ["B", "A"], parameters[name].shape
            if not keys.keys() >= set(kinds):
                raise UserError(f"{path} has only a part of a layer, {', '.join(keys.values())}: give the whole LoRA")
            tensors = [read_tensor(f, path, keys[kind]) for kind in kinds]
            shapes, rank = [tuple(x.shape) for x in tensors], tensors[-1].shape[:1].numel()
            pair = [(rows, rank, *[1] * (len(rest) - 1)), (rank, *rest)]
            if shapes != ([(rows, *rest)] if whole else pair) or not rank:
                raise UserError(
                    f"{path}: {keys[kinds[0]]} has shape {' times '.join(map(str, shapes))}, expected a change of "
                    f"{(rows, *rest)}; is this a LoRA of another base model?"
                )
            alpha = read_alpha(f, path, keys["alpha"]) if "alpha" in keys else stated
            changes.append((name, 1.0 if whole or alpha is None else alpha / rank, tensors))
    return changes


def group_tensors(f, path, parameters, rename):
    """{(parameter, whether it is a difference): {what it is: name in the file}} of an open file. Raises UserError."""
    groups, underscored = {}, {name.replace(".", "_"): name for name in parameters}
    for key in f.keys():
        known = key.replace(".default.weight", ".weight")  # PEFT's name of the adapter
        ending = next((ending for ending in ENDINGS if known.endswith(ending)), "")
        kind, parameter = ENDINGS.get(ending, ("", ""))
        module = known.removesuffix(ending)
        if module.startswith("lora_unet_"):  # kohya's names have no dots inside
            name = underscored.get((module.removeprefix("lora_unet_") + parameter).replace(".", "_"))
        else:
            name = rename(module.removeprefix("transformer.").removeprefix("diffusion_model.") + parameter)
        if not kind or name not in parameters:
            raise UserError(f"{path}: unexpected tensor {key}; is this a LoRA, and of the same base model?")
        group = groups.setdefault((name, kind == "difference"), {})
        if kind in group:
            raise UserError(f"{path}: {key} and {group[kind]} are the same tensor: give a LoRA that holds it once")
        group[kind] = key
    if not groups:
        raise UserError(f"{path} holds no tensor: give a LoRA")
    return groups


def read_alpha(f, path, key):
    """The one number in a tensor. Raises UserError."""
    alpha = f.get_tensor(key).double()  # often a whole number
    if alpha.numel() != 1 or not alpha.isfinite().all():
        raise UserError(f"{path}: {key} is not one finite number; the file is damaged, use another")
    return alpha.item()


def stated_alpha(f, path):
    """The alpha of all layers if diffusers has stated it in the file's header, else None. Raises UserError."""
    header = (f.metadata() or {}).get("lora_adapter_metadata")
    if not header:
        return None
    config = parse_json(header, f"the header of {path}", "download it again")
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    odd = [key for key in ("alpha_pattern", "use_rslora", "use_dora") if config.get(key)]
    if odd or not is_a(config.get("lora_alpha"), float):
        raise UserError(f"{path} states {(odd or ['no lora_alpha'])[0]} in its header, which is not read: use another")
    return config["lora_alpha"]
