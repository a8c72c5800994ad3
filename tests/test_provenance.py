"""Where an answer's copied tokens came from is true to the token."""

from __future__ import annotations

import random

import pytest

from copyspec_engine import (
    AdaptiveDrafter,
    Copy,
    CopySpecDrafter,
    Engine,
    EngineConfig,
    GenerationOutput,
    GenerationRequest,
)
from copyspec_engine.testing import scripted_engine

DOCUMENT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 2
USER = "user"


def messages(*texts: str) -> tuple[dict[str, str], ...]:
    return tuple({"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts))


def source_tokens(
    engine: Engine, output: GenerationOutput, copy: Copy, session: str, prediction: str = ""
) -> tuple[int, ...]:
    """The tokens at the place that a copy names."""
    count = copy.stop - copy.start
    assert copy.offset is not None
    if copy.source == "prompt":
        text = output.prompt_token_ids
    elif copy.source == "answer":
        assert copy.offset < copy.start
        text = output.token_ids
    elif copy.source == "prediction":
        text = tuple(engine.encode(prediction, special_tokens=False))
    else:
        text = next(text.token_ids for text in engine.memory(session).texts() if text.number == copy.stored_text)
    return list(text[copy.offset : copy.offset + count])


def check(engine: Engine, output: GenerationOutput, session: str = "s", prediction: str = "") -> None:
    """The laws that hold for every answer."""
    end = 0
    for copy in output.copies:
        assert end <= copy.start < copy.stop <= len(output.token_ids)
        end = copy.stop
        assert 0 <= copy.text_start <= copy.text_stop <= len(output.text)
        if copy.source in ("grammar", "frequent"):
            assert copy.offset is None
        elif copy.source != "pool":
            assert source_tokens(engine, output, copy, session, prediction) == list(
                output.token_ids[copy.start : copy.stop]
            )
    assert sum(copy.stop - copy.start for copy in output.copies) == output.draft_stats.num_accepted_tokens
    written = "".join(output.text[copy.text_start : copy.text_stop] for copy in output.copies)
    assert written == "".join(segment.text for segment in output.segments if segment.copied)


@pytest.mark.parametrize("drafter", [AdaptiveDrafter(), CopySpecDrafter()])
def test_every_copied_token_is_named_once_and_stands_where_it_is_said_to(
    drafter: AdaptiveDrafter | CopySpecDrafter,
) -> None:
    chance = random.Random(0)
    words = ["fox", "über", "dog", "the", "quick", "日本", "brown", "jumps", "\n", "a"]
    for _ in range(15):
        text = " ".join(chance.choices(words, k=60))
        replies = [
            text[chance.randrange(40) : chance.randrange(100, 300)] + chance.choice(["", text]) for _ in range(4)
        ]
        with scripted_engine(replies, EngineConfig(drafter=drafter)) as engine:
            history: list[str] = []
            for turn in range(4):
                if chance.random() < 0.3:
                    history.clear()
                prediction = text if chance.random() < 0.3 else None
                history.append(chance.choice([text, "again", "what?"]))
                output = engine.generate(
                    GenerationRequest(messages=messages(*history), session_id="s", prediction=prediction)
                )
                assert output.text == replies[turn]
                check(engine, output, prediction=prediction or "")
                history.append(output.text)
