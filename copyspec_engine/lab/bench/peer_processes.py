"""The engine in a process of `copyspec bench peers`, and what is asked there. Importing this is light."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from copyspec_engine import EngineConfig, GenerationRequest, NoDrafter, Segment
from copyspec_engine.cli.demo.figures import PeerAnswer
from copyspec_engine.cli.demo.frameworks import Ask, Message, ask_engine

__all__ = ["AskedTurn", "EngineSide", "through_langchain"]


@dataclass(frozen=True, slots=True)
class AskedTurn:
    """A turn, as every peer is asked for it: by its messages, or by the tokens that they are in the prompt."""

    conversation: str
    """No other one has this name."""
    messages: tuple[Message, ...]
    prompt_ids: tuple[int, ...]
    max_tokens: int


class EngineSide:
    """This engine in the process's other half: answers of `ours`, `ours-plain` and `ours-langchain`.

    Args:
        config: of the engine.
        langchain: whether it is asked through LangChain too.

    Raises:
        CopySpecError: the model cannot be loaded, or runs without drafting.
    """

    def __init__(self, config: EngineConfig, *, langchain: bool) -> None:
        from copyspec_engine.lab.measuring import drafting_engine

        with ExitStack() as stack:
            self._engine = stack.enter_context(drafting_engine(config))
            self._asks = {"ours": ask_engine(self._engine), "ours-plain": ask_engine(self._engine, NoDrafter())}
            self._chat_model = None
            if langchain:
                from langchain_copyspec import ChatCopySpec

                self._chat_model = ChatCopySpec(engine=self._engine)
            self._close = stack.pop_all().close

    def facts(self) -> dict[str, Any]:
        """What figures of the engine hang on, how many tokens it holds, and whether its answers may differ."""
        from copyspec_engine.lab.measuring import facts_of_engine

        info = self._engine.info
        return {**facts_of_engine(info), "max_model_len": info.max_model_len, "is_lossless": info.is_lossless}

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        return self._engine.encode(text)

    def prompt(self, conversation: str, messages: Sequence[Message]) -> list[int]:
        """The tokens of a prompt, earlier answers in those in which plain decoding wrote them."""
        own = tuple(dict(message) for message in messages)
        return self._engine.tokenize(GenerationRequest(messages=own, session_id=f"ours-plain {conversation}"))

    def answer(self, peer: str, asked: AskedTurn) -> PeerAnswer:
        """The answer of a peer, in a session of its own."""
        session_id = f"{peer} {asked.conversation}"
        if peer in self._asks:
            return _timed(self._asks[peer], asked, session_id)
        return through_langchain(self._chat_model, asked, {"configurable": {"thread_id": session_id}})

    def forget(self, conversation: str) -> None:
        """The conversation is over."""
        for peer in (*self._asks, "ours-langchain"):
            self._engine.forget(f"{peer} {conversation}")

    def close(self) -> None:
        self._close()


def _timed(ask: Ask, asked: AskedTurn, session_id: str) -> PeerAnswer:
    first: list[float] = []

    def show(pieces: Sequence[Segment]) -> None:
        if pieces and not first:
            first.append(time.perf_counter())

    started = time.perf_counter()
    answer = ask(asked.messages, session_id, asked.max_tokens, show)
    seconds = time.perf_counter() - started
    ttft_s = first[0] - started if first else seconds
    return PeerAnswer(answer.tokens, seconds, token_ids=answer.token_ids, text=answer.text, ttft_s=ttft_s)


def through_langchain(
    chat_model: Any,  # noqa: ANN401 - any chat model of LangChain
    asked: AskedTurn,
    config: Mapping[str, Any] | None = None,
) -> PeerAnswer:
    """The answer that a chat model streams."""
    turns = [(message["role"], message["content"]) for message in asked.messages]
    text, tokens, ttft_s = "", 0, 0.0
    started = time.perf_counter()
    for chunk in chat_model.stream(turns, config=config, max_tokens=asked.max_tokens):
        piece = str(chunk.text)
        if piece and not text:
            ttft_s = time.perf_counter() - started
        text += piece
        if chunk.usage_metadata:
            tokens = chunk.usage_metadata["output_tokens"]
    seconds = time.perf_counter() - started
    return PeerAnswer(tokens, seconds, text=text, ttft_s=ttft_s or seconds)
