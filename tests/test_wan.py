"""Wan 2.1 and 2.2: their VAEs, umT5, whole segments. The VAEs and umT5 are tiny and random, and need diffusers and
transformers."""

import json
import re
import shutil
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import finetune
import pretrain
import sample
from bases import open_base
from bases.nano import HashPrompts
from bases.umt5 import UMT5Prompts
from bases.wan import WanCodec
from bases.wan22 import Wan22Codec
from data import Clip, Clips
from encoder import MemoryDiT
from sample import Memory
from tests.common import SETTINGS, BlockCodec, randn, randomize, run, smaller, tiny_base, write_checkpoint
from util.cli import UserError
from util.device import autocast
from util.folder import copy_history
from util.video import read_video, to_frames


@pytest.fixture(params=["2.1", "2.2"])
def codec(request):
    version = {"2.1": (WanCodec, "vae"), "2.2": (Wan22Codec, "vae22")}[request.param]
    return version[0](request.getfixturevalue(version[1]))


@pytest.mark.optional
def test_the_vae_in_pieces_equals_the_whole(codec):
    C, height, width = codec.channels, 4 * codec.stride[1], 6 * codec.stride[2]
    pixels = randn(1, 3, 21, height, width).clamp(-1, 1)
    latents = codec.encode(pixels)
    mean, std = (torch.tensor(x).view(1, C, 1, 1, 1) for x in (codec.mean, codec.std))
    with torch.no_grad():
        theirs = codec.vae.encode(pixels).latent_dist.mode()
        whole = codec.vae.decode(theirs).sample
    assert latents.shape == (1, C, 6, 4, 6) and (latents * std + mean - theirs).abs().max() < 1e-4
    decode = codec.decoder()
    parts = [decode(part) for part in latents.split([1, 2, 3], dim=2)]
    assert [part.shape[2:] for part in parts] == [(n, height, width) for n in (1, 8, 12)]
    assert (torch.cat(parts, 2) - whole).abs().max() < 1e-4 and (codec.decode(latents) - whole).abs().max() < 1e-4
    assert (codec.decode(latents[:, :, 3:]) - whole[:, :, 9:10]).abs().max() > 1e-3  # what went before matters
    assert [codec.frames(n) for n in (1, 4, 5, 480, 481)] == [1, 1, 5, 477, 481]
    assert tuple(codec.vae.config.latents_mean) == codec.mean and tuple(codec.vae.config.latents_std) == codec.std
    encode = codec.encoder()
    pieces = [encode(piece) for piece in (pixels[:, :, :1], *pixels[:, :, 1:].split([8, 12], dim=2))]
    assert (torch.cat(pieces, dim=2) - latents).abs().max() < 1e-4


@pytest.mark.optional
@pytest.mark.parametrize("flag, stem", [("vae", "diffusion_pytorch_model"), ("t5", "model")])
def test_models_are_read_whole_or_not_at_all(flag, stem, tmp_path, request):
    path = tmp_path / "model"
    shutil.copytree(request.getfixturevalue(flag), path)
    open_base("tiny-wan", **{flag: path})
    file = next(path.rglob(f"{stem}.safetensors"))
    tensors, whole = load_file(file), file.read_bytes()
    lost = next(name for name in tensors if "conv" in name or "DenseReluDense" in name)
    tensors.pop(lost)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"lacks {re.escape(lost)}"):
        open_base("tiny-wan", **{flag: path})
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        open_base("tiny-wan", **{flag: path})


@pytest.mark.optional
@pytest.mark.parametrize(
    "change, says",
    [
        (dict(z_dim=48, latents_mean=[0.0] * 48, latents_std=[1.0] * 48), "48 channels"),
        (dict(temperal_downsample=[False, False, True]), "another VAE"),
        (dict(patch_size=2), "16 pixels"),
        (dict(latents_mean=[0.0] * 16), "another VAE"),
    ],
)
def test_another_vae_is_refused(change, says, tmp_path, vae):
    config = json.loads((vae / "config.json").read_text())
    type(WanCodec(vae).vae).from_config(config | change).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=says):
        WanCodec(tmp_path / "other")


@pytest.mark.optional
def test_wans_versions_have_another_vae_each(vae, vae22):
    with pytest.raises(UserError, match="48 channels, 16 pixels per latent.* than Wan 2.1's"):
        open_base("wan-14b", vae22)
    with pytest.raises(UserError, match="16 channels, 8 pixels per latent.* than Wan 2.2's"):
        open_base("wan2.2-5b", vae)
    assert open_base("wan2.2-5b", vae22).codec.decodes


@pytest.mark.optional
def test_a_text_encoder_of_another_width_is_refused(t5):
    with pytest.raises(UserError, match="makes vectors of 16 numbers, but the DiT reads 32"):
        UMT5Prompts(t5, 32)


@pytest.mark.optional
def test_the_vae_shows_frames_in_their_place(codec):
    size = [2 * n for n in codec.stride[1:]]
    latents, other = (codec.encode(randn(2, 3, 21, *size, seed=i).clamp(-1, 1)) for i in (0, 1))
    shown = codec.show(latents, other[:, :, [2, 4]], torch.tensor([[2, 4], [0, 5]]))
    assert shown.shape == (2, 3, 2, *size)
    video = latents[:1].clone()
    video[:, :, [2, 4]] = other[:1, :, [2, 4]]
    assert (shown[0] - codec.decode(video)[0][:, [8, 16]]).abs().max() < 1e-4
    beyond = codec.show(latents[:, :, :4], latents[:, :, 4:], torch.tensor([[4, 5]] * 2))  # the next section
    assert (beyond - codec.decode(latents)[:, :, [16, 20]]).abs().max() < 1e-4


@pytest.mark.optional
@pytest.mark.parametrize("n, height, width", [(33, 2, 2), (41, 3, 2)])
def test_the_decoder_needs_no_more_than_its_lookback(n, height, width, codec):
    """The next section after the whole history, and after its newest latents alone."""
    history, section = (randn(1, codec.channels, k, height, width, seed=k) for k in (n, 2))

    def decode_after(latents):
        decode = codec.decoder()
        decode(latents)
        return decode(section)

    whole = decode_after(history)
    assert codec.lookback == 30 and torch.equal(decode_after(history[:, :, -30:]), whole)
    assert not torch.equal(decode_after(history[:, :, -20:]), whole)


@pytest.mark.optional
@pytest.mark.parametrize("kind, parameters", [(WanCodec, 126_892_531), (Wan22Codec, 704_688_668)])
def test_the_lookback_of_wan_in_full_size(kind, parameters):
    codec = kind()
    with torch.device("meta"):
        codec.vae = pytest.importorskip("diffusers").AutoencoderKLWan(**codec.architecture)
    assert codec.lookback == 38 and codec.memory(1)[0]["VAE"] == 4 * parameters
    assert sum(p.numel() for p in codec.vae.parameters()) == parameters


@pytest.mark.parametrize("kind", [WanCodec, Wan22Codec])
@pytest.mark.parametrize("rate", [(2, 4, 4), (1, 2, 2), (4, 2, 2)])
def test_low_is_a_stream_of_the_smaller_video(rate, kind):
    check_low(BlockCodec(kind), rate)
    with pytest.raises(UserError, match="--vae"):
        kind().low_encoder(rate)


@pytest.mark.optional
def test_low_is_a_stream_of_the_smaller_video_with_a_vae(codec):
    check_low(codec, (2, 2, 2))


def check_low(codec, rate):
    """Frames 0, t, 2t, ... made smaller; segment by segment as all at once; any history is the stream's beginning."""
    (t, h, w), (_, y, x), pixels = rate, codec.stride, randn(1, 3, 33, 64, 96).clamp(-1, 1)
    low, encode = codec.encode_low(pixels, rate), codec.low_encoder(rate)
    assert low.shape == (1, codec.channels, 1 + 8 // t, -(-64 // (y * h)), -(-96 // (x * w)))
    small = F.pad(pixels[:, :, ::t], (0, -96 % (x * w), 0, -64 % (y * h), 0, 0), mode="replicate")
    small = small.unfold(3, h, h).unfold(4, w, w).mean((5, 6))
    assert torch.allclose(low, codec.encode(small), atol=1e-4) and low.std() > 0.01
    pieces = [encode(piece) for piece in (pixels[:, :, :1], *pixels[:, :, 1:].split(16, dim=2))]
    assert torch.allclose(torch.cat(pieces, dim=2), low, atol=1e-4)
    rest = codec.encode_low(torch.cat([pixels, pixels[:, :, -4:]], dim=2), rate)  # no whole block at the end
    assert torch.allclose(rest[:, :, : low.shape[2]], low, atol=1e-4) and rest.shape[2] == 1 + 9 // t
    short = codec.encode_low(pixels[:, :, :17], rate)
    assert torch.allclose(codec.cut_low(low, 0, 5, t), short, atol=1e-4)


@pytest.mark.optional
@torch.no_grad()
def test_prompts_are_zero_padded(t5, capsys):
    prompts = UMT5Prompts(t5, 16, 6)
    rows, tokens = prompts("a  cat\nwalks"), torch.tensor([[3, 4, 6, 1]])
    assert rows.shape == (6, 16) and not rows[4:].any()
    assert torch.equal(rows[:4], prompts.model(tokens).last_hidden_state[0].float()) and not prompts("").any()
    assert torch.equal(prompts("a &amp;amp; cat"), prompts("a & cat"))
    long = prompts("a cat walks a dog walks a cat")
    assert "cut to 6" in capsys.readouterr().err and long.any(1).all()
    expected = prompts.model(torch.tensor([[3, 4, 6, 3, 5, 1]])).last_hidden_state[0].float()  # the end stays
    assert torch.equal(long, expected)


@pytest.mark.optional
def test_prompts_are_embedded_on_the_cpu_if_the_gpu_is_too_small(t5, capsys, monkeypatch):
    expected = UMT5Prompts(t5, 16, 6)("a cat walks")
    prompts, devices = UMT5Prompts(t5, 16, 6, "cuda"), []

    def move(model, device, real=torch.nn.Module.to):
        devices.append(device)
        if device == "cuda":
            raise torch.OutOfMemoryError
        return real(model, device)

    monkeypatch.setattr(torch.nn.Module, "to", move)
    assert torch.equal(prompts("a cat walks"), expected) and devices == ["cuda", "cpu"]
    assert "runs on the CPU" in capsys.readouterr().err


def test_training_is_on_whole_segments_at_the_bases_noise_levels():
    base, clips = tiny_base("tiny-wan"), Clips([Clip(randn(16, 13, 8, 8), [], low=randn(16, 7, 2, 2))])
    encoder = MemoryDiT(base).encoder
    for step in range(20):
        batch = finetune.draw_continuation(SETTINGS["finetune"], base, encoder, clips, range(1), step)
        assert batch.high.shape[2] in (5, 9)  # the lone first latent, and one or two segments
    save_file({"any": torch.zeros(1)}, "base.safetensors")
    config = finetune.FinetuneConfig(preset="wan-14b", init="base.safetensors")
    pretrain.check(config)
    assert (config.t_mean, config.t_std, config.lora) == (1.3, 1.0, 128)


@pytest.mark.parametrize(
    "frames, latents, tokens", [(5, 2, 1664), (33, 9, 520), (320, 73, 3848), (321, 81, 4264), (330, 81, 4264)]
)
def test_a_history_is_whole_segments(frames, latents, tokens):
    """20 s at 16 fps are 320 frames, 80 latents: seven of them would wait uncompressed."""
    base, written = open_base("wan-1.3b"), []
    stream = (np.full((1, 1, 1), i) for i in range(frames))
    history = copy_history(stream, SimpleNamespace(write=written.append), base, 10)
    kept = history.remembered
    assert len(written) == history.frames == frames and kept[-1].item() == frames - 1 and len(kept) == 4 * latents - 3
    with torch.device("meta"):
        encoder = MemoryDiT(base, rate="4x4x2").encoder
        high = torch.zeros(1, 16, latents, 480 // 8, 832 // 8)
    memory = encoder.encode(high, smaller(high, encoder.rate))
    assert memory[0].shape == (1, tokens, base.dit.dim)


def test_a_video_from_nothing_begins_with_a_lone_latent():
    """As a whole video does: section + 1 latents at times from 0 on; later sections follow as after any history."""
    base = tiny_base("tiny-wan")
    model, seen = randomize(MemoryDiT(base)), []
    model.dit.register_forward_pre_hook(lambda _, args: seen.append(args))
    memory, latents = Memory(model, base.codec), []
    append = memory.append
    memory.append = lambda x, pixels: (latents.append(x), append(x, pixels))
    config = sample.SampleConfig(steps=1, guidance=1, shift=3.0)
    made = sample.continue_video(model, base, memory, base.codec.decoder(), [randn(24, 16)] * 3, config, (32, 32))
    frames = torch.cat([frames for frames, _ in made])
    assert [times.tolist() for _, _, _, times, _ in seen] == [[*range(5)], [*range(5, 9)], [*range(9, 13)]]
    assert [x.shape[2] for x, *_ in seen] == [5, 4, 4] and seen[0][4] is None
    assert [n for _, n in memory.segments] == [1, 4, 4, 4] and len(memory.times) == 0
    pixels = base.codec.decode(torch.cat(latents, dim=2))
    assert torch.equal(frames, to_frames(pixels)[0]) and len(frames) == 1 + 3 * 16
    with torch.no_grad(), autocast(pixels.device):
        low = base.codec.encode_low(pixels, model.encoder.rate)
        whole = model.encoder.encode(torch.cat(latents, dim=2), low)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(memory.context(), whole))


@pytest.mark.parametrize("given, kept", [(["--history", "a.png"], 1), (["--prompt", "a cat"], 0)])
def test_sample_begins_with_a_picture_or_a_text(given, kept, monkeypatch, capsys):
    monkeypatch.setattr("bases.wan.WanCodec", lambda vae, device: BlockCodec())
    monkeypatch.setattr("bases.wan.NoPrompts", HashPrompts)
    iio.imwrite("a.png", np.full((32, 32, 3), 90, np.uint8))
    checkpoint = write_checkpoint(preset="tiny-wan")
    run(sample.main, *given, "--checkpoint", checkpoint, "--seconds=16", "--steps=1", "--save_file=b.mp4")
    said, made = capsys.readouterr(), read_video("b.mp4", 2, 32, 32)
    assert len(made) == 1 + 2 * 16 and f"history: {kept / 2:g} s, {kept} frames; memory: {kept} tokens" in said.out
    assert f"at least 8 s, and this one has {kept / 2:g} s" in said.err
    assert ((made[0].float() - 90).abs().mean() < 12) == bool(kept)


@pytest.mark.optional
def test_a_diffusers_that_is_too_old_is_refused_at_the_start(vae, monkeypatch):
    monkeypatch.setattr("diffusers.__version__", "0.34.1")
    with pytest.raises(UserError, match="pip install diffusers>=0.35"):
        open_base("wan-1.3b", vae)
