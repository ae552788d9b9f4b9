"""LoRA, a frozen base in bf16, recomputed activations, and the memory that loading takes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import finetune
import pretrain
from encoder import load_model
from model import DiT, DiTConfig
from tests.common import ROOT, TINY, flags, randn, randomize, run, tiny_base

CONFIG = DiTConfig(dim=40, ffn_dim=80, heads=2, layers=2, in_dim=4, out_dim=4, text_dim=16, text_len=6, freq_dim=32)


def small_dit(seed=0):
    return randomize(DiT(CONFIG), seed)


def forward_with_memory(dit):
    args = randn(2, 4, 2, 4, 6), torch.tensor([300.0, 900.0]), randn(2, 6, 16, seed=1)
    return dit(*args, memory=(randn(2, 3, 40, seed=2), randn(3, 3, seed=3)))


def test_lora_starts_as_nothing_and_merges_exactly():
    dit, base = small_dit(), tiny_base()
    before = forward_with_memory(dit)
    base.add_lora(dit, 3)
    trained = {n: p for n, p in dit.named_parameters() if p.requires_grad}
    # q, k, v, o of two attentions and two feed-forward linears, A and B each, in every block
    assert len(trained) == 20 * CONFIG.layers and all(".lora_" in n for n in trained)
    assert sum(p.numel() for p in trained.values()) == CONFIG.layers * 3 * (8 * 2 * 40 + 2 * (40 + 80))
    assert torch.equal(forward_with_memory(dit), before)
    for n, p in trained.items():
        p.data = 0.2 * randn(*p.shape, seed=len(n))
    changed = forward_with_memory(dit)
    assert (changed - before).abs().max() > 1e-2
    base.merge_lora(dit)
    assert [n for n, _ in dit.named_parameters()] == [n for n, _ in small_dit().named_parameters()]
    assert (forward_with_memory(dit) - changed).abs().max() < 1e-5


@pytest.mark.parametrize("lora", (0, 2))
def test_stage_2_begins_with_the_base_and_a_fresh_lora(lora, cache):
    """Only φ comes from stage 1: its DiT, or LoRA, has moved, and stage 2 begins with the base again."""
    base = randomize(DiT(TINY["dit"])).state_dict()
    save_file(base, "base.safetensors")
    common = dict(init="base.safetensors", lora=lora, ema=0)
    run(pretrain.main, *flags(cache, out="one", lr=0.02, **common))
    run(finetune.main, *flags(cache, out="two", encoder="one", steps=1, lr=1e-9, **common))

    def trained(out):
        tensors = load_file(f"{out}/model.safetensors").items()
        return {k.removeprefix("dit."): v for k, v in tensors if k.startswith("dit.") and ".lora_A" not in k}

    one, two = trained("one"), trained("two")
    assert one.keys() == two.keys() and all(".lora_B" in k for k in two) == bool(lora)
    start = {k: base.get(k, torch.zeros_like(v)) for k, v in two.items()}
    gap_one, gap_two = (max((x[k] - v).abs().max() for k, v in start.items()) for x in (one, two))
    assert gap_two < 1e-6 and gap_one > 1e-3
    model = load_model("two/model.safetensors", tiny_base(), "base.safetensors" if lora else "")
    assert all(torch.equal(model.dit.state_dict()[k], v) for k, v in two.items())


def test_recomputing_activations_changes_no_gradient():
    grads = []
    for recompute in (False, True):
        dit = small_dit()
        dit.recompute = recompute
        forward_with_memory(dit).square().mean().backward()
        grads.append([p.grad for p in dit.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads)) and len(grads[0]) > 20


def test_a_frozen_base_is_held_in_the_compute_dtype(tmp_path, monkeypatch):
    monkeypatch.setattr("bases.base.compute_dtype", lambda device: torch.bfloat16)
    save_file(small_dit(seed=1).state_dict(), tmp_path / "base.safetensors")
    with torch.device("meta"):
        dit = DiT(CONFIG)
    tiny_base().load_dit(dit, tmp_path / "base.safetensors", torch.device("cpu"), frozen=True)
    for name, p in dit.named_parameters():
        assert p.dtype == (torch.bfloat16 if name.startswith("blocks.") and p.ndim == 2 else torch.float32), name
    tiny_base().add_lora(dit, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (forward_with_memory(dit) - forward_with_memory(small_dit(seed=1))).abs().max() < 0.1


def test_a_dit_all_in_bf16_runs():
    dit = small_dit(seed=1).bfloat16()
    for m in dit.modules():
        if isinstance(m, torch.nn.LayerNorm):  # which a GPU's autocast runs in float32
            m.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert (forward_with_memory(dit) - forward_with_memory(small_dit(seed=1))).abs().max() < 0.1


LOAD = r"""
import re, sys, torch
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[1])
import bases.base
from model import DiT, DiTConfig
base = bases.open_base("nano")
with torch.device("meta"):
    dit = DiT(DiTConfig(dim=512, ffn_dim=2048, heads=4, layers=20, text_dim=64, text_len=8))
if len(sys.argv) > 2:
    save_file({n: torch.zeros(p.shape) for n, p in dit.named_parameters()}, "big.safetensors")
    sys.exit()
bases.base.compute_dtype = lambda device: torch.bfloat16
small = DiT(DiTConfig(dim=64, ffn_dim=256, heads=1, layers=1, text_dim=64, text_len=8))
save_file(small.state_dict(), "small.safetensors")
base.load_dit(small, "small.safetensors", torch.device("cpu"), frozen=True)  # what is needed once
memory = lambda what: int(re.search(what + r":\s*(\d+)", open("/proc/self/status").read())[1]) * 1024
before = memory("VmRSS")
base.load_dit(dit, "big.safetensors", torch.device("cpu"), frozen=True)
print((memory("VmHWM") - before) / sum(p.numel() * p.element_size() for p in dit.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the memory in use from /proc")
def test_loading_takes_no_second_copy():
    """Peak memory of a process that loads a float32 file of 340 MB, as a share of what holds the model."""

    def call(*more):
        command = [sys.executable, "-c", LOAD, str(ROOT), *more]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    call("write")
    assert 0.9 < float(re.search(r"[\d.]+", call())[0]) < 1.2
