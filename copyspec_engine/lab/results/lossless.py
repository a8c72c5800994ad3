"""What is shown of `copyspec bench lossless`: answers of random conversations beside plain decoding."""

from __future__ import annotations

from copyspec_engine.lab.display.tables import Table
from copyspec_engine.lab.results.files import Results, notes

__all__ = ["lossless_tables"]


def lossless_tables(results: Results) -> list[Table]:
    """A row for each model, dtype and way of running passes."""
    files = results["lossless"]
    body = tuple(
        (
            str(found["model"]),
            str(found["dtype"]),
            "yes" if found["exact"] else "no",
            f"{found['cases']:,}",
            f"{found['tokens']:,}",
            f"{found['differences']:,}",
            f"{found['differences_per_1000_tokens']:.2g}",
        )
        for found in (file.record for file in files)
    )
    headings = ("model", "dtype", "exact", "answers", "tokens", "answers that differ", "of them in 1,000 tokens")
    return [Table("Answers beside plain decoding", headings, body, 3, notes(files))] if files else []
