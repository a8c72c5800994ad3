"""Whose call it is: keys, hosts and origins; and that what one tenant keeps takes nothing from another."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from copyspec_engine import ConfigError, Engine
from copyspec_engine.serve.config import ServeConfig
from copyspec_engine.serve.tenants import KEY_VARIABLE, Tenant, Tenants
from tests.serve.conftest import CHAT, Client, body

MakeEngine = Callable[..., Engine]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A file with keys "ann-key", "ann-new" and "bob-key"."""
    path = tmp_path / "keys"
    lines = [f"{name} {hashlib.sha256(key).hexdigest()}" for name, key in
             (("ann", b"ann-key"), ("ann", b"ann-new"), ("bob", b"bob-key"))]  # fmt: skip
    path.write_text("# who may ask\n\n" + "\n".join(lines))
    path.chmod(0o600)
    return path


def key(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


async def test_all_needs_a_key_that_tells_of_calls(echo: Engine, client: Client, keys: Path) -> None:
    http = client(echo, api_keys=str(keys))
    for path in ("/health", "/ready", "/version", "/docs", "/openapi.json", "/", "/page/main.js"):
        assert (await http.get(path)).status_code == 200
    assert (await client(echo, api_keys=str(keys), page=False).get("/")).status_code == 401
    for path in ("/v1/models", "/metrics", "/nothing", "/docs/", "/page/../metrics"):
        for headers in ({}, key("wrong"), key(""), {"Authorization": "Basic ann-key"}):
            response = await http.get(path, headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key"), path
    for headers in (key("ann-key"), key("ann-new"), {"X-API-Key": "bob-key"}):
        assert (await http.get("/v1/models", headers=headers)).status_code == 200


async def test_keys_are_reread_and_bad_ones_leave_the_old(keys: Path) -> None:
    tenants = Tenants(ServeConfig(api_keys=str(keys)), {KEY_VARIABLE: "own"})
    names = [tenants.of_key(given) for given in ("ann-key", "bob-key", "own", "other", None)]
    assert [tenant and tenant.name for tenant in names] == ["ann", "bob", "default", None, None]
    keys.write_text(f"carl {hashlib.sha256(b'carl-key').hexdigest()}")
    tenants.reread()
    assert tenants.of_key("ann-key") is None
    assert tenants.of_key("carl-key") is not None
    for text, mode, match in (("carl xyz", 0o600, "line 1"), ("", 0o600, "single key"), ("x", 0o604, "chmod 600")):
        keys.write_text(text)
        keys.chmod(mode)
        with pytest.raises(ConfigError, match=match):
            tenants.reread()
    assert tenants.of_key("carl-key") is not None


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_the_command_that_a_bad_line_is_answered_with_writes_a_good_one(keys: Path) -> None:
    keys.write_text(f"ann {hashlib.sha256(b'KEY').hexdigest()}  -")
    with pytest.raises(ConfigError, match="line 1") as refused:
        Tenants(ServeConfig(api_keys=str(keys)), {})
    command = str(refused.value).partition(", as: ")[2]
    keys.write_bytes(subprocess.run(["sh", "-c", command], check=True, capture_output=True).stdout)
    tenant = Tenants(ServeConfig(api_keys=str(keys)), {}).of_key("KEY")
    assert tenant is not None
    assert tenant.name == "ann"


@pytest.mark.parametrize(
    ("headers", "options", "status"),
    [
        ({"Host": "evil.example:8000"}, {}, 403),
        ({"Host": "127.0.0.1.evil.example"}, {}, 403),
        ({"Host": "localhost:8000"}, {}, 200),
        ({"Host": "[::1]:8000"}, {}, 200),
        ({"Host": "chat.example"}, {"allowed_hosts": ("chat.example",)}, 200),
        ({"Host": "chat.example"}, {"host": "0.0.0.0"}, 200),
        ({"Host": "other.example"}, {"host": "0.0.0.0", "allowed_hosts": ("chat.example",)}, 403),
        ({"Origin": "https://evil.example"}, {}, 403),
        ({"Origin": "null"}, {}, 403),
        ({"Origin": "http://127.0.0.1"}, {}, 200),
        ({"Origin": "https://ok.example"}, {"cors_origins": ("https://ok.example",)}, 200),
    ],
)
async def test_pages_of_others_do_not_come_in(
    echo: Engine, client: Client, headers: dict[str, str], options: dict[str, Any], status: int
) -> None:
    response = await client(echo, **options).get("/v1/models", headers=headers)
    assert response.status_code == status
    assert (response.headers.get("access-control-allow-origin") is not None) == bool(options.get("cors_origins"))


async def test_a_conversation_goes_on_by_header_body_and_what_is_shown(make_engine: MakeEngine, client: Client) -> None:
    http = client(make_engine(lambda _: "fine"), session_headers=("x-harness",))
    long = "x" * 300

    async def cached(given: dict[str, Any], headers: dict[str, str]) -> tuple[int, str]:
        response = await http.post(CHAT, json=body(long, **given), headers=headers)
        return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"], response.headers["x-session-id"]

    ways: list[tuple[dict[str, Any], dict[str, str], str]] = [
        ({}, {"X-Session-ID": "a"}, "a"),
        ({"session_id": "a"}, {}, "a"),
        ({"session_id": "z"}, {"X-Conversation-Id": "a"}, "a"),
        ({"metadata": {"thread_id": "a"}}, {}, "a"),
        ({}, {"X-Harness": "a"}, "a"),
    ]
    found = [await cached(given, headers) for given, headers, _ in ways]
    assert [name for _, name in found] == [name for *_, name in ways]
    assert found[0][0] == 0
    assert min(count for count, _ in found[1:]) > 250
    first = await http.post(CHAT, json=body(long, user="u"))
    talk = [*body(long)["messages"], first.json()["choices"][0]["message"], {"role": "user", "content": "more"}]
    seen = {}
    for user in ("u", "v", None):
        response = await http.post(CHAT, json=body(messages=talk, **({} if user is None else {"user": user})))
        seen[user] = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert seen["u"] > 250
    assert (seen["v"], seen[None]) == (0, 0), "what one user has said goes on for none else"
    named = first.headers["x-session-id"]
    again = await http.post(CHAT, json=body(messages=talk), headers={"X-Session-ID": named})
    assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 250
    assert again.headers["x-session-id"] == named


async def test_what_one_tenant_keeps_makes_another_forget_nothing(
    make_engine: MakeEngine, client: Client, keys: Path
) -> None:
    http = client(make_engine(lambda _: "fine", max_sessions=4), api_keys=str(keys))

    async def cached(tenant: str, session: str) -> int:
        headers = {**key(f"{tenant}-key"), "X-Session-ID": session}
        usage = (await http.post(CHAT, json=body("x" * 300), headers=headers)).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert await cached("bob", "s") == 0
    for number in range(9):
        assert await cached("ann", str(number)) == 0
    assert await cached("bob", "s") > 250


def test_tokens_come_back_with_time() -> None:
    now = [0.0]
    tenant = Tenant("ann", ServeConfig(tokens_per_minute=60), lambda: now[0])
    tenant.charge(90)
    with pytest.raises(Exception, match="tokens a minute"):
        tenant.take(1)
    now[0] = 31.0
    tenant.take(1)


def test_a_key_in_the_environment_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, KEY_VARIABLE, "k")
    assert not Tenants(ServeConfig()).is_open
