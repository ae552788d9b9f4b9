"""The memory encoder φ: where tokens stand, segments, odd sizes, gradients, what its branches read; the growing memory.

Tests over all methods that compress the whole history stand here; what is special about a baseline, in
test_baselines.py.
"""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from bases import open_base
from encoder import METHODS, MemoryDiT, find_method
from model import token_positions
from sample import Memory
from tests.common import randn, randomize, smaller, tiny_base
from util.cli import UserError

SEGMENT_METHODS = [name for name in METHODS if find_method(name).has_stage1]  # those that keep every frame
BLOCK_METHODS = ["proposed", "only-lr", "without-lr", "large-patchifier"]  # one token per block, at its centre
RATES = {"4x4x2": 80, "2x2x2": 320, "2x2x1": 640, "4x4x4": 40, "1x1x1": 2560, "8x8x1": 40}  # tokens of 40 nano frames


def make_encoder(method="proposed", rate="4x4x2", base=None, seed=0):
    return randomize(find_method(method)(base or tiny_base(), rate), seed)


def encode(encoder, high, start=0):
    """φ of whole segments: (tokens, positions)."""
    return encoder.encode(high, smaller(high, encoder.rate, later=encoder.causal and start > 0), start)


def append_all(memory, pieces):
    for piece in pieces:
        append(memory, piece)
    return memory


def append(memory, latents):
    """Append latents whose `low` is made up of themselves, as in encode()."""
    encoder, n = memory.encoder, memory.codec.stride[0]
    memory.encode_low = lambda x: smaller(x[:, :, ::n], encoder.rate, later=encoder.causal and x.shape[2] > 1)
    pixels = latents.repeat_interleave(n, 2)
    memory.append(latents, pixels[:, :, n - 1 :] if encoder.causal and memory.frames == 0 else pixels)


# ---------------------------------------------------------------------------------------------------------------------
# Positions


@pytest.mark.parametrize("method", ["proposed", "large-patchifier"])
@pytest.mark.parametrize("rate", RATES)
@torch.no_grad()
def test_tokens_stand_at_the_centres_of_their_blocks(rate, method):
    base, high = open_base("nano"), randn(1, 16, 40, 16, 16)
    encoder = make_encoder(method, rate, base)
    tokens, positions = encode(encoder, high, start=100)
    t, h, w = encoder.rate
    expected = [
        [100 + f + (t - 1) / 2, i + (h - 1) / 2, j + (w - 1) / 2]
        for f in range(0, 40, t)
        for i in range(0, 8, h)
        for j in range(0, 8, w)
    ]
    assert tokens.shape == (1, RATES[rate], 256) and positions.tolist() == expected


@pytest.mark.parametrize("frames, count", [(81, 4264), (121, 6344)])
@torch.no_grad()
def test_tokens_of_wan_in_full_size(frames, count):
    """480 x 832 pixels are 60 x 104 latents; a narrow φ on zeros, since only the shapes matter."""
    base = open_base("wan-1.3b")
    base = dataclasses.replace(base, dit=dataclasses.replace(base.dit, dim=48, heads=2))
    encoder = make_encoder("only-lr", "4x4x2", base)
    high, low = torch.zeros(1).expand(1, 16, frames, 60, 104), torch.zeros(1).expand(1, 16, 1 + frames // 2, 16, 26)
    tokens, positions = encoder.encode(high, low)
    assert tokens.shape == (1, count, 48) and len(positions) == count
    assert positions[0].tolist() == [0, 1.5, 1.5] and positions[104].tolist() == [1.5, 1.5, 1.5]
    assert positions[-1].tolist() == [frames - 1.5, 29.5, 49.5]


def without_attention(encoder):
    """For tests of where things are: attention sees the whole segment, and its rotations tell left from right."""
    for p in encoder.hr.attention.o.parameters():
        p.data.zero_()
    return encoder


@pytest.mark.parametrize("rate", ["4x4x2", "8x8x1"])
@pytest.mark.parametrize("method", BLOCK_METHODS)
@torch.no_grad()
def test_a_block_is_read_by_the_token_that_stands_there(method, rate):
    """A change in the middle of a block moves the token that stands there most, and its neighbours evenly."""
    base, energy = tiny_base(), 0
    for seed in range(40):
        encoder = make_encoder(method, rate, base, seed)
        encoder = without_attention(encoder) if hasattr(encoder, "hr") else encoder
        t, h, w = encoder.rate
        x = randn(1, 16, 4, 2 * 3 * h, 2 * 5 * w, seed=seed)
        y = x.clone()
        y[:, :, :, 3 * h - 1 : 3 * h + 1, 5 * w - 1 : 5 * w + 1] += 1  # the middle of block (1, 2)
        (a, positions), (b, _) = (encode(encoder, z) for z in (x, y))
        change = (a - b)[0].square().sum(-1).view(4 // t, 15).sum(0)
        energy = energy + change / change.sum()
    positions, centre = positions[:15, 1:], torch.tensor([h + (h - 1) / 2, 2 * w + (w - 1) / 2])
    assert torch.equal(positions[energy.argmax()], centre)
    mass = (energy[:, None] * positions).sum(0) / energy.sum()
    assert ((mass - centre).abs() < 0.1 * torch.tensor([h, w])).all()
    if method in ("only-lr", "large-patchifier"):
        assert (energy > 1e-9).sum() == 1


@pytest.mark.parametrize("rate", ["4x4x2", "2x2x2", "2x2x1", "8x8x1"])
@torch.no_grad()
def test_the_hr_branch_is_centred(rate):
    """With mirror-symmetric kernels a mirrored video must give mirrored tokens: no stride may lean to one side."""
    base = tiny_base()
    encoder = without_attention(make_encoder("without-lr", rate, base))
    for conv in *encoder.hr.convs, encoder.hr.shortcut:
        for axis in 2, 3, 4:
            conv.weight.copy_((conv.weight + conv.weight.flip(axis)) / 2)
    t, h, w = encoder.rate

    def grid(x):
        return encode(encoder, x)[0].view(8 // t, 2, 3, 48)

    x = randn(1, 16, 8, 2 * 2 * h, 2 * 3 * w)
    for axis in 0, 1, 2:
        assert (grid(x.flip(axis + 2)) - grid(x).flip(axis)).abs().max() < 1e-5
        assert (grid(x) - grid(x).flip(axis)).abs().max() > 1e-2


# ---------------------------------------------------------------------------------------------------------------------
# Segments


@pytest.mark.parametrize("preset, first", [("tiny", 8), ("tiny-wan", 9)])  # Wan's codec is causal: a lone first latent
@pytest.mark.parametrize("method", SEGMENT_METHODS)
@torch.no_grad()
def test_appending_sections_leaves_the_history_alone(method, preset, first):
    """φ([H; X]) = [φ(H); φ(X)], in one piece or in many."""
    base, x = tiny_base(preset), randn(1, 16, first + 8, 8, 8)
    model = randomize(MemoryDiT(base, method))
    whole = encode(model.encoder, x)
    old = encode(model.encoder, x[:, :, :first])
    new = encode(model.encoder, x[:, :, first:], start=first)
    assert whole[0].std() > 0.1
    for a, b, c in zip(whole, old, new):
        assert (a - torch.cat([b, c], -2)).abs().max() < 1e-5
    one = append_all(Memory(model, base.codec), [x])
    many = append_all(Memory(model, base.codec), x.split(3, 2))
    for a, b, c in zip(whole, one.context(), many.context()):
        assert (a - b).abs().max() < 1e-5 and (a - c).abs().max() < 1e-5
    assert one.frames == many.frames == first + 8


@torch.no_grad()
def test_an_unfinished_segment_stays_uncompressed():
    base, x = tiny_base(), randn(1, 16, 11, 8, 8)
    model = randomize(MemoryDiT(base))
    encoder, memory = model.encoder, Memory(model, base.codec)
    assert memory.context() is None
    append(memory, x[:, :, :3])
    tokens, positions = memory.context()
    assert torch.equal(tokens, encoder.patch_embedding(x[:, :, :3]))
    assert torch.equal(positions, token_positions(torch.arange(3), 4, 4))
    append(memory, x[:, :, 3:])
    tokens, positions = memory.context()
    old = encode(encoder, x[:, :, :8])
    assert tokens.shape[1] == len(old[1]) + 3 * 16 and (tokens[:, :-48] - old[0]).abs().max() < 1e-5
    assert torch.equal(tokens[:, -48:], encoder.patch_embedding(x[:, :, 8:]))
    assert torch.equal(positions[-48:], token_positions(torch.arange(8, 11), 4, 4))
    in_training = encoder.encode(x, smaller(x[:, :, :8], encoder.rate))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(in_training, (tokens, positions)))
    assert memory.uncompressed == 11 * 16


@torch.no_grad()
def test_memory_keeps_the_newest_segments():
    base, x = tiny_base(), randn(1, 16, 24, 8, 8)
    model = randomize(MemoryDiT(base))
    memory, everything = Memory(model, base.codec, most=2), Memory(model, base.codec)
    for k, piece in enumerate(x.split(4, 2)):
        append(memory, piece)
        append(everything, piece)
        assert memory.context()[0].shape[1] == 2 * min(k + 1, 2) and everything.context()[0].shape[1] == 2 * (k + 1)
    for a, b in zip(memory.context(), everything.context()):
        assert torch.equal(a, b[..., -4:, :])  # where they were
    assert memory.uncompressed == 8 * 16


@torch.no_grad()
def test_a_lone_first_latent_goes_with_the_first_segment():
    base, counts = tiny_base("tiny-wan"), []
    memory = Memory(randomize(MemoryDiT(base)), base.codec, most=2)
    for piece in randn(1, 16, 25, 4, 4).split([9, 4, 4, 4, 4], 2):
        append(memory, piece)
        counts.append([n for *_, n in memory.segments])
    assert counts == [[1, 4, 4]] + 4 * [[4, 4]]


@pytest.mark.parametrize("method", SEGMENT_METHODS)
@torch.no_grad()
def test_odd_sizes_are_padded_alike_in_both_branches(method):
    base, x = tiny_base(), randn(1, 16, 4, 15, 13)
    encoder = make_encoder(method, "2x2x2", base)
    to_tokens = method in ("token-merging", "full")  # these pad to whole tokens, not to whole blocks
    padded = F.pad(x, (0, 1 if to_tokens else 3, 0, 1, 0, 0), mode="replicate")
    a, b = (encode(encoder, z) for z in (x, padded))
    assert a[0].shape == (1, 4 * 8 * 7 if method == "full" else 2 * 4 * 4, 48)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("method", SEGMENT_METHODS)
@torch.no_grad()
def test_rows_of_a_batch_do_not_meet(method):
    base, x = tiny_base(), randn(2, 16, 8, 8, 8)
    encoder = make_encoder(method, base=base)
    both = encode(encoder, x)[0]
    for i in range(2):
        assert (encode(encoder, x[i : i + 1])[0] - both[i]).abs().max() < 1e-5


@pytest.mark.parametrize("method", SEGMENT_METHODS)
def test_gradients_reach_every_weight_and_every_segment(method):
    encoder = make_encoder(method)
    high = randn(1, 16, 12, 8, 8).requires_grad_()
    low = smaller(high.detach(), encoder.rate).requires_grad_()
    encoder.encode(high, low)[0].square().sum().backward()
    for x, read in (high, method != "only-lr"), (low, encoder.reads_low):
        assert (x.grad.abs().amax((0, 1, 3, 4)) > 0).all() if read else x.grad is None
    for name, p in encoder.named_parameters():
        if encoder.may_skip_weights and name.startswith("patch_embedding"):  # it is for unfinished segments
            assert p.grad is None
        else:
            assert p.grad.abs().max() > 0 or name == "hr.attention.k.bias", name


# ---------------------------------------------------------------------------------------------------------------------
# The two branches


@torch.no_grad()
def test_methods_differ_only_in_their_branches():
    base, x = tiny_base(), randn(2, 16, 8, 8, 8)
    model = MemoryDiT(base)
    low = smaller(x, model.encoder.rate)
    proposed, only_lr, without_lr = (find_method(name)(base, "4x4x2") for name in ("proposed", "only-lr", "without-lr"))
    for encoder in proposed, only_lr, without_lr:
        encoder.start_from(model.dit)
    # HR starts at zero where LR carries the signal
    assert torch.equal(proposed.encode(x, low)[0], only_lr.encode(x, low)[0])
    assert torch.equal(only_lr.encode(x, low)[0], model.dit.patch_embedding(low))
    tokens = without_lr.encode(x, low)[0]
    assert torch.equal(without_lr.encode(x, torch.full_like(low, math.nan))[0], tokens) and tokens.std() > 0
    assert torch.equal(only_lr.encode(x * math.nan, low)[0], only_lr.encode(x, low)[0])
    model.dit.patch_embedding.weight.fill_(0)
    assert proposed.encode(x, low)[0].abs().max() > 0  # φ's copy is its own


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize("rate", ["4x4", "3x4x2", "axbxc", "0x4x2", "-4x4x2", "4x4x8", "4x4x2x1"])
def test_bad_rates_are_refused(rate):
    with pytest.raises(UserError, match="--rate"):
        MemoryDiT(tiny_base(), "proposed", rate)


def test_unknown_methods_are_refused():
    with pytest.raises(UserError, match="propsed.*proposed"):
        MemoryDiT(tiny_base(), "propsed")


def test_what_is_encoded_whole_is_whole_segments():
    with pytest.raises(ValueError, match="whole segments"):
        make_encoder().encode_whole(randn(1, 16, 6, 8, 8), randn(1, 16, 3, 2, 2), 0)
