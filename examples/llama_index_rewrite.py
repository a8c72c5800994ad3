"""A document rewritten step by step: each version is the next one's source.

Uses the bundled copier, which needs no network and makes the edits that it is told word for word; give another model
for texts of its own.

Run: python examples/llama_index_rewrite.py
"""

from __future__ import annotations

import time
from pathlib import Path

import rich
from llama_index.core.llms import ChatMessage, ChatResponse

from copyspec_engine import Engine, EngineConfig
from llama_index.llms.copyspec import CopySpec, conversation

DOCUMENT = Path(__file__).parent / "documents" / "meeting_notes.md"
STEPS = ('Replace "Wednesday" with "Thursday".', "Prepend this line:\nDRAFT, not yet approved")


def rewrite(engine: Engine, drafter: str) -> tuple[ChatResponse, float, float]:
    """The response with the last version, tokens per forward pass and seconds."""
    llm, text, start = CopySpec(engine=engine), DOCUMENT.read_text(encoding="utf-8"), time.perf_counter()
    tokens = passes = 0
    with conversation(f"minutes {drafter}"):
        for step in STEPS:
            response = llm.chat([ChatMessage(text), ChatMessage(step)], drafter=drafter)
            text = response.message.content or ""
            tokens += response.raw["usage"]["completion_tokens"]
            passes += response.raw["copyspec"]["num_forward_passes"]
    return response, tokens / passes, time.perf_counter() - start


def main() -> None:
    with Engine(EngineConfig(model="bundled")) as engine:
        plain, _, plain_s = rewrite(engine, "none")
        drafted, rate, seconds = rewrite(engine, "adaptive")
    assert drafted.message.content == plain.message.content, "drafting never changes an answer"
    print(drafted.message.content)
    print("-- Where that was copied from, place by place:")
    rich.print(CopySpec.explain(drafted))
    print(f"-- {rate:.1f} tokens per forward pass, {plain_s / seconds:.1f} times as fast as plain decoding, same text")


if __name__ == "__main__":
    main()
