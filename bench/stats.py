"""Intervals, tests of paired differences and rank correlations for the tables."""

import math

import numpy as np
import torch

Z = 1.959964  # the 97.5 % quantile of the normal distribution


def per_clip(values):
    """(n, F) -> one value per clip, (n,), whose mean is that of all values that count (nan does not).

    Their spread is that of this mean over clips, each of which brings all of its values (the usual linear form of a
    ratio). If all values count, these are the means of the clips.
    """
    counts = ~values.isnan()
    mean = values.nanmean()
    return mean + torch.where(counts, values - mean, 0).sum(1) * len(values) / counts.sum()


def interval(values):
    """Mean of a 1-D tensor and the half-width of its 95 % interval by Student's t (nan for a single value)."""
    values, n = values.double(), len(values) - 1
    if n < 1:
        return values.mean().item(), math.nan
    # the 97.5 % quantile of t with n degrees of freedom from the normal one (Abramowitz and Stegun 26.7.5): within
    # 3.1 % for n = 2, within 0.3 % from n = 4 on
    first = (Z**3 + Z) / (4 * n)
    second = (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * n**2)
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / (384 * n**3)
    t = Z + first + second + third
    return values.mean().item(), (t * values.std() / (n + 1) ** 0.5).item()


def wilson(right, n):
    """95 % interval (low, high) of a share when `right` of n were right (Wilson 1927)."""
    z2 = Z**2
    centre = (right + z2 / 2) / (n + z2)
    half = (z2 * (right * (n - right) / n + z2 / 4)) ** 0.5 / (n + z2)
    return centre - half, centre + half


def bootstrap(difference, resamples=10_000):
    """(mean, low, high): the mean of paired differences (n,), one per clip, and its 95 % interval over resampled
    clips."""
    if len(difference) < 2:
        return difference.mean().item(), math.nan, math.nan
    picks = torch.randint(len(difference), (resamples, len(difference)), generator=torch.Generator().manual_seed(0))
    means = difference.double()[picks].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return difference.mean().item(), low, high


def flip_test(difference, flips=10_000):
    """Two-sided p-value of paired differences (n,), one per clip.

    It is how often random signs bring their sum as far from zero as it is, so it also holds for few clips, and for
    scores that rarely differ.
    """
    difference = difference.double()
    signs = torch.randint(2, (flips, len(difference)), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    as_far = (signs @ difference).abs() >= difference.sum().abs() - 1e-9
    return (as_far.sum().item() + 1) / (flips + 1)


def ranks(x):
    """Ranks from 1; equal values share their mean rank."""
    x = np.asarray(x)
    return (x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) + 1) / 2


def rank_correlation(x, y, orders=10_000):
    """(Spearman's rank correlation, the share of random orders that reach it); nan for fewer than 3 values, or if all
    are equal."""
    a, b = ((r - r.mean()) / (r.std() or math.nan) for r in (ranks(x), ranks(y)))
    rho, rng = (a * b).mean(), np.random.default_rng(0)
    if len(a) < 3 or math.isnan(rho):
        return math.nan, math.nan
    return rho, np.mean([(a * rng.permutation(b)).mean() >= rho - 1e-9 for _ in range(orders)])
