"""The vision-language judge, against a chat server that plays the model."""

import base64
import contextlib
import hashlib
import http.server
import io
import json
import socket
import threading
from pathlib import Path
from time import sleep
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from bench import judge
from eval import main
from tests.common import greys, run, write_video
from util.video_writer import VideoWriter

KEY = "sk-12345"


@pytest.fixture
def server(monkeypatch):
    """A chat server on this machine.

    server.plan(question, number of the request) gives the model's answer, or a dict of the reply's `text`, `status`,
    `headers` and of the seconds to `hang` first. server.requests: (question, message content, headers) of each request.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = body["messages"][0]["content"]
            question = content[-1]["text"]
            state.requests.append((question, content, self.headers))
            plan = state.plan(question, len(state.requests))
            reply = plan if isinstance(plan, dict) else {"text": plan}
            sleep(reply.get("hang", 0))
            # the request's headers come back too, so that a key could leak
            answer = {"choices": [{"message": {"content": reply.get("text")}}], "headers": self.headers.as_string()}
            with contextlib.suppress(OSError):  # the judge has hung up
                self.send_response(reply.get("status", 200))
                for name, value in reply.get("headers", {}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_):
            pass

    monkeypatch.setattr(judge, "BACKOFF", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("SECRET", KEY)
    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = SimpleNamespace(url=f"http://127.0.0.1:{listener.server_port}/v1", requests=[], plan=lambda *_: "Yes.")
    thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
    thread.start()
    yield state
    listener.shutdown()
    listener.server_close()
    thread.join()


def judge_flags(url, *videos):
    """A command line for videos of 3 s of history and a continuation."""
    flags = ["--history_seconds", 3, "--frames", 3, "--retries", 1, "--timeout", 5]
    return ["judge", "--videos", *videos, "--endpoint", url, "--model", "m", *flags]


def read_table(printed):
    """{dimension: [score, judged, gated out, failed]} of the printed table."""
    rows = [line.split() for line in printed.splitlines()]
    return {row[0]: row[1:] for row in rows if row and row[0] in judge.QUESTIONS}


def read_records():
    return [json.loads(line) for line in Path("out/judge.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# What is sent


def test_sends_pictures_of_history_and_continuation(server):
    with VideoWriter("a.mp4", 2, 16, 24) as w:
        w.write(greys(12))  # levels 0 to 5 in the 3 s of history, then 6 to 11
    run(main, *judge_flags(server.url, "a.mp4"))
    assert len(server.requests) == 16 and len({question for question, *_ in server.requests}) == 16
    for _, content, headers in server.requests:
        kinds = [piece["type"] for piece in content]
        assert kinds == ["text", *["image_url"] * 3, "text", *["image_url"] * 3, "text"]
        assert "0 s to 3 s" in content[0]["text"] and "3 s to 6 s" in content[4]["text"]
        assert "Authorization" not in headers
    _, content, _ = server.requests[0]
    urls = [piece["image_url"]["url"].split(",") for piece in content if piece["type"] == "image_url"]
    assert {head for head, _ in urls} == {"data:image/jpeg;base64"}
    pictures = [np.array(Image.open(io.BytesIO(base64.b64decode(data)))) for _, data in urls]
    assert {picture.shape for picture in pictures} == {(341, 512, 3)}
    assert [round(picture.mean() / 20) for picture in pictures] == [1, 3, 5, 7, 9, 11]  # the middle of each second


@pytest.mark.parametrize("asked, waits", [("", [0.01, 0.02, 0.04]), ("7", [7, 7, 7]), ("3600", [60, 60, 60])])
def test_waits_before_it_tries_again(server, monkeypatch, asked, waits):
    """The wait doubles with every retry, unless the server says how long to wait; never more than a minute."""
    slept = []
    monkeypatch.setattr(judge, "time", SimpleNamespace(sleep=slept.append))
    busy = {"status": 429, "headers": {"Retry-After": asked} if asked else {}}
    server.plan = lambda question, number: busy if number <= 3 else "Yes."
    write_video("a.mp4", 12)
    run(main, *judge_flags(server.url, "a.mp4"), "--retries", 3)
    assert slept == waits
    assert [record["retries"] for record in read_records()] == [3] + [0] * 15


# ---------------------------------------------------------------------------------------------------------------------
# What is counted


def test_counts_every_kind_of_answer(server, capsys):
    """Both videos: no clothing, a layout that changes, an answer that is none. b.mp4: a timeout and a refusal."""
    write_video("a.mp4", 12, 0)
    write_video("b.mp4", 12, 5)

    def plan(question, number):
        first = number < 15  # the first video
        answers = {
            "clothing": "No",
            "layout": "**No**, it moved.",
            "plausible": "Yes and no.",
            "an object": "Yes" if first else "I'm sorry, but I can't help with that.",
            "a character (": "Yes" if first else {"text": "Yes", "hang": 3},
        }
        if number == 1:
            return {"status": 429}
        return next((answer for words, answer in answers.items() if words in question), "yes")

    server.plan = plan
    run(main, *judge_flags(server.url, "a.mp4", "b.mp4"), "--timeout", 0.6, "--key_env", "SECRET")
    printed = capsys.readouterr().out
    assert read_table(printed) == {
        "character": ["100.0", "1", "0", "1"],
        "cloth": ["–", "0", "2", "0"],
        "object": ["–", "0", "0", "2"],
        "scene": ["66.7", "2", "0", "0"],
    }
    # a: 4 gates, 3 questions each on all but clothes; b: 4 gates, the 3 questions on the scene
    assert "answers: 2 retries, 13 yes, 4 no, 1 unparsable, 1 timeout, 1 refusal" in printed
    assert len(server.requests) == 20 + 2 and server.requests[0][0] == server.requests[1][0]
    assert {headers["Authorization"] for *_, headers in server.requests} == {f"Bearer {KEY}"}
    assert KEY not in Path("out/judge.jsonl").read_text() + printed

    records = read_records()
    assert [record["video"] for record in records] == ["a.mp4"] * 13 + ["b.mp4"] * 7
    assert [record["retries"] for record in records] == [1] + [0] * 12 + [1] + [0] * 6
    assert {record["model"] for record in records} == {"m"}
    assert records[0]["sha256"] == hashlib.sha256(Path("a.mp4").read_bytes()).hexdigest()
    for record in records:
        assert record["date"].startswith("20")
        assert "History" in record["prompt"] and "yes or no" in record["prompt"]


def test_asks_again_only_what_failed(server, capsys):
    write_video("a.mp4", 12, 0)
    write_video("b.mp4", 12, 5)
    flags = judge_flags(server.url, "a.mp4", "b.mp4")
    server.plan = lambda question, number: {"status": 500} if number > 16 and "a character (" in question else "Yes."
    run(main, *flags)
    assert read_table(capsys.readouterr().out)["character"] == ["100.0", "1", "0", "1"]
    with open("out/judge.jsonl", "a") as f:
        f.write('{"video": "b.mp4", "sha')  # killed while it wrote

    def count_requests(*changes):
        server.requests.clear()
        run(main, *flags, *changes)
        return len(server.requests)

    server.plan = lambda *_: "No."
    assert count_requests() == 1  # the gate that failed
    assert read_table(capsys.readouterr().out)["character"] == ["100.0", "1", "1", "0"]
    assert count_requests() == 0
    assert len(read_records()) == 16 + 13 + 1  # the line cut short is gone
    # another model, or other pictures: other questions, 4 gates for each video
    assert count_requests("--model", "other") == 8
    assert count_requests("--frames", 2) == 8


ANSWERS = {
    "yes": ["yes", "Yes.", " **Yes**\nBoth are red.", "YES, it is", '"Yes"', "yes - the same"]
    + ["<think>No.\nWait.</think>\n\nYes"],
    "no": ["no", "No!", "*no*: it differs", "No\n", "No. The coat is not the same."],
    "refusal": ["I'm sorry, I can't say.", "I cannot judge people.", "Sorry, no."]
    + ["No, I cannot assist with that request.", "No, I'm unable to determine this."],
    "unparsable": ["", "maybe", "Yes and no.", "yes/no", "No idea", "Not at all", "Yes, no", "Yes or no?", "Yes.\nNo."]
    + ["Answer: yes", "None", "<think>yes", "Yes.\n\nActually, no.", "Yes.\nFinal answer: No", "No.1 matches"]
    + ["Yes, it does not stay the same", "Yes, though it isn't red"],
}


@pytest.mark.parametrize("kind, text", [(kind, text) for kind, texts in ANSWERS.items() for text in texts])
def test_takes_only_clear_answers(kind, text):
    assert judge.parse_answer(text) == kind


@pytest.mark.parametrize(
    "kind, choice",
    [
        ("refusal", {"message": {"content": None, "refusal": "no"}}),
        ("refusal", {"message": {"content": "yes"}, "finish_reason": "content_filter"}),
        ("unparsable", {"message": {"content": None}}),
        ("error", {"message": {"content": ["yes"]}}),
        ("error", {}),
    ],
)
def test_reads_refusals_and_empty_answers(kind, choice):
    assert judge.read_reply(json.dumps({"choices": [choice]}).encode())[0] == kind


@pytest.mark.parametrize("reply", [b"<html>", b"[]", b'{"choices": []}', b"\xff"])
def test_what_is_no_chat_completion_is_an_error(reply):
    assert judge.read_reply(reply) == ("error", reply.decode(errors="replace"))


def test_content_filter_is_a_refusal(server, capsys):
    """Some servers refuse with HTTP 400, which otherwise ends the run."""
    write_video("a.mp4", 12)
    server.plan = lambda *_: {"status": 400, "text": "content_filter"}
    run(main, *judge_flags(server.url, "a.mp4"))
    printed = capsys.readouterr().out
    assert "answers: 4 refusal" in printed
    assert read_table(printed) == dict.fromkeys(judge.QUESTIONS, ["–", "0", "0", "1"])


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_refuses_videos_it_cannot_judge(server, refused):
    write_video("a.mp4", 12)
    assert "--videos is missing" in refused(main, "judge", "--endpoint", server.url, "--model", "m")
    flags = judge_flags(server.url, "a.mp4")
    assert "a.mp4 lasts 6 s, so nothing continues" in refused(main, *flags, "--history_seconds", 6)
    assert "b.mp4" in refused(main, *judge_flags(server.url, "a.mp4", "b.mp4"))
    assert not server.requests  # a.mp4 is not paid for first


def test_refuses_to_overwrite_another_file(server, refused):
    write_video("a.mp4", 12)
    for text in "one line", "two\nlines\n", '{"kind": "yes"}\n':
        Path("notes.txt").write_text(text)
        error = refused(main, *judge_flags(server.url, "a.mp4"), "--out", "notes.txt")
        assert "notes.txt is not a file of answers" in error
        assert Path("notes.txt").read_text() == text
    assert not server.requests


@pytest.mark.parametrize(
    "flag, value",
    [("--frames", 0), ("--retries", -1), ("--timeout", 0), ("--timeout", "inf"), ("--history_seconds", "nan")],
)
def test_refuses_flags_out_of_range(refused, flag, value):
    error = refused(main, *judge_flags("http://localhost:8000/v1", "a.mp4"), flag, value)
    assert f"{flag} {value}" in error and "expected frames of at least 1" in error


def test_refuses_a_missing_model(refused):
    assert "--model is missing" in refused(main, *judge_flags("http://localhost:8000/v1", "a.mp4"), "--model", "")


ADDRESSES = ["", "localhost:8000", "file:///etc/passwd", "http://me:pass@host/v1", "http://host/v1?key=1"]
ADDRESSES += ["http://.x/v1", "http://a..b/v1", f"http://{'a' * 64}/v1", "http://[abc/v1", "http://hö/v1"]


@pytest.mark.parametrize("address", ADDRESSES)
def test_refuses_what_is_no_plain_address(refused, address):
    error = refused(main, *judge_flags("http://host/v1", "a.mp4"), f"--endpoint={address}")
    assert "--endpoint must be the address" in error


@pytest.mark.parametrize("variable", ["EMPTY", KEY])
def test_never_quotes_what_may_be_the_key(monkeypatch, refused, variable):
    """Somebody gives the key itself to --key_env."""
    monkeypatch.setenv("EMPTY", "")
    error = refused(main, *judge_flags("http://host/v1", "a.mp4"), "--key_env", variable)
    assert "--key_env" in error and KEY not in error


# ---------------------------------------------------------------------------------------------------------------------
# Where every question would fail


def run_until_error(capsys, *flags):
    """The error message of a run that ends with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        run(main, *flags)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_stops_when_the_server_rejects_it(server, capsys):
    write_video("a.mp4", 12)
    server.plan = lambda *_: {"status": 401}
    error = run_until_error(capsys, *judge_flags(server.url, "a.mp4"), "--key_env", "SECRET")
    assert "HTTP 401" in error and "[key]" in error and KEY not in error  # the server repeats the key
    assert len(server.requests) == 1
    assert Path("out/judge.jsonl").read_text() == ""


def test_stops_when_the_server_cannot_be_reached(monkeypatch, capsys):
    monkeypatch.setattr(judge, "BACKOFF", 0.01)
    write_video("a.mp4", 12)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # a port where nobody listens
        url = f"http://127.0.0.1:{s.getsockname()[1]}"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        error = run_until_error(capsys, *judge_flags(url, "a.mp4"))
    assert f"{url}/chat/completions cannot be reached" in error
    assert Path("out/judge.jsonl").read_text() == ""
