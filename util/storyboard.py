"""Storyboards: prompts by time."""

import json
import math
import re
from pathlib import Path

from util.cli import UserError

TIMESTAMP = re.compile(r"(\d+\.?\d*)\s*s\s*:\s*(.*)", re.DOTALL)
LOOKS_LIKE_TIMESTAMP = re.compile(r"[-+]?[\d.,:]+\s*(s|secs?|seconds?|m|mins?|ms)\s*:", re.IGNORECASE)


def parse_storyboard(text_or_path):
    """Read prompts -> list of (seconds, prompt) in temporal order; [] for an empty text. It may be

    a plain prompt         which holds from 0 s on
    prompts with times     0s: a man walks / 4.5s: he sits    (separated by " / " or on lines of their own)
    the path of a .txt     with one of these; lines that begin with # are comments
    the path of a .json    with a list of [seconds, prompt] or {"start": seconds, "text": prompt}; an "end" is ignored,
                           since a prompt holds until the next one
    Raises UserError naming the line or entry.
    """
    text = str(text_or_path).strip()
    suffix = Path(text).suffix.lower() if "\n" not in text else ""
    if not isinstance(text_or_path, Path) and suffix not in {".txt", ".json"}:
        return parse_text(text, "the prompt")
    try:
        content = Path(text).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"storyboard {text} cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'}): "
            "give a .txt or .json file, or the prompt itself"
        ) from None
    if suffix == ".json":
        return decode_json(content, text)
    return parse_text("\n".join("" if s.lstrip().startswith("#") else s for s in content.splitlines()), text)


def parse_text(text, where):
    """A plain prompt or prompts with times -> list of (seconds, prompt); `where` names the text in errors."""
    entries = [
        (i + 1, part.strip())
        for i, line in enumerate(text.splitlines())
        for part in re.split(r"(?:^|\s)/(?=\s|$)", line)
        if part.strip()
    ]
    stamps = [TIMESTAMP.fullmatch(part) for _, part in entries]
    if not any(stamps) and not any(LOOKS_LIKE_TIMESTAMP.match(part) for _, part in entries):
        prompt = " ".join(text.split())
        return [(0.0, prompt)] if prompt else []
    storyboard = []
    for (line, part), stamp in zip(entries, stamps):
        if stamp is None:
            raise UserError(f'{where}, line {line}: "{part[:40]}" has no time before it; write "4s: he sits"')
        append_entry(storyboard, float(stamp[1]), stamp[2], f"{where}, line {line}")
    return storyboard


def decode_json(content, where):
    """JSON -> list of (seconds, prompt); `where` names the file in errors."""
    try:
        entries = json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}, line {error.lineno}: not JSON ({error.msg})") from None
    return parse_entries(entries, where)


def parse_entries(entries, where):
    """A decoded JSON storyboard -> list of (seconds, prompt); `where` names it in errors. Raises UserError."""
    if not isinstance(entries, list):
        raise UserError(f'{where}: expected a list such as [{{"start": 0, "text": "he sits"}}], found something else')
    storyboard = []
    for i, entry in enumerate(entries):
        if isinstance(entry, dict):
            entry = [entry.get("start"), entry.get("text")]
        if not isinstance(entry, list) or len(entry) != 2:
            raise UserError(f'{where}, entry {i + 1}: write {{"start": seconds, "text": prompt}} or [seconds, prompt]')
        append_entry(storyboard, *entry, f"{where}, entry {i + 1}")
    return storyboard


def append_entry(storyboard, seconds, prompt, where):
    """Validate one entry and append it. Raises UserError, which begins with `where`."""
    if type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
        raise UserError(f"{where}: the time is {seconds!r}; give a number of seconds, 0 or more")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where}: the prompt is {prompt!r}; give some text")
    if storyboard and seconds <= storyboard[-1][0]:
        raise UserError(f"{where}: {seconds:g} s comes after {storyboard[-1][0]:g} s; put the times in rising order")
    storyboard.append((float(seconds), " ".join(prompt.split())))


def prompt_at(storyboard, seconds):
    """The prompt that holds at `seconds`: the last one to start by then, else the first; "" if there is none."""
    prompts = [prompt for start, prompt in storyboard if start <= seconds] or [prompt for _, prompt in storyboard[:1]]
    return prompts[-1] if prompts else ""


def storyboard_beside(path):
    """The storyboard of the same name beside a video, a .json or else a .txt; None if there is neither."""
    for beside in (Path(path).with_suffix(".json"), Path(path).with_suffix(".txt")):
        if beside.is_file():
            return parse_storyboard(beside)
    return None
