"""LlamaIndex LLM that decodes by copying from the conversation, with the output of plain decoding."""

from copyspec_engine.adapters.conversations import conversation
from llama_index.llms.copyspec.base import CopySpec
from llama_index.llms.copyspec.completion import CopySpecCompletion

__all__ = ["CopySpec", "CopySpecCompletion", "conversation"]
