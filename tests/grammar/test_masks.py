"""Masks and forced tokens along draft trees are those of a matcher that read the same path and nothing else."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import ClassVar

import llguidance
import pytest
import torch

from copyspec_engine import Grammar, ToolCalls
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.grammar.state import GrammarCompiler, GrammarState, _Rules
from copyspec_engine.testing import ByteTokenizer
from tests.grammar.random_schemas import random_document, random_schema

END = 257
_LONGER = (
    '{"',
    '":',
    '": ',
    '",',
    '", "',
    '"}',
    "}]",
    "[{",
    "], ",
    '"a',
    '"b": ',
    "ab",
    "1,",
    "true",
    "nu",
    " }",
    "\\u0",
)


class Words(ByteTokenizer):
    """Bytes, and longer tokens that reach over the borders of lexemes."""

    def grammar_tokenizer(self, vocab_size: int, eos_token_ids: Sequence[int]) -> llguidance.LLTokenizer:
        class Vocabulary:
            tokens: ClassVar = (
                *(bytes([byte]) for byte in range(256)),
                b"<|a|>",
                b"<|b|>",
                *(t.encode() for t in _LONGER),
            )
            special_token_ids: ClassVar = (256, END)
            bos_token_id, eos_token_id = None, END

            def __call__(self, text: str | bytes) -> list[int]:
                left, ids = text.encode() if isinstance(text, str) else text, list[int]()
                while left:
                    fitting = [token for token in _LONGER if left.startswith(token.encode())]
                    longest = max(fitting, key=len).encode() if fitting else left[:1]
                    ids.append(self.tokens.index(longest))
                    left = left[len(longest) :]
                return ids

        return llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(Vocabulary()), n_vocab=vocab_size, eos_token=list(eos_token_ids)
        )


@pytest.fixture(scope="module")
def compilers() -> tuple[GrammarCompiler, ...]:
    ends = frozenset({END})
    return GrammarCompiler(ByteTokenizer(), 258, ends), GrammarCompiler(Words(), 258 + len(_LONGER), ends)


def random_tree(rng: random.Random, texts: list[list[int]], most: int) -> DraftTree:
    """The ways of some texts, a node where they part, now and then a token that fits none."""
    tokens: list[int] = []
    parents: list[int] = []
    for text in texts:
        node = -1
        for token in text[: rng.randrange(1, 30)]:
            known = [i for i, parent in enumerate(parents) if parent == node and tokens[i] == token]
            if not known and len(tokens) >= most:
                break
            if not known:
                tokens.append(token if rng.random() < 0.98 else rng.randrange(258))
                parents.append(node)
            node = known[0] if known else len(tokens) - 1
    return DraftTree(tuple(tokens), tuple(parents))


def random_grammar(rng: random.Random) -> tuple[Grammar, list[str]]:
    """A grammar, and texts of which most fit it."""
    schema = random_schema(rng)
    documents = [random_document(rng, schema) for _ in range(rng.randrange(2, 5))]
    if rng.random() < 0.8:
        return Grammar(json_schema=schema, lenient=True), [json.dumps(document) for document in documents]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": schema}}}}
    calls = [f'<tool_call>{{"name": "f", "arguments": {{"x": {json.dumps(it)}}}}}</tool_call>' for it in documents]
    return Grammar(tools=ToolCalls(tools=(tool,), tool_choice="required"), lenient=True), calls


def fresh(rules: _Rules, path: list[int]) -> GrammarState | None:
    """A state that read a path and was asked for nothing; None if the grammar does not allow it."""
    state = GrammarState(rules)
    try:
        state.advance(path)
    except RuntimeError:
        return None
    return state


def test_every_mask_of_a_tree_is_that_of_a_fresh_matcher(
    compilers: tuple[GrammarCompiler, ...], pytestconfig: pytest.Config
) -> None:
    rng = random.Random(15)
    num_masks = 0
    for case in range(pytestconfig.getoption("--random-cases")):
        compiler = rng.choice(compilers)
        grammar, texts = random_grammar(rng)
        state, written = compiler.begin(grammar), list[int]()
        rules = state._rules
        documents = [rules._vocabulary.tokenizer.tokenize_str(text) for text in texts]
        while not state.is_terminated:
            rest = [document[len(written) :] for document in documents if document[: len(written)] == written]
            tree = random_tree(rng, rng.sample(rest, len(rest)), 40)
            masks, paths = state.masks(tree), [written]
            for parent, token in zip(tree.parents, tree.tokens, strict=True):
                paths.append([*paths[parent + 1], token])
            at = [fresh(rules, path) for path in paths]
            for node, expected in enumerate(at):
                if expected is not None and not expected.is_terminated:
                    assert torch.equal(masks[node], expected.masks(DraftTree())[0]), (
                        case,
                        grammar,
                        written,
                        tree,
                        node,
                    )
                    num_masks += 1
            assert at[0] is not None
            assert state.prune(tree, 64) == at[0].prune(tree, 64), (case, grammar, written, tree)
            ways = [path for path, place in zip(paths, at, strict=True) if place is not None and path != written]
            if not ways:
                break
            path = rng.choice(ways)
            state.advance(path[len(written) :])
            written = path
    assert num_masks > 10 * case, num_masks
