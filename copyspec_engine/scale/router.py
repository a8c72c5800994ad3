"""The router that Ray runs wherever calls of replicas begin: each conversation to its slot.

Ray tells it which replicas there are and with which slots, sends the call, and takes a replica that has died out of
the list; then the next slot's is the first.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.datastructures import Headers

from copyspec_engine.scale.routes import Askers, Route, route_of
from copyspec_engine.scale.routing import free_slot, ranked
from copyspec_engine.scale.slots import tag_of
from copyspec_engine.serve.config import ServeConfig

__all__ = ["SLOT", "SlotRouter", "order"]

SLOT = "slot"
"""What a replica's metadata call its slot."""
_PATIENCE_S = 10.0
"""Seconds after which a replica that does not say how much it has to do is passed over: it may be on a lost machine."""


def order(route: Route, slots: Sequence[str]) -> list[str]:
    """Slots in the order in which they are to be asked; none: whichever has least to do."""
    found = [slot for slot in slots if route.tag and tag_of(slot) == route.tag]
    if not route.key:
        return found
    return [*found, *(slot for slot in ranked(route.key, slots) if slot not in found)]


class SlotRouter(RequestRouter):
    """Sends each call to the replica in its conversation's slot."""

    _direct: tuple[ServeConfig, Askers] | None = None
    _bound: dict[str, Any] | None = None

    def initialize_state(self, direct: dict[str, Any] | None = None, bound: dict[str, Any] | None = None) -> None:
        """Take over what the application says.

        Args:
            direct: options of the server, where calls come from Ray's proxies rather than from a front.
            bound: `factor` and `least` of `free_slot`; None: no call is passed on because a replica has much to do.
        """
        self._bound = bound
        if direct is not None:
            config = ServeConfig(**direct)
            self._direct = config, Askers(config)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replica in the conversation's slot alone; the next one too, where that has not answered for a while."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # rather than ask again without a pause
        route = self._route(pending_request)
        replicas = {str(replica.replica_metadata.get(SLOT)): replica for replica in candidate_replicas}
        slots = order(route, list(replicas))
        if not slots:
            return [candidate_replicas]
        if self._bound is not None and tag_of(slots[0]) != route.tag:
            calls = {slot: self.replica_queue_len_cache.get(replicas[slot].replica_id) or 0 for slot in slots}
            free = free_slot(slots, calls, **self._bound)
            slots = [free, *(slot for slot in slots if slot != free)]
        patient = time.time() - pending_request.created_at < _PATIENCE_S
        return [[replicas[slot]] for slot in slots[: 1 if patient else 2]]

    def _route(self, pending: PendingRequest) -> Route:
        if self._direct is None:
            return Route.of(pending.metadata.session_id)
        config, askers = self._direct
        scope = pickle.loads(pending.args[0]).asgi_scope  # was made by the proxy, in this very process
        headers = Headers(scope=scope)
        return route_of(askers.of(headers), scope["path"], headers, config)
