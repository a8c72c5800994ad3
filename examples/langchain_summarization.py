"""An agent whose history is summarised in the middle: the file it read is in no prompt any more, but still copied.

SummarizationMiddleware replaces old messages by a summary. The conversation's memory keeps their texts as a source to
copy from. The model is scripted here, as the bundled one cannot write a summary.

Run: python examples/langchain_summarization.py (needs langchain)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import rich
from _compare import compare
from langchain.agents import create_agent
from langchain.agents.middleware import SummarizationMiddleware
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver

from copyspec_engine import Engine
from copyspec_engine.testing import scripted_engine
from langchain_copyspec import ChatCopySpec

DOCUMENTS = Path(__file__).parent / "documents"
ARTICLE = (DOCUMENTS / "article.txt").read_text(encoding="utf-8").rstrip()
QUESTIONS = ("Read article.txt.", "Thanks. Is it about a ferry?", "Now quote it in full.")


@tool
def read_file(path: str) -> str:
    """Read a file."""
    return (DOCUMENTS / Path(path).name).read_text(encoding="utf-8").rstrip()


def reply(prompt: str) -> str:
    """What the model writes: it reads the file, answers, summarises, and in the end quotes the file from memory."""
    last = prompt.rpartition("<|im_start|>assistant\n")[0].rpartition("<|im_start|>")[2]
    if QUESTIONS[2] in last:
        return ARTICLE
    if last.startswith("tool"):
        return "I have read it."
    if "<messages>" in last:
        return "The user had article.txt read; it is about a ferry."
    if QUESTIONS[0] in last:
        call = {"name": "read_file", "arguments": {"path": "article.txt"}}
        return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
    return "Yes, it is."


def run(llm: ChatCopySpec) -> list[AIMessage]:
    middleware: Any = SummarizationMiddleware(llm, trigger=("messages", 5), keep=("messages", 1))
    agent: Any = create_agent(llm, [read_file], checkpointer=InMemorySaver(), middleware=[middleware])
    thread: RunnableConfig = {"configurable": {"thread_id": "article"}}
    answers: list[AIMessage] = []
    for question in QUESTIONS:
        messages = agent.invoke({"messages": [("user", question)]}, thread)["messages"]
        answers.append(messages[-1])
    if any(ARTICLE in str(message.text) for message in messages[:-1]):
        raise AssertionError("the article is still in the prompt")
    return answers


def engine() -> Engine:
    return scripted_engine(reply)


def main() -> None:
    *_, quote = compare(run, engine)
    rich.print(ChatCopySpec.explain(quote))


if __name__ == "__main__":
    main()
