"""LangChain chat model that decodes by copying from the conversation, with the output of plain decoding."""

from copyspec_engine.adapters.conversations import conversation
from langchain_copyspec.chat_models import ChatCopySpec
from langchain_copyspec.errors import ContextOverflowError, RequestTimeoutError

__all__ = ["ChatCopySpec", "ContextOverflowError", "RequestTimeoutError", "conversation"]
