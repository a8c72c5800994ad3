"""Drills of `copyspec serve`, on real processes: `python -m scripts.serve_drill [DRILL ...] [options]`.

load    many clients of several tenants, who also leave, stall and send nonsense: no wrong answer, nothing left over
crash   killed in the middle of answers, again and again: what was said whole is remembered
term    SIGTERM while streams run, once and twice: each has its last event
second  another server on the same memory file
hup     keys that change

The exit code is 0 if all that was drilled held, else 1.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from copyspec_engine.lab.measuring import machine, versions, write_record
from copyspec_engine.models.find import find_model
from scripts.serve_drill.ends import EndOptions, drill_crash, drill_hup, drill_second, drill_term
from scripts.serve_drill.load import LoadOptions, drill_load

Drill = Callable[[], tuple[dict[str, Any], list[str]]]


def main(words: list[str]) -> int:
    """Run the drills that are asked for; the exit code."""
    parser = argparse.ArgumentParser("serve_drill", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = ("load", "crash", "term", "second", "hup")
    parser.add_argument("drills", nargs="*", default=[], metavar="DRILL", help="default: all of them")
    parser.add_argument("--model", help="default: smollm2 where it is there, else bundled")
    parser.add_argument("--clients", type=int, default=64, help="of the load")
    parser.add_argument("--minutes", type=float, default=10.0, help="of the load")
    parser.add_argument("--rounds", type=int, default=3, help="kills of the crash")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--folder", type=Path, help="for logs and memory files; default: one that is deleted")
    options = parser.parse_args(words)
    unknown = [name for name in options.drills if name not in names]
    if unknown:
        parser.error(f"got {unknown[0]!r} but expected {', '.join(names)}")
    model = options.model or ("smollm2" if find_model("smollm2") else "bundled")
    with tempfile.TemporaryDirectory() as made:
        folder: Path = options.folder or Path(made)
        ends = EndOptions(model, folder, options.seed, rounds=options.rounds)
        load = LoadOptions(model, folder, options.clients, options.minutes, options.seed)
        drills: dict[str, Drill] = {
            "load": lambda: drill_load(load),
            "crash": lambda: drill_crash(ends),
            "term": lambda: drill_term(ends),
            "second": lambda: drill_second(ends),
            "hup": lambda: drill_hup(ends),
        }
        results = {name: drills[name]() for name in options.drills or names}
    Console().print(_table(results))
    if options.json is not None:
        told = {name: {"held": not broken, "broken": broken, **figures} for name, (figures, broken) in results.items()}
        about = {"model": model, "versions": versions(), "machine": machine()}
        write_record(
            options.json, {"drills": told, **about}, shlex.join(["python", "-m", "scripts.serve_drill", *words])
        )
    return int(any(broken for _, broken in results.values()))


def _table(results: dict[str, tuple[dict[str, Any], list[str]]]) -> Table:
    table = Table("drill", "held", "figures")
    for name, (figures, broken) in results.items():
        said = [f"{key}: {value}" for key, value in figures.items()]
        table.add_row(name, "no" if broken else "yes", escape("\n".join([*said, *broken])))
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
