"""Every client against servers that are started here on 127.0.0.1: `make conformance`."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scripts.conformance.behaviours import KEY, Place, Result

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".venv-conformance"
CLIENTS = {
    "openai": "openai_client",
    "litellm": "litellm_client",
    "pydantic-ai": "pydantic_ai_client",
    "instructor": "instructor_client",
    "llama-index": "llama_index_client",
    "schemathesis": "schemathesis_client",
}
"""Their scripts, by their names and those of their environments; openai is in the one that this runs in."""
_AT_RANDOM = "schemathesis"
"""Asks anything at all, which a real model would be long about."""
_LIMIT_S = 900
"""Seconds for one client, or for a server to be there."""


@dataclass
class Run:
    """One client at one server.

    Args:
        client: its name.
        place: of the server.
    """

    client: str
    place: Place
    version: str = "?"
    results: list[Result] = field(default_factory=list)

    @property
    def failed(self) -> list[Result]:
        """What does not hold."""
        return [result for result in self.results if result.error is not None]


def main() -> int:
    """Run what was asked for, print one table, and return 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m scripts.conformance", description=__doc__)
    parser.add_argument("--clients", nargs="+", default=list(CLIENTS), choices=list(CLIENTS), metavar="NAME")
    parser.add_argument("--model", default="smollm2", help="a real model, for all that holds with any; '' for none")
    parser.add_argument("--openai-document", type=Path, help="OpenAI's openapi.json; see openai_document.py")
    options = parser.parse_args()
    document = [] if options.openai_document is None else [str(options.openai_document.resolve(strict=True))]
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    with ExitStack() as servers:
        places = [
            servers.enter_context(_serving([sys.executable, "-m", "scripts.conformance.scripted_server"], "scripted"))
        ]
        if options.model:
            command = [sys.executable, "-m", "copyspec_engine", "serve", options.model, "--port", "0"]
            places.append(servers.enter_context(_serving(command, options.model)))
        runs = [
            _run(client, place, console, document if client == _AT_RANDOM else [])
            for client in options.clients
            for place in (places[:1] if client == _AT_RANDOM else places)
        ]
    console.print(_table(runs))
    return int(any(run.failed for run in runs))


@contextmanager
def _serving(command: Sequence[str], model: str) -> Iterator[Place]:
    """A server as a process, within the `with` block; it says its address once its model is loaded.

    Raises:
        RuntimeError: it ended before.
    """
    environment = {**os.environ, "COPYSPEC_API_KEY": KEY}
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        assert server.stdout is not None
        try:
            found = next((url for line in server.stdout if (url := re.search(r"http://127\.0\.0\.1:\d+", line))), None)
            if found is None:
                log.seek(0)
                raise RuntimeError(f"{' '.join(command)} has ended: {log.read()[-2000:]}")
            yield Place(f"{found[0]}/v1", model)
        finally:
            server.terminate()
            server.communicate()


def _run(client: str, place: Place, console: Console, others: Sequence[str]) -> Run:
    """All behaviours of a client at a server, told as they come; `others` is what else its script takes."""
    own = ENVIRONMENTS / client / "bin" / "python"
    command = [str(own) if own.exists() else sys.executable, "-m", f"scripts.conformance.{CLIENTS[client]}"]
    run = Run(client, place)
    console.rule(f"{client} at {place.model}")
    with tempfile.TemporaryFile("w+") as log:
        script = subprocess.Popen(
            [*command, place.url, place.model, *others], cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True
        )
        assert script.stdout is not None
        stop = threading.Timer(_LIMIT_S, script.kill)
        stop.start()
        for told in map(_json, script.stdout):
            if "version" in told:
                run.version = told["version"]
            elif told:
                run.results.append(Result(**told))
                console.print(_line(run.results[-1]))
        stop.cancel()
        if script.wait() or not run.results:
            log.seek(0)
            run.results.append(
                Result("the script comes to its end", f"exit code {script.returncode}: {log.read()[-2000:]}", 0.0)
            )
            console.print(_line(run.results[-1]))
    return run


def _json(line: str) -> dict[str, Any]:
    """A line of a script; what a client has printed by itself is nothing."""
    try:
        told = json.loads(line)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _line(result: Result) -> str:
    told = "[green]ok[/]    " if result.error is None else "[red]FAILED[/]"
    return f"{told} {escape(result.name)}" + (f"\n       {escape(result.error)}" if result.error else "")


def _table(runs: Sequence[Run]) -> Table:
    table = Table("client", "version", "model", "ok", "failed", "seconds")
    for run in runs:
        seconds = sum(result.seconds for result in run.results)
        ok, failed = len(run.results) - len(run.failed), len(run.failed)
        table.add_row(run.client, run.version, run.place.model, str(ok), str(failed or "-"), f"{seconds:.0f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
