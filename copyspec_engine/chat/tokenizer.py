"""Text to tokens and back: chat templates and exact stop texts; detokenizer.py streams what it makes of tokens.

`ChatTokenizer` is what the engine needs of a tokenizer; `HFTokenizer` gives it for any fast tokenizer of a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from transformers.utils.chat_parsing.response_templates import load_response_template

from copyspec_engine.chat.detokenizer import Detokenizer, StoppingTextStream, TextStream
from copyspec_engine.chat.formats import ChatFormat
from copyspec_engine.chat.known_ids import Speller, Spelling
from copyspec_engine.chat.template import (
    ChatTemplate,
    describe_template,
    for_template,
    given_template,
    needs_prompt,
    system_in_users,
    written_in_texts,
)
from copyspec_engine.values.errors import ConfigError, ModelLoadError, UnsupportedModelError, about
from copyspec_engine.values.tokens import Fingerprint

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatTokenizer", "HFTokenizer", "SpecialTokens", "refuse_other_vocabulary"]

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

    Args:
        tokenizer: of a checkpoint.
        chat_template: Jinja, or the path of a file with it, in place of the tokenizer's own.
        tool_prompt: tools, calls and results that the template leaves out are written into messages.

    Raises:
        UnsupportedModelError: the tokenizer is not a fast one.
        ConfigError: its chat template, or the given one, is not Jinja.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, chat_template: str | None = None, tool_prompt: bool = True
    ) -> None:
        if not tokenizer.is_fast:
            raise UnsupportedModelError(
                f"Got tokenizer {type(tokenizer).__name__} but expected a fast one (a tokenizer.json in the folder)"
            )
        self.tokenizer = tokenizer
        """As transformers has it."""
        self.tokenizer.model_max_length = sys.maxsize  # the engine checks lengths; no warning beside its error
        if chat_template is not None:
            self.tokenizer.chat_template = given_template(chat_template)
        self.backend: Any = tokenizer.backend_tokenizer
        """The `tokenizers.Tokenizer` behind it."""
        self._template_error: ConfigError | None = None
        sources = self._usable_sources(is_given=chat_template is not None)
        self._chat_format = self._find_format(sources, tool_prompt)
        self._tool_prompt = tool_prompt
        self._begin = self._text_begin()
        self._special = self._special_tokens()
        self._hidden = {i for i, name in self._special.items() if not self._chat_format.marks_parts_with(name)}
        variables = tokenizer.special_tokens_map
        self._templates = {
            name: ChatTemplate(self._chat_format.prelude + source, variables) for name, source in sources.items()
        }
        control = self._control_tokens(sources)
        self.speller = Speller(
            control, partial(self.encode, special_tokens=False), partial(self.decode, skip_special_tokens=False)
        )
        names = "|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)"
        self._names, self._marked = re.compile(f"{names}|{_OPEN}|{_CLOSE}"), re.compile(f"{_OPEN}({names}){_CLOSE}")

    def _sources(self) -> dict[str, str]:
        """The chat templates by name; most models have one, "default"."""
        found = self.tokenizer.chat_template or {}
        sources = dict(found) if isinstance(found, dict) else {"default": found}
        if sources and not {"default", "tool_use"} & sources.keys():
            raise ConfigError(
                f"Got chat templates named {', '.join(sources)} but expected one named default: give one as "
                "chat_template="
            )
        return sources

    def _usable_sources(self, *, is_given: bool) -> dict[str, str]:
        """The chat templates if they can be read; else only prompts can, unless the caller gave the template."""
        try:
            sources = self._sources()
            for source in sources.values():
                ChatTemplate(source, {})
        except ConfigError as error:
            if is_given:
                raise
            logger.warning("Only raw prompts can be read, no messages: %s", error)
            self._template_error = error
            return {}
        return sources

    def _control_tokens(self, sources: Mapping[str, str]) -> dict[str, int]:
        """The ids of special tokens, and of all others that a chat template writes, by name."""
        template = "".join(sources.values()) + self._chat_format.prelude
        added = self.tokenizer.added_tokens_decoder.items()
        return {
            token.content: token_id
            for token_id, token in added
            if token.special or (token.content in template and not token.content.isspace())
        }

    @property
    def eos_token_id(self) -> int | None:
        token_id: int | None = self.tokenizer.eos_token_id
        return token_id

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        text = _encodable(text)
        if len(text) < _LONG_TEXT:
            ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        else:
            ids = self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        begin = self._begin if special_tokens else []
        return ids if ids[: len(begin)] == begin else begin + ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        template_kwargs: Mapping[str, Any] = MappingProxyType({}),
        spellings: Sequence[Spelling] = (),
    ) -> list[int]:
        text = self._rendered(messages, tools, template_kwargs)
        return self._encode_marked(text) if _OPEN in text else self.speller.spell(text, spellings)

    def render_text(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        template_kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        return re.sub(f"[{_OPEN}{_CLOSE}]", "", self._rendered(messages, tools, template_kwargs))

    def _rendered(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        template_kwargs: Mapping[str, Any],
    ) -> str:
        """A conversation's text, in which each control token's name that comes from the caller has marks around it."""
        if self._template_error is not None:
            raise ConfigError(str(self._template_error))
        if not self._templates:
            raise ConfigError(
                "Got messages but this model has no chat template, as a base model: use prompt= (complete of an LLM), "
                "an instruction model, or give a template as chat_template="
            )
        name = (
            "tool_use" if "default" not in self._templates or (tools and "tool_use" in self._templates) else "default"
        )
        chat_format, template = self._chat_format, self._templates[name]
        copier = _Copier(self._names)
        with _reading("messages"):
            ready = copier.copy(self._without_forged_arguments(for_template(messages, chat_format)))
        with _reading("tools"):
            known = copier.copy(tools)
        with _reading("chat_template_kwargs"):
            options = copier.copy(dict(template_kwargs))
        left_out = None if self._tool_prompt else needs_prompt(ready, known, chat_format)
        if left_out is not None:
            raise ConfigError(
                f"Got {left_out} but this model's chat template does not write them, and tool_prompt=False: leave "
                "tool_prompt out, use another model, or give a template as chat_template="
            )
        ready, known = written_in_texts(ready, known, chat_format)
        failures: list[Exception] = []
        for attempt in _attempts(ready):
            with _held(failures):
                return _encodable(template.render(attempt, known, options, copier.size))
        first = failures[0]
        raise ConfigError(f"The chat template refused the messages: {type(first).__name__}: {first}") from first

    def _encode_marked(self, text: str) -> list[int]:
        """Token ids of a text in which what stands between marks is spelled in letters.

        Raises:
            ConfigError: this tokenizer spells a control token's name as the token in any case.
        """
        ids: list[int] = []
        for number, piece in enumerate(self._marked.split(text)):
            # A mark that stands alone was moved by the template; there the text is divided all the same.
            for part in re.split(f"[{_OPEN}{_CLOSE}]", piece):
                if part:
                    ids += self._encode_inside(part, as_letters=bool(number % 2), is_first=not ids)
        return ids

    def _encode_inside(self, text: str, *, as_letters: bool, is_first: bool) -> list[int]:
        """Token ids of a part of a prompt; behind another part, so that no space is put before it."""
        encode = self._letters if as_letters else partial(self.encode, special_tokens=False)
        if is_first:
            ids = encode(text)
        else:
            before, both = encode("\n"), encode("\n" + text)
            ids = both[len(before) :] if both[: len(before)] == before else encode(text)
        token = self.tokenizer.convert_tokens_to_ids(text) if as_letters else None
        if token in ids:
            raise ConfigError(
                f"Got a message that holds the control token {text!r}, which this tokenizer cannot write as text: "
                "remove it"
            )
        return ids

    def _letters(self, text: str) -> list[int]:
        """Token ids of a text in which the name of a token is no more than its letters."""
        backend = self.backend
        text = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
        words = (
            [text] if backend.pre_tokenizer is None else [w for w, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        )
        return [token.id for word in words for token in backend.model.tokenize(word)]

    def _without_forged_arguments(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages in which the arguments of a call are text if a key in them is a control token's name.

        Nobody could tell it from the template's own; a model may have copied it from anywhere.
        """
        for message in messages:
            for call in message.get("tool_calls") or ():
                function = call["function"]
                if any(map(self._names.search, _keys(function.get("arguments")))):
                    function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        return messages

    def text_stream(
        self, stop: Sequence[str], *, special: SpecialTokens = "none", behind: Sequence[int] = ()
    ) -> TextStream:
        hidden = self._hidden if special == "parts" else self._special if special == "none" else ()
        tokens = Detokenizer(self.backend, hidden, skip_special_tokens=special == "none", behind=behind)
        return StoppingTextStream(tokens.step, tokens.rest, stop)

    def special_ids(self, names: Sequence[str]) -> frozenset[int]:
        return frozenset(token_id for token_id, name in self._special.items() if name in names)

    def _special_tokens(self) -> dict[int, str]:
        """The names of special tokens, and of all others that begin an answer in the chat template, by id."""
        begins = "".join(self._chat_format.assistant)
        return {
            token_id: token.content
            for token_id, token in self.tokenizer.added_tokens_decoder.items()
            if token.special or (token.content in begins and not token.content.isspace())
        }

    def _text_begin(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text."""
        for text in ("a", "1", ".", "the"):
            whole, plain = (self.backend.encode(text, add_special_tokens=added).ids for added in (True, False))
            for at in range(len(whole) - len(plain) + 1):
                if plain and whole[at : at + len(plain)] == plain:
                    return list(whole[:at])
        return []

    def chat_format(self) -> ChatFormat:
        return self._chat_format

    def _find_format(self, sources: Mapping[str, str], tool_prompt: bool) -> ChatFormat:
        own = getattr(self.tokenizer, "response_template", None)
        try:
            if own is not None:
                load_response_template(own)
        except Exception as error:  # answers can still be read by what the chat template writes
            logger.warning("The tokenizer's response template is not used: %s", error)
            own = None
        source = sources.get("tool_use") or sources.get("default")
        variables = self.tokenizer.special_tokens_map
        return describe_template(source, variables, response_template=own, tool_prompt=tool_prompt)

    def vocabulary(self) -> dict[str, int]:
        vocabulary: dict[str, int] = self.backend.get_vocab(with_added_tokens=True)
        return vocabulary

    def fingerprint(self) -> Fingerprint:
        normalizer = json.loads(self.backend.to_str())["normalizer"]
        values = {"vocabulary": self.vocabulary(), "normalizer": normalizer}
        return Fingerprint.of(values, self.tokenizer.chat_template)

    def grammar_tokenizer(self, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
        from llguidance.hf import from_tokenizer

        width = max(vocab_size, len(self.tokenizer))
        fast: Any = self.tokenizer
        return from_tokenizer(fast, n_vocab=width, eos_token=list(eos_token_ids))


_LONG_TEXT = 1 << 15
"""Characters, about 20 ms of work, from which on the backend is asked in the way in which it lets other threads run."""
_OPEN, _CLOSE = "\U000f0000", "\U000f0001"
"""Private characters around a control token's name in what the caller gave; such ones of the caller's are dropped."""


class _Copier:
    """Copies the caller's values as plain JSON: a template must not get hold of any other object.

    Raises ConfigError for a value that is no JSON, and for a key that is a control token's name.

    Args:
        names: finds control tokens' names and marks in texts.
    """

    def __init__(self, names: re.Pattern[str]) -> None:
        self._names = names
        self.size = 0
        """Characters and values copied."""

    def copy(self, value: Any) -> Any:  # noqa: ANN401 - any JSON value
        self.size += 1
        if isinstance(value, str):
            self.size += len(value)
            return self._names.sub(_mark, str.__str__(value))  # the text of an enum's member, not its name
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int | float):
            return int(value) if isinstance(value, int) else float(value)
        if isinstance(value, Mapping):
            return {self._key(key): self.copy(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.copy(item) for item in value]
        raise ConfigError(f"Got {value!r} in the messages, tools or chat_template_kwargs but expected JSON values")

    def _key(self, key: object) -> str:
        """A key as it is: the template's own control tokens could not be told from one that holds such a name."""
        if self._names.search(str(key)):
            raise ConfigError(f"Got the key {key!r} but it holds the name of a control token: rename it")
        return str(key)


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """What is found wrong meanwhile is wrong with this field of a request."""
    try:
        with about(name):
            yield
    except RecursionError:
        raise ConfigError(f"Got {name} that are nested too deeply: make them flatter", name) from None


@contextlib.contextmanager
def _held(failures: list[Exception]) -> Iterator[None]:
    """Keep what a template raises, be it Jinja's or its own raise_exception(), so that something else can be tried."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        failures.append(error)


def _mark(found: re.Match[str]) -> str:
    return "" if found[0] in (_OPEN, _CLOSE) else _OPEN + found[0] + _CLOSE


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


def _attempts(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The messages, then other forms of them: some templates want roles to alternate, or system messages first only."""
    yield messages
    merged = _merge_neighbours(messages)
    if len(merged) < len(messages):
        yield merged
    moved = _merge_neighbours([*messages[:1], *system_in_users(messages[1:])])
    if moved != merged:
        yield moved


def _merge_neighbours(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
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


_SHOWN = 3
"""Tokens that an error names."""


def refuse_other_vocabulary(name: str, tokenizer: ChatTokenizer, draft_name: str, draft: ChatTokenizer) -> None:
    """Compare the vocabularies of a model and its draft model token by token.

    Raises:
        ModelLoadError: an id stands for another token, or for none, in one of them.
    """
    own, other = _tokens_by_id(tokenizer), _tokens_by_id(draft)
    differing = sorted(token for token in own.keys() | other.keys() if own.get(token) != other.get(token))
    if differing:
        shown = "; ".join(
            f"id {token} is {_said(own.get(token))} and {_said(other.get(token))}" for token in differing[:_SHOWN]
        )
        more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise ModelLoadError(
            f"Got draft_model={draft_name!r} but its vocabulary is not that of {name}: {shown}{more}. Take a smaller "
            "model of the same family"
        )


def _tokens_by_id(tokenizer: ChatTokenizer) -> dict[int, str]:
    return {token_id: token for token, token_id in tokenizer.vocabulary().items()}


def _said(token: str | None) -> str:
    return "missing" if token is None else repr(token)
