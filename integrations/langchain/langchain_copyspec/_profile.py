"""What LangChain may know of a model before its first call."""

from __future__ import annotations

from typing import Any, cast

from langchain_core.language_models.model_profile import ModelProfile

from copyspec_engine import EngineConfig
from copyspec_engine.adapters.model import model_facts
from copyspec_engine.adapters.remote import AnyEngine
from copyspec_engine.adapters.tools import has_grammars

__all__ = ["model_profile"]


def model_profile(engine: AnyEngine | EngineConfig) -> ModelProfile | None:
    """The profile from the model's own config and chat template; None if the model is not on this machine."""
    facts = model_facts(engine)
    if facts is None:
        return None
    name = engine.model if isinstance(engine, EngineConfig) else engine.info.model
    written = facts.chat_format
    calls = written.takes_tools and any((written.calls, written.parts, written.own_template))
    profile = ModelProfile(
        name=name,
        open_weights=True,
        text_inputs=True,
        image_inputs=False,
        audio_inputs=False,
        video_inputs=False,
        pdf_inputs=False,
        text_outputs=True,
        reasoning_output=facts.reasons,
        tool_calling=calls,
        tool_choice=calls and written.calls is not None and has_grammars(),
        tool_call_streaming=calls,
        structured_output=has_grammars(),
        attachment=False,
        temperature=True,
    )
    if calls and written.tool_calling == "by prompt":  # as true as True, and there is no field that could say it
        profile["tool_calling"] = cast("Any", "by prompt")
    if facts.max_model_len is not None:
        profile |= {"max_input_tokens": facts.max_model_len, "max_output_tokens": facts.max_model_len}
    # What this version of LangChain does not know it warns of.
    return cast(
        "ModelProfile", {name: value for name, value in profile.items() if name in ModelProfile.__annotations__}
    )
