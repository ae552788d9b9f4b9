"""Intervals, tests and rank correlations: known values, and how often they are right."""

import math

import numpy as np
import pytest
import torch

from bench.report import compare
from bench.runs import Row
from bench.stats import bootstrap, flip_test, interval, per_clip, rank_correlation, ranks, wilson
from tests.common import randn


def test_values_that_are_nan_do_not_count():
    values = torch.tensor([[100.0, math.nan, 0], [math.nan] * 3, [100, 100, 100]])
    each = per_clip(values)
    assert each.shape == (3,) and each.mean().item() == pytest.approx(80)
    assert each[1].item() == pytest.approx(80)  # a clip that shows nothing is as good as the mean
    assert torch.allclose(per_clip(values[::2, ::2]), torch.tensor([50.0, 100]))


def test_interval_known_values():
    mean, half = interval(torch.tensor([1.0, 2, 3, 4]))
    assert mean == 2.5 and half == pytest.approx(3.1824 * (5 / 3) ** 0.5 / 2, rel=0.01)  # 97.5 % of Student's t
    for n, t in (3, 4.3027), (6, 2.5706), (11, 2.2281), (64, 1.9983), (256, 1.9693):
        values = randn(n)
        expected = t * values.std().item() / n**0.5
        assert interval(values)[1] == pytest.approx(expected, rel=0.035 if n < 5 else 0.003)
    assert math.isnan(interval(torch.ones(1))[1])


def test_wilson_interval_known_values():
    assert wilson(19, 20) == pytest.approx((0.7639, 0.9911), abs=1e-4)
    assert wilson(32, 32) == pytest.approx((0.8928, 1), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)


def test_bootstrap_is_paired_and_covers_the_mean():
    clip, noise = 5 * randn(256), 0.5 * randn(256, seed=1)  # clips differ far more than methods do
    mean, low, high = bootstrap(clip + 0.2 + noise - clip)
    half = 1.96 * noise.std().item() / 16
    assert mean == pytest.approx(0.2 + noise.mean().item(), abs=1e-5)
    assert high - mean == pytest.approx(half, rel=0.1) and mean - low == pytest.approx(half, rel=0.1)
    assert bootstrap(noise) == bootstrap(noise)
    assert bootstrap(torch.full((5,), 2.0)) == (2, 2, 2)
    assert [math.isnan(x) for x in bootstrap(torch.ones(1))] == [False, True, True]


def test_flip_test_known_values():
    assert flip_test(torch.zeros(20)) == 1
    assert flip_test(torch.ones(40)) == pytest.approx(1e-4, rel=0.01)
    assert flip_test(torch.ones(2)) > 0.4
    three = torch.tensor([100.0, 100, 100, *[0] * 120])  # three decisions more: nothing, whatever resampling says
    assert flip_test(three) == pytest.approx(0.25, abs=0.02)


def test_flip_test_is_wrong_as_often_as_it_says():
    noise = randn(400, 30, seed=3)
    assert 0.02 < np.mean([flip_test(x, 500) < 0.05 for x in noise]) < 0.09


def row(values):
    """A Row with a metric x (n, F), and one that is the same for all rows."""
    return Row("a", "", {"x": values, "same": torch.zeros(len(values), 1)}, None, {}, trained={"seed": 0})


@pytest.mark.parametrize("metrics", (["x"], ["x", "same"]))  # what never differs adds nothing to the mean
def test_only_what_counts_decides(metrics):
    a, b = torch.zeros(64, 3), torch.zeros(64, 3)
    a[:40, 0] = b[:40, 0] = math.nan
    a[50:54, 1] = 100  # four decisions: p = 1/8, however many clips
    assert 0.09 < flip_test((a - b).nansum(1)) < 0.16
    nothing = torch.full((8, 2), math.nan)
    for better, worse, expected in (a, b, "undecided"), (nothing, nothing, "undecided"), (100 - b, b, "yes"):
        line = compare("", [(row(better), row(worse))], metrics, {}, [])[-1]
        assert f"| {expected} |" in line, line


def test_rank_correlation_known_values():
    assert ranks([3, 1, 3, 0]).tolist() == [3.5, 2, 3.5, 1]
    rho, chance = rank_correlation([1, 2, 3, 4, 5], [10, 20, 40, 30, 50])
    assert rho == pytest.approx(0.9) and chance == pytest.approx(5 / 120, abs=0.01)
    assert rank_correlation([5, 4, 3], [1, 2, 3])[0] == pytest.approx(-1)
    assert math.isnan(rank_correlation([1, 2, 3], [1, 1, 1])[0])
    assert math.isnan(rank_correlation([1, 2], [1, 2])[0])
