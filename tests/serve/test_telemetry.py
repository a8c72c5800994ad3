"""A server goes on with the trace that a call's headers name, and clients of this package name theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from opentelemetry import propagate, trace
from opentelemetry.propagators.textmap import TextMapPropagator
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider

from copyspec_engine import Engine, GenerationRequest
from copyspec_engine.adapters.remote import RemoteEngine
from copyspec_engine.engine.telemetry import continued_trace, trace_headers
from tests.serve.conftest import CHAT, Client, body
from tests.serve.servers import serving

TRACE, PARENT = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331
HEADERS = {"traceparent": f"00-{TRACE:032x}-{PARENT:016x}-01"}


def calls(spans: list[ReadableSpan]) -> list[ReadableSpan]:
    return [span for span in spans if span.name.startswith("chat ")]


def ancestors(span: ReadableSpan, spans: list[ReadableSpan]) -> list[int]:
    """Ids of the spans above one, those of another process too."""
    by_id = {found.context.span_id: found for found in spans}
    found = []
    above = span.parent
    while above is not None:
        found.append(above.span_id)
        above = by_id[above.span_id].parent if above.span_id in by_id else None
    return found


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_goes_on_with_the_trace_of_its_client(
    echo: Engine, client: Client, spans: Callable[[], list[ReadableSpan]], stream: bool
) -> None:
    http = client(echo)
    for headers in (HEADERS | {"X-Session-ID": "notes"}, {}, {"traceparent": "no trace"}):
        assert (await http.post(CHAT, json=body(n=2, stream=stream), headers=headers)).status_code == 200
    found = spans()
    told = calls(found)
    assert len(told) == 6
    for span in told[:2]:
        assert (span.context.trace_id, ancestors(span, found)[-1]) == (TRACE, PARENT)
        assert span.attributes["gen_ai.conversation.id"] == "default/notes"
    for span in told[2:]:
        assert span.context.trace_id != TRACE
        assert PARENT not in ancestors(span, found)
        assert "gen_ai.conversation.id" not in span.attributes


@pytest.mark.enable_socket
def test_a_client_of_this_package_names_its_trace(
    echo: Engine, provider: TracerProvider, spans: Callable[[], list[ReadableSpan]]
) -> None:
    request = GenerationRequest(messages=[{"role": "user", "content": "hi"}])
    with serving(echo) as url:
        remote = RemoteEngine(f"{url}/v1")
        with provider.get_tracer("chain").start_as_current_span("chain") as around:
            assert remote.generate(request).text == "HI"
        assert remote.generate(request).text == "HI"
    first, second = calls(spans())
    chain = around.get_span_context()
    assert (first.context.trace_id, ancestors(first, spans())[-1]) == (chain.trace_id, chain.span_id)
    assert second.context.trace_id != chain.trace_id


def test_a_trace_is_taken_from_headers_where_no_span_is_around(provider: TracerProvider) -> None:
    with continued_trace(HEADERS):
        found = trace.get_current_span().get_span_context()
        assert (found.trace_id, found.span_id, found.is_remote) == (TRACE, PARENT, True)
        assert trace_headers() == HEADERS
    with continued_trace({"traceparent": "no trace"}):
        assert not trace.get_current_span().get_span_context().is_valid
        assert trace_headers() == {}
    with provider.get_tracer("http").start_as_current_span("POST") as around, continued_trace(HEADERS):
        assert trace.get_current_span() is around


class _Broken(TextMapPropagator):
    def extract(self, carrier: Any, *_: Any, **__: Any) -> Any:
        raise ValueError("extract")

    def inject(self, carrier: Any, *_: Any, **__: Any) -> None:
        raise ValueError("inject")

    @property
    def fields(self) -> set[str]:
        return set()


def test_a_propagator_that_fails_harms_no_call(
    provider: TracerProvider, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(propagate, "_HTTP_TEXT_FORMAT", _Broken())
    with continued_trace(HEADERS):
        assert not trace.get_current_span().get_span_context().is_valid
        assert trace_headers() == {}
    assert "extract" in caplog.text
    assert "inject" in caplog.text


def test_headers_say_nothing_where_nobody_listens() -> None:
    with continued_trace(HEADERS):
        assert not trace.get_current_span().get_span_context().is_valid
        assert trace_headers() == {}
