"""Edits: their words, what they make of a text, and whether an answer made them; the chains that ship."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from copyspec_engine import ConfigError, Engine
from copyspec_engine.cli.demo import chain
from copyspec_engine.cli.demo.chain import ChainTask, chain_for
from copyspec_engine.cli.demo.edits import EditStep, Outcome
from copyspec_engine.cli.demo.frameworks import ask_through
from copyspec_engine.cli.demo.run import Chain
from copyspec_engine.cli.documents import CHAT_DOCUMENT, Document, load_document, shipped_folder, shipped_names

TEXT = "a = 1\nb = 2\nc = 3"
REPLACE = EditStep("replace", {"old": "2", "new": "5"})


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (EditStep("append", {"text": "z"}), "a = 1\nb = 2\nc = 3\nz"),
        (EditStep("prepend", {"text": "z"}), "z\na = 1\nb = 2\nc = 3"),
        (REPLACE, "a = 1\nb = 5\nc = 3"),
        (EditStep("set", {"key": "a", "value": "9"}), "a = 9\nb = 2\nc = 3"),
        (EditStep("delete_first", {}), "b = 2\nc = 3"),
        (EditStep("delete_last", {}), "a = 1\nb = 2"),
        (EditStep("repeat", {}), TEXT),
    ],
)
def test_each_edit_says_what_it_does_and_knows_its_perfect_answer(step: EditStep, expected: str) -> None:
    assert step.apply(TEXT) == expected
    assert all(text in step.instruction for text in step.named.values())
    assert step.judge(TEXT, expected) == Outcome(made=True, words_off=0)
    if step.edit != "repeat":
        untouched = step.judge(TEXT, TEXT)
        assert not untouched.made
        assert untouched.words_off > 0


@pytest.mark.parametrize(
    ("after", "outcome"),
    [
        ("a = 1\nb = 5\nc = 4", Outcome(made=True, words_off=1)),
        ("a = 1\nb = 5\nc = 3\nb = 2", Outcome(made=False, words_off=3)),
        ("a = 1\nb = 5", Outcome(made=True, words_off=3)),
        ("I cannot do that.", Outcome(made=False, words_off=9)),
        ("", Outcome(made=False, words_off=9)),
    ],
)
def test_an_answer_is_told_what_it_changed_besides_the_edit(after: str, outcome: Outcome) -> None:
    assert REPLACE.judge(TEXT, after) == outcome


def test_a_text_without_the_old_words_counts_as_no_edit() -> None:
    """The turns before may have lost them: nothing is replaced then, even where the new words happen to be there."""
    assert not REPLACE.judge("a = 5", "a = 5").made


def test_a_step_may_have_words_of_its_own() -> None:
    step = EditStep("replace", {"old": "2", "new": "5"}, "It is {new}, not {old}.")
    assert step.instruction == "It is 5, not 2."


@pytest.mark.parametrize("name", [*shipped_names(), "own.txt"])
@pytest.mark.parametrize("model", ["bundled", "any-chat-model"])
def test_every_chain_has_five_steps_or_more_and_each_finds_what_it_names(name: str, model: str) -> None:
    document = load_document(name) if name in shipped_names() else Document(name, "One line.\nAnd another one.")
    task = chain_for(document, model)
    assert len(task.steps) >= 5
    text = document.text
    for step in task.steps:
        changed = step.apply(text)
        assert (changed == text) == (step.edit == "repeat"), step
        assert step.judge(text, changed) == Outcome(made=True, words_off=0)
        text = changed


def test_a_chat_model_gets_each_text_in_a_request_of_its_own_behind_the_worked_examples() -> None:
    task = ChainTask((REPLACE, EditStep("repeat", {})), ({"role": "system", "content": "Edit."},))
    first, second = task.messages("T0", ()), task.messages("T0", ("T1",))
    assert [message["role"] for message in first] == [message["role"] for message in second] == ["system", "user"]
    assert first[-1]["content"] == 'Replace "2" with "5".\n\nT0'
    assert second[-1]["content"] == "Repeat the document.\n\nT1"


def test_the_bundled_model_gets_one_growing_talk() -> None:
    task = ChainTask((REPLACE, EditStep("repeat", {})), as_talk=True)
    talk = task.messages("T0", ("T1",))
    assert [message["role"] for message in talk] == ["user", "user", "assistant", "user"]
    assert [message["content"] for message in talk] == ["T0", 'Replace "2" with "5".', "T1", "Repeat the document."]


@pytest.mark.parametrize("example", json.loads((shipped_folder() / "chains.json").read_text())["chat"]["examples"])
def test_every_worked_example_changes_its_text(example: dict[str, str]) -> None:
    assert example["answer"] != example["text"]
    assert set(example) == {"ask", "text", "answer"}


@pytest.mark.parametrize("row", [{"edit": "sing"}, {"edit": "replace", "old": "2"}, {"edit": "append", "ask": "{x}"}])
def test_a_broken_step_is_told(row: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="is unknown or missing"):
        chain._step(row)


@pytest.mark.real_model
@pytest.mark.slow
def test_a_real_chat_model_makes_most_edits_of_the_letter_through_langchain(smollm2: Engine) -> None:
    document = load_document(CHAT_DOCUMENT)
    task = chain_for(document, "smollm2")
    with Chain(smollm2, ask_through("langchain", smollm2), task, document, compare=False) as rewriting:
        turns = rewriting.run(Console(quiet=True))
    assert all(turn.identical for turn in turns)
    assert sum(turn.outcome.made for turn in turns) > len(turns) / 2
    assert sum(turn.answer.tokens for turn in turns) > 5 * sum(turn.answer.forward_passes for turn in turns)
