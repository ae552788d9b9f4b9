"""The scores of the paper-doll world (dolls/scores.py) on pictures whose scores are known."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dolls import scores
from dolls.drawing import render
from dolls.stories import Shot, make_character, make_scene, make_story, make_thing, world_seed
from tests.common import DCTCodec
from util.video import to_frames, to_pixels

OTHER_WORLDS = 12


def held_out_story(i):
    return make_story(world_seed("held-out", i), 13)


def true_sections(stories, first=10, count=3):
    """uint8 (n, S, F, H, W, 3)."""
    drawn = [torch.from_numpy(render(story, range(first, first + count))[0]) for story in stories]
    return torch.stack([frames.unflatten(0, (count, 4)) for frames in drawn])


def other_world(story, seed):
    """The same captions, with another look of everything."""
    rng = np.random.default_rng(10**6 + seed)
    scenes = tuple(make_scene(rng, x.kind) for x in story.scenes)
    characters = tuple(make_character(rng, x.build) for x in story.characters)
    things = tuple(make_thing(rng, x.shape) for x in story.things)
    return dataclasses.replace(story, scenes=scenes, characters=characters, things=things)


def distort(truth):
    """{what was done: frames} of true sections: encoded and decoded, shifted, blurred."""
    flat, codec = to_pixels(truth.flatten(0, 1)), DCTCodec()
    shifted = F.pad(flat.flatten(0, 1), (2, 0, 0, 2), mode="replicate")[..., 2:, :-2]
    blurred = F.avg_pool2d(flat.flatten(0, 1), 9, 1, 4, count_include_pad=False)
    made = {"codec": codec.decode(codec.encode(flat)), "shifted": shifted, "blurred": blurred}
    return {name: to_frames(x.reshape(flat.shape)).view(truth.shape) for name, x in made.items()}


@pytest.fixture(scope="module")
def known_scores():
    """{pictures: {score: mean over what counts}} of pictures with known scores; 4 stories, 3 sections each."""
    stories = [held_out_story(i) for i in range(4)]
    truth = true_sections(stories)
    others = [true_sections([other_world(s, 100 * i + k) for i, s in enumerate(stories)]) for k in range(OTHER_WORLDS)]
    pictures = {"truth": truth, **distort(truth)}
    for share in 0.3, 0.5, 0.7:
        pictures[f"faded {share}"] = (share * truth + (1 - share) * others[0].float()).round().to(torch.uint8)
    pictures["grey"] = torch.full_like(truth, 128)
    pictures["mean"] = torch.stack(others).float().mean(0).round().to(torch.uint8)
    found = scores.score(torch.stack([*pictures.values(), *others]), stories, 10)
    means = {name: {k: x[r].nanmean().item() for k, x in found.items()} for r, name in enumerate(pictures)}
    return means | {"others": {k: x[len(pictures) :].nanmean().item() for k, x in found.items()}}


@pytest.mark.parametrize("name", ("truth", "codec", "shifted"))
def test_the_truth_is_right(known_scores, name):
    found = known_scores[name]
    assert all(found[score] == 100 for score in scores.SCORES)
    if name == "shifted":
        assert found["position_error"] == pytest.approx(8**0.5, abs=0.5)  # some stand at the edge
    else:
        assert found["position_error"] == 0
    if name == "truth":
        assert found["psnr"] == 100


def test_another_world_scores_at_chance(known_scores):
    """About 140 decisions per score, which are not independent. The prompt is obeyed: its words fix the kind of
    place."""
    found = known_scores["others"]
    assert all(1 < found[name] < 14 for name in scores.SCORES if name != "obeys")
    assert found["obeys"] > 50


@pytest.mark.parametrize("name", ("grey", "mean"))
def test_nothing_and_a_bit_of_everything_are_nearest_to_no_truth(known_scores, name):
    assert np.mean([known_scores[name][score] for score in scores.MAIN]) < 20  # 40 decisions


def test_psnr_likes_a_mean_of_other_worlds(known_scores):
    """It does not measure memory."""
    assert known_scores["mean"]["psnr"] > known_scores["others"]["psnr"] + 1


def test_what_is_half_right_scores_between(known_scores):
    """What fades into another world, or is blurred, is worse than the truth and better than a guess. Cells of 4 pixels
    suffer more from a blur of 9 than colours do."""
    mean = {name: np.mean([found[score] for score in scores.MAIN]) for name, found in known_scores.items()}
    assert mean["others"] + 4 < mean["faded 0.3"] < mean["faded 0.5"] < mean["faded 0.7"] < mean["truth"]
    assert mean["others"] + 10 < mean["blurred"] < 95
    blurred = known_scores["blurred"]
    assert 10 < blurred["cloth_hard"] < blurred["cloth"] and 10 < blurred["object_hard"] < blurred["object"]


# ---------------------------------------------------------------------------------------------------------------------
# Candidates

PARTS = {"character": ["cloth", "face"], "thing": ["object"], "scene": ["scene"]}


def full_shot():
    """(story, number of its first section with a character and a thing)."""
    story = held_out_story(3)
    return story, next(k for k, s in enumerate(story.shots) if None not in (s.character, s.thing))


@pytest.mark.parametrize("field", PARTS)
def test_candidates_share_the_caption(field):
    story, k = full_shot()
    truth = getattr(story, f"{field}s")[getattr(story.shots[k], field)]
    found = scores.candidates(field, truth)
    assert found[0] == truth and len(set(found)) == len(found) == (16 if field == "scene" else 31)
    parade = scores.substitute_each(story, story.shots[k], field, found)
    assert {parade.caption(i) for i in range(len(found))} == {story.caption(k)}
    assert render(parade, [0])[0].tobytes() == render(story, [k])[0].tobytes()  # the truth is drawn as in the story
    scores.candidates.cache_clear()
    assert scores.candidates(field, truth) == found


@pytest.mark.parametrize("field, hard", [("character", ""), ("thing", ""), ("scene", ""), *zip(PARTS, ["_hard"] * 2)])
def test_candidates_lie_apart(field, hard):
    story, k = full_shot()
    truth = getattr(story, f"{field}s")[getattr(story.shots[k], field)]
    found = scores.candidates(field, truth)
    entities = (truth, *found[16:]) if hard else found[:16]
    parts = PARTS[field][:1] if hard else PARTS[field]
    for part, d in scores.pairwise_distances(field, parts, entities).items():
        assert d.diagonal().max() < 0.01
        assert d.fill_diagonal_(1).min() >= scores.MIN_DISTANCE[part + hard]


def test_hard_candidates_have_the_palette_of_the_truth():
    story, k = full_shot()
    who, *others = scores.candidates("character", story.characters[story.shots[k].character])
    assert all(x == dataclasses.replace(who, shirt=x.shirt, emblem=x.emblem) for x in others[15:])
    what, *others = scores.candidates("thing", story.things[story.shots[k].thing])
    assert all(x == dataclasses.replace(what, cells=x.cells) for x in others[15:])


# ---------------------------------------------------------------------------------------------------------------------
# Positions, and what counts


def test_position_error_is_how_far_the_character_was_moved():
    story, shot = held_out_story(3), Shot(0, 0, None, 0, (1, 1), (1, 1))
    true, masks = scores.render_tensors(dataclasses.replace(story, shots=(shot,)))
    nobody = dataclasses.replace(shot, character=None)
    empty = scores.render_tensors(dataclasses.replace(story, shots=(nobody,)))[0]
    person, moves = ~masks["scene"], [(0, 0), (0, 7), (-3, 0), (0, -12), (-4, 3)]
    moved = [torch.where(person.roll(by, (1, 2))[:, None], true.roll(by, (2, 3)), empty) for by in moves]
    found = scores.position_error(torch.stack(moved), true, person)
    assert found.tolist() == [math.hypot(*by) for by in moves]


def test_what_a_section_does_not_show_is_not_scored():
    story = held_out_story(0)
    bare = dataclasses.replace(story, shots=tuple(dataclasses.replace(s, character=None) for s in story.shots))
    found = scores.score(true_sections([bare], 10, 1)[None], [bare], 10)
    assert all(found[name].isnan().all() for name in ("cloth", "cloth_hard", "identity", "position_error"))
    assert found["scene"].item() == 100


SHOT = Shot(0, 0, None, 0, (1, 1), (1, 1))
EMPTY, NEAR = dataclasses.replace(SHOT, character=None), dataclasses.replace(SHOT, framing=1)


@pytest.mark.parametrize(
    "before, counts",
    [
        ([SHOT, *[EMPTY] * 9], True),
        ([SHOT, *[EMPTY] * 10], False),  # it has left the memory
        ([*[EMPTY] * 9, NEAR], False),  # it was never shown whole
    ],
)
def test_what_the_memory_cannot_hold_is_not_scored(before, counts):
    story, k = dataclasses.replace(held_out_story(3), shots=(*before, SHOT)), len(before)
    found = scores.score_section(true_sections([story], k, 1)[0], story, k, k - 10)
    assert [name in found for name in ("cloth", "identity", "psnr")] == [counts] * 3
    assert found["scene"] == 100
