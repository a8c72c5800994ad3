"""Local language models that never retype what the conversation already says.

The engine speculates that the answer copies from the conversation, verifies a long draft in one forward pass, and gives
exactly the tokens that plain decoding would give:

    from copyspec_engine import Engine, GenerationRequest

    with Engine() as engine:
        answer = engine.generate(GenerationRequest(messages=[{"role": "user", "content": "..."}]))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from copyspec_engine.engine.engine import RequestHandle
from copyspec_engine.values.config import (
    AdaptiveDrafter,
    CopySpecDrafter,
    DrafterConfig,
    DraftModel,
    DraftModelDrafter,
    EngineConfig,
    GenerationRequest,
    NoDrafter,
    SamplingParams,
)
from copyspec_engine.values.errors import (
    ConfigError,
    ContextOverflowError,
    CopySpecError,
    EngineBusyError,
    EngineStoppedError,
    MemoryFileError,
    ModelLoadError,
    RequestFailedError,
    UnsupportedModelError,
    missing_extra,
)
from copyspec_engine.values.grammar import Grammar, ToolCalls
from copyspec_engine.values.info import EngineInfo, EngineMetrics, SessionInfo
from copyspec_engine.values.outputs import (
    CopiedSpan,
    Copy,
    CopySource,
    DraftStats,
    EndedBy,
    Explanation,
    FinishReason,
    GenerationOutput,
    InvalidToolCall,
    Reply,
    ReplyDelta,
    Segment,
    StreamChunk,
    Timing,
    TokenLogprob,
    ToolCall,
    Usage,
)
from copyspec_engine.values.progress import LoadProgress, OnProgress

if TYPE_CHECKING:
    from copyspec_engine.engine.engine import Engine, inspect_model, shared_engine
    from copyspec_engine.memory.view import ConversationMemory, StoredText

__all__ = [
    "AdaptiveDrafter",
    "ConfigError",
    "ContextOverflowError",
    "ConversationMemory",
    "CopiedSpan",
    "Copy",
    "CopySource",
    "CopySpecDrafter",
    "CopySpecError",
    "DraftModel",
    "DraftModelDrafter",
    "DraftStats",
    "DrafterConfig",
    "EndedBy",
    "Engine",
    "EngineBusyError",
    "EngineConfig",
    "EngineInfo",
    "EngineMetrics",
    "EngineStoppedError",
    "Explanation",
    "FinishReason",
    "GenerationOutput",
    "GenerationRequest",
    "Grammar",
    "InvalidToolCall",
    "LoadProgress",
    "MemoryFileError",
    "ModelLoadError",
    "NoDrafter",
    "OnProgress",
    "Reply",
    "ReplyDelta",
    "RequestFailedError",
    "RequestHandle",
    "SamplingParams",
    "Segment",
    "SessionInfo",
    "StoredText",
    "StreamChunk",
    "Timing",
    "TokenLogprob",
    "ToolCall",
    "ToolCalls",
    "UnsupportedModelError",
    "Usage",
    "inspect_model",
    "missing_extra",
    "shared_engine",
]

_LATER = {
    "Engine": "engine.engine",
    "inspect_model": "engine.engine",
    "shared_engine": "engine.engine",
    "ConversationMemory": "memory.view",
    "StoredText": "memory.view",
}
"""The modules of names that need torch or Numba."""


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module attribute may be anything
    """Load torch, transformers and Numba only when the engine is used: importing a config must stay quick."""
    if name in _LATER:
        return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
