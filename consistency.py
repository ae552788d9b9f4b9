"""Table 2: does what follows keep the clothes, faces, things and places of the history? (Paper, section 4. Its judge is
a vision-language model, see judge.py; in the paper-doll world the truth is known, so it is measured exactly.)

    python eval.py table2 runs/t2/*       continue held-out stories with finished runs of finetune.py: a table, pictures
    python eval.py story runs/t2/*        a character leaves and returns: accuracy by seconds of absence

A section is right if, inside the region that the true masks give, the true rendering is the nearest of 16 by mean
squared error. All 16 agree in what the caption says (build, shape, kind, places): only memory can tell which it is.
"""
import csv
import functools
import hashlib
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import budget
import world
from data import STORY_SECTIONS, Clip, Clips, make_codec, psnr, to_frames, to_pixels, world_clips
from model import UserError, autocast, euler, get_preset
from pretrain import downsample, generator
from tables import (EvalConfig, Row, compare, draw_curves, first_seeds, interval, open_checkpoint, parse, plot, read_runs,
                    seed_spreads, sources, write_csv, write_seeds)
from video import VideoWriter, contact_sheet, contact_strip, whole_file

SHIFT = 4           # pixels: a frame may lie so far from where it should, in each direction
OTHERS = 15         # distractors of a set
# Of any two candidates of a set: the least root mean squared difference, of values in [0, 1], in a wide shot. About
# 1 % of random pairs are nearer, most of them equal (skins and hair have few values).
LEAST = {"cloth": 0.2, "face": 0.08, "object": 0.15, "scene": 0.06, "cloth_hard": 0.12, "object_hard": 0.12}
# score: (region, which of the candidates it is decided among); the first is the truth. `hard`: of the same palette,
# with other emblems and patterns. `obeys`: the place asked for, against the other places of the story.
SCORES = {"cloth": ("cloth", range(16)), "identity": ("face", range(16)), "object": ("object", range(16)),
          "scene": ("scene", range(16)), "cloth_hard": ("cloth", [0, *range(16, 31)]),
          "object_hard": ("object", [0, *range(16, 31)]), "obeys": ("scene", [0, 16, 17])}
MAIN = ("cloth", "identity", "object", "scene")         # "consistency" is their mean

# ---------------------------------------------------------------------------------------------------------------------
# The measure


def erode(mask):
    """bool (F, H, W) without the pixels that touch its outside; what is beyond the frame does not count as outside."""
    return F.max_pool2d((~mask).float(), 3, 1, 1) == 0


def distances(frames, candidates, region):
    """Mean squared differences (R, K) of frames (R, F, H, W, 3) and candidates (K, F, H, W, 3), values in [0, 1], within
    the region (F, H, W). For each frame and candidate, that of the best shift of the frame by up to SHIFT pixels: where
    things stand is another figure. Beyond its edges a frame goes on as it ends."""
    padded = F.pad(rearrange(frames, "r f h w c -> r (f c) h w"), (SHIFT,) * 4, mode="replicate")
    windows = padded.unflatten(1, (-1, 3)).unfold(3, 2 * SHIFT + 1, 1).unfold(4, 2 * SHIFT + 1, 1)
    total = 0
    for f, (y, x) in enumerate(mask.nonzero(as_tuple=True) for mask in region):
        shifted = windows[:, f, :, y, x].flatten(1, 2).flatten(2)               # (R, 3P, shifts)
        wanted = rearrange(candidates[:, f, y, x], "k p c -> k (c p)")
        squares = shifted.square().sum(1)[:, None] - 2 * wanted @ shifted + wanted.square().sum(1)[:, None]
        total = total + squares.amin(2)
    return total.clamp(min=0) / (3 * region.sum())


def position_error(frames, truth, person):
    """How far (pixels, mean over frames) the best match of the whole character, searched over the whole frame, lies from
    where it should: frames (R, F, H, W, 3), the true ones (F, H, W, 3) and the character's mask (F, H, W) -> (R,)."""
    errors = []
    for f, mask in enumerate(person):
        top, left = (int(mask.any(axis).nonzero()[0]) for axis in (1, 0))
        bottom, right = (int(mask.any(axis).nonzero()[-1]) + 1 for axis in (1, 0))
        box = slice(top, bottom), slice(left, right)
        mask, x = mask[box].expand(1, 3, -1, -1).float(), rearrange(frames[:, f], "r h w c -> r c h w")
        wanted = mask * truth[f][box].permute(2, 0, 1)
        squares = F.conv2d(x.square(), mask) - 2 * F.conv2d(x, wanted)          # (R, 1, places down, across)
        best, across = squares.flatten(1).argmin(1), squares.shape[3]
        errors.append(torch.hypot((best // across - top).float(), (best % across - left).float()))
    return torch.stack(errors).mean(0)


def draw(story, sections=None, frames=4, size=(64, 64)):
    """render() as tensors: frames (F, H, W, 3) in [0, 1], and masks."""
    pixels, masks = world.render(story, sections, frames, *size)
    return torch.from_numpy(pixels).float() / 255, {name: torch.from_numpy(mask) for name, mask in masks.items()}


def parade(story, shot, field, entities):
    """The story of one shot a candidate: each of the entities takes the place of the shot's character, thing or scene."""
    shots = tuple(replace(shot, **{field: i}) for i in range(len(entities)))
    return replace(story, shots=shots, **{f"{field}s": tuple(entities)})


def apart(field, part, entities):
    """Root mean squared differences (K, K) of a part of these candidates as they are told apart, in a wide shot: in the
    region of the first, at the best shift. Of a scene every fourth pixel is looked at."""
    shot = world.Shot(0, 0 if field == "character" else None, 0 if field == "thing" else None, 0, (1, 1), (1, 1))
    frames, masks = draw(parade(world.make_story(0, 1), shot, field, entities), frames=1)
    region = erode(masks[part][:1])
    if field == "scene":
        region[:, 1::2], region[:, :, 1::2] = False, False
    return distances(frames[:, None], frames[:, None], region).sqrt()


def draw_set(field, truth, make, least):
    """OTHERS distractors from make(), no two of them, nor one and the truth, nearer than least {part: distance}.

    A set that holds too near a pair is drawn anew as a whole: the truth gets no more room than the others, so that a
    guess is right in 1 of 16 cases."""
    while True:
        whole = truth, *(make() for _ in range(OTHERS))
        if all(apart(field, part, whole).fill_diagonal_(1).min() >= distance for part, distance in least.items()):
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


def score_section(frames, story, k):
    """{score: (R,)} of R pictures of section k, frames (R, F, H, W, 3) uint8: 100 if right, 0 if not; position_error,
    pixels; psnr, dB. A score of what the section does not show is left out."""
    shot, n, found, x = story.shots[k], frames.shape[1], {}, frames.float() / 255
    for field, parts in dict(character=("cloth", "face"), thing=("object",), scene=("scene",)).items():
        index, entities = getattr(shot, field), getattr(story, f"{field}s")
        if index is None:
            continue
        whole = candidates(field, entities[index])
        if field == "scene":
            whole += entities[:index] + entities[index + 1:]
        drawn, masks = draw(parade(story, shot, field, whole), None, n, frames.shape[2:4])
        drawn = drawn.unflatten(0, (len(whole), n))                             # (K, F, H, W, 3)
        regions = {part: erode(masks[part][:n]) for part in parts}
        far = {part: distances(x, drawn, region) for part, region in regions.items() if region.any()}
        for score, (part, among) in SCORES.items():
            if part in far:
                found[score] = 100.0 * (far[part][:, among[0]] < far[part][:, among[1:]].amin(1))
        if field == "character":
            found["position_error"] = position_error(x, drawn[0], ~(masks["object"] | masks["scene"])[:n])
    return found | {"psnr": psnr(frames, 255 * drawn[0]).mean(1)}


def score(made, stories, first):
    """{score: (R, n, S)}, nan where it does not count, of what R models made of the n stories' sections from number
    `first` on: uint8 (R, n, S, F, H, W, 3)."""
    R, n, S = made.shape[:3]
    scores = {name: torch.full((R, n, S), math.nan) for name in (*SCORES, "position_error", "psnr")}
    for i, story in enumerate(tqdm(stories, desc="scoring")):
        for k in range(S):
            for name, values in score_section(made[:, i, k], story, first + k).items():
                scores[name][:, i, k] = values
    return scores


# ---------------------------------------------------------------------------------------------------------------------
# Generating


@torch.no_grad()
def continue_stories(model, tools, clips, first, sections, config):
    """Write sections from number `first` on after all before, each appended to the history: uint8 (n, S, F, H, W, 3)."""
    preset, codec, device, made = tools.preset, tools.codec, next(model.parameters()).device, []
    for start in tqdm(range(0, len(clips), config.batch), desc=f"continuing, {model.method}"):
        rows = range(start, min(start + config.batch, len(clips)))
        hr = torch.cat([clips[row].cut(0, first * preset.section) for row in rows]).to(device)
        for k in range(first, first + sections):
            frames = k * preset.section + torch.arange(preset.section, device=device)
            shape = (1, *hr.shape[1:2], preset.section, *hr.shape[3:])
            noise = torch.cat([torch.randn(shape, generator=generator(config.seed, row, k)) for row in rows]).to(device)
            text = torch.cat([clips[row].text(k * preset.section, tools.prompts) for row in rows]).to(device)
            with autocast(device):
                memory = model.encode(hr, downsample(tools, hr))
                x = euler(model.dit, noise, text, frames, memory, config.steps, config.shift, config.guidance).float()
            hr = torch.cat([hr, x], dim=2)
        x = to_frames(codec.decode(hr[:, :, first * preset.section:])).cpu()
        made.append(x.unflatten(1, (sections, preset.section)))
    return torch.cat(made)
