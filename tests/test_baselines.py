"""What is special about each memory that φ is compared with. (What all methods share: test_encoder.py.)"""

import pytest
import torch
import torch.nn.functional as F

from bench.baselines import bipartite_matching
from encoder import MemoryDiT, find_method
from model import token_positions
from sample import Memory
from tests.common import randn, randomize, tiny_base


def make_encoder(method, rate="4x4x2", preset="tiny"):
    return randomize(find_method(method)(tiny_base(preset), rate))


# ---------------------------------------------------------------------------------------------------------------------
# Large patchifier


@pytest.mark.parametrize("rate", ["4x4x2", "2x2x1", "8x8x4"])
@torch.no_grad()
def test_large_patchifier_begins_as_the_patchify_of_averaged_latents(rate):
    model, x = MemoryDiT(tiny_base(), "large-patchifier", rate), randn(2, 16, 8, 16, 32)
    randomize(model.dit)
    model.encoder.start_from(model.dit)
    expected = model.dit.patch_embedding(F.avg_pool3d(x, model.encoder.rate))
    assert expected.std() > 0.01 and (model.encoder.encode(x, x)[0] - expected).abs().max() < 3e-5
    flat = torch.ones_like(x) * randn(1, 16, 1, 1, 1)
    tokens = model.encoder.encode(flat, flat)[0]
    assert (tokens - model.dit.patch_embedding(flat)[:, :1]).abs().max() < 3e-5


# ---------------------------------------------------------------------------------------------------------------------
# Token merging


@torch.no_grad()
def test_token_merging_averages_what_is_alike():
    """In a segment of two colours no token is of both; each is the mean of all that it holds, where those are."""
    encoder = make_encoder("token-merging", "4x4x1")  # 8 tokens for 4 frames of 8 x 4
    encoder.patch_embedding.bias.zero_()  # so that brightness is length, not direction
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        kind = torch.rand(4, 8, 4, generator=g) < 0.4
        colours = randn(2, 16, seed=seed)[kind.long()] * (1 + 0.2 * torch.rand(4, 8, 4, 1, generator=g))
        x = colours.permute(3, 0, 1, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)[None]  # (1, 16, 4, 16, 8)
        (tokens, positions), (everything, places) = encoder.encode(x, x), encoder.embed_frames(x, torch.arange(4))
        groups = bipartite_matching(everything, 8)[0]
        assert tokens.shape == (1, 8, 48)
        for n in range(8):
            inside = groups == n
            assert len(set(kind.flatten()[inside].tolist())) == 1, seed
            assert torch.allclose(tokens[0, n], everything[0, inside].mean(0), atol=1e-5)
            assert torch.allclose(positions[0, n], places[inside].mean(0), atol=1e-5)


@pytest.mark.parametrize("size, frames", [((8, 8), 4), ((15, 13), 8)])
@torch.no_grad()
def test_token_merging_has_as_many_tokens_as_there_are_blocks(size, frames):
    encoder, x = make_encoder("token-merging", "2x2x2"), randn(2, 16, frames, *size)
    tokens, positions = encoder.encode(x, x, start=20)
    n_blocks = frames // 2 * -(-size[0] // 4) * -(-size[1] // 4)
    assert tokens.shape == (2, n_blocks, 48) and positions.shape == (2, n_blocks, 3)
    assert not torch.equal(positions[0], positions[1])
    for first in range(0, frames, 4):  # segments do not mix
        inside = (positions[..., 0] >= 20 + first) & (positions[..., 0] <= 23 + first)
        assert (inside.sum(1) == n_blocks // (frames // 4)).all()


@torch.no_grad()
def test_token_merging_of_equal_tokens_returns_that_token():
    """Equal tokens tie in every round."""
    encoder, x = make_encoder("token-merging", "2x2x2"), torch.ones(2, 16, 4, 8, 8) * randn(2, 16, 1, 1, 1)
    tokens, positions = encoder.encode(x, x)
    assert torch.allclose(tokens, encoder.patch_embedding(x)[:, :1].expand_as(tokens), atol=1e-5)
    assert positions.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# Uncompressed memories


@torch.no_grad()
def test_full_memory_is_every_token():
    encoder, x = make_encoder("full", preset="tiny-wan"), randn(1, 16, 9, 8, 8)
    tokens, positions = encoder.encode(x, x[:, :, :0], start=0)
    assert torch.equal(tokens, encoder.patch_embedding(x))
    assert torch.equal(positions, token_positions(range(9), 4, 4))


FRAMES_KEPT = [  # method, window, most segments in memory, which of 11 frames stay
    ("sliding-window", 0, None, [10]),
    ("sliding-window", 6, None, [5, 6, 7, 8, 9, 10]),
    ("sliding-window", 6, 1, [7, 8, 9, 10]),
    ("sliding-window", 9, None, list(range(2, 11))),
    ("keyframes", 0, None, [0, 10]),
    ("keyframes", 0, 1, [0, 10]),
]


@pytest.mark.parametrize("preset", ["tiny", "tiny-wan"])
@pytest.mark.parametrize("method, window, most, kept", FRAMES_KEPT)
@torch.no_grad()
def test_methods_that_keep_frames(method, window, most, kept, preset):
    base, x = tiny_base(preset), randn(2, 16, 11, 8, 8)
    model = randomize(MemoryDiT(base, method, window=window))
    expected = model.encoder.patch_embedding(x[:, :, kept]), token_positions(torch.tensor(kept), 4, 4)
    if most is None:
        memory = model.encoder.encode(x, x[:, :, :0])
        assert all(torch.equal(a, b) for a, b in zip(memory, expected))
        tokens, positions = model.encoder.encode(x[:, :, :1], x[:, :, :0], start=7)
        assert tokens.shape[1] == 16 and positions[0].tolist() == [7, 0, 0]
    memory = Memory(model, base.codec, most)
    for piece in x[:1].split(3, 2):
        memory.append(piece, piece)  # no pixels are read
    tokens, positions = memory.context()
    assert torch.allclose(tokens, expected[0][:1], atol=1e-6) and torch.equal(positions, expected[1])
    assert memory.frames == 11 and memory.times.tolist() == kept and memory.uncompressed == 16 * len(kept)


@torch.no_grad()
def test_no_memory_keeps_nothing():
    base, x = tiny_base(), randn(1, 16, 8, 8, 8)
    model = MemoryDiT(base, "none")
    memory = Memory(model, base.codec)
    memory.append(x, x)
    assert memory.context() is None and memory.uncompressed == 0 and memory.frames == 8
    assert model.encoder.encode(x, x) is None and not list(model.encoder.parameters())
