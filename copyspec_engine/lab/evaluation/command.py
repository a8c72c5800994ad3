"""`copyspec eval`: the five benchmarks and their options. What runs them is imported when a command runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from copyspec_engine import (
    AdaptiveDrafter,
    ConfigError,
    CopySpecDrafter,
    DrafterConfig,
    DraftModel,
    DraftModelDrafter,
    EngineConfig,
    NoDrafter,
)
from copyspec_engine.cli.options import BUNDLED, ModelArguments, add_command, engine_config
from copyspec_engine.lab.evaluation.benchmarks import BENCHMARKS, Benchmark

__all__ = ["EvalOptions", "ReportOptions", "evaluations"]

evaluations = typer.Typer(
    no_args_is_help=True,
    help="The benchmarks of the CopySpec paper, with and without drafting on the same decoder, and reports on runs.",
)


class DrafterName(str, Enum):
    """What may be measured."""

    adaptive = "adaptive"
    copyspec = "copyspec"
    draft_model = "draft-model"
    none = "none"


class PeerName(str, Enum):
    """What of transformers may write too."""

    generate = "generate"
    prompt_lookup = "prompt-lookup"


class DraftUse(str, Enum):
    """What a draft model may do beside copies."""

    in_tree = "in-tree"
    after_copies = "after-copies"
    never = "never"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions(ModelArguments):
    """Options of every benchmark."""

    named: Benchmark
    """The benchmark that the command is called by."""
    model: Annotated[
        str,
        typer.Option(
            "--model-path", "--model", help='Hub name or local folder; "bundled" is the small model that comes along.'
        ),
    ] = BUNDLED
    model_id: Annotated[str | None, typer.Option(help="What the model is called in reports; default: its path.")] = None
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|DIR|NAME",
            help='JSON Lines file, or what the package datasets loads; "sample": a few tasks that come along. Default: '
            "the benchmark's data set on the hub.",
        ),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(help="Take so many tasks: a fair sample, of each category alike, to which a higher limit adds."),
    ] = None
    per_category: Annotated[int | None, typer.Option(help="Take so many tasks of each category.")] = None
    drafter: Annotated[
        tuple[DrafterName, ...],
        typer.Option(help="Default: adaptive. May be repeated: all of them write beside the same plain decoding."),
    ] = ()
    peer: Annotated[
        tuple[PeerName, ...],
        typer.Option(help="Let transformers write too, on the same prompts and weights; may be repeated."),
    ] = ()
    use_copy: Annotated[bool, typer.Option("--use-copy/--no-use-copy", help="Draft copies at all.")] = True
    gamma: Annotated[
        int | None,
        typer.Option("--gamma", help="Tokens that must match before copying starts; of --drafter copyspec (3)."),
    ] = None
    number_copy: Annotated[
        int | None, typer.Option("--number-copy", help="Tokens copied at a time; of --drafter copyspec (10).")
    ] = None
    draft_path: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A draft model with the same vocabulary: hub name or folder.")
    ] = None
    delta: Annotated[
        int | None, typer.Option(help="Tokens that the draft model writes before a pass, at most (5).")
    ] = None
    draft_use: Annotated[
        DraftUse | None,
        typer.Option(
            help="What the draft model does beside copies: write into the same draft (in-tree, the default of "
            "adaptive), or where nothing is copied (after-copies, that of copyspec), or nothing (never)."
        ),
    ] = None
    use_redundant: Annotated[
        bool, typer.Option("--use-redundant", help="Of mt-bench: the questions of mt-redundant.")
    ] = False
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-token", "--max-new-tokens", help="Most tokens of an answer.")
    ] = 1024
    plain: Annotated[
        bool | None,
        typer.Option(
            "--plain/--no-plain", help="Write each answer without drafting too, side by side; default: if a model runs."
        ),
    ] = None
    execute_code: Annotated[
        bool, typer.Option("--execute-code", help="Run the programs that the model wrote, confined, to score them.")
    ] = False
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the run here; one that was cut off goes on.")
    ] = None
    replay: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Recorded conversations instead of --data, whose answers are written again."),
    ] = None
    replay_model: Annotated[str | None, typer.Option(help="Take the conversations of this model only.")] = None
    tokenizer: Annotated[
        str, typer.Option(metavar="DIR", help="Of --replay: the folder with the tokenizer of that model.")
    ] = "bundled"
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of --replay: force the answers through random weights of this shape, and time them; default: count "
            "passes without a model.",
        ),
    ] = None
    cost_model: Annotated[
        str | None,
        typer.Option(metavar="gpu|cpu|FILE", help="Of --replay without --shape: what a pass costs; default: gpu."),
    ] = None

    def __post_init__(self) -> None:
        if self.use_redundant and self.named.name != "mt-bench":
            raise ConfigError(f"Got --use-redundant with {self.named.name} but it is an option of mt-bench")
        counts = {"--limit": self.limit, "--per-category": self.per_category, "--max-new-token": self.max_new_tokens}
        for option, value in counts.items():
            if value is not None and value < 1:
                raise ConfigError(f"Got {option} {value} but expected at least 1")
        _drafters(self)  # says now what cannot go together

    @property
    def benchmark(self) -> Benchmark:
        return BENCHMARKS["mt-redundant"] if self.use_redundant else self.named

    @property
    def drafters(self) -> tuple[DrafterConfig, ...]:
        """Those that are measured."""
        return _drafters(self)

    @property
    def peers(self) -> tuple[str, ...]:
        return tuple(name.value for name in self.peer)

    @property
    def config(self) -> EngineConfig:
        return engine_config(self.model, self.device, self.dtype, draft_model=_draft_model(self))


def _drafters(options: EvalOptions) -> tuple[DrafterConfig, ...]:
    """The drafters that the options ask for; the paper's options ask for the paper's algorithm."""
    names: Sequence[str] = [name.value for name in options.drafter]
    draft, use = _draft_model(options), options.draft_use and options.draft_use.value
    of_paper = {"min_match_tokens": options.gamma, "block": options.number_copy}
    given = {option: value for option, value in of_paper.items() if value is not None}
    if not options.use_copy:
        if set(names) - {"none", "draft-model"} or given or use:
            raise ConfigError("Got --no-use-copy with a drafter that copies or its options: leave one of them out")
        names = names or ("none" if draft is None else "draft-model",)
    names = names or ("copyspec" if given else "adaptive",)
    if len(names) > len(set(names)) or (len(names) > 1 and "none" in names):
        raise ConfigError(
            f"Got --drafter {' '.join(names)} but expected different ones that draft: plain decoding stands beside them"
        )
    if given and "copyspec" not in names:
        raise ConfigError(
            f"Got --gamma or --number-copy with --drafter {' '.join(names)} but they are options of the paper's "
            "algorithm: leave --drafter out, or name copyspec"
        )
    if draft is not None and "none" in names:
        raise ConfigError("Got --draft-path with --drafter none, which is plain decoding: leave one of them out")
    if draft is None and "draft-model" in names:
        raise ConfigError("Got --drafter draft-model without a draft model: name one with --draft-path")
    beside: dict[str, Any] = {} if use is None else {"draft_model_use": use}
    known: dict[str, Callable[[], DrafterConfig]] = {
        "adaptive": lambda: AdaptiveDrafter(**beside),
        "copyspec": lambda: CopySpecDrafter(**given, **beside),
        "draft-model": DraftModelDrafter,
        "none": NoDrafter,
    }
    return tuple(known[name]() for name in names)


def _draft_model(options: EvalOptions) -> DraftModel | None:
    delta, use = options.delta, options.draft_use
    if options.draft_path is not None:
        return DraftModel(options.draft_path, **({} if delta is None else {"max_tokens": delta}))
    for option, value in (("--delta", delta), ("--draft-use", use and use.value)):
        if value is not None:
            raise ConfigError(f"Got {option} {value} without a draft model: name one with --draft-path")
    return None


def evaluate(options: EvalOptions, command: str, console: Console) -> int:
    """Run a benchmark turn by turn, greedily, with and without drafting.

    Exit code 1 if an answer differs from plain decoding in float32.
    """
    from copyspec_engine.lab.evaluation.run import run_eval

    return run_eval(options, command, console)


for _benchmark in BENCHMARKS.values():
    add_command(evaluations, EvalOptions, _benchmark.name, f"{_benchmark.title}.", named=_benchmark)(evaluate)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """Options of `eval report`."""

    runs: Annotated[tuple[Path, ...], typer.Argument(metavar="DIR...", help="Folders of runs.")]
    markdown: Annotated[Path | None, typer.Option(metavar="OUT.md", help="Write the tables to this file.")] = None
    html: Annotated[
        Path | None, typer.Option(metavar="OUT.html", help="Write one page with tables and charts to this file.")
    ] = None


@add_command(evaluations, ReportOptions)
def report(options: ReportOptions, _command: str, console: Console) -> int:
    """Compare runs side by side: speed by turn and category, accepted lengths, costs of a pass, equal outputs."""
    from copyspec_engine.lab.evaluation.report.write import run_eval_report

    return run_eval_report(options, console)
