"""Stories as clips to train on: drawn, encoded and cached."""

import re
from pathlib import Path

import torch
from tqdm import tqdm

from dolls.drawing import render
from dolls.stories import BUILDS, CAPTION_WORDS, FRAMINGS, KINDS, SHAPES, SLOTS, make_story, world_seed
from util.latents import digest, encode_frames, load_or_make

# Raise it whenever a story or its picture changes (stories.py, drawing.py): cached latents are then made again.
WORLD_VERSION = 2
HISTORY_SECTIONS = 10  # sections of a story that serve as history
STORY_SECTIONS = 13  # with three more to continue them
UNKNOWN_WORDS = (
    "this model has never seen {}; it knows captions like "
    '"beach wide tall person left to right with ball nowhere to nowhere"'
)


def story_pixels(split, index, base, sections=STORY_SECTIONS):
    """A Story and its frames, uint8 (F, H, W, 3), at the first size of a base."""
    story = make_story(world_seed(split, index), sections)
    return story, render(story, None, base.section, *base.sizes[0])[0]


def load_latents(split, count, base, cache, rates, sections):
    """Latents (count, C, F, h, w) float16 of the first stories of a split for each of `rates`, see encode_frames();
    drawn and encoded unless they are cached under all that they depend on. Raises UserError if a file is damaged."""
    settings = WORLD_VERSION, base.sizes[0], base.section, base.codec.settings, sections

    def make(missing):
        numbers = tqdm(range(count), desc=f"drawing {split} stories")
        encoded = [encode_frames(story_pixels(split, i, base, sections)[1], base.codec, missing) for i in numbers]
        return [torch.stack(latents) for latents in zip(*encoded)]

    name = f"world-{split}-{count}"
    files = {rate: Path(cache) / f"{name}-{digest(settings, rate)[:12]}.safetensors" for rate in rates}
    return load_or_make(files, make)


def load_stories(split, count, base, cache, rate=None, keep_pixels=False, sections=STORY_SECTIONS):
    """The first `count` stories of a split ("train" or "held-out"), of so many sections, one dict per story:

    latents (C, F, h, w) float16; low, the same of the smaller video, if a rate (t, h, w) is given; storyboard [(first
    latent frame, prompt)]; pixels uint8 (F, H, W, 3), or None unless keep_pixels; story, the Story.
    """
    clips = []
    rows = zip(*load_latents(split, count, base, cache, [None, rate] if rate else [None], sections))
    for i, (latents, *low) in enumerate(rows):
        story = make_story(world_seed(split, i), sections)
        storyboard = [(k * base.section, story.caption(k)) for k in range(sections)]
        pixels = torch.from_numpy(story_pixels(split, i, base, sections)[1]) if keep_pixels else None
        clip = dict(latents=latents, storyboard=storyboard, pixels=pixels, story=story)
        clips.append(clip | dict(zip(["low"], low)))
    return clips


def unknown_words(prompts):
    """The words of some prompts that are in no caption, in order, without duplicates; UNKNOWN_WORDS is the warning.

    A model trained on stories alone has never seen them.
    """
    known = {*KINDS, *FRAMINGS, *BUILDS, *SHAPES, *SLOTS, *CAPTION_WORDS}
    words = dict.fromkeys(word for prompt in prompts for word in re.findall(r"\w+", prompt.lower()))
    return [word for word in words if word not in known]
