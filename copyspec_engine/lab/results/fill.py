"""`copyspec bench report`: puts the figures of result files into pages of docs and into plots, or finds what differs.

A page says where: between `<!-- bench: begin NAME -->` and `<!-- bench: end -->`, NAME one of `BLOCKS` or "commands".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from copyspec_engine import ConfigError
from copyspec_engine.cli.files import write_text
from copyspec_engine.lab.bench.command import ReportOptions
from copyspec_engine.lab.display.charts import Plot
from copyspec_engine.lab.display.plots import check_installed, drawn_data, save
from copyspec_engine.lab.display.tables import Table, markdown
from copyspec_engine.lab.results.context import context_plots, context_tables
from copyspec_engine.lab.results.draft_models import draft_model_tables
from copyspec_engine.lab.results.drafts import (
    drafts_plots,
    drafts_tables,
    history_tables,
    ingredients_tables,
    propose_tables,
)
from copyspec_engine.lab.results.engine import engine_plots, engine_tables, speed_tables
from copyspec_engine.lab.results.evaluation import (
    eval_plots,
    eval_tables,
    free_eval_tables,
    reproduction_categories,
    reproduction_tables,
)
from copyspec_engine.lab.results.files import Results, commands, load_results
from copyspec_engine.lab.results.free_text import free_text_tables
from copyspec_engine.lab.results.front import demo_tables, front_plots
from copyspec_engine.lab.results.lossless import lossless_tables
from copyspec_engine.lab.results.peers import peers_plots, peers_tables
from copyspec_engine.lab.results.scale_drill import scale_drill_tables
from copyspec_engine.lab.results.scale_sim import scale_sim_plots, scale_sim_tables
from copyspec_engine.lab.results.serve_drill import serve_drill_tables
from copyspec_engine.lab.results.server import server_tables

__all__ = ["BLOCKS", "COMMANDS", "fill_pages"]

BLOCKS: dict[str, Callable[[Results], list[Table]]] = {
    "drafts": drafts_tables,
    "history": history_tables,
    "ingredients": ingredients_tables,
    "propose": propose_tables,
    "free-text": free_text_tables,
    "context": context_tables,
    "demo": demo_tables,
    "peers": peers_tables,
    "serve": server_tables,
    "scale-sim": scale_sim_tables,
    "lossless": lossless_tables,
    "serve-drill": serve_drill_tables,
    "scale-drill": scale_drill_tables,
    "engine": engine_tables,
    "speed": speed_tables,
    "draft-models": draft_model_tables,
    "eval": eval_tables,
    "free-eval": free_eval_tables,
    "reproduction": reproduction_tables,
    "reproduction-categories": reproduction_categories,
}
"""The tables that a page may hold."""
COMMANDS = "commands"
"""The block of the commands that wrote the result files."""
PLOTS: tuple[Callable[[Results], list[Plot]], ...] = (
    front_plots,
    drafts_plots,
    engine_plots,
    context_plots,
    peers_plots,
    eval_plots,
    scale_sim_plots,
)
BLOCK = re.compile(r"(<!-- bench: begin (.*?) -->\n)(.*?)(<!-- bench: end -->)", flags=re.DOTALL)


def fill_pages(options: ReportOptions, console: Console) -> int:
    """Writes the tables and the plots; a plot that no result gives any more is deleted.

    Returns:
        The exit code: 1 if nothing was to be written and something differs, else 0.

    Raises:
        CopySpecError: a file cannot be read or written, or a plot cannot be drawn.
    """
    found, plots = load_results(options.results), options.plots
    old = {path: _read(path) for path in options.page}
    new = {path: _filled(text, path, found) for path, text in old.items()}
    outdated = [path for path in old if old[path] != new[path]]
    wanted = {plots / f"{plot.name}.svg": plot for make in PLOTS for plot in make(found)}
    different = [path for path, plot in wanted.items() if drawn_data(path) != plot.data]
    left_over = [path for path in sorted(plots.glob("*.svg")) if path not in wanted and drawn_data(path)]
    if options.check:
        for path in (*outdated, *different, *left_over):
            _say(console, f"{path} is not what {options.results} gives: run `copyspec bench report`")
        return int(bool(outdated or different or left_over))
    _write({path: new[path] for path in outdated}, {path: wanted[path] for path in different}, left_over, console)
    for name in _not_shown(found, old.values()):
        _say(console, f"Left out {name}: no --page has a block <!-- bench: begin {name} -->")
    return 0


def _write(texts: dict[Path, str], plots: dict[Path, Plot], left_over: Sequence[Path], console: Console) -> None:
    if plots:
        check_installed()
    for path, text in texts.items():
        write_text(path, text, "--page")
        _say(console, f"Wrote {path}")
    for path, plot in plots.items():
        _say(console, f"Wrote {save(plot, path)}")
    for path in left_over:
        path.unlink()
        _say(console, f"Deleted {path}")


def _not_shown(results: Results, texts: Iterable[str]) -> list[str]:
    """Tables that no page has a block for."""
    shown = {block[2] for text in texts for block in BLOCK.finditer(text)}
    return [name for name, tables in BLOCKS.items() if name not in shown and tables(results)]


def _say(console: Console, text: str) -> None:
    console.print(escape(text), soft_wrap=True)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Cannot read --page {path}: {error.strerror or error}") from None


def _filled(text: str, path: Path, results: Results) -> str:
    """The text with each of its blocks as the results give it."""
    num_begun = text.count("<!-- bench: begin")
    if num_begun == 0 or num_begun != len(BLOCK.findall(text)):
        raise ConfigError(
            f"Got --page {path} without blocks that begin and end: write <!-- bench: begin drafts --> and "
            "<!-- bench: end -->, each on its own line"
        )

    def fill(block: re.Match[str]) -> str:
        name = block[2]
        if name not in (*BLOCKS, COMMANDS):
            raise ConfigError(f"Got block {name!r} in {path} but expected one of {', '.join((*BLOCKS, COMMANDS))}")
        if name == COMMANDS:
            return f"{block[1]}{commands(results)}{block[4]}"
        tables = BLOCKS[name](results)
        titles = [f"*{table.title}*\n\n" if len(tables) > 1 else "" for table in tables]
        shown = [f"{title}{markdown(table, level=0)}" for title, table in zip(titles, tables, strict=True)]
        return f"{block[1]}{chr(10).join(shown)}{block[4]}"

    return BLOCK.sub(fill, text)
