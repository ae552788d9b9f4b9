"""Opinions on videos: a vision-language model's answers, and ratings from votes between pairs.

    python eval.py judge --videos a.mp4 b.mp4 --endpoint http://localhost:8000/v1 --model NAME
    python eval.py elo votes.csv

The judge follows the paper's evaluation (its criteria, our wording): a gate asks whether history and continuation both
show a thing at all, three questions whether it stayed the same. What is not answered yes or no is counted, not guessed.
"""
import base64
import csv
import hashlib
import io
import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timezone
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from tqdm import tqdm

from flags import parse_flags
from model import UserError
from video import read_video, video_info, whole_file

# ---------------------------------------------------------------------------------------------------------------------
# Judge

DIMENSIONS = {      # what the gate asks for, and what the three questions ask
    "character": ("a character (a person, an animal or a figure)", {
        "face": "does the face of the character stay the same",
        "body": "does the body of the character (build, proportions, hair) stay the same",
        "identity": "is the character recognisably the same one"}),
    "cloth": ("clothing of a character", {
        "colour": "do the colours of the clothes stay the same",
        "style": "do the kind and the cut of the clothes stay the same",
        "texture": "do the texture and the pattern of the clothes stay the same"}),
    "object": ("an object other than characters, clothes and the background", {
        "shape": "do the objects keep their shape",
        "colour-texture": "do the objects keep their colours and textures",
        "plausibility": "do the objects stay plausible (in size, number, place and use)"}),
    "scene": ("a scene, that is a place with a background,", {
        "layout": "does the layout of the scene stay the same",
        "light": "does the light of the scene stay the same",
        "background": "does the background stay the same"})}
SIDE = 512          # pixels: longest side of a picture sent
BACKOFF = 1.0       # seconds before the first retry, doubled before each further one
ANSWERED = ("yes", "no", "refusal", "unparsable")      # not asked again; "timeout" and "error" are


@dataclass
class JudgeConfig:
    videos: str = ""              # one or more, each a history and what continues it, as sample.py writes them
    endpoint: str = ""            # OpenAI-compatible server, for example http://localhost:8000/v1
    model: str = ""               # its name on the server; it must take pictures
    key_env: str = ""             # environment variable that holds the API key, if the server wants one
    frames: int = 8               # pictures of the history, and as many of the continuation
    history_seconds: float = 20.0      # where in the videos the continuation begins, s
    out: str = "out/judge.jsonl"  # every answer, a line each; answers found here are not asked for again
    retries: int = 3              # further tries after a timeout, HTTP 429 or 5xx
    timeout: float = 60.0         # s without a sign of the server


def one_value(argv, flag):
    """argv with all values of `flag` as one, a line each, since parse_flags takes one value a flag."""
    if flag not in argv:
        return argv
    first = argv.index(flag) + 1
    last = next((i for i in range(first, len(argv)) if argv[i].startswith("-")), len(argv))
    return [*argv[:first - 1], f"{flag}=" + "\n".join(argv[first:last]), *argv[last:]]


def check(config):
    """The API key ("" without --key_env). Raises UserError, which never quotes the key."""
    if not config.videos or not config.model:
        raise UserError(f"{'--model' if config.videos else '--videos'} is missing: "
                        "judge needs --videos A B ... --endpoint URL --model NAME")
    try:
        host = urlsplit(config.endpoint).hostname or ""
        host.encode("idna")
    except ValueError:                                          # brackets without an IPv6 address, an empty label, ...
        host = ""
    if not host or not config.endpoint.isascii() or not re.fullmatch(r"https?://[^\s@?#]+", config.endpoint):
        raise UserError("--endpoint must be the address of a server without user names or queries, "
                        "for example http://localhost:8000/v1; a key goes into an environment variable, see --key_env")
    if config.frames < 1 or config.retries < 0 or not all(
            0 < x < math.inf for x in (config.history_seconds, config.timeout)):
        raise UserError(f"--frames {config.frames} --retries {config.retries} --history_seconds "
                        f"{config.history_seconds:g} --timeout {config.timeout:g}: "
                        "expected frames of at least 1, retries of at least 0, seconds above 0")
    key = os.environ.get(config.key_env, "").strip() if config.key_env else ""
    if config.key_env and not re.fullmatch("[!-~]+", key):      # the name is not quoted: it may be the key by mistake
        raise UserError("the environment variable that --key_env names is not set, or holds no key: export it")
    return key


def parts(path, config):
    """A video's (height, width) and [(first second, length in seconds)] of its history and its continuation."""
    info, cut = video_info(path), config.history_seconds
    if info["seconds"] - cut < 1 / info["fps"]:
        raise UserError(f"{path} lasts {info['seconds']:.4g} s, so nothing continues a history of {cut:g} s: "
                        "say with --history_seconds where the continuation begins")
    return (info["height"], info["width"]), [(0, cut), (cut, info["seconds"] - cut)]


def show(path, config):
    """The pieces of a chat message that show a video: a heading and --frames JPEGs as data URLs for each part, taken in
    the middle of equal stretches of time."""
    size, stretches = parts(path, config)
    size, pieces = [max(1, round(n * min(1, SIDE / max(size)))) for n in size], []
    for name, (start, length) in zip(("History", "Continuation"), stretches):
        pieces.append({"type": "text", "text": f"{name}, {start:.4g} s to {start + length:.4g} s of the video, "
                                               f"{config.frames} pictures in order of time:"})
        gap = length / config.frames
        frames = read_video(path, 1 / gap, *size, start=start + gap / 2, seconds=length)
        if len(frames) < config.frames:
            raise UserError(f"{path} ends before the {start + length:.4g} s that it states: give a complete file")
        for frame in frames.numpy():
            jpeg = io.BytesIO()
            Image.fromarray(frame).save(jpeg, "JPEG", quality=95)
            url = "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
            pieces.append({"type": "image_url", "image_url": {"url": url}})
    return pieces


def parse_answer(text):
    """A model's words -> yes, no, refusal or unparsable. Only a leading yes or no counts that ends there or is followed
    by punctuation, and by nothing that could take it back; a reasoning model's <think> ... </think> is skipped."""
    text = re.sub(r"^\s*<think>.*?</think>", "", text, flags=re.DOTALL)
    found = re.match(r"[\s*_\"'`(]*(yes|no)\b[*_\"'`)]*(\s*($|\n|[.,;:!][*_\"'`)]*(\s|$))|\s+[-–—]\s)", text,
                     re.IGNORECASE)
    answer, rest = (found[1].lower(), text[found.end():]) if found else ("", text)
    sorry = r"\b(sorry|unable|not able|I (can.?t|cannot|won.?t))\b"
    if re.search(sorry, rest, re.IGNORECASE):
        return "refusal"
    doubt = r"\b(yes|no)\b" + r"|\b(not|never)\b|n['’]t\b" * (answer == "yes")
    return "unparsable" if not answer or re.search(doubt, rest, re.IGNORECASE) else answer


def read_reply(reply):
    """The bytes of a chat completion -> (kind, text); "error" for anything else."""
    try:
        choice = json.loads(reply)["choices"][0]
        text, refusal = choice["message"].get("content") or "", choice["message"].get("refusal")
        if refusal or choice.get("finish_reason") == "content_filter":
            return "refusal", str(refusal or text)
        return parse_answer(text), text
    except (ValueError, LookupError, TypeError, AttributeError):
        return "error", reply[:1000].decode(errors="replace")


def post(body, config, key):
    """Send a question -> (kind, text, retries): one of ANSWERED, or of "timeout" and "error", after all tries.

    Raises UserError where every other question would fail too: no server, or one that finds the request wrong.
    """
    url = config.endpoint.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    if key:
        request.add_unredirected_header("Authorization", f"Bearer {key}")       # a redirect must not carry the key away
    for attempt in range(config.retries + 1):
        wait = BACKOFF * 2**attempt
        try:
            try:
                reply = urllib.request.urlopen(request, timeout=config.timeout)
            except urllib.error.HTTPError as e:
                reply = e                                   # it can be read like any other
            with reply:
                said = reply.read().replace(key.encode() or b"\0", b"[key]")
            if reply.status < 300:
                return *read_reply(said), attempt
            text = " ".join(said.decode(errors="replace").split())[:200]
            if reply.status == 400 and re.search("content_(filter|policy)", text):
                return "refusal", text, attempt
            if reply.status != 429 and reply.status < 500:
                raise UserError(f"{url} answers HTTP {reply.status} ({text or reply.reason}): check --endpoint (most "
                                "end in /v1), --model and --key_env, and that the model takes pictures")
            failure, after = ("error", f"HTTP {reply.status} {text}"), reply.headers.get("Retry-After", "")
            wait = min(60, int(after)) if after.isdecimal() else wait
        except (OSError, HTTPException) as e:
            reason = getattr(e, "reason", e)                # urllib wraps what goes wrong before the answer begins
            failure = ("timeout", "") if isinstance(reason, TimeoutError) else ("unreachable", str(reason))
        if attempt < config.retries:
            time.sleep(wait)
    if failure[0] == "unreachable":
        raise UserError(f"{url} cannot be reached ({failure[1]}): start the server or check --endpoint; "
                        "answers so far are kept, so the same command goes on")
    return *failure, config.retries


def read_answers(path):
    """{(sha256 of the video, model, prompt): kind} of what was answered before. A last line cut off is dropped."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as f:
            f.seek(0)
            *lines, cut = f.read().split(b"\n")
            lines = [json.loads(line) for line in lines]
            answers = {(x["sha256"], x["model"], x["prompt"]): x["kind"] for x in lines if x["kind"] in ANSWERED}
            if cut and not cut.startswith(b'{"video"'):
                raise ValueError("not ours to shorten")
            f.truncate(f.tell() - len(cut))
    except OSError as e:
        raise UserError(f"--out {path} cannot be written ({e.strerror}): give another file") from None
    except (ValueError, LookupError, TypeError):
        raise UserError(f"--out {path} is not a file of answers that judge has written: give another") from None
    return answers


def judge_video(path, config, key, answers, bar):
    """Ask all questions about a video. Returns ({dimension: score}, a Counter of kinds and of retries now): the score
    is the fraction of yes, None if the gate says no, nan if a question failed. `answers` is read and extended."""
    shown, sha256 = show(path, config), hashlib.sha256(Path(path).read_bytes()).hexdigest()
    headings = [piece["text"] for piece in shown if piece["type"] == "text"]
    scores, kinds = {}, Counter()

    def ask(dimension, name, question):
        """yes, no, or what went wrong: the kind of the answer, kept or asked for now."""
        question += " Answer with one word: yes or no."
        prompt = "\n".join([*headings, question])
        place = sha256, config.model, prompt
        if place not in answers:
            content = [*shown, {"type": "text", "text": question}]              # last, so that servers reuse the rest
            kind, text, retries = post({"model": config.model, "temperature": 0,
                                        "messages": [{"role": "user", "content": content}]}, config, key)
            line = dict(video=path, sha256=sha256, model=config.model, dimension=dimension, question=name, kind=kind,
                        answer=text, retries=retries, date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                        prompt=prompt)
            with open(config.out, "a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")
            answers[place] = kind
            kinds.update({"retries": retries} if retries else {})
        kinds[answers[place]] += 1
        bar.update()
        return answers[place]

    for dimension, (subject, questions) in DIMENSIONS.items():
        gate = ask(dimension, "gate", f"Is {subject} clearly visible both in the history and in the continuation?")
        if gate != "yes":
            scores[dimension] = None if gate == "no" else math.nan
            bar.update(len(questions))
            continue
        said = [ask(dimension, name, f"From the history to the continuation, {question}?")
                for name, question in questions.items()]
        scores[dimension] = said.count("yes") / len(said) if set(said) <= {"yes", "no"} else math.nan
    return scores, kinds


def judge(argv):
    """Ask a vision-language model whether continuations keep characters, clothes, objects and scenes."""
    config = parse_flags(JudgeConfig, judge.__doc__, one_value(argv, "--videos"))
    key, videos = check(config), config.videos.split("\n")
    for path in videos:
        parts(path, config)             # refuses the last video before the first is paid for
    answers, kinds, scores = read_answers(config.out), Counter(), []
    with tqdm(total=len(videos) * 4 * len(DIMENSIONS), desc="asking") as bar:
        for path in videos:
            of_video, new = judge_video(path, config, key, answers, bar)
            scores.append(of_video)
            kinds += new
    print(f"{config.model}: {len(videos)} videos, {config.frames} + {config.frames} pictures each, continuation from "
          f"{config.history_seconds:g} s on; answers: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}")
    print(f"{'':14}{'score %':>10}{'judged':>10}{'gated out':>12}{'failed':>10}     videos")
    for dimension in DIMENSIONS:
        column = [of_video[dimension] for of_video in scores]
        judged = [x for x in column if x is not None and not math.isnan(x)]
        score = f"{100 * sum(judged) / len(judged):.1f}" if judged else "–"
        out = column.count(None)
        print(f"{dimension:14}{score:>10}{len(judged):10}{out:12}{len(column) - len(judged) - out:10}")
    print(f"answers in {config.out}")


# ---------------------------------------------------------------------------------------------------------------------
# ELO

RESAMPLES = 1000    # of the votes, for the intervals
PRIOR = 0.5         # wins, and as many losses, against an average opponent, where a rating would be infinite


@dataclass
class EloConfig:
    votes: str = ""               # CSV with the columns a, b, winner: a name or tie; the flag's name may be left out
    out: str = "assets/elo.md"    # table; the same as .csv beside it


def read_votes(path):
    """(names sorted, votes (V, 3) int: a, b and twice a's score: 2 won, 1 tie, 0 lost) of a CSV file."""
    rows = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            reader = csv.DictReader(f)
            missing = [column for column in ("a", "b", "winner") if column not in (reader.fieldnames or [])]
            if missing:
                raise UserError(f"{path} has no column {', '.join(missing)}: its first line must be a,b,winner")
            for row in reader:
                a, b, winner = (" ".join((row[column] or "").split()) for column in ("a", "b", "winner"))
                where = f"{path}, line {reader.line_num}"
                if not a or not b or a == b or "tie" in (a, b):
                    raise UserError(f'{where}: a is "{a}", b is "{b}"; give two different names, neither of them tie')
                if winner not in (a, b, "tie"):
                    raise UserError(f'{where}: the winner is "{winner}"; expected "{a}", "{b}" or "tie"')
                rows.append((a, b, {a: 2, b: 0}.get(winner, 1)))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path} cannot be read ({getattr(e, 'strerror', None) or 'not CSV in UTF-8'}): "
                        "give a CSV file with the header a,b,winner") from None
    if not rows:
        raise UserError(f"{path} holds no votes: add lines such as proposed,only-lr,proposed")
    names = sorted({name for a, b, _ in rows for name in (a, b)})
    return names, np.array([(names.index(a), names.index(b), score) for a, b, score in rows])


def reaches(beats):
    """beats (..., n, n) bool -> whether a chain of them leads from i to j."""
    reach = beats | np.eye(beats.shape[-1], dtype=bool)
    for _ in range(beats.shape[-1].bit_length()):
        reach = (reach.astype(float) @ reach) > 0
    return reach


def fit(wins):
    """Bradley-Terry log-strengths of maximum likelihood, mean 0: wins (R, n, n), [r, i, j] those of i over j -> (R, n),
    and which (R,) took the prior.

    The maximum is finite where chains of wins lead from every method to every other (Ford 1957). Elsewhere each method
    is given PRIOR wins and as many losses against an average opponent. Newton's method with steps of s / (1 + 2 s),
    which never overshoot: the curvature changes by at most exp(2 s) on the way.
    """
    n = wins.shape[-1]
    unbounded = ~reaches(wins > 0).all((1, 2))
    prior = PRIOR * unbounded[:, None]
    games, centre = wins + wins.swapaxes(1, 2), np.eye(n) - 1 / n
    theta = np.zeros(wins.shape[:2])
    for _ in range(1000):
        p = 1 / (1 + np.exp(theta[:, None] - theta[:, :, None]))                # that i wins against j
        q = 1 / (1 + np.exp(-theta))                                            # against the average opponent
        gradient = wins.sum(2) - (games * p).sum(2) + prior * (1 - 2 * q)
        curvature = games * p * (1 - p)
        own = curvature.sum(2) + 2 * prior * q * (1 - q)
        # the mean stays 0: strengths are known only up to a constant
        matrix = centre @ (own[:, :, None] * np.eye(n) - curvature) @ centre + 1 / n
        step = np.linalg.solve(matrix, (gradient @ centre)[..., None])[..., 0]
        size = np.abs(step).max(1, keepdims=True)
        theta += step / (1 + 2 * size)
        if size.max() < 1e-8:
            break
    return theta, unbounded


def rate(names, votes, path):
    """(ratings (n,), their 95 % intervals (2, n), remarks): 400 points are odds of 10 to 1, the mean is 1200."""
    cells, counts = np.unique(votes, axis=0, return_counts=True)
    table = np.zeros((len(cells), len(names), len(names)))                      # wins that each kind of vote gives
    table[range(len(cells)), cells[:, 0], cells[:, 1]] = cells[:, 2] / 2
    table[range(len(cells)), cells[:, 1], cells[:, 0]] = 1 - cells[:, 2] / 2
    wins = np.tensordot(counts, table, 1)
    linked = reaches(wins + wins.T > 0)[0]
    if not linked.all():
        groups = [", ".join(name for name, x in zip(names, linked) if x == side) for side in (True, False)]
        raise UserError(f"{path}: no vote links {groups[0]} with {groups[1]}, so their ratings cannot be compared: "
                        "add votes between them")
    theta, unbounded = fit(wins[None])
    resampled = np.random.default_rng(0).multinomial(len(votes), counts / len(votes), RESAMPLES)
    many, without = fit(np.tensordot(resampled, table, 1))
    remarks = []
    if unbounded[0]:
        never = [f"{name} never {what}" for what, sums in (("lost", wins.sum(0)), ("won", wins.sum(1)))
                 for name, x in zip(names, sums) if x == 0]
        remarks.append(f"Infinite ratings ({'; '.join(never) or 'some methods never lost to any of the rest'}), so "
                       "each method is given half a win and half a loss against an average opponent.")
    if without.any():
        remarks.append(f"{without.sum()} of {RESAMPLES} resamples have infinite ratings and are fitted with half a win "
                       "and half a loss of each method against an average opponent: the intervals may be too narrow.")
    points = 400 / math.log(10)
    return 1200 + points * theta[0], 1200 + points * np.percentile(many, (2.5, 97.5), axis=0), remarks


def elo(argv):
    """Ratings from votes between pairs (elo votes.csv): a Bradley-Terry fit with 95 % bootstrap intervals."""
    config = parse_flags(EloConfig, elo.__doc__, argv if not argv or argv[0].startswith("-") else ["--votes", *argv])
    out = Path(config.out)
    if not config.votes:
        raise UserError("the file of votes is missing: python eval.py elo votes.csv")
    if out.suffix != ".md" or out.with_suffix(".csv").resolve() == Path(config.votes).resolve():
        raise UserError(f"--out {out}: give a name that ends in .md; the same name in .csv is written too, so it must "
                        "not be the votes")
    names, votes = read_votes(config.votes)
    ratings, (low, high), remarks = rate(names, votes, config.votes)
    header, played = ["method", "rating", "low", "high", "votes"], np.bincount(votes[:, :2].ravel())
    rows = [[names[i], *(f"{x[i]:.0f}" for x in (ratings, low, high)), played[i]]
            for i in np.argsort(-ratings, kind="stable")]
    lines = [header, ["---"] * len(header), *([row[0].replace("|", "\\|"), *row[1:]] for row in rows)]
    text = "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
    text += "\n" + "\n".join([
        f"{len(votes)} votes of {Path(config.votes).name}; Bradley-Terry, maximum likelihood; mean 1200, 400 points",
        f"are odds of 10 to 1; low, high: 95 % of {RESAMPLES} bootstrap resamples of the votes, seed 0.", *remarks, ""])
    with whole_file(out) as part:
        part.write_text(text, encoding="utf-8")
    with whole_file(out.with_suffix(".csv")) as part, open(part, "w", encoding="utf-8", newline="") as f:
        csv.writer(f, lineterminator="\n").writerows([header, *rows])
    print(f"{text}wrote {out} and {out.with_suffix('.csv')}")
