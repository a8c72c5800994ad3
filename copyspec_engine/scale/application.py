"""The application as Ray Serve takes it: which deployments there are, and how Ray is to treat them."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from copyspec_engine.scale.config import ScaleConfig
from copyspec_engine.scale.front import Front
from copyspec_engine.scale.replica import Replica
from copyspec_engine.scale.router import SlotRouter
from copyspec_engine.serve.config import ServeConfig
from copyspec_engine.values.config import EngineConfig

__all__ = ["application_of", "replica_options"]

_HEALTH_PERIOD_S = 2.0
_MARGIN_S = 10.0
"""Seconds for a replica's end, behind those for the calls that it still answers."""
_SPARE = 64
"""Calls of a replica beside those that the engine takes: lists, health, metrics, and those it refuses."""
_MOST_OF_A_FRONT = 100_000
"""Calls that a front may hand on at a time: what is too much, the engines say."""


def application_of(scale: ScaleConfig, config: ServeConfig, engine_config: EngineConfig) -> Application:
    """The application of several replicas."""
    options, given = replica_options(scale, config, engine_config), (scale, config, engine_config)
    if scale.direct:
        return serve.deployment(serve.ingress()(Replica)).options(**options).bind(*given)
    front = serve.deployment(serve.ingress()(Front)).options(
        name="Front",
        num_replicas=scale.fronts,
        max_ongoing_requests=_MOST_OF_A_FRONT,
        max_queued_requests=-1,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=_HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=config.drain_s + _MARGIN_S,
    )
    replicas = serve.deployment(Replica).options(**options).bind(*given)
    return front.bind(replicas, config, engine_config.memory_tokens, scale.stuck_s)


def replica_options(scale: ScaleConfig, config: ServeConfig, engine_config: EngineConfig) -> dict[str, Any]:
    """How Ray is to treat the replicas."""
    router = f"{SlotRouter.__module__}.{SlotRouter.__name__}"
    return {
        "name": "Replica",
        "num_replicas": scale.replicas,
        "max_ongoing_requests": 2 * (engine_config.max_running + engine_config.max_waiting) + _SPARE,
        "max_queued_requests": -1,  # Ray's own refusals know neither conversations nor the form of an error
        "max_surge_percent": 0,  # one more at a time would take a slot of its own, and conversations with it
        "ray_actor_options": {"num_cpus": scale.num_cpus, "num_gpus": scale.num_gpus},
        "request_router_config": RequestRouterConfig(request_router_class=router),
        "health_check_period_s": _HEALTH_PERIOD_S,
        "graceful_shutdown_timeout_s": config.drain_s + _MARGIN_S,
        "graceful_shutdown_wait_loop_s": 0.5,
        "max_constructor_retry_count": 3,
    }
