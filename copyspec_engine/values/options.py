"""What all options have in common: they are frozen, take known names only, and say in one line what is wrong."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from copyspec_engine.values.errors import ConfigError
from copyspec_engine.values.option_names import advice, is_secret

__all__ = ["Documented", "Options", "explain_errors"]

_MODULES = ("copyspec_engine.values.config", "copyspec_engine.values.grammar")
_OPTIONS = "\n\nOptions:\n"
_INDENT = " " * 8
_SIGNS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
_MAX_SHOWN = 300
"""Characters of a value in an error: a whole prompt would hide what is wrong."""


class Documented(BaseModel):
    """Options of which `help` shows each with its type, default, range, and what is said below it."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    told_by: ClassVar[tuple[type[BaseModel], ...]] = ()
    """Whose fields of the same names tell of those that have no text of their own."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:  # noqa: ANN401 - as pydantic has it
        for name, field in cls.model_fields.items():
            for other in cls.told_by if field.description is None else ():
                if name in other.model_fields:
                    field.description = other.model_fields[name].description
                    break
        own = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
        lines = [
            f"    {name}: {_declared(field)}\n"
            + textwrap.fill(" ".join(field.description.split()), 116, initial_indent=_INDENT, subsequent_indent=_INDENT)
            for name, field in cls.model_fields.items()
            if field.description
        ]
        cls.__doc__ = own + _OPTIONS + "\n".join(lines) if lines else own


def _declared(field: FieldInfo) -> str:
    """The type of a field, its default and the range of its numbers, as one reads them."""
    ranges = [f"{sign} {getattr(rule, key)}" for rule in field.metadata for key, sign in _SIGNS if hasattr(rule, key)]
    within = f" ({', '.join(ranges)})" if ranges else ""
    default = field.default
    if field.is_required():
        return f"{_type_text(field.annotation)}, required{within}"
    if field.default_factory is not None:
        return f"{_type_text(field.annotation)}, made anew{within}"
    shown = f"{type(default).__name__}()" if isinstance(default, BaseModel) else repr(default)
    return f"{_type_text(field.annotation)} = {shown}{within}"


def _type_text(kind: Any) -> str:  # noqa: ANN401 - any type
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type_text(inner[0])
    if origin is Literal:
        return " | ".join(map(repr, inner))
    if origin in (Union, UnionType):
        return " | ".join(map(_type_text, inner))
    if kind in (None, NoneType, ...):
        return "None" if kind is not ... else "..."
    name = getattr(origin or kind, "__name__", str(kind))
    return f"{name}[{', '.join(map(_type_text, inner))}]" if inner and origin is not Callable else name


class Options(Documented):
    """Frozen options whose validation errors are `ConfigError`s that name the value."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=False)

    def __init__(self, **values: Any) -> None:  # noqa: ANN401 - pydantic checks each value
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(explain_errors(type(self), error)) from None


def explain_errors(
    owner: type[BaseModel], error: ValidationError, *, called: str | None = None, beside: Iterable[str] = ()
) -> str:
    """What pydantic found, in one line: `Got temperature=-1 but expected ...`.

    Args:
        owner: whose options were checked.
        error: what pydantic raised.
        called: the owner's name in the text; default: that of the class.
        beside: names of options that are taken along with the owner's.
    """
    lines, called = [], called or owner.__name__
    homes = (*owner.__subclasses__(), *_homes())
    for problem in error.errors(include_url=False):
        name = ".".join(str(part) for part in problem["loc"] if not str(part).endswith(("Drafter", "Validator()]")))
        expected = re.sub(r"^(Value error, |Input should be |\w+ should have )", "", problem["msg"])
        given = name if is_secret(name) else f"{name}={_shown(problem['input'])}"
        if problem["type"] == "extra_forbidden":
            lines.append(f"Got unknown option {given} for {called}: {advice(name, owner, homes, beside)}")
        elif problem["type"] == "missing":
            lines.append(f"Got no {name} for {called} but it is required")
        elif not name or expected.startswith("Got "):  # the message of nested options or of a whole object
            lines.append(expected)
        else:
            lines.append(f"Got {given} but expected {expected}")
    return "; ".join(dict.fromkeys(lines))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}... ({len(text)} characters)"


def _homes() -> list[type[BaseModel]]:
    """All options that a caller may set; last those that cannot be set without others."""
    kinds = [kind for module in _MODULES for kind in Options.__subclasses__() if kind.__module__ == module]
    return sorted(kinds, key=lambda kind: any(field.is_required() for field in kind.model_fields.values()))
