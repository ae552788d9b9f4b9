"""The clips to train on: epochs, stories, folders of videos. (Caches of latents: test_cache.py.)"""

import dataclasses
from pathlib import Path

import pytest
import torch

import data
import pretrain
from bench.table1 import held_out_videos
from data import Clip, Clips, story_clips
from eval import psnr
from tests.common import flags, tiny_base, write_video
from util import latents
from util.cli import UserError, warn
from util.video import to_frames

# ---------------------------------------------------------------------------------------------------------------------
# Epochs


def make_clips(*sizes, frames=4):
    """Clips of these sizes, without content."""
    return Clips([Clip(torch.zeros(16, frames, *size), []) for size in sizes])


def test_an_epoch_covers_every_clip_once():
    sizes = [(8, 8)] * 9 + [(8, 14)] * 6 + [(14, 8)]
    clips = make_clips(*sizes)
    epoch = [clips.batch(step, 3, seed=0) for step in range(6)]
    assert all(len(batch) == 3 and len({sizes[i] for i in batch}) == 1 for batch in epoch)
    assert sorted(i for batch in epoch for i in batch) == [*range(15), 15, 15, 15]  # a small bucket repeats clips


def test_clips_of_a_rare_size_are_left_out(capsys):
    warn.cache_clear()  # it prints each message once
    clips = make_clips(*[(8, 8)] * 9, *[(8, 14)] * 6, (14, 8))
    batches = [clips.batch(step, 5, seed=0) for step in range(4)]  # one clip of a kind, less than a quarter of five
    assert 15 not in {i for batch in batches for i in batch} and [*map(len, batches)] == [5] * 4
    assert "1 clips are left out" in capsys.readouterr().err
    assert set(make_clips((14, 8)).batch(0, 5, seed=0)) == {0}  # unless there is nothing else


def test_clips_shorter_than_a_history_have_batches_of_their_own():
    mixed = Clips([Clip(torch.zeros(16, frames, 8, 8), []) for frames in (9, 4, 8, 7, 9, 5)], full=8)
    batches = {frozenset(mixed.batch(step, 3, seed=0)) for step in range(2)}
    assert batches == {frozenset({0, 2, 4}), frozenset({1, 3, 5})}


def test_a_batch_is_a_function_of_seed_and_step():
    sizes = [(8, 8)] * 9 + [(8, 14)] * 6 + [(14, 8)]
    clips, again = make_clips(*sizes), make_clips(*sizes)
    batches = [clips.batch(step, 3, seed=0) for step in range(12)]
    assert [again.batch(step, 3, seed=0) for step in reversed(range(12))][::-1] == batches
    assert batches[:6] != batches[6:]
    assert batches[:6] != [clips.batch(step, 3, seed=1) for step in range(6)]


# ---------------------------------------------------------------------------------------------------------------------
# Stories


def test_stories_are_cached(tmp_path, monkeypatch):
    base = tiny_base()
    first = story_clips("train", 2, base, tmp_path, keep_pixels=True)
    files = list(tmp_path.iterdir())
    story_clips("train", 2, dataclasses.replace(base, sizes=((64, 64),)), tmp_path)
    assert len(files) == 1 and len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr("dolls.dataset.encode_frames", None)  # from here on nothing may be drawn for latents
    for a, b in zip(first.clips, story_clips("train", 2, base, tmp_path).clips):
        assert torch.equal(a.latents, b.latents) and a.storyboard == b.storyboard and b.pixels is None


def test_a_damaged_cache_of_stories_is_named(tmp_path):
    story_clips("train", 1, tiny_base(), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(UserError, match=f"{file.name} is damaged: delete it"):
        story_clips("train", 1, tiny_base(), tmp_path)


def test_a_story_as_a_clip(tmp_path):
    base = tiny_base()
    clip = story_clips("train", 2, base, tmp_path, keep_pixels=True)[1]
    assert clip.latents.shape == (16, 52, 8, 8) and clip.pixels.shape == (52, 32, 32, 3)
    assert (clip.frames, clip.size) == (52, (8, 8)) and torch.equal(clip.cut(5, 9)[0], clip.latents[:, 5:9].float())
    assert psnr(to_frames(base.codec.decode(clip.cut(0, 52)))[0], clip.pixels).min() > 20
    assert clip.prompt(7) == clip.prompt(4) == clip.story.caption(1) != clip.prompt(8)
    assert torch.equal(clip.text(7, base.prompts)[0], base.prompts(clip.story.caption(1)))
    assert torch.equal(clip.truth(torch.tensor([5, 9]))[0], clip.pixels[[5, 9]])


def test_stories_ask_only_for_what_the_history_shows(clips):
    for clip in clips:
        for n in range(1, 11):
            targets = clip.targets(n, 4)
            assert n < 10 or 40 in targets
            for begin in targets:
                asked = clip.story.shots[begin // 4]
                seen = [s for s in clip.story.shots[begin // 4 - n : begin // 4] if s.framing == 0]
                for field in "scene", "character", "thing":
                    assert getattr(asked, field) in [None, *(getattr(s, field) for s in seen)]


def test_videos_ask_for_every_section_that_they_hold():
    clip = Clip(torch.zeros(16, 11, 8, 8), [])
    assert clip.targets(1, 4) == [4, 5, 6, 7] and clip.targets(2, 4) == []


# ---------------------------------------------------------------------------------------------------------------------
# Folders of videos


@pytest.fixture
def folder(tmp_path):
    """Six videos of 10 to 15 frames with storyboards; one is no video, another has no storyboard."""
    folder = tmp_path / "videos"
    for i in range(6):
        write_video(folder / f"{i}.mp4", 10 + i, i)
        (folder / f"{i}.txt").write_text(f"0s: waves {i} / 2s: more {i}")
    (folder / "0.mp4").write_text("not a video")
    (folder / "1.txt").unlink()
    return folder


def test_captions_may_come_from_elsewhere_and_go_on_after_the_end(folder, capsys):
    """A dataset brings its own; those of the paper-doll stories are three sections longer than their videos."""
    paths = sorted(folder.glob("[1-5].mp4"))
    captions = lambda path: [(0, path.stem), (30, "later")]
    encoded, _ = latents.encode_videos(folder, paths, tiny_base(), "cache", captions=captions)
    assert encoded["3.mp4"]["storyboard"] == [(0, "3"), (60, "later")]
    error = capsys.readouterr().err
    assert error.count("warning: ") == 1 and "5 storyboards go on after their videos end (as that of" in error


def test_a_lone_held_out_clip_is_named(folder, cache, capsys):
    """There is no other whose memory could be the wrong one."""
    data.open_dataset(str(folder), tiny_base(), "cache", 1, 1)
    assert capsys.readouterr().err.count("one clip is held out") == 1
    data.open_dataset("world", tiny_base(), cache, 8, 2)
    assert "held out" not in capsys.readouterr().err


def test_a_mistyped_dataset_is_answered_with_their_names(refused, cache, monkeypatch):
    monkeypatch.setitem(data.DATASETS, "gifs", "gifs.open_gifs")
    assert "or a dataset: world, gifs" in refused(pretrain.main, *flags(cache, data="wrold", out="r"))
    assert "or a dataset: world, gifs" in refused(pretrain.main, *flags(cache, data="gif:folder", out="r"))


def test_a_folder_of_videos(folder, capsys):
    base = tiny_base()
    train, held_out = data.video_clips(folder, base, Path("cache"))
    printed = capsys.readouterr()
    assert (len(train), len(held_out)) == (4, 1) and "1 skipped" in printed.out
    assert printed.err.count("skipped: ") == 1 and "0.mp4" in printed.err and "no caption beside" in printed.err
    for clip in [*train.clips, *held_out.clips]:
        number = clip.frames - 10
        assert clip.latents.shape == (16, 10 + number, 8, 8)
        expected = ["", "", ""] if number == 1 else [f"waves {number}", f"waves {number}", f"more {number}"]
        assert [clip.prompt(frame) for frame in (0, 3, 4)] == expected
    clip = held_out[0]
    assert psnr(to_frames(base.codec.decode(clip.cut(0, clip.frames)))[0], clip.pixels).mean() > 30
    assert all(clip.pixels is None for clip in train)


def test_videos_are_encoded_once(folder, monkeypatch):
    base = tiny_base()
    train, held_out = data.video_clips(folder, base, Path("cache"))
    monkeypatch.setattr(base.codec, "encode", None)  # from here on nothing may be encoded
    again, _ = data.video_clips(folder, base, Path("cache"))
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(train.clips, again.clips))
    alone = held_out_videos(folder, base, Path("cache"))
    assert torch.equal(alone[0].latents, held_out[0].latents) and torch.equal(alone[0].pixels, held_out[0].pixels)


@pytest.mark.parametrize("version", ["READING", "VERSION"])
def test_videos_are_encoded_again_by_another_version(folder, version, monkeypatch):
    latents.encode_video(folder / "3.mp4", tiny_base(), Path("cache"), [None])
    monkeypatch.setattr(latents, version, 99)
    latents.encode_video(folder / "3.mp4", tiny_base(), Path("cache"), [None])
    assert len(list(Path("cache/videos").iterdir())) == 2


def test_a_folder_with_too_many_broken_videos_is_refused(folder):
    (folder / "2.mp4").write_text("")
    with pytest.raises(UserError, match="2 of 6 videos"):
        data.video_clips(folder, tiny_base(), Path("cache"))
