"""A vision-language model's opinion of videos: does the continuation keep what the history shows?

    python eval.py judge --videos a.mp4 b.mp4 --endpoint http://localhost:8000/v1 --model NAME

The judge follows the paper's evaluation (its criteria, our wording). For each dimension (characters, clothes, objects,
scenes) a gate question asks whether history and continuation both show such a thing at all; three more ask whether it
stays the same. An answer that is neither yes nor no is counted as failed, never guessed.
"""

import base64
import io
import json
import math
import os
import re
import time
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image
from tqdm import tqdm

from util.cli import Failure, UserError, parse_flags
from util.files import file_hash
from util.http import post_json, printable
from util.video import read_video, video_info

# Recorded answers are looked up by this wording: if you change it, every question is asked, and paid for, again.
GATES = {
    "character": "a character (a person, an animal or a figure)",
    "cloth": "clothing of a character",
    "object": "an object other than characters, clothes and the background",
    "scene": "a scene, that is a place with a background,",
}
QUESTIONS = {
    "character": {
        "face": "does the face of the character stay the same",
        "body": "does the body of the character (build, proportions, hair) stay the same",
        "identity": "is the character recognisably the same one",
    },
    "cloth": {
        "colour": "do the colours of the clothes stay the same",
        "style": "do the kind and the cut of the clothes stay the same",
        "texture": "do the texture and the pattern of the clothes stay the same",
    },
    "object": {
        "shape": "do the objects keep their shape",
        "colour-texture": "do the objects keep their colours and textures",
        "plausibility": "do the objects stay plausible (in size, number, place and use)",
    },
    "scene": {
        "layout": "does the layout of the scene stay the same",
        "light": "does the light of the scene stay the same",
        "background": "does the background stay the same",
    },
}
LONGEST_SIDE = 512  # of the pictures sent, in pixels
BACKOFF = 1.0  # seconds before the first retry; doubles with every further one
ANSWERED = ("yes", "no", "refusal", "unparsable")  # final; "timeout" and "error" are asked again in the next run

THINKING = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)
# a leading yes or no, perhaps in quotes or bold, that ends there or is followed by punctuation
ANSWER = re.compile(r"[\s*_\"'`(]*(yes|no)\b[*_\"'`)]*(\s*($|\n|[.,;:!][*_\"'`)]*(\s|$))|\s+[-–—]\s)", re.IGNORECASE)
REFUSAL = re.compile(r"\b(sorry|unable|not able|I (can.?t|cannot|won.?t))\b", re.IGNORECASE)
TAKEN_BACK = {  # what, later in the text, puts the answer in doubt
    "yes": re.compile(r"\b(yes|no)\b|\b(not|never)\b|n['’]t\b", re.IGNORECASE),
    "no": re.compile(r"\b(yes|no)\b", re.IGNORECASE),
}


@dataclass
class JudgeConfig:
    videos: str = ""  # one or more videos, each a history and its continuation, as sample.py writes them
    endpoint: str = ""  # OpenAI-compatible server, for example http://localhost:8000/v1
    model: str = ""  # the model's name on the server; it must accept pictures
    key_env: str = ""  # environment variable that holds the API key, if the server wants one
    frames: int = 8  # pictures of the history, and as many of the continuation
    history_seconds: float = 20.0  # where in the videos the continuation begins, s
    out: str = "out/judge.jsonl"  # every answer, one per line; questions answered here are not asked again
    retries: int = 3  # further tries after a timeout, HTTP 429 or 5xx
    timeout: float = 60.0  # how long to wait for a sign of life from the server, s


# ---------------------------------------------------------------------------------------------------------------------
# Flags


def join_values(argv, flag):
    """argv with the values that follow `flag` joined by newlines: parse_flags() takes one value per flag."""
    if flag not in argv:
        return argv
    first = argv.index(flag) + 1
    last = next((i for i in range(first, len(argv)) if argv[i].startswith("-")), len(argv))
    return [*argv[: first - 1], f"{flag}=" + "\n".join(argv[first:last]), *argv[last:]]


def is_plain_address(url):
    """Whether `url` is the http(s) address of a valid host, without user names, queries or fragments."""
    try:
        host = urlsplit(url).hostname or ""
        host.encode("idna")
    except ValueError:  # brackets without an IPv6 address, an empty label, ...
        return False
    return bool(host) and url.isascii() and re.fullmatch(r"https?://[^\s@?#]+", url) is not None


def check_flags(config):
    """Raise UserError if a flag is missing or out of range."""
    if not config.videos or not config.model:
        raise UserError(
            f"{'--model' if config.videos else '--videos'} is missing: "
            "judge needs --videos A B ... --endpoint URL --model NAME"
        )
    if not is_plain_address(config.endpoint):
        raise UserError(
            "--endpoint must be the address of a server without user names or queries, "
            "for example http://localhost:8000/v1; a key goes into an environment variable, see --key_env"
        )
    seconds = config.history_seconds, config.timeout
    if config.frames < 1 or config.retries < 0 or not all(0 < x < math.inf for x in seconds):
        raise UserError(
            f"--frames {config.frames} --retries {config.retries} --history_seconds "
            f"{config.history_seconds:g} --timeout {config.timeout:g}: "
            "expected frames of at least 1, retries of at least 0, seconds above 0"
        )


def read_key(config):
    """The API key, "" without --key_env. Raises UserError, which quotes neither the key nor the variable's name."""
    if not config.key_env:
        return ""
    key = os.environ.get(config.key_env, "").strip()
    if not re.fullmatch("[!-~]+", key):  # the name may be the key, given by mistake
        raise UserError("the environment variable that --key_env names is not set, or holds no key: export it")
    return key


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def stretches(path, config):
    """A video's (height, width) and the (start, length) of its history and of its continuation, in seconds.

    Raises UserError if the video ends with the history.
    """
    info, cut = video_info(path), config.history_seconds
    if info["seconds"] - cut < 1 / info["fps"]:
        raise UserError(
            f"{path} lasts {info['seconds']:.4g} s, so nothing continues a history of {cut:g} s: "
            "say with --history_seconds where the continuation begins"
        )
    return (info["height"], info["width"]), [(0, cut), (cut, info["seconds"] - cut)]


def picture_piece(frame):
    """A frame (height, width, 3) uint8 as a piece of a chat message: a JPEG in a data URL."""
    jpeg = io.BytesIO()
    Image.fromarray(frame).save(jpeg, "JPEG", quality=95)
    url = "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def message_pieces(path, config):
    """The pieces of a chat message that show a video: for history and continuation, a heading and --frames pictures.

    Each stretch is divided into --frames equal parts; the pictures are from the middle of each.
    """
    size, (history, continuation) = stretches(path, config)
    scale = min(1, LONGEST_SIDE / max(size))
    height, width = (max(1, round(n * scale)) for n in size)
    pieces = []
    for name, (start, length) in ("History", history), ("Continuation", continuation):
        end = start + length
        heading = f"{name}, {start:.4g} s to {end:.4g} s of the video, {config.frames} pictures in order of time:"
        gap = length / config.frames
        frames = read_video(path, 1 / gap, height, width, start=start + gap / 2, seconds=length)
        if len(frames) < config.frames:
            raise UserError(f"{path} ends before the {end:.4g} s that it states: give a complete file")
        pieces += [{"type": "text", "text": heading}, *map(picture_piece, frames.numpy())]
    return pieces


# ---------------------------------------------------------------------------------------------------------------------
# The server


class Transient(Exception):
    """A failure that may pass.

    args: its kind ("timeout", "unreachable" or "error"), a text, and the wait that the server asks for (s, or None).
    """


def parse_answer(text):
    """A model's words -> "yes", "no", "refusal" or "unparsable".

    Only a leading yes or no counts, and only if nothing after it could take it back. A reasoning model's <think> ...
    </think> is skipped.
    """
    text = THINKING.sub("", text)
    found = ANSWER.match(text)
    rest = text[found.end() :] if found else text
    if REFUSAL.search(rest):
        return "refusal"
    if not found:
        return "unparsable"
    answer = found[1].lower()
    return "unparsable" if TAKEN_BACK[answer].search(rest) else answer


def read_reply(reply):
    """The bytes of a chat completion -> (kind, text); the kind is "error" for anything else."""
    try:
        choice = json.loads(reply)["choices"][0]
        text, refusal = choice["message"].get("content") or "", choice["message"].get("refusal")
        if refusal or choice.get("finish_reason") == "content_filter":
            return "refusal", str(refusal or text)
        return parse_answer(text), text
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return "error", reply[:1000].decode(errors="replace")


def post(url, body, config, key):
    """Send a question once -> (kind, text) of the answer.

    Raises Transient, or UserError if the server rejects the request, as it would any other.
    """
    try:
        status, headers, content = post_json(url, body, key, config.timeout)
    except TimeoutError:
        raise Transient("timeout", "", None) from None
    except ConnectionError as e:
        raise Transient("unreachable", str(e), None) from None
    if status < 300:
        return read_reply(content)
    text = printable(content.decode(errors="replace"))
    if status == 400 and re.search("content_(filter|policy)", text):
        return "refusal", text
    if status != 429 and status < 500:
        raise UserError(
            f"{url} answers HTTP {status} ({text or 'no text'}): check --endpoint (most end in /v1), --model and "
            "--key_env, and that the model takes pictures"
        )
    wait = headers.get("Retry-After", "")
    raise Transient("error", f"HTTP {status} {text}", min(60, int(wait)) if wait.isdecimal() else None)


def post_with_retries(body, config, key):
    """Send a question -> (kind, text, retries): one of ANSWERED, or "timeout" or "error" if all tries failed.

    Raises UserError where every other question would fail too: no server, or one that rejects the request.
    """
    url = config.endpoint.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    for attempt in range(config.retries + 1):
        try:
            return *post(url, body, config, key), attempt
        except Transient as e:
            kind, text, wait = e.args
        if attempt < config.retries:
            time.sleep(BACKOFF * 2**attempt if wait is None else wait)
    if kind == "unreachable":
        raise UserError(
            f"{url} cannot be reached ({text}): start the server or check --endpoint; "
            "answers so far are kept, so the same command goes on"
        )
    return kind, text, config.retries


# ---------------------------------------------------------------------------------------------------------------------
# Questions


def read_answers(path):
    """{(sha256 of the video, model, prompt): kind} of the answers in a file; a last line cut short is removed from it.

    Makes the folder and the file. Raises UserError if it cannot be written, or holds anything else.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as f:
            f.seek(0)
            *lines, cut = f.read().split(b"\n")
            records = [json.loads(line) for line in lines]
            answers = {(x["sha256"], x["model"], x["prompt"]): x["kind"] for x in records if x["kind"] in ANSWERED}
            if cut and not cut.startswith(b'{"video"'):
                raise ValueError("not ours to shorten")
            f.truncate(f.tell() - len(cut))
    except OSError as e:
        raise UserError(f"--out {path} cannot be written ({e.strerror}): give another file") from None
    except (ValueError, LookupError, TypeError):
        raise UserError(f"--out {path} is not a file of answers that judge has written: give another") from None
    return answers


class Interview:
    """Questions about one video. Raises UserError if it cannot be read, or ends with the history.

    answers: those recorded before, see read_answers(); new ones are added, there and to --out.
    kinds: a Counter of the kinds of the answers used, and of the "retries" that the new ones took.
    """

    def __init__(self, path, config, key, answers):
        self.path, self.config, self.key, self.answers = path, config, key, answers
        self.pieces, self.sha256, self.kinds = message_pieces(path, config), file_hash(path), Counter()

    def get_answer(self, dimension, name, question):
        """The kind of the answer to a question: recorded before, or requested and recorded now."""
        question += " Answer with one word: yes or no."
        headings = [piece["text"] for piece in self.pieces if piece["type"] == "text"]
        prompt = "\n".join([*headings, question])
        index = self.sha256, self.config.model, prompt
        if index not in self.answers:
            content = [*self.pieces, {"type": "text", "text": question}]  # question last: servers reuse the rest
            body = {"model": self.config.model, "temperature": 0, "messages": [{"role": "user", "content": content}]}
            kind, text, retries = post_with_retries(body, self.config, self.key)
            date = datetime.now(timezone.utc).isoformat(timespec="seconds")
            record = dict(video=self.path, sha256=self.sha256, model=self.config.model)
            record |= dict(dimension=dimension, question=name, kind=kind, answer=text, retries=retries)
            record |= dict(date=date, prompt=prompt)
            with open(self.config.out, "a", encoding="utf-8") as f:
                f.write(json.dumps(record) + "\n")
            self.answers[index] = kind
            if retries:
                self.kinds["retries"] += retries
        self.kinds[self.answers[index]] += 1
        return self.answers[index]

    def scores(self, bar):
        """{dimension: fraction of yes, None if the gate says no, nan if a question failed}. Advances the bar."""
        scores = {}
        for dimension, questions in QUESTIONS.items():
            gate = f"Is {GATES[dimension]} clearly visible both in the history and in the continuation?"
            visible = self.get_answer(dimension, "gate", gate)
            bar.update()
            if visible != "yes":
                scores[dimension] = None if visible == "no" else math.nan
                bar.update(len(questions))
                continue
            kinds = []
            for name, question in questions.items():
                kinds.append(self.get_answer(dimension, name, f"From the history to the continuation, {question}?"))
                bar.update()
            scores[dimension] = kinds.count("yes") / len(kinds) if set(kinds) <= {"yes", "no"} else math.nan
        return scores


def print_scores(scores, kinds, config):
    """Print a table of the scores, one row per dimension. scores: [{dimension: score}], one per video."""
    print(
        f"{config.model}: {len(scores)} videos, {config.frames} + {config.frames} pictures each, continuation from "
        f"{config.history_seconds:g} s on; answers: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}"
    )
    print(f"{'':14}{'score %':>10}{'judged':>10}{'gated out':>12}{'failed':>10}     videos")
    for dimension in QUESTIONS:
        column = [of_video[dimension] for of_video in scores]
        judged = [x for x in column if x is not None and not math.isnan(x)]
        gated_out = column.count(None)
        failed = len(column) - len(judged) - gated_out
        score = f"{100 * sum(judged) / len(judged):.1f}" if judged else "–"
        print(f"{dimension:14}{score:>10}{len(judged):10}{gated_out:12}{failed:10}")


def judge(argv):
    """Ask a vision-language model whether continuations keep characters, clothes, objects and scenes."""
    config = parse_flags(JudgeConfig, judge.__doc__, join_values(argv, "--videos"))
    check_flags(config)
    key, videos = read_key(config), config.videos.split("\n")
    for path in videos:
        stretches(path, config)  # refuses the last video before the first is paid for
    answers, kinds, scores = read_answers(config.out), Counter(), []
    with tqdm(total=len(videos) * sum(1 + len(x) for x in QUESTIONS.values()), desc="asking") as bar:
        for path in videos:
            interview = Interview(path, config, key, answers)
            scores.append(interview.scores(bar))
            kinds += interview.kinds
    print_scores(scores, kinds, config)
    print(f"answers in {config.out}")
    if not any(kinds[kind] for kind in ANSWERED):
        raise Failure(f"no question was answered: see {config.out}; the same command asks again")
