"""Where calls go: by what names their conversation, stable whoever comes or goes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import Headers

from copyspec_engine import ConfigError
from copyspec_engine.scale.options import split_options
from copyspec_engine.scale.routes import Askers, Route, route_of
from copyspec_engine.scale.slots import Slot, tag_of
from copyspec_engine.serve.config import ServeConfig
from copyspec_engine.serve.tenants import Tenants

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "You are terse"}


def route(body: dict[str, Any] | None = None, path: str = CHAT, tenant: str = "ann", **headers: str) -> Route:
    config = ServeConfig()
    named = Headers({name.replace("_", "-"): value for name, value in headers.items()})
    return route_of(Tenants(config, {}).named(tenant), path, named, config, body)


def test_a_conversation_has_one_route_by_whatever_names_it() -> None:
    named = route({"messages": [USER]}, x_session_id="notes")
    assert named.key
    assert named == route({"messages": [SYSTEM, USER], "session_id": "notes"})
    assert named == route({"metadata": {"thread_id": "notes"}})
    assert named == route(path="/v1/copyspec/conversations/notes/export")
    assert named == route(path="/v1/copyspec/conversations/notes")
    assert named != route({"session_id": "other"})
    assert named != route({"session_id": "notes"}, tenant="bob")
    assert "notes" not in str(named)


def test_what_is_not_named_goes_by_its_cache_key_or_by_what_the_chat_begins_with() -> None:
    begun = route({"messages": [SYSTEM, USER]})
    assert begun.key
    answer = {"role": "assistant", "content": "Hello"}
    assert begun == route({"messages": [SYSTEM, USER, answer, {"role": "user", "content": "Bye"}]})
    assert begun != route({"messages": [USER]})
    assert route({"input": "Hi"}) == route({"input": [USER, answer]}) == route({"messages": [USER]})
    cached = route({"messages": [USER], "prompt_cache_key": "k"})
    assert cached == route({"messages": [SYSTEM], "prompt_cache_key": "k"})
    assert route({"prompt": "Once"}) == Route()


def test_what_was_made_by_a_replica_leads_to_it() -> None:
    made = f"resp_{tag_of('host-1')}{'0' * 40}"
    assert route(path=f"/v1/responses/{made}").tag == tag_of("host-1")
    assert route(path=f"/v1/responses/{made}/input_items").tag == tag_of("host-1")
    assert route({"previous_response_id": made, "session_id": "notes"}) == Route(
        route({"session_id": "notes"}).key, tag_of("host-1")
    )
    assert route({"conversation": {"id": made.replace("resp", "conv")}}).tag == tag_of("host-1")
    assert route(path="/v1/responses/of-another-server").tag == ""
    assert route({"session_id": f"found-{tag_of('host-1')}{'0' * 32}"}).tag == tag_of("host-1")
    assert route({"session_id": f"named-{tag_of('host-1')}{'0' * 32}"}).tag == ""
    found = route({"previous_response_id": made, "session_id": "notes"})
    assert Route.of(str(found)) == found


@pytest.mark.parametrize(
    "body",
    [
        {"session_id": 3, "metadata": [], "messages": "x", "conversation": []},
        {"messages": [1, None, {"role": "user", "content": [{}]}], "metadata": {"thread_id": {}}},
        {"previous_response_id": {}, "input": {}, "prompt_cache_key": []},
    ],
)
def test_bodies_that_a_replica_refuses_have_a_route_too(body: dict[str, Any]) -> None:
    assert isinstance(route(body), Route)


def test_a_tenant_keeps_his_conversations_when_his_key_is_another_one(tmp_path: Path) -> None:
    def line(name: str, key: str) -> str:
        return f"{name} {hashlib.sha256(key.encode()).hexdigest()}\n"

    keys = tmp_path / "keys"
    keys.touch(mode=0o600)
    keys.write_text(line("ann", "old"))
    askers = Askers(ServeConfig(api_keys=str(keys)))
    assert askers.of(Headers({"authorization": "Bearer old"})).name == "ann"
    assert askers.of(Headers({"x-api-key": "new"})).name == "default"
    keys.write_text(line("ann", "old") + line("ann", "new"))
    assert askers.of(Headers({"x-api-key": "new"})).name == "ann"
    unread = Askers(ServeConfig(api_keys=str(tmp_path / "none")))
    assert unread.of(Headers({"x-api-key": "a"})).name != unread.of(Headers({"x-api-key": "b"})).name


def test_slots_are_held_by_one_each_and_taken_over(tmp_path: Path) -> None:
    first, second = Slot(tmp_path), Slot(tmp_path, prefix="host-")
    assert (first.name, second.name) == ("0", "host-1")
    first.release()
    assert Slot(tmp_path).name == "0"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"port": 9000}, "Got port=9000"),
        ({"replica": 2}, "use replicas"),
        ({"replicas": 0}, "replicas"),
        ({"engine": "nothing"}, "MODULE:NAME"),
        ({"num_gpus": 0.5}, "kv_cache_tokens"),
        ({"host": "0.0.0.0"}, "without any key"),
    ],
)
def test_options_that_cannot_be_are_named(options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COPYSPEC_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=said):
        split_options(options)


def test_options_are_taken_as_words_too() -> None:
    scale, serve, engine = split_options({"model": "smollm2", "replicas": "2", "max_n": "3", "max_running": "4"})
    assert (scale.replicas, serve.max_n, engine.max_running, engine.max_waiting) == (2, 3, 4, 64)
