"""Fills pages of the docs while MkDocs builds them: with options, commands, a server's metrics, and what traces tell.

A page says where: `<!-- options: EngineConfig -->`, `<!-- command: bench drafts -->`, `<!-- metrics: all -->` and
`<!-- traces: attributes -->` or `<!-- traces: instruments -->`. So what the code says of itself is written down once,
in the code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from inspect import cleandoc
from types import SimpleNamespace
from typing import Any, cast

from typer.main import get_command

import copyspec_engine
from copyspec_engine.cli.main import app
from copyspec_engine.engine.telemetry_names import attributes_told, instruments_told
from copyspec_engine.values.html import look
from copyspec_engine.values.options import Options, declared

__all__ = ["commands", "on_files", "on_page_content", "on_page_markdown"]

MARK = re.compile(r"<!-- (options|command|metrics|traces): (.*?) -->")
PLACES = re.compile(r"<code>[^<]*</code>|<td[ >][^<]*</td>")
WHOLE = re.compile(r"(?<![^\s>,(])-{1,2}[a-z][\w-]*|(?<![^\s>,(])\w+(?:-\w+)+|\([\d.,]+ to [\d.,]+\)")
"""Options, names with hyphens, and intervals: a browser would break a line inside them."""


def on_files(files: Any, config: Any) -> None:  # noqa: ANN401 - of MkDocs, which only the docs need
    """What MkDocs calls with all files; the style sheet of copyspec's other pages comes along."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "look.css", content=look()))


def on_page_markdown(markdown: str, **_: object) -> str:
    """What MkDocs calls with each page; every mark becomes what it asks for."""
    fill = {"options": _options, "command": _command, "metrics": _metrics, "traces": _traces}
    return MARK.sub(lambda mark: fill[mark[1]](mark[2]), markdown)


def on_page_content(html: str, **_: object) -> str:
    """What MkDocs calls with each page as HTML; names and figures in code and in tables are not broken."""
    return PLACES.sub(lambda place: WHOLE.sub(r'<span class="whole">\g<0></span>', place[0]), html)


def commands() -> dict[str, Any]:
    """Every command by its words, groups too."""

    def walk(words: tuple[str, ...], command: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - typer's own click
        if words:
            yield " ".join(words), command
        for name, inner in getattr(command, "commands", {}).items():
            yield from walk((*words, name), inner)

    return dict(walk((), get_command(app)))


def _options(name: str) -> str:
    kind = getattr(copyspec_engine, name)
    if not issubclass(kind, Options):
        raise ValueError(f"Got options: {name} but expected the name of a class of options")
    about = cleandoc(kind.__doc__ or "").partition("\n\nOptions:\n")[0]
    fields = [
        f"**`{field}`** &nbsp; `{declared(info)}`\n\n:   {_indented(info.description or '')}\n"
        for field, info in kind.model_fields.items()
    ]
    return "\n".join([f"{about}\n", *fields])


def _indented(text: str) -> str:
    return cleandoc(text).replace("\n", "\n    ")


def _command(words: str) -> str:
    rows = []
    for option in commands()[words].params:
        names = [f"`{name}`" for name in (*option.opts, *option.secondary_opts)]
        if not option.opts[0].startswith("-"):
            names = [f"`{option.metavar or option.name.upper()}`"]
        if option.name != "help":
            rows.append(f"| {', '.join(names)} | {_cell(option.help or '')} | {_default(option)} |\n")
    return f"| option | what it does | default |\n|---|---|---|\n{''.join(rows)}" if rows else ""


def _metrics(_: str) -> str:
    """All that GET /metrics tells, of an engine that was never asked."""
    from copyspec_engine.serve.metrics import Metrics  # of the extra "serve"

    found = Metrics(cast("Any", SimpleNamespace(heartbeat_age_s=0.0)), "").registry.collect()
    rows = (
        f"| `{metric.name}{'_total' * (metric.type == 'counter')}` | {metric.type} | {metric.documentation} |\n"
        for metric in found
    )
    return f"| metric | type | what it tells |\n|---|---|---|\n{''.join(rows)}"


def _traces(what: str) -> str:
    """What OpenTelemetry is told."""
    if what == "attributes":
        rows = (f"| `{name}` | {_cell(text)} |\n" for name, text in attributes_told().items())
        return f"| attribute | what it says |\n|---|---|\n{''.join(rows)}"
    rows = (f"| `{name}` | {kind} | {_cell(text)} |\n" for name, (kind, text) in instruments_told().items())
    return f"| instrument | kind | what it tells |\n|---|---|---|\n{''.join(rows)}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\\[", "[")


def _default(option: Any) -> str:  # noqa: ANN401 - typer's own click
    if option.required:
        return "required"
    value = option.default
    if isinstance(value, list | tuple):
        value = " ".join(str(getattr(part, "value", part)) for part in value)
    return f"`{value}`" if value not in (None, "", False) else ""
