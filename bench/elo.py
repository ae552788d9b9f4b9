"""Ratings from votes between pairs of methods: a Bradley-Terry fit, on the scale of chess ratings (Elo).

python eval.py elo votes.csv
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from util.cli import UserError, parse_flags
from util.files import atomic_write, check_outputs

RESAMPLES = 1000  # bootstrap resamples of the votes, for the intervals
PRIOR = 0.5  # wins, and as many losses, against an average opponent, where a rating would be infinite


@dataclass
class EloConfig:
    votes: str = ""  # CSV with the columns a, b, winner: a name or tie; the flag's name may be left out
    out: str = "out/elo.md"  # the table; the same as .csv beside it


# ---------------------------------------------------------------------------------------------------------------------
# Votes


def parse_vote(row, where):
    """A row of the CSV file -> (a, b, twice a's score: 2 won, 1 tie, 0 lost). Raises UserError naming `where`."""
    a, b, winner = (" ".join((row[column] or "").split()) for column in ("a", "b", "winner"))
    if not a or not b or a == b or "tie" in (a, b):
        raise UserError(f'{where}: a is "{a}", b is "{b}"; give two different names, neither of them tie')
    if winner not in (a, b, "tie"):
        raise UserError(f'{where}: the winner is "{winner}"; expected "{a}", "{b}" or "tie"')
    return a, b, {a: 2, b: 0}.get(winner, 1)


def read_votes(path):
    """A CSV file -> (sorted names, votes (V, 3) int: the indices of a and b, and twice a's score). Raises UserError."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            reader = csv.DictReader(f)
            missing = [column for column in ("a", "b", "winner") if column not in (reader.fieldnames or [])]
            if missing:
                raise UserError(f"{path} has no column {', '.join(missing)}: its first line must be a,b,winner")
            rows = [parse_vote(row, f"{path}, line {reader.line_num}") for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(
            f"{path} cannot be read ({getattr(e, 'strerror', None) or 'not CSV in UTF-8'}): "
            "give a CSV file with the header a,b,winner"
        ) from None
    if not rows:
        raise UserError(f"{path} holds no votes: add lines such as proposed,only-lr,proposed")
    names = sorted({name for a, b, _ in rows for name in (a, b)})
    return names, np.array([(names.index(a), names.index(b), score) for a, b, score in rows])


def count_votes(votes, methods):
    """votes (V, 3) -> how many votes there are of each kind (K,), and the wins of i over j each gives (K, n, n)."""
    kinds, counts = np.unique(votes, axis=0, return_counts=True)
    a, b, score = kinds.T
    wins = np.zeros((len(kinds), methods, methods))
    wins[range(len(kinds)), a, b] = score / 2
    wins[range(len(kinds)), b, a] = 1 - score / 2
    return counts, wins


def reachable(edges):
    """edges (..., n, n) bool -> (..., n, n) bool: whether a chain of edges leads from i to j."""
    reach = edges | np.eye(edges.shape[-1], dtype=bool)
    for _ in range(edges.shape[-1].bit_length()):
        reach = (reach.astype(float) @ reach) > 0
    return reach


def check_linked(names, wins, path):
    """Raise UserError if votes link some methods with none of the others. wins: (n, n)."""
    linked = reachable(wins + wins.T > 0)[0]
    if not linked.all():
        groups = [", ".join(name for name, x in zip(names, linked) if x == side) for side in (True, False)]
        raise UserError(
            f"{path}: no vote links {groups[0]} with {groups[1]}, so their ratings cannot be compared: "
            "add votes between them"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Ratings


def newton_step(theta, wins, prior):
    """Newton's step (R, n) towards the maximum of the likelihood, from log-strengths theta (R, n); prior: (R, 1)."""
    n = theta.shape[-1]
    games, centre = wins + wins.swapaxes(1, 2), np.eye(n) - 1 / n
    p = 1 / (1 + np.exp(theta[:, None] - theta[:, :, None]))  # of i winning against j
    q = 1 / (1 + np.exp(-theta))  # of winning against the average opponent
    gradient = wins.sum(2) - (games * p).sum(2) + prior * (1 - 2 * q)
    curvature = games * p * (1 - p)
    own = curvature.sum(2) + 2 * prior * q * (1 - q)
    # the mean stays 0: strengths are known only up to a constant
    matrix = centre @ (own[:, :, None] * np.eye(n) - curvature) @ centre + 1 / n
    return np.linalg.solve(matrix, (gradient @ centre)[..., None])[..., 0]


def fit_strengths(wins):
    """Maximum-likelihood Bradley-Terry log-strengths of R sets of votes between n methods.

    wins: (R, n, n), of i over j. Returns the log-strengths (R, n), with mean 0, and which sets (R,) took the prior.

    The maximum is finite where chains of wins lead from every method to every other (Ford 1957). Elsewhere each method
    gets PRIOR wins, and as many losses, against an average opponent. Newton's method takes steps of s / (1 + 2 s)
    instead of s, which never overshoot: the curvature changes by at most a factor exp(2 s) on the way.
    """
    unbounded = ~reachable(wins > 0).all((1, 2))
    prior = PRIOR * unbounded[:, None]
    theta = np.zeros(wins.shape[:2])
    for _ in range(1000):
        step = newton_step(theta, wins, prior)
        size = np.abs(step).max(1, keepdims=True)
        theta += step / (1 + 2 * size)
        if size.max() < 1e-8:
            break
    return theta, unbounded


def prior_remarks(names, wins, unbounded, resamples):
    """Sentences on where the prior was needed: for the votes themselves (unbounded), and in how many resamples."""
    remarks = []
    if unbounded:
        sums = {"lost": wins.sum(0), "won": wins.sum(1)}
        never = [f"{name} never {what}" for what, column in sums.items() for name, x in zip(names, column) if x == 0]
        remarks.append(
            f"Infinite ratings ({'; '.join(never) or 'some methods never lost to any of the rest'}), so "
            "each method is given half a win and half a loss against an average opponent."
        )
    if resamples:
        remarks.append(
            f"{resamples} of {RESAMPLES} resamples have infinite ratings and are fitted with half a win "
            "and half a loss of each method against an average opponent: the intervals may be too narrow."
        )
    return remarks


def compute_ratings(names, votes, path):
    """Ratings (n,), their 95 % bootstrap intervals (2, n), and remarks.

    400 points are odds of 10 to 1; the mean is 1200. Raises UserError, which names `path`, if the votes do not link all
    methods.
    """
    counts, table = count_votes(votes, len(names))
    wins = np.tensordot(counts, table, 1)
    check_linked(names, wins, path)
    theta, unbounded = fit_strengths(wins[None])
    resampled = np.random.default_rng(0).multinomial(len(votes), counts / len(votes), RESAMPLES)
    many, many_unbounded = fit_strengths(np.tensordot(resampled, table, 1))
    points = 400 / math.log(10)
    intervals = 1200 + points * np.percentile(many, (2.5, 97.5), axis=0)
    return 1200 + points * theta[0], intervals, prior_remarks(names, wins, unbounded[0], many_unbounded.sum())


# ---------------------------------------------------------------------------------------------------------------------
# Command


def format_table(rows, remarks, votes, path):
    """The Markdown table of `rows`, the first of which is the header, and a note on how it was made."""
    header, *body = rows
    lines = [header, ["---"] * len(header), *([row[0].replace("|", "\\|"), *row[1:]] for row in body)]
    table = "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
    note = [
        f"{votes} votes of {Path(path).name}; Bradley-Terry, maximum likelihood; mean 1200, 400 points",
        f"are odds of 10 to 1; low, high: 95 % of {RESAMPLES} bootstrap resamples of the votes, seed 0.",
        *remarks,
    ]
    return table + "\n" + "\n".join(note) + "\n"


def elo(argv):
    """Ratings from votes between pairs (elo votes.csv): a Bradley-Terry fit with 95 % bootstrap intervals."""
    config = parse_flags(EloConfig, elo.__doc__, argv if not argv or argv[0].startswith("-") else ["--votes", *argv])
    out = Path(config.out)
    if not config.votes:
        raise UserError("the file of votes is missing: python eval.py elo votes.csv")
    if out.suffix != ".md":
        raise UserError(f"--out {out}: give a name that ends in .md; the same name in .csv is written too")
    check_outputs(out.with_suffix(""), (".md", ".csv"), [config.votes])
    names, votes = read_votes(config.votes)
    ratings, (low, high), remarks = compute_ratings(names, votes, config.votes)
    played = np.bincount(votes[:, :2].ravel())
    rows = [["method", "rating", "low", "high", "votes"]]
    for i in np.argsort(-ratings, kind="stable"):
        rows.append([names[i], *(f"{x[i]:.0f}" for x in (ratings, low, high)), played[i]])
    text = format_table(rows, remarks, len(votes), config.votes)
    with atomic_write(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    with atomic_write(out.with_suffix(".csv")) as temporary, open(temporary, "w", encoding="utf-8", newline="") as f:
        # a spreadsheet would take a name such as =cmd for a formula
        safe = [["'" + row[0] if row[0][0] in "=+-@" else row[0], *row[1:]] for row in rows]
        csv.writer(f, lineterminator="\n").writerows(safe)
    print(f"{text}wrote {out} and {out.with_suffix('.csv')}")
