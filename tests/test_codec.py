"""The learned codec of small, and its training."""

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bases import codec, open_base
from bases.autoencoder import WEIGHTS, Autoencoder, LearnedCodec
from dolls.dataset import story_pixels
from eval import psnr
from tests.common import ROOT, listing, losses, randn, run, tiny_base, write_video
from util.video import to_frames, to_pixels


def train(*more):
    """A short training on small pictures."""
    given = ["--steps", 4, "--batch", 4, "--save_every", 2, "--warmup", 1, "--device", "cpu"]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(codec, "SIZE", 32)
        m.setattr(codec, "HELD_OUT", 2)
        run(codec.main, *given, *more)


def test_training_learns_and_resumes_exactly(monkeypatch):
    train("--out", "whole")
    previews = ["preview_000002.png", "preview_000004.png"]
    assert listing("whole") == ["codec.safetensors", "log.jsonl", "model.safetensors", *previews, "state.pt"]
    assert losses("whole")[-1] < losses("whole")[0]

    def interrupt(config, videos, step, real=codec.draw):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(config, videos, step)

    with monkeypatch.context() as m, pytest.raises(SystemExit) as stop:
        m.setattr(codec, "draw", interrupt)
        train("--out", "parts")
    assert stop.value.code == 130 and len(losses("parts")) < 4
    train("--out", "parts", "--resume")
    assert losses("parts") == losses("whole")
    whole, parts = (load_file(f"{name}/model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    shipped = load_file("whole/codec.safetensors")
    assert all(torch.equal(whole[name].half(), shipped[name]) for name in whole)
    assert LearnedCodec(path="whole/codec.safetensors").settings != LearnedCodec().settings


def test_training_on_videos(capsys):
    for i in range(3):
        write_video(Path("videos") / f"{i}.mp4", 10, i)
    train("--out", "run", "--data", "videos")
    assert "2 videos to train on, 1 held out" in capsys.readouterr().out and losses("run", "loss")[-1] > 0


def test_bad_flags_are_refused(refused):
    for key, value in dict(steps=0, batch=0, lr=-1, noise=-0.1, ema=2, warmup=-1, save_every=0).items():
        assert f"--{key}" in refused(codec.main, f"--{key}", value)


def test_latents_in_training_have_mean_0_and_variance_1():
    torch.manual_seed(0)
    model = Autoencoder()
    z = model.encode(randn(4, 3, 32, 32))
    assert z.shape == (4, 16, 4, 4) and model.decode(z).shape == (4, 3, 32, 32)
    assert z.mean((0, 2, 3)).abs().max() < 1e-5 and (z.var((0, 2, 3)) - 1).abs().max() < 1e-3


def test_the_shipped_codec_draws_stories():
    """Held-out stories at 128 x 128, with noise on the latents as a DiT would leave."""
    found, size = {}, (128, 128)
    base = tiny_base()
    base.sizes = (size,)
    shipped = LearnedCodec(path=ROOT / WEIGHTS)
    frames = torch.from_numpy(story_pixels("held-out", 0, base)[1][::4])
    latents = shipped.encode(to_pixels(frames)[None])
    assert latents.shape == (1, 16, 13, 16, 16) and 0.5 < latents.var() < 2 and latents.mean().abs() < 0.3
    for level in 0.0, 0.1, 0.2:
        made = to_frames(shipped.decode(latents + level * randn(*latents.shape)))[0]
        found[level] = psnr(made, frames).mean().item()
    assert found[0.0] > found[0.1] > found[0.2] > 24 and found[0.0] > 32, found


def test_frames_stand_alone_and_any_size_will_do():
    shipped, pixels = open_base("small").codec, randn(2, 3, 5, 40, 72).clamp(-1, 1)
    latents = shipped.encode(pixels)
    assert latents.shape == (2, 16, 5, 5, 9)
    assert torch.allclose(shipped.encode(pixels[1:, :, 3:4])[0, :, 0], latents[1, :, 3], atol=1e-5)
    assert shipped.decode(latents).shape == pixels.shape
