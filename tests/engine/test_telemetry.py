"""What OpenTelemetry is told of calls: their spans, however they end, and instruments; and of whose texts it is not."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any
from weakref import WeakSet

import pytest
from opentelemetry import metrics
from opentelemetry import trace as trace_api
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.trace import SpanKind, StatusCode

from copyspec_engine import (
    ConfigError,
    Engine,
    EngineBusyError,
    EngineConfig,
    GenerationRequest,
    Grammar,
    RequestFailedError,
    SamplingParams,
)
from copyspec_engine.engine import telemetry
from copyspec_engine.engine.telemetry_names import attributes_told, instruments_told
from copyspec_engine.testing import held_by, scripted_engine

SECRET = "the launch code is 0000"
CONTENT = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"


def ask(text: str = SECRET, **options: Any) -> GenerationRequest:
    return GenerationRequest(messages=({"role": "user", "content": text},), **options)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], dict[str, list[Any]]]]:
    """read() -> the data points of all instruments by their names."""
    reader = InMemoryMetricReader()
    made = MeterProvider([reader])
    monkeypatch.setattr(metrics, "get_meter_provider", lambda: made)
    monkeypatch.setattr(telemetry, "_observed", WeakSet())  # engines of other tests are told for a moment longer

    def points() -> dict[str, list[Any]]:
        data = json.loads(reader.get_metrics_data().to_json())
        found = data["resource_metrics"][0]["scope_metrics"][0]["metrics"]
        return {metric["name"]: metric["data"]["data_points"] for metric in found}

    yield points
    made.shutdown()


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    """make_engine(replies) -> a scripted engine; closed after the test."""
    with ExitStack() as engines:
        yield lambda replies: engines.enter_context(scripted_engine(replies))


@pytest.fixture
def echo() -> Iterator[Engine]:
    """Repeats the last user message."""
    with scripted_engine(lambda prompt: prompt.rsplit("<|im_start|>user\n", 1)[1].split("<|im_end|>")[0]) as engine:
        yield engine


@pytest.fixture
def endless() -> Iterator[Engine]:
    config = EngineConfig(model="/somewhere/on/disk/endless", drafter="none", max_running=1, max_waiting=0)
    with scripted_engine(lambda _: "word " * 400, config) as engine:
        yield engine


def only_call(spans: list[ReadableSpan]) -> ReadableSpan:
    (call,) = [span for span in spans if span.parent is None or span.parent.is_remote]
    return call


def test_a_call_is_a_span_with_the_figures_of_its_output(
    echo: Engine, spans: Callable[[], list[ReadableSpan]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = SamplingParams(max_tokens=50, seed=3, stop=["zzz"])
    request = ask(session_id="notes", sampling=sampling)
    first, output = echo.generate(request), echo.generate(ask(session_id="notes", sampling=sampling))
    assert first.copied_share > 0.5 < output.usage.cached_tokens
    *children, call = spans()[4:]
    told = dict(call.attributes or {})
    assert (call.name, call.kind, call.status.status_code) == ("chat scripted", SpanKind.INTERNAL, StatusCode.UNSET)
    stats, usage, timing = output.draft_stats, output.usage, output.timing
    by_source = {name: told.pop(name) for name in list(told) if name.startswith("copyspec.accepted_tokens.")}
    assert sum(by_source.values()) == stats.num_accepted_tokens > 0
    assert told == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "copyspec",
        "gen_ai.request.model": "scripted",
        "gen_ai.response.model": "scripted",
        "gen_ai.conversation.id": "notes",
        "gen_ai.request.max_tokens": 50,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.stop_sequences": ("zzz",),
        "gen_ai.request.seed": 3,
        "gen_ai.response.id": output.request_id,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        "copyspec.copied_share": output.copied_share,
        "copyspec.tokens_per_forward": output.tokens_per_forward,
        "copyspec.forward_passes": stats.num_forward_passes,
        "copyspec.prefill_passes": stats.num_prefill_passes,
        "copyspec.draft_tokens": stats.num_draft_tokens,
        "copyspec.accepted_tokens": stats.num_accepted_tokens,
        "copyspec.queue_s": timing.queue_s,
        "copyspec.ttft_s": timing.ttft_s,
    }
    assert set(told) <= set(attributes_told())
    assert [child.name for child in children] == ["tokenise", "prefill", "decode"]
    tokenise, prefill, decode = children
    ordered = [call.start_time, tokenise.start_time, tokenise.end_time, prefill.start_time, prefill.end_time]
    ordered += [decode.start_time, decode.end_time, call.end_time]
    assert ordered == sorted(ordered)
    ttft_ns = prefill.end_time - tokenise.start_time
    assert abs(ttft_ns - timing.ttft_s * 1e9) < 10
    assert all(child.context.trace_id == call.context.trace_id for child in children)
    assert all(child.parent.span_id == call.context.span_id for child in children)


def test_no_text_is_told_unless_it_is_asked_for(
    echo: Engine, spans: Callable[[], list[ReadableSpan]], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = ask(sampling=SamplingParams(max_tokens=9000))
    bad = GenerationRequest(messages=({"role": "user", "content": SECRET}, {"content": SECRET}))
    unnamed = ask(session_id="found-1", keep_texts=False)

    def asked() -> list[str]:
        before = len(spans())
        echo.generate(unnamed)
        for request in (refused, bad):
            with pytest.raises(Exception, match=r"."):
                echo.generate(request)
        return [span.to_json() for span in spans()[before:]]

    quiet = "".join(asked())
    assert SECRET not in quiet
    assert "found-1" not in quiet
    monkeypatch.setenv(CONTENT, "span_only")
    told = json.loads(next(span for span in asked() if '"chat scripted"' in span))["attributes"]
    assert json.loads(told["gen_ai.input.messages"]) == [
        {"role": "user", "parts": [{"type": "text", "content": SECRET}]}
    ]
    assert json.loads(told["gen_ai.output.messages"]) == [
        {"role": "assistant", "parts": [{"type": "text", "content": SECRET}], "finish_reason": "stop"}
    ]


def test_calls_and_results_of_tools_are_told_as_parts(
    make_engine: Callable[..., Engine], spans: Callable[[], list[ReadableSpan]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CONTENT, "SPAN_AND_EVENT")
    engine = make_engine(['<tool_call>{"name": "save", "arguments": {"text": "b"}}</tool_call>'])
    called = {"id": "1", "type": "function", "function": {"name": "save", "arguments": {"text": "a"}}}
    messages = (
        {"role": "user", "content": [{"type": "text", "text": "save"}]},
        {"role": "assistant", "content": "", "reasoning_content": "why", "tool_calls": [called]},
        {"role": "tool", "content": "saved", "tool_call_id": "1"},
    )
    tool = {"type": "function", "function": {"name": "save", "parameters": {"type": "object"}}}
    engine.generate(GenerationRequest(messages=messages, tools=[tool], parse_reply=True))
    told = only_call(spans()).attributes or {}
    inner = [message["parts"] for message in json.loads(str(told["gen_ai.input.messages"]))]
    assert inner == [
        [{"type": "text", "content": "save"}],
        [
            {"type": "reasoning", "content": "why"},
            {"type": "tool_call", "id": "1", "name": "save", "arguments": {"text": "a"}},
        ],
        [{"type": "tool_call_response", "id": "1", "response": "saved"}],
    ]
    (answer,) = json.loads(str(told["gen_ai.output.messages"]))
    assert [(part["type"], part["name"], part["arguments"]) for part in answer["parts"]] == [
        ("tool_call", "save", {"text": "b"})
    ]


@pytest.mark.parametrize(
    "refused",
    [
        {"role": "user", "content": [1, None]},
        {"role": "assistant", "content": "", "tool_calls": 5},
        {"role": "assistant", "content": "", "tool_calls": ["save"]},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": "save"}]},
    ],
)
def test_a_call_that_was_refused_for_its_messages_ends_its_span(
    echo: Engine, spans: Callable[[], list[ReadableSpan]], monkeypatch: pytest.MonkeyPatch, refused: dict[str, Any]
) -> None:
    monkeypatch.setenv(CONTENT, "SPAN_ONLY")
    with pytest.raises(ConfigError):
        echo.generate(GenerationRequest(messages=(refused,)))
    told = only_call(spans()).attributes or {}
    assert told["error.type"] == "ConfigError"
    assert json.loads(str(told["gen_ai.input.messages"]))[0]["role"] == refused["role"]


def test_texts_that_are_no_utf8_are_told_as_what_exporters_can_send(
    echo: Engine, spans: Callable[[], list[ReadableSpan]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CONTENT, "SPAN_ONLY")
    echo.generate(ask(sampling=SamplingParams(stop=("\ud800", "é"))))
    with pytest.raises(UnicodeEncodeError):  # of the scripted tokenizer
        echo.generate(ask("half \udfff"))
    answered, refused = (span.attributes or {} for span in spans() if span.parent is None)
    assert answered["gen_ai.request.stop_sequences"] == ("?", "é")
    assert "half ?" in str(refused["gen_ai.input.messages"])


def ended(spans: Callable[[], list[ReadableSpan]]) -> ReadableSpan:
    """The only call's span, as soon as it is over."""
    while not spans():
        time.sleep(0.01)
    return only_call(spans())


async def test_streams_that_are_left_end_their_spans(endless: Engine, spans: Callable[[], list[ReadableSpan]]) -> None:
    stream = endless.astream(ask())
    await anext(stream)
    await stream.aclose()
    call = await asyncio.to_thread(ended, spans)
    told = call.attributes or {}
    assert (call.name, call.status.status_code) == ("chat endless", StatusCode.UNSET)
    assert told["gen_ai.response.finish_reasons"] == ("cancelled",)
    assert 0 < int(str(told["gen_ai.usage.output_tokens"])) < 2000


def test_a_closed_handle_ends_its_span(endless: Engine, spans: Callable[[], list[ReadableSpan]]) -> None:
    with endless.stream(ask()) as handle:
        next(handle)
    assert (ended(spans).attributes or {})["gen_ai.response.finish_reasons"] == ("cancelled",)


def test_errors_end_spans_with_their_names(endless: Engine, spans: Callable[[], list[ReadableSpan]]) -> None:
    def last() -> tuple[str, Any]:
        call = next(span for span in reversed(spans()) if span.parent is None)
        assert call.status.status_code is StatusCode.ERROR
        return (call.attributes or {})["error.type"], (call.attributes or {})["gen_ai.response.finish_reasons"]

    assert endless.generate(ask(timeout_s=0.05)).finish_reason == "timeout"
    assert last() == ("timeout", ("timeout",))
    with endless.stream(ask()) as running:
        next(running)
        with pytest.raises(EngineBusyError):
            endless.stream(ask(), wait=False)
        assert last() == ("EngineBusyError", ("error",))
        with pytest.raises(ConfigError):
            endless.stream(ask(sampling=SamplingParams(logit_bias={10**6: 1.0})))
        assert last() == ("ConfigError", ("error",))
    with endless.stream(ask()) as running:
        next(running)
        endless.close()
        assert last() == ("EngineStoppedError", ("error",))


def test_a_request_that_fails_in_the_loop_ends_its_span(
    make_engine: Callable[..., Engine], spans: Callable[[], list[ReadableSpan]]
) -> None:
    with pytest.raises(RequestFailedError):
        make_engine([]).generate(ask())
    call = only_call(spans())
    assert ((call.attributes or {})["error.type"], call.status.description) == ("RequestFailedError", None)
    assert [span.name for span in spans()] == ["tokenise", "prefill", "chat scripted"]


class _Broken(SpanProcessor):
    def on_start(self, span: Any, parent_context: Any = None) -> None:
        raise RuntimeError("on_start")

    def on_end(self, span: ReadableSpan) -> None:
        raise RuntimeError("on_end")


@pytest.mark.parametrize("hook", ["on_start", "on_end"])
def test_a_listener_that_fails_harms_no_call(
    echo: Engine, provider: TracerProvider, hook: str, caplog: pytest.LogCaptureFixture
) -> None:
    listener = _Broken()
    setattr(listener, "on_end" if hook == "on_start" else "on_start", lambda *_, **__: None)
    provider.add_span_processor(listener)
    assert echo.generate(ask()).text == SECRET
    assert echo.generate(ask()).text == SECRET
    assert hook in caplog.text


class _BrokenAtChildren(SpanProcessor):
    def on_end(self, span: ReadableSpan) -> None:
        if span.name == "tokenise":
            raise RuntimeError("on_end")


def test_a_span_ends_though_its_children_cannot_be_told(
    echo: Engine, provider: TracerProvider, spans: Callable[[], list[ReadableSpan]], read: Callable[[], Any]
) -> None:
    provider.add_span_processor(_BrokenAtChildren())
    assert echo.generate(ask()).text == SECRET
    assert (only_call(spans()).attributes or {})["gen_ai.response.finish_reasons"] == ("stop",)
    assert [point["count"] for point in read()["gen_ai.client.inference.duration"]] == [1]


def test_a_provider_that_cannot_be_had_harms_no_call(
    echo: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trace_api, "_TRACER_PROVIDER", None)
    monkeypatch.setenv("OTEL_PYTHON_TRACER_PROVIDER", "not_installed")
    assert echo.generate(ask()).text == SECRET
    assert "gives no provider" in caplog.text


def test_instruments_are_made_once_whoever_calls_first() -> None:
    made: list[int] = []

    class Slow(MeterProvider):
        def get_meter(self, *args: Any, **options: Any) -> Any:
            made.append(threading.get_ident())
            time.sleep(0.05)
            return super().get_meter(*args, **options)

    provider = Slow()
    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(telemetry.instruments_of, [provider] * 4)
    assert len(made) == 1
    assert all(other is first for other in others)
    provider.shutdown()


def test_engines_of_one_model_are_told_together(
    make_engine: Callable[..., Engine], read: Callable[[], dict[str, list[Any]]]
) -> None:
    one, other = make_engine(lambda _: "a"), make_engine(lambda _: "b")
    for engine, session_id in ((one, "1"), (one, "2"), (other, "3")):
        engine.generate(ask(session_id=session_id))
    points = read()
    assert [point["value"] for point in points["copyspec.sessions"]] == [3]
    assert [point["value"] for point in points["copyspec.prompt_tokens"]] == [
        one.metrics().prompt_tokens + other.metrics().prompt_tokens
    ]
    slots = sum(point["value"] for point in points["copyspec.kv_slots"])
    assert slots == one.metrics().num_kv_slots + other.metrics().num_kv_slots


def test_instruments_tell_what_outputs_and_the_engine_say(
    echo: Engine, read: Callable[[], dict[str, list[Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = [echo.generate(ask(session_id="notes")) for _ in range(3)]
    with pytest.raises(ConfigError):
        echo.generate(ask(sampling=SamplingParams(logit_bias={10**6: 1.0})))
    points, metrics = read(), echo.metrics()
    assert set(points) == set(instruments_told())
    used = "gen_ai.client.inference.usage"
    for name, expected in (
        (f"{used}.input_tokens", metrics.prompt_tokens),
        (f"{used}.output_tokens", metrics.completion_tokens),
        (f"{used}.cache_read.input_tokens", metrics.cached_tokens),
        ("copyspec.prompt_tokens", metrics.prompt_tokens),
        ("copyspec.forward_passes", metrics.num_steps),
        ("copyspec.sessions", 1),
    ):
        assert [point["value"] for point in points[name]] == [expected], name
    by_source = {point["attributes"]["copyspec.source"]: point["value"] for point in points["copyspec.accepted_tokens"]}
    assert by_source == metrics.accepted_by_source
    assert sum(point["value"] for point in points["copyspec.kv_slots"]) == metrics.num_kv_slots
    durations = points["gen_ai.client.inference.duration"]
    assert [(point["count"], point["attributes"].get("error.type")) for point in durations] == [
        (3, None),
        (1, "ConfigError"),
    ]
    (ttft,) = points["gen_ai.server.time_to_first_token"]
    assert (ttft["count"], ttft["sum"]) == (3, sum(output.timing.ttft_s for output in outputs))
    (share,) = points["copyspec.copied_share"]
    assert share["sum"] == sum(output.copied_share for output in outputs)
    by_type = {point["attributes"]["gen_ai.token.type"]: point["sum"] for point in points["gen_ai.client.token.usage"]}
    assert by_type == {"input": metrics.prompt_tokens, "output": metrics.completion_tokens}
    monkeypatch.setattr(telemetry, "_SAME_READING_S", -1.0)
    echo.close()
    assert "copyspec.sessions" not in read()  # an engine that is closed says nothing of itself


def test_json_and_raw_prompts_are_told_apart(
    make_engine: Callable[..., Engine], spans: Callable[[], list[ReadableSpan]]
) -> None:
    engine = make_engine(["{}", "more"])
    engine.generate(ask(grammar=Grammar(json_object=True)))
    engine.generate(GenerationRequest(prompt=SECRET))
    calls = [span for span in spans() if span.parent is None]
    assert [(call.name, (call.attributes or {}).get("gen_ai.output.type")) for call in calls] == [
        ("chat scripted", "json"),
        ("text_completion scripted", None),
    ]


def test_a_call_is_a_child_of_the_span_around_it(
    echo: Engine, provider: TracerProvider, spans: Callable[[], list[ReadableSpan]]
) -> None:
    async def asked() -> None:
        await echo.agenerate(ask())

    with provider.get_tracer("test").start_as_current_span("around") as around:
        echo.generate(ask())
        asyncio.run(asked())
    calls = [span for span in spans() if span.name == "chat scripted"]
    assert [call.parent.span_id for call in calls] == [around.get_span_context().span_id] * 2


UNTOLD = """
import sys
from copyspec_engine import GenerationRequest
from copyspec_engine.testing import scripted_engine
with scripted_engine(["hello"]) as engine:
    assert engine.generate(GenerationRequest(prompt="hi")).text == "hello"
print(*[name for name in sys.modules if name.startswith("opentelemetry")])
"""


def test_nothing_is_imported_where_nobody_has_set_up_a_provider() -> None:
    shown = subprocess.run([sys.executable, "-c", UNTOLD], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == ""


def test_without_a_provider_a_request_carries_nothing(endless: Engine) -> None:
    from opentelemetry import trace as api  # it is imported, and nobody listens

    assert type(api.get_tracer_provider()).__name__ == "ProxyTracerProvider"
    with endless.stream(ask()) as handle:
        next(handle)
        assert held_by(endless).running == 1
