"""Passages of this project's docs from an index, put together by a refining query engine, and tried again.

The embeddings are counts of words, so that no second model is needed, and the critic is a rule. The bundled model can
copy and edit: the prompts ask for that. With a larger model leave the prompts out and ask in your own words.

Run: python examples/llama_index_rag.py
"""

from __future__ import annotations

import re
import time
import zlib
from pathlib import Path
from typing import Any

from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.evaluation import BaseEvaluator, EvaluationResult
from llama_index.core.indices.query.query_transform.feedback_transform import FeedbackQueryTransformation
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import ChatPromptTemplate
from llama_index.core.query_engine import RetryGuidelineQueryEngine
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.schema import QueryBundle, TextNode

from copyspec_engine import Engine, EngineConfig
from llama_index.llms.copyspec import CopySpec

PAGE = Path(__file__).parents[1] / "docs" / "langchain.md"
QUESTION = "Which thread or session is the conversation, and what stays a source to copy from?"
TITLE = "# Conversations"


class WordCounts(BaseEmbedding):
    """Counts of a text's words, hashed into 256 places: the same everywhere, and nothing to load."""

    def _get_text_embedding(self, text: str) -> list[float]:
        counts = [0.0] * 256
        for word in re.findall(r"[a-z]{4,}", text.lower()):
            counts[zlib.crc32(word.removesuffix("s").encode()) % 256] += 1.0
        return counts

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


class HasTitle(BaseEvaluator):
    """Passes answers that begin with the title."""

    async def aevaluate(
        self,
        query: str | None = None,
        response: str | None = None,
        contexts: object = None,  # noqa: ARG002 - part of the interface
        **_: object,
    ) -> EvaluationResult:
        passing, feedback = (response or "").startswith(TITLE), f"Prepend this line:\n{TITLE}"
        return EvaluationResult(query=query, response=response, passing=passing, feedback=feedback)

    def _get_prompts(self) -> dict[str, Any]:
        return {}

    def _update_prompts(self, prompts: dict[str, Any]) -> None:
        pass


class AnswerAndFeedback(FeedbackQueryTransformation):
    """The next query: the answer that did not pass, and what to change."""

    def _run(self, query_bundle: QueryBundle, metadata: dict[str, Any]) -> QueryBundle:
        found = metadata["evaluation"]
        text = f"{found.response}\n---\n{found.feedback}"
        return QueryBundle(text, custom_embedding_strs=query_bundle.embedding_strs)


def document(**given: str) -> str:
    """What to work on: an answer that did not pass, else the passage that was found."""
    answer, feedback, _ = given.get("query_str", "").partition("\n---\n")
    return answer if feedback else given.get("context_str", "")


def instruction(**given: str) -> str:
    return given.get("query_str", "").partition("\n---\n")[2] or "Repeat the document."


def refinement(**given: str) -> str:
    """Adds the next passage, or keeps the answer where the try was about something else."""
    is_retry = "\n---\n" in given.get("query_str", "")
    return "Repeat the document." if is_retry else f"Append this line:\n{given.get('context_msg', '')}"


ANSWER = ChatPromptTemplate(
    message_templates=[ChatMessage("{document}"), ChatMessage("{instruction}")],
    function_mappings={"document": document, "instruction": instruction},
)
REFINE = ChatPromptTemplate(
    message_templates=[ChatMessage("{existing_answer}"), ChatMessage("{instruction}")],
    function_mappings={"instruction": refinement},
)


def build(llm: CopySpec) -> BaseQueryEngine:
    paragraphs = PAGE.read_text(encoding="utf-8").split("\n\n")
    passages = [text for text in paragraphs if text[:1].isalpha() and len(text) < 350]
    nodes = [TextNode(text=text, id_=f"passage-{number}") for number, text in enumerate(passages)]
    refining = VectorStoreIndex(nodes, embed_model=WordCounts()).as_query_engine(
        llm=llm,
        response_mode=ResponseMode.REFINE,
        similarity_top_k=2,
        text_qa_template=ANSWER,
        refine_template=REFINE,
    )
    Settings.llm = llm  # the retry engine's inner transformation takes no other
    evaluator: Any = HasTitle()
    return RetryGuidelineQueryEngine(refining, evaluator, max_retries=1, query_transformer=AnswerAndFeedback(llm=llm))


def ask(engine: Engine, drafter: str) -> tuple[str, float, float]:
    """The answer, tokens per forward pass and seconds."""
    query_engine, before, start = build(CopySpec(engine=engine, drafter=drafter)), engine.metrics(), time.perf_counter()
    answer, after = str(query_engine.query(QUESTION)), engine.metrics()
    tokens, passes = after.completion_tokens - before.completion_tokens, after.num_steps - before.num_steps
    return answer, tokens / passes, time.perf_counter() - start


def main() -> None:
    with Engine(EngineConfig(model="bundled")) as engine:
        plain, _, plain_s = ask(engine, "none")
        answer, rate, seconds = ask(engine, "adaptive")
    assert answer == plain, "drafting never changes an answer"
    print(answer)
    print(f"-- {rate:.1f} tokens per forward pass, {plain_s / seconds:.1f} times as fast as plain decoding, same text")


if __name__ == "__main__":
    main()
