"""Scenes: layers (colour, coverage), back to front. Every edge is y against a profile h(x), two pixels soft."""

from typing import NamedTuple

import numpy as np

from dolls.shapes import bands, box, cover, mix


class View(NamedTuple):
    """Where the pixels of a scene are: x (1, w) from the middle, y (h, 1) from the horizon, in units."""

    x: np.ndarray
    y: np.ndarray
    scale: float  # half the pixels per unit, which makes cover() twice as soft

    def wave(self, length, phase):
        return np.sin(2 * np.pi * (self.x / length + phase))

    def below(self, profile):
        """Coverage of what lies below a height, or heights (1, w)."""
        return cover(self.y - profile + 0 * self.x, self.scale)

    def sun(self, position, height, radius):
        """Coverage of a disc; position: from 0, left, to 1, right."""
        return cover(np.hypot(self.x - 44 * (position - 0.5), self.y - height) - radius, self.scale)


def forest_layers(view, r, sky, far, near, accent):
    period = 15 + 5 * r[0]
    trunks = abs((view.x + period * r[1]) % period - period / 2) - 3 - r[2] + 0 * view.y
    leaves = 1 - view.below(23 + 2.5 * view.wave(13 + 5 * r[3], r[4]))
    return [(far, cover(trunks, view.scale)), (accent, leaves), (near, view.below(-5 + 1.5 * view.wave(30, r[5])))]


def hills_layers(view, r, sky, far, near, accent):
    back = view.below(6 + 7 * view.wave(38 + 10 * r[1], r[2]))
    front = view.below(-6 + 4 * view.wave(26 + 10 * r[3], r[4]))
    return [(accent, view.sun(r[0], 24, 5)), (far, back), (near, front)]


def city_layers(view, r, sky, far, near, accent):
    u = (view.x / 10 + 16 + r[0]) % 12  # 12 blocks, 10 units wide, repeated
    edges = np.arange(12).repeat(2) + np.tile([0.03, 0.97], 12)
    roof = np.interp(u, edges, 6 + 20 * np.repeat(r, 2), period=12)
    windows = bands((u % 1 - 0.5) * 10, 5, view.scale) * bands(view.y + 1, 5, view.scale)
    return [(far, view.below(roof)), (accent, 0.8 * windows * view.below(roof - 4)), (near, view.below(-6))]


def room_layers(view, r, sky, far, near, accent):
    x, y, scale = view.x - 36 * (r[2] - 0.5), view.y - 17, view.scale  # from the middle of the window
    return [
        (far, 1 + 0 * view.x * view.y),
        (accent, 0.45 * bands(view.x + 16 * r[0], 7 + 2 * r[1], scale) + 0 * view.y),
        ((250, 246, 240), cover(box(x, y, 10, 11, 2), scale)),
        (sky, cover(box(abs(x) - 4.5, abs(y) - 5, 3.7, 4.2), scale)),
        (0.8 * near, view.below(-6)),
        (near, view.below(-9)),
    ]


def beach_layers(view, r, sky, far, near, accent):
    surf = view.below(-2 + view.wave(18, r[1])) - view.below(-5 + view.wave(18, r[1]))
    sand = view.below(-9 + 2.5 * view.wave(34 + 10 * r[2], r[3]))
    return [(accent, view.sun(r[0], 20, 7)), (far, view.below(4)), (0.5 * far + 127, 0.6 * surf), (near, sand)]


def desert_layers(view, r, sky, far, near, accent):
    def ridge(height, length, phase, drop):
        return view.below(height * abs(2 * ((view.x / length + phase) % 1) - 1) - drop)

    dune = ridge(16, 60 + 12 * r[2], r[3], 12)
    ripples = bands(view.x + 1.6 * view.y + 20 * r[4], 7 + 2 * r[5], view.scale)
    return [(far, ridge(18, 44 + 12 * r[0], r[1], 2)), (near, dune), (accent, 0.5 * dune * ripples)]


LAYERS = {
    "room": room_layers,
    "desert": desert_layers,
    "forest": forest_layers,
    "hills": hills_layers,
    "beach": beach_layers,
    "city": city_layers,
}


def draw_scene(scene, unit, height, width):
    """-> uint8 (height, width, 3); unit: pixels per unit."""
    scale = unit / 2
    x = ((np.arange(width) + 0.5 - width / 2) / (2 * scale)).astype(np.float32)[None]
    y = ((0.6 * height - np.arange(height) - 0.5) / (2 * scale)).astype(np.float32)[:, None]
    sky, far, near, accent = (np.array(c, np.float32) for c in scene.colours)
    image = mix(sky, 0.5 * sky + 127, np.clip(1 - y / 30, 0, 1) + 0 * x)  # paler towards the horizon
    for colour, amount in LAYERS[scene.kind](View(x, y, scale), scene.layout, sky, far, near, accent):
        image = mix(image, colour, amount)
    return (image + 0.5).astype(np.uint8)
