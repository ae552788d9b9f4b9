"""HunyuanVideo's DiT: outputs of the original, names of weights, memory, text, guidance, LoRA. (VAE, prompts:
test_hunyuan_parts.py.)"""

import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from bases import hunyuan_dit, open_base
from bases.hunyuan import HunyuanBase
from bases.hunyuan_dit import HunyuanConfig, HunyuanDiT, frequencies, guidance_input
from bases.hunyuan_names import hunyuan_name
from encoder import MemoryDiT
from sample import Guidance, sample
from tests.common import ROOT, SHARED, randn, randomize
from util.cli import UserError

CONFIG = HunyuanConfig(dim=48, ffn_dim=96, heads=3, layers=2, single_layers=3, text_dim=20, text_len=10, pooled_dim=12)


def small_dit(seed=0, **changes):
    """Random weights everywhere; the final layer and modulations too, which start at zero."""
    return randomize(HunyuanDiT(dataclasses.replace(CONFIG, **changes)), seed)


def base(dit=CONFIG, **changes):
    return dataclasses.replace(open_base("hunyuan"), dit=dit, **changes)


def pack(pooled, text, lengths):
    """A prompt per sample as one tensor: the pooled vector, then a row per token, zeros behind the last."""
    rows = text * (torch.arange(text.shape[1])[None, :, None] < torch.as_tensor(lengths)[:, None, None])
    return torch.cat([F.pad(pooled, (0, text.shape[2] - pooled.shape[1]))[:, None], rows], dim=1)


def inputs(B=2, lengths=(9, 4)):
    """x, t, text."""
    text = pack(randn(B, 12, seed=1), randn(B, 9, 20, seed=2), lengths)
    return randn(B, 16, 2, 4, 6), torch.tensor([731.0, 12.5])[:B], text


def memory(B=2):
    return randn(B, 5, 48, seed=3), 3 * randn(5, 3, seed=4)


# ---------------------------------------------------------------------------------------------------------------------
# The original


@pytest.mark.parametrize("name", ["hunyuan_tiny", "hunyuan_tiny_other"])
@pytest.mark.parametrize("case", ["a", "b", "c", "m", "m_guided"])
@torch.no_grad()
def test_the_dit_equals_the_original(name, case, monkeypatch):
    """Tencent's own code; its memory cases are HunyuanVideo-I2V's clean first frame."""
    folder = SHARED / "fixtures"
    if not (folder / f"{name}.json").is_file():
        pytest.skip(f"{name} is not in tests/fixtures: it would make the repository too large")
    about, tensors = json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")
    c, its = about["config"], about["cases"].get(case)
    if its is None or (c["guidance"] and its["guidance_in_memory"] is False):
        pytest.skip("memory without guidance: ours has it, see HunyuanDiT.forward")
    same = {key: c[key] for key in ("dim", "heads", "text_dim", "pooled_dim", "theta")}
    same |= dict(layers=c["double"], single_layers=c["single"], in_dim=c["in_channels"], out_dim=c["out_channels"])
    same |= dict(axes=tuple(c["axes"]), patch=tuple(c["patch"]), guided=c["guidance"])
    dit = HunyuanDiT(HunyuanConfig(ffn_dim=c["mlp_ratio"] * c["dim"], **same))
    dit.load_state_dict({key[2:]: v for key, v in tensors.items() if key.startswith("w.")}, strict=True)
    given = {key.split(".")[2]: v for key, v in tensors.items() if key.startswith(f"in.{its['inputs']}.")}
    text = pack(given["pooled"], given["text"], given["text_lengths"])
    context = (given["memory"], given["memory_positions"]) if "memory" in given else None
    monkeypatch.setattr(hunyuan_dit, "text_time", lambda times: torch.zeros(1, 1, 1))
    theirs = frequencies(128).clone()
    theirs[12] = theirs[12].nextafter(torch.tensor(1.0))  # its last bit where the fixtures were made
    monkeypatch.setattr(hunyuan_dit, "frequencies", lambda n: theirs)
    monkeypatch.setattr(hunyuan_dit, "guidance_input", lambda scale: scale)  # 6000, not 6016
    v = dit(given["x"], given["t"], text, given["frames"], context, given.get("guidance", 1.0))
    assert (v - tensors[f"out.{case}"]).abs().max() < 1e-5 and v.std() > 0.8


def read_fixture():
    path = ROOT / "tests" / "fixtures" / "hunyuan_diffusers"
    return json.loads(path.with_suffix(".json").read_text()), load_file(path.with_suffix(".safetensors"))


def fixture_config(c):
    same = dict(in_dim=c["in_channels"], out_dim=c["out_channels"], heads=c["num_attention_heads"])
    same |= dict(layers=c["num_layers"], single_layers=c["num_single_layers"], text_dim=c["text_embed_dim"])
    dim = c["num_attention_heads"] * c["attention_head_dim"]
    ffn_dim, pooled_dim = int(dim * c["mlp_ratio"]), c["pooled_projection_dim"]
    axes, guided = c["rope_axes_dim"], c["guidance_embeds"]
    return HunyuanConfig(dim=dim, ffn_dim=ffn_dim, pooled_dim=pooled_dim, axes=tuple(axes), guided=guided, **same)


def load(config, path, **options):
    """A DiT on the meta device, filled from files."""
    with torch.device("meta"):
        dit = HunyuanDiT(config)
    its = base()
    its.dit = config
    its.load_dit(dit, path, **options)
    return dit


@torch.no_grad()
def test_the_dit_equals_that_of_diffusers(tmp_path):
    """With diffusers' names, of which some make one of ours; guidance 6 and 1, unequal prompts."""
    about, tensors = read_fixture()
    save_file({key[2:]: v for key, v in tensors.items() if key.startswith("w.")}, tmp_path / "dit.safetensors")
    dit = load(fixture_config(about["config"]), tmp_path)
    given = {key[3:]: v for key, v in tensors.items() if key.startswith("in.")}
    text = pack(given["pooled"], given["text"], given["lengths"])
    v = dit(given["x"], given["t"], text, guidance=torch.tensor([6.0, 1.0]))
    assert (v - tensors["out"]).abs().max() < 2e-5 and v.std() > 1
    assert (dit(given["x"], given["t"], text, guidance=5.984) - tensors["out"])[0].abs().max() > 1e-2  # 5984


def diffusers_dit(**changes):
    """diffusers' class with the sizes of CONFIG."""
    diffusers = pytest.importorskip("diffusers")
    c = CONFIG
    sizes = dict(num_attention_heads=c.heads, attention_head_dim=16, num_layers=2, num_single_layers=3, mlp_ratio=2)
    sizes |= dict(text_embed_dim=20, pooled_projection_dim=12, rope_axes_dim=(4, 6, 6), patch_size=2, patch_size_t=1)
    return randomize(diffusers.HunyuanVideoTransformer3DModel(**sizes | changes))


@pytest.mark.optional
@torch.no_grad()
def test_memory_equals_diffusers_clean_first_frame(tmp_path, monkeypatch):
    """Shards that cut through the parts of a tensor; frame 0 as memory, the others noisy."""
    theirs = diffusers_dit(guidance_embeds=False, image_condition_type="token_replace")
    theirs.save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 20
    dit = load(dataclasses.replace(CONFIG, guided=False), tmp_path)
    x, t, text = inputs()
    mask = torch.cat([torch.ones(1, 9), F.pad(torch.ones(1, 4), (0, 5))])
    given = dict(encoder_hidden_states=text[:, 1:], pooled_projections=text[:, 0, :12], encoder_attention_mask=mask)
    expected = theirs(hidden_states=x, timestep=t, **given, return_dict=False)[0]
    monkeypatch.setattr(hunyuan_dit, "text_time", lambda times: torch.zeros(1, 1, 1))
    first = dit.patch_embedding(x[:, :, :1])
    places = torch.tensor([[0.0, i, j] for i in range(2) for j in range(3)])
    v = dit(x[:, :, 1:], t, text, torch.tensor([1]), (first, places))
    assert (v - expected[:, :, 1:]).abs().max() < 1e-5 and v.std() > 0.1


def test_parameters_in_full_size():
    its = open_base("hunyuan")
    with torch.device("meta"):
        dit = its.make_dit()
        assert sum(p.numel() for p in dit.parameters()) == 12_821_012_544 and len(dit.state_dict()) == 856
        its.add_lora(dit, 128)
    assert sum(p.numel() for p in dit.parameters() if p.requires_grad) == 471_859_200
    assert its.dit.rope_axes == (16, 56, 56)


# ---------------------------------------------------------------------------------------------------------------------
# Names and files


def comfy_name(name):
    """What ComfyUI calls a parameter."""
    name = name.replace("_mod.linear", "_mod.lin").replace("modulation.linear", "modulation.lin")
    name = name.replace("_attn_qkv", "_attn.qkv").replace("_attn_proj", "_attn.proj")
    for x, word in ("q", "query"), ("k", "key"):
        name = name.replace(f"_attn_{x}_norm.weight", f"_attn.norm.{word}_norm.scale")
        name = name.replace(f"{x}_norm.weight", f"norm.{word}_norm.scale")
    for embedder in "t_embedder", "time_in", "guidance_in":
        name = name.replace(f"{embedder}.mlp.0", f"{embedder}.in_layer")
        name = name.replace(f"{embedder}.mlp.2", f"{embedder}.out_layer")
    name = name.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.2")
    return name.replace("c_embedder.linear_1", "c_embedder.in_layer").replace("linear_2", "out_layer")


def test_names_of_comfyui_and_of_wrappers():
    names = list(small_dit().state_dict())
    theirs = [comfy_name(name) for name in names]
    assert len(set(theirs)) == len(names) and sum(a == b for a, b in zip(names, theirs)) < len(names) / 2
    for prefix in "", "model.", "model.model.", "diffusion_model.", "module.", "dit.":
        assert [hunyuan_name(prefix + name) for name in names] == names
        assert [hunyuan_name(prefix + name) for name in theirs] == names


def test_parts_that_do_not_fit(tmp_path):
    about, tensors = read_fixture()
    config = fixture_config(about["config"])
    state = {key[2:]: v for key, v in tensors.items() if key.startswith("w.")}
    key = "transformer_blocks.0.attn.to_k.weight"

    def refuse(says, **changes):
        save_file({**state, **changes}, tmp_path / "a.safetensors")
        with pytest.raises(UserError, match=says):
            load(config, tmp_path)

    refuse(r"to_q.weight .*to_k.weight .* has shape \(20, 20\) \+ \(20, 19\)", **{key: torch.ones(20, 19)})
    refuse(r"norm_out.linear.bias has shape \(39,\), expected \(40,\)", **{"norm_out.linear.bias": torch.ones(39)})
    refuse("same tensor, img_in.proj.bias", **{"img_in.proj.bias": torch.ones(20)})
    lost = state.pop(key)
    refuse(r"to_q.weight \+ transformer_blocks.0.attn.to_v.weight has shape .*, expected \(60, 20\)")
    refuse("unexpected tensor spare", spare=lost)


class Bomb:
    """A pickle that makes a folder when it is read."""

    def __reduce__(self):
        return Path.mkdir, (Path("exploded"),)


def test_the_official_pickle_is_read_without_running_it(tmp_path):
    state, path = small_dit(seed=1).state_dict(), tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": {name: x.bfloat16() for name, x in state.items()}, "step": 3}, path)
    dit = load(CONFIG, path)
    assert all(torch.equal(x, state[name].bfloat16().float()) for name, x in dit.state_dict().items())
    for content in {"module": Bomb()}, {"module": {"a": 3}}, [torch.ones(2)]:
        torch.save(content, path)
        with pytest.raises(UserError, match="holds no plain weights"):
            load(CONFIG, path)
    for content in b"", b"PK", pickle.dumps(3), Path(__file__).read_bytes():
        path.write_bytes(content)
        with pytest.raises(UserError, match="holds no plain weights"):
            load(CONFIG, path)
    path.unlink()
    with pytest.raises(UserError, match="no weights at"):
        load(CONFIG, path)
    assert not Path("exploded").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Memory, text, guidance


@torch.no_grad()
def test_memory_is_read_and_placed_by_positions_alone():
    dit, (x, t, text), (tokens, places) = small_dit(), inputs(), memory()
    alone = dit(x, t, text)
    assert torch.equal(alone, dit(x, t, text, None, (tokens[:, :0], places[:0])))
    near = dit(x, t, text, torch.tensor([5, 6]), (tokens, places))
    assert (near - alone).abs().max() > 1e-2
    order = [2, 0, 4, 1, 3]
    swapped = dit(x, t, text, torch.tensor([5, 6]), (tokens[:, order], places[order]))
    assert torch.allclose(near, swapped, atol=1e-5)
    far = dit(x, t, text, torch.tensor([5005, 5006]), (tokens, places + torch.tensor([5000, 0, 0])))
    assert torch.allclose(near, far, atol=1e-4)  # text comes along
    assert (dit(x, t, text, torch.tensor([5, 7.5]), (tokens, places)) - near).abs().max() > 1e-3
    each = dit(x, t, text, torch.tensor([[5, 6], [8, 9.5]]), (tokens, places.expand(2, -1, -1)))
    assert torch.allclose(each[0], near[0], atol=1e-5) and (each[1] - near[1]).abs().max() > 1e-3


@torch.no_grad()
def test_padding_is_never_read():
    dit, (x, t, text) = small_dit(), inputs(lengths=(9, 4))
    both = dit(x, t, text, memory=memory())
    assert torch.allclose(dit(x, t, F.pad(text, (0, 0, 0, 30)), memory=memory()), both, atol=1e-5)
    for i, length in enumerate((9, 4)):
        its = dict(memory=(memory()[0][i : i + 1], memory()[1]))
        alone = dit(x[i : i + 1], t[i : i + 1], text[i : i + 1, : 1 + length], **its)
        assert torch.allclose(alone, both[i : i + 1], atol=1e-5)
        shorter = dit(x[i : i + 1], t[i : i + 1], text[i : i + 1, :length], **its)
        assert (shorter - alone).abs().max() > 1e-3  # its last token is read
    other = text.clone()
    other[:, 0, 0] += 1
    assert (dit(x, t, other, memory=memory()) - both).abs().max() > 1e-3  # and the pooled vector


def test_without_a_prompt_there_is_no_text():
    dit, (x, t, text) = small_dit().requires_grad_(), inputs()
    none = dit(x, t, torch.zeros_like(text))
    mixed = dit(x, t, text * torch.tensor([1, 0])[:, None, None])
    assert torch.allclose(mixed[1], none[1], atol=1e-5) and torch.allclose(mixed[0], dit(x, t, text)[0], atol=1e-5)
    assert (none - dit(x, t, text)).abs().max() > 1e-2
    for v in none, mixed:
        v.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in dit.parameters())


@torch.no_grad()
def test_guidance_is_an_input():
    assert guidance_input(torch.tensor([6.0, 10.0, 3.5, 1.0])).tolist() == [6016, 9984, 3504, 1000]
    dit, (x, _, text), calls = small_dit(), inputs(), []
    dit.register_forward_hook(lambda m, args, kwargs, v: calls.append(kwargs.get("guidance", 1.0)), with_kwargs=True)

    def scales(guidance, steps=4, prompts=text):
        calls.clear()
        sample(dit, x, prompts, None, None, steps, guidance=guidance)
        return calls

    assert scales(1.0) == [1.0] * 4 and scales(6.0) == [6.0] * 4
    assert scales(Guidance(6.0, torch.zeros(10, 20))) == [6.0] * 4  # no negative prompt
    assert scales(Guidance(6.0, interval=(0.4, 0.8))) == [1.0, 6.0, 6.0, 1.0]  # t = 1, 0.75, 0.5, 0.25
    for needs_two in Guidance(6.0, text[0]), Guidance(6.0, zero_star=True):
        assert scales(needs_two) == [1.0] * 8
    one, six = (sample(dit, x, text, None, None, 1, guidance=g) for g in (1.0, 6.0))
    assert torch.allclose(one, x - dit(x, torch.full((2,), 1000.0), text), atol=1e-6)
    assert torch.allclose(six, x - dit(x, torch.full((2,), 1000.0), text, guidance=6.0), atol=1e-6)
    assert (one - six).abs().max() > 1e-2


@pytest.mark.parametrize("flag", ["cross_attention", "cache_memory"])
def test_what_the_dit_lacks_is_refused(flag):
    with pytest.raises(UserError, match=f"--{flag} does not work with --method proposed and --preset hunyuan: drop it"):
        MemoryDiT(base(), **{flag: True})


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_gradients_reach_all_weights_and_the_memory():
    dit, (x, t, text), (tokens, places) = small_dit(), inputs(), memory()
    tokens.requires_grad_()
    dit(x, t, text, None, (tokens, places)).sum().backward()
    # softmax ignores a bias of the keys that are not rotated; a third of a fused bias
    assert all(p.grad.abs().max() > 0 for p in dit.parameters()) and tokens.grad.abs().max() > 0


def test_recomputing_activations_changes_no_gradient():
    grads = []
    for recompute in (False, True):
        dit, (x, t, text) = small_dit(), inputs()
        dit.recompute = recompute
        dit(x, t, text, None, memory()).square().mean().backward()
        grads.append([p.grad for p in dit.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads)) and len(grads[0]) > 100


def test_a_lora_trains_and_merges():
    dit, (x, t, text), its = small_dit(), inputs(), base()
    before = dit(x, t, text, None, memory())
    its.add_lora(dit, 3)
    trained = {name: p for name, p in dit.named_parameters() if p.requires_grad}
    # qkv, proj, fc1, fc2 of video and text in double blocks, two linears in single ones; A and B each
    assert len(trained) == 2 * (2 * 8 + 3 * 2) and not any("mod" in name for name in trained)
    assert torch.equal(dit(x, t, text, None, memory()), before)
    optimizer, losses = torch.optim.Adam(trained.values(), 1e-2), []
    for _ in range(5):
        loss = (dit(x, t, text, None, memory()) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    with torch.no_grad():
        changed = dit(x, t, text, None, memory())
        its.merge_lora(dit)
        assert [n for n, _ in dit.named_parameters()] == [n for n, _ in small_dit().named_parameters()]
        assert (dit(x, t, text, None, memory()) - changed).abs().max() < 1e-5
    exported = its.exports({f"dit.{name}": p for name, p in trained.items()})["lora.safetensors"]
    assert "diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight" in exported


def test_a_lora_by_others_is_added(tmp_path):
    """Names of diffusion-pipe and musubi-tuner, on the fused linears, modulation too."""
    dit, path = small_dit(), tmp_path / "lora.safetensors"
    its, before = base(), {name: p.clone() for name, p in dit.named_parameters()}
    A, B = randn(2, 48), randn(144, 2, seed=1)
    file = {f"transformer.double_blocks.1.img_attn_qkv.lora_{k}.weight": v for k, v in dict(A=A, B=B).items()}
    other = "lora_unet_single_blocks_0_modulation_linear"
    file |= {f"{other}.lora_down.weight": A, f"{other}.lora_up.weight": B, f"{other}.alpha": torch.tensor(1.0)}
    save_file({name: v.contiguous().clone() for name, v in file.items()}, path)
    its.apply_loras(dit, f"{path}:0.5")
    moved = {name: p - before[name] for name, p in dit.named_parameters() if not torch.equal(p, before[name])}
    assert list(moved) == ["double_blocks.1.img_attn_qkv.weight", "single_blocks.0.modulation.linear.weight"]
    for scale, change in zip((0.5, 0.25), moved.values()):
        assert torch.allclose(change, scale * B @ A, atol=1e-5)
    theirs = "transformer.transformer_blocks.0.attn.to_q"
    save_file({f"{theirs}.lora_A.weight": A, f"{theirs}.lora_B.weight": randn(48, 2)}, path)
    with pytest.raises(UserError, match="unexpected tensor"):
        its.apply_loras(dit, str(path))


def test_a_frozen_base_is_held_in_the_compute_dtype(tmp_path, monkeypatch):
    monkeypatch.setattr("bases.base.compute_dtype", lambda device: torch.bfloat16)
    save_file(small_dit(seed=1).state_dict(), tmp_path / "base.safetensors")
    dit = load(CONFIG, tmp_path, device=torch.device("cpu"), frozen=True)
    its = base()
    with its.random_frozen(torch.device("cpu")):
        made = its.make_dit()
    for name, p in dit.named_parameters():
        assert p.dtype == (torch.bfloat16 if "blocks." in name and p.ndim == 2 else torch.float32), name
        assert made.get_parameter(name).dtype == p.dtype, name
    its.add_lora(dit, 2)
    x, t, text = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        rough = dit(x, t, text, None, memory())
    exact = small_dit(seed=1)(x, t, text, None, memory())
    assert (rough - exact).abs().max() < 0.15 * exact.std() and not torch.equal(rough, exact)


def test_the_bases_class_is_its_own():
    its = open_base("hunyuan")
    assert type(its) is HunyuanBase and type(dataclasses.replace(its)) is HunyuanBase
    with pytest.raises(UserError, match="prompts of HunyuanVideo need its text encoders: give --t5"):
        its.prompts("a cat")
    with pytest.raises(UserError, match="latents of HunyuanVideo need its VAE: give --vae"):
        its.codec.decode(torch.zeros(1, 16, 1, 8, 8))
    assert its.prompts("").shape == (257, 4096)
