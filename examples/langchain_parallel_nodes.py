"""Nodes that run side by side share one engine: their requests are decoded in the same forward passes.

Uses the bundled copier, which needs no network and makes the edits that it is told word for word; give another model
for texts of its own.

Run: python examples/langchain_parallel_nodes.py (needs langgraph)
"""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Annotated, TypedDict

from _compare import compare
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import Runnable, RunnableLambda
from langgraph.graph import START, StateGraph

from langchain_copyspec import ChatCopySpec

DOCUMENTS = Path(__file__).parent / "documents"
EDITS = {
    "article.txt": "Prepend this line:\nLocal news",
    "meeting_notes.md": "Append this line:\n- Oskar brings the projector.",
    "service.ini": "Append this line:\nchecksum = yes",
    "stock_table.csv": "Delete the last line.",
}


class State(TypedDict):
    """What the nodes share."""

    answers: Annotated[list[AIMessage], operator.add]


def editor(llm: ChatCopySpec, name: str, instruction: str) -> Runnable[State, State]:
    """A node that edits one document."""

    def edit(_: State) -> State:
        text = (DOCUMENTS / name).read_text(encoding="utf-8")
        return {"answers": [llm.invoke([HumanMessage(text), HumanMessage(instruction)])]}

    return RunnableLambda(edit)


def run(llm: ChatCopySpec) -> list[AIMessage]:
    graph = StateGraph(State)
    for name, instruction in EDITS.items():
        graph.add_node(name, editor(llm, name, instruction))
        graph.add_edge(START, name)
    state = graph.compile().invoke({"answers": []}, {"configurable": {"thread_id": "desk"}})
    return list(state["answers"])


def main() -> None:
    answers = compare(run)
    for answer in answers:
        print(str(answer.text).splitlines()[0])


if __name__ == "__main__":
    main()
