"""Does a section show the clothes, face, thing and place that it should? (Paper, section 4. Its judge is a
vision-language model, see judge.py; in the paper-doll world the truth is known, so it is measured exactly.)

A section is right if, inside the region that the true masks give (for faces: where any of the 16 has a head), less its
rim, the true rendering is the nearest of 16 by mean squared error, at the best shift of a few pixels. All 16 agree in
what the caption says (build, shape, kind, places): only memory can tell which it is.

    scores = score(made, stories, first)        of one model, or of many side by side
"""
import functools
import hashlib
import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import world
from codec import psnr

SHIFT = 4           # pixels: a frame may lie so far from where it should, in each direction
OTHERS = 15         # distractors of a set
# Of any two candidates of a set: the least root mean squared difference, of values in [0, 1], in a wide shot. About
# 1 % of random pairs or fewer are nearer, many of them equal: there are few skins, haircuts and emblems.
LEAST = {"cloth": 0.2, "face": 0.06, "object": 0.15, "scene": 0.06, "cloth_hard": 0.12, "object_hard": 0.12}
# score: (region, which of the candidates it is decided among); the first is the truth. `hard`: of the same palette,
# with other emblems and patterns. `obeys`: the place asked for, against the other places of the story.
SCORES = {"cloth": ("cloth", range(16)), "identity": ("face", range(16)), "object": ("object", range(16)),
          "scene": ("scene", range(16)), "cloth_hard": ("cloth", [0, *range(16, 31)]),
          "object_hard": ("object", [0, *range(16, 31)]), "obeys": ("scene", [0, 16, 17])}
MAIN = ("cloth", "identity", "object", "scene")         # "consistency" is their mean


def erode(mask):
    """bool (F, H, W) without the pixels that touch its outside; what is beyond the frame does not count as outside."""
    return F.max_pool2d((~mask).float(), 3, 1, 1) == 0


def mismatch(frames, wanted, mask):
    """Summed squared differences (R, K, down, across) of frames (R, 3, H, W) and each of wanted (K, 3, h, w) inside a
    mask (h, w), laid over the frames at every place where it fits."""
    mask = mask.float()
    wanted = mask * wanted
    return (F.conv2d(frames.square().sum(1, keepdim=True), mask[None, None]) - 2 * F.conv2d(frames, wanted)
            + wanted.square().sum((1, 2, 3))[:, None, None])


def box_around(mask):
    """(rows, columns), slices, of the smallest box around a mask (H, W)."""
    return tuple(slice(int(on[0]), int(on[-1]) + 1) for on in (mask.any(1).nonzero(), mask.any(0).nonzero()))


def distances(frames, candidates, region):
    """Mean squared differences (R, K) of frames (R, F, 3, H, W) and candidates (K, F, 3, H, W), values in [0, 1], in
    the region (F, H, W). For each frame and candidate, that of the best shift of the frame by up to SHIFT pixels:
    where things stand is another figure. Beyond its edges a frame goes on as it ends."""
    total, area = 0, region.sum()
    for f, mask in enumerate(region):
        y, x = box_around(mask) if mask.any() else (slice(1), slice(1))            # a part may be too small in a frame
        near = F.pad(frames[:, f], (SHIFT,) * 4, mode="replicate")[
            ..., y.start:y.stop + 2 * SHIFT, x.start:x.stop + 2 * SHIFT]
        total = total + mismatch(near, candidates[:, f, :, y, x], mask[y, x]).flatten(2).amin(2)
    return total.clamp(min=0) / (3 * area)


def position_error(frames, truth, person):
    """How far (pixels, mean over frames) the best match of the whole character, searched over the whole frame, lies
    from where it should: frames (R, F, 3, H, W), the true ones (F, 3, H, W), the character's mask (F, H, W) -> (R,)."""
    errors = []
    for f, mask in enumerate(person):
        y, x = box_around(mask)
        found = mismatch(frames[:, f], truth[None, f, :, y, x], mask[y, x])     # (R, 1, down, across)
        best, across = found.flatten(1).argmin(1), found.shape[3]
        errors.append(torch.hypot((best // across - y.start).float(), (best % across - x.start).float()))
    return torch.stack(errors).mean(0)


def draw(story, sections=None, frames=4, size=(64, 64)):
    """render() as tensors: frames (F, 3, H, W) in [0, 1], and masks."""
    pixels, masks = world.render(story, sections, frames, *size)
    masks = {name: torch.from_numpy(mask) for name, mask in masks.items()}
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255, masks


def parade(story, shot, field, entities):
    """The story of a shot for each entity, which takes the place of the shot's character, thing or scene."""
    shots = tuple(replace(shot, **{field: i}) for i in range(len(entities)))
    return replace(story, shots=shots, **{f"{field}s": tuple(entities)})


def apart(field, parts, entities):
    """Root mean squared differences {part: (K, K)} of these candidates as they are told apart, in a wide shot: in the
    region of the first, at the best shift. Of a scene every fourth pixel is looked at."""
    shot = world.Shot(0, 0 if field == "character" else None, 0 if field == "thing" else None, 0, (1, 1), (1, 1))
    frames, masks = draw(parade(world.make_story(0, 1), shot, field, entities), frames=1)
    regions = {part: erode(masks[part][:1]) for part in parts}
    if field == "scene":
        regions["scene"][:, 1::2], regions["scene"][:, :, 1::2] = False, False
    return {part: distances(frames[:, None], frames[:, None], region).sqrt() for part, region in regions.items()}


def draw_set(field, truth, make, least):
    """OTHERS distractors from make(), no two of them, nor one and the truth, nearer than least {part: distance}.

    A set that holds too near a pair is drawn anew as a whole: the truth gets no more room than the others, so that a
    guess is right in 1 of 16 cases."""
    while True:
        whole = truth, *(make() for _ in range(OTHERS))
        if len(set(whole)) == len(whole) and all(
                d.fill_diagonal_(1).min() >= least[part] for part, d in apart(field, least, whole).items()):
            return whole[1:]


@functools.lru_cache(maxsize=64)
def candidates(field, truth):
    """(truth, 15 others, of characters and things 15 more of the same palette), seeded by the truth. All are as its
    caption says."""
    rng = np.random.default_rng(list(hashlib.sha256(repr(truth).encode()).digest()))
    others = lambda make, **least: draw_set(field, truth, make, least)
    if field == "scene":
        return truth, *others(lambda: world.make_scene(rng, truth.kind), scene=LEAST["scene"])
    if field == "thing":
        return (truth, *others(lambda: world.make_thing(rng, truth.shape), object=LEAST["object"]),
                *others(lambda: replace(truth, cells=world.pick_cells(rng, 3, 3, 3, 6)), object=LEAST["object_hard"]))
    alike = lambda: replace(truth, shirt=world.SHIRTS[rng.integers(len(world.SHIRTS))],
                            emblem=world.pick_cells(rng, 3, 2, 2, 4))
    return (truth, *others(lambda: world.make_character(rng, truth.build), cloth=LEAST["cloth"], face=LEAST["face"]),
            *others(alike, cloth=LEAST["cloth_hard"]))


def score_section(frames, story, k, since=0):
    """{score: (R,)} of R pictures of section k, frames (R, F, H, W, 3) uint8: 100 if right, 0 if not; position_error,
    pixels; psnr, dB. A score of what the section does not show is left out, and so is one of what sections since..k-1
    never showed whole: nothing that is still remembered tells how it looks."""
    shot, n, found, x = story.shots[k], frames.shape[1], {}, frames.permute(0, 1, 4, 2, 3) / 255
    for field, parts in dict(character=("cloth", "face"), thing=("object",), scene=("scene",)).items():
        index, entities = getattr(shot, field), getattr(story, f"{field}s")
        if index is None or index not in [getattr(s, field) for s in story.shots[since:k] if s.framing == 0]:
            continue
        whole = candidates(field, entities[index])
        if field == "scene":
            whole += entities[:index] + entities[index + 1:]
        drawn, masks = draw(parade(story, shot, field, whole), None, n, frames.shape[2:4])
        drawn = drawn.unflatten(0, (len(whole), n))                             # (K, F, 3, H, W)
        # heads differ in outline, by their hair: look wherever any of the 16 has one, or larger hair than the true one
        # would cost nothing
        masks["face"] = masks["face"].unflatten(0, (len(whole), n))[:1 + OTHERS].any(0)
        regions = {part: erode(masks[part][:n]) for part in parts}
        far = {part: distances(x, drawn, region) for part, region in regions.items() if region.any()}
        for score, (part, among) in SCORES.items():
            if part in far:
                found[score] = 100.0 * (far[part][:, among[0]] < far[part][:, among[1:]].amin(1))
        if field == "character":
            found["position_error"] = position_error(x, drawn[0], ~(masks["object"] | masks["scene"])[:n])
    if world.askable(story, k, since):                              # else there is no one right continuation
        found["psnr"] = psnr(255 * x, 255 * draw(story, [k], n, frames.shape[2:4])[0]).mean(1)
    return found


def score(made, stories, first):
    """{score: (R, n, S)}, nan where it does not count, of what R models made of the n stories' sections from number
    `first` on: uint8 (R, n, S, F, H, W, 3). Each was written from the `first` sections before it."""
    R, n, S = made.shape[:3]
    scores = {name: torch.full((R, n, S), math.nan) for name in (*SCORES, "position_error", "psnr")}
    for i, story in enumerate(tqdm(stories, desc="scoring")):
        for k in range(S):
            for name, values in score_section(made[:, i, k], story, first + k, k).items():
                scores[name][:, i, k] = values
    return scores
