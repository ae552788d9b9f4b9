"""What the tables write: Markdown, CSV, paired differences, where each row comes from."""

import csv
import math
import statistics
from itertools import combinations

from bench.plots import draw_curves
from bench.runs import by_seed
from bench.stats import bootstrap, flip_test, interval
from encoder import find_method
from util.files import atomic_write

# ---------------------------------------------------------------------------------------------------------------------
# Markdown


def markdown(heads, rows):
    """Lines of a Markdown table of rows of strings."""
    return ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows)]


def expected_pairs(rows, chains):
    """[(row, row)]: which is expected to be above which. Each chain of (method, rate) is in order, best first."""
    found = {(row.method, row.rate): row for row in rows}
    return [(found[a], found[b]) for chain in chains for a, b in combinations(chain, 2) if {a, b} <= set(found)]


def mean_of(row, metrics):
    """The mean of these metrics of a row over all clips."""
    return sum(row.each(m).mean().item() for m in metrics) / len(metrics)


def compare_pair(a, b, metrics, papers, everything):
    """The cells of a line of compare()."""
    mean, low, high = bootstrap(sum(a.each(m) - b.each(m) for m in metrics) / len(metrics))
    decisions = [a.values[m] - b.values[m] for m in metrics]  # what does not count is no difference
    p = flip_test(sum(x.nansum(1) / (~x.isnan()).sum().clamp(min=1) for x in decisions))
    holds = "undecided" if p >= 0.05 else "yes" if mean > 0 else "no"
    theirs = [[paper.get((row.method, row.rate), math.nan) for row in (a, b)] for paper in papers.values()]
    gaps = ["–" if math.isnan(x - y) else f"{x - y:+.2f}" for x, y in theirs]
    of_a, of_b = (
        {row.trained["seed"]: mean_of(row, metrics) for row in everything if row.name == name}
        for name in (a.name, b.name)
    )
    both = sorted(of_a.keys() & of_b.keys())
    seeds = ", ".join(f"{of_a[seed] - of_b[seed]:+.2f}" for seed in both) if len(both) > 1 else "–"
    interval_cell = f"{low:+.2f} to {high:+.2f}"
    return [f"{a.name} above {b.name}", f"{mean:+.2f}", interval_cell, f"{p:.2g}", holds, seeds, *gaps]


def compare(title, pairs, metrics, papers, everything):
    """Lines of Markdown: paired differences of pairs of rows in the mean of these metrics; [] if there are no pairs.

    papers: {head of a column: {(method, rate): the paper's value}}; everything: the rows of all seeds, for the
    differences of the training seeds that both rows have.
    """
    if not pairs:
        return []
    explanation = (
        f"{title}, with its 95 % interval (bootstrap over clips, 10,000 resamples); decided if p < 0.05 (random signs "
        "of the clips' differences, two-sided; where it and the interval disagree, it decides). They tell luck of the "
        "clips alone, not of the training, which the column of seeds shows; of many rows, one in twenty is decided by "
        "chance."
    )
    heads = ["A above B", "difference", "interval", "p", "holds", "seed by seed", *papers]
    cells = [compare_pair(a, b, metrics, papers, everything) for a, b in pairs]
    return ["", explanation, "", *markdown(heads, cells)]


def describe_run(row, metric):
    """The cells of a line of describe_runs()."""
    trained = row.trained
    phi = trained.get("encoder", "–") if find_method(trained["method"]).has_stage1 else "–"
    share = trained.get("encoder_lr", 1)
    rate = f"{trained['lr']:g}" + (f", φ {trained['lr'] * share:g}" if share != 1 else "")
    mean = f"{interval(row.each(metric))[0]:.2f}"
    cells = [row.name, row.folder, phi, trained["step"], trained["seed"], rate, mean, row.machine, row.version]
    return [str(cell) for cell in cells]


def describe_runs(everything, metric, title, unit):
    """Lines of Markdown: where each row comes from, and the spread over seeds."""
    heads = ["row", "run", "φ of", "step", "seed", "learning rate", title, "measured on", "version"]
    seeds = by_seed(everything, metric)
    spreads = [f"{name} {statistics.stdev(x):.2f} ({len(x)} seeds)" for name, x in seeds.items() if len(x) > 1]
    return [
        "",
        *markdown(heads, [describe_run(row, metric) for row in everything]),
        "",
        "Version: MEASUREMENT_VERSION of the code that measured it (0: from before versions were counted).",
        "",
        f"Standard deviation of {title} over training seeds, {unit}: {'; '.join(spreads) or 'one seed only'}.",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write_csv(path, records):
    """Write records, dicts with the same keys, one per line; floats with six digits."""

    def rounded(x):
        return float(f"{x:.6g}") if isinstance(x, float) else x

    records = [{key: rounded(x) for key, x in record.items()} for record in records]
    with atomic_write(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)


def write_seeds(path, everything, record, metrics):
    """Write a CSV of all runs: these columns of record(row), and for the first of them its mean and deviation over the
    seeds of the same method and rate."""
    records, main = [], metrics[0]
    seeds = by_seed(everything, main)
    for row in everything:
        values, columns = seeds[row.name], record(row)
        records.append(
            {
                "method": row.method,
                "rate": row.rate,
                "seed": row.trained["seed"],
                "step": row.trained["step"],
                **{key: columns[key] for key in metrics},
                "seeds": len(values),
                f"{main}_mean_of_seeds": statistics.mean(values),
                f"{main}_deviation_of_seeds": statistics.stdev(values) if len(values) > 1 else "",
            }
        )
    write_csv(path, records)


def write_table(stem, lines, rows, everything, record, metrics):
    """Write what both tables have, and print the Markdown.

    stem.md: these lines; stem.csv: record(row) of each row; stem_seeds.csv: all runs, see write_seeds();
    stem_curves.png.
    """
    text = "\n".join(lines) + "\n"
    with atomic_write(f"{stem}.md") as part:
        part.write_text(text, encoding="utf-8")
    write_csv(f"{stem}.csv", [record(row) for row in rows])
    write_seeds(f"{stem}_seeds.csv", everything, record, metrics)
    draw_curves(f"{stem}_curves.png", rows, everything)
    print(text)
