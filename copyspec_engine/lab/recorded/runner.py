"""Our runners, made to write recorded answers, or to guess them as a draft model does."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any
from zlib import crc32

import numpy as np
import torch

from copyspec_engine.execution.packing import Piece
from copyspec_engine.execution.runner import Runner
from copyspec_engine.sampling.gumbel import noise_keys

__all__ = ["CERTAIN", "RecordedDraftRunner", "RecordedRunner", "force", "next_tokens"]

CERTAIN = 1e4
"""A logit that no random model reaches."""


def next_tokens(answer: Sequence[int], written: Sequence[int]) -> list[int]:
    """The recorded token behind the first `written` ones, for each of `written`; behind the record its end token.

    What a draft node holds does not matter: the record's token at its depth is the right one where the path to it is
    the record, and nobody ever gets to a node whose path is not.
    """
    last = len(answer) - 1
    return [answer[min(count, last)] for count in written]


def force(logits: torch.Tensor, tokens: Sequence[int]) -> None:
    """Make `tokens` the likeliest ones, in place: one for each row of `logits`, shape (rows, vocabulary)."""
    logits.scatter_(1, torch.tensor(tokens)[:, None].to(logits.device), CERTAIN)


class RecordedRunner:
    """Passes of another runner, in full, whose logits then say what is recorded.

    Args:
        runner: what computes them.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.answers: dict[str, Sequence[int]] = {}
        """The recorded answer of each request, by its id."""
        self.passes: Counter[str] = Counter()
        """Passes that gave a request a token, by its id."""
        self._prompts: dict[str, int] = {}
        """How long each request's prompt is, by its id."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever else the runner has
        return getattr(self._runner, name)

    @property
    def vocab_size(self) -> int:
        return self._runner.vocab_size

    @torch.inference_mode()
    def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """See `Runner`."""
        for piece in pieces:
            self._prompts.setdefault(piece.key, len(piece.text))
        logits = self._runner.forward(pieces)
        rows = [piece for piece in pieces if piece.num_logits]
        self.passes.update(piece.key for piece in rows)
        if rows:
            force(logits, [token for piece in rows for token in self._tokens(piece)])
        return logits

    @property
    def num_rows(self) -> int:
        return len(self._prompts)

    def release(self, key: str) -> None:
        self._prompts.pop(key, None)
        self._runner.release(key)

    def num_written(self, piece: Piece) -> int:
        """Tokens of its answer that a row holds."""
        return len(piece.text) - self._prompts[piece.key]

    def _tokens(self, piece: Piece) -> list[int]:
        """What is recorded behind a row's last token and behind each node of its draft."""
        done = self.num_written(piece)
        return next_tokens(self.answers[piece.key], [done + depth for depth in (0, *piece.draft.depths())])


class RecordedDraftRunner:
    """Passes of a draft model's runner, in full, whose likeliest token is the recorded one at a share of all places.

    Which places is a function of (record, position) alone: the same for every peer, and others in each answer. The
    likeliest token always gets the probability `agreement`, so that nothing can be told from it: draft models of
    checkpoints say more.

    Args:
        runner: what computes them.
        target: the runner of the model that it drafts for, which knows what is recorded.
        agreement: share of the places, above 0 and below 1.
    """

    def __init__(self, runner: Runner, target: RecordedRunner, agreement: float) -> None:
        self._runner, self._target, self._agreement = runner, target, agreement

    @property
    def vocab_size(self) -> int:
        return self._runner.vocab_size

    @property
    def num_rows(self) -> int:
        return self._runner.num_rows

    @torch.inference_mode()
    def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """See `Runner`."""
        logits = self._runner.forward(pieces)
        tokens = [self._token(piece) for piece in pieces if piece.num_logits]
        if tokens:
            likely = logits.logsumexp(dim=-1, keepdim=True) + math.log(self._agreement / (1 - self._agreement))
            logits.scatter_(1, torch.tensor(tokens)[:, None].to(logits.device), likely)
        return logits

    def release(self, key: str) -> None:
        self._runner.release(key)

    def _token(self, piece: Piece) -> int:
        """What it says behind a text: the recorded token or, where it errs, the one with the next id."""
        answer = self._target.answers[piece.key]
        (token,) = next_tokens(answer, [self._target.num_written(piece)])
        (chance,) = noise_keys(crc32(np.array(answer).tobytes()), [len(piece.text)])[:, 0] / 2.0**64
        errs = bool(chance >= self._agreement)
        return (token + errs) % self.vocab_size
