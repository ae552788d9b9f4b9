"""The paper-doll world: stories are determined by their seeds, pictures by captions and what is to be remembered."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from dolls import drawing
from dolls.drawing import draw_character, render
from dolls.stories import FRAMINGS, SLOTS, make_story, world_seed


def grow(mask, outside=False):
    """One pixel of dilation of bool (F, H, W)."""
    p = np.pad(mask, ((0, 0), (1, 1), (1, 1)), constant_values=outside)
    h, w = mask.shape[1:]
    return np.any([p[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=0)


def shrink(mask):
    return ~grow(~mask, True)


# ---------------------------------------------------------------------------------------------------------------------
# Stories


def test_a_story_is_determined_by_its_seed():
    for index in range(20):
        seed = world_seed("held-out", index)
        short, long = make_story(seed, 7), make_story(seed, 13)
        assert make_story(seed, 7) == short and short.shots == long.shots[:7] and short.scenes == long.scenes
        a, b = render(short), render(long, slice(2, 7))
        assert a[0][8:].tobytes() == b[0].tobytes() and all((a[1][m][8:] == b[1][m]).all() for m in a[1])


def test_stories_differ():
    assert {world_seed("train", i) for i in range(500)}.isdisjoint(world_seed("held-out", i) for i in range(500))
    assert len({render(make_story(s, 1))[0].tobytes() for s in range(50)}) == 50


def test_a_story_shows_everything_before_it_asks_for_it():
    early = []
    for seed in range(300):
        story = make_story(seed, 13)
        assert not story.askable(0) and all(story.askable(k) for k in range(4, 13))
        early.append(story.askable(1) or story.askable(2))
        for k, shot in enumerate(story.shots):
            for field in ("scene", "character", "thing"):
                before = [getattr(s, field) for s in story.shots[:k]]
                assert getattr(shot, field) is None or getattr(shot, field) in before or shot.framing == 0
            assert shot.character is not None or shot.thing is not None
    assert 0.35 < np.mean(early) < 0.65


def test_a_caption_has_a_fixed_place_for_each_role():
    for seed in range(100):
        story = make_story(seed, 13)
        for k, shot in enumerate(story.shots):
            words = story.caption(k).split()
            assert len(words) == 12 and words[0] == story.scenes[shot.scene].kind and words[1] == FRAMINGS[shot.framing]
            person = None if shot.character is None else story.characters[shot.character].build
            thing = None if shot.thing is None else story.things[shot.thing].shape
            assert words[2:4] == ([person, "person"] if person else ["nobody", "there"])
            assert words[7:9] == ["with", thing or "nothing"]
            for first, who, slots in (4, person, shot.walk), (9, thing, shot.slide):
                start, end = (SLOTS[slot] if who else "nowhere" for slot in slots)
                assert words[first : first + 3] == [start, "to", end]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def test_captions_fix_the_picture():
    """Same words and same entities, same picture; and the words do not depend on what has to be remembered."""
    for seed in range(40):
        story, pictures = make_story(seed, 40), {}
        frames = render(story)[0].reshape(40, 4, 64, 64, 3)
        for k in range(40):
            assert pictures.setdefault(story.caption(k), frames[k].tobytes()) == frames[k].tobytes()


def inverted(colours):
    return tuple(tuple(255 - v for v in colour) for colour in colours)


def changed(story, field, change):
    """Where the pictures change (F, H, W) when all entities of a field change, and the masks of before and after."""
    old, masks = render(story)
    new, after = render(dataclasses.replace(story, **{field: tuple(map(change, getattr(story, field)))}))
    return abs(old.astype(int) - new).max(-1), masks, after


def test_masks_agree_with_the_drawing():
    def other_shirt(who):
        return dataclasses.replace(who, shirt_colours=inverted(who.shirt_colours))

    def other_emblem(who):
        return dataclasses.replace(who, emblem=tuple(tuple(1 - bit for bit in row) for row in who.emblem))

    def other_colours(entity):
        return dataclasses.replace(entity, colours=inverted(entity.colours))

    for seed in range(30):
        story = make_story(seed)
        diff, masks, after = changed(story, "characters", other_shirt)
        assert not diff[~grow(masks["cloth"])].any() and (diff[masks["cloth"]] > 30).mean() > 0.3
        assert all((masks[m] == after[m]).all() for m in masks)
        diff, masks, _ = changed(story, "characters", other_emblem)
        assert not diff[~masks["cloth"]].any() and diff.any()
        diff, masks, _ = changed(story, "scenes", other_colours)
        # where two outlines meet in a corner, a trace of the scene shines through; elsewhere nothing does
        inside = diff[shrink(~masks["scene"])]
        assert inside.max() < 56 and (inside > 8).mean() < 0.02 and (diff[masks["scene"]] > 32).mean() > 0.9
        diff, masks, _ = changed(story, "things", other_colours)
        assert not diff[~grow(masks["object"])].any()
        assert (sum(masks[m].astype(int) for m in masks) <= 1).all()


@pytest.mark.parametrize("height, width, seeds", [(64, 64, range(150)), (128, 224, range(4)), (224, 128, range(4))])
def test_nothing_is_hidden(height, width, seeds):
    """People and things are whole (but for feet in closer framings), apart, and inside, at every size."""
    n = 4
    for seed in seeds:
        story = make_story(seed)
        bare = dataclasses.replace(story, shots=tuple(dataclasses.replace(s, character=None) for s in story.shots))
        masks = render(story, None, n, height, width)[1]
        alone = render(bare, None, n, height, width)[1]
        assert (masks["object"] == alone["object"]).all()  # nobody covers a thing
        ink = ~masks["scene"]
        assert not ink[:, :, [0, -1]].any() and not ink[:, 0].any()
        for k, shot in enumerate(story.shots):
            inside = slice(k * n, k * n + n)
            if shot.framing == 0 or shot.character is None:
                assert not ink[inside, -1].any()
            if shot.character is not None:
                assert (masks["face"][inside].sum((1, 2)) > 60).all()


def test_emblems_stand_out_from_shirts():
    for seed in range(200):
        for who in make_story(seed).characters:
            assert 4 <= sum(map(sum, who.emblem)) <= 8
            gap = [np.linalg.norm(np.subtract(who.emblem_colour, colour)) for colour in who.shirt_colours]
            assert min(gap) > 110, (seed, gap)


def test_each_cell_of_an_emblem_covers_36_pixels():
    """At 128 pixels: three units by three."""
    who, blank = make_story(199).characters[0], ((0, 0, 0),) * 4
    for cell in range(12):
        one = tuple(tuple(int(3 * r + c == cell) for c in range(3)) for r in range(4))
        a, b = (draw_character(dataclasses.replace(who, emblem=e), 2.0).rgba[0] for e in (one, blank))
        assert (abs(a - b).max(-1) > 20).sum() == 36


def test_everything_is_drawn_once_and_then_pasted(monkeypatch):
    """That is why a story takes milliseconds: scenes once, people and things once per framing."""
    drawn = Counter()

    def count(name, draw):
        def counted(entity, *args):
            drawn[name, entity] += 1
            return draw(entity, *args)

        monkeypatch.setattr(drawing, name, counted)

    for name in ("draw_scene", "draw_character", "draw_thing"):
        count(name, getattr(drawing, name))
    story = make_story(3, 40)
    render(story)
    scenes = {("draw_scene", scene): 1 for scene in story.scenes}
    people = {("draw_character", who): len(FRAMINGS) for who in story.characters}
    things = {("draw_thing", what): len(FRAMINGS) for what in story.things}
    assert drawn == scenes | people | things
