"""Storyboards: prompts by time, as text, .txt or .json."""

import json

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
