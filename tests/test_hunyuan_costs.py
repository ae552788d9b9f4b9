"""What budget predicts of HunyuanVideo's DiT, against what is counted while it runs; compare test_budget.py."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import bases
from bases import hunyuan, hunyuan_dit, open_base
from bases.hunyuan_dit import HunyuanConfig, HunyuanDiT
from bench import budget, costs, speed
from bench.nets import compiled_twin
from tests.common import randn, randomize, read_csv, run, script
from tests.test_budget import Live, attention_by_products, counted_flops
from util.distributed import compile_blocks

CONFIG = HunyuanConfig(dim=48, ffn_dim=112, heads=2, layers=2, single_layers=3, text_dim=16, text_len=8)
CONFIG = dataclasses.replace(CONFIG, in_dim=4, out_dim=3, freq_dim=32)


@pytest.mark.parametrize("M", [0, 7])
@pytest.mark.parametrize("guided", [True, False])
def test_flops_are_those_that_torch_counts(M, guided, monkeypatch):
    monkeypatch.setattr(hunyuan_dit, "attention", lambda q, k, v, mask: attention_by_products(q, k, v))
    c = dataclasses.replace(CONFIG, guided=guided)
    dit, memory = HunyuanDiT(c), (randn(1, M, c.dim), torch.zeros(M, 3)) if M else None
    x, t, text = randn(1, 4, 3, 4, 6), torch.tensor([5.0]), randn(1, 8, 16)
    assert costs.flops(c, 3 * 2 * 3, M) == counted_flops(lambda: dit(x, t, text, memory=memory))


def test_parameters():
    with torch.device("meta"):
        dit, base = HunyuanDiT(CONFIG), open_base("hunyuan")
        in_blocks = [p for name, p in dit.named_parameters() if "blocks." in name and p.ndim == 2]
        assert costs.matrices(CONFIG) == sum(p.numel() for p in in_blocks)
        base.add_lora(dit, 3)
    assert costs.lora_parameters(CONFIG, 3) == sum(p.numel() for p in dit.parameters() if p.requires_grad)
    assert costs.lora_parameters(base.dit, 128) == 471_859_200
    assert costs.n_blocks(CONFIG) == len(dit.blocks) == 5 and costs.text_tokens(base.dit) == 256


@pytest.mark.parametrize("lora", [0, 1])
def test_bytes_that_a_block_keeps(lora, monkeypatch):
    """Against the tensors that autograd saves, with a fused attention and bf16 products as on a GPU."""
    monkeypatch.setattr(hunyuan_dit, "attention", lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v))
    c, (M, N, L) = dataclasses.replace(CONFIG, ffn_dim=192), (9, 1000, 4)
    dit = HunyuanDiT(c)
    for p in dit.parameters():
        p.data = randn(*p.shape)
    if lora:
        open_base("hunyuan").add_lora(dit, lora)
    rotations, found = hunyuan_dit.rope(torch.zeros(1, M + N + L, 3), 24, c.rope_axes), []
    for block in dit.blocks[0], dit.blocks[-1]:
        kept = {}

        def keep(x, kept=kept):
            if {M + N + L, M + N, N + L, N} & set(x.shape):
                kept[x.untyped_storage().data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
            block(randn(1, M + N + L, 48).requires_grad_(), randn(1, 2, 48), rotations, (M, N, L), None)
        kept.pop(rotations.untyped_storage().data_ptr(), None)
        found.append(sum(x.untyped_storage().nbytes() for x in kept.values()))
    assert costs.block_bytes(c, M + N + L, lora > 0) == pytest.approx(max(found), rel=0.03)


@pytest.mark.parametrize("lora", [0, 128])
def test_the_most_that_sampling_needs_in_a_block(lora, monkeypatch):
    """Against all that lives while a block of full width runs at 480p, on tensors without content."""
    monkeypatch.setattr(hunyuan_dit, "attention", lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v))
    base, (M, N, L) = open_base("hunyuan"), (6344, 8 * 1560, 256)
    c = dataclasses.replace(base.dit, layers=1, single_layers=1)
    with FakeTensorMode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        dit = HunyuanDiT(c)
        for name, p in dit.named_parameters():
            p.data = p.data.to(torch.bfloat16 if "blocks." in name and p.ndim == 2 else torch.float32)
        if lora:
            base.add_lora(dit, lora)
        e, rotations = torch.empty(1, 2, c.dim), torch.empty(1, M + N + L, 1, 64, 2)
        for there_before in (*dit.parameters(), e, rotations):
            there_before.untyped_storage().counted = True
        with Live() as live:
            x = torch.empty(1, M + N + L, c.dim)
            for block in dit.blocks:
                x = block(x, e, rotations, (M, N, L), None)
    assert live.most < costs.inference_bytes(c, M + N + L, lora > 0) < 1.2 * live.most
    denoising, _ = budget.sampling_memory(base, int(lora > 0), 0, M + N)
    assert denoising["inside one block"] == costs.inference_bytes(c, M + N + L, lora > 0)


def test_the_budget_of_hunyuan(capsys):
    run(script("eval"), "budget", "--preset", "hunyuan")
    printed = capsys.readouterr().out
    assert "12,821,012,544" in printed and "471,859,200" in printed and "6,344" in printed
    assert "50 steps\n" in printed and "--cache_memory" not in printed and "decodes with" in printed


def test_speed_of_hunyuan(monkeypatch):
    """One pass per step; no DiT of diffusers beside it."""
    dit = HunyuanConfig(dim=48, ffn_dim=64, heads=2, layers=1, text_dim=16, text_len=8)
    changes = dict(dit=dit, sizes=((32, 32),), fps=2, section=4, history=9, widths=(8, 8, 16, 16), lora=4)
    monkeypatch.setitem(hunyuan.PRESETS, "tiny-hunyuan", hunyuan.PRESETS["hunyuan"] | changes)
    monkeypatch.setitem(bases.BASES, "tiny-hunyuan", hunyuan)
    monkeypatch.setattr(speed, "GROWTH", (2,))
    monkeypatch.setattr(speed, "alternate", lambda jobs, *args: {name: [job(), 0.5][1:] for name, job in jobs.items()})
    run(script("eval"), "speed", "--preset", "tiny-hunyuan", "--repeats", 1, "--device", "cpu", "--out", "plot.png")
    (row,) = read_csv("plot.csv")
    assert row["section_seconds"] == row["section_seconds_uncompressed"] == "25.0"  # 50 steps


@pytest.mark.parametrize("training", [False, True])
def test_compiled_blocks_compute_the_same(training):
    dit, (x, t, text) = randomize(HunyuanDiT(CONFIG)), (randn(2, 4, 2, 4, 4), torch.tensor([5.0, 700]), randn(2, 8, 16))
    dit.recompute = training
    twin = compiled_twin(dit, lambda dit: compile_blocks(dit, "aot_eager"))
    text[1, 5:] = 0
    for n in 0, 3, 5:
        memory = (randn(2, n, 48, seed=n), randn(n, 3)) if n else None
        with torch.set_grad_enabled(training):
            ours, theirs = (net(x, t, text, None, memory) for net in (dit, twin))
        assert torch.allclose(ours, theirs, atol=1e-5)
