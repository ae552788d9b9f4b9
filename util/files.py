"""Files: atomic writes, hashes, JSON."""

import errno
import hashlib
import json
import os
import shutil
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from safetensors import SafetensorError

from util.cli import AT_END, UserError


class NotWritable(UserError):
    """Where something was to be written, nothing can be: no fault of what was to be written there."""


def file_hash(path):
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def read_text(path, newline=None):
    """The text of a user's file in UTF-8. Raises OSError, UnicodeDecodeError."""
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would wait for ever
        raise OSError(0, "it is no file")
    with open(path, encoding="utf-8-sig", newline=newline) as f:
        return f.read()


def shipped(path):
    """The path of a file that comes with the project, found from any working directory."""
    beside = Path(__file__).resolve().parent.parent / path
    return str(beside) if not Path(path).exists() and beside.exists() else path


# ---------------------------------------------------------------------------------------------------------------------
# Writing: never over an input, never over a file that was not written here

LOCK = ".written.lock"  # in a folder: there while a process writes to it
RECORD = ".written.json"  # in each folder: {name: [bytes, time of the last change]} of the files written there


def _fingerprint(path):
    """What tells whether a file was changed: [bytes, time of the last change in ns]."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _read_record(folder):
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return record if isinstance(record, dict) else {}
    except (OSError, ValueError):
        return {}


def _record(path):
    """Remember that this program wrote `path`. A record that cannot be kept costs a refusal later, nothing else."""
    record = {name: known for name, known in _read_record(path.parent).items() if (path.parent / name).exists()}
    try:
        (path.parent / RECORD).write_text(json.dumps(record | {path.name: _fingerprint(path)}), encoding="utf-8")
    except OSError:
        pass


def check_output(path, inputs=()):
    """Make sure that `path` can be written, before hours of work go into it; makes its folder.

    Raises UserError if it is one of the `inputs`, if a file is there that this program did not write or that was
    changed since, or if nothing can be written there.
    """
    path = Path(path)
    for given in inputs:
        if given and same_path(path, given):
            raise UserError(f"{path} would be written over, but it is an input: give another name")
    refuse_foreign(path)
    check_writable(path)


def check_writable(path):
    """Make the folder of `path`. Raises UserError if nothing can be written there."""
    _make_part_folder(Path(path)).rmdir()


def same_path(a, b):
    """Whether two paths lead to the same place. (Path.resolve would raise on a loop of links.)"""
    try:
        return os.path.realpath(a) == os.path.realpath(b)
    except OSError:  # too long for a path: a prompt, say
        return False


def unused(path, word):
    """`path` if nothing is there, else the same with a name that is free: NAME_word, NAME_word2, ..."""
    spare, n = Path(path), 1
    while os.path.lexists(spare):
        spare = Path(path).with_stem(f"{Path(path).stem}_{word}{n if n > 1 else ''}")
        n += 1
    return spare


def check_outputs(stem, endings, inputs=()):
    """check_output() of the files STEM + ending."""
    for ending in endings:
        check_output(f"{stem}{ending}", inputs)


def refuse_foreign(path):
    """Raise UserError if a file is there that this program did not write, or that was changed since."""
    foreign = not path.is_file() or _read_record(path.parent).get(path.name) != _fingerprint(path)
    if os.path.lexists(path) and not path.is_dir() and foreign:  # a pipe or a dangling link is foreign too
        raise UserError(
            f"{path} exists and was not written by this program, or was changed since: give another name, or "
            "move it away"
        )


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
        in_the_way = [p for p in path.parents if os.path.lexists(p) and not p.is_dir()]
        reason = f"{in_the_way[0]} is no folder" if in_the_way else error.strerror
        message = f"{path} cannot be written ({reason}): give one in a folder you may write to"
        raise NotWritable(message) from None
    return folder


@contextmanager
def atomic_write(path, replace=False, final=None):
    """Write a file so that `path` is always the old file or the complete new one.

    Yields a temporary path beside it, which is flushed and renamed at the end, or removed on an exception. Makes the
    folder. replace: whatever is there may go; else see refuse_foreign(), and two processes cannot write it at once.
    final: called at the end, gives another path in the same folder. Raises OSError if the disk does not take it,
    UserError if nothing may or can be written there.
    """
    path = Path(path)
    if not replace:
        refuse_foreign(path)
    folder = _make_part_folder(path)
    temporary = folder / f".{path.name}"
    try:
        with nullcontext() if replace else locked(path.with_name(f".{path.name}.lock"), path):
            yield temporary
            with open(temporary, "rb+") as f:
                os.fsync(f.fileno())
            temporary.chmod(folder.stat().st_mode & 0o666)  # like any new file; safetensors makes private ones
            path = final() if final else path
            os.replace(temporary, path)
            if not replace:
                _record(path)
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


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def parse_json(text, source, advice, **types):
    """The JSON object in `text` (str or bytes), whose keys have these types: parse_json(..., step=int, loss=float).

    Raises UserError naming `source` and what to do for anything else: also for bytes that are not UTF-8, nesting too
    deep and numbers too long for Python.
    """
    try:
        content = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        content = None
    if not isinstance(content, dict) or not all(is_a(content.get(key), kind) for key, kind in types.items()):
        raise UserError(f"{source} is damaged: {advice}")
    return content


def is_a(value, kind):
    """isinstance() as JSON means it: True is no number, and a whole number is a float too."""
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind if kind in (int, bool) else isinstance(value, kind)


def inside(folder, name):
    """folder / name, for a name read from a file. Raises UserError if it leads outside the folder."""
    path = Path(folder) / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise UserError(f"{name} leads out of {folder}: nothing is read from there")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Locks: of a run's folder until the script ends, of a file while it is written

_held = set()  # the folders that this process has locked


@contextmanager
def locked(path, what):
    """Hold the lock file `path` in the body, at most as long as this process lives; then the file goes.

    Raises UserError, which calls it `what`, if another process holds it. Where a file system has no locks, all pass.
    """
    check_writable(path)
    path = os.path.abspath(path)
    if os.path.lexists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is no file, so it cannot be a lock: move it away")
    file = open(path, "a")
    try:
        _lock(file)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            file.close()
            raise UserError(f"{what} is being written by another run: wait for it, or give another name") from None
    try:
        yield
    finally:
        with suppress(OSError):  # on Windows an open file stays
            os.unlink(path)
        file.close()


def _lock(file):
    """Raises OSError if another process holds the lock."""
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        return
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if not os.path.exists(file.name) or not os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
        raise BlockingIOError(errno.EAGAIN, "its holder has just removed it")


def lock_folder(folder):
    """Lock a folder until the script ends. Raises UserError if another process holds the lock."""
    key, new = os.path.realpath(folder), not os.path.lexists(folder)
    if key in _held:
        return
    if new:
        AT_END.callback(_remove_empty, key)
    AT_END.enter_context(locked(Path(folder) / LOCK, f"--out {folder}"))
    _held.add(key)
    AT_END.callback(_held.discard, key)


def _remove_empty(folder):
    with suppress(OSError):
        os.rmdir(folder)
