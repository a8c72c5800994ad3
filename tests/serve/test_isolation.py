"""Nothing of one tenant shows for another: everyone is answered as if alone on a fresh server, byte for byte.

Tenants do what they please on one server, with the same names and keys for all, and with ids that others were given.
Then each one's requests are made again on a server that nobody else uses.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copyspec_engine import Engine, EngineConfig
from copyspec_engine.serve.app import create_app
from copyspec_engine.serve.config import ServeConfig
from copyspec_engine.testing import loop_of, scripted_engine

NAMES = ("ann", "bob", "eve")
TEXTS = (
    "What all of them say: the ferry leaves at nine, the ferry leaves at ten.",
    "{0}'s secret is secret, says {0}. " * 4,
)
ID = re.compile(r"\b[a-z]+[-_][0-9a-f]{32,}\b")
UNKNOWN = f"resp_{'0' * 48}"
"""What nobody was ever given."""
TIMES = {
    *("created", "created_at", "completed_at", "last_used_at", "queue_s", "ttft_s", "total_s"),
    *("total_duration", "load_duration", "prompt_eval_duration", "eval_duration"),
}
CONVERSATIONS = "/v1/copyspec/conversations"


@dataclass(frozen=True)
class Act:
    """What a tenant does; most kinds make something of a few of these."""

    tenant: str
    kind: str
    text: str
    session: str | None
    key: str | None
    user: str | None
    drafter: str | None
    n: int
    stream: bool
    goes_on: bool
    other: int
    """Which of the ids that anybody was given, and which of the talks that anybody had."""


@dataclass(frozen=True)
class Asked:
    """A request."""

    method: str
    path: str
    body: dict[str, Any] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    n: int = 1


class Ids:
    """What a server has called things that another has called otherwise."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def learn(self, there: str, here: str) -> None:
        """Two servers have told the same."""
        self._known |= zip(ID.findall(there), ID.findall(here), strict=False)

    def in_text(self, text: str) -> str:
        """A text of there as it would be here; ids that stand for nothing here stay as they are."""
        return ID.sub(lambda found: self._known.get(found[0], found[0]), text)

    def in_request(self, asked: Asked) -> Asked:
        body = json.loads(self.in_text(json.dumps(asked.body)))
        return replace(asked, path=self.in_text(asked.path), body=body)


@dataclass
class World:
    """What was said so far to anybody."""

    ids: dict[str, list[str]] = field(default_factory=dict)
    """By what they stand for."""
    talks: list[list[dict[str, Any]]] = field(default_factory=list)
    exports: list[dict[str, Any]] = field(default_factory=list)

    def id_of(self, kind: str, number: int) -> str:
        found = self.ids.get(kind, [])
        return found[number % len(found)] if found else UNKNOWN

    def talk(self, number: int) -> list[dict[str, Any]]:
        return self.talks[number % len(self.talks)] if self.talks else []

    def note(self, asked: Asked, answer: Any) -> None:
        """Take in what a request was answered with."""
        if isinstance(answer, list):  # a stream
            answer = answer[-1]["response"] if "type" in answer[-1] else answer[0]
        if "choices" in answer or answer.get("object") in ("response", "conversation"):
            self.ids.setdefault(answer.get("object", "").split(".")[0], []).append(answer["id"])
        self.ids.setdefault("item", []).extend(item["id"] for item in answer.get("output", ()))
        if "message" in (answer.get("choices") or [{}])[0] and asked.body is not None:
            said = {"role": "assistant", "content": answer["choices"][0]["message"]["content"]}
            self.talks.append([*asked.body["messages"], said])
        if "texts" in answer:
            self.exports.append(answer)


def request_of(act: Act, world: World) -> Asked:
    """What an act says to the server."""
    asked = KINDS[act.kind](replace(act, text=act.text.format(act.tenant)), world)
    return replace(asked, headers={"Authorization": f"Bearer {act.tenant}", **asked.headers})


def called(act: Act, **said: Any) -> dict[str, Any]:
    """The body of a call."""
    options = {"explain": True, "stats": True, "segments": True, "drafter": act.drafter}
    given = {"model": "scripted", "stream": act.stream, "user": act.user, "prompt_cache_key": act.key, **said}
    given["copyspec"] = {name: value for name, value in options.items() if value is not None}
    return {name: value for name, value in given.items() if value is not None}


def in_session(act: Act) -> dict[str, str]:
    return {} if act.session is None else {"X-Session-ID": act.session}


def messages(act: Act, world: World) -> list[dict[str, Any]]:
    """What a chat shows; it may go on from what another has said."""
    before = world.talk(act.other) if act.goes_on else []
    return [*before, {"role": "user", "content": act.text}]


def chat(act: Act, world: World) -> Asked:
    prediction = {"type": "content", "content": act.text.upper()} if act.goes_on else None
    body = called(act, messages=messages(act, world), n=act.n, prediction=prediction)
    return Asked("POST", "/v1/chat/completions", body, in_session(act), act.n)


def completion(act: Act, _: World) -> Asked:
    body = called(act, prompt=act.text, n=act.n, max_tokens=90, session_id=act.session)
    return Asked("POST", "/v1/completions", body, n=act.n)


def response(act: Act, world: World) -> Asked:
    given: list[dict[str, Any]] = [{"role": "user", "content": act.text}]
    named: dict[str, Any] = {}
    if act.goes_on:
        kind = ("response", "conversation", "item")[act.other % 3]
        found = world.id_of(kind, act.other // 3)
        named = {"response": {"previous_response_id": found}, "conversation": {"conversation": found}}.get(kind, {})
        given = given if named else [{"id": found}, *given]
    metadata = None if act.session is None else {"thread_id": act.session}
    return Asked("POST", "/v1/responses", called(act, input=given, metadata=metadata, **named))


def ollama_chat(act: Act, world: World) -> Asked:
    body = {"model": "scripted", "messages": messages(act, world), "stream": act.stream}
    return Asked("POST", "/api/chat", body, in_session(act))


def ollama_generate(act: Act, _: World) -> Asked:
    body = {"model": "scripted", "prompt": act.text, "stream": act.stream, "raw": act.goes_on}
    return Asked("POST", "/api/generate", body, in_session(act))


def tokenize(act: Act, world: World) -> Asked:
    body = {"messages": messages(act, world), **({} if act.session is None else {"session_id": act.session})}
    return Asked("POST", "/tokenize", body)


def conversation(act: Act, world: World) -> Asked:
    item = {"id": world.id_of("item", act.other)} if act.goes_on else {"role": "user", "content": act.text}
    return Asked("POST", "/v1/conversations", {"items": [item]})


def take_in(act: Act, world: World) -> Asked:
    exported = world.exports[act.other % len(world.exports)] if world.exports else {}
    return Asked("POST", f"{CONVERSATIONS}/{act.session or 't'}/import", exported)


def about(kind: str, path: str, method: str = "GET") -> Callable[[Act, World], Asked]:
    """Asks for something by its id, whoever was given it."""
    return lambda act, world: Asked(method, path.format(world.id_of(kind, act.other)))


def named(path: str, method: str = "GET") -> Callable[[Act, World], Asked]:
    """Asks for a conversation by the name that everybody uses, or by that of another."""
    return lambda act, _: Asked(method, CONVERSATIONS + path.format(("s", "t", "ann%2Fs", "bob%2Fs")[act.other % 4]))


KINDS: dict[str, Callable[[Act, World], Asked]] = {
    "chat": chat,
    "completion": completion,
    "response": response,
    "ollama chat": ollama_chat,
    "ollama generate": ollama_generate,
    "tokenize": tokenize,
    "conversation": conversation,
    "get response": about("response", "/v1/responses/{}"),
    "list input": about("response", "/v1/responses/{}/input_items"),
    "delete response": about("response", "/v1/responses/{}", "DELETE"),
    "get conversation": about("conversation", "/v1/conversations/{}"),
    "list items": about("conversation", "/v1/conversations/{}/items"),
    "delete conversation": about("conversation", "/v1/conversations/{}", "DELETE"),
    "explain": about("chat", "/v1/copyspec/explain/{}", "POST"),
    "explain text": about("text_completion", "/v1/copyspec/explain/{}", "POST"),
    "explain response": about("response", "/v1/copyspec/explain/{}", "POST"),
    "list": lambda _, __: Asked("GET", CONVERSATIONS),
    "look": named("/{}"),
    "export": named("/{}/export"),
    "forget": named("/{}", "DELETE"),
    "import": take_in,
}


def reply(prompt: str) -> str:
    """Repeats what was said, or nearly, or not at all: copies are worth something else each time."""
    said = re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", prompt, re.DOTALL) or [prompt]
    last = said[-1]
    ways = (last * 2, last.swapcase(), last.replace("e", "ee").replace("s", ""), " ".join(sorted(last.split())))
    return ways[len(prompt) % len(ways)]


def told(response: httpx.Response) -> Any:
    """All that an answer says, without times; a stream's events by the answer that they are of."""
    if response.headers["content-type"].startswith(("text/event-stream", "application/x-ndjson")):
        lines = [line.removeprefix("data: ") for line in response.text.split("\n") if line[:1] in ("d", "{")]
        events = [_without_times(json.loads(line)) for line in lines if line != "[DONE]"]
        return sorted(events, key=lambda event: [choice["index"] for choice in event.get("choices", ())])
    return _without_times(response.json())


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_times(inner) for name, inner in value.items() if name not in TIMES}
    return [_without_times(inner) for inner in value] if isinstance(value, list) else value


class Server:
    """One server, and a client of it."""

    def __init__(self, engine: Engine, http: httpx.AsyncClient) -> None:
        self._engine, self._http = engine, http

    async def ask(self, asked: Asked) -> tuple[str, Any]:
        """All that is answered, with the headers that say something; and the answer alone."""
        with self._all_at_once(asked.n):
            response = await self._http.request(asked.method, asked.path, json=asked.body, headers=asked.headers)
        said = told(response)
        headers = {name: response.headers.get(name) for name in ("x-session-id", "x-copyspec-ignored")}
        return json.dumps([response.status_code, headers, said], ensure_ascii=False), said

    @contextmanager
    def _all_at_once(self, count: int) -> Iterator[None]:
        """The answers to one call begin in one step, however fast this machine is."""
        loop, is_over, is_held = loop_of(self._engine), threading.Event(), threading.Event()

        def hold() -> None:
            is_held.set()
            while len(loop.requests) < count and not is_over.is_set():
                time.sleep(0.0005)

        thread = threading.Thread(target=loop.call, args=(hold,))
        if count > 1:
            thread.start()
            is_held.wait()
        yield
        is_over.set()
        if count > 1:
            thread.join()


@asynccontextmanager
async def fresh(keys: Path, drafter: str) -> AsyncIterator[Server]:
    """A server that nobody has asked anything yet."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))  # choices come in in their order
    with scripted_engine(reply, EngineConfig(model="scripted", drafter=drafter)) as engine:
        transport = httpx.ASGITransport(app=create_app(engine, ServeConfig(api_keys=str(keys))))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            yield Server(engine, http)


async def compare(keys: Path, acts: list[Act], drafter: str) -> None:
    """Let everyone act on one server, and again each alone."""
    world, asked, answers = World(), list[Asked](), list[str]()
    tenant_of: dict[str, str] = {}  # by ids: whoever was the first to hear them
    async with fresh(keys, drafter) as server:
        for act in acts:
            asked.append(request_of(act, world))
            answer, said = await server.ask(asked[-1])
            answers.append(answer)
            world.note(asked[-1], said)
            for found in ID.findall(answer):
                assert tenant_of.setdefault(found, act.tenant) == act.tenant or found in str(asked[-1]), act
    for name in sorted({act.tenant for act in acts}):
        ids = Ids()
        async with fresh(keys, drafter) as server:
            for act, request, answer in zip(acts, asked, answers, strict=True):
                if act.tenant == name:
                    alone, _ = await server.ask(ids.in_request(request))
                    ids.learn(answer, alone)
                    assert ids.in_text(answer) == alone, act


def acts_of(tenants: Sequence[str]) -> st.SearchStrategy[list[Act]]:
    act = st.builds(
        Act,
        tenant=st.sampled_from(tenants),
        kind=st.sampled_from([*KINDS, *["chat"] * 8, *["response"] * 4, "completion", "completion"]),
        text=st.sampled_from(TEXTS),
        session=st.sampled_from([None, "s", "t"]),
        key=st.sampled_from([None, "k", "k"]),
        user=st.sampled_from([None, "u"]),
        drafter=st.sampled_from([None, None, "copyspec", "none"]),
        n=st.sampled_from([1, 1, 2]),
        stream=st.booleans(),
        goes_on=st.booleans(),
        other=st.integers(0, 11),
    )
    return st.lists(act, min_size=12, max_size=20)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everyone's key is his name."""
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("".join(f"{name} {hashlib.sha256(name.encode()).hexdigest()}\n" for name in NAMES))
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("drafter", ["adaptive", "copyspec"])
def test_everyone_is_answered_as_if_alone(keys: Path, drafter: str) -> None:
    @settings(max_examples=10, deadline=None)
    @given(st.sampled_from([NAMES[:2], NAMES]).flatmap(acts_of))
    def check(acts: list[Act]) -> None:
        asyncio.run(compare(keys, acts, drafter))

    check()
