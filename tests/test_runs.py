"""Rows and kept measurements (bench/runs.py)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench import runs
from eval import main
from tests.common import read_csv, run, write_checkpoint
from util.cli import warn
from util.weights import open_safetensors, read_config


@pytest.mark.parametrize(
    "config, expected",
    [
        (dict(method="proposed"), ("proposed", "4x4x2")),
        (dict(method="proposed", encoder="none"), ("without-pretrain", "4x4x2")),
        (dict(method="proposed", freeze_encoder=True), ("frozen", "4x4x2")),
        (dict(method="only-lr", encoder="none", freeze_encoder=False), ("only-lr-without-pretrain", "4x4x2")),
        (dict(method="full", encoder="a"), ("full", "")),
        (dict(method="keyframes", encoder="none"), ("keyframes", "")),
        (dict(method="none", encoder="none"), ("none", "")),
        (dict(method="sliding-window", window=8, encoder="none"), ("sliding-window", "8")),
    ],
)
def test_labels(config, expected):
    assert runs.label({"rate": "4x4x2", **config}) == expected


def test_pictures_are_kept_exactly():
    pictures = torch.randint(256, (2, 3, 8, 10, 3), dtype=torch.uint8)
    assert torch.equal(runs.unpack(runs.pack(pictures), 2, 3), pictures)


# ---------------------------------------------------------------------------------------------------------------------
# Versions

ASKED = {"steps": 10, "codec": ["dct", "x"]}


class Measure:
    """A measure() that counts its calls."""

    count = 0

    def __call__(self, folder):
        self.count += 1
        return {"psnr": torch.full((2, 4), float(self.count))}, torch.zeros(1, 4, 8, 8, 3, dtype=torch.uint8), {"a": 1}


@pytest.fixture
def measured():
    """measured(): the row of a run in the folder "run", and how often it was measured by then."""
    Path("run").mkdir()
    write_checkpoint("run/model.safetensors")
    measure = Measure()

    def check(asked=ASKED):
        warn.cache_clear()
        file = Path("run/model.safetensors")
        found = {"run": read_config(file if file.exists() else "run/table2.safetensors")}
        (row,) = runs.measure_runs(found, "table2", asked, "a machine", measure)
        return row, measure.count

    return check


def rewrite(change):
    """Rewrite what the kept file says of itself, with change(dict)."""
    path = "run/table2.safetensors"
    with open_safetensors(path) as f:
        metadata = f.metadata()
    known = json.loads(metadata["measured"])
    change(known)
    save_file(load_file(path), path, metadata | {"measured": json.dumps(known)})


def become_old(known):
    """As before versions were counted: a hash of the code instead."""
    del known["version"]
    known["code"] = "1aee7f0bc4287b7d"


def test_a_run_is_measured_once(measured):
    assert measured()[1] == 1
    row, count = measured()
    assert count == 1 and row.version == runs.MEASUREMENT_VERSION and row.psnr.tolist() == [1, 1]
    assert row.machine == "a machine" and row.costs == {"a": 1}
    assert measured(ASKED | {"steps": 20})[1] == 2


def test_a_new_version_measures_again(measured, monkeypatch):
    measured()
    monkeypatch.setattr(runs, "MEASUREMENT_VERSION", runs.MEASUREMENT_VERSION + 1)
    assert measured()[1] == 2 and measured()[1] == 2


def test_a_run_measured_before_versions_were_counted_is_measured_again(measured):
    measured()
    rewrite(become_old)
    assert measured()[1] == 2


@pytest.mark.parametrize("old", (True, False))
def test_a_row_without_weights_may_be_of_any_version(measured, capsys, old):
    measured()
    if old:
        rewrite(become_old)
    Path("run/model.safetensors").unlink()
    row, count = measured()
    assert count == 1 and row.version == (0 if old else runs.MEASUREMENT_VERSION)
    assert capsys.readouterr().err.count("measured by another version") == old


def test_what_cannot_be_kept_is_said(measured, capsys):
    Path("run/table2.safetensors").mkdir()  # in its place
    Path("run/table2.safetensors/x").touch()
    row = runs.Row("a", "", {}, torch.zeros(1, 1, 8, 8, 3, dtype=torch.uint8), {}, "run", {})
    warn.cache_clear()
    runs.keep(row, "table2", {})
    assert "this measurement is not kept" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Rows of a table


@pytest.fixture
def two_runs(request, stage1_runs, stage2_runs, cache):
    """(table, two runs, what is asked) of a table that lies in first/."""
    table = request.param
    pair = (stage1_runs / "full-0", stage1_runs / "proposed-0")
    pair = pair if table == "table1" else (stage2_runs / "f", stage2_runs / "a")
    asked = "--clips", 2, "--steps", 1, "--cache", cache
    run(main, table, *pair, *asked, "--out", "first")
    return table, *pair, asked


both_tables = pytest.mark.parametrize("two_runs", ("table1", "table2"), indirect=True)


@both_tables
def test_a_measured_row_needs_no_weights(two_runs, refused):
    """The file that a table keeps in a run's folder stands for the run, with the same figures, and only for what was
    asked."""
    table, mine, given, asked = two_runs
    kept = f"{table}.safetensors"
    Path("row").mkdir()
    shutil.copy(given / kept, "row")
    run(main, table, mine, "row", *asked, "--out", "second")
    for ending in ".csv", "_seeds.csv", ".png", "_curves.png":
        assert Path(f"second/{table}{ending}").read_bytes() == Path(f"first/{table}{ending}").read_bytes()
    assert "steps 1, not 2" in refused(main, table, "row", *asked, "--steps", 2)
    assert "with seed 0: give one of them" in refused(main, table, given, "row", *asked)
    assert "seed 0, not 1" in refused(main, table, "row", *asked, "--seed", 1)
    Path("row", kept).write_bytes(b"cut short")
    assert kept in refused(main, table, "row", *asked)


@both_tables
def test_other_weights_are_measured_anew(two_runs, refused):
    table, mine, given, asked = two_runs
    kept = f"{table}.safetensors"
    Path("other").mkdir()  # the measurement of one run, the weights of another
    shutil.copy(given / kept, "other")
    for name in "model.safetensors", "log.jsonl":
        shutil.copy(mine / name, "other")
    run(main, table, "other", *asked, "--out", "third")
    expected = [row["psnr"] for row in read_csv(f"first/{table}.csv") if row["method"] in ("full", "none")]
    assert [read_csv(f"third/{table}.csv")[-1]["psnr"]] == expected
    Path("other", "model.safetensors").unlink()
    Path("other", kept).rename("other/table3.safetensors")
    assert "but table3.safetensors" in refused(main, table, "other", *asked)
