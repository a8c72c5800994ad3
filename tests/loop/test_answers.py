"""What an answer says of its end and its counts, whatever was drafted."""

from __future__ import annotations

from typing import Any

import pytest

from copyspec_engine import GenerationOutput, GenerationRequest, Grammar, Usage
from copyspec_engine.testing import scripted_engine

DOCUMENT = "".join(f"line {i}: value {i * i}\n" for i in range(20))
END = 257
DRAFTERS = ("adaptive", "copyspec", "none")


def asked(reply: str, drafter: str, **options: Any) -> GenerationOutput:
    request = {"messages": [{"role": "user", "content": DOCUMENT}], "drafter": drafter, **options}
    with scripted_engine([reply]) as engine:
        return engine.generate(GenerationRequest(**request))


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize(
    ("options", "finish_reason", "ended_by", "stop_reason"),
    [
        ({}, "stop", "eos", None),
        ({"sampling": {"stop": ["zzz", "value 16"]}}, "stop", "stop_text", "value 16"),
        ({"sampling": {"stop": ["value 9\nl", "value 9"]}}, "stop", "stop_text", "value 9"),
        ({"sampling": {"stop": ["<|im_end|>"]}}, "stop", "stop_text", "<|im_end|>"),
        ({"sampling": {"stop_token_ids": [ord("5"), END]}}, "stop", "stop_token", ord("5")),
        ({"sampling": {"stop_token_ids": [END]}}, "stop", "stop_token", END),
        ({"sampling": {"max_tokens": 40, "stop": ["zzz"]}}, "length", None, None),
        ({"grammar": Grammar(choice=(DOCUMENT, "no"))}, "stop", "grammar", None),
        ({"grammar": Grammar(regex=r"(?s).*")}, "stop", "eos", None),
    ],
)
def test_an_answer_says_what_ended_it(
    drafter: str, options: dict[str, Any], finish_reason: str, ended_by: str | None, stop_reason: str | int | None
) -> None:
    output = asked(DOCUMENT, drafter, **options)
    assert (output.finish_reason, output.ended_by, output.stop_reason) == (finish_reason, ended_by, stop_reason)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize(
    ("reply", "num_reasoning"),
    [
        ("<think>\nhm, so\n</think>\n\nLet me see.", len("<think>\nhm, so")),
        (f"<think>{DOCUMENT}</think>{DOCUMENT}", len(f"<think>{DOCUMENT}") - 1),
        ("<think>never ends", len("<think>never ends")),
        (DOCUMENT, 0),
    ],
)
def test_reasoning_is_counted_up_to_its_last_token(drafter: str, reply: str, num_reasoning: int) -> None:
    assert asked(reply, drafter, parse_reply=True).usage.reasoning_tokens == num_reasoning
    assert asked(reply, drafter).usage.reasoning_tokens == 0


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_prediction_is_counted_by_what_the_answer_repeats_of_it(drafter: str) -> None:
    edited = DOCUMENT.replace("line 7: value 49", "line 7: what was seven").replace("line 12: value 144\n", "")
    usage = asked(edited, drafter, prediction=DOCUMENT).usage
    lost = len("value 49") + len("line 12: value 144\n")
    assert usage.accepted_prediction_tokens + usage.rejected_prediction_tokens == len(DOCUMENT)
    assert lost <= usage.rejected_prediction_tokens <= lost + 3
    assert asked(DOCUMENT, drafter).usage == Usage(usage.prompt_tokens, 0, len(DOCUMENT) + 1)


def test_a_stream_names_sources_but_not_those_of_strangers() -> None:
    with scripted_engine([DOCUMENT] * 3) as engine:
        for session_id, source in (("a", "answer"), ("b", "pool"), ("b", "answer")):
            messages = [{"role": "user", "content": "Go on."}]
            request = GenerationRequest(messages=messages, session_id=session_id, memory_pool="team")
            chunks = list(engine.stream(request))
            output = chunks[-1].output
            assert output is not None
            pieces = [segment for chunk in chunks for segment in chunk.segments]
            assert "".join(segment.text for segment in pieces) == output.text == DOCUMENT
            copied = "".join(segment.text for segment in pieces if segment.copied)
            assert copied == "".join(segment.text for segment in output.segments if segment.copied)
            told = {segment.source for segment in pieces if segment.copied}
            assert source in told
            assert "prompt" not in told  # nothing of the answer stands there
