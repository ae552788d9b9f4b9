"""Shapes and patterns as anti-aliased coverage. Lengths are in units, see drawing.py."""

import numpy as np


def box(x, y, half_x, half_y, r=0.0):
    """Signed distance of a box around (0, 0) with corners of radius r."""
    dx, dy = abs(x) - (half_x - r), abs(y) - (half_y - r)
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0) - r


def stroke(x, y, ax, ay, bx, by, r):
    """Signed distance of a stroke of radius r from a to b."""
    px, py, ex, ey = x - ax, y - ay, bx - ax, by - ay
    t = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
    return np.hypot(px - t * ex, py - t * ey) - r


def cover(distance, scale):
    """Anti-aliased coverage of pixels whose centres lie `distance` units outside an edge; scale: pixels per unit."""
    return np.clip(0.5 - distance * scale, 0, 1)


def bands(t, width, scale):
    """A soft square wave of t (units), from 0 to 1: bands of `width` units, one of them centred on t = 0."""
    return cover(abs((t + width) % (2 * width) - width) - width / 2, scale)


def grid(x, y, cells, half_x, half_y, scale):
    """Coverage (h, w) of the cells that are on, in a grid that fills -half..half. x, y: (1, w), (h, 1) or (h, w)."""
    dx, dy, total = half_x / len(cells[0]), half_y / len(cells), 0 * x * y
    for r, c in np.argwhere(cells).tolist():
        column = cover(abs(x + half_x - (2 * c + 1) * dx) - dx, scale)
        row = cover(abs(y - half_y + (2 * r + 1) * dy) - dy, scale)
        total = total + column * row
    return total


def mix(a, b, amount):
    """Blend colours a, (3) or (h, w, 3), into b where amount (h, w) goes to 1."""
    return a + amount[..., None] * (np.asarray(b, np.float32) - np.asarray(a, np.float32))
