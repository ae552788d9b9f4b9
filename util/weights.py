"""Weights from safetensors files: strict (whatever does not fit is named), safe (no code in a file can run), and never
a second copy in memory."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from util.cli import UserError, first_line
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


class OpenPickle:
    """A PyTorch file of weights, {name: tensor} or {"module": {name: tensor}}, read as an open safetensors file is.

    No code in it can run, and only what is asked for is read. Raises UserError for anything else.
    """

    def __init__(self, path):
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except FileNotFoundError:
            raise UserError(f"no file {path}: expected weights, name another") from None
        except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as e:
            raise UserError(f"{path} holds no plain weights ({first_line(e)}): give them as safetensors") from None
        self.tensors = found.get("module", found) if isinstance(found, dict) else None
        if not isinstance(self.tensors, dict) or not all(isinstance(x, torch.Tensor) for x in self.tensors.values()):
            raise UserError(f"{path} holds no plain weights: expected names and tensors, give them as safetensors")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.tensors = None

    def keys(self):
        return list(self.tensors)

    def metadata(self):
        return None

    def get_tensor(self, name):
        return self.tensors[name]

    def get_slice(self, name):
        return SimpleNamespace(get_shape=lambda: list(self.tensors[name].shape))


def open_weights(path):
    """Open a file of a base's weights: safetensors, or a PyTorch file by its ending."""
    return OpenPickle(path) if Path(path).suffix in (".pt", ".pth", ".bin") else open_safetensors(path)


def own_config(path):
    """The config in the header of a checkpoint of this project; None for any other file."""
    with open_weights(path) as f:
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


class Part(NamedTuple):
    """A tensor of a file that is one of several which make a tensor here, joined along their rows."""

    name: str  # here
    order: int = 0  # among them
    change: object = None  # a function of it, of the same shape


def load_weights(module, files, rename=None, names=None, device="cpu", dtype=None):
    """Read the tensors of `module` from files, strictly. Nothing changes unless everything fits.

    rename(name in the file) -> name here, a Part of a tensor here, or None to skip it; names: only these tensors of the
    module. Each tensor goes straight to `device` and to dtype(name, tensor here), by default the module's own dtype, so
    a module built on the meta device never takes more memory than in the end.
    Raises UserError naming a missing, extra, wrong-shaped or non-finite tensor.
    """
    wanted = {name: tensor for name, tensor in module.state_dict().items() if names is None or name in names}
    places = locate_tensors(wanted, files, rename or (lambda name: name))
    found = {}
    for name, pieces in places.items():
        target, tensors = dtype(name, wanted[name]) if dtype else wanted[name].dtype, []
        for path, theirs, change in pieces:
            with open_weights(path) as f:  # opened anew for each: a mapped file stays in memory until it is closed
                tensor = read_tensor(f, path, theirs)
                tensor = change(tensor) if change else tensor
                tensors.append(tensor.to(device, target, copy=True))
        found[name] = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    module.load_state_dict(found, strict=names is None, assign=True)


def read_tensor(f, path, name):
    """A tensor of an open file. Raises UserError unless it holds finite floats of 16, 32 or 64 bits."""
    tensor = f.get_tensor(name)
    if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{path}: {name} is {kind}, which is not read: give the file in bf16, fp16 or fp32")
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():  # no copy of the tensor's size
        raise UserError(f"{path}: {name} holds values that are not finite; the file is damaged, use another")
    return tensor


def locate_tensors(wanted, files, rename):
    """{name here: [(file, name there, change)]} of all tensors in `wanted`, see Part. Raises UserError if the files do
    not fit."""
    places, shapes = {}, {}
    for path in files:
        with open_weights(path) as f:
            for theirs in f.keys():
                if (found := rename(theirs)) is None:
                    continue
                name, order, change = found if isinstance(found, Part) else Part(found)
                if name not in wanted:
                    raise UserError(
                        f"{path}: unexpected tensor {theirs}; is this a checkpoint of another model or method?"
                    )
                pieces = places.setdefault(name, {})
                if order in pieces:
                    raise UserError(
                        f"{path}: {theirs} and {pieces[order][1]} are the same tensor, {name}: give a checkpoint that "
                        "holds it once"
                    )
                pieces[order] = path, theirs, change
                shapes[path, theirs] = tuple(f.get_slice(theirs).get_shape())
    places = {name: [pieces[order] for order in sorted(pieces)] for name, pieces in places.items()}
    for name, pieces in places.items():
        check_shape(pieces, [shapes[path, theirs] for path, theirs, _ in pieces], tuple(wanted[name].shape))
    missing = [name for name in wanted if name not in places]
    if missing:
        raise UserError(
            f"{files[0]}: no tensor {missing[0]} ({len(missing)} of {len(wanted)} missing); is this a checkpoint of "
            "another model or method?"
        )
    return places


def check_shape(pieces, shapes, expected):
    """Raise UserError unless tensors of a file, joined along their rows, have the expected shape."""
    joined = shapes[0] if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])
    if joined != expected or any(shape[1:] != joined[1:] for shape in shapes):
        path, theirs = pieces[0][0], " + ".join(theirs for _, theirs, _ in pieces)
        shape = " + ".join(map(str, shapes))
        raise UserError(
            f"{path}: {theirs} has shape {shape}, expected {expected}; is this a checkpoint of another size or rate?"
        )
