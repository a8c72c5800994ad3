"""The token ids that a conversation was written with, so that its next prompt begins with the same ones.

A model may spell a text otherwise than the tokenizer would. Its next prompt holds that text again; read from the text
it would have other ids there, and nothing behind them could be reused. So the ids of the last calls are kept for each
session, and taken wherever a prompt holds exactly their text, whole stretches between control tokens at a time.

The text decides; ids only say how it is spelled.

A model may read its own spelling otherwise than the tokenizer's, so the same messages can get another answer in the
session that wrote them than in a fresh one, greedy decoding too. `EngineConfig(keep_token_ids=False)` keeps no ids: the
same messages are then the same tokens everywhere, at the price of the KV behind a text that was spelled otherwise.
"""

from __future__ import annotations

import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from copyspec_engine.values.fairness import first_to_go

__all__ = ["KnownIds", "Speller", "Spelling"]

_PER_SESSION = 8
_MAX_TOKENS = 1 << 23
"""Ids that are kept in all, of four bytes each; a session's texts need about as much again once they are used."""


class Spelling:
    """One call's token ids, prompt and answer; their texts are added when they are first needed."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.token_ids = array("i", token_ids)
        self.stretches: tuple[tuple[int, str], ...] | None = None
        """(index behind the last id, text) of each control token and of what stands between two."""
        self.begun: tuple[tuple[int, str], ...] = ()
        """Those of an earlier call that this one begins with."""


class KnownIds:
    """The last calls of each session. Thread-safe.

    Args:
        max_tokens: kept in all; the least recently used session of the account that has most goes first.
    """

    def __init__(self, max_tokens: int = _MAX_TOKENS) -> None:
        self._max_tokens, self._num_tokens = max_tokens, 0
        self._lock = threading.Lock()
        self._sessions: OrderedDict[str, tuple[Spelling, ...]] = OrderedDict()
        self._accounts: dict[str, str | None] = {}

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    def keep(self, session_id: str, token_ids: Sequence[int], account: str | None = None) -> None:
        """Keep a call's ids, which count for an account; earlier calls that they begin with are not needed any more."""
        spelling = Spelling(token_ids)
        ids = spelling.token_ids
        with self._lock:
            others: list[Spelling] = []
            for other in self._pop(session_id):
                if other.token_ids != ids[: len(other.token_ids)]:
                    others.append(other)
                elif len(other.stretches or ()) > len(spelling.begun):
                    spelling.begun = other.stretches or ()
            kept = (spelling, *others)[:_PER_SESSION]
            self._sessions[session_id], self._accounts[session_id] = kept, account
            self._num_tokens += _size(kept)
            while self._num_tokens > self._max_tokens:
                self._pop(first_to_go((name, self._accounts[name], _size(own)) for name, own in self._sessions.items()))

    def of(self, session_id: str | None) -> tuple[Spelling, ...]:
        """A session's calls, the last one first."""
        with self._lock:
            if session_id is None or session_id not in self._sessions:
                return ()
            self._sessions.move_to_end(session_id)
            return self._sessions[session_id]

    def drop(self, session_id: str) -> None:
        """Forget a session."""
        with self._lock:
            self._pop(session_id)

    def _pop(self, session_id: str) -> tuple[Spelling, ...]:
        spellings = self._sessions.pop(session_id, ())
        self._accounts.pop(session_id, None)
        self._num_tokens -= _size(spellings)
        return spellings


def _size(spellings: Sequence[Spelling]) -> int:
    return sum(len(spelling.token_ids) for spelling in spellings)


class Speller:
    """Spells rendered prompts as earlier calls did.

    A control token divides a text: what stands before it has the same ids whatever stands behind, and the other way
    round. So ids can be taken over up to a control token.

    Args:
        control: the ids of control tokens by name.
        encode: token ids of a text, none added.
        decode: text of token ids, control tokens by name.
    """

    def __init__(
        self,
        control: Mapping[str, int],
        encode: Callable[[str], list[int]],
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        self._ids, self.encode, self._decode = frozenset(control.values()), encode, decode
        names = sorted(map(re.escape, control), key=len, reverse=True)
        self._names = re.compile("|".join(names) or "(?!)")

    def spell(self, text: str, spellings: Sequence[Spelling]) -> list[int]:
        """Token ids of a text, those of the spelling that it has most in common with as far as it is the same."""
        best, best_count, best_at = None, 0, 0
        for spelling in spellings:
            count, at = self._common(text, self._stretches(spelling))
            if at > best_at:
                best, best_count, best_at = spelling, count, at
        if best is None or best.stretches is None:
            return self.encode(text)
        end, last = best.stretches[best_count - 1]
        known = best.token_ids[:end].tolist()
        if not self._names.fullmatch(last):
            return known + self.encode(text[best_at:])
        # With the control token before it, so that a text in the middle is not taken for one at the beginning.
        rest = self.encode(last + text[best_at:])
        return known + rest[1:] if rest[0] == known[-1] else self.encode(text)

    def _common(self, text: str, stretches: Sequence[tuple[int, str]]) -> tuple[int, int]:
        """How many stretches a text begins with, and their length, up to where it can be divided."""
        count = at = 0
        for _, stretch in stretches:
            if not text.startswith(stretch, at):
                break
            count, at = count + 1, at + len(stretch)
        while count and not (self._names.match(text, at) or self._names.fullmatch(stretches[count - 1][1])):
            count, at = count - 1, at - len(stretches[count - 1][1])
        return count, at

    def _stretches(self, spelling: Spelling) -> Sequence[tuple[int, str]]:
        """The texts of a spelling's stretches; none if they do not say which control tokens are in it."""
        if spelling.stretches is None:
            known = list(spelling.begun)
            while known and not self._names.fullmatch(known[-1][1]):
                known.pop()  # it may go on
            begin, ids = known[-1][0] if known else 0, spelling.token_ids
            cuts = {at for i in range(begin, len(ids)) if ids[i] in self._ids for at in (i, i + 1)}
            ends = sorted((cuts | {len(ids)}) - {begin})
            starts = [begin, *ends][: len(ends)]
            texts = [self._decode(ids[a:b]) for a, b in zip(starts, ends, strict=True)]
            # A control token's name that was spelled in letters, or a decoder that needs to see the whole text.
            pairs = zip(starts, texts, strict=True)
            is_plain = any(ids[start] not in self._ids and self._names.search(text) for start, text in pairs)
            is_whole = "".join(texts) == self._decode(ids[begin:])
            found = (*known, *zip(ends, texts, strict=True))
            spelling.stretches = found if is_whole and not is_plain else ()
        return spelling.stretches
