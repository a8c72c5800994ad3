"""What is shown of `copyspec bench serve`: speed, first tokens and processor time, over HTTP and in process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from copyspec_engine.lab.display.tables import Table, figure, percent
from copyspec_engine.lab.evaluation.intervals import median_interval
from copyspec_engine.lab.results.files import Results, tables_of_each

__all__ = ["HTTP", "IN_PROCESS", "server_tables", "server_tables_of"]

Row = Mapping[str, Any]
Pairs = Sequence[tuple[Row, Row]]
"""The same calls in process and over HTTP, batch by batch."""

IN_PROCESS, HTTP = "in-process", "http"
"""The ways to ask."""


def server_tables(results: Results) -> list[Table]:
    """The tables of each file."""
    return tables_of_each(results["serve"], server_tables_of)


def server_tables_of(record: Mapping[str, Any]) -> list[Table]:
    """Of one file of figures: tokens per second, times to the first token, and processor time."""
    rows: Sequence[Row] = record["results"]
    by_clients = {clients: _pairs(rows, clients) for clients in dict.fromkeys(row["clients"] for row in rows)}

    def table(title: str, headings: tuple[str, ...], cells: Callable[[Pairs], tuple[str, ...]]) -> Table:
        body = tuple((str(clients), *cells(pairs)) for clients, pairs in by_clients.items())
        return Table(title, ("at once", *headings), body)

    return [
        table(
            "Tokens per second, medians of batches",
            ("answers", "tokens per chunk", "in process", "over HTTP", "over HTTP by in process"),
            _speed,
        ),
        table(
            "Milliseconds to the first token",
            ("in process", "over HTTP", "more", "in process, 95th percentile", "over HTTP, 95th percentile"),
            _first,
        ),
        table(
            "Processor time beyond that of the engine",
            ("server, ms a call", "server, µs a token", "clients, µs a token"),
            _processor,
        ),
    ]


def _pairs(rows: Sequence[Row], clients: int) -> Pairs:
    found = {(row["batch"], row["way"]): row for row in rows if row["clients"] == clients}
    return [(row, found[number, HTTP]) for (number, way), row in found.items() if way == IN_PROCESS]


def _speed(pairs: Pairs) -> tuple[str, ...]:
    own, http = ([row["tokens"] / row["seconds"] for row in rows] for rows in zip(*pairs, strict=True))
    ratios = [over / inside for inside, over in zip(own, http, strict=True)]
    per_chunk = _sum(pairs, HTTP, "tokens") / _sum(pairs, HTTP, "chunks")
    ratio = _with_limits(ratios, [[ratio] for ratio in ratios], percent)
    answers = str(sum(len(http["ttft_s"]) for _, http in pairs))
    return answers, figure(per_chunk), figure(median(own)), figure(median(http)), ratio


def _first(pairs: Pairs) -> tuple[str, ...]:
    own, http = ([1000 * ttft_s for row in rows for ttft_s in row["ttft_s"]] for rows in zip(*pairs, strict=True))
    more = [
        [1000 * (over - inside) for inside, over in zip(*(row["ttft_s"] for row in pair), strict=True)]
        for pair in pairs
    ]
    late = (figure(float(np.quantile(times, 0.95))) for times in (own, http))
    shown = _with_limits([each for group in more for each in group], more, "{:.2f}".format)
    return figure(median(own)), figure(median(http)), shown, *late


def _with_limits(values: Sequence[float], groups: Sequence[Sequence[float]], show: Callable[[float], str]) -> str:
    """The median of values with its interval, where the groups that they come in give one."""
    found = median_interval(groups)
    return show(median(values)) + ("" if found is None else f" ({show(found[0])} to {show(found[1])})")


def _processor(pairs: Pairs) -> tuple[str, ...]:
    server_s = _sum(pairs, HTTP, "loop_s") - _sum(pairs, IN_PROCESS, "loop_s")
    requests, tokens = sum(len(http["ttft_s"]) for _, http in pairs), _sum(pairs, HTTP, "tokens")
    client_s = _sum(pairs, HTTP, "client_cpu_s")
    return figure(1e3 * server_s / requests), figure(1e6 * server_s / tokens), figure(1e6 * client_s / tokens)


def _sum(pairs: Pairs, way: str, name: str) -> float:
    return float(sum(row[name] for pair in pairs for row in pair if row["way"] == way))
