"""What can be known of a model before it is loaded: read from small files that are on this machine."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from copyspec_engine.chat.formats import ChatFormat, find_chat_format
from copyspec_engine.chat.template import describe_template, given_template
from copyspec_engine.models import find_model
from copyspec_engine.models.gguf_file import is_gguf, read_file
from copyspec_engine.values.config import EngineConfig
from copyspec_engine.values.errors import ConfigError, ModelLoadError

__all__ = ["ModelFacts", "read_model_facts"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFacts:
    """A model's own limits and abilities."""

    max_model_len: int | None
    """Longest prompt plus answer, in tokens, within the limit of the engine's configuration; None: not known."""
    chat_format: ChatFormat
    """How its chat template writes tool calls and reasoning, and what it leaves out."""

    @property
    def reasons(self) -> bool:
        """Its answers may have reasoning."""
        return self.chat_format.reasons


def read_model_facts(config: EngineConfig) -> ModelFacts | None:
    """The facts of a config's model; None for a model that is not on this machine. Nothing is loaded or downloaded."""
    try:
        found = find_model(config.model)
        if found is None:
            return None
        facts = _read(found.path, config.chat_template, config.tool_prompt)
    except ModelLoadError:  # loading it says what is wrong
        return None
    if facts is None:
        return None
    limits = [limit for limit in (facts.max_model_len, config.max_model_len) if limit is not None]
    return ModelFacts(min(limits, default=None), facts.chat_format)


@lru_cache(maxsize=64)
def _read(path: Path, given: str | None, tool_prompt: bool) -> ModelFacts | None:
    """What is known of a folder or a GGUF file; None: the folder holds no model.

    Raises:
        ModelLoadError: the GGUF file cannot be read.
    """
    if is_gguf(str(path)):
        file = read_file(path)
        limit, template, special, own = file.max_model_len, file.chat_template, file.special_tokens, None
    elif (path / "config.json").is_file():
        tokenizer = _json(path / "tokenizer_config.json")
        limit, template = _longest_context(_json(path / "config.json")), _chat_template(path, tokenizer)
        special, own = _special_tokens(tokenizer), tokenizer.get("response_template")
    else:
        return None
    if given is not None:
        template = given_template(given)
    try:
        chat_format = describe_template(template, special, response_template=own, tool_prompt=tool_prompt)
    except ConfigError as error:  # loading the model will say so
        logger.warning("the chat template for %s cannot be read: %s", path, error)
        chat_format = find_chat_format(template, own)
    return ModelFacts(limit, chat_format)


def _special_tokens(tokenizer: dict[str, Any]) -> dict[str, str]:
    """The names of special tokens as a chat template reads them."""
    tokens = {name: value for name, value in tokenizer.items() if name.endswith("_token")}
    names = {name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()}
    return {name: value for name, value in names.items() if isinstance(value, str)}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, OSError):  # loading the model will say so
        logger.warning("%s cannot be read", path, exc_info=True)
        return {}
    return content if isinstance(content, dict) else {}


def _chat_template(folder: Path, tokenizer: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = tokenizer.get("chat_template") or _json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several by name
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("tool_use") or named.get("default")
    return template if isinstance(template, str) else None


def _longest_context(config: dict[str, Any]) -> int | None:
    """As the engine limits it: long-context RoPE ("longrope") is used up to its original context only."""
    part = config.get("text_config")
    text = part if isinstance(part, dict) else config
    limit = text.get("max_position_embeddings")
    rope = text.get("rope_parameters") or text.get("rope_scaling")
    if isinstance(rope, dict) and "longrope" in (rope.get("rope_type"), rope.get("type")):
        original = rope.get("original_max_position_embeddings") or text.get("original_max_position_embeddings")
        limit = min((length for length in (limit, original) if isinstance(length, int)), default=None)
    return limit if isinstance(limit, int) and limit > 0 else None
