"""The DiT against a plain one, Wan's own outputs and diffusers; memory and positions; rectified flow; the sampler."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file

import pretrain
from bench.nets import diffusers_dit
from data import story_clips
from encoder import MemoryDiT
from model import DiT, DiTConfig, add_noise, token_positions
from sample import sample
from tests.common import ROOT, SHARED, flags, losses, randn, randomize, run, smaller, tiny_base
from util import attention

FIXTURES = ROOT / "tests" / "fixtures"  # outputs of Wan's own code for tiny random weights
# heads of width 20 give the axes of RoPE unequal shares: 8 + 6 + 6
CONFIG = DiTConfig(dim=40, ffn_dim=80, heads=2, layers=2, in_dim=4, out_dim=4, text_dim=16, text_len=6, freq_dim=32)


def tiny_dit(seed=0, **changes):
    return randomize(DiT(dataclasses.replace(CONFIG, **changes)), seed)


# ---------------------------------------------------------------------------------------------------------------------
# The DiT


class PlainDiT:
    """Wan's forward pass again, plainly: one sample in float64, a timestep per token, RoPE in complex numbers."""

    def __init__(self, dit):
        self.config = dit.config
        self.weights = {name: p.double() for name, p in dit.state_dict().items()}

    def linear(self, name, y):
        return y @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def silu(self, y):
        return y / (1 + torch.exp(-y))

    def gelu(self, y):
        return 0.5 * y * (1 + torch.tanh((2 / math.pi) ** 0.5 * (y + 0.044715 * y**3)))

    def layer_norm(self, y):
        centred = y - y.mean(-1, keepdim=True)
        return centred / (y.var(-1, correction=0, keepdim=True) + self.config.eps).sqrt()

    def rms_norm(self, name, y):
        return y / (y.square().mean(-1, keepdim=True) + self.config.eps).sqrt() * self.weights[f"{name}.weight"]

    def attention(self, name, y, context, phases=None):
        """phases (tokens, 1, head_dim / 2), complex: rotate queries and keys by them."""
        q = self.rms_norm(f"{name}.norm_q", self.linear(f"{name}.q", y))
        k = self.rms_norm(f"{name}.norm_k", self.linear(f"{name}.k", context))
        v = self.linear(f"{name}.v", context)
        q, k, v = (z.unflatten(-1, (self.config.heads, -1)) for z in (q, k, v))
        if phases is not None:
            q, k = self.rotate(q, phases), self.rotate(k, phases)
        weights = (torch.einsum("nhd,mhd->hnm", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        if phases is not None and self.config.rotate_values:
            read = self.rotate(torch.einsum("hnm,mhd->nhd", weights, self.rotate(v, phases)), phases.conj())
        else:
            read = torch.einsum("hnm,mhd->nhd", weights, v)
        return self.linear(f"{name}.o", read.flatten(1))

    def rotate(self, y, phases):
        return torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * phases).flatten(-2)

    def phases(self, places):
        d = self.config.dim // self.config.heads
        axes = (d - 4 * (d // 6), 2 * (d // 6), 2 * (d // 6))
        angles = [places[:, a, None] * 10000.0 ** (-torch.arange(0, n, 2).double() / n) for a, n in enumerate(axes)]
        return torch.exp(1j * torch.cat(angles, 1))[:, None]

    def embed_times(self, times):
        """Timesteps (tokens,) -> embedding (tokens, D) and modulation (tokens, 6, D)."""
        half = self.config.freq_dim // 2
        angle = times[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
        e = self.linear("time_embedding.0", torch.cat([angle.cos(), angle.sin()], 1))
        e = self.linear("time_embedding.2", self.silu(e))
        return e, self.linear("time_projection.1", self.silu(e)).unflatten(1, (6, -1))

    def embed_text(self, text):
        padding = torch.zeros(self.config.text_len - len(text), self.config.text_dim).double()
        hidden = self.gelu(self.linear("text_embedding.0", torch.cat([text, padding])))
        return self.linear("text_embedding.2", hidden)

    def block(self, name, x, modulation, text, phases):
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.weights[f"{name}.modulation"] + modulation).unbind(1)
        y = self.layer_norm(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attention(f"{name}.self_attn", y, y, phases)
        y = self.layer_norm(x) * self.weights[f"{name}.norm3.weight"] + self.weights[f"{name}.norm3.bias"]
        x = x + self.attention(f"{name}.cross_attn", y, text)
        y = self.layer_norm(x) * (1 + scale2) + shift2
        return x + gate2 * self.linear(f"{name}.ffn.2", self.gelu(self.linear(f"{name}.ffn.0", y)))

    def __call__(self, video, t, text, frames, tokens, places):
        """video (C, F, H, W), t a float, text (L, text_dim), frames (F,), memory tokens (M, D) at places (M, 3)."""
        x, places, times = list(tokens), [p.tolist() for p in places], [0.0] * len(tokens)
        n_frames, height, width = video.shape[1:]
        corners = list(itertools.product(range(n_frames), range(0, height, 2), range(0, width, 2)))
        for f, i, j in corners:
            patch = video[:, f, i : i + 2, j : j + 2].flatten()
            kernel, bias = self.weights["patch_embedding.weight"], self.weights["patch_embedding.bias"]
            x.append(kernel.flatten(1) @ patch + bias)
            places.append([float(frames[f]), i / 2, j / 2])
            times.append(t)
        x, phases = torch.stack(x), self.phases(torch.tensor(places).double())
        e, modulation = self.embed_times(torch.tensor(times).double())
        text = self.embed_text(text)
        for i in range(self.config.layers):
            x = self.block(f"blocks.{i}", x, modulation, text, phases)
        shift, scale = self.weights["head.modulation"][0, 0] + e, self.weights["head.modulation"][0, 1] + e
        out = self.linear("head.head", self.layer_norm(x) * (1 + scale) + shift)[len(tokens) :]
        result = torch.zeros_like(video)
        for y, (f, i, j) in zip(out, corners):
            patch = y.view(2, 2, self.config.out_dim)  # channels last in a patch
            result[:, f, i : i + 2, j : j + 2] = patch.permute(2, 0, 1)
        return result


@pytest.mark.parametrize("rotate_values", [False, True])
@pytest.mark.parametrize("M", [0, 7])
@torch.no_grad()
def test_the_dit_equals_a_plain_one(M, rotate_values):
    dit = tiny_dit(rotate_values=rotate_values)
    x, text, t = randn(2, 4, 3, 4, 6), randn(2, 5, 16, seed=1), torch.tensor([731.0, 12.5])
    frames = torch.tensor([[0, 1, 2], [17.25, 40, 3]])
    tokens, places = randn(2, M, 40, seed=2), 20 * randn(2, M, 3, seed=3)
    v = dit(x, t, text, frames, (tokens, places) if M else None)
    assert v.std() > 0.1
    plain = PlainDiT(dit)
    for b in range(2):
        expected = plain(x[b].double(), t[b].item(), text[b].double(), frames[b], tokens[b].double(), places[b])
        assert (v[b] - expected).abs().max() < 1e-5


def load_fixture(name):
    """(what its .json says, tensors, the DiT with its weights) of outputs of Wan's own code."""
    folder = FIXTURES if (FIXTURES / f"{name}.json").is_file() else SHARED / "fixtures"
    if not (folder / f"{name}.json").is_file():
        pytest.skip(f"{name} is not in tests/fixtures: it would make the repository too large")
    about, tensors = json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")
    c = about["config"]
    same = ("dim", "ffn_dim", "in_dim", "out_dim", "text_dim", "text_len", "freq_dim", "eps")
    config = {key: c[key] for key in same} | dict(heads=c["num_heads"], layers=c["num_layers"])
    dit = DiT(DiTConfig(patch=tuple(c["patch_size"]), **config))
    dit.load_state_dict({key[2:]: v for key, v in tensors.items() if key.startswith("w.")}, strict=True)
    return about, tensors, dit


@pytest.mark.parametrize("case", "abc")
@pytest.mark.parametrize("name", ["wan_tiny", "wan_tiny_eps"])
@torch.no_grad()
def test_the_dit_equals_wan(name, case):
    about, tensors, dit = load_fixture(name)
    assert f"in.{case}.x0" in tensors
    for i in range(about["cases"][case]["batch"]):
        names = f"in.{case}.x{i}", f"in.{case}.context{i}", f"out.{case}.x{i}"
        x, context, out = (tensors[name][None] for name in names)
        assert (dit(x, tensors[f"in.{case}.t"][i : i + 1], context) - out).abs().max() < 1e-5


@pytest.mark.parametrize("case", "abc")
@torch.no_grad()
def test_the_dit_equals_wan_2_2(case):
    """TI2V-5B's; in case c the first latent frame is clean, at t = 0, which here is memory."""
    about, tensors, dit = load_fixture("wan22_tiny")
    x, t, out = (tensors[f"{kind}.{case}{part}"] for kind, part in (("in", ".x"), ("in", ".t"), ("out", "")))
    lone = case == "c"
    assert about["cases"][case]["kind"] == ("first frame clean" if lone else "one timestep")
    first, times = dit.patch_embedding(x[:, :, :lone]), torch.arange(lone, x.shape[2])
    memory = first, token_positions(torch.arange(int(lone)), x.shape[3] // 2, x.shape[4] // 2)
    for i in range(len(x)):
        text = tensors[f"in.{case}.context{i}"][None]
        row = slice(i, i + 1)
        v = dit(x[row, :, lone:], t[row], text, times, (memory[0][row], memory[1]))
        assert (v - out[row, :, lone:]).abs().max() < 1e-5 and v.std() > 0.1


@pytest.mark.optional
@torch.no_grad()
def test_the_dit_equals_that_of_diffusers(tmp_path):
    pytest.importorskip("diffusers")
    theirs = randomize(diffusers_dit(tiny_dit()))
    theirs.save_pretrained(tmp_path)  # a folder with diffusers' names
    with torch.device("meta"):
        ours = DiT(CONFIG)
    tiny_base().load_dit(ours, tmp_path)
    x, t, text = randn(2, 4, 3, 4, 6), torch.tensor([300.0, 900.0]), randn(2, 6, 16, seed=1)
    expected = theirs(hidden_states=x, timestep=t, encoder_hidden_states=text, return_dict=False)[0]
    assert (ours(x, t, text) - expected).abs().max() < 1e-5 and expected.std() > 0.1


@pytest.mark.parametrize("rotate_values", [False, True])
@torch.no_grad()
def test_memory_is_placed_by_positions_alone(rotate_values):
    dit = tiny_dit(rotate_values=rotate_values)
    x, t, text = randn(1, 4, 2, 4, 4), torch.tensor([400.0]), randn(1, 6, 16)
    tokens, places = randn(1, 3, 40), randn(3, 3)
    alone = dit(x, t, text)
    assert torch.equal(alone, dit(x, t, text, None, (tokens[:, :0], places[:0])))
    near = dit(x, t, text, torch.tensor([5, 6]), (tokens, places))
    assert (near - alone).abs().max() > 1e-3
    swapped = dit(x, t, text, torch.tensor([5, 6]), (tokens[:, [2, 0, 1]], places[[2, 0, 1]]))
    assert torch.allclose(near, swapped, atol=1e-5)  # a token's place in the sequence means nothing
    # only distances count, and there is no longest video: Wan's own table of rotations ends at 1024
    far = dit(x, t, text, torch.tensor([5005, 5006]), (tokens, places + torch.tensor([5000, 0, 0])))
    assert torch.allclose(near, far, atol=1e-4)
    assert (dit(x, t, text, torch.tensor([5, 7]), (tokens, places)) - near).abs().max() > 1e-3


def test_gradients_reach_all_weights_and_the_memory():
    dit, tokens = tiny_dit(), randn(1, 3, 40).requires_grad_()
    dit(randn(1, 4, 2, 4, 4), torch.tensor([400.0]), randn(1, 6, 16), None, (tokens, randn(3, 3))).sum().backward()
    # softmax ignores a bias of the keys that are not rotated
    assert all(p.grad.abs().max() > 0 for name, p in dit.named_parameters() if "cross_attn.k.bias" not in name)
    assert (tokens.grad.abs().amax(-1) > 0).all()


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("n, m", [(16, 16), (700, 5), (1500, 1500)])  # bf16: rows together, alone, by SDPA
@pytest.mark.parametrize("piece", [2**14, attention.PIECE])
def test_attention_is_softmax_attention_at_any_length(n, m, dtype, error, piece, monkeypatch):
    monkeypatch.setattr(attention, "PIECE", piece)
    q, k, v = (randn(3, 2, x, 8, seed=s).to(dtype).requires_grad_() for s, x in enumerate((n, m, m)))
    out = attention.attention(q, k, v)
    exact = [z.detach().double().requires_grad_() for z in (q, k, v)]
    plain = (exact[0] @ exact[1].mT / 8**0.5).softmax(-1) @ exact[2]
    assert (out - plain).abs().max() < error
    with torch.no_grad():
        assert (attention.attention(q, k, v) - plain).abs().max() < error
    out.sum().backward()
    plain.sum().backward()
    for z, true in zip((q, k, v), exact):
        assert (z.grad - true.grad).abs().max() < error * (1 + true.grad.abs().max())


@pytest.mark.parametrize("rotate_values", [False, True])
@torch.no_grad()
def test_rotations_are_the_same_compiled(rotate_values, monkeypatch):
    """The compiler takes another path: it knows no complex numbers."""
    dit = tiny_dit(rotate_values=rotate_values)
    x, t, text = randn(2, 4, 2, 4, 6), torch.tensor([300.0, 900.0]), randn(2, 6, 16, seed=1)
    memory = randn(2, 3, 40, seed=2), randn(3, 3, seed=3)
    eager = dit(x, t, text, memory=memory)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert (dit(x, t, text, memory=memory) - eager).abs().max() < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Rectified flow


def test_flow_runs_from_data_to_noise():
    x0, noise = randn(2, 4, 3, 2, 2), randn(2, 4, 3, 2, 2, seed=1)
    assert torch.equal(add_noise(x0, noise, torch.zeros(2)), x0)
    assert torch.equal(add_noise(x0, noise, torch.ones(2)), noise)
    assert torch.allclose(add_noise(x0, noise, torch.tensor([0.25, 1]))[0], 0.75 * x0[0] + 0.25 * noise[0])


@torch.no_grad()
def test_the_model_is_the_dit_given_the_encoded_history():
    base = tiny_base()
    model, high = randomize(MemoryDiT(base)), randn(2, 16, 8, 8, 8)
    low = smaller(high, model.encoder.rate)
    x_t, text, times = randn(2, 16, 3, 8, 8, seed=1), randn(2, 24, 16), torch.tensor([[1, 5, 6], [0, 2, 9]])
    v = model(high, low, x_t, torch.tensor([0.3, 0.8]), text, times)
    memory = model.encoder.encode(high, low)
    expected = model.dit(x_t, torch.tensor([300.0, 800.0]), text, times, memory)  # the DiT counts t to 1000
    assert (v - expected).abs().max() < 1e-5 and expected.std() > 0.1


def test_the_loss_is_the_squared_error_of_the_velocity(cache):
    """A fresh DiT returns zero, so the first loss is the mean square of the target ε - x_0."""
    run(pretrain.main, *flags(cache, out="a", steps=1, batch=4))
    config, base = pretrain.PretrainConfig(preset="tiny", init="random", batch=4), tiny_base()
    pretrain.check(config)
    encoder = MemoryDiT(base, config.method, config.rate).encoder
    clips = story_clips("train", 8, base, cache, encoder.low_rate)
    chosen = [clips[i] for i in clips.batch(0, config.batch, config.seed)]
    batch = pretrain.draw_retrieval(config, base, encoder, chosen, range(4), 0)
    assert losses("a") == pytest.approx([(batch.noise - batch.target).square().mean().item()], rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The sampler


def test_sampling_with_the_true_velocity_finds_the_data():
    x0, noise = randn(2, 4, 3, 2, 2), randn(2, 4, 3, 2, 2, seed=1)
    seen = []

    def oracle(x, t, text, times, memory):
        seen.append(t[0].item() / 1000)
        return (x - x0) / (t / 1000).view(-1, 1, 1, 1, 1)

    for steps, shift in (1, 1), (7, 1), (4, 3):
        assert torch.allclose(sample(oracle, noise, torch.zeros(2, 1, 1), None, None, steps, shift), x0, atol=1e-5)
    assert seen[-4:] == pytest.approx([1, 0.9, 0.75, 0.5])  # 3 t / (1 + 2 t)


@pytest.mark.parametrize("guidance, v, calls", [(1, 2.0, [True] * 2), (3, 5.0, [True, False] * 2), (0, 0.5, None)])
def test_guidance_moves_away_from_no_prompt_and_keeps_the_memory(guidance, v, calls):
    with_prompt, memories = [], []

    def dit(x, t, text, times, memory):
        with_prompt.append(text.any().item())
        memories.append(memory)
        return torch.full_like(x, 2.0 if text.any() else 0.5)

    x = sample(dit, torch.zeros(1, 4, 1, 2, 2), torch.ones(1, 2, 3), None, "memory", 2, 1, guidance)
    assert x.flatten().tolist() == pytest.approx([-v] * 16)
    assert with_prompt == (calls or [True, False] * 2) and set(memories) == {"memory"}
