"""LoRAs by others: their names, alpha, differences, beside our own; those that do not fit are refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sample
from model import DiT
from tests.common import TINY, randn, run, tiny_base, write_checkpoint, write_video
from tests.test_lora import forward_with_memory, small_dit
from tests.test_weights import copied, diffusers_name, equal
from util.cli import UserError
from util.video import read_video

LAYERS = ["blocks.1.self_attn.q", "blocks.0.cross_attn.o", "blocks.0.ffn.2", "head.head", "text_embedding.0"]
LAYERS += ["time_projection.1", "patch_embedding"]
NAMINGS = {  # module, "A" or "B" -> name
    "ComfyUI": lambda m, x: f"diffusion_model.{m}.lora_{x}.weight",
    "lightx2v": lambda m, x: f"diffusion_model.{m}.lora_{'down' if x == 'A' else 'up'}.weight",
    "official": lambda m, x: f"{m}.lora_{x}.weight",
    "diffusers": lambda m, x: f"transformer.{diffusers_name(m + '.')}lora_{x}.weight",
    "diffusers, no prefix": lambda m, x: f"{diffusers_name(m + '.')}lora_{x}.weight",
    "PEFT": lambda m, x: f"{m}.lora_{x}.default.weight",
    "kohya": lambda m, x: f"lora_unet_{m.replace('.', '_')}.lora_{'down' if x == 'A' else 'up'}.weight",
}


def factors(dit, rank=3, layers=LAYERS, seed=0):
    """{module: (A, B)} for a DiT, kernels for its patch embedding, a convolution."""
    made = {}
    for i, layer in enumerate(layers):
        rows, *rest = dit.get_submodule(layer).weight.shape
        A, B = randn(rank, *rest, seed=seed + i), randn(rows, rank, *[1] * (len(rest) - 1), seed=seed - i - 1)
        made[layer] = 0.3 * A, 0.3 * B
    return made


def write_lora(path, pairs, naming="ComfyUI", metadata=None, **more):
    """A file with these pairs, and more tensors; alpha=a gives each layer one."""
    alpha = more.pop("alpha", None)
    tensors = {NAMINGS[naming](m, x): y.contiguous() for m, pair in pairs.items() for x, y in zip("AB", pair)}
    if alpha is not None:
        tensors |= {re.sub(r"\.lora_.*", ".alpha", name): torch.tensor(alpha) for name in tensors}
    save_file(tensors | more, path, metadata)
    return path


def added(dit, pairs, scale=1.0):
    """The DiT's tensors with scale * B A added by hand."""
    state = copied(dit.state_dict())
    for layer, (A, B) in pairs.items():
        state[f"{layer}.weight"] += scale * torch.einsum("or,ri->oi", B.flatten(1), A.flatten(1)).view_as(
            state[f"{layer}.weight"]
        )
    return state


def assert_close(dit, state, tolerance=1e-6):
    assert dit.state_dict().keys() == state.keys()
    for name, tensor in dit.state_dict().items():
        assert tensor.dtype == state[name].dtype and (tensor - state[name]).abs().max() <= tolerance, name


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("alpha", [None, 12, 1.5])
def test_a_lora_is_added_whatever_its_names(naming, alpha):
    dit = small_dit()
    pairs = factors(dit)
    expected = added(dit, pairs, 0.5 * (1 if alpha is None else alpha / 3))
    write_lora("a.safetensors", pairs, naming, alpha=alpha)
    tiny_base().apply_loras(dit, "a.safetensors:0.5")
    assert_close(dit, expected)
    assert not equal(dit.state_dict(), small_dit().state_dict())


def test_several_loras_and_their_strengths():
    dit = small_dit()
    one, two, three = factors(dit), factors(dit, 2, LAYERS[:3], 10), factors(dit, 1, LAYERS[2:4], 20)
    write_lora("a.safetensors", one, "kohya", alpha=6)
    write_lora("b:c.safetensors", two)
    write_lora("d.safetensors:e", three, "diffusers")
    state = added(dit, one, -0.25 * 2)
    for pairs, strength in (two, 1), (three, 0.8):
        state = {name: state[name] + x - dit.state_dict()[name] for name, x in added(dit, pairs, strength).items()}
    tiny_base().apply_loras(dit, "a.safetensors:-.25 b:c.safetensors d.safetensors:e:0.8")
    assert_close(dit, state)


def test_differences_are_added_too():
    """lightx2v's files have some of norms, biases and the modulation."""
    dit, ends = small_dit(), {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}
    changes = {n: randn(*p.shape, seed=len(n)) for n, p in dit.named_parameters() if "blocks.1" not in n}
    pairs = factors(dit, layers=["blocks.0.self_attn.q", "blocks.1.ffn.0"])
    tensors = {f"diffusion_model.{re.sub(r'[a-z]+$', lambda m: ends[m[0]], n)}": x for n, x in changes.items()}
    assert {"diffusion_model.blocks.0.norm3.diff_b", "diffusion_model.blocks.0.diff_m"} < tensors.keys()
    write_lora("a.safetensors", pairs, "lightx2v", alpha=6, **tensors)  # alpha is of the pairs alone
    expected = added(dit, pairs, 2 * 0.5)
    tiny_base().apply_loras(dit, "a.safetensors:0.5")
    assert_close(dit, {n: x + 0.5 * changes.get(n, torch.zeros(1)) for n, x in expected.items()})


def test_alpha_in_the_header_counts():
    """Newer versions of diffusers write it there, and no tensor."""
    for prefix in "", "transformer.":
        dit = small_dit()
        config = {f"{prefix}lora_alpha": 6, f"{prefix}r": 3, f"{prefix}use_dora": False, f"{prefix}alpha_pattern": {}}
        metadata = {"lora_adapter_metadata": json.dumps(config)}
        write_lora("a.safetensors", factors(dit), "diffusers", metadata)
        expected = added(dit, factors(dit), 2)
        tiny_base().apply_loras(dit, "a.safetensors")
        assert_close(dit, expected)
        config[f"{prefix}alpha_pattern"] = {"blocks.0.attn1.to_q": 8}
        write_lora("a.safetensors", factors(dit), "diffusers", {"lora_adapter_metadata": json.dumps(config)})
        with pytest.raises(UserError, match="alpha_pattern in its header"):
            tiny_base().apply_loras(dit, "a.safetensors")


@pytest.mark.parametrize("merge_first", (False, True))
def test_a_lora_beside_our_own(merge_first):
    dit, base = small_dit(), tiny_base()
    base.add_lora(dit, 2)
    for n, p in dit.named_parameters():
        p.data = 0.2 * randn(*p.shape, seed=len(n)) if ".lora_" in n else p.data
    own = {m: (dit.get_submodule(m).lora_A.detach(), dit.get_submodule(m).lora_B.detach()) for m in LAYERS[:3]}
    expected = added(small_dit(), factors(dit))
    write_lora("a.safetensors", factors(dit))
    if merge_first:
        base.merge_lora(dit)
    base.apply_loras(dit, "a.safetensors")
    result = forward_with_memory(dit)
    if not merge_first:
        assert all(torch.equal(dit.get_submodule(m).lora_B, B) for m, (_, B) in own.items())
        base.merge_lora(dit)
        assert (forward_with_memory(dit) - result).abs().max() < 1e-4
    for m, (A, B) in own.items():
        assert (dit.get_submodule(m).weight - expected[f"{m}.weight"] - B @ A).abs().max() < 1e-5


def test_our_own_export_gives_the_trained_model():
    dit, base = small_dit(), tiny_base()
    base.add_lora(dit, 2)
    for n, p in dit.named_parameters():
        p.data = 0.2 * randn(*p.shape, seed=len(n)) if ".lora_" in n else p.data
    exported = base.exports({f"dit.{n}": x for n, x in dit.state_dict().items()})["lora.safetensors"]
    save_file(exported, "lora.safetensors")
    other = small_dit()
    base.apply_loras(other, "lora.safetensors")
    base.merge_lora(dit)
    assert_close(other, dit.state_dict())


def test_a_base_in_bf16_is_rounded_once():
    dit = small_dit().bfloat16()
    pairs, half = factors(dit), {m: (A.half(), B.half()) for m, (A, B) in factors(dit).items()}
    write_lora("a.safetensors", half)
    expected = added(dit.float(), {m: (A.float(), B.float()) for m, (A, B) in half.items()}, 0.5)
    dit.bfloat16()
    tiny_base().apply_loras(dit, "a.safetensors:0.25 a.safetensors:0.25")
    assert pairs.keys() == half.keys() and equal(dit.state_dict(), {n: x.bfloat16() for n, x in expected.items()})


@pytest.mark.optional
@pytest.mark.parametrize("naming", ["ComfyUI", "lightx2v", "kohya"])
def test_diffusers_reads_the_same(naming):
    """What diffusers makes of a file, under its own names, gives the same weights."""
    loaders = pytest.importorskip("diffusers.loaders.lora_pipeline")
    dit, other = small_dit(), small_dit()
    layers = [f"blocks.{i}.{m}" for i in (0, 1) for m in ("ffn.0", "ffn.2")]
    layers += [f"blocks.{i}.{a}_attn.{m}" for i in (0, 1) for a in ("self", "cross") for m in "qkvo"]
    write_lora("a.safetensors", factors(dit, layers=layers), naming, alpha=12.0)
    save_file(loaders.WanLoraLoaderMixin.lora_state_dict(load_file("a.safetensors")), "b.safetensors")
    assert any("transformer.blocks.1.attn2.to_out.0.lora_A" in name for name in load_file("b.safetensors"))
    tiny_base().apply_loras(dit, "a.safetensors")
    tiny_base().apply_loras(other, "b.safetensors")
    assert_close(dit, other.state_dict(), 1e-5)


def test_sampling_with_a_lora():
    """One that holds the difference between two checkpoints turns one into the other."""
    write_video("clip.mp4", 12)
    one = write_checkpoint("one.safetensors")
    blocks = {name: x for name, x in load_file(one).items() if name.startswith("dit.blocks")}
    two = write_checkpoint("two.safetensors", change=lambda s: s.update({n: 1.5 * x for n, x in blocks.items()}))
    ends = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}
    save_file({re.sub(r"\w+$", lambda m: ends[m[0]], n[4:]): 0.5 * x for n, x in blocks.items()}, "a.safetensors")
    made = {}
    for name, given in dict(one=[one], two=[two], lora=[one, "--lora", "a.safetensors"]).items():
        common = "--history", "clip.mp4", "--seconds=2", "--steps=2", "--save_file", f"{name}.mp4"
        run(sample.main, *common, "--checkpoint", *given)
        made[name] = read_video(f"{name}.mp4", 2, 32, 32)[12:].float()
    assert (made["lora"] - made["two"]).abs().mean() < 0.1 < 1 < (made["lora"] - made["one"]).abs().mean()


BAD = {  # what is wrong: (what is said of it, changes to the pair (A, B) of a layer, further tensors made from it)
    "another layer": ("unexpected tensor C.7.ffn.0.lora_A.weight", None, {"C.7.ffn.0.lora_A.weight": "A"}),
    "another kind": ("unexpected tensor C.0.ffn.0.dora_scale", None, {"C.0.ffn.0.dora_scale": "B"}),
    "another size": ("shape (64, 3) times (3, 47), expected a change of (64, 48)", lambda A, B: (A[:, 1:], B), {}),
    "two ranks": ("shape (64, 3) times (2, 48)", lambda A, B: (A[1:], B), {}),
    "no rank": ("shape (64, 0) times (0, 48)", lambda A, B: (A[:0], B[:, :0]), {}),
    "a vector": ("shape (64,) times (3, 48)", lambda A, B: (A, B[:, 0]), {}),
    "only A": ("only a part of a layer, C.0.ffn.2.lora_A.weight", None, {"C.0.ffn.2.lora_A.weight": "A"}),
    "another difference": ("shape (3, 48), expected a change of (48,)", None, {"C.0.norm3.diff": "A"}),
    "not finite": ("lora_B.weight holds values that are not finite", lambda A, B: (A, B / 0), {}),
    "several alphas": ("C.0.ffn.0.alpha is not one finite number", None, {"C.0.ffn.0.alpha": "A"}),
    "integers": ("C.0.ffn.0.lora_A.weight is int32", lambda A, B: (A.int(), B), {}),
    "twice": ("are the same tensor", None, {"blocks.0.ffn.0.lora_down.weight": "A"}),
}


@pytest.mark.parametrize("case", BAD)
def test_a_lora_that_does_not_fit_is_refused(case, refused):
    says, change, more = BAD[case]
    dit = DiT(TINY["dit"])
    pairs = factors(dit, layers=["blocks.0.ffn.0"])
    good = write_lora("good.safetensors", pairs)
    A, B = pairs["blocks.0.ffn.0"]
    more = {name.replace("C.", "diffusion_model.blocks."): dict(A=A, B=B)[x].clone() for name, x in more.items()}
    bad = write_lora("bad.safetensors", {"blocks.0.ffn.0": change(A, B) if change else (A, B)}, **more)
    write_video("clip.mp4", 12)
    common = "--history", "clip.mp4", "--checkpoint", write_checkpoint(), "--seconds=2", "--steps=1"
    assert says.replace("C.", "diffusion_model.blocks.") in refused(sample.main, *common, "--lora", f"{good} {bad}")
    before = copied(dit.state_dict())
    with pytest.raises(UserError):
        tiny_base().apply_loras(dit, f"{good} {bad}")
    assert equal(dit.state_dict(), before)


def test_what_is_no_lora_is_refused(refused):
    write_video("clip.mp4", 12)
    common = "--history", "clip.mp4", "--checkpoint", write_checkpoint(), "--lora"
    Path("a.pt").write_bytes(b"PK" + bytes(99))
    assert "no file b.safetensors:0,5" in refused(sample.main, *common, "b.safetensors:0,5")
    save_file({}, "empty.safetensors")
    assert "empty.safetensors holds no tensor" in refused(sample.main, *common, "empty.safetensors")
    assert "a.pt is not a readable safetensors file" in refused(sample.main, *common, "a.pt:0.5")
    assert "unexpected tensor" in refused(sample.main, *common, "tiny.safetensors")
    given = "--history", "clip.mp4", "--init", "random", "--preset", "tiny", "--lora", "a.pt"
    assert "--lora does nothing for random weights" in refused(sample.main, *given)
