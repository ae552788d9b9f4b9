"""Training on several processes, one per GPU, as torchrun starts them.

They compute the gradient of one global batch, so the result is that of a single process up to rounding.
"""

import contextlib
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from util.cli import UserError
from util.device import pick_device


@dataclass
class Processes:
    """This process among all: its rank, their number, its device."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    def barrier(self):
        if self.world_size > 1:
            dist.barrier()

    @contextlib.contextmanager
    def main_first(self):
        """Run the body on rank 0, then on all others."""
        if self.rank:
            dist.barrier()
        yield
        if self.rank == 0:
            self.barrier()

    def sum_loss(self, loss, norm, signals):
        """(the sum of all ranks' losses, the gradient's norm, the signal that stops all after this step, or 0).

        The only place where a training step waits for the GPU.
        """
        reduced = torch.stack([loss, norm, torch.full_like(loss, max(signals, default=0))])
        if self.world_size > 1:
            dist.all_reduce(reduced[:1])
            dist.all_reduce(reduced[1:], dist.ReduceOp.MAX)
        loss, norm, signal = reduced.tolist()
        return loss, norm, int(signal)

    def sum_dicts(self, dicts):
        """Each of these {name: number} summed over all ranks."""
        if self.world_size == 1:
            return dicts
        gathered = [None] * self.world_size
        dist.all_gather_object(gathered, dicts)
        names = dict.fromkeys(name for ranks_dicts in gathered for name in ranks_dicts[0])
        return [
            {name: sum(of_rank[k].get(name, 0) for of_rank in gathered) for name in names} for k in range(len(dicts))
        ]

    def running_sum(self):
        """A function add(n) that returns the sum of all numbers that any rank has given it so far; nobody waits."""
        store = dist.group.WORLD.get_group_store() if self.world_size > 1 else dist.HashStore()
        return lambda n: store.add("count", n)

    def same_start(self, step, tensors):
        """Give all ranks the tensors of rank 0: another kind of processor may draw other ones from the same seed.

        Raises UserError if the ranks found checkpoints of different steps.
        """
        if self.world_size == 1:
            return
        steps = [None] * self.world_size
        dist.all_gather_object(steps, step)
        if len(set(steps)) > 1:
            raise UserError(
                f"--resume: the processes found checkpoints of steps {sorted(set(steps))}: --out must be a folder that "
                "all machines share"
            )
        for x in tensors:
            dist.broadcast(x.detach(), 0)

    def wrap(self, model, find_unused_parameters):
        """The model in DDP if there are several processes. Weights are equal already, see same_start()."""
        if self.world_size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            model,
            ids,
            init_sync=False,
            find_unused_parameters=find_unused_parameters,
            gradient_as_bucket_view=True,
        )

    def accumulate(self, model, last):
        """A context for a forward and backward pass of a wrapped model: only the last of a step exchanges gradients."""
        return contextlib.nullcontext() if self.world_size == 1 or last else model.no_sync()

    def shutdown(self):
        """Wait for all ranks, then leave the group: torchrun stops all once one has failed, and a rank waiting on an
        exited peer fails."""
        if self.world_size > 1:
            dist.barrier()
            dist.destroy_process_group()


def start_processes(device_name, timeout=None, tensors=True):
    """Join the other processes if torchrun started this one -> Processes.

    timeout: how long to wait for the others, by default two hours: rank 0 may fill the cache first. tensors: they will
    exchange some, so GPUs need NCCL.
    """
    device = pick_device(device_name)
    if "RANK" not in os.environ:
        return Processes(device)
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(f"RANK is set but {name} is not: start with torchrun, or unset RANK")
    backend = dict(backend="gloo")
    if device.type == "cuda":
        cards = torch.cuda.device_count()
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % cards)
        torch.cuda.set_device(device)
        # NCCL refuses two processes on one card
        if tensors and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= cards:
            backend = dict(backend="nccl", device_id=device)
    dist.init_process_group(timeout=timeout or timedelta(hours=2), **backend)
    return Processes(device, dist.get_rank(), dist.get_world_size())


def compile_blocks(dit, backend="inductor"):
    """torch.compile the DiT's blocks in place: parameter names stay as they are."""
    # a block is smaller than DDP's buckets: cutting its graph at them would only break up what is fused
    torch._dynamo.config.optimize_ddp = False
    # in Block.forward, the numbers of tokens and of memory tokens change with the history: taken for constants,
    # they would make every block compile twice
    memory = "L['M'],L['memory']:1,L['cached'][0]:2,L['cached'][1]:2"
    torch.compiler.config.dynamic_sources = f"L['x']:1,L['rotations']:1,{memory}"
    for block in dit.blocks:
        block.compile(backend=backend)
