"""Ratings from votes between pairs of methods: a Bradley-Terry fit, on the scale of chess ratings (Elo).

python eval.py elo votes.csv
"""

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from util.cli import UserError, parse_flags
from util.files import atomic_write, check_outputs, read_text

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
        reader = csv.DictReader(io.StringIO(read_text(path, newline=""), newline=""))
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
    index = {name: i for i, name in enumerate(names)}
    return names, np.array([(index[a], index[b], score) for a, b, score in rows])


@dataclass
class Pairs:
    """R sets of votes between the methods a and b of P pairs."""

    a: torch.Tensor  # (P,) index of a method
    b: torch.Tensor  # (P,)
    won: torch.Tensor  # (P, R) how often a won, ties count half
    lost: torch.Tensor  # (P, R)

    def sum(self, for_a, for_b, methods):
        """(methods, R): what all pairs give their a's, for_a (P, R), and their b's."""
        total = torch.zeros(methods, for_a.shape[1], dtype=for_a.dtype)
        return total.index_add_(0, self.a, for_a).index_add_(0, self.b, for_b)

    def reached(self, methods, wins=True, losses=True):
        """(methods, R) bool: whether a chain leads from the first method to each, where each has beaten the one before
        (wins), has lost to it (losses), or either."""
        from_a = (wins & (self.won > 0) | losses & (self.lost > 0)).double()
        from_b = (wins & (self.lost > 0) | losses & (self.won > 0)).double()
        reach = torch.zeros(methods, from_a.shape[1], dtype=torch.float64)
        reach[0], before = 1, None
        while before is None or not torch.equal(reach, before):
            before = reach
            reach = (reach + self.sum(reach[self.b] * from_b, reach[self.a] * from_a, methods)).clamp(max=1)
        return reach > 0


def pair_votes(kinds, counts):
    """kinds (K, 3): votes as read_votes() returns them; counts (K, R): how many of each R sets have -> Pairs."""
    pairs, pair_of = np.unique(kinds[:, :2], axis=0, return_inverse=True)
    score, counts = torch.from_numpy(kinds[:, 2:] / 2), torch.from_numpy(counts).double()
    zeros, pair_of = counts.new_zeros(len(pairs), counts.shape[1]), torch.from_numpy(pair_of.ravel())
    won, lost = (zeros.index_add(0, pair_of, counts * share) for share in (score, 1 - score))
    return Pairs(*torch.from_numpy(pairs.T.copy()), won, lost)


def check_linked(names, pairs, path):
    """Raise UserError if votes link some methods with none of the others. pairs: one set."""
    linked = pairs.reached(len(names))[:, 0]
    if not linked.all():
        groups = [[name for name, x in zip(names, linked) if x == side] for side in (True, False)]
        a, b = (", ".join(group[:5] + [f"{len(group) - 5} more"] * (len(group) > 5)) for group in groups)
        raise UserError(
            f"{path}: no vote links {a} with {b}, so their ratings cannot be compared: add votes between them"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Ratings


def newton_step(theta, pairs, prior):
    """Newton's step (n, R) towards the maximum of the likelihood, from log-strengths theta (n, R); prior: (R,).

    By conjugate gradients, as each method meets few others: the curvature is never written out as a matrix. The mean
    stays 0, since strengths are known only up to a constant.
    """
    n, games = len(theta), pairs.won + pairs.lost
    p, q = (theta[pairs.a] - theta[pairs.b]).sigmoid(), theta.sigmoid()  # of a winning; of beating the average opponent
    surplus, curvature = pairs.won - games * p, games * p * (1 - p)
    own = 2 * prior * q * (1 - q)
    diagonal = pairs.sum(curvature, curvature, n) + own

    def centre(x):
        return x - x.mean(0)

    def curve(x):
        pull = curvature * (x[pairs.a] - x[pairs.b])
        return centre(pairs.sum(pull, -pull, n) + own * x)

    rest = centre(pairs.sum(surplus, -surplus, n) + prior * (1 - 2 * q))
    step, direction, last, enough = torch.zeros_like(theta), torch.zeros_like(theta), torch.ones_like(prior), None
    for _ in range(10 * n):
        scaled = centre(rest / diagonal)
        now = (rest * scaled).sum(0)
        enough = (1e-6 * now).clamp(min=1e-26) if enough is None else enough
        going = now > enough  # what the other sets would still get is rounding errors
        if not going.any():
            break
        direction = torch.where(going, scaled + direction * (now / last), 0.0)
        curved = curve(direction)
        length = torch.where(going, now / (direction * curved).sum(0), 0.0)
        step, rest, last = step + length * direction, centre(rest - length * curved), now
    return step


def fit_strengths(pairs, methods, start=0.0):
    """Maximum-likelihood Bradley-Terry log-strengths of R sets of votes between n methods.

    start: log-strengths to start from. Returns the log-strengths (n, R), with mean 0, and which sets (R,) took the
    prior.

    The maximum is finite where chains of wins lead from every method to every other (Ford 1957). Elsewhere each method
    gets PRIOR wins, and as many losses, against an average opponent. Newton's method takes steps of s / (1 + 2 s)
    instead of s, which never overshoot: the curvature changes by at most a factor exp(2 s) on the way.
    """
    unbounded = ~(pairs.reached(methods, losses=False) & pairs.reached(methods, wins=False)).all(0)
    prior = PRIOR * unbounded.double()
    theta = torch.zeros(methods, len(prior), dtype=torch.float64) + start
    for _ in range(1000):
        step = newton_step(theta, pairs, prior)
        size = step.abs().amax(0)
        theta += step / (1 + 2 * size)
        if size.max() < 1e-8:
            break
    return theta, unbounded


def prior_remarks(names, pairs, unbounded, resamples):
    """Sentences on where the prior was needed: for the votes themselves (unbounded), and in how many resamples."""
    remarks = []
    if unbounded:
        won, lost = pairs.won, pairs.lost
        sums = {"lost": pairs.sum(lost, won, len(names)), "won": pairs.sum(won, lost, len(names))}
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
    kinds, counts = np.unique(votes, axis=0, return_counts=True)
    pairs = pair_votes(kinds, counts[:, None])
    check_linked(names, pairs, path)
    theta, unbounded = fit_strengths(pairs, len(names))
    resampled = np.random.default_rng(0).multinomial(len(votes), counts / len(votes), RESAMPLES)
    parts = np.array_split(resampled, 1 + counts.size * RESAMPLES // 2**17)  # of some MB, for the cache and the bar
    bar = tqdm(parts, desc="resamples", delay=2)
    fits = [fit_strengths(pair_votes(kinds, part.T), len(names), theta) for part in bar]
    many, many_unbounded = (torch.cat(x, dim=-1) for x in zip(*fits))
    points = 400 / math.log(10)
    intervals = 1200 + points * np.percentile(many.numpy(), (2.5, 97.5), axis=1)
    return (
        1200 + points * theta[:, 0].numpy(),
        intervals,
        prior_remarks(names, pairs, unbounded[0], many_unbounded.sum()),
    )


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
