"""Runs the demo with its peers on every shipped document and writes the docs' table of figures.

Run: python scripts/measure_demo.py [--write]    (without --write the table is only printed)
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
import textwrap
from pathlib import Path

import torch
from rich.console import Console

from copyspec_engine import EngineConfig, shared_engine
from copyspec_engine.cli.demo.chain import chain_for
from copyspec_engine.cli.demo.figures import figures
from copyspec_engine.cli.demo.frameworks import ask_through
from copyspec_engine.cli.demo.run import Chain
from copyspec_engine.cli.documents import load_document, shipped_names
from copyspec_engine.execution.calibration import cpu_name

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
COLUMNS = {
    "tokens": "tokens",
    "forward passes": "forward passes",
    "tokens per pass": "tokens per pass",
    "time": "copyspec",
    "plain decoding": "plain decoding",
    "generate": "generate",
    "prompt lookup": "prompt lookup",
    "over plain": "over plain",
    "over lookup": "over lookup",
    "identical to plain": "identical",
}


def main() -> int:
    """Measures, prints and, if asked, writes; exit code 1 if any turn differs."""
    parser = argparse.ArgumentParser(description="Measures the demo on every shipped document.")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    parser.add_argument("--framework", default="langchain")
    parser.add_argument("--model", default="bundled")
    options = parser.parse_args()
    table, same = _measure(options.framework, options.model)
    print(table)
    if options.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(before + BEGIN + table + END + rest.partition(END)[2], encoding="utf-8")
    return 0 if same else 1


def _measure(framework: str, model: str) -> tuple[str, bool]:
    engine = shared_engine(EngineConfig(model=model, device="cpu", generation_config="ignore"))
    rows, same = [], True
    for name in shipped_names():
        document, console = load_document(name), Console(quiet=True)
        task = chain_for(document, model)
        with Chain(engine, ask_through(framework, engine), task, document, compare=True) as chain:
            chain.warm_up()
            turns = chain.run(console)
        cells = figures(turns)
        same = same and all(turn.identical and turn.equals_generate for turn in turns)
        values = [cells[key] for key in COLUMNS]
        values[-1] = "yes" if all(turn.identical and turn.equals_generate for turn in turns) else "NO"
        rows.append(f"| {name}, {len(turns)} turns | {' | '.join(values)} |\n")
        print(rows[-1], end="", file=sys.stderr, flush=True)
    head = f"| document | {' | '.join(COLUMNS.values())} |\n|---|{'---:|' * len(COLUMNS)}\n"
    return f"{head}{''.join(rows)}\n{_conditions(framework)}\n", same


def _conditions(framework: str) -> str:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    said = (
        f"Measured on {datetime.date.today():%Y-%m-%d} with `python scripts/measure_demo.py` through {framework}, on "
        f"{os.cpu_count()} CPU threads ({cpu_name()}), float32, Python {platform.python_version()}, torch "
        f"{torch.__version__}; the load average was {load:.1f} at the end."
    )
    return textwrap.fill(said, 120, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(main())
