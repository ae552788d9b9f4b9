"""Storyboards: prompts by time, as text, .txt or .json."""

import json
import time
from pathlib import Path

import pytest

from util.cli import UserError
from util.storyboard import parse_storyboard, prompt_at, storyboard_beside

BOARD = [(0.0, "a man walks"), (4.5, "he sits")]


def test_a_plain_prompt_holds_from_the_start():
    assert parse_storyboard("a man / a dog") == [(0.0, "a man / a dog")]
    assert parse_storyboard(" a\n man  walks ") == [(0.0, "a man walks")]
    assert parse_storyboard(" ") == []


@pytest.mark.parametrize("text", ["0s: a man walks / 4.5s: he sits", "0s:a man walks /\n4.5 s: he sits"])
def test_prompts_with_times(text):
    assert parse_storyboard(text) == BOARD


def test_storyboards_beside_a_video(tmp_path):
    assert storyboard_beside(tmp_path / "a.mp4") is None
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf# when he tires\r\n0s: a man walks\r\n\r\n4.5s: he sits\r\n")
    assert storyboard_beside(tmp_path / "a.mp4") == parse_storyboard(str(tmp_path / "a.txt")) == BOARD
    (tmp_path / "a.srt").write_text("1\n00:00:01,000 --> 00:00:04,000\nbye\n")
    (tmp_path / "c.srt").write_bytes((tmp_path / "a.srt").read_bytes())
    assert storyboard_beside(tmp_path / "c.mp4") == [(1.0, "bye")]
    assert storyboard_beside(tmp_path / "a.mp4") == BOARD  # the .txt goes before the .srt
    (tmp_path / "a.json").write_text(json.dumps([{"start": 1, "text": "x", "end": 2}, [3, "y"]]))
    assert storyboard_beside(tmp_path / "a.mp4") == [(1.0, "x"), (3.0, "y")]  # it goes before the .txt
    assert storyboard_beside(tmp_path / "b.mp4") is None


def test_the_prompt_at_a_time():
    assert [prompt_at(BOARD, t) for t in (-1, 0, 4.4, 4.5, 99)] == ["a man walks"] * 3 + ["he sits"] * 2
    assert prompt_at([], 3) == ""


@pytest.mark.parametrize(
    "text, says",
    [
        ("0s: a\nb\n2s: c", "line 2"),
        ("0s: a\n0s: b", "line 2"),
        ("0s: a / 4s:", "line 1"),
        ("-1s: a", "line 1"),
        ("9" * 400 + "s: a", "inf"),
        ("no/such.txt", "no/such.txt"),
        ("no/such.json", "no/such.json"),
    ],
    ids=lambda text: text[:20],
)
def test_errors_in_a_text(text, says):
    with pytest.raises(UserError, match=says):
        parse_storyboard(text)


@pytest.mark.parametrize(
    "text, says",
    [
        ('[[0, "a"], [0, "b"]]', "entry 2"),
        ('[{"text": "a"}]', "entry 1"),
        ("[1]", "entry 1"),
        ('[[NaN, "a"]]', "entry 1"),
        ("[[0, 5]]", "entry 1"),
        ('{"a": 1}', "list"),
        ('[[0, "a"],\n', 'line 2: not JSON .*; write \\[\\[0, "he walks"'),
    ],
)
def test_errors_in_a_json_file(tmp_path, text, says):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=says):
        parse_storyboard(tmp_path / "a.json")


@pytest.mark.parametrize(
    "text, board",
    [
        ("[0s: a] [4s: b]", [(0, "a"), (4, "b")]),
        ("a [1s: b]", [(0, "a"), (1, "b")]),
        ("0s-3s: a", [(0, "a")]),
        ("0-3s: a / 3 - 6.5 s: b", [(0, "a"), (3, "b")]),
        ("0s: a, 4s: b", [(0, "a"), (4, "b")]),
        ("0s: a man, tall, / 4s: b", [(0, "a man, tall,"), (4, "b")]),
        ("0:00 a\n1:04.5 b", [(0, "a"), (64.5, "b")]),
        ("[00:00] a\n[00:04] b", [(0, "a"), (4, "b")]),
        ("00:00 - 00:04 a\n00:04 - 00:08 b", [(0, "a"), (4, "b")]),
        ("1\n00:00:01,000 --> 00:00:04,000\na\nb\n\n2\n00:01:05,500 --> 00:01:06,000\nc", [(1, "a b"), (65.5, "c")]),
        ("WEBVTT\n\n00:01.000 --> 00:04.000\na", [(1, "a")]),
        ("a 16:9 picture of a clock", [(0, "a 16:9 picture of a clock")]),
        ("10:30 in the morning, a train arrives", [(0, "10:30 in the morning, a train arrives")]),
        ("a 5s exposure, then a 3s one", [(0, "a 5s exposure, then a 3s one")]),
        ("0s: a/4s: b", [(0, "a"), (4, "b")]),
        ("0s: a // 4s: b", [(0, "a"), (4, "b")]),
        ("0s a / 4s b", [(0, "a"), (4, "b")]),
        ("0s - a / 4s - b", [(0, "a"), (4, "b")]),
        ("0: a / 4: b", [(0, "a"), (4, "b")]),
        ("0 to 4 seconds: a\n4 to 8 seconds: b", [(0, "a"), (4, "b")]),
        ("4 sec: a", [(4, "a")]),
        ("0s: a; 4s: b | 8s: c", [(0, "a"), (4, "b"), (8, "c")]),
        ("00:00: a / 00:04: b", [(0, "a"), (4, "b")]),
        ("[0-4s] a", [(0, "a")]),
        ("[0-4s] a [4-8s] b", [(0, "a"), (4, "b")]),
        ("(2s) a (4s) b", [(2, "a"), (4, "b")]),
        ("[1:02:03] a", [(3723, "a")]),
        ('[[0, "a"], [4, "b"]]', [(0, "a"), (4, "b")]),
        ('[{"start": 0, "text": "a"}]', [(0, "a")]),
        ("1 00:00:01,000 --> 00:00:04,000 a 2 00:00:05,000 --> 00:00:06,000 b", [(1, "a"), (5, "b")]),
        ("0s: a 1/4s exposure (30), 16:9 / 4s: b", [(0, "a 1/4s exposure (30), 16:9"), (4, "b")]),
        ("0.5s exposure of a street", [(0, "0.5s exposure of a street")]),
        ("a 3:2 clip (10s) of 2 dogs / 3 cats", [(0, "a 3:2 clip (10s) of 2 dogs / 3 cats")]),
        ("1. a man\n2. a dog", [(0, "1. a man 2. a dog")]),
        ("24/7 diner, 5s-long shot", [(0, "24/7 diner, 5s-long shot")]),
        ("0s:a;4s:b", [(0, "a"), (4, "b")]),
        ("0s: a, far,4s: b", [(0, "a, far"), (4, "b")]),
        ("0s: a. 4s: b.", [(0, "a."), (4, "b.")]),
        ("0s, a / 4s, b", [(0, "a"), (4, "b")]),
        ("0s. a / 4s. b", [(0, "a"), (4, "b")]),
        ("0m0s: a / 1m5s: b", [(0, "a"), (65, "b")]),
        ("1 min 5 s: a", [(65, "a")]),
        ("t=0 a / t=4 b", [(0, "a"), (4, "b")]),
        ("t=0: a, t = 4: b", [(0, "a"), (4, "b")]),
        ("<0s> a <4s> b", [(0, "a"), (4, "b")]),
        ("**0s**: a", [(0, "a")]),
        ("**0s:** a\n\n**4s:** b", [(0, "a"), (4, "b")]),
        ("4s - a", [(4, "a")]),
        ("0s -> a / 4s -> b", [(0, "a"), (4, "b")]),
        ("20s: a / 30s: b", [(20, "a"), (30, "b")]),
        ("0s a / 50s b", [(0, "a"), (50, "b")]),
        ("90 s: a", [(90, "a")]),
    ],
)
def test_prompts_by_time_in_other_notations(text, board):
    assert parse_storyboard(text) == board


@pytest.mark.parametrize(
    "text",
    ["1950s: a diner", "50s: a diner", "00:07 agent", "80s synth / 90s grunge", "the 80s: synth, the 90s: grunge"]
    + ["1950s: a diner, 1960s: a mall", "2010s: a phone", "20s flapper dances", "007: a spy", "3:15 to Yuma"]
    + ["9 to 5: office life", "16:9 - a street", "5s, black and white", "2 seconds of silence", "3, 4 and 5 dogs"]
    + ["24/7: a shop", "1. a / 2. b", "<b>bold</b> a **10** b"],
)
def test_texts_that_are_no_storyboards(text):
    assert parse_storyboard(text) == [(0, text)]


@pytest.mark.parametrize(
    "unit", ["9", " ", "/", "1:", "1,", "[1s:", "0s: a / ", "12:34 ", "**1s", "1m", "a\n", "[\n", ". "]
)
def test_long_texts_take_no_time(unit):
    started = time.process_time()
    try:
        parse_storyboard((unit * 10_000)[:10_000] + "x")
    except UserError as error:
        assert len(str(error)) < 200 and "\n" not in str(error)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "text",
    ["at 3 sec: a then 5 sec: b", "1m: a", "from 00:10 a to 00:20 b", "0s a, 4s b", "0s a 4s b", "1: a / 2: b"]
    + ["a [4s] b", "0-4s a. 4-8s b", "0s: a 4s: b", "0s: a & 4s: b", "5s a / 3s b", "0s) a\n4s) b"],
)
def test_texts_that_seem_to_hold_times_are_refused(text):
    with pytest.raises(UserError, match="seems to hold times") as refused:
        parse_storyboard(text)
    assert "\n" not in str(refused.value)


def test_prompts_that_may_be_meant_otherwise_are_named(capsys):
    Path("beach").mkdir()
    Path("empty.txt").write_text("# nothing yet\n")
    assert parse_storyboard("beach") == [(0, "beach")]
    assert "the prompt beach is taken as words, not as the file or folder" in capsys.readouterr().err
    assert parse_storyboard("empty.txt") == []
    assert "empty.txt holds no prompt" in capsys.readouterr().err
