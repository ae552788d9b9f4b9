"""Stories of the paper-doll world: who and what appears where, section by section.

A story is a list of shots, one per section. The caption of a shot says everything about its picture EXCEPT what has to
be remembered (colours, patterns, emblem, hair, glasses, layout of the background): a model that still knows the earlier
sections knows the one right picture; a model that forgot them can only guess.
"""

from dataclasses import dataclass

import numpy as np

KINDS = ("room", "desert", "forest", "hills", "beach", "city")  # ordered by hue, from red to violet
BUILDS = ("tall", "broad", "small", "round")
HAIRS = ("short", "long", "bun", "afro", "mohawk", "pigtails", "bald")
EYES, MOUTHS = ("dots", "round", "sleepy"), ("smile", "flat", "open")
SHIRTS = ("plain", "rows", "columns", "checks", "dots")
SHAPES = ("ball", "box", "kite", "flag", "heart")
FRAMINGS = ("wide", "close")
SLOTS = ("left", "middle", "right")
CAPTION_WORDS = ("person", "nobody", "there", "to", "with", "nothing", "nowhere")  # all other words of a caption

DARK = ((196, 32, 44), (34, 62, 186), (20, 112, 58), (112, 40, 150), (34, 32, 56), (0, 104, 122), (124, 62, 24))
LIGHT = ((252, 214, 50), (250, 246, 236), (112, 206, 250), (255, 158, 190), (150, 234, 140), (255, 156, 56))
SKINS = ((255, 220, 190), (240, 190, 150), (205, 145, 100), (155, 98, 62), (104, 64, 44))
HAIR_COLOURS = (
    (40, 28, 30),
    (110, 60, 28),
    (236, 196, 84),
    (206, 84, 30),
    (226, 226, 230),
    (60, 110, 200),
    (214, 70, 150),
)


# The repr of a Scene, Character or Thing seeds its distractors (scores.candidates): renaming a field changes scores.


@dataclass(frozen=True)
class Scene:
    kind: str
    colours: tuple  # 4 x RGB: sky, far, near, accent
    layout: tuple  # 12 numbers in [0, 1): phases, positions and heights


@dataclass(frozen=True)
class Character:
    build: str
    skin: tuple
    hair: str
    hair_colour: tuple
    glasses: bool
    eyes: str
    mouth: str
    shirt: str
    shirt_colours: tuple  # 2 x RGB
    emblem: tuple  # 4 rows of 3 bits, top row first
    emblem_colour: tuple
    trousers: tuple


@dataclass(frozen=True)
class Thing:
    shape: str
    cells: tuple  # 4 rows of 4 bits, top row first
    colours: tuple  # 2 x RGB: cells that are off, cells that are on


@dataclass(frozen=True)
class Shot:
    """What one section shows. Numbers are indices into the tuples of the story, FRAMINGS and SLOTS."""

    scene: int
    character: int | None
    thing: int | None
    framing: int
    walk: tuple  # the character's slots in the first and the last frame
    slide: tuple  # the thing's slots


@dataclass(frozen=True)
class Story:
    scenes: tuple  # 3
    characters: tuple  # 1 or 2
    things: tuple  # 1 or 2
    shots: tuple

    def caption(self, k):
        """The caption of section k: everything about its picture except what has to be remembered.

        It always has twelve words, each role at a fixed position, so that prompt embeddings without grammar suffice.
        """
        shot = self.shots[k]
        who, what = "nobody there", "nothing"
        walk = slide = "nowhere to nowhere"
        if shot.character is not None:
            who = f"{self.characters[shot.character].build} person"
            walk = " to ".join(SLOTS[i] for i in shot.walk)
        if shot.thing is not None:
            what = self.things[shot.thing].shape
            slide = " to ".join(SLOTS[i] for i in shot.slide)
        return f"{self.scenes[shot.scene].kind} {FRAMINGS[shot.framing]} {who} {walk} with {what} {slide}"

    def askable(self, k, first=0):
        """True if sections first..k-1 showed everything in section k completely, that is, in wide framing."""
        shot, wide = self.shots[k], [s for s in self.shots[first:k] if s.framing == 0]
        return (
            shot.scene in [s.scene for s in wide]
            and shot.character in [None, *(s.character for s in wide)]
            and shot.thing in [None, *(s.thing for s in wide)]
        )


def world_seed(split, index):
    """The seed of story `index`: even for training, odd for held-out, so that the two splits share no story."""
    return 2 * index + {"train": 0, "held-out": 1}[split]


def pick_colour(rng, palette, avoid=(), gap=150):
    """A jittered colour from the palette, at an RGB distance of about `gap` or more from every colour in `avoid`.

    If none is that far away, the farthest ones are the choice.
    """
    room = [min((sum((a - b) ** 2 for a, b in zip(p, c)) for c in avoid), default=gap**2) for p in palette]
    fit = [p for p, r in zip(palette, room) if r >= min(gap**2, max(room))]
    colour = fit[rng.integers(len(fit))]
    jitter = rng.integers(-10, 11, 3).tolist()
    return tuple(min(max(c + j, 0), 255) for c, j in zip(colour, jitter))


def pick_cells(rng, rows, columns, least, most):
    """rows x columns bits with `least` to `most` of them on, so that the pattern is neither empty nor a solid block."""
    on = rng.permutation(rows * columns)[: rng.integers(least, most + 1)].tolist()
    return tuple(tuple(int(r * columns + c in on) for c in range(columns)) for r in range(rows))


def pick_emblem(rng):
    return pick_cells(rng, 4, 3, 4, 8)


def pick_pattern(rng):
    return pick_cells(rng, 4, 4, 5, 11)


def make_scene(rng, kind):
    """A scene in pastel colours, paler than any clothes, so that people always stand out.

    The ground and the distance have roughly the hue of the kind, so that one glance tells the word. Tone, sky, accent
    and layout are free.
    """
    own = KINDS.index(kind) / len(KINDS)
    hue = np.array([rng.random(), own, own + 0.06, rng.random()]) + rng.uniform(-0.05, 0.05, 4)
    saturation, value = rng.uniform(0.22, 0.42, 4), rng.uniform([0.9, 0.74, 0.58, 0.88], [0.98, 0.84, 0.7, 0.98])
    saturation[1:3] += 0.12
    k = (np.array([5.0, 3.0, 1.0]) + 6 * hue[:, None]) % 6  # the usual closed form of HSV -> RGB
    rgb = value[:, None] * (1 - saturation[:, None] * np.clip(np.minimum(k, 4 - k), 0, 1))
    return Scene(kind, tuple(map(tuple, (255 * rgb).astype(int).tolist())), tuple(rng.random(12).tolist()))


def make_character(rng, build):
    """A character with a light emblem on dark shirt colours or the reverse, so that the emblem is always legible."""
    skin = SKINS[rng.integers(len(SKINS))]
    cloth, ink = ((DARK, LIGHT), (LIGHT, DARK))[rng.integers(2)]
    first = pick_colour(rng, cloth)
    second = pick_colour(rng, cloth, (first,), 100)
    return Character(
        build=build,
        skin=skin,
        hair=HAIRS[rng.integers(len(HAIRS))],
        hair_colour=pick_colour(rng, HAIR_COLOURS, (skin,), 110),
        glasses=bool(rng.random() < 0.4),
        eyes=EYES[rng.integers(len(EYES))],
        mouth=MOUTHS[rng.integers(len(MOUTHS))],
        shirt=SHIRTS[rng.integers(len(SHIRTS))],
        shirt_colours=(first, second),
        emblem=pick_emblem(rng),
        emblem_colour=pick_colour(rng, ink, (first, second), 220),
        trousers=pick_colour(rng, DARK + LIGHT, (first, second)),
    )


def make_thing(rng, shape):
    """A thing of two distant colours, so that every cell counts."""
    first = pick_colour(rng, DARK + LIGHT)
    return Thing(shape, pick_pattern(rng), (first, pick_colour(rng, DARK + LIGHT, (first,), 240)))


def make_shot(rng, scene, character, thing, framing, new=False):
    """A shot with random slots. In a new scene the character walks, so that little of it stays hidden."""
    walk, slide = rng.integers(3, size=2).tolist(), rng.integers(3, size=2).tolist()
    free = [0, 1, 2]
    if character is not None and thing is not None:
        slide = [2 * (slide[0] // 2)] * 2  # the thing keeps to one side, the character to what is left
        other_side = 2 - slide[0]
        free = [other_side, 1] if framing == 0 else [other_side]  # the middle is too near in a close shot
        walk = [free[w % len(free)] for w in walk]
    if new and walk[0] == walk[1]:
        walk[1] = free[(free.index(walk[0]) + 1) % len(free)]
    return Shot(scene, character, thing, framing, tuple(walk), tuple(slide))


def order_introductions(rng, n_characters, n_things):
    """[(scene, character, thing)] of the three sections that introduce everything; None where one is absent."""
    extra = ((0, None), (None, 0), (0, 1))[rng.integers(3)]  # whom and what the third section shows, besides its scene
    columns = []
    for n, third in zip((n_characters, n_things), extra):
        numbers = (0, n - 1, third if third is None else third % n)
        columns.append([numbers[i] for i in rng.permutation(3)])
    return list(zip(range(3), *columns))


def choose_seen(rng, now, seen):
    """The next [scene, character, thing], all of them seen before. now: those of the last section.

    Those on screen often stay, which keeps the others away for long: that is what a memory is for.
    """
    chosen = []
    for number, numbers, stay in zip(now, seen, (0.3, 0.6, 0.4)):
        if number is not None and rng.random() < stay:
            chosen.append(number)
        else:
            chosen.append(numbers[int(len(numbers) * rng.random() ** 2)] if numbers else None)
    content = rng.random()
    if None not in chosen and content < 0.45:
        chosen[2 if content < 0.25 else 1] = None
    return chosen


def make_story(seed, sections=11):
    """seed -> Story. A longer story of the same seed begins with the shots of the shorter one.

    Three of the sections 0..3 introduce everything, each in a new scene and in wide framing. The fourth, and every
    section after them, shows only what was shown before: it is askable. Half of the stories have a single character and
    half a single thing, because recalling the only one is easier than telling two apart.
    """
    rng = np.random.default_rng(seed)
    scenes = tuple(make_scene(rng, KINDS[i]) for i in rng.permutation(len(KINDS))[:3])
    n_characters, n_things = rng.integers(1, 3, size=2).tolist()
    characters = tuple(make_character(rng, BUILDS[i]) for i in rng.permutation(len(BUILDS))[:n_characters])
    things = tuple(make_thing(rng, SHAPES[i]) for i in rng.permutation(len(SHAPES))[:n_things])
    early = (1, 2, 3, 3)[rng.integers(4)]  # the one of the sections 0..3 that introduces nothing
    introductions = order_introductions(rng, n_characters, n_things)
    seen, shots = ([], [], []), []  # scenes, characters, things seen so far: longest absent first
    now = None
    for k in range(sections):
        new, framing = k < 4 and k != early, int(rng.integers(len(FRAMINGS)))
        now = introductions.pop(0) if new else choose_seen(rng, now, seen)
        for numbers, number in zip(seen, now):
            if number in numbers:
                numbers.remove(number)
            if number is not None:
                numbers.append(number)
        shots.append(make_shot(rng, *now, 0 if new else framing, new))
    return Story(scenes, characters, things, tuple(shots))
