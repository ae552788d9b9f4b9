"""What memory can have beside φ: a window, an anchor, cross-attention, cached keys and values; noise on the history."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import finetune
import model
import pretrain
import sample
from encoder import MemoryDiT, load_model
from model import token_positions
from sample import Memory
from tests.common import flags, randn, randomize, run, smaller, tiny_base, write_video
from util.attention import attention

BESIDE = [  # flags, and which of 11 frames, 8 of them in segments, are kept uncompressed
    (dict(), [8, 9, 10]),
    (dict(window=2), [8, 9, 10]),
    (dict(window=5), [6, 7, 8, 9, 10]),
    (dict(anchor=True), [0, 8, 9, 10]),
    (dict(window=40), list(range(11))),
]


def make(base, **memory):
    made = MemoryDiT(base, **memory)
    if made.config.cross_attention:
        made.dit.add_cross_attention()
    return randomize(made)


def remember(made, base, x, low, pieces=(11,), most=None):
    """What the DiT reads of latents x whose pixels have this `low`, appended in pieces."""
    memory, read = Memory(made, base.codec, most), iter(low.split(base.section // made.encoder.rate[0], dim=2))
    memory.encode_low = lambda pixels: next(read)
    for piece in x.split(pieces, dim=2):
        memory.append(piece, piece.new_zeros(1, 3, piece.shape[2], 32, 32))
    return memory


def is_close(a, b):
    """Are two things that a DiT reads equal up to rounding?"""
    if torch.is_tensor(a):
        return a.shape == b.shape and (a - b).abs().max() < 1e-5
    return len(a) == len(b) and all(map(is_close, a, b))


@pytest.mark.parametrize("memory, kept", BESIDE)
@torch.no_grad()
def test_window_and_anchor(memory, kept):
    """Beside the tokens of whole segments lie the patches of these frames, at their times."""
    base, x = tiny_base(), randn(1, 16, 11, 8, 8)
    made = make(base, **memory)
    low = smaller(x[:, :, :8], made.encoder.rate)
    segments = make(base).encoder.encode(x[:, :, :8], low)
    tokens, positions = made.encoder.encode(x, low)
    n = segments[0].shape[1]
    assert is_close((tokens[:, :n], positions[:n]), segments)
    assert torch.equal(tokens[:, n:], made.encoder.patch_embedding(x[:, :, kept]))
    assert torch.equal(positions[n:], token_positions(torch.tensor(kept), 4, 4))


@pytest.mark.parametrize("pieces", [(11,), (3, 3, 3, 2), (1,) * 11])
@pytest.mark.parametrize("memory", [*(m for m, _ in BESIDE), dict(cache_memory=True, window=5, rate="2x2x2+1x1x4")])
@torch.no_grad()
def test_a_growing_memory_equals_the_whole(memory, pieces):
    base, x = tiny_base(), randn(1, 16, 11, 8, 8)
    made = make(base, **memory)
    low = smaller(x[:, :, :8], made.encoder.rate)
    grown = remember(made, base, x, low, pieces)
    whole = made.remember(x, low)
    if made.encoder.second:  # the same tokens in another order, which attention does not see
        grown_cache, whole = (
            [x.sort(dim=2).values for pair in cache for x in pair] for cache in (grown.context(), whole)
        )
        assert is_close(grown_cache, whole)
    else:
        assert is_close(grown.context(), whole)
    assert grown.uncompressed == 11 * 16


@torch.no_grad()
def test_two_encoders():
    """The second one's tokens lie beside the first's, at the centres of its own blocks."""
    base, x = tiny_base(), randn(2, 16, 11, 8, 8)
    made = make(base, rate="4x4x2+2x2x4")
    low = smaller(x[:, :, :8], made.encoder.rate)
    tokens, positions = made.encoder.encode(x, low)
    first = MemoryDiT(base, rate="4x4x2").encoder
    first.load_state_dict({k: v for k, v in made.encoder.state_dict().items() if not k.startswith("second")})
    first = first.encode(x[:, :, :8], low)
    second = made.encoder.second.encode(x[:, :, :8], low)
    assert first[0].shape[1] == 4 and second[0].shape[1] == 8 and second[1][0].tolist() == [1.5, 0.5, 0.5]
    kept = made.encoder.embed_frames(x[:, :, 8:], torch.arange(8, 11))
    assert is_close(tokens, torch.cat([first[0], second[0], kept[0]], dim=1))
    assert is_close(positions, torch.cat([first[1], second[1], kept[1]]))
    assert not any("second.patch_embedding" in name for name in made.state_dict())


@torch.no_grad()
def test_the_anchor_stays_when_its_segment_has_gone():
    base, x = tiny_base(), randn(1, 16, 16, 8, 8)
    made = make(base, anchor=True, window=3)
    memory = remember(made, base, x, smaller(x, made.encoder.rate), [4] * 4, most=2)
    assert [n for _, n in memory.segments] == [4, 4] and memory.times.tolist() == [0, 13, 14, 15]
    assert torch.equal(memory.latents, x[:, :, [0, 13, 14, 15]])


@torch.no_grad()
def test_cross_attention_starts_at_zero_and_then_reads_memory():
    base, x, t = tiny_base(), randn(2, 16, 4, 8, 8), torch.full((2,), 500.0)
    made, high = randomize(MemoryDiT(base)), randn(2, 16, 8, 8, 8)
    text, times, memory = (
        randn(2, 3, base.dit.text_dim),
        torch.arange(8, 12),
        made.remember(high, smaller(high, made.encoder.rate)),
    )
    before = made.dit(x, t, text, times, memory)
    made.dit.add_cross_attention()
    assert torch.equal(made.dit(x, t, text, times, memory), before)
    without = made.dit(x, t, text, times)
    for block in made.dit.blocks:
        randomize(block.memory_attn)
    read = made.dit(x, t, text, times, memory)
    assert (read - before).abs().max() > 1e-2 and torch.equal(made.dit(x, t, text, times), without)
    tokens, positions = memory
    moved = made.dit(x, t, text, times, (tokens, positions + 1000))
    shifted = made.dit(x, t, text, times + 1000, (tokens, positions + torch.tensor([1000.0, 0, 0])))
    assert (moved - read).abs().max() > 1e-3 and (shifted - read).abs().max() < 1e-3  # places count, relative ones


@pytest.mark.parametrize("preset, frames", [("tiny", 11), ("tiny-wan", 9)])
@torch.no_grad()
def test_cached_memory_equals_full_attention_that_ends_at_segments(monkeypatch, preset, frames):
    """The same as one sequence whose memory tokens see their own segment alone, where there is no prompt."""
    base, t = tiny_base(preset), torch.full((2,), 700.0)
    base, x = replace(base, dit=replace(base.dit, layers=3)), randn(2, 16, base.section, 8, 8)
    cached, plain = (make(base, rate="2x2x2", cache_memory=value) for value in (True, False))
    high, text = randn(2, 16, frames, 8, 8), torch.zeros(2, base.dit.text_len, base.dit.text_dim)
    low = smaller(high[:, :, : plain.encoder.whole(frames)], plain.encoder.rate)
    times = torch.arange(frames, frames + x.shape[2])
    parts = plain.encoder.parts(high, low)
    lengths = [memory[0].shape[1] // n for memory, n in parts for _ in range(n)]
    assert len(lengths) == 3
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))

    def masked(q, k, v):
        if q.shape[2] != k.shape[2]:
            return attention(q, k, v)  # the prompt's
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
        mask[: len(segment)] = False
        mask[: len(segment), : len(segment)] = segment[:, None] == segment
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)

    memory = plain.remember(high, low)
    unmasked = plain.dit(x, t, text, times, memory)
    made = cached.dit(x, t, text, times, cached.remember(high, low))
    monkeypatch.setattr(model, "attention", masked)
    expected = plain.dit(x, t, text, times, memory)
    assert (made - expected).abs().max() < 1e-5 and (unmasked - expected).abs().max() > 1e-3


def test_cached_memory_is_trained():
    base = tiny_base()
    made, high = make(base, cache_memory=True), randn(2, 16, 8, 8, 8)
    made.dit.recompute = True
    low = smaller(high, made.encoder.rate)
    v = made(
        high,
        low,
        randn(2, 16, 4, 8, 8),
        torch.rand(2),
        randn(2, 3, base.dit.text_dim),
        torch.arange(8, 12).expand(2, -1),
    )
    v.square().mean().backward()
    assert all(p.grad is not None for name, p in made.encoder.named_parameters() if "patch_embedding" not in name)
    assert made.encoder.hr.proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    "memory",
    [
        dict(window=2, anchor=True),
        dict(cross_attention=True, rate="2x2x2+1x1x4"),
        dict(cache_memory=True, window=1),
    ],
)
def test_a_checkpoint_carries_its_options(cache, memory, capsys):
    """A training with them resumes, and sample.py and eval.py need no flag."""
    common = dict(cache=cache, encoder="none", steps=2, **memory)
    run(finetune.main, *flags(out="a", **common))
    run(finetune.main, *flags(out="b", **(common | dict(steps=1, warmup=0))))
    made = load_model(Path("a/model.safetensors"), tiny_base())
    assert made.config == replace(made.config, **memory)
    write_video("clip.mp4", 22)  # 11 s
    run(sample.main, "--history", "clip.mp4", "--checkpoint", "a/model.safetensors", "--prompt", "hills")
    tokens, high = re.findall(r"memory: (\d+) tokens", capsys.readouterr().out)[-1], randn(1, 16, 22, 8, 8)
    assert int(tokens) == made.count(made.remember(high, smaller(high[:, :, :20], made.encoder.rate)))
    run(finetune.main, *flags(out="a", resume=True, **(common | dict(steps=3))))


def test_history_noise(cache):
    """The history is noisy, the target is not; about one row in ten stays clean, and levels spread up to the most."""
    base = tiny_base()
    clips, _ = pretrain.open_dataset("world", base, cache, 8, 1, (2, 2, 2))
    encoder = MemoryDiT(base).encoder
    config = finetune.FinetuneConfig(preset="tiny", t_mean=0.0, t_std=1.0, batch=8)

    def draw(step, most):
        settings = replace(config, history_noise=most)
        return finetune.draw_continuation(settings, base, encoder, [clips[i] for i in range(8)], range(8), step)

    shares = []
    for step in range(25):
        clean, noisy = draw(step, 0.0), draw(step, 0.5)
        assert torch.equal(clean.target, noisy.target) and torch.equal(clean.times, noisy.times)
        for a, b, c, d in zip(clean.high, noisy.high, clean.low, noisy.low):
            level = (1 - (a * b).sum() / (a * a).sum()).item()  # of (1 - level) a + level ε
            shares.append(level)
            assert torch.equal(a, b) == torch.equal(c, d)
    shares = torch.tensor(shares)
    assert 0.03 < (shares == 0).float().mean() < 0.2 and 0.35 < shares.max() < 0.65 and shares.min() > -0.1
