"""Reading models of diffusers and transformers from local folders."""

import hashlib
from pathlib import Path

from safetensors import SafetensorError

from util.cli import UserError, first_line
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
