"""Front doors: streams, cancelling, failures that stay alone, shutting down, sessions."""

from __future__ import annotations

import asyncio
import operator
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from copyspec_engine import (
    ConfigError,
    ContextOverflowError,
    Engine,
    EngineConfig,
    EngineStoppedError,
    GenerationRequest,
    RequestFailedError,
    SamplingParams,
    shared_engine,
)
from copyspec_engine.drafting.drafter import Drafter
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.execution.packing import Piece
from copyspec_engine.memory.conversation import SessionMemory
from copyspec_engine.testing import ScriptedRunner, loop_of, scripted_engine
from tests.conftest import assert_all_slots_free

DOCUMENT = "".join(f"line {i}: value {i * i}\n" for i in range(20))


def ask(text: str, **options: object) -> GenerationRequest:
    return GenerationRequest(messages=({"role": "user", "content": text},), **options)


@pytest.fixture
def endless() -> Iterator[Engine]:
    """An engine whose every answer is long, so that there is time to interrupt it."""
    with scripted_engine(lambda _prompt: "abcdefg hijk " * 200, EngineConfig(drafter="none")) as engine:
        yield engine
        if not loop_of(engine).is_over:
            assert_all_slots_free(engine)


@pytest.fixture
def echo() -> Iterator[Engine]:
    """An engine that repeats the last user message."""

    def reply(prompt: str) -> str:
        return prompt.rsplit("<|im_start|>user\n", 1)[1].split("<|im_end|>")[0]

    with scripted_engine(reply) as engine:
        yield engine
        assert_all_slots_free(engine)


def wait_until_idle(engine: Engine) -> bool:
    engine.forget("nobody")  # answered once everything asked for before it has been carried out
    deadline = time.monotonic() + 10
    while (loop_of(engine).requests or loop_of(engine).core.scheduler) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not loop_of(engine).requests and not loop_of(engine).core.scheduler


def test_stream_joined_equals_generate(echo: Engine) -> None:
    chunks = list(echo.stream(ask(DOCUMENT)))
    output = echo.generate(ask(DOCUMENT))
    assert "".join(chunk.text for chunk in chunks) == output.text == DOCUMENT
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == output.token_ids
    assert [chunk.is_last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert "".join(segment.text for segment in output.segments) == output.text


def test_async_equals_sync(echo: Engine) -> None:
    async def both() -> tuple[str, str]:
        streamed = "".join([chunk.text async for chunk in echo.astream(ask(DOCUMENT))])
        return streamed, (await echo.agenerate(ask(DOCUMENT))).text

    assert asyncio.run(both()) == (DOCUMENT, DOCUMENT)


def test_counts_add_up(echo: Engine) -> None:
    output = echo.generate(ask(DOCUMENT))
    stats = output.draft_stats
    assert output.usage.completion_tokens == len(output.token_ids) == len(DOCUMENT) + 1
    assert stats.num_accepted_tokens == sum(stats.accepted_lengths)
    assert stats.num_forward_passes == len(stats.accepted_lengths) == len(stats.draft_lengths)
    assert stats.num_draft_tokens == sum(stats.draft_lengths)
    assert all(map(operator.ge, stats.draft_lengths, stats.accepted_lengths))
    assert stats.num_accepted_tokens + stats.num_forward_passes >= output.usage.completion_tokens
    assert stats.num_draft_tokens >= stats.num_accepted_tokens
    assert output.tokens_per_forward > 10
    assert output.copied_share > 0.9
    assert 0 < output.timing.queue_s <= output.timing.ttft_s <= output.timing.total_s


def test_the_second_turn_reads_only_its_new_tokens_and_copies_from_the_first(echo: Engine) -> None:
    first = echo.generate(ask(DOCUMENT, session_id="s"))
    history = [
        {"role": "user", "content": DOCUMENT},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "thanks"},
    ]
    second = echo.generate(GenerationRequest(messages=tuple(history), session_id="s"))
    assert second.usage.cached_tokens in (first.usage.total_tokens, first.usage.total_tokens - 1)
    assert second.text == "thanks"


def test_a_text_that_is_no_longer_in_the_prompt_is_copied_from_the_session() -> None:
    with scripted_engine([DOCUMENT, DOCUMENT, DOCUMENT]) as engine:
        engine.generate(ask("write it", session_id="s"))
        remembered = engine.generate(ask("again", session_id="s"))
        stranger = engine.generate(ask("again", session_id="other"))
        assert remembered.text == stranger.text == DOCUMENT
        assert remembered.tokens_per_forward > 2 * stranger.tokens_per_forward


def test_closing_a_stream_cancels_the_request(endless: Engine) -> None:
    stream = endless.stream(ask("go"))
    next(stream)
    stream.close()
    assert wait_until_idle(endless)
    assert_all_slots_free(endless)


def test_an_id_is_free_at_once_when_its_stream_is_closed(endless: Engine) -> None:
    request = ask("go", request_id="same", sampling=SamplingParams(max_tokens=50))
    with endless.stream(request) as stream:
        next(stream)
    assert endless.generate(request).usage.completion_tokens == 50


def test_closing_a_finished_stream_leaves_a_new_request_of_its_id_alone(endless: Engine) -> None:
    request = ask("go", request_id="same", sampling=SamplingParams(max_tokens=50))
    old = endless.stream(request)
    assert old.result().finish_reason == "length"
    new = endless.stream(request)
    old.close()
    assert new.result().finish_reason == "length"


@pytest.mark.parametrize("how", ["close", "drop"])
def test_a_stream_that_was_never_read_is_cancelled(endless: Engine, how: str) -> None:
    stream = endless.stream(ask("go"))
    if how == "close":
        stream.close()
        assert list(stream) == []
        with pytest.raises(RequestFailedError, match="closed before it was finished"):
            stream.result()
    del stream
    assert wait_until_idle(endless)


def test_a_result_may_be_asked_for_again(echo: Engine) -> None:
    handle = echo.stream(ask("hello"))
    chunks = list(handle)
    assert handle.result() is handle.result() is chunks[-1].output
    assert list(handle) == []


def test_the_garbage_collector_may_close_a_handle_while_the_lock_is_held(endless: Engine) -> None:
    """Past regression: an abandoned stream in a reference cycle deadlocked the thread that collected it."""
    handle = endless.stream(ask("go"))
    with loop_of(endless).lock:
        handle.close()
    assert wait_until_idle(endless)


def test_cancel_keeps_what_was_written_and_frees_every_slot(endless: Engine) -> None:
    handle = endless.stream(ask("go", request_id="r", session_id="s"))
    chunks = iter(handle)
    text = next(chunks).text + next(chunks).text
    assert endless.cancel("r")
    rest = list(chunks)
    output = rest[-1].output
    assert output is not None
    assert output.finish_reason == "cancelled"
    assert output.text.startswith(text)
    assert not endless.cancel("r")
    assert_all_slots_free(endless)


def test_a_waiting_request_can_be_cancelled() -> None:
    with scripted_engine(lambda _: "x" * 3000, EngineConfig(max_running=1, drafter="none")) as engine:
        first = engine.stream(ask("a", request_id="first"))
        second = engine.stream(ask("b", request_id="second"))
        assert engine.cancel("second")
        output = second.result()
        assert (output.finish_reason, output.text) == ("cancelled", "")
        engine.cancel("first")
        assert first.result().finish_reason == "cancelled"
        assert_all_slots_free(engine)


def test_a_cancelled_task_cancels_its_request(endless: Engine) -> None:
    async def run() -> None:
        async def consume() -> None:
            async for _ in endless.astream(ask("go")):
                pass

        task = asyncio.create_task(consume())
        while not loop_of(endless).requests:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert wait_until_idle(endless)
    assert_all_slots_free(endless)


def test_the_event_loop_goes_on_while_tokens_are_made(endless: Engine) -> None:
    async def run() -> int:
        ticks = 0
        task = asyncio.create_task(endless.agenerate(ask("go", sampling=SamplingParams(max_tokens=300))))
        while not task.done():
            ticks += 1
            await asyncio.sleep(0)
        assert (await task).usage.completion_tokens == 300
        return ticks

    assert asyncio.run(run()) > 20


@pytest.mark.parametrize("drafter", ["adaptive", "none"])
def test_a_request_that_fails_takes_nobody_with_it(drafter: str) -> None:
    class Moody(ScriptedRunner):
        def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
            for piece in pieces:
                if piece.key == "bad" and len(piece.text) > 40:
                    raise torch.OutOfMemoryError("no memory left on the device")
            return super().forward(pieces)

    with scripted_engine(lambda _: DOCUMENT, EngineConfig(drafter=drafter)) as engine:
        loop_of(engine).model.runner = Moody(lambda _: DOCUMENT)
        good = [engine.stream(ask("x", request_id=f"good{i}")) for i in range(2)]
        bad = engine.stream(ask("x", request_id="bad"))
        late = engine.stream(ask("x", request_id="late"))
        with pytest.raises(RequestFailedError, match="no memory left") as caught:
            bad.result()
        assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
        assert [handle.result().text for handle in (*good, late)] == [DOCUMENT] * 3
        assert_all_slots_free(engine)


class WatchedDrafter:
    """A drafter that counts how often it is finished, notes what it observes, and may fail in one of its methods."""

    def __init__(self, drafter: Drafter, fails: str) -> None:
        self._drafter, self._fails = drafter, fails
        self.num_finished = 0
        self.observed: list[tuple[DraftTree, Sequence[int], Sequence[int]]] = []

    def propose(self, num_pending: int, room: int) -> DraftTree:
        self._may_fail("propose")
        return self._drafter.propose(num_pending, room)

    def observe(self, draft: DraftTree, accepted: Sequence[int], tokens: Sequence[int]) -> None:
        self._may_fail("observe")
        self.observed.append((draft, accepted, tokens))
        self._drafter.observe(draft, accepted, tokens)

    def finish(self) -> None:
        self.num_finished += 1
        self._may_fail("finish")
        self._drafter.finish()

    def _may_fail(self, method: str) -> None:
        if self._fails == method:
            raise ArithmeticError(f"from {method}")


def watch(engine: Engine, monkeypatch: pytest.MonkeyPatch, fails: str = "") -> list[WatchedDrafter]:
    """All drafters that an engine begins from now on; those of prompts with "bad" in them fail."""
    watched: list[WatchedDrafter] = []
    begin = loop_of(engine).core.policy.begin

    def watched_begin(
        options: Any, memory: SessionMemory, prompt_ids: Sequence[int], *rest: Any, **named: Any
    ) -> Drafter:
        drafter = begin(options, memory, prompt_ids, *rest, **named)
        is_bad = "bad" in engine.decode(prompt_ids)
        if is_bad and fails == "begin":
            raise ArithmeticError("from begin")
        watched.append(WatchedDrafter(drafter, fails if is_bad else ""))
        return watched[-1]

    monkeypatch.setattr(loop_of(engine).core.policy, "begin", watched_begin)
    return watched


def open_spans(engine: Engine) -> list[Any]:
    texts = loop_of(engine).core.conversations.store
    sessions = [session for session in texts._sessions.values() if session is not None]
    return [span for session in sessions for span in session.memory.index.spans if span.is_open]


@pytest.mark.parametrize("drafter", ["adaptive", "copyspec", "none"])
def test_a_drafter_sees_what_was_kept_and_is_finished_once(
    echo: Engine, monkeypatch: pytest.MonkeyPatch, drafter: str
) -> None:
    watched = watch(echo, monkeypatch)
    stops = [(), ("value 9\n",), ("lin",), ("7: v",), ("ne 12: value 144",)]
    outputs = [
        echo.generate(
            ask(DOCUMENT, session_id="s", drafter=drafter, sampling=SamplingParams(stop=stop, max_tokens=most))
        )
        for stop in stops
        for most in (None, 60, 1)
    ]
    for output, seen in zip(outputs, watched, strict=True):
        assert seen.num_finished == 1
        assert tuple(token for _, _, tokens in seen.observed for token in tokens) == output.token_ids
        for draft, accepted, tokens in seen.observed:
            assert [draft.tokens[node] for node in accepted] == list(tokens[: len(accepted)])
            assert len(tokens) - len(accepted) in (0, 1)
    if drafter == "adaptive":
        cut = [len(seen.observed[-1][1]) == len(seen.observed[-1][2]) for seen in watched]
        assert any(cut)  # some answers ended inside an accepted draft


def test_a_drafter_is_finished_once_when_its_request_is_cancelled_or_dropped(
    endless: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = watch(endless, monkeypatch)
    for session in ("a", "b"):
        first = endless.stream(ask("go", request_id="first", session_id=session, drafter="adaptive"))
        second = endless.stream(ask("go", session_id=session))
        next(first)
        next(second)
        assert len(open_spans(endless)) >= 1
        endless.cancel("first")
        second.close()
        first.result()
        assert wait_until_idle(endless)
        assert open_spans(endless) == []
    assert [seen.num_finished for seen in watched] == [1] * 4


@pytest.mark.parametrize("method", ["begin", "propose", "observe", "finish"])
def test_a_drafter_that_fails_ends_its_own_request_alone(
    echo: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    watched = watch(echo, monkeypatch, fails=method)
    good = [echo.stream(ask(f"{DOCUMENT} {i}", session_id=f"good{i}")) for i in range(2)]
    bad = echo.stream(ask("bad", session_id="s"))
    late = echo.stream(ask(DOCUMENT, session_id="s"))
    with pytest.raises(RequestFailedError, match=f"from {method}") as caught:
        bad.result()
    assert isinstance(caught.value.__cause__, ArithmeticError)
    assert [handle.result().text for handle in (*good, late)] == [f"{DOCUMENT} 0", f"{DOCUMENT} 1", DOCUMENT]
    assert echo.generate(ask(DOCUMENT, session_id="s")).tokens_per_forward > 10
    assert [seen.num_finished for seen in watched] == [1] * len(watched)
    assert open_spans(echo) == []
    assert_all_slots_free(echo)


def test_an_error_that_stops_the_loop_reaches_current_and_later_callers(caplog: pytest.LogCaptureFixture) -> None:
    with scripted_engine(lambda _: "x" * 500, EngineConfig(drafter="none")) as engine:
        handle = engine.stream(ask("go"))
        next(iter(handle))
        loop_of(engine).core.scheduler.schedule = None  # type: ignore[method-assign,assignment]
        with pytest.raises(EngineStoppedError, match="its loop failed with TypeError") as caught:
            handle.result()
        assert isinstance(caught.value.cause, TypeError)
        loop_of(engine).thread.join()
        with pytest.raises(EngineStoppedError, match="TypeError"):
            engine.generate(ask("again"))
        with pytest.raises(EngineStoppedError):
            engine.forget("s")
    assert "loop failed" in caplog.text


def test_even_an_exit_inside_the_loop_reaches_the_callers(caplog: pytest.LogCaptureFixture) -> None:
    def leave(_prompt: str) -> str:
        raise SystemExit("from a reply")

    with scripted_engine(leave) as engine, pytest.raises(EngineStoppedError, match="from a reply"):
        engine.generate(ask("go"))
    assert "loop failed" in caplog.text


def test_an_error_while_cancelling_stays_with_its_request(endless: Engine) -> None:
    good, bad = endless.stream(ask("a", request_id="good")), endless.stream(ask("b", request_id="bad"))
    next(bad)
    request = loop_of(endless).requests["bad"][0]
    request.answer.text.flush = None  # type: ignore[method-assign,assignment]
    endless.cancel("bad")
    with pytest.raises(RequestFailedError, match="TypeError"):
        bad.result()
    assert next(good).token_ids
    good.close()
    assert wait_until_idle(endless)


def test_a_session_can_be_forgotten_from_the_loop_thread() -> None:
    found: list[bool] = []

    def reply(prompt: str) -> str:
        if "now" in prompt:
            found.append(engine.forget("other"))
        return "done"

    with scripted_engine(reply) as engine:
        engine.generate(ask("x", session_id="other"))
        engine.generate(ask("now", session_id="mine"))
        engine.generate(ask("now", session_id="mine"))
    assert found == [True, False]


def test_a_forked_child_is_told_instead_of_waiting_for_ever() -> None:
    code = """
import os, signal
from copyspec_engine import EngineStoppedError, GenerationRequest
from copyspec_engine.testing import scripted_engine
engine = scripted_engine(["a", "b"])
engine.generate(GenerationRequest(prompt="x"))
child = os.fork()
if not child:
    signal.alarm(20)
    try:
        engine.generate(GenerationRequest(prompt="x"))
    except EngineStoppedError as error:
        os._exit(0 if "forked" in str(error) else 3)
    os._exit(4)
status = os.waitpid(child, 0)[1]
assert engine.generate(GenerationRequest(prompt="x")).text == "b"
raise SystemExit(os.waitstatus_to_exitcode(status))
"""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False, timeout=60).returncode == 0


def test_closing_ends_unfinished_requests_and_refuses_new_ones(endless: Engine) -> None:
    handle = endless.stream(ask("go"))
    next(iter(handle))
    endless.close()
    with pytest.raises(EngineStoppedError, match="it was closed"):
        list(handle)
    with pytest.raises(EngineStoppedError):
        endless.generate(ask("again"))
    endless.close()


@pytest.mark.parametrize(
    ("options", "sampling", "says"),
    [
        ({"max_model_len": 100}, {"max_tokens": 90}, "the model's context holds 100"),
        ({"max_model_len": 20}, {}, "the model's context holds 20"),
        ({"kv_cache_tokens": 64}, {"max_tokens": 60}, "the KV pool"),
    ],
)
def test_a_request_that_cannot_fit_is_refused_before_any_work(
    options: dict[str, int], sampling: dict[str, int], says: str
) -> None:
    with scripted_engine(["never"], EngineConfig(**options)) as engine:
        with pytest.raises(ContextOverflowError, match=says) as caught:
            engine.stream(ask("hello", sampling=SamplingParams(**sampling)))
        assert caught.value.num_tokens > caught.value.max_tokens
        assert loop_of(engine).model.runner.num_forward_passes == 0  # type: ignore[attr-defined]


def test_an_answer_ends_where_the_context_ends() -> None:
    with scripted_engine(["x" * 500], EngineConfig(max_model_len=100)) as engine:
        output = engine.generate(ask("go"))
        assert output.finish_reason == "length"
        assert output.usage.total_tokens == 100


def test_requests_wait_for_slots_and_old_sessions_make_room() -> None:
    with scripted_engine(lambda _: "y" * 30, EngineConfig(kv_cache_tokens=200, max_model_len=150)) as engine:
        handles = [
            engine.stream(ask("go", session_id=f"s{i}", sampling=SamplingParams(max_tokens=60))) for i in range(8)
        ]
        assert [handle.result().text for handle in handles] == ["y" * 30] * 8
        assert_all_slots_free(engine)


@pytest.mark.parametrize(
    ("options", "says", "param"),
    [
        (
            {"prompt_token_ids": (1, 999)},
            "prompt_token_ids with 999 but expected ids from 0 to 257",
            "prompt_token_ids",
        ),
        ({"messages": [{"content": "no role"}]}, r"messages\[0\] with role=None", "messages[0].role"),
        ({"prompt": "a", "sampling": {"stop_token_ids": [999]}}, "stop_token_ids with 999", "stop_token_ids"),
        ({"prompt": "a", "sampling": {"suppress_tokens": range(258)}}, "that ban 258 tokens", "bad_words"),
        ({"prompt": "a", "drafter": "draft-model"}, "but no draft model", "drafter"),
        ({"prompt": "a", "grammar": {"regex": "("}}, "Got a grammar that llguidance refuses", "grammar"),
    ],
)
def test_bad_input_is_refused_by_name(options: dict[str, Any], says: str, param: str) -> None:
    with scripted_engine(["a"]) as engine:
        with pytest.raises(ConfigError, match=says) as caught:
            engine.stream(GenerationRequest(**options))
        assert caught.value.param == param


def test_a_request_id_that_is_running_is_refused(endless: Engine) -> None:
    handle = endless.stream(ask("x", request_id="twice"))
    with pytest.raises(ConfigError, match="request_id='twice'"):
        endless.stream(ask("x", request_id="twice"))
    endless.cancel("twice")
    handle.result()


def test_forgetting_a_session_erases_texts_and_kv() -> None:
    with scripted_engine([DOCUMENT, DOCUMENT]) as engine:
        engine.generate(ask("x", session_id="s"))
        assert engine.forget("s")
        assert not engine.forget("s")
        assert loop_of(engine).core.kv.pool.num_free == loop_of(engine).core.kv.pool.num_slots
        assert engine.generate(ask("x", session_id="s")).usage.cached_tokens == 0


def converse(engine: Engine, seed: int) -> None:
    """A few turns of a client that cancels some requests and walks away from others."""
    rng = random.Random(seed)
    for turn in range(4):
        request = ask(f"{seed} {turn} " * 9, session_id=f"s{seed % 5}", request_id=f"{seed}-{turn}")
        for count, _ in enumerate(engine.stream(request)):
            if rng.random() < 0.03:
                engine.cancel(request.request_id)
            if count > 150 and rng.random() < 0.1:
                break


def test_many_threads_and_random_cancels_leave_every_slot_free() -> None:
    config = EngineConfig(kv_cache_tokens=4000, max_model_len=1000, max_running=5)
    with scripted_engine(lambda prompt: prompt[-200:] * 2, config) as engine:
        with ThreadPoolExecutor(16) as clients:
            for done in [clients.submit(converse, engine, seed) for seed in range(16)]:
                done.result()
        assert wait_until_idle(engine)
        assert_all_slots_free(engine)


def test_equal_configs_share_one_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    import copyspec_engine.engine.engine as module

    made: list[EngineConfig] = []

    def build(config: EngineConfig, **_: object) -> Engine:
        made.append(config)
        time.sleep(0.05)
        return scripted_engine(["a", "b"], config)

    monkeypatch.setattr(module, "Engine", build)
    found: list[Engine] = []
    threads = [
        threading.Thread(target=lambda: found.append(shared_engine(EngineConfig(model="shared")))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(engine) for engine in found}) == 1
    assert len(made) == 1
    found[0].close()
    again = shared_engine(EngineConfig(model="shared"))
    assert again is not found[0]
    again.close()


def test_info_says_what_is_loaded(make_engine: Callable[..., Engine]) -> None:
    info = make_engine("qwen3").info
    assert info.architecture == "Qwen3ForCausalLM"
    assert (info.device, info.dtype, info.max_model_len) == ("cpu", "float32", 512)
    assert info.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4  # layers, keys and values, kv heads, head_dim, bytes
    assert {"copyspec", "python", "torch", "transformers", "numba"} <= set(info.versions)
    assert "compile" in info.load_seconds
    assert 0 < info.device_memory[0] <= info.device_memory[1]


def test_a_name_in_place_of_a_config_is_told_where_it_goes() -> None:
    with pytest.raises(
        ConfigError, match=r"Got config='smollm2' but expected an EngineConfig, such as EngineConfig\(model="
    ):
        Engine("smollm2")  # type: ignore[arg-type]


def test_a_drafters_name_in_a_copy_that_nobody_checked_is_that_drafter() -> None:
    request = GenerationRequest(prompt="a word and a word", sampling=SamplingParams(temperature=0.0, max_tokens=8))
    with scripted_engine(lambda _: "a word and a word") as engine:
        plain = engine.generate(request.model_copy(update={"drafter": "none"}))
        assert plain.draft_stats.num_draft_tokens == 0
        with pytest.raises(
            ConfigError, match="Got drafter='nobody' but expected adaptive, copyspec, draft-model or none"
        ):
            engine.generate(request.model_copy(update={"drafter": "nobody"}))
