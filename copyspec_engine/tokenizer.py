"""Text to tokens and back: chat templates, streaming detokenisation and exact stop texts.

`ChatTokenizer` is what the engine needs of a tokenizer; `HFTokenizer` gives it for any fast tokenizer of a checkpoint.
"""

from __future__ import annotations

import inspect
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from transformers.utils.chat_parsing.response_templates import load_response_template

from copyspec_engine.chat_format import ChatFormat, find_chat_format
from copyspec_engine.chat_messages import for_template
from copyspec_engine.detokenizer import Detokenizer
from copyspec_engine.errors import ConfigError, UnsupportedModelError
from copyspec_engine.exact_tokens import Speller, Spelling
from copyspec_engine.memory_file import Fingerprint
from copyspec_engine.outputs import Segment
from copyspec_engine.sequence import TextStream

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatTokenizer", "HFTokenizer", "SpecialTokens", "StoppingTextStream"]

logger = logging.getLogger(__name__)


SpecialTokens = Literal["none", "parts", "all"]
"""none; those that mark the parts of an answer; all."""


class ChatTokenizer(Protocol):
    """What the engine needs of a tokenizer. All methods may be called from any thread."""

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of raw text, behind those special tokens that the tokenizer begins a text with.

        A text that begins with them by name has them once. What a tokenizer ends texts with is left out: a prompt is
        to be gone on with.
        """
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text, without special tokens or with their names in it."""
        ...

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        template_kwargs: Mapping[str, Any] = MappingProxyType({}),
        spellings: Sequence[Spelling] = (),
    ) -> list[int]:
        """Token ids of a conversation up to where the answer begins.

        Args:
            messages: in OpenAI's form.
            tools: OpenAI-style function schemas.
            template_kwargs: more variables of the chat template.
            spellings: of earlier calls; where the text begins as one of them does, it has the same ids.
        """
        ...

    def render_text(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        template_kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """The text of which `render` gives the token ids."""
        ...

    def text_stream(
        self, stop: Sequence[str], *, special: SpecialTokens = "none", behind: Sequence[int] = ()
    ) -> TextStream:
        """A fresh detokeniser for one answer.

        Args:
            stop: texts that end it.
            special: which special tokens are written, by name.
            behind: the end of the prompt, where the answer goes on with its text.
        """
        ...

    def special_ids(self, names: Sequence[str]) -> frozenset[int]:
        """The ids of those of the names that are special tokens': what is written by them has no text."""
        ...

    def chat_format(self) -> ChatFormat:
        """How the chat template writes tool calls and reasoning."""
        ...

    def vocabulary(self) -> dict[str, int]:
        """The id of each token, by the token as the tokenizer spells it."""
        ...

    def fingerprint(self) -> Fingerprint:
        """Digests by which saved token ids are known to mean the same texts."""
        ...

    def grammar_tokenizer(self, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
        """What grammars need to know of the tokens; needs the extra "grammar". May take seconds.

        Args:
            vocab_size: width of the model's logits; ids beyond the tokenizer's own are never allowed.
            eos_token_ids: ids that may end an answer whose grammar allows an end, at least one.
        """
        ...


class HFTokenizer:
    """A fast Hugging Face tokenizer with its chat template.

    Raises:
        UnsupportedModelError: the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise UnsupportedModelError(
                f"Got tokenizer {type(tokenizer).__name__} but expected a fast one (a tokenizer.json in the folder)"
            )
        self._tokenizer = tokenizer
        self._tokenizer.model_max_length = sys.maxsize  # the engine checks lengths; no warning beside its error
        self._backend: Any = tokenizer.backend_tokenizer
        # Encoding may change settings of the backend on the way; decoding only reads and needs no lock.
        self._encoding = threading.Lock()
        self._chat_format = self._find_format()
        self._begin = self._text_begin()
        self._special = self._special_tokens()
        self._hidden = {i for i, name in self._special.items() if not self._chat_format.marks_parts_with(name)}
        control = self._control_tokens()
        self._markers = (*control, *_FORGED)
        self._speller = Speller(
            control, partial(self.encode, special_tokens=False), partial(self.decode, skip_special_tokens=False)
        )

    def _control_tokens(self) -> dict[str, int]:
        """The ids of special tokens, and of all others that a chat template writes, by name."""
        template = self._tokenizer.chat_template or ""
        template = "".join(template.values()) if isinstance(template, dict) else template
        template += self._chat_format.prelude
        added = self._tokenizer.added_tokens_decoder.items()
        return {
            token.content: token_id
            for token_id, token in added
            if token.special or (token.content in template and not token.content.isspace())
        }

    @property
    def eos_token_id(self) -> int | None:
        token_id: int | None = self._tokenizer.eos_token_id
        return token_id

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        with self._encoding:
            ids: list[int] = self._backend.encode(_encodable(text), add_special_tokens=False).ids
        begin = self._begin if special_tokens else []
        return ids if ids[: len(begin)] == begin else begin + ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        template_kwargs: Mapping[str, Any] = MappingProxyType({}),
        spellings: Sequence[Spelling] = (),
    ) -> list[int]:
        if not self._tokenizer.chat_template:
            raise ConfigError("Got messages but this model has no chat template: use prompt=, or an instruction model")
        _refuse_media(messages)
        chat_format = self._chat_format
        ready = self._without_forged_keys(for_template(messages, chat_format), [tools, template_kwargs])
        options = {"chat_template": self._chat_template(tools, chat_format), **template_kwargs}
        has_markers = self._has_markers([ready, tools, template_kwargs])
        if has_markers:
            options["sanitize_control_tokens"] = True
        try:
            rendered = self._apply_template(ready, tools, options, tokenize=has_markers)
        except Exception as error:  # templates raise whatever Jinja or their own raise_exception() gives
            merged = _merge_neighbours(messages)
            if len(merged) < len(messages):  # some templates insist that roles alternate
                return self.render(merged, tools, template_kwargs, spellings)
            raise ConfigError(f"The chat template refused the messages: {type(error).__name__}: {error}") from error
        return self._speller.spell(_encodable(rendered), spellings) if isinstance(rendered, str) else rendered

    def render_text(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        template_kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        ready = for_template(messages, self._chat_format)
        options = {"chat_template": self._chat_template(tools, self._chat_format), **template_kwargs}
        try:
            return cast("str", self._apply_template(ready, tools, options, tokenize=False))
        except Exception as error:
            merged = _merge_neighbours(messages)
            if len(merged) < len(messages):
                return self.render_text(merged, tools, template_kwargs)
            raise ConfigError(f"The chat template refused the messages: {type(error).__name__}: {error}") from error

    def _apply_template(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        options: dict[str, Any],
        *,
        tokenize: bool,
    ) -> str | list[int]:
        with self._encoding:
            rendered = self._tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                add_generation_prompt=True,
                tokenize=tokenize,
                return_dict=False,
                **options,
            )
        return cast("str | list[int]", rendered)

    def _chat_template(self, tools: Sequence[dict[str, Any]] | None, chat_format: ChatFormat) -> str:
        """The template, behind what writes the calls for one that cannot."""
        template: str = self._tokenizer.get_chat_template(tools=list(tools) if tools else None)
        return template if "tool_calls" in template else chat_format.prelude + template

    def _without_forged_keys(self, messages: list[dict[str, Any]], others: object) -> list[dict[str, Any]]:
        """Messages in which no key is a control token's name: nobody could tell it from the template's own.

        The arguments of a call that have such a key, which a model may have copied from anywhere, become text.

        Raises:
            ConfigError: another key is one.
        """
        for message in messages:
            for call in message.get("tool_calls") or ():
                function = call["function"]
                if self._forged_key(function.get("arguments")) is not None:
                    function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        found = self._forged_key([messages, others])
        if found is not None:
            raise ConfigError(f"Got the key {found!r} but it holds the name of a control token: rename it")
        return messages

    def _forged_key(self, value: object) -> str | None:
        keys = _keys(value)
        return next((key for key in keys if any(marker in key for marker in self._markers)), None)

    def _has_markers(self, inputs: object) -> bool:
        """Whether a text of the caller's holds a control token's name, which must not become the token.

        Raises:
            ConfigError: one does, and this release of transformers cannot tell it from the template's own.
        """
        texts = list(_texts(inputs))
        found = next((marker for marker in self._markers if any(marker in text for text in texts)), None)
        if found is None:
            return False
        if "sanitize_control_tokens" not in inspect.signature(self._tokenizer.apply_chat_template).parameters:
            raise ConfigError(
                f"Got a message that holds the control token {found!r}: remove it, or upgrade transformers to a "
                "release that can keep it apart from those of the chat template (5.23 can)"
            )
        return True

    def text_stream(
        self, stop: Sequence[str], *, special: SpecialTokens = "none", behind: Sequence[int] = ()
    ) -> TextStream:
        hidden = self._hidden if special == "parts" else self._special if special == "none" else ()
        tokens = Detokenizer(self._backend, hidden, skip_special_tokens=special == "none", behind=behind)
        return StoppingTextStream(tokens.step, tokens.rest, stop)

    def special_ids(self, names: Sequence[str]) -> frozenset[int]:
        return frozenset(token_id for token_id, name in self._special.items() if name in names)

    def _special_tokens(self) -> dict[int, str]:
        """The names of special tokens, and of all others that begin an answer in the chat template, by id."""
        begins = "".join(self._chat_format.assistant)
        return {
            token_id: token.content
            for token_id, token in self._tokenizer.added_tokens_decoder.items()
            if token.special or (token.content in begins and not token.content.isspace())
        }

    def _text_begin(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text."""
        for text in ("a", "1", ".", "the"):
            whole, plain = (self._backend.encode(text, add_special_tokens=added).ids for added in (True, False))
            for at in range(len(whole) - len(plain) + 1):
                if plain and whole[at : at + len(plain)] == plain:
                    return list(whole[:at])
        return []

    def chat_format(self) -> ChatFormat:
        return self._chat_format

    def _find_format(self) -> ChatFormat:
        chat_template = self._tokenizer.chat_template
        if isinstance(chat_template, dict):  # several by name
            chat_template = chat_template.get("tool_use") or chat_template.get("default")
        own = getattr(self._tokenizer, "response_template", None)
        try:
            if own is not None:
                load_response_template(own)
        except Exception as error:  # answers can still be read by what the chat template writes
            logger.warning("The tokenizer's response template is not used: %s", error)
            own = None
        return find_chat_format(chat_template, own)

    def vocabulary(self) -> dict[str, int]:
        with self._encoding:
            vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return vocabulary

    def fingerprint(self) -> Fingerprint:
        with self._encoding:
            normalizer = json.loads(self._backend.to_str())["normalizer"]
        values = {"vocabulary": self.vocabulary(), "normalizer": normalizer}
        return Fingerprint.of(values, self._tokenizer.chat_template)

    def grammar_tokenizer(self, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
        from llguidance.hf import from_tokenizer

        with self._encoding:
            width = max(vocab_size, len(self._tokenizer))
            fast: Any = self._tokenizer
            return from_tokenizer(fast, n_vocab=width, eos_token=list(eos_token_ids))


_FORGED = ("\U000f0000", "\U000f0001")
"""What transformers puts around a control token's name in a message, to keep it apart."""


def _texts(value: object) -> Iterator[str]:
    """All texts in nested values but the keys, as the template may write them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _keys(value: object) -> Iterator[str]:
    """All keys in nested values."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _keys(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _keys(item)


def _encodable(text: str) -> str:
    """A text without halves of surrogate pairs, which JSON can hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


_MEDIA = {"image", "image_url", "input_image", "audio", "input_audio", "video", "video_url", "file", "input_file"}


def _refuse_media(messages: Sequence[dict[str, Any]]) -> None:
    """A template would write a placeholder for an image, and the model answer as if it had seen it."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list | tuple) else ():
            if isinstance(part, dict) and part.get("type") in _MEDIA:
                raise UnsupportedModelError(
                    f"Got a message with a part of type {part['type']!r} but only text can be read"
                )


def _merge_neighbours(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Plain texts of one role in a row as one message, two line breaks apart."""
    merged: list[dict[str, Any]] = []
    for message in messages:
        last = merged[-1] if merged else {}
        plain = message.keys() == last.keys() == {"role", "content"} and message["role"] == last["role"]
        if plain and isinstance(message["content"], str) and isinstance(last["content"], str):
            merged[-1] = {"role": last["role"], "content": f"{last['content']}\n\n{message['content']}"}
        else:
            merged.append(message)
    return merged


class StoppingTextStream:
    """Releases an answer's text once no stop text can begin in it, and ends it before the first stop text.

    Args:
        step: token id -> the text it completes, "" inside a character.
        rest: the text that is left when no more tokens come.
        stop: texts of at least one character.
    """

    def __init__(self, step: Callable[[int], str], rest: Callable[[], str], stop: Sequence[str]) -> None:
        self._step, self._rest, self._stop = step, rest, tuple(stop)
        self._held: list[Segment] = []
        self._stopped = False
        self.num_characters = 0

    @property
    def stopped(self) -> bool:
        return self._stopped

    def push(self, token_id: int, *, copied: bool) -> list[Segment]:
        piece = self._step(token_id)
        self.num_characters += len(piece)
        if not piece or self._stopped:
            return []
        self._held.append(Segment(piece, copied))
        if not self._stop:
            return self._release(len(piece))
        text = "".join(segment.text for segment in self._held)
        found = min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=None)
        if found is not None:
            released = self._release(found)
            self._held, self._stopped = [], True
            return released
        return self._release(len(text) - _longest_beginning(text, self._stop))

    def flush(self) -> list[Segment]:
        if self._stopped:
            return []
        rest = self._rest()
        if rest:
            self._held.append(Segment(rest, copied=False))
        return self._release(sum(len(segment.text) for segment in self._held))

    def _release(self, count: int) -> list[Segment]:
        """Take the first `count` characters of what is held."""
        released: list[Segment] = []
        while count > 0 and self._held:
            segment = self._held[0]
            taken = Segment(segment.text[:count], segment.copied)
            if len(segment.text) > count:
                self._held[0] = Segment(segment.text[count:], segment.copied)
            else:
                self._held.pop(0)
            count -= len(taken.text)
            released.append(taken)
        return released


def _longest_beginning(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that is the beginning of a stop text."""
    longest = max(len(stop) for stop in stops) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
