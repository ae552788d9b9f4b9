"""Solvers against closed forms and diffusers; guidance: negative prompt, interval of noise levels, CFG-Zero*; what each
costs and brings: eval.py solvers."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.consistency import StoryConfig, continue_stories
from data import story_clips
from encoder import load_model
from eval import main, psnr
from model import DiT
from sample import SOLVERS, Guidance, euler, sample
from tests.common import randn, read_csv, run, tiny_base, write_checkpoint
from util.cli import load_object
from util.unipc import unipc


def levels(steps, shift=1.0):
    """Noise levels as sample() makes them, float64."""
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift * t / (1 + (shift - 1) * t)


def bent(x, t):
    """A velocity whose x_0 changes with x and with t."""
    return torch.sin(3 * x + 2 * t) + math.cos(5 * t) * x.roll(1, -1) + x**2 / (2 + x**2)


# ---------------------------------------------------------------------------------------------------------------------
# UniPC


@pytest.mark.optional
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shift", [1, 3, 5])
@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20, 50])
def test_unipc_equals_that_of_diffusers(steps, shift, dtype):
    diffusers = pytest.importorskip("diffusers")
    settings = dict(solver_order=2, solver_type="bh2", predict_x0=True, lower_order_final=True, flow_shift=shift)
    theirs = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, **settings)
    theirs.set_timesteps(sigmas=levels(steps)[:-1].numpy())  # by default they end above 0
    x = noise = randn(2, 3, 4).to(dtype)
    for i, t in enumerate(theirs.timesteps):
        x = theirs.step(bent(x, theirs.sigmas[i].item()), t, x).prev_sample
    ours = unipc(bent, noise, levels(steps, shift))
    assert (ours - x).abs().max() < 1e-4 and ours.dtype == dtype
    assert steps <= 2 or (ours - euler(bent, noise, levels(steps, shift))).abs().max() > 1e-2


@pytest.mark.parametrize("shift", [1, 3, 5])
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_unipc_finds_the_data_in_straight_lines(steps, shift):
    x0, noise, asked = randn(2, 3, 4), randn(2, 3, 4, seed=1), []
    found = unipc(lambda x, t: asked.append(t) or (x - x0) / t, noise, levels(steps, shift))
    assert torch.allclose(found, x0, atol=1e-5)
    assert asked == levels(steps, shift)[:-1].tolist()  # once per step


@pytest.mark.parametrize("steps", [1, 2])
def test_one_or_two_steps_of_unipc_are_eulers(steps):
    x = randn(2, 3, 4).double()
    assert (unipc(bent, x, levels(steps, 3)) - euler(bent, x, levels(steps, 3))).abs().max() < 1e-12


def test_unipc_is_of_second_order():
    """Twice as many steps make Euler's error half as large, and that of UniPC a quarter."""
    x = randn(2, 3, 4).double()
    field = lambda x, t: torch.sin(x + t)
    truth = unipc(field, x, levels(5000))
    halvings = {}
    for solver in euler, unipc:
        errors = [(solver(field, x, levels(steps)) - truth).abs().mean() for steps in (20, 160)]
        halvings[solver] = torch.log2(errors[0] / errors[1]).item() / 3  # per doubling
    assert halvings[euler] == pytest.approx(1, abs=0.1) and halvings[unipc] == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize("shift", [1e-6, 1e5, 1e9])
def test_unipc_takes_levels_that_lie_as_close_as_may_be(shift):
    x = randn(2, 3, 4)
    assert unipc(bent, x, levels(20, shift).float()).isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# Guidance


class PromptVelocity:
    """A DiT whose velocity is what a prompt's first number says, in each sample's own direction."""

    def __init__(self):
        self.calls = []  # (noise level, first number of the prompt)

    def __call__(self, x, t, text, times, memory):
        assert memory == "memory"
        self.calls.append((round(t[0].item() / 1000, 4), text[0, 0, 0].item()))
        way = torch.arange(1.0, len(x) + 1).view(-1, 1, 1, 1, 1)
        return way * text[:, 0, 0].view(-1, 1, 1, 1, 1) * torch.ones_like(x)


def guided(guidance, steps=4, dit=None, noise=None, solver=euler, prompt=2.0):
    noise = torch.zeros(2, 1, 1, 1, 2) if noise is None else noise
    dit = dit or PromptVelocity()
    return sample(dit, noise, torch.full((2, 3, 5), prompt), None, "memory", steps, 1, guidance, solver), dit.calls


def test_guidance_is_a_scale_or_more():
    (a, calls), (b, _) = guided(3.0), guided(Guidance(3.0))
    assert torch.equal(a, b) and a[:, 0, 0, 0, 0].tolist() == pytest.approx([-6, -12])
    assert calls == [(t, prompt) for t in (1, 0.75, 0.5, 0.25) for prompt in (2, 0)]
    assert [prompt for _, prompt in guided(Guidance())[1]] == [2] * 4


def test_a_negative_prompt_takes_the_place_of_none():
    x, calls = guided(Guidance(3.0, negative=torch.full((3, 5), 0.5)))
    assert [prompt for _, prompt in calls] == [2, 0.5] * 4
    assert x[:, 0, 0, 0, 0].tolist() == pytest.approx([-(0.5 + 3 * 1.5), -2 * (0.5 + 3 * 1.5)])


def test_outside_the_interval_one_pass_serves():
    x, calls = guided(Guidance(3.0, interval=(0.3, 0.75)))
    assert calls == [(1, 2), (0.75, 2), (0.75, 0), (0.5, 2), (0.5, 0), (0.25, 2)]
    assert x[0, 0, 0, 0, 0].item() == pytest.approx(-(2 + 6 + 6 + 2) / 4)


def test_cfg_zero_scales_the_other_velocity_for_each_sample():
    v, other = randn(2, 1, 2, 3, 4), randn(2, 1, 2, 3, 4, seed=1)
    dit = lambda x, t, text, times, memory: v if text.any() else other
    x = sample(dit, torch.zeros_like(v), torch.ones(2, 3, 5), None, None, 1, 1, Guidance(3.0, zero_star=True))
    for i in range(2):
        nearest = other[i] * (v[i] * other[i]).sum() / (other[i] ** 2).sum()
        assert ((v[i] - nearest) * other[i]).sum().abs() < 1e-5  # no other scale is nearer to v
        assert torch.allclose(-x[i], nearest + 3 * (v[i] - nearest), atol=1e-5)
    nothing = sample(lambda x, *_: 0 * x, v, torch.ones(2, 3, 5), None, None, 1, 1, Guidance(3.0, zero_star=True))
    assert torch.equal(nothing, v)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps, zero", [(1, 0), (24, 0), (25, 1), (49, 1), (50, 2)])
def test_cfg_zero_goes_nowhere_in_the_first_steps(steps, zero, solver):
    """4 % of the steps, rounded down: noise stays noise, and no pass of the DiT is needed."""
    noise, text = randn(2, 1, 1, 1, 2), torch.full((3, 5), 1.0)
    guidance = Guidance(2.0, negative=text, zero_star=True)
    x, calls = guided(guidance, steps, noise=noise, solver=load_object(SOLVERS[solver]))
    assert len(calls) == 2 * (steps - zero) and calls[0][0] == pytest.approx(1 - zero / steps, abs=1e-4)
    # the velocity of the negative prompt, scaled, is that of the prompt
    moved = (noise - x)[:, 0, 0, 0, 0] * steps / (steps - zero)
    assert moved.tolist() == pytest.approx([2, 4], rel=1e-3)
    assert len(guided(Guidance(1.0, zero_star=True), steps)[1]) == steps  # a part of guidance


# ---------------------------------------------------------------------------------------------------------------------
# python eval.py solvers


def test_solvers_command(cache, capsys, monkeypatch):
    forward, calls = DiT.forward, []
    monkeypatch.setattr(DiT, "forward", lambda *args: calls.append(1) or forward(*args))
    common = "--checkpoint", write_checkpoint(), "--clips", 2, "--cache", cache, "--device", "cpu"
    run(main, "solvers", *common, "--steps", 5)
    rows = read_csv("out/solvers.csv")
    asked = {(r["solver"], int(r["steps"]), float(r["guidance"])): r for r in rows}
    assert set(asked) == {(solver, n, g) for solver in ("euler", "unipc") for n in (1, 2, 4) for g in (1, 1.5)}
    passes = [int(r["passes"]) for r in rows]
    assert passes == sorted(passes) and sum(passes) == len(calls)  # both stories are one batch
    assert asked["unipc", 4, 1.5]["passes"] == "8" and asked["unipc", 4, 1]["passes"] == "4"

    base, config = tiny_base(), StoryConfig(steps=4, guidance=1.5, device="cpu")  # the PSNR of a row, again
    clips = story_clips("held-out", 2, base, cache, keep_pixels=True)
    made = continue_stories(load_model("tiny.safetensors", base), base, clips, 10, 1, config, unipc).flatten(1, 2)
    found = psnr(made, torch.stack([clip.pixels[40:44] for clip in clips.clips])).mean().item()
    assert float(asked["unipc", 4, 1.5]["psnr"]) == pytest.approx(found, abs=0.01)
    values = {key: float(r["psnr"]) for key, r in asked.items()}
    assert values["unipc", 2, 1.5] == pytest.approx(values["euler", 2, 1.5], abs=0.01)
    assert len({round(values[key], 3) for key in values if key[1] == 4}) == 4

    assert np.array(Image.open("out/solvers.png").convert("RGB")).std() > 5
    assert "8 passes: unipc   4 steps, guidance 1.5: consistency" in capsys.readouterr().out
    run(main, "solvers", *common, "--steps", 1, "--guidance", 1, "--out", "plain")
    assert [r["solver"] for r in read_csv("plain/solvers.csv")] == ["euler", "unipc"]


def test_solvers_refuses_what_it_cannot_measure(refused):
    assert "give one of finetune.py" in refused(main, "solvers", "--checkpoint", write_checkpoint(stage="pretrain"))
    for flag, value in ("--steps", 0), ("--sections", 0), ("--guidance", -1), ("--shift", 0):
        assert f"{flag} {value}" in refused(main, "solvers", "--checkpoint", write_checkpoint(), flag, value)
    Path("out/solvers.png").mkdir(parents=True)
    assert "solvers.png" in refused(main, "solvers", "--checkpoint", write_checkpoint())
