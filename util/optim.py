"""Optimizers, the learning rate, and the moving average of the weights."""

import contextlib
import math

import torch

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

    torch.optim.Muon takes 2D parameters only, one by one, in bf16; here matrices of one shape share their products.
    """

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        """One update; parameters without a gradient stay as they are."""
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault((len(p), p[0].numel()), []).append(p)
            for params in by_shape.values():
                self.update(params, group["lr"], group["momentum"])

    def update(self, params, lr, momentum):
        """Update parameters of one shape together."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        grads = torch.stack([p.grad.flatten(1) for p in params])
        momenta = torch.stack([self.state[p]["momentum"].flatten(1) for p in params])
        momenta.lerp_(grads, 1 - momentum)
        updates = orthogonalize(grads.lerp_(momenta, momentum))  # Nesterov
        rows, columns = grads.shape[1:]
        for p, m, u in zip(params, momenta, updates):
            self.state[p]["momentum"].copy_(m.view_as(p))
            p.add_(u.view_as(p), alpha=-lr * max(1, rows / columns) ** 0.5)


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
        return torch.optim.AdamW(param_groups, betas=(0.9, 0.99), weight_decay=0.0)

    if optimizer == "adamw":
        return [adamw(groups(params, lr))]
    timestep = [name for name in params if name.startswith("dit.time_")]
    matrices = [name for name, p in params.items() if p.ndim in (2, 5) and name not in timestep]
    others = [name for name, p in params.items() if p.ndim not in (2, 5) and name not in timestep]
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
