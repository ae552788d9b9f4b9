"""Table 2 and the story test: continuing stories, figures, pictures; what is refused."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from bench import budget, consistency, story, table2
from data import story_clips
from dolls import scores
from dolls.drawing import render
from dolls.stories import world_seed
from encoder import METHODS, MemoryDiT, load_model
from eval import main, psnr
from pretrain import generator
from sample import Memory, sample
from tests.common import TINY, randomize, read_csv, run, tiny_base, write_checkpoint
from util.device import autocast
from util.video import to_frames, to_pixels, video_info

# ---------------------------------------------------------------------------------------------------------------------
# Continuing


@torch.no_grad()
def test_stories_are_continued_as_sample_does(cache):
    """A batch gives what Memory, section by section, gives each story."""
    base, config = tiny_base(), table2.Table2Config(steps=2, batch=2, seed=5, device="cpu")
    model, clips = randomize(MemoryDiT(base)), story_clips("held-out", 2, base, cache, keep_pixels=True)
    made = consistency.continue_stories(model, base, clips, 10, 2, config)
    memory = Memory(model, base.codec, most=10)  # 20 s, as by default
    with autocast(torch.device("cpu")):
        memory.append(clips[1].cut(0, 40), to_pixels(clips[1].pixels[None, :40]))
        for k in 10, 11:
            noise = torch.randn(1, 16, 4, 8, 8, generator=generator(5, 1, k))
            text, times = clips[1].text(4 * k, base.prompts), 4 * k + torch.arange(4)
            x = sample(model.dit, noise, text, times, memory.context(), 2, 3.0, 1.5).float()
            memory.append(x, base.codec.decode(x))
            difference = to_frames(base.codec.decode(x))[0].int() - made[1, k - 10].int()
            assert difference.abs().float().mean() < 1  # bf16 differs with the size of a batch


@pytest.mark.parametrize("method", METHODS)
def test_every_method_continues_stories(method, cache):
    base, config = tiny_base(), table2.Table2Config(steps=1, device="cpu")
    model, clips = randomize(MemoryDiT(base, method)), story_clips("held-out", 2, base, cache, keep_pixels=True)
    assert consistency.continue_stories(model, base, clips, 10, 2, config).shape == (2, 2, 4, 32, 32, 3)
    found = consistency.costs(model, base, clips[0], config)
    expected = {"sliding-window": 16, "keyframes": 2 * 16, "full": 40 * 16, "none": 0}.get(method, 20)
    assert found["tokens"] == expected and found["ms_per_section"] > 0
    assert found["flops_per_section"] >= 2 * budget.flops(TINY["dit"], 4 * 16, expected)


# ---------------------------------------------------------------------------------------------------------------------
# python eval.py table2


@pytest.fixture
def table(stage2_runs, cache, capsys):
    """(rows of the CSV, the Markdown, what is printed) of a table of all runs, in out/, beside a Table 1."""
    Path("out").mkdir()
    Path("out/table1.csv").write_text("method,rate,psnr\nproposed,4x4x2,17\ncodec,,29\n")
    given = "--clips", 2, "--sections", 2, "--steps", 1, "--cache", cache
    run(main, "table2", *sorted(stage2_runs.iterdir()), *given)
    return read_csv("out/table2.csv"), Path("out/table2.md").read_text(encoding="utf-8"), capsys.readouterr().out


def test_table2(table, stage2_runs, cache):
    rows, text, printed = table
    header = Path("out/table2.csv").read_text().splitlines()[0]
    assert header.startswith("method,rate,tokens_per_second,cloth,identity,object,scene,psnr,")
    names = [("proposed", "4x4x2"), ("without-pretrain", "4x4x2"), ("frozen", "4x4x2"), ("sliding-window", "3")]
    assert {(r["method"], r["rate"]) for r in rows} == {*names, ("none", "")}
    means = [float(r["consistency"]) for r in rows]
    assert means == sorted(means, reverse=True)
    assert means[0] == pytest.approx(np.mean([float(rows[0][name]) for name in scores.MAIN]), abs=1e-3)
    tokens = {r["method"]: int(r["tokens"]) for r in rows}
    assert (tokens["proposed"], tokens["sliding-window"], tokens["none"]) == (20, 3 * 16, 0)
    row = next(r for r in rows if r["method"] == "none")
    assert int(row["flops_per_section"]) == 2 * budget.flops(TINY["dit"], 4 * 16)
    assert float(row["ms_per_section"]) > 0

    base, config = tiny_base(), table2.Table2Config(steps=1)  # the PSNR of a row, again
    clips = story_clips("held-out", 2, base, cache, keep_pixels=True)
    model = load_model(stage2_runs / "f" / "model.safetensors", base)
    made = consistency.continue_stories(model, base, clips, 10, 2, config).flatten(1, 2)
    truth = torch.stack([clip.pixels[40:48] for clip in clips.clips])
    assert float(row["psnr"]) == pytest.approx(psnr(made, truth).mean().item(), abs=0.01)

    assert text in printed and "dots: 1, too few" in printed
    pairs = [line for line in text.splitlines() if line.startswith("| proposed 4x4x2 above frozen 4x4x2")]
    mean, *each = pairs[-5:]  # the paper's differences: of the mean, of each score
    assert mean.endswith("| – | +15.84 |") and each[0].endswith("| – | +19.01 |")
    assert "| proposed | 4x4x2 | 96.12 | 70.73 | 89.89 | 77.4 | 80.19 | 74.38 | 72.21 |" in text
    assert "| frozen | 4x4x2 |  |  |  | 58.39 |" in text
    assert "100.0 (scene)" in text  # of the truth after the codec

    seeds = [(r["seed"], r["seeds"]) for r in read_csv("out/table2_seeds.csv") if r["method"] == "proposed"]
    assert seeds == [("0", "2"), ("1", "2")]
    for name in "table2.png", "table2_sections.png", "table2_curves.png", "table2_claim.png":
        assert np.array(Image.open(f"out/{name}").convert("RGB")).std() > 5
    assert video_info("out/table2.mp4")["seconds"] == pytest.approx((8 + 8) / 2, abs=0.1)


def test_drift_compares_the_first_sections_with_the_last(stage2_runs, cache):
    values = torch.arange(24.0).view(2, 12)  # sections 0..11 of two stories
    values[0, -1] = torch.nan  # nothing was asked there
    row = SimpleNamespace(name="a", values=dict.fromkeys((*scores.MAIN, "psnr", "position_error"), values))
    *_, line = table2.drift([row], 12)
    assert "| a | 6.5 → 18.3 (+11.8) |" in line and not table2.drift([row], 3)
    run(main, "table2", stage2_runs / "f", "--clips", 1, "--steps", 1, "--sections", 14, "--cache", cache)
    assert "Drift over 14 sections: mean of the first 2 → of the last 2" in Path("out/table2.md").read_text("utf-8")
    assert video_info("out/table2.mp4")["seconds"] == pytest.approx((8 + 14 * 4) / 2, abs=0.1)


def test_the_papers_means_need_all_of_its_figures():
    means = table2.papers_means({("a", ""): (1, 2, 3), ("b", ""): (1, 2, 3, 6)}, scores.MAIN)
    assert means == {("b", ""): 3}
    assert table2.papers_means({("a", ""): (1, 2, 3)}, ("object",)) == {("a", ""): 3}


def test_runs_that_do_not_belong_in_the_table_are_refused(refused, stage1, stage2_runs):
    good = stage2_runs / "a"
    assert "needs finished runs of finetune.py" in refused(main, "table2")
    assert "is of stage pretrain: give runs of finetune.py" in refused(main, "table2", stage1)
    assert "nowhere" in refused(main, "table2", "nowhere")
    assert "--sections 0: must be at least 1" in refused(main, "table2", good, "--sections", 0)
    Path("other").mkdir()
    Path("other/log.jsonl").touch()
    write_checkpoint("other/model.safetensors", steps=7)
    assert "trained alike" in refused(main, "table2", good, "other")
    assert "with seed 0: give one of them" in refused(main, "table2", "other", "other/../other")


@pytest.mark.parametrize(
    "content", (b"a,b\n1,2\n", b"method,rate,psnr\nproposed\n", b"\xff\xfe", b"method,rate,psnr\nnone,,high\n")
)
def test_a_table1_that_is_none_is_refused_before_anything_is_measured(refused, stage2_runs, content):
    Path("out").mkdir()
    Path("out/table1.csv").write_bytes(content)
    assert "out/table1.csv is not what" in refused(main, "table2", stage2_runs / "a", "--clips", 1)


# ---------------------------------------------------------------------------------------------------------------------
# The story test


@pytest.mark.parametrize("seed", range(5))
def test_absence_stories_differ_in_the_absence_alone(seed):
    told = [story.make_absence_story(seed, absence) for absence in range(8)]
    assert len({(s.characters, s.things, s.scenes, s.shots[-1]) for s in told}) == 1
    for absence, s in enumerate(told):
        seen = [(k, shot.framing) for k, shot in enumerate(s.shots[:10]) if shot.character is not None]
        assert len(s.shots) == 11 and seen == [(0, 0), (9 - absence, 0)]  # twice, in wide framing
        assert s.askable(10) and s.shots[10].character == 0
        assert all((shot.thing is None) == (shot.character is not None) for shot in s.shots)


def test_story_command(stage2_runs, cache, capsys):
    run(main, "story", stage2_runs / "a", stage2_runs / "f", "--clips", 1, "--steps", 1, "--cache", cache)
    rows, printed = read_csv("out/table2_story.csv"), capsys.readouterr().out
    expected = [(method, f"{2.0 * k}") for method in ("none", "proposed") for k in range(8)]
    assert [(r["method"], r["seconds_absent"]) for r in rows] == expected
    for r in rows:
        assert float(r["cloth"]) in (0, 100) and float(r["identity"]) in (0, 100)
        assert 0 <= float(r["cloth_low"]) < float(r["cloth_high"]) <= 100
        assert 0 < float(r["position_error"]) < 32 * 2**0.5
    assert "14 s absent" in printed and f"step {rows[0]['step']}, seed 0" in printed
    for name in "table2_story.png", "table2_story_strip.png":
        assert np.array(Image.open(f"out/{name}").convert("RGB")).std() > 5


class Measured(Exception):
    pass


def measure_nothing(*args):
    raise Measured


def test_a_story_test_is_measured_once(stage2_runs, cache, monkeypatch):
    asked = "story", stage2_runs / "a", "--clips", 1, "--steps", 1, "--cache", cache
    run(main, *asked)
    first, drawn = Path("out/table2_story.csv").read_text(), []
    monkeypatch.setattr(story, "save_contact_sheet", lambda rows, path, columns: drawn.extend([*rows, columns]))
    monkeypatch.setattr(consistency, "continue_stories", measure_nothing)
    run(main, *asked)
    assert Path("out/table2_story.csv").read_text() == first
    with pytest.raises(Measured):
        run(main, *asked, "--seed", 1)
    (name, made), (_, truth), seconds = drawn
    assert name == "proposed\n4x4x2" and made.shape == truth.shape == (8, 32, 32, 3) and seconds[-1] == "14 s"
    assert made.float().std() > 5
    told = story.make_absence_story(world_seed("held-out", 0), 7)
    assert np.array_equal(truth[-1].numpy(), render(told, None, 4, 32, 32)[0][10 * 4 + 2])


def test_a_story_test_needs_no_log(stage2_runs, cache):
    Path("alone").mkdir()
    shutil.copy(stage2_runs / "a" / "model.safetensors", "alone")
    run(main, "story", "alone", "--clips", 1, "--steps", 1, "--cache", cache)
    assert {r["run"] for r in read_csv("out/table2_story.csv")} == {"alone"}


def test_of_several_seeds_the_lowest_is_drawn():
    config = dict(method="proposed", rate="4x4x2", encoder="x")
    runs = {"a": config | {"seed": 1}, "b": config | {"seed": 0}, "c": config | {"seed": 5, "rate": "2x2x2"}}
    assert list(story.lowest_seeds(runs)) == ["c", "b"]
