"""The drafters of a replay: the known ones do what they are known for, ours drop what they are told to drop."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from copyspec_engine import ConfigError, CopySpecError
from copyspec_engine.drafting.drafter import Ingredients
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.lab.contestants import INGREDIENTS, OURS, PEERS, PromptLookup, contestant, installed
from copyspec_engine.lab.replay import (
    Message,
    RecordedCall,
    Tally,
    calls_of,
    load_conversations,
    load_cost_curve,
    load_tokenizer,
    replay,
)

CHATS = Path(__file__).parents[1] / "data" / "chats.jsonl"
COST = load_cost_curve("gpu")
ROOM = 4096
EVERY_NAME = [name for name in ("none", *PEERS, OURS, *INGREDIENTS) if installed(name)]


@pytest.fixture(scope="module")
def chats() -> list[tuple[Message, ...]]:
    return load_conversations(CHATS, load_tokenizer("bundled"), 10**6)


def tally_of(name: str, *conversations: Sequence[RecordedCall]) -> Tally:
    drafter, tally = contestant(name, COST), Tally()
    for calls in conversations:
        replay(drafter(), calls, tally)
    return tally


# Prompt lookup


def transformers_lookup(tokens: list[int]) -> list[int]:
    """The draft of transformers' own generator, made as `generate(prompt_lookup_num_tokens=10)` makes it."""
    generator = PromptLookupCandidateGenerator(num_output_tokens=10, max_length=ROOM)
    candidates, _ = generator.get_candidates(torch.tensor([tokens]))
    return candidates[0, len(tokens) :].tolist()


token_lists = st.lists(st.integers(0, 4), min_size=1, max_size=40)


@given(prompt=token_lists, answer=st.lists(token_lists, max_size=4))
def test_prompt_lookup_drafts_what_transformers_drafts(prompt: list[int], answer: list[list[int]]) -> None:
    drafter, tokens = PromptLookup(prompt), list(prompt)
    for written in (*answer, []):
        draft = drafter.propose(1, ROOM)
        assert list(draft.tokens) == transformers_lookup(tokens)
        assert draft.parents == tuple(range(-1, len(draft) - 1))
        drafter.observe(draft, (), written)
        tokens += written


def test_prompt_lookup_takes_the_oldest_place_and_prefers_two_tokens() -> None:
    assert PromptLookup([1, 2, 3, 9, 2, 4, 1, 2]).propose(1, ROOM).tokens == (3, 9, 2, 4, 1, 2)
    assert PromptLookup([2, 3, 9, 2, 4, 5, 2]).propose(1, ROOM).tokens == (3, 9, 2, 4, 5, 2)
    assert PromptLookup([1, 2, 3]).propose(1, ROOM).tokens == ()
    assert len(PromptLookup([*range(30), 0]).propose(1, ROOM)) == 10
    assert len(PromptLookup([*range(30), 0]).propose(1, 4)) == 4


def test_prompt_lookup_counted_by_hand() -> None:
    # 1 is drafted 2 3 4 5 8 1: 2 3 4 are right, then comes 9. 9 is new: nothing is drafted. 2 is drafted 3 4 5 8 1 ...
    tally = tally_of("prompt-lookup", [RecordedCall((1, 2, 3, 4, 5, 8, 1), (2, 3, 4, 9, 2, 3))])
    assert Counter(tally.draft_lengths) == {6: 1, 0: 1, 10: 1}
    assert tally.accepted == 3 + 0 + 1
    assert tally.tokens == 6


# The published algorithm


@pytest.mark.parametrize(("name", "drafted"), [("copyspec", 10), ("copyspec-64", 30)])
def test_copyspec_counted_by_hand(name: str, drafted: int) -> None:
    """Its first place of 0 1 2 is followed by 3 ... 29, its block is cut where the known tokens end."""
    prompt, answer = (*range(30), 0, 1, 2), (*range(3, 16), 99, 0, 1, 2)
    tally = tally_of(name, [RecordedCall(prompt, answer)])
    # 64: one pass writes 3 ... 15 and 99; 10: 3 ... 12 and 13, then 14 15 and 99. Then 0, 1, 2 without a draft.
    blocks = {drafted: 1} if name == "copyspec-64" else {drafted: 2}
    assert Counter(tally.draft_lengths) == {**blocks, 0: 3}
    assert tally.accepted == (13 if name == "copyspec-64" else 12)


# Arctic Inference


class FakeCache:
    """Notes its calls; drafts the tokens 5 6 7, of which 6 and 7 both follow 5."""

    made: ClassVar[list[FakeCache]] = []

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.log: list[tuple[Any, ...]] = []
        FakeCache.made.append(self)

    def start_request(self, request: int, prompt: Any) -> None:
        self.log.append(("start", request, prompt.tolist()))

    def speculate(self, request: int, context: list[int], **limits: Any) -> SimpleNamespace:
        self.log.append(("speculate", request, list(context), limits))
        return SimpleNamespace(token_ids=[5, 6, 7], parents=[-1, 0, 0])

    def add_active_response(self, request: int, tokens: list[int]) -> None:
        self.log.append(("add", request, tokens))

    def stop_request(self, request: int) -> None:
        self.log.append(("stop", request))


@pytest.fixture
def fake_arctic(monkeypatch: pytest.MonkeyPatch) -> list[FakeCache]:
    module = ModuleType("arctic_inference.suffix_decoding")
    module.SuffixDecodingCache = FakeCache  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "arctic_inference", ModuleType("arctic_inference"))
    monkeypatch.setitem(sys.modules, "arctic_inference.suffix_decoding", module)
    FakeCache.made = []
    return FakeCache.made


@pytest.mark.parametrize(
    ("name", "depth", "limits"),
    [
        ("arctic", 64, {"max_spec_tokens": 64, "max_spec_factor": 1.0}),
        ("arctic-tuned", 192, {"max_spec_tokens": 192, "max_spec_factor": 4.0}),
    ],
)
def test_arctic_keeps_one_cache_for_each_conversation(
    name: str, depth: int, limits: dict[str, Any], fake_arctic: list[FakeCache]
) -> None:
    prompt = list(range(100, 200))
    tally = tally_of(
        name, [RecordedCall(tuple(prompt), (5, 7, 1)), RecordedCall((9,), (8,))], [RecordedCall((3,), (4,))]
    )
    assert [cache.options for cache in fake_arctic] == [{"max_tree_depth": depth}] * 2
    first, second = (cache.log for cache in fake_arctic)
    assert first == [
        ("start", 1, prompt),
        ("speculate", 1, prompt[-64:], limits),
        ("add", 1, [5, 7, 1]),
        ("stop", 1),
        ("start", 2, [9]),
        ("speculate", 2, [9], limits),
        ("add", 2, [8]),
        ("stop", 2),
    ]
    assert [entry[0] for entry in second] == ["start", "speculate", "add", "stop"]
    assert Counter(tally.draft_lengths) == {3: 3}
    assert tally.accepted == 2


def test_arctic_looks_up_the_last_tokens_with_what_was_written(fake_arctic: list[FakeCache]) -> None:
    tally_of("arctic", [RecordedCall((1, 2), (3, 4))])
    contexts = [entry[2] for entry in fake_arctic[0].log if entry[0] == "speculate"]
    assert contexts == [[1, 2], [1, 2, 3]]


@pytest.mark.skipif(not installed("arctic"), reason="arctic-inference is not installed")
def test_the_real_arctic_copies_from_the_prompt_and_from_the_answer_before() -> None:
    fresh = tuple(range(50, 80))
    first = tally_of("arctic-tuned", [RecordedCall((1, *fresh, 2, 50, 51), fresh[2:])])
    assert first.tokens / first.num_passes > 5
    trimmed = tally_of("arctic-tuned", [RecordedCall((1,), fresh), RecordedCall((50, 51), fresh[2:])])
    assert trimmed.num_passes < 30 + 28


def test_a_missing_arctic_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "arctic_inference.suffix_decoding", None)
    for name in ("arctic", "arctic-tuned"):
        with pytest.raises(
            CopySpecError, match=r'arctic-inference is not installed\. Run: pip install "copyspec\[bench\]"'
        ):
            contestant(name, COST)()


# Ours


def test_an_unknown_name_is_named_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"Got drafter 'eagle' but expected one of none, copyspec, .*, adaptive, "):
        contestant("eagle", COST)


def test_every_ingredient_can_be_switched_off() -> None:
    switches = {field.name for field in dataclasses.fields(Ingredients)}
    assert {switch for switch in INGREDIENTS.values() if switch} == switches
    assert all(name.startswith(f"{OURS}-no-") for name in INGREDIENTS)


@pytest.mark.parametrize("name", EVERY_NAME)
def test_every_drafter_replays_every_conversation(name: str, chats: list[tuple[Message, ...]]) -> None:
    calls = [list(calls_of(chat, "full")) for chat in chats]
    tally = tally_of(name, *calls)
    assert tally.tokens == sum(len(call.answer_ids) for call in chain.from_iterable(calls))
    # Each pass writes one token of the model's own, but for the last pass of a call whose draft went to the end.
    missing = tally.num_passes + tally.accepted - tally.tokens
    assert 0 <= missing <= sum(map(len, calls))
    if name == "none":
        assert Counter(tally.draft_lengths) == {0: tally.tokens}
    else:
        assert tally.tokens > 1.5 * tally.num_passes


TEXT = tuple(range(300, 360))
TRIMMED = [RecordedCall((1, *TEXT, 2), (3,)), RecordedCall((4,), (*TEXT[5:40], 3))]
"""The second answer copies from the first call's prompt, which its own prompt no longer holds."""


def test_memory_serves_text_that_left_the_prompt() -> None:
    assert tally_of("adaptive", TRIMMED).accepted > 20
    assert tally_of("adaptive-no-memory", TRIMMED).accepted == 0


def test_conversations_do_not_see_each_other() -> None:
    assert tally_of("adaptive", TRIMMED[:1], TRIMMED[1:]).accepted == 0


@pytest.mark.parametrize("name", [OURS, "copyspec", "prompt-lookup"])
def test_a_proposal_can_be_repeated(name: str) -> None:
    begin: Callable[[Sequence[int]], Any] = contestant(name, COST)()
    drafter = begin((*TEXT, *TEXT[:8]))
    first: DraftTree = drafter.propose(1, ROOM)
    assert len(first) > 0
    assert drafter.propose(1, ROOM) == first


@pytest.mark.parametrize("name", ["copyspec", "prompt-lookup", "arctic", "adaptive"])
def test_nobody_drafts_behind_the_end_of_an_answer(name: str) -> None:
    if not installed(name):
        pytest.skip("arctic-inference is not installed")
    end, text = 9, [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13]
    drafter = contestant(name, COST, end)()((*text, *text, *text[:4]))
    draft = drafter.propose(1, ROOM)
    children = {draft.tokens[parent] for parent in draft.parents if parent >= 0}
    assert {5, 6} <= set(draft.tokens)
    assert end not in children
