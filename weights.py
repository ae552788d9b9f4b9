"""Weights from safetensors files: checkpoints of this project, and Wan 2.1's in the official or diffusers naming.
Strict (whatever does not fit is named), safe (no code in a file can run), and never a second copy in memory.
"""
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from devices import product_dtype
from model import UserError

DIFFUSERS_NAMES = [     # (diffusers, Wan); norm1 and the other one of norm2 and norm3 have no parameters
    (".norm2.", ".norm3."), (".attn1.", ".self_attn."), (".attn2.", ".cross_attn."),
    (".to_q.", ".q."), (".to_k.", ".k."), (".to_v.", ".v."), (".to_out.0.", ".o."),
    (".ffn.net.0.proj.", ".ffn.0."), (".ffn.net.2.", ".ffn.2."), (".scale_shift_table", ".modulation"),
    ("condition_embedder.time_embedder.linear_1.", "time_embedding.0."),
    ("condition_embedder.time_embedder.linear_2.", "time_embedding.2."),
    ("condition_embedder.text_embedder.linear_1.", "text_embedding.0."),
    ("condition_embedder.text_embedder.linear_2.", "text_embedding.2."),
    ("condition_embedder.time_proj.", "time_projection.1."), ("proj_out.", "head.head."),
]


def wan_name(name):
    """The official name of a DiT parameter that may be named as diffusers or a training wrapper names it."""
    name = name.removeprefix("model.").removeprefix("diffusion_model.").removeprefix("dit.")
    if name == "scale_shift_table":
        return "head.modulation"
    for theirs, ours in DIFFUSERS_NAMES:
        name = name.replace(theirs, ours)
    return name


def parse_json(text, source, advice, *keys):
    """The JSON object that `text`, found in `source`, holds, with at least these keys. Raises UserError."""
    try:
        content = json.loads(text)
        return {**content, **{key: content[key] for key in keys}}
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{source} is damaged: {advice}") from None


def weight_files(path):
    """The safetensors files of a checkpoint: a file, or a folder with one file or with shards and an index."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"no weights at {path}: give a .safetensors file or a folder that holds one")
    for index in sorted(path.glob("*.safetensors.index.json")):
        names = parse_json(index.read_bytes(), index, "download it again", "weight_map")["weight_map"]
        if not isinstance(names, dict) or not names or not all(isinstance(f, str) for f in names.values()):
            raise UserError(f"{index} names no files: download it again")
        files = sorted({path / f for f in names.values()})
        missing = [f.name for f in files if not f.is_file()]
        if missing:
            raise UserError(f"{index} lists {', '.join(missing)}, not found in {path}: download the missing file")
        return files
    if (path / "model.safetensors").is_file():                       # a run; its LoRA and measurements may lie beside
        return [path / "model.safetensors"]
    files = sorted(path.glob("*.safetensors"))
    if not files and (path / "transformer").is_dir():                # a whole pipeline of diffusers
        return weight_files(path / "transformer")
    if len(files) != 1:
        raise UserError(f"{path} holds {len(files)} .safetensors files and no index: name the one to load")
    return files


def open_safetensors(path):
    """Open a safetensors file for reading. Anything else (a pickle, a file cut short) is refused; no code can run."""
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder: name the file, for example {path}/model.safetensors")
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"no file {path}: expected safetensors weights; train them first, or name another") from None
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{path} is not a readable safetensors file ({e}): download or train it again") from None


def own_config(path):
    """The JSON config that a checkpoint of this project carries in its header; None of any other."""
    with open_safetensors(path) as f:
        text = (f.metadata() or {}).get("config")
    return text and parse_json(text, f"the config in the header of {path}", "train it again, or name another", "stage",
                               "preset")


def read_metadata(path):
    """own_config(), where it must be there."""
    config = own_config(path)
    if config is None:
        raise UserError(f"{path} was not written by pretrain.py or finetune.py (no config in it): "
                        "give a model.safetensors of theirs")
    return config


def load_weights(module, files, rename=lambda name: name, names=None, device="cpu",
                 dtype=lambda name, tensor: tensor.dtype):
    """Read the tensors of `module` (of `names`, if given) from safetensors files, strictly: a missing, extra,
    wrong-shaped or non-finite one is named. Nothing is changed unless everything fits.

    rename(name in file) gives the name here, or None to skip it. Each tensor goes straight to `device` and to
    dtype(name, tensor here), so that a module built on the meta device never takes more memory than it does in the end.
    """
    wanted = {name: tensor for name, tensor in module.state_dict().items() if names is None or name in names}
    places = {}                                                     # name here -> (file, name there)
    for path in files:
        with open_safetensors(path) as f:
            for name in f.keys():
                ours = rename(name)
                if ours is None:
                    continue
                if ours not in wanted:
                    raise UserError(f"{path}: unexpected tensor {name}; "
                                    "is this a checkpoint of another model or method?")
                if ours in places:
                    raise UserError(f"{path}: {name} and {places[ours][1]} are the same tensor, {ours}: give a "
                                    "checkpoint that holds it once")
                shape = tuple(f.get_slice(name).get_shape())
                if shape != tuple(wanted[ours].shape):
                    raise UserError(f"{path}: {name} has shape {shape}, expected {tuple(wanted[ours].shape)}; "
                                    "is this a checkpoint of another size or rate?")
                places[ours] = path, name
    missing = [name for name in wanted if name not in places]
    if missing:
        raise UserError(f"{files[0]}: no tensor {missing[0]} ({len(missing)} of {len(wanted)} missing); "
                        "is this a checkpoint of another model or method?")
    found = {}
    for ours, (path, name) in places.items():
        with open_safetensors(path) as f:       # opened for each: a mapped file stays in memory until it is closed
            tensor = f.get_tensor(name)
            if not torch.stack(tensor.aminmax()).isfinite().all():              # no copy of the tensor's size
                raise UserError(f"{path}: {name} holds values that are not finite; the file is damaged, use another")
            found[ours] = tensor.to(device, dtype(ours, wanted[ours]), copy=True)
    module.load_state_dict(found, strict=names is None, assign=True)


def frozen_dtype(device):
    """dtype(name, tensor) for a DiT that is not trained: the matrices of its blocks, 98 % of it, are kept in what
    products are computed in; the rest stays float32, as in Wan's own mixed precision."""
    return lambda name, tensor: (product_dtype(device) if name.startswith("blocks.") and tensor.ndim == 2
                                 else torch.float32)


def load_base(dit, path, device="cpu", frozen=False):
    """The base DiT's weights: official or diffusers naming, one file or shards, or a checkpoint of this project. Held
    in float32, or if frozen as frozen_dtype says."""
    held = frozen_dtype(device) if frozen else lambda name, tensor: torch.float32
    files = weight_files(path)
    own = own_config(files[0]) is not None                          # of a checkpoint of ours take the DiT alone
    rename = lambda name: None if own and name.startswith("encoder.") else wan_name(name)
    load_weights(dit, files, rename, device=device, dtype=held)
