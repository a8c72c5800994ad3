"""How much more several replicas write than one, with a processor each."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import httpx

from copyspec_engine.cli.documents import CHAT_DOCUMENT, load_document
from scripts.scale_drill.cluster import Cluster
from scripts.scale_drill.talks import client_of

__all__ = ["measure_speed"]

_NAMES = ("Ann", "Bob", "Cleo", "Dave", "Eve", "Finn", "Gita", "Hugo")


class _Writer:
    """One conversation: a letter, and changes to it."""

    def __init__(self, number: int, model: str) -> None:
        self.name, self.tag, self.num_tokens = f"letter-{number}", "", 0
        self._model = model
        self._text = load_document(CHAT_DOCUMENT).text
        self._number = number

    async def write(self, client: httpx.AsyncClient, turn: int, max_tokens: int) -> int:
        """Have the letter written again with another name; the tokens of the answer."""
        name = _NAMES[(self._number + turn) % len(_NAMES)]
        question = f"{self._text}\n\nRewrite the letter for {name}. Change nothing else."
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": max_tokens,
        }
        written = 0
        headers = {"X-Session-ID": self.name}
        async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise RuntimeError(f"{self.name}: {event['error']}")
                    self.tag = event["id"].partition("-")[2][:8]
                    written = (event.get("usage") or {}).get("completion_tokens", written)
        return written


async def measure_speed(cluster: Cluster, model: str, calls: int, *, direct: bool) -> dict[str, Any]:
    """Tokens a second of all calls together, by one replica and by two, with one processor and thread each.

    Args:
        cluster: where they run.
        model: that they serve.
        calls: of each conversation.
        direct: Ray's proxies ask the replicas themselves.
    """
    found: dict[str, Any] = {}
    for replicas in (1, 2):
        args = {"model": model, "num_cpus": 1, "direct": direct, "device": "cpu", "kv_cache_tokens": 16_384}
        cluster.deploy(args, replicas)
        async with client_of(cluster.url) as client:
            writers = await _evenly([_Writer(number, model) for number in range(24)], client, replicas)
            began = time.monotonic()
            written = await asyncio.gather(*(_all(writer, client, calls) for writer in writers))
            seconds = time.monotonic() - began
        found[f"replicas_{replicas}"] = {
            "conversations": len(writers),
            "tokens": sum(written),
            "seconds": round(seconds, 2),
            "tokens_per_s": round(sum(written) / seconds, 1),
        }
    one, two = (found[f"replicas_{number}"]["tokens_per_s"] for number in (1, 2))
    return {**found, "speedup": round(two / one, 3)}


async def _evenly(writers: Sequence[_Writer], client: httpx.AsyncClient, replicas: int) -> list[_Writer]:
    """As many conversations of each replica, after a first call of each, eight in all."""
    for writer in writers:
        await writer.write(client, 0, 2)
    kept: list[_Writer] = []
    for tag in Counter(writer.tag for writer in writers):
        kept += [writer for writer in writers if writer.tag == tag][: 8 // replicas]
    if len(kept) != 8:
        raise RuntimeError(
            f"there are {len(kept)} conversations, evenly over {replicas} replicas, and eight were wanted"
        )
    return kept


async def _all(writer: _Writer, client: httpx.AsyncClient, calls: int) -> int:
    return sum([await writer.write(client, turn, 160) for turn in range(1, calls + 1)])
