"""`copyspec serve`: the options of a server and of its engine, and what is checked before a model is loaded."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape

from copyspec_engine import Engine, EngineConfig, LoadProgress, OnProgress, missing_extra
from copyspec_engine.cli.exits import loading
from copyspec_engine.cli.options import DEFAULT
from copyspec_engine.serve.config import MAX_WAITING, ServeConfig

__all__ = ["ServeOptions", "check_serve_installed", "option_of", "options_of_serve", "run_serve"]

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
_ENGINE = (
    *("device", "dtype", "memory", "quantization", "exact", "trust_remote_code", "chat_template", "generation_config"),
    *("max_model_len", "kv_cache_tokens", "max_running", "max_waiting", "max_prefill_tokens", "max_sessions"),
    "max_sessions_per_owner",
    *("memory_tokens", "memory_path", "keep_token_ids", "compile_layers"),
)
"""Options of the engine whose values can be given as words."""
_NAMES = {"drafter": "adaptive, copyspec, draft-model or none.", "draft_model": "A smaller model that drafts too."}
"""Options of the engine that take an object, or a name."""


def options_of_serve() -> Iterator[tuple[str, Any, Any]]:
    """(name, type, default) of every option, as a dataclass has them."""
    yield "model", Annotated[str, typer.Argument(help="A model, as for `copyspec chat`.")], DEFAULT
    for kind, names in ((ServeConfig, tuple(ServeConfig.model_fields)), (EngineConfig, _ENGINE)):
        for name in names:
            yield name, *option_of(kind, name)
    for name, text in _NAMES.items():
        yield name, Annotated[str | None, typer.Option(help=text)], None


def option_of(kind: type[BaseModel], name: str) -> tuple[Any, Any]:
    """(type, default) of a field as an option of a command."""
    field = kind.model_fields[name]
    text = " ".join((field.description or "").split()).replace("[", "\\[")
    default = MAX_WAITING if name == "max_waiting" else field.default
    return Annotated[field.annotation, typer.Option(help=text)], default


ServeOptions = dataclasses.make_dataclass(
    "ServeOptions",
    [(name, kind, dataclasses.field(default=default)) for name, kind, default in options_of_serve()],
    frozen=True,
    kw_only=True,
)
"""Every option of `ServeConfig`, and those of `EngineConfig` that can be given as words."""


def check_serve_installed(extra: str = "serve") -> None:
    """Raises CopySpecError if what the extra "serve" brings is not installed; it names `extra`."""
    missing = next((name for name in _PACKAGES if importlib.util.find_spec(name) is None), None)
    if missing is not None:
        raise missing_extra(missing, extra)


def run_serve(options: Any, _words: str, console: Console) -> int:  # noqa: ANN401 - made above
    """Serves until a signal; returns the exit code.

    Raises:
        CopySpecError: the extra "serve" is not installed, an option cannot be as it is, or the model cannot be loaded.
    """
    check_serve_installed()
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    config = ServeConfig(**{name: given[name] for name in ServeConfig.model_fields})
    named = {name: given[name] for name in _NAMES if given[name] is not None}
    engine_config = EngineConfig(model=options.model, **{name: given[name] for name in _ENGINE}, **named)
    from copyspec_engine.serve.lifecycle import LOG_FORMAT, listen, run_server

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=LOG_FORMAT)
    listener = listen(config)

    def load(check: OnProgress) -> Engine:
        with loading(engine_config.model) as shown:

            def tell(told: LoadProgress) -> None:
                check(told)
                shown(told)

            engine = Engine(engine_config, on_progress=tell)
        if engine.info.drafting_error is not None:
            console.print(f"[yellow]Nothing is drafted:[/] {escape(engine.info.drafting_error)}")
        return engine

    return run_server(load, config, listener, lambda url: console.print(f"Serving {options.model} at {url}/v1"))
