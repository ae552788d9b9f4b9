"""The training recipe of docs/bases.md for Wan 2.1, on a Wan of tiny width and depth, with two processes."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
from encoder import load_model
from model import DiT
from tests.common import ROOT, SHARED, TINY, losses, randomize, read_csv, run, script, tiny_base, torchrun, write_video
from util.cli import UserError
from util.video import read_video, video_info
from util.weights import open_safetensors

STAGE1, STAGE2 = Path("runs/wan_pretrain/model.safetensors"), Path("runs/wan_finetune/model.safetensors")


def recipe_command(script, preset="wan-1.3b"):
    """{flag: value} of the command in docs/bases.md that starts this script."""
    text = (ROOT / "docs" / "bases.md").read_text(encoding="utf-8")
    shell = "".join(re.findall(r"^ *```sh\n(.*?)```", text, re.DOTALL | re.M)).replace("\\\n", " ")
    words = re.search(rf"torchrun .*\b{script}\.py (.*)", shell)[1].split()
    first, second = re.search(rf"preset={preset} first=(\d+) second=(\d+)", shell).groups()
    known = {"$preset": preset, "$first": first, "$second": second}
    return {flag: known.get(value, value) for flag, value in zip(words[::2], words[1::2])}


@pytest.mark.parametrize("preset", ("wan-1.3b", "wan-14b"))
def test_the_recipe_fits_80_gb(preset, capsys):
    run(script("eval"), "budget", "--preset", preset)
    most = re.search(r"largest batch in.*", capsys.readouterr().out)[0].split()[-2:]
    for stage, largest in zip(("pretrain", "finetune"), most):
        given = recipe_command(stage, preset)
        batch, micro_batch = int(given["--batch"]), int(given["--micro_batch"])
        assert given["--preset"] == preset and micro_batch <= int(largest) and batch % (8 * micro_batch) == 0


def recipe_videos(videos, folder):
    """Three captioned clips in a folder: "made" here, or "real" ones."""
    found = sorted((SHARED / "videos").rglob("*.mp4")) if videos == "real" else []
    real = [path for path in found if video_info(path)["seconds"] > 17][:3]  # a segment and a section of tiny-wan
    if videos == "real" and len(real) < 3:
        pytest.skip("needs the clips of ../shared/videos")
    folder.mkdir()
    for i in range(3):
        if videos == "made":
            write_video(folder / f"{i}.mp4", 60, i)
        else:
            shutil.copy(real[i], folder / f"{i}.mp4")
        (folder / f"{i}.txt").write_text("0s: a cat / 2s: a dog")


def train(vae, t5):
    """The cache and both stages, by the recipe's commands."""
    # a base that has not been trained has a head of zeros, through which no gradient comes
    save_file(randomize(DiT(TINY["dit"])).state_dict(), "base.safetensors")
    Path("run_data.py").write_text('from tests.common import script\n\nmain = script("data")\n')
    torchrun("run_data", "cache", "--preset", "tiny-wan", "--videos", "videos", "--out", "c", "--vae", vae, "--t5", t5)
    changed = {"--preset": "tiny-wan", "--init": "base.safetensors", "--data": "c", "--device": "cpu"}
    changed |= {"--batch": 2, "--steps": 4, "--save_every": 4, "--warmup": 1, "--lr": 0.03, "--ema": 0}
    for stage, more in ("pretrain", {"--queries": 2}), ("finetune", {"--vae": vae}):
        given = recipe_command(stage) | changed | {"--sample_steps": 1} | more
        torchrun(stage, *(x for pair in given.items() for x in pair))


def check_runs():
    """Both stages trained everything that they should, and logged it."""
    stage1, stage2 = load_file(STAGE1), load_file(STAGE2)
    for tensors in stage1, stage2:
        assert all(x.abs().max() >= 1e-3 for name, x in tensors.items() if name.endswith("lora_B"))
    still = [name for name, x in stage2.items() if x.ndim > 1 and torch.equal(x, stage1[name])]
    assert still == ["encoder.patch_embedding.weight"]  # for frames that wait: with Wan there are none
    assert min(losses(STAGE1.parent, "grad_norm") + losses(STAGE2.parent, "grad_norm")) > 0
    assert {n.split(".")[0] for n in stage2} == {"dit", "encoder"}
    assert all(".lora_" in n for n in stage2 if n.startswith("dit."))
    assert STAGE2.with_name("preview_000004.png").is_file()
    assert "latent_mse" in STAGE1.with_name("log.jsonl").read_text()
    assert "psnr" in STAGE2.with_name("log.jsonl").read_text()


def check_exported_lora():
    """The LoRA under the names that ComfyUI reads."""
    exported, stage2 = load_file(STAGE2.with_name("lora.safetensors")), load_file(STAGE2)
    linears = [f"{a}.{p}" for a in ("self_attn", "cross_attn") for p in "qkvo"] + ["ffn.0", "ffn.2"]
    names = {f"blocks.{i}.{m}.lora_{x}" for i in range(TINY["dit"].layers) for m in linears for x in "AB"}
    assert exported.keys() == {f"diffusion_model.{name}.weight" for name in names}
    assert all(torch.equal(exported[f"diffusion_model.{name}.weight"], stage2[f"dit.{name}"]) for name in names)


def check_samples(vae, t5):
    """A clip is continued by the LoRA, merged or not, otherwise than without it."""
    config, tensors = open_safetensors(STAGE2).metadata()["config"], load_file(STAGE2)
    tensors = {n: x * 0 if n.endswith("lora_B") else x for n, x in tensors.items()}
    save_file(tensors, "without.safetensors", {"config": config})
    common = "--history", "videos/0.mp4", "--init", "base.safetensors", "--vae", vae, "--t5", t5, "--device", "cpu"
    written = []
    for given in (STAGE2,), (STAGE2, "--merge"), ("without.safetensors",):
        run(sample.main, *common, "--seconds", 1, "--steps", 2, "--checkpoint", *given)
        written.append(read_video("out/0.mp4", 2, 32, 32)[-16:].float())  # a section is 4 latents of 4 frames
    merged, without = ((x - written[0]).abs().mean() for x in written[1:])
    assert 10 * merged < without and without > 1, (merged, without)  # merged weights are rounded to bf16


def check_retrieval(vae):
    """Frames of a clip, and of a folder of clips, are retrieved."""
    common = "--init", "base.safetensors", "--vae", vae, "--device", "cpu", "--steps", 1, "--queries", 2
    run(script("eval"), "retrieval", "--checkpoint", STAGE1, "--history", "videos/1.mp4", *common)
    assert Image.open("out/retrieval.png").width > 2 * 32
    run(script("eval"), "table1", STAGE1.parent, "--data", "videos", "--out", "tables", *common)
    ceiling, row = read_csv("tables/table1_video.csv")
    assert 3 < float(row["psnr"]) < 100 and 3 < float(ceiling["psnr"]) < 100


def check_refusals():
    """A LoRA of another base is refused, and so is one without a base."""
    base, tensors = tiny_base("tiny-wan"), load_file(STAGE2)
    tensors["dit.blocks.7.self_attn.q.lora_A"] = tensors.pop("dit.blocks.0.self_attn.q.lora_A")
    save_file(tensors, "bad.safetensors", {"config": open_safetensors(STAGE2).metadata()["config"]})
    with pytest.raises(UserError, match="unexpected tensor dit.blocks.7"):
        load_model("bad.safetensors", base, "base.safetensors")
    with pytest.raises(UserError, match="give the base DiT too"):
        load_model(STAGE2, base)


@pytest.mark.optional
@pytest.mark.parametrize("videos", ("made", "real"))
def test_the_recipe_on_two_processes(videos, tmp_path, vae, t5):
    """Cache, both stages, a continued clip and figures of retrieval."""
    recipe_videos(videos, tmp_path / "videos")
    train(vae, t5)
    check_runs()
    check_exported_lora()
    check_samples(vae, t5)
    check_refusals()
    check_retrieval(vae)
