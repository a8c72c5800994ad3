"""What all options have in common: they are frozen, take known names only, and say in one line what is wrong."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from copyspec_engine.errors import ConfigError

__all__ = ["Options", "explain_errors"]


class Options(BaseModel):
    """Frozen options whose validation errors are `ConfigError`s that name the value."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=False)

    def __init__(self, **values: Any) -> None:  # noqa: ANN401 - pydantic checks each value
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(explain_errors(type(self).__name__, error)) from None


def explain_errors(owner: str, error: ValidationError) -> str:
    """What pydantic found, in one line: `Got temperature=-1 but expected ...`."""
    lines = []
    for problem in error.errors(include_url=False):
        name = ".".join(str(part) for part in problem["loc"] if not str(part).endswith(("Drafter", "Validator()]")))
        expected = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        if problem["type"] == "extra_forbidden":
            lines.append(f"Got unknown option {name}={problem['input']!r} for {owner}: check the spelling")
        elif problem["type"] == "missing":
            lines.append(f"Got no {name} for {owner} but it is required")
        elif not name or expected.startswith("Got "):  # the message of nested options or of a whole object
            lines.append(expected)
        else:
            lines.append(f"Got {name}={problem['input']!r} but expected {expected}")
    return "; ".join(dict.fromkeys(lines))
