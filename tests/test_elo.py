"""Ratings from votes: known values, known truth, infinite ratings, files that are refused."""

import math
import re
import time
from pathlib import Path

import numpy as np
import pytest

from bench.elo import compute_ratings, fit_strengths, pair_votes
from eval import main
from tests.common import run


def write_votes(rows, path="votes.csv"):
    """Write a file of votes (a, b, winner)."""
    lines = [",".join(row) for row in [("a", "b", "winner"), *rows]]
    Path(path).write_text("\n".join(lines) + "\n")


def rate_votes(capsys, rows):
    """Rate votes -> {method: [rating, low, high, votes]} in the order of the table, and what was printed."""
    write_votes(rows)
    run(main, "elo", "votes.csv", "--out", "elo.md")
    header, *lines = [line.split(",") for line in Path("elo.csv").read_text().splitlines()]
    assert header == ["method", "rating", "low", "high", "votes"]
    return {name: list(map(int, values)) for name, *values in lines}, capsys.readouterr().out


def test_recovers_known_ratings(capsys):
    truth, rng, rows = {"a": 1050, "b": 1120, "c": 1230, "d": 1400}, np.random.default_rng(0), []
    for _ in range(3000):
        a, b = rng.choice(list(truth), 2, replace=False)
        chance = 1 / (1 + 10 ** ((truth[b] - truth[a]) / 400))
        rows.append((a, b, a if rng.random() < chance else b))
    found, printed = rate_votes(capsys, rows)
    assert list(found) == ["d", "c", "b", "a"]
    assert sum(votes for *_, votes in found.values()) == 2 * 3000
    assert sum(rating for rating, *_ in found.values()) / 4 == pytest.approx(1200, abs=1)
    for name, (rating, low, high, _) in found.items():
        assert abs(rating - truth[name]) < 25
        assert low <= truth[name] <= high and 15 < high - low < 60
    assert "3000 votes of votes.csv" in printed and "infinite" not in printed.lower()

    swapped, _ = rate_votes(capsys, [(b, a, winner) for a, b, winner in rows[::-1]])
    assert {name: x[0] for name, x in swapped.items()} == {name: x[0] for name, x in found.items()}
    assert rate_votes(capsys, rows) == (found, printed)  # seeded


def test_writes_markdown_and_csv(capsys):
    found, printed = rate_votes(capsys, [("x|1", "y", "x|1")] * 10 + [("y", "x|1", "y")])
    (_, low, high, _), (_, y_low, y_high, _) = found.values()
    markdown = Path("elo.md").read_text()
    assert markdown.splitlines()[:4] == [
        "| method | rating | low | high | votes |",
        "| --- | --- | --- | --- | --- |",
        f"| x\\|1 | 1400 | {low} | {high} | 11 |",
        f"| y | 1000 | {y_low} | {y_high} | 11 |",
    ]
    assert printed == f"{markdown}wrote elo.md and elo.csv\n"


def test_odds_of_10_to_1_are_400_points(capsys):
    found, printed = rate_votes(capsys, [("x", "y", "x")] * 10 + [("y", "x", "y")])
    assert (found["x"][0], found["y"][0]) == (1400, 1000)
    # a resample has no win of y with probability (10 / 11)^11 = 0.35
    resamples = re.search(r"(\d+) of 1000 resamples have infinite ratings", printed)
    assert 300 < int(resamples[1]) < 400


def test_a_tie_is_half_a_win(capsys):
    found, _ = rate_votes(capsys, [("x", "y", "tie")] * 5 + [("x", "y", "x"), ("x", "y", "y")])
    assert found["x"][0] == found["y"][0] == 1200 and found["x"][3] == 7
    found, _ = rate_votes(capsys, [("x", "y", "x")] * 3 + [("x", "y", "tie")] * 2)  # 4 to 1
    assert found["x"][0] - found["y"][0] == pytest.approx(400 * math.log10(4), abs=1)


def test_says_who_never_lost_or_won(capsys):
    votes = [("top", "x", "top")] * 3 + [("x", "y", "x"), ("x", "y", "y"), ("y", "low", "y")]
    found, printed = rate_votes(capsys, votes)
    assert "Infinite ratings (top never lost; low never won)" in printed
    assert "half a win and half a loss" in Path("elo.md").read_text()
    assert list(found)[0] == "top" and list(found)[-1] == "low" and 1200 < found["top"][0] < 1800


def test_says_when_a_group_never_lost_to_the_rest(capsys):
    """Nobody is unbeaten, but p and q are by the others."""
    votes = [("p", "q", "p"), ("p", "q", "q"), ("r", "s", "r"), ("r", "s", "s"), ("p", "r", "p")]
    found, printed = rate_votes(capsys, votes)
    assert "some methods never lost to any of the rest" in printed
    assert found["p"][0] > found["r"][0]


def test_the_maximum_is_found_among_many_methods(monkeypatch):
    """Where the likelihood is greatest, each of 600 methods has won as often as it was expected to."""
    rng = np.random.default_rng(0)
    ring = [(i, (i + 1) % 600, score) for i in range(600) for score in (0, 2)]  # all lost to all, by some chain
    votes = np.array(ring + [(*rng.choice(600, 2, replace=False), rng.integers(3)) for _ in range(2000)])
    monkeypatch.setattr("bench.elo.RESAMPLES", 50)
    started = time.process_time()
    ratings, (low, high), remarks = compute_ratings([f"m{i:03}" for i in range(600)], votes, "votes.csv")
    assert time.process_time() - started < 15  # with a matrix per resample, a minute
    assert ratings.mean() == pytest.approx(1200) and (low < high).all() and "50 of 50 resamples" in remarks[0]
    a, b, score = votes.T
    expected = 1 / (1 + 10 ** ((ratings[b] - ratings[a]) / 400))
    surplus = np.zeros(600)
    np.add.at(surplus, a, score / 2 - expected)
    np.add.at(surplus, b, expected - score / 2)
    assert np.abs(surplus).max() < 1e-6


def test_strengths_under_the_prior():
    """One vote: the likelihood is greatest where σ(-2 θ) = σ(θ) - 1/2 (vote against prior, derived by hand)."""
    theta, unbounded = fit_strengths(pair_votes(np.array([[0, 1, 2]]), np.array([[1]])), 2)
    x, y = theta[:, 0].tolist()
    assert unbounded.all() and y == pytest.approx(-x)
    assert 1 / (1 + math.exp(2 * x)) == pytest.approx(1 / (1 + math.exp(-x)) - 0.5)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "holds no votes"),
        ([("x", "y", "x"), ("x", "y", "z")], 'line 3: the winner is "z"'),
        ([("x", "x", "x")], 'line 2: a is "x", b is "x"'),
        ([("x", "tie", "x")], 'line 2: a is "x", b is "tie"'),
        ([("x",)], 'line 2: a is "x", b is ""'),
        ([("x", "y", "x"), ("y", "x", "x"), ("u", "v", "tie")], "no vote links u, v with x, y"),
        ([("u", "v", "tie"), *(("a", f"a{i}", "tie") for i in range(7))], "links a, a0, a1, a2, a3, 3 more with u, v,"),
    ],
)
def test_refuses_votes_that_make_no_sense(refused, rows, message):
    write_votes(rows)
    assert message in refused(main, "elo", "votes.csv")


def test_refuses_what_is_no_file_of_votes(refused):
    assert "votes.csv cannot be read (No such file" in refused(main, "elo", "votes.csv")
    Path("votes.csv").write_text("a,b,won\nx,y,x\n")
    assert "votes.csv has no column winner" in refused(main, "elo", "votes.csv")
    Path("votes.csv").write_bytes(b"a,b,winner\nx,\xff\xfe,x\n")
    assert "votes.csv cannot be read (not CSV in UTF-8)" in refused(main, "elo", "votes.csv")
    assert "the file of votes is missing" in refused(main, "elo")


@pytest.mark.parametrize("out", ["votes.csv", "votes.md", "elo.txt"])
def test_refuses_to_write_over_the_votes(refused, out):
    """--out ends in .md, and the same name in .csv is written too."""
    write_votes([("x", "y", "x")])
    says = "votes.csv would be written over" if out == "votes.md" else f"--out {out}: give a name that ends in .md"
    assert says in refused(main, "elo", "votes.csv", "--out", out)
