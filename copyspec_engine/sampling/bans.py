"""Tokens that may not come: suppressed ones, ends before their time, bad words, runs that stood in the text before.

What is banned at a place is a function of the text in front of it alone, so that it is the same behind what was written
and behind the nodes of a draft.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.values.config import SamplingParams

__all__ = ["Banned", "Bans"]


class Banned(NamedTuple):
    """What is banned in one pass, by rows: the place behind the text is row 0, that behind node i row i + 1."""

    everywhere: npt.NDArray[np.int64]
    """Token ids, shape (n,)."""
    rows: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    """Token ids, each in one of `rows`; both of shape (m,)."""


class Bans:
    """The bans of one request.

    Args:
        params: suppress_tokens, begin_suppress_tokens, min_tokens and no_repeat_ngram_size.
        words: bad words as token ids, each of at least one.
        ends: ids that end the answer.
        num_prompt_tokens: tokens in front of the answer.
    """

    def __init__(
        self, params: SamplingParams, words: Collection[Sequence[int]], ends: Collection[int], num_prompt_tokens: int
    ) -> None:
        alone = {word[0] for word in words if len(word) == 1 and word[0] not in ends}
        self._everywhere = np.array(sorted(alone.union(params.suppress_tokens)), dtype=np.int64)
        self._first, self._ends = params.begin_suppress_tokens, tuple(ends) if params.min_tokens else ()
        self._min_tokens, self._num_prompt_tokens = params.min_tokens, num_prompt_tokens
        self._size = params.no_repeat_ngram_size
        self._words: defaultdict[int, list[tuple[int, ...]]] = defaultdict(list)
        for word in words:
            if len(word) > 1:
                self._words[word[-2]].append(tuple(word))
        self._reach = max((len(word) - 1 for word in words), default=0)
        self._followers: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)
        self._num_read = 0

    @property
    def is_empty(self) -> bool:
        """Nothing is banned anywhere."""
        return not (len(self._everywhere) or self._first or self._ends or self._words or self._size)

    def at(self, token_ids: Sequence[int], draft: DraftTree) -> Banned:
        """What may not come behind the text and behind each node of a draft.

        Args:
            token_ids: prompt and what was written; never shorter than last time.
            draft: nodes behind it.
        """
        self._read(token_ids)
        found = [(row, token) for row, path in enumerate(draft.paths()) for token in self._behind(token_ids, path)]
        places = np.array(found, dtype=np.int64).reshape(-1, 2)
        return Banned(self._everywhere, places[:, 0], places[:, 1])

    def _behind(self, token_ids: Sequence[int], path: Sequence[int]) -> Iterator[int]:
        """What is banned behind the text and a path of draft tokens, besides `everywhere`."""
        written = len(token_ids) - self._num_prompt_tokens + len(path)
        if written == 0:
            yield from self._first
        if written < self._min_tokens:
            yield from self._ends
        if self._words:
            text = (*token_ids[-self._reach :], *path)
            for word in self._words.get(text[-1], ()):
                if text[1 - len(word) :] == word[:-1]:
                    yield word[-1]
        if self._size and len(token_ids) + len(path) >= self._size - 1:
            yield from self._repeated(token_ids, path)

    def _repeated(self, token_ids: Sequence[int], path: Sequence[int]) -> Iterator[int]:
        """What would repeat a run of `no_repeat_ngram_size` tokens."""
        before = self._size - 1
        text = (*token_ids[len(token_ids) - before :], *path) if before else tuple(path)
        last = text[len(text) - before :]
        yield from self._followers.get(last, ())
        for i in range(len(path)):
            if text[i : i + before] == last:
                yield path[i]

    def _read(self, token_ids: Sequence[int]) -> None:
        """Note which token followed each run of the text."""
        before = self._size - 1
        if before < 0:
            return
        for at in range(max(self._num_read, before), len(token_ids)):
            self._followers[tuple(token_ids[at - before : at])].add(token_ids[at])
        self._num_read = len(token_ids)
