"""One served model, asked by three clients: OpenAI's own, LangChain and LlamaIndex.

Starts `copyspec serve` with the bundled copier on a free port of this machine; a server of yours takes its place by its
address. Needs the extras "serve", "client", "langchain" and "llama-index".

Run: python examples/server_clients.py
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from langchain_core.messages import AIMessage, HumanMessage
from llama_index.core.llms import ChatMessage
from openai import OpenAI

from langchain_copyspec import ChatCopySpec
from llama_index.llms.copyspec import CopySpec

DOCUMENT = (Path(__file__).parent / "documents" / "service.ini").read_text(encoding="utf-8")
EDITS = ("Append this line:\nchecksum = yes", 'Replace "8080" with "9000".')


@contextmanager
def server() -> Iterator[str]:
    """The address of a server within the `with` block."""
    words = [sys.executable, "-m", "copyspec_engine", "serve", "bundled", "--port", "0", "--no-page"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = next(word for line in process.stdout for word in line.split() if word.startswith("http://"))
            yield address
        finally:
            process.terminate()


def ask_openai(base_url: str) -> str:
    """A stream of OpenAI's client; the header names the conversation, the prediction is the document."""
    client = OpenAI(base_url=base_url, api_key="none")
    stream = client.chat.completions.create(
        model="bundled",
        messages=[{"role": "user", "content": DOCUMENT}, {"role": "user", "content": EDITS[0]}],
        prediction={"type": "content", "content": DOCUMENT},
        stream=True,
        stream_options={"include_usage": True},
        extra_headers={"X-Session-ID": "service"},
    )
    text = ""
    for event in stream:
        text += "".join(choice.delta.content or "" for choice in event.choices)
        if event.usage is not None and event.usage.completion_tokens_details is not None:
            accepted = event.usage.completion_tokens_details.accepted_prediction_tokens
            print(f"OpenAI's client: {accepted} of {event.usage.completion_tokens} tokens came from the prediction")
    return text


def ask_langchain(base_url: str, edited: str) -> str:
    """The next edit, in the same conversation."""
    llm = ChatCopySpec(base_url=base_url, session_id="service")
    answer = llm.invoke([HumanMessage(DOCUMENT), HumanMessage(EDITS[0]), AIMessage(edited), HumanMessage(EDITS[1])])
    assert answer.usage_metadata is not None
    reused = answer.usage_metadata["input_token_details"]["cache_read"]
    print(f"LangChain: {answer.response_metadata['copyspec']['copied_share']:.0%} copied, {reused} tokens of KV reused")
    return str(answer.text)


def ask_llama_index(base_url: str) -> str:
    """A question that stands alone."""
    llm = CopySpec(base_url=base_url)
    response = llm.chat([ChatMessage(DOCUMENT), ChatMessage("Repeat the document.")])
    print(f"LlamaIndex: {response.raw['copyspec']['tokens_per_forward']:.1f} tokens per forward pass")
    return response.message.content or ""


def main() -> None:
    with server() as base_url:
        edited = ask_openai(base_url)
        print(ask_langchain(base_url, edited))
        assert ask_llama_index(base_url).strip() == DOCUMENT.strip()


if __name__ == "__main__":
    main()
