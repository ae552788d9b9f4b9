"""The examples of docs/extending.md run."""

import re
import sys
from pathlib import Path

import pytest

import bases
import data
import encoder
import finetune
import pretrain
import sample
from tests.common import ROOT, flags, losses, run, tiny_base, write_checkpoint, write_video
from util.cli import load_object

DOC = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


@pytest.fixture
def examples(monkeypatch):
    """The code blocks of the document as files that can be imported."""
    blocks = re.findall(r"```python\n# (\S+)\n(.*?)```", DOC, re.DOTALL)
    for name, code in blocks:
        Path(Path(name).name).write_text(code)
    monkeypatch.syspath_prepend(".")
    assert {name for name, _ in blocks} == {"block_mean.py", "gifs.py", "heun.py", "bases/blocks.py"}
    yield
    for name, _ in blocks:
        sys.modules.pop(Path(name).stem, None)


def registry_line(name):
    """The value of "name": "value" that the document says to add to a registry."""
    return re.search(rf'`"{name}": "([\w.]+)"`', DOC)[1]


def test_a_method_in_one_file(examples, cache, monkeypatch):
    monkeypatch.setitem(encoder.METHODS, "block-mean", registry_line("block-mean"))
    run(pretrain.main, *flags(cache, out="a", method="block-mean"))
    run(finetune.main, *flags(cache, out="b", method="block-mean", encoder="a"))
    write_video("clip.mp4")
    run(sample.main, "--history", "clip.mp4", "--checkpoint", "b/model.safetensors", "--seconds=2", "--steps=1")
    assert Path("out/clip.mp4").is_file() and len(losses("b")) == 3


def test_a_dataset_in_one_file(examples, cache, monkeypatch):
    monkeypatch.setitem(data.DATASETS, "gifs", registry_line("gifs"))
    for i in range(4):
        write_video(Path("my_gifs") / f"wave_{i}.gif", 12, i)
    run(pretrain.main, *flags(cache, out="a", data="gifs:my_gifs", batch=2, text_drop=0))
    assert len(losses("a")) == 3
    train, held_out = load_object(data.DATASETS["gifs"])("my_gifs", tiny_base(), cache, 8, 1, None)
    assert (len(train), len(held_out)) == (3, 1) and train[0].prompt(5).startswith("wave ")
    assert train[0].pixels is None and held_out[0].pixels is not None


def test_a_solver_in_one_file(examples, monkeypatch):
    monkeypatch.setitem(sample.SOLVERS, "heun", registry_line("heun"))
    heun = load_object(sample.SOLVERS["heun"])
    # dx/dt = 2t from x(1) = 1: a method of second order is exact, the last step (Euler's) errs by its own length
    # squared
    assert heun(lambda x, t: 2 * t, 1.0, [1.0, 0.5, 0.1, 0.0]) == pytest.approx(-0.01)
    write_video("clip.mp4")
    command = "--history", "clip.mp4", "--checkpoint", write_checkpoint(), "--seconds=2", "--steps=2"
    run(sample.main, *command, "--save_file=heun.mp4", "--solver=heun")
    run(sample.main, *command, "--save_file=euler.mp4")
    assert Path("heun.mp4").read_bytes() != Path("euler.mp4").read_bytes()


def test_a_base_in_one_file(examples, cache, monkeypatch):
    import blocks

    monkeypatch.setitem(bases.BASES, "blocks", blocks)
    run(finetune.main, *flags(cache, preset="blocks", out="base", method="none", steps=1, clips=4))
    given = dict(preset="blocks", init="base/model.safetensors", steps=1, clips=4)
    run(pretrain.main, *flags(cache, out="a", **given))
    assert len(losses("a")) == 1
