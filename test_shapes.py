"""Shapes, positions, and one training step and one section of every preset and method: python -m pytest -q
test_shapes.py

Half a minute. The rest of the tests is in tests/, by topic.
"""

from dataclasses import replace

import pytest
import torch

from bases import BASES, open_base
from data import Clip, Clips
from encoder import METHODS, MemoryDiT, find_method, parse_rate
from eval import psnr, ssim
from finetune import FinetuneConfig, draw_continuation
from model import DiT, DiTConfig, add_noise, rope, token_positions
from pretrain import PretrainConfig, draw_retrieval
from sample import Memory, SampleConfig, continue_video, sample
from tests.common import BlockCodec
from util.optim import EMA, make_optimizers, set_learning_rate

torch.set_num_threads(1)  # everything here is so small that threads only wait for each other
PRESETS = [name for name in BASES if not name.startswith("tiny")]
COMPRESSING = [name for name in METHODS if find_method(name).has_stage1]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny(name="nano", **changes):
    """A base with everything of its preset but the size: small frames, three segments of history, a narrow DiT."""
    base = open_base(name)
    height, width = (8 * s for s in base.codec.stride[1:])  # 4x4 tokens per latent frame
    dit = replace(base.dit, dim=48, ffn_dim=64, heads=2, layers=2, text_dim=16, text_len=8)
    base = replace(base, dit=dit, sizes=((height, width),), widths=(8, 8, 16, 16), lora=base.lora and 4, **changes)
    if base.codec.causal:
        base.codec = BlockCodec(base.codec)  # Wan's own needs weights
    base.prompts = Prompts()
    return replace(base, history=3 * base.section + base.codec.causal)


class Prompts:
    length, settings = 8, ["test"]

    def __call__(self, prompt):
        return randn(8, 16, seed=len(prompt)) if prompt else torch.zeros(8, 16)


def make_model(base, method="proposed", rate="2x2x2", **memory):
    """A model whose every weight is random, so that nothing hides behind a weight that starts at zero."""
    model = MemoryDiT(base, method, rate, **memory)
    if base.lora:
        base.add_lora(model.dit, base.lora)
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = p.data + 0.1 * torch.randn(p.shape, generator=g)
    return model


def make_clips(base, n=3):
    """Random clips, one section longer than the history, with original pixels."""
    frames, (height, width) = base.history + base.section, base.sizes[0]
    clips = []
    for i in range(n):
        latents = randn(base.dit.in_dim, frames, *latent_size(base), seed=i).half()
        pixels = torch.full((frames, height, width, 3), i, dtype=torch.uint8)
        low = latents[:, ::2, ::2, ::2] if base.codec.causal else latents[:, :, ::2, ::2]  # at 2x2x2
        clips.append(Clip(latents, [(0, "a"), (base.section, "a b")], pixels, low=low))
    return Clips(clips)


def latent_size(base):
    return tuple(n // s for n, s in zip(base.sizes[0], base.codec.stride[1:]))


def encode(model, high):
    """φ of high (B, C, F, H, W), whose `low` is made up: (tokens, positions)."""
    t, h, w = model.encoder.rate
    return model.encoder.encode(high, high[:, :, : model.encoder.whole(high.shape[2]) : t, ::h, ::w])


# ---------------------------------------------------------------------------------------------------------------------
# The DiT


def test_positions_are_ordered_frame_row_column():
    positions = token_positions([5, 7.5], rows=2, columns=3)
    assert positions.shape == (12, 3)
    assert positions[:4].tolist() == [[5, 0, 0], [5, 0, 1], [5, 0, 2], [5, 1, 0]]
    assert positions[-1].tolist() == [7.5, 1, 2]
    assert rope(positions[None], 20).shape == (1, 12, 1, 10, 2)


@pytest.mark.parametrize("M", [0, 5])
@torch.no_grad()
def test_dit_returns_the_shape_it_was_given(M):
    c = DiTConfig(dim=48, ffn_dim=64, heads=2, layers=2, in_dim=3, out_dim=3, text_dim=16, text_len=8)
    memory = (randn(2, M, 48), randn(M, 3)) if M else None
    v = DiT(c)(randn(2, 3, 4, 6, 8), torch.tensor([0.0, 1000]), randn(2, 5, 16), torch.arange(4), memory)
    assert v.shape == (2, 3, 4, 6, 8) and v.dtype == torch.float32


def test_time_is_relative():
    """Moving everything in time by the same amount changes nothing: RoPE knows differences only."""
    model = make_model(tiny())
    x, text, tokens, places = randn(1, 16, 2, 8, 8), randn(1, 8, 16), randn(1, 6, 48), 3 * randn(6, 3)
    shift = torch.tensor([40.0, 0, 0])
    t = torch.tensor([500.0])
    with torch.no_grad():
        a = model.dit(x, t, text, torch.tensor([9, 10]), (tokens, places))
        b = model.dit(x, t, text, torch.tensor([49, 50]), (tokens, places + shift))
        c = model.dit(x, t, text, torch.tensor([49, 50]), (tokens, places))
    assert torch.allclose(a, b, atol=1e-4) and (a - c).abs().max() > 1e-3


def test_presets_have_the_parameters_of_their_models():
    with torch.device("meta"):
        count = {name: sum(p.numel() for p in open_base(name).make_dit().parameters()) for name in PRESETS}
    assert count["wan-1.3b"] == 1_418_996_800 and count["wan-14b"] == 14_288_491_584
    assert count["wan2.2-5b"] == 4_999_787_712 and count["hunyuan"] == 12_821_012_544
    assert 5e6 < count["nano"] < 7e6


def test_one_step_of_the_sampler_is_the_conditional_mean():
    x0, noise = randn(2, 16, 4, 8, 8), randn(2, 16, 4, 8, 8, seed=1)

    def dit(x, t, text, times, memory):
        return noise - x0

    for steps in (1, 7):
        assert torch.allclose(sample(dit, noise, randn(2, 8, 16), None, None, steps, shift=3.0), x0, atol=1e-5)
    assert torch.equal(add_noise(x0, noise, torch.ones(2)), noise) and torch.equal(
        add_noise(x0, noise, torch.zeros(2)), x0
    )


# ---------------------------------------------------------------------------------------------------------------------
# φ


@pytest.mark.parametrize("rate, tokens", {"4x4x2": 80, "2x2x2": 320, "2x2x1": 640, "8x8x1": 40}.items())
@torch.no_grad()
def test_tokens_of_20_seconds_of_nano(rate, tokens):
    base = open_base("nano")
    tokens_of_base, positions = encode(MemoryDiT(base, "proposed", rate), randn(1, 16, 40, 16, 16))
    assert tokens_of_base.shape == (1, tokens, 256) and positions.shape == (tokens, 3)


@torch.no_grad()
def test_tokens_of_20_seconds_of_wan():
    """480x832 at 16 frames per second, 4x4x2: 8x13 tokens per two latent frames, padded up."""
    base = open_base("wan-1.3b")
    model = MemoryDiT(replace(base, dit=replace(base.dit, dim=48, layers=1, heads=2)), "only-lr", "4x4x2")
    tokens, positions = encode(model, torch.zeros(1, 16, 81, 60, 104))
    assert tokens.shape == (1, 4264, 48)
    assert positions[0].tolist() == [0, 1.5, 1.5]  # the lone first latent
    assert positions[104].tolist() == [1.5, 1.5, 1.5]  # latents 1 and 2


@pytest.mark.parametrize("method", ["proposed", "only-lr", "without-lr", "large-patchifier"])
@torch.no_grad()
def test_tokens_sit_at_the_centres_of_their_blocks(method):
    base = tiny()
    _, positions = encode(make_model(base, method, "4x2x2"), randn(1, 16, 4, 8, 8))
    assert positions.tolist() == [[t, 1.5, w] for t in (0.5, 2.5) for w in (0.5, 2.5)]


@pytest.mark.parametrize("preset", ["nano", "wan-1.3b"])
@pytest.mark.parametrize("method", COMPRESSING)
@torch.no_grad()
def test_appending_a_section_leaves_the_history_alone(method, preset):
    """φ([H; X]) = [φ(H); φ(X)], with and without a causal codec's lone first latent."""
    base = tiny(preset)
    codec, model, high = base.codec, make_model(base, method), randn(2, 16, base.history, *latent_size(base))
    pixels = codec.decode(high)
    low = codec.encode_low(pixels, (2, 2, 2))
    tokens, positions = model.encoder.encode(high, codec.cut_low(low, 0, base.history, 2))
    memory, decode = Memory(model, codec), codec.decoder()
    for piece in high.split(5, dim=2):
        memory.append(piece, decode(piece))
    assert torch.allclose(memory.context()[0], tokens, atol=1e-5)
    assert torch.equal(memory.context()[1].expand(len(tokens), -1, -1), positions.expand(len(tokens), -1, -1))

    part = base.history - base.section
    tokens, tokens_of_part = encode(model, high)[0], encode(model, high[:, :, :part])[0]
    assert torch.allclose(tokens[:, : tokens_of_part.shape[1]], tokens_of_part, atol=1e-5)
    changed = high.clone()
    changed[:, :, part:] += 1
    later = encode(model, changed)[0]
    assert torch.equal(later[:, : tokens_of_part.shape[1]], tokens[:, : tokens_of_part.shape[1]])
    assert (later - tokens).abs().max() > 1e-3


@torch.no_grad()
def test_frames_of_an_unfinished_segment_stay_uncompressed():
    base = tiny()
    model = make_model(base, rate="4x4x2")
    tokens, positions = encode(model, randn(1, 16, 6, 8, 8))
    assert tokens.shape[1] == 2 + 2 * 16  # a segment of 4 frames, then 2 frames of 4x4 tokens
    assert positions[2:].tolist() == token_positions([4, 5], 4, 4).tolist()


@torch.no_grad()
def test_memory_keeps_the_newest_segments():
    base = tiny()
    memory = Memory(make_model(base), base.codec, most=2)
    for _ in range(5):
        memory.append(randn(1, 16, 4, 8, 8), randn(1, 3, 4, *base.sizes[0]))
        assert memory.context()[0].shape[1] <= 2 * 8
    assert memory.context()[1][:, 0].tolist() == [t for t in (12.5, 14.5, 16.5, 18.5) for _ in range(4)]


@pytest.mark.parametrize("rate", ["4x4", "3x4x2", "axbxc", "0x4x2", "", "4x4x2x1"])
def test_bad_rates_are_refused(rate):
    with pytest.raises(ValueError, match="--rate"):
        parse_rate(rate)


# ---------------------------------------------------------------------------------------------------------------------
# One training step and one section


def train_once(base, model, batch):
    """One optimizer step on a batch; returns the loss before and after it."""
    optimizers = make_optimizers(model, base.optimizer, base.lr)
    ema, losses = EMA(model, 0.9), []
    for step in range(2):
        set_learning_rate(optimizers, step, steps=3, warmup=0)
        x_t = add_noise(batch.target, batch.noise, batch.t)
        v = model(batch.high, batch.low, x_t, batch.t, batch.text, batch.times)
        assert v.shape == batch.target.shape
        loss = (batch.noise - batch.target - v).square().mean()
        losses.append(loss.item())
        if step == 0:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(ema.params, 1.0)
            for optimizer in optimizers:
                optimizer.step()
    return losses


def check_batch(base, batch, B, F, history):
    """The shapes of a Batch with targets of F frames."""
    C, h, w = base.dit.in_dim, *latent_size(base)
    assert batch.high.shape == (B, C, history, h, w) and batch.low.shape[:2] == (B, C)
    assert batch.target.shape == batch.noise.shape == (B, C, F, h, w)
    assert batch.times.shape == (B, F) and batch.t.shape == (B,) and batch.text.shape == (B, 8, 16)
    assert batch.truth.shape == (B, F, *base.sizes[0], 3)


def expert(base):
    return "high" if base.boundary else None


@pytest.mark.parametrize("preset", PRESETS)
def test_stage_1_of_every_preset(preset):
    base = tiny(preset)
    model, clips = make_model(base), make_clips(base)
    config = PretrainConfig(preset=preset, mask="noise", batch=3, expert=expert(base))
    batch = draw_retrieval(config, base, model.encoder, clips, range(3), step=0)
    check_batch(base, batch, B=3, F=4, history=base.history)
    for i, clip in enumerate(clips):  # H_Ω, where it belongs; frames in Ω stay clean
        omega = batch.times[i].long()
        assert torch.equal(batch.target[i], batch.high[i][:, omega])
        assert psnr(batch.truth[i], clip.pixels[:4]).min() == 100
    before, after = train_once(base, model, batch)
    assert after < before


@pytest.mark.parametrize("preset", PRESETS)
def test_stage_2_of_every_preset(preset):
    base = tiny(preset)
    model, clips = make_model(base), make_clips(base)
    config = FinetuneConfig(preset=preset, batch=3, t_mean=base.t_mean, t_std=base.t_std, expert=expert(base))
    batch = draw_continuation(config, base, model.encoder, clips, range(3), step=0, longest=True)
    check_batch(base, batch, B=3, F=base.section, history=base.history)
    assert batch.times[0].tolist() == list(range(base.history, base.history + base.section))
    assert torch.equal(batch.target[0], clips[0].cut(base.history, base.history + base.section)[0])
    before, after = train_once(base, model, batch)
    assert after < before


@pytest.mark.parametrize("method", METHODS)
def test_a_step_and_a_section_of_every_method(method):
    base = tiny()
    model, clips = make_model(base, method), make_clips(base)
    config = FinetuneConfig(batch=2, t_mean=1.0, t_std=1.0)
    batch = draw_continuation(config, base, model.encoder, clips, range(2), step=0, longest=True)
    before, after = train_once(base, model, batch)
    assert after < before
    other = model(batch.high + 1, batch.low + 1, batch.target, batch.t, batch.text, batch.times)
    same = model(batch.high, batch.low, batch.target, batch.t, batch.text, batch.times)
    assert ((other - same).abs().max() < 1e-6) == (method == "none")  # memory is read
    assert generate(base, model, clips).shape == (base.section, *base.sizes[0], 3)


@pytest.mark.parametrize("preset", PRESETS)
def test_two_sections_of_every_preset(preset):
    base = tiny(preset)
    frames = generate(base, make_model(base), make_clips(base), sections=2)
    assert frames.shape == (2 * base.section * base.codec.stride[0], *base.sizes[0], 3)


@torch.no_grad()
def generate(base, model, clips, sections=1):
    """Sections after the history of the first clip: frames uint8 (F, H, W, 3)."""
    memory, decode = Memory(model, base.codec, most=3), base.codec.decoder()
    history = clips[0].cut(0, base.history)
    memory.append(history, decode(history))
    config = SampleConfig(steps=2, guidance=2.0, shift=3.0)
    texts = [base.prompts("a")] * sections
    made = [frames for frames, _ in continue_video(model, base, memory, decode, texts, config, base.sizes[0])]
    assert memory.frames == base.history + sections * base.section
    return torch.cat(made)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def test_metrics_give_one_value_per_frame():
    a = torch.randint(0, 256, (5, 16, 24, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert psnr(a, a).tolist() == [100] * 5 and torch.allclose(ssim(a, a), torch.ones(5, dtype=torch.float64))
    assert psnr(a, 255 - a).shape == ssim(a, 255 - a).shape == (5,)
    assert psnr(torch.zeros_like(a), torch.full_like(a, 255)).tolist() == [0] * 5
