"""What OpenTelemetry is told of calls: a span for each, with children for its phases, and instruments.

`telemetry_names` has all names and figures. Texts are left out, unless the conventions' own variable asks for them.
Nothing is imported that is not there already: whoever sets up a provider has imported OpenTelemetry, and where nobody
has, a call costs a look into `sys.modules`. What goes wrong here is logged, and harms no call.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from copyspec_engine.engine.telemetry_names import (
    ANSWERED,
    ASKED,
    COUNTERS,
    DURATIONS,
    GAUGES,
    MEASURES,
    SECONDS,
    by_source,
    contents,
    encodable,
    instruments_told,
)
from copyspec_engine.values.config import GenerationRequest
from copyspec_engine.values.errors import EngineStoppedError
from copyspec_engine.values.info import EngineMetrics
from copyspec_engine.values.outputs import GenerationOutput, StreamChunk

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
    from opentelemetry.trace import Span, TracerProvider

    from copyspec_engine.loop.request import Request

__all__ = ["CallTrace", "Telemetry", "continued_trace", "trace_headers"]

logger = logging.getLogger(__name__)

_PROVIDER = "copyspec"
_CONTENT = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
_WITH_CONTENT = ("SPAN_ONLY", "SPAN_AND_EVENT", "TRUE")
"""Values of that variable, in any case, with which spans have texts."""
_SAME_READING_S = 0.1
"""An engine is asked once for all instruments that are read within so long."""


_making = threading.Lock()


def instruments_of(provider: MeterProvider) -> dict[str, Any]:
    """The process's instruments by their names; those of engines read themselves."""
    with _making:  # else two first calls at once would make all of them twice
        return _made_once(provider)


@lru_cache(maxsize=1)
def _made_once(provider: MeterProvider) -> dict[str, Any]:
    meter = provider.get_meter("copyspec")
    made: dict[str, Any] = {
        name: meter.create_histogram(name, "s", text, explicit_bucket_boundaries_advisory=SECONDS)
        for name, text in DURATIONS.items()
    }
    for measure in MEASURES:
        if measure.name in made:
            continue
        if measure.kind == "counter":
            made[measure.name] = meter.create_counter(measure.name, measure.unit, measure.text)
        else:
            made[measure.name] = meter.create_histogram(
                measure.name, measure.unit, measure.text, explicit_bucket_boundaries_advisory=measure.boundaries
            )
    for name, (kind, text) in instruments_told().items():
        if name not in made:
            create = meter.create_observable_gauge if kind == "gauge" else meter.create_observable_counter
            made[name] = create(name, [partial(_observe, name)], description=text)
    return made


_observed: weakref.WeakSet[Telemetry] = weakref.WeakSet()


def _observe(name: str, _: CallbackOptions) -> Iterable[Observation]:
    """What the engines say of themselves under a name: engines of one model together, as one of them would."""
    from opentelemetry.metrics import Observation

    sums: Counter[tuple[tuple[str, str], ...]] = Counter()
    for telemetry in list(_observed):
        for count, attributes in telemetry.figures(name.removeprefix("copyspec.")):
            sums[tuple(attributes.items())] += count
    for names, count in sums.items():
        yield Observation(count, dict(names))


# ---- an engine, and its calls --------------------------------------------------------------------------------------


class Telemetry:
    """Tells OpenTelemetry of an engine's calls. Thread-safe.

    Args:
        model: its name; of a folder, the last one is told.
        metrics: gives the engine's counts.
    """

    def __init__(self, model: str, metrics: Callable[[], EngineMetrics]) -> None:
        self.model = PurePath(model).name if PurePath(model).is_absolute() else model
        self._metrics = metrics
        self._taken: tuple[float, EngineMetrics | None] = (0.0, None)

    @contextmanager
    def call(self, request: GenerationRequest) -> Iterator[CallTrace | None]:
        """A call that begins, until the loop has it; what is raised meanwhile ends it. None: nobody listens."""
        trace = self._begin(request)
        if trace is None:
            yield None
            return
        try:
            yield trace
        except BaseException as error:
            trace.ended(error)
            raise

    def _begin(self, request: GenerationRequest) -> CallTrace | None:
        traces, metrics = _provider("trace", "get_tracer_provider"), _provider("metrics", "get_meter_provider")
        if traces is None and metrics is None:
            return None
        try:
            if metrics is not None:
                _observed.add(self)
            return CallTrace(self.model, request, traces, None if metrics is None else instruments_of(metrics))
        except Exception:
            logger.exception("a call could not be told to OpenTelemetry")
            return None

    def figures(self, name: str) -> Iterable[tuple[int, dict[str, str]]]:
        """What `EngineMetrics` says under a name of `instruments_told`, with attributes; nothing once it is closed."""
        model = {"gen_ai.request.model": self.model}
        try:
            metrics = self._recent()
        except EngineStoppedError:
            return []
        if name == "kv_slots":
            return [(count, {**model, "copyspec.state": state}) for state, count in metrics.kv_slots_by_state.items()]
        if name == "accepted_tokens":
            return [
                (count, {**model, "copyspec.source": source}) for source, count in metrics.accepted_by_source.items()
            ]
        if name == "finished":
            return [(count, {**model, "copyspec.reason": reason}) for reason, count in metrics.finished.items()]
        _, attribute = {**GAUGES, **COUNTERS}[name]
        return [(getattr(metrics, attribute), model)]

    def _recent(self) -> EngineMetrics:
        """The engine's counts: all instruments are read at one time, and the engine is asked once for them."""
        taken_s, metrics = self._taken
        now_s = time.monotonic()
        if metrics is None or now_s - taken_s > _SAME_READING_S:
            metrics = self._metrics()
            self._taken = (now_s, metrics)
        return metrics


class CallTrace:
    """What is told of one call.

    Args:
        model: its name.
        request: what is asked. The span's parent is that of the context in which it comes.
        traces: takes spans; None: nobody does.
        instruments: by their names; None: nobody reads any.
    """

    def __init__(
        self,
        model: str,
        request: GenerationRequest,
        traces: TracerProvider | None,
        instruments: Mapping[str, Any] | None,
    ) -> None:
        from opentelemetry import trace

        self._begun_s, self._begun_ns = time.perf_counter(), time.time_ns()
        self._asked, self._instruments = request, instruments
        self._request: Request | None = None
        self._is_over = False
        self._names = {
            "gen_ai.operation.name": "text_completion" if request.messages is None else "chat",
            "gen_ai.provider.name": _PROVIDER,
            "gen_ai.request.model": model,
        }
        is_remote = trace.get_current_span().get_span_context().is_remote
        self._tracer = (traces or trace.NoOpTracerProvider()).get_tracer("copyspec")
        self._span: Span = self._tracer.start_span(
            f"{self._names['gen_ai.operation.name']} {model}",
            kind=trace.SpanKind.SERVER if is_remote else trace.SpanKind.INTERNAL,
            attributes=self._names,
            start_time=self._begun_ns,
        )

    def handed_over(self, request: Request) -> None:
        """The call is prepared: whoever ends the request ends this."""
        self._request = request
        request.on_end = self.ended

    def ended(self, item: StreamChunk | BaseException) -> None:
        """The call is over, with its last chunk or with what it was refused or failed with. Raises nothing."""
        if self._is_over:
            return
        self._is_over = True
        try:
            self._end(item)
        except Exception:
            logger.exception("the end of request %s could not be told to OpenTelemetry", self._asked.request_id)
        self._request = None

    def _end(self, item: StreamChunk | BaseException) -> None:
        seconds = time.perf_counter() - self._begun_s
        output = None if isinstance(item, BaseException) else item.output
        error = _error_type(item)
        try:
            if self._instruments is not None:
                self._measure(self._instruments, output, error, seconds)
            if self._span.is_recording():
                self._describe(output, error, item)
                if self._request is not None:
                    self._tell_phases(self._request)
        finally:  # whatever went wrong: a span that does not end is never seen
            self._span.end(self._begun_ns + int(seconds * 1e9))

    def _describe(self, output: GenerationOutput | None, error: str | None, item: StreamChunk | BaseException) -> None:
        """All that is known of the call at its end."""
        from opentelemetry.trace import Status, StatusCode

        asked, told = self._asked, dict[str, Any]()
        if asked.session_id is not None and asked.keep_texts:  # any other id is nobody's to know
            told["gen_ai.conversation.id"] = asked.session_id
        grammar = asked.grammar
        if grammar is not None and (grammar.json_schema is not None or grammar.json_object):
            told["gen_ai.output.type"] = "json"
        if self._request is not None:
            params = self._request.asked.call.sampling
            told |= {name: value(params) for name, (_, value) in ASKED.items()}
        if output is None:
            told["gen_ai.response.finish_reasons"] = ("cancelled",) if error is None else ("error",)
        else:
            told |= {name: value(output) for name, (_, value) in ANSWERED.items()}
            told["gen_ai.response.model"] = self._names["gen_ai.request.model"]
            told |= by_source(output)
        has_content = os.environ.get(_CONTENT, "").upper() in _WITH_CONTENT
        if has_content:
            told |= contents(asked, output)
        if error is not None:
            told["error.type"] = error
            # An error may quote what was asked.
            why = encodable(str(item)) if has_content and output is None else None
            self._span.set_status(Status(StatusCode.ERROR, why))
        self._span.set_attributes({name: encodable(value) for name, value in told.items() if value is not None})

    def _tell_phases(self, request: Request) -> None:
        """Children: tokenising, reading the prompt, writing the answer, as far as it came."""
        from opentelemetry.trace import set_span_in_context

        now_s, progress = time.perf_counter(), request.progress
        phases = [("tokenise", progress.asked_s, progress.prepared_s)]
        if progress.started_s:
            phases.append(("prefill", progress.started_s, progress.first_token_s or now_s))
        if progress.first_token_s:
            phases.append(("decode", progress.first_token_s, progress.last_token_s))
        context = set_span_in_context(self._span)
        for name, start_s, stop_s in phases:
            self._tracer.start_span(name, context, start_time=self._ns(start_s)).end(self._ns(stop_s))

    def _ns(self, perf_s: float) -> int:
        """A time on the clock `time.perf_counter` in nanoseconds since 1970."""
        return self._begun_ns + int((perf_s - self._begun_s) * 1e9)

    def _measure(
        self, made: Mapping[str, Any], output: GenerationOutput | None, error: str | None, seconds: float
    ) -> None:
        names = self._names
        failed = names if error is None else {**names, "error.type": error}
        for name in DURATIONS:
            made[name].record(seconds, failed)
        if output is None or not output.token_ids:
            return
        names = {**names, "gen_ai.response.model": names["gen_ai.request.model"]}
        for measure in MEASURES:
            tell = made[measure.name].add if measure.kind == "counter" else made[measure.name].record
            tell(measure.value(output), {**names, **measure.attributes})


def _provider(signal: str, getter: str) -> Any:  # noqa: ANN401 - of spans or of instruments
    """What somebody has set up to take a signal; None: nobody has, and OpenTelemetry's API hands nothing on."""
    api = sys.modules.get(f"opentelemetry.{signal}")
    try:
        provider = None if api is None else getattr(api, getter)()
    except Exception:  # OTEL_PYTHON_TRACER_PROVIDER or its like names one that is not installed
        logger.exception("OpenTelemetry's API gives no provider")
        return None
    return None if type(provider).__module__.startswith(("opentelemetry.trace", "opentelemetry.metrics")) else provider


def _error_type(item: StreamChunk | BaseException) -> str | None:
    """What a call ended with, if that was an error: one that its caller has given up is none."""
    if isinstance(item, Exception):
        return type(item).__name__
    is_late = isinstance(item, StreamChunk) and item.output is not None and item.output.finish_reason == "timeout"
    return "timeout" if is_late else None


# ---- over HTTP -----------------------------------------------------------------------------------------------------


def continued_trace(headers: Mapping[str, str]) -> AbstractContextManager[None]:
    """Calls in the `with` block go on with the trace that an HTTP request names (`traceparent`).

    Where a span of this process is around already, as of what instruments the server, that one is their parent.
    """
    return nullcontext() if _provider("trace", "get_tracer_provider") is None else _continued(headers)


@contextmanager
def _continued(headers: Mapping[str, str]) -> Iterator[None]:
    from opentelemetry import context, propagate, trace

    if trace.get_current_span().get_span_context().is_valid:
        yield
        return
    try:
        found = propagate.extract(headers)
    except Exception:
        logger.exception("the trace that a call's headers name could not be read")
        found = context.get_current()
    token = context.attach(found)
    try:
        yield
    finally:
        context.detach(token)


def trace_headers() -> dict[str, str]:
    """Headers by which a server goes on with the trace of the current span; none where there is none."""
    headers: dict[str, str] = {}
    if _provider("trace", "get_tracer_provider") is not None:
        try:
            from opentelemetry import propagate  # raises, where OTEL_PROPAGATORS names one that is not installed

            propagate.inject(headers)
        except Exception:
            logger.exception("the trace of a call could not be told to its server")
    return headers
