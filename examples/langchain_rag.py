"""Retrieval with self-correction: answer from what was found, check the answer, correct it.

The check is a rule here; with a larger model it is one more prompt.

Uses the bundled copier, which needs no network and makes the edits that it is told word for word; give another model
for texts of its own.

Run: python examples/langchain_rag.py
"""

from __future__ import annotations

from pathlib import Path

from _compare import compare
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.vectorstores import InMemoryVectorStore

from langchain_copyspec import ChatCopySpec

DOCUMENTS = Path(__file__).parent / "documents"
THREAD: RunnableConfig = {"configurable": {"thread_id": "service"}}


def find(question: str) -> str:
    """The text nearest to the question; these embeddings know equal texts only, so the question is the file's name."""
    store = InMemoryVectorStore(DeterministicFakeEmbedding(size=32))
    files = ("article.txt", "meeting_notes.md", "service.ini")
    store.add_documents([Document(name, metadata={"file": name}) for name in files])
    found = store.as_retriever(search_kwargs={"k": 1}).invoke(question)[0]
    return (DOCUMENTS / str(found.metadata["file"])).read_text(encoding="utf-8")


def criticise(answer: str) -> str | None:
    """What is wrong with the answer, as an instruction; None if nothing is."""
    if "port = 9000" not in answer:
        return 'Set "port" to "9000".'
    if "checksum" not in answer:
        return "Append this line:\nchecksum = yes"
    return None


def run(llm: ChatCopySpec) -> list[AIMessage]:
    answers = [llm.invoke([HumanMessage(find("service.ini")), HumanMessage("Repeat the document.")], THREAD)]
    while (instruction := criticise(str(answers[-1].text))) is not None and len(answers) < 5:
        answers.append(llm.invoke([HumanMessage(answers[-1].text), HumanMessage(instruction)], THREAD))
    return answers


def main() -> None:
    answers = compare(run)
    print(answers[-1].text)


if __name__ == "__main__":
    main()
