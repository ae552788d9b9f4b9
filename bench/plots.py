"""Plots: lines on labelled axes."""

import io
from contextlib import contextmanager

from cycler import cycler
from matplotlib import rcParams
from matplotlib.figure import Figure
from PIL import Image

from util.files import atomic_write


@contextmanager
def plot(path, x, *labels):
    """Yield axes, one per label of a y axis, side by side; at the end they are written to `path` as a PNG.

    x: label of the x axes. Lines that are drawn with a label appear in one legend.
    """
    columns = min(len(labels), 3)
    rows = -(-len(labels) // columns)
    size = (8, 5) if columns == 1 else (4.5 * columns, 3.5 * rows + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in every:  # of more than ten lines no two look the same
        axes.set_prop_cycle(cycler(linestyle=["-", "--", ":"]) * rcParams["axes.prop_cycle"])
    yield every[: len(labels)]
    for axes, y in zip(every, labels):
        axes.set(xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
    if every[0].lines:
        figure.legend(*every[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    for axes in every[len(labels) :]:
        axes.remove()
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=130)
    with atomic_write(path) as part:  # few colours: a palette needs a third of the space
        Image.open(drawn).convert("RGB").quantize(256).save(part, "PNG")


def draw_curves(path, rows, everything):
    """Plot the PSNR of every run over its steps, from its log: one colour per row, thin lines for its other seeds.

    rows: the Rows of the table; everything: those of all seeds.
    """
    trained = everything[0].trained
    label = f"PSNR, dB ({trained['held_out']} clips, {trained['sample_steps']} Euler steps)"
    with plot(path, "step", label) as (axes,):
        for row in (row for row in rows if row.curve):  # a log may hold no PSNR
            (line,) = axes.plot(*zip(*row.curve), marker=".", linewidth=1.6, label=row.name)
            style = dict(color=line.get_color(), linestyle=line.get_linestyle())
            for other in everything:
                if other.name == row.name and other is not row and other.curve:
                    axes.plot(*zip(*other.curve), marker=".", linewidth=0.6, **style)
