"""Evaluator and optimizer in a LangGraph: each new draft is written from the feedback alone.

The last draft is not in the prompt, so nothing can be copied from there; it is copied from the conversation's memory.
The model is scripted here, as the bundled one cannot write a text of its own.

Run: python examples/langchain_evaluator_optimizer.py (needs langgraph)
"""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Annotated, TypedDict

from _compare import compare
from langchain_core.messages import AIMessage
from langgraph.graph import END, START, StateGraph

from copyspec_engine.testing import scripted_engine
from langchain_copyspec import ChatCopySpec

ARTICLE = (Path(__file__).parent / "documents" / "article.txt").read_text(encoding="utf-8").rstrip()
LINES = {"Name the source.": "Reporting by our harbour correspondent.", "Say when.": "Printed in May."}
"""What the evaluator may miss, and what answers it."""


class State(TypedDict, total=False):
    """What the nodes share."""

    feedback: str
    drafts: Annotated[list[AIMessage], operator.add]


def article(prompt: str) -> str:
    """What the model writes: the article, with a line for each piece of feedback in the prompt."""
    return "\n".join([ARTICLE, *(line for feedback, line in LINES.items() if feedback in prompt)])


def run(llm: ChatCopySpec) -> list[AIMessage]:
    def optimize(state: State) -> State:
        return {"drafts": [llm.invoke(f"Write about the ferry. {state.get('feedback', '')}")]}

    def evaluate(state: State) -> State:
        draft, feedback = str(state["drafts"][-1].text), state.get("feedback", "")
        missing = [order for order, line in LINES.items() if line not in draft]
        return {"feedback": f"{feedback} {missing[0]}" if missing else "done"}

    graph = StateGraph(State)
    graph.add_node("optimize", optimize)
    graph.add_node("evaluate", evaluate)
    graph.add_edge(START, "optimize")
    graph.add_edge("optimize", "evaluate")
    graph.add_conditional_edges("evaluate", lambda state: END if state["feedback"] == "done" else "optimize")
    drafts: list[AIMessage] = graph.compile().invoke({}, {"configurable": {"thread_id": "article"}})["drafts"]
    return drafts


def main() -> None:
    for number, draft in enumerate(compare(run, lambda: scripted_engine(article)), 1):
        stats = draft.response_metadata["copyspec"]
        print(f"-- draft {number}: {stats['copied_share']:.0%} copied, {stats['num_forward_passes']} passes")
    print(draft.text)


if __name__ == "__main__":
    main()
