"""Answers of a prescribed form: which tokens may come next, which drafts can stand, which tokens are forced.

llguidance knows what a grammar allows behind a prefix; here that is asked for whole draft trees. Free text may come
before the grammar, and between two calls of functions: a marker in the text ends it, wherever in a token or draft.
Forced tokens are only drafted: the model still chooses among the tokens that spell the same text.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from copyspec_engine.chat.tokenizer import ChatTokenizer
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.grammar.text import quoted, translate
from copyspec_engine.values.errors import ConfigError, about, missing_extra
from copyspec_engine.values.grammar import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

__all__ = ["GrammarCompiler", "GrammarState"]

_MAX_COMPILED = 64
"""Grammars that are kept ready."""
_MAX_FORCED = 64
"""Forced tokens drafted in one place."""

Mask = npt.NDArray[np.int32]
"""A bit for each token, 1 if it is allowed, lowest bit first; shape (words,)."""


class GrammarCompiler:
    """Prepares grammars for one model; those used last are kept ready. Thread-safe.

    Args:
        tokenizer: the model's.
        vocab_size: width of the model's logits.
        eos_token_ids: the model's own; allowed wherever the answer may end.
    """

    def __init__(self, tokenizer: ChatTokenizer, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos_token_ids = tokenizer, vocab_size, eos_token_ids
        self._loading = threading.Lock()
        self._vocabulary: _Vocabulary | None = None
        self._rules = lru_cache(maxsize=_MAX_COMPILED)(self._compile)

    def begin(self, grammar: Grammar) -> GrammarState:
        """A state for one answer.

        Raises:
            ConfigError: nothing fits the grammar, llguidance refuses it, or the model has no end-of-sequence token.
            CopySpecError: llguidance is not installed.
        """
        return GrammarState(self._rules(grammar.model_dump_json()))

    def _compile(self, grammar: str) -> _Rules:
        """A grammar, given as JSON, made ready."""
        vocabulary, asked = self._load(), Grammar.model_validate_json(grammar)
        param = "grammar" if asked.tools is None or asked.tools.answer_schema is not None else "tools"
        with about(param):
            return _Rules(vocabulary, *translate(asked, vocabulary.literal), param)

    def _load(self) -> _Vocabulary:
        with self._loading:
            if self._vocabulary is None:
                try:
                    import llguidance  # noqa: F401 - the tokenizer needs it
                except ImportError:
                    raise missing_extra("llguidance", "grammar") from None
                if not self._eos_token_ids:
                    raise ConfigError("Got a grammar but this model has no end-of-sequence token to end an answer with")
                known = self._tokenizer.grammar_tokenizer(self._vocab_size, sorted(self._eos_token_ids))
                self._vocabulary = _Vocabulary(known)
            return self._vocabulary


class GrammarState:
    """How far one answer has come. One thread at a time may use it; only `advance` changes it."""

    def __init__(self, rules: _Rules) -> None:
        self._rules, self._position = rules, rules.start()

    @property
    def is_terminated(self) -> bool:
        """The answer is complete and cannot go on."""
        return self._position.ended

    def advance(self, tokens: Sequence[int]) -> None:
        """Take over tokens that were written.

        Raises:
            ConfigError: the grammar is too large to be followed further.
            RuntimeError: it does not allow one of them, or llguidance gave up on it.
        """
        for token in tokens:
            position = self._rules.step(self._position, token)
            if position is None:
                raise RuntimeError(f"Got token {token} but the grammar does not allow it here")
            self._position = position

    def prune(self, draft: DraftTree, room: int) -> DraftTree:
        """What can stand of a draft, with the tokens that are forced before it and behind its likeliest leaf.

        Raises as `advance` does.

        Args:
            draft: nodes proposed behind what was written.
            room: most nodes; forced tokens are added up to here.
        """
        nodes: list[int] = []
        self._walk(draft, lambda node, _: nodes.append(node))
        if len(nodes) <= len(draft):
            draft = draft.kept(sorted(nodes)[1:])
        draft = draft.joined(-1, self._forced(DraftTree()), room)
        if 0 < len(draft) < room:
            leaf, path = _likeliest_path(draft)
            draft = draft.joined(leaf, self._forced(DraftTree.chain(path)), room)
        return draft

    def masks(self, draft: DraftTree) -> torch.Tensor:
        """The tokens allowed behind what was written, then behind each node; int32, shape (1 + len(draft), words).

        Everything is allowed behind nodes that nothing can follow: what is sampled there is dropped. Raises as
        `advance` does.
        """
        allowed = np.full((1 + len(draft), self._rules.num_words), -1, dtype=np.int32)
        address, size = allowed.ctypes.data, allowed.strides[0]
        self._walk(
            draft,
            lambda node, position: self._rules.fill(position, allowed[node + 1], address + (node + 1) * size),
            self._rules.fork,
        )
        if not allowed.any(axis=1).all():
            raise RuntimeError("llguidance found no token that may follow")
        return torch.from_numpy(allowed)

    def _forced(self, chain: DraftTree) -> list[int]:
        """Tokens that must come next behind a chain."""
        forced: list[int] = []

        def look(node: int, position: _Position) -> None:
            if node == len(chain) - 1 and position.matcher is not None and not position.ended:
                tokens = position.matcher.compute_ff_tokens()[:_MAX_FORCED]
                forced.extend(tokens[: position.matcher.validate_tokens(tokens)])

        self._walk(chain, look)
        return forced

    def _walk(
        self,
        draft: DraftTree,
        visit: Callable[[int, _Position], None],
        fork: Callable[[_Position], _Position] = lambda position: position,
    ) -> None:
        """Visit the root (-1) and each node that the grammar allows, parents first; afterwards nothing has changed.

        One matcher goes down every path and back up: copying it for each node would cost far more late in an answer.

        Args:
            draft: the nodes.
            visit: is handed a node and its position; asks for masks only if there is a `fork`.
            fork: gives the position to go on from where there are several ways; at the root there is the answer's, too.
        """
        children = draft.children()
        path, left = [self._position], list[_Position]()  # down to a node, and those whose matchers moved there
        waiting = [(1, child) for child in children[0].values()]
        root_moved = False
        try:
            visit(-1, self._position)
            while waiting:
                depth, node = waiting.pop()
                while len(path) > depth:
                    path.pop()
                    self._rules.step_back(left.pop())
                parent = draft.parents[node]
                before = fork(path[-1]) if parent < 0 or len(children[parent + 1]) > 1 else path[-1]
                root_moved |= before is self._position
                position = self._rules.step(before, draft.tokens[node])
                if position is not None:
                    path.append(position)
                    left.append(before)
                    visit(node, position)
                    waiting += [(depth + 1, child) for child in children[node + 1].values()]
        finally:
            while left:
                self._rules.step_back(left.pop())
        if root_moved:
            fork(self._position)


class _Position(NamedTuple):
    """Where in its form an answer is: in free text, in the grammar, or at the end."""

    tail: bytes = b""
    """The end of the free text that may be the beginning of the marker."""
    matcher: LLMatcher | None = None
    """Follows the grammar; None in free text."""
    ended: bool = False
    """Nothing may follow; the matcher is asked nothing any more."""


_TOO_LARGE = {
    "ParserTooComplex": "with more ways to go on in one place than can be followed: give its objects fewer optional "
    "properties, and its alternatives fewer options",
    "LexerTooComplex": "with texts of a form that is too large to be followed: make its patterns, lengths and lists of "
    "texts shorter",
}
"""What llguidance's limits mean, by its reasons to stop."""


def _reason(matcher: LLMatcher) -> str:
    """What llguidance has to say of a matcher that failed, without the state that it was in: that holds all rules."""
    return str(matcher.get_error()).partition("\n<state>")[0].strip()


def _likeliest_path(draft: DraftTree) -> tuple[int, list[int]]:
    """The likeliest leaf, the deepest one if nothing is known, and the tokens down to it."""
    parents, depths = set(draft.parents), draft.depths()
    known = len(draft.probabilities) == len(draft)
    leaves = [node for node in range(len(draft)) if node not in parents]
    leaf = node = max(leaves, key=lambda node: (draft.probabilities[node] if known else 0.0, depths[node]))
    tokens: list[int] = []
    while node >= 0:
        tokens.append(draft.tokens[node])
        node = draft.parents[node]
    return leaf, tokens[::-1]


class _Vocabulary:
    """The model's tokens as llguidance and we need to know them.

    Attributes:
        pieces: what each token adds to the text, special tokens by their names; empty for ids without a token.
        specials: special tokens by their names.
        special_mask: a mask that allows these only.
    """

    def __init__(self, tokenizer: LLTokenizer) -> None:
        self.tokenizer = tokenizer
        self.eos_token_ids = frozenset(tokenizer.eos_tokens)
        self.num_words = (tokenizer.vocab_size + 31) // 32
        pieces = [tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size)]
        self.pieces = [b"" if piece == b"<[%d]>" % token else piece for token, piece in enumerate(pieces)]
        special = [token for token, piece in enumerate(self.pieces) if piece and tokenizer.is_special_token(token)]
        self.specials = {self.pieces[token].decode(errors="replace"): token for token in special}
        self.special_mask = self.mask_of(special)

    def mask_of(self, tokens: Sequence[int]) -> Mask:
        """A mask that allows these tokens."""
        bits = np.zeros(32 * self.num_words, dtype=np.uint8)
        bits[list(tokens)] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)

    def literal(self, text: str) -> str:
        """A text in Lark; names of special tokens in it stand for these tokens."""
        if not text:
            return ""
        names = sorted(map(re.escape, self.specials), key=len, reverse=True)
        parts = re.split(f"({'|'.join(names)})", text) if names else [text]
        known = (f"<[{self.specials[part]}]>" if part in self.specials else quoted(part) for part in parts if part)
        return " ".join(known)


class _Rules:
    """A grammar made ready for a vocabulary.

    Args:
        vocabulary: the model's tokens.
        grammar: in llguidance's form.
        marker: ends the free text before the grammar; empty: there is none.
        again: free text follows the grammar's end, and the marker in it begins the grammar again.
        param: the option that the grammar comes from.

    Raises:
        ConfigError: llguidance refuses the grammar, it is too large, or it allows nothing.
    """

    def __init__(self, vocabulary: _Vocabulary, grammar: str, marker: bytes, again: bool, param: str) -> None:
        from llguidance import LLMatcher

        self._vocabulary, self._marker, self._again, self._param = vocabulary, marker, again, param
        self.num_words = vocabulary.num_words
        self._matcher = LLMatcher(vocabulary.tokenizer, grammar, log_level=0)
        self._check_size(self._matcher)
        if self._matcher.is_error():
            raise ConfigError(f"Got a grammar that llguidance refuses: {_reason(self._matcher)}")
        if not self._matcher.is_stopped():
            self._matcher.compute_bitmask()
            self._check_size(self._matcher)
            self._check_beginning()
        if self._matcher.is_error() or (self._matcher.is_stopped() and not self._matcher.is_accepting()):
            raise ConfigError("Got a grammar that no text fits")
        self._unread = np.empty(self.num_words, dtype=np.int32)
        self._free_masks: dict[bytes, Mask] = {}
        # Tokens that can hold an end of the marker, and something behind it.
        ends = tuple(marker[at:] for at in range(len(marker)))
        pieces = enumerate(vocabulary.pieces)
        self._closing = [token for token, piece in pieces if piece.startswith(ends) or (marker and marker in piece)]

    def _check_size(self, matcher: LLMatcher) -> None:
        """Refuse a grammar that has turned out to be beyond llguidance's limits."""
        if not matcher.is_error():
            return
        # Where a token is taken the reason is an internal error, and the state in the message says which.
        told = f"{matcher.stop_reason()} {matcher.get_error()}"
        for reason, meaning in _TOO_LARGE.items():
            if reason in told:
                raise ConfigError(f"Got a grammar {meaning}", self._param)

    def _check(self, matcher: LLMatcher) -> None:
        """Refuse to go on with a matcher that failed."""
        self._check_size(matcher)
        if matcher.is_error():
            raise RuntimeError(f"llguidance gave up: {_reason(matcher)}")

    def _check_beginning(self) -> None:
        """Refuse what is too large behind what every text begins with, as the brace of an object.

        That is told before a prompt is read, which may take long.
        """
        ahead = self._matcher.deep_copy()
        forced = self._vocabulary.tokenizer.tokenize_bytes(ahead.compute_ff_bytes())
        if forced and ahead.try_consume_tokens(forced) == len(forced) and not ahead.is_stopped():
            ahead.compute_bitmask()
        self._check_size(ahead)

    def start(self) -> _Position:
        return _Position() if self._marker else _Position(matcher=self._matcher.deep_copy())

    def step(self, position: _Position, token: int) -> _Position | None:
        """Where a token leads, or None if it is not allowed. The position's own matcher moves on."""
        if position.ended:
            return None
        if position.matcher is None:
            return self._read(position.tail + self._vocabulary.pieces[token])
        if position.matcher.try_consume_tokens([token]) != 1:
            self._check(position.matcher)
            return None
        return self._settle(position.matcher, complete=token not in self._vocabulary.eos_token_ids)

    def step_back(self, position: _Position) -> None:
        """Undo a step that was taken from here."""
        if position.matcher is not None and not position.matcher.rollback(1):
            self._check(position.matcher)
            raise RuntimeError("llguidance could not take back a token")

    def fill(self, position: _Position, mask: Mask, address: int) -> None:
        """Write down which tokens may follow, in a mask at this address; at an ended position it is left alone."""
        if position.ended:
            return
        if position.matcher is None:
            mask[:] = self._free_mask(position.tail)
            return
        position.matcher.unsafe_compute_mask_ptr(address, mask.nbytes)
        self._check(position.matcher)
        if (mask & self._vocabulary.special_mask).any():
            self._spell_out(position.matcher, mask)

    def fork(self, position: _Position) -> _Position:
        """The position, or a copy of it, from which masks may be asked for below although others were on another way.

        llguidance (seen in 1.7.6 to 1.9.1) keeps the last mask under the numbers of the parser's row and the lexer's
        state, which another path may have too, and `rollback` leaves it there::

            matcher = LLMatcher(tokenizer, grammar)  # {"properties": {"a": {"type": "string"}, "b": {"type": "null"}}}
            matcher.consume_tokens('{"a":'), matcher.compute_bitmask()  # a quote
            matcher.rollback(4), matcher.consume_tokens('"b":'), matcher.compute_bitmask()  # a quote again

        A mask asked for here takes the other's place. Where bytes are forced, llguidance keeps none: a copy goes on.
        """
        if position.matcher is None or position.ended:
            return position
        if position.matcher.compute_ff_bytes():
            return position._replace(matcher=position.matcher.deep_copy())
        position.matcher.unsafe_compute_mask_ptr(self._unread.ctypes.data, self._unread.nbytes)
        return position

    def _spell_out(self, matcher: LLMatcher, mask: Mask) -> None:
        """Allow the first plain token of forced text that looks like a special token.

        llguidance then allows the special token alone, and does not take it.
        """
        bits = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        if len(bits) == 1 and not matcher.validate_tokens([int(bits[0])]):
            plain = self._vocabulary.tokenizer.greedy_tokenize(matcher.compute_ff_bytes().decode(errors="ignore"))[0]
            mask[:] = 0
            mask.view(np.uint32)[plain // 32] = 1 << plain % 32

    def _settle(self, matcher: LLMatcher, *, complete: bool = True) -> _Position:
        """The position of a matcher; behind a complete text free text may follow."""
        if not matcher.is_stopped():
            return _Position(matcher=matcher)
        return _Position() if complete and self._again else _Position(ended=True)

    def _read(self, text: bytes) -> _Position | None:
        """The position behind free text."""
        _, found, rest = text.partition(self._marker)
        if found:
            return self._enter(rest)
        most = min(len(text), len(self._marker) - 1)
        fitting = (size for size in range(most, 0, -1) if self._marker.startswith(text[-size:]))
        return _Position(text[len(text) - next(fitting, 0) :])

    def _enter(self, rest: bytes) -> _Position | None:
        """The position behind the first bytes of the grammar's text, or None if they are not allowed."""
        matcher, tokenizer = self._matcher.deep_copy(), self._vocabulary.tokenizer
        tokens = tokenizer.tokenize_bytes(rest) if rest else []
        if tokenizer.decode_bytes(tokens) != rest or matcher.try_consume_tokens(tokens) != len(tokens):
            return None
        return self._settle(matcher)

    def _free_mask(self, tail: bytes) -> Mask:
        """All tokens but those that complete the marker and go on as the grammar does not allow."""
        mask = self._free_masks.get(tail)
        if mask is None:
            pieces = self._vocabulary.pieces
            refused = [token for token in self._closing if self._read(tail + pieces[token]) is None]
            mask = self._free_masks[tail] = ~self._vocabulary.mask_of(refused)
        return mask
