"""An answer becomes a record that says the same of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from copyspec_engine import ConfigError, DraftStats, GenerationOutput, GenerationRequest, NoDrafter, Timing
from copyspec_engine.lab.evaluation.records import TurnRecord
from copyspec_engine.lab.evaluation.turns import turn_record
from copyspec_engine.testing import scripted_engine

DOCUMENT = "The quick brown fox jumps over the lazy dog, and the dog, being lazy, does not mind this at all; nor do I."
MESSAGES = ({"role": "user", "content": DOCUMENT}, {"role": "user", "content": "Repeat the document."})


def answer(*, plain: bool = False, explain: bool = True) -> GenerationOutput:
    request = GenerationRequest(messages=MESSAGES, drafter=NoDrafter() if plain else None, explain=explain)
    with scripted_engine([f"Sure. {DOCUMENT}"]) as engine:
        return engine.generate(request)


def record_of(output: GenerationOutput) -> TurnRecord:
    return turn_record("81", "writing", 2, "adaptive", MESSAGES, output)


def test_the_record_counts_what_the_answer_counts() -> None:
    output = answer()
    record = record_of(output)
    assert (record.task, record.category, record.turn, record.writer) == ("81", "writing", 2, "adaptive")
    assert (record.messages, record.text, record.token_ids) == (MESSAGES, output.text, output.token_ids)
    assert (record.prompt_tokens, record.num_tokens) == (output.usage.prompt_tokens, output.usage.completion_tokens)
    assert record.forward_passes == len(record.accepted_lengths) == len(record.draft_lengths)
    assert sum(record.draft_lengths) == output.draft_stats.num_draft_tokens
    assert 0 < record.num_accepted == output.draft_stats.num_accepted_tokens < record.num_tokens


def test_accepted_tokens_by_source_are_all_of_them() -> None:
    record = record_of(answer())
    assert sum(record.accepted_by_source.values()) == record.num_accepted
    assert record.accepted_by_source["prompt"] > len(DOCUMENT) / 2


def test_the_copied_spans_point_into_the_messages() -> None:
    record = record_of(answer())
    copied = [span for span in record.copies if span.get("message") == 0]
    assert copied
    for span in copied:
        there = MESSAGES[0]["content"][span["offset"] :]
        assert there.startswith(record.text[span["start"] : span["stop"]])


def test_plain_decoding_copies_nothing() -> None:
    record = record_of(answer(plain=True))
    assert (record.num_accepted, record.accepted_by_source, record.copies) == (0, {}, ())
    assert record.forward_passes == record.num_tokens


def test_an_answer_that_was_not_explained_has_no_spans() -> None:
    record = record_of(answer(explain=False))
    assert record.num_accepted
    assert not record.copies


def test_seconds_count_from_the_first_forward_pass() -> None:
    record = record_of(replace(answer(), timing=Timing(queue_s=1.0, ttft_s=1.5, total_s=4.5)))
    assert (record.prefill_s, record.decode_s, record.seconds) == (0.5, 3.0, 3.5)


def test_an_answer_without_a_token_is_refused() -> None:
    cut = replace(answer(), text="", token_ids=(), draft_stats=DraftStats(), finish_reason="timeout")
    with pytest.raises(ConfigError, match=r"Got turn 2 of task 81 without a token \(finish_reason='timeout'\)"):
        record_of(cut)


def test_the_record_is_one_line_of_a_run() -> None:
    record = record_of(answer())
    line = record.model_dump_json()
    assert "\n" not in line
    assert TurnRecord.model_validate_json(line) == record
