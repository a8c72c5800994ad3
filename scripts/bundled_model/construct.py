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
import math

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.bundled_model.circuit import CONSTANT, RATIO, SLOPE
from scripts.bundled_model.program import write_program
from scripts.bundled_model.tokenizer_builder import END, NULL, PAD, REGISTERS, TURNS
from scripts.bundled_model.wires import (
    CIRCLES,
    CLOCK_STEP,
    CODE,
    FOUND,
    KINDS,
    LEFT,
    NEURONS,
    SLOTS,
    SPEEDS,
    TURN_ANGLES,
    WIDTH,
    Builder,
    phase,
    turned,
)


def _embed(b: Builder) -> None:
    weight, wire = b.model.model.embed_tokens.weight, b.wire
    b.codes[[b.id(t) for t in (NULL, PAD, *REGISTERS)]] = 0.0
    turn_ids = [b.id(token) for token in TURNS]
    b.codes[turn_ids] = b.codes[turn_ids[0]].clone()
    weight[:, 0] = CONSTANT
    weight[:, wire("code")] = b.codes
    weight[:, wire("rank")] = b.ranks[:, None]
    singles = {
        "is_break": ["\n"],
        "is_end": [END],
        "is_quote": ['"'],
        "is_comma": [","],
        "is_null": [NULL],
        "is_sink": REGISTERS[-1:],
    }
    singles |= {"is_register": REGISTERS, "is_turn": TURNS}
    for name, tokens in singles.items():
        weight[[b.id(token) for token in tokens], wire(name)] = 1.0
    for turn, token in enumerate(TURNS):
        weight[b.id(token), wire("turn_number")] = turn / 8
        weight[b.id(token), wire("turn_mark")] = phase(turn, TURN_ANGLES)
    # A turn token counts as part of a word, so that the role before it is no whole word that an edit could mean.
    word_turns = set(turn_ids)
    for f, token in enumerate(REGISTERS[:-1]):
        weight[b.id(token), wire("clock").start + f] = 1.0
    for i in range(len(b.tokenizer)):
        text = str(b.tokenizer.decode([i]))
        weight[i, wire("is_word")] = float(i in word_turns or text.replace("_", "a").isalnum())
        weight[i, wire("is_solid")] = float(
            i not in b.tokenizer.all_special_ids and not set(text) & set(" \t\n\r\"'=:")
        )


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
    # Registers are told by what all others lose: their own scores stay near 0, where float32 is finest.
    register = layer.keys(0, torch.stack([one - b.flag("is_register"), b.flag("is_null")]))
    turn = layer.keys(0, (b.flag("is_turn") * 40 + b.flag("turn_number") * 120)[None])
    carried = b.get("clock") - b.flag("is_sink")
    seen = [b.get(name) for name in ("turn_mark", "code", "is_quote", "is_word", "is_comma")]
    rows = [layer.value(g, torch.cat([carried, *seen])) for g in (0, 1)]
    clock, number, code, last = rows[0][:12], rows[0][12:20], rows[0][20:34], rows[0][34:]
    for k in range(CIRCLES):
        layer.query_pair(0, k, CLOCK_STEP, one)
    layer.query(0, register, torch.stack([-60 * one, 300 * (b.flag("is_register") + b.flag("is_null"))]))
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
        if 2 <= back < 2 + LEFT:
            at = b.wire("slot_words").start + back - 2
            layer.output(head, last[:1], slice(at, at + 1))
    layer.output(2, last[:1], b.wire("after_word"))
    layer.output(2, last[1:], b.wire("after_comma"))


def phrases() -> list[tuple[str, dict[int, str]]]:
    """What triggers each kind: tokens by how far back they are from the trigger."""

    def text(kind: str, *tokens: str) -> tuple[str, dict[int, str]]:
        return kind, {len(tokens) - 1 - i: token for i, token in enumerate(tokens)}

    return [
        *(text("repeat", TURNS[0], "\n", "Repeat", " ", "the", " ", noun) for noun in ("document", "text")),
        text("repeat", "Write", " ", "the", " ", "document", " ", "again"),
        *(text("first", verb, " ", "the", " ", "first", " ", "line") for verb in ("Delete", "Remove")),
        *(text("last", verb, " ", "the", " ", "last", " ", "line") for verb in ("Delete", "Remove")),
        text("append", "Append", " ", "this", " ", "line", ":", "\n"),
        text("append", "at", " ", "the", " ", "end", ":", "\n"),
        text("prepend", "Prepend", " ", "this", " ", "line", ":", "\n"),
        text("prepend", "at", " ", "the", " ", "top", ":", "\n"),
        text("say", "Repeat", " ", "this", " ", "text", ":", "\n"),
        text("call", "Call", " ", "this", " ", "tool", ":", "\n"),
        # These trigger on the first token of the new text, whatever it is: the phrase lies behind it.
        ("replace", {5: '"', 4: " ", 3: "with", 2: " ", 1: '"'}),
        ("set", {5: '"', 4: " ", 3: "to", 2: " ", 1: '"'}),
        ("tool", {3: "tool", 2: TURNS[0], 1: "\n"}),
    ]


def _value_starts() -> list[dict[int, str]]:
    """What lies before the first token of a value: `key=`, `key = `, `key: `, each also with an opening quote."""
    bare: list[tuple[str, ...]] = [("=",), ("=", " "), (":", " ")]
    return [dict(zip(range(len(t), 0, -1), t, strict=True)) for t in [*bare, *((*t, '"') for t in bare)]]


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
    tail = {0: END, 1: ".", 2: "else", 3: " ", 4: "anything", 5: " ", 6: "for"}
    layer.when(b.saw(tail), 6.85, 0.15, b.wire("refusal"), yes, one)
    for tokens in _value_starts():
        layer.when(b.flag("is_solid") + b.saw(tokens), len(tokens) + 0.85, 0.15, b.wire("value"), yes, one)
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
        if k <= LEFT + 1:  # "left" marks the place before the text, by its distance from the closing quote
            places = torch.eye(LEFT + 2)
            layer.neuron(inside * SLOPE, one * (2 / SLOPE), b.wire("left"), (places[k] - places[k - 1])[1 : LEFT + 1])


def _layer_1(b: Builder) -> None:
    layer, one = b.layers[1], b.one
    turn = layer.keys(0, (b.flag("is_turn") * 40 + b.flag("turn_number") * 120)[None])
    own = layer.keys(0, b.get("turn"))
    trigger = layer.keys(0, b.get("trigger").sum(0)[None])
    null = layer.keys(0, b.flag("is_null")[None])
    word = layer.keys(0, (b.flag("after_word") - b.flag("is_word"))[None])
    layer.key_pair(0, 5, one)
    clock, kind = layer.value(0, b.get("clock")), layer.value(0, b.get("trigger"))
    slots = layer.value(0, b.get("slots")[: FOUND * CODE])
    words = layer.value(0, b.get("slot_words"))
    layer.query(0, turn, one[None])
    layer.output(0, clock, b.wire("start"))
    layer.query(1, own, b.get("turn") * 30)
    layer.query(1, trigger, one[None] * 60)
    layer.query(1, null, (400 * one - 240 * b.flag("is_end"))[None])
    layer.output(1, kind, b.wire("kind"))
    # The first token of a value remembers its key: what lay before the last end of a word.
    layer.query(2, own, b.get("turn") * 30000)
    layer.query(2, word, one[None] * 60000)
    layer.query_pair(2, 5, 1j, 16000 * one)
    layer.query(2, null, (one - b.flag("value"))[None] * 4e5)
    layer.output(2, slots, b.wire("found"))
    layer.output(2, words, b.wire("left"))
    # The source is the message before this one, or the one before that if the model only said what it can do.
    end = layer.keys(0, b.flag("is_end")[None])
    layer.query(3, own, turned(b.get("turn"), -1, TURN_ANGLES) * 30)
    layer.query(3, end, one[None] * 60)
    layer.output(3, layer.value(0, b.get("refusal")), b.wire("after_refusal"))
    # The first closing quote of the message holds the text to search for.
    layer.key_pair(1, 4, one)
    own, closing = layer.keys(1, b.get("turn")), layer.keys(1, b.flag("closing")[None])
    null = layer.keys(1, b.flag("is_null")[None])
    layer.query(4, own, b.get("turn") * 5000)
    layer.query(4, closing, one[None] * 8000)
    layer.query_pair(4, 4, -1j, 1920 * one)
    layer.query(4, null, (one - b.flag("is_end"))[None] * 4e5)
    for name in ("found", "found_length", "left"):
        layer.output(4, layer.value(1, b.get(name)), b.wire(name))
    layer.product(b.get("clock"), b.get("start"), b.wire("index"), one)
    for shift, refused in ((-1, one - b.flag("after_refusal")), (-2, b.flag("after_refusal"))):
        score = b.flag("is_end") + refused - 1.5 * one
        layer.copy_if(score, turned(b.get("turn"), shift, TURN_ANGLES), b.wire("source"))
    keep = b.kind("replace")
    layer.copy_if(one / 2 - keep, b.get("found_length"), b.wire("found_length"), -1.0)
    for name in ("found", "left"):
        layer.copy_if(one / 2 - keep - b.kind("set") - b.flag("value"), b.get(name), b.wire(name), -1.0)


def construct(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """Write the whole model; takes about a second. `seed` only deals the tokens' codes and ranks."""
    b = Builder(tokenizer, seed)
    with torch.no_grad():
        _embed(b)
        _layer_0_attention(b)
        _layer_0_neurons(b)
        _layer_1(b)
        write_program(b)
        for layer in b.layers:
            if layer.neurons > NEURONS:
                raise ValueError(f"Got {layer.neurons} neurons but expected at most {NEURONS}")
        final = b.model.model.norm.weight
        final.zero_()
        final[b.wire("code")] = 5.0 * CONSTANT / math.sqrt(WIDTH)
        # Codes equally unlike the right one would come out equal, and rounding decide between them where the right one
        # is banned: each token's rank, far below what tells codes apart, puts them in order.
        b.layers[-1].block.mlp.down_proj.bias[b.wire("rank")] = 1.0
        final[b.wire("rank")] = 4.0 * CONSTANT / math.sqrt(WIDTH)
        for parameter in b.model.parameters():
            if parameter.dim() > 1:  # what the shipped file can hold
                parameter.copy_(parameter.half().float())
    return b.model
