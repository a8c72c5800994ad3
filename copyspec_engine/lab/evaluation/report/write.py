"""`copyspec eval report`: runs beside one another, on the terminal, as Markdown and as a page."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from copyspec_engine.cli.files import check_writable, write_text
from copyspec_engine.lab.display.plots import check_installed
from copyspec_engine.lab.display.tables import markdown, on_terminal
from copyspec_engine.lab.evaluation.command import ReportOptions
from copyspec_engine.lab.evaluation.report.compare import charts, load_runs, tables
from copyspec_engine.lab.evaluation.report.html import page

__all__ = ["run_eval_report"]


def run_eval_report(options: ReportOptions, console: Console) -> int:
    """Prints the tables and writes the files; returns the exit code 0.

    Raises:
        CopySpecError: --html is given but matplotlib is not installed.
        ConfigError: a folder is given twice or holds no run, a file of it is broken, or a file cannot be written.
    """
    check_writable(options.markdown, "--markdown")
    check_writable(options.html, "--html")
    if options.html:
        check_installed()
    runs = load_runs(options.runs)
    found = tables(runs)
    for table in found:
        console.print(on_terminal(table))
    title = f"copyspec eval: {', '.join(dict.fromkeys(run.facts.benchmark for run in runs))}"
    if options.markdown:
        write_text(options.markdown, f"# {title}\n\n" + "\n".join(map(markdown, found)), "--markdown")
    if options.html:
        write_text(options.html, page(title, found, charts(runs)), "--html")
    for path in (options.markdown, options.html):
        if path:
            console.print(f"Wrote {escape(str(path))}", soft_wrap=True)
    return 0
