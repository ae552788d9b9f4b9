"""Optimizers, the learning rate, and the average of weights."""
import contextlib
import math

import torch

from devices import product_dtype


def orthogonalize(g, steps=5):
    """Newton-Schulz iteration towards U V^T of g = U S V^T, for a stack of matrices (K, rows, columns)."""
    x = g.to(product_dtype(g.device))
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)                  # -4.7750 a + 2.0315 a a
        x = torch.baddbmm(x, b, x, beta=3.4445)                                 # 3.4445 x + b x
    return (x.mT if tall else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, then an orthogonal update, for weights that are matrices (convolutions: output x everything else). As
    torch.optim.Muon without weight decay, but matrices of one shape share their products, and convolutions are taken
    too."""

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
            for (rows, columns), params in by_shape.items():
                grads = torch.stack([p.grad.flatten(1) for p in params])
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                momenta = torch.stack([self.state[p]["momentum"].flatten(1) for p in params])
                momenta.lerp_(grads, 1 - group["momentum"])
                updates = orthogonalize(grads.lerp_(momenta, group["momentum"]))    # Nesterov
                for p, m, u in zip(params, momenta, updates):
                    self.state[p]["momentum"].copy_(m.view_as(p))
                    p.add_(u.view_as(p), alpha=-group["lr"] * max(1, rows / columns)**0.5)


def make_optimizers(model, config):
    """Muon for matrices and convolutions; AdamW for norms, biases and modulation, at a tenth of the rate, and for what
    embeds the timestep, at a hundredth; or AdamW for everything.

    The timestep's sinusoids reach periods of six levels in a thousand, finer than a short training samples them. Muon
    makes every direction as large as the useful ones: a few noise levels then met a modulation nine times too large.
    """
    params, lr = {name: p for name, p in model.named_parameters() if p.requires_grad}, config.lr
    adamw = lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)

    def groups(names, peak):
        """Parameter groups of these, φ's with --encoder_lr."""
        found = {peak: []}
        for name in names:
            share = config.encoder_lr if name.startswith("encoder.") else 1
            found.setdefault(peak * share, []).append(params[name])
        return [dict(params=those, peak=rate) for rate, those in found.items()]

    if config.optimizer == "adamw":
        return [adamw(groups(params, lr))]
    timestep = [name for name in params if name.startswith("dit.time_")]
    matrices = [name for name, p in params.items() if p.ndim in (2, 5) and name not in timestep]
    others = [name for name, p in params.items() if p.ndim not in (2, 5) and name not in timestep]
    return [Muon(groups(matrices, lr), lr), adamw(groups(others, 0.1 * lr) + groups(timestep, 0.01 * lr))]


def learning_rate(step, config):
    """As a share of the peak: linear warm-up, then cosine to zero."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    return warm * 0.5 * (1 + math.cos(math.pi * max(0, step - config.warmup) / max(1, config.steps - config.warmup)))


class EMA:
    """The running average of the trained weights. `with ema.swapped():` lends them to the model."""

    def __init__(self, model, decay):
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.shadow = [p.detach().clone() for p in self.params]
        self.decay = decay

    def update(self, step):
        decay = min(self.decay, (1 + step) / (10 + step))       # young averages forget faster
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
