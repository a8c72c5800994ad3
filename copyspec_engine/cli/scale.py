"""`copyspec scale`: several replicas of a server, on one or more machines."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Annotated, Any

import typer
from rich.console import Console

from copyspec_engine import missing_extra
from copyspec_engine.cli.exits import loading
from copyspec_engine.cli.options import add_command
from copyspec_engine.cli.serve import check_serve_installed, option_of, options_of_serve
from copyspec_engine.scale.config import ScaleConfig

__all__ = ["ScaleOptions", "scale"]

scale = typer.Typer(no_args_is_help=True, help="Several replicas of a server, on one or more machines, by Ray Serve.")

_ADDRESS = (
    "Of a running Ray cluster, auto: the one of this machine. Default: one that begins and ends with the command."
)
_MEMORY = (
    "A folder in which each replica keeps the texts of its conversations over restarts, in a file for its slot; or "
    "postgresql://user@host/database, in which all replicas keep them together. "
    "Default: texts live in memory only."
)
_WITHOUT = ("drain_notice_s", "send_timeout_s")
"""Options of a server that mean nothing behind Ray's proxies."""

_options = {name: (kind, default) for name, kind, default in options_of_serve() if name not in _WITHOUT}
_options |= {name: option_of(ScaleConfig, name) for name in ScaleConfig.model_fields}
_options["direct"] = (
    Annotated[bool, typer.Option("--direct/--front", help=ScaleConfig.model_fields["direct"].description)],
    False,
)
_options["memory_path"] = Annotated[str | None, typer.Option(help=_MEMORY)], None
_options["address"] = Annotated[str | None, typer.Option(help=_ADDRESS)], None

ScaleOptions = dataclasses.make_dataclass(
    "ScaleOptions",
    [(name, kind, dataclasses.field(default=default)) for name, (kind, default) in _options.items()],
    frozen=True,
    kw_only=True,
)
"""Every option of `ScaleConfig`, and those of `copyspec serve`."""


@add_command(scale, ScaleOptions)
def up(options: Any, _words: str, console: Console) -> int:  # noqa: ANN401 - made above
    """Serve a model by several replicas, until a signal."""
    check_serve_installed("scale")
    if importlib.util.find_spec("ray") is None:
        raise missing_extra("ray", "scale")
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    port, address = given.pop("port"), given.pop("address")
    named = {name: value for name, value in given.items() if value is not None}
    from copyspec_engine.models import locate_model
    from copyspec_engine.scale.options import split_options
    from copyspec_engine.scale.up import UpOptions, run_up

    scale_config, _, _ = split_options(named)
    if address is None and scale_config.engine is None:
        with loading(options.model) as shown:
            locate_model(options.model, shown)  # once, and not by each replica; what is wrong is told at once
    return run_up(UpOptions(named, port, address), lambda url: console.print(f"Serving {options.model} at {url}/v1"))
