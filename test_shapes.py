"""All tests: python -m pytest -q test_shapes.py

Data is tiny, seeded and made here. What needs the official Wan fixtures (../shared/fixtures) or the shipped weights
(checkpoints/) is skipped where they are not.
"""
import base64
import contextlib
import csv
import dataclasses
import faulthandler
import hashlib
import http.server
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import budget
import caching
import codec as codecs
import consistency
import data
import devices
import encoder
import eval as evaluation
import figures
import finetune
import judge
import model
import optim
import pretrain
import sample
import saving
import scores
import speed
import tables
import video
import wan
import world as W
from codec import DCTCodec, HashPrompts, to_frames, to_pixels
from data import Clip, Clips, world_clips
from encoder import BLOCK_METHODS, Memory, MemoryDiT, MemoryEncoder
from flags import field_help, run_main
from model import PRESETS, DiT, DiTConfig, Preset, UserError, add_noise, attend, euler, pad_replicate, token_positions
from pretrain import Tools, draw_retrieval
from storyboard import parse_storyboard, prompt_at, storyboard_beside
from video import VideoWriter, contact_strip, find_videos, read_video, video_info
from weights import load_base, load_weights, open_safetensors, wan_name, weight_files

torch.set_num_threads(1)            # everything here is so small that threads only wait for each other
# oneDNN and ideep keep what they compile for each new shape, 1,024 kernels each: tests of memory would measure that
os.environ |= {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}
HERE = Path(__file__).resolve().parent
FIXTURES = HERE.parent / "shared" / "fixtures"
TINY = Preset(DiTConfig(dim=48, ffn_dim=64, heads=2, layers=1, text_dim=16, text_len=24), "dct", ((32, 32),), fps=2,
              section=4, history=40, widths=(8, 8, 16, 16))
PRESETS["tiny"] = TINY
PRESETS["tiny-wan"] = dataclasses.replace(TINY, codec="wan", history=9, lora=4, optimizer="adamw", lr=1e-3,
                                          recompute=True)


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path, monkeypatch):
    """Files go to tmp_path; train() takes over the signals of the process."""
    monkeypatch.chdir(tmp_path)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for s, handler in handlers.items():
        signal.signal(s, handler)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomize(module, seed=0):
    """Random weights everywhere: a weight that starts at zero or one must not hide a mistake."""
    g = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        scale = 0.1 if p.ndim == 1 else p[0].numel()**-0.5
        p.data = (p.ndim == 1 and name.endswith("weight")) + scale * torch.randn(p.shape, generator=g)
    return module.eval()


def run(main, *flags):
    """A script's main with these flags, in this process."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, "argv", ["script", *map(str, flags)])
        run_main(main)


def tiny_tools(method="proposed", rate="4x4x2"):
    encoder = MemoryDiT("tiny", method, rate).encoder
    return Tools(TINY, DCTCodec(), HashPrompts(16, 24), encoder, torch.device("cpu"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A folder that holds the encoded stories of all tests."""
    path = tmp_path_factory.mktemp("cache")
    for split, count in ("train", 8), ("held-out", 2):
        world_clips(split, count, TINY, DCTCodec(), path)
    return path


@pytest.fixture
def clips(cache):
    return world_clips("train", 8, TINY, DCTCodec(), cache).clips


# ---------------------------------------------------------------------------------------------------------------------
# model.py

# a width a head of 20 gives the axes of RoPE unequal shares, 8 + 6 + 6
CONFIG = DiTConfig(dim=40, ffn_dim=80, heads=2, layers=2, in_dim=4, out_dim=4, text_dim=16, text_len=6, freq_dim=32)


def plain_dit(w, c, x, t, text, frames, tokens, places):
    """Wan's forward pass again, plainly: one sample, every token with its own timestep, RoPE in complex numbers."""
    linear = lambda name, y: y @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    silu = lambda y: y / (1 + torch.exp(-y))
    gelu = lambda y: 0.5 * y * (1 + torch.tanh((2 / math.pi)**0.5 * (y + 0.044715 * y**3)))
    norm = lambda y: (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + c.eps).sqrt()
    rms = lambda name, y: y / (y.square().mean(-1, keepdim=True) + c.eps).sqrt() * w[f"{name}.weight"]
    heads = lambda y: y.unflatten(-1, (c.heads, -1))

    video, x, places, times = x, list(tokens), [p.tolist() for p in places], [0.0] * len(tokens)
    corners = list(itertools.product(range(video.shape[1]), range(0, video.shape[2], 2), range(0, video.shape[3], 2)))
    for f, i, j in corners:
        patch = video[:, f, i:i + 2, j:j + 2].flatten()
        x.append(w["patch_embedding.weight"].flatten(1) @ patch + w["patch_embedding.bias"])
        places.append([float(frames[f]), i / 2, j / 2])
        times.append(t)
    x, places, times = torch.stack(x), torch.tensor(places).double(), torch.tensor(times).double()

    d = c.dim // c.heads
    axes = (d - 4 * (d // 6), 2 * (d // 6), 2 * (d // 6))
    angles = [places[:, a, None] * 10000.0**(-torch.arange(0, n, 2).double() / n) for a, n in enumerate(axes)]
    phases = torch.exp(1j * torch.cat(angles, 1))[:, None]                                # (tokens, 1, d / 2)
    turn = lambda y: torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * phases).flatten(-2)

    def attention(name, y, z, rotated):
        q, k = rms(f"{name}.norm_q", linear(f"{name}.q", y)), rms(f"{name}.norm_k", linear(f"{name}.k", z))
        q, k, v = heads(q), heads(k), heads(linear(f"{name}.v", z))
        q, k = (turn(q), turn(k)) if rotated else (q, k)
        weights = (torch.einsum("nhd,mhd->hnm", q, k) / d**0.5).softmax(-1)
        return linear(f"{name}.o", torch.einsum("hnm,mhd->nhd", weights, v).flatten(1))

    angle = times[:, None] * 10000.0**(-torch.arange(c.freq_dim // 2).double() / (c.freq_dim // 2))
    e = linear("time_embedding.2", silu(linear("time_embedding.0", torch.cat([angle.cos(), angle.sin()], 1))))
    e0 = linear("time_projection.1", silu(e)).unflatten(1, (6, -1))                       # (tokens, 6, D)
    padded = torch.cat([text, torch.zeros(c.text_len - len(text), c.text_dim).double()])
    padded = linear("text_embedding.2", gelu(linear("text_embedding.0", padded)))
    for b in (f"blocks.{i}" for i in range(c.layers)):
        s1, c1, g1, s2, c2, g2 = (w[f"{b}.modulation"] + e0).unbind(1)
        y = norm(x) * (1 + c1) + s1
        x = x + g1 * attention(f"{b}.self_attn", y, y, True)
        x = x + attention(f"{b}.cross_attn", norm(x) * w[f"{b}.norm3.weight"] + w[f"{b}.norm3.bias"], padded, False)
        x = x + g2 * linear(f"{b}.ffn.2", gelu(linear(f"{b}.ffn.0", norm(x) * (1 + c2) + s2)))
    shift, scale = w["head.modulation"][0, 0] + e, w["head.modulation"][0, 1] + e
    out, result = linear("head.head", norm(x) * (1 + scale) + shift)[len(tokens):], torch.zeros_like(video)
    for y, (f, i, j) in zip(out, corners):
        result[:, f, i:i + 2, j:j + 2] = y.view(2, 2, c.out_dim).permute(2, 0, 1)         # channels last in a patch
    return result


def tiny_dit(seed=0, **changes):
    return randomize(DiT(dataclasses.replace(CONFIG, **changes)), seed)


@pytest.mark.parametrize("M", [0, 7])
@torch.no_grad()
def test_dit_equals_a_plain_one(M):
    dit = tiny_dit()
    x, text, t = randn(2, 4, 3, 4, 6), randn(2, 5, 16, seed=1), torch.tensor([731.0, 12.5])
    frames = torch.tensor([[0, 1, 2], [17.25, 40, 3]])
    tokens, places = randn(2, M, 40, seed=2), 20 * randn(2, M, 3, seed=3)
    v = dit(x, t, text, frames, (tokens, places) if M else None)
    assert v.std() > 0.1
    w = {name: p.double() for name, p in dit.state_dict().items()}
    for b in range(2):
        doubles = (x[b].double(), t[b].item(), text[b].double(), frames[b], tokens[b].double(), places[b])
        plain = plain_dit(w, CONFIG, *doubles)
        assert (v[b] - plain).abs().max() < 1e-5


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="needs the official model's outputs in ../shared/fixtures")
@pytest.mark.parametrize("case", "abc")
@pytest.mark.parametrize("name", ["wan_tiny", "wan_tiny_eps"])
@torch.no_grad()
def test_dit_equals_wan(name, case):
    about, tensors = json.loads((FIXTURES / f"{name}.json").read_text()), load_file(FIXTURES / f"{name}.safetensors")
    if case not in about["cases"]:
        pytest.skip(f"{name} has no case {case}")
    c = about["config"]
    dit = DiT(DiTConfig(heads=c["num_heads"], layers=c["num_layers"], patch=tuple(c["patch_size"]), **{
        k: c[k] for k in ("dim", "ffn_dim", "in_dim", "out_dim", "text_dim", "text_len", "freq_dim", "eps")}))
    dit.load_state_dict({k[2:]: v for k, v in tensors.items() if k.startswith("w.")}, strict=True)
    assert f"in.{case}.x0" in tensors
    for i in range(about["cases"][case]["batch"]):
        x, context, out = (tensors[f"{n}{i}"][None] for n in (f"in.{case}.x", f"in.{case}.context", f"out.{case}.x"))
        assert (dit(x, tensors[f"in.{case}.t"][i:i + 1], context) - out).abs().max() < 1e-5


@torch.no_grad()
def test_dit_equals_that_of_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    c = CONFIG
    theirs = diffusers.WanTransformer3DModel(
        patch_size=c.patch, num_attention_heads=c.heads, attention_head_dim=c.dim // c.heads, in_channels=c.in_dim,
        out_channels=c.out_dim, text_dim=c.text_dim, freq_dim=c.freq_dim, ffn_dim=c.ffn_dim, num_layers=c.layers,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=c.eps)
    randomize(theirs).save_pretrained(tmp_path)                     # a folder in diffusers' naming
    with torch.device("meta"):
        ours = DiT(c)
    load_base(ours, tmp_path)
    x, t, text = randn(2, 4, 3, 4, 6), torch.tensor([300.0, 900.0]), randn(2, 6, 16, seed=1)
    expected = theirs(hidden_states=x, timestep=t, encoder_hidden_states=text, return_dict=False)[0]
    assert (ours(x, t, text) - expected).abs().max() < 1e-5 and expected.std() > 0.1


@pytest.mark.parametrize("preset, count", [("wan-1.3b", 1418996800), ("wan-14b", 14288491584)])
def test_dit_has_as_many_parameters_as_wan(preset, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in DiT(PRESETS[preset].dit).parameters()) == count


@torch.no_grad()
def test_dit_memory_and_positions():
    dit, x, t, text = tiny_dit(), randn(1, 4, 2, 4, 4), torch.tensor([400.0]), randn(1, 6, 16)
    tokens, places = randn(1, 3, 40), randn(3, 3)
    alone = dit(x, t, text)
    assert torch.equal(alone, dit(x, t, text, None, (tokens[:, :0], places[:0])))
    near = dit(x, t, text, torch.tensor([5, 6]), (tokens, places))
    assert (near - alone).abs().max() > 1e-3
    swapped = dit(x, t, text, torch.tensor([5, 6]), (tokens[:, [2, 0, 1]], places[[2, 0, 1]]))
    assert torch.allclose(near, swapped, atol=1e-5)                 # a token's place in the sequence means nothing
    # only distances count, and there is no longest video: RoPE's own table ends at 1024
    far = dit(x, t, text, torch.tensor([5005, 5006]), (tokens, places + torch.tensor([5000, 0, 0])))
    assert torch.allclose(near, far, atol=1e-4)
    assert (dit(x, t, text, torch.tensor([5, 7]), (tokens, places)) - near).abs().max() > 1e-3


def test_dit_gradient_reaches_memory():
    dit, tokens = tiny_dit(), randn(1, 3, 40).requires_grad_()
    dit(randn(1, 4, 2, 4, 4), torch.tensor([400.0]), randn(1, 6, 16), None, (tokens, randn(3, 3))).sum().backward()
    assert all(p.grad.abs().max() > 0 for n, p in dit.named_parameters() if "cross_attn.k.bias" not in n)
    assert (tokens.grad.abs().amax(-1) > 0).all()


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("n, m", [(16, 16), (700, 5), (1500, 1500)])            # bf16: rows together, alone, in pieces
def test_attend_is_softmax_attention_at_any_length(n, m, dtype, error):
    for few in 2**14, model.PIECE:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "PIECE", few)
            q, k, v = (randn(3, 2, x, 8, seed=s).to(dtype).requires_grad_() for s, x in enumerate((n, m, m)))
            out = attend(q, k, v)
        exact = [z.detach().double().requires_grad_() for z in (q, k, v)]
        plain = (exact[0] @ exact[1].mT / 8**0.5).softmax(-1) @ exact[2]
        assert (out - plain).abs().max() < error
        out.sum().backward()
        plain.sum().backward()
        for z, true in zip((q, k, v), exact):
            assert (z.grad - true.grad).abs().max() < error * (1 + true.grad.abs().max())


@torch.no_grad()
def test_rotations_are_the_same_compiled(monkeypatch):
    dit = tiny_dit()
    eager = forward_with_memory(dit)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert (forward_with_memory(dit) - eager).abs().max() < 1e-5


def test_flow_runs_from_data_to_noise():
    x0, noise = randn(2, 4, 3, 2, 2), randn(2, 4, 3, 2, 2, seed=1)
    assert torch.equal(add_noise(x0, noise, torch.zeros(2)), x0)
    assert torch.equal(add_noise(x0, noise, torch.ones(2)), noise)
    assert torch.allclose(add_noise(x0, noise, torch.tensor([0.25, 1]))[0], 0.75 * x0[0] + 0.25 * noise[0])
    t, seen = torch.tensor([0.3, 0.8]), []
    zero = lambda x, t, *rest: seen.append((x, t)) or torch.zeros_like(x)
    losses = model.flow_loss(zero, x0, noise, t, None, None, None)
    assert torch.allclose(losses, (noise - x0).square().mean((1, 2, 3, 4)))
    assert torch.equal(seen[0][0], add_noise(x0, noise, t)) and torch.allclose(seen[0][1], 1000 * t)


def test_euler_with_the_true_velocity_finds_the_data():
    x0, noise = randn(2, 4, 3, 2, 2), randn(2, 4, 3, 2, 2, seed=1)
    times = []

    def oracle(x, t, text, frames, memory):
        times.append(t[0].item() / 1000)
        return (x - x0) / (t / 1000).view(-1, 1, 1, 1, 1)
    for steps, shift in (1, 1), (7, 1), (4, 3):
        assert torch.allclose(euler(oracle, noise, torch.zeros(2, 1, 1), None, None, steps, shift), x0, atol=1e-5)
    assert times[-4:] == pytest.approx([1, 0.9, 0.75, 0.5])        # 3 t / (1 + 2 t)


def test_guidance_moves_away_from_no_prompt_and_keeps_memory():
    calls = []

    def dit(x, t, text, frames, memory):
        calls.append((text.any().item(), memory))
        return torch.full_like(x, 2.0 if text.any() else 0.5)
    noise, text = torch.zeros(1, 4, 1, 2, 2), torch.ones(1, 2, 3)
    for guidance, v, expected in (1, 2.0, [True] * 2), (3, 5.0, [True, False] * 2), (0, 0.5, [True, False] * 2):
        calls.clear()
        assert euler(dit, noise, text, None, "memory", 2, 1, guidance).flatten().tolist() == pytest.approx([-v] * 16)
        assert [c[0] for c in calls] == expected and all(c[1] == "memory" for c in calls)


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
    for kind, theirs in ("time", "time_embedder"), ("text", "text_embedder"):
        for i in 0, 2:
            name = name.replace(f"{kind}_embedding.{i}", f"condition_embedder.{theirs}.linear_{i // 2 + 1}")
    return name


def test_names_of_diffusers_and_of_wrappers(tmp_path):
    dit = tiny_dit()
    state = dit.state_dict()
    assert len(state) == 15 + 27 * CONFIG.layers
    theirs = {diffusers_name(n): v for n, v in state.items()}
    assert len(theirs) == len(state) and sum(n in state for n in theirs) == 2
    assert [wan_name(n) for n in theirs] == list(state)
    for prefix in "", "model.", "diffusion_model.", "dit.", "model.diffusion_model.":
        assert [wan_name(prefix + n) for n in state] == list(state)
    save_file(theirs, tmp_path / "a.safetensors")
    other = tiny_dit(seed=1)
    pretrain.load_base(other, tmp_path / "a.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), state.values()))


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("damage, says", [
    (lambda s: s.pop("blocks.1.ffn.2.bias"), "blocks.1.ffn.2.bias"), (lambda s: s.update(spare=torch.ones(2)), "spare"),
    (lambda s: s.update({"head.head.bias": torch.ones(3)}), "head.head.bias has shape \\(3,\\), expected \\(16,\\)"),
    (lambda s: s["blocks.0.norm3.bias"].fill_(math.nan), "blocks.0.norm3.bias"),
    (lambda s: s["blocks.0.norm3.bias"].fill_(-math.inf), "blocks.0.norm3.bias"),
    *((damage, "a.safetensors") for damage in ("truncated", "pickle", "empty", "missing"))])
def test_weights_that_do_not_fit_change_nothing(tmp_path, damage, says):
    path = tmp_path / "a.safetensors"
    state = {k: v.clone() for k, v in tiny_dit(seed=1).state_dict().items()}
    if callable(damage):
        damage(state)
    save_file(state, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "pickle":
        torch.save(Bomb(), path)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "missing":
        path.unlink()
    dit = tiny_dit()
    before = {k: v.clone() for k, v in dit.state_dict().items()}
    with pytest.raises(UserError, match=says) as error:
        load_weights(dit, [path])
    assert "a.safetensors" in str(error.value) and not Path("exploded").exists()
    assert all(torch.equal(before[k], v) for k, v in dit.state_dict().items())


def test_a_base_holds_each_tensor_once_and_nothing_else(tmp_path):
    state = tiny_dit(seed=1).state_dict()
    for more, says in ({"model.head.head.bias": state["head.head.bias"].clone()}, "same tensor, head.head.bias"), (
            {"encoder.spare": torch.zeros(2)}, "unexpected tensor encoder.spare"):
        save_file({**state, **more}, tmp_path / "base.safetensors")
        with pytest.raises(UserError, match=says):
            load_base(tiny_dit(), tmp_path / "base.safetensors")
    save_file({**{f"dit.{k}": v for k, v in state.items()}, **more}, tmp_path / "base.safetensors",
              {"config": json.dumps({"stage": "finetune", "preset": "tiny"})})
    load_base(tiny_dit(), tmp_path / "base.safetensors")            # of a run of ours φ is left where it is


def test_weights_in_shards(tmp_path):
    state = tiny_dit(seed=1).state_dict()
    names, folder = list(state), tmp_path / "wan"
    folder.mkdir()
    shards = {"part-1.safetensors": names[:20], "part-2.safetensors": names[20:]}
    for file, part in shards.items():
        save_file({n: state[n] for n in part}, folder / file)
    with pytest.raises(UserError, match="2 .safetensors files"):
        weight_files(folder)
    index = {"weight_map": {n: file for file, part in shards.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    dit = tiny_dit()
    load_weights(dit, weight_files(folder))
    assert all(torch.equal(v, state[k]) for k, v in dit.state_dict().items())
    pipeline = tmp_path / "pipeline"                                # a whole one of diffusers: its DiT is meant
    shutil.copytree(folder, pipeline / "transformer")
    assert [file.parent.name for file in weight_files(pipeline)] == ["transformer"] * 2
    (folder / "part-2.safetensors").unlink()
    with pytest.raises(UserError, match="part-2.safetensors"):
        weight_files(folder)
    for names in [], {}, {"a": 1}:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        with pytest.raises(UserError, match="index.json names no files"):
            weight_files(folder)
    with pytest.raises(UserError, match="nowhere"):
        weight_files(tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------------------------------
# encoder.py

SEGMENT_METHODS = ("proposed", "only-lr", "without-lr", "large-patchifier", "token-merging", "full")
RATES = {"4x4x2": 80, "2x2x2": 320, "2x2x1": 640, "4x4x4": 40, "1x1x1": 2560, "8x8x1": 40}    # tokens of 40 nano frames


def make_encoder(method="proposed", rate="4x4x2", preset="tiny", seed=0, **settings):
    return randomize(MemoryEncoder(method, rate, preset, **settings), seed)


def box_mean(hr, rate):
    """Latents averaged over whole segments of (frames, rows, columns); a causal codec's lone first one by itself."""
    lone = hr.shape[2] % 4
    whole = (rate[0], 2 * rate[1], 2 * rate[2])
    parts = [pad_replicate(part, whole) for part in (hr[:, :, :lone], hr[:, :, lone:]) if part.shape[2]]
    return torch.cat([F.avg_pool3d(part, rate) for part in parts], 2)


@pytest.mark.parametrize("method", ["proposed", "large-patchifier"])
@pytest.mark.parametrize("rate", RATES)
@torch.no_grad()
def test_encoder_tokens_stand_at_the_centres_of_their_blocks(rate, method):
    encoder, codec, hr = make_encoder(method, rate, "nano"), DCTCodec(), randn(1, 16, 40, 16, 16)
    tokens, positions = encoder(hr, codec.downsample(hr, encoder.rate), start=100)
    t, h, w = encoder.rate
    expected = [(100 + f + (t - 1) / 2, i + (h - 1) / 2, j + (w - 1) / 2)
                for f in range(0, 40, t) for i in range(0, 8, h) for j in range(0, 8, w)]
    assert tokens.shape == (1, RATES[rate], 256) and positions.tolist() == [list(p) for p in expected]


@pytest.mark.parametrize("frames, count", [(81, 4264), (121, 6344)])
@torch.no_grad()
def test_encoder_tokens_of_20_seconds_of_wan(frames, count):
    """Only shapes: φ of one narrow width, on Wan's grid. 60 x 104 latents are 480 x 832 pixels."""
    encoder = make_encoder("only-lr", "4x4x2", "tiny-wan")
    encoder.segment = PRESETS["wan-1.3b"].section
    hr, lr = torch.zeros(1).expand(1, 16, frames, 60, 104), torch.zeros(1).expand(1, 16, 1 + frames // 2, 16, 26)
    tokens, positions = encoder(hr, lr)
    assert tokens.shape == (1, count, 48) and len(positions) == count
    assert positions[0].tolist() == [0, 1.5, 1.5] and positions[104].tolist() == [1.5, 1.5, 1.5]
    assert positions[-1].tolist() == [frames - 1.5, 29.5, 49.5]


@pytest.mark.parametrize("preset, first", [("tiny", 8), ("tiny-wan", 9)])
@pytest.mark.parametrize("method", SEGMENT_METHODS)
@torch.no_grad()
def test_encoder_appends_sections_without_touching_the_history(method, preset, first):
    codec = DCTCodec() if preset == "tiny" else SimpleNamespace(downsample=box_mean)
    dit = randomize(MemoryDiT(preset, method))
    encoder, x = dit.encoder, randn(1, 16, first + 8, 8, 8)
    lr = lambda hr: codec.downsample(hr, encoder.rate)
    whole = encoder(x, lr(x))
    old, new = encoder(x[:, :, :first], lr(x[:, :, :first])), encoder(x[:, :, first:], lr(x[:, :, first:]), start=first)
    assert whole[0].std() > 0.1
    for a, b, c in zip(whole, old, new):
        assert (a - torch.cat([b, c], -2)).abs().max() < 1e-5
    one, many = Memory(dit, codec), Memory(dit, codec)
    one.append(x)
    for piece in x.split(3, 2):
        many.append(piece)
    for a, b, c in zip(whole, one.context(), many.context()):
        assert (a - b).abs().max() < 1e-5 and (a - c).abs().max() < 1e-5
    assert one.frames == many.frames == first + 8


@torch.no_grad()
def test_memory_keeps_an_unfinished_segment_uncompressed():
    dit, codec, x = randomize(MemoryDiT("tiny")), DCTCodec(), randn(1, 16, 11, 8, 8)
    memory = Memory(dit, codec)
    assert memory.context() is None
    memory.append(x[:, :, :3])
    tokens, positions = memory.context()
    assert torch.equal(tokens, dit.encoder.patch_embedding(x[:, :, :3]))
    assert torch.equal(positions, token_positions(torch.arange(3), 4, 4))
    memory.append(x[:, :, 3:])
    tokens, positions = memory.context()
    hr = x[:, :, :8]
    old = dit.encoder(hr, codec.downsample(hr, dit.encoder.rate))
    assert tokens.shape[1] == len(old[1]) + 3 * 16 and (tokens[:, :-48] - old[0]).abs().max() < 1e-5
    assert torch.equal(tokens[:, -48:], dit.encoder.patch_embedding(x[:, :, 8:]))
    assert torch.equal(positions[-48:], token_positions(torch.arange(8, 11), 4, 4))
    in_training = dit.encode(x, codec.downsample(hr, dit.encoder.rate))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(in_training, (tokens, positions)))
    assert memory.uncompressed == 11 * 16


@torch.no_grad()
def test_memory_is_bounded():
    dit, codec, x = randomize(MemoryDiT("tiny")), DCTCodec(), randn(1, 16, 24, 8, 8)
    memory, everything = Memory(dit, codec, most=2), Memory(dit, codec)
    for k, piece in enumerate(x.split(4, 2)):
        memory.append(piece)
        everything.append(piece)
        assert memory.context()[0].shape[1] == 2 * min(k + 1, 2) and everything.context()[0].shape[1] == 2 * (k + 1)
    for a, b in zip(memory.context(), everything.context()):
        assert torch.equal(a, b[..., -4:, :])                       # the newest, where they were
    assert memory.uncompressed == 8 * 16 and Memory(MemoryDiT("tiny", "none"), codec).context() is None
    memory, counts = Memory(randomize(MemoryDiT("tiny-wan")), wan.WanCodec(), most=2), []
    for piece in randn(1, 16, 25, 4, 4).split([9, 4, 4, 4, 4], 2):
        memory.append(piece)
        counts.append([n for *_, n in memory.segments])
    assert counts == [[1, 4, 4]] + 4 * [[4, 4]]                     # the lone first latent goes with the first segment


def without_attention(encoder):
    """Attention sees the whole segment, and its rotations tell left from right: for tests of where things are."""
    for p in encoder.hr.attention.o.parameters():
        p.data.zero_()
    return encoder


@pytest.mark.parametrize("rate", ["4x4x2", "8x8x1"])
@pytest.mark.parametrize("method", ["only-lr", "without-lr", "proposed", "large-patchifier"])
@torch.no_grad()
def test_encoder_blocks_answer_where_they_are(method, rate):
    """A change in the middle of a block moves the token that stands there most, and its neighbours evenly."""
    codec, energy = DCTCodec(), 0
    for seed in range(40):
        encoder = make_encoder(method, rate, "tiny", seed)
        encoder = without_attention(encoder) if hasattr(encoder, "hr") else encoder
        t, h, w = encoder.rate
        x = randn(1, 16, 4, 2 * 3 * h, 2 * 5 * w, seed=seed)
        y = x.clone()
        y[:, :, :, 3 * h - 1:3 * h + 1, 5 * w - 1:5 * w + 1] += 1       # the middle of block (1, 2)
        (a, positions), (b, _) = (encoder(z, codec.downsample(z, encoder.rate)) for z in (x, y))
        change = (a - b)[0].square().sum(-1).view(4 // t, 15).sum(0)
        energy = energy + change / change.sum()
    positions, centre = positions[:15, 1:], torch.tensor([h + (h - 1) / 2, 2 * w + (w - 1) / 2])
    assert torch.equal(positions[energy.argmax()], centre)
    mass = (energy[:, None] * positions).sum(0) / energy.sum()
    assert ((mass - centre).abs() < 0.1 * torch.tensor([h, w])).all()
    if method in ("only-lr", "large-patchifier"):
        assert (energy > 1e-9).sum() == 1


@pytest.mark.parametrize("rate", ["4x4x2", "2x2x2", "2x2x1", "8x8x1"])
@torch.no_grad()
def test_encoder_high_resolution_branch_is_centred(rate):
    """With mirror-symmetric kernels a mirrored video must give mirrored tokens: no stride may lean to one side."""
    encoder = without_attention(make_encoder("without-lr", rate))
    for conv in *encoder.hr.convs, encoder.hr.shortcut:
        for axis in 2, 3, 4:
            conv.weight.copy_((conv.weight + conv.weight.flip(axis)) / 2)
    t, h, w = encoder.rate
    x = randn(1, 16, 8, 2 * 2 * h, 2 * 3 * w)
    grid = lambda x: encoder(x, x)[0].view(8 // t, 2, 3, 48)
    for axis in 0, 1, 2:
        assert (grid(x.flip(axis + 2)) - grid(x).flip(axis)).abs().max() < 1e-5
        assert (grid(x) - grid(x).flip(axis)).abs().max() > 1e-2


@pytest.mark.parametrize("method", SEGMENT_METHODS)
@torch.no_grad()
def test_encoder_pads_odd_sizes_alike_in_both_branches(method):
    encoder, codec, x = make_encoder(method, "2x2x2"), DCTCodec(), randn(1, 16, 4, 15, 13)
    tokenwise = method in ("token-merging", "full")                 # these pad to whole tokens, not to whole blocks
    padded = F.pad(x, (0, 1 if tokenwise else 3, 0, 1, 0, 0), mode="replicate")
    a, b = (encoder(z, codec.downsample(z, encoder.rate)) for z in (x, padded))
    assert a[0].shape == (1, 4 * 8 * 7 if method == "full" else 2 * 4 * 4, 48)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("method", SEGMENT_METHODS)
def test_encoder_gradient_reaches_every_weight_and_every_segment(method):
    encoder, codec = make_encoder(method), DCTCodec()
    hr = randn(1, 16, 12, 8, 8).requires_grad_()
    lr = codec.downsample(hr.detach(), encoder.rate).requires_grad_()
    encoder(hr, lr)[0].square().sum().backward()
    for x, read in (hr, method != "only-lr"), (lr, method in ("proposed", "only-lr")):
        assert (x.grad.abs().amax((0, 1, 3, 4)) > 0).all() if read else x.grad is None
    for name, p in encoder.named_parameters():
        if method in BLOCK_METHODS and name.startswith("patch_embedding"):      # it is for unfinished segments
            assert p.grad is None
        else:
            assert p.grad.abs().max() > 0 or name == "hr.attention.k.bias", name


@pytest.mark.parametrize("rate", ["4x4x2", "2x2x1", "8x8x4"])
@torch.no_grad()
def test_large_patchifier_begins_as_the_patchify_of_averaged_latents(rate):
    dit = MemoryDiT("tiny", "large-patchifier", rate)
    randomize(dit.dit)
    dit.encoder.start_from(dit.dit, slice(None))
    x = randn(2, 16, 8, 16, 32)
    expected = dit.dit.patch_embedding(F.avg_pool3d(x, dit.encoder.rate))
    assert expected.std() > 0.01 and (dit.encode(x, x)[0] - expected).abs().max() < 1e-5
    flat = torch.ones_like(x) * randn(1, 16, 1, 1, 1)
    assert (dit.encode(flat, flat)[0] - dit.dit.patch_embedding(flat)[:, :1]).abs().max() < 1e-5


@torch.no_grad()
def test_lr_begins_with_the_means_that_the_large_patchifier_begins_with():
    """Without detail in the latents the two are the same; detail changes neither LR nor the small picture's means."""
    codec, dit, large = DCTCodec(), MemoryDiT("tiny", "only-lr"), MemoryDiT("tiny", "large-patchifier")
    for m in dit, large:
        randomize(m.dit)
        m.encoder.start_from(m.dit, codec.averages)
    x = randn(2, 16, 8, 16, 32)
    detail = torch.ones(16, dtype=torch.bool)
    detail[list(codec.averages)] = False
    smooth = torch.where(detail[:, None, None, None], 0, x)
    lr = lambda x: codec.downsample(x, dit.encoder.rate)
    expected = large.encode(smooth, lr(smooth))[0]
    assert lr(smooth)[:, detail].abs().max() > 0.1                  # the small picture has detail, the start ignores it
    for shown in smooth, x:
        assert (dit.encode(shown, lr(shown))[0] - expected).abs().max() < 1e-5


@torch.no_grad()
def test_token_merging_averages_what_is_alike():
    """Of a segment of two colours no token is of both; each is the mean of all that it holds, where those are."""
    phi = make_encoder("token-merging", "4x4x1")                    # 8 tokens for 4 frames of 8 x 4
    phi.patch_embedding.bias.zero_()                                # so that brightness is length, not direction
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        kind = torch.rand(4, 8, 4, generator=g) < 0.4
        colours = randn(2, 16, seed=seed)[kind.long()] * (1 + 0.2 * torch.rand(4, 8, 4, 1, generator=g))
        x = colours.permute(3, 0, 1, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)[None]   # (1, 16, 4, 16, 8)
        (tokens, positions), (everything, places) = phi(x, x), phi.embed_frames(x, torch.arange(4))
        groups = encoder.bipartite_matching(everything, 8)[0]
        assert tokens.shape == (1, 8, 48)
        for n in range(8):
            inside = groups == n
            assert len(set(kind.flatten()[inside].tolist())) == 1, seed
            assert torch.allclose(tokens[0, n], everything[0, inside].mean(0), atol=1e-5)
            assert torch.allclose(positions[0, n], places[inside].mean(0), atol=1e-5)


@pytest.mark.parametrize("size, frames", [((8, 8), 4), ((15, 13), 8)])
@torch.no_grad()
def test_token_merging_keeps_the_count_and_the_mass(size, frames):
    phi, x = make_encoder("token-merging", "2x2x2"), randn(2, 16, frames, *size)
    tokens, positions = phi(x, x, start=20)
    everything, places = phi.embed_frames(x, 20 + torch.arange(frames))
    assert tokens.shape == (2, frames // 2 * -(-size[0] // 4) * -(-size[1] // 4), 48)
    assert positions.shape == (*tokens.shape[:2], 3) and not torch.equal(positions[0], positions[1])
    for first in range(0, frames, 4):                               # segments do not mix
        inside = (positions[..., 0] >= 20 + first) & (positions[..., 0] <= 23 + first)
        assert (inside.sum(1) == tokens.shape[1] // (frames // 4)).all()
    alone = phi.merge_segments(torch.ones_like(x[:, :, :4]) * randn(1, 16, 4, 1, 1), 0, 4)
    assert all(y.isfinite().all() for y in alone)                   # equal tokens tie
    assert everything.shape[1] == len(places) > tokens.shape[1]


@torch.no_grad()
def test_full_memory_is_every_token():
    phi, x = make_encoder("full", preset="tiny-wan"), randn(1, 16, 9, 8, 8)
    tokens, positions = phi(x, x[:, :, :0], start=0)
    assert torch.equal(tokens, phi.patch_embedding(x)) and torch.equal(positions, token_positions(range(9), 4, 4))


@pytest.mark.parametrize("preset", ["tiny", "tiny-wan"])
@pytest.mark.parametrize("method, window, most, kept", [
    ("sliding-window", 1, None, [10]), ("sliding-window", 6, None, [5, 6, 7, 8, 9, 10]),
    ("sliding-window", 6, 1, [7, 8, 9, 10]), ("sliding-window", 99, None, list(range(11))),
    ("keyframes", 1, None, [0, 10]), ("keyframes", 1, 1, [0, 10])])
@torch.no_grad()
def test_methods_that_keep_frames(method, window, most, kept, preset):
    dit, x = randomize(MemoryDiT(preset, method, window=window)), randn(2, 16, 11, 8, 8)
    expected = dit.encoder.patch_embedding(x[:, :, kept]), token_positions(torch.tensor(kept), 4, 4)
    if most is None:
        memory = dit.encode(x, x[:, :, :0])
        assert all(torch.equal(a, b) for a, b in zip(memory, expected))
        first = dit.encode(x[:, :, :1], x[:, :, :0], start=7)
        assert first[0].shape[1] == 16 and first[1][0].tolist() == [7, 0, 0]
    memory = Memory(dit, DCTCodec(), most)
    for piece in x[:1].split(3, 2):
        memory.append(piece)
    for a, b in zip(memory.context(), expected):
        assert torch.allclose(a, b[:1] if b.ndim == 3 else b, atol=1e-6)
    assert memory.frames == 11 and memory.waiting.shape[2] == len(kept) and memory.uncompressed == 16 * len(kept)


@torch.no_grad()
def test_encoder_methods_differ_only_in_their_branches():
    codec, x, dit = DCTCodec(), randn(2, 16, 8, 8, 8), MemoryDiT("tiny")
    lr = codec.downsample(x, dit.encoder.rate)
    proposed, only_lr, without_lr = (MemoryEncoder(m, "4x4x2", "tiny") for m in ("proposed", "only-lr", "without-lr"))
    for phi in proposed, only_lr, without_lr:
        phi.start_from(dit.dit, slice(None))
    assert torch.equal(proposed(x, lr)[0], only_lr(x, lr)[0])       # HR starts at zero where LR carries the signal
    assert torch.equal(only_lr(x, lr)[0], dit.dit.patch_embedding(lr))
    nan = torch.full_like(lr, math.nan)
    assert torch.equal(without_lr(x, nan)[0], without_lr(x, lr)[0]) and without_lr(x, nan)[0].std() > 0
    assert torch.equal(only_lr(x * math.nan, lr)[0], only_lr(x, lr)[0])
    dit.dit.patch_embedding.weight.fill_(0)
    assert proposed(x, lr)[0].abs().max() > 0                       # φ's copy is its own


@pytest.mark.parametrize("method", SEGMENT_METHODS)
@torch.no_grad()
def test_encoder_rows_of_a_batch_do_not_meet(method):
    encoder, codec, x = make_encoder(method), DCTCodec(), randn(2, 16, 8, 8, 8)
    both = encoder(x, codec.downsample(x, encoder.rate))[0]
    for i in range(2):
        assert (encoder(x[i:i + 1], codec.downsample(x[i:i + 1], encoder.rate))[0] - both[i]).abs().max() < 1e-5


@pytest.mark.parametrize("rate", ["4x4", "3x4x2", "axbxc", "0x4x2", "-4x4x2", "4x4x8", "", "4x4x2x1"])
def test_encoder_refuses_bad_rates(rate):
    with pytest.raises(UserError, match="--rate"):
        MemoryDiT("tiny", "proposed", rate)


def test_encoder_refuses_unknown_methods_and_unfinished_segments():
    with pytest.raises(UserError, match="propsed.*proposed"):
        MemoryDiT("tiny", "propsed")
    with pytest.raises(ValueError, match="whole segments"):
        make_encoder()(randn(1, 16, 6, 8, 8), randn(1, 16, 3, 2, 2))


# ---------------------------------------------------------------------------------------------------------------------
# data.py


def test_dct_codec_is_a_linear_map_with_orthonormal_rows():
    codec, z = DCTCodec(), randn(2, 16, 3, 8, 6)
    assert torch.allclose(codec.basis @ codec.basis.T, torch.eye(16), atol=1e-6)
    assert torch.allclose(codec.encode(codec.decode(z)), z, atol=1e-5)
    flat = torch.full((1, 3, 1, 8, 8), 0.5)
    assert torch.allclose(codec.decode(codec.encode(flat)), flat, atol=1e-6)
    assert codec.encode(flat)[:, 1:].abs().max() < 1e-6


def test_dct_codec_on_stories():
    codec, latents = DCTCodec(), []
    for i in range(6):
        pixels = torch.from_numpy(data.story_pixels("train", i, PRESETS["nano"])[1])
        latents.append(codec.encode(to_pixels(pixels)[None]))
        again = to_frames(codec.decode(latents[-1]))[0]
        assert again.shape == pixels.shape == (52, 64, 64, 3) and codecs.psnr(again, pixels).mean() > 25
    assert 0.6 < torch.cat(latents).var() < 1.6


@pytest.mark.parametrize("rate", [(2, 4, 4), (1, 2, 2), (2, 2, 2)])
def test_dct_downsampling_is_that_of_the_pixels(rate):
    codec, z = DCTCodec(), randn(2, 16, 4, 16, 16)
    exact = codec.encode(F.avg_pool3d(codec.decode(z), rate))
    assert (codec.downsample(z, rate) - exact).abs().max() < 1e-5


def test_pixels_survive_the_file_boundary():
    frames = torch.arange(256).to(torch.uint8).view(1, 16, 16, 1).repeat(1, 1, 1, 3)
    pixels = to_pixels(frames)
    assert pixels.shape == (3, 1, 16, 16) and pixels.aminmax() == (-1, 1) and torch.equal(to_frames(pixels), frames)
    outside = torch.tensor([-5.0, -1, 1, 5]).view(1, 4, 1, 1).expand(3, 4, 1, 1)
    assert to_frames(outside)[:, 0, 0, 1].tolist() == [0, 0, 255, 255]


def test_hash_prompts():
    prompts = HashPrompts(16, 5)
    a, b = prompts("A cat, a dog"), prompts("dog dog the cat a dog and more")
    assert a.shape == b.shape == (5, 16) and torch.equal(a, HashPrompts(16, 5)("a cat a dog"))
    code = lambda i: 0.5 * torch.from_numpy(codecs.hash_word(f"position {i}", 16))
    assert torch.allclose(a[1] - code(1), b[3] - code(3)) and torch.allclose(a[3] - code(3), b[0] - code(0))
    assert torch.equal(a[4], torch.zeros(16)) and not prompts("").any() and not prompts(" ,. ").any() and b.any(1).all()
    words = torch.stack([torch.from_numpy(codecs.hash_word(w, 64)) for w in "one two three four five six".split()])
    assert (torch.corrcoef(words) - torch.eye(6)).abs().max() < 0.6 and 0.8 < words.var() < 1.2
    # shipped weights rely on it
    assert codecs.hash_word("cat", 3).tolist() == pytest.approx([2.32206, -0.77695, -1.08425], 1e-4)


def test_clips_cover_every_clip_once_an_epoch():
    sizes = [(8, 8)] * 9 + [(8, 14)] * 6 + [(14, 8)] * 1
    clips = Clips([Clip(torch.zeros(16, 4, *size), []) for size in sizes])
    epoch = [clips.batch(step, 3, seed=0) for step in range(6)]
    assert all(len(batch) == 3 and len({sizes[i] for i in batch}) == 1 for batch in epoch)
    assert sorted(i for batch in epoch for i in batch) == [*range(15), 15, 15, 15]      # a small bucket repeats clips
    fives = [clips.batch(step, 5, seed=0) for step in range(4)]     # one of a kind, less than a quarter of five
    assert 15 not in {i for batch in fives for i in batch} and [*map(len, fives)] == [5] * 4
    assert set(Clips(clips.clips[15:]).batch(0, 5, seed=0)) == {0}  # but if there is nothing else, it is repeated
    mixed = Clips([Clip(torch.zeros(16, frames, 8, 8), []) for frames in (9, 4, 8, 7, 9, 5)], full=8)
    batches = {frozenset(mixed.batch(step, 3, seed=0)) for step in range(2)}
    assert batches == {frozenset({0, 2, 4}), frozenset({1, 3, 5})}
    again = Clips(clips.clips)
    assert [again.batch(step, 3, seed=0) for step in reversed(range(12))][::-1][:6] == epoch
    assert epoch != [clips.batch(step, 3, seed=0) for step in range(6, 12)]
    assert epoch != [clips.batch(step, 3, seed=1) for step in range(6)]


def test_world_clips_are_cached(tmp_path, monkeypatch):
    codec = DCTCodec()
    first = world_clips("train", 2, TINY, codec, tmp_path, keep_pixels=True)
    files = list(tmp_path.iterdir())
    world_clips("train", 2, dataclasses.replace(TINY, sizes=((64, 64),)), codec, tmp_path)
    assert len(files) == 1 and len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(data, "encode_story", None)                 # from here on nothing may be drawn for latents
    for a, b in zip(first.clips, world_clips("train", 2, TINY, codec, tmp_path).clips):
        assert torch.equal(a.latents, b.latents) and a.storyboard == b.storyboard and b.pixels is None
    clip = first[1]
    assert clip.latents.shape == (16, 52, 8, 8) and clip.pixels.shape == (52, 32, 32, 3)
    assert codecs.psnr(to_frames(codec.decode(clip.latents[None].float()))[0], clip.pixels).min() > 20
    assert clip.prompt(7) == clip.prompt(4) == W.caption(clip.story, 1) != clip.prompt(8)
    assert torch.equal(clip.truth(torch.tensor([5, 9]))[0], clip.pixels[[5, 9]])


def test_clips_ask_only_for_what_was_seen(clips):
    for clip in clips:
        for n in range(1, 11):
            targets = clip.targets(n, 4)
            assert n < 10 or 40 in targets
            for begin in targets:
                asked = clip.story.shots[begin // 4]
                seen = [s for s in clip.story.shots[begin // 4 - n:begin // 4] if s.framing == 0]
                for f in "scene", "character", "thing":
                    assert getattr(asked, f) is None or getattr(asked, f) in [getattr(s, f) for s in seen]
    assert Clip(torch.zeros(16, 11, 8, 8), []).targets(1, 4) == [4, 5, 6, 7]
    assert Clip(torch.zeros(16, 11, 8, 8), []).targets(2, 4) == []


def write_video(path, n=10, seed=0, size=32):
    """A small video of a soft moving pattern, 2 frames a second."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    waves = [torch.sin(x / 5 + y / (4 + c) + 0.5 * f + seed) for f in range(n) for c in range(3)]
    frames = (100 + 80 * torch.stack(waves)).view(n, 3, size, size).permute(0, 2, 3, 1).to(torch.uint8)
    with VideoWriter(path, 2, size, size, scale=4) as w:
        w.write(frames)
    return frames


def test_folder_of_videos(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "videos"
    for i in range(6):
        write_video(folder / f"{i}.mp4", 10 + i, i)
        (folder / f"{i}.txt").write_text(f"0s: waves {i} / 2s: more {i}")
    (folder / "0.mp4").write_text("not a video")
    (folder / "1.txt").unlink()
    train, held_out = data.video_clips(folder, TINY, DCTCodec(), tmp_path / "cache")
    said = capsys.readouterr()
    assert (len(train), len(held_out)) == (4, 1) and "1 skipped" in said.out
    assert said.err.count("skipped: ") == 1 and "0.mp4" in said.err and "no caption beside" in said.err
    for clip in [*train.clips, *held_out.clips]:
        name = clip.frames - 10
        assert clip.latents.shape == (16, 10 + name, 8, 8)
        expected = ["", "", ""] if name == 1 else [f"waves {name}", f"waves {name}", f"more {name}"]
        assert [clip.prompt(frame) for frame in (0, 3, 4)] == expected
    clip = held_out[0]
    assert codecs.psnr(to_frames(DCTCodec().decode(clip.latents[None].float()))[0], clip.pixels).mean() > 30
    again, _ = data.video_clips(folder, TINY, DCTCodec(), tmp_path / "cache")
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(train.clips, again.clips))
    for version in "READING", "ENCODING":
        before = len(list((tmp_path / "cache" / "videos").iterdir()))
        monkeypatch.setattr(data, version, 99)
        data.encode_video(folder / "3.mp4", TINY, DCTCodec(), tmp_path / "cache")
        assert len(list((tmp_path / "cache" / "videos").iterdir())) == before + 1
    (folder / "2.mp4").write_text("")
    with pytest.raises(UserError, match="2 of 6 videos"):
        data.video_clips(folder, TINY, DCTCodec(), tmp_path / "cache")


# ---------------------------------------------------------------------------------------------------------------------
# world.py


def grow(mask, outside=False):
    """One pixel of dilation of bool (F, H, W)."""
    p = np.pad(mask, ((0, 0), (1, 1), (1, 1)), constant_values=outside)
    h, w = mask.shape[1:]
    return np.any([p[:, i:i + h, j:j + w] for i in range(3) for j in range(3)], axis=0)


def shrink(mask):
    return ~grow(~mask, True)


def changed(story, **other):
    """Where the pictures change when a part of the world does, and the masks of before."""
    old, masks = W.render(story)
    new, after = W.render(dataclasses.replace(story, **other))
    return abs(old.astype(int) - new).max(-1), masks, after


def test_world_is_determined_by_its_seed():
    assert {W.world_seed("train", i) for i in range(500)}.isdisjoint(W.world_seed("held-out", i) for i in range(500))
    for index in range(20):
        seed = W.world_seed("held-out", index)
        short, long = W.make_story(seed, 7), W.make_story(seed, 13)
        assert W.make_story(seed, 7) == short and short.shots == long.shots[:7] and short.scenes == long.scenes
        a, b = W.render(short), W.render(long, slice(2, 7))
        assert a[0][8:].tobytes() == b[0].tobytes() and all((a[1][m][8:] == b[1][m]).all() for m in a[1])
    assert len({W.render(W.make_story(s, 1))[0].tobytes() for s in range(50)}) == 50


def test_world_masks_agree_with_the_drawing():
    for seed in range(30):
        story = W.make_story(seed)
        flip = lambda colours: tuple(tuple(255 - v for v in c) for c in colours)            # noqa: E731
        people = tuple(dataclasses.replace(c, shirt_colours=flip(c.shirt_colours)) for c in story.characters)
        diff, masks, after = changed(story, characters=people)
        assert not diff[~grow(masks["cloth"])].any() and (diff[masks["cloth"]] > 30).mean() > 0.3
        assert all((masks[m] == after[m]).all() for m in masks)
        people = tuple(dataclasses.replace(c, emblem=tuple(tuple(1 - b for b in r) for r in c.emblem))
                       for c in story.characters)
        diff, masks, _ = changed(story, characters=people)
        assert not diff[~masks["cloth"]].any() and diff.any()
        diff, masks, _ = changed(story, scenes=tuple(
            dataclasses.replace(s, colours=flip(s.colours)) for s in story.scenes))
        # Where two outlines meet in a corner a trace of the scene shines through; elsewhere nothing does.
        inside = diff[shrink(~masks["scene"])]
        assert inside.max() < 56 and (inside > 8).mean() < 0.02 and (diff[masks["scene"]] > 32).mean() > 0.9
        diff, masks, _ = changed(story, things=tuple(
            dataclasses.replace(t, colours=flip(t.colours)) for t in story.things))
        assert not diff[~grow(masks["object"])].any()
        assert (sum(masks[m].astype(int) for m in masks) <= 1).all()


def test_world_asks_only_for_what_was_shown():
    early = []
    for seed in range(300):
        story = W.make_story(seed, 13)
        assert not W.askable(story, 0) and all(W.askable(story, k) for k in range(4, 13))
        early.append(W.askable(story, 1) or W.askable(story, 2))
        for k, shot in enumerate(story.shots):
            for f in ("scene", "character", "thing"):
                before = [getattr(s, f) for s in story.shots[:k]]
                assert getattr(shot, f) is None or getattr(shot, f) in before or shot.framing == 0
            assert shot.character is not None or shot.thing is not None
            words = W.caption(story, k).split()
            assert len(words) <= 24 and words[0] == story.scenes[shot.scene].kind
    assert 0.35 < np.mean(early) < 0.65


def test_world_captions_fix_the_picture():
    """Same words and same entities, same picture; and the words do not depend on what has to be remembered."""
    for seed in range(40):
        story, pictures = W.make_story(seed, 40), {}
        frames = W.render(story)[0].reshape(40, 4, 64, 64, 3)
        for k in range(40):
            assert pictures.setdefault(W.caption(story, k), frames[k].tobytes()) == frames[k].tobytes()


def test_world_hides_nothing():
    """People and things are whole (but for feet in closer framings), apart, and inside, at every size."""
    for height, width, seeds in ((64, 64, range(150)), (128, 224, range(4)), (224, 128, range(4))):
        for seed in seeds:
            story, n = W.make_story(seed), 4
            bare = dataclasses.replace(story, shots=tuple(dataclasses.replace(s, character=None) for s in story.shots))
            masks = W.render(story, None, n, height, width)[1]
            alone = W.render(bare, None, n, height, width)[1]
            assert (masks["object"] == alone["object"]).all()                               # nobody covers a thing
            ink = ~masks["scene"]
            assert not ink[:, :, [0, -1]].any() and not ink[:, 0].any()
            for k, shot in enumerate(story.shots):
                inside = slice(k * n, k * n + n)
                if shot.framing == 0 or shot.character is None:
                    assert not ink[inside, -1].any()
                if shot.character is not None:
                    assert (masks["face"][inside].sum((1, 2)) > 60).all()


def test_world_emblems_can_be_read():
    """Each cell of the emblem covers 4 x 4 pixels or more, in a colour far from the shirt's."""
    for seed in range(200):
        story = W.make_story(seed)
        for who in story.characters:
            assert 2 <= sum(map(sum, who.emblem)) <= 4
            gap = [np.linalg.norm(np.subtract(who.emblem_colour, c)) for c in who.shirt_colours]
            assert min(gap) > 110, (seed, gap)
    who, blank = story.characters[0], tuple(((0, 0),) * 3)
    for cell in range(6):
        one = tuple(tuple(int(2 * r + c == cell) for c in range(2)) for r in range(3))
        a, b = (W.draw_character(dataclasses.replace(who, emblem=e), 1.0).rgba[0] for e in (one, blank))
        assert (abs(a - b).max(-1) > 20).sum() == 16


def test_world_is_fast():
    stories = [W.make_story(s) for s in range(30)]
    start = time.perf_counter()
    for story in stories:
        W.render(story)
    assert (time.perf_counter() - start) / 30 < 0.1           # 0.01 on a quiet core


# ---------------------------------------------------------------------------------------------------------------------
# video.py


def greys(n, h=16, w=24):
    """n flat frames, each 20 levels lighter than the one before."""
    return (20 * torch.arange(n)).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, h, w, 3)


def write_raw(path, frames, codec="libx264", pix_fmt="yuv420p", times=None, options=None, source="rgb24"):
    """Write arrays with any codec and any time stamps (milliseconds; by default 10 a second)."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pix_fmt
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.asarray(frame), format=source)
            picture.pts, picture.time_base = times[i] if times else 100 * i, Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def write_sound(path):
    """A file with sound but no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))


def levels(frames):
    """The mean grey of each frame, in steps of 20."""
    return (frames.float().mean((1, 2, 3)) / 20).round().int().tolist()


@pytest.mark.parametrize("suffix", ["mp4", "gif", "mkv"])
@pytest.mark.parametrize("fps", [2, 8, 16, 30000 / 1001])
def test_video_write_then_read_gives_the_same_frames(tmp_path, suffix, fps):
    frames = torch.randint(0, 200, (12, 15, 18, 1), dtype=torch.uint8, generator=torch.manual_seed(0))
    frames = frames + torch.tensor([50, 20, 0], dtype=torch.uint8)
    with VideoWriter(tmp_path / "new" / f"a.{suffix}", fps, 15, 18, scale=4) as w:  # the folder is made
        w.write(frames[:5])
        w.write(frames[5:].numpy())
    again = read_video(tmp_path / "new" / f"a.{suffix}", fps, 15, 18)
    assert again.shape == frames.shape and again.dtype == torch.uint8
    assert (again.float() - frames.float()).abs().mean() < 2.5
    assert (again.float() - frames.float()).mean().abs() < 0.5  # FFmpeg's default conversion is 1.2 too dark
    assert os.listdir(tmp_path / "new") == [f"a.{suffix}"]


def test_video_is_sampled_by_time_stamps(tmp_path):
    for name in "vfr.mp4", "vfr.mkv":  # on screen from 0, 0.1, 1.1 and 1.2 s; the first stamp is not zero
        write_raw(tmp_path / name, greys(4), times=[500, 600, 1600, 1700])
        assert levels(read_video(tmp_path / name, 10, 16, 24)) == [0] + [1] * 10 + [2, 3]
        assert levels(read_video(tmp_path / name, 4, 16, 24, start=0.05, seconds=1.25)) == [0, 1, 1, 1, 1]


def test_video_start_jumps_to_the_same_frames(tmp_path):
    write_raw(tmp_path / "a.mp4", [greys(12)[i // 5 % 12] for i in range(60)], options={"g": "7"})
    whole = read_video(tmp_path / "a.mp4", 10, 16, 24)
    assert len(whole) == 60
    for k in (5, 23, 59):
        assert torch.equal(read_video(tmp_path / "a.mp4", 10, 16, 24, start=k / 10), whole[k:])
    with pytest.raises(UserError, match="6.00 s"):
        read_video(tmp_path / "a.mp4", 10, 16, 24, start=6.1)


@pytest.mark.parametrize("matrix, turn", [((0, 1, -1, 0), lambda x: np.rot90(x, -1)), ((0, -1, 1, 0), np.rot90),
                                          ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)), ((-1, 0, 0, 1), np.fliplr)])
def test_video_rotation_and_mirroring(tmp_path, matrix, turn):
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:16, :32], picture[:16, 32:], picture[16:, :32] = 240, 160, 80
    write_raw(tmp_path / "a.mp4", [picture] * 2)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    a, b, c, d = (n << 16 for n in matrix)
    at = data.index(b"tkhd") + 44
    data[at:at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(data)
    upright = turn(picture)
    assert (video_info(tmp_path / "a.mp4")["height"], video_info(tmp_path / "a.mp4")["width"]) == upright.shape[:2]
    again = read_video(tmp_path / "a.mp4", 10, *upright.shape[:2])
    assert np.abs(again[0].numpy().astype(int) - upright).mean() < 4


@pytest.mark.parametrize("name, codec, pix_fmt", [("a.mkv", "ffv1", "gray"), ("a.mkv", "ffv1", "yuv420p10le"),
                                                  ("a.avi", "mpeg4", "yuv420p"), ("a.webm", "libvpx-vp9", "yuv420p")])
def test_video_formats_odd_and_tiny_sizes(tmp_path, name, codec, pix_fmt):
    for h, w in (27, 33), (4, 4):
        write_raw(tmp_path / name, greys(4, h, w), codec, pix_fmt)
        assert levels(read_video(tmp_path / name, 10, 20, 8)) == [0, 1, 2, 3]
        assert video_info(tmp_path / name)["width"] == w


@pytest.mark.parametrize("name, codec, pix_fmt", [("a.webm", "libvpx-vp9", "yuva420p"), ("a.mov", "qtrle", "argb"),
                                                  ("a.gif", None, None)])
def test_video_alpha_is_laid_over_white(tmp_path, name, codec, pix_fmt):
    picture = np.zeros((16, 32, 4), np.uint8)
    picture[:, :16] = 200, 0, 0, 255
    if codec:
        write_raw(tmp_path / name, [picture] * 3, codec, pix_fmt, source="rgba")
    else:
        Image.fromarray(picture).save(tmp_path / name, save_all=True, append_images=[Image.fromarray(picture[:, ::-1])])
    frame = read_video(tmp_path / name, 10, 16, 32)[0].int()
    assert (frame[8, 4] - torch.tensor([200, 0, 0])).abs().max() < 8 and frame[8, 28].min() > 247


def test_video_resize_covers_and_crops_the_middle(tmp_path):
    picture = np.zeros((40, 100, 3), np.uint8)
    picture[:, 30:70] = np.where(np.arange(40) % 2, 255, 1)[None, :, None]  # stripes of one pixel, around the middle
    write_raw(tmp_path / "a.mkv", [picture], "ffv1", "bgr0")
    for size in 20, 14:  # whole factor and not: either way the stripes must melt into grey
        frame = read_video(tmp_path / "a.mkv", 30, size, size)
        assert frame.shape == (1, size, size, 3)  # and one picture is one frame
        assert (frame[:, :, 1:-1].float() - 128).abs().max() < 12


def test_video_pixels_that_are_not_square(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        picture = np.zeros((64, 32, 3), np.uint8)
        picture[:, :4] = 240  # a crop that took the pixels for square would keep this edge 4 wide, or lose it
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode(None))
    assert video_info(tmp_path / "a.mp4")["width"] == 64
    assert 7 <= (read_video(tmp_path / "a.mp4", 1, 64, 64)[0, 32, :, 0] > 120).sum() <= 9


def test_video_damaged_files(tmp_path, capsys):
    noise = torch.randint(0, 256, (20, 32, 32, 3), dtype=torch.uint8)
    with VideoWriter(tmp_path / "a.mp4", 10, 32, 32, scale=1) as w:
        w.write(noise)
    write_raw(tmp_path / "a.mkv", noise)
    for name in "a.mp4", "a.mkv":
        data = (tmp_path / name).read_bytes()
        assert len(read_video(tmp_path / name, 10, 32, 32)) == 20 and not capsys.readouterr().err
        (tmp_path / f"cut_{name}").write_bytes(data[:len(data) * 6 // 10])
        assert 5 < len(read_video(tmp_path / f"cut_{name}", 10, 32, 32)) < 16
        warning = capsys.readouterr().err
        assert warning.count("\n") == 1 and f"cut_{name}" in warning and "frames decoded" in warning
        (tmp_path / f"stub_{name}").write_bytes(data[:300])
    write_sound(tmp_path / "sound.mp4")
    (tmp_path / "text.mp4").write_text("not a video\n" * 50)
    (tmp_path / "empty.mp4").touch()
    for name in "stub_a.mp4", "stub_a.mkv", "sound.mp4", "text.mp4", "empty.mp4", "missing.mp4", ".":
        for read in (lambda path: read_video(path, 2, 8, 8)), video_info:
            with pytest.raises(UserError) as error:
                read(tmp_path / name)
            assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    for wrong in dict(fps=0), dict(start=-1), dict(seconds=0), dict(seconds=float("nan")):
        with pytest.raises(UserError, match=next(iter(wrong))):
            read_video(tmp_path / "a.mp4", **{"fps": 2, "height": 8, "width": 8, **wrong})


def test_video_writer_leaves_nothing_half_written(tmp_path):
    (tmp_path / "a.mp4").write_text("the old one")
    with pytest.raises(KeyboardInterrupt):
        with VideoWriter(tmp_path / "a.mp4", 2, 16, 24) as w:
            w.write(greys(3))
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["a.mp4"] and (tmp_path / "a.mp4").read_text() == "the old one"
    for path in tmp_path / "a.mp4" / "b.mp4", tmp_path / "a.txt":  # a folder that is a file; an unknown suffix
        with pytest.raises(UserError):
            VideoWriter(path, 2, 16, 24).__enter__()
    with VideoWriter(tmp_path / "a.mp4", 2, 16, 24) as w:
        w.write(greys(2))
        with pytest.raises(ValueError, match="expected"):
            w.write(greys(2, 24, 16))
    info = video_info(tmp_path / "a.mp4")
    assert (info["height"], info["width"], info["seconds"]) == (512, 768, 1.0) and info["fps"] >= 8


def test_video_folder_and_strip(tmp_path):
    with pytest.raises(UserError, match="no video"):
        find_videos(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in "b.MP4", "sub/a.webm", "._b.mp4", "notes.txt":
        (tmp_path / name).touch()
    assert find_videos(tmp_path) == [tmp_path / "b.MP4", tmp_path / "sub" / "a.webm"]
    contact_strip([("one", greys(3)), ("two", greys(5))], tmp_path / "s" / "a.png", columns=["0 s", "1 s"], scale=2)
    strip = np.array(Image.open(tmp_path / "s" / "a.png").convert("RGB"))
    for level in range(1, 5):  # every shade is there: as often as it was drawn, at twice the size
        count = (strip == 20 * level).all(-1).sum()
        assert count >= (2 if level < 3 else 1) * 4 * 16 * 24
    assert (strip[[0, -1]] == 255).all() and (strip[:, [0, -1]] == 255).all()


def test_storyboard_parsing(tmp_path):
    board = [(0.0, "a man walks"), (4.5, "he sits")]
    assert parse_storyboard("a man / a dog") == [(0.0, "a man / a dog")] and parse_storyboard(" ") == []
    assert parse_storyboard("0s: a man walks / 4.5s: he sits") == board
    assert parse_storyboard("0s:a man walks /\n4.5 s: he sits") == board
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf# when he tires\r\n0s: a man walks\r\n\r\n4.5s: he sits\r\n")
    assert storyboard_beside(tmp_path / "a.mp4") == parse_storyboard(str(tmp_path / "a.txt")) == board
    (tmp_path / "a.json").write_text(json.dumps([{"start": 1, "text": "x", "end": 2}, [3, "y"]]))
    assert storyboard_beside(tmp_path / "a.mp4") == [(1.0, "x"), (3.0, "y")]
    assert storyboard_beside(tmp_path / "b.mp4") is None
    assert [prompt_at(board, t) for t in (-1, 0, 4.4, 4.5, 99)] == ["a man walks"] * 3 + ["he sits"] * 2
    assert prompt_at([], 3) == ""


@pytest.mark.parametrize("text, says", [("0s: a\nb\n2s: c", "line 2"), ("0s: a\n0s: b", "line 2"),
                                        ("0s: a / 4s:", "line 1"), ("4 sec: a", "line 1"), ("-1s: a", "line 1"),
                                        ("9" * 400 + "s: a", "inf"),
                                        ("no/such.txt", "no/such.txt"), ("no/such.json", "no/such.json")])
def test_storyboard_text_errors(text, says):
    with pytest.raises(UserError, match=says):
        parse_storyboard(text)


@pytest.mark.parametrize("text, says", [('[[0, "a"], [0, "b"]]', "entry 2"), ('[{"text": "a"}]', "entry 1"),
                                        ("[1]", "entry 1"), ('[[NaN, "a"]]', "entry 1"), ('[[0, 5]]', "entry 1"),
                                        ('{"a": 1}', "list"), ('[[0, "a"],\n', "line 2")])
def test_storyboard_json_errors(tmp_path, text, says):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=says):
        parse_storyboard(tmp_path / "a.json")


# ---------------------------------------------------------------------------------------------------------------------
# pretrain.py and finetune.py

SETTINGS = dict(pretrain=pretrain.PretrainConfig(preset="tiny"),
                finetune=finetune.FinetuneConfig(preset="tiny", t_mean=2.5, t_std=2.0))


def flags(cache, **changes):
    """The command line of a tiny run."""
    given = dict(preset="tiny", init="random", cache=cache, clips=8, held_out=2, batch=4, steps=3, warmup=2,
                 save_every=99, sample_steps=1, device="cpu") | changes
    return [x for k, v in given.items() for x in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]


def losses(folder, key="loss"):
    return [json.loads(line)[key] for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def stage1(cache, tmp_path_factory):
    """A short run of stage 1."""
    out = tmp_path_factory.mktemp("stage1")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(signal, "signal", lambda *a: None)
        run(pretrain.main, *flags(cache, out=out, steps=40))
    return out


def places(clip, hr):
    """The frames of a clip at which hr (C, F, h, w) may begin: a story can show the same twice."""
    n = hr.shape[1]
    return [i for i in range(clip.frames - n + 1) if torch.equal(clip.latents[:, i:i + n].float(), hr)]


def test_retrieval_asks_for_frames_of_the_history(clips):
    tools, rows = tiny_tools(), range(8)
    batch = draw_retrieval(SETTINGS["pretrain"], tools, clips, rows, step=3)
    assert batch.hr.shape == (8, 16, 40, 8, 8) and batch.target.shape == (8, 16, 4, 8, 8) and batch.t.shape == (8,)
    for i, clip in enumerate(clips):
        omega = batch.frames[i].long()
        assert torch.equal(batch.target[i], batch.hr[i][:, omega]) and len(set(omega.tolist())) == 4
        assert min(places(clip, batch.hr[i])) <= 12
    assert torch.equal(batch.lr, tools.codec.downsample(batch.hr, (2, 4, 4)))
    prompts = [b.any().item() for step in range(8) for b in draw_retrieval(
        SETTINGS["pretrain"], tools, clips, rows, step).text]
    assert 16 < sum(prompts) < 48                                   # dropped in half of the samples


def test_retrieval_hides_all_but_the_queries(clips):
    tools = tiny_tools()
    clean, noisy = (draw_retrieval(dataclasses.replace(SETTINGS["pretrain"], mask=mask), tools, clips, range(8), 0)
                    for mask in ("none", "noise"))
    assert torch.equal(clean.target, noisy.target) and torch.equal(clean.frames, noisy.frames)
    asked = torch.zeros(8, 40, dtype=torch.bool).scatter_(1, clean.frames.long(), True)
    assert torch.equal((clean.hr == noisy.hr).all(4).all(3).all(1), asked)
    assert torch.equal((clean.lr == noisy.lr).all(4).all(3).all(1), asked.view(8, 20, 2).any(2))
    for i in range(8):                                              # one level a clip, for both: x + level (ε - x)
        level = [((a - b)[:, ~kept].var() / (1 + b[:, ~kept].var())).sqrt().item() for a, b, kept in (
            (noisy.hr[i], clean.hr[i], asked[i]), (noisy.lr[i], clean.lr[i], asked[i].view(20, 2).any(1)))]
        assert 0 < level[0] < 1 and level[0] == pytest.approx(level[1], rel=0.25)


def test_continuation_asks_for_what_follows_the_history(clips):
    tools, section, waiting = tiny_tools(), 4, []
    for step in range(24):
        some = [clips[i] for i in np.random.default_rng(step).permutation(8)[:3]]
        batch = finetune.draw_continuation(SETTINGS["finetune"], tools, some, range(3), step)
        n = batch.hr.shape[2]
        waiting.append(n % section)
        assert section <= n <= 40 and batch.target.shape == (3, 16, section, 8, 8)
        assert torch.equal(batch.lr, tools.codec.downsample(batch.hr[:, :, :n // section * section], (2, 4, 4)))
        assert batch.frames.tolist() == [list(range(n, n + section))] * 3
        for i, clip in enumerate(some):
            follows = lambda first: torch.equal(                                            # noqa: E731
                batch.target[i], clip.latents[:, first + n:first + n + section].float())
            first = next(f for f in places(clip, batch.hr[i]) if (f + n) % section == 0 and follows(f))
            begin = first + n
            # all that is asked for was on screen for a whole section of this history
            assert W.askable(clip.story, begin // section, -(-first // section))
            assert not batch.text[i].any() or torch.equal(batch.text[i], tools.prompts(clip.prompt(begin)))
    assert 6 < waiting.count(0) < 20                                # about half end with an unfinished segment


def test_batches_do_not_depend_on_how_they_are_split(clips):
    for step in range(6):
        together = draw_retrieval(SETTINGS["pretrain"], tiny_tools(), clips, range(8), step)
        parts = [draw_retrieval(SETTINGS["pretrain"], tiny_tools(), clips, range(i, i + 2), step)
                 for i in range(0, 8, 2)]
        for key, value in vars(together).items():
            assert value is None or torch.equal(value, torch.cat([getattr(p, key) for p in parts])), key


def test_generators_depend_on_every_part_of_the_key():
    first = lambda *key: torch.rand((), generator=pretrain.generator(*key)).item()
    keys = list(itertools.product(range(3), repeat=3))
    assert len({first(*key) for key in keys}) == len(keys) and first(0, 1, 2) == first(0, 1, 2)


def test_muon_makes_updates_orthogonal():
    for rows, columns in (48, 96), (96, 48), (16, 200):             # square ones have singular values too near to zero
        g = randn(3, rows, columns)
        u, s, v = torch.linalg.svd(optim.orthogonalize(g))
        assert 0.6 < s.min() and s.max() < 1.25
        exact = [a @ b.mT for a, b in zip(*(lambda u, s, v: (u, v.mT))(*torch.linalg.svd(g, full_matrices=False)))]
        cosine = F.cosine_similarity(torch.stack(exact).flatten(1), optim.orthogonalize(g).flatten(1))
        assert cosine.min() > 0.95


def test_every_trained_weight_has_one_optimizer():
    dit = MemoryDiT("tiny")
    dit.dit.text_embedding.requires_grad_(False)
    muon, adam = pretrain.make_optimizers(dit, pretrain.PretrainConfig(lr=0.02))
    ids = lambda o: [id(p) for group in o.param_groups for p in group["params"]]
    assert sorted(ids(muon) + ids(adam)) == sorted(id(p) for p in dit.parameters() if p.requires_grad)
    names = {id(p): n for n, p in dit.named_parameters()}
    assert all(w in [names[i] for i in ids(muon)] for w in ("dit.blocks.0.ffn.0.weight", "encoder.hr.convs.0.weight"))
    slow = [names[id(p)] for group in adam.param_groups if group["peak"] == 0.01 * 0.02 for p in group["params"]]
    assert sorted(slow) == sorted(name for name in names.values() if name.startswith("dit.time_"))
    rates = lambda **changes: {names[id(p)]: group["peak"] for o in pretrain.make_optimizers(
        dit, pretrain.PretrainConfig(lr=0.02, **changes)) for group in o.param_groups for p in group["params"]}
    for optimizer in "muon", "adamw":
        whole, slower = rates(optimizer=optimizer), rates(optimizer=optimizer, encoder_lr=0.1)
        assert whole.keys() == slower.keys()
        share = {name: 0.1 if name.startswith("encoder.") else 1 for name in whole}
        assert all(math.isclose(slower[name], whole[name] * share[name]) for name in whole)


def test_noise_levels_are_spread_over_a_batch():
    config = pretrain.PretrainConfig(batch=8, t_mean=1.3, t_std=2.0)
    levels = torch.stack([torch.cat([pretrain.noise_level(config, step, row) for row in range(8)])
                          for step in range(400)])                              # (steps, rows)
    normal = (torch.logit(levels) - 1.3) / 2
    eighths = (8 * torch.special.ndtr(normal)).floor().clamp(0, 7)
    assert (eighths.sort(dim=1).values == torch.arange(8)).float().mean() > 0.99        # one of each eighth
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.03 and (normal[0] - normal[1]).abs().min() > 0
    assert model.sample_t(torch.tensor([0.5]), 0.0).item() == 0.5


def test_training_lowers_the_loss(stage1):
    found = losses(stage1)
    assert len(found) == 40 and np.mean(found[-8:]) < 0.85 * np.mean(found[:4])
    last = json.loads((stage1 / "log.jsonl").read_text().splitlines()[-1])
    assert {"loss_t0.5", "psnr", "psnr_one_step", "psnr_wrong_memory", "psnr_one_step_wrong_memory",
            "grad_norm"} <= set(last)
    dit, config = encoder.load_model(stage1 / "model.safetensors")
    assert (config["stage"], config["step"], config["rate"]) == ("pretrain", 40, "4x4x2")
    assert {p.name for p in stage1.iterdir()} == {"log.jsonl", "model.safetensors", "preview_000040.png", "state.pt"}


@pytest.fixture
def exact(monkeypatch):
    """Float32 and plain gradient descent: bf16 and Muon make much of the last bits."""
    monkeypatch.setattr(pretrain, "autocast", lambda device: torch.autocast("cpu", enabled=False))
    monkeypatch.setattr(pretrain, "make_optimizers", lambda dit, config: [
        torch.optim.SGD([dict(params=[p for p in dit.parameters() if p.requires_grad], peak=config.lr)], config.lr)])


@pytest.mark.parametrize("kind", ["world", "videos"])
@pytest.mark.parametrize("stage", [pretrain, finetune])
def test_accumulated_gradients_equal_those_of_the_whole_batch(stage, kind, cache, exact):
    if kind == "videos":                                            # all of another length
        for i in range(6):
            write_video(Path("videos") / f"{i}.mp4", 9 + 8 * i, i)
    for n in 1, 4:
        none = {"encoder": "none"} if stage is finetune else {}
        run(stage.main, *flags(cache, out=f"out{n}", micro_batch=n, data=kind, **none))
    assert losses("out1") == pytest.approx(losses("out4"), abs=1e-5)
    a, b = (load_file(f"out{n}/model.safetensors") for n in (1, 4))
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-5


def take_step_with_signal(step, number, real=pretrain.take_step):
    """A take_step() that sends this process a signal in this step. (Batches are drawn ahead, by another thread.)"""
    def take_step(*given):
        if given[-1] == step:
            os.kill(os.getpid(), number)
        return real(*given)
    return take_step


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(cache, monkeypatch, capsys):
    run(pretrain.main, *flags(cache, out="whole", steps=6))

    with monkeypatch.context() as m, pytest.raises(SystemExit) as stop:
        m.setattr(pretrain, "take_step", take_step_with_signal(2, signal.SIGTERM))
        run(pretrain.main, *flags(cache, out="parts", steps=6))
    assert stop.value.code == 143 and len(losses("parts")) == 3
    run(pretrain.main, *flags(cache, out="new", steps=6, resume=True))          # nothing there yet: from the start
    assert losses("new") == losses("whole")
    run(pretrain.main, *flags(cache, out="parts", steps=6, resume=True))
    assert losses("parts") == losses("whole")
    a, b = (load_file(f"{out}/model.safetensors") for out in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    capsys.readouterr()
    run(pretrain.main, *flags(cache, out="parts", steps=5, resume=True))        # finished: nothing to do, and said so
    assert "parts has 6 steps already" in capsys.readouterr().err and losses("parts") == losses("whole")


def torchrun(module, *argv):
    """The main of a module on two processes, the tiny presets known."""
    presets = {name: PRESETS[name] for name in ("tiny", "tiny-wan")}
    Path("tiny.py").write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})\nfrom model import *\n"
                               f"PRESETS.update({presets!r})\nimport {module}\n"
                               f"{module}.run_main({module}.main)\n")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           "tiny.py", *map(str, argv)], capture_output=True, text=True, timeout=200,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_train_as_one(cache, tmp_path):
    run(pretrain.main, *flags(cache, out="one", steps=4))
    torchrun("pretrain", *flags(cache, out="two", steps=4))
    assert losses("two") == pytest.approx(losses("one"), abs=1e-3)
    assert losses("two", "grad_norm") == pytest.approx(losses("one", "grad_norm"), rel=0.02)
    figures = [json.loads((Path(out) / "log.jsonl").read_text().splitlines()[-1]) for out in ("one", "two")]
    assert figures[0].keys() == figures[1].keys() and figures[1]["psnr"] == pytest.approx(figures[0]["psnr"], abs=0.05)
    a, b = (load_file(f"{out}/model.safetensors") for out in ("one", "two"))
    assert a.keys() == b.keys()


@pytest.mark.parametrize("lora", (0, 4))
@pytest.mark.parametrize("method", encoder.METHODS)
@pytest.mark.parametrize("preset", ("tiny", "tiny-wan"))
def test_everything_stays_on_the_device(preset, method, lora, monkeypatch):
    """The base is loaded onto the device, φ is made on the CPU: what follows mixes no two devices. The meta device
    stands for a GPU: it refuses tensors of the CPU as that does."""
    monkeypatch.setattr(pretrain, "load_base", lambda dit, path, device, frozen: dit.to(device))
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    p, meta = PRESETS[preset], torch.device("meta")
    codec = codecs.make_codec(p)
    dit = pretrain.make_model(pretrain.PretrainConfig(preset, method=method, lora=lora), p, codec, meta)
    random = lambda *shape: torch.randn(*shape, device=meta)                    # noqa: E731
    n = 2 * p.section + codec.causal
    hr, target, times = random(2, 16, n + 1, 8, 8), random(2, 16, 4, 8, 8), random(2, 4)
    lr = codec.downsample(hr[:, :, :n], (2, 4, 4))
    loss = dit(hr, lr, target, times, random(2, 16, 4, 8, 8), random(2), random(2, 24, p.dit.text_dim))
    loss.sum().backward()
    assert loss.device == meta and all(q.device == meta for q in dit.parameters())
    memory = Memory(dit, codec, most=2)
    memory.append(hr[:1])
    memory.append(hr[:1])
    text = random(1, 24, p.dit.text_dim)
    assert euler(dit.dit, target[:1], text, times[:1], memory.context(), 2, 3.0, 2.0).device == meta


def test_stage_2_takes_or_keeps_the_encoder(cache, stage1, monkeypatch, capsys):
    # without a device the weights would end up on the CPU, the DiT being elsewhere
    monkeypatch.setattr(finetune, "load_weights", lambda *a, device, **k: load_weights(*a, device=device, **k))
    for name, more in ("trained", {}), ("frozen", {"freeze_encoder": True}), ("fresh", {"encoder": "none"}):
        run(finetune.main, *flags(cache, out=name, **{"encoder": stage1, **more}))
    theirs = {k: v for k, v in load_file(stage1 / "model.safetensors").items() if k.startswith("encoder.")}
    trained, frozen, fresh = (load_file(f"{name}/model.safetensors") for name in ("trained", "frozen", "fresh"))
    assert theirs and all(torch.equal(frozen[k], v) for k, v in theirs.items())
    assert capsys.readouterr().out.count(f"φ: {stage1}/model.safetensors, of pretrain.py, step ") == 2
    gap = lambda a: sum((a[k] - v).square().sum() for k, v in theirs.items())
    assert 0 < gap(trained) < 0.5 * gap(fresh)                      # it starts from φ of stage 1 and moves on
    assert any(not torch.equal(frozen[k], v) for k, v in trained.items() if k.startswith("dit."))


@pytest.mark.parametrize("lora", (0, 2))
def test_stage_2_begins_with_the_base_and_a_fresh_lora(lora, cache):
    """Only φ comes from stage 1: its DiT, or LoRA, has moved, and stage 2's is the base's again."""
    base = randomize(DiT(TINY.dit)).state_dict()
    save_file(base, "base.safetensors")
    common = dict(init="base.safetensors", lora=lora, ema=0)
    run(pretrain.main, *flags(cache, out="one", lr=0.02, **common))
    run(finetune.main, *flags(cache, out="two", encoder="one", steps=1, lr=1e-9, **common))
    one, two = ({k.removeprefix("dit."): v for k, v in load_file(f"{out}/model.safetensors").items()
                 if k.startswith("dit.") and ".lora_A" not in k} for out in ("one", "two"))
    assert one.keys() == two.keys() and all(".lora_B" in k for k in two) == bool(lora)
    start = {k: base.get(k, torch.zeros_like(v)) for k, v in two.items()}
    gap = lambda a: max((a[k] - v).abs().max() for k, v in start.items())       # noqa: E731
    assert gap(two) < 1e-6 and gap(one) > 1e-3


def test_weights_without_their_state_are_not_written_over(cache, capsys):
    """--resume begins anew where there is no state.pt, and keeps the weights that lie there under another name."""
    run(pretrain.main, *flags(cache, out="run", steps=3))
    weights, state = Path("run/model.safetensors"), Path("run/state.pt")
    before = weights.read_bytes()
    state.unlink()
    run(pretrain.main, *flags(cache, out="run", steps=2, resume=True))
    assert Path("run/model-step3.safetensors").read_bytes() == before != weights.read_bytes()
    assert state.is_file() and [entry for entry in saving.read_log(Path("run/log.jsonl"))] == [1, 2]
    assert "model-step3.safetensors now" in capsys.readouterr().out


def test_figures_of_stage_2_are_of_the_longest_history(cache):
    """Drawn by lot they would differ from seed to seed, and show the newest frames uncompressed in some."""
    clips = world_clips("held-out", 2, TINY, DCTCodec(), cache)
    for seed in range(6):
        config = dataclasses.replace(SETTINGS["finetune"], seed=seed)
        batch = finetune.draw_continuation(config, tiny_tools(), clips, range(2), 0, longest=True)
        assert batch.hr.shape[2] == TINY.history and batch.frames[0].tolist() == [40, 41, 42, 43]


def test_wan_trains_on_whole_segments_at_its_own_noise_levels():
    clips = Clips([Clip(randn(16, 13, 8, 8), [])])
    tools = Tools(PRESETS["tiny-wan"], wan.WanCodec(), wan.ZeroPrompts(16, 24),
                  MemoryEncoder("proposed", "4x4x2", "tiny-wan"), "cpu")
    for step in range(20):
        batch = finetune.draw_continuation(SETTINGS["finetune"], tools, clips, range(1), step)
        assert batch.hr.shape[2] in (5, 9)                          # the lone first latent, and one or two segments
    save_file({"any": torch.zeros(1)}, "base.safetensors")
    config = finetune.FinetuneConfig(preset="wan-14b", init="base.safetensors")
    pretrain.check(config)
    assert (config.t_mean, config.t_std, config.lora) == (1.3, 1.0, 128)


def test_a_base_without_memory(cache, tmp_path):
    run(finetune.main, *flags(cache, out="base", method="none"))
    assert all(k.startswith("dit.") for k in load_file("base/model.safetensors"))
    run(pretrain.main, *flags(cache, out="next", init="base/model.safetensors", steps=1, lr=1e-9))
    a, b = load_file("base/model.safetensors"), load_file("next/model.safetensors")
    assert all(torch.allclose(b[k], v, atol=1e-6) for k, v in a.items())
    assert torch.allclose(b["encoder.patch_embedding.weight"], a["dit.patch_embedding.weight"], atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# wan.py, LoRA, and the cache


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """A folder with Wan's VAE, tiny and random."""
    diffusers = pytest.importorskip("diffusers")
    path = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    diffusers.AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def t5(tmp_path_factory):
    """A folder with umT5 and its tokenizer, tiny and random, as in a diffusers pipeline."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    path = tmp_path_factory.mktemp("pipeline")
    words = {w: i for i, w in enumerate("<pad> </s> <unk> a cat dog walks & 'quoted'".split())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>",
                                         unk_token="<unk>").save_pretrained(path / "tokenizer")
    torch.manual_seed(0)
    config = transformers.UMT5Config(vocab_size=9, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
                                     tie_word_embeddings=False)
    transformers.UMT5EncoderModel(config).save_pretrained(path / "text_encoder")
    return path


def test_wan_codec_in_pieces_equals_the_whole(vae):
    codec, pixels = wan.WanCodec(vae), randn(1, 3, 21, 32, 48).clamp(-1, 1)
    latents = codec.encode(pixels)
    mean, std = (torch.tensor(x).view(1, 16, 1, 1, 1) for x in (wan.MEAN, wan.STD))
    with torch.no_grad():
        theirs = codec.vae.encode(pixels).latent_dist.mode()
        whole = codec.vae.decode(theirs).sample
    assert latents.shape == (1, 16, 6, 4, 6) and (latents * std + mean - theirs).abs().max() < 1e-4
    decode = codec.decoder()
    parts = [decode(part) for part in latents.split([1, 2, 3], dim=2)]
    assert [part.shape[2] for part in parts] == [1, 8, 12]
    assert (torch.cat(parts, 2) - whole).abs().max() < 1e-4 and (codec.decode(latents) - whole).abs().max() < 1e-4
    assert (codec.decode(latents[:, :, 3:]) - whole[:, :, 9:10]).abs().max() > 1e-3     # what went before matters
    assert [codec.frames(n) for n in (1, 4, 5, 480, 481)] == [1, 1, 5, 477, 481]
    assert tuple(codec.vae.config.latents_mean) == wan.MEAN and tuple(codec.vae.config.latents_std) == wan.STD


def test_wan_models_are_read_whole_or_not_at_all(tmp_path, vae, t5):
    read = {"diffusion_pytorch_model": lambda path: wan.WanCodec(path), "model": lambda path: wan.UMT5Prompts(path, 16)}
    for folder, (stem, open_it) in zip((vae, t5), read.items()):
        path = tmp_path / stem
        shutil.copytree(folder, path)
        file = next(path.rglob(f"{stem}.safetensors"))
        tensors = load_file(file)
        lost = next(name for name in tensors if "conv" in name or "DenseReluDense" in name)
        tensors.pop(lost)
        whole = file.read_bytes()
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(UserError, match=f"lacks {re.escape(lost)}"):
            open_it(path)
        file.write_bytes(whole[:len(whole) // 2])
        with pytest.raises(UserError, match="cannot be read"):
            open_it(path)


def test_wan_models_of_another_kind_are_refused(tmp_path, vae, t5):
    config = json.loads((vae / "config.json").read_text())
    for change, says in ((dict(z_dim=48, latents_mean=[0.0] * 48, latents_std=[1.0] * 48), "48 channels"),
                         (dict(temperal_downsample=[False, False, True]), "another VAE"),
                         (dict(patch_size=2), "16 pixels"), (dict(latents_mean=[0.0] * 16), "another VAE")):
        made = type(wan.WanCodec(vae).vae).from_config(config | change)
        made.save_pretrained(tmp_path / says)
        with pytest.raises(UserError, match=says):
            wan.WanCodec(tmp_path / says)
    with pytest.raises(UserError, match="makes vectors of 16 numbers, but the DiT reads 32"):
        wan.UMT5Prompts(t5, 32)


def test_wan_codec_shows_frames_in_their_place(vae):
    codec = wan.WanCodec(vae)
    latents, other = (codec.encode(randn(2, 3, 21, 16, 16, seed=i).clamp(-1, 1)) for i in (0, 1))
    shown = codec.show(latents, other[:, :, [2, 4]], torch.tensor([[2, 4], [0, 5]]))
    assert shown.shape == (2, 3, 2, 16, 16)
    video = latents[:1].clone()
    video[:, :, [2, 4]] = other[:1, :, [2, 4]]
    assert (shown[0] - codec.decode(video)[0][:, [8, 16]]).abs().max() < 1e-4
    beyond = codec.show(latents[:, :, :4], latents[:, :, 4:], torch.tensor([[4, 5]] * 2))       # the next section
    assert (beyond - codec.decode(latents)[:, :, [16, 20]]).abs().max() < 1e-4


def test_wan_codec_downsamples_whole_segments_and_the_lone_latent():
    codec, x = wan.WanCodec(), randn(1, 16, 9, 6, 10)
    small = codec.downsample(x, (2, 2, 2))
    assert small.shape == (1, 16, 5, 4, 6)                          # up to whole 2 x 2 tokens
    assert torch.allclose(small[:, :, 0, :3, :5], F.avg_pool2d(x[:, :, 0], 2)) and not codec.decodes
    assert torch.allclose(small[:, :, 1:, :3, :5], F.avg_pool3d(x[:, :, 1:], 2), atol=1e-6)
    with pytest.raises(UserError, match="--vae"):
        codec.decoder()


@torch.no_grad()
def test_umt5_prompts_are_zero_padded(t5, capsys, monkeypatch):
    prompts = wan.UMT5Prompts(t5, 16, 6)
    rows = prompts("a  cat\nwalks")
    tokens = torch.tensor([[3, 4, 6, 1]])
    assert rows.shape == (6, 16) and not rows[4:].any()
    assert torch.equal(rows[:4], prompts.model(tokens).last_hidden_state[0].float()) and not prompts("").any()
    assert torch.equal(prompts("a &amp;amp; cat"), prompts("a & cat"))
    def full(self, device, real=wan.torch.nn.Module.to):
        if str(device) == "meta":
            raise torch.OutOfMemoryError
        return real(self, device)
    monkeypatch.setattr(torch.nn.Module, "to", full)                # a GPU that is too small
    assert torch.equal(wan.UMT5Prompts(t5, 16, 6, "meta")("a  cat\nwalks"), rows)
    assert "runs on the CPU" in capsys.readouterr().err
    long = prompts("a cat walks a dog walks a cat")
    assert "cut to 6" in capsys.readouterr().err and long.any(1).all()
    expected = prompts.model(torch.tensor([[3, 4, 6, 3, 5, 1]])).last_hidden_state[0].float()   # the end stays
    assert torch.equal(long, expected)


def forward_with_memory(dit):
    args = randn(2, 4, 2, 4, 6), torch.tensor([300.0, 900.0]), randn(2, 6, 16, seed=1)
    return dit(*args, memory=(randn(2, 3, 40, seed=2), randn(3, 3, seed=3)))


def test_lora_starts_as_nothing_and_merges_exactly():
    dit = tiny_dit()
    before = forward_with_memory(dit)
    model.add_lora(dit, 3)
    trained = {n: p for n, p in dit.named_parameters() if p.requires_grad}
    # q, k, v, o of two attentions and two feed-forward linears, A and B each, in every block
    assert len(trained) == 20 * CONFIG.layers and all(".lora_" in n for n in trained)
    assert sum(p.numel() for p in trained.values()) == CONFIG.layers * 3 * (8 * 2 * 40 + 2 * (40 + 80))
    assert torch.equal(forward_with_memory(dit), before)
    for n, p in trained.items():
        p.data = 0.2 * randn(*p.shape, seed=len(n))
    changed = forward_with_memory(dit)
    assert (changed - before).abs().max() > 1e-2
    model.merge_lora(dit)
    assert [n for n, _ in dit.named_parameters()] == [n for n, _ in tiny_dit().named_parameters()]
    assert (forward_with_memory(dit) - changed).abs().max() < 1e-5


def test_recomputing_activations_changes_no_gradient():
    grads = []
    for recompute in (False, True):
        dit = tiny_dit()
        dit.recompute = recompute
        forward_with_memory(dit).square().mean().backward()
        grads.append([p.grad for p in dit.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads)) and len(grads[0]) > 20


def test_frozen_base_is_held_in_the_dtype_of_products(tmp_path, monkeypatch):
    monkeypatch.setattr("weights.product_dtype", lambda device: torch.bfloat16)
    save_file(tiny_dit(seed=1).state_dict(), tmp_path / "base.safetensors")
    with torch.device("meta"):
        dit = DiT(CONFIG)
    load_base(dit, tmp_path / "base.safetensors", torch.device("cpu"), frozen=True)
    for name, p in dit.named_parameters():
        assert p.dtype == (torch.bfloat16 if name.startswith("blocks.") and p.ndim == 2 else torch.float32), name
    model.add_lora(dit, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (forward_with_memory(dit) - forward_with_memory(tiny_dit(seed=1))).abs().max() < 0.1


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the memory in use from /proc")
def test_loading_takes_no_second_copy():
    """Peak memory of a process that loads a float32 file of 340 MB, measured against what holds the model."""
    script = r"""
import re, sys, torch
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[1])
import model
import optim
import weights
config = model.DiTConfig(dim=512, ffn_dim=2048, heads=4, layers=20, text_dim=64, text_len=8)
with torch.device("meta"):
    dit = model.DiT(config)
size = sum(p.numel() for p in dit.parameters())
if len(sys.argv) > 2:
    save_file({n: torch.zeros(p.shape) for n, p in dit.named_parameters()}, "big.safetensors")
    sys.exit()
weights.product_dtype = lambda device: torch.bfloat16
small = model.DiT(model.DiTConfig(dim=64, ffn_dim=256, heads=1, layers=1, text_dim=64, text_len=8))
save_file(small.state_dict(), "small.safetensors")
weights.load_base(small, "small.safetensors", torch.device("cpu"), frozen=True)      # what is needed once
memory = lambda what: int(re.search(what + r":\s*(\d+)", open("/proc/self/status").read())[1]) * 1024
before = memory("VmRSS")
weights.load_base(dit, "big.safetensors", torch.device("cpu"), frozen=True)
print((memory("VmHWM") - before) / sum(p.numel() * p.element_size() for p in dit.parameters()))
"""
    call = lambda *more: subprocess.run([sys.executable, "-c", script, str(HERE), *more], capture_output=True,
                                        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert call("write").returncode == 0
    done = call()
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.2


def cached(folder, *more, preset="tiny"):
    """data.py cache, in this process."""
    caching.cache_videos(["--videos", str(folder), "--out", "shards", "--preset", preset, "--shard", "4",
                          *map(str, more)])
    return Path("shards")


def watch_encoding(monkeypatch):
    """A list that gets the name of every video that data.py cache encodes from here on."""
    calls = []
    monkeypatch.setattr(caching, "cache_video", lambda path, *a, real=caching.cache_video: (
        calls.append(path.name) or real(path, *a)))
    return calls


@pytest.mark.parametrize("width, height, size", [(1920, 1080, (480, 832)), (1080, 1920, (832, 480)),
                                                 (1080, 1080, (624, 624)), (640, 480, (480, 832)),
                                                 (1280, 1024, (624, 624)), (2560, 1080, (480, 832))])
def test_videos_go_to_the_size_of_the_nearest_shape(width, height, size):
    assert data.nearest_size(PRESETS["wan-14b"], dict(width=width, height=height)) == size


def test_cache_goes_on_and_is_never_stale(tmp_path, capsys, monkeypatch):
    folder, codec = tmp_path / "videos", DCTCodec()
    for i in range(6):
        write_video(folder / f"{i}.mp4", 100 if i == 3 else 12 + i, i)
        (folder / f"{i}.txt").write_text(f"0s: waves {i} / 2s: more {i}")
    (folder / "0.mp4").write_text("not a video")
    shards = cached(folder)
    said = capsys.readouterr()
    members = {i: [j for j in range(6) if caching.shard_of(f"{j}.mp4", 2) == caching.shard_of(f"{i}.mp4", 2)]
               for i in range(6)}
    assert "7 clips of 5 videos in 2 shards; 1 skipped" in said.out and said.err.count("skipped: ") == 1
    train, held_out = data.cached_clips(shards, TINY, codec, 16)
    clips = [*train.clips, *held_out.clips]
    assert sorted(clip.frames for clip in clips) == [13, 14, 16, 17, 44, 44, 44]
    for clip in clips:
        i = 3 if clip.frames == 44 else clip.frames - 12            # 100 frames: windows of 40 + 4, the last from 56 on
        pixels = read_video(folder / f"{i}.mp4", 2, 32, 32)
        text = clip.text(5, HashPrompts(16, 24))
        assert text.shape == (1, 24, 16) and torch.allclose(text[0], HashPrompts(16, 24)(f"more {i}"), atol=0.02)
        if i != 3:
            assert torch.allclose(clip.cut(2, 9), codec.encode(to_pixels(pixels[2:9])[None]), atol=0.05)
    calls = watch_encoding(monkeypatch)
    cached(folder)
    assert calls == []
    (folder / "5.txt").write_text("another caption")
    cached(folder)
    assert calls == [f"{i}.mp4" for i in members[5]] and len(calls) < 6         # its shard alone
    calls.clear()
    shutil.copy(folder / "2.mp4", folder / "1.mp4")                 # another video of that name
    cached(folder)
    assert calls == [f"{i}.mp4" for i in members[1]]
    for changed in dataclasses.replace(TINY, fps=4), dataclasses.replace(TINY, sizes=((32, 48),)):
        calls.clear()
        monkeypatch.setitem(PRESETS, "tiny", changed)
        cached(folder)
        assert len(calls) == 6
    for version in "READING", "ENCODING":
        calls.clear()
        monkeypatch.setattr(data, version, 99)
        cached(folder)
        assert len(calls) == 6
    with pytest.raises(UserError, match="cached with prompts"):
        data.cached_clips(shards, dataclasses.replace(changed, dit=dataclasses.replace(TINY.dit, text_len=7)), codec, 1)


def test_cache_stops_once_too_many_are_bad(tmp_path, monkeypatch):
    for i in range(10):
        write_video(tmp_path / "videos" / f"{i}.mp4", 12, i)
    order = sorted(range(10), key=lambda i: (caching.shard_of(f"{i}.mp4", 5), i))
    for i in order[1:4]:
        (tmp_path / "videos" / f"{i}.mp4").write_text("not a video")
    calls = watch_encoding(monkeypatch)
    with pytest.raises(UserError, match="3 of 10 videos"):
        cached(tmp_path / "videos", "--shard", 2)
    assert 4 <= len(calls) < 10 and calls == [f"{i}.mp4" for i in order[:len(calls)]]
    assert not Path("shards/manifest.json").exists()


def test_a_cache_made_again_never_gives_a_training_another_video(tmp_path, monkeypatch):
    folder, codec, prompts = tmp_path / "videos", DCTCodec(), HashPrompts(16, 24)
    for i in range(6):
        write_video(folder / f"{i}.mp4", 12, i)
        (folder / f"{i}.txt").write_text(f"waves {i}")
    shards = cached(folder)
    (shards / "shard-00000.safetensors").write_bytes(b"of a cache before files had keys in their names")
    clips = [clip for part in data.cached_clips(shards, TINY, codec, 16) for clip in part.clips]
    read = lambda clip: (clip.cut(0, 12), clip.text(0, prompts))                                # noqa: E731
    before = [read(clip) for clip in clips]
    shutil.copy(folder / "2.mp4", folder / "1.mp4")                 # another video of that name
    with monkeypatch.context() as m:
        m.setattr(caching, "finish_cache", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            cached(folder)
    assert same([read(clip) for clip in clips], before)             # until the new one is whole
    cached(folder)
    gone = caching.shard_of("1.mp4", 2)
    for clip, was in zip(clips, before):
        if int(clip.file.name.split("-")[1]) == gone:
            with pytest.raises(UserError, match=r"is gone \(was the cache made again\?\): run data.py cache"):
                read(clip)
        else:
            assert same(read(clip), was)
    files = {path.name for path in shards.glob("*.safetensors")}
    assert files == json.loads((shards / "manifest.json").read_text())["files"].keys() and len(files) == 2
    for path in shards.glob("*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))
    for ask in lambda clip: clip.cut(0, 12), lambda clip: clip.text(0, prompts):                # noqa: E731
        with pytest.raises(UserError, match="safetensors is damaged: delete it, run data.py cache"):
            ask(data.cached_clips(shards, TINY, codec, 16)[0][0])


def test_a_shard_is_written_while_it_is_made(tmp_path, monkeypatch):
    """A film of Wan takes gigabytes, a shard of them more memory than there is."""
    for i in range(3):
        write_video(tmp_path / "videos" / f"{i}.mp4", 100, i)
        (tmp_path / "videos" / f"{i}.txt").write_text(f"0s: waves / {7 + i}s: more")
    read = lambda: [(clip.cut(0, 44), clip.text(40, HashPrompts(16, 24))) for part in                   # noqa: E731
                    data.cached_clips(shards, TINY, DCTCodec(), 9) for clip in part.clips]
    shards = cached(tmp_path / "videos")
    whole, events = read(), []
    assert len(whole) == 9 and len(list(shards.glob("*.safetensors"))) == 1
    monkeypatch.setattr(DCTCodec, "encode", lambda *a, real=DCTCodec.encode: events.append("encode") or real(*a))
    monkeypatch.setattr(caching, "save_file", lambda *a: events.append("save") or save_file(*a))
    window = whole[0][0].numel() * 2
    for most, times in (2 * window, 5), (1, 9):                     # bytes of bf16; its prompts count too
        shutil.rmtree(shards)
        events.clear()
        monkeypatch.setattr(caching, "PIECE", most)
        cached(tmp_path / "videos")
        assert len(list(shards.glob("*.safetensors"))) == times == events.count("save")
        assert most > 1 or events == 9 * ["encode", "save"]
        assert same(read(), whole)
    events.clear()
    cached(tmp_path / "videos")
    assert events == []
    next(shards.glob("shard-00000-*-5.safetensors")).unlink()       # any of its files: the shard is made again
    cached(tmp_path / "videos")
    assert events.count("encode") == 9 and same(read(), whole)


def test_a_new_video_changes_few_shards():
    names = [f"{i}.mp4" for i in range(4000)]
    for n in (1, 2, 3, 4, 5, 31, 32, 33, 100):
        before, after = ([caching.shard_of(name, k) for name in names] for k in (n, n + 1))
        assert set(before) == set(range(n)) and max(map(before.count, range(n))) < 3 * len(names) / n
        moved = [(a, b) for a, b in zip(before, after) if a != b]
        assert {b for _, b in moved} == {n} and len({a for a, _ in moved}) == 1         # one shard is split


def test_storyboard_past_the_end_is_said(tmp_path, capsys):
    for i in range(2):
        write_video(tmp_path / "videos" / f"{i}.mp4", 12, i)
        (tmp_path / "videos" / f"{i}.txt").write_text(f"0s: waves / {50 + i}s: more")
    data.video_clips(tmp_path / "videos", TINY, DCTCodec(), tmp_path / "c")
    cached(tmp_path / "videos")
    said = capsys.readouterr().err
    assert "goes on to 50 s, but the video ends at 6 s" in said and "goes on to 51 s" in said


@pytest.mark.parametrize("frames, latents, tokens", [(5, 2, 1664), (33, 9, 520), (320, 73, 3848), (321, 81, 4264),
                                                     (330, 81, 4264)])
def test_a_history_for_wan_is_whole_segments(frames, latents, tokens, monkeypatch):
    """20 s at 16 fps are 320 frames, 80 latents: seven of them would wait uncompressed."""
    monkeypatch.setattr(sample, "read_clip", lambda path, preset: torch.arange(frames)[:, None, None, None])
    preset, codec = PRESETS["wan-1.3b"], wan.WanCodec()
    history, kept = sample.read_history(sample.SampleConfig(), preset, codec, 10)
    assert len(history) == frames and kept.flatten()[-1] == frames - 1 and len(kept) == 4 * latents - 3
    assert budget.memory_tokens(preset, (480, 832), "4x4x2", latents) == tokens


def test_cache_refuses_what_does_not_fit(tmp_path):
    folder, codec = tmp_path / "videos", DCTCodec()
    for i in range(2):
        write_video(folder / f"{i}.mp4", 12, i)
    (folder / "list.jsonl").write_text('{"video": "0.mp4", "caption": "a wave"}\n{"video": "1.mp4", "storyboard": '
                                       '[[0, "a"], [2, "b"]]}\n')
    shards = cached(folder, "--captions", folder / "list.jsonl")
    train, held_out = data.cached_clips(shards, TINY, codec, 16)
    assert {len(json.loads(open_safetensors(c.file).metadata()["starts"])[c.number])
            for c in [*train.clips, *held_out.clips]} == {1, 2}
    with pytest.raises(UserError, match="with fps 2, not 4"):
        data.cached_clips(shards, dataclasses.replace(TINY, fps=4), codec, 16)
    with pytest.raises(UserError, match="cached with codec"):
        data.cached_clips(shards, TINY, wan.WanCodec(), 16)
    manifest = (shards / "manifest.json").read_text()
    (shards / "manifest.json").write_text(json.dumps(json.loads(manifest) | {"files": {}}))
    with pytest.raises(UserError, match="holds no clip"):
        data.cached_clips(shards, TINY, codec, 16)
    (shards / "manifest.json").write_text(manifest)
    shard = next(shards.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut short"):
        data.cached_clips(shards, TINY, codec, 16)
    cached(folder, "--captions", folder / "list.jsonl")             # as that error says
    assert len(data.cached_clips(shards, TINY, codec, 16)[0]) == 1
    settings = json.loads(manifest)["settings"]
    del settings["version"]                                         # a cache made before files had keys in their names
    (shards / "manifest.json").write_text(json.dumps(dict(settings=settings, bytes=[9])))
    with pytest.raises(UserError, match="with version None, not 1: .* or run data.py cache again"):
        data.cached_clips(shards, TINY, codec, 16)
    (shards / "shard-00000.json").write_text(json.dumps(dict(key="a", clips=[], skipped=[], bytes=9)))
    cached(folder, "--captions", folder / "list.jsonl")
    assert len(data.cached_clips(shards, TINY, codec, 16)[0]) == 1
    for damage in ('{"settings": ', "[]", "{}", '{"settings": []}', '{"settings": {}}', '{"settings": {"codec": null}}',
                   '{"settings": {}, "files": []}'):
        (shards / "manifest.json").write_text(damage)
        with pytest.raises(UserError, match="manifest.json is damaged"):
            data.cached_clips(shards, TINY, codec, 16)
    (shards / "manifest.json").unlink()
    with pytest.raises(UserError, match="manifest.json is missing: run data.py cache again"):
        data.cached_clips(shards, TINY, codec, 16)
    (folder / "list.jsonl").write_text('{"video": "0.mp4"}\n')
    with pytest.raises(UserError, match="list.jsonl, line 1"):
        cached(folder, "--captions", folder / "list.jsonl")
    with pytest.raises(UserError, match="nowhere.jsonl cannot be read"):
        cached(folder, "--captions", folder / "nowhere.jsonl")
    for bad in folder.glob("*.mp4"):
        bad.write_text("")
    with pytest.raises(UserError, match="2 of 2 videos"):
        cached(folder)


def readme_command(script, preset="wan-1.3b"):
    """{flag: value} of the README's command that starts this script on Wan 2.1."""
    commands = (HERE / "README.md").read_text().partition("## With Wan 2.1")[2].replace("\\\n", " ")
    values = re.search(rf"preset={preset} first=(\d+) second=(\d+)", commands)
    words = re.search(rf"torchrun --nproc_per_node=8 {script}.py (--preset .*)", commands)[1].split()
    known = {"$preset": preset, "$first": values[1], "$second": values[2]}
    return {flag: known.get(value, value) for flag, value in zip(words[::2], words[1::2])}


@pytest.mark.parametrize("preset", ("wan-1.3b", "wan-14b"))
def test_the_recipe_of_the_readme_fits_80_gb(preset, capsys):
    run(evaluation.main, "budget", "--preset", preset)
    most = re.search(r"largest batch in.*", capsys.readouterr().out)[0].split()[-2:]
    for script, largest in zip(("pretrain", "finetune"), most):
        given = readme_command(script, preset)
        parsed = [int(given[f"--{key}"]) for key in ("batch", "micro_batch")]
        assert given["--preset"] == preset and parsed[1] <= int(largest) and parsed[0] % (8 * parsed[1]) == 0


def recipe_videos(videos, folder):
    """Three captioned clips in a folder: "made" here, or "real" ones."""
    real = [path for path in sorted((HERE.parent / "shared" / "videos").rglob("*.mp4"))
            if video_info(path)["seconds"] > 17][:3]                # a segment and a section of tiny-wan
    if videos == "real" and len(real) < 3:
        pytest.skip("needs the clips of ../shared/videos")
    folder.mkdir()
    for i in range(3):
        if videos == "made":
            write_video(folder / f"{i}.mp4", 60, i)
        else:
            shutil.copy(real[i], folder / f"{i}.mp4")
        (folder / f"{i}.txt").write_text("0s: a cat / 2s: a dog")


@pytest.mark.parametrize("videos", ("made", "real"))
def test_wan_recipe_on_two_processes(videos, tmp_path, vae, t5):
    """Cache, both stages and a continued clip, by the README's commands, on a Wan of tiny width and depth."""
    recipe_videos(videos, tmp_path / "videos")
    # a base that has not been trained has a head of zeros, through which no gradient comes
    save_file(randomize(DiT(PRESETS["tiny-wan"].dit)).state_dict(), tmp_path / "base.safetensors")
    torchrun("data", "cache", "--preset", "tiny-wan", "--videos", "videos", "--out", "shards", "--vae", vae, "--t5", t5,
             "--shard", 1)
    changed = {"--preset": "tiny-wan", "--init": "base.safetensors", "--data": "shards", "--batch": 2, "--steps": 4,
               "--save_every": 4, "--warmup": 1, "--lr": 0.03, "--ema": 0, "--sample_steps": 1, "--device": "cpu"}
    for script, more in ("pretrain", {"--queries": 2}), ("finetune", {"--vae": vae}):
        torchrun(script, *(x for pair in (readme_command(script) | changed | more).items() for x in pair))
    stage1, stage2 = (load_file(f"runs/wan_{stage}/model.safetensors") for stage in ("pretrain", "finetune"))
    for run_of in stage1, stage2:
        still = [name for name, x in run_of.items() if name.endswith("lora_B") and x.abs().max() < 1e-3]
        assert not still
    assert [name for name, x in stage2.items() if x.ndim > 1 and torch.equal(x, stage1[name])] == [
        "encoder.patch_embedding.weight"]                           # for frames that wait: with Wan there are none
    assert min(losses("runs/wan_pretrain", "grad_norm") + losses("runs/wan_finetune", "grad_norm")) > 0
    assert {n.split(".")[0] for n in stage2} == {"dit", "encoder"}
    assert all(".lora_" in n for n in stage2 if n.startswith("dit."))
    assert Path("runs/wan_finetune/preview_000004.png").is_file()
    assert "latent_mse" in Path("runs/wan_pretrain/log.jsonl").read_text() and "psnr" in Path(
        "runs/wan_finetune/log.jsonl").read_text()
    exported = load_file("runs/wan_finetune/lora.safetensors")
    assert exported.keys() == {f"diffusion_model.blocks.{i}.{m}.lora_{x}.weight" for i in range(TINY.dit.layers)
                               for m in (*(f"{a}.{p}" for a in ("self_attn", "cross_attn") for p in "qkvo"),
                                         "ffn.0", "ffn.2") for x in "AB"}
    assert all(torch.equal(x, stage2[f"dit.{name.removeprefix('diffusion_model.').removesuffix('.weight')}"])
               for name, x in exported.items())
    header = {"config": open_safetensors("runs/wan_finetune/model.safetensors").metadata()["config"]}
    save_file({n: x * 0 if n.endswith("lora_B") else x for n, x in stage2.items()}, "without.safetensors", header)
    written = []
    for given in (("runs/wan_finetune/model.safetensors",), ("runs/wan_finetune/model.safetensors", "--merge"),
                  ("without.safetensors",)):
        run(sample.main, "--history", "videos/0.mp4", "--init", "base.safetensors", "--vae", vae, "--t5", t5,
            "--seconds", 1, "--steps", 2, "--device", "cpu", "--checkpoint", *given)
        written.append(read_video("out/0.mp4", 2, 32, 32)[-16:].float())        # a section is 4 latents of 4 frames
    merged, without = ((x - written[0]).abs().mean() for x in written[1:])
    assert 10 * merged < without and without > 1, (merged, without)             # merged weights are rounded to bf16
    given = ("--init", "base.safetensors", "--vae", vae, "--device", "cpu", "--steps", 1, "--queries", 2)
    run(evaluation.main, "retrieval", "--checkpoint", "runs/wan_pretrain/model.safetensors", "--history",
        "videos/1.mp4", *given)
    assert Image.open("out/retrieval.png").width > 2 * 32
    run(evaluation.main, "table1", "runs/wan_pretrain", "--data", "videos", *given)
    ceiling, row = read_csv("assets/table1_video.csv")
    assert 3 < float(row["psnr"]) < 100 and 3 < float(ceiling["psnr"]) < 100
    bad = dict(stage2)
    bad["dit.blocks.7.self_attn.q.lora_A"] = bad.pop("dit.blocks.0.self_attn.q.lora_A")
    save_file(bad, "bad.safetensors", header)
    with pytest.raises(UserError, match="unexpected tensor dit.blocks.7"):
        encoder.load_model("bad.safetensors", "base.safetensors")
    with pytest.raises(UserError, match="give the base DiT too"):
        encoder.load_model("runs/wan_finetune/model.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# sample.py


@pytest.mark.parametrize("method, given, count", [
    ("sliding-window", {"window": 3}, 3 * 16), ("keyframes", {}, 2 * 16),
    ("token-merging", {"encoder": "none"}, 3 * 2)])
def test_other_methods_go_through_stage_2_and_sampling(method, given, count, cache, capsys):
    if method in encoder.FRAME_METHODS:                             # even where a run of stage 1 lies ready
        given = {**given, "encoder": "runs/pretrain"}
    run(finetune.main, *flags(cache, out="run", method=method, rate="4x4x2", steps=1, **given))
    dit, config = encoder.load_model("run/model.safetensors")
    assert dit.encoder.window == config["window"] == given.get("window", 1)
    write_video("clip.mp4", 12)
    run(sample.main, "--history", "clip.mp4", "--checkpoint", "run/model.safetensors", "--seconds=2", "--steps=1",
        "--save_file=b.mp4")
    assert len(read_video("b.mp4", 2, 32, 32)) == 12 + 4
    assert f"memory: {count} tokens" in capsys.readouterr().out


def write_checkpoint(path="tiny.safetensors", stage="finetune", method="proposed", change=None, claims={}):
    """A checkpoint of random weights, written as train() does; its config may claim something else."""
    state = randomize(MemoryDiT("tiny", method)).state_dict()
    if change is not None:
        change(state)
    config = finetune.FinetuneConfig(preset="tiny", method=method, rate="4x4x2")
    config = {**dataclasses.asdict(config), "stage": stage, "step": 7}
    save_file(state, path, {"config": json.dumps({**config, **claims})})
    return path


def continued(storyboard=(), sections=3, prompts=HashPrompts(16, 24), most=None, **settings):
    """Latents of `sections` new sections after a random history, and the memory."""
    dit, codec = randomize(MemoryDiT("tiny")), DCTCodec()
    memory = Memory(dit, codec, most)
    memory.append(randn(1, 16, 10, 8, 8))
    config = sample.SampleConfig(**{"steps": 2, "guidance": 1.5, "shift": 3.0, **settings})
    texts = sample.embed(prompts, list(storyboard), sections, TINY, codec)
    made = sample.continue_video(dit, codec, texts, memory, config, (32, 32))
    return torch.cat([latents for latents, _ in made], 2), memory


def test_sampling_depends_on_the_seed_alone():
    a, b, c = continued(seed=1)[0], continued(seed=1)[0], continued(seed=2)[0]
    assert a.shape == (1, 16, 12, 8, 8) and a.isfinite().all() and torch.equal(a, b) and (a - c).abs().mean() > 0.1
    assert torch.equal(continued(seed=1, sections=1)[0], a[:, :, :4])


def test_sampling_gives_each_section_its_prompt():
    said, embed = [], HashPrompts(16, 24)
    a, _ = continued([(0, "a cat"), (3.5, "a dog")], prompts=lambda text: said.append(text) or embed(text))
    assert sorted(said) == ["a cat", "a dog"]                       # once each; sections begin at 0, 2 and 4 s
    b, _ = continued([(0, "a cat")])
    assert torch.equal(a[:, :, :8], b[:, :, :8]) and (a - b)[:, :, 8:].abs().max() > 1e-3


def test_sampling_reads_memory_and_bounds_it():
    a, everything = continued(sections=5)
    b, bounded = continued(sections=5, most=2)
    assert everything.frames == bounded.frames == 30
    # 7 whole segments of 2 tokens, or the newest 2; and 2 frames of 16 tokens that wait
    assert everything.context()[0].shape[1] == 7 * 2 + 2 * 16 and bounded.context()[0].shape[1] == 2 * 2 + 2 * 16
    assert torch.equal(a[:, :, :4], b[:, :, :4]) and (a - b).abs().max() > 1e-3


def test_sample_writes_history_then_what_follows(capsys):
    history, checkpoint = write_video("clip.mp4", 10), write_checkpoint()
    common = ["--history", "clip.mp4", "--checkpoint", checkpoint, "--seconds", 3, "--prompt", "waves"]
    run(sample.main, *common, "--steps", 2, "--guidance", 2, "--shift", 3, "--seed", 5, "--save_file", "new/a.mp4")
    assert "wrote new/a.mp4" in capsys.readouterr().out and Path("new/a.png").is_file()
    made = read_video("new/a.mp4", 2, 32, 32)
    assert len(made) == 10 + 8                                      # 3 s are two sections of 2 s
    assert (made[:10].float() - history.float()).abs().mean() < 4 and made[10:].float().std() > 5
    # Wan's own names of the flags
    run(sample.main, *common, "--sample_steps", 2, "--sample_guide_scale", 2, "--sample_shift", 3, "--base_seed", 5,
        "--save_file", "b.mp4")
    assert torch.equal(read_video("b.mp4", 2, 32, 32), made)
    run(sample.main, *common, "--steps", 2, "--guidance", 2, "--shift", 3, "--seed", 6, "--save_file", "c.mp4")
    assert not torch.equal(read_video("c.mp4", 2, 32, 32), made)


def test_readmes_lines_of_python_write_a_section(monkeypatch):
    monkeypatch.chdir(HERE)
    made = {}
    exec(re.search(r"```python\n(.*?)```", Path("README.md").read_text(encoding="utf-8"), re.DOTALL)[1], made)
    assert made["frames"].shape == (4, 64, 64, 3) and made["frames"].float().std() > 5
    assert made["memory"].frames == 44 and made["memory"].context()[0].shape == (1, 11 * 32, 256)


def test_sample_takes_the_storyboard_beside_the_clip(capsys):
    config = sample.SampleConfig(history="clip.mp4")
    assert sample.storyboard_of(config, 10, 6) == []
    Path("clip.txt").write_text("0s: a cat\n10s: a dog\n13s: a cow")
    assert sample.storyboard_of(config, 10, 6) == [(-10, "a cat"), (0, "a dog"), (3, "a cow")]
    two = dataclasses.replace(config, prompt="0s: a bee / 5s: a bear")
    assert sample.storyboard_of(two, 10, 6) == [(0, "a bee"), (5, "a bear")]
    assert not capsys.readouterr().err
    sample.storyboard_of(two, 10, 4)
    assert "--prompt: its storyboard goes on to 5 s, but the video ends at 4 s" in capsys.readouterr().err
    sample.storyboard_of(config, 14, 6)
    assert "ends before the clip does" in capsys.readouterr().err


def test_sample_warns_of_words_that_no_caption_has(capsys):
    story = W.make_story(3, 13)
    sample.check_words([(k, W.caption(story, k)) for k in range(13)])
    assert not capsys.readouterr().err
    sample.check_words([(0, "beach wide tall dragon")])
    assert "never seen dragon;" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["one frame", "4 x 4 pixels", "shorter than a segment", "tall", "no memory"])
def test_sample_takes_odd_clips(case):
    n, h, w = {"one frame": (1, 32, 32), "4 x 4 pixels": (12, 4, 4), "tall": (12, 50, 22)}.get(case, (3, 32, 32))
    write_raw("a.mkv", greys(n, h, w), "ffv1", "bgr0", times=[500 * i for i in range(n)])
    checkpoint = write_checkpoint(method="none" if case == "no memory" else "proposed")
    run(sample.main, "--history", "a.mkv", "--checkpoint", checkpoint, "--seconds=2", "--steps=1", "--save_file=b.mp4")
    assert len(read_video("b.mp4", 2, 32, 32)) == n + 4


def test_sample_goes_on_from_what_is_left_of_a_video(capsys):
    write_video("good.mp4")
    whole = Path("good.mp4").read_bytes()
    Path("half.mp4").write_bytes(whole[:len(whole) // 2])
    run(sample.main, "--history", "half.mp4", "--checkpoint", write_checkpoint(), "--seconds=2", "--steps=1")
    assert "half.mp4 is damaged or cut off" in capsys.readouterr().err and Path("out/half.mp4").is_file()


def test_sample_takes_frames_that_are_not_numbers():
    """Of a video in floating point; FFmpeg turns them into bytes."""
    with av.open("a.mkv", "w") as file:
        stream = file.add_stream("ffv1", rate=2, width=32, height=32, pix_fmt="gbrpf32le", options={
            "strict": "experimental", "level": "4"})
        for _ in range(6):
            frame = av.VideoFrame(32, 32, "gbrpf32le")
            for plane in frame.planes:
                plane.update(np.full(plane.buffer_size // 4, math.nan, np.float32).tobytes())
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    run(sample.main, "--history", "a.mkv", "--checkpoint", write_checkpoint(), "--seconds=2", "--steps=1",
        "--save_file=b.mp4")
    assert len(read_video("b.mp4", 2, 32, 32)) == 6 + 4


# ---------------------------------------------------------------------------------------------------------------------
# eval.py


def pictures(seed=0):
    a = (128 + 40 * randn(3, 20, 27, 3, seed=seed)).clamp(0, 255).to(torch.uint8)
    return a, (a.float() + 25 * randn(3, 20, 27, 3, seed=seed + 1)).clamp(0, 255).to(torch.uint8)


def test_ssim_known_values():
    a, b = pictures()
    assert torch.allclose(evaluation.ssim(a, a), torch.ones(3).double()) and (evaluation.ssim(a, b) < 0.99).all()
    flat = lambda level: torch.full((1, 16, 16, 3), level, dtype=torch.uint8)
    c1 = 2.55**2
    assert evaluation.ssim(flat(100), flat(140)).item() == pytest.approx((2 * 100 * 140 + c1) / (100**2 + 140**2 + c1))
    a, b = a[:1, :11, :11], b[:1, :11, :11]                         # one window: the formula as it is written
    weights = np.exp(-np.arange(-5, 6)**2 / (2 * 1.5**2))
    weights, channels = np.outer(weights, weights) / weights.sum()**2, []
    for x, y in zip(*(z[0].double().numpy().transpose(2, 0, 1) for z in (a, b))):
        mean = lambda z: (weights * z).sum()
        dx, dy = x - mean(x), y - mean(y)
        channels.append((2 * mean(x) * mean(y) + c1) * (2 * mean(dx * dy) + 7.65**2)
                        / ((mean(x)**2 + mean(y)**2 + c1) * (mean(dx**2) + mean(dy**2) + 7.65**2)))
    assert evaluation.ssim(a, b).item() == pytest.approx(np.mean(channels), abs=1e-6)
    with pytest.raises(UserError, match="11 x 11"):
        evaluation.ssim(a[:, :10], b[:, :10])


def test_ssim_equals_that_of_scikit_image():
    a, b = pictures()
    # scikit-image 0.26: structural_similarity(a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    # data_range=255, channel_axis=-1) of each pair
    assert evaluation.ssim(a, b).tolist() == pytest.approx([0.8328877, 0.7953046, 0.8480581], abs=1e-4)


def write_lpips(folder="lpips", backbone=None, linear=None, seed=0):
    """A folder of weights named as torchvision and the lpips package name theirs; random ones by default."""
    folder = Path(folder)
    folder.mkdir()
    sizes = [(0, (64, 3, 11, 11)), (3, (192, 64, 5, 5)), (6, (384, 192, 3, 3)), (8, (256, 384, 3, 3)),
             (10, (256, 256, 3, 3))]
    if backbone is None:
        backbone = {f"features.{i}.weight": randn(*s, seed=i) * math.prod(s[1:])**-0.5 for i, s in sizes}
        backbone |= {f"features.{i}.bias": 0.1 * randn(s[0], seed=i + 50) for i, s in sizes}
        linear = {f"lin{k}.model.1.weight": randn(1, s[0], 1, 1, seed=k).abs() for k, (_, s) in enumerate(sizes)}
    torch.save({**backbone, "classifier.1.weight": torch.ones(2, 2)}, folder / "alexnet-owt-7be5be79.pth")
    torch.save(linear, folder / "alex.pth")
    return backbone, linear


def test_lpips_by_hand():
    """The features of one pair again, in plain steps and double precision."""
    w, linear = ({k: v.double() for k, v in part.items()} for part in write_lpips())
    a, b = (randn(3, 33, 40, 3, seed=s).mul(60).add(128).clamp(0, 255).to(torch.uint8) for s in range(2))
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]).double(), torch.tensor([0.458, 0.448, 0.450]).double()
    distance, features = 0, []
    for x in a, b:
        x = ((x.double() / 127.5 - 1 - shift) / scale).permute(0, 3, 1, 2)
        layers = []
        for i, stride, padding in (0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1):
            x = F.max_pool2d(x, 3, 2) if i in (3, 6) else x
            x = F.conv2d(x, w[f"features.{i}.weight"], w[f"features.{i}.bias"], stride, padding).clamp(min=0)
            layers.append(x / x.norm(dim=1, keepdim=True))
        features.append(layers)
    for k, (x, y) in enumerate(zip(*features)):
        weights = linear[f"lin{k}.model.1.weight"].view(1, -1, 1, 1)
        distance = distance + (weights * (x - y)**2).sum(1).mean((1, 2))
    lpips = evaluation.LPIPS("lpips")
    assert (lpips(a, b) - distance).abs().max() < 1e-4 * distance.max() and distance.min() > 0.1
    assert lpips(a, a).tolist() == [0, 0, 0] and torch.allclose(lpips(a, b), lpips(b, a))
    assert torch.allclose(evaluation.measure(a[:, None], b[:, None], lpips)["lpips"][:, 0], lpips(a, b), atol=1e-5)
    save_file(torch.load("lpips/alex.pth"), "lpips/alex.safetensors")           # safetensors will do as well
    Path("lpips/alex.pth").unlink()
    assert torch.equal(evaluation.LPIPS("lpips")(a, b), lpips(a, b))


def test_lpips_equals_the_package():
    pytest.importorskip("torchvision")
    package = pytest.importorskip("lpips").LPIPS(net="alex", pretrained=False, pnet_rand=True, verbose=False).eval()
    state = randomize(package).state_dict()
    backbone = {f"features.{k.split('.', 2)[2]}": v for k, v in state.items() if k.startswith("net.")}
    linear = {k: v.abs() for k, v in state.items() if k.startswith("lin") and not k.startswith("lins")}
    package.load_state_dict(linear, strict=False)
    write_lpips("lpips", backbone, linear)
    a, b = (randn(4, 64, 48, 3, seed=s).mul(60).add(128).clamp(0, 255).to(torch.uint8) for s in range(2))
    with torch.no_grad():
        expected = package(*(to_pixels(x).transpose(0, 1) for x in (a, b))).flatten()
    assert (evaluation.LPIPS("lpips")(a, b) - expected).abs().max() < 1e-5 and expected.min() > 0.01


@pytest.mark.parametrize("damage, says", [
    (lambda b, l: b.pop("features.3.bias"), "3.bias is not there"), (lambda b, l: l.update(lin5=torch.ones(1)), "lin5"),
    (lambda b, l: b.update({"features.0.weight": torch.ones(64, 3, 3, 3)}), "0.weight is \\(64, 3, 3, 3\\)"),
    (lambda b, l: l["lin2.model.1.weight"].fill_(math.nan), "lin2.weight"),
    ("pickle", "alex.pth"), ("none", "--lpips")])
def test_lpips_refuses_weights_that_do_not_fit(damage, says):
    parts = write_lpips("good")
    if callable(damage):
        damage(*parts)
    write_lpips("bad", *parts)
    if damage == "pickle":
        torch.save(Bomb(), "bad/alex.pth")
    if damage == "none":
        Path("bad/alex.pth").unlink()
    with pytest.raises(UserError, match=says) as error:
        evaluation.LPIPS("bad")
    assert "\n" not in str(error.value) and not Path("exploded").exists()


def test_psnr_known_values():
    a = torch.full((2, 8, 8, 3), 100, dtype=torch.uint8)
    assert codecs.psnr(a, a).tolist() == [100, 100]
    assert codecs.psnr(a, a + torch.tensor([10, 20]).to(torch.uint8).view(2, 1, 1, 1)).tolist() == pytest.approx(
        [28.1308, 22.1102], abs=1e-3)


def test_interval_covers_the_mean():
    mean, half = evaluation.interval(torch.tensor([1.0, 2, 3, 4]))
    assert mean == 2.5 and half == pytest.approx(3.1824 * (5 / 3)**0.5 / 2, rel=0.01)       # 97.5 % of Student's t
    for n, t in (3, 4.3027), (6, 2.5706), (11, 2.2281), (64, 1.9983), (256, 1.9693):
        values = randn(n)
        half = t * values.std().item() / n**0.5
        assert evaluation.interval(values)[1] == pytest.approx(half, rel=0.035 if n < 5 else 0.003)
    assert math.isnan(evaluation.interval(torch.ones(1))[1])


def test_wilson_interval_known_values():
    assert tables.wilson(19, 20) == pytest.approx((0.7639, 0.9911), abs=1e-4)
    assert tables.wilson(32, 32) == pytest.approx((0.8928, 1), abs=1e-4)
    assert tables.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)


def test_retrieval_command(stage1, cache, capsys):
    common = ["retrieval", "--checkpoint", stage1 / "model.safetensors", "--steps", 2, "--cache", cache]
    run(evaluation.main, *common, "--clips", 2, "--out", "a.png")
    said = capsys.readouterr().out
    values = {line.split()[0]: float(line.split()[1]) for line in said.splitlines() if "±" in line}
    assert Path("a.png").is_file() and "step 40" in said and values["codec"] > 20 and said.count("n/a") == 5
    assert values["codec"] > max(values[k] for k in ("model", "wrong_memory", "no_memory"))
    write_video("clip.mp4", 10)
    write_lpips()
    run(evaluation.main, *common, "--history", "clip.mp4", "--out", "b.png", "--lpips", "lpips")
    assert Path("b.png").is_file() and "n/a" not in capsys.readouterr().out


def test_bootstrap_is_paired_and_covers_the_mean():
    clip, noise = 5 * randn(256), 0.5 * randn(256, seed=1)          # clips differ far more than methods do
    mean, low, high = tables.bootstrap(clip + 0.2 + noise - clip)
    half = 1.96 * noise.std().item() / 16
    assert mean == pytest.approx(0.2 + noise.mean().item(), abs=1e-5)
    assert high - mean == pytest.approx(half, rel=0.1) and mean - low == pytest.approx(half, rel=0.1)
    assert tables.bootstrap(noise) == tables.bootstrap(noise)
    assert tables.bootstrap(torch.full((5,), 2.0)) == (2, 2, 2)
    assert [math.isnan(x) for x in tables.bootstrap(torch.ones(1))] == [False, True, True]


def test_flip_test_known_values():
    assert tables.flip_test(torch.zeros(20)) == 1 and tables.flip_test(torch.ones(40)) == pytest.approx(1e-4, rel=0.01)
    three = torch.tensor([100.0, 100, 100, *[0] * 120])     # three decisions more: nothing, whatever resampling says
    assert tables.flip_test(three) == pytest.approx(0.25, abs=0.02) and tables.flip_test(torch.ones(2)) > 0.4
    def row(x):
        values = {"x": x, "same": torch.zeros(len(x), 1)}
        return SimpleNamespace(name="a", method="a", rate="", values=values, each=lambda m: tables.per_clip(values[m]))
    a, b = torch.zeros(64, 3), torch.zeros(64, 3)
    a[:40, 0] = b[:40, 0] = math.nan                                # what does not count changes nothing
    a[50:54, 1] = 100                                               # four decisions: p = 1/8, however many clips
    for x, said in ((a, "undecided"), (torch.full((8, 2), math.nan), "undecided"), (100 - b, "yes")):
        for metrics in ["x"], ["x", "same"]:                        # what never differs adds nothing to the mean
            line = tables.compare("", [(row(x), row(b[:len(x), :x.shape[1]]))], metrics, {}, [])[-1]
            assert f"| {said} |" in line, line
    assert 0.09 < tables.flip_test((a - b).nansum(1)) < 0.16
    noise = randn(400, 30, seed=3)
    assert 0.02 < np.mean([tables.flip_test(x, 500) < 0.05 for x in noise]) < 0.09       # wrong as often as it says


def table_row(method, rate, psnr, **trained):
    return evaluation.Row(method, rate, {"psnr": psnr[:, None]}, None, {}, trained=trained)


def test_table1_compares_neighbours_and_the_papers_order():
    clip = 15 + randn(64)
    rows = [table_row("full", "", clip + 3, seed=0),
            table_row("large-patchifier", "4x4x2", clip + 1.5 + 0.1 * randn(64, seed=1), seed=0),
            table_row("proposed", "4x4x2", clip + 1, seed=0),
            table_row("only-lr", "4x4x2", clip + 1 + randn(64, seed=2), seed=0)]
    others = [table_row("proposed", "4x4x2", clip + 2, seed=1), table_row("large-patchifier", "4x4x2", clip, seed=1),
              table_row("proposed", "4x4x2", clip, seed=2)]                                 # a seed without its like
    for row in (*rows, *others):                                    # at one step all are alike
        row.values["psnr_one_step"] = clip[:, None]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]]
             for line in evaluation.differences(rows, rows + others) if "above" in line]
    of_samples, of_one_step = lines[:-4], lines[-3:]
    found = {line[0]: line[4:] for line in of_samples if line[0] != "A above B"}
    assert len(of_samples) - 2 == 3 + 3 and [line[4] for line in of_one_step] == ["undecided"] * 3
    assert found["full above large-patchifier 4x4x2"] == ["yes", "–", "–"]
    assert found["proposed 4x4x2 above only-lr 4x4x2"] == ["undecided", "–", "+2.20"]
    gap = (rows[2].psnr - rows[1].psnr).mean().item()
    assert found["proposed 4x4x2 above large-patchifier 4x4x2"] == ["no", f"{gap:+.2f}, +2.00", "+4.48"]


def test_figures_by_age():
    values, ages = torch.tensor([[1.0, 2, 3], [4, 5, 6]]), torch.tensor([[0.0, 3, 4], [39, 36, 35]])
    assert evaluation.by_age(values, ages, 4) == {0: 1.5, 1: 3, 8: 6, 9: 4.5}


@pytest.fixture(scope="session")
def runs(cache, tmp_path_factory):
    """Short runs of stage 1 that one table may hold."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(signal, "signal", lambda *a: None)
        for method, seed in ("proposed", 0), ("proposed", 1), ("full", 0):
            run(pretrain.main, *flags(cache, out=folder / f"{method}-{seed}", method=method, seed=seed, steps=2))
    return folder


@pytest.mark.parametrize("table, figures", [
    ("table1", {"tokens_per_second": "g", "psnr": ".2f", "ssim": ".3f", "psnr_one_step": ".2f"}),
    *((table, {"tokens": "g"} | dict.fromkeys([*scores.MAIN, "consistency"], ".1f"))
      for table in ("table2", "drawing/table2"))])
def test_readme_has_the_figures_of_the_tables(table, figures):
    rows = [[r["method"], r["rate"] or "–",
             *(format(float(r[key]), f) if r[key] else "–" for key, f in figures.items())]
            for r in read_csv(HERE / "assets" / f"{table}.csv")]
    lines = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    assert lines in (HERE / "README.md").read_text(encoding="utf-8"), f"README.md should have:\n{lines}"


def read_csv(path):
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def test_table1(runs, cache, capsys):
    given = [runs / name for name in ("proposed-1", "full-0", "proposed-0")]
    write_lpips()
    run(evaluation.main, "table1", *given, "--clips", 2, "--steps", 2, "--cache", cache, "--out", "assets",
        "--lpips", "lpips")
    said, rows = capsys.readouterr().out, read_csv("assets/table1.csv")
    header = Path("assets/table1.csv").read_text().splitlines()[0]
    assert header.startswith("method,rate,tokens_per_second,psnr,psnr_low,psnr_high,ssim,")
    assert rows[0]["method"] == "codec" and {(r["method"], r["rate"]) for r in rows[1:]} == {("proposed", "4x4x2"), (
        "full", "")}
    levels = [float(r["psnr"]) for r in rows]
    assert levels == sorted(levels, reverse=True) and all(float(r["lpips"]) >= 0 for r in rows)
    row = next(r for r in rows if r["method"] == "proposed")
    assert (row["tokens_per_second"], row["channels_per_latent_value"]) == ("1.0", "0.0234375")
    assert row["paper_psnr"] == "17.41"
    assert float(row["psnr_low"]) < float(row["psnr"]) < float(row["psnr_high"]) and float(row["encoder_ms"]) > 0

    dit, _ = encoder.load_model(runs / "proposed-0" / "model.safetensors")      # the figure of seed 0, again
    assert int(row["encoder_parameters"]) == sum(p.numel() for p in dit.encoder.parameters())
    clips = world_clips("held-out", 2, TINY, DCTCodec(), cache, keep_pixels=True)
    batch = draw_retrieval(pretrain.PretrainConfig(text_drop=1.0), tiny_tools(), clips, range(2), 0)
    with torch.no_grad(), devices.autocast(torch.device("cpu")):
        x = euler(dit.dit, batch.noise, batch.text, batch.frames, dit.encode(batch.hr, batch.lr), 2, 3.0)
    psnr = codecs.psnr(to_frames(DCTCodec().decode(x.float())), batch.truth).mean().item()
    assert float(row["psnr"]) == pytest.approx(psnr, abs=0.01)
    _, ages, shown = evaluation.retrieve(dit, tiny_tools(), clips, evaluation.Table1Config(steps=1), None)
    assert torch.equal(ages, 39 - batch.frames) and torch.equal(shown["truth"], batch.truth)

    seeds = read_csv("assets/table1_seeds.csv")
    assert [(r["method"], r["seed"]) for r in seeds] == [("full", "0"), ("proposed", "0"), ("proposed", "1")]
    both = [float(r["psnr"]) for r in seeds[1:]]
    assert float(seeds[1]["psnr_deviation_of_seeds"]) == pytest.approx(np.std(both, ddof=1), abs=1e-3)
    assert seeds[0]["psnr_deviation_of_seeds"] == "" and both[0] == pytest.approx(float(row["psnr"]))
    text = Path("assets/table1.md").read_text()
    assert text in said and str(runs / "full-0") in text and "2 held-out clips x 4 frames" in text and "n/a" not in text
    for name in "table1.png", "table1_curves.png", "table1_age.png":
        assert np.array(Image.open(f"assets/{name}").convert("RGB")).std() > 5


def test_held_out_videos_stay_held_out():
    names = [f"{i}.mp4" for i in range(200)]
    train, held = data.split_videos(names)
    assert 8 < len(held) < 35 and sorted(train + held) == sorted(names)
    assert set(data.split_videos(names + ["more.mp4", "a/0.mp4"])[1]) - {"more.mp4", "a/0.mp4"} == set(held)
    assert data.split_videos(["0.mp4"]) == (["0.mp4"], ["0.mp4"]) and len(data.split_videos(train[:3])[1]) == 1


def test_few_held_out_clips_are_of_different_videos(tmp_path):
    for name in "123456":
        write_video(tmp_path / "videos" / f"{name}.mp4", 100)
    shards = cached(tmp_path / "videos")
    names = data.split_videos([f"{name}.mp4" for name in "123456"])[1]
    manifest = json.loads((shards / "manifest.json").read_text())
    held = data.cached_clips(shards, TINY, DCTCodec(), len(names))[1]
    assert len(manifest["files"]) == 2 and len(held) == len(names)
    assert [manifest["files"][c.file.name][1][c.number][0] for c in held.clips] == names


def test_captions_that_belong_to_no_video(tmp_path, capsys):
    for i in range(2):
        write_video(tmp_path / "videos" / f"{i}.mp4", 12, i)
    captions = tmp_path / "list.jsonl"
    line = lambda name: json.dumps({"video": name, "caption": "waves"}) + "\n"                  # noqa: E731
    captions.write_text(line(str(tmp_path / "videos" / "0.mp4")))
    with pytest.raises(UserError, match="names no video"):
        cached(tmp_path / "videos", "--captions", captions)
    captions.write_text(line("0.mp4") + line("7.mp4"))
    cached(tmp_path / "videos", "--captions", captions)
    assert "1 captions belong to no video" in capsys.readouterr().err
    captions.write_text(line("0.mp4") + line(None))
    with pytest.raises(UserError, match="line 2: expected"):
        cached(tmp_path / "videos", "--captions", captions)
    said = '{"video": "0.mp4", "caption": "two\u2028lines"}'
    captions.write_text(f"\ufeff{said}\r\n\n \n" + line("1.mp4") + "\n", encoding="utf-8")
    assert caching.read_captions(captions) == {"0.mp4": [(0, "two lines")], "1.mp4": [(0, "waves")]}
    captions.write_text(line("0.mp4") + "\n" + line("0.mp4"))
    with pytest.raises(UserError, match="line 3: 0.mp4 stands on an earlier line too: give each video one line"):
        cached(tmp_path / "videos", "--captions", captions)


def test_split_never_trains_on_what_it_holds_out():
    names = [f"{i}.mp4" for i in range(300)]
    tenth = data.split_videos(names)[1]                                    # two of them alone: one is still trained on
    for some in names, tenth[:2], names[:2], names[:5]:
        train, held_out = data.split_videos(some)
        assert held_out and train and sorted(train + held_out) == sorted(some)
    assert 15 < len(tenth) < 45 and data.split_videos(["a"]) == (["a"], ["a"])


def test_stage_2_takes_the_presets_rate_as_stage_1_does(tmp_path, monkeypatch):
    """By the defaults of both: it was refused once, None being compared with a rate."""
    class Reached(Exception):
        pass

    def setup(config):
        raise Reached
    Path("runs/pretrain").mkdir(parents=True)
    write_checkpoint("runs/pretrain/model.safetensors", stage="pretrain")
    monkeypatch.setattr(finetune, "setup", setup)
    with pytest.raises(Reached):
        run(finetune.main, "--preset", "tiny", "--init", "random", "--rate", "4x4x2")
    with pytest.raises(Reached):
        run(finetune.main, "--preset", "tiny", "--init", "random")


def test_the_base_has_a_folder_of_its_own(cache):
    run(finetune.main, *flags(cache, method="none", steps=1))
    run(finetune.main, *flags(cache, encoder="none", steps=1))
    assert all(Path("runs", name, "model.safetensors").is_file() for name in ("base", "finetune"))


def test_a_dit_all_in_bf16_runs():
    dit = tiny_dit(seed=1).bfloat16()
    for m in dit.modules():
        if isinstance(m, torch.nn.LayerNorm):                       # which a GPU's autocast runs in float32
            m.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert (forward_with_memory(dit) - forward_with_memory(tiny_dit(seed=1))).abs().max() < 0.1


@pytest.mark.parametrize("table", ("table1", "table2"))
def test_a_measured_row_needs_no_weights(table, runs, stage2, cache, refused):
    """The file that a table keeps in a run's folder stands for the run, with the same figures, and only for what was
    asked; other weights are measured anew."""
    mine, given = (runs / "full-0", runs / "proposed-0") if table == "table1" else (stage2 / "f", stage2 / "a")
    asked = "--clips", 2, "--steps", 1, "--cache", cache
    run(evaluation.main, table, mine, given, *asked, "--out", "first")
    kept = f"{table}.safetensors"
    Path("row").mkdir()
    shutil.copy(given / kept, "row")
    run(evaluation.main, table, mine, "row", *asked, "--out", "second")
    for ending in ".csv", "_seeds.csv":
        assert Path(f"second/{table}{ending}").read_text() == Path(f"first/{table}{ending}").read_text()
    for ending in ".png", "_curves.png":
        assert Path(f"second/{table}{ending}").read_bytes() == Path(f"first/{table}{ending}").read_bytes()
    assert "steps 1, not 2" in refused(evaluation.main, table, "row", *asked[:2], "--steps", 2, "--cache", cache)
    assert "seed 0" in refused(evaluation.main, table, given, "row", *asked)
    assert "seed 0, not 1" in refused(evaluation.main, table, "row", *asked, "--seed", 1)

    Path("other").mkdir()                                           # the measurement of one run, the weights of another
    shutil.copy(given / kept, "other")
    for name in "model.safetensors", "log.jsonl":
        shutil.copy(mine / name, "other")
    run(evaluation.main, table, "other", *asked, "--out", "third")
    assert read_csv(f"third/{table}.csv")[-1]["psnr"] in [
        row["psnr"] for row in read_csv(f"first/{table}.csv") if row["method"] in ("full", "none")]
    Path("other", "model.safetensors").unlink()
    Path("other", kept).rename("other/table3.safetensors")
    assert "but table3.safetensors" in refused(evaluation.main, table, "other", *asked)
    Path("row", kept).write_bytes(b"cut short")
    assert kept in refused(evaluation.main, table, "row", *asked)


def test_table1_of_videos(runs, tmp_path):
    for i in range(3):
        write_video(tmp_path / "videos" / f"{i}.mp4", 10, i)
    run(evaluation.main, "table1", runs / "proposed-0", "--data", "videos", "--steps", 1, "--out", "out")
    assert {p.name for p in Path("out").iterdir()} == {"table1_video" + end for end in (
        ".md", ".csv", ".png", "_seeds.csv", "_curves.png", "_age.png")}
    codec, row = read_csv("out/table1_video.csv")
    assert float(codec["psnr"]) > 30 and codec["lpips"] == row["lpips"] == "n/a" and row["psnr_low"] == "nan"
    assert "1 held-out clips x 4 frames of videos" in Path("out/table1_video.md").read_text()


def test_table1_refuses_runs_that_are_not_alike(refused):
    def write(name, method="proposed", stage="pretrain", **claims):
        Path(name).mkdir()
        Path(name, "log.jsonl").touch()
        claims = {"steps": 7, "mask": "none", "queries": 4, **claims}
        write_checkpoint(f"{name}/model.safetensors", stage, method, claims=claims)
        return name
    good, table = write("good"), lambda *runs: refused(evaluation.main, "table1", *runs)
    for key, value in dict(init="random", data="videos", batch=4, mask="noise", clips=5, queries=2).items():
        error = table(good, write(key, method="full", **{key: value}))
        assert f"{key} has --{key} {value} but good has" in error
    assert "step 7 of 9" in table(good, write("unfinished", steps=9))
    assert "seed 0" in table(good, write("twice"))
    assert "seed 0" in table(write("full1", "full"), write("full2", "full", rate="2x2x2"))     # its rate is none
    assert "finetune" in table(good, write("stage2", stage="finetune"))
    assert "nowhere" in table(good, "nowhere") and "folders" in table() and "--clips" in table(good, "--clips", 0)
    Path("good/log.jsonl").unlink()
    assert "log.jsonl" in table(good)


# ---------------------------------------------------------------------------------------------------------------------
# scores.py and consistency.py


def true_sections(stories, first=10, count=3):
    """uint8 (n, S, F, H, W, 3)."""
    return torch.stack([torch.from_numpy(W.render(s, range(first, first + count))[0]).unflatten(0, (count, 4))
                        for s in stories])


def other_world(story, seed):
    """The same captions, with another look of everything."""
    rng = np.random.default_rng(10**6 + seed)
    return dataclasses.replace(story, scenes=tuple(W.make_scene(rng, x.kind) for x in story.scenes),
                               characters=tuple(W.make_character(rng, x.build) for x in story.characters),
                               things=tuple(W.make_thing(rng, x.shape) for x in story.things))


OTHER_WORLDS = 12


@pytest.fixture(scope="module")
def known_scores():
    """{pictures: {score: mean over what counts}} of pictures with known scores; 4 stories, 3 sections each."""
    stories, codec = [W.make_story(W.world_seed("held-out", i), 13) for i in range(4)], DCTCodec()
    truth = true_sections(stories)
    others = [true_sections([other_world(s, 100 * i + k) for i, s in enumerate(stories)]) for k in range(OTHER_WORLDS)]
    flat = to_pixels(truth.flatten(0, 1))
    shifted = F.pad(flat.flatten(0, 1), (2, 0, 0, 2), mode="replicate")[..., 2:, :-2].unflatten(0, flat.shape[:2])
    blurred = F.avg_pool2d(flat.flatten(0, 1), 9, 1, 4, count_include_pad=False).unflatten(0, flat.shape[:2])
    shown = {"truth": truth, **{name: to_frames(x).view(truth.shape) for name, x in (
        ("codec", codec.decode(codec.encode(flat))), ("shifted", shifted), ("blurred", blurred))}}
    for share in 0.3, 0.5, 0.7:
        shown[f"faded {share}"] = (share * truth + (1 - share) * others[0].float()).round().to(torch.uint8)
    shown |= {"grey": torch.full_like(truth, 128), "mean": torch.stack(others).float().mean(0).round().to(torch.uint8)}
    found = scores.score(torch.stack([*shown.values(), *others]), stories, 10)
    means = {name: {k: x[r].nanmean().item() for k, x in found.items()} for r, name in enumerate(shown)}
    return means | {"others": {k: x[len(shown):].nanmean().item() for k, x in found.items()}}


def test_scores_of_the_truth_are_perfect(known_scores):
    for name in "truth", "codec", "shifted":
        assert all(known_scores[name][score] == 100 for score in scores.SCORES), name
    assert known_scores["truth"]["psnr"] == 100 and known_scores["truth"]["position_error"] == 0
    assert known_scores["codec"]["position_error"] == 0
    assert known_scores["shifted"]["position_error"] == pytest.approx(8**0.5, abs=0.5)      # some stand at the edge


def test_scores_of_another_world_are_chance(known_scores):
    """About 140 decisions a score, which are not independent. The prompt is obeyed: its words fix the kind of place."""
    found = known_scores["others"]
    assert all(1 < found[name] < 14 for name in scores.SCORES if name != "obeys") and found["obeys"] > 50
    for name in "grey", "mean":                 # what is nothing, or a bit of everything, is nearest to no truth
        assert np.mean([known_scores[name][score] for score in scores.MAIN]) < 20, name       # 40 decisions
    assert known_scores["mean"]["psnr"] > found["psnr"] + 1         # but PSNR likes it: it does not measure memory


def test_scores_lie_between_for_what_is_half_right(known_scores):
    """What fades into another world, or is blurred, is worse than the truth and better than a guess; cells of 4 pixels
    suffer more from a blur of 9 than colours do."""
    mean = {name: np.mean([found[score] for score in scores.MAIN]) for name, found in known_scores.items()}
    assert mean["others"] + 10 < mean["faded 0.3"] < mean["faded 0.5"] < mean["faded 0.7"] < mean["truth"]
    blurred = known_scores["blurred"]
    assert mean["others"] + 10 < mean["blurred"] < 95
    assert 10 < blurred["cloth_hard"] < blurred["cloth"] and 10 < blurred["object_hard"] < blurred["object"]


def test_candidates_share_the_caption_and_lie_apart():
    """All 16 have the words of the truth, which is drawn as in the story; the hard ones have its palette too."""
    story = W.make_story(W.world_seed("held-out", 3), 13)
    shot = next(s for s in story.shots if s.character is not None and s.thing is not None)
    k, parts = story.shots.index(shot), dict(character=["cloth", "face"], thing=["object"], scene=["scene"])
    for field, index in ("character", shot.character), ("thing", shot.thing), ("scene", shot.scene):
        truth = getattr(story, f"{field}s")[index]
        everyone = scores.candidates(field, truth)
        assert everyone[0] == truth and len(set(everyone)) == len(everyone) == (16 if field == "scene" else 31)
        parade = scores.parade(story, shot, field, everyone)
        assert {W.caption(parade, i) for i in range(len(everyone))} == {W.caption(story, k)}
        assert W.render(parade, [0])[0].tobytes() == W.render(story, [k])[0].tobytes()
        some = [("", everyone[:16])] + ([("_hard", (truth, *everyone[16:]))] if field != "scene" else [])
        for hard, entities in some:
            for part, d in scores.apart(field, parts[field][:1] if hard else parts[field], entities).items():
                assert d.diagonal().max() < 0.01 and d.fill_diagonal_(1).min() >= scores.LEAST[part + hard]
        scores.candidates.cache_clear()
        assert scores.candidates(field, truth) == everyone
    who, *others = scores.candidates("character", story.characters[shot.character])
    assert all(x == dataclasses.replace(who, shirt=x.shirt, emblem=x.emblem) for x in others[15:])


def test_position_error_is_how_far_the_character_was_moved():
    story = W.make_story(W.world_seed("held-out", 3), 13)
    shot = W.Shot(0, 0, None, 0, (1, 1), (1, 1))
    true, masks = scores.draw(dataclasses.replace(story, shots=(shot,)))
    empty = scores.draw(dataclasses.replace(story, shots=(dataclasses.replace(shot, character=None),)))[0]
    person, moves = ~masks["scene"], [(0, 0), (0, 7), (-3, 0), (0, -12), (-4, 3)]
    moved = [torch.where(person.roll(by, (1, 2))[:, None], true.roll(by, (2, 3)), empty) for by in moves]
    assert scores.position_error(torch.stack(moved), true, person).tolist() == [math.hypot(*by) for by in moves]


def test_sections_that_show_nothing_do_not_count():
    values = torch.tensor([[100.0, math.nan, 0], [math.nan] * 3, [100, 100, 100]])
    each = tables.per_clip(values)
    assert each.shape == (3,) and each.mean().item() == pytest.approx(80) and each[1] == pytest.approx(80)
    assert torch.allclose(tables.per_clip(values[::2, ::2]), torch.tensor([50.0, 100]))
    story = W.make_story(W.world_seed("held-out", 0), 13)
    bare = dataclasses.replace(story, shots=tuple(dataclasses.replace(s, character=None) for s in story.shots))
    found = scores.score(true_sections([bare], 10, 1)[None], [bare], 10)
    assert all(found[name].isnan().all() for name in ("cloth", "cloth_hard", "identity", "position_error"))
    assert found["scene"].item() == 100

    story = W.make_story(W.world_seed("held-out", 3), 13)           # what has left the memory is not asked for
    shot = W.Shot(0, 0, None, 0, (1, 1), (1, 1))
    empty, near = dataclasses.replace(shot, character=None), dataclasses.replace(shot, framing=1)
    for before, counts in ([shot, *[empty] * 9], True), ([shot, *[empty] * 10], False), ([empty] * 9 + [near], False):
        story, k = dataclasses.replace(story, shots=(*before, shot)), len(before)
        found = scores.score_section(true_sections([story], k, 1)[0], story, k, k - 10)
        assert [name in found for name in ("cloth", "identity", "psnr")] == [counts] * 3 and found["scene"] == 100


def test_rank_correlation_known_values():
    assert consistency.ranks([3, 1, 3, 0]).tolist() == [3.5, 2, 3.5, 1]
    rho, chance = consistency.rank_correlation([1, 2, 3, 4, 5], [10, 20, 40, 30, 50])
    assert rho == pytest.approx(0.9) and chance == pytest.approx(5 / 120, abs=0.01)
    assert consistency.rank_correlation([5, 4, 3], [1, 2, 3])[0] == pytest.approx(-1)
    assert math.isnan(consistency.rank_correlation([1, 2, 3], [1, 1, 1])[0])
    assert math.isnan(consistency.rank_correlation([1, 2], [1, 2])[0])


def test_absence_stories_differ_in_the_absence_alone():
    for seed in range(5):
        stories = [consistency.make_absence_story(seed, absence) for absence in range(8)]
        assert len({(s.characters, s.things, s.scenes, s.shots[-1]) for s in stories}) == 1
        for absence, story in enumerate(stories):
            shown = [(k, shot.framing) for k, shot in enumerate(story.shots[:10]) if shot.character is not None]
            assert len(story.shots) == 11 and shown == [(0, 0), (9 - absence, 0)]           # twice, in wide framing
            assert W.askable(story, 10) and story.shots[10].character == 0
            assert all((shot.thing is None) == (shot.character is not None) for shot in story.shots)


@torch.no_grad()
def test_stories_are_continued_as_sample_does(cache):
    """A batch gives what Memory, section by section, gives each story."""
    dit, tools = randomize(MemoryDiT("tiny")), tiny_tools()
    tools.encoder, clips = dit.encoder, world_clips("held-out", 2, TINY, DCTCodec(), cache)
    config = consistency.Table2Config(steps=2, batch=2, seed=5)
    made = consistency.continue_stories(dit, tools, clips, 10, 2, config)
    memory = Memory(dit, DCTCodec(), most=10)                       # 20 s, as by default
    with devices.autocast(torch.device("cpu")):
        memory.append(clips[1].cut(0, 40))
        for k in 10, 11:
            noise = torch.randn(1, 16, 4, 8, 8, generator=pretrain.generator(5, 1, k))
            text = clips[1].text(4 * k, tools.prompts)
            x = euler(dit.dit, noise, text, 4 * k + torch.arange(4), memory.context(), 2, 3.0, 1.5).float()
            memory.append(x)
            difference = to_frames(DCTCodec().decode(x))[0].int() - made[1, k - 10].int()
            assert difference.abs().float().mean() < 1                          # bf16 differs with the size of a batch


@pytest.mark.parametrize("method", encoder.METHODS)
def test_every_method_continues_stories(method, cache):
    dit, clips = randomize(MemoryDiT("tiny", method)), world_clips("held-out", 2, TINY, DCTCodec(), cache)
    tools, config = dataclasses.replace(tiny_tools(), encoder=dit.encoder), consistency.Table2Config(steps=1)
    assert consistency.continue_stories(dit, tools, clips, 10, 2, config).shape == (2, 2, 4, 32, 32, 3)
    found = consistency.costs(dit, tools, clips[0], config)
    expected = {"sliding-window": 16, "keyframes": 2 * 16, "full": 40 * 16, "none": 0}.get(method, 20)
    assert found["tokens"] == expected and found["ms_per_section"] > 0
    assert found["flops_per_section"] >= 2 * budget.flops(TINY.dit, 4 * 16, expected)


@pytest.fixture(scope="session")
def stage2(cache, stage1, tmp_path_factory):
    """Short runs of stage 2 that one table may hold."""
    folder = tmp_path_factory.mktemp("stage2")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(signal, "signal", lambda *a: None)
        for name, given in dict(
                a=dict(encoder=stage1), b=dict(encoder=stage1, seed=1), c=dict(encoder="none"),
                d=dict(encoder=stage1, freeze_encoder=True), e=dict(method="sliding-window", window=3),
                f=dict(method="none")).items():
            run(finetune.main, *flags(cache, out=folder / name, steps=2, **given))
    return folder


def test_table2(stage2, cache, capsys):
    Path("assets").mkdir()
    Path("assets/table1.csv").write_text("method,rate,psnr\nproposed,4x4x2,17\ncodec,,29\n")
    run(evaluation.main, "table2", *sorted(stage2.iterdir()), "--clips", 2, "--sections", 2, "--steps", 1,
        "--cache", cache)
    said, rows = capsys.readouterr().out, read_csv("assets/table2.csv")
    header = Path("assets/table2.csv").read_text().splitlines()[0]
    assert header.startswith("method,rate,tokens_per_second,cloth,identity,object,scene,psnr,")
    assert {(r["method"], r["rate"]) for r in rows} == {
        ("proposed", "4x4x2"), ("without-pretrain", "4x4x2"), ("frozen", "4x4x2"), ("sliding-window", "3"),
        ("none", "")}
    means = [float(r["consistency"]) for r in rows]
    assert means == sorted(means, reverse=True)
    assert means[0] == pytest.approx(np.mean([float(rows[0][name]) for name in scores.MAIN]), abs=1e-3)
    tokens = {r["method"]: int(r["tokens"]) for r in rows}
    assert (tokens["proposed"], tokens["sliding-window"], tokens["none"]) == (20, 3 * 16, 0)
    row = next(r for r in rows if r["method"] == "none")
    assert int(row["flops_per_section"]) == 2 * budget.flops(TINY.dit, 4 * 16) and float(row["ms_per_section"]) > 0
    clips = world_clips("held-out", 2, TINY, DCTCodec(), cache, keep_pixels=True)
    dit, _ = encoder.load_model(stage2 / "f" / "model.safetensors")                         # its PSNR, again
    tools, config = dataclasses.replace(tiny_tools(), encoder=None), consistency.Table2Config(steps=1)
    made = consistency.continue_stories(dit, tools, clips, 10, 2, config).flatten(1, 2)
    truth = torch.stack([clip.pixels[40:48] for clip in clips.clips])
    assert float(row["psnr"]) == pytest.approx(codecs.psnr(made, truth).mean().item(), abs=0.01)

    seeds = read_csv("assets/table2_seeds.csv")
    assert [(r["method"], r["seed"], r["seeds"]) for r in seeds if r["method"] == "proposed"] == [
        ("proposed", "0", "2"), ("proposed", "1", "2")]
    text = Path("assets/table2.md").read_text()
    assert text in said and "dots: 1, too few" in said
    mean, *each = [line for line in text.splitlines() if line.startswith("| proposed 4x4x2 above frozen 4x4x2")][-5:]
    assert mean.endswith("| – | +15.84 |") and each[0].endswith("| – | +19.01 |")                # the paper's
    assert "| proposed | 4x4x2 | 96.12 | 70.73 | 89.89 | 77.4 | 80.19 | 74.38 | 72.21 |" in text
    assert "| frozen | 4x4x2 |  |  |  | 58.39 |" in text
    assert "100.0 (scene)" in text
    for name in "table2.png", "table2_sections.png", "table2_curves.png", "table2_claim.png":
        assert np.array(Image.open(f"assets/{name}").convert("RGB")).std() > 5
    assert video_info("assets/table2.mp4")["seconds"] == pytest.approx((8 + 8) / 2, abs=0.1)


def test_story_command(stage2, cache, capsys):
    run(evaluation.main, "story", stage2 / "a", stage2 / "f", "--clips", 1, "--steps", 1, "--cache", cache)
    rows = read_csv("assets/table2_story.csv")
    assert [(r["method"], r["seconds_absent"]) for r in rows] == [
        (method, f"{2.0 * k}") for method in ("none", "proposed") for k in range(8)]
    assert all(float(r["cloth"]) in (0, 100) and float(r["identity"]) in (0, 100) for r in rows)
    assert all(0 <= float(r["cloth_low"]) < float(r["cloth_high"]) <= 100 for r in rows)
    assert all(0 < float(r["position_error"]) < 32 * 2**0.5 for r in rows)
    assert "14 s absent" in (said := capsys.readouterr().out) and f"step {rows[0]['step']}, seed 0" in said
    with pytest.MonkeyPatch.context() as m:                         # what was measured once is kept
        drawn = []
        m.setattr(consistency, "contact_strip", lambda rows, path, columns: drawn.extend([*rows, columns]))
        m.delattr(consistency, "continue_stories")
        run(evaluation.main, "story", stage2 / "a", "--clips", 1, "--steps", 1, "--cache", cache)
        with pytest.raises(NameError):
            run(evaluation.main, "story", stage2 / "a", "--clips", 1, "--steps", 1, "--seed", 1, "--cache", cache)
    (name, made), (_, truth), seconds = drawn
    assert name == "proposed\n4x4x2" and made.shape == truth.shape == (8, 32, 32, 3) and seconds[-1] == "14 s"
    story = consistency.make_absence_story(W.world_seed("held-out", 0), 7)
    assert np.array_equal(truth[-1].numpy(), W.render(story, None, 4, 32, 32)[0][10 * 4 + 2]) and made.float().std() > 5
    for name in "table2_story.png", "table2_story_strip.png":
        assert np.array(Image.open(f"assets/{name}").convert("RGB")).std() > 5
    Path("alone").mkdir()
    shutil.copy(stage2 / "a" / "model.safetensors", "alone")                    # no curve is drawn: weights are enough
    run(evaluation.main, "story", "alone", "--clips", 1, "--steps", 1, "--cache", cache)


def test_table2_refuses_runs_that_are_not_alike(refused, stage1, stage2):
    table = lambda *given: refused(evaluation.main, "table2", *given)           # noqa: E731
    assert "finetune.py" in table() and "pretrain" in table(stage1) and "nowhere" in table("nowhere")
    assert "--sections 0" in table(stage2 / "a", "--sections", 0) and "13" in table(stage2 / "a", "--sections", 4)
    Path("other").mkdir()
    Path("other/log.jsonl").touch()
    write_checkpoint("other/model.safetensors", claims={"steps": 7})
    assert "trained alike" in table(stage2 / "a", "other")
    assert "seed 0" in table("other", "other/../other")
    Path("assets").mkdir()
    for content in (b"a,b\n1,2\n", b"method,rate,psnr\nproposed\n", b"\xff\xfe", b"method,rate,psnr\nnone,,high\n"):
        Path("assets/table1.csv").write_bytes(content)              # said before anything is measured
        assert "table1.csv is not what" in table(stage2 / "a", "--clips", 1)


# ---------------------------------------------------------------------------------------------------------------------
# budget.py


@torch.no_grad()
def test_budget_counts_tokens():
    wan, nano = PRESETS["wan-14b"], PRESETS["nano"]
    assert [budget.memory_tokens(wan, (480, 832), "4x4x2", n) for n in (81, 121)] == [4264, 6344]
    assert [budget.frame_tokens(wan, size) for size in wan.sizes] == [1560, 1560, 39 * 39]
    assert budget.memory_tokens(wan, (624, 624), "2x2x1", 81) == 81 * 20 * 20
    assert {rate: budget.memory_tokens(nano, (64, 64), rate, 40) for rate in RATES} == RATES
    assert budget.paper_tokens() == 5460 and budget.paper_tokens(latents=2) == 7 * 13
    for preset, frames in itertools.product(("tiny", "tiny-wan"), (1, 4, 5, 8, 11)):       # some do not fill a segment
        model, p = MemoryDiT(preset), PRESETS[preset]
        size = [4 * s for s in budget.STRIDES[p.codec][1:]]
        hr, lr = (x[..., :4, :4] for x in (torch.zeros(1, 16, frames, 4, 4), torch.zeros(1, 16, frames, 1, 1)))
        n = model.encoder.whole(frames)
        lr = lr[:, :, :budget.memory_tokens(p, size, "4x4x2", n)]                          # one token a memory frame
        assert model.encode(hr, lr)[0].shape[1] == budget.memory_tokens(p, size, "4x4x2", frames)


def counted_flops(f):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


def count_attention(monkeypatch):
    """SDPA by its products: torch's counter does not know all of its CPU kernels."""
    by_hand = lambda q, k, v: (q @ k.mT / q.shape[-1]**0.5).softmax(-1) @ v     # noqa: E731
    monkeypatch.setattr(model, "attend", by_hand)


@pytest.mark.parametrize("M", [0, 7])
def test_budget_flops_are_those_that_torch_counts(M, monkeypatch):
    count_attention(monkeypatch)
    c = dataclasses.replace(CONFIG, out_dim=3)
    memory = (randn(1, M, c.dim), torch.zeros(M, 3)) if M else None
    made = counted_flops(lambda: DiT(c)(randn(1, 4, 3, 4, 6), torch.tensor([5.0]), randn(1, 2, 16), memory=memory))
    assert budget.flops(c, 3 * 2 * 3, M) == made


def test_budget_flops_of_wan_and_of_the_encoder(monkeypatch):
    count_attention(monkeypatch)
    for preset, expected in ("wan-1.3b", 283e12), ("wan-14b", 1678e12):        # 81 frames of 480 x 832
        assert budget.flops(PRESETS[preset].dit, 32760) == pytest.approx(expected, rel=2e-3)
    real, (hr, lr) = make_encoder(), budget.random_history(TINY, "4x4x2", 8, "cpu")
    on_meta = lambda n: budget.encoder_cost(MemoryEncoder("proposed", "4x4x2", "tiny").to("meta"), TINY, "4x4x2", n)
    assert on_meta(8)[0] == counted_flops(lambda: real(hr, lr)) and on_meta(40)[0] == 5 * on_meta(8)[0]
    assert 4.5 < on_meta(40)[1] / on_meta(8)[1] < 5.5


def test_budget_counts_lora():
    linears = [m for m in DiT(CONFIG).blocks.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 10 * CONFIG.layers
    assert budget.lora_parameters(CONFIG, 3) == sum(3 * (m.in_features + m.out_features) for m in linears)


class WithLoRA(torch.nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.down = base.requires_grad_(False), torch.nn.Linear(base.in_features, 1, bias=False)
        self.up = torch.nn.Linear(1, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("lora", [False, True])
def test_budget_knows_what_a_block_keeps(lora, monkeypatch):
    """Against the tensors that autograd saves, with a fused attention and bf16 products as on a GPU."""
    monkeypatch.setattr(model, "attend", F.scaled_dot_product_attention)
    c, N = DiTConfig(dim=48, ffn_dim=96, heads=2, layers=1, text_dim=8, text_len=2), 1009
    block = model.Block(c)
    if lora:
        block.requires_grad_(False)
        for m in (block.self_attn, block.cross_attn, block.ffn):
            for name, linear in list(m.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    setattr(m, name, WithLoRA(linear))
    angles = model.rope(torch.zeros(1, N, 3), c.dim // c.heads)
    held = {}

    def keep(x):
        if N in x.shape or N - 9 in x.shape:
            held[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        block(randn(1, N, 48).requires_grad_(), randn(1, 2, 6, 48), randn(1, 2, 48), angles, 9)
    for x in angles:
        held.pop(x.untyped_storage().data_ptr(), None)
    kept = sum(x.untyped_storage().nbytes() for x in held.values())
    assert budget.block_bytes(c, N, lora) == pytest.approx(kept, rel=0.03)


@pytest.mark.parametrize("preset, says", [
    ("nano", ["7,807,520", "2,560", "256 + 320"]), ("small", ["63,545,856", "224x128", "71,680"]),
    ("wan-1.3b", ["1,418,996,800", "4,264", "126,360", "5,460", "yes       yes"]),
    ("wan-14b", ["14,288,491,584", "6,240 + 4,264", "12,480 + 4,264", "6,344", "1.39 PFLOP"])])
def test_budget_command(preset, says, capsys):
    run(evaluation.main, "budget", "--preset", preset)
    said = capsys.readouterr().out
    assert "predictions" in said and all(s in said for s in says), said
    assert max(map(len, said.splitlines())) <= 120


class Live(TorchDispatchMode):
    """Bytes of the tensors made under it that live now, and their most."""
    now = most = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and not hasattr(storage := x.untyped_storage(), "counted"):
                storage.counted, n = True, storage.nbytes()
                self.now += n
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.free, n)
        return out

    def free(self, n):
        self.now -= n


@pytest.mark.parametrize("lora", [0, 128])
@pytest.mark.parametrize("preset", ["wan-1.3b", "wan-14b"])
def test_budget_knows_the_most_that_sampling_needs_in_a_block(preset, lora):
    """Against all that lives in a forward pass of one layer at 480p, on tensors without content."""
    c, M, frames = dataclasses.replace(PRESETS[preset].dit, layers=1), 4264, 8
    with FakeTensorMode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        dit = DiT(c)
        for name, p in dit.named_parameters():
            p.data = p.data.to(torch.bfloat16 if name.startswith("blocks.") and p.ndim == 2 else torch.float32)
        if lora:
            model.add_lora(dit, lora)
        given = (torch.empty(1, 16, frames, 60, 104), torch.empty(1), torch.empty(1, 512, c.text_dim), None,
                 (torch.empty(1, M, c.dim), torch.empty(M, 3)))
        for x in (*dit.parameters(), given[0], *given[4]):          # was there before
            x.untyped_storage().counted = True
        with Live() as live:
            dit(*given)
    tokens = M + frames * 30 * 52
    said = budget.sampling_memory(c, 1 if lora else 0, 0, tokens, 0)[0]["inside one block"]
    assert said == pytest.approx(live.most, rel=0.1)


def test_budget_knows_wans_vae():
    """Against all that lives while the real architecture decodes, without a number computed."""
    diffusers = pytest.importorskip("diffusers")
    codec, height, width = wan.WanCodec(), 480, 832
    codec.device = "meta"
    with torch.device("meta"):
        codec.vae = diffusers.AutoencoderKLWan().requires_grad_(False)
    assert sum(4 * p.numel() for p in codec.vae.parameters()) == budget.VAE_WEIGHTS
    decode, latents = codec.decoder(), torch.empty(1, 16, 9, height // 8, width // 8, device="meta")
    with Live() as live:
        for section in latents.split([1, 8], dim=2):
            pixels = decode(section)
        del pixels, section
    assert live.now == pytest.approx(budget.VAE_CARRIES * height * width, rel=0.01)
    assert live.most == pytest.approx(budget.VAE_DECODES * height * width, rel=0.01)


def test_budget_batches_fill_the_memory(capsys):
    def batches(gpus, memory):
        run(evaluation.main, "budget", "--preset", "wan-14b", "--gpus", gpus, "--memory_gb", memory)
        said = capsys.readouterr().out
        return next(line.split("GiB")[1].split() for line in said.splitlines() if "largest batch" in line)
    with torch.device("meta"):
        weights = dict(DiT(PRESETS["wan-14b"].dit).named_parameters())
    frozen = sum(p.numel() for p in weights.values())
    held = sum(p.numel() * (2 if name.startswith("blocks.") and p.ndim == 2 else 4) for name, p in weights.items())
    fixed, sample = budget.training_memory(PRESETS["wan-14b"].dit, frozen, 100, 7, 2, 50)
    assert sum(fixed.values()) == held + (4 + 2 + 4 + 8 + 4) * 100 + (budget.CONTEXT + budget.NCCL) * 2**30
    assert sample["stream between blocks, float32"] == 40 * 7 * 5120 * 4 and sample["φ, float32"] == 50
    assert batches(2, 79) == ["3", "1"] and batches(2, 30)[:3] == ["does", "not", "fit"]


def test_alternate_takes_turns():
    calls = []
    times = speed.alternate({n: lambda n=n: calls.append(n) for n in "ab"}, 3, torch.device("cpu"))
    assert calls == list("abababab") and [len(t) for t in times.values()] == [3, 3]
    assert speed.ratio([1, 4, 9], [1, 2, 3]) == 2


@pytest.mark.parametrize("preset", ["tiny", "tiny-wan"])
def test_speed_command(preset, capsys, monkeypatch):
    monkeypatch.setattr(speed, "GROWTH", (2, 8))
    monkeypatch.setattr(speed, "autocast", lambda device: torch.autocast("cpu", enabled=False))
    if preset == "tiny-wan":
        monkeypatch.setitem(sys.modules, "diffusers", None)     # as if it were not installed
    run(evaluation.main, "speed", "--preset", preset, "--repeats", 1, "--device", "cpu", "--out", "plot.png")
    said = capsys.readouterr().out
    rows = [line.split(",") for line in Path("plot.csv").read_text().splitlines()]
    p = PRESETS[preset]
    latents = {"tiny": (4, 16), "tiny-wan": (5, 5)}[preset]     # whole segments of 2 and of 0.5 latents a second
    assert [row[:2] + row[3:4] for row in rows[1:]] == [
        [str(n) for n in (s, budget.memory_tokens(p, (32, 32), "4x4x2", m), m * budget.frame_tokens(p, (32, 32)))]
        for s, m in zip((2, 8), latents)]
    assert all(float(row[2]) > 0 and float(row[4]) > 0 for row in rows[1:])
    assert Image.open("plot.png").size == (1040, 650)
    step = next(line.split() for line in said.splitlines() if line.split()[:1] == ["eager"])
    assert "a training step of stage 2, 1 x (" in said and float(step[1].replace(",", "")) > 0
    if "n/a" in said:
        assert preset == "tiny-wan" or not importlib.util.find_spec("diffusers")
    else:
        difference = next(line.split()[-1] for line in said.splitlines() if "largest difference" in line)
        assert 0 < float(difference) < 1e-5
    for line in (line for line in said.splitlines() if "the time of DiT" in line):
        found = {kind: int(x) for kind, x in re.findall(r"([a-zA-Z ]+) (\d+) %", line.partition(": ")[2])}
        assert abs(sum(found.values()) - 100) <= 3 and {"attention", " matrix products", " norms"} < set(found)
    assert said.count("the time of DiT") == 2
    a, cpu = torch.ones(512, 512), torch.device("cpu")
    assert speed.shares(lambda: a @ a, cpu)["matrix products"] > 0.5 < speed.shares(lambda: F.gelu(a), cpu)["GELU"]


def test_speed_skips_what_takes_too_long(capsys, monkeypatch):
    monkeypatch.setattr(speed, "GROWTH", (2, 8))
    config = speed.SpeedConfig(preset="tiny", rate="4x4x2", repeats=1, out="plot.png")
    slow = 2 * budget.flops(TINY.dit, 64, 8 * 16) / speed.PATIENCE             # as many tokens as fit the patience
    rows = speed.measure_growth(config, TINY, DiT(TINY.dit), slow)
    assert [[y is None for y in row] for row in rows] == [[False] * 5, [False] * 4 + [True]]
    speed.write_growth(config, rows, "title")
    assert Path("plot.csv").read_text().splitlines()[-1].endswith(",")
    rows = speed.measure_growth(config, TINY, DiT(TINY.dit), slow / 100)        # not even what is compressed
    assert [[y is None for y in row] for row in rows] == [[False, False, True, False, True]] * 2
    speed.write_growth(config, rows, "title")
# judge.py


@pytest.fixture
def server(monkeypatch):
    """A chat server that plays the model: server.plan(question, asked) gives its words, an HTTP status, or seconds to
    hang. server.asked: (question, message content, headers) of all requests."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            """Answer a question by the plan."""
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = body["messages"][0]["content"]
            asked.append((content[-1]["text"], content, self.headers))
            plan = play.plan(content[-1]["text"], len(asked))
            if isinstance(plan, float):
                time.sleep(plan)
            status = plan if isinstance(plan, int) else 200
            said = {"choices": [{"message": {"content": plan}}], "headers": self.headers.as_string()}
            with contextlib.suppress(OSError):              # the judge has hung up
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(said).encode())

        def log_message(self, *_):
            pass

    asked = []
    monkeypatch.setattr(judge, "BACKOFF", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
    thread.start()
    play = SimpleNamespace(url=f"http://127.0.0.1:{listener.server_port}/v1", asked=asked, plan=lambda *_: "Yes.")
    yield play
    listener.shutdown()
    listener.server_close()
    thread.join()


def judge_flags(server, *videos):
    return ["judge", "--videos", *videos, "--endpoint", server.url, "--model", "m", "--history_seconds", 3,
            "--frames", 3, "--retries", 1, "--timeout", 5]


def judged(said):
    """{dimension: [score, judged, gated out, failed]} of the printed table."""
    return {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.split()[:1][0] in judge.DIMENSIONS}


def test_judge_sends_pictures_of_both_parts(server):
    with VideoWriter("a.mp4", 2, 16, 24) as w:
        w.write(greys(12))                                  # levels 0 to 5 in 3 s of history, then 6 to 11
    run(evaluation.main, *judge_flags(server, "a.mp4"))
    assert len(server.asked) == 16 and len({question for question, *_ in server.asked}) == 16
    for _, content, headers in server.asked:
        kinds = [piece["type"] for piece in content]
        assert kinds == ["text", *["image_url"] * 3, "text", *["image_url"] * 3, "text"]
        assert "0 s to 3 s" in content[0]["text"] and "3 s to 6 s" in content[4]["text"]
        assert "Authorization" not in headers
    head, *jpegs = [piece["image_url"]["url"].split(",") for piece in content if piece["type"] == "image_url"]
    assert head[0] == "data:image/jpeg;base64"
    pictures = [np.array(Image.open(io.BytesIO(base64.b64decode(data)))) for _, data in (head, *jpegs)]
    assert all(p.shape == (341, 512, 3) for p in pictures)
    assert [round(p.mean() / 20) for p in pictures] == [1, 3, 5, 7, 9, 11]     # the middle of each second


def test_judge_counts_and_goes_on(server, capsys, monkeypatch):
    """Two videos; every kind of answer; a second run asks only what has had no answer."""
    for name, seed in ("a.mp4", 0), ("b.mp4", 5):
        write_video(name, 12, seed)

    def plan(question, asked):
        if asked == 1:
            return 429                                      # once: the first question is asked again
        for word, answer in (("clothing", "No"), ("layout", "**No**, it moved."), ("plausible", "Yes and no."),
                             ("an object", "Yes" if asked < 15 else "I'm sorry, but I can't help with that."),
                             ("a character (", "Yes" if asked < 15 else hang)):
            if word in question:
                return answer
        return "yes"
    hang, server.plan = 3.0, plan
    monkeypatch.setenv("SECRET", "sk-12345")
    flags = [*judge_flags(server, "a.mp4", "b.mp4"), "--timeout", 0.6, "--key_env", "SECRET"]
    run(evaluation.main, *flags)
    said = capsys.readouterr().out
    assert judged(said) == {"character": ["100.0", "1", "0", "1"], "cloth": ["–", "0", "2", "0"],
                            "object": ["–", "0", "0", "2"], "scene": ["66.7", "2", "0", "0"]}, said
    assert "1 refusal" in said and "1 unparsable" in said and "1 timeout" in said
    assert "2 retries" in said
    # a: 4 gates, cloth out, 3 x 3 and a retry; b: 4 gates, one with a retry, 3 of the scene
    assert len(server.asked) == 14 + 8 and server.asked[0][0] == server.asked[1][0]
    assert all(headers["Authorization"] == "Bearer sk-12345" for *_, headers in server.asked)

    lines = [json.loads(line) for line in Path("out/judge.jsonl").read_text().splitlines()]
    assert len(lines) == 13 + 7 and "sk-12345" not in Path("out/judge.jsonl").read_text() + said
    assert {x["video"] for x in lines} == {"a.mp4", "b.mp4"} and {x["model"] for x in lines} == {"m"}
    assert [x["retries"] for x in lines[:2]] == [1, 0] and sum(x["retries"] for x in lines) == 2
    assert lines[0]["sha256"] == hashlib.sha256(Path("a.mp4").read_bytes()).hexdigest()
    assert all(x["date"].startswith("20") and "History" in x["prompt"] and "yes or no" in x["prompt"] for x in lines)

    with open("out/judge.jsonl", "a") as f:
        f.write('{"video": "b.mp4", "sha')                  # stopped while it wrote
    del server.asked[:]
    server.plan = lambda *_: "No."
    run(evaluation.main, *flags)                            # the gate that hung is all that is asked again
    assert len(server.asked) == 1 and judged(capsys.readouterr().out)["character"] == ["100.0", "1", "1", "0"]
    run(evaluation.main, *flags)
    assert len(server.asked) == 1 and len(Path("out/judge.jsonl").read_text().splitlines()) == 21
    run(evaluation.main, *flags, "--model", "other")        # other questions: another model, another sampling
    assert len(server.asked) == 1 + 8
    run(evaluation.main, *flags, "--frames", 2)
    assert len(server.asked) == 1 + 16


def test_judge_takes_only_clear_answers():
    for kind, texts in {"yes": ("yes", "Yes.", " **Yes**\nBoth are red.", "YES, it is", '"Yes"', "yes - the same",
                                "<think>No.\nWait.</think>\n\nYes"),
                        "no": ("no", "No!", "*no*: it differs", "No\n", "No. The coat is not the same."),
                        "refusal": ("I'm sorry, I can't say.", "I cannot judge people.", "Sorry, no.",
                                    "No, I cannot assist with that request.", "No, I'm unable to determine this."),
                        "unparsable": ("", "maybe", "Yes and no.", "yes/no", "No idea", "Not at all", "Yes, no",
                                       "Yes or no?", "Yes.\nNo.", "Answer: yes", "None", "<think>yes",
                                       "Yes.\n\nActually, no.", "Yes.\nFinal answer: No", "No.1 matches",
                                       "Yes, it does not stay the same", "Yes, though it isn't red")}.items():
        for text in texts:
            assert judge.parse_answer(text) == kind, text
    reply = lambda **choice: judge.read_reply(json.dumps({"choices": [choice]}).encode())
    assert reply(message={"content": None, "refusal": "no"})[0] == "refusal"
    assert reply(message={"content": "yes"}, finish_reason="content_filter")[0] == "refusal"
    assert reply(message={"content": None})[0] == "unparsable"
    assert {judge.read_reply(x)[0] for x in (b"<html>", b"[]", b'{"choices": []}', b"\xff")} == {"error"}


def test_judge_refuses(server, refused, monkeypatch):
    write_video("a.mp4", 12)
    Path("notes.txt").write_text("one line")
    flags = judge_flags(server, "a.mp4")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("SECRET", "sk-12345")
    assert "--videos" in refused(evaluation.main, "judge", "--endpoint", server.url, "--model", "m")
    assert "--model" in refused(evaluation.main, *flags, "--model", "")
    assert "a.mp4 lasts 6 s" in refused(evaluation.main, *flags, "--history_seconds", 6)
    assert "b.mp4" in refused(evaluation.main, *judge_flags(server, "a.mp4", "b.mp4"))
    assert "notes.txt" in refused(evaluation.main, *flags, "--out", "notes.txt")
    assert Path("notes.txt").read_text() == "one line"
    for flag, value in ("--frames", 0), ("--retries", -1), ("--timeout", 0), ("--history_seconds", "nan"):
        assert flag in refused(evaluation.main, *flags, flag, value)
    for address in ("", "localhost:8000", "file:///etc/passwd", "http://me:pass@host/v1", "http://host/v1?key=1",
                    "http://.x/v1", "http://a..b/v1", f"http://{'a' * 64}/v1", "http://[abc/v1", "http://hö/v1"):
        assert "--endpoint" in refused(evaluation.main, *flags, f"--endpoint={address}")
    for name in "EMPTY", "sk-12345":
        assert "sk-12345" not in refused(evaluation.main, *flags, "--key_env", name)
    assert not server.asked


def test_judge_stops_where_every_question_would_fail(server, capsys, monkeypatch):
    def stopped(*flags):
        with pytest.raises(SystemExit) as stop:
            run(evaluation.main, *judge_flags(server, "a.mp4"), *flags)
        assert stop.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]
    write_video("a.mp4", 12)
    monkeypatch.setenv("SECRET", "sk-12345")
    server.plan = lambda *_: 401
    said = stopped("--key_env", "SECRET")                   # the server repeats the key
    assert "HTTP 401" in said and "[key]" in said and "sk-12345" not in said and len(server.asked) == 1
    with socket.socket() as s:                              # a port where nobody listens
        s.bind(("127.0.0.1", 0))
        assert "cannot be reached" in stopped("--endpoint", f"http://127.0.0.1:{s.getsockname()[1]}")
    assert Path("out/judge.jsonl").read_text() == ""


def write_votes(rows, path="votes.csv"):
    Path(path).write_text("".join(",".join(row) + "\n" for row in [("a", "b", "winner"), *rows]))


def elo_table(capsys, *flags):
    """({method: [rating, low, high, votes]}, what was printed)."""
    run(evaluation.main, "elo", "votes.csv", "--out", "elo.md", *flags)
    rows = [line.split(",") for line in Path("elo.csv").read_text().splitlines()]
    assert rows[0] == ["method", "rating", "low", "high", "votes"]
    return {name: list(map(int, values)) for name, *values in rows[1:]}, capsys.readouterr().out


def test_elo_recovers_known_ratings(capsys):
    truth, rng, rows = {"a": 1050, "b": 1120, "c": 1230, "d": 1400}, np.random.default_rng(0), []
    for _ in range(3000):
        a, b = rng.choice(list(truth), 2, replace=False)
        u, chance = rng.random(), 1 / (1 + 10**((truth[b] - truth[a]) / 400))
        rows.append((a, b, a if u < chance else b))
    write_votes(rows)
    found, said = elo_table(capsys)
    assert list(found) == ["d", "c", "b", "a"] and sum(x[3] for x in found.values()) == 6000
    assert sum(x[0] for x in found.values()) / 4 == pytest.approx(1200, abs=1)
    for name, (rating, low, high, _) in found.items():
        assert abs(rating - truth[name]) < 25 and low <= truth[name] <= high and 15 < high - low < 60
    assert "3000 votes" in said and "| d |" in said and said.startswith(Path("elo.md").read_text())
    assert "infinite" not in said.lower()
    write_votes([(b, a, winner) for a, b, winner in rows[::-1]])            # neither order matters
    again, _ = elo_table(capsys)
    assert all(again[name][0] == found[name][0] for name in truth)
    assert elo_table(capsys)[0] == again                                    # seeded


def test_elo_known_values_and_ties(capsys):
    write_votes([("x", "y", "x")] * 10 + [("y", "x", "y")])
    found, _ = elo_table(capsys)
    assert (found["x"][0], found["y"][0]) == (1400, 1000)                  # odds of 10 to 1 are 400 points
    write_votes([("x", "y", "tie")] * 5 + [("x", "y", "x"), ("x", "y", "y")])
    found, _ = elo_table(capsys)
    assert found["x"][0] == found["y"][0] == 1200 and found["x"][3] == 7
    write_votes([("x", "y", "x")] * 3 + [("x", "y", "tie")] * 2)           # 4 to 1
    found, _ = elo_table(capsys)
    assert found["x"][0] - found["y"][0] == pytest.approx(400 * math.log10(4), abs=1)


def test_elo_says_when_a_rating_is_infinite(capsys):
    write_votes([("top", "x", "top")] * 3 + [("x", "y", "x"), ("x", "y", "y"), ("y", "low", "y")])
    found, said = elo_table(capsys)
    assert "top never lost; low never won" in said and "half a win and half a loss" in Path("elo.md").read_text()
    assert 1200 < found["top"][0] < 1800 and list(found)[0] == "top" and list(found)[-1] == "low"
    write_votes([("p", "q", "p"), ("p", "q", "q"), ("r", "s", "r"), ("r", "s", "s"), ("p", "r", "p")])
    found, said = elo_table(capsys)                         # nobody is unbeaten, but p and q are by the others
    assert "some methods never lost to any of the rest" in said and found["p"][0] > found["r"][0]
    wins = np.array([[[0, 1.0], [0, 0]]])                   # σ(-θ) of the vote = 2 (σ(θ/2) - 1/2) of the prior, by hand
    theta = judge.fit(wins)[0][0]
    x = theta[0]
    assert x == -theta[1] and 1 / (1 + math.exp(2 * x)) == pytest.approx(1 / (1 + math.exp(-x)) - 0.5)


def test_elo_refuses(refused):
    elo = [evaluation.main, "elo", "votes.csv"]
    assert "votes.csv" in refused(*elo)
    Path("votes.csv").write_text("a,b,won\nx,y,x\n")
    assert "no column winner" in refused(*elo)
    Path("votes.csv").write_bytes(b"a,b,winner\nx,\xff\xfe,x\n")
    assert "UTF-8" in refused(*elo)
    for rows, says in (([], "no votes"), ([("x", "y", "x"), ("x", "y", "z")], 'line 3: the winner is "z"'),
                       ([("x", "x", "x")], "line 2"), ([("x", "tie", "x")], "line 2"), ([("x",)], "line 2"),
                       ([("x", "y", "x"), ("y", "x", "x"), ("u", "v", "tie")], "no vote links u, v with x, y")):
        write_votes(rows)
        assert says in refused(*elo)
    write_votes([("x", "y", "x")])
    assert ".md" in refused(*elo, "--out", "votes.csv") and ".md" in refused(*elo, "--out", "votes.md")
    assert "votes" in refused(evaluation.main, "elo")


# ---------------------------------------------------------------------------------------------------------------------
# Command line: the user's mistakes are one line each, exit code 2, and leave no file


@pytest.fixture
def refused(capsys, tmp_path):
    def check(main, *flags):
        files = lambda: sorted(p for p in tmp_path.rglob("*") if p.is_file())
        before = files()
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(main, *flags)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        assert files() == before
        return error
    return check


def test_sample_refuses_bad_histories(refused):
    checkpoint = write_checkpoint()
    write_video("good.mp4")
    Path("text.mp4").write_text("not a video\n" * 50)
    Path("text.txt").write_text("not a video\n" * 50)               # FFmpeg would draw it
    Path("empty.mp4").touch()
    Path("cut.mp4").write_bytes(Path("good.mp4").read_bytes()[:300])
    write_sound("sound.mp4")
    stage1 = write_checkpoint("stage1.safetensors", stage="pretrain")
    for name in "missing.mp4", "text.mp4", "text.txt", "empty.mp4", "cut.mp4", "sound.mp4", ".":
        assert name in refused(sample.main, "--checkpoint", checkpoint, "--history", name)
        assert name in refused(evaluation.main, "retrieval", "--checkpoint", stage1, "--history", name)
    write_video("short.mp4", 2)
    assert "short.mp4" in refused(evaluation.main, "retrieval", "--checkpoint", stage1, "--history", "short.mp4")
    assert "--history" in refused(sample.main, "--checkpoint", checkpoint)
    same = refused(sample.main, "--checkpoint", checkpoint, "--history", "good.mp4", "--save_file", "./good.mp4")
    assert "--save_file" in same
    assert "a.avi" in refused(sample.main, "--checkpoint", checkpoint, "--history", "good.mp4", "--save_file", "a.avi")


def test_sample_refuses_bad_settings(refused):
    write_video("good.mp4")
    Path("times.txt").write_text("0s: a cat\n0s: a dog")
    common = [sample.main, "--checkpoint", write_checkpoint(), "--history", "good.mp4"]
    assert "times.txt, line 2" in refused(*common, "--prompt", "times.txt")
    assert "none.txt" in refused(*common, "--prompt", "none.txt")
    assert "--guidance" in refused(*common, "--guidence", "2")
    for flag, value in (("--steps", 0), ("--seconds", 0), ("--seconds", "nan"), ("--shift", 0), ("--guidance", -1),
                        ("--memory_seconds", -1), ("--seconds", 1e9), ("--preset", "small"),
                        ("--steps", "ten"), ("--device", "abacus"), ("--device", "")):
        assert flag.strip("-") in refused(*common, f"{flag}={value}")


def test_unknown_presets_are_refused_everywhere(refused):
    for main, *command in ((pretrain.main,), (finetune.main,), (data.main, "story"), (evaluation.main, "speed"), (
            sample.main, "--history=a", "--init=random"), (data.main, "cache", "--videos=a", "--out=b")):
        assert "--preset giant" in refused(main, *command, "--preset", "giant")
    assert "nano and small" in refused(data.main, "story", "--preset", "wan-1.3b")
    assert "runs/a follows no flag" in refused(evaluation.main, "table1", "--clips", 4, "runs/a")
    assert "--NAME a.mp4" in refused(sample.main, "a.mp4")


def test_sample_refuses_bad_checkpoints(refused):
    write_video("good.mp4")
    torch.save(Bomb(), "pickle.safetensors")
    nan = lambda state: state["dit.head.head.bias"].fill_(math.nan)
    for path, says in (
            (write_checkpoint("nan.safetensors", change=nan), "dit.head.head.bias"),
            (write_checkpoint("rate.safetensors", claims={"rate": "2x2x2"}), "encoder.hr.convs"),
            (write_checkpoint("width.safetensors", claims={"preset": "nano"}), "has shape (48,), expected (256,)"),
            (write_checkpoint("stage.safetensors", stage="pretrain"), "pretrain"),
            ("pickle.safetensors", "pickle.safetensors"), ("missing.safetensors", "missing.safetensors"),
            (".", "is a folder")):
        assert says in refused(sample.main, "--checkpoint", path, "--history", "good.mp4")
    assert not Path("exploded").exists()


def test_what_does_not_fit_the_memory_is_one_line(capsys, monkeypatch):
    def euler(*given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nA second line")
    write_video("good.mp4")
    monkeypatch.setattr(sample, "euler", euler)
    with pytest.raises(SystemExit) as stop:
        run(sample.main, "--history", "good.mp4", "--checkpoint", write_checkpoint(), "--save_file", "made/a.mp4")
    said = capsys.readouterr().err
    assert stop.value.code == 1 and "error: CUDA out of memory. Tried to allocate 9 GiB. Train with" in said
    assert "Traceback" not in said and not [p for p in Path("made").rglob("*") if p.is_file()]


def test_the_model_waits_elsewhere_while_wans_vae_decodes(monkeypatch):
    """A GPU, played by names: what is moved where, and when."""
    moved, gpu, cpu = [], SimpleNamespace(type="cuda"), SimpleNamespace(type="cpu")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: moved.append("room"))
    for codec, device in (SimpleNamespace(causal=True), gpu), (SimpleNamespace(causal=False), gpu), (
            SimpleNamespace(causal=True), cpu):
        dit = SimpleNamespace(to=lambda where: moved.append(getattr(where, "type", where)))
        with sample.set_aside(dit, codec, device):
            moved.append("decode")
    assert moved == ["cpu", "room", "decode", "cuda", "decode", "cuda", "decode", "cpu"]


def test_sample_writes_nothing_that_is_not_finite(capsys):
    write_video("good.mp4")
    checkpoint = write_checkpoint(change=lambda state: state["dit.head.head.weight"].fill_(3e38))
    with pytest.raises(SystemExit) as stop:
        run(sample.main, "--history", "good.mp4", "--checkpoint", checkpoint, "--save_file", "made/a.mp4")
    assert stop.value.code == 2 and f"error: {checkpoint} makes numbers that are not finite" in capsys.readouterr().err
    assert not [p for p in Path("made").rglob("*") if p.is_file()]


def test_stages_refuse_bad_settings(refused, cache, tmp_path):
    for flag, value, says in (
            ("preset", "nanoo", "nano"), ("method", "propsed", "proposed"), ("rate", "3x3x3", "--rate"),
            ("steps", 0, "--steps"), ("batch", 0, "--batch"), ("mask", "blur", "--mask"), ("step", 3, "--steps"),
            ("init", "nowhere", "nowhere"), ("data", "nowhere", "nowhere"), ("device", "abacus", "abacus"),
            ("lr", "fast", "lr"), ("window", 0, "--window"), ("method", "sliding-window", "finetune.py"),
            ("lr", -1, "--lr"), ("t_std", "nan", "--t_std"), ("sample_shift", 0, "--sample_shift"),
            ("clip_grad", "inf", "--clip_grad"), ("lora", -1, "--lora"), ("warmup", -1, "--warmup"),
            ("text_drop", 7, "--text_drop"), ("ema", 3, "--ema"),
            ("method", "keyframes", "finetune.py")):
        assert says in refused(pretrain.main, *flags(cache, out=tmp_path / "out", **{flag: value}))
    assert "--seed -1" in refused(pretrain.main, *flags(cache, seed=-1))
    assert "nowhere" in refused(pretrain.main, *flags("fresh", init="nowhere"))     # and no stories were drawn for it
    assert "--lora 0" in refused(pretrain.main, *flags(cache, lora=2))
    assert "8x8 tokens" in refused(pretrain.main, *flags(cache, preset="nano", rate="32x1x1"))
    assert "--t_mean" in refused(pretrain.main, *flags(cache, t_mean="nan"))
    for main, given in (pretrain.main, {"window": 3}), (pretrain.main, {"vae": "v"}), (
            finetune.main, {"method": "keyframes", "encoder": "runs/other"}):
        assert "drop it" in refused(main, *flags(cache, **given))
    weights = write_checkpoint()
    write_video("a.mp4")
    for flag in ("--init", "base"), ("--merge",), ("--vae", "vae"), ("--t5", "t5"):
        assert " ".join((*flag, "does nothing")) in refused(sample.main, "--history", "a.mp4", "--checkpoint", weights,
                                                            *flag)
    assert "suffix" in refused(sample.main, "--history", "a.mp4", "--checkpoint", weights, "--save_file", "a.png")
    assert "a.mp4/b.mp4 cannot be written" in refused(          # before the model is loaded
        sample.main, "--history", "a.mp4", "--checkpoint", weights, "--save_file", "a.mp4/b.mp4", "--device", "cpu")
    assert "drop one" in refused(sample.main, "--history", "a.mp4", "--init", "random", "--checkpoint", "b")
    assert "--prompt does nothing for random weights" in refused(
        sample.main, "--history", "a.mp4", "--init", "random", "--preset", "tiny", "--prompt", "x")
    assert "--seed" in refused(sample.main, "--seed", 2**64, "--history", "a.mp4")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "state.pt").touch()
    assert "--resume" in refused(pretrain.main, *flags(cache, out=tmp_path / "used"))
    (tmp_path / "used" / "state.pt").rename(tmp_path / "used" / "model.safetensors")
    assert "model.safetensors" in refused(pretrain.main, *flags(cache, out=tmp_path / "used"))
    assert "memory" in refused(pretrain.main, *flags(cache, out=tmp_path / "out", method="none"))
    assert "--freeze_encoder" in refused(finetune.main, *flags(cache, out=tmp_path / "out", method="none",
                                                               freeze_encoder=True))


def test_figures_do_not_depend_on_the_micro_batch(cache, monkeypatch):
    sizes = []
    monkeypatch.setattr(figures, "evaluate", lambda *a, real=figures.evaluate: (sizes.append(len(a[-1])), real(*a))[1])
    for micro_batch in 4, 3:
        run(pretrain.main, *flags(cache, out=f"run-{micro_batch}", steps=1, held_out=8, micro_batch=micro_batch))
    assert sizes == [4, 4, 3, 3, 2]
    a, b = (json.loads(Path(f"run-{k}/log.jsonl").read_text()) for k in (4, 3))
    assert a.keys() == b.keys() and "psnr_wrong_memory" in a and "loss_t0.5" in a
    assert all(a[k] == pytest.approx(b[k], abs=0.02) for k in a if k != "minutes")


def test_log_drops_the_steps_that_are_done_again(tmp_path):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"step": i}) + "\n" for i in (1, 2, 3)))
    saving.start_log(tmp_path, 2)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2]


def test_stages_refuse_checkpoints_of_another_kind(refused, cache, stage1):
    wide = {k: torch.cat([v, v]) if v.ndim == 1 else v for k, v in randomize(DiT(TINY.dit)).state_dict().items()}
    save_file(wide, "wide.safetensors")
    torch.save(Bomb(), "pickle.safetensors")
    common = lambda **changes: flags(cache, out="out", **changes)
    assert "shape" in refused(pretrain.main, *common(init="wide.safetensors"))
    assert "pickle.safetensors" in refused(pretrain.main, *common(init="pickle.safetensors"))
    assert "is of --preset tiny, not nano" in refused(pretrain.main, *common(init=stage1 / "model.safetensors",
                                                                             preset="nano"))
    for damage in "{", "[]", "{}":
        save_file({"x": torch.zeros(1)}, "damaged.safetensors", {"config": damage})
        assert "header of damaged.safetensors is damaged" in refused(
            finetune.main, *common(encoder="damaged.safetensors"))
    assert "is of pretrain.py" in refused(finetune.main, *flags(cache, out=stage1, encoder="none", resume=True))
    assert "--encoder" in refused(finetune.main, *common(encoder=stage1, rate="2x2x2"))
    assert "--encoder" in refused(finetune.main, *common(encoder=stage1, method="only-lr"))
    assert "nowhere" in refused(finetune.main, *common(encoder="nowhere"))
    assert "finetune" in refused(evaluation.main, "retrieval", "--checkpoint", write_checkpoint(stage="finetune"))
    assert not Path("exploded").exists()


def test_eval_refuses_unknown_commands_and_flags(refused):
    assert "retrieval" in refused(evaluation.main, "retrievel")
    assert "--checkpoint" in refused(evaluation.main, "retrieval", "--chekpoint", "x")
    assert "missing.safetensors" in refused(evaluation.main, "retrieval", "--checkpoint", "missing.safetensors")
    assert "wan-14b" in refused(evaluation.main, "budget", "--preset", "wan")
    assert "--gpus 0" in refused(evaluation.main, "budget", "--gpus", 0)
    assert "--memory_gb nan" in refused(evaluation.main, "budget", "--memory_gb", "nan")
    assert "--rate 4x4x16" in refused(evaluation.main, "budget", "--rate", "4x4x16")
    assert "--repeats 0" in refused(evaluation.main, "speed", "--repeats", 0)
    assert ".png" in refused(evaluation.main, "speed", "--out", "plot.csv")
    assert "CUDA" in refused(evaluation.main, "speed", "--preset", "wan-14b", "--device", "cpu")


@pytest.mark.parametrize("script", [pretrain, finetune, sample])
def test_help_describes_every_flag(script, capsys):
    run(script.main, "--help")
    said = capsys.readouterr().out
    assert "--seed" in said and "python" in said
    config = {pretrain: pretrain.PretrainConfig, finetune: finetune.FinetuneConfig, sample: sample.SampleConfig}[script]
    comments = field_help(config)
    assert all(comments.get(f.name) and f"--{f.name}" in said for f in dataclasses.fields(config))


def test_exit_code_of_the_real_process():
    done = subprocess.run([sys.executable, str(HERE / "sample.py"), "--history", "missing.mp4", "--init", "random"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# The shipped weights

SHIPPED = HERE / "checkpoints" / "nano.safetensors"


@pytest.mark.skipif(not SHIPPED.is_file(), reason="needs checkpoints/nano.safetensors")
@torch.no_grad()
def test_shipped_model_remembers_and_obeys(tmp_path):
    """The next section of 8 held-out stories: better with the memory of its own story than with another's or none,
    and in the place that the prompt asks for."""
    dit, config = encoder.load_model(SHIPPED)
    assert config["stage"] == "finetune" and config["preset"] == "nano"
    preset, codec = PRESETS["nano"], DCTCodec()
    tools = Tools(preset, codec, codecs.make_prompts(preset), dit.encoder, torch.device("cpu"))
    clips = world_clips("held-out", 8, preset, codec, tmp_path, keep_pixels=True).clips
    hr = torch.stack([clip.latents[:, :40].float() for clip in clips])
    truth = torch.stack([clip.pixels[40:44] for clip in clips])
    text = torch.stack([tools.prompts(clip.prompt(40)) for clip in clips])
    found = {}
    for name, history in ("right", hr), ("wrong", hr.roll(1, 0)), ("none", None):
        memory = None if history is None else dit.encode(history, pretrain.downsample(tools, history))
        x = euler(dit.dit, randn(8, 16, 4, 16, 16), text, torch.arange(40, 44), memory, steps=10)
        frames = to_frames(codec.decode(x))
        found[name] = codecs.psnr(frames, truth).mean().item()
        if name == "right":                                         # the place asked for, not another of the story
            written = scores.score(frames[None, :, None], [clip.story for clip in clips], 10)
            assert written["obeys"].mean() >= 75, written["obeys"]
    assert found["right"] > max(found["wrong"], found["none"]) + 3, found


@pytest.mark.skipif(not SHIPPED.is_file(), reason="needs checkpoints/nano.safetensors")
@torch.no_grad()
def test_shipped_model_shows_what_the_prompt_asks_for(tmp_path):
    """After the same history, every scene of the story in either framing: what is written is nearest to the one that
    was asked for, of the six."""
    dit, _ = encoder.load_model(SHIPPED)
    preset, codec = PRESETS["nano"], DCTCodec()
    tools = Tools(preset, codec, codecs.make_prompts(preset), dit.encoder, torch.device("cpu"))
    right = []
    for clip in world_clips("held-out", 4, preset, codec, tmp_path).clips:
        hr = clip.latents[None, :, :40].float()
        tokens, positions = dit.encode(hr, pretrain.downsample(tools, hr))
        asked = [dataclasses.replace(clip.story, shots=(*clip.story.shots[:10], dataclasses.replace(
            clip.story.shots[10], scene=scene, framing=framing))) for scene in range(3) for framing in range(2)]
        text = torch.stack([tools.prompts(W.caption(story, 10)) for story in asked])
        noise = randn(1, 16, 4, 16, 16).expand(6, -1, -1, -1, -1)
        x = euler(dit.dit, noise, text, torch.arange(40, 44), (tokens.expand(6, -1, -1), positions), steps=10)
        written = to_frames(codec.decode(x)) / 255
        drawn = torch.stack([scores.draw(story, [10], 4, (64, 64))[0] for story in asked]).permute(0, 1, 3, 4, 2)
        far = (written[:, None] - drawn).square().mean((2, 3, 4, 5))            # (6 written, 6 drawn)
        right += (far.argmin(1) == torch.arange(6)).tolist()
    assert sum(right) >= 18, right                                  # of 24; chance is 4


# ---------------------------------------------------------------------------------------------------------------------
# Nothing is lost: killed runs, full disks, numbers that are not finite, broken and hostile files
# The long ones print a line of figures each: python -m pytest -q -m stress test_shapes.py

STAGES = [(pretrain, {}), (finetune, {"encoder": "none"})]


def posix(test):
    """For tests of Processes. A training before the first fork has made all the slow imports."""
    test = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes")(test)
    return pytest.mark.usefixtures("stage1")(test)


class Processes:
    """A script's main in `world` processes of its own, killed by kill(), joined by wait(). A fork has no imports to
    wait for; prepare(rank) runs in each before main. What they say goes to said."""

    def __init__(self, main, *flags, world=1, prepare=lambda rank: None):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.files = [Path(f"said-{port}-{rank}") for rank in range(world)]

        def work(rank):
            torch.set_num_threads(1)            # OpenMP's threads do not survive a fork: waiting for them hung, rarely
            for s in signal.SIGINT, signal.SIGTERM:
                signal.signal(s, signal.SIG_DFL if s == signal.SIGTERM else signal.default_int_handler)
            sys.stdout = sys.stderr = self.files[rank].open("w", buffering=1)
            faulthandler.dump_traceback_later(100, file=sys.stderr)             # wait() kills after 120 s: say where
            if world > 1:
                os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_PORT=str(port),
                                  MASTER_ADDR="127.0.0.1")
            tqdm.set_lock(threading.RLock())            # its own is shared by forks: a killed one may hold it for ever
            prepare(rank)
            run(main, *flags)
        fork = multiprocessing.get_context("fork")
        self.processes = [fork.Process(target=work, args=(rank,)) for rank in range(world)]
        for process in self.processes:
            process.start()

    def kill(self, rank=0, number=signal.SIGKILL):
        os.kill(self.processes[rank].pid, number)

    def wait(self):
        """The exit codes."""
        for process in self.processes:
            process.join(120)
            process.kill()
            process.join()
        return [process.exitcode for process in self.processes]

    @property
    def said(self):
        return [file.read_text() for file in self.files]


def finish(main, *flags, **more):
    """Processes that must end well."""
    processes = Processes(main, *flags, **more)
    assert set(processes.wait()) == {0}, "\n".join(processes.said)


def same(a, b):
    """Equal to the last bit?"""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list | tuple) else a == b


def assert_same_run(a, b):
    """Two run folders hold the same steps, pictures and weights, but for their times, and nothing else."""
    state, other = (torch.load(folder / "state.pt") for folder in (a, b))
    for part in "step", "model", "ema", "optimizers":
        assert same(state[part], other[part]), part
    assert same(load_file(a / "model.safetensors"), load_file(b / "model.safetensors"))
    logs = [[{k: v for k, v in json.loads(line).items() if k != "minutes"}
             for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (a, b)]
    assert logs[0] == logs[1] and sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())


def slow_saves(rank):
    """Make every save take about 0.2 s: files grow piece by piece, and their renaming waits."""
    def write(f, content):
        for i in range(0, len(content), len(content) // 8 + 1):
            f.write(content[i:i + len(content) // 8 + 1])
            f.flush()
            time.sleep(0.01)

    def save_slowly(state, f, real=torch.save):
        buffer = io.BytesIO()
        real(state, buffer)
        write(f, buffer.getvalue())

    def save_file_slowly(tensors, path, metadata=None):
        with open(path, "wb") as f:
            write(f, safetensors.torch.save(tensors, metadata))

    def replace_slowly(a, b, real=os.replace):
        time.sleep(0.01)
        real(a, b)
    torch.save, saving.save_file, os.replace = save_slowly, save_file_slowly, replace_slowly


def crash(stage, more, cache, times, in_saves, world=1, seed=0, steps=12):
    """Kill a run `times` times, each at another random moment of a run from the start, `in_saves` of them inside a
    save; each goes on and must end as the run `whole` that nothing happened to. Returns how many were in a save, how
    many had a checkpoint to go on from."""
    rng, out, counts = random.Random(seed), Path("killed"), [0, 0]
    given = flags(cache, steps=steps, save_every=3, **more)
    started = time.time()
    finish(stage.main, *given, "--out", "whole", world=world)
    lasts, done = time.time() - started, 0
    while done < times:
        shutil.rmtree(out, ignore_errors=True)
        slow = done < in_saves
        processes = Processes(stage.main, *given, "--out", out, world=world,
                              prepare=slow_saves if slow else lambda rank: None)
        if slow:                                                    # the k-th time that a file is begun
            for _ in range(rng.randint(1, 2 * steps // 3 - 1)):
                while not list(out.glob(".[ms]*.part/.*")) and processes.processes[0].is_alive():
                    time.sleep(0.001)
                time.sleep(rng.uniform(0, 0.12))
        else:
            time.sleep(rng.uniform(0, lasts))
        processes.kill(rng.randrange(world))                        # the others fail, for they have lost a peer
        if -signal.SIGKILL not in processes.wait():
            continue                                                # it was done already
        done += 1
        counts[0] += any(out.glob(".[ms]*.part"))
        counts[1] += (out / "state.pt").exists()
        finish(stage.main, *given, "--out", out, "--resume", world=world)
        (out / "model-step3.safetensors").unlink(missing_ok=True)   # killed in the first save: kept, as it may be work
        assert_same_run(Path("whole"), out)
    return counts


@posix
def test_a_killed_run_goes_on(cache):
    in_saves, _ = crash(pretrain, {}, cache, times=2, in_saves=2, steps=6)
    assert in_saves >= 1


@posix
@pytest.mark.stress
@pytest.mark.parametrize("stage, more", STAGES)
def test_20_killed_runs_go_on(stage, more, cache, capsys):
    started = time.time()
    in_saves, resumed = crash(stage, more, cache, times=20, in_saves=8, seed=1)
    assert in_saves >= 5
    with capsys.disabled():
        print(f"\ncrash resume, {stage.__name__}: 20 of 20 killed runs ended bit-identical, {in_saves} killed inside a "
              f"save, {resumed} with a checkpoint to go on from; {time.time() - started:.0f} s")


@posix
@pytest.mark.stress
def test_killed_runs_of_two_processes_go_on(cache, capsys):
    started = time.time()
    in_saves, resumed = crash(pretrain, {}, cache, times=6, in_saves=3, world=2, seed=2)
    with capsys.disabled():
        print(f"\ncrash resume, 2 processes: 6 of 6 ended bit-identical, {in_saves} killed inside a save, {resumed} "
              f"with a checkpoint to go on from; {time.time() - started:.0f} s")


def stop_at(step, number):
    """A prepare() that sends the first process a signal in this step, by itself."""
    def prepare(rank):
        if rank == 0:
            pretrain.take_step = take_step_with_signal(step, number)
    return prepare


@posix
def test_a_signal_to_one_process_stops_both_and_one_goes_on(cache, exact_adamw):
    given = flags(cache, steps=5, optimizer="adamw", lr=1e-3)
    finish(pretrain.main, *given, "--out", "whole")
    stopped = Processes(pretrain.main, *given, "--out", "parts", world=2, prepare=stop_at(2, signal.SIGINT))
    assert stopped.wait() == [130, 130] and "go on with --resume" in stopped.said[0] and len(losses("parts")) == 3
    finish(pretrain.main, *given, "--out", "parts", "--resume")     # another number of processes: the same samples
    assert losses("parts") == pytest.approx(losses("whole"), abs=1e-5)


@posix
def test_a_full_disk_leaves_the_old_checkpoint(cache):
    """No file may grow beyond a limit, which fails in the kernel as a full disk does."""
    import resource
    given, out = flags(cache, steps=4, save_every=2, out="run"), Path("run")
    finish(pretrain.main, *given, "--out", "whole")
    assert Processes(pretrain.main, *given, prepare=stop_at(1, signal.SIGTERM)).wait() == [143]
    before = (out / "state.pt").read_bytes()
    for most in "model.safetensors", "state.pt":                    # half of state.pt has room for model.safetensors
        limit = (out / most).stat().st_size // 2
        processes = Processes(pretrain.main, *given, "--resume",
                              prepare=lambda rank: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        assert processes.wait() == [1] and "Traceback" not in processes.said[0]
        line = [line for line in processes.said[0].splitlines() if line.startswith("error: ")]
        assert len(line) == 1 and most in line[0] and "File too large" in line[0]
        assert (out / "state.pt").read_bytes() == before and not list(out.glob(".*"))
    finish(pretrain.main, *given, "--resume")
    assert_same_run(Path("whole"), out)


@posix
def test_a_folder_that_is_read_only_or_gone(cache, tmp_path):
    shutil.copytree(cache, "cache")
    for folder in tmp_path, Path("cache"):
        folder.chmod(0o755)
    given, out = flags("cache", steps=4, out="run"), Path("run")
    finish(pretrain.main, *given, "--steps", 2)
    for file in [*Path("cache").iterdir(), *out.iterdir()]:
        file.chmod(0o644)
    out.chmod(0o555)
    before = {p: p.read_bytes() for p in out.iterdir()}
    processes = Processes(pretrain.main, *given, "--resume",        # root may write anywhere
                          prepare=lambda rank: os.geteuid() or os.setuid(65534))
    assert processes.wait() == [2] and "Permission denied" in processes.said[0] and "Traceback" not in processes.said[0]
    assert {p: p.read_bytes() for p in out.iterdir()} == before
    out.chmod(0o755)

    def prepare(rank, real=draw_retrieval):
        pretrain.draw_retrieval = lambda *a: shutil.rmtree(out, ignore_errors=True) or real(*a)
    processes = Processes(pretrain.main, *given, "--resume", prepare=prepare)
    assert processes.wait() == [1] and "Traceback" not in processes.said[0]
    assert "error: [Errno 2] No such file or directory: 'run/log.jsonl'" in processes.said[0]


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    for name in ".state.pt.123.part", ".model.safetensors.7.part":
        (tmp_path / name).mkdir()
        (tmp_path / name / ".tmpAbC").touch()
    keep = {".hidden.12.txt", "a.12.part", ".git", ".x.part", "log.jsonl"}
    for name in keep:
        (tmp_path / name).touch()
    video.remove_leftovers(tmp_path)
    assert set(os.listdir(tmp_path)) == keep
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    saving.start_log(tmp_path, 2)                                 # a line that a kill cut short
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.fixture
def exact_adamw(monkeypatch):
    """Float32, so that processes differ by the order of sums alone."""
    monkeypatch.setattr(pretrain, "autocast", lambda device: torch.autocast("cpu", enabled=False))


def gaps(cache, optimizer, steps, worlds, micro_batches=()):
    """{setting: largest difference of the losses at the first step, at the last, anywhere} from one process."""
    given = flags(cache, steps=steps, save_every=steps, optimizer=optimizer, lr=0.02 if optimizer == "muon" else 1e-3)
    finish(pretrain.main, *given, "--out", "1")
    found = {}
    for name, more, world in [*((f"{n} processes", (), n) for n in worlds),
                              *((f"4 x {n}" if n == 1 else f"micro-batch {n}", ("--micro_batch", n), 1)
                                for n in micro_batches)]:
        finish(pretrain.main, *given, "--out", name, *more, world=world)
        gap = np.abs(np.subtract(losses("1"), losses(name)))
        found[name] = gap[0], gap[-1], gap.max()
    return found


@posix
def test_processes_and_accumulation_give_equal_losses(cache, exact_adamw):
    for first, last, most in gaps(cache, "adamw", 6, worlds=[2], micro_batches=[1]).values():
        assert first < 1e-6 and most < 1e-5


@posix
@pytest.mark.stress
def test_equal_gradients_for_50_steps(cache, exact_adamw, capsys, monkeypatch, tmp_path):
    for optimizer in "adamw", "muon":
        (tmp_path / optimizer).mkdir()
        monkeypatch.chdir(tmp_path / optimizer)
        found = gaps(cache, optimizer, 50, worlds=[2, 4], micro_batches=[1])
        with capsys.disabled():
            print(f"\nequal gradients, {optimizer}: differences of the loss at step 1, step 50, most: " + "; ".join(
                f"{name} {a:.1e}, {b:.1e}, {c:.1e}" for name, (a, b, c) in found.items()))
        for first, last, _ in found.values():
            assert first < 1e-6 and (optimizer == "muon" or last < 1e-4)


@pytest.mark.parametrize("world", range(1, 9))
def test_processes_share_every_batch(world, monkeypatch):
    class Enough(Exception):
        pass
    clips = Clips([Clip(torch.zeros(16, 4, 8, 8), []) for _ in range(29)])
    for batch, micro in (8, 8), (9, 2), (13, 1):
        seen = []

        def draw(config, tools, some, rows, step):
            seen.extend(id(some[row]) for row in rows)
            return SimpleNamespace(to=lambda device: SimpleNamespace(
                **dict.fromkeys("hr lr target frames noise t text".split())))

        class Model:
            no_sync = contextlib.nullcontext
            __call__ = lambda self, *a: torch.zeros(1, requires_grad=True)                  # noqa: E731
        per_epoch = 29 // batch
        config = pretrain.PretrainConfig(batch=batch, micro_batch=micro, steps=per_epoch)
        for rank in range(world):
            tools = SimpleNamespace(device=torch.device("cpu"), rank=rank, world_size=world)
            batches = pretrain.draws(config, tools, draw, clips, 0)
            for step in range(per_epoch):
                pretrain.accumulate_gradients(config, tools, Model(), batches)
            assert next(batches, None) is None
        assert sorted(seen) == sorted(set(seen)) and len(seen) == per_epoch * batch


def test_the_same_seed_gives_the_same_files(cache, tmp_path, monkeypatch):
    write_video("clip.mp4", 10)
    for folder in "a", "b":
        Path(folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        run(finetune.main, *flags(cache, out="run", encoder="none"))
        run(sample.main, "--history", "../clip.mp4", "--checkpoint", "run/model.safetensors", "--seconds=3",
            "--steps=2", "--save_file=run/a.mp4")
        monkeypatch.chdir(tmp_path)
    files = sorted(p.name for p in Path("a/run").iterdir() if p.name != "log.jsonl")
    assert {"model.safetensors", "state.pt", "a.mp4", "a.png", "preview_000003.png"} == set(files)
    assert all(Path("a/run", name).read_bytes() == Path("b/run", name).read_bytes() for name in files)


def watch(steps, bad):
    """A prepare(): at the start of each step this process notes the hash of its weights, averages and optimizers in
    steps-RANK; bad(rank, step) names what is not a number then: "batch" or "gradient"."""
    def prepare(rank):
        """Before main, in the process of this rank."""
        now = []                                                    # the steps begun so far

        def take_step(config, tools, ddp, optimizers, ema, batches, step, real=pretrain.take_step):
            if not now:
                ema.params[0].register_hook(lambda g: g * math.nan if bad(rank, now[-1]) == "gradient" else g)
            now.append(step)
            states = [x for o in optimizers for s in o.state.values() for x in s.values()]
            digest = hashlib.sha256()
            for tensor in [*ema.params, *ema.shadow, *states]:
                digest.update(tensor.detach().numpy().tobytes())
            with open(f"{steps}-{rank}", "a") as f:
                f.write(digest.hexdigest() + "\n")
            return real(config, tools, ddp, optimizers, ema, batches, step)

        def draw(config, tools, clips, rows, step, real=draw_retrieval):
            batch = real(config, tools, clips, rows, step)          # for training in a thread, where gradients are on
            if torch.is_grad_enabled() and bad(rank, step) == "batch":
                batch.target[0, 0, 0, 0, 0] = math.nan
            return batch
        pretrain.take_step, pretrain.draw_retrieval = take_step, draw
    return prepare


@posix
def test_numbers_that_are_not_finite_change_nothing(cache):
    bad = lambda rank, step: {2: "batch", 4: "gradient"}.get(step) if rank == 1 else None   # noqa: E731
    processes = Processes(pretrain.main, *flags(cache, steps=7, out="run"), world=2, prepare=watch("steps", bad))
    assert processes.wait() == [0, 0], processes.said
    hashes, other = (Path(f"steps-{rank}").read_text().split() for rank in (0, 1))
    assert hashes == other and len(hashes) == 7
    assert [i for i in range(6) if hashes[i] == hashes[i + 1]] == [2, 4]
    log = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "skipped" in entry] == [3, 5] and "step 3: the" in processes.said[0]


@posix
def test_processes_start_alike_or_not_at_all(cache):
    """A processor of another kind may draw other weights; a folder that is not shared has no checkpoint."""
    def prepare(rank, made=pretrain.make_model):
        def make_model(*given):
            trained = made(*given)
            for p in trained.parameters():
                p.data += rank
            return trained
        pretrain.make_model = make_model
        watch("steps", lambda *a: False)(rank)
    given = flags(cache, steps=2, out="run")
    processes = Processes(pretrain.main, *given, world=2, prepare=prepare)
    assert processes.wait() == [0, 0], processes.said
    assert Path("steps-0").read_text() == Path("steps-1").read_text()

    def elsewhere(rank, real=pretrain.resume):
        pretrain.resume = lambda *a: 0 if rank else real(*a)
    processes = Processes(pretrain.main, *given, "--steps", 3, "--resume", world=2, prepare=elsewhere)
    assert processes.wait() == [2, 2] and "checkpoints of steps [0, 2]" in processes.said[0], processes.said


@posix
def test_too_many_of_them_stop_the_run(cache):
    given = flags(cache, steps=30, save_every=2, out="run")
    bad = lambda rank, step: "batch" if step >= 2 else None                                 # noqa: E731
    processes = Processes(pretrain.main, *given, prepare=watch("steps", bad))
    assert processes.wait() == [1] and "Traceback" not in processes.said[0]
    assert "error: the gradient was not finite 10 times in a row, up to step 12;" in processes.said[0]
    assert len(set(Path("steps-0").read_text().split())) == 3
    assert torch.load("run/state.pt")["step"] == 10 and len(losses("run")) == 12
    state = torch.load("run/state.pt")
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    finish(pretrain.main, *given, "--resume", "--steps", 11)


@posix
def test_the_limit_of_bad_videos_is_of_all_processes(tmp_path):
    """Four of twelve are bad, two in the first shards of each process: neither alone has above 20 % of all."""
    names = [next(name for name in map("{}.mp4".format, itertools.count()) if caching.shard_of(name, 12) == k)
             for k in range(12)]
    for k, name in enumerate(names):
        write_video(tmp_path / "videos" / name, 12, k)
        if k < 4:
            (tmp_path / "videos" / name).write_text("not a video")
    processes = Processes(data.main, "cache", "--videos", "videos", "--out", "shards", "--preset", "tiny", "--shard", 1,
                          world=2)
    assert 2 in processes.wait() and re.search("[34] of 12 videos in videos cannot be used", "".join(processes.said))
    assert sum("skipped: " in line for said in processes.said for line in said.splitlines()) >= 3
    assert len(list(Path("shards").glob("shard-*.json"))) < 12 and not Path("shards/manifest.json").exists()


def claim_size(path, width, height):
    """Let a gif say that it is of another size."""
    content = bytearray(path.read_bytes())
    content[6:10] = struct.pack("<HH", width, height)
    path.write_bytes(content)


def test_a_folder_of_broken_videos(tmp_path, capsys):
    folder = tmp_path / "videos"
    for i in range(40):                                             # the same few under many names
        if i < 4:
            write_video(folder / f"good{i}.mp4", 10 + i, i)
        else:
            shutil.copy(folder / f"good{i % 4}.mp4", folder / f"good{i}.mp4")
    write_raw(folder / "odd.mkv", greys(12, 33, 35), "ffv1", "bgr0", times=[500 * i for i in range(12)])
    good = (folder / "good0.mp4").read_bytes()
    Image.new("RGB", (32, 32)).save(folder / "picture.png")
    (folder / "picture.png").rename(folder / "picture.mp4")
    (folder / "truncated.mp4").write_bytes(good[:len(good) // 8])
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("not a video\n" * 50)
    write_video(folder / "one.mp4", 1)
    write_sound(folder / "sound.mp4")
    with VideoWriter(folder / "huge.gif", 2, 32, 32) as w:
        w.write(greys(10, 32, 32))
    claim_size(folder / "huge.gif", 16000, 16000)
    torch.save(Bomb(), folder / "pickle.mp4")
    with av.open(str(folder / "thin.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=2)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(1, 20)
        for frame in greys(10, 32, 32).numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode(None))
    write_raw(folder / "late.mkv", greys(12, 32, 32), "ffv1", "bgr0", times=[*range(0, 5500, 500), 10**9])
    bad = {"thin.mp4", "late.mkv", "picture.mp4", "truncated.mp4", "empty.mp4", "text.mp4", "one.mp4", "sound.mp4",
           "huge.gif", "pickle.mp4"}

    def reported(skipped):
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped: ")]
        assert len(lines) == skipped and {name for name in bad if not any(name in line for line in lines)} == set()
    train, held_out = data.video_clips(folder, TINY, DCTCodec(), tmp_path / "cache")
    reported(10)
    frames = sorted(clip.frames for clip in [*train.clips, *held_out.clips])
    assert frames == sorted([*range(10, 14)] * 10 + [12])           # nothing in the place of what was skipped
    shards = cached(folder)
    reported(10)
    train, held_out = data.cached_clips(shards, TINY, DCTCodec(), 99)
    assert sorted(clip.frames for clip in [*train.clips, *held_out.clips]) == frames
    for i in range(10):
        (folder / f"good{i}.mp4").unlink()
    with pytest.raises(UserError, match="10 of 41 videos"):
        data.video_clips(folder, TINY, DCTCodec(), tmp_path / "cache")
    with pytest.raises(UserError, match="9 of 41 videos"):
        cached(folder)
    assert not Path("exploded").exists()


def test_a_damaged_cache_is_named(cache, tmp_path):
    shutil.copytree(cache, "cache")
    path = next(Path("cache").glob("world-train-8-*"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{path.name} is damaged: delete it"):
        world_clips("train", 8, TINY, DCTCodec(), "cache")


def lying_header(shape, size):
    """The start of a safetensors file whose header claims a tensor of this shape."""
    header = json.dumps({"head.head.bias": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads the memory in use from /proc")
def test_weights_that_claim_terabytes_take_no_memory(tmp_path):
    """In a process of its own that may take 256 MiB more than it holds."""
    contents = [struct.pack("<Q", 2**42) + b"{}", struct.pack("<Q", 2**63 - 1) + b" " * 99,
                lying_header([2**40], 2**42) + bytes(64), lying_header([2**40], 64) + bytes(64)]
    for i, content in enumerate(contents):
        Path(f"{i}.safetensors").write_bytes(content)
    script = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import model
import weights
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 2**28, held + 2**28))
for i in range(4):
    for read in (weights.read_metadata, lambda path: weights.load_base(model.DiT(model.PRESETS["nano"].dit), path)):
        try:
            read(f"{i}.safetensors")
        except model.UserError as e:
            print(e)
"""
    done = subprocess.run([sys.executable, "-c", script, str(HERE)], capture_output=True, text=True, timeout=100,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is not a readable safetensors file") == 8, done.stdout


@pytest.mark.parametrize("damage, says", [
    (lambda s: s["model"].pop("dit.head.head.bias"), "dit.head.head.bias"),
    (lambda s: s["model"].update(spare=torch.ones(2)), "spare"),
    (lambda s: s["model"].update({"dit.head.head.bias": torch.ones(1).expand(2**40)}), "dit.head.head.bias"),
    (lambda s: s["model"]["dit.head.head.bias"].fill_(math.nan), "dit.head.head.bias"),
    (lambda s: s.pop("ema"), "cannot be read"), (lambda s: s.update(bomb=Bomb()), "cannot be read"),
    ("truncated", "cannot be read"), ("empty", "cannot be read")])
def test_a_hostile_state_changes_nothing(damage, says, stage1, refused, cache, monkeypatch):
    shutil.copytree(stage1, "run")
    path = Path("run/state.pt")
    if callable(damage):
        state = torch.load(path)
        damage(state)
        torch.save(state, path)
    else:
        path.write_bytes(path.read_bytes()[:-100] if damage == "truncated" else b"")
    loaded = []
    monkeypatch.setattr(MemoryDiT, "load_state_dict", lambda *a, **k: loaded.append(a))
    assert says in refused(pretrain.main, *flags(cache, out="run", steps=41, resume=True))
    assert not loaded and not Path("exploded").exists()


def resident(pid="self"):
    """Bytes of memory that this process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


linux = pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads the memory in use from /proc")


@linux
@pytest.mark.stress
@pytest.mark.parametrize("stage, more", STAGES)
def test_memory_of_1000_steps(stage, more, cache, monkeypatch, capsys):
    found = []
    monkeypatch.setattr(pretrain, "accumulate_gradients", lambda *a, real=pretrain.accumulate_gradients: (
        found.append(resident()), real(*a))[1])
    run(stage.main, *flags(cache, out="run", steps=1200, batch=2, save_every=100, **more))
    growth = max(found[-100:]) / max(found[100:200]) - 1
    with capsys.disabled():
        print(f"\nmemory, {stage.__name__}: {growth:+.2%} from steps 101 to 200 on to steps 1101 to 1200, 12 saves "
              f"among them ({max(found) / 2**20:.0f} MiB)")
    assert growth < 0.01


@linux
@pytest.mark.stress
def test_memory_of_200_sections(monkeypatch, capsys):
    found, tokens = [], []

    def watched(config, *a, real=Memory.append):
        real(config, *a)
        found.append(resident())
        context = config.context()
        tokens.append(context[0].shape[1])
    monkeypatch.setattr(Memory, "append", watched)
    write_video("clip.mp4", 40)
    for seconds in 20, 0:
        found.clear(), tokens.clear()
        run(sample.main, "--history", "clip.mp4", "--checkpoint", write_checkpoint(), "--seconds", 400, "--steps", 1,
            "--memory_seconds", seconds, "--save_file", "a.mp4")
        growth = max(found[-20:]) - max(found[10:30])
        with capsys.disabled():
            print(f"\nmemory of {len(found) - 1} sections, --memory_seconds {seconds}: {growth / 2**20:+.2f} MiB of "
                  f"{max(found) / 2**20:.0f} from sections 10-30 to the last 20; {tokens[10]} to {tokens[-1]} tokens")
        assert len(found) == 201 and growth < 0.01 * max(found)
        assert seconds == 0 or tokens[10] == tokens[-1]


@pytest.mark.stress
def test_saving_costs_little(cache, monkeypatch, capsys):
    """At the defaults of stage 1: the nano preset, a batch of 8, a save every 250 steps."""
    saves, steps = [], []

    def timed(*a, real=pretrain.save):
        started = time.time()
        real(*a)
        saves.append(time.time() - started)
    monkeypatch.setattr(pretrain, "save", timed)
    monkeypatch.setattr("figures.evaluate_all", lambda *a: ({}, None))
    monkeypatch.setattr(pretrain, "accumulate_gradients", lambda *a, real=pretrain.accumulate_gradients: (
        steps.append(time.time()), real(*a))[1])
    run(pretrain.main, *flags(cache, preset="nano", out="run", steps=8, batch=8, save_every=4))
    step = np.median(np.diff(steps)[[0, 1, 2, 4, 5, 6]])            # but for the one with the save
    with capsys.disabled():
        print(f"\ncost of saving: {max(saves):.2f} s every 250 steps of {step:.2f} s, {max(saves) / (250 * step):.2%}")
    assert max(saves) < 0.05 * 250 * step
