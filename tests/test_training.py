"""Both stages: what is drawn to denoise, the optimizers, the training loop."""

import contextlib
import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import finetune
import pretrain
from bases.base import Base
from data import story_clips
from encoder import METHODS, HighRes, MemoryDiT, load_model
from model import noise_levels
from pretrain import draw_retrieval
from sample import Memory, sample
from tests.common import (
    SETTINGS,
    TINY,
    flags,
    listing,
    losses,
    randn,
    run,
    smaller,
    stop_in_step,
    tiny_base,
    tiny_encoder,
    torchrun,
    write_checkpoint,
    write_video,
)
from util.checkpoint import read_log
from util.optim import Muon, make_optimizers, orthogonalize, share_matrices
from util.weights import load_weights, read_config

# ---------------------------------------------------------------------------------------------------------------------
# What to denoise


def draw(clips, rows, step, **changes):
    """A batch of stage 1 on the tiny base."""
    config = dataclasses.replace(SETTINGS["pretrain"], **changes)
    return draw_retrieval(config, tiny_base(), tiny_encoder(), clips, rows, step)


def begins_of(clip, high):
    """The frames of a clip at which high (C, F, h, w) may begin: a story can show the same twice."""
    n = high.shape[1]
    return [i for i in range(clip.frames - n + 1) if torch.equal(clip.latents[:, i : i + n].float(), high)]


def test_retrieval_asks_for_frames_of_the_history(clips):
    batch = draw(clips, range(8), 3)
    assert batch.high.shape == (8, 16, 40, 8, 8) and batch.target.shape == (8, 16, 4, 8, 8) and batch.t.shape == (8,)
    for i, clip in enumerate(clips):
        omega = batch.times[i].long()
        assert torch.equal(batch.target[i], batch.high[i][:, omega]) and len(set(omega.tolist())) == 4
        assert min(begins_of(clip, batch.high[i])) <= 12
    for clip, high, low in zip(clips, batch.high, batch.low):
        lows = [tiny_base().codec.cut_low(clip.low[None].float(), i, i + 40, 2)[0] for i in begins_of(clip, high)]
        assert any(torch.equal(low, x) for x in lows)
    prompted = [text.any().item() for step in range(8) for text in draw(clips, range(8), step).text]
    assert 16 < sum(prompted) < 48  # dropped in half of the samples


def test_retrieval_hides_all_but_the_queries(clips):
    clean, noisy = (draw(clips, range(8), 0, mask=mask) for mask in ("none", "noise"))
    assert torch.equal(clean.target, noisy.target) and torch.equal(clean.times, noisy.times)
    asked = torch.zeros(8, 40, dtype=torch.bool).scatter_(1, clean.times.long(), True)
    assert torch.equal((clean.high == noisy.high).all(4).all(3).all(1), asked)
    assert torch.equal((clean.low == noisy.low).all(4).all(3).all(1), asked.view(8, 20, 2).any(2))

    def level(noisy, clean, kept):  # of x + level (ε - x)
        return ((noisy - clean)[:, ~kept].var() / (1 + clean[:, ~kept].var())).sqrt().item()

    for i in range(8):  # one level per clip, for both
        high = level(noisy.high[i], clean.high[i], asked[i])
        low = level(noisy.low[i], clean.low[i], asked[i].view(20, 2).any(1))
        assert 0 < high < 1 and high == pytest.approx(low, rel=0.25)


def check_continuation(clip, batch, i, n, section):
    """Row i of a batch is a history of n frames of the clip and what follows it, and all that it asks for was seen."""

    def follows(first):
        target = clip.latents[:, first + n : first + n + section].float()
        return (first + n) % section == 0 and torch.equal(batch.target[i], target)

    first = next(f for f in begins_of(clip, batch.high[i]) if follows(f))
    begin = first + n
    # all that is asked for was on screen for a whole section of this history
    assert clip.story.askable(begin // section, -(-first // section))
    assert not batch.text[i].any() or torch.equal(batch.text[i], tiny_base().prompts(clip.prompt(begin)))


def test_continuation_asks_for_what_follows_the_history(clips):
    base, section, waiting = tiny_base(), 4, []
    for step in range(24):
        some = [clips[i] for i in np.random.default_rng(step).permutation(8)[:3]]
        batch = finetune.draw_continuation(SETTINGS["finetune"], base, tiny_encoder(), some, range(3), step)
        n = batch.high.shape[2]
        waiting.append(n % section)
        assert section <= n <= 40 and batch.target.shape == (3, 16, section, 8, 8)
        whole = batch.high[:, :, : n // section * section]
        assert batch.low.shape == smaller(whole, (2, 4, 4)).shape
        assert batch.times.tolist() == [list(range(n, n + section))] * 3
        for i, clip in enumerate(some):
            check_continuation(clip, batch, i, n, section)
    assert 6 < waiting.count(0) < 20  # about half end with an unfinished segment


def test_batches_do_not_depend_on_how_they_are_split(clips):
    for step in range(6):
        whole, parts = draw(clips, range(8), step), [draw(clips, range(i, i + 2), step) for i in range(0, 8, 2)]
        for key, value in vars(whole).items():
            assert value is None or torch.equal(value, torch.cat([getattr(p, key) for p in parts])), key


def test_generators_depend_on_every_part_of_the_key():
    keys = list(itertools.product(range(3), repeat=3))
    first = [[torch.rand((), generator=pretrain.generator(*key)).item() for key in keys] for _ in range(2)]
    assert len(set(first[0])) == len(keys) and first[0] == first[1]


def test_noise_levels_are_spread_over_a_batch():
    config = pretrain.PretrainConfig(batch=8, t_mean=1.3, t_std=2.0)
    rows = [
        torch.cat([pretrain.noise_level(config, tiny_base(), step, row) for row in range(8)]) for step in range(400)
    ]
    normal = (torch.logit(torch.stack(rows)) - 1.3) / 2  # (steps, rows)
    eighths = (8 * torch.special.ndtr(normal)).floor().clamp(0, 7)
    assert (eighths.sort(dim=1).values == torch.arange(8)).float().mean() > 0.99  # one of each eighth
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.03 and (normal[0] - normal[1]).abs().min() > 0
    assert noise_levels(torch.tensor([0.5]), 0.0).item() == 0.5


def test_stage_2_is_validated_on_the_longest_history(cache):
    """Drawn at random its length would differ from seed to seed, and some would end with uncompressed frames."""
    clips = story_clips("held-out", 2, tiny_base(), cache, (2, 4, 4))
    for seed in range(6):
        config = dataclasses.replace(SETTINGS["finetune"], seed=seed)
        batch = finetune.draw_continuation(config, tiny_base(), tiny_encoder(), clips, range(2), 0, longest=True)
        assert batch.high.shape[2] == TINY["history"] and batch.times[0].tolist() == [40, 41, 42, 43]


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers


def test_muon_makes_updates_orthogonal():
    for rows, columns in (48, 96), (96, 48), (16, 200):  # square ones have singular values too near to zero
        g = randn(3, rows, columns)
        made = orthogonalize(g)
        s = torch.linalg.svdvals(made)
        assert 0.6 < s.min() and s.max() < 1.25
        u, _, v = torch.linalg.svd(g, full_matrices=False)
        assert F.cosine_similarity((u @ v).flatten(1), made.flatten(1)).min() > 0.95


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_the_matrices(world):
    params = [torch.empty(*shape) for shape in [(4, 4), (16, 4), (4, 4), (4, 2, 2), (64, 64), (32, 32), (4, 16)]]
    shares = share_matrices(params, world)
    assert sorted(i for share in shares for some in share.values() for i in some) == list(range(len(params)))
    assert all(
        (len(params[i]), params[i][0].numel()) == shape for share in shares for shape in share for i in share[shape]
    )
    assert world == 1 or list(shares[0].values()) == [[4]]  # it costs more than all others together


def test_muon_updates_are_the_same_in_shares(monkeypatch):
    """What two processes exchange adds up to what one makes alone, though neither makes all of it."""
    net, alone, halves = HighRes(4, (8, 8, 16), (2, 4, 4), 8), [], []
    params = [p for p in net.parameters() if p.ndim in (2, 5)]
    for seed, p in enumerate(params):
        p.grad = randn(*p.shape, seed=seed)
    for world in 1, 2:
        for rank in range(world):
            with monkeypatch.context() as m:
                if world > 1:
                    for name, value in dict(
                        is_initialized=True, get_rank=rank, get_world_size=2, all_reduce=None
                    ).items():
                        m.setattr(torch.distributed, name, lambda *given, value=value: value)
                (alone if world == 1 else halves).append(Muon(params, 0.1).updates(params, 0.95))
    for whole, a, b in zip(*alone, *halves):
        assert torch.allclose(a + b, whole, atol=1e-3) and whole.any() and (a.any() != b.any())


def peaks(model, **changes):
    """{name of a parameter: its peak learning rate}."""
    config = pretrain.PretrainConfig(**{"lr": 0.02, "optimizer": "muon", **changes})
    names = {id(p): name for name, p in model.named_parameters()}
    optimizers = make_optimizers(model, config.optimizer, config.lr, config.encoder_lr)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    found = [(names[id(p)], group["peak"]) for group in groups for p in group["params"]]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_every_trained_weight_has_one_optimizer():
    model = MemoryDiT(tiny_base())
    model.dit.text_embedding.requires_grad_(False)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    muon, adam = make_optimizers(model, "muon", 0.02)
    matrices = {id(p) for group in muon.param_groups for p in group["params"]}
    assert {id(model.dit.blocks[0].ffn[0].weight), id(model.encoder.hr.convs[0].weight)} <= matrices
    rates = peaks(model)
    assert rates.keys() == trained
    slow = {name for name, rate in rates.items() if rate == 0.01 * 0.02}
    assert slow == {name for name in trained if name.startswith("dit.time_")}
    for optimizer in "muon", "adamw":
        whole, slower = peaks(model, optimizer=optimizer), peaks(model, optimizer=optimizer, encoder_lr=0.1)
        assert whole.keys() == slower.keys() == trained
        share = {name: 0.1 if name.startswith("encoder.") else 1 for name in whole}
        assert all(math.isclose(slower[name], whole[name] * share[name]) for name in whole)


# ---------------------------------------------------------------------------------------------------------------------
# The training loop


def test_training_lowers_the_loss(stage1):
    found = losses(stage1)
    assert len(found) == 40 and np.mean(found[-8:]) < 0.85 * np.mean(found[:4])
    last = json.loads((stage1 / "log.jsonl").read_text().splitlines()[-1])
    figures = {"psnr", "psnr_one_step", "psnr_wrong_memory", "psnr_one_step_wrong_memory"}
    assert {"loss_t0.5", "grad_norm", *figures} <= set(last)
    path = stage1 / "model.safetensors"
    load_model(path, tiny_base())
    config = read_config(path)
    assert (config["stage"], config["step"], config["rate"]) == ("pretrain", 40, "4x4x2")
    assert listing(stage1) == ["log.jsonl", "model.safetensors", "preview_000040.png", "state.pt"]


@pytest.fixture
def exact(monkeypatch):
    """Float32 and plain gradient descent: bf16 and Muon make much of the last bits."""

    def descent(model, optimizer, lr, encoder_lr):
        return [torch.optim.SGD([dict(params=[p for p in model.parameters() if p.requires_grad], peak=lr)], lr)]

    monkeypatch.setattr(pretrain, "autocast", lambda device: torch.autocast("cpu", enabled=False))
    monkeypatch.setattr(pretrain, "make_optimizers", descent)


@pytest.mark.parametrize("kind", ["world", "videos"])
@pytest.mark.parametrize("stage", [pretrain, finetune])
def test_accumulated_gradients_equal_those_of_the_whole_batch(stage, kind, cache, exact):
    if kind == "videos":  # all of another length
        for i in range(6):
            write_video(Path("videos") / f"{i}.mp4", 9 + 8 * i, i)
    for n in 1, 4:
        more = {"encoder": "none"} if stage is finetune else {}
        run(stage.main, *flags(cache, out=f"out{n}", micro_batch=n, data=kind, **more))
    assert losses("out1") == pytest.approx(losses("out4"), abs=1e-5)
    a, b = (load_file(f"out{n}/model.safetensors") for n in (1, 4))
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-5


def test_a_stopped_run_goes_on_as_if_it_had_not_been(cache, capsys):
    run(pretrain.main, *flags(cache, out="whole", steps=6))
    stop_in_step(2, pretrain, lambda: run(pretrain.main, *flags(cache, out="parts", steps=6)))
    assert len(losses("parts")) == 3
    run(pretrain.main, *flags(cache, out="new", steps=6, resume=True))  # nothing there yet: from the start
    assert losses("new") == losses("whole")
    run(pretrain.main, *flags(cache, out="parts", steps=6, resume=True))
    assert losses("parts") == losses("whole")
    a, b = (load_file(f"{out}/model.safetensors") for out in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    capsys.readouterr()
    run(pretrain.main, *flags(cache, out="parts", steps=5, resume=True))  # finished: nothing to do, and it says so
    assert "parts has 6 steps already" in capsys.readouterr().err and losses("parts") == losses("whole")


def test_two_processes_train_as_one(cache):
    run(pretrain.main, *flags(cache, out="one", steps=4))
    torchrun("pretrain", *flags(cache, out="two", steps=4))
    assert losses("two") == pytest.approx(losses("one"), abs=1e-3)
    assert losses("two", "grad_norm") == pytest.approx(losses("one", "grad_norm"), rel=0.02)
    one, two = (json.loads(Path(out, "log.jsonl").read_text().splitlines()[-1]) for out in ("one", "two"))
    assert one.keys() == two.keys() and two["psnr"] == pytest.approx(one["psnr"], abs=0.05)
    a, b = (load_file(f"{out}/model.safetensors") for out in ("one", "two"))
    assert a.keys() == b.keys()


@pytest.mark.parametrize("lora", (0, 4))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", ("tiny", "tiny-wan"))
def test_everything_stays_on_the_device(preset, method, lora, monkeypatch):
    """The base is loaded onto the device and φ made on the CPU: what follows must not mix the two. The meta device
    stands for a GPU: like one, it refuses tensors of the CPU."""
    monkeypatch.setattr(Base, "load_dit", lambda self, dit, path, device, frozen: dit.to(device))
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    base, meta = tiny_base(preset), torch.device("meta")
    model = pretrain.make_model(pretrain.PretrainConfig(preset=preset, method=method, lora=lora), base, meta)

    def random(*shape):
        return torch.randn(*shape, device=meta)

    n = 2 * base.section + base.codec.causal
    high, x_t, times = random(2, 16, n + 1, 8, 8), random(2, 16, 4, 8, 8), random(2, 4)
    low = smaller(high[:, :, :n], (2, 4, 4))
    v = model(high, low, x_t, random(2), random(2, 24, base.dit.text_dim), times)
    v.sum().backward()
    assert v.device == meta and all(p.device == meta for p in model.parameters())
    memory = Memory(model, base.codec, most=2)
    memory.encode_low = lambda pixels: low[:1, :, -base.section // 2 :] if len(memory.segments) else low[:1, :, :1]
    for _ in range(2):
        memory.append(high[:1], high[:1])
    text = random(1, 24, base.dit.text_dim)
    assert sample(model.dit, x_t[:1], text, times[:1], memory.context(), 2, 3.0, 2.0).device == meta


def test_stage_2_takes_or_keeps_the_encoder(cache, stage1, monkeypatch, capsys):
    # without a device the weights would end up on the CPU, away from the DiT
    monkeypatch.setattr("util.run.load_weights", lambda *a, device, **k: load_weights(*a, device=device, **k))
    for name, more in ("trained", {}), ("frozen", {"freeze_encoder": True}), ("fresh", {"encoder": "none"}):
        run(finetune.main, *flags(cache, out=name, **{"encoder": stage1, **more}))
    theirs = {k: v for k, v in load_file(stage1 / "model.safetensors").items() if k.startswith("encoder.")}
    trained, frozen, fresh = (load_file(f"{name}/model.safetensors") for name in ("trained", "frozen", "fresh"))
    assert theirs and all(torch.equal(frozen[k], v) for k, v in theirs.items())
    assert capsys.readouterr().out.count(f"φ: {stage1}/model.safetensors, of pretrain.py, step ") == 2

    def gap(tensors):
        return sum((tensors[k] - v).square().sum() for k, v in theirs.items())

    assert 0 < gap(trained) < 0.5 * gap(fresh)  # it starts from φ of stage 1 and moves on
    assert any(not torch.equal(frozen[k], v) for k, v in trained.items() if k.startswith("dit."))


def test_weights_without_their_state_are_not_written_over(cache, capsys):
    """--resume begins anew where there is no state.pt, and keeps the weights that lie there under another name."""
    run(pretrain.main, *flags(cache, out="run", steps=3))
    weights, state = Path("run/model.safetensors"), Path("run/state.pt")
    before = weights.read_bytes()
    state.unlink()
    run(pretrain.main, *flags(cache, out="run", steps=2, resume=True))
    assert Path("run/model-step3.safetensors").read_bytes() == before != weights.read_bytes()
    assert state.is_file() and list(read_log(Path("run/log.jsonl"))) == [1, 2]
    assert "model-step3.safetensors now" in capsys.readouterr().out


def test_a_base_without_memory(cache):
    run(finetune.main, *flags(cache, out="base", method="none"))
    assert all(k.startswith("dit.") for k in load_file("base/model.safetensors"))
    run(pretrain.main, *flags(cache, out="next", init="base/model.safetensors", steps=1, lr=1e-9))
    a, b = load_file("base/model.safetensors"), load_file("next/model.safetensors")
    assert all(torch.allclose(b[k], v, atol=1e-6) for k, v in a.items())
    assert torch.allclose(b["encoder.patch_embedding.weight"], a["dit.patch_embedding.weight"], atol=1e-6)


def test_the_base_has_a_folder_of_its_own(cache):
    run(finetune.main, *flags(cache, method="none", steps=1))
    run(finetune.main, *flags(cache, encoder="none", steps=1))
    assert all(Path("runs", name, "model.safetensors").is_file() for name in ("base", "finetune"))


def test_stage_2_takes_the_presets_rate_as_stage_1_does(monkeypatch):
    """By the defaults of both: it was refused once, None being compared with a rate."""

    class Reached(Exception):
        pass

    def setup(config):
        raise Reached

    Path("runs/pretrain").mkdir(parents=True)
    write_checkpoint("runs/pretrain/model.safetensors", stage="pretrain")
    monkeypatch.setattr(finetune, "setup", setup)
    for more in ("--rate", "4x4x2"), ():
        with pytest.raises(Reached):
            run(finetune.main, "--preset", "tiny", "--init", "random", *more)
