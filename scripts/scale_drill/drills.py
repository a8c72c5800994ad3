"""What is done to a cluster, and what has to hold then."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from copyspec_engine.scale.slots import tag_of
from copyspec_engine.values.config import is_database
from scripts.scale_drill.cluster import Cluster, kill, wait_until
from scripts.scale_drill.models import STICK
from scripts.scale_drill.talks import Answer, ModelTalk, Talk, at_once, client_of

__all__ = ["DRILLS", "DrillOptions", "Found"]


@dataclass(slots=True)
class Found:
    """What a drill has shown."""

    figures: dict[str, Any] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    """What did not hold."""

    def check(self, holds: bool, text: str) -> None:
        """Something that has to hold."""
        if not holds:
            self.broken.append(text)


@dataclass(frozen=True, slots=True)
class DrillOptions:
    """How much is done."""

    folder: Path
    """For memory files and keys; empty at first."""
    conversations: int = 60
    calls: int = 10_000
    """Of the drill `sticky`."""
    rounds: int = 2
    """Kills."""
    memory_path: str | None = None
    """A store that all replicas share; default: a file for each."""
    model: str = "smollm2"
    """Of the drill `lost-model`."""

    @property
    def is_shared(self) -> bool:
        """Whether all replicas remember in one store."""
        return self.memory_path is not None and is_database(self.memory_path)

    def args(self, **more: Any) -> dict[str, Any]:  # noqa: ANN401 - options of any type
        """Options of the application."""
        memory = self.memory_path or str(self.folder / "memory")
        model = {"model": "scripted", "engine": "scripts.scale_drill.models:scripted"}
        return {**model, "num_cpus": 0.5, "max_waiting": 1000, "memory_path": memory, **more}

    def talks(self, drill: str, number: int | None = None) -> list[Talk]:
        """The conversations of a drill."""
        return [Talk(f"{drill}-{at}") for at in range(number or self.conversations)]


LONG, SHORT = 120, 12
"""Words of an answer that is to be hit in its middle, and of one that is not."""


def _moved(talks: Iterable[Talk], before: Mapping[str, str]) -> list[Talk]:
    """Conversations that are answered by another slot than before."""
    return [talk for talk in talks if talk.tag != before[talk.name]]


def _check_whole(found: Found, talks: Sequence[Talk], words: int, when: str) -> None:
    """All of the last answers have to be right to their ends."""
    bad = [talk for talk in talks if not talk.answers[-1].is_whole or talk.answers[-1].error]
    found.check(not bad, f"{when}: {len(bad)} calls failed, as {[talk.answers[-1].error for talk in bad[:3]]}")
    wrong = [told for talk in talks if (told := talk.wrong(talk.answers[-1], words))]
    found.check(not wrong, f"{when}: {wrong[:3]}")


async def _in_stream(
    talks: Sequence[Talk], client: httpx.AsyncClient, harm: Callable[[], None], begun: int
) -> dict[str, str]:
    """Have all ask for a long story at once, and do harm once so many have had their first words.

    Gives what each had by then.
    """
    asked = [asyncio.create_task(talk.ask(client, LONG)) for talk in talks]
    await asyncio.sleep(0)
    while sum(bool(talk.answers[-1].text) for talk in talks) < begun:
        await asyncio.sleep(0.02)
    await asyncio.to_thread(harm)
    had = {talk.name: talk.answers[-1].text for talk in talks}
    await asyncio.gather(*asked)
    return had


async def sticky(cluster: Cluster, options: DrillOptions) -> Found:
    """Many calls of many conversations: each is answered where the one before was."""
    found, talks = Found(), options.talks("sticky", 500)
    cluster.deploy(options.args(), 3)
    began, hits, calls = time.monotonic(), 0, 0

    def count(talk: Talk, answer: Answer) -> None:
        nonlocal hits, calls
        if len(talk.answers) > 1:
            calls += 1
            hits += answer.tag == talk.answers[0].tag and answer.is_whole

    async with client_of(cluster.url) as client:
        for _ in range(1 + options.calls // len(talks)):
            await at_once(talks, client, SHORT, also=count)
    _check_whole(found, talks, SHORT, "calls")
    shares = Counter(talk.tag for talk in talks)
    found.figures = {
        "calls": calls,
        "sticky_hit_rate": hits / calls,
        "conversations_by_slot": sorted(shares.values()),
        "calls_per_s": round(calls / (time.monotonic() - began), 1),
    }
    found.check(hits == calls, f"{calls - hits} of {calls} calls were answered by another slot than before")
    return found


async def lost(cluster: Cluster, options: DrillOptions) -> Found:
    """SIGKILL of a replica in the middle of streams, behind a front."""
    return await _lost(cluster, options, options.talks("lost"), options.args(max_running=8))


async def lost_direct(cluster: Cluster, options: DrillOptions) -> Found:
    """SIGKILL of a replica in the middle of streams that Ray's proxies have from it."""
    return await _lost(cluster, options, options.talks("direct"), options.args(direct=True, max_running=8))


async def lost_model(cluster: Cluster, options: DrillOptions) -> Found:
    """As `lost`, with a real model, a processor for each replica, and one call at a time after the loss.

    Of many at once each drafts less: there a pass of many rows is dear.
    """
    talks = [ModelTalk(f"model-{at}", options.model) for at in range(min(options.conversations, 24))]
    args = options.args(model=options.model, engine=None, num_cpus=1, device="cpu", kv_cache_tokens=16_384)
    return await _lost(cluster, options, talks, args, one_by_one=True)


async def _lost(
    cluster: Cluster, options: DrillOptions, talks: Sequence[Talk], args: Mapping[str, Any], one_by_one: bool = False
) -> Found:
    """SIGKILL of each replica of two, one after the other, in the middle of streams."""
    figures = {"rounds": options.rounds, "streams_lost": 0, "asked_again": 0, "streams_of_survivor": 0}
    found = Found(figures={**figures, "next_call_s": [], "replaced_after_s": []})
    streaming, direct = talks[:24], bool(args.get("direct"))
    cluster.deploy(args, 2)
    async with client_of(cluster.url) as client:
        await at_once(talks, client, SHORT)
        for number in range(options.rounds):
            before = {talk.name: talk.tag for talk in talks}
            victim = sorted(cluster.replicas())[number % 2]
            process = cluster.replicas()[victim]
            replaced = asyncio.create_task(_replaced(cluster, victim, process))
            had = await _in_stream(streaming, client, partial(kill, process), len(streaming) // 2 - 2)
            _check_streams(found, streaming, before, victim, had, direct=direct)
            hit = [talk for talk in talks if before[talk.name] == victim]
            others = [talk for talk in talks if before[talk.name] != victim]
            most = 1 if one_by_one else len(hit)
            await at_once(hit, client, SHORT, most=most, stream=False)
            _check_whole(found, hit, SHORT, "calls after the loss")
            seconds = [talk.answers[-1].seconds for talk in hit]
            times = {
                "calls_at_once": most,
                "calls": len(hit),
                "median": round(median(seconds), 3),
                "longest": round(max(seconds), 3),
            }
            found.figures["next_call_s"].append(times)
            if options.is_shared:
                _check_remembered(found, hit)
            await at_once(others, client, SHORT)
            found.check(not _moved(others, before), "conversations of the survivor have moved")
            found.figures["replaced_after_s"].append(round(await replaced, 1))
            await at_once(talks, client, SHORT, most=1 if one_by_one else 32, stream=False)
            _check_whole(found, talks, SHORT, "calls after the replacement")
            _check_back(found, talks, before)
            told = [await talk.forgotten(client, shared=options.is_shared) for talk in talks]
            found.check(not any(told), f"answers are forgotten: {[text for text in told if text][:3]}")
    found.check(found.figures["streams_lost"] > 0, "no stream was lost: they were over too soon")
    return found


async def _replaced(cluster: Cluster, tag: str, process: int) -> float:
    """The seconds from the end of a replica until another one answers in its slot."""
    await asyncio.to_thread(wait_until, "a replica is lost", lambda: cluster.replicas().get(tag) != process)
    began = time.monotonic()
    await asyncio.to_thread(wait_until, "its slot is taken over", lambda: tag in cluster.replicas())
    await asyncio.to_thread(cluster.wait_for, 2)
    return time.monotonic() - began


def _check_streams(
    found: Found, talks: Sequence[Talk], before: Mapping[str, str], victim: str, had: Mapping[str, str], *, direct: bool
) -> None:
    """Those of the survivor have to be whole; others too, by whoever wrote them, or they say that they are not."""
    for talk in talks:
        answer = talk.answers[-1]
        found.check(not (wrong := talk.wrong(answer, LONG)), wrong)
        found.check(answer.text.startswith(had[talk.name]), "a stream takes back what it has said")
        if before[talk.name] != victim:
            found.check(answer.is_whole and not answer.error, f"the survivor's stream ends with {answer.error!r}")
            found.figures["streams_of_survivor"] += answer.is_whole
        elif answer.is_whole:
            found.figures["asked_again"] += answer.tag != victim
        elif direct:
            found.check(bool(answer.error), "a lost stream ends as if it were whole")
            found.figures["streams_lost"] += 1
        else:
            said = answer.error == "replica_lost" and answer.has_begun
            found.check(said, f"a lost stream ends with {answer.error!r}, begun: {answer.has_begun}")
            found.figures["streams_lost"] += 1


def _check_back(found: Found, talks: Sequence[Talk], before: Mapping[str, str]) -> None:
    """All conversations have to be where they were before, with what they remember."""
    found.check(not _moved(talks, before), "conversations are not answered where they were before")
    _check_remembered(found, talks)


def _check_remembered(found: Found, talks: Sequence[Talk]) -> None:
    """Their last answers have to be copied from what was answered before, which they do not show."""
    without = [talk.name for talk in talks if not talk.answers[-1].copied.get("earlier_answer")]
    found.check(not without, f"{len(without)} conversations have forgotten what was answered, as {without[:3]}")
    found.figures["copied_from_memory"] = sum(talk.answers[-1].copied.get("earlier_answer", 0) for talk in talks)


async def front(cluster: Cluster, options: DrillOptions) -> Found:
    """SIGKILL of the front."""
    return await _between(cluster, options, "front", cluster.fronts)


async def proxy(cluster: Cluster, options: DrillOptions) -> Found:
    """SIGKILL of Ray's proxy."""
    return await _between(cluster, options, "proxy", cluster.proxies)


async def _between(cluster: Cluster, options: DrillOptions, name: str, processes: Callable[[], list[int]]) -> Found:
    """A kill of what stands between clients and replicas: streams break, and all conversations stay where they are."""
    found, talks = Found(), options.talks(name, 24)
    cluster.deploy(options.args(max_running=len(talks)), 2)
    async with client_of(cluster.url) as client:
        await at_once(talks, client, SHORT)
        before, replicas = {talk.name: talk.tag for talk in talks}, cluster.replicas()
        (process,) = processes()
        await _in_stream(talks, client, lambda: kill(process), len(talks))
        began = time.monotonic()
        whole = [talk.name for talk in talks if talk.answers[-1].is_whole]
        found.check(not whole, f"{len(whole)} streams through it came to their ends")

        def is_back() -> bool:
            try:
                return httpx.get(f"{cluster.url}/ready", timeout=5).status_code == 200
            except httpx.HTTPError:
                return False

        await asyncio.to_thread(wait_until, f"the {name} is back", is_back)
        found.figures["answers_again_after_s"] = round(time.monotonic() - began, 1)
        await at_once(talks, client, SHORT, stream=False)
        _check_whole(found, talks, SHORT, "calls after it")
        _check_back(found, talks, before)
        found.check(replicas == cluster.replicas(), "replicas were replaced")
    return found


async def scale(cluster: Cluster, options: DrillOptions) -> Found:
    """1, 2, 3, 2 and 1 replicas under load: no call fails, and of each change only those move who have to."""
    found, talks = Found(figures={"kept": []}), options.talks("scale", max(options.conversations, 200))
    cluster.deploy(options.args(), 1)
    async with client_of(cluster.url) as client:
        await at_once(talks, client, SHORT)
        for before, after in ((1, 2), (2, 3), (3, 2), (2, 1)):
            old, were = set(cluster.replicas()), {talk.name: talk.tag for talk in talks}
            calls = await _meanwhile(talks, client, partial(cluster.deploy, options.args(), after))
            bad = [answer.error for answer in calls if not answer.is_whole or answer.error]
            found.check(not bad, f"{before} -> {after}: {len(bad)} of {len(calls)} calls failed, as {bad[:3]}")
            await at_once(talks, client, SHORT)
            _check_whole(found, talks, SHORT, f"{before} -> {after}")
            changed, moved = old ^ set(cluster.replicas()), _moved(talks, were)
            astray = [talk for talk in moved if talk.tag not in changed and were[talk.name] not in changed]
            found.check(not astray, f"{before} -> {after}: {len(astray)} conversations moved between slots that stayed")
            kept = 1 - len(moved) / len(talks)
            found.figures["kept"].append(
                {"from": before, "to": after, "kept": round(kept, 3), "calls_meanwhile": len(calls)}
            )
    return found


async def _meanwhile(talks: Sequence[Talk], client: httpx.AsyncClient, change: Callable[[], None]) -> list[Answer]:
    """All calls of conversations that go on until a change is over, and a while longer."""
    answers: list[Answer] = []
    changing = asyncio.create_task(asyncio.to_thread(change))
    while not changing.done():
        await at_once(talks, client, SHORT, most=8, also=lambda _, answer: answers.append(answer))
    await changing
    return answers


async def rolling(cluster: Cluster, options: DrillOptions) -> Found:
    """Another version in place of a running one under load: no call fails, all conversations are back, and remember."""
    found, talks = Found(), options.talks("rolling")
    cluster.deploy(options.args(), 3)
    async with client_of(cluster.url) as client:
        await at_once(talks, client, SHORT)
        before = {talk.name: talk.tag for talk in talks}

        def change() -> None:
            cluster.deploy(options.args(max_n=7), 3, wait=False)
            cluster.wait_for(3)

        calls = await _meanwhile(talks, client, change)
        bad = Counter(answer.error for answer in calls if not answer.is_whole or answer.error)
        found.check(not bad, f"{sum(bad.values())} of {len(calls)} calls failed meanwhile: {dict(bad)}")
        await at_once(talks, client, SHORT, stream=False)
        _check_whole(found, talks, SHORT, "calls after it")
        _check_back(found, talks, before)
        found.figures["calls_meanwhile"] = len(calls)
    return found


async def stuck(cluster: Cluster, options: DrillOptions) -> Found:
    """A loop that is stuck in a pass: the replica ends, another one takes its slot, and the others notice nothing."""
    found, talks = Found(), options.talks("stuck")
    cluster.deploy(options.args(stuck_s=3.0), 2)
    async with client_of(cluster.url) as client:
        await at_once(talks, client, SHORT)
        before, replicas = {talk.name: talk.tag for talk in talks}, cluster.replicas()
        sticking = Talk(f"{STICK}{talks[0].name}")
        asked = asyncio.create_task(sticking.ask(client, SHORT))
        began = time.monotonic()
        await asyncio.to_thread(
            wait_until,
            "the stuck replica has ended",
            lambda: not set(replicas.values()) <= set(cluster.replicas().values()),
        )
        found.figures["ended_after_s"] = round(time.monotonic() - began, 1)
        (victim,) = {tag for tag, process in replicas.items() if cluster.replicas().get(tag) != process}
        found.check((await asked).error == "replica_lost", "the call that it was stuck in does not end with its loss")
        found.figures["replaced_after_s"] = round(cluster.wait_for(2), 1)
        await at_once(talks, client, SHORT, stream=False)
        _check_whole(found, talks, SHORT, "calls after it")
        _check_back(found, talks, before)
        found.check(victim in cluster.replicas(), "its slot was not taken over")
    return found


async def together(cluster: Cluster, options: DrillOptions) -> Found:
    """What replicas answer together, behind a front and without, and while their number changes."""
    found, place = Found(figures={"listed": 0}), "/v1/copyspec/conversations"
    for direct in (False, True):
        talks = options.talks(f"together-{'direct' if direct else 'front'}", 20)
        names = {talk.name for talk in talks}
        for replicas in (2, 3, 1):
            cluster.deploy(options.args(direct=direct), replicas)
            async with client_of(cluster.url) as client:
                await at_once(talks, client, SHORT)
                listed = {told["id"] for told in (await client.get(place)).json()["data"]}
                found.check(names <= listed, f"{sorted(names - listed)[:3]} of {replicas} replicas are not listed")
                found.figures["listed"] += len(names & listed)
                counts = (await client.get("/metrics")).text
                slots = set(re.findall(r'copyspec_running\{slot="(.+)"\}', counts))
                found.check({tag_of(slot) for slot in slots} == set(cluster.replicas()), f"metrics are of {slots}")
                gone = talks[replicas].name
                erased = await client.delete(f"{place}/{gone}")
                found.check(erased.status_code == 200, f"erasing: {erased.status_code} {erased.text}")
                left = {told["id"] for told in (await client.get(place)).json()["data"]}
                found.check(gone not in left, f"{gone} was erased, and is listed")
    return found


Drill = Callable[[Cluster, DrillOptions], Coroutine[Any, Any, Found]]
DRILLS: dict[str, Drill] = {
    "sticky": sticky,
    "lost": lost,
    "lost-direct": lost_direct,
    "lost-model": lost_model,
    "front": front,
    "proxy": proxy,
    "scale": scale,
    "rolling": rolling,
    "stuck": stuck,
    "together": together,
}
