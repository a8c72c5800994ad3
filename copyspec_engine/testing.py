"""A real engine over a scripted model: test code that uses copyspec without weights, downloads or waiting.

    engine = scripted_engine(["first answer", "second answer"])
    engine.generate(GenerationRequest(messages=[{"role": "user", "content": "hi"}])).text  # "first answer"

Everything but the model is real: scheduling, memory, drafting, verification, stop texts, streaming, errors.
"""

from __future__ import annotations

import codecs
import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from copyspec_engine.chat.detokenizer import StoppingTextStream, TextStream
from copyspec_engine.chat.formats import ChatFormat, find_chat_format
from copyspec_engine.chat.known_ids import Spelling
from copyspec_engine.chat.template import for_template
from copyspec_engine.chat.tokenizer import SpecialTokens
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.engine.engine import Engine, close_shared_engines
from copyspec_engine.engine.thread import LoopThread
from copyspec_engine.execution.packing import Piece
from copyspec_engine.execution.runner import LoadedModel
from copyspec_engine.values.config import EngineConfig
from copyspec_engine.values.info import EngineInfo, Held
from copyspec_engine.values.tokens import Fingerprint

if TYPE_CHECKING:
    from llguidance import LLTokenizer

__all__ = ["ByteTokenizer", "ScriptedRunner", "close_shared_engines", "held_by", "loop_of", "scripted_engine"]

_START, _END, _VOCABULARY = 256, 257, 258
_MARKERS = {_START: "<|im_start|>", _END: "<|im_end|>"}


class ByteTokenizer:
    """UTF-8 bytes as tokens 0 to 255, then the turn markers 256 and 257 of a ChatML-like template."""

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:  # noqa: ARG002 - it adds none
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        if not skip_special_tokens:
            return _prompt_text(token_ids)
        return bytes(token for token in token_ids if token < _START).decode(errors="replace")

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        template_kwargs: Mapping[str, Any] = MappingProxyType({}),  # noqa: ARG002 - it reads none
        spellings: Sequence[Spelling] = (),  # noqa: ARG002 - bytes spell each text in one way only
    ) -> list[int]:
        ids: list[int] = []
        if tools:
            ids += self._turn("system", json.dumps(list(tools)))
        for message in for_template(messages, self.chat_format()):
            ids += self._turn(message["role"], _written(message))
        return [*ids, _START, *self.encode("assistant\n")]

    def render_text(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        template_kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        return self.decode(self.render(messages, tools, template_kwargs), skip_special_tokens=False)

    def _turn(self, role: str, content: str) -> list[int]:
        return [_START, *self.encode(f"{role}\n{content}"), _END, *self.encode("\n")]

    def chat_format(self) -> ChatFormat:
        return find_chat_format("<think> <tool_call>")

    def text_stream(
        self,
        stop: Sequence[str],
        *,
        special: SpecialTokens = "none",
        behind: Sequence[int] = (),  # noqa: ARG002 - bytes have the same text anywhere
    ) -> TextStream:
        markers = _MARKERS if special == "all" else dict.fromkeys(_MARKERS, "")  # they mark no parts of an answer
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return StoppingTextStream(
            lambda token: decoder.decode(bytes([token])) if token < _START else markers[token],
            lambda: decoder.decode(b"", final=True),
            stop,
        )

    def special_ids(self, names: Sequence[str]) -> frozenset[int]:
        return frozenset(token for token, name in _MARKERS.items() if name in names)

    def vocabulary(self) -> dict[str, int]:
        return {f"<{byte:02x}>": byte for byte in range(_START)} | {name: token for token, name in _MARKERS.items()}

    def fingerprint(self) -> Fingerprint:
        return Fingerprint.of("bytes and two turn markers", "ChatML-like")

    def grammar_tokenizer(self, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(TokenizerWrapper(_ByteVocabulary()), n_vocab=vocab_size, eos_token=list(eos_token_ids))


class _ByteVocabulary:
    """The tokens of `ByteTokenizer` as llguidance asks for them."""

    tokens: ClassVar = [*(bytes([byte]) for byte in range(_START)), b"<|im_start|>", b"<|im_end|>"]
    special_token_ids: ClassVar = [_START, _END]
    bos_token_id = None
    eos_token_id = _END

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def _written(message: dict[str, Any]) -> str:
    """Content and tool calls as the template writes them."""
    calls = "".join("\n<tool_call>" + json.dumps(call) + "</tool_call>" for call in message.get("tool_calls") or ())
    return (message.get("content") or "") + calls


class ScriptedRunner:
    """Gives all probability to the next byte of a reply, whatever the draft; off the script it ends the answer.

    Args:
        reply: rendered prompt -> the whole answer; asked once a request, on the engine's thread.
    """

    vocab_size = _VOCABULARY

    def __init__(self, reply: Callable[[str], str]) -> None:
        self._reply = reply
        self._scripts: dict[str, tuple[int, list[int]]] = {}
        """Tokens of the prompt, and the answer to it, by `Piece.key`."""
        self.num_forward_passes = 0

    def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        self.num_forward_passes += 1
        logits = [self._logits(piece.key, piece.text, piece.draft) for piece in pieces if piece.num_logits]
        return torch.cat([torch.empty((0, _VOCABULARY)), *logits])

    @property
    def num_rows(self) -> int:
        return len(self._scripts)

    def release(self, key: str) -> None:
        self._scripts.pop(key, None)

    def _logits(self, key: str, text: Sequence[int], draft: DraftTree) -> torch.Tensor:
        if key not in self._scripts:  # its first step
            self._scripts[key] = len(text), [*self._reply(_prompt_text(text)).encode(), _END]
        num_prompt_tokens, script = self._scripts[key]
        paths = [[*text[num_prompt_tokens:], *path] for path in draft.paths()]
        logits = torch.full((len(paths), _VOCABULARY), -1e4)
        for node, path in enumerate(paths):
            on_script = path == script[: len(path)] and len(path) < len(script)
            logits[node, script[len(path)] if on_script else _END] = 0.0
        return logits


def _prompt_text(token_ids: Iterable[int]) -> str:
    pieces = (_MARKERS[token].encode() if token in _MARKERS else bytes([token]) for token in token_ids)
    return b"".join(pieces).decode(errors="replace")


def scripted_engine(replies: Sequence[str] | Callable[[str], str], config: EngineConfig | None = None) -> Engine:
    """An engine whose model writes what it is told.

    Args:
        replies: the answers in the order in which requests are admitted, or a function from the rendered prompt (with
            `<|im_start|>role` and `<|im_end|>` markers) to the answer. A request beyond the last reply fails.
        config: limits and drafter; its model and device only name things. Default context: 8192 byte tokens.
    """
    config = config or EngineConfig(model="scripted")
    limit = config.max_model_len or 8192
    model = LoadedModel(
        runner=ScriptedRunner(replies if callable(replies) else _in_order(replies)),
        tokenizer=ByteTokenizer(),
        info=EngineInfo(
            model=config.model,
            architecture="ScriptedModel",
            device="cpu",
            dtype="float32",
            max_model_len=limit,
            num_parameters=0,
            num_kv_slots=config.kv_cache_tokens or 8 * limit,
            kv_bytes_per_token=0,
            step_cost=config.points or ((1, 1.0), (256, 1.5)),
            exact=config.exact,
            tool_calling=ByteTokenizer().chat_format().tool_calling,
        ),
        eos_token_ids=frozenset({_END}),
    )
    return Engine(config, model=model)


def loop_of(engine: Engine) -> LoopThread:
    """What is behind an engine: its loop, with its `core` and `model`, for tests that look inside or replace a part.

    All of it belongs to the loop's thread: look when no request is on its way.
    """
    return engine._loop


def held_by(engine: Engine) -> Held:
    """What requests hold of an engine between two steps: `not any(held_by(engine))` once all of them are over.

    Raises:
        EngineStoppedError: the engine was closed.
    """
    return loop_of(engine).call(loop_of(engine).held)


def _in_order(replies: Sequence[str]) -> Callable[[str], str]:
    remaining, lock = iter(replies), threading.Lock()

    def reply(_prompt: str) -> str:
        with lock:
            text = next(remaining, None)
        if text is None:
            raise RuntimeError(f"Got more requests than the {len(replies)} scripted replies: add replies")
        return text

    return reply
