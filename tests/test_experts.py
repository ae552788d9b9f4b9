"""Bases of two DiTs, one for high and one for low noise levels: each is trained alone, both sample together."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import finetune
import pretrain
import sample
from bases import open_base
from bases.experts import Experts
from encoder import load_model
from model import DiT, noise_levels
from sample import Guidance, SampleConfig
from tests.common import TINY, flags, losses, randn, randomize, run, script, tiny_base, write_checkpoint, write_video
from util.cli import UserError
from util.device import autocast
from util.weights import read_config

HIGH, LOW = "high/model.safetensors", "low/model.safetensors"


@pytest.fixture
def init():
    """A folder with the weights of both, in diffusers' layout."""
    for seed, name in enumerate(("transformer", "transformer_2")):
        (Path("wan") / name).mkdir(parents=True)
        save_file(randomize(DiT(TINY["dit"]), seed).state_dict(), Path("wan") / name / "model.safetensors")
    return "wan"


def train(main, cache, init, expert, out=None, **changes):
    given = dict(preset="tiny-experts", init=init, expert=expert, out=out or expert, lr=0.03, ema=0, warmup=1)
    run(main, *flags(cache, **given | changes))


@pytest.fixture
def pair(cache, init):
    """HIGH and LOW, trained for a few steps."""
    train(finetune.main, cache, init, "high", encoder="none")
    train(finetune.main, cache, init, "low", encoder="high", freeze_encoder=True)


def opened(**changes):
    """The MemoryDiT that sample.py has with these flags."""
    config = SampleConfig(history="clip.mp4", checkpoint=HIGH, init="wan", **changes)
    base, _ = sample.check(config)
    return sample.open_model(config, base, torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_noise_levels_in_a_range_are_those_of_all_that_lie_there():
    quantiles = (torch.arange(4000) + 0.5) / 4000
    everywhere = noise_levels(quantiles, 1.3, 0.8)
    assert torch.equal(everywhere, torch.sigmoid(1.3 + 0.8 * torch.special.ndtri(quantiles)))
    for low, high in (0.875, 1.0), (0.0, 0.875), (0.3, 0.6):
        levels, theirs = (
            noise_levels(quantiles, 1.3, 0.8, (low, high)),
            everywhere[(everywhere - low) * (high - everywhere) > 0],
        )
        assert low <= levels.min() and levels.max() <= high and len(theirs) > 100
        for q in 0.01, 0.3, 0.5, 0.9, 0.99:
            assert torch.quantile(levels, q).item() == pytest.approx(torch.quantile(theirs, q).item(), abs=3e-3)
    far = noise_levels(quantiles, -40.0, 1.0, (0.875, 1.0))  # where hardly any level lies
    assert far.isfinite().all() and far.min() >= 0.875


def test_a_batch_covers_the_range_of_its_expert():
    base, found = tiny_base("tiny-experts"), {}
    for expert in "high", "low":
        config = pretrain.PretrainConfig(batch=8, expert=expert)
        found[expert] = torch.cat([pretrain.noise_level(config, base, 3, row) for row in range(8)])
    assert found["low"].max() < 0.875 < found["high"].min()
    assert len({*found["low"].tolist(), *found["high"].tolist()}) == 16


def test_each_expert_is_trained_on_its_own_weights_with_one_encoder(cache, pair):
    high, low = load_file(HIGH), load_file(LOW)
    encoder = [name for name in high if name.startswith("encoder.")]
    assert encoder and all(torch.equal(high[name], low[name]) for name in encoder)
    loras = [name for name in high if name.endswith("lora_B")]
    assert loras and not any(torch.equal(high[name], low[name]) for name in loras)
    assert [read_config(path)["expert"] for path in (HIGH, LOW)] == ["high", "low"]
    levels = {"high": (0.95, 0.99), "low": (0.25, 0.5, 0.75)}  # at which they are validated, with no sampling
    for expert, inside in levels.items():
        record = Path(expert, "log.jsonl").read_text().splitlines()[-1]
        assert [t for t in (0.25, 0.5, 0.75, 0.95, 0.99) if f'"loss_t{t}"' in record] == list(inside)
        assert "psnr" not in record and len(losses(expert)) == 3
    for path, weights in (HIGH, "transformer"), (LOW, "transformer_2"):
        model = load_model(path, open_base("tiny-experts"), "wan")
        theirs = load_file(f"wan/{weights}/model.safetensors")
        weight = model.dit.blocks[0].ffn[0].weight  # of the compute dtype
        assert torch.equal(weight, theirs["blocks.0.ffn.0.weight"].to(weight.dtype))


def test_stage_1_trains_an_expert_too(cache, init):
    train(pretrain.main, cache, init, "high", out="stage1", queries=2)
    train(finetune.main, cache, init, "high", encoder="stage1")
    assert read_config("stage1/model.safetensors")["expert"] == read_config(HIGH)["expert"] == "high"


@pytest.mark.parametrize("high, low", [("transformer", "transformer_2"), ("high_noise_model", "low_noise_model")])
def test_weights_are_found_in_the_folder_of_both(high, low):
    base = open_base("wan2.2-a14b")
    Path("x", high).mkdir(parents=True)
    assert Path(base.expert_weights("x", "high")) == Path("x", high)
    for wrong, expert in ("x", "low"), (f"x/{high}", "low"), (f"y/{low}", "high"):
        with pytest.raises(UserError, match=f"--init {wrong} has no weights of the {expert} expert"):
            base.expert_weights(wrong, expert)
    Path("x", low).mkdir()
    for expert, name in ("high", high), ("low", low):
        assert (
            Path(base.expert_weights("x", expert)) == Path(base.expert_weights(f"x/{name}", expert)) == Path("x", name)
        )
    assert str(base.expert_weights("base.safetensors", "low")) == "base.safetensors"
    assert open_base("wan-14b").expert_weights("x", None) == "x"


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


class Recorder(torch.nn.Module):
    """A DiT that says where it was put and what it was given."""

    def __init__(self, name, done):
        super().__init__()
        self.name, self.done, self.weight = name, done, torch.nn.Parameter(torch.zeros(1))

    def to(self, device):
        self.done.append((self.name, str(device)))
        return self

    def forward(self, x, t, text, times, memory):
        self.done.append((self.name, t[0].item(), memory))
        return x


def test_the_dit_of_the_noise_level_is_used_and_the_other_waits():
    done = []
    experts = Experts(Recorder("high", done), Recorder("low", done), 0.875)
    assert done == [("low", "cpu")]
    x = torch.zeros(1, device="meta")  # stands for a GPU
    for t in 1000, 875, 874, 100, 900:
        experts(x, torch.tensor([t]), None, None, "memory")
        (module,) = experts.children()  # what moves with the model, and where the model is
        assert module is experts.current and len(experts.waiting) == 1 and experts.waiting[0] is not module
    asked = [event for event in done if len(event) == 3]
    assert asked == [
        (name, t, "memory") for name, t in zip(("high", "high", "low", "low", "high"), (1000, 875, 874, 100, 900))
    ]
    moved = [event for event in done if len(event) == 2]
    assert moved[1:] == [("high", "cpu"), ("low", "meta"), ("low", "cpu"), ("high", "meta")]  # one at a time
    untrained = Experts(Recorder("high", done), Recorder("low", done), 0.875, low_reads=False)
    for t in 900, 500:
        untrained(x, torch.tensor([t]), None, None, "memory")
    assert [event for event in done if len(event) == 3][-2:] == [("high", 900, "memory"), ("low", 500, None)]


@torch.no_grad()
def test_sampling_opens_both_as_they_were_trained(pair):
    model, base = opened(low_checkpoint=LOW), open_base("tiny-experts")
    x, text, memory = randn(1, 16, 2, 8, 8), randn(1, 24, 16), (randn(1, 5, 48), randn(5, 3))
    alone = {path: load_model(path, base, "wan").dit for path in (HIGH, LOW)}
    untrained, merged, plain = opened(), opened(low_checkpoint=LOW, merge=True), DiT(base.dit)
    base.load_dit(plain, "wan/transformer_2", frozen=True)
    with autocast(torch.device("cpu")):
        for t, path, other in (900.0, HIGH, LOW), (500.0, LOW, HIGH), (875.0, HIGH, LOW):
            given = x, torch.tensor([t]), text, torch.arange(2)
            v = model.dit(*given, memory)
            assert torch.equal(v, alone[path](*given, memory))
            assert (v - alone[other](*given, memory)).abs().max() > 0.1
            assert (v - merged.dit(*given, memory)).abs().max() < 0.1
            expected = v if path == HIGH else plain(*given)  # without memory
            assert torch.equal(untrained.dit(*given, memory), expected)


def test_guidance_is_each_experts_own():
    calls = []

    def dit(x, t, text, times, memory):
        calls.append((round(t[0].item() / 1000, 3), text.any().item()))
        return torch.full_like(x, 2.0 if text.any() else 1.0)

    def generate(guidance, steps=4):
        calls.clear()
        return sample.sample(
            dit, torch.zeros(1, 1, 1, 1, 1), torch.ones(1, 2, 3), None, None, steps, 1.0, guidance
        ).item()

    # levels 1, 0.75, 0.5, 0.25; v = 1 + scale
    assert generate(Guidance(4.0, below=(0.75, 3.0))) == pytest.approx(-(5 + 5 + 4 + 4) / 4)
    assert generate(Guidance(4.0, below=(0.75, 1.0))) == pytest.approx(-(5 + 5 + 2 + 2) / 4)
    assert calls == [(1, True), (1, False), (0.75, True), (0.75, False), (0.5, True), (0.25, True)]
    assert generate(Guidance(4.0)) == generate(Guidance(4.0, below=(0.75, None))) == pytest.approx(-5)


def test_a_clip_is_continued_by_both(cache, pair, capsys, monkeypatch):
    write_video("clip.mp4", 12)
    seen, real = [], sample.sample
    monkeypatch.setattr(sample, "sample", lambda *given: seen.append(given[7]) or real(*given))
    common = "--history", "clip.mp4", "--checkpoint", HIGH, "--init", "wan", "--seconds=4", "--steps=4", "--prompt=x"
    for given, scales in (
        ((), (4.0, 3.0)),
        (("--guidance", 2), (2.0, 2.0)),
        (("--guidance", 2, "--low_guidance", 1.5), (2.0, 1.5)),
        (("--low_guidance", 1), (4.0, 1.0)),
    ):
        seen.clear()
        run(sample.main, *common, *given, "--low_checkpoint", LOW, "--device", "cpu")
        assert [(g.scale, *g.below) for g in seen] == [(scales[0], 0.875, scales[1])] * 2
    assert "memory: " in capsys.readouterr().out and Path("out/clip.mp4").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def test_training_refuses_what_does_not_fit(cache, init, refused):
    def refusal(main, **changes):
        given = dict(preset="tiny-experts", init="wan", expert="high", out="x") | changes
        return refused(main, *(f for f in flags(cache, **{k: v for k, v in given.items() if v is not None})))

    assert "choose high or low" in refusal(pretrain.main, expert=None)
    assert "choose high or low" in refusal(finetune.main, expert="medium", encoder="none")
    assert "--preset tiny has one DiT" in refusal(pretrain.main, preset="tiny", init="random")
    assert "--cache_memory" in refusal(pretrain.main, cache_memory=True)
    assert "--freeze_encoder" in refusal(finetune.main, expert="low", encoder="none")
    assert "no weights of the low expert" in refusal(pretrain.main, expert="low", init="wan/transformer")


def test_sampling_refuses_what_does_not_fit(cache, pair, refused):
    write_video("clip.mp4", 12)
    common = sample.main, "--history", "clip.mp4", "--init", "wan"
    both = *common, "--checkpoint", HIGH, "--low_checkpoint", LOW
    assert f"{LOW} is of the low expert" in refused(*common, "--checkpoint", LOW)
    assert "has expert high, but low is needed" in refused(*common, "--checkpoint", HIGH, "--low_checkpoint", HIGH)
    assert "--lora" in refused(*both, "--lora", "a.safetensors")
    assert "--low_guidance -1" in refused(*both, "--low_guidance", -1)
    assert "transformer_2" in refused(*common[:-1], "wan/transformer", "--checkpoint", HIGH)
    train(finetune.main, cache, "wan", "high", out="other", encoder="none", seed=1)
    given = "--checkpoint", "other/model.safetensors", "--low_checkpoint", LOW
    assert f"{LOW} has another φ than other/model.safetensors" in refused(*common, *given)
    one = write_checkpoint()
    for flag, value in ("--low_checkpoint", LOW), ("--low_guidance", 2):
        assert f"{flag} does nothing" in refused(sample.main, "--history", "clip.mp4", "--checkpoint", one, flag, value)
    random = "--init", "random", "--preset", "tiny-experts", "--low_checkpoint", LOW
    assert "does nothing for random weights" in refused(sample.main, "--history", "clip.mp4", *random)
    said = refused(script("eval"), "continuation", "--checkpoint", HIGH, "--init", "wan", "--cache", cache)
    assert "one of two DiTs" in said
