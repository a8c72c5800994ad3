"""Callers that wait for a place: in their order, up to their timeout, and leaving nothing behind when they give up."""

from __future__ import annotations

import asyncio
import gc
import math
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from copyspec_engine import ConfigError, Engine, EngineBusyError, EngineConfig, EngineStoppedError, GenerationRequest
from copyspec_engine.engine.thread import Admission
from copyspec_engine.testing import loop_of, scripted_engine
from tests.conftest import assert_all_slots_free

SMALL = EngineConfig(model="scripted", max_running=1, max_waiting=1, drafter="none", max_model_len=256)


def ask(text: str = "go", **options: object) -> GenerationRequest:
    return GenerationRequest(prompt=text, **options)


class Gate:
    """Answers that come once it is opened."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def reply(self, prompt: str) -> str:
        self.event.wait(30)
        return prompt.upper()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.event.set()


@pytest.fixture
def full(gate: Gate) -> Iterator[Engine]:
    """An engine with all places taken, until the gate is opened."""
    with scripted_engine(gate.reply, SMALL) as engine:
        handles = [engine.stream(ask("first")), engine.stream(ask("second"))]
        yield engine
        gate.event.set()
        if not loop_of(engine).is_over:
            assert [handle.result().text for handle in handles] == ["FIRST", "SECOND"]
            assert_all_slots_free(engine)
            assert not len(loop_of(engine).places)
            assert not loop_of(engine).places.num_waiting


def num_waiting(engine: Engine, count: int) -> bool:
    deadline = time.monotonic() + 10
    while loop_of(engine).places.num_waiting != count and time.monotonic() < deadline:
        time.sleep(0.001)
    return loop_of(engine).places.num_waiting == count


def test_threads_wait_for_a_place_and_all_are_served(full: Engine, gate: Gate) -> None:
    with ThreadPoolExecutor(30) as pool:
        done = [pool.submit(full.generate, ask(f"n{i}")) for i in range(20)]
        streams = [pool.submit(lambda i=i: list(full.stream(ask(f"s{i}")))) for i in range(5)]
        assert num_waiting(full, 25)
        with pytest.raises(EngineBusyError, match="2 run or wait"):
            full.stream(ask(), wait=False)
        gate.event.set()
        assert [future.result().text for future in done] == [f"N{i}" for i in range(20)]
        assert all(future.result()[-1].output is not None for future in streams)


def test_tasks_wait_for_a_place_without_a_thread_each(full: Engine, gate: Gate) -> None:
    async def run() -> list[str]:
        tasks = [asyncio.create_task(full.agenerate(ask(f"n{i}"))) for i in range(1300)]
        while loop_of(full).places.num_waiting < 1300:
            await asyncio.sleep(0)
        gate.event.set()
        return [(await task).text for task in tasks]

    assert asyncio.run(run()) == [f"N{i}" for i in range(1300)]


def test_a_caller_waits_up_to_its_timeout(full: Engine) -> None:
    with pytest.raises(EngineBusyError, match="2 run or wait"):
        full.generate(ask(timeout_s=0.02))
    with pytest.raises(EngineBusyError):
        full.stream(ask(timeout_s=1e-300))

    async def run() -> None:
        with pytest.raises(EngineBusyError, match="2 run or wait"):
            await full.agenerate(ask(timeout_s=0.02))
        with pytest.raises(EngineBusyError):
            async for _ in full.astream(ask(timeout_s=0.02)):
                pass

    asyncio.run(run())


def test_a_free_place_is_had_however_short_the_timeout() -> None:
    async def run() -> None:
        places = Admission(1)
        await places.wait_async(0, deadline_s=0.0)
        with pytest.raises(EngineBusyError):
            places.take(1)

    asyncio.run(run())


def test_a_very_long_timeout_is_none(full: Engine, gate: Gate) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(full.generate, ask("long", timeout_s=1e300))
        assert num_waiting(full, 1)
        gate.event.set()
        assert waiting.result().text == "LONG"


def test_a_task_that_is_cancelled_while_it_waits_leaves_the_queue(full: Engine, gate: Gate) -> None:
    async def run() -> str:
        gone = [asyncio.create_task(full.agenerate(ask(f"n{i}"))) for i in range(5)]
        kept = asyncio.create_task(full.agenerate(ask("kept")))
        while loop_of(full).places.num_waiting < 6:
            await asyncio.sleep(0)
        for task in gone:
            task.cancel()
        assert all(
            isinstance(error, asyncio.CancelledError) for error in await asyncio.gather(*gone, return_exceptions=True)
        )
        assert loop_of(full).places.num_waiting == 1
        gate.event.set()
        return (await kept).text

    assert asyncio.run(run()) == "KEPT"


def test_a_request_whose_caller_waits_can_be_cancelled(full: Engine, gate: Gate) -> None:
    async def run() -> str:
        task = asyncio.create_task(full.agenerate(ask("gone", request_id="task")))
        while not loop_of(full).places.num_waiting:
            await asyncio.sleep(0)
        assert full.cancel("task")
        gate.event.set()
        return (await task).finish_reason

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(full.generate, ask("gone", request_id="thread"))
        assert num_waiting(full, 1)
        assert full.cancel("thread")
        assert asyncio.run(run()) == waiting.result().finish_reason == "cancelled"
    assert waiting.result().text == ""
    assert not full.cancel("thread")
    assert not loop_of(full)._at_the_door
    assert not loop_of(full)._called_off


def test_closing_tells_those_who_wait(gate: Gate, full: Engine) -> None:
    async def run() -> BaseException:
        task = asyncio.create_task(full.agenerate(ask("x")))
        while loop_of(full).places.num_waiting < 2:
            await asyncio.sleep(0)
        threading.Thread(target=full.close).start()
        gate.event.set()
        (found,) = await asyncio.gather(task, return_exceptions=True)
        return found

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(full.generate, ask("y"))
        assert isinstance(asyncio.run(run()), EngineStoppedError)
        with pytest.raises(EngineStoppedError, match="it was closed"):
            waiting.result()


def test_a_request_that_is_refused_after_its_wait_gives_its_place_back() -> None:
    gate = Gate()
    with scripted_engine(gate.reply, SMALL) as engine:
        first = engine.stream(ask("a", request_id="same"))
        with pytest.raises(ConfigError, match="request_id='same'"):
            engine.generate(ask("b", request_id="same"))
        assert len(loop_of(engine).places) == 1
        gate.event.set()
        assert first.result().text == "A"


def test_the_heartbeat_is_read_while_a_pass_hangs() -> None:
    entered, gate = threading.Event(), threading.Event()

    def reply(prompt: str) -> str:
        entered.set()
        gate.wait(30)
        return prompt

    with scripted_engine(reply, SMALL) as engine:
        assert engine.heartbeat_age_s == 0.0
        handle = engine.stream(ask())
        entered.wait(30)
        ages = [engine.heartbeat_age_s for _ in range(1000)]
        assert 0.0 <= ages[0] < ages[-1]
        assert ages == sorted(ages)
        gate.set()
        handle.result()
        engine.metrics()  # a turn of its own
        while engine.heartbeat_age_s:
            time.sleep(0.001)
    assert engine.heartbeat_age_s == math.inf


def test_places_go_round_in_order() -> None:
    places = Admission(1)
    places.take(0)
    order: list[int] = []

    def wait(number: int) -> None:
        places.wait(number, float("inf"))
        order.append(number)
        places.release(number)

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(1, 6)]
    for number, thread in enumerate(threads, 1):
        thread.start()
        while places.num_waiting < number:
            time.sleep(0.001)
    places.release(0)
    places.release(0)
    for thread in threads:
        thread.join()
    assert order == [1, 2, 3, 4, 5]


# ---- engines that nobody holds, and forks --------------------------------------------------------------------------


def test_an_engine_that_everybody_has_let_go_of_ends_its_thread_and_frees_its_model() -> None:
    engine = scripted_engine(lambda prompt: prompt, SMALL)
    assert engine.generate(ask("x")).text == "x"
    loop = loop_of(engine)
    thread, model, core = loop.thread, weakref.ref(loop.model.runner), weakref.ref(loop.core)
    del loop
    del engine
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
    gc.collect()
    assert model() is None
    assert core() is None


def test_a_handle_keeps_its_engine_until_the_answer_is_read() -> None:
    handle = scripted_engine(lambda prompt: prompt * 50, SMALL).stream(ask("abc"))
    gc.collect()
    assert handle.result().text == "abc" * 50


_FORKED = """
import asyncio, os, signal, threading
from copyspec_engine import EngineConfig, EngineStoppedError, GenerationRequest
from copyspec_engine.testing import scripted_engine
gate = threading.Event()
config = EngineConfig(model="scripted", max_running=1, max_waiting=1)
engine = scripted_engine(lambda prompt: gate.wait(30) and "done", config)
ask = lambda: GenerationRequest(prompt="x")
handles = [engine.stream(ask()), engine.stream(ask())]
async def last():
    return await engine.agenerate(ask())
ways = [handles[0].result, lambda: next(handles[1]), lambda: engine.generate(ask()), lambda: engine.stream(ask()),
        lambda: engine.stream(ask(), wait=False), lambda: asyncio.run(last()), engine.metrics,
        lambda: engine.forget("s")]
child = os.fork()
if not child:
    signal.alarm(30)
    for number, way in enumerate(ways):
        try:
            way()
        except EngineStoppedError as error:
            if "forked" in str(error):
                continue
        os._exit(10 + number)
    handles[0].close()
    del handles, ways, way
    engine.close()
    os._exit(0)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
gate.set()
assert [handle.result().text for handle in handles] == ["done"] * 2
raise SystemExit(code)
"""


def test_in_a_forked_child_handles_and_engines_raise_instead_of_waiting_for_ever() -> None:
    command = [sys.executable, "-W", "ignore", "-c", _FORKED]
    assert subprocess.run(command, check=False, timeout=90).returncode == 0


def test_the_interpreter_waits_for_loops_of_engines_that_nobody_holds_any_more() -> None:
    """They would free a model's tensors while the interpreter takes torch away: "terminate called", exit code 134."""
    code = (
        "import atexit, threading\n"
        "atexit.register(lambda: print([t.name for t in threading.enumerate() if t.name == 'copyspec-engine']))\n"
        "from copyspec_engine.testing import scripted_engine\n"
        "engine = scripted_engine(['word ' * 4000])\n"
        "from copyspec_engine import GenerationRequest\n"
        "handle = engine.stream(GenerationRequest(prompt='Write.'))\n"
        "next(iter(handle))\n"
        "del handle, engine\n"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "[]\n"), run.stderr
