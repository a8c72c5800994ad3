"""Clients of a server, as cheap as clients can be: they keep the bytes as they come, and read them when all is over."""

from __future__ import annotations

import json
import selectors
import socket
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import accumulate
from typing import Any

from copyspec_engine import CopySpecError
from copyspec_engine.lab.bench.server_process import Asked, Written

__all__ = ["read_answer", "request_bytes", "stream_all"]

_END = b"0\r\n\r\n"
"""Of a body in chunks. Events end with an empty line of their own, so that none of them ends with this."""
_DONE = "[DONE]"
_MOST_BYTES = 1 << 16
"""That are read at once."""

Piece = tuple[float, bytes]
"""Bytes, and when they came, on the clock `time.perf_counter`."""


def request_bytes(asked: Asked, model: str) -> bytes:
    """A call as it goes over the wire; its answer comes as a stream that tells its tokens."""
    body = {
        "model": model,
        "messages": asked.messages,
        "temperature": 0,
        "max_tokens": asked.max_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    content = json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"X-Session-ID: {asked.session_id}\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def stream_all(port: int, calls: Sequence[bytes]) -> tuple[float, list[tuple[float, list[Piece]]]]:
    """Makes calls at once, each on a connection that is open already.

    Args:
        port: of a server on this machine.
        calls: what is sent.

    Returns:
        Seconds from the first call to the last answer's end, and for each call when it was sent and what came.

    Raises:
        CopySpecError: an answer is an error, or breaks off.
    """
    with ExitStack() as stack:
        unread = stack.enter_context(selectors.DefaultSelector())
        opened = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in calls]
        answers: list[tuple[float, list[Piece]]] = []
        for connection, call in zip(opened, calls, strict=True):
            answers.append((time.perf_counter(), []))
            connection.sendall(call)
            unread.register(connection, selectors.EVENT_READ, (connection, answers[-1][1]))
        while unread.get_map():
            for key, _ in unread.select():
                connection, pieces = key.data
                pieces.append((time.perf_counter(), connection.recv(_MOST_BYTES)))
                if _is_whole(pieces):
                    unread.unregister(connection)
    return max(pieces[-1][0] for _, pieces in answers) - answers[0][0], answers


def _is_whole(pieces: Sequence[Piece]) -> bool:
    """Whether an answer has come to its end."""
    last = pieces[-1][1]
    if not last:
        raise CopySpecError("The server closed a connection in the middle of an answer")
    if len(pieces) == 1 and not last.startswith(b"HTTP/1.1 200 "):
        raise CopySpecError(f"The server answered {last.decode(errors='replace')}")
    return b"".join(data for _, data in pieces[-len(_END) :]).endswith(_END)


def read_answer(sent_s: float, pieces: Sequence[Piece]) -> Written:
    """What a stream said.

    Raises:
        CopySpecError: it tells of an error, or has no end.
    """
    text, came, usage = "", list[float](), None
    said = ""
    for came_s, chunk in _chunks(pieces):
        before = len(text)
        for line in chunk.decode().split("\n"):
            if not line.startswith("data: "):  # a comment, which says that the server lives, or nothing
                continue
            said = line.removeprefix("data: ")
            event: dict[str, Any] = {} if said == _DONE else json.loads(said)
            if "error" in event:
                raise CopySpecError(f"The server answered {said}")
            usage = event.get("usage") or usage
            text += "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))
        if len(text) > before:
            came.append(came_s)
    if said != _DONE or usage is None or not came:
        raise CopySpecError(f"The server sent a stream without text or end: {said}")
    return Written(text, usage["completion_tokens"], came[0] - sent_s, pieces[-1][0] - sent_s, len(came))


def _chunks(pieces: Sequence[Piece]) -> Iterator[tuple[float, bytes]]:
    """The chunks of a body, and when each was there as a whole."""
    raw = b"".join(data for _, data in pieces)
    ends = list(accumulate(len(data) for _, data in pieces))
    at = raw.index(b"\r\n\r\n") + 4
    while True:
        line_end = raw.index(b"\r\n", at)
        size = int(raw[at:line_end], 16)
        if size == 0:
            return
        start, at = line_end + 2, line_end + size + 4
        yield pieces[bisect_left(ends, at)][0], raw[start : start + size]
