"""How deep nested values from outside may be: many readers of them recurse."""

from __future__ import annotations

from collections.abc import Mapping

from copyspec_engine.values.errors import ConfigError

__all__ = ["check_nesting"]

_MOST_LEVELS = 100


def check_nesting(value: object, what: str) -> None:
    """Refuse nested values that no recursive reader could take.

    Raises:
        ConfigError: lists and dicts are nested too deeply.
    """
    level = [value]
    for _ in range(_MOST_LEVELS):
        level = [
            item
            for outer in level
            if isinstance(outer, Mapping | list | tuple)
            for item in (outer.values() if isinstance(outer, Mapping) else outer)
        ]
        if not level:
            return
    raise ConfigError(f"Got {what} nested more than {_MOST_LEVELS} deep: name its parts in $defs, or make it flatter")
