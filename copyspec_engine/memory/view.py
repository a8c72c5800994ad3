"""What a conversation remembers, for its owner to look at, to take along and to erase.

Every look is a snapshot, taken between two steps of the engine; it does not count as use. Safe in any thread.
Not covered: texts that calls put into a shared pool.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from copyspec_engine.memory.conversation import KINDS, SessionMemory
from copyspec_engine.values.errors import ConfigError, EngineStoppedError, about
from copyspec_engine.values.tokens import Fingerprint, TokenArray

__all__ = ["ConversationMemory", "Snapshot", "StoredText", "read_export", "snapshot"]

TextKind = Literal["prompt", "answer", "prediction"]
_SHOWN_TEXTS, _SHOWN_CHARACTERS = 20, 200
"""What a notebook shows of a memory."""


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
        load: adds the texts of an export to it for an owner, and says how many.
        fingerprint: of the tokenizer and chat template; asked for after a look.
    """

    def __init__(
        self,
        session_id: str,
        *,
        look: Callable[[], Snapshot],
        decode: Callable[[Sequence[int]], str],
        forget: Callable[[], bool],
        load: Callable[[str | Mapping[str, Any], str | None], int],
        fingerprint: Callable[[], Fingerprint],
    ) -> None:
        self.session_id = session_id
        self._look, self._decode, self._forget = look, decode, forget
        self._load, self._fingerprint = load, fingerprint

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
        """The texts as JSON: {"session_id", "fingerprint", "texts": [{"number", "kind", "token_ids", "text"}]}."""
        texts = [asdict(text) for text in self.texts()]
        content = {"session_id": self.session_id, "fingerprint": asdict(self._fingerprint()), "texts": texts}
        return json.dumps(content, ensure_ascii=False)

    def load(self, exported: str | Mapping[str, Any], *, owner: str | None = None) -> int:
        """Take in what `export` gave, of this conversation or another, in this engine or one with the same model.

        Texts that the conversation holds already are left out, so that loading twice is loading once. They are kept on
        disk as those of calls are, and the same limits hold: of more than `EngineConfig.memory_tokens` the oldest go.
        Answers are the same with and without them; KV is computed anew. Requests in flight go on meanwhile.

        Args:
            exported: the JSON, or what it holds; of "texts", "kind" and "token_ids" are read.
            owner: whom the conversation counts for if it is new, see `GenerationRequest.owner`.

        Returns:
            How many texts were added, and are held.

        Raises:
            ConfigError: it is no such JSON, or of another tokenizer or chat template; nothing is added.
            EngineStoppedError: the engine was closed.
        """
        return self._load(exported, owner)

    def clear(self) -> bool:
        """Erase the conversation, in main memory, pools and on disk, with its KV; False if there was nothing.

        Raises:
            MemoryFileError: it is erased in main memory, but not on disk. Call again to try again.
            EngineStoppedError: the engine was closed.
        """
        return self._forget()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.session_id!r})"

    def _repr_html_(self) -> str:
        """What notebooks show: the latest texts, shortened; of an engine that has stopped, that it has."""
        from copyspec_engine.values.html import table

        try:
            texts = self.texts()
        except EngineStoppedError as error:
            return table(self.session_id, {"texts": error})
        shown = {
            f"{text.number} \N{MIDDLE DOT} {text.kind} \N{MIDDLE DOT} {len(text.token_ids):,} tokens": _short(text.text)
            for text in texts[-_SHOWN_TEXTS:]
        }
        left_out = f", the last {_SHOWN_TEXTS} of them" if len(texts) > _SHOWN_TEXTS else ""
        num_tokens = sum(len(text.token_ids) for text in texts)
        return table(f"{self.session_id}: {len(texts):,} texts of {num_tokens:,} tokens{left_out}", shown)


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def read_export(
    exported: str | Mapping[str, Any], fingerprint: Fingerprint, vocab_size: int
) -> list[tuple[int, TokenArray]]:
    """Kind and tokens of the texts in an export.

    Args:
        exported: the JSON, or what it holds.
        fingerprint: of the tokenizer and chat template that it must have been made with.
        vocab_size: of the model.

    Raises:
        ConfigError: it is none, or not of this tokenizer and template.
    """
    with about("exported"):
        try:
            content = json.loads(exported) if isinstance(exported, str) else exported
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"Got exported={exported!r:.80} but expected the JSON of `export`: {error}") from None
        found = content.get("fingerprint") if isinstance(content, Mapping) else None
        texts = content.get("texts") if isinstance(content, Mapping) else None
        if not isinstance(found, dict) or not isinstance(texts, list):
            raise ConfigError(f"Got exported={exported!r:.80} but expected an object with fingerprint and texts")
        for name, expected in asdict(fingerprint).items():
            if found.get(name) != expected:
                raise ConfigError(
                    f"Got an export with {name} {found.get(name)!r} but the model's {name} is {expected!r}: token ids "
                    "mean other texts here. Load it into an engine of the model that it was made with"
                )
        return [_text_of(text, f"texts[{number}]", vocab_size) for number, text in enumerate(texts)]


def _text_of(text: object, where: str, vocab_size: int) -> tuple[int, TokenArray]:
    """Kind and tokens of one text of an export."""
    kind, ids = (text.get("kind"), text.get("token_ids")) if isinstance(text, dict) else (None, None)
    if kind not in KINDS:
        raise ConfigError(f"Got {where} with kind={kind!r} but expected one of {', '.join(KINDS)}")
    if not isinstance(ids, list) or not ids:
        raise ConfigError(f"Got {where} with token_ids={ids!r:.80} but expected a list of at least one id")
    bad = next((token for token in ids if type(token) is not int or not 0 <= token < vocab_size), None)
    if bad is not None:
        raise ConfigError(f"Got {where} with the token id {bad!r} but expected ids from 0 to {vocab_size - 1}")
    return KINDS.index(kind), np.array(ids, dtype=np.int64)
