"""Files that are written as a whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from copyspec_engine import ConfigError

__all__ = ["check_writable", "write_text"]


def check_writable(path: Path | None, option: str) -> None:
    """Raises `ConfigError` now, rather than after minutes of work, if `write_text` could not write here.

    None, for an option that was not given, is always right.
    """
    if path is None:
        return
    if path.exists() and not path.is_file():
        raise ConfigError(f"Got {option} {path}, which is not a file: name a file, it is made if it is not there")
    if not path.parent.is_dir():
        raise ConfigError(f"Got {option} {path} but there is no folder {path.parent}: create it first")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"Got {option} {path} but the folder {path.parent} is not writable: choose another")


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
