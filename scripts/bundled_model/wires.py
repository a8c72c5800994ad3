"""Names and number codes shared by the circuits: token codes, phases of indices, the layout of the residual stream."""

from __future__ import annotations

import itertools
import math
import random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from scripts.bundled_model.circuit import RATIO, Form, Layer, Layout, blank_model
from scripts.bundled_model.tokenizer_builder import (
    END,
    PAD,
)

WIDTH, LAYERS, NEURONS = 392, 6, 144
CODE, SLOTS, FOUND, CIRCLES = 13, 6, 5, 6
LEFT = 3  # a found text of up to so many tokens must start where a word starts
CLOCK_STEP = 0.002  # how far a register's weight swings: small is exact, too small drowns in rounding
KINDS = ("repeat", "say", "append", "prepend", "first", "last", "replace", "set", "call", "tool")
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


def token_ranks(count: int, seed: int) -> Tensor:
    """A number of its own for each token, in no order, from -1/2 up to 1/2: (count,)."""
    ranks = list(range(count))
    random.Random(seed).shuffle(ranks)
    return torch.tensor(ranks) / count - 0.5


def make_layout() -> Layout:
    """Name the coordinates of the stream, each layer's results on wires of their own."""
    layout = Layout(WIDTH)
    flags: tuple[str, ...] = (
        "is_turn",
        "turn_number",
        "is_break",
        "is_end",
        "is_quote",
        "is_register",
        "is_sink",
        "is_null",
        "is_word",
    )
    flags += ("is_comma", "is_solid", "after_word", "after_comma", "value")
    sizes = dict.fromkeys(flags, 1) | {
        "code": CODE,
        "slots": SLOTS * CODE,
        "slot_quotes": SLOTS,
        "slot_words": LEFT,
        "left": LEFT,
    }
    sizes |= {
        "turn_mark": 2 * len(TURN_ANGLES),
        "clock": 2 * CIRCLES,
        "start": 2 * CIRCLES,
        "index": 2 * CIRCLES,
        "turn": 2 * len(TURN_ANGLES),
    }
    sizes |= {"source": 2 * len(TURN_ANGLES), "refusal": 1, "after_refusal": 1}
    sizes |= {"head_break": 1, "first": 1, "closing": 1, "trigger": len(KINDS), "kind": len(KINDS)}
    sizes |= {"found": FOUND * CODE, "found_length": 2 * CIRCLES}
    sizes |= dict.fromkeys(("base", "resume", "from", "to", "t1", "length", "t2", "shift2", "shift3"), 2 * CIRCLES)
    sizes["rank"] = 1
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
        self.codes, self.ranks = token_codes(len(tokenizer), seed), token_ranks(len(tokenizer), seed)
        self.left_rows: dict[int, list[int]] = {}
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
