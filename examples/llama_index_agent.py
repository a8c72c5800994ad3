"""An agent that calls a tool and reports what it found, turn after turn in one conversation.

The bundled model makes exactly the call it is told to make; a larger model finds out for itself.

Run: python examples/llama_index_agent.py
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.workflow import Context

from copyspec_engine import Engine, EngineConfig
from llama_index.llms.copyspec import CopySpec

DOCUMENTS = Path(__file__).parent / "documents"


def read_document(name: str) -> str:
    """Reads one of the documents."""
    return (DOCUMENTS / name).read_text(encoding="utf-8").strip()


def told_to_read(name: str) -> str:
    return "Call this tool:\n" + json.dumps({"name": "read_document", "arguments": {"name": name}})


async def work(engine: Engine, drafter: str) -> tuple[list[str], float, float]:
    """The agent's answers, tokens per forward pass and seconds."""
    agent = FunctionAgent(tools=[read_document], llm=CopySpec(engine=engine, drafter=drafter))
    context, before, start = Context(agent), engine.metrics(), time.perf_counter()
    answers = [str(await agent.run(told_to_read("meeting_notes.md"), ctx=context)) for _ in range(2)]
    after = engine.metrics()
    tokens, passes = after.completion_tokens - before.completion_tokens, after.num_steps - before.num_steps
    return answers, tokens / passes, time.perf_counter() - start


async def compare() -> None:
    with Engine(EngineConfig(model="bundled")) as engine:
        plain, _, plain_s = await work(engine, "none")
        answers, rate, seconds = await work(engine, "adaptive")
    assert answers == plain, "drafting never changes an answer"
    print("\n\n".join(answers))
    print(f"-- {rate:.1f} tokens per forward pass, {plain_s / seconds:.1f} times as fast as plain decoding, same text")


if __name__ == "__main__":
    asyncio.run(compare())
