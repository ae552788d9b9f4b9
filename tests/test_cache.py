"""Folders of videos and `data.py cache`: what is encoded, kept, made again, split and refused."""

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import data
from bases import nano, open_base
from bases.nano import DCTCodec, HashPrompts
from tests.common import TINY, tiny_base, tiny_encoder, write_video
from util import cache
from util.cli import UserError, warn
from util.folder import nearest_size, split_videos
from util.video import read_video, to_pixels

VIDEOS, OUT = Path("videos"), Path("cached")


def make_cache(*more):
    """data.py cache of the folder of videos, in this process."""
    data.cache(["--videos", str(VIDEOS), "--out", str(OUT), "--preset", "tiny", *map(str, more)])


def cached_clips(base=None, n_held_out=16):
    """All clips of the cache, those to train on first."""
    train, held_out = data.cached_clips(OUT, base or tiny_base(), n_held_out)
    return [*train.clips, *held_out.clips]


def read(clip):
    """(latents, embedding of the prompt of its last frame, `low` at 4x4x2) of a clip."""
    return clip.cut(0, clip.frames), clip.text(clip.frames - 1, HashPrompts(16, 24)), clip.load_low(tiny_encoder())


def same(some, others):
    """Equal to the last bit?"""
    pairs = [pair for a, b in zip(some, others, strict=True) for pair in zip(a, b)]
    return all(torch.equal(a, b) for a, b in pairs)


def manifest():
    return json.loads((OUT / "manifest.json").read_text())


def windows(video):
    """Names of the files of a video's windows."""
    return {name for name, *_ in manifest()["videos"][video]}


def write_videos(n, frames=12):
    """n captioned videos, 0.mp4 and so on."""
    for i in range(n):
        write_video(VIDEOS / f"{i}.mp4", frames, i)
        (VIDEOS / f"{i}.txt").write_text(f"waves {i}")


@pytest.fixture
def encoded(monkeypatch):
    """A list of the names of all videos that data.py cache encodes from here on."""
    names = []

    def watched(path, base, real=cache.video_windows):
        names.append(path.name)
        return real(path, base)

    monkeypatch.setattr(cache, "video_windows", watched)
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Encoding


@pytest.mark.parametrize(
    "width, height, size",
    [
        (1920, 1080, (480, 832)),
        (1080, 1920, (832, 480)),
        (1080, 1080, (624, 624)),
        (640, 480, (480, 832)),
        (1280, 1024, (624, 624)),
        (2560, 1080, (480, 832)),
    ],
)
def test_videos_go_to_the_size_of_the_nearest_shape(width, height, size):
    assert nearest_size(open_base("wan-14b").sizes, dict(width=width, height=height)) == size


def test_clips_are_what_the_videos_show(capsys):
    for i in range(6):
        write_video(VIDEOS / f"{i}.mp4", 100 if i == 3 else 12 + i, i)
        (VIDEOS / f"{i}.txt").write_text(f"0s: waves {i} / 2s: more {i}")
    (VIDEOS / "0.mp4").write_text("not a video")
    make_cache()
    said = capsys.readouterr()
    assert "7 clips of 5 videos; 1 skipped" in said.out and said.err.count("skipped: ") == 1
    clips, base = cached_clips(), tiny_base()
    assert sorted(clip.frames for clip in clips) == [13, 14, 16, 17, 44, 44, 44]
    for clip in clips:
        i = 3 if clip.frames == 44 else clip.frames - 12  # 100 frames: windows of 40 + 4, the last from 56 on
        text = clip.text(5, base.prompts)
        assert text.shape == (1, 24, 16) and torch.allclose(text[0], base.prompts(f"more {i}"), atol=0.02)
        if i != 3:
            pixels = read_video(VIDEOS / f"{i}.mp4", 2, 32, 32)
            expected = base.codec.encode(to_pixels(pixels[2:9])[None])
            assert torch.allclose(clip.cut(2, 9), expected, atol=0.05)


def test_a_cache_goes_on_and_is_never_stale(monkeypatch, encoded, capsys):
    write_videos(6)
    (VIDEOS / "0.mp4").write_text("not a video")
    make_cache()
    assert encoded == [f"{i}.mp4" for i in range(6)]
    for change, again in (
        (lambda: None, []),
        (lambda: (VIDEOS / "5.txt").write_text("another caption"), ["5.mp4"]),
        (lambda: shutil.copy(VIDEOS / "2.mp4", VIDEOS / "1.mp4"), ["1.mp4"]),  # another video of that name
        (lambda: write_video(VIDEOS / "6.mp4", 12, 6), ["6.mp4"]),
    ):
        change()
        encoded.clear()
        capsys.readouterr()
        make_cache()
        assert encoded == again and "skipped: videos/0.mp4" in capsys.readouterr().err
    everything = [f"{i}.mp4" for i in range(7)]
    for changed in dict(fps=4), dict(sizes=((32, 48),)), dict(section=2):
        encoded.clear()
        with monkeypatch.context() as m:
            m.setitem(nano.PRESETS, "tiny", TINY | changed)
            make_cache()
        assert encoded == everything
    for version in "READING", "VERSION":
        encoded.clear()
        monkeypatch.setattr(cache, version, 99)
        make_cache()
        assert encoded == everything


def test_a_cache_that_was_stopped_goes_on(monkeypatch, encoded):
    write_videos(4)

    def stop_at_2(path, *rest, real=cache.video_windows):
        if path.name == "2.mp4":
            raise KeyboardInterrupt
        return real(path, *rest)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(cache, "video_windows", stop_at_2)
        make_cache()
    with pytest.raises(UserError, match="is not a cache of latents"):
        data.open_dataset(str(OUT), open_base("tiny-wan"), "unused", 1, 1, None)
    assert encoded == ["0.mp4", "1.mp4"]
    make_cache()
    assert encoded == [f"{i}.mp4" for i in range(4)] and len(cached_clips()) == 4


def test_caching_stops_once_too_many_are_bad(encoded):
    write_videos(10)
    for i in 1, 2, 3:
        (VIDEOS / f"{i}.mp4").write_text("not a video")
    with pytest.raises(UserError, match="3 of 10 videos"):
        make_cache()
    assert encoded == [f"{i}.mp4" for i in range(4)] and not (OUT / "manifest.json").exists()


def test_a_full_disk_is_no_bad_video(monkeypatch):
    write_videos(6)

    def save_two(tensors, path, metadata):
        if len(list(OUT.glob("windows/*.safetensors"))) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path, metadata)

    with monkeypatch.context() as m, pytest.raises(OSError, match="cannot be written .No space left on device"):
        m.setattr(cache, "save_file", save_two)
        make_cache()
    assert not (OUT / "manifest.json").exists()
    make_cache()
    assert len(cached_clips()) == 6


def test_a_window_is_written_while_the_video_is_encoded(monkeypatch, encoded):
    """A film of Wan takes gigabytes: more than memory holds."""
    for i in range(3):
        write_video(VIDEOS / f"{i}.mp4", 100, i)
        (VIDEOS / f"{i}.txt").write_text(f"0s: waves / {7 + i}s: more")
    events, encode = [], DCTCodec.encode
    monkeypatch.setattr(DCTCodec, "encode", lambda *a: events.append("encode") or encode(*a))
    monkeypatch.setattr(cache, "save_file", lambda *a: events.append("save") or save_file(*a))
    make_cache()
    whole, files = [read(clip) for clip in cached_clips()], sorted((OUT / "windows").iterdir())
    assert events == 9 * ["encode", "encode", "save"] and len(whole) == len(files) == 9
    events.clear()
    make_cache()
    assert events == []
    files[4].unlink()  # any of its windows: the video is made again
    encoded.clear()
    make_cache()
    assert len(encoded) == 1 and events == 3 * ["encode", "encode", "save"]
    assert same([read(clip) for clip in cached_clips()], whole)


# ---------------------------------------------------------------------------------------------------------------------
# A cache that is made again or damaged


def test_a_cache_made_again_never_gives_a_training_another_video(monkeypatch):
    write_videos(6)
    make_cache()
    stray, theirs = OUT / "windows" / f"{'0' * 24}-0.safetensors", OUT / "windows" / "notes.safetensors"
    for file in stray, theirs:
        file.write_bytes(b"of an earlier cache, or of somebody else")
    clips, gone = cached_clips(), windows("1.mp4")
    before = [read(clip) for clip in clips]
    shutil.copy(VIDEOS / "2.mp4", VIDEOS / "1.mp4")  # another video of that name

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(cache, "finish_cache", stop)
        make_cache()
    assert same([read(clip) for clip in clips], before)  # until the new one is complete
    make_cache()
    for clip, was in zip(clips, before):
        if clip.file.name in gone:
            with pytest.raises(UserError, match=r"is gone \(was the cache made again\?\): run data.py cache"):
                read(clip)
        else:
            assert same([read(clip)], [was])
    named = {name for video in manifest()["videos"] for name in windows(video)}
    assert {path.name for path in (OUT / "windows").iterdir()} == named | {theirs.name} and len(named) == 6


def test_damaged_files_are_named():
    write_videos(3)
    make_cache()
    clip, base = cached_clips()[0], tiny_base()
    whole = clip.file.read_bytes()
    clip.file.write_bytes(bytes(len(whole)))
    for ask in lambda: clip.cut(0, 12), lambda: clip.text(0, base.prompts):
        with pytest.raises(UserError, match=f"{clip.file.name} is damaged: delete it, run data.py cache"):
            ask()
    clip.file.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=f"{clip.file.name} is missing or cut short"):
        cached_clips()
    make_cache()  # as that error says
    assert len(cached_clips()) == 3
    index = next((OUT / "videos").glob("*.json"))
    index.write_text('{"key": ')
    with pytest.raises(UserError, match=f"{index.name} is damaged: delete it, then run data.py cache again"):
        make_cache()
    index.unlink()
    make_cache()
    for damage in ('{"settings": ', "[]", "{}", '{"settings": []}', json.dumps(manifest() | {"videos": []})):
        (OUT / "manifest.json").write_text(damage)
        with pytest.raises(UserError, match="manifest.json is damaged: delete it"):
            cached_clips()


def test_a_cache_of_other_settings_is_refused():
    write_videos(2)
    make_cache()
    base = tiny_base()
    short = dataclasses.replace(base, prompts=HashPrompts(16, 7))
    for other, says in (
        (dataclasses.replace(base, fps=4), "with fps 2, not 4"),
        (dataclasses.replace(base, section=2), "with section 4, not 2"),
        (dataclasses.replace(base, codec=open_base("tiny-wan").codec), "cached with codec"),
        (short, "cached with prompts"),
    ):
        with pytest.raises(UserError, match=says):
            cached_clips(other)
    with pytest.raises(UserError, match=r"holds low.4x4x2, not low.2x2x2: run data.py cache again with --rates"):
        data.cached_clips(OUT, base, 1, (2, 2, 2))
    whole = manifest()
    (OUT / "manifest.json").write_text(json.dumps(whole | {"videos": {}}))
    with pytest.raises(UserError, match="holds no clip"):
        cached_clips()
    whole["settings"]["version"] = 1  # of the layout before, with files of many videos
    (OUT / "manifest.json").write_text(json.dumps(dict(settings=whole["settings"], files={})))
    with pytest.raises(UserError, match="with version 1, not 3: .* or run data.py cache again"):
        cached_clips()
    with pytest.raises(UserError, match="is damaged: it is not a cache's manifest"):
        make_cache()
    (OUT / "manifest.json").unlink()
    (OUT / "shard-00000.json").touch()
    with pytest.raises(UserError, match="holds shard-00000.json, which is not a cache's"):
        make_cache()
    (OUT / "shard-00000.json").unlink()
    make_cache()
    assert len(cached_clips()) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Captions


def jsonl(*entries):
    """A JSONL file of captions: its path."""
    Path("list.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return Path("list.jsonl")


def test_captions_of_one_file():
    write_videos(2)
    board = [[0, "a"], [2, "b"]]
    captions = jsonl(dict(video="0.mp4", caption="a wave"), dict(video="1.mp4", storyboard=board))
    make_cache("--captions", captions)
    prompts = tiny_base().prompts
    texts, expected = [clip.text(11, prompts)[0] for clip in cached_clips()], [prompts("a wave"), prompts("b")]
    found = [[torch.equal(text, other.bfloat16().float()) for other in expected] for text in texts]
    assert sorted(found) == [[False, True], [True, False]]
    with pytest.raises(UserError, match="list.jsonl, line 1"):
        make_cache("--captions", jsonl(dict(video="0.mp4")))
    with pytest.raises(UserError, match="nowhere.jsonl cannot be read"):
        make_cache("--captions", "nowhere.jsonl")


def test_captions_that_belong_to_no_video(tmp_path, capsys):
    write_videos(2)
    with pytest.raises(UserError, match="names no video"):
        make_cache("--captions", jsonl(dict(video=str(tmp_path / VIDEOS / "0.mp4"), caption="waves")))
    one, other = (dict(video=name, caption="waves") for name in ("0.mp4", "7.mp4"))
    make_cache("--captions", jsonl(one, other))
    assert "1 captions belong to no video" in capsys.readouterr().err
    with pytest.raises(UserError, match="line 2: expected"):
        make_cache("--captions", jsonl(one, dict(video=None, caption="waves")))
    with pytest.raises(UserError, match="line 2: 0.mp4 stands on an earlier line too: give each video one line"):
        make_cache("--captions", jsonl(one, one))


def test_captions_may_hold_any_line_break():
    said, more = '{"video": "0.mp4", "caption": "two\u2028lines"}', '{"video": "1.mp4", "caption": "waves"}'
    Path("list.jsonl").write_text(f"\ufeff{said}\r\n\n \n{more}\n\n", encoding="utf-8")
    assert cache.read_captions("list.jsonl") == {"0.mp4": [(0, "two lines")], "1.mp4": [(0, "waves")]}


def test_a_storyboard_past_the_end_is_warned_of(capsys):
    for i in range(2):
        write_video(VIDEOS / f"{i}.mp4", 12, i)
        (VIDEOS / f"{i}.txt").write_text(f"0s: waves / {50 + i}s: more")
    data.video_clips(VIDEOS, tiny_base(), Path("c"))
    assert "2 storyboards go on after their videos end (as that of" in capsys.readouterr().err
    warn.cache_clear()
    make_cache()
    assert capsys.readouterr().err.count("2 storyboards go on after their videos end (as that of") == 1


# ---------------------------------------------------------------------------------------------------------------------
# What is held out


def test_held_out_videos_stay_held_out():
    names = [f"{i}.mp4" for i in range(300)]
    train, held_out = split_videos(names)
    assert 15 < len(held_out) < 45 and sorted(train + held_out) == sorted(names)
    assert set(split_videos(names + ["more.mp4", "a/0.mp4"])[1]) - {"more.mp4", "a/0.mp4"} == set(held_out)
    assert split_videos(["0.mp4"]) == (["0.mp4"], ["0.mp4"]) and len(split_videos(train[:3])[1]) == 1


def test_what_is_held_out_is_not_trained_on():
    names = [f"{i}.mp4" for i in range(300)]
    tenth = split_videos(names)[1]  # two of them alone: one is still trained on
    for some in names, tenth[:2], names[:2], names[:5]:
        train, held_out = split_videos(some)
        assert held_out and train and sorted(train + held_out) == sorted(some)


def test_few_held_out_clips_are_of_different_videos():
    for name in "123456":
        write_video(VIDEOS / f"{name}.mp4", 100)
    make_cache()
    names = split_videos([f"{name}.mp4" for name in "123456"])[1]
    held_out = data.cached_clips(OUT, tiny_base(), len(names))[1]
    video_of = {name: video for video in manifest()["videos"] for name in windows(video)}
    assert len(video_of) == 18 and [video_of[clip.file.name] for clip in held_out.clips] == names
