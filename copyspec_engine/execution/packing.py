"""The rows of a forward pass as one array of int32, so that a device gets all of it in one copy.

What varies from pass to pass stands in the array, and nothing but the bucket decides where: a captured pass over the
same device buffer serves every batch of its bucket.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.values.tokens import TokenArray

__all__ = ["Bucket", "Piece", "pack", "visibility_words", "wanted_tokens"]

Int32Array = npt.NDArray[np.int32]

_ROWS = (1, 4, 16, 64, 256, 1024)
_TOKENS = (1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024, 1280, 1536, 2048)
_FEW_LOGITS = 64
"""Logits of a pass that reads prompts for the most part."""
_ALIGNMENT = 16
"""int32 numbers: kernels read 16 bytes at a time where an address allows it."""
_BITS = 32


@dataclass(frozen=True, slots=True)
class Piece:
    """What one row of a forward pass needs: its new tokens, and where its keys and values are.

    Args:
        slots: of the row's tokens, the new ones last, shape (context,) or longer.
        base: tokens that the row has already, and so the position of its first new one.
        ids: the new tokens; a draft's nodes come last and sit at their depth.
        draft: see above.
        num_logits: how many of the last new tokens' logits are wanted.
        key: whose row it is: the id of its request, by which a runner may keep what it needs until `Runner.release`.
        text: the row's tokens from the first one on, without the draft; those behind the new ones are not to be read
            yet. For runners that keep something else than KV.
    """

    slots: TokenArray
    base: int
    ids: Sequence[int]
    draft: DraftTree
    num_logits: int
    key: str = ""
    text: Sequence[int] = ()

    @property
    def context(self) -> int:
        return self.base + len(self.ids)

    def positions(self) -> Int32Array:
        """Position of each new token: a node's is its depth behind the last token, shape (new,)."""
        positions = np.arange(self.base, self.context, dtype=np.int32)
        if not self.draft.is_chain:
            last = self.context - len(self.draft) - 1
            positions[last + 1 - self.base :] = last + np.array(self.draft.depths(), dtype=np.int32)
        return positions


@dataclass(frozen=True, slots=True)
class Bucket:
    """What a pass has room for.

    Args:
        rows: sequences. One more row takes the padding, so that every token of the pass belongs to a row.
        tokens: new tokens of all rows and padding.
        logits: tokens whose logits are computed.
        is_static: one of few sizes, which are worth a captured pass; else made to measure.
    """

    rows: int
    tokens: int
    logits: int
    is_static: bool = True

    @classmethod
    def around(cls, pieces: Sequence[Piece]) -> Bucket:
        """The smallest one that holds these pieces."""
        rows, tokens = len(pieces), sum(len(piece.ids) for piece in pieces)
        logits = sum(piece.num_logits for piece in pieces)
        if rows > _ROWS[-1] or tokens > _TOKENS[-1]:
            return cls(rows, tokens, logits, is_static=False)
        rows = next(size for size in _ROWS if size >= rows)
        tokens = next(size for size in _TOKENS if size >= tokens)
        if logits:
            logits = tokens if logits > _FEW_LOGITS else min(tokens, _FEW_LOGITS)
        return cls(rows, tokens, logits)

    @property
    def words(self) -> int:
        """int32 numbers that hold which new tokens of its row a token sees."""
        return -(-self.tokens // _BITS)

    @property
    def fields(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Offset and shape of each field; "slots" comes last and is as long as the pass needs."""
        return _fields(self)

    def size(self, pieces: Sequence[Piece]) -> int:
        """Numbers that these pieces take."""
        return self.fields["slots"][0] + sum(piece.context for piece in pieces)


@lru_cache(maxsize=1024)
def _fields(bucket: Bucket) -> dict[str, tuple[int, tuple[int, ...]]]:
    rows, tokens = bucket.rows + 1, bucket.tokens
    shapes: dict[str, tuple[int, ...]] = {
        "ids": (tokens,),
        "positions": (tokens,),
        "write": (tokens,),
        "wanted": (bucket.logits,),
        "start": (rows,),
        "num_new": (rows,),
        "context": (rows,),
        "slot_start": (rows,),
        "visible": (tokens, bucket.words),
        "slots": (0,),
    }
    fields, offset = {}, 0
    for name, shape in shapes.items():
        fields[name] = offset, shape
        offset += -(-math.prod(shape) // _ALIGNMENT) * _ALIGNMENT
    return fields


def pack(pieces: Sequence[Piece], bucket: Bucket, padding_slot: int, out: Int32Array) -> int:
    """Write a pass into `out`, which holds at least `bucket.size(pieces)` numbers.

    The fields: "ids", "positions" and the slot to "write" of each token, padding last; "wanted", the tokens whose
    logits count; for each row its first token ("start"), how many are new ("num_new"), its tokens in all ("context"; 0
    for the padding, which sees nothing) and where its slots begin ("slot_start"); which new tokens of its row a token
    sees ("visible", bit j of word w: token 32 w + j); the "slots" of all rows, one row behind the other.

    Returns:
        How many numbers were written, from the first one on.
    """
    fields = {
        name: out[offset : offset + math.prod(shape)].reshape(shape) for name, (offset, shape) in bucket.fields.items()
    }
    size = bucket.size(pieces)
    out[: bucket.fields["slots"][0]] = 0
    slots = out[bucket.fields["slots"][0] : size]
    fields["write"][:] = padding_slot
    token = first_slot = 0
    for row, piece in enumerate(pieces):
        new = slice(token, token + len(piece.ids))
        fields["ids"][new] = piece.ids
        fields["positions"][new] = piece.positions()
        fields["write"][new] = piece.slots[piece.base : piece.context]
        fields["visible"][new] = visibility_words(piece.draft, len(piece.ids), bucket.words)
        slots[first_slot : first_slot + piece.context] = piece.slots[: piece.context]
        _describe(fields, row, token, len(piece.ids), piece.context, first_slot)
        token, first_slot = new.stop, first_slot + piece.context
    _describe(fields, len(pieces), token, bucket.tokens - token, 0, 0)
    wanted = list(wanted_tokens(pieces))
    fields["wanted"][: len(wanted)] = wanted
    return size


def _describe(fields: dict[str, Int32Array], row: int, start: int, num_new: int, context: int, slot_start: int) -> None:
    fields["start"][row] = start
    fields["num_new"][row] = num_new
    fields["context"][row] = context
    fields["slot_start"][row] = slot_start


def wanted_tokens(pieces: Sequence[Piece]) -> Iterator[int]:
    """The tokens whose logits are wanted, in order."""
    stop = 0
    for piece in pieces:
        stop += len(piece.ids)
        yield from range(stop - piece.num_logits, stop)


def visibility_words(draft: DraftTree, num_new: int, words: int) -> Int32Array:
    """Which new tokens of a row each of them sees: pending ones in a chain, then the nodes of the draft behind them.

    Returns:
        Shape (num_new, words).

    Example: one pending token and parents (-1, 0, -1) give 0b1, 0b11, 0b111, 0b1001.
    """
    return _chain_words(num_new, words) if draft.is_chain else _words(draft.visible(num_new - len(draft)), words)


@lru_cache(maxsize=256)
def _chain_words(num_new: int, words: int) -> Int32Array:
    return _words(DraftTree().visible(num_new), words)


def _words(seen: npt.NDArray[np.bool_], words: int) -> Int32Array:
    bits = np.zeros((len(seen), words * _BITS), dtype=np.bool_)
    bits[:, : len(seen)] = seen
    return np.packbits(bits, axis=1, bitorder="little").view("<i4").astype(np.int32, copy=False)
