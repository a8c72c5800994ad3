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
TAG = re.compile(r"(<[^>]*>)")
OPTION, NAME, INTERVAL = r"-{1,2}[a-z][\w-]*", r"\.?\w[\w.]*(?:-[\w.]*\w)+", r"\([-\d.,%]+ to [-\d.,%]+\)"
WHOLE = re.compile(rf"((?<![^\s>,(\[])(?:{OPTION}|{NAME})|{INTERVAL})")
"""Options, names with hyphens, and intervals: a browser would break a line inside them."""
JOINT = re.compile(r"(?<=\w)[.(=](?=[a-z_\"])", flags=re.IGNORECASE)
"""Where a long name in a table may be broken on a telephone."""
TEST = re.compile(r"\btest_\w+")
"""A name that is too long for a table anywhere."""
FIELD = re.compile(r"<code>((\w+)\.(\w+))</code>(?!</a>)")
HEADLESS = re.compile(r"<th([^>]*)></th>")
"""Above names of rows: a heading without a text is none."""
ATTRIBUTE = re.compile(r'<div class="doc doc-object doc-attribute">\s*<h\d id="([^"]*)"')


def on_files(files: Any, config: Any) -> None:  # noqa: ANN401 - of MkDocs, which only the docs need
    """What MkDocs calls with all files; the style sheet of copyspec's other pages comes along."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "look.css", content=look()))


def on_page_markdown(markdown: str, **_: object) -> str:
    """What MkDocs calls with each page; every mark becomes what it asks for."""
    fill = {"options": _options, "command": _command, "metrics": _metrics, "traces": _traces}
    return MARK.sub(lambda mark: fill[mark[1]](mark[2]), markdown)


def on_page_content(html: str, page: Any, **_: object) -> str:  # noqa: ANN401 - of MkDocs
    """What MkDocs calls with each page as HTML: names lead to options, and names and figures are not broken.

    The contents beside the page list no attributes of classes, which would hide the classes.
    """
    _leave_out(page.toc.items, set(ATTRIBUTE.findall(html)))
    return _unbroken(FIELD.sub(_leading, HEADLESS.sub(r"<td\1></td>", html)))


def _leave_out(entries: list[Any], attributes: set[str]) -> None:
    entries[:] = [entry for entry in entries if entry.id not in attributes]
    for entry in entries:
        _leave_out(entry.children, attributes)


def _leading(name: re.Match[str]) -> str:
    """`EngineConfig.model` as a link to where that option is described; other names as they are."""
    kind = getattr(copyspec_engine, name[2], None)
    known = isinstance(kind, type) and issubclass(kind, Options) and name[3] in kind.model_fields
    return f'<a href="options.html#{name[1]}">{name[0]}</a>' if known else name[0]


def _unbroken(html: str) -> str:
    """A page whose names and figures stand in one line each, but for long names in tables on a telephone."""
    parts, depth = TAG.split(html), dict.fromkeys(("pre", "code", "td"), 0)
    for place, part in enumerate(parts):
        if place % 2:
            tag = part.strip("</>").split()[0]
            depth[tag] = depth.get(tag, 0) + (-1 if part.startswith("</") else 1)
        elif not depth["pre"]:
            parts[place] = "".join(_piece(piece, whole, depth) for whole, piece in enumerate(WHOLE.split(part)))
    return "".join(parts)


def _piece(text: str, number: int, depth: dict[str, int]) -> str:
    """Text as `WHOLE` splits it; in prose only what has a digit is kept whole: SmolLM2-135M, a date."""
    if number % 2 and (depth["code"] or depth["td"] or any(map(str.isdigit, text))):
        return f'<span class="whole">{text}</span>'
    if not (depth["code"] and depth["td"]):
        return text
    jointed = JOINT.sub(r"\g<0><wbr>", text)
    return TEST.sub(lambda name: name[0].replace("_", '_<wbr class="long">'), jointed)


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
    fields = (_option(f"{name}.{field}", info) for field, info in kind.model_fields.items())
    return "\n".join([f"{_escaped(about)}\n", *fields])


def _option(name: str, info: Any) -> str:  # noqa: ANN401 - of pydantic
    here = f'<a class="headerlink" href="#{name}" title="Permanent link">&para;</a>'
    about = _escaped(cleandoc(info.description or "")).replace("\n", "\n    ")
    return f"**`{name.split('.')[1]}`**{{ #{name} }} &nbsp; `{declared(info)}` {here}\n\n:   {about}\n"


def _escaped(text: str) -> str:
    """Markdown whose angle brackets are letters: a text of the code holds no HTML."""
    return "`".join(part if place % 2 else part.replace("<", "&lt;") for place, part in enumerate(text.split("`")))


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
    return _escaped(text.replace("|", "\\|").replace("\\[", "["))


def _default(option: Any) -> str:  # noqa: ANN401 - typer's own click
    if option.required:
        return "required"
    value = option.default
    if isinstance(value, list | tuple):
        value = " ".join(str(getattr(part, "value", part)) for part in value)
    return f"`{value}`" if value not in (None, "", False) else ""
