"""Prompts by time (storyboards)."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from util.cli import UserError, warn
from util.files import read_text

CLOCK = r"(?:\d+:)?\d{1,2}:\d{2}(?:[.,]\d+)?"  # 00:04, 1:02:03.5
NUMBER = r"\d+(?:\.\d*)?"
SECONDS = rf"(?:\d+\s*m(?:in)?\s*)?{NUMBER}\s*(?:s|secs?|seconds?)(?!\w)"  # 4s, 4.5 sec, 1m5s
TIME = rf"(?:{CLOCK}|{SECONDS}|{NUMBER})"
TO = r"\s*(?:-|–|—|to)\s*"
SPAN = rf"(?:t\s*=\s*)?{TIME}(?:{TO}{TIME})?"  # 0s-3s, 0-3s, 00:04 - 00:08, t=4
UNITS = rf"(?:{TIME}{TO})?{SECONDS}"  # a span that names its unit
DECADE = r"(?:(?:1\d|20)\d|[2-9])0s(?!\w)"  # 50s, 1950s, 2010s
# a prompt after its time: 4s: he sits, 4s he sits, 4s, he sits, 4 - he sits, [0-4s] he sits, 00:04 he sits
STAMPED = re.compile(
    rf"(?P<open>[\[(<])?\s*(?P<span>{SPAN})\s*(?P<close>[\])>])?"
    r"(?:\s*(?P<mark>:|[,.](?=\s)|[-–—=→]+>?(?=\s))(?P<gap>\s*)|(?<=[\])>])|\s+)(?P<text>.*)",
    re.DOTALL | re.IGNORECASE,
)
BOLD = re.compile(rf"\*\*\s*({UNITS}|{CLOCK})\s*(:?)\s*\*\*", re.IGNORECASE)  # Markdown's **4s**: and **4s:**
BRACKETED = re.compile(rf"\[\s*(?P<span>{UNITS}|{CLOCK}(?=:\s))\s*:(?P<text>[^\]]*)\]", re.IGNORECASE)  # [4s: he sits]
SUBTITLE = re.compile(  # SRT and WebVTT, also without their line breaks
    rf"(?:^\d+[ \t]*\n[ \t]*|(?<!\S)\d+[ \t]+)?(?<!\d)(?P<span>{CLOCK})[ \t]*-->[ \t]*{CLOCK}(?:[ \t]+[a-z]+:\S+)*",
    re.MULTILINE,
)
# between prompts: a slash, or a comma or the end of a sentence before a time and a colon; or a space, if times stand in
# brackets
SEPARATOR = re.compile(
    rf"(?:^|\s)/+(?=\s|$)|(?<![\d/])\s*/+\s*(?={SPAN}\s*:\s|{UNITS})|[,;|]\s+(?={SPAN}\s*:\s)"
    rf"|(?<!\d)[,;|]\s*(?={UNITS}\s*:)|(?<=[.!?])\s+(?={UNITS}\s*:)",
    re.IGNORECASE,
)
IN_BRACKETS = re.compile(rf"(?:^|\s+)(?=[\[(<]\s*(?:{UNITS}|{CLOCK})\s*[\])>])", re.IGNORECASE)
BESIDE = (".json", ".txt", ".srt")  # endings of storyboards beside a video, the first wins
LONGEST = 10**7  # seconds, four months
ADVICE = '"0s: he walks / 4s: he sits"'
JSON_ADVICE = '[[0, "he walks"], [4, "he sits"]]'
# what a person may have meant as a time, though no notation above has it
UNIT_STAMP = re.compile(
    rf"(?<![\w:.,])(?!{DECADE})[-+]?\d[\d.,:]*\s*(?:s|secs?|seconds?|m|mins?|minutes?|ms)\s*[:\])]", re.IGNORECASE
)
CLOCK_STAMP = re.compile(r"(?<![\d:])\d{1,2}:\d{2}(?!\d)")
BRACKET_STAMP = re.compile(rf"\[\s*{UNITS}\s*\]", re.IGNORECASE)


def parse_storyboard(text_or_path):
    """Read prompts -> list of (seconds, prompt) in temporal order; [] for an empty text. It may be

    a plain prompt         which holds from 0 s on
    prompts with times     0s: a man walks / 4.5s: he sits    (separated by slashes, commas, or on lines of their own)
                           4.5s he sits, 4.5s - he sits, [4.5s] he sits, [3-6s] he sits, 00:04 he sits, 0: he sits;
                           1m5s: he sits, t=4 he sits, <4s> he sits, **4s**: he sits;
                           a man walks [4.5s: he sits]; SRT; the list of a .json
    the path of a .txt     with one of these; lines that begin with # are comments. Or of an .srt
    the path of a .json    with a list of [seconds, prompt] or {"start": seconds, "text": prompt}

    A prompt holds until the next one begins, so ends, as in 0s-3s, are ignored. Times are times where the text begins
    with one, and where more follow in rising order, or the first is 0 or clear: 1950s: a diner is a plain prompt.
    Raises UserError naming the line or entry.
    """
    text = str(text_or_path).strip()
    suffix = Path(text).suffix.lower() if "\n" not in text else ""
    if not isinstance(text_or_path, Path) and suffix not in BESIDE:
        if text and os.path.exists(text):
            warn(f"the prompt {text} is taken as words, not as the file or folder of that name")
        return parse_text(text, "the prompt")
    try:
        content = read_text(text)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(
            f"storyboard {text} cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'}): "
            "give a .txt, .srt or .json file, or the prompt itself"
        ) from None
    if suffix == ".json":
        return decode_json(content, text)
    lines = ["" if s.lstrip().startswith("#") else s for s in content.splitlines()]
    return parse_text("\n".join(lines), text) or warn(f"{text} holds no prompt") or []


def parse_text(text, where):
    """Text in one of the notations above -> list of (seconds, prompt); `where` names it in errors."""
    if re.match(r'[\[{]\s*[\[{"]', text):
        return decode_json(text, where)
    if SUBTITLE.search(text):
        return collect(read_subtitles(text))
    if BRACKETED.search(text):
        return collect(read_bracketed(text, where))
    text = BOLD.sub(r"[\1]\2", re.sub(r"[^\S\n]+", " ", text))
    entries = [
        (f"{where}, line {i + 1}", part.strip())
        for i, line in enumerate(text.splitlines())
        for piece in (IN_BRACKETS.split(line) if IN_BRACKETS.match(text) else [line])
        for part in SEPARATOR.split(piece)
        if part.strip()
    ]
    stamps = [read_stamp(part) for _, part in entries]
    timed = [stamp for stamp in stamps if stamp]
    clear = any(stamp.clear for stamp in timed)
    if clear and None in stamps:
        place, part = entries[stamps.index(None)]
        raise UserError(f'{place}: "{part[:40]}" has no time before it; write {ADVICE}')
    if all(stamp.decade for stamp in timed):
        timed = []
    # a time that stands alone may be anything, as in "10:30 in the morning", unless it is 0 or written clearly
    zero = bool(timed) and timed[0].seconds == 0
    later = f"{SECONDS}\\s*:" if clear else f"(?:{SECONDS}|{CLOCK})"
    again = (clear or zero and len(timed) == 1) and any(re.search(rf"(?<![\w:.]){later}", s.prompt) for s in timed)
    rising = len(timed) > 1 and all(a.seconds < b.seconds for a, b in zip(timed, timed[1:])) and not timed[0].bare
    if timed and None not in stamps and not again and (clear or zero or rising):
        return collect([(place, stamp.seconds, stamp.prompt) for (place, _), stamp in zip(entries, stamps)])
    meant = [place for place, part in entries if UNIT_STAMP.match(part)]
    many = len(UNIT_STAMP.findall(text)) + len(CLOCK_STAMP.findall(text))
    if meant or many > 1 or len(timed) > 1 or again or BRACKET_STAMP.search(text):
        place = (meant or [where])[0]
        raise UserError(f'{place}: "{text[:40]}" seems to hold times; write {ADVICE}')
    prompt = " ".join(text.split())
    return [(0.0, prompt)] if prompt else []


@dataclass
class Stamp:
    """A prompt after its time, and whether this can be anything else."""

    seconds: float
    prompt: str
    clear: bool  # it is a time: brackets, t=, or a unit before a colon or a dash say so
    bare: bool  # a number without a unit, which may be anything
    decade: bool  # as in "80s synth"


def read_stamp(part):
    """`4s: he sits` -> Stamp; None if there is no time before the prompt."""
    match = STAMPED.fullmatch(part)
    if match is None or bool(match["open"]) != bool(match["close"]):
        return None
    span, mark, decade = match["span"].lower(), match["mark"] or ",", re.fullmatch(DECADE, match["span"].lower())
    bare, marked = not re.search("[:s=]", span), mark not in ",."
    if bare and not match["open"] and not (marked and match["gap"]):
        return None
    clear = match["open"] in ("[", "<") or "=" in span or marked and ":" not in span and not decade
    weak = bool(decade) and not match["open"] and (mark != ":" or len(span) > 3)
    return Stamp(start_seconds(span), match["text"], clear and not bare, bare, weak)


def read_bracketed(text, where):
    """`he walks [4s: he sits]` -> (place, seconds, prompt); what stands before the first bracket holds from 0 s on."""
    matches = list(BRACKETED.finditer(text))
    if text[: matches[0].start()].strip():
        yield where, 0.0, text[: matches[0].start()]
    for match, end in zip(matches, [m.start() for m in matches[1:]] + [len(text)]):
        after = text[match.end() : end].strip(" \n,;/")
        if after:
            raise UserError(f'{where}: "{after[:40]}" has no time before it; write "[4s: he sits]"')
        yield f"{where}, [{match['span']}", start_seconds(match["span"]), match["text"]


def read_subtitles(text):
    """SRT or WebVTT -> (place, seconds, prompt)."""
    stamps = list(SUBTITLE.finditer(text))
    ends = [stamp.start() for stamp in stamps[1:]] + [len(text)]
    for stamp, end in zip(stamps, ends):
        yield stamp["span"], start_seconds(stamp["span"]), text[stamp.end() : end].strip(" \n/")


def start_seconds(span):
    """Seconds at which a SPAN begins."""
    start = re.search(r"[\d:]+(?:[.,]\d*)?", re.sub(r"\s*m(?:in)?\s*", ":", span))[0].replace(",", ".")
    return sum(float(part) * 60**k for k, part in enumerate(reversed(start.split(":"))))


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
        raise UserError(f"{where}, line {error.lineno}: not JSON ({error.msg}); write {JSON_ADVICE}") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, or nesting as deep
        raise UserError(f"{where}: not JSON of a sensible size; write {JSON_ADVICE}") from None
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
    """The storyboard of the same name beside a video, the first there is of BESIDE; None if there is none."""
    found = [file for suffix in BESIDE if (file := Path(path).with_suffix(suffix)).is_file()]
    return parse_storyboard(found[0]) if found else None
