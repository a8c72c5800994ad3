"""`copyspec bench`: the options of the measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from copyspec_engine import ConfigError
from copyspec_engine.cli.exits import console, exit_with
from copyspec_engine.cli.loading import BUNDLED, Device, Dtype, DtypeName, engine_config
from copyspec_engine.cli.words import RecordedCommand

__all__ = ["bench"]

bench = typer.Typer(
    no_args_is_help=True,
    help="Measure: drafts and propose replay recorded conversations without a model, engine builds one that writes "
    "them, in free-text and context a model writes as it likes, and lossless counts answers that drafting changes.",
)


def _check_count(option: str, value: int, most: int = 10**9) -> None:
    if not 1 <= value <= most:
        raise ConfigError(f"Got {option} {value} but expected 1 to {most}")


MOST_MEMORY = 20_000_000
"""Tokens of memory that a measurement may fill; ten million is what a session is built for."""

Transcripts = Annotated[
    list[Path],
    typer.Option(
        metavar="FILE...",
        help='Recorded conversations, JSON lines {"messages": [{"role", "content"}]}, gzipped if named .gz.',
    ),
]
TokenizerDir = Annotated[
    str,
    typer.Option(
        metavar="DIR",
        help='Folder with the tokenizer.json of the model whose answers are replayed; "bundled" is the small one that '
        "comes along.",
    ),
]
JsonPath = Annotated[Path | None, typer.Option(metavar="OUT", help="Write the figures to this file.")]


@bench.command(cls=RecordedCommand)
def drafts(
    context: typer.Context,
    transcripts: Transcripts,
    tokenizer: TokenizerDir,
    drafters: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Names with commas between them; default: ours and every installed peer."),
    ] = None,
    cost_model: Annotated[
        str,
        typer.Option(
            metavar="gpu|cpu|FILE",
            help="Cost of a pass with k draft tokens: gpu is 1 + 0.002 k, cpu is 1 + 0.10 k, a JSON file holds "
            "measured \\[\\[tokens, seconds], ...].",
        ),
    ] = "gpu",
    max_tokens: Annotated[int, typer.Option(help="Answer tokens replayed of each file.")] = 15_000,
    history: Annotated[
        Literal["full", "last-turn", "evaluator-optimizer"],
        typer.Option(
            help="What prompts hold: everything before, the last turn only, or the task and the last message."
        ),
    ] = "full",
    ingredients: Annotated[
        bool, typer.Option("--ingredients", help="Also replay ours with each ingredient switched off in turn.")
    ] = False,
    json: JsonPath = None,
) -> None:
    """Replay conversations through every drafter: tokens per forward pass, modelled speed and time spent drafting."""

    def run() -> int:
        _check_count("--max-tokens", max_tokens)
        from copyspec_engine.lab.bench.drafts import DraftsOptions, run_drafts

        options = DraftsOptions(
            tuple(transcripts), tokenizer, drafters, cost_model, max_tokens, history, ingredients, json
        )
        return run_drafts(options, context.meta["command"], console())

    exit_with(run)


@bench.command(cls=RecordedCommand)
def report(
    results: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the JSON files.")] = Path(
        "benchmarks/results"
    ),
    readme: Annotated[
        list[Path], typer.Option(metavar="FILE...", help="Markdown with <!-- bench: begin NAME --> blocks.")
    ] = [Path("README.md"), Path("benchmarks/README.md")],  # noqa: B006 - read only
    plots: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the plots.")] = Path("docs/plots"),
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit code 1 if something differs.")] = False,
) -> None:
    """Put the figures of all results into the READMEs' tables and into plots."""

    def run() -> int:
        from copyspec_engine.lab.bench.collect import run_bench_report

        return run_bench_report(results, readme, plots, check, console())

    exit_with(run)


@bench.command(cls=RecordedCommand)
def propose(
    context: typer.Context,
    transcripts: Transcripts,
    tokenizer: TokenizerDir,
    memory_tokens: Annotated[
        list[int], typer.Option(metavar="N...", help="Tokens in the conversation's memory, one table row each.")
    ] = [16_000, 1_000_000],  # noqa: B006 - read only
    max_tokens: Annotated[int, typer.Option(help="Answer tokens replayed at each size.")] = 5_000,
    json: JsonPath = None,
) -> None:
    """Fill a memory with the transcripts' text, repeated if need be, and time drafts and indexing at each size."""

    def run() -> int:
        _check_count("--max-tokens", max_tokens)
        for size in memory_tokens:
            _check_count("--memory-tokens", size, MOST_MEMORY)
        from copyspec_engine.lab.bench.propose import ProposeOptions, run_propose

        options = ProposeOptions(tuple(memory_tokens), tuple(transcripts), tokenizer, max_tokens, json)
        return run_propose(options, context.meta["command"], console())

    exit_with(run)


@bench.command("free-text", cls=RecordedCommand)
def free_text(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(help='Hub name or local folder; "bundled" is the small model that comes along.')
    ] = BUNDLED,
    device: Device = "auto",
    dtype: Dtype = "auto",
    cost_model: Annotated[
        str,
        typer.Option(
            metavar="measured|gpu|cpu|FILE", help="What drafting takes a pass to cost; all but the first as in drafts."
        ),
    ] = "measured",
    temperature: Annotated[list[float], typer.Option(metavar="T...", help="Temperatures, one after the other.")] = [  # noqa: B006 - read only
        0.0,
        1.0,
    ],
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 120,
    rounds: Annotated[int, typer.Option(help="Answers to each of the six prompts.")] = 2,
    json: JsonPath = None,
) -> None:
    """Let a model write as it likes: tokens per forward pass and second with copies and recycled candidates.

    Each answer is of a conversation of its own. Exit code 1 if drafts change a token in float32.
    """

    def run() -> int:
        _check_count("--max-tokens", max_tokens)
        _check_count("--rounds", rounds)
        config = engine_config(model, device, dtype)
        from copyspec_engine.lab.bench.free_text import FreeTextOptions, run_free_text

        options = FreeTextOptions(config, cost_model, tuple(temperature), max_tokens, rounds, json)
        return run_free_text(options, context.meta["command"], console())

    exit_with(run)


@bench.command(name="context", cls=RecordedCommand)
def by_context(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help='Hub name or local folder; "bundled" is the small model that comes along.')
    ] = BUNDLED,
    file: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE...",
            help="Documents that conversations begin with: your own, or shipped ones by their names; default: "
            "article.txt.",
        ),
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N...", help="Tokens of context at which the next turn is measured; default: 500 to 4000."
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of each answer.")] = 128,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Let transformers write the turns too.")] = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: JsonPath = None,
) -> None:
    """Let a conversation about a document grow, and measure its turns by the tokens of context before them.

    The model writes as it likes. Exit code 1 if drafts change a token in float32.
    """

    def run() -> int:
        _check_count("--max-tokens", max_tokens)
        lengths = tuple(sorted(set(length or (500, 1000, 2000, 4000))))
        for each in lengths:
            _check_count("--length", each)
        config = engine_config(model, device, dtype)
        from copyspec_engine.lab.bench.context import ContextOptions, run_context

        documents = tuple(dict.fromkeys(file or ("article.txt",)))
        options = ContextOptions(config, documents, lengths, max_tokens, peers, json)
        return run_context(options, context.meta["command"], console())

    exit_with(run)


@bench.command(cls=RecordedCommand)
def lossless(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help='Hub name or local folder; "bundled" is the small model that comes along, "tiny" has random weights.',
        ),
    ] = BUNDLED,
    cases: Annotated[int, typer.Option(help="Answers to compare.")] = 500,
    case: Annotated[
        int | None, typer.Option(metavar="K", help="Only this case, with prompt and answers; those beside it run too.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all that is random about the cases.")] = 0,
    exact: Annotated[bool, typer.Option("--exact", help="With EngineConfig.exact, in both ways.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: JsonPath = None,
) -> None:
    """Compare answers of random conversations with plain decoding of each prompt by itself, token by token.

    Greedy and seeded, with trees and blocks, grammars, stop texts, penalties, reused KV, requests that run together or
    are cancelled. Exit code 1 if an answer differs where the engine promises that none does.
    """

    def run() -> int:
        _check_count("--cases", cases)
        config = engine_config(model, device, dtype, exact=exact)
        from copyspec_engine.lab.bench.lossless import LosslessOptions, run_lossless

        if case is not None and case < 0:
            raise ConfigError(f"Got --case {case} but expected a number from 0")
        return run_lossless(LosslessOptions(config, cases, seed, case, json), context.meta["command"], console())

    exit_with(run)


@bench.command(cls=RecordedCommand)
def engine(
    context: typer.Context,
    transcripts: Transcripts,
    shape: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Whose dimensions the random weights have: bundled, qwen2.5-0.5b, qwen2.5-0.5b-4layers, "
            "qwen2.5-1.5b, qwen2.5-7b, llama-3.2-1b or llama-3.1-8b.",
        ),
    ] = "bundled",
    tokenizer: TokenizerDir = "bundled",
    peers: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Names with commas between them of ours, ours-plain, ours-draft, ours-copy-first, ours-tree, "
            "generate, generate-kv, prompt-lookup and generate-batch; default: all but the last, or with --concurrency "
            "only ours and the last; the three with a draft model where there is one.",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Answer tokens written of each file; longer answers are cut.")] = 1000,
    turns: Annotated[int | None, typer.Option(help="Turns of a conversation, at most; default: all.")] = None,
    conversations: Annotated[
        int | None,
        typer.Option(help="Conversations of each file, which share --max-tokens evenly; default: as many as it fills."),
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Conversations at the same time.")] = 1,
    device: Device = "auto",
    dtype: Annotated[
        DtypeName,
        typer.Option(help="auto is float32 on a CPU and bfloat16 on a GPU."),
    ] = "auto",
    draft_shape: Annotated[
        str | None, typer.Option(metavar="NAME", help="Whose dimensions a draft model has; default: there is none.")
    ] = None,
    agreement: Annotated[
        float, typer.Option(help="Share of the places where the draft model says what is recorded, 0 to 1.")
    ] = 0.7,
    draft_tokens: Annotated[int, typer.Option(help="Tokens that the draft model writes before a pass, at most.")] = 5,
    json: JsonPath = None,
) -> None:
    """Write recorded answers with a model of a real shape: this engine beside transformers on the same weights.

    Exit code 1 if a peer writes anything else than the record.
    """

    def run() -> int:
        for option, value, most in (
            ("--max-tokens", max_tokens, 10**9),
            ("--turns", turns, 10**6),
            ("--conversations", conversations, 10**6),
            ("--concurrency", concurrency, 256),
            ("--draft-tokens", draft_tokens, 64),
        ):
            if value is not None:
                _check_count(option, value, most)
        from copyspec_engine.lab.bench.engine import EngineOptions, run_engine

        options = EngineOptions(
            tuple(transcripts),
            shape,
            tokenizer,
            peers,
            max_tokens,
            turns,
            conversations,
            concurrency,
            device,
            dtype,
            draft_shape,
            agreement,
            draft_tokens,
        )
        return run_engine(options, json, context.meta["command"], console())

    exit_with(run)
