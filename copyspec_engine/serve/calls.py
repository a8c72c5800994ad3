"""A call on the engine: its answers, begun together, read together, and ended when nobody reads them any more.

Everything that an endpoint may not forget is here: a call counts against its tenant, is refused while the server
drains, is cancelled where its client goes away, and comes to an end of its own when the server stops.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing

from starlette.types import Receive

from copyspec_engine.engine.engine import Engine
from copyspec_engine.serve.config import ServeConfig
from copyspec_engine.serve.errors import ApiError, by_names
from copyspec_engine.serve.kept import Answered
from copyspec_engine.serve.metrics import Metrics
from copyspec_engine.serve.tenants import Tenant
from copyspec_engine.values.config import GenerationRequest
from copyspec_engine.values.errors import RequestFailedError
from copyspec_engine.values.outputs import GenerationOutput, StreamChunk

__all__ = ["Call", "Calls"]


class Call:
    """The answers to one call, written side by side. Made by `Calls.begin`; whoever has it closes it.

    Args:
        engine: that answers.
        tenant: who asks; it has taken a place for each answer.
        requests: one for each answer.
        metrics: count them.
        body_tokens: what the body of the call counts for in what is kept of it.
        names: what the body calls fields, for errors; see `by_names`.
    """

    def __init__(
        self,
        engine: Engine,
        tenant: Tenant,
        requests: Sequence[GenerationRequest],
        metrics: Metrics,
        body_tokens: int,
        names: Mapping[str, str],
    ) -> None:
        self.requests, self.body_tokens = tuple(requests), body_tokens
        self.outputs: dict[int, GenerationOutput] = {}
        """The whole answers by their numbers, of those that are over."""
        self.is_forgotten = False
        """Its conversation was erased meanwhile: nothing of it is kept."""
        self.on_close: Callable[[], None] = lambda: None
        self._engine, self._tenant, self._metrics, self._names = engine, tenant, metrics, names
        self._items = deque[tuple[int, StreamChunk | Exception]]()
        """What came and was not taken yet."""
        self._came: asyncio.Future[None] | None = None
        """Something has come; None: nobody waits for it."""
        loop = asyncio.get_running_loop()
        self._first: list[asyncio.Future[Exception | None]] = [loop.create_future() for _ in requests]
        """What came first of each answer: None for a chunk."""
        self._left = len(self.requests)
        self._tasks = [asyncio.create_task(self._read(index)) for index in range(len(self.requests))]

    @property
    def call_id(self) -> str:
        """What its requests are named by, each with a number behind it."""
        return self.requests[0].request_id.rpartition("-")[0]

    async def admitted(self, first_byte_s: float) -> None:
        """Wait until each answer has begun, but no longer than so many seconds.

        Raises:
            Exception: what one of them failed with.
        """
        done, _ = await asyncio.wait(self._first, timeout=first_byte_s)
        error = next((found.result() for found in self._first if found in done and found.result()), None)
        if error is not None:
            raise error

    @property
    def is_over(self) -> bool:
        """All answers were taken to their ends."""
        return not self._left

    async def take(self) -> list[tuple[int, StreamChunk]]:
        """The chunks that have come since, each with the number of its answer.

        Waits for one, but not beyond the end or a `wake`.

        Raises:
            Exception: what an answer failed with; the others are cancelled then.
        """
        if self._left and not self._items:
            self._came = asyncio.get_running_loop().create_future()
            await self._came
        taken: list[tuple[int, StreamChunk]] = []
        while self._left and self._items:
            index, item = self._items[0]
            if not isinstance(item, Exception):
                self._left -= item.is_last
                taken.append((index, item))
            elif taken:  # it is told behind them
                break
            else:
                self._left = 0
                self.cancel()
                raise item
            self._items.popleft()
        return taken

    def wake(self) -> None:
        """Whoever waits in `take` goes on."""
        if self._came is not None and not self._came.done():
            self._came.set_result(None)

    async def chunks(self) -> AsyncIterator[tuple[int, StreamChunk]]:
        """All that `take` gives."""
        while not self.is_over:
            for taken in await self.take():
                yield taken

    def cancel(self) -> None:
        """End the answers at the next step, each with a last chunk; those that have not come in yet with an error."""
        for task, first, request in zip(self._tasks, self._first, self.requests, strict=True):
            if not task.done() and not self._engine.cancel(request.request_id) and not first.done():
                task.cancel()  # it is still being prepared

    def close(self) -> None:
        """Nobody reads the call any more."""
        self._left = 0
        self.cancel()
        self.on_close()

    async def over(self) -> None:
        """Wait until nothing of it is in the engine."""
        await asyncio.wait(self._tasks)

    async def _read(self, index: int) -> None:
        """Take an answer from the engine as it is written."""
        last_s = 0.0
        try:
            with by_names(self._names):
                async with aclosing(self._engine.astream(self.requests[index], wait=False)) as chunks:
                    async for chunk in chunks:
                        now_s = time.perf_counter()
                        if last_s:
                            self._metrics.between_chunks.observe(now_s - last_s)
                        last_s = now_s
                        self._put(index, chunk)
        except asyncio.CancelledError:
            self._put(index, RequestFailedError("The call was cancelled before it began"))
        except Exception as error:
            self._put(index, error)

    def _put(self, index: int, item: StreamChunk | Exception) -> None:
        """Hand on what came of an answer. What it has cost is counted before anyone hears that it is over."""
        if isinstance(item, Exception):
            self._tenant.give_back(1)
        elif item.output is not None:
            usage = item.output.usage
            self._tenant.charge(usage.completion_tokens + (0 if self.outputs else usage.prompt_tokens))
            self.outputs[index] = item.output
            self._metrics.answered(item.output)
            self._tenant.give_back(1)
            if len(self.outputs) == len(self.requests):
                self._keep()
        self._items.append((index, item))
        self.wake()
        if not self._first[index].done():
            self._first[index].set_result(item if isinstance(item, Exception) else None)

    def _keep(self) -> None:
        """Keep the answers to be explained, unless nobody has read them to their ends."""
        outputs = tuple(self.outputs[index] for index in range(len(self.requests)))
        if not self.is_forgotten and all(output.finish_reason != "cancelled" for output in outputs):
            size = self.body_tokens + sum(output.usage.total_tokens for output in outputs)
            self._tenant.answered.keep(self.call_id, Answered(self.requests, outputs), size)


class Calls:
    """All calls in flight. For one event loop.

    Args:
        engine: that answers.
        config: the limits.
        metrics: count them.
    """

    def __init__(self, engine: Engine, config: ServeConfig, metrics: Metrics) -> None:
        self.engine, self.config = engine, config
        self.is_draining = False
        """New calls are refused."""
        self._metrics = metrics
        metrics.in_flight.set_function(lambda: float(len(self)))
        metrics.draining.set_function(lambda: float(self.is_draining))
        self._in_flight: set[Call] = set()
        self._followed: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """Calls whose clients are still answered."""
        return len(self._in_flight)

    async def begin(
        self,
        tenant: Tenant,
        requests: Sequence[GenerationRequest],
        receive: Receive,
        body_tokens: int,
        names: Mapping[str, str],
    ) -> Call:
        """A call that has begun, to be closed.

        Args:
            tenant: who asks.
            requests: one for each choice. They share their prompt, and what is kept of them counts for the tenant.
            receive: of the HTTP request, whose body was read; the call is cancelled when its client goes away.
            body_tokens: what that body counts for in what is kept of the call.
            names: what that body calls fields, for errors; see `by_names`.

        Raises:
            ApiError: 503 while the server drains, 429 where the tenant has too many.
            Exception: what the engine says of one of the requests.
        """
        if self.is_draining:
            raise ApiError(503, "draining", "The server is shutting down: ask again", retry_after_s=2.0)
        tenant.take(len(requests))
        requests = [request.model_copy(update={"owner": tenant.name}) for request in requests]
        self._metrics.asked(tenant, requests)
        call = Call(self.engine, tenant, requests, self._metrics, body_tokens, names)
        self._in_flight.add(call)
        call.on_close = lambda: self._in_flight.discard(call)
        follower = asyncio.create_task(_follow(call, receive))
        self._followed.add(follower)
        follower.add_done_callback(self._followed.discard)
        try:
            await call.admitted(self.config.first_byte_s)
        except BaseException:
            call.close()
            await call.over()  # its other answers hold no place any more when it is asked again
            raise
        return call

    def keep_nothing_of(self, session: str) -> None:
        """Keep no answers of calls of a session that are in flight, by the engine's name for it."""
        for call in self._in_flight:
            if any(request.session_id == session for request in call.requests):
                call.is_forgotten = True

    async def cut_short(self) -> None:
        """Cancel all calls, and wait until the engine has ended them; their clients get what was written."""
        for call in self._in_flight:
            call.cancel()
        if self._followed:
            await asyncio.wait(self._followed)


async def _follow(call: Call, receive: Receive) -> None:
    """Cancel a call whose client goes away."""
    watcher = asyncio.create_task(_gone(receive))
    watcher.add_done_callback(lambda task: None if task.cancelled() else call.cancel())
    await call.over()
    watcher.cancel()


async def _gone(receive: Receive) -> None:
    """Returns when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass
