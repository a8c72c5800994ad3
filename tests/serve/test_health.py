"""What operators read: health, readiness, metrics, and the document of the API."""

from __future__ import annotations

import re
from collections.abc import Callable

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
