"""Many requests at once: each answers as if alone, whatever runs beside it, and nobody loses slots."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import pytest

from copyspec_engine import (
    AdaptiveDrafter,
    Engine,
    EngineBusyError,
    EngineConfig,
    GenerationRequest,
    RequestHandle,
    SamplingParams,
)
from copyspec_engine.execution.packing import Piece
from copyspec_engine.testing import held_by, loop_of, scripted_engine
from tests.conftest import assert_all_slots_free
from tests.loop.test_lossless import PROMPT, ids_of, random_case, run, same_answer

MakeEngine = Callable[..., Engine]


def submit(engine: Engine, prompt: tuple[int, ...], drafter: Any = None, **options: Any) -> RequestHandle:
    sampling = options.pop("sampling", {"max_tokens": 40})
    return engine.stream(
        GenerationRequest(prompt_token_ids=prompt, drafter=drafter, sampling=SamplingParams(**sampling), **options)
    )


def batches(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, int]]]:
    """(request, tokens read) of each row of each pass from now on."""
    seen: list[list[tuple[str, int]]] = []
    forward = loop_of(engine).model.runner.forward

    def watched(pieces: Sequence[Piece]) -> Any:
        seen.append([(piece.key, len(piece.ids) - len(piece.draft)) for piece in pieces])
        return forward(pieces)

    monkeypatch.setattr(loop_of(engine).model.runner, "forward", watched)
    return seen


def in_use(engine: Engine) -> int:
    """Slots of the KV pool that are not free."""
    pool = loop_of(engine).core.kv.pool
    return pool.num_slots - pool.num_free


def started(handle: RequestHandle) -> RequestHandle:
    next(handle)
    return handle


@pytest.mark.parametrize("drafter", ["none", "adaptive", "copyspec"])
def test_rows_of_a_batch_answer_as_if_alone(
    make_engine: MakeEngine, architecture: str, drafter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(architecture, max_prefill_tokens=50)
    prompts = [PROMPT[i : i + 30 + 15 * i] for i in range(6)]
    alone = [run(engine, prompt, "none", max_tokens=40) for prompt in prompts]
    seen = batches(engine, monkeypatch)
    handles = [submit(engine, prompt, drafter) for prompt in prompts]
    assert all(same_answer(a, handle.result()) for a, handle in zip(alone, handles, strict=True))
    assert max(map(len, seen)) >= 4
    assert_all_slots_free(engine)


@pytest.mark.parametrize("num_slots", [160, 260])
def test_requests_that_give_way_go_on_as_if_nothing_had_happened(make_engine: MakeEngine, num_slots: int) -> None:
    """Slots for one or two requests, and four that run: they are taken from those that came last, again and again."""
    rng = random.Random(num_slots)
    engine = make_engine("qwen2", kv_cache_tokens=num_slots, max_prefill_tokens=32)
    cases = [random_case(rng) for _ in range(30)]
    for _, sampling, _ in cases:
        sampling["max_tokens"] = 50
    prompts = [prompt[:90] for prompt, _, _ in cases]
    alone = [run(engine, prompt, "none", **case[1]) for prompt, case in zip(prompts, cases, strict=True)]
    handles = [
        submit(
            engine, prompt, drafter, session_id=rng.choice("abc"), cache_salt=rng.choice([None, "s"]), sampling=sampling
        )
        for prompt, (_, sampling, drafter) in zip(prompts, cases, strict=True)
    ]
    for expected, handle in zip(alone, handles, strict=True):
        assert same_answer(expected, handle.result())
    assert engine.metrics().num_preemptions > 3
    assert_all_slots_free(engine)


def test_a_salt_shares_the_kv_of_a_common_beginning_and_nothing_else_does(make_engine: MakeEngine) -> None:
    engine = make_engine("llama")
    plain = run(engine, PROMPT, "none")
    assert run(engine, PROMPT, "none", "a").usage.cached_tokens == 0
    assert run(engine, PROMPT, "none", "b").usage.cached_tokens == 0
    assert run(engine, PROMPT, "none", "c", {"cache_salt": "team"}).usage.cached_tokens == 0
    for session, salt in (("d", "team"), (None, "team"), ("a", "team")):
        shared = run(engine, PROMPT, "adaptive", session, {"cache_salt": salt})
        assert shared.usage.cached_tokens == len(PROMPT) - 1
        assert same_answer(plain, shared)
    assert run(engine, PROMPT, "none", None, {"cache_salt": "other"}).usage.cached_tokens == 0
    assert run(engine, PROMPT, "none", None).usage.cached_tokens == 0
    assert_all_slots_free(engine)


def test_parallel_branches_share_their_beginning(make_engine: MakeEngine) -> None:
    engine = make_engine("llama")
    first = run(engine, PROMPT, "none", None, {"cache_salt": "app"})
    endings = [ids_of(f" and {i}") for i in range(5)]
    alone = [run(engine, (*PROMPT, *ending), "none", None, {"cache_salt": "fresh"}) for ending in endings]
    used = in_use(engine)
    options: dict[str, Any] = {"cache_salt": "app", "sampling": {"max_tokens": 48}}
    handles = [submit(engine, (*PROMPT, *ending), "adaptive", **options) for ending in endings]
    outputs = [handle.result() for handle in handles]
    assert all(same_answer(a, b) for a, b in zip(alone, outputs, strict=True))
    assert all(output.usage.cached_tokens >= len(PROMPT) - 1 for output in outputs)
    assert in_use(engine) - used < 5 * (len(PROMPT) // 2)
    assert len(first.token_ids) == 48
    assert_all_slots_free(engine)


@pytest.mark.parametrize("drafter", ["none", "adaptive"])
@pytest.mark.parametrize("num_slots", [None, 260])
def test_several_answers_to_a_prompt_compute_it_once_and_are_those_of_calls_alone(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, drafter: str, num_slots: int | None
) -> None:
    engine = make_engine("llama", max_prefill_tokens=20, max_running=4, kv_cache_tokens=num_slots)
    prompt, count = (*PROMPT, *ids_of("x" * 60)), 6
    samplings = [{"temperature": 1.0, "seed": 2**63 - 3 + i, "max_tokens": 30} for i in range(3)]
    samplings += [{"temperature": 1.0, "seed": i, "max_tokens": 30} for i in range(3)]
    alone = [submit(engine, prompt, "none", sampling=sampling).result() for sampling in samplings]
    read = batches(engine, monkeypatch)
    handles = [submit(engine, prompt, drafter, cache_salt="once", sampling=sampling) for sampling in samplings]
    outputs = [handle.result() for handle in handles]
    assert len({output.token_ids for output in alone}) == count
    assert all(same_answer(a, b) for a, b in zip(alone, outputs, strict=True))
    assert outputs[0].usage.cached_tokens == 0
    assert all(output.usage.cached_tokens == len(prompt) - 1 for output in outputs[1:])
    if num_slots is None:  # else some give way, and read again what is no longer kept
        by_key = {handle.request_id: 0 for handle in handles}
        for batch in read:
            for key, tokens in batch:
                by_key[key] += tokens
        assert sum(by_key.values()) <= len(prompt) + sum(len(output.token_ids) for output in outputs)
    assert_all_slots_free(engine)


def test_one_who_waits_for_a_shared_beginning_keeps_nobody_waiting_and_outlives_who_computes_it(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine("llama", max_prefill_tokens=20)
    prompt = (*PROMPT, *ids_of("y" * 200))
    alone = submit(engine, prompt, "none").result()
    first, second = (submit(engine, prompt, "none", cache_salt="s", request_id=name) for name in ("first", "second"))
    other = submit(engine, PROMPT[:30], "none", sampling={"max_tokens": 1})
    other.result()
    first.close()
    assert same_answer(alone, second.result())
    assert_all_slots_free(engine)


def test_a_long_prompt_keeps_nobody_waiting(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine("llama", max_prefill_tokens=20, max_model_len=512)
    seen = batches(engine, monkeypatch)
    first = started(submit(engine, PROMPT[:30], "none", sampling={"max_tokens": 60, "ignore_eos": True}))
    long = submit(engine, PROMPT * 3, "none", request_id="long", sampling={"max_tokens": 4})
    short = submit(engine, PROMPT[:15], "none", request_id="short", sampling={"max_tokens": 4})
    for handle in (first, long, short):
        handle.result()
    together = [dict(batch) for batch in seen if any(name == "long" for name, _ in batch)]
    assert all(first.request_id in batch for batch in together[:10])  # decodes on beside the prompt
    assert max(sum(batch.values()) for batch in together) <= 20 + 2
    last_of_long = max(i for i, batch in enumerate(together) if batch["long"] > 1)
    assert any("short" in batch for batch in together[: last_of_long - 5])


def test_a_full_queue_is_said_at_once_and_harms_nobody() -> None:
    gate = threading.Event()

    def reply(_: str) -> str:
        gate.wait(30)
        return "done"

    with scripted_engine(reply, EngineConfig(max_running=1, max_waiting=2)) as engine:
        handles = [engine.stream(GenerationRequest(prompt=f"{i}")) for i in range(3)]
        with pytest.raises(EngineBusyError, match="3 run or wait") as caught:
            engine.stream(GenerationRequest(prompt="x"), wait=False)
        assert caught.value.num_requests == 3
        gate.set()
        assert [handle.result().text for handle in handles] == ["done"] * 3
        assert engine.generate(GenerationRequest(prompt="x")).text == "done"
        assert_all_slots_free(engine)


def test_an_answer_that_takes_too_long_ends_with_what_is_written(make_engine: MakeEngine) -> None:
    engine = make_engine("llama", max_running=1)
    endless = {"max_tokens": 300, "ignore_eos": True}
    whole = run(engine, PROMPT, "none", **endless)
    seconds = whole.timing.total_s
    handles = [submit(engine, PROMPT, "none", timeout_s=seconds / 3, sampling=endless) for _ in range(2)]
    for handle in handles:  # the second one waits for its turn until its time is over
        output = handle.result()
        assert output.finish_reason == "timeout"
        assert len(output.token_ids) < 300
        assert output.token_ids == whole.token_ids[: len(output.token_ids)]
    assert same_answer(whole, run(engine, PROMPT, "none", **endless))
    assert_all_slots_free(engine)


def test_a_batch_drafts_less_than_its_rows_would_alone() -> None:
    text = "".join(f"{i}, " for i in range(100))
    cost = tuple((width, 1.0 + 0.05 * (width - 1)) for width in (1, 2, 64, 256))
    config = EngineConfig(step_cost=cost, drafter=AdaptiveDrafter())

    def drafted(count: int) -> float:
        with scripted_engine(lambda _: text, config) as engine:
            handles = [engine.stream(GenerationRequest(prompt=text)) for _ in range(count)]
            outputs = [handle.result() for handle in handles]
            assert all(output.text == text for output in outputs)
            return sum(max(output.draft_stats.accepted_lengths) for output in outputs) / count

    assert drafted(8) < drafted(1)


@pytest.mark.slow
def test_threads_that_cancel_at_random_for_a_minute_lose_nothing(make_engine: MakeEngine) -> None:
    soak(make_engine("llama", kv_cache_tokens=1024, max_running=8, max_prefill_tokens=64), 64, 60.0)


def test_threads_that_cancel_at_random_lose_nothing(make_engine: MakeEngine) -> None:
    soak(make_engine("llama", kv_cache_tokens=600, max_running=6, max_prefill_tokens=64), 16, 4.0)


def soak(engine: Engine, num_threads: int, seconds: float) -> None:
    expected = {i: run(engine, PROMPT[i:], "none", max_tokens=40) for i in range(8)}
    until, failures = time.monotonic() + seconds, []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            while time.monotonic() < until:
                i = rng.randrange(8)
                handle = submit(
                    engine,
                    PROMPT[i:],
                    rng.choice(["none", "adaptive", "copyspec"]),
                    session_id=rng.choice([None, "a", "b"]),
                    cache_salt=rng.choice([None, "s"]),
                )
                if rng.random() < 0.5:
                    chunks = islice(handle, rng.randrange(1, 4))
                    tokens = tuple(token for chunk in chunks for token in chunk.token_ids)
                    assert tokens == expected[i].token_ids[: len(tokens)]
                    if rng.random() < 0.5:
                        handle.close()
                    else:
                        engine.cancel(handle.request_id)
                else:
                    assert same_answer(expected[i], handle.result())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    deadline = time.monotonic() + 10
    while (loop_of(engine).requests or loop_of(engine).core.scheduler) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert_all_slots_free(engine)


def test_what_requests_hold_is_told_and_nothing_is_left_of_it(make_engine: MakeEngine) -> None:
    engine = make_engine("llama", max_running=2)
    handles = [started(submit(engine, PROMPT, sampling={"max_tokens": 60, "ignore_eos": True})) for _ in range(2)]
    handles.append(submit(engine, PROMPT, sampling={"max_tokens": 4}))
    held = held_by(engine)
    assert (held.places, held.running, held.waiting) == (3, 2, 1)
    assert held.slots >= 2 * len(PROMPT)
    for handle in handles:
        handle.close()
    assert not any(held_by(engine))
    assert_all_slots_free(engine)
