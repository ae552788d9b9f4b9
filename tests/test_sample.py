"""Sampling: a clip goes in, the clip and what follows it come out."""

import math
import re
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
import pytest
import torch

import finetune
import sample
from data import check_prompts
from dolls.stories import make_story
from encoder import MemoryDiT, find_method, load_model
from sample import Memory
from tests.common import (
    ROOT,
    flags,
    greys,
    randn,
    randomize,
    run,
    tiny_base,
    write_checkpoint,
    write_raw,
    write_video,
)
from util.sections import section_prompts
from util.video import read_video
from util.weights import read_config


@pytest.mark.parametrize(
    "method, given, count",
    [
        ("sliding-window", {"window": 3}, 3 * 16),
        ("keyframes", {}, 2 * 16),
        ("token-merging", {"encoder": "none"}, 3 * 2),
    ],
)
def test_other_methods_go_through_stage_2_and_sampling(method, given, count, cache, capsys):
    if not find_method(method).has_stage1:  # even where a run of stage 1 lies ready
        given = {**given, "encoder": "runs/pretrain"}
    run(finetune.main, *flags(cache, out="run", method=method, rate="4x4x2", steps=1, **given))
    path = "run/model.safetensors"
    assert load_model(path, tiny_base()).config.window == read_config(path)["window"] == given.get("window", 0)
    write_video("clip.mp4", 12)
    common = "--history", "clip.mp4", "--checkpoint", path
    run(sample.main, *common, "--seconds=2", "--steps=1", "--save_file=b.mp4")
    assert len(read_video("b.mp4", 2, 32, 32)) == 12 + 4
    assert f"memory: {count} tokens" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Section after section


def continued(prompt="", sections=3, base=None, most=None, **settings):
    """Frames of `sections` new sections after a random history, and the memory."""
    base = base or tiny_base()
    model = randomize(MemoryDiT(base))
    memory = Memory(model, base.codec, most)
    history, decode = randn(1, 16, 10, 8, 8), base.codec.decoder()
    memory.append(history, decode(history))
    settings = {"steps": 2, "guidance": 1.5, "shift": 3.0, "prompt": prompt, "seconds": 2.0 * sections, **settings}
    config = sample.SampleConfig(**settings)
    _, prompts = section_prompts(config, base, clip_seconds=5)
    texts = sample.embed_prompts(config, base, prompts)
    made = sample.continue_video(model, base, memory, decode, texts, config, (32, 32))
    return torch.cat([frames for frames, _ in made]), memory


def test_sampling_depends_on_the_seed_alone():
    a, b, c = continued(seed=1)[0], continued(seed=1)[0], continued(seed=2)[0]
    assert a.shape == (12, 32, 32, 3) and torch.equal(a, b) and (a.float() - c).abs().mean() > 1
    assert torch.equal(continued(seed=1, sections=1)[0], a[:4])


def test_sampling_gives_each_section_its_prompt():
    base, said = tiny_base(), []
    embed = base.prompts
    base.prompts = lambda text: said.append(text) or embed(text)
    a, _ = continued("0s: a cat / 3.5s: a dog", base=base)
    assert sorted(said) == ["a cat", "a dog"]  # once each; sections begin at 0, 2 and 4 s
    b, _ = continued("a cat")
    assert torch.equal(a[:8], b[:8]) and not torch.equal(a[8:], b[8:])


def test_sampling_reads_memory_and_bounds_it():
    a, everything = continued(sections=5)
    b, bounded = continued(sections=5, most=2)
    assert everything.frames == bounded.frames == 30
    # 7 whole segments of 2 tokens, or the newest 2; and 2 frames of 16 tokens that wait
    assert everything.context()[0].shape[1] == 7 * 2 + 2 * 16 and bounded.context()[0].shape[1] == 2 * 2 + 2 * 16
    assert torch.equal(a[:4], b[:4]) and not torch.equal(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# The script


def test_sample_writes_the_history_then_what_follows(capsys):
    history, checkpoint = write_video("clip.mp4", 10), write_checkpoint()
    common = ["--history", "clip.mp4", "--checkpoint", checkpoint, "--seconds", 3, "--prompt", "waves"]
    run(sample.main, *common, "--steps", 2, "--guidance", 2, "--shift", 3, "--seed", 5, "--save_file", "new/a.mp4")
    assert "wrote new/a.mp4" in capsys.readouterr().out and Path("new/a.png").is_file()
    made = read_video("new/a.mp4", 2, 32, 32)
    assert len(made) == 10 + 8  # 3 s are two sections of 2 s
    assert (made[:10].float() - history.float()).abs().mean() < 4 and made[10:].float().std() > 5
    wans = "--sample_steps", 2, "--sample_guide_scale", 2, "--sample_shift", 3, "--base_seed", 5  # Wan's own names
    run(sample.main, *common, *wans, "--save_file", "b.mp4")
    assert torch.equal(read_video("b.mp4", 2, 32, 32), made)
    run(sample.main, *common, "--steps", 2, "--guidance", 2, "--shift", 3, "--seed", 6, "--save_file", "c.mp4")
    assert not torch.equal(read_video("c.mp4", 2, 32, 32), made)


def test_sample_guides_away_from_what_it_is_told(capsys):
    write_video("clip.mp4", 10)
    common = "--history", "clip.mp4", "--checkpoint", write_checkpoint(), "--seconds=2", "--steps=2", "--guidance=3"

    def made(*given):
        run(sample.main, *common, *given, "--save_file=a.mp4")
        return Path("a.mp4").read_bytes()

    prompt = "--prompt=waves"
    plain, unguided, away = made(prompt), made(prompt, "--guidance=1"), made(prompt, "--negative=a cat")
    assert len({plain, unguided, away, made(prompt, "--cfg_zero")}) == 4
    # where both passes are the same, or there is no guidance
    assert unguided == made(prompt, "--negative=waves") == made(prompt, "--guidance_interval", 0, 0.1)
    assert len({made(), made("--guidance=1"), made("--cfg_zero"), made("--guidance_interval", 0, 0.1)}) == 1
    assert made("--negative=a cat") not in (made(), away)
    assert "never seen waves, a, cat;" in capsys.readouterr().err


def test_sample_knows_another_solver():
    write_video("clip.mp4", 10)
    common = "--history", "clip.mp4", "--checkpoint", write_checkpoint(), "--seconds=2", "--steps=4"
    for name, given in ("a", []), ("b", ["--solver=unipc"]), ("c", ["--sample_solver=unipc"]):  # as Wan calls it
        run(sample.main, *common, *given, f"--save_file={name}.mp4")
    a, b, c = (Path(f"{name}.mp4").read_bytes() for name in "abc")
    assert a != b and b == c


def test_the_readmes_lines_of_python_write_a_section(monkeypatch):
    monkeypatch.chdir(ROOT)
    made, text = {}, Path("README.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], made)
    assert made["frames"].shape == (4, 128, 128, 3) and made["frames"].float().std() > 5
    assert made["memory"].frames == 44 and made["memory"].context()[0].shape == (1, 11 * 32, 256)


def test_sample_takes_the_storyboard_beside_the_clip(capsys):
    base = tiny_base()  # sections of 2 s

    def prompts(clip_seconds, **given):
        config = sample.SampleConfig(history="clip.mp4", **{"seconds": 6.0} | given)
        return section_prompts(config, base, clip_seconds)

    assert prompts(10) == ([], ["", "", ""])
    Path("clip.txt").write_text("0s: a cat\n10s: a dog\n13s: a cow")
    assert prompts(10) == ([(-10, "a cat"), (0, "a dog"), (3, "a cow")], ["a dog", "a dog", "a cow"])
    two = "0s: a bee / 5s: a bear"
    assert prompts(10, prompt=two) == ([(0, "a bee"), (5, "a bear")], ["a bee"] * 3)
    assert not capsys.readouterr().err
    prompts(10, prompt=two, seconds=4.0)
    assert "--prompt: its storyboard goes on to 5 s, but the video ends at 4 s" in capsys.readouterr().err
    prompts(14)
    assert "ends before the clip does" in capsys.readouterr().err


def test_words_that_no_caption_has_are_warned_of(capsys):
    story = make_story(3, 13)
    check_prompts("world", [story.caption(k) for k in range(13)])
    check_prompts("my_videos", ["beach wide tall dragon"])
    assert not capsys.readouterr().err
    check_prompts("world", ["beach wide tall dragon"])
    assert "never seen dragon;" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["one frame", "4 x 4 pixels", "shorter than a segment", "tall", "no memory", "cached"])
def test_sample_takes_odd_clips(case):
    sizes = {"one frame": (1, 32, 32), "4 x 4 pixels": (12, 4, 4), "tall": (12, 50, 22)}
    n, h, w = sizes.get(case, (3, 32, 32))
    write_raw("a.mkv", greys(n, h, w), "ffv1", "bgr0", times=[500 * i for i in range(n)])
    method = "none" if case == "no memory" else "proposed"
    checkpoint = write_checkpoint(method=method, cache_memory=case == "cached")
    common = "--history", "a.mkv", "--checkpoint", checkpoint
    run(sample.main, *common, "--seconds=2", "--steps=1", "--save_file=b.mp4")
    assert len(read_video("b.mp4", 2, 32, 32)) == n + 4


@pytest.mark.parametrize("name", ["a.png", "b.jpg", "out/c.png"])
def test_sample_begins_with_a_picture(name, capsys):
    """It is a history of one frame, which waits uncompressed; 16 tokens."""
    Path("out").mkdir()
    x = np.arange(48)
    picture = np.stack([np.add.outer(3 * x[:40], 2 * x), *[np.full((40, 48), 90)] * 2], axis=-1).astype(np.uint8)
    iio.imwrite(name, picture)
    whole = Path(name).read_bytes()
    run(sample.main, "--history", name, "--checkpoint", write_checkpoint(), "--seconds=3", "--steps=1")
    said, file = capsys.readouterr(), Path("out") / f"{Path(name).stem}{'_continued' * name.startswith('out')}.mp4"
    made, (frame,) = read_video(file, 2, 32, 32), read_video(name, 2, 32, 32)
    assert len(made) == 1 + 8 and (made[0].float() - frame.float()).abs().mean() < 6
    assert "memory: 16 tokens for its newest 0.5 s (uncompressed: 16)" in said.out
    assert "tiny.safetensors was trained on histories of at least 2 s, and this one has 0.5 s" in said.err
    assert file.with_suffix(".png").is_file() and Path(name).read_bytes() == whole


def test_sample_begins_with_a_text_alone(capsys, refused):
    common = "--checkpoint", write_checkpoint(), "--seconds=4", "--steps=1"
    assert "--history is missing" in refused(sample.main, *common)
    run(sample.main, *common, "--prompt", "0s: a cat / 2s: a dog")
    said, made = capsys.readouterr(), read_video("out/text.mp4", 2, 32, 32)
    assert len(made) == 8 and "memory: 0 tokens" in said.out and "without memory" not in said.err
    assert "and this one has 0 s" in said.err
    sheet = iio.imread("out/text.png")
    assert sheet.shape[0] < 2 * 128  # one row
    run(sample.main, *common, "--prompt", "0s: a cat / 2s: a cow", "--save_file=b.mp4")
    other = read_video("b.mp4", 2, 32, 32)
    assert torch.equal(made[:4], other[:4]) and not torch.equal(made[4:], other[4:])


def test_a_clip_as_long_as_those_of_training_is_not_warned_of(capsys):
    common = "--checkpoint", write_checkpoint(), "--seconds=2", "--steps=1"
    for n, warnings in (3, 1), (4, 0):
        write_video(f"{n}.mp4", n)
        run(sample.main, "--history", f"{n}.mp4", *common)
        assert capsys.readouterr().err.count("was trained on histories of at least 2 s") == warnings


def test_sampling_from_nothing_reads_no_memory_at_first():
    base = tiny_base()
    model, seen = randomize(MemoryDiT(base)), []
    model.dit.register_forward_pre_hook(lambda _, args: seen.append(args))
    memory = Memory(model, base.codec)
    config = sample.SampleConfig(steps=1, guidance=1, shift=3.0)
    texts = [randn(24, 16)] * 2
    made = list(sample.continue_video(model, base, memory, base.codec.decoder(), texts, config, (32, 32)))
    assert [frames.shape for frames, _ in made] == [(4, 32, 32, 3)] * 2
    assert [(x.shape[2], times.tolist()) for x, _, _, times, _ in seen] == [(4, [0, 1, 2, 3]), (4, [4, 5, 6, 7])]
    assert seen[0][4] is None and seen[1][4][0].shape[1] == 2


def test_sample_goes_on_from_what_is_left_of_a_video(capsys):
    write_video("good.mp4")
    whole = Path("good.mp4").read_bytes()
    Path("half.mp4").write_bytes(whole[: len(whole) // 2])
    run(sample.main, "--history", "half.mp4", "--checkpoint", write_checkpoint(), "--seconds=2", "--steps=1")
    assert "half.mp4 is damaged or cut off" in capsys.readouterr().err and Path("out/half.mp4").is_file()


def test_sample_takes_frames_that_are_not_numbers():
    """Of a video in floating point; FFmpeg turns them into bytes."""
    options = {"strict": "experimental", "level": "4"}
    with av.open("a.mkv", "w") as file:
        stream = file.add_stream("ffv1", rate=2, width=32, height=32, pix_fmt="gbrpf32le", options=options)
        for _ in range(6):
            frame = av.VideoFrame(32, 32, "gbrpf32le")
            for plane in frame.planes:
                plane.update(np.full(plane.buffer_size // 4, math.nan, np.float32).tobytes())
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    common = "--history", "a.mkv", "--checkpoint", write_checkpoint()
    run(sample.main, *common, "--seconds=2", "--steps=1", "--save_file=b.mp4")
    assert len(read_video("b.mp4", 2, 32, 32)) == 6 + 4
