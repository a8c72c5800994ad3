"""What is shown of `copyspec bench free-text`: text that a model writes as it likes."""

from __future__ import annotations

from copyspec_engine.lab.display.tables import Table, figure, times
from copyspec_engine.lab.results.files import Results, notes

__all__ = ["free_text_tables"]


def free_text_tables(results: Results) -> list[Table]:
    """A row for each cost model, temperature and way of drafting."""
    files = results["free-text"]
    body = tuple(
        (
            result.record["cost_model"],
            f"{row['temperature']:g}",
            row["way"],
            f"{row['tokens']:,}",
            figure(row["tokens_per_forward"]),
            figure(row["tokens_per_s"]),
            times(row["over_plain"]),
        )
        for result in files
        for row in result.rows
    )
    headings = ("cost of a pass", "temperature", "drafts", "tokens", "tokens per forward", "tokens/s", "over plain")
    return [Table("Free text", headings, body, 3, notes(files))] if files else []
