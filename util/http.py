"""A careful HTTP client: replies bounded in size and time, no redirects, text that is safe to print."""

import json
import time
import urllib.error
import urllib.request
from http.client import HTTPException

LONGEST_REPLY = 2**20  # bytes


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer like any other: following it could carry a key away."""

    def redirect_request(self, *given):
        return None


def printable(text):
    """One line of text without control characters, at most 300 characters."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))[:300]


def post_json(url, body, key, timeout):
    """POST `body` as JSON -> (status, headers, reply as bytes, with the key masked).

    timeout: seconds without a sign of the server, and tenfold for the whole reply. Raises TimeoutError, or
    ConnectionError whose text is printable for whatever else goes wrong.
    """
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        try:
            reply = urllib.request.build_opener(NoRedirects).open(request, timeout=timeout)
        except urllib.error.HTTPError as e:
            reply = e  # can be read like any other reply
        with reply:
            content = read_bounded(reply, 10 * timeout)
    except (OSError, HTTPException, ValueError) as e:
        reason = getattr(e, "reason", e)  # urllib wraps what fails before the reply begins
        if isinstance(reason, TimeoutError):
            raise TimeoutError from None
        raise ConnectionError(printable(str(reason)) or type(reason).__name__) from None
    return reply.status, reply.headers, content.replace(key.encode() or b"\0", b"[key]")


def read_bounded(reply, seconds):
    """The bytes of a reply. Raises TimeoutError if it takes longer, ConnectionError if it is too long."""
    content, end = b"", time.monotonic() + seconds
    while part := reply.read1(2**16):
        content += part
        if len(content) > LONGEST_REPLY:
            raise ConnectionError(f"the reply is longer than {LONGEST_REPLY} bytes")
        if time.monotonic() > end:
            raise TimeoutError
    return content
