"""Table 1: from finished runs to figures, differences and pictures; what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench import table1
from bench.lpips import open_lpips
from bench.runs import Row
from data import story_clips
from encoder import load_model
from eval import main, psnr
from pretrain import PretrainConfig, draw_retrieval
from sample import sample
from tests.common import listing, randn, read_csv, run, tiny_base, write_checkpoint, write_video
from tests.test_metrics import write_lpips
from util.device import autocast
from util.video import to_frames

# ---------------------------------------------------------------------------------------------------------------------
# Differences


def table_row(method, rate, values, seed=0, one_step=None):
    metrics = {"psnr": values[:, None], "psnr_one_step": (values if one_step is None else one_step)[:, None]}
    return Row(method, rate, metrics, None, {}, trained={"seed": seed})


def cells_of(lines):
    """{A above B: other cells} of the lines of a table of differences."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    return {first: rest for first, *rest in cells if " above " in first and first != "A above B"}


def test_neighbours_and_the_papers_order_are_compared():
    clip = 15 + randn(64)
    rows = [
        table_row("full", "", clip + 3, 0, clip),  # at one step all are alike
        table_row("large-patchifier", "4x4x2", clip + 1.5 + 0.1 * randn(64, seed=1), 0, clip),
        table_row("proposed", "4x4x2", clip + 1, 0, clip),
        table_row("only-lr", "4x4x2", clip + 1 + randn(64, seed=2), 0, clip),
    ]
    others = [
        table_row("proposed", "4x4x2", clip + 2, 1, clip),
        table_row("large-patchifier", "4x4x2", clip, 1, clip),
        table_row("proposed", "4x4x2", clip, 2, clip),  # no other row has this seed
    ]
    lines = table1.differences(rows, rows + others)
    starts = [i for i, line in enumerate(lines) if line.startswith("| A above B")] + [len(lines)]
    neighbours, order, one_step = (cells_of(lines[a:b]) for a, b in zip(starts, starts[1:]))
    assert len(neighbours) == len(order) == len(one_step) == 3
    assert [cells[3] for cells in one_step.values()] == ["undecided"] * 3
    assert neighbours["full above large-patchifier 4x4x2"][3:] == ["yes", "–", "–"]
    assert neighbours["proposed 4x4x2 above only-lr 4x4x2"][3:] == ["undecided", "–", "+2.20"]
    gap = (rows[2].psnr - rows[1].psnr).mean().item()
    found = order["proposed 4x4x2 above large-patchifier 4x4x2"]
    assert found[0] == f"{gap:+.2f}" and found[3:] == ["no", f"{gap:+.2f}, +2.00", "+4.48"]


def test_no_pairs_no_lines():
    assert table1.differences([table_row("full", "", 15 + randn(8))], []) == []


def test_means_by_age():
    values, ages = torch.tensor([[1.0, 2, 3], [4, 5, 6]]), torch.tensor([[0.0, 3, 4], [39, 36, 35]])
    assert table1.by_age(values, ages, 4) == {0: 1.5, 1: 3, 8: 6, 9: 4.5}


# ---------------------------------------------------------------------------------------------------------------------
# python eval.py table1


def test_table1(stage1_runs, cache, capsys):
    given = [stage1_runs / name for name in ("proposed-1", "full-0", "proposed-0")]
    write_lpips()
    run(main, "table1", *given, "--clips", 2, "--steps", 2, "--cache", cache, "--lpips", "lpips")
    printed, rows = capsys.readouterr().out, read_csv("out/table1.csv")
    header = Path("out/table1.csv").read_text().splitlines()[0]
    assert header.startswith("method,rate,tokens_per_second,psnr,psnr_low,psnr_high,ssim,")
    assert rows[0]["method"] == "codec"
    assert {(r["method"], r["rate"]) for r in rows[1:]} == {("proposed", "4x4x2"), ("full", "")}
    means = [float(r["psnr"]) for r in rows]
    assert means == sorted(means, reverse=True)
    assert all(float(r["lpips"]) >= 0 for r in rows)
    row = next(r for r in rows if r["method"] == "proposed")
    assert (row["tokens_per_second"], row["channels_per_latent_value"]) == ("1.0", "0.0234375")
    assert row["paper_psnr"] == "17.41" and float(row["encoder_ms"]) > 0
    assert float(row["psnr_low"]) < float(row["psnr"]) < float(row["psnr_high"])

    seeds = read_csv("out/table1_seeds.csv")
    assert [(r["method"], r["seed"]) for r in seeds] == [("full", "0"), ("proposed", "0"), ("proposed", "1")]
    both = [float(r["psnr"]) for r in seeds[1:]]
    assert float(seeds[1]["psnr_deviation_of_seeds"]) == pytest.approx(np.std(both, ddof=1), abs=1e-3)
    assert seeds[0]["psnr_deviation_of_seeds"] == "" and both[0] == pytest.approx(float(row["psnr"]))
    text = Path("out/table1.md").read_text(encoding="utf-8")
    assert text in printed and "2 held-out clips x 4 frames" in text and "n/a" not in text
    assert f"| full | {stage1_runs / 'full-0'} | " in text
    for name in "table1.png", "table1_curves.png", "table1_age.png":
        assert np.array(Image.open(f"out/{name}").convert("RGB")).std() > 5


def test_a_row_is_what_the_model_retrieves(stage1_runs, cache):
    """The PSNR of a row again, in plain steps."""
    folder, base, settings = stage1_runs / "proposed-0", tiny_base(), PretrainConfig(text_drop=1.0)
    run(main, "table1", folder, "--clips", 2, "--steps", 2, "--cache", cache)
    row = read_csv("out/table1.csv")[1]
    model = load_model(folder / "model.safetensors", base)
    clips = story_clips("held-out", 2, base, cache, model.encoder.low_rate, keep_pixels=True)
    batch = draw_retrieval(settings, base, model.encoder, clips, range(2), 0)
    with torch.no_grad(), autocast(torch.device("cpu")):
        memory = model.encoder.encode(batch.high, batch.low)
        x = sample(model.dit, batch.noise, batch.text, batch.times, memory, 2, 3.0)
    mean = psnr(to_frames(base.codec.decode(x.float())), batch.truth).mean().item()
    assert float(row["psnr"]) == pytest.approx(mean, abs=0.01)
    assert int(row["encoder_parameters"]) == sum(p.numel() for p in model.encoder.parameters())

    config = table1.Table1Config(steps=1)
    _, ages, pictures = table1.retrieve(model, base, model.encoder, clips, config, open_lpips(config))
    assert torch.equal(ages, 39 - batch.times) and torch.equal(pictures["truth"], batch.truth)


@pytest.mark.parametrize("name, reads_low", [("proposed-0", True), ("full-0", False)])
def test_making_low_counts_for_methods_that_read_it(name, reads_low, stage1_runs, monkeypatch):
    base = tiny_base()
    model, made = load_model(stage1_runs / name / "model.safetensors", base), []
    encode = base.codec.encode
    monkeypatch.setattr(base.codec, "encode", lambda *args: made.append(1) or encode(*args))
    table1.costs(model, base, (8, 8), torch.device("cpu"))
    assert len(made) == (1 + 6 if reads_low else 0)  # to count tokens, and in 6 rounds


def test_table1_of_videos(stage1_runs):
    for i in range(3):
        write_video(Path("videos") / f"{i}.mp4", 10, i)
    run(main, "table1", stage1_runs / "proposed-0", "--data", "videos", "--steps", 1)
    endings = ".md", ".csv", ".png", "_seeds.csv", "_curves.png", "_age.png"
    assert listing("out") == sorted(f"table1_video{end}" for end in endings)
    codec, row = read_csv("out/table1_video.csv")
    assert float(codec["psnr"]) > 30 and codec["lpips"] == row["lpips"] == "n/a" and row["psnr_low"] == "nan"
    assert "1 held-out clips x 4 frames of videos" in Path("out/table1_video.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def write_run(name, method="proposed", stage="pretrain", **claims):
    """A folder that claims to be a finished run."""
    Path(name).mkdir()
    Path(name, "log.jsonl").touch()
    claims = {"steps": 7, "mask": "none", "queries": 4, **claims}
    write_checkpoint(f"{name}/model.safetensors", stage, method, **claims)
    return name


@pytest.mark.parametrize(
    "key, value", dict(init="random", data="videos", batch=4, mask="noise", clips=5, queries=2).items()
)
def test_runs_that_are_not_trained_alike_are_refused(refused, key, value):
    error = refused(main, "table1", write_run("good"), write_run("other", "full", **{key: value}))
    assert f"other has --{key} {value} but good has" in error and "trained alike" in error


def test_runs_that_do_not_belong_in_the_table_are_refused(refused):
    good = write_run("good")
    assert "step 7 of 9" in refused(main, "table1", good, write_run("unfinished", steps=9))
    assert "give runs of pretrain.py" in refused(main, "table1", good, write_run("stage2", stage="finetune"))
    assert "no file nowhere/model.safetensors" in refused(main, "table1", good, "nowhere")
    assert "give their folders" in refused(main, "table1")
    assert "--clips 0: must be at least 1" in refused(main, "table1", good, "--clips", 0)
    Path("good/log.jsonl").unlink()
    assert "good has no log.jsonl" in refused(main, "table1", good)


def test_the_same_row_twice_is_refused(refused):
    good = write_run("good")
    assert "both proposed 4x4x2 with seed 0" in refused(main, "table1", good, write_run("twice"))
    full = write_run("full1", "full"), write_run("full2", "full", rate="2x2x2")
    assert "both full  with seed 0" in refused(main, "table1", *full)  # it has no rate
