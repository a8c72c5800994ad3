"""A streamed LlamaIndex chat about a table, with the drafting statistics of each answer.

Uses the bundled copier, which needs no network and makes the edits that it is told word for word; give another model
for texts of its own.

Run: python examples/llama_index_chat.py
"""

from __future__ import annotations

from pathlib import Path

from llama_index.core.llms import ChatMessage

from llama_index.llms.copyspec import CopySpec

DOCUMENT = Path(__file__).parent / "documents" / "stock_table.csv"
STEPS = ("Append this line:\nladle,copper,21,C2,12.30,Ostrow", "Delete the first line.")


def main() -> None:
    llm = CopySpec(model="bundled", session_id="stock")
    history = [ChatMessage(role="user", content=DOCUMENT.read_text(encoding="utf-8"))]
    for instruction in STEPS:
        history.append(ChatMessage(role="user", content=instruction))
        answer = None
        for answer in llm.stream_chat(history):
            print(answer.delta, end="", flush=True)
        assert answer is not None
        history.append(answer.message)
        stats = answer.raw["copyspec"]
        print(f"\n-- {stats['tokens_per_forward']:.1f} tokens per forward pass, {stats['copied_share']:.0%} copied\n")


if __name__ == "__main__":
    main()
