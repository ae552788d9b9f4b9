"""PSNR, SSIM and LPIPS: known values, by hand, against the packages; and the commands that print them."""

import math
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import eval as evaluation
from bench.lpips import LPIPS
from bench.retrieval import RetrievalConfig, clean_retrieval, measure, reconstruct
from data import story_clips
from encoder import MemoryDiT
from sample import sample
from tests.common import randn, randomize, run, tiny_base, write_checkpoint, write_video
from util.cli import UserError
from util.device import autocast
from util.video import to_frames, to_pixels


class Bomb:
    """A pickle that makes a folder when it is read."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def random_frames(*shape, seed=0, spread=60):
    """uint8 frames (*shape, 3)."""
    return (128 + spread * randn(*shape, 3, seed=seed)).clamp(0, 255).to(torch.uint8)


def pictures(seed=0):
    """Three frames and noisy copies of them."""
    a = random_frames(3, 20, 27, seed=seed, spread=40)
    return a, (a.float() + 25 * randn(3, 20, 27, 3, seed=seed + 1)).clamp(0, 255).to(torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# PSNR and SSIM


def test_psnr_known_values():
    a = torch.full((2, 8, 8, 3), 100, dtype=torch.uint8)
    assert evaluation.psnr(a, a).tolist() == [100, 100]
    b = a + torch.tensor([10, 20]).to(torch.uint8).view(2, 1, 1, 1)
    assert evaluation.psnr(a, b).tolist() == pytest.approx([28.1308, 22.1102], abs=1e-3)


def test_ssim_of_equal_and_of_flat_frames():
    def flat(level):
        return torch.full((1, 16, 16, 3), level, dtype=torch.uint8)

    a, b = pictures()
    assert torch.allclose(evaluation.ssim(a, a), torch.ones(3).double())
    assert (evaluation.ssim(a, b) < 0.99).all()
    c1 = 2.55**2
    expected = (2 * 100 * 140 + c1) / (100**2 + 140**2 + c1)
    assert evaluation.ssim(flat(100), flat(140)).item() == pytest.approx(expected)
    with pytest.raises(UserError, match="11 x 11"):
        evaluation.ssim(a[:, :10], b[:, :10])


def test_ssim_by_hand():
    """One window: the formula as it is written."""
    a, b = (x[:1, :11, :11] for x in pictures())
    row = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights = np.outer(row, row) / row.sum() ** 2
    c1, c2, channels = 2.55**2, 7.65**2, []

    def mean(z):
        return (weights * z).sum()

    for x, y in zip(*(z[0].double().numpy().transpose(2, 0, 1) for z in (a, b))):
        dx, dy = x - mean(x), y - mean(y)
        light = (2 * mean(x) * mean(y) + c1) / (mean(x) ** 2 + mean(y) ** 2 + c1)
        structure = (2 * mean(dx * dy) + c2) / (mean(dx**2) + mean(dy**2) + c2)
        channels.append(light * structure)
    assert evaluation.ssim(a, b).item() == pytest.approx(np.mean(channels), abs=1e-6)


def test_ssim_equals_that_of_scikit_image():
    a, b = pictures()
    # scikit-image 0.26: structural_similarity(a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    # data_range=255, channel_axis=-1) of each pair
    assert evaluation.ssim(a, b).tolist() == pytest.approx([0.8328877, 0.7953046, 0.8480581], abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# LPIPS


def write_lpips(folder="lpips", backbone=None, linear=None):
    """A folder of weights named as torchvision and the lpips package name theirs; random ones by default."""
    folder = Path(folder)
    folder.mkdir()
    if backbone is None:
        sizes = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}
        backbone, linear = {}, {}
        for k, (i, size) in enumerate(sizes.items()):
            backbone[f"features.{i}.weight"] = randn(*size, seed=i) * math.prod(size[1:]) ** -0.5
            backbone[f"features.{i}.bias"] = 0.1 * randn(size[0], seed=i + 50)
            linear[f"lin{k}.model.1.weight"] = randn(1, size[0], 1, 1, seed=k).abs()
    torch.save({**backbone, "classifier.1.weight": torch.ones(2, 2)}, folder / "alexnet-owt-7be5be79.pth")
    torch.save(linear, folder / "alex.pth")
    return backbone, linear


def unit_features(frames, w):
    """The normalised features of the five layers, in plain steps and double precision."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]).double(), torch.tensor([0.458, 0.448, 0.450]).double()
    x, layers = ((frames.double() / 127.5 - 1 - shift) / scale).permute(0, 3, 1, 2), []
    for i, stride, padding in (0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1):
        x = F.max_pool2d(x, 3, 2) if i in (3, 6) else x
        x = F.conv2d(x, w[f"features.{i}.weight"], w[f"features.{i}.bias"], stride, padding).clamp(min=0)
        layers.append(x / x.norm(dim=1, keepdim=True))
    return layers


def test_lpips_by_hand():
    w, linear = ({k: v.double() for k, v in part.items()} for part in write_lpips())
    a, b = (random_frames(3, 33, 40, seed=seed) for seed in range(2))
    distance = 0
    for k, (x, y) in enumerate(zip(unit_features(a, w), unit_features(b, w))):
        weights = linear[f"lin{k}.model.1.weight"].view(1, -1, 1, 1)
        distance = distance + (weights * (x - y) ** 2).sum(1).mean((1, 2))
    lpips = LPIPS("lpips")
    assert distance.min() > 0.1
    assert (lpips(a, b) - distance).abs().max() < 1e-4 * distance.max()
    assert lpips(a, a).tolist() == [0, 0, 0]
    assert torch.allclose(lpips(a, b), lpips(b, a))
    each = measure(a[:, None], b[:, None], lpips)["lpips"]
    assert each.shape == (3, 1) and torch.allclose(each[:, 0], lpips(a, b), atol=1e-5)
    with pytest.raises(UserError, match="31 x 31"):
        lpips(a[:, :30], b[:, :30])


def test_lpips_reads_safetensors():
    write_lpips()
    a, b = (random_frames(1, 33, 40, seed=seed) for seed in range(2))
    expected = LPIPS("lpips")(a, b)
    save_file(torch.load("lpips/alex.pth"), "lpips/alex.safetensors")
    Path("lpips/alex.pth").unlink()
    assert torch.equal(LPIPS("lpips")(a, b), expected)


def alexnet(**given):
    """The layers of torchvision's AlexNet, of which the lpips package asks torchvision; its wheels do not load beside
    every build of torch."""
    sizes = (3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1)
    layers = []
    for i, size in enumerate(sizes):
        layers += [torch.nn.Conv2d(*size), torch.nn.ReLU(), *[torch.nn.MaxPool2d(3, 2)] * (i in (0, 1, 4))]
    return SimpleNamespace(features=torch.nn.Sequential(*layers))


@pytest.mark.optional
def test_lpips_equals_the_package(monkeypatch):
    torchvision = ModuleType("torchvision")
    torchvision.models = SimpleNamespace(alexnet=alexnet)
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    package = pytest.importorskip("lpips").LPIPS(net="alex", pretrained=False, pnet_rand=True, verbose=False).eval()
    state = randomize(package).state_dict()
    backbone = {f"features.{k.split('.', 2)[2]}": v for k, v in state.items() if k.startswith("net.")}
    linear = {k: v.abs() for k, v in state.items() if k.startswith("lin") and not k.startswith("lins")}
    package.load_state_dict(linear, strict=False)
    write_lpips("lpips", backbone, linear)
    a, b = (random_frames(4, 64, 48, seed=seed) for seed in range(2))
    with torch.no_grad():
        expected = package(*(to_pixels(x).transpose(0, 1) for x in (a, b))).flatten()
    assert expected.min() > 0.01
    assert (LPIPS("lpips")(a, b) - expected).abs().max() < 1e-5


def drop_bias(backbone, linear):
    backbone.pop("features.3.bias")


def add_layer(backbone, linear):
    linear["lin5"] = torch.ones(1)


def change_shape(backbone, linear):
    backbone["features.0.weight"] = torch.ones(64, 3, 3, 3)


def put_nan(backbone, linear):
    linear["lin2.model.1.weight"].fill_(math.nan)


@pytest.mark.parametrize(
    "damage, says",
    [
        (drop_bias, "3.bias is not there"),
        (add_layer, "lin5"),
        (change_shape, "0.weight is \\(64, 3, 3, 3\\)"),
        (put_nan, "lin2.weight"),
        (None, "alex.pth"),
    ],
)
def test_lpips_refuses_weights_that_do_not_fit(damage, says):
    parts = write_lpips("good")
    if damage:
        damage(*parts)
    write_lpips("bad", *parts)
    if not damage:
        torch.save(Bomb(), "bad/alex.pth")
    with pytest.raises(UserError, match=says) as error:
        LPIPS("bad")
    assert "\n" not in str(error.value) and not Path("exploded").exists()


def test_lpips_names_the_files_it_needs():
    write_lpips()
    Path("lpips/alex.pth").unlink()
    with pytest.raises(UserError, match="--lpips lpips holds 0 files alex"):
        LPIPS("lpips")


# ---------------------------------------------------------------------------------------------------------------------
# python eval.py retrieval, continuation


def printed_means(text):
    """{row: PSNR} of what the commands print."""
    return {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if "±" in line}


def test_retrieval_of_stories(stage1, cache, capsys):
    given = "--checkpoint", stage1 / "model.safetensors", "--steps", 2, "--cache", cache, "--clips", 2, "--out", "a.png"
    run(evaluation.main, "retrieval", *given)
    printed = capsys.readouterr().out
    means = printed_means(printed)
    assert Path("a.png").is_file()
    assert "step 40, seed 0; 2 clips x 4 frames" in printed and printed.count("n/a") == 5
    assert list(means) == ["codec", "one_step", "model", "no_memory", "wrong_memory"]
    assert means["codec"] > 20 and means["codec"] == max(means.values())


def test_retrieval_of_your_own_clip(stage1, capsys):
    write_video("clip.mp4", 10)
    write_lpips()
    given = "--checkpoint", stage1 / "model.safetensors", "--steps", 2, "--history", "clip.mp4", "--lpips", "lpips"
    run(evaluation.main, "retrieval", *given)
    printed, error = capsys.readouterr()
    assert Path("out/retrieval.png").is_file() and "n/a" not in printed and "no row wrong_memory" in error
    rows = [line.split()[0] for line in printed.splitlines()[2:-1]]
    assert rows == ["codec", "one_step", "model", "no_memory"]  # there is no other clip


@torch.no_grad()
def test_controls_have_the_memory_of_the_next_clip_and_none(cache):
    base, config = tiny_base(), RetrievalConfig(steps=1, batch=2, device="cpu")
    model, clips = randomize(MemoryDiT(base)), story_clips("held-out", 2, base, cache, (2, 4, 4), keep_pixels=True)
    draw = clean_retrieval(config, base, model.encoder, clips)
    made, batch = reconstruct(model, base, draw, 2, config), draw([0, 1])
    with autocast(torch.device("cpu")):
        tokens, positions = model.encoder.encode(batch.high, batch.low)
        memories = {"model": (tokens, positions), "wrong_memory": (tokens.flip(0), positions), "no_memory": None}
        x = {key: sample(model.dit, batch.noise, batch.text, batch.times, m, 1) for key, m in memories.items()}
    for name in memories:
        assert torch.equal(made[name], to_frames(base.codec.decode(x[name].float()))), name
    assert not torch.equal(made["model"], made["wrong_memory"])
    assert not torch.equal(made["model"], made["no_memory"])


def test_continuation_of_stories(cache, capsys):
    path = write_checkpoint()
    run(evaluation.main, "continuation", "--checkpoint", path, "--steps", 1, "--cache", cache, "--clips", 2)
    printed = capsys.readouterr().out
    means = printed_means(printed)
    assert Path("out/continuation.png").is_file() and "step 7, seed 0; 2 clips x 4 frames, with prompts" in printed
    assert means["one_step"] == means["model"] < means["codec"]


def test_a_checkpoint_of_the_other_stage_is_refused(refused, cache):
    path = write_checkpoint()
    assert "is of stage finetune: give one of pretrain.py" in refused(
        evaluation.main, "retrieval", "--checkpoint", path
    )
    path = write_checkpoint(stage="pretrain")
    assert "give one of finetune.py" in refused(evaluation.main, "continuation", "--checkpoint", path)


def test_too_short_a_clip_is_refused(refused):
    path = write_checkpoint(stage="pretrain")
    write_video("clip.mp4", 3)
    error = refused(evaluation.main, "retrieval", "--checkpoint", path, "--history", "clip.mp4")
    assert "3 frames at 2 fps; at least 4 are needed" in error
