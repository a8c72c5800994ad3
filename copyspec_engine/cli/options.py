"""Options of commands: those that several share, and commands whose options are the fields of a class."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import typer
from rich.console import Console
from typer.core import TyperCommand
from typer.models import ParameterInfo

from copyspec_engine import EngineConfig
from copyspec_engine.cli.exits import console, exit_with

__all__ = [
    "BUNDLED",
    "DEFAULT",
    "Device",
    "Dtype",
    "DtypeName",
    "Memory",
    "ModelArguments",
    "add_command",
    "engine_config",
]

BUNDLED = "bundled"
DEFAULT = "smollm2"
"""A small real chat model, fetched once: it writes what it likes, not only copies."""
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
Device = Annotated[str, typer.Option(help="auto, all (GPUs), cpu, cuda, cuda:N, mps or xpu.")]
Dtype = Annotated[
    DtypeName,
    typer.Option(help="auto is float32 on a CPU and the checkpoint's own type on a GPU."),
]
Memory = Annotated[
    Literal["wide", "narrow"],
    typer.Option(help="On a CPU: wide keeps weights as float32, narrow in the fewer bits that they came in."),
]

Options = TypeVar("Options")
Run = Callable[[Options, str, Console], int]
"""(options, words of the command line, where to print) -> exit code."""


def engine_config(model: str, device: str, dtype: DtypeName, **options: Any) -> EngineConfig:  # noqa: ANN401
    """The config of a model that a command names.

    What is measured and shown is plain greedy decoding, whatever the checkpoint's generation_config.json asks for.
    """
    return EngineConfig(**{"model": model, "device": device, "dtype": dtype, "generation_config": "ignore", **options})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelArguments:
    """The options of a command that loads a model to measure it."""

    model: Annotated[
        str, typer.Option(help='Hub name or local folder; "bundled" is the small model that comes along.')
    ] = BUNDLED
    device: Device = "auto"
    dtype: Dtype = "auto"

    @property
    def config(self) -> EngineConfig:
        return engine_config(self.model, self.device, self.dtype)


def add_command(
    app: typer.Typer,
    options: type[Options],
    name: str | None = None,
    description: str | None = None,
    **given: Any,  # noqa: ANN401 - whatever the class holds besides options
) -> Callable[[Run[Options]], Run[Options]]:
    """A decorator that makes a function a command of `app`.

    Args:
        app: gets the command.
        options: a dataclass. A field whose type is annotated with `typer.Option` or `typer.Argument` is an option;
            one of `tuple[X, ...]` takes several values, in a row or with its flag before each.
        name: of the command; default: the function's.
        description: for `--help`; default: the function's docstring.
        given: values of fields that are no options.
    """

    def add(run: Run[Options]) -> Run[Options]:
        parameters, several = _parameters(options)

        def called(**values: Any) -> None:  # noqa: ANN401 - as the class says
            words = values.pop("context").meta["command"]
            values.update({key: tuple(values[key]) for key in several if values[key] is not None})
            exit_with(lambda: run(options(**given, **values), words, console()))

        called.__name__, called.__doc__ = run.__name__, run.__doc__
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        app.command(name, help=description, cls=_RecordedCommand)(called)
        return run

    return add


def _parameters(options: type) -> tuple[list[inspect.Parameter], list[str]]:
    """The parameters that Typer makes options of, and the names of those with several values."""

    def parameter(name: str, kind: object, default: object = inspect.Parameter.empty) -> inspect.Parameter:
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)

    parameters, several = [parameter("context", typer.Context)], []
    kinds: Mapping[str, Any] = get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        kind, *about = get_args(kinds[field.name]) if get_origin(kinds[field.name]) is Annotated else [None]
        if not any(isinstance(found, ParameterInfo) for found in about):
            continue
        (info,) = about
        without_none = next((part for part in get_args(kind) if get_origin(part) is tuple), kind)
        if get_origin(without_none) is tuple:
            several.append(field.name)
            listed: Any = list[get_args(without_none)[0]]  # type: ignore[misc]
            kind = listed if without_none is kind else listed | None
        default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        parameters.append(parameter(field.name, Annotated[kind, info], default))
    return parameters, several


class _RecordedCommand(TyperCommand):
    """Lets an option that may be repeated take its values in a row: `--transcripts A B C`.

    Keeps the words of the command line in the context, for the record of a measurement. Its help is without boxes:
    their columns for names, types and what is said leave none of them room in a terminal of 80 columns, and cut names.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401 - typer and click differ on the types
        self.rich_markup_mode = None
        super().format_help(ctx, formatter)
        formatter.buffer = [part.replace("\\[", "[") for part in formatter.buffer]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - typer and click differ on the type
        ctx.meta["command"] = shlex.join([*ctx.command_path.split(), *args])
        repeatable = {flag for option in self.params if getattr(option, "multiple", False) for flag in option.opts}
        words: list[str] = []
        flag = None
        for word in args:
            if word.startswith("-"):
                flag = word if word in repeatable else None
            elif flag and words[-1] != flag:
                words.append(flag)
            words.append(word)
        return super().parse_args(ctx, words)
