"""`copyspec eval report`: runs beside one another, on the terminal, as Markdown and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table as Grid

from copyspec_engine.cli.report import check_writable, write_text
from copyspec_engine.lab.evaluation.compare import charts, load_runs, tables
from copyspec_engine.lab.evaluation.report_page import page
from copyspec_engine.lab.evaluation.tables import Table, markdown

__all__ = ["run_eval_report"]


def run_eval_report(paths: Sequence[Path], markdown_path: Path | None, html_path: Path | None, console: Console) -> int:
    """Prints the tables and writes the files; returns the exit code 0.

    Raises:
        ConfigError: a folder is given twice or holds no run, a file of it is broken, or a file cannot be written.
    """
    for path, option in ((markdown_path, "--markdown"), (html_path, "--html")):
        if path:
            check_writable(path, option)
    runs = load_runs(paths)
    found = tables(runs)
    for table in found:
        console.print(_grid(table))
    title = f"copyspec eval: {', '.join(dict.fromkeys(run.facts.benchmark for run in runs))}"
    if markdown_path:
        write_text(markdown_path, f"# {title}\n\n" + "\n".join(map(markdown, found)), "--markdown")
    if html_path:
        write_text(html_path, page(title, found, charts(runs)), "--html")
    for path in (markdown_path, html_path):
        if path:
            console.print(f"Wrote {escape(str(path))}", soft_wrap=True)
    return 0


def _grid(table: Table) -> Group:
    grid = Grid(box=box.SIMPLE, padding=0)
    words = any(len(cell) > 24 for row in table.rows for cell in row[table.num_labels :])
    for place, heading in enumerate(table.headings):
        label = place < table.num_labels
        grid.add_column(heading, justify="left" if label or words else "right", overflow="fold", no_wrap=label)
    group = table.num_labels - 1
    for place, row in enumerate(table.rows):
        following = table.rows[place + 1] if place + 1 < len(table.rows) else ()
        ends = bool(group) and row[:group] != following[:group]
        grid.add_row(*map(escape, row), end_section=ends)
    return Group(f"[italic]{escape(table.title)}[/]", grid)
