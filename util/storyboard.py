"""Prompts by time (storyboards)."""

import json
import re
from pathlib import Path

from util.cli import UserError

SECONDS = r"(\d+(?:\.\d*)?)(?:\s*s?\s*(?:-|–|to)\s*\d+(?:\.\d*)?)?\s*s"  # 4s, 4.5 s, 0s-3s, 0-3s; group: the start
CLOCK = r"(?:(\d+):)?(\d{1,2}):(\d{2}(?:[.,]\d+)?)"  # 00:04, 1:02:03.5; groups: hours, minutes, seconds
STAMPED = re.compile(rf"{SECONDS}\s*:\s*(.*)", re.DOTALL)  # 4s: he sits
CLOCKED = re.compile(rf"\[?{CLOCK}(?:\s*(?:-|–)\s*[\d:.,]+)?\]?(?:\s*[:–-])?\s+(.*)", re.DOTALL)  # 00:04 he sits
BRACKETED = re.compile(rf"\[\s*{SECONDS}\s*:\s*([^\]]*)\]")  # [4s: he sits]
SUBTITLE = re.compile(rf"^(?:\d+[ \t]*\n)?[ \t]*{CLOCK}[ \t]*-->.*$", re.MULTILINE)  # SRT and WebVTT
SEPARATOR = re.compile(rf"(?:^|\s)/(?=\s|$)|,\s+(?=(?:{SECONDS})\s*:)".replace("(\\d", "(?:\\d"))  # " / ", or a comma
LONGEST = 10**7  # seconds, four months
# what a person may have meant as a time, though no notation above has it
UNIT_STAMP = re.compile(
    r"(?<![\w:.])[-+]?\d[\d.,:]*\s*(?:s|secs?|seconds?|m|mins?|minutes?|ms)\s*[:\])]", re.IGNORECASE
)
CLOCK_STAMP = re.compile(r"(?<![\d:])\d{1,2}:\d{2}(?!\d)")


def parse_storyboard(text_or_path):
    """Read prompts -> list of (seconds, prompt) in temporal order; [] for an empty text. It may be

    a plain prompt         which holds from 0 s on
    prompts with times     0s: a man walks / 4.5s: he sits    (separated by " / ", commas, or on lines of their own)
                           a man walks [4.5s: he sits], 00:04 he sits (one per line), or SRT
    the path of a .txt     with one of these; lines that begin with # are comments. Or of an .srt
    the path of a .json    with a list of [seconds, prompt] or {"start": seconds, "text": prompt}

    A prompt holds until the next one begins, so ends, as in 0s-3s, are ignored.
    Raises UserError naming the line or entry.
    """
    text = str(text_or_path).strip()
    suffix = Path(text).suffix.lower() if "\n" not in text else ""
    if not isinstance(text_or_path, Path) and suffix not in {".txt", ".json", ".srt"}:
        return parse_text(text, "the prompt")
    try:
        content = Path(text).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(
            f"storyboard {text} cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'}): "
            "give a .txt, .srt or .json file, or the prompt itself"
        ) from None
    if suffix == ".json":
        return decode_json(content, text)
    return parse_text("\n".join("" if s.lstrip().startswith("#") else s for s in content.splitlines()), text)


def parse_text(text, where):
    """Text in one of the notations above -> list of (seconds, prompt); `where` names it in errors."""
    if SUBTITLE.search(text):
        return collect(read_subtitles(text))
    if BRACKETED.search(text):
        return collect(read_bracketed(text, where))
    entries = [
        (f"{where}, line {i + 1}", part.strip())
        for i, line in enumerate(text.splitlines())
        for part in SEPARATOR.split(line)
        if part.strip()
    ]
    if any(STAMPED.fullmatch(part) for _, part in entries):
        return collect(read_stamped(entries))
    clocks = [CLOCKED.fullmatch(part) for _, part in entries]
    # "10:30 in the morning" is a plain prompt; a clock that starts at zero, or one on every line, is a time
    if clocks and all(clocks) and (len(clocks) > 1 or entries[0][1].lstrip("[").startswith("0")):
        return collect([(place, clock_seconds(c), c[4]) for (place, _), c in zip(entries, clocks)])
    meant = [place for place, part in entries if UNIT_STAMP.match(part)]
    if meant or len(UNIT_STAMP.findall(text)) + len(CLOCK_STAMP.findall(text)) > 1:
        place = (meant or [where])[0]
        raise UserError(f'{place}: "{text[:40]}" seems to hold times; write "0s: he walks / 4s: he sits"')
    prompt = " ".join(text.split())
    return [(0.0, prompt)] if prompt else []


def read_stamped(entries):
    """`4s: he sits`: every entry (place, text) has its time -> (place, seconds, prompt)."""
    for place, part in entries:
        stamp = STAMPED.fullmatch(part)
        if stamp is None:
            raise UserError(f'{place}: "{part[:40]}" has no time before it; write "4s: he sits"')
        yield place, float(stamp[1]), stamp[2]


def read_bracketed(text, where):
    """`he walks [4s: he sits]` -> (place, seconds, prompt); what stands before the first bracket holds from 0 s on."""
    first, *rest = BRACKETED.split(text)
    if first.strip():
        yield where, 0.0, first
    for seconds, prompt, after in zip(rest[::3], rest[1::3], rest[2::3]):
        if after.strip(" \n,;/"):
            raise UserError(f'{where}: "{after.strip()[:40]}" has no time before it; write "[4s: he sits]"')
        yield f"{where}, [{seconds}s", float(seconds), prompt


def read_subtitles(text):
    """SRT or WebVTT -> (place, seconds, prompt)."""
    stamps = list(SUBTITLE.finditer(text))
    ends = [stamp.start() for stamp in stamps[1:]] + [len(text)]
    for stamp, end in zip(stamps, ends):
        place = stamp[0].strip().splitlines()[-1]
        yield place, clock_seconds(stamp), text[stamp.end() : end]


def clock_seconds(match):
    """Seconds of a match of CLOCK."""
    hours, minutes, seconds = match[1] or 0, match[2], match[3].replace(",", ".")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def collect(entries):
    """Check (place, seconds, prompt) one after the other -> list of (seconds, prompt). Raises UserError with the
    place."""
    storyboard = []
    for place, seconds, prompt in entries:
        append_entry(storyboard, seconds, prompt, place)
    return storyboard


def decode_json(content, where):
    """JSON -> list of (seconds, prompt); `where` names the file in errors."""
    try:
        entries = json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}, line {error.lineno}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, or nesting as deep
        raise UserError(f'{where}: not JSON of a sensible size; write [[0, "he walks"], [4, "he sits"]]') from None
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
    """Check one entry and append it. Raises UserError that begins with `where`."""
    if type(seconds) not in (int, float) or not 0 <= seconds <= LONGEST:
        raise UserError(f"{where}: the time is {str(seconds)[:40]}; give a number of seconds, 0 to {LONGEST:,}")
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
