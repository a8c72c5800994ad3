"""One way to ask for an answer per framework: the engine itself, LangChain and LlamaIndex.

Each takes chat messages and shows the answer while it comes. The counts and times are the engine's own, as they reach
a user of that framework; nothing that is shown is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from copyspec_engine import (
    ConfigError,
    GenerationOutput,
    GenerationRequest,
    NoDrafter,
    SamplingParams,
    Segment,
    missing_extra,
)

if TYPE_CHECKING:
    from copyspec_engine import Engine

__all__ = ["FRAMEWORKS", "Ask", "FrameworkAnswer", "Message", "Show", "ask_engine", "ask_through", "check_framework"]

Message = Mapping[str, str]
"""A chat message: "role" and "content"."""
Show = Callable[[Sequence[Segment]], None]
"""Called with each piece of the answer as it comes."""
FRAMEWORKS = ("engine", "langchain", "llama-index")


@dataclass(frozen=True, slots=True)
class FrameworkAnswer:
    """An answer with the engine's counts and times."""

    text: str
    tokens: int
    forward_passes: int
    copied_share: float
    ttft_s: float
    seconds: float
    token_ids: tuple[int, ...]

    def same_as(self, other: FrameworkAnswer) -> bool:
        """Whether both are the same tokens."""
        return self.token_ids == other.token_ids


class Ask(Protocol):
    """Asks for one answer in a conversation."""

    def __call__(
        self, messages: Sequence[Message], session_id: str, max_tokens: int, show: Show
    ) -> FrameworkAnswer: ...


def check_framework(framework: str) -> None:
    """Raises before any work if `framework` is not one of `FRAMEWORKS`, or its package is not installed.

    Raises:
        ConfigError: there is no such framework.
        CopySpecError: its package is not installed.
    """
    if framework not in FRAMEWORKS:
        raise ConfigError(f"Got --framework {framework} but expected one of {', '.join(FRAMEWORKS)}")
    package = {"langchain": "langchain_core", "llama-index": "llama_index.core"}.get(framework)
    try:
        found = package is None or find_spec(package) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise missing_extra(f"{framework}-core", framework)


def ask_through(framework: str, engine: Engine) -> Ask:
    """The way to ask through `framework`, which `check_framework` has passed."""
    return {"engine": ask_engine, "langchain": _ask_langchain, "llama-index": _ask_llama_index}[framework](engine)


def ask_engine(engine: Engine, drafter: NoDrafter | None = None) -> Ask:
    """The engine without a framework; `NoDrafter()` is plain decoding."""

    def ask(messages: Sequence[Message], session_id: str, max_tokens: int, show: Show) -> FrameworkAnswer:
        request = GenerationRequest(
            messages=tuple(dict(message) for message in messages),
            sampling=SamplingParams(max_tokens=max_tokens),
            session_id=session_id,
            drafter=drafter,
        )
        output = None
        for chunk in engine.stream(request):
            show(chunk.segments)
            output = chunk.output
        return _answer(output)

    return ask


def _answer(output: GenerationOutput | None) -> FrameworkAnswer:
    assert output is not None, "the last chunk of a stream has the whole output"
    return FrameworkAnswer(
        text=output.text,
        tokens=output.usage.completion_tokens,
        forward_passes=output.draft_stats.num_forward_passes,
        copied_share=output.copied_share,
        ttft_s=output.timing.ttft_s,
        seconds=output.timing.total_s,
        token_ids=output.token_ids,
    )


def _ask_langchain(engine: Engine) -> Ask:
    from langchain_copyspec import ChatCopySpec

    llm = ChatCopySpec(engine=engine, include_segments=True, include_token_ids=True)

    def ask(messages: Sequence[Message], session_id: str, max_tokens: int, show: Show) -> FrameworkAnswer:
        turns = [(message["role"], message["content"]) for message in messages]
        text, last = "", None
        for chunk in llm.stream(turns, config={"configurable": {"thread_id": session_id}}, max_tokens=max_tokens):
            text += str(chunk.text)
            show(_segments(chunk.response_metadata.get("copyspec", {})))
            last = chunk if chunk.usage_metadata else last
        assert last is not None, "one chunk carries usage_metadata"
        assert last.usage_metadata is not None
        return _answer_of(text, last.usage_metadata["output_tokens"], last.response_metadata["copyspec"])

    return ask


def _ask_llama_index(engine: Engine) -> Ask:
    from llama_index.core.llms import ChatMessage

    from llama_index.llms.copyspec import CopySpec

    llm = CopySpec(engine=engine, include_segments=True, include_token_ids=True)

    def ask(messages: Sequence[Message], session_id: str, max_tokens: int, show: Show) -> FrameworkAnswer:
        turns = [ChatMessage(role=message["role"], content=message["content"]) for message in messages]
        last: Any = None
        for last in llm.stream_chat(turns, session_id=session_id, max_tokens=max_tokens):
            show(_segments(last.raw["copyspec"]))
        return _answer_of(last.message.content or "", last.raw["usage"]["completion_tokens"], last.raw["copyspec"])

    return ask


def _segments(stats: Mapping[str, Any]) -> list[Segment]:
    return [Segment(piece["text"], piece.get("source")) for piece in stats.get("segments", [])]


def _answer_of(text: str, tokens: int, stats: Mapping[str, Any]) -> FrameworkAnswer:
    return FrameworkAnswer(
        text=text,
        tokens=tokens,
        forward_passes=stats["num_forward_passes"],
        copied_share=stats["copied_share"],
        ttft_s=stats["ttft_s"],
        seconds=stats["total_s"],
        token_ids=tuple(stats["token_ids"]),
    )
