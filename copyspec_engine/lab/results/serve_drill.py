"""What is shown of the load drill of `python -m scripts.serve_drill`: what must not be, and what was seen beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from copyspec_engine.lab.display.tables import Table, figure
from copyspec_engine.lab.results.files import Results, notes

__all__ = ["serve_drill_tables"]

_RUNNING_SLOTS = 'kv_slots{state="running"}'


def serve_drill_tables(results: Results) -> list[Table]:
    """A row for each figure, a column for each file."""
    files = results["serve-drill"]
    loads = [_load(file.record["drills"]["load"]) for file in files]
    body = tuple((name, *(load[name] for load in loads)) for name in (loads[0] if loads else ()))
    headings = ("", *(str(file.record["model"]) for file in files))
    return [Table("A server under load", headings, body, 1, notes(files))] if files else []


def _load(found: Mapping[str, Any]) -> dict[str, str]:
    """The figures of one load by what they are."""
    counts, statuses, broken = found["counts"], found["statuses"], found["broken"]
    health, memory, peaks, left = (found[name] for name in ("health", "memory", "peaks", "left"))
    gone = sum(number for name, number in counts.items() if name.startswith("left "))
    again = sum(statuses.get(status, 0) for status in ("429", "503"))
    return {
        "clients, minutes": f"{found['clients']}, {found['minutes']:g}",
        "answers compared with plain decoding": f"{counts['answers compared']:,}",
        "of them wrong": f"{broken.get('wrong answers', 0):,}",
        "texts that held another tenant's word": f"{broken.get('texts of other tenants', 0):,}",
        "clients that left before their answer was whole": f"{gone:,}",
        "malformed calls": f"{counts['malformed calls']:,}",
        "calls refused for now, by 429 or 503 with Retry-After": f"{again:,}",
        "answers of 5xx besides": f"{broken.get('5xx', 0):,}",
        "KV slots that calls hold once all clients have gone": f"{left[_RUNNING_SLOTS]:,.0f}",
        "conversations, at most": f"{peaks['sessions']:.0f}",
        "/health: median, 99th percentile and longest, ms": ", ".join(
            figure(1000 * health[name]) for name in ("median_s", "p99_s", "max_s")
        ),
        "memory once the KV pool and the conversations were full, first and last third of that time, MB": ", ".join(
            "-" if memory.get(name) is None else figure(memory[name]) for name in ("first_third_mb", "last_third_mb")
        ),
    }
