"""A model together with options of its calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.runnables import RunnableBinding
from langchain_core.runnables.config import merge_configs
from typing_extensions import override

from langchain_copyspec._tools import Tool

if TYPE_CHECKING:
    from langchain_copyspec.chat_models import ChatCopySpec

__all__ = ["BoundModel"]


class BoundModel(RunnableBinding[LanguageModelInput, AIMessage]):  # type: ignore[no-redef]  # of a field and pydantic
    """LangChain's binding, which also counts tokens with what is bound."""

    @classmethod
    @override
    def lc_id(cls) -> list[str]:
        return RunnableBinding.lc_id()

    def get_num_tokens_from_messages(
        self,
        messages: list[BaseMessage],
        tools: Sequence[Tool] | None = None,
        **options: Any,  # noqa: ANN401 - those of a call
    ) -> int:
        """Exactly the prompt tokens of a call with `messages`; see `ChatCopySpec.get_num_tokens_from_messages`."""
        options = {**self.kwargs, **options, "config": merge_configs(self.config, options.get("config"))}
        if tools is not None:
            options["tools"] = tools
        return cast("ChatCopySpec", self.bound).get_num_tokens_from_messages(messages, **options)
