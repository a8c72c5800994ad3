"""What changes logits before a token is chosen: the grammar's mask, logit_bias, penalties and bans, in that order.

All of it is a function of the text in front of a place, the sequence's own and the draft's path down to it, so that it
is the same to the last bit whether that text was written or only drafted. What was written is counted as it grows, not
again at every step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.values.config import SamplingParams

__all__ = [
    "Banned",
    "Bans",
    "TokenCounts",
    "add_bias",
    "ban",
    "mask_tokens",
    "penalise",
]


def mask_tokens(scores: torch.Tensor, allowed: torch.Tensor) -> None:
    """Make every token impossible that is not allowed.

    Args:
        scores: shape (nodes, vocabulary); changed in place.
        allowed: bit t % 32 of word t // 32 says whether token t may follow, shape (nodes, words), int32. Tokens beyond
            the last word may not.
    """
    forbidden = ~_unpacked(allowed.to(scores.device))[:, : scores.shape[-1]]
    scores[:, : forbidden.shape[1]].masked_fill_(forbidden, -torch.inf)
    scores[:, forbidden.shape[1] :] = -torch.inf


def _unpacked(words: torch.Tensor) -> torch.Tensor:
    """The bits of a mask, shape (nodes, 32 * words)."""
    octets = words.contiguous().view(torch.uint8)
    if octets.device.type == "cpu":  # many times faster there
        return torch.from_numpy(np.unpackbits(octets.numpy(), axis=1, bitorder="little")).view(torch.bool)
    return _unpacked_octets(octets)


def _unpacked_octets(octets: torch.Tensor) -> torch.Tensor:
    """The bits of bytes on any device, shape (nodes, 8 * bytes)."""
    bits = (octets[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=octets.device)) & 1
    return bits.view(len(octets), -1).bool()


def add_bias(scores: torch.Tensor, logit_bias: tuple[tuple[int, float], ...]) -> None:
    """Add each token's bias to its scores, shape (nodes, vocabulary), in place."""
    tokens = torch.tensor([token for token, _ in logit_bias], device=scores.device)
    scores[:, tokens] += torch.tensor([bias for _, bias in logit_bias], dtype=scores.dtype, device=scores.device)


def ban(scores: torch.Tensor, banned: Banned, *, is_bound: bool) -> None:
    """Make banned tokens impossible, in place.

    Args:
        scores: shape (nodes, vocabulary).
        banned: by nodes.
        is_bound: a grammar has made other tokens impossible. Where it leaves only banned ones, these stay possible.
    """
    before = scores.clone() if is_bound else scores
    scores[:, torch.from_numpy(banned.everywhere).to(scores.device)] = -torch.inf
    rows, tokens = (torch.from_numpy(part).to(scores.device) for part in (banned.rows, banned.tokens))
    scores[rows, tokens] = -torch.inf
    if is_bound:
        stuck = scores.amax(dim=-1) == -torch.inf
        scores[stuck] = before[stuck]


def penalise(scores: torch.Tensor, params: SamplingParams, counts: TokenCounts, draft: DraftTree) -> None:
    """Apply the penalties at every node, each with its own path.

    Args:
        scores: behind the sequence's last token and behind each node, shape (1 + len(draft), vocabulary); changed in
            place.
        params: repetition_penalty, frequency_penalty and presence_penalty, applied in that order.
        counts: of the sequence.
        draft: the nodes.
    """
    device = scores.device
    drafted, on_path = _count_paths(draft)
    columns = torch.from_numpy(drafted).to(device)
    untouched = scores[:, columns]
    ids, times = torch.from_numpy(counts.ids).to(device), torch.from_numpy(counts.times).to(device)
    scores[:, ids] = _penalised(scores[:, ids], times, params)
    if len(draft):
        stands = torch.from_numpy(on_path > 0).to(device)
        times = torch.from_numpy(on_path + counts.times_of(drafted)).to(device)
        scores[:, columns] = torch.where(stands, _penalised(untouched, times, params), scores[:, columns])


def _penalised(scores: torch.Tensor, times: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Scores of tokens that stand in the text, `times` times in the answer; shape (nodes, tokens)."""
    penalty = params.repetition_penalty
    scores = torch.where(scores > 0, scores / penalty, scores * penalty)
    scores = scores - times * params.frequency_penalty
    return scores - (times > 0) * params.presence_penalty


def _count_paths(draft: DraftTree) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The draft's distinct tokens, and how often each stands on the path to the root and to every node.

    Returns:
        Shapes (distinct,) and (1 + len(draft), distinct).
    """
    tokens, columns = np.unique(np.asarray(draft.tokens, dtype=np.int64), return_inverse=True)
    counts = np.zeros((1 + len(draft), len(tokens)), dtype=np.int64)
    for node, (parent, column) in enumerate(zip(draft.parents, columns.tolist(), strict=True)):
        counts[node + 1] = counts[parent + 1]
        counts[node + 1, column] += 1
    return tokens, counts


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
