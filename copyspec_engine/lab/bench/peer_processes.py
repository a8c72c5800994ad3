"""Processes of `copyspec bench peers`: the engine in one, transformers in another.

So the memory of each is its own, and no thread pool of one is at work while the other answers. All is timed where it
is called: an answer's way between the processes takes nobody's time.

Importing this is light: a process sets the number of its threads before anything that reads it is imported.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from copyspec_engine import CopySpecError, EngineConfig, GenerationRequest, NoDrafter, Segment
from copyspec_engine.cli.demo.figures import GENERATE, LOOKUP, PeerAnswer
from copyspec_engine.cli.demo.frameworks import Ask, Message, ask_engine

__all__ = ["AskedTurn", "EngineSide", "PeerProcess", "TransformersSide", "through_langchain"]

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
END_TIMEOUT_S = 5.0


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


class TransformersSide:
    """transformers on the same weights: answers of `generate` and `prompt-lookup`.

    Raises:
        ModelLoadError: it cannot load the model.
    """

    def __init__(self, config: EngineConfig) -> None:
        from copyspec_engine.cli.demo.peers import transformers_lanes

        trusted = config.trust_remote_code
        lanes = transformers_lanes(config.model, config.device, config.dtype, trust_remote_code=trusted)
        self._lanes = {"generate": lanes[GENERATE], "prompt-lookup": lanes[LOOKUP]}

    def answer(self, peer: str, asked: AskedTurn) -> PeerAnswer:
        """The answer of a peer, which reads the whole prompt in every turn."""
        return self._lanes[peer](asked.prompt_ids, asked.max_tokens)

    def close(self) -> None:
        """Nothing is to be ended."""


class PeerProcess:
    """One of the sides, made in a process of its own; `close` ends it, and so does leaving its `with` block.

    Args:
        name: what it is called in errors.
        threads: how many threads compute in it.
        make: makes the side, there.
        arguments: of `make`, by name.

    Raises:
        CopySpecError: the side cannot be made.
    """

    def __init__(self, name: str, threads: int, make: Callable[..., Any], **arguments: Any) -> None:  # noqa: ANN401
        self._name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, threads, make, arguments), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._result()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None, "it was started"
        return self._process.pid

    def call(self, method: str, *arguments: Any) -> Any:  # noqa: ANN401 - as the method has it
        """What a method of the side gives.

        Raises:
            CopySpecError: the method raised one, or the process has ended.
        """
        self._connection.send((method, arguments))
        return self._result()

    def close(self) -> None:
        """End the process; it is killed if it does not end by itself."""
        self._connection.close()
        for end in (self._process.terminate, self._process.kill):
            self._process.join(END_TIMEOUT_S)
            if self._process.exitcode is None:
                end()
        self._process.join()

    def _result(self) -> Any:  # noqa: ANN401
        try:
            failed, result = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(END_TIMEOUT_S)
            raise CopySpecError(f"The process of {self._name} ended with exit code {self._process.exitcode}") from None
        if failed:
            raise CopySpecError(result)
        return result


def _serve(connection: Connection, threads: int, make: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """What a process does: makes its side and calls its methods, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; who started this one closes its end then
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    import torch

    torch.set_num_threads(threads)
    with ExitStack() as stack, contextlib.suppress(EOFError, BrokenPipeError):
        try:
            side = stack.enter_context(contextlib.closing(make(**arguments)))
        except CopySpecError as error:
            connection.send((True, str(error)))
            return
        connection.send((False, None))
        while True:
            method, given = connection.recv()
            try:
                answer = False, getattr(side, method)(*given)
            except CopySpecError as error:
                answer = True, str(error)
            connection.send(answer)
