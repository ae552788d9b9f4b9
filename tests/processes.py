"""Processes that tests kill, stop and starve, and comparisons of what they leave behind.

They are forked by a server that has imported everything and done nothing (multiprocessing's forkserver): a process
starts in milliseconds and inherits no thread and no lock of the tests. What runs in it is pickled by name, so functions
are defined at the top level of a module; functools.partial gives them arguments.
"""

import faulthandler
import functools
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from tqdm import tqdm

import pretrain
import util.checkpoint
from tests.common import ROOT, flags, listing, losses, run, script

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks and kills processes")
# what a training imports, also what it imports late
PRELOADED = "tests.processes", "sample", "data", "finetune", "torch._dynamo", "einops._torch_specific"
PRELOADED += ("PIL.ImageDraw", "PIL.ImageFont", "PIL.PngImagePlugin", "multiprocessing.synchronize")


@functools.cache
def fork_server():
    """The context that starts processes. Its server has a single thread, and finds the modules of the project."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with pytest.MonkeyPatch.context() as m:
        m.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        for name in ("OPENBLAS", "OMP", "MKL"):
            m.setenv(f"{name}_NUM_THREADS", "1")
        process = context.Process(target=int)  # the first one starts the server
        process.start()
        process.join()
    return context


def work(main, argv, prepare, rank, world, port, output):
    """What runs in each process."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.stdout = sys.stderr = output.open("w", buffering=1)
    faulthandler.dump_traceback_later(100, file=sys.stderr)  # wait() kills after 120 s: say where it stood
    if world > 1:
        group = dict(RANK=rank, WORLD_SIZE=world, LOCAL_RANK=rank, MASTER_PORT=port, MASTER_ADDR="127.0.0.1")
        os.environ.update({name: str(value) for name, value in group.items()})
    tqdm.set_lock(threading.RLock())  # its own is shared by forks: a killed one may hold it for ever
    for change in prepare:
        change(rank)
    run(main, *argv)


class Processes:
    """A script's main in `world` processes, one of them killed by kill(), all joined by wait().

    prepare: functions of the rank that run in each process before main. What they print is in `output`.
    """

    def __init__(self, main, *argv, world=1, prepare=()):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.files = [Path(f"output-{port}-{rank}") for rank in range(world)]
        argv, context = [str(x) for x in argv], fork_server()
        self.processes = [
            context.Process(target=work, args=(main, argv, prepare, rank, world, port, file))
            for rank, file in enumerate(self.files)
        ]
        for process in self.processes:
            process.start()

    def kill(self, rank):
        self.processes[rank].kill()

    def wait(self):
        """The exit codes."""
        for process in self.processes:
            process.join(120)
            process.kill()
            process.join()
        return [process.exitcode for process in self.processes]

    @property
    def output(self):
        return [file.read_text() if file.exists() else "" for file in self.files]


def finish(main, *argv, **more):
    """Run processes that must end well."""
    processes = Processes(main, *argv, **more)
    assert set(processes.wait()) == {0}, "\n".join(processes.output)


def data_main():
    """The main of data.py."""
    script("data")()


# ---------------------------------------------------------------------------------------------------------------------
# What may happen to a process: functions for `prepare`


def use_float32(rank):
    """Processes then differ by the order of sums alone."""
    pretrain.autocast = lambda device: torch.autocast("cpu", enabled=False)


def stop_at(step, number, rank):
    """The first process sends itself a signal in this step."""

    def start_step(optimizers, this, *schedule, real=pretrain.set_learning_rate):
        if rank == 0 and this == step:
            os.kill(os.getpid(), number)
        real(optimizers, this, *schedule)

    pretrain.set_learning_rate = start_step


def slow_saves(rank):
    """Make every save take about 0.2 s: files grow piece by piece, and their renaming waits."""

    def write(f, content):
        for i in range(0, len(content), len(content) // 8 + 1):
            f.write(content[i : i + len(content) // 8 + 1])
            f.flush()
            time.sleep(0.01)

    def save_slowly(state, f, real=torch.save):
        buffer = io.BytesIO()
        real(state, buffer)
        write(f, buffer.getvalue())

    def save_file_slowly(tensors, path, metadata=None):
        with open(path, "wb") as f:
            write(f, safetensors.torch.save(tensors, metadata))

    def replace_slowly(a, b, real=os.replace):
        time.sleep(0.01)
        real(a, b)

    torch.save, util.checkpoint.save_file, os.replace = save_slowly, save_file_slowly, replace_slowly


# ---------------------------------------------------------------------------------------------------------------------
# Comparisons


def same(a, b):
    """Equal to the last bit?"""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def read_run(folder):
    """(state, weights, log without times, names of files) of a run."""
    state = torch.load(folder / "state.pt")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    log = [{k: v for k, v in entry.items() if k != "minutes"} for entry in log]
    return state, load_file(folder / "model.safetensors"), log, listing(folder)


def assert_same_run(a, b):
    """Two run folders hold the same steps, pictures and weights, apart from their times, and nothing else."""
    (state, *first), (other, *second) = read_run(a), read_run(b)
    for part in "step", "model", "ema", "optimizers":
        assert same(state[part], other[part]), part
    assert same(first[0], second[0])
    assert first[1:] == second[1:]


def crash(stage, more, cache, times, in_saves, world=1, seed=0, steps=12):
    """Kill a run `times` times, each at another random moment of a run from the start, `in_saves` of them inside a
    save; each is resumed and must end as the run `whole` that nothing happened to.

    Returns (how many were killed in a save, how many had a checkpoint to resume from).
    """
    rng, out = random.Random(seed), Path("killed")
    given = flags(cache, steps=steps, save_every=3, **more)
    fork_server()  # its own start is no part of a run's duration
    started = time.time()
    finish(stage.main, *given, "--out", "whole", world=world)
    duration, done, killed_in_save, resumed = time.time() - started, 0, 0, 0
    while done < times:
        shutil.rmtree(out, ignore_errors=True)
        slow = done < in_saves
        prepare = [slow_saves] if slow else []
        processes = Processes(stage.main, *given, "--out", out, world=world, prepare=prepare)
        if slow:  # the k-th time that a file is begun
            for _ in range(rng.randint(1, 2 * steps // 3 - 1)):
                while not list(out.glob(".[ms]*.part/.*")) and processes.processes[0].is_alive():
                    time.sleep(0.001)
                time.sleep(rng.uniform(0, 0.12))
        else:
            time.sleep(rng.uniform(0, duration))
        processes.kill(rng.randrange(world))  # the others fail, for they have lost a peer
        if -signal.SIGKILL not in processes.wait():
            continue  # it was done already
        done += 1
        killed_in_save += any(out.glob(".[ms]*.part"))
        resumed += (out / "state.pt").exists()
        finish(stage.main, *given, "--out", out, "--resume", world=world)
        (out / "model-step3.safetensors").unlink(missing_ok=True)  # killed in the first save: kept, it may be work
        assert_same_run(Path("whole"), out)
    return killed_in_save, resumed


def loss_gaps(cache, optimizer, steps, worlds, micro_batches=()):
    """{setting: largest difference of the losses at the first step, at the last, anywhere} from one process."""
    lr = 0.02 if optimizer == "muon" else 1e-3
    given = flags(cache, steps=steps, save_every=steps, optimizer=optimizer, lr=lr)
    finish(pretrain.main, *given, "--out", "1", prepare=[use_float32])
    settings = [(f"{n} processes", (), n) for n in worlds]
    settings += [(f"micro-batch {n}", ("--micro_batch", n), 1) for n in micro_batches]
    found = {}
    for name, more, world in settings:
        finish(pretrain.main, *given, "--out", name, *more, world=world, prepare=[use_float32])
        gap = np.abs(np.subtract(losses("1"), losses(name)))
        found[name] = gap[0], gap[-1], gap.max()
    return found
