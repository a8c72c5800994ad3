"""Which widths of a pass give a token the same bits, wherever it stands and whatever else is read: found at load.

A matrix product adds up each row by itself, but libraries choose how by the number of rows: for one or two of them
another way than for many, on a GPU another way for nearly every number. And what is computed number by number may be
rounded otherwise at the end of a thread's share. So it is tried: the same token behind the same text, at every place
of a pass, among others and alone. Passes are then filled up to the widths that agree.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.execution.packing import Piece
from copyspec_engine.values.errors import UnsupportedModelError

__all__ = ["EXACT_WIDTHS", "agreeing_widths"]

logger = logging.getLogger(__name__)

EXACT_WIDTHS = (4, 8, 16, 32, 64)
"""Tokens of a pass that are tried. Wider passes take longer on a CPU, but fewer draft tokens find room in others."""
_TEXT = 4
"""Tokens that the one that is looked at stands behind; no more than a pass holds."""


class WidthRunner(Protocol):
    """What is checked: `ModelRunner`."""

    def run(self, pieces: Sequence[Piece]) -> torch.Tensor: ...


class MakeWidthRunner(Protocol):
    """Makes one whose passes are filled up to one of these widths."""

    def __call__(self, *, num_slots: int, exact_widths: tuple[int, ...]) -> WidthRunner: ...


def agreeing_widths(
    name: str, vocabulary: int, make_runner: MakeWidthRunner, widths: Sequence[int] = EXACT_WIDTHS
) -> tuple[int, ...]:
    """The most of some widths that agree on the bits of a token; of as many, the widest.

    Args:
        name: of the model, for messages.
        vocabulary: its token ids.
        make_runner: `ModelRunner` of this model.
        widths: what is tried.

    Raises:
        UnsupportedModelError: at no width is a token independent of what is read with it.
    """
    groups: list[tuple[torch.Tensor, tuple[int, ...]]] = []
    for width in widths:
        runner = make_runner(num_slots=_TEXT + widths[-1], exact_widths=(width,))
        logits = _logits_everywhere(runner, width, vocabulary)
        if not bool((logits == logits[0]).all()):
            continue
        same = next((i for i, (found, _) in enumerate(groups) if torch.equal(found, logits[0])), None)
        if same is None:
            groups.append((logits[0], (width,)))
        else:
            groups[same] = groups[same][0], (*groups[same][1], width)
    if not groups:
        raise UnsupportedModelError(
            f"Got exact=True but {name} gives a token other logits here by what else is read with it, at every width "
            "of a pass: leave exact out"
        )
    agreeing = max((those for _, those in groups), key=lambda those: (len(those), those))
    logger.info("%s: passes of %s tokens agree to the last bit", name, ", ".join(map(str, agreeing)))
    return agreeing


def _logits_everywhere(runner: WidthRunner, width: int, vocabulary: int) -> torch.Tensor:
    """Logits behind one token, alone and then as a draft at each other place of a pass; shape (width, vocabulary)."""
    generator = np.random.default_rng(0)
    *text, token = generator.integers(0, vocabulary, _TEXT + 1).tolist()
    slots = np.arange(_TEXT + width)
    runner.run([Piece(slots, 0, text, DraftTree(), 0)])
    found = [runner.run([Piece(slots, _TEXT, [token], DraftTree(), 1)])]
    for first in range(2):
        nodes = generator.integers(0, vocabulary, width - 1)
        nodes[first::2] = token
        draft = DraftTree(tuple(nodes.tolist()), (-1,) * (width - 1))  # each behind the text's last token
        found.append(runner.run([Piece(slots, _TEXT - 1, [text[-1], *draft.tokens], draft, width - 1)])[first::2])
    return torch.cat(found)
