"""LangChain chat model that decodes by copying from the conversation, with the output of plain decoding."""

from copyspec_engine.adapters.conversations import conversation
from langchain_copyspec._calls import ContextOverflowError, RequestTimeoutError
from langchain_copyspec.chat_models import ChatCopySpec

__all__ = ["ChatCopySpec", "ContextOverflowError", "RequestTimeoutError", "conversation"]
