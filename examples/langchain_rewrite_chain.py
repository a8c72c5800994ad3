"""A document rewritten step by step with a LangChain chain; the thread keeps every version as a source to copy from.

Uses the bundled copier, which needs no network and makes the edits that it is told word for word; give another model
for texts of its own.

Run: python examples/langchain_rewrite_chain.py
"""

from __future__ import annotations

from pathlib import Path

import rich
from _compare import compare
from langchain_core.messages import AIMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableConfig

from langchain_copyspec import ChatCopySpec

DOCUMENT = Path(__file__).parent / "documents" / "meeting_notes.md"
STEPS = (
    "Append this line:\n- Oskar brings the projector.",
    'Replace "Wednesday" with "Thursday".',
    "Prepend this line:\nDRAFT, not yet approved",
)


def run(llm: ChatCopySpec) -> list[AIMessage]:
    chain = ChatPromptTemplate.from_messages([("human", "{document}"), ("human", "{instruction}")]) | llm
    thread: RunnableConfig = {"configurable": {"thread_id": "minutes"}}
    text, answers = DOCUMENT.read_text(encoding="utf-8"), []
    for instruction in STEPS:
        answers.append(chain.invoke({"document": text, "instruction": instruction}, config=thread))
        text = str(answers[-1].text)
    return answers


def main() -> None:
    answers = compare(run)
    print(answers[-1].text)
    print("\nColoured by where it was copied from:")
    rich.print(ChatCopySpec.explain(answers[-1]))


if __name__ == "__main__":
    main()
