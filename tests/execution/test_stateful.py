"""Models that cannot take a token back: no drafts, no reuse, and the tokens of `generate` all the same."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from copyspec_engine import (
    Engine,
    EngineConfig,
    GenerationRequest,
    RequestFailedError,
    SamplingParams,
    UnsupportedModelError,
)
from copyspec_engine.execution import stateful
from copyspec_engine.execution.loading import prepare
from copyspec_engine.execution.stateful import StatefulRunner
from copyspec_engine.testing import ByteTokenizer, loop_of
from tests.conftest import assert_all_slots_free
from tests.execution.architectures import STATEFUL, build_model
from tests.loop.test_lossless import PROMPT, generate, ids_of, run

MakeEngine = Callable[..., Engine]
PROMPTS = [PROMPT[:n] for n in (5, 60, 33, 90, 1, 47)]


def runner_of(engine: Engine) -> StatefulRunner:
    runner = loop_of(engine).model.runner
    assert isinstance(runner, StatefulRunner)
    return runner


def states(engine: Engine) -> int:
    return runner_of(engine).num_rows


@pytest.mark.parametrize("name", sorted(STATEFUL))
def test_tokens_equal_generate_over_turns_and_nothing_is_drafted(
    make_engine: MakeEngine, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(name, max_prefill_tokens=37)
    assert "runs without drafting" in caplog.text
    assert "could not be taken back" in (engine.info.drafting_error or "")
    assert engine.info.step_cost[0][0] == 1
    prompt = PROMPT
    for _ in range(2):
        expected = generate(name, prompt, 24)
        assert len(set(expected)) > 2, "a model that repeats itself proves nothing"
        got = run(engine, prompt, "adaptive", session="chat", max_tokens=24)
        assert list(got.token_ids) == expected
        assert got.draft_stats.num_draft_tokens == got.usage.cached_tokens == 0
        prompt = (*prompt, *expected, *ids_of(" the cat sat on"))
    assert states(engine) == 0
    assert_all_slots_free(engine)


@pytest.mark.parametrize("name", ["mamba", "qwen3_next"])
def test_requests_in_flight_together_answer_as_if_alone(make_engine: MakeEngine, name: str) -> None:
    engine = make_engine(name, max_running=4, max_prefill_tokens=16)
    requests = [GenerationRequest(prompt_token_ids=p, sampling=SamplingParams(max_tokens=20)) for p in PROMPTS]
    handles = [engine.stream(request) for request in requests]
    for prompt, handle in zip(PROMPTS, handles, strict=True):
        assert list(handle.result().token_ids) == generate(name, prompt, 20)
    assert states(engine) == 0
    assert_all_slots_free(engine)


def test_a_cancelled_request_leaves_no_state(make_engine: MakeEngine) -> None:
    engine = make_engine("mamba2")
    request = GenerationRequest(prompt_token_ids=PROMPT, sampling=SamplingParams(max_tokens=300, ignore_eos=True))
    stream = engine.stream(request)
    next(stream)
    held: list[int] = []
    runner = loop_of(engine).model.runner
    release = runner.release
    runner.release = lambda key: (held.append(states(engine)), release(key))  # type: ignore[assignment, method-assign, func-returns-value]
    engine.cancel(request.request_id)
    assert stream.result().finish_reason == "cancelled"
    assert held == [1]
    assert states(engine) == 0
    assert_all_slots_free(engine)


def test_a_request_that_fails_leaves_no_state_and_the_others_in_peace(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failed step is run again row by row: rows that had read their tokens must not read them twice."""
    engine = make_engine("jamba")
    read = stateful._State.read

    def explode(state: Any, ids: Sequence[int]) -> torch.Tensor:
        if state.num_read + len(ids) > len(PROMPTS[1]) + 5:  # however it is read
            raise RuntimeError("boom")
        return read(state, ids)

    monkeypatch.setattr(stateful._State, "read", explode)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    handles = [engine.stream(GenerationRequest(prompt_token_ids=prompt, sampling=params)) for prompt in PROMPTS[:3]]
    for index in (0, 2):
        expected = generate("jamba", PROMPTS[index], 20)
        assert list(handles[index].result().token_ids)[: len(expected)] == expected
    with pytest.raises(RequestFailedError, match="boom"):
        handles[1].result()
    assert states(engine) == 0
    assert_all_slots_free(engine)


def test_a_pass_that_fails_once_is_run_again_on_the_whole_text(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine("jamba")
    read, failures = stateful._State.read, [5, 9, 12]

    def stumble(state: Any, ids: Sequence[int]) -> torch.Tensor:
        logits = read(state, ids)
        if failures and state.num_read == len(PROMPTS[1]) + failures[0]:
            failures.pop(0)
            raise RuntimeError("after the state has changed")
        return logits

    monkeypatch.setattr(stateful._State, "read", stumble)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    handles = [engine.stream(GenerationRequest(prompt_token_ids=prompt, sampling=params)) for prompt in PROMPTS[:3]]
    for prompt, handle in zip(PROMPTS, handles, strict=False):
        expected = generate("jamba", prompt, 20)
        assert list(handle.result().token_ids)[: len(expected)] == expected
    assert not failures


def test_a_model_that_reads_only_the_first_tokens_at_once_gets_its_prompt_whole(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lengths: list[int] = []
    engine = make_engine("mamba", max_prefill_tokens=10)
    assert "reads each prompt in one pass" in caplog.text
    read = stateful._State.read

    def noted(state: Any, ids: Sequence[int]) -> torch.Tensor:
        lengths.append(len(ids))
        return read(state, ids)

    monkeypatch.setattr(stateful._State, "read", noted)
    run(engine, PROMPT, "none", max_tokens=4, ignore_eos=True)
    assert lengths == [len(PROMPT), 1, 1, 1]


def test_a_state_that_does_not_go_on_right_is_refused() -> None:
    model = build_model("rwkv")
    original = model.forward
    model.forward = lambda *args, state=None, **kwargs: original(*args, **kwargs)  # forgets what came before
    with pytest.raises(UnsupportedModelError, match="other logits from its state than in one piece"):
        prepare(model, ByteTokenizer(), EngineConfig(model="m"))


def test_a_model_without_drafting_is_not_measured(make_engine: MakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine("jamba", step_cost="measured")
    assert engine.info.step_cost == ()
    assert engine.info.kv_bytes_per_token == 2 * 2 * 12 * 4  # one attention layer of two
    with caplog.at_level(logging.INFO):
        assert run(engine, PROMPT, "adaptive", max_tokens=4).usage.completion_tokens == 4


def test_an_id_that_is_free_again_is_not_met_by_the_request_that_had_it(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who gives up a request frees its id before the loop has ended it; the next one must come in behind that end."""
    engine = make_engine("mamba")
    prompt = ids_of("once upon a time there was a king who")
    alone, loop = run(engine, prompt, "none", max_tokens=12, ignore_eos=True), loop_of(engine)
    take_off, asked = loop._take_off, threading.Event()

    def put_aside(request: Any) -> Any:
        found = take_off(request)
        if threading.current_thread() is closing:
            asked.wait(0.3)  # another thread may come in between, if anything lets it
        return found

    monkeypatch.setattr(loop, "_take_off", put_aside)
    given_up = GenerationRequest(
        prompt_token_ids=ids_of("the cat sat on the mat and"),
        sampling=SamplingParams(max_tokens=200, ignore_eos=True),
        request_id="same",
    )
    first = engine.stream(given_up)
    next(first)
    closing = threading.Thread(target=first.close)
    closing.start()
    while "same" in loop.requests:
        time.sleep(0.001)
    again = GenerationRequest(
        prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=12, ignore_eos=True), request_id="same"
    )
    second = engine.stream(again)
    for _ in range(5):
        next(second)
    asked.set()
    assert second.result().token_ids == alone.token_ids
    closing.join()
    assert states(engine) == 0
