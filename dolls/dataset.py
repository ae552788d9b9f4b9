"""Stories as clips to train on: drawn, encoded and cached."""

import hashlib
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from dolls.drawing import render
from dolls.stories import BUILDS, CAPTION_WORDS, FRAMINGS, KINDS, SHAPES, SLOTS, make_story, world_seed
from util.cli import UserError
from util.files import atomic_write, check_writable
from util.video import to_pixels
from util.weights import open_safetensors

# Raise it whenever a story or its picture changes (stories.py, drawing.py): cached latents are then made again.
WORLD_VERSION = 1
HISTORY_SECTIONS = 10  # sections of a story that serve as history
STORY_SECTIONS = 13  # with three more to continue them
UNKNOWN_WORDS = (
    "this model has never seen {}; it knows captions like "
    '"beach wide tall person left to right with ball nowhere to nowhere"'
)


def story_pixels(split, index, base):
    """A Story and its frames, uint8 (F, H, W, 3), at the first size of a base."""
    story = make_story(world_seed(split, index), STORY_SECTIONS)
    return story, render(story, None, base.section, *base.sizes[0])[0]


def encode_story(split, index, base, rate=None):
    """Latents (C, F, h, w) float16 of a story, or of the smaller video of this rate."""
    pixels = to_pixels(story_pixels(split, index, base)[1])[None]
    return (base.codec.encode_low(pixels, rate) if rate else base.codec.encode(pixels))[0].half()


def load_latents(split, count, base, cache, rate=None):
    """encode_story() of the first stories of a split, (count, C, F, h, w), drawn and encoded unless they are cached.

    The name of the cache file depends on everything the latents depend on. Raises UserError if the file is damaged.
    """
    settings = (WORLD_VERSION, base.sizes[0], base.section, base.codec.settings, STORY_SECTIONS, rate and rate[1:])
    digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:12]
    path = Path(cache) / f"world-{split}-{count}-{digest}.safetensors"
    if not path.exists():
        check_writable(path)
        stories = tqdm(range(count), desc=f"drawing {split} stories" + ", smaller" * bool(rate))
        latents = [encode_story(split, i, base, rate) for i in stories]
        with atomic_write(path, replace=True) as part:
            save_file({"latents": torch.stack(latents)}, part)
    try:
        with open_safetensors(path) as f:
            return f.get_tensor("latents")
    except (UserError, SafetensorError):
        raise UserError(f"{path} is damaged: delete it, then it is made again") from None


def load_stories(split, count, base, cache, rate=None, keep_pixels=False):
    """The first `count` stories of a split ("train" or "held-out"), one dict per story:

    latents (C, F, h, w) float16; low, the same of the smaller video, if a rate (t, h, w) is given; storyboard [(first
    latent frame, prompt)]; pixels uint8 (F, H, W, 3), or None unless keep_pixels; story, the Story.
    """
    clips = []
    lows = load_latents(split, count, base, cache, rate) if rate else [None] * count
    for i, latents in enumerate(load_latents(split, count, base, cache)):
        story = make_story(world_seed(split, i), STORY_SECTIONS)
        storyboard = [(k * base.section, story.caption(k)) for k in range(STORY_SECTIONS)]
        pixels = torch.from_numpy(story_pixels(split, i, base)[1]) if keep_pixels else None
        clips.append(dict(latents=latents, low=lows[i], storyboard=storyboard, pixels=pixels, story=story))
    return clips


def unknown_words(prompts):
    """The words of some prompts that are in no caption, in order, without duplicates; UNKNOWN_WORDS is the warning.

    A model trained on stories alone has never seen them.
    """
    known = {*KINDS, *FRAMINGS, *BUILDS, *SHAPES, *SLOTS, *CAPTION_WORDS}
    words = dict.fromkeys(word for prompt in prompts for word in re.findall(r"\w+", prompt.lower()))
    return [word for word in words if word not in known]
