"""An agent with tools over several turns: what a tool gave is copied into answers and into later calls.

The bundled model calls a tool when told so word for word; a larger model decides by itself.

Run: python examples/langchain_agent.py (needs langchain)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from _compare import compare
from langchain.agents import create_agent
from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver

from langchain_copyspec import ChatCopySpec

DOCUMENTS = Path(__file__).parent / "documents"
written: list[str] = []


@tool
def read_document(name: str) -> str:
    """Read a document."""
    return (DOCUMENTS / name).read_text(encoding="utf-8")


@tool
def save_document(text: str) -> str:
    """Save a document."""
    written.append(text)
    return f"Saved {len(text)} characters."


def run(llm: ChatCopySpec) -> list[AIMessage]:
    agent: Any = create_agent(llm, [read_document, save_document], checkpointer=InMemorySaver())
    text = (DOCUMENTS / "meeting_notes.md").read_text(encoding="utf-8").rstrip()
    turns = (
        {"name": "read_document", "arguments": {"name": "meeting_notes.md"}},
        {"name": "save_document", "arguments": {"text": text}},
        {"name": "read_document", "arguments": {"name": "service.ini"}},
    )
    state: dict[str, Any] = {}
    for turn in turns:
        question = f"Call this tool:\n{json.dumps(turn)}"
        state = agent.invoke({"messages": [("user", question)]}, {"configurable": {"thread_id": "minutes"}})
    return [message for message in state["messages"] if isinstance(message, AIMessage)]


def main() -> None:
    answers = compare(run)
    for message in answers:
        for call in message.tool_calls:
            print(f"{call['name']}({', '.join(call['args'])})")
    print(answers[-1].text)


if __name__ == "__main__":
    main()
