"""Models that read a text once, front to back: with recurrent, linear-attention or convolution layers.

Such a layer keeps a state of fixed size that every token changes for good: a rejected draft could not be taken out of
it again, nor can a later call start from the middle. So nothing is drafted and nothing is reused over calls. Each
sequence has a state of its own, which the model makes and transformers keeps.

Not covered: several sequences in one pass, and a state that goes on in the conversation's next call.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from copyspec_engine.execution.checkpoint import relative_difference, tolerance, vocab_size
from copyspec_engine.execution.packing import Piece
from copyspec_engine.values.errors import UnsupportedModelError

__all__ = ["StatefulRunner", "check_state"]

logger = logging.getLogger(__name__)

_STATE_NAMES = ("past_key_values", "cache_params", "state")
"""What models call their state, as an argument and in what they return."""


class _State:
    """What the model knows of the tokens that it has read."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        takes = inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._takes_positions = "position_ids" in takes
        self._kept: dict[str, Any] = {}
        if "past_key_values" in takes and model._supports_default_dynamic_cache():  # type: ignore[operator]
            self._kept["past_key_values"] = DynamicCache(config=model.config.get_text_config())
        self.num_read = 0
        self.logits: torch.Tensor | None = None
        """After the last token, shape (1, vocabulary)."""

    @torch.inference_mode()
    def read(self, ids: Sequence[int]) -> torch.Tensor:
        """Go on with `ids`, at least one; the logits after the last of them, shape (1, vocabulary).

        Raises:
            UnsupportedModelError: the model keeps no state.
        """
        device, end = self._model.device, self.num_read + len(ids)
        if self._takes_positions:  # a model that counts what it has read asks its first layer, which may not know
            self._options["position_ids"] = torch.arange(self.num_read, end, device=device)[None]
        ids_in = torch.tensor([ids], device=device)
        result = self._model(input_ids=ids_in, use_cache=True, **self._options, **self._kept)
        self._kept |= {name: result[name] for name in _STATE_NAMES if result.get(name) is not None}
        if not self._kept:
            raise UnsupportedModelError(f"{type(self._model).__name__} returns none of {', '.join(_STATE_NAMES)}")
        self.num_read = end
        logits: torch.Tensor = result.logits[0, -1:]
        self.logits = logits
        return logits

    @property
    def bytes_per_token(self) -> int:
        """What attention layers between the others keep of each token."""
        layers = getattr(self._kept.get("past_key_values"), "layers", ())
        kept = [tensor for layer in layers for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))]
        return sum(t.element_size() * t.shape[1] * t.shape[3] for t in kept if t is not None and t.dim() == 4)


class StatefulRunner:
    """Forward passes of a model whose state cannot be taken back, one row after the other.

    Args:
        model: in evaluation mode, on its device, with its own attention.
        in_pieces: it may read several tokens behind others. If not, a prompt is read whole with its last piece.
    """

    def __init__(self, model: PreTrainedModel, in_pieces: bool) -> None:
        self._model, self._in_pieces = model, in_pieces
        self._states: dict[str, _State] = {}

    @property
    def vocab_size(self) -> int:
        return vocab_size(self._model)

    @property
    def num_rows(self) -> int:
        """Rows whose state is in memory."""
        return len(self._states)

    def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """As `Runner.forward`.

        Raises:
            ValueError: there is a draft.
        """
        if any(len(piece.draft) for piece in pieces):
            raise ValueError("Got a draft but expected none: this model's state cannot be taken back")
        return torch.cat([self._forward_row(piece) for piece in pieces])

    def release(self, key: str) -> None:
        """Drop a row's state; if it goes on all the same, its text is read again."""
        self._states.pop(key, None)

    def _forward_row(self, piece: Piece) -> torch.Tensor:
        if not piece.num_logits and not self._in_pieces:
            return torch.empty((0, self.vocab_size), dtype=self._model.dtype, device=self._model.device)
        logits = self._read(piece)
        return logits if piece.num_logits else logits[:0]

    def _read(self, piece: Piece) -> torch.Tensor:
        """Bring a row's state up to the piece's last token, which may have happened before: a failed step is run again.

        Returns:
            The logits behind that token, shape (1, vocabulary).
        """
        # Taken out meanwhile: a pass that fails leaves half a state behind, and the next one has to start afresh.
        state = self._states.pop(piece.key, None) or _State(self._model)
        ids = piece.text[state.num_read : piece.context]
        size = 1 if state.num_read and not self._in_pieces else max(len(ids), 1)
        for start in range(0, len(ids), size):
            state.read(ids[start : start + size])
        self._states[piece.key] = state
        if state.logits is None:
            raise ValueError(f"Got a piece that ends at token {piece.context} but expected at least one token to read")
        return state.logits


def check_state(model: PreTrainedModel, name: str) -> tuple[StatefulRunner, int]:
    """Compare reading a few tokens in parts with reading them at once, on the real weights.

    Returns:
        A runner that reads only as this model can, and the bytes that it keeps of one token besides its state.

    Raises:
        UnsupportedModelError: the logits differ even token by token.
    """
    ids = torch.randint(0, vocab_size(model), (12,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode():
        whole = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].float()
    # The second way is how `generate` reads: nothing is more right, so that only a gross difference speaks against it.
    for in_pieces, ends, limit in ((True, (5, 9, 11, 12), tolerance(model) / 20), (False, (9, 10, 11, 12), 5e-2)):
        state = _State(model)
        try:
            got = torch.cat([state.read(ids[state.num_read : end]) for end in ends]).float()
        except Exception as error:
            message = f"{name} ({type(model).__name__}) cannot go on from its state: {error}"
            raise UnsupportedModelError(message) from error
        difference = relative_difference(got, whole[[end - 1 for end in ends]])
        if difference < limit:
            if not in_pieces:
                logger.warning("%s reads each prompt in one pass: in pieces it gives other logits", name)
            return StatefulRunner(model, in_pieces), state.bytes_per_token
    raise UnsupportedModelError(
        f"{name} ({type(model).__name__}) gives other logits from its state than in one piece (relative difference "
        f"{difference:.2g}): this architecture is not supported yet"
    )
