"""The clients of the load drill: each does something by chance, again and again, and looks hard at what comes back."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from scripts.serve_drill.endpoints import Endpoint, Events, asked, whole
from scripts.serve_drill.questions import Answer, Question, Talk, World, secret_of
from scripts.serve_drill.servers import TENANTS, key_of

__all__ = ["LIMITS", "Client", "Tally"]

_SMALL_BUFFER = [(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)]
_CHAT = "/v1/chat/completions"
_KEPT_DETAILS = 3
"""Of what went wrong in one way."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server of the drill was told."""

    sessions: int = 24
    sessions_per_owner: int = 8
    max_in_flight: int = 14
    max_body_bytes: int = 2 * 1024 * 1024
    context: int = 4096
    """Tokens, and as many KV slots: one call may need them all."""
    body_timeout_s: float = 2.0
    send_timeout_s: float = 3.0


LIMITS = Limits()


@dataclass(slots=True)
class Tally:
    """What all clients have seen."""

    counts: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    broken: dict[str, list[str]] = field(default_factory=dict)
    """What must not be, by its kind: the first of each in words."""
    num_broken: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    """Of whole answers and whole streams that nobody left."""

    def breaks(self, kind: str, detail: str) -> None:
        """Something is as it must not be."""
        self.num_broken[kind] += 1
        kept = self.broken.setdefault(kind, [])
        if len(kept) < _KEPT_DETAILS:
            kept.append(detail[:600])


class Client:
    """One client of one tenant.

    Args:
        number: whose remainder decides the tenant.
        url: of the server.
        model: its name.
        world: what is asked.
        tally: takes what is seen.
        until_s: when to end, on the clock `time.monotonic`.
        seed: of all that is done by chance.
    """

    def __init__(
        self, number: int, url: str, model: str, world: World, tally: Tally, until_s: float, seed: int
    ) -> None:
        self.tenant = TENANTS[number % len(TENANTS)]
        self._number, self._url, self._model, self._world = number, url, model, world
        self._tally, self._until_s = tally, until_s
        self._rng = random.Random(f"{seed} client {number}")
        self._foreign = [secret_of(name) for name in TENANTS if name != self.tenant]
        self._last_id = "none"
        self._http = self._made()
        self._actions: Mapping[Callable[[], Awaitable[None]], int] = {
            self._talk: 55,
            self._go_on_raw: 12,
            self._fill_form: 4,
            self._read_slowly: 4,
            self._read_nothing: 1,
            self._send_nonsense: 12,
            self._send_half_a_body: 2,
            self._look: 10,
        }

    def _made(self, options: Sequence[tuple[int, int, int]] = ()) -> httpx.AsyncClient:
        transport = httpx.AsyncHTTPTransport(socket_options=options)
        return httpx.AsyncClient(base_url=self._url, headers=key_of(self.tenant), timeout=180, transport=transport)

    async def run(self) -> None:
        """Do things until the time is over."""
        async with self._http:
            while not self._is_late:
                (act,) = self._rng.choices(list(self._actions), list(self._actions.values()))
                try:
                    await act()
                except (httpx.HTTPError, OSError) as error:
                    self._tally.breaks("connections broken", f"{act.__name__}: {error!r}")

    @property
    def _is_late(self) -> bool:
        return time.monotonic() >= self._until_s

    # ---- questions with right answers ----------------------------------------------------------------------------

    async def _talk(self) -> None:
        """A conversation turn by turn: in a named session or none, at one endpoint, whole or streamed, or left."""
        talk = self._rng.choice(self._world.talks[self.tenant])
        endpoint: Endpoint = self._rng.choice(("chat", "chat", "responses", "ollama"))
        headers = {"X-Session-ID": self._session()} if self._rng.random() < 0.6 else {}
        before: str | None = None
        for question, right in zip(talk.questions, talk.answers, strict=True):
            if self._rng.random() < 0.25:
                await self._leave(endpoint, question, headers)
            if self._is_late or self._rng.random() < 0.1:
                return
            more = self._extras(endpoint)
            if endpoint == "responses" and before and self._rng.random() < 0.5:
                more |= {"input": [question.messages[-1]], "previous_response_id": before}
            before = await self._ask(endpoint, question, right, headers, more)

    def _session(self) -> str:
        """A name that this client alone uses, or one that it shares with others of its tenant."""
        if self._rng.random() < 0.3:
            return f"{self.tenant}-shared-{self._rng.randint(0, 3)}"
        return f"{self.tenant}-{self._number}-{self._rng.randint(0, 2)}"

    def _extras(self, endpoint: Endpoint) -> dict[str, Any]:
        """Fields that change nothing of an answer's text."""
        if endpoint in ("ollama", "generate"):
            return {}
        own: dict[str, Any] = {}
        if self._rng.random() < 0.4:
            own["drafter"] = self._rng.choice(("none", "copyspec", "adaptive"))
        for name in ("segments", "explain", "stats"):
            if self._rng.random() < 0.2:
                own[name] = True
        more: dict[str, Any] = {"copyspec": own} if own else {}
        if endpoint == "chat" and self._rng.random() < 0.1:
            more["n"] = self._rng.randint(2, 3)
        if self._rng.random() < 0.1:
            more["prompt_cache_key"] = f"key-{self._rng.randint(0, 2)}"
        if self._rng.random() < 0.1:
            more["user"] = f"user-{self._rng.randint(0, 2)}"
        return more

    async def _go_on_raw(self) -> None:
        question, right = self._rng.choice(self._world.raw[self.tenant])
        endpoint: Endpoint = self._rng.choice(("completions", "completions", "generate"))
        if self._rng.random() < 0.2:
            await self._leave(endpoint, question, {})
        await self._ask(endpoint, question, right, {}, self._extras(endpoint))

    async def _fill_form(self) -> None:
        question, right = self._rng.choice(self._world.forms[self.tenant])
        await self._ask("chat", question, right, {}, self._extras("chat"))

    async def _ask(
        self,
        endpoint: Endpoint,
        question: Question,
        right: Answer,
        headers: Mapping[str, str],
        more: Mapping[str, Any],
    ) -> str | None:
        """Ask until there is an answer, and compare it. Gives the id of a response."""
        stream = self._rng.random() < 0.5
        path, body = asked(endpoint, self._model, question, stream=stream)
        body |= more
        while not self._is_late:
            began = time.monotonic()
            if stream:
                told = await self._streamed(endpoint, path, body, headers)
            else:
                told = await self._whole(endpoint, path, body, headers)
            if told is not None:
                self._tally.seconds.append(time.monotonic() - began)
                self._compare(told, right, f"{endpoint} stream={stream} {dict(headers)} {dict(more)} {question}")
                return self._last_id if endpoint == "responses" and not stream else None
            if "previous_response_id" in body and self._last_id == "forgotten":
                path, body = asked(endpoint, self._model, question, stream=stream)
        return None

    async def _whole(
        self, endpoint: Endpoint, path: str, body: Mapping[str, Any], headers: Mapping[str, str]
    ) -> list[Answer] | None:
        response = await self._http.post(path, json=body, headers=dict(headers))
        if not await self._accepted(response, path):
            return None
        told = response.json()
        self._last_id = told.get("id", self._last_id)
        self._tally.counts["whole answers"] += 1
        return whole(endpoint, told)

    async def _streamed(
        self, endpoint: Endpoint, path: str, body: Mapping[str, Any], headers: Mapping[str, str]
    ) -> list[Answer] | None:
        async with self._http.stream("POST", path, json=body, headers=dict(headers)) as response:
            if response.status_code != 200:
                await response.aread()
                await self._accepted(response, path)
                return None
            return await self._read_events(endpoint, response, 0.0)

    async def _read_events(self, endpoint: Endpoint, response: httpx.Response, pause_s: float) -> list[Answer]:
        """Read a stream to its end, with a pause after each line."""
        self._tally.statuses[200] += 1
        events = Events(endpoint)
        async for line in response.aiter_lines():
            self._check_foreign(line, endpoint)
            events.take(line)
            if pause_s:
                await asyncio.sleep(pause_s)
        if not events.is_over:
            self._tally.breaks("streams without an end", f"{endpoint}: {events.answers}")
        if events.error is not None:
            self._tally.breaks("streams that failed", f"{endpoint}: {events.error}")
        self._tally.counts["whole streams"] += 1
        return events.answers

    def _compare(self, told: Sequence[Answer], right: Answer, about: str) -> None:
        for answer in told:
            self._check_foreign(answer.text, about)
            self._tally.counts["answers compared"] += 1
            if answer != right:
                self._tally.breaks("wrong answers", f"{answer} instead of {right}: {about}")

    def _check_foreign(self, text: str, about: str) -> None:
        if any(secret in text for secret in self._foreign):
            self._tally.breaks("texts of other tenants", f"{about}: {text}")

    async def _accepted(self, response: httpx.Response, about: str) -> bool:
        """Whether a call was answered; one that is refused because there are too many is to be asked again."""
        status, text = response.status_code, response.text
        self._tally.statuses[status] += 1
        self._check_foreign(text, about)
        if status == 200:
            return True
        if status in (429, 503) and "retry-after" in response.headers:
            await asyncio.sleep(self._rng.uniform(0.2, 1.0) * min(float(response.headers["retry-after"]), 2.0))
        elif status == 404 and "previous_response_not_found" in text:
            self._last_id = "forgotten"
            self._tally.counts["responses that were forgotten"] += 1
        else:
            self._tally.breaks("5xx" if status >= 500 else "unexpected refusals", f"{about}: {status} {text}")
        return False

    # ---- clients that go away, and readers that are slow ---------------------------------------------------------

    async def _leave(self, endpoint: Endpoint, question: Question, headers: Mapping[str, str]) -> None:
        """Ask, and be gone before the answer is whole."""
        way = self._rng.choice(("before the first byte", "before a whole answer", "in the middle of a stream"))
        self._tally.counts[f"left {way}"] += 1
        path, body = asked(endpoint, self._model, question, stream=way != "before a whole answer")
        if way == "before the first byte":
            await self._send_raw(path, json.dumps(body).encode(), self._rng.uniform(0, 0.5))
        elif way == "before a whole answer":
            asking = asyncio.create_task(self._http.post(path, json=body, headers=dict(headers)))
            await asyncio.wait({asking}, timeout=self._rng.uniform(0, 2.0))
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        else:
            left = self._rng.randint(1, 12)
            async with self._http.stream("POST", path, json=body, headers=dict(headers)) as response:
                async for line in response.aiter_lines():
                    self._check_foreign(line, path)
                    left -= 1
                    if not left:
                        return

    async def _send_raw(self, path: str, body: bytes, wait_s: float, share: float = 1.0) -> None:
        """Send a call, or the first part of its body, and hang up, with or without a word."""
        parts = urlsplit(self._url)
        _, writer = await asyncio.open_connection(parts.hostname, parts.port)
        (name, value), *_ = key_of(self.tenant).items()
        head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\n{name}: {value}\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body[: int(share * len(body))])
        await writer.drain()
        await asyncio.sleep(wait_s)
        if self._rng.random() < 0.5:  # a reset, not an end
            opened = writer.get_extra_info("socket")
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()

    def _long_stream(self) -> tuple[Talk, dict[str, Any]]:
        """A call whose stream is many times as long as its text."""
        talk = self._rng.choice(self._world.talks[self.tenant])
        _, body = asked("chat", self._model, talk.questions[0], stream=True)
        return talk, {**body, "logprobs": True, "top_logprobs": 20}

    async def _read_slowly(self) -> None:
        """Take a stream a few lines at a time through a small buffer: it is whole all the same."""
        talk, body = self._long_stream()
        async with (
            self._made(_SMALL_BUFFER) as http,
            http.stream("POST", _CHAT, json=body) as response,
        ):
            if response.status_code != 200:
                await response.aread()
                await self._accepted(response, _CHAT)
                return
            told = await self._read_events("chat", response, 0.05)
            self._tally.counts["slow readers"] += 1
            self._compare(told, talk.answers[0], "a slow reader")

    async def _read_nothing(self) -> None:
        """Ask for more than buffers hold and read none of it: the server gives such a reader up."""
        _, body = self._long_stream()
        async with self._made(_SMALL_BUFFER) as http:
            async with http.stream("POST", _CHAT, json={**body, "n": 6}):
                await asyncio.sleep(2 * LIMITS.send_timeout_s)
            self._tally.counts["readers of nothing"] += 1

    # ---- nonsense, and looks -------------------------------------------------------------------------------------

    async def _send_nonsense(self) -> None:
        """A call that cannot be answered is refused as it should be."""
        method, path, content, headers, status = self._nonsense()
        self._tally.counts["malformed calls"] += 1
        response = await self._http.request(method, path, content=content, headers=headers)
        self._tally.statuses[response.status_code] += 1
        self._check_foreign(response.text, path)
        if response.status_code not in (status, 429):
            self._tally.breaks(
                "nonsense told otherwise", f"{content[:80]!r} {path}: {response.status_code} {response.text}"
            )

    def _nonsense(self) -> tuple[str, str, bytes, dict[str, str], int]:
        """Method, path, body and headers of a call, and its right status."""
        path = self._rng.choice((_CHAT, "/v1/completions", "/v1/responses", "/api/chat"))
        chat: dict[str, Any] = {"model": self._model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}

        def of(**fields: Any) -> bytes:  # noqa: ANN401 - any field of a body
            return json.dumps({**chat, **fields}).encode()

        many = [{"role": "user", "content": "word " * 10}] * (LIMITS.context // 10)
        kinds: list[tuple[str, str, bytes, dict[str, str], int]] = [
            ("POST", path, b"{", {}, 400),
            ("POST", path, b"\xff\xfe\x00", {}, 400),
            ("POST", path, b'{"model": ' + b"[" * 80 + b"]" * 80 + b"}", {}, 400),
            ("POST", path, b"[" * 500_000, {}, 400),
            ("POST", path, b"x" * (LIMITS.max_body_bytes + 1), {}, 413),
            ("POST", path, of(model="another"), {}, 404 if path == _CHAT else 400),
            ("POST", path, of(), {"Authorization": "Bearer wrong"}, 401),
            ("POST", _CHAT, of(messages="Hi"), {}, 400),
            ("POST", _CHAT, of(messages=[{"role": "user", "content": {"text": "Hi"}}]), {}, 400),
            ("POST", _CHAT, of(temperature="hot"), {}, 400),
            ("POST", _CHAT, of(max_tokens=0), {}, 400),
            ("POST", _CHAT, of(n=99), {}, 400),
            ("POST", _CHAT, of(unheard_of=1), {}, 400),
            ("POST", _CHAT, of(copyspec={"drafter": "nobody"}), {}, 400),
            ("POST", _CHAT, of(messages=many), {}, 400),
            ("POST", _CHAT, of(messages=[{"role": "user", "content": "a long text " * 80_000}]), {}, 400),
            ("POST", _CHAT, of(), {"X-Session-ID": "x" * 300}, 400),
            ("POST", "/v1/responses", b'{"model": 1}', {}, 400),
            ("POST", "/v1/embeddings", of(), {}, 404),
            ("POST", "/v1/copyspec/explain/none", b"", {}, 404),
            ("GET", _CHAT, b"", {}, 405),
            ("DELETE", "/v1/responses/none", b"", {}, 404),
        ]
        return self._rng.choice(kinds)

    async def _send_half_a_body(self) -> None:
        """A body that never becomes whole."""
        self._tally.counts["half bodies"] += 1
        question, _ = self._rng.choice(self._world.raw[self.tenant])
        path, body = asked("completions", self._model, question, stream=False)
        wait_s = self._rng.choice((0.1, 1.5 * LIMITS.body_timeout_s))
        await self._send_raw(path, json.dumps(body).encode(), wait_s, self._rng.uniform(0.1, 0.9))

    async def _look(self) -> None:
        """Look at what is the tenant's own, and at what is another's."""
        self._tally.counts["looks"] += 1
        place = "/v1/copyspec/conversations"
        listed = await self._http.get(place)
        names = [told["id"] for told in listed.json()["data"]] if await self._accepted(listed, place) else []
        if len(names) > LIMITS.sessions_per_owner:
            self._tally.breaks("more sessions than a tenant may have", f"{self.tenant}: {names}")
        other = self._rng.choice([name for name in TENANTS if name != self.tenant])
        looks = [
            ("GET", f"{place}/{other}-shared-0", (404,)),
            ("GET", f"{place}/{other}-shared-0/export", (404,)),
            ("DELETE", f"{place}/{other}-shared-0", (404,)),
            ("POST", f"/v1/copyspec/explain/{self._last_id}", (200, 404)),
            *(("GET", path, (200,)) for path in ("/v1/models", "/metrics", "/ready", "/", "/docs", "/api/tags")),
        ]
        if names:
            own = f"{place}/{self._rng.choice(names)}"
            looks += [("GET", own, (200, 404)), ("GET", f"{own}/export", (200, 404)), ("DELETE", own, (200, 404))]
        method, path, right = self._rng.choice(looks)
        response = await self._http.request(method, path)
        self._tally.statuses[response.status_code] += 1
        self._check_foreign(response.text, path)
        if response.status_code not in right:
            self._tally.breaks("looks told otherwise", f"{method} {path}: {response.status_code} {response.text}")
