"""Files: atomic writes, hashes, JSON."""

import errno
import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from util.cli import UserError


def file_hash(path):
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(f)


def _digest(file):
    """hashlib.file_digest for Python 3.10."""
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def _make_part_folder(path):
    """Make the folder of `path`, and in it one for a temporary file. Raises UserError where nothing can be written."""
    folder = path.with_name(f".{path.name}.{os.getpid()}.part")  # its own: safetensors writes temporary files too
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise UserError(f"{path} cannot be written ({error.strerror}): give one in a folder you may write to") from None
    return folder


def check_writable(path):
    """Make the folder of `path`. Raises UserError if the file cannot be written, before hours of work go into it."""
    _make_part_folder(Path(path)).rmdir()


@contextmanager
def atomic_write(path):
    """Write a file so that `path` is always the old file or the complete new one.

    Yields a temporary path beside it, which is flushed and renamed at the end, or removed on an exception. Makes the
    folder. Raises OSError if the disk does not take it, UserError if nothing can be written there.
    """
    path = Path(path)
    folder = _make_part_folder(path)
    temporary = folder / f".{path.name}"
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        temporary.chmod(folder.stat().st_mode & 0o666)  # like any new file; safetensors makes private ones
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        # safetensors has its own exception for a full disk; PyTorch closes its file, which fails once more
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, (OSError, SafetensorError)):
            raise
        raise OSError(
            f"{path} cannot be written ({getattr(cause, 'strerror', None) or cause}); what was there stays as it was"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder):
    """Remove what processes killed inside atomic_write() left in a folder that nobody else is writing to."""
    for part in Path(folder).glob(".*.[0-9]*.part"):
        shutil.rmtree(part, ignore_errors=True)


def parse_json(text, source, advice, *keys):
    """The JSON object in `text`, which must have these keys. Raises UserError naming `source` and what to do."""
    try:
        content = json.loads(text)
        return {**content, **{key: content[key] for key in keys}}
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{source} is damaged: {advice}") from None
