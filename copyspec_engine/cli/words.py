"""A command that knows its own words."""

from __future__ import annotations

import shlex
from typing import Any

from typer.core import TyperCommand

__all__ = ["RecordedCommand"]


class RecordedCommand(TyperCommand):
    """Lets an option that may be repeated take its values in a row: `--transcripts A B C`.

    Keeps the words of the command line in the context, for the record of a measurement.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - typer and click differ on the type
        ctx.meta["command"] = shlex.join([*ctx.command_path.split(), *args])
        repeatable = {flag for option in self.params if getattr(option, "multiple", False) for flag in option.opts}
        words: list[str] = []
        flag = None
        for word in args:
            if word.startswith("-"):
                flag = word if word in repeatable else None
            elif flag and words[-1] != flag:
                words.append(flag)
            words.append(word)
        return super().parse_args(ctx, words)
