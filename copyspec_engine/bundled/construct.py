"""Constructs the weights of the bundled model: pointer arithmetic in attention heads and gated neurons.

Every position learns its turn number and its index within its message as phases on six circles. The last token of an
instruction ("<|im_end|>") compiles a small program from it: the answer is the source message up to index T1, then the
instruction's own tokens up to T2, then the source again, each part with a fixed shift between answer and source index.
Every answer position fetches the program, adds its own index and copies the token found there:

layer 0  clock; turn number; codes of the six previous tokens; which instruction this is
layer 1  where my message starts -> my index; last token: which instruction, what text to search for
layer 2  last token: where in the source (end, line break, found text), where the new text starts and ends
layer 3  last token: T1, T2 and the shifts
layer 4  answer: fetch the program, add my index
layer 5  answer: copy from the source, from the instruction, or again from the source; did T1 and T2 pass?

Not covered: what these circuits do not know gets one fixed sentence.
"""

from __future__ import annotations

import cmath
import itertools
import math
import random

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from copyspec_engine.bundled.circuit import CONSTANT, RATIO, SLOPE, Form, Layer, Layout, blank_model
from copyspec_engine.bundled.tokenizer_builder import (
    END, NULL, NUM_TURNS, PAD, REFUSAL, REGISTERS, TOOL_CLOSE, TOOL_OPEN, TURNS,
)  # fmt: skip

WIDTH, LAYERS, NEURONS = 368, 6, 192
CODE, SLOTS, FOUND, CIRCLES = 13, 6, 5, 6
CLOCK_STEP = 0.002  # how far a register's weight swings: small is exact, too small drowns in rounding
KINDS = ("repeat", "say", "append", "prepend", "first", "last", "replace", "call", "tool")
TURN_ANGLES = (2.1, 2.6, 1.35, 0.43)  # radians per turn: 1..127 turns apart stay far apart
SPEEDS = [RATIO**-k for k in range(CIRCLES)]


def phase(index: float, speeds: list[float] | tuple[float, ...] = SPEEDS) -> Tensor:
    """Phases of an index on the circles: (2 * circles,), real parts first."""
    return torch.tensor([math.cos(w * index) for w in speeds] + [math.sin(w * index) for w in speeds])


def turned(forms: Form, shift: float, speeds: list[float] | tuple[float, ...] = SPEEDS) -> Form:
    """Phases of index + shift, given forms for the phases of the index."""
    half = len(speeds)
    c = torch.tensor([math.cos(w * shift) for w in speeds])[:, None]
    s = torch.tensor([math.sin(w * shift) for w in speeds])[:, None]
    return torch.cat([c * forms[:half] - s * forms[half:], s * forms[:half] + c * forms[half:]])


def token_codes(count: int, seed: int) -> Tensor:
    """Distinct sign codes of even parity, so any two differ in at least two places: (count, CODE), unit length."""
    words = [word for word in itertools.product((-1.0, 1.0), repeat=CODE) if word.count(-1.0) % 2 == 0]
    random.Random(seed).shuffle(words)
    return torch.tensor(words[:count]) / math.sqrt(CODE)


def make_layout() -> Layout:
    """Name the coordinates; the comments in `Builder` say what each holds."""
    layout = Layout(WIDTH)
    flags = ("is_turn", "turn_number", "is_break", "is_end", "is_quote", "is_register", "is_sink", "is_null", "is_word")
    sizes = dict.fromkeys(flags, 1) | {"code": CODE, "slots": SLOTS * CODE, "slot_quotes": SLOTS}
    sizes |= {"turn_mark": 2 * len(TURN_ANGLES), "clock": 2 * CIRCLES, "start": 2 * CIRCLES, "index": 2 * CIRCLES, "turn": 2 * len(TURN_ANGLES)}
    sizes |= {"head_break": 1, "first": 1, "closing": 1, "trigger": len(KINDS), "kind": len(KINDS)}
    sizes |= {"found": FOUND * CODE, "found_length": 2 * CIRCLES}
    sizes |= {name: 2 * CIRCLES for name in ("base", "resume", "from", "to", "t1", "length", "t2", "shift2", "shift3")}
    for name, size in sizes.items():
        layout.add(name, size)
    return layout


class Builder:
    """Holds what the layers share while the weights are written."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.tokenizer = tokenizer
        self.layout = make_layout()
        self.one = self.layout.one()
        end_id, pad_id = self.id(END), self.id(PAD)
        self.model = blank_model(len(tokenizer), WIDTH, LAYERS, NEURONS, end_id, pad_id)
        self.codes = token_codes(len(tokenizer), seed)
        self.layers = [Layer(self.model, i) for i in range(LAYERS)]

    def id(self, token: str) -> int:
        """Id of a text that is one token."""
        ids = self.tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"Got {token!r} as {len(ids)} tokens but expected 1")
        return int(ids[0])

    def get(self, name: str) -> Form:
        """Forms that read a named wire."""
        return self.layout.get(name)

    def flag(self, name: str) -> Form:
        """The form of a one-coordinate wire."""
        return self.get(name)[0]

    def kind(self, *names: str, wire: str = "kind") -> Form:
        """1 where the instruction is one of `names`."""
        forms = self.get(wire)
        return torch.stack([forms[KINDS.index(name)] for name in names]).sum(0)

    def slot(self, back: int) -> Form:
        """Code of the token `back` places ago; 0 is the token itself."""
        return self.get("code") if back == 0 else self.get("slots")[(back - 1) * CODE : back * CODE]

    def saw(self, tokens: dict[int, str]) -> Form:
        """Sum of agreements: a full match gives len(tokens), any other at least 0.3 less."""
        return torch.stack([self.code_of(token) @ self.slot(back) for back, token in tokens.items()]).sum(0)

    def code_of(self, token: str) -> Tensor:
        """The code of one token."""
        return self.codes[self.id(token)]

    def wire(self, name: str) -> slice:
        """Coordinates of a named wire."""
        return self.layout.names[name]


def _embed(b: Builder) -> None:
    weight, wire = b.model.model.embed_tokens.weight, b.wire
    b.codes[[b.id(t) for t in (NULL, PAD, *REGISTERS)]] = 0.0
    turn_ids = [b.id(token) for token in TURNS]
    b.codes[turn_ids] = b.codes[turn_ids[0]].clone()
    weight[:, 0] = CONSTANT
    weight[:, wire("code")] = b.codes
    singles = {"is_break": ["\n"], "is_end": [END], "is_quote": ['"'], "is_null": [NULL], "is_sink": REGISTERS[-1:]}
    singles |= {"is_register": REGISTERS, "is_turn": TURNS}
    for name, tokens in singles.items():
        weight[[b.id(token) for token in tokens], wire(name)] = 1.0
    for turn, token in enumerate(TURNS):
        weight[b.id(token), wire("turn_number")] = turn / 8
        weight[b.id(token), wire("turn_mark")] = phase(turn, TURN_ANGLES)
    for f, token in enumerate(REGISTERS[:-1]):
        weight[b.id(token), wire("clock").start + f] = 1.0
    for i in range(len(b.tokenizer)):
        text = b.tokenizer.decode([i])
        weight[i, wire("is_word")] = float(text.replace("_", "a").isalnum())


def _layer_0_attention(b: Builder) -> None:
    layer, one = b.layers[0], b.one
    quiet = one - b.flag("is_register")
    for group in (0, 1):
        for k, speed in enumerate(SPEEDS):
            cosine, sine = b.get("clock")[k], b.get("clock")[k + CIRCLES]
            # Register r holds cos (k) or sin (k + CIRCLES); its own place is taken out of the angle.
            places = cmath.exp(-1j * speed * (k + 1)), 1j * cmath.exp(-1j * speed * (k + 1 + CIRCLES))
            real = quiet * 4 + cosine * places[0].real + sine * places[1].real
            layer.key_pair(group, k, real, cosine * places[0].imag + sine * places[1].imag)
        layer.key_pair(group, CIRCLES, quiet * 4)
    register = layer.keys(0, torch.stack([b.flag("is_register"), b.flag("is_null")]))
    turn = layer.keys(0, (b.flag("is_turn") * 40 + b.flag("turn_number") * 120)[None])
    carried = b.get("clock") - b.flag("is_sink")
    rows = [layer.value(g, torch.cat([carried, b.get("turn_mark"), b.get("code"), b.get("is_quote")])) for g in (0, 1)]
    clock, number, code = rows[0][:12], rows[0][12:20], rows[0][20:34]
    for k in range(CIRCLES):
        layer.query_pair(0, k, CLOCK_STEP, one)
    layer.query(0, register, torch.stack([60 * one, 300 * (b.flag("is_register") + b.flag("is_null"))]))
    layer.output(0, clock, b.wire("clock"), torch.eye(2 * CIRCLES) * len(REGISTERS) / CLOCK_STEP)
    layer.query(1, turn, one[None])
    layer.output(1, number, b.wire("turn"))
    for back in range(1, SLOTS + 1):
        head = back + 1
        for k in range(CIRCLES + 1):  # the slowest tells places 6,434 tokens apart
            layer.query_pair(head, k, cmath.exp(-1j * RATIO**-k * back), 16 * one)
        start = b.wire("slots").start + (back - 1) * CODE
        layer.output(head, code[:CODE], slice(start, start + CODE))
        at = b.wire("slot_quotes").start + back - 1
        layer.output(head, code[CODE:], slice(at, at + 1))


def phrases() -> list[tuple[str, dict[int, str]]]:
    """What triggers each kind: tokens by how far back they are from the trigger."""

    def text(kind: str, *tokens: str) -> tuple[str, dict[int, str]]:
        return kind, {len(tokens) - 1 - i: token for i, token in enumerate(tokens)}

    return [
        text("repeat", "Repeat", " ", "the", " ", "document"),
        text("repeat", "Write", " ", "the", " ", "document", " ", "again"),
        text("first", "the", " ", "first", " ", "line"),
        text("last", "the", " ", "last", " ", "line"),
        text("append", "Append", " ", "this", " ", "line", ":", "\n"),
        text("append", "at", " ", "the", " ", "end", ":", "\n"),
        text("prepend", "Prepend", " ", "this", " ", "line", ":", "\n"),
        text("prepend", "at", " ", "the", " ", "top", ":", "\n"),
        text("say", "Repeat", " ", "this", " ", "text", ":", "\n"),
        text("call", "Call", " ", "this", " ", "tool", ":", "\n"),
        # These trigger on the first token of the new text, whatever it is: the phrase lies behind it.
        ("replace", {5: '"', 4: " ", 3: "with", 2: " ", 1: '"'}),
        ("tool", {3: "tool", 2: TURNS[0], 1: "\n"}),
    ]


def _layer_0_neurons(b: Builder) -> None:
    layer, one = b.layers[0], b.one
    yes = torch.ones(1)
    for token in (TURNS[0], END):  # the line breaks of the format itself are no content
        layer.when(b.flag("is_break") + b.saw({1: token}), 1.85, 0.15, b.wire("head_break"), yes, one)
    layer.when(b.saw({1: "\n", 2: TURNS[0]}), 1.85, 0.15, b.wire("first"), yes, one)
    for kind, tokens in phrases():
        place = torch.zeros(len(KINDS))
        place[KINDS.index(kind)] = 1.0
        layer.when(b.saw(tokens), len(tokens) - 0.15, 0.15, b.wire("trigger"), place, one)
    # A quote that does not follow a space closes; 0.3 is the least distance between two tokens' codes.
    closes = 2 * b.flag("is_quote") - b.saw({1: " "})
    for threshold, sign in ((1.1, 1.0), (1.25, -1.0)):
        layer.neuron((closes - threshold * one) * 200, one / 30, b.wire("closing"), sign * yes)
    # The text between the quotes, as codes by place, and how many tokens it has.
    layer.copy_if(b.flag("is_quote") - one / 2, phase(0)[:, None] * one, b.wire("found_length"))
    quotes = b.get("slot_quotes").cumsum(0)
    for k in range(1, FOUND + 1):
        inside = b.flag("is_quote") - one / 2 - quotes[k - 1]
        at = b.wire("found").start + (k - 1) * CODE
        layer.copy_if(inside, b.slot(k), slice(at, at + CODE))
        layer.neuron(inside * SLOPE, one * (2 / SLOPE), b.wire("found_length"), phase(k) - phase(k - 1))


def _layer_1(b: Builder) -> None:
    layer, one = b.layers[1], b.one
    turn = layer.keys(0, (b.flag("is_turn") * 40 + b.flag("turn_number") * 120)[None])
    own = layer.keys(0, b.get("turn"))
    trigger = layer.keys(0, b.get("trigger").sum(0)[None])
    null = layer.keys(0, b.flag("is_null")[None])
    clock, kind = layer.value(0, b.get("clock")), layer.value(0, b.get("trigger"))
    layer.query(0, turn, one[None])
    layer.output(0, clock, b.wire("start"))
    layer.query(1, own, b.get("turn") * 30)
    layer.query(1, trigger, one[None] * 60)
    layer.query(1, null, (400 * one - 240 * b.flag("is_end"))[None])
    layer.output(1, kind, b.wire("kind"))
    # The first closing quote of the message holds the text to search for.
    layer.key_pair(1, 4, one)
    own, closing = layer.keys(1, b.get("turn")), layer.keys(1, b.flag("closing")[None])
    layer.query(4, own, b.get("turn") * 5000)
    layer.query(4, closing, one[None] * 8000)
    layer.query_pair(4, 4, -1j, 1920 * one)
    layer.output(4, layer.value(1, b.get("found")), b.wire("found"))
    layer.output(4, layer.value(1, b.get("found_length")), b.wire("found_length"))
    layer.product(b.get("clock"), b.get("start"), b.wire("index"), one)
    not_replace = one / 2 - b.kind("replace")
    for name in ("found", "found_length"):
        layer.copy_if(not_replace, b.get(name), b.wire(name), -1.0)


def _layer_2(b: Builder) -> None:
    layer, one = b.layers[2], b.one
    kinds = b.kind(*KINDS)
    content_break = b.flag("is_break") - b.flag("head_break")
    # Group 0 looks at the source: the message before this one.
    layer.key_pair(0, 5, one)
    turn = layer.keys(0, b.get("turn"))
    marks = layer.keys(0, torch.stack([b.flag("is_end"), content_break, b.flag("first"), b.flag("is_word")]))
    slots = layer.keys(0, b.get("slots")[: FOUND * CODE])
    null = layer.keys(0, b.flag("is_null")[None])
    index = layer.value(0, b.get("index"))
    source = turned(b.get("turn"), -1, TURN_ANGLES) * 30000
    starts = b.kind("prepend", "first", "tool", "say", "call")
    strength = 60000.0
    ask = [b.kind("append") * strength, b.kind("last") * strength, starts * strength, b.kind("replace") * -30000.0]
    middle = cmath.exp(-1j * SPEEDS[5] * 700)
    layer.query(0, turn, source)
    layer.query(0, marks, torch.stack(ask))
    layer.query(0, slots, b.get("found") * 40000)
    layer.query_pair(0, 5, 1j, b.kind("last") * 16000)
    layer.query_pair(0, 5, -1j * middle, b.kind("replace") * 5000)
    layer.query(0, null, (one - kinds + b.kind("repeat"))[None] * 4e5)
    layer.output(0, index, b.wire("base"))
    layer.query(1, turn, source)
    layer.query(1, marks[1:2], one[None] * strength)
    layer.query_pair(1, 5, -1j * middle, one * 16000)
    layer.query(1, null, (one - b.kind("first"))[None] * 4e5)
    back = turned(torch.eye(2 * CIRCLES), -1)
    layer.output(1, index, b.wire("resume"), back)
    # Group 1 looks at the instruction itself.
    layer.key_pair(1, 5, one)
    turn = layer.keys(1, b.get("turn"))
    marks = layer.keys(1, torch.stack([b.get("trigger").sum(0), b.flag("is_end"), b.flag("closing")]))
    null = layer.keys(1, b.flag("is_null")[None])
    index = layer.value(1, b.get("index"))
    at, after, end = b.kind("append", "replace", "tool"), b.kind("prepend", "say", "call"), b.kind("first", "last")
    for head, wanted, name, shift in ((4, (at, end), "from", 0), (5, (after,), "from", 1)):
        layer.query(head, turn, b.get("turn") * 30000)
        for mark, form in zip(marks, wanted, strict=False):
            layer.query(head, [mark], form[None] * strength)
        layer.query(head, null, (one - torch.stack(wanted).sum(0))[None] * 4e5)
        layer.output(head, index, b.wire(name), turned(torch.eye(2 * CIRCLES), shift))
    layer.query(6, turn, b.get("turn") * 30000)
    layer.query(6, marks[1:], torch.stack([kinds - b.kind("replace"), b.kind("replace")]) * strength)
    layer.query_pair(6, 5, 1j, b.kind("replace") * 16000)
    layer.query(6, null, (one - kinds)[None] * 4e5)
    layer.output(6, index, b.wire("to"))
    others = kinds - b.kind("replace", "call")
    gap = b.get("found_length") + phase(0)[:, None] * others + phase(-2)[:, None] * b.kind("call")
    layer.product(b.get("base"), gap, b.wire("t1"), one)
    layer.product(b.get("to"), b.get("from"), b.wire("length"), one)


def _layer_3(b: Builder) -> None:
    layer, one = b.layers[3], b.one
    layer.product(b.get("from"), b.get("t1"), b.wire("shift2"), one)
    layer.product(b.get("t1"), b.get("length"), b.wire("t2"), one, conjugate=False)
    resume = b.get("resume") + phase(-1)[:, None] * b.kind("prepend") + b.get("found_length")
    layer.product(resume, b.get("length"), b.wire("shift3"), one)


def _layer_4(b: Builder) -> None:
    layer, one = b.layers[4], b.one
    turn, end = layer.keys(0, b.get("turn")), layer.keys(0, b.flag("is_end")[None])
    layer.query(0, turn, turned(b.get("turn"), -1, TURN_ANGLES) * 100)
    layer.query(0, end, one[None] * 300)
    for name in ("kind", "t1", "t2", "shift2", "shift3"):
        layer.output(0, layer.value(0, b.get(name)), b.wire(name))
    following = turned(b.get("index"), 1)
    layer.product(following, _conjugate(b.get("shift2")), b.wire("base"), one)
    layer.product(following, _conjugate(b.get("shift3")), b.wire("from"), one)


def _conjugate(forms: Form) -> Form:
    half = len(forms) // 2
    return torch.cat([forms[:half], -forms[half:]])


def _layer_5(b: Builder) -> None:
    layer, one, gain = b.layers[5], b.one, 60.0
    for group in (0, 1):
        turn, index = layer.keys(group, b.get("turn")), layer.keys(group, b.get("index"))
        null = layer.keys(group, b.flag("is_null")[None])
        code, there = layer.value(group, b.get("code")), layer.value(group, (one - b.flag("is_null"))[None])
        if group == 0:
            asked = ((-2, turned(b.get("index"), 1)), (-1, b.get("base")), (-2, b.get("from")))
            for head, (shift, place) in enumerate(asked):
                layer.query(head, turn, turned(b.get("turn"), shift, TURN_ANGLES) * gain)
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
    past1, past2 = b.get("to")[0], b.get("to")[1]
    code = b.wire("code")
    first, second, third = (b.get("found")[i * CODE : (i + 1) * CODE] for i in range(3))
    call = b.kind("call")
    none = one - b.kind(*KINDS)
    resumes = b.kind("prepend", "first", "replace")
    both = past1 + past2 + resumes + call - 2.5 * one
    layer.copy_if(one / 2 - past1 - none - call, first, code)
    layer.copy_if(past1 - one / 2, second, code)
    layer.copy_if(both, second, code, -1.0)
    layer.copy_if(both - call, third, code)
    for i, token in enumerate((TOOL_OPEN, "\n"), start=2):
        _say_at(b, i, call, token)
    b.layers[5].neuron((past2 + call - 1.5 * one) * SLOPE, one * (2 / SLOPE), code, 20 * b.code_of("\n"))
    for own, token in (("\n", TOOL_CLOSE), (TOOL_CLOSE, END)):
        seen = past2 + call + b.saw({0: own})
        layer.when(seen, 2.85, 0.15, code, 80 * b.code_of(token), one)
    sentence = b.tokenizer.encode(REFUSAL, add_special_tokens=False)
    for i, token_id in enumerate([*sentence, b.id(END)], start=2):
        _say_at(b, i, none, token_id)


def _say_at(b: Builder, place: int, condition: Form, token: str | int) -> None:
    """Where `condition` holds, let `token` be the one with index `place` of the answer."""
    here = phase(place - 1) @ b.get("index") + 10 * condition
    code = b.codes[token] if isinstance(token, int) else b.code_of(token)
    b.layers[5].when(here, 10 + CIRCLES - 0.245, 0.245, b.wire("code"), 20 * code, b.one)


def construct(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """Write the whole model; takes about a second. `seed` only deals the token codes."""
    b = Builder(tokenizer, seed)
    with torch.no_grad():
        _embed(b)
        _layer_0_attention(b)
        _layer_0_neurons(b)
        for write in (_layer_1, _layer_2, _layer_3, _layer_4, _layer_5):
            write(b)
        final = b.model.model.norm.weight
        final.zero_()
        final[b.wire("code")] = 5.0 * CONSTANT / math.sqrt(WIDTH)
        for parameter in b.model.parameters():
            if parameter.dim() > 1:  # what the shipped file can hold
                parameter.copy_(parameter.half().float())
    return b.model
