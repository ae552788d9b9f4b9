"""Weights: others' names, shards, and files that do not fit, which change nothing."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bases.names import wan_name
from model import DiT, DiTConfig
from tests.common import randomize, tiny_base
from util.cli import UserError
from util.weights import load_weights, weight_files

CONFIG = DiTConfig(dim=40, ffn_dim=80, heads=2, layers=2, in_dim=4, out_dim=4, text_dim=16, text_len=6, freq_dim=32)


def small_dit(seed=0):
    return randomize(DiT(CONFIG), seed)


def copied(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def equal(state, other):
    return state.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in state.items())


def diffusers_name(name):
    """What diffusers calls a parameter of Wan's."""
    name = name.replace("norm3", "norm2").replace("self_attn", "attn1").replace("cross_attn", "attn2")
    if ".attn" in name:
        name = name.replace(".o.", ".to_out.0.")
        for n in "qkv":
            name = name.replace(f".{n}.", f".to_{n}.")
    name = name.replace("ffn.0", "ffn.net.0.proj").replace("ffn.2", "ffn.net.2")
    name = name.replace("head.head", "proj_out").replace("head.modulation", "scale_shift_table")
    name = name.replace("modulation", "scale_shift_table").replace("time_projection.1", "condition_embedder.time_proj")
    for kind in ("time", "text"):
        for i in 0, 2:
            theirs = f"condition_embedder.{kind}_embedder.linear_{i // 2 + 1}"
            name = name.replace(f"{kind}_embedding.{i}", theirs)
    return name


def test_names_of_diffusers_and_of_wrappers(tmp_path):
    state = small_dit().state_dict()
    assert len(state) == 15 + 27 * CONFIG.layers
    theirs = {diffusers_name(name): tensor for name, tensor in state.items()}
    assert len(theirs) == len(state) and sum(name in state for name in theirs) == 2
    assert [wan_name(name) for name in theirs] == list(state)
    for prefix in "", "model.", "diffusion_model.", "dit.", "model.diffusion_model.":
        assert [wan_name(prefix + name) for name in state] == list(state)
    save_file(theirs, tmp_path / "a.safetensors")
    other = small_dit(seed=1)
    tiny_base().load_dit(other, tmp_path / "a.safetensors")
    assert equal(other.state_dict(), state)


class Bomb:
    """A pickle that makes a folder when it is read."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def check_refused(path, says):
    """Loading this file raises one error and leaves the module as it was."""
    dit = small_dit()
    before = copied(dit.state_dict())
    with pytest.raises(UserError, match=says) as error:
        load_weights(dit, [path])
    assert "a.safetensors" in str(error.value) and not Path("exploded").exists()
    assert equal(dit.state_dict(), before)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda s: s.pop("blocks.1.ffn.2.bias"), "no tensor blocks.1.ffn.2.bias"),
        (lambda s: s.update(spare=torch.ones(2)), "unexpected tensor spare"),
        (lambda s: s.update({"head.head.bias": torch.ones(3)}), r"head.head.bias has shape \(3,\), expected \(16,\)"),
        (lambda s: s["blocks.0.norm3.bias"].fill_(math.nan), "blocks.0.norm3.bias holds values that are not finite"),
        (lambda s: s["blocks.0.norm3.bias"].fill_(-math.inf), "blocks.0.norm3.bias holds values that are not finite"),
    ],
)
def test_tensors_that_do_not_fit_change_nothing(tmp_path, change, says):
    state = copied(small_dit(seed=1).state_dict())
    change(state)
    save_file(state, tmp_path / "a.safetensors")
    check_refused(tmp_path / "a.safetensors", says)


@pytest.mark.parametrize("damage", ["truncated", "pickle", "empty", "missing"])
def test_files_that_are_no_weights_change_nothing(tmp_path, damage):
    path = tmp_path / "a.safetensors"
    save_file(small_dit(seed=1).state_dict(), path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "pickle":
        torch.save(Bomb(), path)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    check_refused(path, "no file" if damage == "missing" else "not a readable safetensors file")


def test_a_base_holds_each_tensor_once_and_nothing_else(tmp_path):
    state, path = small_dit(seed=1).state_dict(), tmp_path / "base.safetensors"
    save_file({**state, "model.head.head.bias": state["head.head.bias"].clone()}, path)
    with pytest.raises(UserError, match="same tensor, head.head.bias"):
        tiny_base().load_dit(small_dit(), path)
    spare = {"encoder.spare": torch.zeros(2)}
    save_file({**state, **spare}, path)
    with pytest.raises(UserError, match="unexpected tensor encoder.spare"):
        tiny_base().load_dit(small_dit(), path)
    ours = {f"dit.{name}": tensor for name, tensor in state.items()}
    save_file({**ours, **spare}, path, {"config": json.dumps({"stage": "finetune", "preset": "tiny"})})
    dit = small_dit()
    tiny_base().load_dit(dit, path)  # from a checkpoint of this project, φ is skipped
    assert equal(dit.state_dict(), state)


def write_shards(folder, state):
    """Weights in two files without an index -> {tensor: file}."""
    folder.mkdir()
    names = list(state)
    shards = {"part-1.safetensors": names[:20], "part-2.safetensors": names[20:]}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, folder / file)
    return {name: file for file, part in shards.items() for name in part}


def test_weights_in_shards(tmp_path):
    state, folder = small_dit(seed=1).state_dict(), tmp_path / "wan"
    places = write_shards(folder, state)
    with pytest.raises(UserError, match="2 .safetensors files"):
        weight_files(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    dit = small_dit()
    load_weights(dit, weight_files(folder))
    assert equal(dit.state_dict(), state)
    pipeline = tmp_path / "pipeline"  # of a whole diffusers pipeline, the DiT is meant
    shutil.copytree(folder, pipeline / "transformer")
    assert [file.parent.name for file in weight_files(pipeline)] == ["transformer"] * 2
    (folder / "part-2.safetensors").unlink()
    with pytest.raises(UserError, match="part-2.safetensors"):
        weight_files(folder)


@pytest.mark.parametrize("names", [[], {}, {"a": 1}])
def test_an_index_names_files(tmp_path, names):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(UserError, match="index.json (names no files|is damaged)"):
        weight_files(tmp_path)


def test_weights_that_are_nowhere(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        weight_files(tmp_path / "nowhere")
