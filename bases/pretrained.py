"""Reading models of diffusers and transformers from local folders."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError

from util.cli import UserError, first_line, warn
from util.files import file_hash


def subfolder(folder, name, flag):
    """The part `name` of a downloaded diffusers pipeline, or `folder` itself if it is that part."""
    for path in (Path(folder) / name, Path(folder)):
        if (path / "config.json").is_file():
            return path
    raise UserError(
        f"{flag} {folder}: no config.json there or in its {name}; give the folder of a model in the diffusers layout, "
        "such as Wan2.1-T2V-1.3B-Diffusers, or its part"
    )


def fingerprint(folder):
    """SHA-256 over the files of a folder: what a cache was made with."""
    files = sorted(p for p in Path(folder).iterdir() if p.is_file())
    return hashlib.sha256(repr([(p.name, file_hash(p)) for p in files]).encode()).hexdigest()


def from_pretrained(cls, folder, flag, dtype):
    """A model of diffusers or transformers with all of its weights, from a local folder.

    Raises UserError for missing weights, where the libraries only warn.
    """
    try:
        model, found = cls.from_pretrained(folder, torch_dtype=dtype, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise UserError(f"{flag} cannot be read ({first_line(e)}): download it again") from None
    if found["missing_keys"]:
        lost = sorted(found["missing_keys"])[0]
        # some versions of transformers do not tie umT5's embeddings
        advice = "update transformers" if "embed_tokens" in lost else "download it again"
        raise UserError(f"{flag} lacks {lost}: {advice}")
    return model


def import_transformers(what):
    """The package transformers, which `what` needs. Raises UserError without it."""
    try:
        import transformers
    except ImportError:
        raise UserError(f"{what} needs the package transformers: pip install transformers") from None
    return transformers


def open_tokenizer(path, flag):
    """A tokenizer of transformers. Raises UserError."""
    try:
        return import_transformers(flag).AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, RuntimeError) as e:
        raise UserError(f"{flag}: its tokenizer cannot be read ({first_line(e)}): download it again") from None


def run_text_model(model, tokens, device, name):
    """(what a model of transformers makes of token ids (1, n), the device it ran on: the CPU if `device` has too little
    memory)."""
    try:
        return model.to(device)(tokens.to(device)), device
    except torch.OutOfMemoryError:
        warn(f"{name} does not fit the memory of {device} and runs on the CPU, which is slow")
    return model.to("cpu")(tokens), "cpu"  # not inside `except`: the error holds on to what did not fit
