"""budget: its predictions against tokens, FLOPs and tensors that are counted while the real modules run, on tensors
without content where they are large."""

import contextlib
import dataclasses
import re
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import model
from bases import open_base
from bases.wan import WanCodec
from bases.wan22 import Wan22Codec
from bench import budget
from encoder import MemoryDiT
from model import DiT, DiTConfig
from tests.common import randn, run, script, tiny_base, tiny_encoder

CONFIG = DiTConfig(dim=40, ffn_dim=80, heads=2, layers=2, in_dim=4, out_dim=4, text_dim=16, text_len=6, freq_dim=32)
RATES = {"4x4x2": 80, "2x2x2": 320, "2x2x1": 640, "4x4x4": 40, "1x1x1": 2560, "8x8x1": 40}  # tokens of 40 nano frames


# ---------------------------------------------------------------------------------------------------------------------
# Tokens and parameters


def test_tokens_are_counted_by_hand():
    wan, nano = open_base("wan-14b"), open_base("nano")
    assert [budget.memory_tokens(wan, (480, 832), "4x4x2", n) for n in (81, 121)] == [4264, 6344]
    assert [budget.frame_tokens(wan, size) for size in wan.sizes] == [1560, 1560, 39 * 39]
    assert budget.memory_tokens(wan, (624, 624), "2x2x1", 81) == 81 * 20 * 20
    assert {rate: budget.memory_tokens(nano, (128, 128), rate, 40) for rate in RATES} == RATES
    assert budget.paper_tokens() == 5460 and budget.paper_tokens(latents=2) == 7 * 13
    # of 39 nano latents, 36 are compressed and 3 wait; Wan's first latent stands alone, so none of 81 waits
    assert budget.most_memory_tokens(nano, (128, 128), "4x4x2") == 36 // 2 * 2 * 2 + 3 * 64
    assert budget.most_memory_tokens(wan, (480, 832), "4x4x2") == 4264


@pytest.mark.parametrize("preset", ["tiny", "tiny-wan"])
@pytest.mark.parametrize("frames", [1, 4, 5, 8, 11])  # some do not fill a segment
@torch.no_grad()
def test_tokens_are_as_many_as_the_encoder_makes(preset, frames):
    base, encoder = tiny_base(preset), tiny_encoder(preset=preset)
    size = [4 * stride for stride in base.codec.stride[1:]]  # 4 x 4 latents: one token per memory frame
    whole = budget.memory_tokens(base, size, "4x4x2", encoder.whole(frames))
    tokens, _ = encoder.encode(torch.zeros(1, 16, frames, 4, 4), torch.zeros(1, 16, whole, 1, 1))
    assert tokens.shape[1] == budget.memory_tokens(base, size, "4x4x2", frames)


def test_parameters_of_a_lora():
    linears = [m for m in DiT(CONFIG).blocks.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 10 * CONFIG.layers
    assert budget.lora_parameters(CONFIG, 3) == sum(3 * (m.in_features + m.out_features) for m in linears)


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs


def counted_flops(job):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        job()
    return counter.get_total_flops()


def attention_by_products(q, k, v):
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


@pytest.fixture
def countable_attention(monkeypatch):
    """torch's counter does not know all CPU kernels of SDPA."""
    monkeypatch.setattr(model, "attention", attention_by_products)


@pytest.mark.parametrize("M, options", [(0, {}), (7, {}), (7, {"cached": True}), (7, {"cross_attention": True})])
def test_flops_of_the_dit_are_those_that_torch_counts(M, options, countable_attention):
    c = dataclasses.replace(CONFIG, out_dim=3)
    dit, memory = DiT(c), (randn(1, M, c.dim), torch.zeros(M, 3)) if M else None
    if "cross_attention" in options:
        dit.add_cross_attention()
    if "cached" in options:
        memory = dit.cache_memory(*memory)
    x, t, text = randn(1, 4, 3, 4, 6), torch.tensor([5.0]), randn(1, 2, 16)
    assert budget.flops(c, 3 * 2 * 3, M, **options) == counted_flops(lambda: dit(x, t, text, memory=memory))


@pytest.mark.parametrize("preset, expected", [("wan-1.3b", 283e12), ("wan-14b", 1678e12)])
def test_flops_of_wan_are_those_that_are_published(preset, expected):
    assert budget.flops(open_base(preset).dit, 32760) == pytest.approx(expected, rel=2e-3)  # 81 frames of 480 x 832


def test_the_cost_of_the_encoder_grows_with_its_history(countable_attention):
    base, real = tiny_base(), tiny_encoder()
    high, low = budget.random_history(base, "4x4x2", 8, "cpu")
    on_meta = tiny_encoder().to("meta")
    flops, kept = budget.encoder_cost(on_meta, base, "4x4x2", 8)
    flops_of_40, kept_of_40 = budget.encoder_cost(on_meta, base, "4x4x2", 40)
    assert flops == counted_flops(lambda: real.encode(high, low)) and flops_of_40 == 5 * flops
    assert 4.5 < kept_of_40 / kept < 5.5  # some of it does not grow


@pytest.mark.parametrize("preset, start, low", [("tiny", 0, 4), ("tiny-wan", 0, 5), ("tiny-wan", 1, 4)])
def test_a_random_history_has_the_shape_that_the_encoder_expects(preset, start, low):
    base = tiny_base(preset)
    n = 8 + (base.codec.causal and start == 0)
    rows = 32 // base.codec.stride[1]
    shapes = [tuple(x.shape) for x in budget.random_history(base, "4x4x2", n, "meta", start)]
    assert shapes == [(1, 16, n, rows, rows), (1, 16, low, rows // 4, rows // 4)]


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize("lora", [0, 1])
def test_bytes_that_a_block_keeps(lora, monkeypatch):
    """Against the tensors that autograd saves, with a fused attention and bf16 products as on a GPU."""
    monkeypatch.setattr(model, "attention", F.scaled_dot_product_attention)
    c, N, M = DiTConfig(dim=48, ffn_dim=96, heads=2, layers=1, text_dim=8, text_len=2), 1009, 9
    dit = DiT(c)
    if lora:
        tiny_base().add_lora(dit, lora)
    rotations = model.rope(torch.zeros(1, N, 3), c.dim // c.heads)
    kept = {}

    def keep(x):
        if N in x.shape or N - M in x.shape:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        dit.blocks[0](randn(1, N, 48).requires_grad_(), randn(1, 2, 6, 48), randn(1, 2, 48), rotations, M)
    kept.pop(rotations.untyped_storage().data_ptr(), None)
    found = sum(x.untyped_storage().nbytes() for x in kept.values())
    assert budget.block_bytes(c, N, lora > 0) == pytest.approx(found, rel=0.03)


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors made under it that live now, and their peak."""

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
def test_the_most_that_sampling_needs_in_a_block(preset, lora, monkeypatch):
    """Against all that lives in a forward pass of one layer at 480p, on tensors without content, with a fused attention
    as on a GPU. Never less than that, since it must fit."""
    monkeypatch.setattr(model, "attention", F.scaled_dot_product_attention)
    base = open_base(preset)
    c, M, frames = dataclasses.replace(base.dit, layers=1), 4264, 8
    with FakeTensorMode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        dit = DiT(c)
        for name, p in dit.named_parameters():
            p.data = p.data.to(torch.bfloat16 if name.startswith("blocks.") and p.ndim == 2 else torch.float32)
        if lora:
            base.add_lora(dit, lora)
        x, t, text = torch.empty(1, 16, frames, 60, 104), torch.empty(1), torch.empty(1, 512, c.text_dim)
        memory = torch.empty(1, M, c.dim), torch.empty(M, 3)
        for there_before in (*dit.parameters(), x, *memory):
            there_before.untyped_storage().counted = True
        with Live() as live:
            dit(x, t, text, None, memory)
    denoising, _ = budget.sampling_memory(base, 1 if lora else 0, 0, M + frames * 30 * 52)
    assert live.most < denoising["inside one block"] < 1.2 * live.most


def test_a_random_frozen_dit_is_never_in_float32(monkeypatch):
    """Made in the dtypes of a loaded one, it has the numbers of one that is cast afterwards, at little more memory than
    it takes in the end."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    base, made = tiny_base("tiny-wan"), []
    config = dataclasses.replace(base.dit, layers=12)
    for frozen in (contextlib.nullcontext(), base.random_frozen("cpu")):
        torch.manual_seed(0)
        with Live() as live, frozen:
            made.append(DiT(config).state_dict())
    for name, tensor in made[0].items():
        dtype = torch.bfloat16 if name.startswith("blocks.") and tensor.ndim == 2 else torch.float32
        assert made[1][name].dtype == dtype and torch.equal(made[1][name], tensor.to(dtype))
    assert live.most < 1.3 * sum(x.nbytes for x in made[1].values())
    assert {p.dtype for p in DiT(config).parameters()} == {torch.float32}  # only in the context


@pytest.mark.optional
@pytest.mark.parametrize("kind, height, width", [(WanCodec, 480, 832), (Wan22Codec, 704, 1280)])
def test_memory_of_wans_vae(kind, height, width):
    """Against all that lives while the real architecture decodes, without a number computed."""
    diffusers = pytest.importorskip("diffusers")
    codec = kind(device="meta")
    with torch.device("meta"):
        codec.vae = diffusers.AutoencoderKLWan(**codec.architecture).requires_grad_(False)
        latents = torch.empty(1, codec.channels, 9, height // codec.stride[1], width // codec.stride[2])
    decode = codec.decoder()
    with Live() as live:
        for section in latents.split([1, 8], dim=2):
            pixels = decode(section)
        del pixels, section
    between, decoding = (list(needs.values()) for needs in codec.memory(height * width))
    assert between[0] == decoding[0] == sum(4 * p.numel() for p in codec.vae.parameters())
    assert between[1] == pytest.approx(live.now, rel=0.01)
    assert decoding[1] == pytest.approx(live.most, rel=0.01)


def test_memory_of_decoding_leaves_out_the_dit_where_it_has_to_make_room():
    wan, nano = open_base("wan-14b"), open_base("nano")
    between, decoding = wan.codec.memory(480 * 832)
    phases = budget.sampling_memory(wan, 10**6, 10**5, 7)
    assert phases[1] == decoding | {"CUDA context (estimate)": 2**30}
    assert between.items() <= phases[0].items() and phases[0]["trained weights, float32"] == 4 * 10**5
    assert budget.sampling_memory(nano, 0, 10**5, 7)[1] == {}


def test_training_memory_counts_all_copies_of_the_weights():
    base = open_base("wan-14b")
    with torch.device("meta"):
        weights = dict(DiT(base.dit).named_parameters())
    frozen = sum(p.numel() for p in weights.values())
    held = sum(p.numel() * (2 if name.startswith("blocks.") and p.ndim == 2 else 4) for name, p in weights.items())
    fixed, sample = budget.training_memory(base, frozen, 100, 7, 2, 50)
    assert sum(fixed.values()) == held + (4 + 2 + 4 + 8 + 4) * 100 + (budget.CONTEXT + budget.NCCL) * 2**30
    assert sample["stream between blocks, float32"] == 40 * 7 * 5120 * 4 and sample["φ, float32"] == 50
    fixed, sample = budget.training_memory(dataclasses.replace(base, recompute=False), frozen, 100, 7, 1, 50)
    assert fixed["NCCL's buffers (estimate)"] == 0
    assert sample["inside all blocks"] == 40 * budget.block_bytes(base.dit, 7, lora=True)


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize(
    "preset, expected",
    [
        ("nano", ["7,807,520", "2,560", "256 + 320"]),
        ("small", ["63,545,856", "448x256", "71,680"]),
        ("wan-1.3b", ["1,418,996,800", "4,264", "126,360", "5,460", "yes       yes"]),
        ("wan-14b", ["14,288,491,584", "6,240 + 4,264", "12,480 + 4,264", "6,344", "1.39 PFLOP"]),
        ("wan2.2-a14b", ["14,288,491,584", "28,576,983,168", "29.3 GiB with its LoRA", "40 steps x 2", "4,264"]),
        ("wan2.2-5b", ["4,999,787,712", "3,520 + 3,660", "106,480", "13,420", "1,708", "no        no"]),
    ],
)
def test_the_command_prints_its_predictions(preset, expected, capsys):
    run(script("eval"), "budget", "--preset", preset)
    printed = capsys.readouterr().out
    assert "predictions" in printed and all(figure in printed for figure in expected), printed
    assert max(map(len, printed.splitlines())) <= 120


def test_the_parameters_printed_are_those_of_the_model(capsys):
    run(script("eval"), "budget", "--preset", "tiny-wan")
    rows = [line.rsplit(None, 1) for line in capsys.readouterr().out.splitlines()]
    printed = {row[0].strip(): row[1].replace(",", "") for row in rows if len(row) == 2}
    base = tiny_base("tiny-wan")
    made = MemoryDiT(base)
    dit, phi = (sum(p.numel() for p in module.parameters()) for module in (made.dit, made.encoder))
    base.add_lora(made.dit, base.lora)
    trained = sum(p.numel() for p in made.parameters() if p.requires_grad)
    found = [int(printed[what]) for what in ("DiT", "memory encoder φ", "LoRA, rank 4", "trained")]
    assert found == [dit, phi, trained - phi, trained]


def test_the_largest_batch_fills_the_memory(capsys):
    def batches(gpus, memory):
        run(script("eval"), "budget", "--preset", "wan-14b", "--gpus", gpus, "--memory_gb", memory)
        lines = capsys.readouterr().out.splitlines()
        return next(line.split("GiB")[1] for line in lines if "largest batch" in line)

    assert batches(2, 79).split() == ["3", "1"]
    assert re.split(" {2,}", batches(2, 30).strip()) == ["does not fit"] * 2


def test_what_cannot_be_predicted_is_refused(refused):
    assert "wan-14b" in refused(script("eval"), "budget", "--preset", "wan")
    assert "--gpus 0" in refused(script("eval"), "budget", "--gpus", 0)
    assert "--memory_gb nan" in refused(script("eval"), "budget", "--memory_gb", "nan")
    assert "--rate 4x4x16" in refused(script("eval"), "budget", "--rate", "4x4x16")
