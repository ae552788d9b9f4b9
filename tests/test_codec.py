"""The learned codec of nano and small, its shipped weights and its training."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from bases import codec as training
from bases import open_base
from bases.autoencoder import WEIGHTS, LearnedCodec
from dolls.dataset import story_pixels
from encoder import load_model
from eval import psnr
from model import DiT
from tests.common import greys, randn, run, stop_in_step, write_video
from util.cli import UserError
from util.device import compute_dtype
from util.files import shipped
from util.video import to_frames, to_pixels
from util.video_writer import VideoWriter
from util.weights import read_config


def test_the_shipped_codec_on_held_out_stories():
    """Sharp pictures, latents of unit variance; each frame is encoded alone, a region without the rest of the frame."""
    base, latents, found = open_base("nano"), [], []
    for i in range(6):
        pixels = torch.from_numpy(story_pixels("held-out", i, base)[1][::4])
        latents.append(base.codec.encode(to_pixels(pixels)[None]))
        again = to_frames(base.codec.decode(latents[-1]))[0]
        assert latents[-1].shape == (1, 16, 13, 16, 16) and again.shape == pixels.shape == (13, 128, 128, 3)
        found.append(psnr(again, pixels).mean())
    z = torch.cat(latents)
    assert np.mean(found) > 35 and z.mean((0, 2, 3, 4)).abs().max() < 0.5 and 0.7 < z.var() < 1.3
    alone = base.codec.encode(to_pixels(story_pixels("held-out", 5, base)[1][4:5])[None])
    assert (alone - latents[-1][:, :, 1:2]).abs().max() < 0.1


def test_a_checkpoint_names_its_codec_by_the_latents():
    """Another decoder for the same latents fits; another encoder is refused, for the model and for --init."""
    weights = load_file(shipped(WEIGHTS))
    for part in "decoder.0.weight", "encoder.1.weight":
        save_file(weights | {part: weights[part] * 1.01}, f"{part.split('.')[0]}.safetensors")
    ours, decoder, encoder = (open_base("nano", name) for name in ("", "decoder.safetensors", "encoder.safetensors"))
    trained = shipped("checkpoints/nano.safetensors")
    config = read_config(trained) | {"codec": ours.codec.identity}
    save_file(load_file(trained), "trained.safetensors", {"config": json.dumps(config)})
    for base in ours, decoder:
        load_model("trained.safetensors", base)
        base.load_dit(DiT(base.dit), "trained.safetensors")
    for load in load_model, lambda path, base: base.load_dit(DiT(base.dit), path):
        with pytest.raises(UserError, match="trained with another codec: give that one, --vae FILE"):
            load("trained.safetensors", encoder)


def test_a_frame_may_be_cut():
    """Far from the cut, latents are those of the whole picture."""
    codec, pixels = LearnedCodec(), randn(1, 3, 1, 128, 256).clamp(-1, 1)
    whole, cut = codec.encode(pixels), codec.encode(pixels[..., :128])
    assert (whole[..., :8] - cut[..., :8]).abs().max() < 0.1 < (whole[..., 15:16] - cut[..., 15:]).abs().max()


@pytest.mark.parametrize("rate", [(2, 4, 4), (1, 2, 2), (4, 2, 2)])
def test_low_is_the_smaller_video_through_the_codec(rate):
    """Means over areas, every t-th frame; piece by piece as all at once, and as a training cuts it out of a clip."""
    codec, (t, h, w) = LearnedCodec(), rate
    (_, y, x), pixels = codec.stride, randn(1, 3, 12, 96, 160).clamp(-1, 1)
    tolerance = 1e-5 if compute_dtype("cpu") == torch.float32 else 0.05
    blocks = pixels[:, :, ::t].unfold(3, h, h).unfold(4, w, w).mean((5, 6))  # (1, 3, 12 / t, 96 / h, 160 / w)
    padded = F.pad(blocks, (0, -blocks.shape[4] % x, 0, -blocks.shape[3] % y, 0, 0), mode="replicate")
    low, encode = codec.low_encoder(rate)(pixels), codec.low_encoder(rate)
    assert torch.allclose(low, codec.encode(padded), atol=tolerance) and low.std() > 0.1
    assert torch.allclose(torch.cat([encode(piece) for piece in pixels.split(4, dim=2)], dim=2), low, atol=tolerance)
    whole = codec.encode_low(pixels, rate)
    assert torch.allclose(codec.cut_low(whole, 0, 12, t), low, atol=tolerance)
    late = codec.low_encoder(rate)(pixels[:, :, 3:11])  # a history may begin anywhere
    assert torch.allclose(codec.cut_low(whole, 3, 11, t), late, atol=tolerance)


def train(*flags):
    run(training.main, "--stories", 2, "--batch", 2, "--save_every", 2, "--warmup", 1, "--device", "cpu", *flags)


def test_training_resumes_exactly_and_opens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "SIDE", 32)
    monkeypatch.setattr(training, "HELD_OUT", 2)
    write_video("videos/a.mp4", 20)
    write_video("videos/b.mp4", 20)
    given = "--steps", 4, "--videos", "videos", "--out"
    train(*given, "whole")
    stop_in_step(1, training, lambda: train(*given, "parts"))
    train(*given, "parts", "--resume")
    a, b = (load_file(f"{out}/model.safetensors") for out in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    log = [json.loads(line) for line in Path("parts/log.jsonl").read_text().splitlines()]
    assert len(log) == 4 and {"stories", "stories_0.2", "videos_448x256", "videos_448x256_0.2"} < log[-1].keys()
    assert Path("parts/preview_000004.png").is_file()
    train(*given, "decoder", "--init", "whole/codec.safetensors")
    whole, decoder = (load_file(f"{out}/codec.safetensors") for out in ("whole", "decoder"))
    assert all(torch.equal(whole[k], decoder[k]) != k.startswith("decoder.") for k in whole)
    mine, shipped = LearnedCodec("parts/codec.safetensors"), LearnedCodec()
    assert mine.settings != shipped.settings and decoder["decoder.0.weight"].dtype == torch.half
    pixels = randn(1, 3, 1, 32, 32).clamp(-1, 1)
    assert mine.encode(pixels).shape == (1, 16, 1, 4, 4)


def test_every_size_of_held_out_videos_is_measured_and_a_bad_file_skipped(monkeypatch, capsys):
    monkeypatch.setattr(training, "HELD_OUT", 1)
    for i in range(4):
        write_video(f"videos/{i}.mp4", 12)
    for name, height, width in ("wide", 36, 64), ("tall", 64, 36):
        with VideoWriter(f"videos/{name}.mp4", 2, height, width) as writer:
            writer.write(greys(12, height, width))
    Path("videos/bad.mp4").write_text("no video")
    config = training.CodecConfig(videos="videos", held="wide.mp4 tall.mp4", stories=1, out="run", device="cpu")
    _, stories, clips, held_out = training.setup(config)
    assert len(stories) == 13 and len(clips) == 4 and "skipped: videos/bad.mp4" in capsys.readouterr().err
    assert {name: x.shape[1:3] for name, x in held_out.items()} == {
        "stories": (128, 128),
        "videos_256x448": (256, 448),
        "videos_448x256": (448, 256),
    }


def test_bad_flags_are_refused(refused):
    for flag, value, why in (
        ("steps", 0, "at least 1"),
        ("noise", "nan", "at least 0"),
        ("noise", -1.0, "at least 0"),
        ("lr", 0.0, "above 0"),
        ("warmup", -1, "at least 0"),
        ("ema", 2.0, "at least 0 and at most 1"),
    ):
        assert f"--{flag} {value}: must be {why}" in refused(training.main, f"--{flag}={value}")
    write_video("videos/a.mp4", 20)
    given = "--videos", "videos", "--held", "b.mp4", "--out", "run"
    assert "--held b.mp4: --videos videos has no such file" in refused(training.main, *given)
