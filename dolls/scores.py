"""Does a section show the right clothes, face, thing and scene? (Paper, section 4.)

The paper's judge is a vision-language model; in the paper-doll world the truth is known, so it is measured exactly.

A section is right if the true rendering is the nearest of 16 by mean squared error, at the best shift of a few pixels.
Only the region of the true mask, without its rim, counts (for faces: wherever any of the 16 has a head). All 16 agree
with the caption (build, shape, kind, positions): only memory can tell which one is right.

    scores = score(made, stories, first)        of one model, or of several side by side
"""

import functools
import hashlib
import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from dolls.drawing import render
from dolls.stories import SHIRTS, Shot, make_character, make_scene, make_story, make_thing, pick_emblem, pick_pattern

SHIFT = 4  # pixels: how far a frame may lie from its true position, in each direction
OTHERS = 15  # distractors in a set
# The least root mean squared difference between any two candidates of a set, for values in [0, 1], in a wide shot. At
# most about 1 % of random pairs are nearer, and many of those are equal: there are few skins, haircuts and emblems.
MIN_DISTANCE = {"cloth": 0.2, "face": 0.06, "object": 0.15, "scene": 0.06, "cloth_hard": 0.12, "object_hard": 0.12}
# score: (region, indices of the candidates to decide among); the first is the truth. `hard`: the same palette with
# other emblems and patterns. `obeys`: the scene of the caption against the other scenes of the story.
SCORES = {
    "cloth": ("cloth", range(16)),
    "identity": ("face", range(16)),
    "object": ("object", range(16)),
    "scene": ("scene", range(16)),
    "cloth_hard": ("cloth", [0, *range(16, 31)]),
    "object_hard": ("object", [0, *range(16, 31)]),
    "obeys": ("scene", [0, 16, 17]),
}
MAIN = ("cloth", "identity", "object", "scene")  # "consistency" is their mean
PARTS = {"character": ("cloth", "face"), "thing": ("object",), "scene": ("scene",)}  # what is scored of each


# ---------------------------------------------------------------------------------------------------------------------
# Distances


def erode(mask):
    """bool (F, H, W) without the pixels that touch its outside; beyond the frame does not count as outside."""
    return F.max_pool2d((~mask).float(), 3, 1, 1) == 0


def squared_differences(frames, wanted, mask):
    """Sums (R, K, down, across) of squared differences inside a mask, at every position where it fits into the frames.

    frames: (R, 3, H, W); wanted: (K, 3, h, w); mask: (h, w).
    """
    mask = mask.float()
    wanted = mask * wanted
    energy = F.conv2d(frames.square().sum(1, keepdim=True), mask[None, None])
    return energy - 2 * F.conv2d(frames, wanted) + wanted.square().sum((1, 2, 3))[:, None, None]


def bounding_box(mask):
    """(rows, columns), slices, of the smallest box around a mask (H, W)."""
    return tuple(slice(int(on[0]), int(on[-1]) + 1) for on in (mask.any(1).nonzero(), mask.any(0).nonzero()))


def distances(frames, candidates, region):
    """Mean squared differences (R, K) between frames and candidates in a region.

    Each frame is shifted by up to SHIFT pixels to where it fits a candidate best: position_error() measures positions.
    Beyond its edges a frame repeats its outermost pixels.

    frames: (R, F, 3, H, W) in [0, 1]; candidates: (K, F, 3, H, W) in [0, 1]; region: bool (F, H, W).
    """
    total, area = 0, region.sum()
    for f, mask in enumerate(region):
        y, x = bounding_box(mask) if mask.any() else (slice(1), slice(1))  # a part may be too small in some frames
        near = F.pad(frames[:, f], (SHIFT,) * 4, mode="replicate")
        near = near[..., y.start : y.stop + 2 * SHIFT, x.start : x.stop + 2 * SHIFT]
        total = total + squared_differences(near, candidates[:, f, :, y, x], mask[y, x]).flatten(2).amin(2)
    return total.clamp(min=0) / (3 * area)


def position_error(frames, truth, person):
    """How far the character is from its true position: pixels, mean over frames, (R,).

    The best match of the whole character is searched in the whole frame.

    frames: (R, F, 3, H, W); truth: (F, 3, H, W); person: the mask of the character, (F, H, W).
    """
    errors = []
    for f, mask in enumerate(person):
        y, x = bounding_box(mask)
        found = squared_differences(frames[:, f], truth[None, f, :, y, x], mask[y, x])  # (R, 1, down, across)
        best, across = found.flatten(1).argmin(1), found.shape[3]
        errors.append(torch.hypot((best // across - y.start).float(), (best % across - x.start).float()))
    return torch.stack(errors).mean(0)


def mean_psnr(frames, truth):
    """PSNR in dB, mean over frames, (R,); 100 if equal. frames: (R, F, 3, H, W) in [0, 1]; truth: (F, 3, H, W)."""
    mse = (255 * frames - 255 * truth).square().flatten(-3).mean(-1)
    return (10 * torch.log10(255**2 / mse)).clamp(max=100).mean(1)


# ---------------------------------------------------------------------------------------------------------------------
# Candidates


def render_tensors(story, sections=None, frames=4, size=(64, 64)):
    """render() as tensors: frames (F, 3, H, W) in [0, 1], and masks."""
    pixels, masks = render(story, sections, frames, *size)
    masks = {name: torch.from_numpy(mask) for name, mask in masks.items()}
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255, masks


def substitute_each(story, shot, field, entities):
    """A story that repeats a shot for each entity, which replaces the shot's character, thing or scene (`field`)."""
    shots = tuple(replace(shot, **{field: i}) for i in range(len(entities)))
    return replace(story, shots=shots, **{f"{field}s": tuple(entities)})


def pairwise_distances(field, parts, entities):
    """Root mean squared differences {part: (K, K)} between candidates in a wide shot, as distances() compares them.

    Only every fourth pixel of a scene is compared.
    """
    shot = Shot(0, 0 if field == "character" else None, 0 if field == "thing" else None, 0, (1, 1), (1, 1))
    frames, masks = render_tensors(substitute_each(make_story(0, 1), shot, field, entities), frames=1)
    regions = {part: erode(masks[part][:1]) for part in parts}
    if field == "scene":
        regions["scene"][:, 1::2], regions["scene"][:, :, 1::2] = False, False
    return {part: distances(frames[:, None], frames[:, None], region).sqrt() for part, region in regions.items()}


def draw_distractors(field, truth, make, least):
    """OTHERS distractors from make(); no two of them, and none and the truth, are nearer than least {part: distance}.

    A set with a pair that is too near is redrawn completely. The truth thus gets no more room than the others, and a
    guess is right in 1 of 16 cases.
    """
    while True:
        entities = truth, *(make() for _ in range(OTHERS))
        if len(set(entities)) < len(entities):
            continue
        pairs = pairwise_distances(field, least, entities)
        if all(pairs[part].fill_diagonal_(1).min() >= least[part] for part in least):
            return entities[1:]


@functools.lru_cache(maxsize=64)
def candidates(field, truth):
    """The truth and 15 others that share its caption; of characters and things 15 more of the same palette.

    The truth is the seed.
    """
    rng = np.random.default_rng(list(hashlib.sha256(repr(truth).encode()).digest()))

    def others(make, **least):
        return draw_distractors(field, truth, make, least)

    def same_palette():
        if field == "thing":
            return replace(truth, cells=pick_pattern(rng))
        return replace(truth, shirt=SHIRTS[rng.integers(len(SHIRTS))], emblem=pick_emblem(rng))

    if field == "scene":
        return truth, *others(lambda: make_scene(rng, truth.kind), scene=MIN_DISTANCE["scene"])
    if field == "thing":
        easy = others(lambda: make_thing(rng, truth.shape), object=MIN_DISTANCE["object"])
        return truth, *easy, *others(same_palette, object=MIN_DISTANCE["object_hard"])
    least = {part: MIN_DISTANCE[part] for part in ("cloth", "face")}
    easy = others(lambda: make_character(rng, truth.build), **least)
    return truth, *easy, *others(same_palette, cloth=MIN_DISTANCE["cloth_hard"])


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def score_field(x, story, shot, field):
    """{score: (R,)} of the character, thing or scene (`field`) of a shot. x: (R, F, 3, H, W) in [0, 1]."""
    n, size, index, entities = x.shape[1], x.shape[3:], getattr(shot, field), getattr(story, f"{field}s")
    compared = candidates(field, entities[index])
    if field == "scene":
        compared += entities[:index] + entities[index + 1 :]
    drawn, masks = render_tensors(substitute_each(story, shot, field, compared), None, n, size)
    drawn = drawn.unflatten(0, (len(compared), n))  # (K, F, 3, H, W)
    # The hair changes the outline of a head. The region is wherever any of the 16 has one; otherwise larger hair than
    # the true one would cost nothing.
    masks["face"] = masks["face"].unflatten(0, (len(compared), n))[: 1 + OTHERS].any(0)
    regions = {part: erode(masks[part][:n]) for part in PARTS[field]}
    far = {part: distances(x, drawn, region) for part, region in regions.items() if region.any()}
    found = {}
    for name, (part, among) in SCORES.items():
        if part in far:
            found[name] = 100.0 * (far[part][:, among[0]] < far[part][:, among[1:]].amin(1))
    if field == "character":
        found["position_error"] = position_error(x, drawn[0], ~(masks["object"] | masks["scene"])[:n])
    return found


def score_section(frames, story, k, since=0):
    """Scores {name: (R,)} of R renderings of section k, frames uint8 (R, F, H, W, 3).

    SCORES are 100 if right and 0 if not, position_error is in pixels, psnr in dB. Scores of what the section does not
    show are left out, and so are those of what sections since..k-1 never showed completely: nothing that is still
    remembered tells how it looks.
    """
    shot, x, found = story.shots[k], frames.permute(0, 1, 4, 2, 3) / 255, {}
    for field in PARTS:
        known = [getattr(s, field) for s in story.shots[since:k] if s.framing == 0]
        if getattr(shot, field) is not None and getattr(shot, field) in known:
            found |= score_field(x, story, shot, field)
    if story.askable(k, since):  # otherwise there is no single right continuation
        found["psnr"] = mean_psnr(x, render_tensors(story, [k], frames.shape[1], frames.shape[2:4])[0])
    return found


def score(made, stories, first):
    """Scores {name: (R, n, S)} of what R models made of n stories; nan where a score does not count.

    made: uint8 (R, n, S, F, H, W, 3), S sections per story from number `first` on, each written after the `first`
    sections before it.
    """
    R, n, S = made.shape[:3]
    scores = {name: torch.full((R, n, S), math.nan) for name in (*SCORES, "position_error", "psnr")}
    for i, story in enumerate(tqdm(stories, desc="scoring")):
        for k in range(S):
            for name, values in score_section(made[:, i, k], story, first + k, k).items():
                scores[name][:, i, k] = values
    return scores
