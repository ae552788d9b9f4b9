"""The command line: flags from a dataclass, commands, warnings, exit codes."""

import argparse
import atexit
import contextlib
import difflib
import errno
import functools
import importlib
import inspect
import math
import os
import re
import signal
import sys
import threading
import traceback
from dataclasses import fields, is_dataclass

import torch
from tqdm import tqdm


class UserError(ValueError):
    """A user's mistake: shown as one line (what was given, what is expected, what to do), exit code 2."""

    def __str__(self):  # it may quote what was given
        return re.sub(r"\s*\n\s*", " ", super().__str__())


class Failure(Exception):
    """What went wrong on the way and is nobody's mistake in the command: shown as one line, exit code 1."""


# of an OSError: a path that can never be used, given by the user. (A disk that is full, a folder that is gone: no.)
BAD_PATHS = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.EACCES, errno.EPERM}
AT_END = contextlib.ExitStack()  # closed at the end of a script, however it ends
atexit.register(AT_END.close)


def first_line(error):
    """The first line of an exception's message, or its type if it has none."""
    return str(error).partition("\n")[0] or type(error).__name__


def is_out_of_memory(error):
    """Whether an exception means too little memory, of a GPU or of the host, for which torch raises a RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


@functools.lru_cache
def warn(message):
    """Print a warning once, above any progress bar."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


def load_object(path):
    """The object behind a dotted path such as "bench.table1.table1", imported now."""
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


# ---------------------------------------------------------------------------------------------------------------------
# Flags


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def field_help(cls):
    """{field: its trailing comment}, so that a flag is described where it is defined."""
    text = "".join(inspect.getsource(c) for c in reversed(cls.__mro__) if is_dataclass(c))
    return dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.*)$", text, re.M))


def make_parser(cls, description, aliases):
    """An argparse parser with one flag per field of the dataclass `cls`."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    comments = field_help(cls)
    for f in fields(cls):
        default = f" [{f.default}]" if f.default not in (None, "") else ""
        kind = dict(action="store_true") if f.type is bool else dict(type=f.type, metavar=f.type.__name__)
        if f.type is tuple:  # of numbers
            kind = dict(type=float, nargs=len(f.default), metavar="float")
        names = [f"--{f.name}", *([aliases[f.name]] if f.name in aliases else [])]
        text = (comments.get(f.name, "") + default).replace("%", "%%")  # which argparse would fill in
        parser.add_argument(*names, dest=f.name, default=f.default, help=text, **kind)
    return parser


def parse_flags(cls, description, argv=None, aliases=None):
    """Read the command line into an instance of the dataclass `cls`: one flag per field, with its default and comment.

    aliases: {field: another name of its flag}. Raises UserError for an unknown flag, naming the nearest that exists.
    """
    parser = make_parser(cls, description, aliases or {})
    known, unknown = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        if not flag.startswith("-"):
            raise UserError(
                f"{flag} follows no flag: write --NAME {flag}, see --help (only the folders and files of "
                "eval.py stand alone, before the flags)"
            )
        near = difflib.get_close_matches(flag, parser._option_string_actions, 3, 0.5)
        raise UserError(f"unknown flag {flag}" + (f"; did you mean {' or '.join(near)}?" if near else "; see --help"))
    empty = [f.name for f in fields(cls) if f.default and isinstance(f.default, str) and not getattr(known, f.name)]
    if empty:  # an empty path would mean the current folder
        raise UserError(f"--{empty[0]} is empty: leave it out, for {parser.get_default(empty[0])}, or give a value")
    if not 0 <= getattr(known, "seed", 0) < 2**63:
        raise UserError(f"--seed {known.seed}: give a whole number of at least 0, below 2^63")
    return cls(**vars(known))


def check_numbers(config, flags, least, most=math.inf, above=False):
    """Raise UserError unless these flags, named in one string, are from `least` (above: from more than it) to `most`.

    Flags that the config lacks are left out.
    """
    for flag in flags.split():
        value = getattr(config, flag, None)
        if value is None or math.isfinite(value) and least <= value <= most and not (above and value == least):
            continue
        limit = f"above {least}" if above else f"at least {least}" + f" and at most {most}" * (most < math.inf)
        raise UserError(f"--{flag} {value}: must be {limit}")


def run_command(script, commands, description):
    """Run the command that the command line names.

    commands: {name: function of argv, or its dotted path, which is imported only then}; --help lists them.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(description)
        print(f"Commands: {', '.join(commands)}. Flags of a command: python {script} COMMAND --help")
        return
    if name not in commands:
        raise UserError(f"{script} {name}: choose one of {', '.join(commands)}")
    command = commands[name]
    command = load_object(command) if isinstance(command, str) else command
    sys.argv = [f"{script} {name}", *sys.argv[2:]]  # as --help shows it
    command(sys.argv[1:])


# ---------------------------------------------------------------------------------------------------------------------
# Signals and exit codes


@contextlib.contextmanager
def uninterrupted():
    """Let Ctrl-C and SIGTERM wait for the end of the body, in which a file gets its name."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    came = []
    handlers = {s: signal.signal(s, lambda number, _: came.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
    for number in came[:1]:
        signal.raise_signal(number)


class SafeStream:
    """A text stream whose writes never fail: a terminal that is not UTF-8, a closed pipe, a full disk."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text):
        return self._try("write", text)

    def flush(self):
        return self._try("flush")

    def _try(self, name, *given):
        try:
            return getattr(self.stream, name)(*given)
        except (OSError, ValueError):  # ValueError: it is closed
            return 0

    def __getattr__(self, name):
        return getattr(self.stream, name)


def protect_output():
    """Make sure that printing never ends a run. A process started with a stream closed has None there."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        setattr(sys, name, SafeStream(open(os.devnull, "w") if stream is None else stream))


def run_main(main):
    """Run a script's main and exit: 0 done, 2 a user error, 1 any other error, 130 or 143 stopped by a signal."""
    worker = "RANK" in os.environ
    protect_output()
    code = exit_code(main, worker)
    if worker:
        # A process of torchrun's skips the interpreter's clean-up. After an error, freeing what it shares with the
        # others could wait for them; at the end, threads of a process group that were still freeing their tensors
        # made finished runs hang or abort, rarely.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # all is done but the interpreter's clean-up
    if code:
        sys.exit(code)


def close_bars():
    """Close the progress bars: a message would stand on their line."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def exit_code(main, worker):
    """Run main and turn what it raises into an exit code. worker: print a traceback instead of raising it."""
    try:
        # SIGTERM becomes an exception so that half-written files are removed; training has its own handler
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        with AT_END:
            main()
    except (UserError, Failure, OSError) as e:  # OSError: a full disk, a folder that is gone
        if getattr(e, "errno", None) in BAD_PATHS and e.filename:
            e = UserError(f"{e.filename} cannot be used ({e.strerror}): give another path")
        close_bars()
        print(f"error: {e}", file=sys.stderr)
        return 2 if isinstance(e, UserError) else 1
    except KeyboardInterrupt:
        close_bars()
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130
    except SystemExit as e:
        return e.code or 0
    except Exception as e:
        if is_out_of_memory(e):
            print(
                f"error: {first_line(e)} Train with a smaller --micro_batch, sample with fewer --memory_seconds, or "
                "close what else runs there",
                file=sys.stderr,
            )
            return 1
        if not worker:
            raise
        traceback.print_exc()
        return 1
    return 0
