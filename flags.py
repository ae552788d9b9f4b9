"""The command line: flags from a dataclass, commands, warnings, exit codes."""
import argparse
import difflib
import functools
import inspect
import os
import re
import signal
import sys
import traceback
from dataclasses import fields, is_dataclass

import torch
from tqdm import tqdm

from model import UserError, first_line


def field_help(cls):
    """{field: its trailing comment}, so that a flag is described where it is defined."""
    text = "".join(inspect.getsource(c) for c in reversed(cls.__mro__) if is_dataclass(c))
    return dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.*)$", text, re.M))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def parse_flags(cls, description, argv=None, aliases={}):
    """An instance of the dataclass `cls` from the command line: a flag per field, with the field's default and comment.
    Unknown flags are refused, with the nearest name that exists."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    comments = field_help(cls)
    for f in fields(cls):
        names = [f"--{f.name}", *aliases.get(f.name, ())]
        extra = dict(action="store_true") if f.type is bool else dict(type=f.type, metavar=f.type.__name__)
        parser.add_argument(*names, dest=f.name, default=f.default,
                            help=comments.get(f.name, "") + (f" [{f.default}]" if f.default not in (None, "") else ""),
                            **extra)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        if not flag.startswith("-"):
            raise UserError(f"{flag} follows no flag: write --NAME {flag}, see --help (only the folders and files of "
                            "eval.py stand alone, before the flags)")
        near = difflib.get_close_matches(flag, parser._option_string_actions, 3, 0.5)
        raise UserError(f"unknown flag {flag}" + (f"; did you mean {' or '.join(near)}?" if near else "; see --help"))
    if not 0 <= getattr(known, "seed", 0) < 2**63:
        raise UserError(f"--seed {known.seed}: give a whole number of at least 0, below 2^63")
    return cls(**vars(known))


def run_command(script, commands, description):
    """Run the one of {name: function of argv} that the command line names; --help lists them."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(description)
        print("\n".join(f"{script} {k}: {f.__doc__}" for k, f in commands.items()))
        print(f"\nFlags of a command: python {script} COMMAND --help")
        return
    if name not in commands:
        raise UserError(f"{script} {name}: choose one of {', '.join(commands)}")
    commands[name](sys.argv[2:])


@functools.lru_cache
def warn(message):
    """Say it once, above any progress bar."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


def run_main(main):
    """Run a script's main: 0 done, 2 the user's mistake, 1 ours or the machine's, 130 and 143 stopped by a signal.

    A process that torchrun started leaves at once, without the interpreter's clean-up. After an error, because freeing
    what it shares with the others could wait for them; and at the end, because threads of a process group that then
    still free their tensors made finished runs hang or abort, rarely.
    """
    code, worker = 0, "RANK" in os.environ
    try:
        # so that half-written files are removed; training has a handler of its own
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        main()
    except (UserError, OSError) as e:   # of the latter a full disk, a folder that is gone
        print(f"error: {e}", file=sys.stderr)
        code = 2 if isinstance(e, UserError) else 1
    except torch.OutOfMemoryError as e:
        print(f"error: {first_line(e)} Train with a smaller --micro_batch, sample with fewer --memory_seconds, or "
              "close what else runs there", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    except SystemExit as e:
        code = e.code or 0
    except Exception:
        if not worker:
            raise
        traceback.print_exc()
        code = 1
    if worker:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)
