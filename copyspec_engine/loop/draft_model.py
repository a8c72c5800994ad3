"""A smaller model that guesses what the model will write, with KV sequences of its own.

It follows each request lazily: what was written since it was last asked is read when it is asked again, so that
stretches which it has no part in cost nothing. What it wrote and was not accepted is written over.

Not covered: when it is worth asking (mix.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.execution.packing import Piece
from copyspec_engine.execution.runner import LoadedModel
from copyspec_engine.execution.threads import one_torch_thread
from copyspec_engine.kv.slots import KVSequence, KVSlots
from copyspec_engine.loop.draft_chain import Guess
from copyspec_engine.loop.request import Request
from copyspec_engine.loop.scheduler import piece_of, split_evenly

__all__ = ["DraftWriter", "UnknownTokenError"]


class UnknownTokenError(ValueError):
    """A text holds a token that the draft model lacks."""


@dataclass(slots=True, eq=False)
class _Followed:
    """How far the draft model has followed a request."""

    sequence: KVSequence
    """The request's text with its guesses behind."""
    num_known: int = 0
    """Tokens of the text when it was last looked at; what stands behind them is guessed."""
    has_read: bool = False
    """It has computed something, rather than only found it in the cache."""


class DraftWriter:
    """Follows requests and guesses their next tokens. Only the engine's loop thread may use it.

    Args:
        model: with the vocabulary of the one it drafts for.
        kv: its own.
        vocab_size: width of the logits of the model it drafts for; the rest of the draft model's is padding.
        max_prefill_tokens: tokens that one pass reads, of all requests together, where more than one is missing.
    """

    def __init__(self, model: LoadedModel, kv: KVSlots, vocab_size: int, max_prefill_tokens: int) -> None:
        self.model, self.kv = model, kv
        self._vocab_size = min(vocab_size, model.runner.vocab_size)
        self._max_prefill_tokens = max_prefill_tokens
        self._followed: dict[Request, _Followed] = {}
        self.num_passes = self.num_tokens_read = 0

    @property
    def num_rows(self) -> int:
        """Requests that it follows."""
        return len(self._followed)

    def follow(self, request: Request) -> int:
        """Look at what a request has written; how many of its tokens are still to be read, at least 1.

        Raises:
            UnknownTokenError: it holds a token that the draft model lacks.
        """
        followed = self._followed.get(request) or self._begin(request)
        sequence, text = followed.sequence, request.sequence.token_ids
        at, end = followed.num_known, min(len(text), len(sequence.token_ids))
        while at < end and sequence.token_ids[at] == text[at]:  # guesses that were right
            at += 1
        known = self.model.runner.vocab_size
        if max(text[at:], default=0) >= known:
            raise UnknownTokenError(f"the text holds a token id from {known} on, which the draft model lacks")
        sequence.num_computed = min(sequence.num_computed, at, len(text) - 1)
        sequence.token_ids[at:] = text[at:]
        followed.num_known = len(text)
        return sequence.num_pending

    def room(self, request: Request) -> int:
        """Most tokens that it can guess behind a request's text before its context is full."""
        return max(self.model.info.max_model_len - len(request.sequence.token_ids), 0)

    def guess(self, requests: Sequence[Request]) -> list[Guess | None]:
        """One pass over requests that were looked at: the next token of each, which is read in the next pass.

        None: more than a pass may take is still to be read, a part of it was; or there are no slots for it.
        """
        sequences = [self._followed[request].sequence for request in requests]
        counts = split_evenly([sequence.num_pending for sequence in sequences], self._max_prefill_tokens)
        pieces: dict[KVSequence, Piece] = {}
        for request, sequence, count in zip(requests, sequences, counts, strict=True):
            # Sequences that nobody asks for now give way.
            if self.kv.secure(sequence, count, lambda: self._drop_all_but(requests)):
                pieces[sequence] = piece_of(request.id, sequence, count, DraftTree())
        if not pieces:
            return [None] * len(requests)
        found = self._run(pieces)
        for sequence, piece in pieces.items():
            sequence.num_computed += len(piece.ids)
        for sequence, guess in found.items():
            sequence.token_ids.append(guess.token)
        for request in requests:
            self._followed[request].has_read = True
        return [found.get(sequence) for sequence in sequences]

    def _run(self, pieces: dict[KVSequence, Piece]) -> dict[KVSequence, Guess]:
        """Read the sequences' pieces; a guess for each sequence that is read to its end."""
        self.num_passes += 1
        self.num_tokens_read += sum(len(piece.ids) for piece in pieces.values())
        logits = self.model.runner.forward(list(pieces.values()))
        if not len(logits):
            return {}
        with one_torch_thread():
            scores = logits[:, : self._vocab_size].float()
            best = scores.argmax(dim=-1)
            likely = scores.softmax(dim=-1).gather(-1, best[:, None]).squeeze(-1)
        wanting = [sequence for sequence, piece in pieces.items() if piece.num_logits]
        return dict(zip(wanting, map(Guess, best.tolist(), likely.tolist()), strict=True))

    def release(self, request: Request) -> None:
        """A request is over: keep what was computed for its conversation's next call, free the rest."""
        followed = self._followed.pop(request, None)
        if followed is not None:
            sequence = followed.sequence
            sequence.num_computed = min(sequence.num_computed, followed.num_known)
            owner = request.kept_as if followed.has_read else None
            self.kv.end(sequence, owner, request.asked.cache_salt, request.account)

    def drop(self, request: Request) -> None:
        """Forget all of a request."""
        followed = self._followed.pop(request, None)
        if followed is not None:
            self.kv.end(followed.sequence)

    def _begin(self, request: Request) -> _Followed:
        text = request.sequence.token_ids
        slots = self.kv.begin(text[:-1], request.begins_with, request.asked.cache_salt)
        self._followed[request] = followed = _Followed(KVSequence(text[: len(slots)], slots, len(slots)))
        return followed

    def _drop_all_but(self, asking: Sequence[Request]) -> bool:
        """Forget all other requests; False if there are none."""
        others = [request for request in self._followed if request not in asking]
        for other in others:
            self.drop(other)
        return bool(others)
