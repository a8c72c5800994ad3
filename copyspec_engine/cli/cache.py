"""`copyspec cache`: what copyspec keeps on this machine, and removing it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from copyspec_engine.cli.exits import console, exit_with
from copyspec_engine.cli.printing import size_text
from copyspec_engine.models.store import clear_models, clear_unfinished, kept_models, size, unfinished
from copyspec_engine.values.folders import cache_dir, compiled_folder, models_folder, step_cost_folder

__all__ = ["cache"]

cache = typer.Typer(add_completion=False, help="Show what copyspec keeps on this machine, and remove it.")


@dataclass(frozen=True, slots=True)
class _Kind:
    """One kind of what is kept."""

    name: str
    why: str
    folder: Callable[[], Path]
    paths: Callable[[], list[Path]]
    """All that there is of it."""
    clear: Callable[[], list[str]]
    """Removes it, and gives the names of what is in use and stays."""


def _of_folder(name: str, why: str, folder: Callable[[], Path]) -> _Kind:
    def clear() -> list[str]:
        if folder().is_dir():
            shutil.rmtree(folder())
        return []

    return _Kind(name, why, folder, lambda: [folder()], clear)


def _clear_models() -> list[str]:
    clear_models()
    return []


_KINDS = (
    _of_folder("compiled code", "compiled again at the next load", compiled_folder),
    _Kind("models", "fetched or converted again when asked for", models_folder, kept_models, _clear_models),
    _Kind("downloads", "begun and not ended", models_folder, unfinished, clear_unfinished),
    _of_folder("calibration", "measured again at the next load", step_cost_folder),
)


@cache.callback(invoke_without_command=True)
def show(
    context: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False
) -> None:
    """Show the folder in which copyspec keeps what it would else make again, and what of each kind is in it.

    The cache of the hub is not a part of it: `copyspec models` lists that, too.
    """
    if context.invoked_subcommand is None:
        exit_with(lambda: _show(console(), as_json))


@cache.command("clear")
def clear(
    compiled: Annotated[bool, typer.Option("--compiled", help="Remove compiled code.")] = False,
    models: Annotated[bool, typer.Option("--models", help="Remove fetched and converted models; asks first.")] = False,
    downloads: Annotated[bool, typer.Option("--downloads", help="Remove what was left by downloads.")] = False,
    calibration: Annotated[bool, typer.Option("--calibration", help="Remove measured costs of a pass.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove what is kept: the kinds that are named, or all of them. All of it is made again when it is needed."""
    named = [kind for kind, wanted in zip(_KINDS, (compiled, models, downloads, calibration), strict=True) if wanted]
    exit_with(lambda: _clear(named or list(_KINDS), yes, console()))


def _show(out: Console, as_json: bool) -> int:
    sizes = {kind.name: size(*kind.paths()) for kind in _KINDS}
    if as_json:
        kinds = {kind.name: {"path": str(kind.folder()), "num_bytes": sizes[kind.name]} for kind in _KINDS}
        out.print_json(json.dumps({"path": str(cache_dir()), "kinds": kinds}))
        return 0
    out.print(f"{escape(str(cache_dir()))} (COPYSPEC_CACHE_DIR moves it)", soft_wrap=True)
    table = Table("kind", "size", "in", "if it is removed", box=None, header_style="bold", pad_edge=False)
    table.columns[1].justify = "right"
    for kind in _KINDS:
        table.add_row(kind.name, size_text(sizes[kind.name]), kind.folder().name, kind.why)
    out.print(table)
    out.print("`copyspec models` lists the models: a GGUF file is there twice, as it was fetched and unpacked.")
    return 0


def _clear(kinds: list[_Kind], yes: bool, out: Console) -> int:
    num_bytes = size(*(path for kind in kinds for path in kind.paths()))
    models = size(*kept_models()) if any(kind.name == "models" for kind in kinds) else 0
    if models and not yes and not typer.confirm(f"Remove the models too, {size_text(models)}?"):
        out.print("Nothing was removed.")
        return 1
    for kind in kinds:
        for name in kind.clear():
            out.print(f"{escape(name)} is being made just now, and stays.", soft_wrap=True)
    left = size(*(path for kind in kinds for path in kind.paths()))
    for folder in (models_folder() / "gguf", models_folder(), cache_dir()):
        with suppress(OSError):  # it is not there, or something else is in it
            folder.rmdir()
    out.print(f"Removed {size_text(num_bytes - left)} from {escape(str(cache_dir()))}.", soft_wrap=True)
    return 0
