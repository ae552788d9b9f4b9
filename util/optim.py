"""Optimizers, the learning rate, and the moving average of the weights."""

import contextlib
import math

import torch
import torch.distributed as dist

from util.device import compute_dtype


def orthogonalize(g, steps=5):
    """Newton-Schulz iteration towards U V^T of g = U S V^T, for a stack of matrices (K, rows, columns)."""
    x = g.to(compute_dtype(g.device))
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)  # -4.7750 a + 2.0315 a a
        x = torch.baddbmm(x, b, x, beta=3.4445)  # 3.4445 x + b x
    return (x.mT if tall else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, then an orthogonal update, for matrices and convolutions (output x everything else).

    torch.optim.Muon takes 2D parameters only, one by one, in bf16; here matrices of one shape share their products, and
    several processes share the work: each orthogonalizes some of the matrices, then all get all of them. All have the
    same gradients and keep all momenta, so any of them can save the state.
    """

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        """One update; parameters without a gradient stay as they are."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p, update in zip(params, self.updates(params, group["momentum"])):
                p.add_(update.view_as(p), alpha=-group["lr"] * max(1, len(p) / p[0].numel()) ** 0.5)

    def updates(self, params, momentum):
        """The orthogonal updates of these parameters, in their order, the same on every process."""
        if not params:
            return []
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta, grads = [self.state[p]["momentum"] for p in params], [p.grad for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - momentum)
        nesterov = torch._foreach_lerp(grads, momenta, momentum)
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        sizes = [p.numel() for p in params]
        flat = torch.zeros(sum(sizes), device=params[0].device)  # zero where another process fills it in
        updates = flat.split(sizes)
        for members in share_matrices(params, world_size)[rank].values():
            made = orthogonalize(torch.stack([nesterov[i].flatten(1) for i in members]))
            torch._foreach_copy_([updates[i] for i in members], list(made.flatten(1)))
        if world_size > 1:
            dist.all_reduce(flat)
        return updates


def share_matrices(params, world_size):
    """For each process, {(rows, columns): indices of the parameters of this shape that it orthogonalizes}.

    The most expensive come first, each for the process with the least work so far.
    """
    shapes = [(len(p), p[0].numel()) for p in params]
    costs = [rows * columns * min(rows, columns) for rows, columns in shapes]
    work, shares = [0] * world_size, [{} for _ in range(world_size)]
    for i in sorted(range(len(params)), key=lambda i: -costs[i]):
        process = work.index(min(work))
        work[process] += costs[i]
        shares[process].setdefault(shapes[i], []).append(i)
    return shares


def make_optimizers(model, optimizer, lr, encoder_lr=1.0):
    """A list of optimizers for all trained parameters; every group carries its peak learning rate as "peak".

    optimizer: "adamw" for everything, or "muon" for matrices and convolutions, with AdamW for norms, biases and
    modulation at a tenth of the rate, and for the layers that embed the timestep at a hundredth. encoder_lr: φ's rate
    as a share of the others'.

    The timestep's sinusoids have periods down to six levels in a thousand, finer than a short training samples them.
    Muon makes every direction as large as the useful ones: a few noise levels then met a modulation nine times too
    large.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def groups(names, peak):
        by_peak = {peak: []}
        for name in names:
            share = encoder_lr if name.startswith("encoder.") else 1
            by_peak.setdefault(peak * share, []).append(params[name])
        return [dict(params=some, peak=rate) for rate, some in by_peak.items()]

    def adamw(param_groups):
        fused = next(model.parameters()).device.type == "cuda"  # one kernel for many tensors
        return torch.optim.AdamW(param_groups, betas=(0.9, 0.99), weight_decay=0.0, fused=fused)

    if optimizer == "adamw":
        return [adamw(groups(params, lr))]
    timestep = [name for name in params if name.startswith("dit.time_")]
    matrices = [name for name, p in params.items() if p.ndim in (2, 4, 5) and name not in timestep]
    others = [name for name, p in params.items() if p.ndim not in (2, 4, 5) and name not in timestep]
    return [Muon(groups(matrices, lr), lr), adamw(groups(others, 0.1 * lr) + groups(timestep, 0.01 * lr))]


def set_learning_rate(optimizers, step, steps, warmup):
    """Linear warm-up to each group's peak, then cosine to zero."""
    warm = min(1.0, (step + 1) / max(1, warmup))
    share = warm * 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share


class EMA:
    """The exponential moving average of the trained weights. `with ema.swapped():` puts it into the model.

    swa_utils.AveragedModel would copy a frozen base of gigabytes too.
    """

    def __init__(self, model, decay):
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.shadow = [p.detach().clone() for p in self.params]
        self.decay = decay

    def update(self, step):
        decay = min(self.decay, (1 + step) / (10 + step))  # a young average forgets faster
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.params], 1 - decay)

    @contextlib.contextmanager
    def swapped(self):
        def swap():
            for p, s in zip(self.params, self.shadow):
                p.data, s.data = s.data, p.data

        swap()
        try:
            yield
        finally:
            swap()
