"""What any training needs and no reader asks for: command line, checkpoints, processes, optimizers, video files.

Scripts import it before torch, which takes seconds in which Ctrl-C would print a traceback.
"""

import os
import signal
import sys

SCRIPT = os.path.realpath(getattr(sys.modules["__main__"], "__file__", None) or "")


def stop(number, frame):
    """What Ctrl-C does until util.cli.run_main() runs."""
    print("stopped by Ctrl-C", file=sys.stderr)
    os._exit(130)


if os.path.dirname(SCRIPT) == os.path.dirname(
    os.path.dirname(os.path.realpath(__file__))
):  # one of ours, which did nothing yet
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)
