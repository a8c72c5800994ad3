"""Which tokens stand in a text and how often each was sampled, for penalties; counted as the text grows, not again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["TokenCounts"]


class TokenCounts:
    """Counts over one request's text."""

    def __init__(self) -> None:
        self.ids: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        """The distinct tokens of prompt and answer, ascending, shape (distinct,)."""
        self.times: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        """How often each stands in the answer, shape (distinct,); 0 for one of the prompt alone."""
        self._num_read = 0

    def update(self, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Count the tokens that have come since the last time.

        Args:
            token_ids: the whole text, which only ever grows.
            num_prompt_tokens: how many of them are the prompt's.
        """
        new = np.asarray(token_ids[self._num_read :], dtype=np.int64)
        if not len(new):
            return
        sampled = new[max(num_prompt_tokens - self._num_read, 0) :]
        self._num_read += len(new)
        fresh = np.setdiff1d(new, self.ids)
        at = np.searchsorted(self.ids, fresh)
        self.ids, self.times = np.insert(self.ids, at, fresh), np.insert(self.times, at, 0)
        np.add.at(self.times, np.searchsorted(self.ids, sampled), 1)

    def times_of(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How often each of `tokens` stands in the answer, in their shape."""
        at = np.searchsorted(self.ids, tokens)
        known = np.append(self.ids, -1)[at] == tokens
        return np.where(known, np.append(self.times, 0)[at], 0)
