"""What operators read: health, readiness, metrics, and the document of the API."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

import httpx
import pytest

from copyspec_engine import Engine
from tests.serve.conftest import CHAT, Client, body

MakeEngine = Callable[..., Engine]


def counts(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"^([a-z_:]+(?:\{.*?\})?) (\S+)$", text, re.MULTILINE)}


async def test_metrics_count_what_was_done(make_engine: MakeEngine, client: Client) -> None:
    http = client(make_engine(lambda _: "again and again and again", drafter="copyspec"), vllm_metric_names=True)
    before = counts((await http.get("/metrics")).text)
    usage = (await http.post(CHAT, json=body(n=2))).json()["usage"]
    await http.post(CHAT, json=body(), headers={"X-Session-ID": "a"})
    await http.post(CHAT, json=body(temperature=-1))
    await http.request("BREW", "/coffee")
    text = (await http.get("/metrics")).text
    told = counts(text)
    assert told["copyspec_prompt_tokens_total"] == 3 * usage["prompt_tokens"]
    assert told["copyspec_completion_tokens_total"] == 1.5 * usage["completion_tokens"]
    assert told['vllm:generation_tokens_total{model_name="scripted"}'] == 1.5 * usage["completion_tokens"]
    assert told['copyspec_requests_total{code="200",endpoint="/v1/chat/completions",method="POST"}'] == 2
    assert told['copyspec_requests_total{code="400",endpoint="/v1/chat/completions",method="POST"}'] == 1
    assert told['copyspec_requests_total{code="404",endpoint="other",method="other"}'] == 1
    assert told['copyspec_conversations_total{kind="new"}'] == 2
    assert told['copyspec_conversations_total{kind="named"}'] == 1
    assert told['copyspec_finished_total{reason="stop"}'] == 3
    assert told["copyspec_request_seconds_count"] == 3
    assert told["copyspec_copied_share_count"] == 3
    slots = [told[f'copyspec_kv_slots{{state="{state}"}}'] for state in ("running", "cached", "free")]
    assert sum(slots) == 8 * 8192
    assert before["copyspec_running"] == told["copyspec_running"] == told["copyspec_calls_in_flight"] == 0


@pytest.mark.parametrize(
    ("path", "status"),
    [
        *((path, 200) for path in ("/", "/health", "/ready", "/version", "/docs", "/openapi.json", "/page/main.js")),
        *((path, 200) for path in ("/v1/models", "/api/tags", "/api/version", "/v1/copyspec/conversations")),
        *(("/v1/responses/x", 404), (CHAT, 405), ("/nothing", 404), ("/api/blobs/sha256:1", 404)),
    ],
)
async def test_head_is_get_without_the_body(echo: Engine, client: Client, path: str, status: int) -> None:
    http = client(echo)
    whole, head = await http.get(path), await http.head(path)
    assert (head.status_code, head.content) == (status, b"")
    assert whole.status_code == status
    assert whole.content
    same = ("content-length", "content-type", "allow")
    assert [head.headers.get(name) for name in same] == [whole.headers.get(name) for name in same]


async def test_head_comes_over_the_wire_and_is_counted_as_such(
    echo: Engine, serve: Callable[..., Awaitable[str]]
) -> None:
    async with httpx.AsyncClient(base_url=await serve(echo)) as http:
        assert [(await http.head("/health")).content for _ in range(2)] == [b"", b""]  # on one connection
        text = (await http.get("/metrics")).text
    assert counts(text)['copyspec_requests_total{code="200",endpoint="/health",method="HEAD"}'] == 2


async def test_metrics_and_health_outlive_the_engine(echo: Engine, client: Client) -> None:
    http = client(echo)
    echo.close()
    assert (await http.get("/health")).status_code == 503
    assert (await http.get("/ready")).status_code == 503
    assert counts((await http.get("/metrics")).text)["copyspec_heartbeat_age_seconds"] == float("inf")
    refused = await http.post(CHAT, json=body())
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_stopped")


async def test_the_page_of_the_api_needs_no_script_and_names_every_field(echo: Engine, client: Client) -> None:
    http = client(echo)
    page = await http.get("/docs")
    document = (await http.get("/openapi.json")).json()
    assert "<script" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    fields = document["components"]["schemas"]["ChatBody"]["properties"]
    assert {"messages", "copyspec", "temperature"} <= set(fields)
    assert all(f"<code>{name}</code>" in page.text for name in fields)
    references = set(re.findall(r'"\$ref": ?"#/components/schemas/(\w+)"', (await http.get("/openapi.json")).text))
    assert references <= set(document["components"]["schemas"])
