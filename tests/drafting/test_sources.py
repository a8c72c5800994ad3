"""Drafts of several sources in one tree: each accepted token counts for its own source, and only copies as copied."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from copyspec_engine import AdaptiveDrafter, Engine, GenerationRequest, SamplingParams
from copyspec_engine.drafting.cost import CostCurve
from copyspec_engine.drafting.drafter import DraftingPolicy
from copyspec_engine.drafting.tree import ALTERNATIVE, DRAFT_MODEL, FORCED, DraftTree
from copyspec_engine.memory.conversation import SessionMemory
from copyspec_engine.provenance.trail import trace
from copyspec_engine.testing import loop_of
from tests.loop.test_lossless import PROMPT, OracleTrees, run, same_answer

COPIED = DraftTree((5, 8, 6), (-1, -1, 0), np.array([0.6, 0.2, 0.5]), np.array([40, 90, 41]))


def test_a_merged_tree_has_each_node_once_and_says_where_it_comes_from() -> None:
    both = COPIED.merged((5, 6, 7, 9), (-1, 0, 1, 0), (0.9, 0.8, 0.7, 0.1), DRAFT_MODEL, cost=0.5)
    assert both == DraftTree((5, 8, 6, 7, 9), (-1, -1, 0, 2, 0))
    assert both.probabilities.tolist() == [0.6, 0.2, 0.5, 0.7, 0.1]
    assert both.sources.tolist() == [40, 90, 41, DRAFT_MODEL, DRAFT_MODEL]
    assert both.cost == both.first(1).cost == both.kept([1]).cost == both.joined(-1, [3], 9).cost == 0.5
    again = both.merged((8, 4), (-1, 0), (0.3, 0.2), ALTERNATIVE)
    assert again == DraftTree((5, 8, 6, 7, 9, 4), (-1, -1, 0, 2, 0, 1))
    assert (again.sources[-1], again.cost) == (ALTERNATIVE, 0.5)


def test_merging_with_nothing_gives_the_other_tree() -> None:
    tree = DraftTree().merged((1, 2, 3), (-1, 0, 0), (0.5, 0.4, 0.1), ALTERNATIVE)
    assert tree == DraftTree((1, 2, 3), (-1, 0, 0))
    assert tree.probabilities.tolist() == [0.5, 0.4, 0.1]
    assert tree.sources.tolist() == [ALTERNATIVE] * 3
    assert COPIED.merged((), (), (), ALTERNATIVE) == COPIED


def test_a_tree_of_unknown_origin_can_be_merged() -> None:
    tree = DraftTree((1, 2), (-1, 0)).merged((1, 3), (-1, 0), (0.5, 0.4), DRAFT_MODEL)
    assert tree == DraftTree((1, 2, 3), (-1, 0, 0))
    assert tree.sources.tolist() == [0, 0, DRAFT_MODEL]
    assert not len(tree.probabilities)


def test_a_node_is_reached_as_often_as_what_is_below_it() -> None:
    assert COPIED.reach(COPIED.probabilities).tolist() == [0.6, 0.2, 0.5]
    both = COPIED.merged((8, 4), (-1, 0), (0.95, 0.9), DRAFT_MODEL)
    assert both.probabilities.tolist() == [0.6, 0.2, 0.5, 0.9]
    assert both.reach(both.probabilities).tolist() == [0.6, 0.9, 0.5, 0.9]


def test_a_node_is_never_verified_without_its_parent() -> None:
    policy = DraftingPolicy(CostCurve([(1, 1.0), (2, 1.5), (64, 32.0)]))
    merged = COPIED.merged((8, 4), (-1, 0), (0.95, 0.9), DRAFT_MODEL)
    kept, other = policy.share([None, None], [merged, DraftTree()], 2)
    assert kept == DraftTree((8, 4), (-1, 0))
    assert not len(other)


def test_runs_of_each_source_are_told_apart() -> None:
    runs = trace(SessionMemory(4096).index, [DRAFT_MODEL, DRAFT_MODEL, ALTERNATIVE, FORCED, DRAFT_MODEL, 0, 0, ~3, ~4])
    assert [(run.num_tokens, run.kind) for run in runs] == [
        (2, "draft_model"),
        (1, "recycled"),
        (1, "grammar"),
        (1, "draft_model"),
        (2, "frequent"),
        (2, "block"),
    ]


def test_what_copies_are_worth_is_learnt_from_copies_alone() -> None:
    def learnt(proposed: Callable[[DraftTree], DraftTree]) -> list[list[float]]:
        policy = DraftingPolicy(CostCurve([(1, 1.0), (256, 1.0)]))
        drafter = policy.begin(AdaptiveDrafter(), SessionMemory(100_000), [1, 2, 3, 4] * 9)
        draft = drafter.propose(1, 64)
        node = draft.tokens.index(1)
        drafter.observe(proposed(draft), (node,), (1, 7))
        acceptance = drafter.acceptance  # type: ignore[attr-defined]
        return [acceptance.weights.tolist(), acceptance.paths.tolist()]

    merged = learnt(lambda draft: draft.merged((1, 9, 8), (-1, 0, -1), (0.99, 0.98, 0.01), DRAFT_MODEL))
    assert merged == learnt(lambda draft: draft)


class SourcedTrees(OracleTrees):
    """Oracle trees whose nodes claim to come from a draft model, or from no text at every third place."""

    def propose(self, num_pending: int, room: int) -> DraftTree:
        tree = super().propose(num_pending, room)
        sources = np.array([DRAFT_MODEL if node % 9 else 0 for node in range(1, len(tree) + 1)], dtype=np.int64)
        return DraftTree(tree.tokens, tree.parents, sources=sources)


def test_tokens_that_were_drafted_but_not_copied_do_not_count_as_copied(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine("llama")
    plain = run(engine, PROMPT, "none", max_tokens=120)
    loop_of(engine).core.policy = SourcedTrees(plain.token_ids, 5)  # type: ignore[assignment]
    request = GenerationRequest(prompt_token_ids=PROMPT, sampling=SamplingParams(max_tokens=120), explain=True)
    output = engine.generate(request)
    assert same_answer(plain, output)
    sizes = dict.fromkeys(("draft_model", "frequent"), 0)
    for copy in output.copies:
        sizes[copy.source] += copy.stop - copy.start
    assert min(sizes.values()) > 5
    assert engine.metrics().accepted_by_source == sizes
    assert sum(sizes.values()) == output.draft_stats.num_accepted_tokens
    assert output.copied_share == 0
    assert output.explanation is not None
    assert {span.source for span in output.explanation.spans} == {"frequent"}
    assert output.explanation.copied_share == 0
    assert not any(segment.copied for segment in output.segments)
    for source in sizes:
        told = "".join(output.text[copy.text_start : copy.text_stop] for copy in output.copies if copy.source == source)
        assert told
        assert told == "".join(segment.text for segment in output.segments if segment.source == source)
