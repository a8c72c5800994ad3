"""exact=True: a token has the same bits however it is read, beside whatever else, on any branch of any draft."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from copyspec_engine import Engine, EngineConfig, GenerationRequest, SamplingParams, UnsupportedModelError
from copyspec_engine.drafting.cost import CostCurve
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.execution import loading
from copyspec_engine.execution.exact_passes import EXACT_WIDTHS, agreeing_widths
from copyspec_engine.execution.loading import prepare
from copyspec_engine.execution.packing import Piece
from copyspec_engine.execution.pass_cost import measure_pass_cost
from copyspec_engine.execution.runner import LoadedModel, ModelRunner
from copyspec_engine.testing import ByteTokenizer, loop_of
from tests.conftest import STEP_COST
from tests.execution.architectures import build_model
from tests.loop.test_lossless import PROMPT, OracleTrees, ids_of, run, same_answer

MakeEngine = Callable[..., Engine]
NAMES = ["llama", "qwen2", "gemma2", "gemma3", "mistral", "gpt_oss", "granite", "gpt2", "deepseek_v3", "mixtral"]
NUM_TOKENS, NUM_SLOTS = 170, 400
"""Two and a half blocks of columns."""
LENGTH = {"max_tokens": 50, "ignore_eos": True}


def exact_model(name: str, dtype: torch.dtype) -> LoadedModel:
    config = EngineConfig(model=f"tiny-{name}", step_cost=STEP_COST, kv_cache_tokens=NUM_SLOTS, exact=True)
    return prepare(build_model(name).to(dtype), ByteTokenizer(), config)


class Text:
    """A text that is read into slots of its own, in whatever pieces."""

    def __init__(self, runner: ModelRunner, ids: Sequence[int], slots: np.ndarray[Any, Any]) -> None:
        self.runner, self.ids, self.slots, self.num_read = runner, ids, slots.copy(), 0
        self.logits: list[torch.Tensor] = []

    def piece(self, count: int, rng: random.Random | None = None) -> tuple[Piece, list[int]]:
        """The next `count` tokens: the first one, or all but one to five, and then a draft; where they stand in it."""
        if rng is None or count == 1:
            ids = self.ids[self.num_read : self.num_read + count]
            return Piece(self.slots, self.num_read, ids, DraftTree(), count), list(range(count))
        pending = rng.randint(1, count - 1)
        tokens, parents, place, path = [], [], -1, list(range(pending))
        for token in self.ids[self.num_read + pending : self.num_read + count]:
            for _ in range(rng.choice((0, 0, 1, 2))):  # wrong nodes around the right one
                parents.append(rng.randint(-1, len(tokens) - 1))
                tokens.append(rng.randrange(250))
            parents.append(place)
            place = len(tokens)
            path.append(pending + place)
            tokens.append(token)
        ids = [*self.ids[self.num_read : self.num_read + pending], *tokens]
        return Piece(self.slots, self.num_read, ids, DraftTree(tuple(tokens), tuple(parents)), len(ids)), path

    def take(self, path: Sequence[int], logits: torch.Tensor) -> None:
        """Keep a path of what was read, as the scheduler does."""
        self.logits += logits[list(path)].clone()
        window = self.slots[self.num_read :].copy()
        others = [i for i in range(len(window)) if i not in set(path)]
        self.slots[self.num_read :] = window[[*path, *others]]
        self.num_read += len(path)


def read_one_by_one(runner: ModelRunner, ids: Sequence[int], slots: np.ndarray[Any, Any]) -> Text:
    text = Text(runner, ids, slots)
    while text.num_read < len(ids):
        piece, path = text.piece(1)
        text.take(path, runner.run([piece]))
    return text


def read_in_pieces(
    runner: ModelRunner, ids: Sequence[int], slots: np.ndarray[Any, Any], rng: random.Random, most: int
) -> Text:
    """In chains and trees of many sizes, beside other rows, at changing places of passes of up to `most` tokens."""
    text = Text(runner, ids, slots[: len(ids) + 50])
    beside = slots[len(ids) + 50 :]
    while text.num_read < len(ids):
        piece, path = text.piece(min(rng.choice((1, 2, 3, 7, 20)), len(ids) - text.num_read), rng)
        if len(piece.ids) > most:  # which widths agree, and so how wide passes are, is another on each kind of CPU
            piece, path = text.piece(1)
        sizes = [rng.randint(1, 4) for _ in range(rng.randint(0, 3))]
        while len(piece.ids) + sum(sizes) > most:
            sizes.pop()
        others = [
            Piece(beside[9 * i : 9 * i + 9], 0, [rng.randrange(250) for _ in range(size)], DraftTree(), size)
            for i, size in enumerate(sizes)
        ]
        place = rng.randint(0, len(others))
        logits = runner.run([*others[:place], piece, *others[place:]])
        before = sum(other.num_logits for other in others[:place])
        text.take(path, logits[before : before + piece.num_logits])
    return text


def bits(texts: Text) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits behind all tokens, and all keys and values."""
    store = texts.runner.store
    slots = torch.from_numpy(texts.slots[: texts.num_read])
    layers = [store.layers[layer] for layer in range(store.num_layers)]
    return torch.stack(texts.logits), [kept[:, slots].clone() for layer in layers for kept in layer]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_kv_are_the_same_bits_in_whatever_pieces_a_text_is_read(name: str, dtype: torch.dtype) -> None:
    rng = random.Random(name)
    model = exact_model(name, dtype)
    runner, most = model.runner, model.exact_width
    assert isinstance(runner, ModelRunner)
    assert most is not None
    ids = [rng.randrange(250) for _ in range(NUM_TOKENS)]
    in_order = np.arange(NUM_SLOTS)
    logits, kept = bits(read_one_by_one(runner, ids, in_order))
    assert logits.dtype == torch.float32
    for slots in (in_order, np.random.default_rng(0).permutation(NUM_SLOTS)):
        found, other = bits(read_in_pieces(runner, ids, slots, rng, most))
        assert torch.equal(found, logits)
        assert all(map(torch.equal, other, kept))


class Bits:
    """Of every text whose continuation an engine has computed the logits of: the first ones, and how often again."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.logits: dict[tuple[int, ...], torch.Tensor] = {}
        self.num_compared = self.num_branches = 0
        self._forward = loop_of(engine).model.runner.forward
        monkeypatch.setattr(loop_of(engine).model.runner, "forward", self._watched)

    def _watched(self, pieces: Sequence[Piece]) -> torch.Tensor:
        logits = self._forward(pieces)
        rows = iter(logits)
        for piece in pieces:
            if not piece.num_logits:
                continue
            draft = piece.draft
            self.num_branches += not draft.is_chain
            texts = [tuple(piece.text)]
            for token, parent in zip(draft.tokens, draft.parents, strict=True):
                texts.append((*texts[parent + 1], token))
            for text, found in zip(texts, rows, strict=False):
                self.num_compared += text in self.logits
                assert torch.equal(self.logits.setdefault(text, found.clone()), found)
        return logits


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_drafts_batches_reuse_and_preemption_leave_the_bits_as_they_are(
    make_engine: MakeEngine, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of wrong branches: whenever a text is read again, the logits behind it are the same to the last bit."""
    engine = make_engine(name, dtype="bfloat16", exact=True, kv_cache_tokens=500, max_prefill_tokens=50)
    bits = Bits(engine, monkeypatch)
    prompts = [PROMPT[at:] + ids_of(" and so on, and") for at in (0, 7, 31)]
    options: list[dict[str, Any]] = [{"temperature": heat, "seed": 3, **LENGTH} for heat in (0.0, 0.7, 1.5)]
    cases = list(zip(prompts, options, strict=True))
    plain = [run(engine, prompt, "none", **option) for prompt, option in cases]
    policy = loop_of(engine).core.policy
    for (prompt, option), expected in zip(cases, plain, strict=True):
        for session in ("first", "first", "second"):
            assert same_answer(expected, run(engine, prompt, "adaptive", session, **option))
        loop_of(engine).core.policy = OracleTrees(expected.token_ids, 1)  # type: ignore[assignment]
        assert same_answer(expected, run(engine, prompt, "adaptive", "third", **option))
        loop_of(engine).core.policy = policy
    for drafter in ("none", "adaptive"):
        handles = [
            engine.stream(
                GenerationRequest(prompt_token_ids=prompt, sampling=SamplingParams(**option), drafter=drafter)
            )
            for prompt, option in cases
        ]
        assert all(same_answer(handle.result(), expected) for handle, expected in zip(handles, plain, strict=True))
    assert engine.metrics().num_preemptions > 0
    assert bits.num_branches > 20
    assert bits.num_compared > 500


def test_where_no_width_agrees_exact_is_refused_and_else_the_most_widths_are_taken() -> None:
    class Runner:
        """Passes of these widths give their own logits; others make each token depend on its place."""

        def __init__(self, groups: dict[int, float], *, num_slots: int, exact_widths: tuple[int, ...]) -> None:
            (self.width,) = exact_widths
            self.groups, self.num_slots = groups, num_slots

        def run(self, pieces: Sequence[Piece]) -> torch.Tensor:
            assert sum(len(piece.ids) for piece in pieces) <= self.width
            assert max(piece.slots.max() for piece in pieces) < self.num_slots
            offset = self.groups.get(self.width)
            (piece,) = pieces
            behind = piece.ids[len(piece.ids) - piece.num_logits :]
            return torch.tensor([[token + (i if offset is None else offset)] for i, token in enumerate(behind)])

    def widths(groups: dict[int, float]) -> tuple[int, ...]:
        return agreeing_widths("m", 250, lambda **options: Runner(groups, **options))

    assert widths(dict.fromkeys(EXACT_WIDTHS, 0.0)) == EXACT_WIDTHS
    assert widths({4: 1.0, 8: 0.0, 16: 0.0, 64: 0.0}) == (8, 16, 64)
    assert widths({4: 1.0, 8: 1.0, 16: 0.0, 64: 0.0}) == (16, 64)
    assert widths({width: float(width) for width in EXACT_WIDTHS}) == (64,)
    with pytest.raises(UnsupportedModelError, match="Got exact=True but m gives a token other logits here"):
        widths({})


def test_widths_that_were_found_to_agree_are_kept_beside_the_cost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COPYSPEC_CACHE_DIR", str(tmp_path))
    tried: list[str] = []

    def try_widths(name: str, *_args: object) -> tuple[int, ...]:
        tried.append(name)
        return (8, 64)

    monkeypatch.setattr(loading, "agreeing_widths", try_widths)

    def load(name: str, **options: Any) -> tuple[int, ...] | None:
        return prepare(build_model(name), ByteTokenizer(), EngineConfig(model=name, **options)).exact_widths

    assert load("llama") is None
    assert [load("llama", exact=True) for _ in range(2)] == [(8, 64)] * 2
    assert tried == ["llama"]
    load("llama", exact=True, step_cost=STEP_COST)
    load("qwen3", exact=True)
    assert tried == ["llama", "llama", "qwen3"], "only where costs are measured, and for each model"


def test_a_model_whose_layers_look_at_their_neighbours_is_refused() -> None:
    model = build_model("llama")
    forward = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: forward(x) * (1 + 1e-3 * (x.shape[1] > 20))
    loaded = prepare(model, ByteTokenizer(), EngineConfig(model="m", step_cost=STEP_COST, exact=True))
    widths = loaded.exact_widths
    assert widths
    assert max(widths) <= 20 or min(widths) > 20, "those on both sides of 20 cannot agree"
    model = build_model("llama")
    forward_of = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: forward_of(x) + 1e-4 * x.mean(1, keepdim=True)
    with pytest.raises(UnsupportedModelError, match="exact=True"):
        prepare(model, ByteTokenizer(), EngineConfig(model="m", step_cost=STEP_COST, exact=True))


def test_the_cost_of_a_pass_is_a_stair_where_passes_are_filled_up() -> None:
    model = exact_model("llama", torch.float32)
    runner, widths = model.runner, model.exact_widths
    assert isinstance(runner, ModelRunner)
    assert widths
    cost = CostCurve(measure_pass_cost(runner, 64, 200, budget_s=0.3))
    for below, wide in pairwise((0, *widths)):
        seconds = cost.seconds(below + 1, wide - below)
        assert seconds[-1] <= seconds[0] * (1 if below else 3), "a draft up to the width is free"
    assert cost.points[-1][0] == widths[-1]
