"""The router that Ray runs wherever calls of replicas begin: each conversation to its slot.

Ray tells it which replicas there are and what they say of themselves, sends the call, and takes a replica that has died
out of the list; then the next slot's is the first. How calls are to be routed the replicas say, too: a router that Ray
has once made lives on, with the options of its beginning, when the application is deployed anew with others.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.datastructures import Headers

from copyspec_engine.scale.config import ScaleConfig
from copyspec_engine.scale.routes import Askers, Route, route_of
from copyspec_engine.scale.routing import free_slot, ranked
from copyspec_engine.scale.slots import tag_of
from copyspec_engine.serve.config import ServeConfig
from copyspec_engine.values.config import EngineConfig

__all__ = ["SlotRouter", "order", "said_to_routers"]

_SLOT, _SERVER, _BOUND = "slot", "server", "bound"
"""Of a replica's metadata."""
_PATIENCE_S = 10.0
"""Seconds after which a replica that does not say how much it has to do is passed over: it may be on a lost machine."""


def said_to_routers(slot: str, scale: ScaleConfig, config: ServeConfig, engine_config: EngineConfig) -> dict[str, Any]:
    """What a replica says of itself and of how calls are to be routed, as its metadata.

    Args:
        slot: its name.
        scale: of the application.
        config: of the server.
        engine_config: of the engine.
    """
    bound = None if scale.load_factor is None else {"factor": scale.load_factor, "least": 2 * engine_config.max_running}
    return {_SLOT: slot, _SERVER: config.model_dump(mode="json"), _BOUND: bound}


def order(route: Route, slots: Sequence[str]) -> list[str]:
    """Slots in the order in which they are to be asked; none: whichever has least to do."""
    found = [slot for slot in slots if route.tag and tag_of(slot) == route.tag]
    if not route.key:
        return found
    return [*found, *(slot for slot in ranked(route.key, slots) if slot not in found)]


class SlotRouter(RequestRouter):
    """Sends each call to the replica in its conversation's slot."""

    _server: Mapping[str, Any] | None = None
    """Options that `_askers` was made with."""
    _askers: tuple[ServeConfig, Askers]

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replica in the conversation's slot alone; the next one too, where that has not answered for a while."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # rather than ask again without a pause
        replicas = {str(replica.replica_metadata.get(_SLOT)): replica for replica in candidate_replicas}
        told = replicas[min(replicas)].replica_metadata  # they differ only while an update goes from one to the next
        route = self._route(pending_request, told)
        slots = order(route, list(replicas))
        if not slots:
            return [candidate_replicas]
        if told.get(_BOUND) and tag_of(slots[0]) != route.tag:
            calls = {slot: self.replica_queue_len_cache.get(replicas[slot].replica_id) or 0 for slot in slots}
            free = free_slot(slots, calls, **told[_BOUND])
            slots = [free, *(slot for slot in slots if slot != free)]
        patient = time.time() - pending_request.created_at < _PATIENCE_S
        return [[replicas[slot]] for slot in slots[: 1 if patient else 2]]

    def _route(self, pending: PendingRequest, told: Mapping[str, Any]) -> Route:
        """Where a call is to go: as its front says, or its headers where Ray's proxy asks the replicas itself."""
        if not pending.metadata.is_http_request or _SERVER not in told:
            return Route.of(pending.metadata.session_id)
        if told[_SERVER] != self._server:
            config = ServeConfig(**told[_SERVER])
            self._server, self._askers = told[_SERVER], (config, Askers(config))
        config, askers = self._askers
        scope = pickle.loads(pending.args[0]).asgi_scope  # was made by the proxy, in this very process
        headers = Headers(scope=scope)
        return route_of(askers.of(headers), scope["path"], headers, config)
