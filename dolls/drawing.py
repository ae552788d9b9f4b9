"""Draw stories: anti-aliased signed distances in NumPy, and sprites that are drawn once and then only pasted.

Lengths are in *units*: the shorter side of a frame is 64 units, whatever its size in pixels. y points up in every
drawing. Signed distances are in units, negative inside. Whatever changes a picture must raise dataset.WORLD_VERSION.
"""

import functools
from typing import NamedTuple

import numpy as np

from dolls.scenes import draw_scene
from dolls.shapes import bands, box, cover, grid, mix, stroke

STEP = 8  # units: people and things stand at multiples of this
# A camera that moves closer magnifies near things more: people stand in front of things, the scenery is far away.
PERSON_ZOOM, THING_ZOOM = (1.0, 1.4), (1.0, 1.2)  # for each framing
PERSON_HALF, THING_HALF, HAIR_ROOM = 11.0, 8.75, 4.5  # units: no drawing reaches farther than this
CLOTH, FACE, HANDS, OBJECT = 1, 2, 3, 4  # part ids; 0 is the scene
STAND, LEFT_FOOT_UP, RIGHT_FOOT_UP, ARMS_OUT = range(4)  # poses
WALKING, WAVING = (STAND, LEFT_FOOT_UP, STAND, RIGHT_FOOT_UP), (STAND, ARMS_OUT, STAND, ARMS_OUT)
INK, WOOD, LENS = (28, 22, 30), (92, 70, 60), (235, 245, 255)
LIFT = {"kite": 16.0, "heart": 16.0, "flag": 13.0}  # units from the ground to the lower edge of a thing on a stick


class Body(NamedTuple):
    """The measures of a build, in units."""

    legs: float
    half_width: float  # of the torso
    torso: float  # height
    head: float  # radius
    taper: float  # > 0: wider at the hips


BODIES = {
    "tall": Body(16.0, 6.6, 17.0, 6.0, 0.0),
    "broad": Body(9.0, 7.5, 17.0, 6.4, -0.3),
    "small": Body(6.0, 6.4, 15.0, 7.6, 0.05),
    "round": Body(7.0, 7.6, 17.0, 6.2, 0.45),
}


class Sprite:
    """A drawing on a transparent ground: rgba (..., h, w, 4), premultiplied, and parts (..., h, w), one id per pixel.

    x (1, w) and y (h, 1) hold the centres of the pixels in units; x = 0 is the middle and y = 0 the bottom edge.
    """

    def __init__(self, left, right, top, scale, poses=()):
        rows, columns = np.ceil(top * scale), np.arange(-np.ceil(left * scale), np.ceil(right * scale))
        self.x = ((columns + 0.5) / scale).astype(np.float32)[None]
        self.y = ((rows - np.arange(rows) - 0.5) / scale).astype(np.float32)[:, None]
        self.parts, self.scale = np.zeros((*poses, int(rows), len(columns)), np.uint8), scale
        self.rgba = np.zeros((*self.parts.shape, 4), np.float32)

    def paint(self, distance, colour, part, rim=0.35):
        """Paint a shape over what is there, darker along its edge so that it stands out from any ground."""
        alpha, ink = cover(distance, self.scale), np.ones((*distance.shape, 4), np.float32)
        ink[..., :3] = colour
        if rim:
            ink[..., :3] *= 1 - rim * np.clip(1 + distance, 0, 1)[..., None]
        self.rgba += alpha[..., None] * (ink - self.rgba)
        self.parts[alpha > 0.5] = part


# ---------------------------------------------------------------------------------------------------------------------
# People and things


def person_height(build):
    """Units from the ground to above any hair. It must not depend on the hair, which no caption mentions."""
    body = BODIES[build]
    return body.legs + body.torso - 1.5 + 2 * body.head + HAIR_ROOM


def draw_character(who, scale):
    """-> Sprite with 4 poses: STAND, LEFT_FOOT_UP, RIGHT_FOOT_UP, ARMS_OUT.

    People are symmetric except for the emblem: one half is drawn, with its limbs in three states, and then mirrored.
    """
    body, top = BODIES[who.build], person_height(who.build)
    chest, chin = (body.legs + body.torso / 2) // 1, body.legs + body.torso - 1.5
    limbs, trunk = Sprite(0, PERSON_HALF, top, scale, (3,)), Sprite(0, PERSON_HALF, top, scale)
    x, y = limbs.x, limbs.y
    shirt = mix(who.shirt_colours[0], who.shirt_colours[1], weave(who.shirt, x, y - chest, scale))
    draw_limbs(limbs, who, body, shirt, chin)
    trunk.paint(box(x + 0 * y, y - body.legs, 0.82 * body.half_width, 2.5, 1), who.trousers, CLOTH, 0)
    middle = y - body.legs - body.torso / 2
    tapered = x / (1 - body.taper * middle / body.torso)
    trunk.paint(box(tapered, middle, body.half_width, body.torso / 2, 2.5), shirt, CLOTH)
    draw_head(trunk, x, y - chin - body.head, who, body.head)
    rgba = limbs.rgba * (1 - trunk.rgba[..., 3:]) + trunk.rgba
    parts = np.where(trunk.parts, trunk.parts, limbs.parts)
    left, right = [0, 2, 1, 1], [0, 1, 2, 1]  # the state of the limbs of each half in each pose
    doll = Sprite(PERSON_HALF, PERSON_HALF, top, scale)
    doll.rgba = np.concatenate([rgba[left][:, :, ::-1], rgba[right]], 2)
    doll.parts = np.concatenate([parts[left][:, :, ::-1], parts[right]], 2)
    emblem = grid(doll.x, y - chest, who.emblem, 4.5, 6, scale)
    doll.rgba[..., :3] = mix(doll.rgba[..., :3], who.emblem_colour, emblem)
    return doll


def weave(shirt, x, y, scale):
    """Coverage (h, w) of the second colour of a shirt; (0, 0) is the middle of the chest."""
    columns, rows = bands(x, 4, scale) + 0 * y, bands(y, 4, scale) + 0 * x
    dots = cover(np.hypot((x + 3) % 6 - 3, (y + 3) % 6 - 3) - 1.9, scale)
    checks = rows + columns - 2 * rows * columns
    return {"plain": 0 * rows, "rows": rows, "columns": columns, "checks": checks, "dots": dots}[shirt]


def draw_limbs(limbs, who, body, shirt, chin):
    """Paint the right arm and leg in three states (at rest, arm out, foot up), and long hair behind the shoulders."""
    x, y, legs, wide = limbs.x, limbs.y, body.legs, body.half_width
    lift, out = np.array([[0, 0, 2.5], [0.4, 1.2, 0.0]], np.float32)[..., None, None]  # (3, 1, 1) each
    hand, hip, r = legs + 0.35 * body.torso, 0.48 * wide, 0.36 * wide
    if who.hair == "long":
        limbs.paint(
            box(x, y - chin - body.head + 5, body.head + 1.4, body.head + 5, 4) + 0 * lift, who.hair_colour, FACE
        )
    limbs.paint(stroke(x, y, hip, legs, hip, r + lift, r), who.trousers, CLOTH)
    shoe = stroke(x, y, hip, 1.5 + lift, hip + 1, 1.5 + lift, 1.5)
    limbs.paint(shoe, 0.45 * np.array(who.trousers), CLOTH, 0)
    limbs.paint(np.hypot(x - wide - 0.2 - out, y - hand - out + 1) - 1.6, who.skin, HANDS)
    shoulder = wide * (1 - body.taper / 2) - 0.6
    limbs.paint(stroke(x, y, shoulder, chin - 2, wide + 0.2 + out, hand + out + 1, 1.8), shirt, CLOTH)


def draw_head(trunk, x, y, who, r):
    """Paint face, glasses and hair; (0, 0) is the middle of a head of radius r, x >= 0."""
    d, eye, hair = np.hypot(x, y), np.hypot(x - 0.42 * r, y + 0.4), who.hair_colour
    if who.hair == "afro":
        trunk.paint(np.hypot(x, y - 2) - r - 2.2, hair, FACE)
    elif who.hair == "bun":
        trunk.paint(np.hypot(x, y - r - 1.2) - 3.2, hair, FACE)
    elif who.hair == "pigtails":
        trunk.paint(np.hypot(x - r - 0.2, y - 1) - 2.8, hair, FACE)
    trunk.paint(d - r, who.skin, FACE)
    if who.hair == "mohawk":
        trunk.paint(box(x, y - r, 2, 4.2, 1.5), hair, FACE)
    elif who.hair != "bald":
        trunk.paint(np.maximum(d - r - 0.6, 0.35 * r + 0.08 * x - y), hair, FACE, 0.2)
    if who.glasses:
        trunk.paint(np.minimum(eye - 2.2, box(x, y + 0.2, 0.42 * r, 0.4)), INK, FACE, 0)
        trunk.paint(eye - 1.3, LENS, FACE, 0)
    if who.eyes == "round":
        trunk.paint(eye - 1.5, LENS, FACE, 0)
    sleepy = np.maximum(eye - 1.3, y + 0.4)  # the lower half of a disc
    trunk.paint(sleepy if who.eyes == "sleepy" else eye - 0.85, INK, FACE, 0)
    below = y + 0.32 * r  # from the middle of the mouth's circle
    mouth = {
        "smile": np.maximum(abs(np.hypot(x, below) - 2) - 0.5, below + 1),
        "flat": box(x, below + 1.5, 1.9, 0.45),
        "open": np.hypot(x, below + 1.4) - 1.3,
    }[who.mouth]
    trunk.paint(mouth, 0.5 * np.array(who.skin), FACE, 0)


def draw_thing(what, scale):
    """-> Sprite of a thing 17 units across: kite and heart on a stick, flag on a pole, ball and box on the ground."""
    lift = LIFT.get(what.shape, 0.0)
    sprite = Sprite(THING_HALF, THING_HALF, lift + 2 * THING_HALF, scale)
    x, y, v = sprite.x, sprite.y, sprite.y - lift - 8.5
    if what.shape == "flag":
        sprite.paint(box(x + 6.6, y - 13, 1, 14.5, 0.8), WOOD, OBJECT, 0)
    elif lift:
        sprite.paint(box(x, y - lift / 2, 0.6, lift / 2), WOOD, OBJECT, 0)
    distance, (grid_x, grid_y, half_x, half_y) = outline(what.shape, x, v)
    amount = grid(grid_x, grid_y, what.cells, half_x, half_y, scale)
    sprite.paint(distance, mix(what.colours[0], what.colours[1], amount), OBJECT)
    return sprite


def outline(shape, x, y):
    """(signed distance, (x, y, half_x, half_y) of the grid of cells) of a thing around (0, 0)."""
    a, b = (x + y) * 0.5**0.5, (y - x) * 0.5**0.5  # axes turned by 45 degrees
    if shape == "ball":
        return np.hypot(x, y) - 8.5, (x, y, 8.5, 8.5)
    if shape == "box":
        return box(x, y, 8, 8.5, 1), (x, y, 8, 8.5)
    if shape == "kite":
        return box(a, b, 6, 6), (a, b, 6, 6)
    if shape == "flag":
        return box(x - 0.8, y, 7, 6, 1), (x - 0.8, y, 7, 6)
    heart = np.minimum(box(a, b, 4.9, 4.9), np.hypot(abs(x) - 3.46, y - 3.46) - 4.9)
    return heart, (x, y - 0.7, 8.4, 7.7)


# ---------------------------------------------------------------------------------------------------------------------
# Sections


def snap(x, low, high):
    """The multiple of STEP nearest to x within low..high, or x if there is none.

    Motion in steps of a whole token makes the parts of a picture look alike wherever they are: a small model learns to
    draw them from far fewer stories.
    """
    fit = np.arange(np.ceil(low / STEP), np.floor(high / STEP) + 1) * STEP
    return x if not len(fit) else float(fit[np.abs(fit - x).argmin()])


def sprite_paths(shot, build, n, unit, height, width):
    """Where the sprites stand in n frames, in pixels: (n columns, row of the ground) of the character, of the thing."""
    person = PERSON_HALF * PERSON_ZOOM[shot.framing] + 0.5
    thing = THING_HALF * THING_ZOOM[shot.framing] + 0.5
    ground = height / unit - 4 + shot.framing
    lowest = 1 + person_height(build) * PERSON_ZOOM[shot.framing] if build else 0  # the whole head is in the frame
    feet = max(ground + 1 + shot.framing, lowest)
    right = width / unit

    def path(half, low, high, ends):
        slots = [half, right / 2, right - half]
        return [snap(x, low, high) for x in np.linspace(slots[ends[0]], slots[ends[1]], n)]

    def in_pixels(columns, row):
        return [round(x * unit) for x in columns], round(row * unit)

    slide = path(thing, thing, right - thing, shot.slide)
    low, high = person, right - person
    if None not in (shot.character, shot.thing):  # the character keeps clear of the thing
        low, high = (slide[0] + person + thing, high) if shot.slide[0] == 0 else (low, slide[0] - person - thing)
    return in_pixels(path(person, low, high, shot.walk), feet), in_pixels(slide, ground)


def paste(frame, parts, sprite, pose, column, ground):
    """Paste one pose of a sprite (or ... for one without poses), its middle at `column` and its bottom at row `ground`.

    What lies outside the frame is cropped.
    """
    rgba, ids = sprite.rgba[pose], sprite.parts[pose]
    top, left = ground - ids.shape[0], column - ids.shape[1] // 2
    rows = slice(max(0, -top), min(ids.shape[0], frame.shape[0] - top))
    columns = slice(max(0, -left), min(ids.shape[1], frame.shape[1] - left))
    rgba, ids = rgba[rows, columns], ids[rows, columns]
    spot = slice(top + rows.start, top + rows.stop), slice(left + columns.start, left + columns.stop)
    frame[spot] = frame[spot] * (1 - rgba[..., 3:]) + (rgba[..., :3] + 0.5)
    np.copyto(parts[spot], ids, where=ids > 0)


def render(story, sections=None, frames_per_section=4, height=64, width=64):
    """-> frames uint8 (F, H, W, 3) and masks {cloth, face, object, scene}, each bool (F, H, W).

    sections: a slice or range of section numbers, by default all. Motion is in whole pixels, so every person, thing and
    scene is drawn once per framing and then only pasted: about 10 ms for 44 frames of 64 x 64 on one core.
    """
    every = range(len(story.shots))
    sections = every if sections is None else every[sections] if isinstance(sections, slice) else sections
    unit, n = min(height, width) / 64, frames_per_section
    frames = np.empty((len(sections), n, height, width, 3), np.uint8)
    parts = np.zeros(frames.shape[:-1], np.uint8)

    @functools.cache
    def scenery(i):
        return draw_scene(story.scenes[i], unit, height, width)

    @functools.cache
    def doll(i, framing):
        return draw_character(story.characters[i], PERSON_ZOOM[framing] * unit)

    @functools.cache
    def prop(i, framing):
        return draw_thing(story.things[i], THING_ZOOM[framing] * unit)

    for s, shot in enumerate(story.shots[k] for k in sections):
        frames[s] = scenery(shot.scene)
        build = None if shot.character is None else story.characters[shot.character].build
        (walk, feet), (slide, ground) = sprite_paths(shot, build, n, unit, height, width)
        poses = WAVING if shot.walk[0] == shot.walk[1] else WALKING
        for f in range(n):
            if shot.thing is not None:
                paste(frames[s, f], parts[s, f], prop(shot.thing, shot.framing), ..., slide[f], ground)
            if build:
                paste(frames[s, f], parts[s, f], doll(shot.character, shot.framing), poses[f % 4], walk[f], feet)
    frames, parts = frames.reshape(-1, height, width, 3), parts.reshape(-1, height, width)
    return frames, {"cloth": parts == CLOTH, "face": parts == FACE, "object": parts == OBJECT, "scene": parts == 0}
