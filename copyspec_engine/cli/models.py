"""`copyspec models` and `copyspec pull`: the models on this machine, and fetching one by its name."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Column, Table

from copyspec_engine import LoadProgress
from copyspec_engine.cli.exits import console, exit_with
from copyspec_engine.cli.printing import size_text

__all__ = ["models", "run_pull"]

models = typer.Typer(add_completion=False, help="List and remove the models on this machine.")

_SOURCES = {
    "copyspec": "comes with copyspec",
    "hub": "the hub's cache",
    "package": "installed package",
    "fetched": "fetched",
    "converted": "converted GGUF file",
}


@models.callback(invoke_without_command=True)
def list_all(
    context: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False
) -> None:
    """List the models on this machine, and those with a short name."""
    if context.invoked_subcommand is None:
        exit_with(lambda: _list(console(), as_json))


@models.command("rm")
def remove(
    name: Annotated[
        str, typer.Argument(help="As `copyspec models` lists it; of a converted file a beginning that no other has.")
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a model that copyspec or the hub's client has fetched, or the converted weights of one."""
    exit_with(lambda: _remove(name, yes, console()))


def _list(out: Console, as_json: bool) -> int:
    from copyspec_engine.models import list_models

    found = list_models()
    if as_json:
        out.print_json(json.dumps([asdict(model) for model in found]))
        return 0
    name = Column("model", overflow="fold", no_wrap=True)  # whole: `rm` takes it
    table = Table(name, "size", "licence", "from", box=None, header_style="bold", pad_edge=False)
    for model in found:
        size = size_text(model.num_bytes)
        where = _SOURCES.get(model.source, f"not fetched: copyspec pull {model.name}")
        if model.missing:
            where += f", not whole ({len(model.missing)} files are missing): copyspec pull {model.name}"
        table.add_row(*(escape(cell) for cell in (model.name, size, model.licence or "?", where)))
    out.print(table)
    return 0


def _remove(name: str, yes: bool, out: Console) -> int:
    from copyspec_engine.models import plan_removal

    plan = plan_removal(name)
    if not yes and not typer.confirm(f"Remove {plan.what}, {size_text(plan.num_bytes)}?"):
        out.print("Nothing was removed.")
        return 1
    plan.run()
    out.print(f"Removed {escape(plan.what)}: {size_text(plan.num_bytes)} are free now.")
    return 0


def run_pull(name: str, out: Console) -> int:
    """Fetch a model and say where it is; returns the exit code 0."""
    from copyspec_engine.models import KNOWN, fetch_model, find_model

    found = find_model(name) if name in KNOWN else None
    if found is not None:
        out.print(f"{escape(name)} is here already: {escape(str(found.path))}", soft_wrap=True)
        return 0
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=out, transient=True) as shown:
        task = shown.add_task(escape(f"looking for {name}"), total=None)

        def show(progress: LoadProgress) -> None:
            shown.update(task, description=escape(progress.text), completed=progress.done, total=progress.total)

        found = fetch_model(name, show)
    out.print(f"{escape(name)} is in {escape(str(found.path))}", soft_wrap=True)
    return 0
