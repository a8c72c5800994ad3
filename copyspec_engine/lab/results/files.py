"""Result files: which kind each one is, and where its figures come from, in words.

A new kind of result gets an entry in `KINDS`, and a module here that says what is shown of it.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from copyspec_engine import ConfigError
from copyspec_engine.lab.contestants import INGREDIENTS
from copyspec_engine.lab.display.conditions import day, hardware
from copyspec_engine.lab.display.tables import Table

__all__ = ["Result", "Results", "commands", "conditions", "load_results", "notes", "tables_of_each"]

_ROWS = ("rows", "results", "turns")
"""Where files of figures keep their rows."""
LINE = 120
"""Characters of a line of Markdown, at most."""
CODE_LINE = 97
"""Of a line of code: the page of docs has no room for more."""


@dataclass(frozen=True, slots=True)
class Result:
    """One file of figures."""

    name: str
    record: Mapping[str, Any]

    @property
    def rows(self) -> Sequence[Mapping[str, Any]]:
        found: Sequence[Mapping[str, Any]] = next((self.record[key] for key in _ROWS if key in self.record), ())
        return found

    @property
    def facts(self) -> Mapping[str, Any]:
        """What holds command, date and machine: the file itself, or what an evaluation run says of itself."""
        facts: Mapping[str, Any] = self.record.get("facts", self.record)
        return facts


Results = dict[str, list[Result]]
"""The files of each kind, by name."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a file of a kind has to hold, and how each of its rows looks."""

    keys: frozenset[str]
    row_keys: frozenset[str]


_FACTS = {"command", "machine"}
_DRAFTS = Kind(
    frozenset({"results", "comparison", "cost_model", "history", "max_tokens", "tokenizer", *_FACTS}),
    frozenset({"source", "drafter", "tokens_per_forward", "modelled_speedup"}),
)
_SPEEDS = {"tokens", "tokens_per_s", "tokens_per_forward"}
_ENGINE = Kind(
    frozenset({"results", "summary", "shape", "device", "dtype", *_FACTS}),
    frozenset(
        {
            "source",
            "conversation",
            "turn",
            "peer",
            "concurrency",
            "prompt_tokens",
            "seconds",
            "forward_passes",
            *_SPEEDS,
        }
    ),
)
KINDS = {
    "drafts": _DRAFTS,
    "history": _DRAFTS,
    "ingredients": _DRAFTS,
    "propose": Kind(
        frozenset({"results", "indexed_tokens", "tokenizer", *_FACTS}),
        frozenset({"memory_tokens", "propose_us_p50", "propose_us_p99", "index_ms", "bytes_per_token"}),
    ),
    "free-text": Kind(
        frozenset({"results", "cost_model", "rounds", "prompts", *_FACTS}),
        frozenset({"temperature", "way", "over_plain", *_SPEEDS}),
    ),
    "context": Kind(
        frozenset({"results", "lengths", "documents", "model", "device", "dtype", *_FACTS}),
        frozenset({"length", "way", "turns", "prompt_tokens", "loop_share", *_SPEEDS}),
    ),
    "demo": Kind(
        frozenset({"turns", "framework", "model", "device", "dtype", *_FACTS}),
        frozenset({"edit", "tokens", "forward_passes", "seconds", "plain_seconds", "identical"}),
    ),
    "peers": Kind(
        frozenset({"results", "memory", "left_out", "threads", "max_tokens", "model", "device", "dtype", *_FACTS}),
        frozenset({"peer", "kind", "conversation", "turn", "tokens", "seconds", "ttft_s", "same_as_plain"}),
    ),
    "serve": Kind(
        frozenset({"results", "rounds", "max_tokens", "threads", "different", "model", "device", "dtype", *_FACTS}),
        frozenset(
            {
                *("clients", "batch", "way", "tokens", "chunks", "seconds", "ttft_s"),
                *("loop_s", "process_s", "client_cpu_s"),
            }
        ),
    ),
    "scale-sim": Kind(
        frozenset({"results", "replicas", "conversations", "calls", "lost", "grow", "seed", *_FACTS}),
        frozenset({"policy", "steady", "scaling", "moved", "busiest", "busiest_at_once", "wait_s", "longest_wait_s"}),
    ),
    "lossless": Kind(
        frozenset(
            {"cases", "differences", "differences_per_1000_tokens", "tokens", "by_feature", "dtype", "exact", *_FACTS}
        ),
        frozenset(),
    ),
    "serve-drill": Kind(frozenset({"drills", "model", *_FACTS}), frozenset()),
    "scale-drill": Kind(frozenset({"drills", "pass_s", *_FACTS}), frozenset()),
    "engine": _ENGINE,
    "draft-models": _ENGINE,
    "eval": Kind(
        frozenset({"rows", "facts", "benchmark", "drafter", "model", "identical", "metrics"}),
        frozenset({"turn", "category", "copied_share", "speedup", "modelled_speedup", *_SPEEDS}),
    ),
}


def load_results(folder: Path) -> Results:
    """Every JSON file of the folder, by kind.

    Raises:
        ConfigError: there is no such folder, or it holds no result, or a file of no known kind.
    """
    if not folder.is_dir():
        raise ConfigError(f"Got --results {folder}, which is no folder: name the one that holds the JSON files")
    results: Results = {kind: [] for kind in KINDS}
    for path in sorted(folder.glob("*.json")):
        record = _read(path)
        results[_kind_of(path, record)].append(Result(path.name, record))
    if not any(results.values()):
        raise ConfigError(f"Got --results {folder}, which holds no JSON file: write one with a benchmark's --json")
    return results


def _read(path: Path) -> Any:  # noqa: ANN401 - whatever JSON holds
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"Got {path}, which is no JSON: {error}. Write it again, or delete it") from None


def _kind_of(path: Path, record: Any) -> str:  # noqa: ANN401 - whatever JSON holds
    fitting = [name for name, kind in KINDS.items() if isinstance(record, dict) and kind.keys <= record.keys()]
    if not fitting:
        raise ConfigError(
            f"Got {path}, which is no result of {', '.join(KINDS)}: write it with `copyspec bench ... --json`, or take "
            "an evaluation run's summary.json"
        )
    name = fitting[0]
    if name == "drafts":
        name = _kind_of_drafts(record)
    if name == "engine" and record.get("draft_shape"):
        name = "draft-models"
    rows = Result(path.name, record).rows
    lacking = (
        frozenset[str]().union(*(KINDS[name].row_keys - row.keys() for row in rows))
        if rows or not KINDS[name].row_keys
        else {"rows"}
    )
    if lacking:
        raise ConfigError(f"Got {path}, a result of {name} without {min(lacking)}: write it again")
    return name


def _kind_of_drafts(record: Mapping[str, Any]) -> str:
    if record["history"] != "full":
        return "history"
    return "ingredients" if {row["drafter"] for row in record["results"]} & INGREDIENTS.keys() else "drafts"


def conditions(result: Result) -> str:
    """Model or tokens, hardware and day, in one line."""
    facts = result.facts
    on = hardware(facts["machine"], facts.get("device", "cpu"))
    model = facts.get("shape") or facts.get("model")
    what = model or (f"{facts['tokenizer']} tokens" if "tokenizer" in facts else "")
    return ", ".join(part for part in (what, facts.get("dtype"), on, day(facts.get("date"))) if part)


def notes(results: Sequence[Result]) -> str:
    """Where the figures of a table come from: conditions once for files in a row that share them."""
    parts = []
    for said, files in groupby(results, conditions):
        names = ", ".join(f"`{file.name}`" for file in files)
        parts.append(f"{said[:1].upper()}{said[1:]}: {names}.")
    return _wrapped(" ".join(parts))


def tables_of_each(files: Sequence[Result], tables_of: Callable[[Mapping[str, Any]], list[Table]]) -> list[Table]:
    """The tables of each file's record; behind the last of them stands where its figures come from."""
    tables: list[Table] = []
    for file in files:
        *first, last = tables_of(file.record)
        tables += [*first, Table(last.title, last.headings, last.rows, last.num_labels, notes([file]))]
    return tables


def commands(results: Results) -> str:
    """The commands that wrote the files, as a fenced block each; files of one run share theirs."""
    files: dict[str, list[str]] = {}
    for result in sorted((result for found in results.values() for result in found), key=lambda result: result.name):
        files.setdefault(result.facts["command"], []).append(f"`{result.name}`")
    return "\n".join(
        f"{_wrapped(', '.join(names))}\n\n```bash\n{_continued(command)}\n```\n" for command, names in files.items()
    )


def _continued(command: str) -> str:
    """A command in lines that a shell reads as one, no option apart from its value."""
    together = re.sub(r"(--\S+) (?!--)", "\\1\0", command)
    return _wrapped(together, CODE_LINE - 4).replace("\n", " \\\n  ").replace("\0", " ")


def _wrapped(text: str, width: int = LINE) -> str:
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
