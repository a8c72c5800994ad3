"""The drills of ends and beginnings: a kill, signals, a second server on one memory file, and keys that change."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx

from scripts.serve_drill.endpoints import Endpoint, Events, asked
from scripts.serve_drill.questions import Question, secret_of
from scripts.serve_drill.servers import TENANTS, Server, key_of, wait_until, write_keys

__all__ = ["EndOptions", "drill_crash", "drill_hup", "drill_second", "drill_term"]

Found = tuple[dict[str, Any], list[str]]
"""Figures, and what did not hold."""
_PLACE = "/v1/copyspec/conversations"
_COPIED = 0.5
"""Share of an answer that its conversation holds already, at least."""
_ENDPOINTS: tuple[Endpoint, ...] = ("chat", "responses", "ollama", "completions")


@dataclass(frozen=True, slots=True)
class EndOptions:
    """What the drills run on."""

    model: str
    folder: Path
    seed: int = 0
    streams: int = 16
    rounds: int = 3
    """Kills."""


def _notes(number: int) -> str:
    return f"# List {number}\n" + "".join(f"- item {number}-{at} of {secret_of('ann')}\n" for at in range(8))


def _question(number: int, max_tokens: int, tenant: str = TENANTS[0]) -> Question:
    text = f"{_notes(number)}\nRepeat the list."
    return Question(tenant, max_tokens, ({"role": "user", "content": text},), prompt=_notes(number))


class _Stream:
    """One stream that is read in a thread of its own."""

    def __init__(self, server: Server, endpoint: Endpoint, question: Question, session: str | None = None) -> None:
        self.events = Events(endpoint)
        self.began, self.cut = threading.Event(), False
        """Whether the connection broke before the last event."""
        self.num_lines = 0
        self.tenant = question.tenant
        self._server, self._endpoint, self._question, self._session = server, endpoint, question, session

    def read(self) -> _Stream:
        """Ask, and read to the end."""
        path, body = asked(self._endpoint, self._server.model, self._question, stream=True)
        headers = {"X-Session-ID": self._session} if self._session else {}
        try:
            with (
                self._server.client(self._question.tenant) as http,
                http.stream("POST", path, json=body, headers=headers) as response,
            ):
                response.raise_for_status()
                for line in response.iter_lines():
                    self.events.take(line)
                    self.num_lines += 1
                    self.began.set()
        except httpx.HTTPError:
            self.cut = True
        finally:
            self.began.set()
        return self


@contextmanager
def _streaming(server: Server, number: int, max_tokens: int) -> Iterator[list[Future[_Stream]]]:
    """So many streams at all endpoints, each of which has begun."""
    streams = [
        _Stream(
            server, _ENDPOINTS[at % len(_ENDPOINTS)], _question(at, max_tokens, TENANTS[at % len(TENANTS)]), f"s{at}"
        )
        for at in range(number)
    ]
    with ThreadPoolExecutor(number) as threads:
        futures = [threads.submit(stream.read) for stream in streams]
        for stream in streams:
            stream.began.wait(120)
        yield futures


def drill_crash(options: EndOptions) -> Found:
    """Kill a server in the middle of answers, again and again: what was said whole is there, and is copied from."""
    rng, broken, folder = random.Random(options.seed), list[str](), options.folder / "crash"
    told: dict[str, int] = {}
    """Conversations that were answered whole, and the texts that they had then."""
    first, again = list[float](), list[float]()
    for turn in range(options.rounds + 1):
        with Server(options.model, folder) as server, server.client() as http:
            broken += _remembered(http, told)
            # What is asked again is copied from what was answered before the kill: its prompt does not hold it.
            again += [_answer(http, server.model, name) for name in told]
            if turn == options.rounds:
                server.signal(signal.SIGTERM)
                if (code := server.end()) != 0:
                    broken.append(f"exit code {code} in place of 0")
                break
            new = [f"crash-{number}" for number in range(4 * turn, 4 * turn + 4)]
            first += [_answer(http, server.model, name) for name in new]
            told = {name: _num_texts(http, name) for name in (*told, *new)}
            with _streaming(server, 8, 200):
                time.sleep(rng.uniform(0.0, 1.5))
                server.signal(signal.SIGKILL)
    if min(again) < _COPIED:
        broken.append(f"an answer that was there already was copied to {min(again):.0%} only")
    shares = {"copied_share_at_first": round(fmean(first), 3), "least_copied_share_again": round(min(again), 3)}
    return {"kills": options.rounds, "conversations": len(told), **shares}, broken


def _names(http: httpx.Client) -> list[str]:
    return [told["id"] for told in http.get(_PLACE).json()["data"]]


def _num_texts(http: httpx.Client, name: str) -> int:
    return len(http.get(f"{_PLACE}/{name}/export").json()["texts"])


def _remembered(http: httpx.Client, told: dict[str, int]) -> list[str]:
    """What is not there of conversations."""
    names = _names(http)
    return [
        f"{name} had {number} texts and has {_num_texts(http, name) if name in names else 0}"
        for name, number in told.items()
        if name not in names or _num_texts(http, name) < number
    ]


def _answer(http: httpx.Client, model: str, name: str) -> float:
    """Write an answer in a conversation, to what its name says; the share of it that was copied."""
    messages = ({"role": "user", "content": f"Tell me a story about {name}."},)
    path, body = asked("chat", model, Question(TENANTS[0], 48, messages), stream=False)
    response = http.post(path, json={**body, "copyspec": {"stats": True}}, headers={"X-Session-ID": name})
    response.raise_for_status()
    return float(response.json()["choices"][0]["copyspec"]["stats"]["copied_share"])


def drill_term(options: EndOptions) -> Found:
    """SIGTERM while streams run, once and twice: each has its last event, new calls are refused, and the exit code."""
    broken, figures = list[str](), dict[str, Any]()
    for kind, max_tokens, drain_s, twice in (
        ("whole", 60, 120, False),
        ("cut", 1500, 1, False),
        ("twice", 1500, 120, True),
    ):
        server = Server(options.model, options.folder / f"term-{kind}", {"drain_s": drain_s, "drain_notice_s": 2})
        with server, server.client() as http, _streaming(server, options.streams, max_tokens) as futures:
            server.signal(signal.SIGTERM)
            began = time.monotonic()
            wait_until("/ready is 503", lambda h=http: h.get("/ready").status_code == 503)
            _, body = asked("chat", server.model, _question(0, 8), stream=False)
            refused = http.post("/v1/chat/completions", json=body)
            if refused.status_code != 503 or "retry-after" not in refused.headers:
                broken.append(f"{kind}: a new call got {refused.status_code} with {dict(refused.headers)}")
            if twice:
                server.signal(signal.SIGTERM)
                began = time.monotonic()
            code = server.end(180)
            took = time.monotonic() - began
            streams = [future.result() for future in futures]
            broken += [f"{kind}: {said}" for said in _ends(streams, code, 143 if twice else 0)]
            if kind == "whole" and any(stream.events.error for stream in streams):
                broken.append(f"{kind}: a stream that had time failed")
            figures[kind] = {"streams": len(streams), "exit_code": code, "seconds": round(took, 2)}
            if twice and took > 10:
                broken.append(f"a second signal ended it after {took:.1f} s")
    return figures, broken


def _ends(streams: Sequence[_Stream], code: int, right_code: int) -> list[str]:
    """What is wrong with how streams have ended, and the server."""
    unfinished = [stream for stream in streams if not stream.events.has_finish or not stream.events.is_over]
    told = [f"{len(unfinished)} of {len(streams)} streams have no last event"] if unfinished else []
    cut = sum(stream.cut for stream in streams)
    told += [f"{cut} connections broke"] if cut else []
    return [*told, *([f"exit code {code} in place of {right_code}"] if code != right_code else [])]


def drill_second(options: EndOptions) -> Found:
    """A second server on a memory file in use ends with 2 and one line, and the first is none the worse."""
    broken = []
    with Server(options.model, options.folder / "second") as first, first.client() as http:
        _answer(http, first.model, "kept")
        second = Server(options.model, options.folder / "second")
        code = second.end(180)
        second.process.communicate()
        lines = [line for line in second.said if line.startswith("Error")]
        if code != 2 or len(lines) != 1 or "Traceback" in "".join(second.said):
            broken.append(f"exit code {code}, and the log has {second.said[-5:]}")
        _answer(http, first.model, "kept")
        if http.get("/ready").status_code != 200:
            broken.append("the first server is not ready any more")
    return {"exit_code": code, "said": lines}, broken


def drill_hup(options: EndOptions) -> Found:
    """Keys that change: the new one is let in, the old one is not, and who was let in is answered to the end."""
    broken = []
    with Server(options.model, options.folder / "hup") as server, _streaming(server, 8, 150) as futures:
        models = f"{server.url}/v1/models"

        def code(tenant: str) -> int:
            return httpx.get(models, headers=key_of(tenant), timeout=60).status_code

        if code("emil") != 401:
            broken.append("a key is let in that nobody has put there")
        write_keys(server.keys, [name for name in (*TENANTS, "emil") if name != "ann"])
        server.signal(signal.SIGHUP)
        wait_until("the new key is let in", lambda: code("emil") == 200)
        if code("ann") != 401:
            broken.append(f"the old key gets {code('ann')}")
        server.keys.write_text("no keys at all", encoding="utf-8")
        server.signal(signal.SIGHUP)
        wait_until("the log says that the keys stay", lambda: any("stay as they were" in line for line in server.said))
        if code("emil") != 200:
            broken.append("keys that cannot be read have taken the old ones away")
        streams = [future.result() for future in futures]
        broken += _ends(streams, 0, 0)
        broken += [f"a stream ended with {stream.events.error}" for stream in streams if stream.events.error]
        of_ann = [stream for stream in streams if stream.tenant == "ann"]
    return {"streams": len(streams), "of_the_removed_tenant": len(of_ann)}, broken
