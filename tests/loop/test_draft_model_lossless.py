"""Drafting with a draft model gives the tokens of plain decoding, in any mixture of what a call may be."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from transformers import PreTrainedModel

from copyspec_engine import (
    AdaptiveDrafter,
    CopySpecDrafter,
    DrafterConfig,
    DraftModelDrafter,
    Engine,
    GenerationOutput,
    GenerationRequest,
    Grammar,
    SamplingParams,
)
from tests.conftest import build_model
from tests.loop.test_draft_model import MakeDrafted, assert_no_draft_rows_left, make_drafted, perturbed
from tests.loop.test_lossless import PROMPT, random_case, same_answer

__all__ = ["make_drafted"]


def draft_of(name: str) -> PreTrainedModel:
    """The model itself, one that often agrees with it, or one that never does."""
    return perturbed(0.03) if name == "near" else build_model("llama") if name == "same" else build_model("qwen2", 7)


def asking(rng: random.Random, drafter: AdaptiveDrafter | CopySpecDrafter) -> DrafterConfig:
    """The drafter, or one that only asks the draft model, which it may ask in any way that it has."""
    use = rng.choice(("never", "alone", "after-copies", "in-tree"))
    if use == "alone":
        return DraftModelDrafter()
    if use == "in-tree" and isinstance(drafter, CopySpecDrafter):
        return drafter
    return drafter.model_copy(update={"draft_model": use})


GRAMMARS = (Grammar(regex="[a-z ]{3,12}"), Grammar(choice=("the cat sat", "the mat")), Grammar(regex="(ab|c)*d?"))


@pytest.mark.parametrize("draft", ["same", "near", "other"])
@pytest.mark.parametrize("max_running", [1, 16], ids=["single", "batch"])
def test_random_cases_drafting_on_equals_off(make_drafted: MakeDrafted, draft: str, max_running: int) -> None:
    """Every rule with sampling, stop texts, grammars, sessions, shared KV and cancels, in any mixture: 1,050 cases."""
    count = 50 if max_running == 1 else 300
    rng = random.Random(f"{draft} {max_running}")
    engine = make_drafted(
        draft_of(draft), kv_cache_tokens=900, max_prefill_tokens=64, max_running=max_running, max_waiting=2 * count
    )
    cases = []
    for _ in range(count):
        prompt, sampling, drafter = random_case(rng, longest=rng.choice((6, 6, 30)))
        sampling["max_tokens"] = rng.randrange(1, 14)
        options: dict[str, Any] = {"prompt_token_ids": (*PROMPT[: rng.choice((15, 60))], *prompt)}
        if rng.random() < 0.2:
            sampling.pop("ignore_eos", None)
            options["grammar"] = rng.choice(GRAMMARS)
        cases.append((options, sampling, drafter))
    plain = answers(engine, [(*case[:2], {"drafter": "none"}) for case in cases])
    cut = []
    for i, (output, (_, sampling, _)) in enumerate(zip(plain, cases, strict=True)):
        if len(output.text) > 2 and rng.random() < 0.3:
            at = rng.randrange(len(output.text))
            sampling["stop"] = (output.text[at : at + rng.randrange(1, 4)], "never written")
            cut.append(i)
    for i, output in zip(cut, answers(engine, [(*cases[i][:2], {"drafter": "none"}) for i in cut]), strict=True):
        plain[i] = output
    ways = []
    for options, sampling, drafter in cases:
        extra: dict[str, Any] = {"drafter": asking(rng, drafter)}
        extra |= {"cache_salt": rng.choice("xy")} if rng.random() < 0.3 else {}
        ways.append((options, sampling, extra | {"session_id": rng.choice([*"abcd", None])}))
    cancelled = set(rng.sample(range(count), count // 10))
    drafted = answers(engine, ways, cancelled)
    for i, (expected, got) in enumerate(zip(plain, drafted, strict=True)):
        if got.finish_reason == "cancelled":
            assert expected.token_ids[: len(got.token_ids)] == got.token_ids, ways[i]
        else:
            assert same_answer(expected, got), ways[i]
    now = engine.metrics()
    accepted = now.accepted_by_source
    assert accepted.get("draft_model", 0) >= {"same": count / 4, "near": count / 8, "other": 0}[draft]
    assert sum(accepted.values()) > accepted.get("draft_model", 0)
    assert len(cut) > count / 10
    assert now.finished["cancelled"] > 0
    assert engine.info.draft_model_error is None
    assert_no_draft_rows_left(engine)


def answers(
    engine: Engine,
    cases: Sequence[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]],
    cancelled: Sequence[int] | set[int] = (),
) -> list[GenerationOutput]:
    """Everything at once; some are cancelled, by turns at their first chunk and while they wait."""
    handles = [
        engine.stream(GenerationRequest(**options, **extra, sampling=SamplingParams(**sampling)))
        for options, sampling, extra in cases
    ]
    for turn, i in enumerate(sorted(cancelled)):
        if turn % 2 == 0:
            next(handles[i])
        engine.cancel(handles[i].request_id)
    return [handle.result() for handle in handles]
