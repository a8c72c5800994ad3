"""Answers taken apart: whatever the pieces they come in, the parts are those of the whole."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from copyspec_engine import GenerationRequest, Grammar, InvalidToolCall, Reply, ReplyDelta, SamplingParams, ToolCall
from copyspec_engine.chat.formats import ChatFormat, find_chat_format
from copyspec_engine.chat.reply import Form, ReplyParser
from copyspec_engine.testing import scripted_engine

HERMES = find_chat_format("<tool_call>")
REASONING = find_chat_format("<think> <tool_call>")
ADD = {"type": "function", "function": {"name": "add"}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, "}"]}}\n</tool_call>'


def parse(
    text: str,
    prompt: str = "<|im_start|>assistant\n",
    cut: int | None = None,
    chat_format: ChatFormat = REASONING,
    tools: Sequence[dict[str, Any]] = (ADD,),
    form: Form = "free",
) -> tuple[Reply, list[ReplyDelta]]:
    """The reply and all deltas, of a text in random pieces, or in one."""
    parser, rng, deltas = ReplyParser(chat_format, prompt, tools, form=form), random.Random(cut), []
    while text:
        size = len(text) if cut is None else rng.randint(1, 6)
        deltas += parser.feed(text[:size])
        text = text[size:]
    reply, last = parser.finish()
    return reply, deltas + last


def joined(deltas: list[ReplyDelta]) -> tuple[str, str, list[tuple[str | None, str]]]:
    """Text, reasoning and (name, arguments) of each call that the deltas add up to."""
    calls: dict[int, tuple[str | None, str]] = {}
    for delta in (delta for delta in deltas if delta.kind == "tool_call"):
        name, arguments = calls.get(delta.index, (delta.name, ""))
        calls[delta.index] = name, arguments + delta.text
    texts = ("".join(delta.text for delta in deltas if delta.kind == kind) for kind in ("text", "reasoning"))
    return (*texts, list(calls.values()))  # type: ignore[return-value]


@pytest.mark.parametrize("cut", [None, *range(20)])
def test_text_reasoning_and_calls_come_apart(cut: int | None) -> None:
    reply, deltas = parse(f"<think>\nhm, so\n</think>\n\nLet me see.\n{CALL}\n{CALL}", cut=cut)
    assert (reply.text, reply.reasoning, reply.invalid_tool_calls) == ("Let me see.", "hm, so", ())
    assert [(call.name, call.arguments) for call in reply.tool_calls] == [("add", {"a": 1, "b": [2, "}"]})] * 2
    assert len({call.id for call in reply.tool_calls}) == 2
    assert joined(deltas) == ("Let me see.", "hm, so", [("add", '{"a": 1, "b": [2, "}"]}')] * 2)
    ids = [delta.id for delta in deltas if delta.id is not None]
    assert ids == [call.id for call in reply.tool_calls]


@pytest.mark.parametrize("text", ["", "plain", "a < b\n\n<tool", "<tool_calls>", "  two  spaces\n\nand lines\n"])
@pytest.mark.parametrize("cut", [None, 1, 2, 3])
def test_plain_text_stays_as_it_is(text: str, cut: int | None) -> None:
    reply, deltas = parse(text, cut=cut)
    assert reply == Reply(text)
    assert joined(deltas) == (text, "", [])


@pytest.mark.parametrize("cut", [None, 1, 2, 3])
def test_white_space_between_parts_is_the_formats(cut: int | None) -> None:
    reply, deltas = parse(f" <think> hm\n</think>\n\n a \n{CALL}\n", cut=cut)
    assert (reply.text, reply.reasoning) == ("a", "hm")
    assert joined(deltas)[:2] == ("a", "hm")
    assert parse("<think>hm</think>\n\nSo.\n", cut=cut)[0].text == "So.\n"
    assert parse(f"{CALL}\nDone. ", cut=cut)[0].text == "Done. "


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ('{"name": "add", "arguments": {"a": 1', "not JSON"),
        ('{"name": "add", "argu', "not JSON"),
        ('{"name": "add", "arguments": [1]}', "no JSON object"),
        ('{"name": "add", "arguments": {}} or so', "not JSON"),
    ],
)
@pytest.mark.parametrize("end", ["</tool_call>", ""])
@pytest.mark.parametrize("cut", [None, 1, 2])
def test_a_call_with_a_name_that_is_malformed_is_an_invalid_one(
    body: str, error: str, end: str, cut: int | None
) -> None:
    reply, _ = parse(f"so: <tool_call>{body}{end}", cut=cut)
    assert (reply.text, reply.tool_calls) == ("so:", ())
    (call,) = reply.invalid_tool_calls
    assert isinstance(call, InvalidToolCall)
    assert (call.name, call.arguments) == ("add", body)
    assert error in call.error


QUOTES = [
    "The `<tool_call>` mark opens a call and `</tool_call>` closes it.",
    "<tool_call> and </tool_call> are marks.",
    "<tool_call></tool_call>",
    "so: <tool_call>add(1, 2)</tool_call>\n",
    'Write <tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call> for each.',
    "It is <tool_call>{...}</tool_call>, where ... is JSON.",
    '<tool_call>{"tool": "add"}</tool_call> behind',
    "<tool_call>[]</tool_call>",
    "ends with <tool_call>",
    'ends with <tool_call>{"na',
    "  <tool_call> spaced  ",
]


@pytest.mark.parametrize("text", QUOTES)
@pytest.mark.parametrize("cut", [None, 1, 2, 3])
def test_marks_around_no_call_that_has_a_name_are_text_though_tools_were_offered(text: str, cut: int | None) -> None:
    reply, deltas = parse(text, cut=cut)
    assert reply == Reply(text)
    assert joined(deltas) == (text, "", [])


def test_text_behind_a_quoted_mark_comes_at_once() -> None:
    parser = ReplyParser(HERMES, "<|im_start|>assistant\n", (ADD,))
    text = "The `<tool_call>` mark opens a call, and so on."
    assert "".join(delta.text for letter in text for delta in parser.feed(letter)) == text


@pytest.mark.parametrize("cut", [None, 1, 2, 3])
def test_a_quoted_mark_costs_no_call_that_follows(cut: int | None) -> None:
    quote = "I write `<tool_call>` now.\n"
    reply, deltas = parse(f"{quote}{CALL}\nand <tool_call>[] then\n</tool_call>{CALL}", cut=cut)
    assert [call.arguments for call in reply.tool_calls] == [{"a": 1, "b": [2, "}"]}] * 2
    assert reply.text == joined(deltas)[0] == f"{quote}\nand <tool_call>[] then\n</tool_call>"


@pytest.mark.parametrize("cut", [None, 1, 2, 3])
def test_marks_inside_of_arguments_are_arguments(cut: int | None) -> None:
    written = '{"name": "add", "arguments": {"a": "<think>x</think> <tool_call> [TOOL_CALLS]"}}'
    reply, _ = parse(f"<tool_call>{written}</tool_call>", cut=cut)
    assert [call.arguments for call in reply.tool_calls] == [{"a": "<think>x</think> <tool_call> [TOOL_CALLS]"}]
    assert reply.text == ""


# ---- what was not offered, or cannot be ------------------------------------------------------------------------------

MARKED = [
    CALL,
    f"Write {CALL} like so.",
    f"\n  {CALL}\n",
    "a <think>b</think> c",
    f"Well,\n<think>hm</think>\n\n{CALL}",
    "</think> first",
    "<tool_call>",
]


@pytest.mark.parametrize("text", MARKED)
@pytest.mark.parametrize("cut", [None, 1, 2, 3])
@pytest.mark.parametrize("chat_format", [HERMES, REASONING])
def test_without_tools_nothing_is_a_call(text: str, cut: int | None, chat_format: ChatFormat) -> None:
    reply, deltas = parse(text, cut=cut, tools=(), chat_format=chat_format)
    assert reply == Reply(text)
    assert joined(deltas) == (text, "", [])


@pytest.mark.parametrize("text", ["<think>hm</think>\n\nSo.", " <think>", "<think>a</think><think>b</think>"])
@pytest.mark.parametrize("cut", [None, 1, 2, 3])
def test_what_a_model_that_does_not_reason_writes_is_text(text: str, cut: int | None) -> None:
    assert parse(text, cut=cut, chat_format=HERMES)[0] == Reply(text)


@pytest.mark.parametrize("cut", [None, 1, 2, 3])
@pytest.mark.parametrize(
    ("text", "prompt", "reply"),
    [
        ("<think>a</think>\n\nb <think>c</think> d\n", "", Reply("b <think>c</think> d\n", "a")),
        ("\n<think>a</think><think>c</think>", "", Reply("<think>c</think>", "a")),
        ("x <think>c</think> d", "", Reply("x <think>c</think> d")),
        ("a\n</think>\n\n<think> is a mark", "<think>\n", Reply("<think> is a mark", "a")),
        ("<think> is a mark", "<think>\n\n</think>\n\n", Reply("<think> is a mark")),
        ("<think> is a mark", "</think>", Reply("<think> is a mark")),
    ],
)
def test_reasoning_begins_an_answer_or_there_is_none(text: str, prompt: str, reply: Reply, cut: int | None) -> None:
    got, deltas = parse(text, f"<|im_start|>assistant\n{prompt}", cut)
    assert got == reply
    assert joined(deltas) == (reply.text, reply.reasoning, [])


@pytest.mark.parametrize(
    ("prompt", "reply"),
    [
        ("<|assistant|>\n<think>\n", Reply("b", "a")),
        ("<|assistant|>\n<think>\n\n</think>\n\n", Reply("a</think>b")),
        ("<|user|>Say <think> now.<|assistant|>\n", Reply("a</think>b")),
    ],
)
def test_a_prompt_opens_reasoning_whatever_its_template_begins_answers_with(prompt: str, reply: Reply) -> None:
    assert parse("a</think>b", prompt, 1)[0] == reply


@pytest.mark.parametrize("cut", [None, 1, 2, 3])
def test_an_answer_whose_form_is_prescribed_is_text_from_its_beginning(cut: int | None) -> None:
    value = '{"thought": "<think>a</think>", "call": "' + CALL.replace('"', '\\"') + '"}'
    for form in ("text", "either"):
        assert parse(value, cut=cut, form=form)[0] == Reply(value)
    assert parse("<think>", cut=cut, form="text")[0] == Reply("<think>")
    assert parse("so</think>" + value, "<|im_start|>assistant\n<think>", cut, form="text")[0] == Reply(value, "so")
    calls = parse(f"\n{CALL}\n{CALL}", cut=cut, form="either")[0]
    assert (calls.text, len(calls.tool_calls)) == ("", 2)
    assert parse("<tool", cut=cut, form="either")[0] == Reply("<tool")


pieces = st.lists(
    st.sampled_from(
        [
            "<think>",
            "</think>",
            "<tool_call>",
            "</tool_call>",
            CALL,
            '{"name": "',
            "add",
            "[",
            "a b",
            " ",
            "\n",
            "<",
            "é",
        ]
    ),
    max_size=9,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=pieces, cut=st.integers(0, 99))
@example(text=" <think>a</think>\n", cut=0)
def test_whatever_is_written_no_text_is_lost(text: str, cut: int) -> None:
    assert parse(text, cut=cut, tools=(), chat_format=HERMES)[0] == Reply(text)
    (whole, _), (reply, deltas) = parse(text), parse(text, cut=cut)
    assert (reply.text, reply.reasoning) == (whole.text, whole.reasoning) == joined(deltas)[:2]
    calls = [call.arguments for call in reply.invalid_tool_calls] + ["add"] * len(reply.tool_calls)
    kept = "".join((reply.text, reply.reasoning, *calls))
    for letter in "é<":
        marks = sum(text.count(mark) for mark in ("<think>", "</think>", "<tool_call>", "</tool_call>"))
        assert kept.count(letter) >= text.count(letter) - (marks if letter == "<" else 0)


def test_arguments_may_come_first_or_be_missing() -> None:
    reply, deltas = parse('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', cut=1)
    assert [(call.name, call.arguments) for call in reply.tool_calls] == [("f", {"a": 1})]
    assert joined(deltas)[2] == [("f", '{"a": 1}')]
    reply, _ = parse('<tool_call>{"name": "f"}</tool_call>')
    assert [(call.name, call.arguments) for call in reply.tool_calls] == [("f", {})]


def test_a_template_may_have_opened_the_reasoning() -> None:
    reply, deltas = parse("so it is\n</think>\n\nYes.", "<|im_start|>assistant\n<think>\n", cut=4)
    assert reply == Reply("Yes.", "so it is")
    assert joined(deltas) == ("Yes.", "so it is", [])
    assert parse("Yes.", "<|im_start|>assistant\n<think>\n\n</think>\n\n")[0] == Reply("Yes.")


def test_an_engine_takes_its_answers_apart_when_asked() -> None:
    with scripted_engine(lambda _: f"<think>hm</think>Well.\n{CALL}") as engine:
        messages = [{"role": "user", "content": "1 + 2?"}]
        plain = engine.generate(GenerationRequest(messages=messages))
        assert plain.reply is None
        chunks = list(engine.stream(GenerationRequest(messages=messages, tools=[ADD], parse_reply=True)))
        output = chunks[-1].output
        assert output is not None
        assert output.reply is not None
        assert output.text == plain.text == "".join(chunk.text for chunk in chunks)
        assert (output.reply.text, output.reply.reasoning) == ("Well.", "hm")
        assert isinstance(output.reply.tool_calls[0], ToolCall)
        deltas = [delta for chunk in chunks for delta in chunk.deltas]
        assert joined(deltas) == ("Well.", "hm", [("add", '{"a": 1, "b": [2, "}"]}')])


@pytest.mark.parametrize("before", ["", "<think>hm</think>"])
def test_white_space_is_held_without_looking_at_it_again(before: str) -> None:
    parser = ReplyParser(REASONING, "<|im_start|>assistant\n", (ADD,))
    parser.feed(before)
    deltas = [delta for _ in range(3000) for delta in parser.feed("\n")]
    assert deltas == []
    assert parser.num_held == (0 if before else 3000)
    deltas += parser.feed("end")
    assert "".join(delta.text for delta in deltas) == ("end" if before else "\n" * 3000 + "end")


@pytest.mark.parametrize(
    ("written", "grammar", "text"),
    [
        (CALL, None, CALL),
        (f'{{"x": "{MARKED[3]}"}}', Grammar(json_object=True), f'{{"x": "{MARKED[3]}"}}'),
        ("<think>", Grammar(choice=("<think>", "x")), "<think>"),
        ("hm</think> <think>", Grammar(choice=("<think>",), start_after="</think> "), "hm</think> <think>"),
    ],
)
def test_an_engine_takes_nothing_out_of_texts(written: str, grammar: Grammar | None, text: str) -> None:
    with scripted_engine(lambda _: written) as engine:
        request = GenerationRequest(
            messages=[{"role": "user", "content": "x"}],
            parse_reply=True,
            explain=True,
            grammar=grammar,
            sampling=SamplingParams(max_tokens=200),
        )
        chunks = list(engine.stream(request))
        output = chunks[-1].output
        assert output is not None
        assert output.reply == Reply(text)
        assert output.text == text
        assert "".join(delta.text for chunk in chunks for delta in chunk.deltas) == text
        assert output.explanation is not None
        assert output.explanation.text == text


def test_tools_of_a_grammar_alone_were_offered_too() -> None:
    with scripted_engine(lambda _: CALL) as engine:
        grammar = engine.chat_format.grammar(
            ({"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},), "required"
        )
        messages = [{"role": "user", "content": "x"}]
        output = engine.generate(GenerationRequest(messages=messages, grammar=grammar, parse_reply=True))
        assert output.reply is not None
        assert [call.name for call in output.reply.tool_calls] == ["add"]


def test_white_space_comes_at_once_where_nothing_can_come_behind_text() -> None:
    parser = ReplyParser(REASONING, "<|im_start|>assistant\n")
    told = ["".join(delta.text for delta in parser.feed(letter)) for letter in "a \n b"]
    assert told == ["a", " ", "\n", " ", "b"]
