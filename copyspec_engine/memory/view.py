"""What a conversation remembers, for its owner to look at, to take along and to erase.

Every look is a snapshot, taken between two steps of the engine; it does not count as use. Safe in any thread.
Not covered: texts that calls put into a shared pool.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple, cast

from copyspec_engine.memory.conversation import KINDS, SessionMemory
from copyspec_engine.values.tokens import TokenArray

__all__ = ["ConversationMemory", "Snapshot", "StoredText", "snapshot"]

TextKind = Literal["prompt", "answer", "prediction"]


@dataclass(frozen=True, slots=True)
class StoredText:
    """A stretch of a prompt that was new to the conversation, an answer (a long one in parts), or a prediction."""

    number: int
    """As in `Copy.stored_text`; another one after a restart."""
    kind: TextKind
    token_ids: tuple[int, ...]
    text: str
    """With special tokens by their names."""


class Snapshot(NamedTuple):
    """A memory as it was between two steps."""

    texts: Sequence[tuple[int, TextKind, TokenArray]]
    """Number, kind and tokens of each, oldest first."""
    num_bytes: int


def snapshot(memory: SessionMemory | None) -> Snapshot:
    """What a memory holds; None holds nothing."""
    if memory is None:
        return Snapshot((), 0)
    kinds = cast("Sequence[TextKind]", KINDS)
    texts = [(text.number, kinds[text.kind], memory.index.tokens_of(text)) for text in memory.texts]
    return Snapshot([text for text in texts if len(text[2])], memory.index.num_bytes + memory.alternatives.num_bytes)


class ConversationMemory:
    """The texts of one conversation, from which its answers are copied; made by `Engine.memory`.

    Each text is there once: a prompt adds only what the conversation had not seen yet.

    Args:
        session_id: the conversation, which need not exist.
        look: takes a snapshot.
        decode: token ids -> text.
        forget: erases the conversation.
    """

    def __init__(
        self,
        session_id: str,
        look: Callable[[], Snapshot],
        decode: Callable[[Sequence[int]], str],
        forget: Callable[[], bool],
    ) -> None:
        self.session_id = session_id
        self._look, self._decode, self._forget = look, decode, forget

    def texts(self) -> tuple[StoredText, ...]:
        """The texts, oldest first, with what is written so far of answers in flight."""
        found = ((number, kind, tokens.tolist()) for number, kind, tokens in self._look().texts)
        return tuple(StoredText(number, kind, tuple(ids), self._decode(ids)) for number, kind, ids in found)

    def __len__(self) -> int:
        """Number of texts."""
        return len(self._look().texts)

    def __bool__(self) -> bool:
        return True

    @property
    def num_tokens(self) -> int:
        return sum(len(tokens) for _, _, tokens in self._look().texts)

    @property
    def num_bytes(self) -> int:
        """Main memory for texts, index and candidates; grows in powers of two, and does not shrink but by `clear`."""
        return self._look().num_bytes

    def export(self) -> str:
        """The texts as JSON: {"session_id", "texts": [{"number", "kind", "token_ids", "text"}]}."""
        content = {"session_id": self.session_id, "texts": [asdict(text) for text in self.texts()]}
        return json.dumps(content, ensure_ascii=False)

    def clear(self) -> bool:
        """Erase the conversation, in main memory, pools and on disk, with its KV; False if there was nothing.

        Raises:
            MemoryFileError: it is erased in main memory, but not on disk. Call again to try again.
            EngineStoppedError: the engine was closed.
        """
        return self._forget()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.session_id!r})"
