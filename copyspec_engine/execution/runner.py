"""The model and its KV: verify passes of any transformers decoder over rows of KV slots."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone knows
from transformers import PreTrainedModel

from copyspec_engine.chat.tokenizer import ChatTokenizer
from copyspec_engine.execution.accelerator import has_float64
from copyspec_engine.execution.attention import (
    KVBatch,
    KVRow,
    KVStore,
    Row,
    Slots,
    on_device,
    slots_of,
)
from copyspec_engine.execution.checkpoint import (
    vocab_size,
)
from copyspec_engine.execution.cuda_graphs import StaticPasses
from copyspec_engine.execution.generation_defaults import GenerationDefaults
from copyspec_engine.execution.narrow_decoder import MOST_TOKENS, NarrowDecoder, NarrowPasses
from copyspec_engine.execution.ordered_attention import OrderedRow
from copyspec_engine.execution.packing import Piece
from copyspec_engine.values.info import EngineInfo, Execution
from copyspec_engine.values.tokens import TokenArray

__all__ = ["LoadedModel", "ModelRunner", "Runner"]

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """What the engine needs of a model."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def num_rows(self) -> int:
        """Rows for which something is kept until `release`."""
        ...

    def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Read all pieces; the logits that they want, in order, shape (sum of num_logits, vocabulary)."""
        ...

    def release(self, key: str) -> None:
        """A row is over (`Piece.key`): whatever is kept of it alone can go. It may be unknown here."""
        ...


class ModelRunner:
    """Forward passes of a transformers decoder over our KV slots.

    Args:
        model: in evaluation mode, on its device, with the attention implementation "copyspec".
        num_slots: token slots of the KV pool.
        exact_widths: fill passes up to one of these numbers of tokens, ascending, and sum in an order that a token's
            own path decides, so that its bits depend on nothing else (exact_passes.py); None: as is fastest.
        execution: how passes run, see `EngineInfo.execution`; those for a GPU not in exact mode.
        narrow: the model's narrow weights, for "narrow".
        kv_dtype: see `KVStore`; other than the model's own not where kernels for a GPU read keys and values.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_slots: int,
        exact_widths: tuple[int, ...] | None = None,
        execution: Execution = "eager",
        narrow: NarrowDecoder | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self._model = model
        self.device = model.device
        self._vocab_size = vocab_size(model)
        self._store = KVStore(num_slots, kv_dtype)
        self.exact_widths = exact_widths
        self.passes: StaticPasses | None = None
        """How passes run that are packed; None: all run through the model's own path."""
        if execution in ("paged", "graphs", "compiled"):
            self.passes = StaticPasses(model, self._store, use_graphs=execution != "paged")
        self._narrow: NarrowPasses | None = None
        self.narrow_tokens = 0
        """Passes of up to so many tokens are narrow ones."""
        if execution == "narrow":
            assert narrow is not None
            self._narrow, self.narrow_tokens = NarrowPasses(narrow, self._store), MOST_TOKENS

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def num_rows(self) -> int:
        """0: the pool's slots are all that a row has."""
        return 0

    @property
    def store(self) -> KVStore:
        return self._store

    @property
    def is_static(self) -> bool:
        """Whether passes run out of static buffers, so that the first one of a size takes long."""
        return self.passes is not None

    @property
    def capture_error(self) -> str | None:
        """Why passes are not captured any more; None if they are, or never were."""
        return None if self.passes is None else self.passes.capture_error

    def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        if self.exact_widths is None:
            logits = self.run(pieces)
        else:
            logits = torch.cat([self.run(those) for those in _side_by_side(pieces, self.exact_widths[-1])])
        return logits if has_float64(self.device) else logits.cpu()  # in which tokens are drawn

    def release(self, key: str) -> None:
        """Nothing to do: the pool's slots are all that a row has, and whoever took them gives them back."""

    @torch.inference_mode()
    def run(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Read all pieces in one pass; the logits they want, in order, shape (sum of num_logits, vocabulary).

        They are good until the next pass.
        """
        if self.passes is not None:
            return self.passes.run(pieces)
        if self._narrow is not None and sum(len(piece.ids) for piece in pieces) <= self.narrow_tokens:
            return self._narrow.run(pieces)
        ids = [token for piece in pieces for token in piece.ids]
        written = len(ids)
        ids += [0] * (self._filled(written) - written)
        rows: list[Row] = []
        for piece in pieces:
            rows.append(self._row(piece, rows[-1].stop if rows else 0))
        wanted = [
            row.stop - 1 - i for row, piece in zip(rows, pieces, strict=True) for i in reversed(range(piece.num_logits))
        ]
        positions = torch.cat([row.new_positions for row in rows])
        if written < len(ids):
            positions = F.pad(positions, (0, len(ids) - written))
        result = self._model(
            input_ids=torch.tensor([ids], device=self.device),
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=self._to_keep(wanted, len(ids)),
            kv_batch=KVBatch(
                store=self._store,
                write=self._index(np.concatenate([piece.slots[piece.base : piece.context] for piece in pieces])),
                written=written,
                rows=rows,
                device=self.device,
            ),
        )
        logits: torch.Tensor = result.logits[0]  # from some models those of every token
        return logits[wanted] if len(logits) == len(ids) else logits[: len(wanted)]

    def _filled(self, count: int) -> int:
        """Tokens of a pass that reads `count`."""
        return count if self.exact_widths is None else next(width for width in self.exact_widths if width >= count)

    def _to_keep(self, wanted: Sequence[int], width: int) -> torch.Tensor | int:
        """Which of a pass's tokens the head reads, filled up as a pass is; 0: all `width` of them."""
        count = self._filled(len(wanted))
        if count == width:
            return 0
        return torch.tensor([*wanted, *[0] * (count - len(wanted))], dtype=torch.long, device=self.device)

    def _row(self, piece: Piece, start: int) -> Row:
        if self.exact_widths is not None:
            return OrderedRow.of(piece, start, self.exact_widths[0], self.device)
        new, draft, visible = len(piece.ids), piece.draft, None
        positions = torch.arange(piece.context)
        if not draft.is_chain:
            positions[piece.base :] = torch.from_numpy(piece.positions())
            visible = torch.from_numpy(draft.visible(new - len(draft))).to(self.device)
        slots = self._index(piece.slots[: piece.context])
        return KVRow(start, new, slots, positions.to(self.device), visible)

    def _index(self, slots: TokenArray) -> Slots:
        return on_device(slots_of(slots), self.device)


def _side_by_side(pieces: Sequence[Piece], most: int) -> Iterator[list[Piece]]:
    """Pieces in passes of at most `most` tokens."""
    those: list[Piece] = []
    for piece in pieces:
        if those and sum(len(other.ids) for other in those) + len(piece.ids) > most:
            yield those
            those = []
        those.append(piece)
    yield those


@dataclass(slots=True)
class LoadedModel:
    """A model that is ready to serve."""

    runner: Runner
    tokenizer: ChatTokenizer
    info: EngineInfo
    """What it is and how it is served, as far as that is known when it is loaded."""
    eos_token_ids: frozenset[int]
    cost_is_measured: bool = False
    """`info.step_cost` was measured, and so may be corrected, rather than given."""
    exact_widths: tuple[int, ...] | None = None
    """Tokens of its passes where bits must not depend on what else is read, see `EngineConfig.exact`; None: any."""
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    """What the checkpoint says of calls that do not say otherwise."""
    draft: LoadedModel | None = None
    """A smaller model with the same vocabulary and as many slots, which drafts."""

    @property
    def exact_width(self) -> int | None:
        """Most tokens that one request may have in a pass; None: any number."""
        return None if self.exact_widths is None else self.exact_widths[-1]
