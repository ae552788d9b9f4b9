"""Several processes and micro-batches compute what one process computes; they start alike and end together."""

import functools
import hashlib
import itertools
import json
import math
import re
import signal
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
import finetune
import pretrain
import sample
import util.distributed
from data import Clip, Clips
from tests.common import flags, listing, losses, run, write_video
from tests.processes import Processes, data_main, finish, loss_gaps, posix, stop_at, use_float32


def watch(path, bad, rank):
    """At the start of each step, write the hash of this process's weights, averages and optimizers to `path`-RANK.

    bad: {(rank, step): "batch" or "gradient"}, what is not a number then.
    """
    begun, averages = [], []  # the steps begun so far; the EMA

    def make_ema(*given, real=pretrain.EMA):
        averages.append(real(*given))
        averages[0].params[0].register_hook(lambda g: g * math.nan if bad.get((rank, begun[-1])) == "gradient" else g)
        return averages[0]

    def start_step(optimizers, step, *schedule, real=pretrain.set_learning_rate):
        begun.append(step)
        states = [x for o in optimizers for s in o.state.values() for x in s.values()]
        digest = hashlib.sha256()
        for tensor in [*averages[0].params, *averages[0].shadow, *states]:
            digest.update(tensor.detach().numpy().tobytes())
        with open(f"{path}-{rank}", "a") as f:
            f.write(digest.hexdigest() + "\n")
        real(optimizers, step, *schedule)

    def draw(config, base, encoder, clips, rows, step, real=pretrain.draw_retrieval):
        batch = real(config, base, encoder, clips, rows, step)
        # for training, it is drawn in a thread, where gradients are on
        if torch.is_grad_enabled() and bad.get((rank, step)) == "batch":
            batch.target[0, 0, 0, 0, 0] = math.nan
        return batch

    pretrain.EMA, pretrain.set_learning_rate, pretrain.draw_retrieval = make_ema, start_step, draw


def hashes(path, rank=0):
    return Path(f"{path}-{rank}").read_text().split()


# ---------------------------------------------------------------------------------------------------------------------
# The same results


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("batch, micro_batch", [(8, 8), (9, 2), (13, 1)])
def test_processes_share_every_batch(world, batch, micro_batch):
    clips = Clips([Clip(torch.zeros(16, 4, 8, 8), []) for _ in range(29)])
    steps = 29 // batch  # one epoch
    config, seen = pretrain.PretrainConfig(batch=batch, micro_batch=micro_batch, steps=steps), []

    def draw(some, rows, step):
        assert len(some) == batch and len(rows) <= micro_batch
        seen.extend(id(some[row]) for row in rows)
        return list(rows)

    for rank in range(world):
        processes = SimpleNamespace(device=torch.device("cpu"), rank=rank, world_size=world)
        batches = pretrain.draw_ahead(config, processes, clips, draw, 0)
        for _ in range(steps):
            rows, last = [], False
            while not last:
                more, last = next(batches)
                rows += more
            assert rows == list(range(rank, batch, world))
        assert next(batches, None) is None
    assert len(set(seen)) == len(seen) == steps * batch


@posix
def test_processes_and_accumulation_give_equal_losses(cache):
    for first, _, most in loss_gaps(cache, "adamw", 6, worlds=[2], micro_batches=[1]).values():
        assert first < 1e-6 and most < 1e-5


def test_validation_does_not_depend_on_the_micro_batch(cache, monkeypatch):
    sizes = []

    def validate_batch(config, base, model, draw, clips, rows, device, real=evaluation.validate_batch):
        sizes.append(len(rows))
        return real(config, base, model, draw, clips, rows, device)

    monkeypatch.setattr(evaluation, "validate_batch", validate_batch)
    for micro_batch in 4, 3:
        run(pretrain.main, *flags(cache, out=f"run-{micro_batch}", steps=1, held_out=8, micro_batch=micro_batch))
    assert sizes == [4, 4, 3, 3, 2]
    a, b = (json.loads(Path(f"run-{k}/log.jsonl").read_text()) for k in (4, 3))
    assert a.keys() == b.keys() and "psnr_wrong_memory" in a and "loss_t0.5" in a
    assert all(a[k] == pytest.approx(b[k], abs=0.02) for k in a if k != "minutes")


def test_the_same_seed_gives_the_same_files(cache, tmp_path, monkeypatch):
    write_video("clip.mp4", 10)
    for folder in "a", "b":
        Path(folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        run(finetune.main, *flags(cache, out="run", encoder="none"))
        given = "--history", "../clip.mp4", "--checkpoint", "run/model.safetensors", "--seconds=3", "--steps=2"
        run(sample.main, *given, "--save_file=run/a.mp4")
        monkeypatch.chdir(tmp_path)
    files = [name for name in listing("a/run") if name != "log.jsonl"]
    assert {"model.safetensors", "state.pt", "a.mp4", "a.png", "preview_000003.png"} == set(files)
    assert all(Path("a/run", name).read_bytes() == Path("b/run", name).read_bytes() for name in files)


# ---------------------------------------------------------------------------------------------------------------------
# Start and end


def draw_other_weights(rank, make_model=pretrain.make_model):
    """A processor of another kind may draw other weights from the same seed."""

    def make_other(*given):
        model = make_model(*given)
        for p in model.parameters():
            p.data += rank
        return model

    pretrain.make_model = make_other


def find_no_checkpoint(rank, resume=pretrain.resume):
    """A folder that is not shared has no checkpoint."""
    pretrain.resume = lambda *given: 0 if rank else resume(*given)


@posix
def test_processes_start_alike_or_not_at_all(cache):
    given = flags(cache, steps=2, out="run")
    finish(pretrain.main, *given, world=2, prepare=[draw_other_weights, functools.partial(watch, "steps", {})])
    assert len(hashes("steps")) == 2 and hashes("steps", 0) == hashes("steps", 1)
    processes = Processes(pretrain.main, *given, "--steps", 3, "--resume", world=2, prepare=[find_no_checkpoint])
    assert processes.wait() == [2, 2] and "checkpoints of steps [0, 2]" in processes.output[0], processes.output


def check_ddp_is_freed(rank):
    """Fail if DDP outlives its process group: it would end the group's threads while it holds the GIL, which these may
    wait for. A finished run then hung, rarely."""
    wrapped = []

    def wrap(*given, real=util.distributed.Processes.wrap, **more):
        model = real(*given, **more)
        wrapped.append(weakref.ref(model))
        return model

    def shutdown(self, real=util.distributed.Processes.shutdown):
        assert len(wrapped) == 1 and wrapped[0]() is None, "DDP is still there"
        real(self)

    util.distributed.Processes.wrap, util.distributed.Processes.shutdown = wrap, shutdown


@posix
def test_a_signal_to_one_process_stops_both_and_one_goes_on(cache):
    given = flags(cache, steps=5, optimizer="adamw", lr=1e-3)
    finish(pretrain.main, *given, "--out", "whole", prepare=[use_float32])
    prepare = [use_float32, check_ddp_is_freed, functools.partial(stop_at, 2, signal.SIGINT)]
    stopped = Processes(pretrain.main, *given, "--out", "parts", world=2, prepare=prepare)
    assert stopped.wait() == [130, 130], stopped.output
    assert "go on with --resume" in stopped.output[0] and len(losses("parts")) == 3
    # another number of processes: the same samples
    finish(pretrain.main, *given, "--out", "parts", "--resume", prepare=[use_float32])
    assert losses("parts") == pytest.approx(losses("whole"), abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# What is not finite, what cannot be used: all processes agree


@posix
def test_numbers_that_are_not_finite_change_nothing(cache):
    bad = {(1, 2): "batch", (1, 4): "gradient"}
    prepare = [check_ddp_is_freed, functools.partial(watch, "steps", bad)]
    processes = Processes(pretrain.main, *flags(cache, steps=7, out="run"), world=2, prepare=prepare)
    assert processes.wait() == [0, 0], processes.output
    found = hashes("steps")
    assert found == hashes("steps", 1) and len(found) == 7
    assert [i for i, (a, b) in enumerate(itertools.pairwise(found)) if a == b] == [2, 4]
    log = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "skipped" in entry] == [3, 5]
    assert "step 3: the gradient is not finite" in processes.output[0]


@posix
def test_too_many_of_them_stop_the_run(cache):
    given = flags(cache, steps=30, save_every=2, out="run")
    bad = {(0, step): "batch" for step in range(2, 30)}
    processes = Processes(pretrain.main, *given, prepare=[functools.partial(watch, "steps", bad)])
    assert processes.wait() == [1] and "Traceback" not in processes.output[0]
    assert "error: the gradient was not finite 10 times in a row, up to step 12;" in processes.output[0]
    assert len(set(hashes("steps"))) == 3
    state = torch.load("run/state.pt")
    assert state["step"] == 10 and len(losses("run")) == 12
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    finish(pretrain.main, *given, "--resume", "--steps", 11)


@posix
def test_the_limit_of_bad_videos_is_of_all_processes():
    """Four of twelve are bad, the first two of each process: neither alone has above 20 % of all."""
    for k in range(12):
        path = Path("videos") / f"{k:02d}.mp4"
        write_video(path, 12, k)
        if k < 4:
            path.write_text("not a video")
    processes = Processes(data_main, "cache", "--videos=videos", "--out=cache", "--preset=tiny", world=2)
    assert 2 in processes.wait(), processes.output
    output = "".join(processes.output)
    assert re.search("[34] of 12 videos in videos cannot be used", output)
    assert sum("skipped: " in line for line in output.splitlines()) >= 3
    assert len(list(Path("cache/videos").glob("*.json"))) < 12 and not Path("cache/manifest.json").exists()
