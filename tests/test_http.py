"""The HTTP client that the judge uses, and servers that misbehave."""

import socket
import threading
import time

import pytest

from util.http import LONGEST_REPLY, post_json, printable

OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"


@pytest.fixture
def serve():
    """serve(*pieces): the address of a server that sends these bytes to each request, 0.05 s apart."""
    sockets = []

    def start(*pieces):
        server = socket.create_server(("127.0.0.1", 0))
        sockets.append(server)

        def work():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    request = b""  # all of it: closing on what was not read would reset the connection
                    while not request.endswith(b"{}"):
                        request += connection.recv(2**16)
                    try:
                        for piece in pieces:
                            connection.sendall(piece)
                            time.sleep(0.05 if len(pieces) > 1 else 0)
                    except OSError:
                        pass

        threading.Thread(target=work, daemon=True).start()
        return f"http://127.0.0.1:{server.getsockname()[1]}/v1"

    yield start
    for server in sockets:
        server.close()


def test_an_answer_is_returned_without_the_key(serve):
    status, _, content = post_json(serve(OK % 14 + b"the key is key"), {}, "key", 5)
    assert (status, content) == (200, b"the [key] is [key]")


def test_a_redirect_is_an_answer(serve):
    target = serve(OK % 2 + b"{}")
    location = f"HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n"
    assert post_json(serve(location.encode()), {}, "key", 5)[0] == 302


@pytest.mark.parametrize("reply", [b"garbage\r\n\r\n", b"HTTP/1.1 abc\n\n", b"", b"\x1b[31mred\x1b[0m\n\n"])
def test_garbage_is_one_printable_line(reply, serve):
    with pytest.raises(ConnectionError) as error:
        post_json(serve(reply), {}, "", 5)
    assert str(error.value).isprintable()


def test_a_long_reply_is_given_up(serve):
    size = 2 * LONGEST_REPLY
    with pytest.raises(ConnectionError, match="longer than"):
        post_json(serve(OK % size + b"x" * size), {}, "", 5)


def test_a_reply_that_never_ends_is_given_up(serve):
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        post_json(serve(OK % 10**6, *[b"x"] * 200), {}, "", 0.1)
    assert time.monotonic() - started < 5


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ConnectionError):
        post_json(f"http://127.0.0.1:{port}/v1", {}, "", 5)


def test_printable_text_is_one_short_line():
    assert printable("a\x1b[31m\n b\x00") == "a?[31m b?" and len(printable("x" * 999)) == 300
