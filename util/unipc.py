"""UniPC of second order, Wan's default solver.

Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models", in the variant
that predicts x_0, with B(h) = 1 - e^-h: equal to diffusers' UniPCMultistepScheduler with flow_prediction.
"""

import math


def unipc(velocity, x, levels):
    """A solver, see sample.euler: integrate dx = v dt from noise x (B, ...) along falling `levels` (S + 1,).

    velocity(x, t) is called once per step, t a float. One or two steps are those of Euler's method.

    A step from t to t' is x' = ratio x + (1 - ratio) m with ratio = t' / t. It is exact if m is the mean of x_0 over
    the step, weighed by e^λ, where λ = log((1 - t) / t); x_0 is interpolated in λ.
    """
    levels = sorted({float(t) for t in levels}, reverse=True)  # a step of no length would do nothing
    logs = [math.log((1 - t + 1e-6) / t) for t in levels[:-1]]  # finite at t = 1: as there, so in diffusers
    start, before, ratio, slope, a, b = x, x, 1, 0, 0, 0  # of the step that led here; at first, one that does nothing
    for i, t in enumerate(levels[:-1]):
        found = x - t * velocity(x, t)  # x_0, predicted here
        # UniC: that step once more, now that x_0 is known at its end
        x = ratio * start + (1 - ratio) * (before + a * slope + b * (found - before))
        slope, a, b = 0, 0, 1 / 2  # first order in the first step, and in the last, in which λ rises to ∞
        if 0 < i < len(logs) - 1:
            h = logs[i + 1] - logs[i]
            r = (logs[i - 1] - logs[i]) / h
            slope = (before - found) / r  # the change of x_0 over h, if it goes on as it came
            # weighed means of u = (λ - λ here) / h and of u²; UniC gets both right: a + b = mean, r a + b = square
            mean = -1 / math.expm1(-h) - 1 / h
            square = -1 / math.expm1(-h) - 2 * mean / h
            a = (mean - square) / (1 - r)
            b = mean - a
        start, before, ratio = x, found, levels[i + 1] / t
        x = ratio * x + (1 - ratio) * (found + slope / 2)  # UniP
    return x
