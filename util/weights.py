"""Weights from safetensors files: strict (whatever does not fit is named), safe (no code in a file can run), and never
a second copy in memory."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from util.cli import UserError
from util.files import inside, parse_json


def weight_files(path):
    """The safetensors files of a checkpoint: a file, or a folder with one file or with shards and an index."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"no weights at {path}: give a .safetensors file or a folder that holds one")
    for index in sorted(path.glob("*.safetensors.index.json")):
        return shard_files(path, index)
    if (path / "model.safetensors").is_file():  # a run; its LoRA and measurements may lie beside it
        return [path / "model.safetensors"]
    files = sorted(path.glob("*.safetensors"))
    if not files and (path / "transformer").is_dir():  # a whole diffusers pipeline
        return weight_files(path / "transformer")
    if len(files) != 1:
        raise UserError(f"{path} holds {len(files)} .safetensors files and no index: name the one to load")
    return files


def shard_files(folder, index):
    """The files that an index of shards names. Raises UserError if one is missing."""
    names = parse_json(index.read_bytes(), index, "download it again", weight_map=dict)["weight_map"]
    if not names or not all(isinstance(f, str) for f in names.values()):
        raise UserError(f"{index} names no files: download it again")
    files = sorted({inside(folder, f) for f in names.values()})
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        raise UserError(f"{index} lists {', '.join(missing)}, not found in {folder}: download the missing file")
    return files


def open_safetensors(path):
    """Open a safetensors file for reading. Raises UserError for anything else (a pickle, a truncated file)."""
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder: name the file, for example {path}/model.safetensors")
    if Path(path).is_fifo():  # which would be waited for
        raise UserError(f"{path} is a pipe: give a file of weights")
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"no file {path}: expected safetensors weights; train them first, or name another") from None
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{path} is not a readable safetensors file ({e}): download or train it again") from None


def own_config(path):
    """The config in the header of a checkpoint of this project; None for any other file."""
    with open_safetensors(path) as f:
        text = (f.metadata() or {}).get("config")
    source = f"the config in the header of {path}"
    return text and parse_json(text, source, "train it again, or name another", stage=str, preset=str)


def read_config(path):
    """own_config(), which must be there. Raises UserError."""
    config = own_config(path)
    if not config:
        raise UserError(
            f"{path} was not written by pretrain.py or finetune.py (no config in it): give a model.safetensors of "
            "theirs"
        )
    source = f"the config in the header of {path}"
    types = dict(method=str, rate=str, window=int, anchor=bool, cross_attention=bool, cache_memory=bool)
    types |= dict(step=int, seed=int)
    return parse_json(json.dumps(config), source, "train it again, or name another", **types)


def load_weights(module, files, rename=None, names=None, device="cpu", dtype=None):
    """Read the tensors of `module` from safetensors files, strictly. Nothing changes unless everything fits.

    rename(name in the file) -> name here, or None to skip it; names: only these tensors of the module. Each tensor goes
    straight to `device` and to dtype(name, tensor here), by default the module's own dtype, so a module built on the
    meta device never takes more memory than in the end.
    Raises UserError naming a missing, extra, wrong-shaped or non-finite tensor.
    """
    wanted = {name: tensor for name, tensor in module.state_dict().items() if names is None or name in names}
    places = locate_tensors(wanted, files, rename or (lambda name: name))
    found = {}
    for name, (path, theirs) in places.items():
        with open_safetensors(path) as f:  # opened anew for each: a mapped file stays in memory until it is closed
            tensor = read_tensor(f, path, theirs)
            target = dtype(name, wanted[name]) if dtype else wanted[name].dtype
            found[name] = tensor.to(device, target, copy=True)
    module.load_state_dict(found, strict=names is None, assign=True)


def read_tensor(f, path, name):
    """A tensor of an open safetensors file. Raises UserError unless it holds finite floats of 16, 32 or 64 bits."""
    tensor = f.get_tensor(name)
    if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{path}: {name} is {kind}, which is not read: give the file in bf16, fp16 or fp32")
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():  # no copy of the tensor's size
        raise UserError(f"{path}: {name} holds values that are not finite; the file is damaged, use another")
    return tensor


def locate_tensors(wanted, files, rename):
    """{name here: (file, name there)} of all tensors in `wanted`. Raises UserError if the files do not fit."""
    places = {}
    for path in files:
        with open_safetensors(path) as f:
            for theirs in f.keys():
                name = rename(theirs)
                if name is None:
                    continue
                if name not in wanted:
                    raise UserError(
                        f"{path}: unexpected tensor {theirs}; is this a checkpoint of another model or method?"
                    )
                if name in places:
                    raise UserError(
                        f"{path}: {theirs} and {places[name][1]} are the same tensor, {name}: give a checkpoint that "
                        "holds it once"
                    )
                shape, expected = tuple(f.get_slice(theirs).get_shape()), tuple(wanted[name].shape)
                if shape != expected:
                    raise UserError(
                        f"{path}: {theirs} has shape {shape}, expected {expected}; is this a checkpoint of another "
                        "size or rate?"
                    )
                places[name] = path, theirs
    missing = [name for name in wanted if name not in places]
    if missing:
        raise UserError(
            f"{files[0]}: no tensor {missing[0]} ({len(missing)} of {len(wanted)} missing); is this a checkpoint of "
            "another model or method?"
        )
    return places
