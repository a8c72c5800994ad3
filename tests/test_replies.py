"""Answers taken apart: whatever the pieces they come in, the parts are those of the whole."""

from __future__ import annotations

import random

import pytest

from copyspec_engine import GenerationRequest, InvalidToolCall, Reply, ReplyDelta, ToolCall
from copyspec_engine.chat_format import find_chat_format
from copyspec_engine.replies import ReplyParser
from copyspec_engine.testing import scripted_engine

HERMES = find_chat_format("<tool_call>")
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, "}"]}}\n</tool_call>'


def parse(text: str, prompt: str = "<|im_start|>assistant\n", cut: int | None = None) -> tuple[Reply, list[ReplyDelta]]:
    """The reply and all deltas, of a text in random pieces, or in one."""
    parser, rng, deltas = ReplyParser(HERMES, prompt), random.Random(cut), []
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
    ("body", "name", "error"),
    [
        ('{"name": "add", "arguments": {"a": 1', "add", "not JSON"),
        ('{"name": "add", "argu', "add", "not JSON"),
        ("add(1, 2)", None, "not JSON"),
        ('{"tool": "add"}', None, "no 'name'"),
        ('{"name": "add", "arguments": [1]}', "add", "no JSON object"),
        ("[]", None, "no 'name'"),
        ("", None, "not JSON"),
    ],
)
@pytest.mark.parametrize("end", ["</tool_call>", ""])
def test_a_malformed_call_is_an_invalid_one(body: str, name: str | None, error: str, end: str) -> None:
    reply, _ = parse(f"so: <tool_call>{body}{end}")
    assert (reply.text, reply.tool_calls) == ("so:", ())
    if not (body or end):
        return
    (call,) = reply.invalid_tool_calls
    assert isinstance(call, InvalidToolCall)
    assert (call.name, call.arguments) == (name, body)
    assert error in call.error


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
        chunks = list(engine.stream(GenerationRequest(messages=messages, parse_reply=True)))
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
    parser = ReplyParser(HERMES, "<|im_start|>assistant\n")
    parser.feed(before)
    deltas = [delta for _ in range(3000) for delta in parser.feed("\n")]
    assert deltas == []
    assert len(parser._text._held) == (0 if before else 3000)
    deltas += parser.feed("end")
    assert "".join(delta.text for delta in deltas) == ("end" if before else "\n" * 3000 + "end")
