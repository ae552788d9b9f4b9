"""Training by several processes, one a GPU, as torchrun starts them: join, agree, and leave together.

They compute the gradient of one global batch, so that the result is that of a single process up to rounding.
"""
import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from devices import pick_device
from encoder import BLOCK_METHODS
from model import UserError


def start_processes(name, wait=timedelta(hours=2), tensors=True):
    """Join the other processes if torchrun started this one. Returns (rank, world size, device).

    name: of a device. wait: how long to, for the others at most; by default for the first one, which may fill the
    cache. tensors: they will exchange some, so that GPUs need NCCL.
    """
    device = pick_device(name)
    if "RANK" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    nccl = dict(backend="nccl", device_id=device) if device.type == "cuda" and tensors else dict(backend="gloo")
    dist.init_process_group(timeout=wait, **nccl)
    return dist.get_rank(), dist.get_world_size(), device


def shared_count(world_size):
    """A function that takes a number and gives the sum of all that any process has given it, at once: none waits."""
    store = dist.group.WORLD.get_group_store() if world_size > 1 else dist.HashStore()
    return lambda n: store.add("count", n)


@contextmanager
def first_before_others(rank, world_size):
    """What is inside is done by the first process, then by all others."""
    if rank:
        dist.barrier()
    yield
    if world_size > 1 and rank == 0:
        dist.barrier()


def same_start(first, ema, world_size):
    """Let all processes go on from the same step with the weights of the first one: other kinds of processors may draw
    other ones from a seed. Raises UserError where they found different checkpoints."""
    if world_size == 1:
        return
    found = [None] * world_size
    dist.all_gather_object(found, first)
    if len(set(found)) > 1:
        raise UserError(f"--resume: the processes found checkpoints of steps {sorted(set(found))}: "
                        "--out must be a folder that all machines share")
    for x in (*ema.params, *ema.shadow):
        dist.broadcast(x.detach(), 0)


def wrap(config, model, tools):
    """The model as it is called: its blocks compiled if asked for, and DDP around it with several processes."""
    if config.compile:
        # a block is smaller than DDP's buckets: cutting its graph at them would only break up what is fused
        torch._dynamo.config.optimize_ddp = False
        for block in model.dit.blocks:
            block.compile()                                         # in place: parameter names stay as they are
    if tools.world_size == 1:
        return model
    # without uncompressed frames in a batch φ's patch embedding is not used; and what is trained is the same everywhere
    # already (see same_start): no need to send a frozen base around
    ids = [tools.device.index] if tools.device.type == "cuda" else None
    return DistributedDataParallel(model, ids, init_sync=False,
                                   find_unused_parameters=config.method in BLOCK_METHODS, gradient_as_bucket_view=True)


def share(loss, signals, world_size):
    """(the sum of all processes' losses, the signal that stops all of them after the same step, or 0)."""
    shared = torch.stack([loss, torch.full_like(loss, max(signals, default=0))])
    if world_size > 1:
        dist.all_reduce(shared[:1])
        dist.all_reduce(shared[1:], dist.ReduceOp.MAX)
    return shared[0].item(), int(shared[1])


def leave(world_size):
    """End together: torchrun stops all once one has failed, and one that waits for a peer that is gone fails."""
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()
