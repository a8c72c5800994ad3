"""GET /metrics: what Prometheus reads. No label and no figure tells one tenant from another."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector
from starlette.responses import Response

from copyspec_engine.engine.engine import Engine
from copyspec_engine.engine.telemetry_names import COUNTERS, GAUGES
from copyspec_engine.serve.tenants import Tenant
from copyspec_engine.values.config import GenerationRequest
from copyspec_engine.values.errors import EngineStoppedError
from copyspec_engine.values.info import EngineMetrics
from copyspec_engine.values.outputs import GenerationOutput

__all__ = ["Metrics", "metrics_router"]

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_TOKENS = (1, 1.5, 2, 3, 5, 8, 12, 20, 40, 80, 160)
_SHARES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.99)
_WAIT_S = 1.0
"""Seconds for which a scrape waits for the engine's own counts; then it gets the last ones."""


class Metrics:
    """What a server counts. For one event loop.

    Args:
        engine: whose counts are told too.
        model: what it is called.
        vllm_names: tell some of them by vLLM's names besides, which routers in front of servers read.
    """

    def __init__(self, engine: Engine, model: str, *, vllm_names: bool = False) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self._engine = engine
        self._own = _EngineCollector(engine, model, vllm_names=vllm_names)
        self.registry.register(self._own)

        def times(name: str, text: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
            return Histogram(f"copyspec_{name}", text, buckets=buckets, registry=self.registry)

        self.requests = Counter(
            "copyspec_requests",
            "HTTP requests by endpoint, method and status.",
            ("endpoint", "method", "code"),
            registry=self.registry,
        )
        self.in_flight = Gauge("copyspec_calls_in_flight", "Calls that are answered now.", registry=self.registry)
        self.draining = Gauge("copyspec_draining", "1 while new calls are refused.", registry=self.registry)
        self.between_chunks = times("time_between_chunks_seconds", "Between two chunks of an answer.")
        self._reuse = Counter(
            "copyspec_conversations",
            "Answers by how their conversation was found: named, found, new or none.",
            ("kind",),
            registry=self.registry,
        )
        self._first_token = times("time_to_first_token_seconds", "From a call to the first token of an answer.")
        self._request = times("request_seconds", "From a call to the end of an answer.")
        self._queue = times("queue_seconds", "From a call to its first forward pass.")
        self._per_forward = times("tokens_per_forward", "Tokens per forward pass of an answer.", _TOKENS)
        self._copied = times("copied_share", "Share of an answer's tokens that were copied.", _SHARES)

    def asked(self, tenant: Tenant, requests: Iterable[GenerationRequest]) -> None:
        """Count how the conversations of a call were found: named, by what it shows, new, or none."""
        for request in requests:
            kind = "named"
            if request.session_id is None:
                kind = "none"
            elif not request.keep_texts and request.session_id.startswith(f"{tenant.name}/found-"):
                kind = "new" if request.continues is None else "found"
            self._reuse.labels(kind).inc()

    def answered(self, output: GenerationOutput) -> None:
        """Count an answer that is over."""
        self._first_token.observe(output.timing.ttft_s)
        self._request.observe(output.timing.total_s)
        self._queue.observe(output.timing.queue_s)
        self._per_forward.observe(output.tokens_per_forward)
        self._copied.observe(output.copied_share)

    async def text(self) -> bytes:
        """All counts in Prometheus's form."""
        try:
            taken = asyncio.to_thread(self._engine.metrics)
            self._own.last = await asyncio.wait_for(taken, _WAIT_S)
        except (asyncio.TimeoutError, EngineStoppedError):  # it is busy, or has died: the last ones are told
            pass
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """The engine's own counts, as they were taken last."""

    def __init__(self, engine: Engine, model: str, *, vllm_names: bool) -> None:
        self.last: EngineMetrics | None = None
        self._engine, self._model, self._vllm_names = engine, model, vllm_names

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        """Each count; before the first time that they were taken without a value."""
        age, last = self._engine.heartbeat_age_s, self.last
        yield GaugeMetricFamily("copyspec_heartbeat_age_seconds", "For how long the engine's loop is in a turn.", age)
        for name, (text, attribute) in GAUGES.items():
            yield GaugeMetricFamily(f"copyspec_{name}", text, None if last is None else getattr(last, attribute))
        for name, (text, attribute) in COUNTERS.items():
            yield CounterMetricFamily(f"copyspec_{name}", text, None if last is None else getattr(last, attribute))
        slots = GaugeMetricFamily("copyspec_kv_slots", "KV slots, one for each token, by state.", labels=("state",))
        sources = CounterMetricFamily(
            "copyspec_accepted_tokens", "Accepted draft tokens by source.", labels=("source",)
        )
        reasons = CounterMetricFamily("copyspec_finished", "Answers by the reason of their end.", labels=("reason",))
        if last is not None:
            _fill(slots, last.kv_slots_by_state)
            _fill(sources, last.accepted_by_source)
            _fill(reasons, last.finished)
        yield from (slots, sources, reasons)
        if self._vllm_names and last is not None:
            yield from self._as_vllm(last)

    def _as_vllm(self, last: EngineMetrics) -> Iterator[Metric]:
        used = (last.num_kv_slots_running + last.num_kv_slots_cached) / last.num_kv_slots
        for kind, name, value in (
            (GaugeMetricFamily, "num_requests_running", last.num_running),
            (GaugeMetricFamily, "num_requests_waiting", last.num_waiting),
            (GaugeMetricFamily, "kv_cache_usage_perc", used),
            (CounterMetricFamily, "prompt_tokens", last.prompt_tokens),
            (CounterMetricFamily, "generation_tokens", last.completion_tokens),
        ):
            family = kind(f"vllm:{name}", "As vLLM tells it.", labels=("model_name",))
            family.add_metric((self._model,), value)
            yield family


def _fill(family: GaugeMetricFamily | CounterMetricFamily, values: dict[str, int]) -> None:
    for label, value in values.items():
        family.add_metric((label,), value)


def metrics_router(metrics: Metrics) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {}}}}})
    async def get_metrics() -> Response:
        """All counts, for Prometheus."""
        return Response(await metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return router
