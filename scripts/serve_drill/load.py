"""The load drill: many clients of several tenants at once, and what must hold meanwhile and afterwards."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from copyspec_engine.lab.measuring import memory_of
from scripts.serve_drill.clients import LIMITS, Client, Tally
from scripts.serve_drill.questions import World, secret_of, world_of
from scripts.serve_drill.servers import TENANTS, Server, key_of

__all__ = ["LoadOptions", "drill_load"]

_RSS_EVERY_S, _METRICS_EVERY_S = 1.0, 5.0
_WARM_UP = 0.25
"""Of the time at least, before memory is expected to stay as it is; and not before all that may fill is full."""
_RSS_GROWTH = 1.03
"""The last third over the first, at most."""
_FREE_SLOTS = 0.1
"""Of the pool, at most: the others hold KV, so that their memory is in use."""
_HEALTH_P99_S = 0.1
_QUIET_S = 60.0
"""Within which nothing of a call is left, once all clients have gone."""
_SPARE_TOKENS = 40
"""That the question which fills the pool leaves."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How hard it is."""

    model: str
    folder: Path
    clients: int = 64
    minutes: float = 10.0
    seed: int = 0
    talks: int = 8
    """Conversations of each tenant."""


@dataclass(slots=True)
class _Watch:
    """What was seen of the server from outside."""

    rss: list[tuple[float, float]] = field(default_factory=list)
    """(seconds since the start, MB)"""
    full_s: float | None = None
    """Seconds since the start until the KV pool was full for the first time, with as many conversations as may be."""
    peaks: dict[str, float] = field(default_factory=dict)
    """The most that a gauge has shown."""


def drill_load(options: LoadOptions) -> tuple[dict[str, Any], list[str]]:
    """The figures, and what did not hold."""
    with Server(options.model, options.folder / "plain", {"drafter": "none"}) as plain:
        world = world_of(plain.url, options.model, options.seed, options.talks)
    tally, watch = Tally(), _Watch()
    told = {
        "max_waiting": 32,
        "max_in_flight": LIMITS.max_in_flight,
        "max_sessions": LIMITS.sessions,
        "max_sessions_per_owner": LIMITS.sessions_per_owner,
        "memory_tokens": LIMITS.context,
        "max_model_len": LIMITS.context,
        "kv_cache_tokens": LIMITS.context,
        "max_kept": 32,
        "max_states": 64,
        "max_body_bytes": LIMITS.max_body_bytes,
        "body_timeout_s": LIMITS.body_timeout_s,
        "send_timeout_s": LIMITS.send_timeout_s,
    }
    with Server(options.model, options.folder / "load", told) as server:
        health = asyncio.run(_under_load(server, world, options, tally, watch))
        left = _what_is_left(server, tally)
        server.signal(signal.SIGTERM)
        code = server.end()
    if code != 0:
        tally.breaks("exit code", str(code))
    for line in server.said:
        if re.search(r" (ERROR|CRITICAL) |^Traceback", line):
            tally.breaks("errors in the log", line)
    figures = {
        "model": options.model,
        "clients": options.clients,
        "minutes": options.minutes,
        "right_answers": world.num_answers,
        **_figures(tally, watch, health),
        "left": left,
    }
    return figures, [f"{kind}, {number}: {tally.broken[kind]}" for kind, number in tally.num_broken.items()]


async def _under_load(
    server: Server, world: World, options: LoadOptions, tally: Tally, watch: _Watch
) -> Sequence[float]:
    """Let the clients loose; the seconds that /health took meanwhile."""
    parts = urlsplit(server.url)
    command = [sys.executable, "-m", "scripts.serve_drill.probe", str(parts.hostname), str(parts.port)]
    probe = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    until_s = time.monotonic() + 60 * options.minutes
    made = (server.url, options.model, world, tally, until_s, options.seed)
    clients = [Client(number, *made) for number in range(options.clients)]
    watching = asyncio.create_task(_look_on(server, watch, tally))
    await asyncio.gather(*(client.run() for client in clients))
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    told, _ = await asyncio.to_thread(probe.communicate, "")
    if probe.returncode:
        tally.breaks("/health", f"the probe ended with {probe.returncode}")
        return [float("inf")]
    seconds: list[float] = json.loads(told)
    return seconds


async def _look_on(server: Server, watch: _Watch, tally: Tally) -> None:
    """Note memory and gauges."""
    begin = time.monotonic()
    metrics_at = 0.0
    async with httpx.AsyncClient(base_url=server.url, headers=key_of(TENANTS[0]), timeout=60) as http:
        while True:
            now = time.monotonic() - begin
            held = memory_of(server.process.pid)
            if held is None:
                tally.breaks("the server", "it has ended")
                return
            watch.rss.append((now, held["bytes"] / 1e6))
            if now >= metrics_at:
                metrics_at = now + _METRICS_EVERY_S
                gauges = _gauges((await http.get("/metrics")).text)
                for name, value in gauges.items():
                    watch.peaks[name] = max(watch.peaks.get(name, 0.0), value)
                if watch.full_s is None and _is_full(gauges):
                    watch.full_s = now
            await asyncio.sleep(_RSS_EVERY_S)


def _gauges(text: str) -> dict[str, float]:
    found = re.findall(r"^copyspec_([a-z_]+(?:\{.*?\})?) (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def _is_full(gauges: Mapping[str, float]) -> bool:
    free = gauges.get('kv_slots{state="free"}', float(LIMITS.context))
    return free <= _FREE_SLOTS * LIMITS.context and gauges.get("sessions", 0.0) >= LIMITS.sessions


def _what_is_left(server: Server, tally: Tally) -> dict[str, float]:
    """Nothing of the calls may be left in the server; each tenant can have all its answers, and one call the pool."""
    names = ("running", "waiting", "calls_in_flight", 'kv_slots{state="running"}')
    with server.client() as http:
        _wait_for_nothing(http, names, tally)
        for tenant in TENANTS:
            halves = (LIMITS.max_in_flight // 2, LIMITS.max_in_flight - LIMITS.max_in_flight // 2)
            with ThreadPoolExecutor(len(halves)) as threads:
                codes = list(threads.map(lambda n, who=tenant: _choices(server, who, n), halves))
            if codes != [200] * len(halves):
                tally.breaks("places that are not given back", f"{tenant}: {codes}")
        model = http.get("/v1/models").json()["data"][0]["id"]
        tokens = http.post("/tokenize", json={"prompt": "one more word " * LIMITS.context}).json()["tokens"]
        whole_pool = {"model": model, "prompt": tokens[: LIMITS.context - _SPARE_TOKENS], "max_tokens": 8}
        code = http.post("/v1/completions", json=whole_pool).status_code
        if code != 200:
            tally.breaks("slots that are not given back", f"a call that needs nearly all of them: {code}")
        _wait_for_nothing(http, names, tally)
        gauges = _gauges(http.get("/metrics").text)
        slots = sum(gauges[f'kv_slots{{state="{state}"}}'] for state in ("running", "cached", "free"))
        if slots != LIMITS.context or gauges["sessions"] > LIMITS.sessions:
            tally.breaks("slots or sessions", f"{slots} slots, {gauges['sessions']} sessions")
    _check_memories(server, tally)
    return {name: gauges[name] for name in (*names, "sessions", "preemptions_total")}


def _wait_for_nothing(http: httpx.Client, names: Sequence[str], tally: Tally) -> None:
    end = time.monotonic() + _QUIET_S
    while any(
        left := {name: value for name, value in _gauges(http.get("/metrics").text).items() if name in names and value}
    ):
        if time.monotonic() > end:
            tally.breaks("what calls have left", f"{left}")
            return
        time.sleep(0.2)


def _choices(server: Server, tenant: str, n: int) -> int:
    """The status of a call for so many answers."""
    with server.client(tenant) as http:
        model = http.get("/v1/models").json()["data"][0]["id"]
        body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "n": n}
        return http.post("/v1/chat/completions", json=body).status_code


def _check_memories(server: Server, tally: Tally) -> None:
    """What is remembered of each tenant is no more than it may be, and holds no word of another's."""
    place = "/v1/copyspec/conversations"
    for tenant in TENANTS:
        with server.client(tenant) as http:
            names = [told["id"] for told in http.get(place).json()["data"]]
            texts = [http.get(f"{place}/{name}/export").text for name in names]
        if len(names) > LIMITS.sessions_per_owner:
            tally.breaks("more sessions than a tenant may have", f"{tenant}: {names}")
        for other in TENANTS:
            if other != tenant and any(secret_of(other) in text for text in texts):
                tally.breaks("texts of other tenants", f"{other}'s in the memory of {tenant}")


def _figures(tally: Tally, watch: _Watch, health: Sequence[float]) -> dict[str, Any]:
    """What was seen, in numbers; notes what is beyond its bound."""
    peaks = {name: watch.peaks.get(name, 0.0) for name in ("sessions", "running", "waiting", "calls_in_flight")}
    if peaks["sessions"] > LIMITS.sessions:
        tally.breaks("more sessions than there may be", f"{peaks['sessions']}")
    memory = _memory(watch, tally)
    ranked = sorted(health)
    p99 = ranked[int(0.99 * (len(ranked) - 1))]
    if p99 > _HEALTH_P99_S:
        tally.breaks("/health is slow", f"p99 {p99:.3f} s")
    took = sorted(tally.seconds) or [0.0]
    return {
        "counts": dict(sorted(tally.counts.items())),
        "statuses": {str(status): number for status, number in sorted(tally.statuses.items())},
        "broken": dict(tally.num_broken),
        "answer_s": {"median": round(statistics.median(took), 3), "max": round(took[-1], 3)},
        "health": {
            "asked": len(ranked),
            "median_s": round(statistics.median(ranked), 4),
            "p99_s": round(p99, 4),
            "max_s": round(ranked[-1], 4),
        },
        "memory": memory,
        "peaks": peaks,
    }


def _memory(watch: _Watch, tally: Tally) -> Mapping[str, float | None]:
    """The server's resident memory once all that may fill was full, early and late; notes where it grows.

    That is the first third of that time beside the last one, and the slope of a line through all of it.
    """
    highest = round(max(size for _, size in watch.rss), 1)
    if watch.full_s is None:
        tally.breaks("memory was not measured", "the KV pool or the conversations were never full: take more minutes")
        return {"full_after_s": None, "max_mb": highest}
    begin_s = max(watch.full_s, _WARM_UP * watch.rss[-1][0])
    warm = [(at, size) for at, size in watch.rss if at >= begin_s]
    third = max(len(warm) // 3, 1)
    sizes = [size for _, size in warm]
    slope = statistics.linear_regression(*zip(*warm, strict=True)).slope if len(warm) > 1 else 0.0
    memory = {
        "full_after_s": round(watch.full_s, 1),
        "measured_from_s": round(begin_s, 1),
        "first_third_mb": round(statistics.fmean(sizes[:third]), 1),
        "last_third_mb": round(statistics.fmean(sizes[-third:]), 1),
        "mb_per_minute": round(60 * slope, 2),
        "max_mb": highest,
    }
    if memory["last_third_mb"] > _RSS_GROWTH * memory["first_third_mb"]:
        tally.breaks("memory grows", f"{memory}")
    return memory
