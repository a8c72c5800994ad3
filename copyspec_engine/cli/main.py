"""The `copyspec` command and its options.

The commands import their modules when they run, so that `--help` need not wait for torch.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from copyspec_engine import ConfigError, SamplingParams
from copyspec_engine.cli.cache import cache
from copyspec_engine.cli.demo.frameworks import FRAMEWORKS
from copyspec_engine.cli.documents import shipped_names
from copyspec_engine.cli.exits import console, exit_with
from copyspec_engine.cli.models import models, run_pull
from copyspec_engine.cli.options import (
    BUNDLED,
    DEFAULT,
    Device,
    Dtype,
    Memory,
    ModelArguments,
    add_command,
    engine_config,
)
from copyspec_engine.cli.scale import scale
from copyspec_engine.cli.serve import ServeOptions, run_serve
from copyspec_engine.lab.bench.command import bench
from copyspec_engine.lab.evaluation.command import evaluations

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Local language models that copy from the conversation: the same answers in fewer forward passes.",
)
app.add_typer(bench, name="bench")
app.add_typer(evaluations, name="eval")
app.add_typer(models, name="models")
app.add_typer(cache, name="cache")
app.add_typer(scale, name="scale")

_MODEL_HELP = 'smollm2, a name on the hub, a folder, a GGUF file, or "bundled", the copier that comes along.'
Model = Annotated[str, typer.Option(help=_MODEL_HELP)]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"copyspec {importlib.metadata.version('copyspec')}")
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoArguments(ModelArguments):
    """Options of `demo`."""

    file: Annotated[
        str | None, typer.Option(help=f"Text to rewrite: a path, or one of {', '.join(shipped_names())}.")
    ] = None
    framework: Annotated[str, typer.Option(help=f"Ask through {', '.join(FRAMEWORKS)}.")] = "langchain"
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also run transformers generate and prompt lookup, and llama.cpp if llama-server is on the PATH.",
        ),
    ] = False
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None
    svg: Annotated[Path | None, typer.Option(help="Write a picture of the first turns and the table.")] = None
    model: Annotated[
        str,
        typer.Option(help='A chat model, fetched if it is not there; "bundled" comes along and only copies.'),
    ] = DEFAULT


@add_command(app, DemoArguments)
def demo(options: DemoArguments, command: str, console: Console) -> int:
    """Rewrite a document turn by turn, beside plain decoding.

    Exit code 1 if a turn differs from plain decoding, or with --compare from transformers generate, in float32.
    """
    from copyspec_engine.cli.demo.run import DemoOptions, run_demo

    chosen = (options.file, options.framework, options.compare, options.json, options.svg)
    return run_demo(DemoOptions(options.config, *chosen, command), console)


@app.command()
def chat(
    model: Annotated[str | None, typer.Option(help=_MODEL_HELP, show_default=DEFAULT)] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Talk to the model of a `copyspec serve` there; a key is taken from COPYSPEC_API_KEY."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    memory: Memory = "wide",
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy; default: the checkpoint's own, else 0.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer.")] = None,
) -> None:
    """Talk to a model; copied text is coloured."""

    def run() -> int:
        config = engine_config(model or DEFAULT, device, dtype, memory=memory, generation_config="auto")
        from copyspec_engine.cli.chat import run_chat, run_remote_chat

        given = {"temperature": temperature, "seed": seed, "max_tokens": max_tokens}
        sampling = SamplingParams(**{name: value for name, value in given.items() if value is not None})
        if url is None:
            return run_chat(config, sampling, console())
        for name, value, usual in (("device", device, "auto"), ("dtype", dtype, "auto"), ("memory", memory, "wide")):
            if value != usual:
                raise ConfigError(f"Got --{name} {value} with --url: that is up to the server, leave it out")
        return run_remote_chat(url, model, sampling, console())

    exit_with(run)


@app.command()
def info(
    model: Model = DEFAULT,
    device: Device = "auto",
    dtype: Dtype = "auto",
    memory: Memory = "wide",
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON for a bug report: no names of users, no folders.")
    ] = False,
) -> None:
    """Show the device, the model, its memory and the versions."""

    def run() -> int:
        config = engine_config(model, device, dtype, memory=memory, generation_config="auto")
        from copyspec_engine.cli.info import run_info

        return run_info(config, console(), as_json=json)

    exit_with(run)


@app.command()
def pull(
    name: Annotated[
        str, typer.Argument(help="smollm2, a name on the hub, or OWNER/NAME/FILE.gguf for one file there.")
    ],
) -> None:
    """Fetch a model, or the newest state of one on the hub; weights in pickles are not fetched."""
    exit_with(lambda: run_pull(name, console()))


@app.command()
def calibrate(
    model: Model = DEFAULT,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Annotated[
        Path | None,
        typer.Option(help="Write \\[\\[tokens, seconds], ...] to this file, as a cost model for bench drafts."),
    ] = None,
) -> None:
    """Measure what a pass costs by its tokens, and keep it for later loads on this machine.

    Loading a model does the same in a hurry. Exit code 1 if the measured costs cannot be kept.
    """

    def run() -> int:
        config = engine_config(model, device, dtype)
        from copyspec_engine.cli.calibrate import CalibrateOptions, run_calibrate

        return run_calibrate(CalibrateOptions(config, json), console())

    exit_with(run)


@app.command()
def explain(
    output: Annotated[Path, typer.Option("--output", "-o", help="Write the page to this file.")],
    run: Annotated[
        Path | None, typer.Argument(help="turns.jsonl of an evaluation run, or the run's folder.", metavar="RUN")
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Show answers of the bundled model, written now.")] = False,
    task: Annotated[
        list[str] | None, typer.Option(help="Show this conversation only; may be given again.", metavar="ID")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Show this many conversations.")] = None,
    writer: Annotated[str | None, typer.Option(help="Whose answers; default: those of the run's drafter.")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help='Folder with the tokenizer.json of the model, or "bundled": tells what each pass wrote.'),
    ] = None,
) -> None:
    """Write a page that shows where each part of a run's answers was copied from."""

    def write() -> int:
        config = engine_config(BUNDLED, "auto", "auto")
        from copyspec_engine.lab.page.explain import ExplainOptions, run_explain

        options = ExplainOptions(config, output, run, demo, tuple(task or ()), limit, writer, tokenizer)
        return run_explain(options, console())

    exit_with(write)


add_command(app, ServeOptions, "serve", "Serve a model over HTTP, in OpenAI's form, to several users.")(run_serve)


def main() -> None:
    """The console script."""
    app()
