"""Layers 2 to 5 of the bundled model: the instruction's last token compiles a program, answer positions follow it."""

from __future__ import annotations

import cmath

import torch

from scripts.bundled_model.circuit import SLOPE, Form, Layer
from scripts.bundled_model.tokenizer_builder import END, REFUSAL, TOOL_CLOSE, TOOL_OPEN
from scripts.bundled_model.wires import CIRCLES, CODE, FOUND, KINDS, SPEEDS, TURN_ANGLES, Builder, phase, turned

STRENGTH, SOURCE, FAR = 60000.0, 30000.0, 4e5  # marks, turns, and what beats both
LEFT_PAIRS = (8, 7)
MIDDLE = cmath.exp(-1j * SPEEDS[5] * 700)  # prefer-the-first is monotone for sources of 0 to 2,000 tokens


def _content_break(b: Builder) -> Form:
    return b.flag("is_break") - b.flag("head_break")


def _value_end(b: Builder) -> Form:
    return _content_break(b) + b.flag("is_end") + b.flag("closing")


def _left_keys(b: Builder, layer: Layer, group: int, name: str) -> None:
    """Tell whether a word goes on before a text of one, two or three tokens; slow pairs hardly turn within a source."""
    forms = b.get(name)
    for pair, form in zip(LEFT_PAIRS, forms[1:], strict=True):
        layer.key_pair(group, pair, form)
    b.left_rows[group] = layer.keys(group, forms[:1])


def _left_query(b: Builder, layer: Layer, head: int) -> None:
    forms = b.get("left") * -12000.0
    for pair, form in zip(LEFT_PAIRS, forms[1:], strict=True):
        layer.query_pair(head, pair, 1, form)
    layer.query(head, b.left_rows[head // 4], forms[:1])


def _layer_2_source(b: Builder) -> None:
    """Heads 0 to 2 look at messages before this one, and value ends at the value before them."""
    layer, one, kinds = b.layers[2], b.one, b.kind(*KINDS)
    layer.key_pair(0, 5, one)
    turn = layer.keys(0, b.get("turn"))
    # One row tells ends (1) from line breaks (-1): rows are scarce.
    marks = layer.keys(0, torch.stack([b.flag("is_end") - _content_break(b), b.flag("value"), b.flag("is_word")]))
    _left_keys(b, layer, 0, "slot_words")
    slots = layer.keys(0, b.get("slots")[: FOUND * CODE])
    null = layer.keys(0, b.flag("is_null")[None])
    index, found, left = (layer.value(0, b.get(name)) for name in ("index", "found", "left"))
    source = b.get("source") * SOURCE
    layer.query(0, turn, source)
    layer.query(0, marks[:1], (b.kind("append") - b.kind("last"))[None] * STRENGTH)
    layer.query(0, marks[2:], b.kind("replace")[None] * -30000.0)
    _left_query(b, layer, 0)
    layer.query(0, slots, b.get("found") * 40000)
    layer.query_pair(0, 5, 1j, b.kind("last") * 16000)
    layer.query_pair(0, 5, -1j * MIDDLE, b.kind("replace") * 5000)
    layer.query(0, null, (one - b.kind("append", "last", "replace"))[None] * FAR)
    layer.output(0, index, b.wire("base"))
    layer.query(1, turn, source)
    layer.query(1, marks[:1], one[None] * -STRENGTH)
    layer.query_pair(1, 5, -1j * MIDDLE, one * 16000)
    layer.query(1, null, (one - b.kind("first"))[None] * FAR)
    layer.output(1, index, b.wire("resume"), turned(torch.eye(2 * CIRCLES), -1))
    layer.query(2, turn, b.get("turn") * SOURCE)
    layer.query(2, marks[1:2], one[None] * STRENGTH)
    layer.query_pair(2, 5, 1j, one * 16000)
    layer.query(2, null, (one - _value_end(b) + kinds)[None] * FAR)
    layer.output(2, index, b.wire("found_length"))
    layer.output(2, found, b.wire("found"))
    layer.output(2, left, b.wire("left"))


def _layer_2_instruction(b: Builder) -> None:
    """Heads 4 to 6 look for the new text in the instruction, head 7 for the value to set."""
    layer, one, kinds = b.layers[2], b.one, b.kind(*KINDS)
    layer.key_pair(1, 5, one)
    turn = layer.keys(1, b.get("turn"))
    ends = b.flag("is_end") - b.flag("closing")
    marks = layer.keys(1, torch.stack([b.get("trigger").sum(0), ends, b.flag("value")]))
    _left_keys(b, layer, 1, "left")
    null = layer.keys(1, b.flag("is_null")[None])
    found = layer.keys(1, b.get("found"))
    index = layer.value(1, b.get("index"))
    quoted = b.kind("replace", "set")
    at, after, end = (
        b.kind("append", "replace", "set", "tool"),
        b.kind("prepend", "say", "call"),
        b.kind("first", "last"),
    )
    for head, wanted, shift in ((4, (at, end), 0), (5, (after,), 1)):
        layer.query(head, turn, b.get("turn") * SOURCE)
        for mark, form in zip(marks, wanted, strict=False):
            layer.query(head, [mark], form[None] * STRENGTH)
        layer.query(head, null, (one - torch.stack(wanted).sum(0))[None] * FAR)
        layer.output(head, index, b.wire("from"), turned(torch.eye(2 * CIRCLES), shift))
    layer.query(6, turn, b.get("turn") * SOURCE)
    layer.query(6, marks[1:2], (kinds - 2 * quoted)[None] * STRENGTH)
    layer.query_pair(6, 5, 1j, quoted * 16000)
    layer.query(6, null, (one - kinds)[None] * FAR)
    layer.output(6, index, b.wire("to"))
    layer.query(7, turn, b.get("source") * SOURCE)
    layer.query(7, marks[2:], one[None] * STRENGTH)
    _left_query(b, layer, 7)
    layer.query(7, found, b.get("found") * 40000)
    layer.query_pair(7, 5, -1j * MIDDLE, one * 5000)
    layer.query(7, null, (one - b.kind("set"))[None] * FAR)
    layer.output(7, index, b.wire("base"))


def _layer_2_neurons(b: Builder) -> None:
    layer, one, kinds = b.layers[2], b.one, b.kind(*KINDS)
    gap = b.get("found_length") + phase(0)[:, None] * (kinds - b.kind("replace", "call"))
    gap = gap + phase(-2)[:, None] * b.kind("call")
    base = b.get("base") + phase(2)[:, None] * b.kind("prepend", "first", "tool", "say", "call")
    layer.product(base, gap, b.wire("t1"), one)
    layer.product(b.get("to"), b.get("from"), b.wire("length"), one)
    # The end of a value keeps its length; a comma at the end of the line is no part of the value.
    comma = b.flag("after_comma")
    for shift, unless in ((0, comma), (-1, one - comma)):
        layer.product(
            turned(b.get("index"), shift), b.get("found_length"), b.wire("resume"), one, unless=unless + kinds
        )


def _layer_3(b: Builder) -> None:
    layer, one = b.layers[3], b.one
    layer.key_pair(0, 5, one)
    turn, end = layer.keys(0, b.get("turn")), layer.keys(0, _value_end(b)[None])
    null, found = layer.keys(0, b.flag("is_null")[None]), layer.keys(0, b.get("found"))
    left = layer.keys(0, b.get("left"))
    layer.query(0, left, b.get("left") * -12000.0)
    layer.query(0, turn, b.get("source") * SOURCE)
    layer.query(0, end, one[None] * STRENGTH)
    layer.query(0, found, b.get("found") * 40000)
    layer.query_pair(0, 5, -1j * MIDDLE, one * 5000)
    layer.query(0, null, (one - b.kind("set"))[None] * FAR)
    layer.output(0, layer.value(0, b.get("resume")), b.wire("resume"))
    layer.product(b.get("from"), b.get("t1"), b.wire("shift2"), one)
    layer.product(b.get("t1"), b.get("length"), b.wire("t2"), one, conjugate=False)
    resume = b.get("resume") + phase(-1)[:, None] * b.kind("prepend")
    # The length of the found text is 0 but for a replacement.
    layer.product(resume + b.get("found_length"), b.get("length"), b.wire("shift3"), one)


def _layer_4(b: Builder) -> None:
    layer, one = b.layers[4], b.one
    turn, end = layer.keys(0, b.get("turn")), layer.keys(0, b.flag("is_end")[None])
    layer.query(0, turn, turned(b.get("turn"), -1, TURN_ANGLES) * 100)
    layer.query(0, end, one[None] * 300)
    for name in ("kind", "source", "t1", "t2", "shift2", "shift3"):
        layer.output(0, layer.value(0, b.get(name)), b.wire(name))
    following = turned(b.get("index"), 1)
    layer.product(following, _conjugate(b.get("shift2")), b.wire("base"), one)
    layer.product(following, _conjugate(b.get("shift3")), b.wire("from"), one)


def _conjugate(forms: Form) -> Form:
    half = len(forms) // 2
    return torch.cat([forms[:half], -forms[half:]])


def _layer_5_attention(b: Builder) -> None:
    layer, one, gain = b.layers[5], b.one, 60.0
    for group in (0, 1):
        turn, index = layer.keys(group, b.get("turn")), layer.keys(group, b.get("index"))
        null = layer.keys(group, b.flag("is_null")[None])
        code, there = layer.value(group, b.get("code")), layer.value(group, (one - b.flag("is_null"))[None])
        if group == 0:
            source, instruction = b.get("source"), turned(b.get("turn"), -1, TURN_ANGLES)
            places = (turned(b.get("index"), 1), b.get("base"), b.get("from"))
            for head, (message, place) in enumerate(zip((source, instruction, source), places, strict=True)):
                layer.query(head, turn, message * gain)
                layer.query(head, index, place * gain)
                at = b.wire("found").start + head * CODE
                layer.output(head, code, slice(at, at + CODE), torch.eye(CODE) * 20)
        else:
            level = gain * (len(TURN_ANGLES) + CIRCLES - 0.245)
            for head, name in ((4, "t1"), (5, "t2")):
                layer.query(head, turn, b.get("turn") * gain)
                layer.query(head, index, turned(b.get(name), -1) * gain)
                layer.query(head, null, level * one[None])
                at = b.wire("to").start + head - 4
                layer.output(head, there, slice(at, at + 1))


def _layer_5_neurons(b: Builder) -> None:
    layer, one = b.layers[5], b.one
    past1, past2 = b.get("to")[0], b.get("to")[1]
    code = b.wire("code")
    first, second, third = (b.get("found")[i * CODE : (i + 1) * CODE] for i in range(3))
    call = b.kind("call")
    none = one - b.kind(*KINDS)
    resumes = b.kind("prepend", "first", "replace", "set")
    both = past1 + past2 + resumes + call - 2.5 * one
    layer.copy_if(one / 2 - past1 - none - call, first, code)
    layer.copy_if(past1 - one / 2, second, code)
    layer.copy_if(both, second, code, -1.0)
    layer.copy_if(both - call, third, code)
    for i, token in enumerate((TOOL_OPEN, "\n"), start=2):
        _say_at(b, i, call, token)
    layer.neuron((past2 + call - 1.5 * one) * SLOPE, one * (2 / SLOPE), code, 20 * b.code_of("\n"))
    for own, token in (("\n", TOOL_CLOSE), (TOOL_CLOSE, END)):
        seen = past2 + call + b.saw({0: own})
        layer.when(seen, 2.85, 0.15, code, 80 * b.code_of(token), one)
    sentence = b.tokenizer.encode(REFUSAL, add_special_tokens=False)
    for i, token_id in enumerate([*sentence, b.id(END)], start=2):
        _say_at(b, i, none, token_id)


def _say_at(b: Builder, place: int, condition: Form, token: str | int) -> None:
    """Where `condition` holds, let `token` be the one with index `place` of the answer."""
    here = phase(place - 1) @ b.get("index") + 2 * condition
    code = b.codes[token] if isinstance(token, int) else b.code_of(token)
    b.layers[5].when(here, 2 + CIRCLES - 0.245, 0.245, b.wire("code"), 20 * code, b.one)


def write_program(b: Builder) -> None:
    """Write layers 2 to 5."""
    for write in (
        _layer_2_source,
        _layer_2_instruction,
        _layer_2_neurons,
        _layer_3,
        _layer_4,
        _layer_5_attention,
        _layer_5_neurons,
    ):
        write(b)
