"""What a name is that no model here answers to, and what to give instead."""

from __future__ import annotations

import difflib
import re

from copyspec_engine.models.known import KNOWN
from copyspec_engine.values.config import BUNDLED_MODEL

__all__ = ["hub_file", "is_hub_name", "refuse_foreign_name"]

_PART = r"[A-Za-z0-9][\w.-]*"
_FULL_NAMES = {known.repo.rpartition("/")[2].lower(): name for name, known in KNOWN.items()}
"""Short names by the last part of the full ones."""
_OF_SERVICES = re.compile(
    r"(gpt-[345]|chatgpt|o[134](-|$)|claude-|gemini-|command-r|mistral-(small|medium|large)-latest)"
)
_HUB_FORM = 'a name on the hub has the form owner/name, "HuggingFaceTB/SmolLM2-135M-Instruct" for example'


def is_hub_name(name: str) -> bool:
    """Whether a repository on the hub can be called so."""
    return re.fullmatch(rf"{_PART}(/{_PART})?", name) is not None


def hub_file(name: str) -> tuple[str, str] | None:
    """The repository and the file of "owner/name/file.gguf"; None for any other name."""
    found = re.fullmatch(rf"({_PART}/{_PART})/(.+\.gguf)", name)
    return (found[1], found[2]) if found else None


def refuse_foreign_name(name: str) -> str | None:
    """What is wrong with the name of a model that is not on this machine, and what to do; None for a possible one."""
    if "/" not in name and (near := _near(name)) is not None:
        return f"there is no such model: did you mean {near!r}?"
    if re.match(r"https?:|hf\.co/|[\w.-]+\.(com|co|org)/", name):
        return f"that is an address: {_HUB_FORM}"
    if re.match(r"([A-Za-z]:)?[\\/]|[.~]", name):
        return f"there is no such file or folder, and {_HUB_FORM}"
    prefix, tag = name.rpartition(":")[::2]
    last = name.rpartition("/")[2].rpartition(":")[2].lower()
    if _OF_SERVICES.match(last):
        return (
            "that is a model of a service, whose weights are not published: copyspec runs models on this machine, and "
            + _HUB_FORM
        )
    if re.search(r"gguf", prefix, re.IGNORECASE) or re.fullmatch(r"(I?Q\d\w*|F16|BF16|F32)", tag):
        return (
            f"{tag!r} picks a GGUF file by its quantization, and files are given by their names here: run "
            f"`copyspec pull {prefix or 'OWNER/NAME'}/FILE.gguf` and give that as the model"
        )
    if prefix:
        return (
            "that is a tag of Ollama, whose store is not read: give the model's name on the hub, or the path of its "
            f".gguf file; {_HUB_FORM}"
        )
    if not is_hub_name(name):
        return f"there is no such file or folder, and {_HUB_FORM}"
    return None


def _near(name: str) -> str | None:
    """The short name that was meant."""
    lowered = name.lower()
    if lowered in _FULL_NAMES:
        return _FULL_NAMES[lowered]
    close = difflib.get_close_matches(lowered, [BUNDLED_MODEL, *KNOWN], n=1, cutoff=0.75)
    return close[0] if close else None
