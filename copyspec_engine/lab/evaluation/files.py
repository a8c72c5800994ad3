"""Files that are written as a whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from copyspec_engine import ConfigError

__all__ = ["write_text"]


def write_text(path: Path, text: str, option: str) -> None:
    """Writes the whole file or nothing: a temporary file beside it takes its name when it is complete.

    Raises:
        ConfigError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"Cannot write {option} {path}: {error.strerror or error}. Choose another path") from None
    finally:
        temporary.unlink(missing_ok=True)
