"""The codec and the prompts of nano and small, which need no weights. (Wan's: test_wan.py.)"""

import pytest
import torch
import torch.nn.functional as F

from bases import BASES, open_base
from bases.nano import DCTCodec, HashPrompts, hash_word
from dolls.dataset import story_pixels
from eval import psnr
from tests.common import randn
from util.cli import UserError
from util.video import to_frames, to_pixels


def test_the_codec_is_a_linear_map_with_orthonormal_rows():
    codec, z = DCTCodec(), randn(2, 16, 3, 8, 6)
    assert torch.allclose(codec.basis @ codec.basis.T, torch.eye(16), atol=1e-6)
    assert torch.allclose(codec.encode(codec.decode(z)), z, atol=1e-5)
    assert torch.allclose(codec.decode(2 * z), 2 * codec.decode(z), atol=1e-5)


def test_the_codec_keeps_flat_colours():
    codec, flat = DCTCodec(), torch.full((1, 3, 1, 8, 8), 0.5)
    latents = codec.encode(flat)
    assert torch.allclose(codec.decode(latents), flat, atol=1e-6) and latents[:, 1:].abs().max() < 1e-6
    colours = codec.encode(torch.rand(1, 3, 1, 1, 1, generator=torch.manual_seed(0)).expand(1, 3, 1, 8, 8))
    assert sorted(codec.averages) == colours.abs().amax((0, 2, 3, 4)).gt(1e-6).nonzero().flatten().tolist()


def test_the_codec_on_stories():
    base, latents = open_base("nano"), []
    for i in range(6):
        pixels = torch.from_numpy(story_pixels("train", i, base)[1])
        latents.append(base.codec.encode(to_pixels(pixels)[None]))
        again = to_frames(base.codec.decode(latents[-1]))[0]
        assert again.shape == pixels.shape == (52, 64, 64, 3) and psnr(again, pixels).mean() > 25
    assert 0.6 < torch.cat(latents).var() < 1.6


@pytest.mark.parametrize("rate", [(2, 4, 4), (1, 2, 2), (4, 2, 2)])
def test_low_is_the_smaller_video_through_the_codec(rate):
    """Means over areas and times; piece by piece as all at once, and as a training cuts it out of a clip."""
    codec, (t, h, w) = DCTCodec(), rate
    (_, y, x), pixels = codec.stride, randn(1, 3, 12, 96, 160).clamp(-1, 1)
    blocks = pixels.unfold(2, t, t).unfold(3, h, h).unfold(4, w, w).mean((5, 6, 7))  # (1, 3, 12 / t, 96 / h, 160 / w)
    padded = F.pad(blocks, (0, -blocks.shape[4] % x, 0, -blocks.shape[3] % y, 0, 0), mode="replicate")
    low, encode = codec.low_encoder(rate)(pixels), codec.low_encoder(rate)
    assert torch.allclose(low, codec.encode(padded), atol=1e-5) and low.std() > 0.1
    assert torch.allclose(torch.cat([encode(piece) for piece in pixels.split(4, dim=2)], dim=2), low, atol=1e-5)
    whole = codec.encode_low(pixels, rate)
    assert torch.allclose(codec.cut_low(whole, 0, 12, t), low, atol=1e-5)
    late = codec.low_encoder(rate)(pixels[:, :, 3:11])  # a history may begin anywhere
    assert torch.allclose(codec.cut_low(whole, 3, 11, t), late, atol=1e-5)


def test_prompts_are_words_and_their_positions():
    prompts = HashPrompts(16, 5)
    a, b = prompts("A cat, a dog"), prompts("dog dog the cat a dog and more")
    assert a.shape == b.shape == (5, 16) and torch.equal(a, HashPrompts(16, 5)("a cat a dog"))

    def position(i):
        return 0.5 * torch.from_numpy(hash_word(f"position {i}", 16))

    assert torch.allclose(a[1] - position(1), b[3] - position(3))  # cat
    assert torch.allclose(a[3] - position(3), b[0] - position(0))  # dog
    assert torch.equal(a[4], torch.zeros(16)) and b.any(1).all()
    assert not prompts("").any() and not prompts(" ,. ").any()


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(capsys):
    prompts = HashPrompts(16, 5)
    assert torch.equal(prompts("one two three four five six"), prompts("one two three four five"))
    assert 'a prompt of 6 words is cut to 5: "one two' in capsys.readouterr().err


def test_words_are_independent_vectors_and_the_same_on_every_machine():
    words = torch.stack([torch.from_numpy(hash_word(w, 64)) for w in "one two three four five six".split()])
    assert (torch.corrcoef(words) - torch.eye(6)).abs().max() < 0.6 and 0.8 < words.var() < 1.2
    # the shipped weights rely on it
    assert hash_word("cat", 3).tolist() == pytest.approx([2.32206, -0.77695, -1.08425], 1e-4)


def test_a_base_that_is_not_there():
    with pytest.raises(UserError, match="--preset nanno: choose one of .*nano"):
        open_base("nanno")
    with pytest.raises(UserError, match="--vae here does nothing: --preset nano needs no such weights"):
        open_base("nano", vae="here")


@pytest.mark.parametrize("name", [name for name in BASES if not name.startswith("tiny")])
def test_sizes_and_histories_are_whole(name):
    """Every size is whole tokens, every history whole segments."""
    base = open_base(name)
    for size in base.sizes:
        assert all(n % (s * p) == 0 for n, s, p in zip(size, base.codec.stride[1:], base.dit.patch[1:]))
    assert (base.history - base.codec.causal) % base.section == 0
    assert base.dit.in_dim == base.codec.channels and base.prompts.length == base.dit.text_len
    seconds = base.history * base.codec.stride[0] / base.fps
    assert base.name == name and seconds == pytest.approx(20, abs=0.3)
