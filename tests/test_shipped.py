"""The shipped weights."""

import dataclasses

import pytest
import torch

from bases import open_base
from data import story_clips
from dolls import scores
from encoder import load_model
from eval import psnr
from sample import sample
from tests.common import ROOT, randn
from util.video import to_frames
from util.weights import read_config

SHIPPED = ROOT / "checkpoints" / "nano.safetensors"
pytestmark = pytest.mark.skipif(not SHIPPED.is_file(), reason="needs checkpoints/nano.safetensors")


def encode_memory(base, model, clips):
    """φ of the first 40 frames of clips."""
    high, low = (torch.cat(x) for x in zip(*(clip.history(0, 40, model.encoder, base.codec) for clip in clips)))
    return model.encoder.encode(high, low)


@torch.no_grad()
def test_the_model_remembers_and_obeys(tmp_path):
    """The next section of 8 held-out stories: better with the memory of its own story than with another's or none, and
    in the place that the prompt asks for."""
    base, config = open_base("nano"), read_config(SHIPPED)
    model = load_model(SHIPPED, base)
    assert config["stage"] == "finetune" and config["preset"] == "nano"
    clips = story_clips("held-out", 8, base, tmp_path, model.encoder.low_rate, keep_pixels=True).clips
    truth = torch.stack([clip.pixels[40:44] for clip in clips])
    text = torch.stack([base.prompts(clip.prompt(40)) for clip in clips])
    noise, times, found = randn(8, 16, 4, 16, 16), torch.arange(40, 44), {}
    for name, history in ("right", clips), ("wrong", clips[-1:] + clips[:-1]), ("none", None):
        memory = None if history is None else encode_memory(base, model, history)
        frames = to_frames(base.codec.decode(sample(model.dit, noise, text, times, memory, steps=10)))
        found[name] = psnr(frames, truth).mean().item()
        if name == "right":  # the place asked for, not another of the story
            scored = scores.score(frames[None, :, None], [clip.story for clip in clips], 10)
            assert scored["obeys"].mean() >= 75, scored["obeys"]
    assert found["right"] > max(found["wrong"], found["none"]) + 8, found


@torch.no_grad()
def test_the_model_shows_what_the_prompt_asks_for(tmp_path):
    """After the same history, every scene of the story in either framing: what is generated is nearest to the one that
    was asked for, of the six."""
    base = open_base("nano")
    model = load_model(SHIPPED, base)
    noise, times, right = randn(1, 16, 4, 16, 16).expand(6, -1, -1, -1, -1), torch.arange(40, 44), []
    for clip in story_clips("held-out", 4, base, tmp_path, model.encoder.low_rate).clips:
        tokens, positions = encode_memory(base, model, [clip])
        *shots, last = clip.story.shots[:11]
        choices = [dict(scene=scene, framing=framing) for scene in range(3) for framing in range(2)]
        asked = [
            dataclasses.replace(clip.story, shots=(*shots, dataclasses.replace(last, **choice))) for choice in choices
        ]
        text = torch.stack([base.prompts(story.caption(10)) for story in asked])
        memory = tokens.expand(6, -1, -1), positions
        x = sample(model.dit, noise, text, times, memory, steps=10)
        made = to_frames(base.codec.decode(x)) / 255
        drawn = torch.stack([scores.render_tensors(story, [10], 4, (128, 128))[0] for story in asked])
        drawn = drawn.permute(0, 1, 3, 4, 2)  # (6, F, H, W, 3)
        distances = (made[:, None] - drawn).square().mean((2, 3, 4, 5))  # (6 made, 6 drawn)
        right += (distances.argmin(1) == torch.arange(6)).tolist()
    assert sum(right) >= 18, right  # of 24; chance is 4
