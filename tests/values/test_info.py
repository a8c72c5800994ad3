"""What an engine says of itself is what happened."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from copyspec_engine import Engine, EngineStoppedError, GenerationRequest, SamplingParams
from copyspec_engine.testing import loop_of
from tests.loop.test_lossless import PROMPT, run


def test_counts_are_those_of_the_answers(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine("llama", kv_cache_tokens=2048)
    before = engine.metrics()
    assert before.num_kv_slots == 2048
    assert before.prefix_hit_rate == before.tokens_per_forward == before.kv_slots_in_use == 0.0
    outputs = [
        run(engine, PROMPT, "adaptive", "a", max_tokens=100),
        run(engine, PROMPT, "copyspec", "a"),
        run(engine, PROMPT, "adaptive", "b", {"prediction": engine.decode(PROMPT)}),
    ]
    after = engine.metrics()
    assert after.prompt_tokens == 3 * len(PROMPT)
    assert after.cached_tokens == len(PROMPT) - 1
    assert after.prefix_hit_rate == pytest.approx(after.cached_tokens / after.prompt_tokens)
    assert after.completion_tokens == sum(len(output.token_ids) for output in outputs)
    passes = sum(output.draft_stats.num_forward_passes for output in outputs)
    assert after.tokens_per_forward == pytest.approx(after.completion_tokens / passes)
    assert after.draft_tokens == sum(output.draft_stats.num_draft_tokens for output in outputs)
    accepted = [output.draft_stats.num_accepted_tokens for output in outputs]
    assert sum(after.accepted_by_source.values()) == sum(accepted)
    assert after.accepted_by_source["block"] == accepted[1] > 0
    assert after.accepted_by_source.keys() <= {
        "prompt",
        "answer",
        "prediction",
        "frequent",
        "grammar",
        "block",
        "recycled",
    }
    assert after.finished == {"length": 3}
    assert (after.num_running, after.num_waiting, after.num_kv_slots_running, after.num_sessions) == (0, 0, 0, 2)
    assert after.num_kv_slots_cached == sum(len(row.slots) for row in loop_of(engine).core.kv.cache.sequences)
    assert after.step_cost == engine.info.step_cost


def test_running_and_waiting_requests_are_seen(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine("llama", max_running=1)
    endless = SamplingParams(max_tokens=400, ignore_eos=True)
    handles = [engine.stream(GenerationRequest(prompt="the cat", sampling=endless)) for _ in range(3)]
    next(handles[0])
    now = engine.metrics()
    assert (now.num_running, now.num_waiting) == (1, 2)
    assert 0 < now.kv_slots_in_use < 1
    for handle in handles:
        engine.cancel(handle.request_id)
        handle.result()
    assert engine.metrics().finished == {"cancelled": 3}
    engine.close()
    with pytest.raises(EngineStoppedError):
        engine.metrics()
