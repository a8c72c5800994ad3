"""`copyspec bench`: the measurements and their options. What measures is imported when a command runs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from copyspec_engine import ConfigError, EngineConfig
from copyspec_engine.cli.options import BUNDLED, DEFAULT, Device, DtypeName, ModelArguments, add_command, engine_config
from copyspec_engine.lab.evaluation.benchmarks import BENCHMARKS

__all__ = [
    "BenchPeer",
    "ContextOptions",
    "DraftsOptions",
    "EngineOptions",
    "FreeTextOptions",
    "LosslessOptions",
    "PeersOptions",
    "ProposeOptions",
    "ReportOptions",
    "ScaleSimOptions",
    "ServerOptions",
    "bench",
]

bench = typer.Typer(
    no_args_is_help=True,
    help="Measure: drafts and propose replay recorded conversations without a model, engine builds one that writes "
    "them, in free-text, context and peers a model writes as it likes, lossless counts answers that drafting changes, "
    "serve asks an engine over HTTP and in process, scale-sim simulates many replicas, and report puts what they have "
    "found into tables and plots.",
)

MOST_MEMORY = 20_000_000
"""Tokens of memory that a measurement may fill; ten million is what a session is built for."""

Transcripts = Annotated[
    tuple[Path, ...],
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


def _check_count(option: str, value: int | None, most: int = 10**9) -> None:
    if value is not None and not 1 <= value <= most:
        raise ConfigError(f"Got {option} {value} but expected 1 to {most}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftsOptions:
    """Options of `bench drafts`."""

    transcripts: Transcripts
    tokenizer: TokenizerDir
    drafters: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Names with commas between them; default: ours and every installed peer."),
    ] = None
    cost_model: Annotated[
        str,
        typer.Option(
            metavar="gpu|cpu|FILE",
            help="Cost of a pass with k draft tokens: gpu is 1 + 0.002 k, cpu is 1 + 0.10 k, a JSON file holds "
            "measured \\[\\[tokens, seconds], ...].",
        ),
    ] = "gpu"
    max_tokens: Annotated[int, typer.Option(help="Answer tokens replayed of each file.")] = 15_000
    history: Annotated[
        Literal["full", "last-turn", "evaluator-optimizer"],
        typer.Option(
            help="What prompts hold: everything before, the last turn only, or the task and the last message."
        ),
    ] = "full"
    ingredients: Annotated[
        bool, typer.Option("--ingredients", help="Also replay ours with each ingredient switched off in turn.")
    ] = False
    json: JsonPath = None

    def __post_init__(self) -> None:
        _check_count("--max-tokens", self.max_tokens)


@add_command(bench, DraftsOptions)
def drafts(options: DraftsOptions, command: str, console: Console) -> int:
    """Replay conversations through every drafter: tokens per forward pass, modelled speed and time spent drafting."""
    from copyspec_engine.lab.bench.drafts import measure_drafts
    from copyspec_engine.lab.measuring import recorded

    return recorded(measure_drafts, options, command, console)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """Options of `bench report`."""

    results: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the JSON files.")] = Path("benchmarks/results")
    page: Annotated[
        tuple[Path, ...], typer.Option(metavar="FILE...", help="Markdown with <!-- bench: begin NAME --> blocks.")
    ] = (Path("docs/benchmarks.md"), Path("docs/result_files.md"), Path("docs/scale.md"))
    plots: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the plots.")] = Path("docs/plots")
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit code 1 if something differs.")] = False


@add_command(bench, ReportOptions)
def report(options: ReportOptions, _command: str, console: Console) -> int:
    """Put the figures of all results into the tables of docs and into plots."""
    from copyspec_engine.lab.results.fill import fill_pages

    return fill_pages(options, console)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposeOptions:
    """Options of `bench propose`."""

    transcripts: Transcripts
    tokenizer: TokenizerDir
    memory_tokens: Annotated[
        tuple[int, ...], typer.Option(metavar="N...", help="Tokens in the conversation's memory, one table row each.")
    ] = (16_000, 1_000_000)
    max_tokens: Annotated[int, typer.Option(help="Answer tokens replayed at each size.")] = 5_000
    json: JsonPath = None

    def __post_init__(self) -> None:
        _check_count("--max-tokens", self.max_tokens)
        for size in self.memory_tokens:
            _check_count("--memory-tokens", size, MOST_MEMORY)


@add_command(bench, ProposeOptions)
def propose(options: ProposeOptions, command: str, console: Console) -> int:
    """Fill a memory with the transcripts' text, repeated if need be, and time drafts and indexing at each size."""
    from copyspec_engine.lab.bench.propose import measure_propose
    from copyspec_engine.lab.measuring import recorded

    return recorded(measure_propose, options, command, console)


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeTextOptions(ModelArguments):
    """Options of `bench free-text`."""

    cost_model: Annotated[
        str,
        typer.Option(
            metavar="measured|gpu|cpu|FILE", help="What drafting takes a pass to cost; all but the first as in drafts."
        ),
    ] = "measured"
    temperature: Annotated[
        tuple[float, ...], typer.Option(metavar="T...", help="Temperatures, one after the other.")
    ] = (0.0, 1.0)
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 120
    rounds: Annotated[int, typer.Option(help="Answers to each of the six prompts.")] = 2
    json: JsonPath = None

    def __post_init__(self) -> None:
        _check_count("--max-tokens", self.max_tokens)
        _check_count("--rounds", self.rounds)


@add_command(bench, FreeTextOptions, "free-text")
def free_text(options: FreeTextOptions, command: str, console: Console) -> int:
    """Let a model write as it likes: tokens per forward pass and second with copies and alternatives.

    Each answer is of a conversation of its own. Exit code 1 if drafts change a token in float32.
    """
    from copyspec_engine.lab.bench.free_text import measure_free_text
    from copyspec_engine.lab.measuring import recorded

    return recorded(measure_free_text, options, command, console)


class ContextPeer(str, Enum):
    """Who may write in `bench context`."""

    ours_plain = "ours-plain"
    generate = "generate"
    prompt_lookup = "prompt-lookup"


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextOptions(ModelArguments):
    """Options of `bench context`."""

    file: Annotated[
        tuple[str, ...],
        typer.Option(
            metavar="FILE...",
            help="Documents that conversations begin with: your own, or shipped ones by their names.",
        ),
    ] = ("article.txt",)
    length: Annotated[
        tuple[int, ...],
        typer.Option(metavar="N...", help="Tokens of context at which the next turn is measured."),
    ] = (500, 1000, 2000, 4000)
    max_tokens: Annotated[int, typer.Option(help="Most tokens of each answer.")] = 128
    peer: Annotated[
        tuple[ContextPeer, ...],
        typer.Option(help="Who writes beside this engine; ours-plain always does. Default: all."),
    ] = (ContextPeer.generate, ContextPeer.prompt_lookup)
    json: JsonPath = None

    def __post_init__(self) -> None:
        _check_count("--max-tokens", self.max_tokens)
        for length in self.length:
            _check_count("--length", length)

    @property
    def peers(self) -> tuple[str, ...]:
        """Those of transformers that are to write."""
        return tuple(name.value for name in ContextPeer if name in self.peer and name != ContextPeer.ours_plain)

    @property
    def lengths(self) -> list[int]:
        """Tokens of a prompt from which on the next turn is measured, in rising order."""
        return sorted(set(self.length))


@add_command(bench, ContextOptions, "context")
def by_context(options: ContextOptions, command: str, console: Console) -> int:
    """Let a conversation about a document grow, and measure its turns by the tokens of context before them.

    The model writes as it likes. Exit code 1 if drafts change a token in float32.
    """
    from copyspec_engine.lab.bench.context import measure_context
    from copyspec_engine.lab.measuring import recorded

    return recorded(measure_context, options, command, console)


@dataclass(frozen=True, slots=True, kw_only=True)
class LosslessOptions(ModelArguments):
    """Options of `bench lossless`."""

    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help='Hub name or local folder; "bundled" is the small model that comes along, "tiny" has random weights.',
        ),
    ] = BUNDLED
    cases: Annotated[int, typer.Option(help="Answers to compare.")] = 500
    case: Annotated[
        int | None, typer.Option(metavar="K", help="Only this case, with prompt and answers; those beside it run too.")
    ] = None
    seed: Annotated[int, typer.Option(help="Of all that is random about the cases.")] = 0
    exact: Annotated[bool, typer.Option("--exact", help="With EngineConfig.exact, in both ways.")] = False
    json: JsonPath = None

    def __post_init__(self) -> None:
        _check_count("--cases", self.cases)
        if self.case is not None and self.case < 0:
            raise ConfigError(f"Got --case {self.case} but expected a number from 0")

    @property
    def config(self) -> EngineConfig:
        return engine_config(self.model, self.device, self.dtype, exact=self.exact)


@add_command(bench, LosslessOptions)
def lossless(options: LosslessOptions, command: str, console: Console) -> int:
    """Compare answers of random conversations with plain decoding of each prompt by itself, token by token.

    Greedy and seeded, with trees and blocks, grammars, stop texts, penalties, reused KV, requests that run together or
    are cancelled. Exit code 1 if an answer differs where the engine promises that none does.
    """
    from copyspec_engine.lab.bench.lossless import measure_lossless
    from copyspec_engine.lab.measuring import recorded

    return recorded(measure_lossless, options, command, console)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Options of `bench engine`, and what only tests and scripts set."""

    transcripts: Transcripts
    shape: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Whose dimensions the random weights have: bundled, qwen2.5-0.5b, qwen2.5-0.5b-4layers, "
            "qwen2.5-1.5b, qwen2.5-7b, llama-3.2-1b or llama-3.1-8b.",
        ),
    ] = "bundled"
    tokenizer: TokenizerDir = "bundled"
    peer: Annotated[
        tuple[str, ...],
        typer.Option(
            metavar="NAME...",
            help="Who writes: ours, ours-plain, ours-draft, ours-copy-first, ours-tree, generate, generate-kv, "
            "prompt-lookup and generate-batch; default: all but the last, or with --concurrency only ours and the "
            "last; the three with a draft model where there is one.",
        ),
    ] = ()
    max_tokens: Annotated[int, typer.Option(help="Answer tokens written of each file; longer answers are cut.")] = 1000
    turns: Annotated[int | None, typer.Option(help="Turns of a conversation, at most; default: all.")] = None
    conversations: Annotated[
        int | None,
        typer.Option(help="Conversations of each file, which share --max-tokens evenly; default: as many as it fills."),
    ] = None
    concurrency: Annotated[int, typer.Option(help="Conversations at the same time.")] = 1
    device: Device = "auto"
    dtype: Annotated[DtypeName, typer.Option(help="auto is float32 on a CPU and bfloat16 on a GPU.")] = "auto"
    draft_shape: Annotated[
        str | None, typer.Option(metavar="NAME", help="Whose dimensions a draft model has; default: there is none.")
    ] = None
    agreement: Annotated[
        float, typer.Option(help="Share of the places where the draft model says what is recorded, 0 to 1.")
    ] = 0.7
    draft_tokens: Annotated[int, typer.Option(help="Tokens that the draft model writes before a pass, at most.")] = 5
    json: JsonPath = None
    curve_s: float = 10.0
    """Seconds that measuring passes may take."""
    step_cost: tuple[tuple[int, float], ...] | None = None
    """What drafting takes passes to cost; default: measured."""
    draft_step_cost: tuple[tuple[int, float], ...] | None = None
    """The same for passes of the draft model."""

    def __post_init__(self) -> None:
        _check_count("--max-tokens", self.max_tokens)
        _check_count("--turns", self.turns, 10**6)
        _check_count("--conversations", self.conversations, 10**6)
        _check_count("--concurrency", self.concurrency, 256)
        _check_count("--draft-tokens", self.draft_tokens, 64)


@add_command(bench, EngineOptions)
def engine(options: EngineOptions, command: str, console: Console) -> int:
    """Write recorded answers with a model of a real shape: this engine beside transformers on the same weights.

    Exit code 1 if a peer writes anything else than the record.
    """
    from copyspec_engine.lab.bench.engine import measure_engine
    from copyspec_engine.lab.measuring import recorded

    return recorded(measure_engine, options, command, console)


class BenchPeer(str, Enum):
    """Who may write."""

    ours = "ours"
    ours_plain = "ours-plain"
    generate = "generate"
    prompt_lookup = "prompt-lookup"
    llama = "llama"
    llama_ngram_mod = "llama-ngram-mod"
    llama_ngram_simple = "llama-ngram-simple"
    ours_langchain = "ours-langchain"
    llama_langchain = "llama-langchain"


class KindName(str, Enum):
    """What may be asked."""

    rewrite = "rewrite"
    mt_redundant = "mt-redundant"
    cnndm = "cnndm"
    gsm8k = "gsm8k"
    mt_bench = "mt-bench"
    humaneval = "humaneval"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeersOptions:
    """Options of `bench peers`."""

    model: Annotated[
        str, typer.Option(metavar="M.gguf", help="A GGUF file, or any other model: llama.cpp is left out then.")
    ] = BUNDLED
    llama_server: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="The program; default: llama-server on the PATH (scripts/build_llama_server.sh)."
        ),
    ] = None
    peer: Annotated[
        tuple[BenchPeer, ...],
        typer.Option(
            help="Who writes; ours-plain always does, since all go on from its answers. Default: all that can.",
        ),
    ] = ()
    kind: Annotated[tuple[KindName, ...], typer.Option(help="Kinds of conversations.")] = (
        KindName.rewrite,
        KindName.mt_redundant,
        KindName.cnndm,
        KindName.gsm8k,
    )
    data: Annotated[
        tuple[str, ...],
        typer.Option(
            metavar="KIND=FILE...",
            help="Tasks of a kind, as --data of copyspec eval names them; default: a few that come along.",
        ),
    ] = ()
    file: Annotated[
        tuple[str, ...],
        typer.Option(metavar="FILE...", help="Documents of rewrite: your own, or shipped ones by their names."),
    ] = ("letter.txt", "meeting_notes.md", "article.txt")
    limit: Annotated[int, typer.Option(help="Conversations of each kind, at most.")] = 3
    max_tokens: Annotated[int, typer.Option(help="Most tokens of each answer.")] = 256
    threads: Annotated[int | None, typer.Option(help="Threads of every peer; default: one a processor.")] = None
    minutes: Annotated[
        int | None, typer.Option(help="Begin no conversation after so long; default: write all, however long it takes.")
    ] = None
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on behind the conversations that are in the file of --json.")
    ] = False
    json: JsonPath = None

    def __post_init__(self) -> None:
        _check_count("--limit", self.limit)
        _check_count("--minutes", self.minutes)
        if self.resume and (self.json is None or not self.json.is_file()):
            raise ConfigError(f"Got --resume with --json {self.json} but there is no such file to go on with")
        _check_count("--max-tokens", self.max_tokens)
        _check_count("--threads", self.threads, 1024)
        for given in self.data:
            kind, sign, file = given.partition("=")
            if kind not in BENCHMARKS or not sign or not file:
                raise ConfigError(f"Got --data {given} but expected KIND=FILE with one of {', '.join(BENCHMARKS)}")
            if kind not in self.kinds:
                raise ConfigError(f"Got --data {given} without --kind {kind}: name the kind too")

    @property
    def peers(self) -> tuple[str, ...]:
        """Who is to write, in the order of `BenchPeer`."""
        chosen = {*self.peer, BenchPeer.ours_plain} if self.peer else set(BenchPeer)
        return tuple(name.value for name in BenchPeer if name in chosen)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.value for name in self.kind))

    @property
    def files_by_kind(self) -> dict[str, str]:
        return dict(given.split("=", 1) for given in self.data)

    @property
    def num_threads(self) -> int:
        return self.threads or os.cpu_count() or 1

    @property
    def config(self) -> EngineConfig:
        """In float32 on the CPU, where it is compared."""
        return engine_config(self.model, "cpu", "float32")


@add_command(bench, PeersOptions)
def peers(options: PeersOptions, command: str, console: Console) -> int:
    """Let a model write freely, turn by turn beside what else runs it on a CPU: transformers and llama.cpp.

    All get the same prompts, with the answers of plain decoding in them. The file of --json holds what is written so
    far as soon as a conversation ends. Exit code 1 if drafts change a token.
    """
    from copyspec_engine.lab.bench.peers import measure_peers
    from copyspec_engine.lab.measuring import recorded

    return recorded(partial(measure_peers, command=command), options, command, console)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions(ModelArguments):
    """Options of `bench serve`."""

    model: Annotated[str, typer.Option(help="A model, as for `copyspec serve`.")] = DEFAULT
    clients: Annotated[
        tuple[int, ...], typer.Option(metavar="N...", help="Clients that ask at once, or tasks in process.")
    ] = (1, 16)
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 64
    rounds: Annotated[int, typer.Option(help="How often both ways make the same calls.")] = 8
    threads: Annotated[int | None, typer.Option(help="Threads of the engine; default: one a processor.")] = None
    json: JsonPath = None

    def __post_init__(self) -> None:
        for number in self.clients:
            _check_count("--clients", number, 256)
        _check_count("--max-tokens", self.max_tokens)
        _check_count("--rounds", self.rounds)
        _check_count("--threads", self.threads, 1024)

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of clients, each once."""
        return tuple(dict.fromkeys(self.clients))

    @property
    def num_threads(self) -> int:
        return self.threads or os.cpu_count() or 1


@add_command(bench, ServerOptions)
def serve(options: ServerOptions, command: str, console: Console) -> int:
    """Ask one engine over HTTP and in process: what a server adds to the first token, and takes of the speed.

    Exit code 1 if an answer over HTTP is another one.
    """
    from copyspec_engine.lab.bench.server import measure_server
    from copyspec_engine.lab.measuring import recorded

    return recorded(measure_server, options, command, console)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleSimOptions:
    """Options of `bench scale-sim`."""

    replicas: Annotated[int, typer.Option(help="Replicas.")] = 1000
    conversations: Annotated[int, typer.Option(help="Conversations.")] = 10_000_000
    calls: Annotated[float, typer.Option(help="Calls an hour of a conversation, on average over all.")] = 1.0
    exponent: Annotated[float, typer.Option(help="Of Zipf's law, by which some conversations call more often.")] = 1.0
    most_calls: Annotated[float, typer.Option(help="Calls an hour of the busiest conversation.")] = 360.0
    call_s: Annotated[float, typer.Option(help="Seconds of a call, on average.")] = 4.0
    running: Annotated[int, typer.Option(help="Calls that a replica works at together; later ones wait.")] = 16
    lost: Annotated[float, typer.Option(help="Share of the replicas that is lost in an hour.")] = 0.01
    back_s: Annotated[float, typer.Option(help="Seconds until another one is in the place of a lost one.")] = 60.0
    grow: Annotated[float, typer.Option(help="Share by which replicas become more in the second half.")] = 0.1
    hours: Annotated[float, typer.Option(help="Hours that are simulated.")] = 1.0
    factor: Annotated[
        tuple[float, ...],
        typer.Option(metavar="F...", help="Bounds on calls in flight, over the mean of all replicas."),
    ] = (1.25, 2.0)
    least: Annotated[
        tuple[int, ...], typer.Option(metavar="N...", help="Calls in flight that each replica takes in any case.")
    ] = (16, 32)
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0
    json: JsonPath = None

    def __post_init__(self) -> None:
        _check_count("--replicas", self.replicas, 10_000)
        _check_count("--conversations", self.conversations, 50_000_000)
        _check_count("--running", self.running)
        limits = {
            "calls": (0.0, self.most_calls),
            "exponent": (0.0, 3.0),
            "most_calls": (0.0, 3600.0),
            "call_s": (1.0, 3600.0),
            "lost": (0.0, 1000.0),
            "back_s": (1.0, 3600.0),
            "grow": (0.0, 1.0),
            "hours": (0.01, 24.0),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high or (value == 0 and name in ("calls", "most_calls")):
                raise ConfigError(f"Got --{name.replace('_', '-')} {value:g} but expected {low:g} to {high:g}")
        for factor in self.factor:
            if not factor > 1:
                raise ConfigError(f"Got --factor {factor:g} but expected more than 1, or some calls have no room")
        for least in self.least:
            _check_count("--least", least)

    @property
    def most_replicas(self) -> int:
        """Replicas after the number has grown."""
        return self.replicas + round(self.grow * self.replicas)


@add_command(bench, ScaleSimOptions, "scale-sim")
def scale_sim(options: ScaleSimOptions, command: str, console: Console) -> int:
    """Simulate many replicas: how many calls find their conversation's memory, and how even the load is, by policy."""
    from copyspec_engine.lab.bench.scale_sim import measure_scale_sim
    from copyspec_engine.lab.measuring import recorded

    return recorded(measure_scale_sim, options, command, console)
