"""`copyspec eval`: the options of the five benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from copyspec_engine import (
    AdaptiveDrafter,
    ConfigError,
    CopySpecDrafter,
    DrafterConfig,
    DraftModel,
    DraftModelDrafter,
    NoDrafter,
)
from copyspec_engine.cli.exits import console, exit_with
from copyspec_engine.cli.loading import BUNDLED, Device, Dtype, engine_config
from copyspec_engine.cli.words import RecordedCommand
from copyspec_engine.lab.evaluation.benchmarks import BENCHMARKS

__all__ = ["evaluations"]

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


def _drafters(
    names: Sequence[str], use_copy: bool, of_paper: dict[str, int | None], draft: DraftModel | None, use: str | None
) -> tuple[DrafterConfig, ...]:
    """The drafters that the options ask for; the paper's options ask for the paper's algorithm."""
    given = {option: value for option, value in of_paper.items() if value is not None}
    if not use_copy:
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
    options: dict[str, Any] = {} if use is None else {"draft_model": use}
    known: dict[str, Callable[[], DrafterConfig]] = {
        "adaptive": lambda: AdaptiveDrafter(**options),
        "copyspec": lambda: CopySpecDrafter(**given, **options),
        "draft-model": DraftModelDrafter,
        "none": NoDrafter,
    }
    return tuple(known[name]() for name in names)


def _draft_model(path: str | None, delta: int | None, use: str | None) -> DraftModel | None:
    if path is not None:
        return DraftModel(path, **({} if delta is None else {"max_tokens": delta}))
    for option, value in (("--delta", delta), ("--draft-use", use)):
        if value is not None:
            raise ConfigError(f"Got {option} {value} without a draft model: name one with --draft-path")
    return None


def evaluate(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            "--model-path", "--model", help='Hub name or local folder; "bundled" is the small model that comes along.'
        ),
    ] = BUNDLED,
    model_id: Annotated[
        str | None, typer.Option(help="What the model is called in reports; default: its path.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|DIR|NAME",
            help='JSON Lines file, or what the package datasets loads; "sample": a few tasks that come along. Default: '
            "the benchmark's data set on the hub.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Take so many tasks: a fair sample, of each category alike, to which a higher limit adds."),
    ] = None,
    per_category: Annotated[int | None, typer.Option(help="Take so many tasks of each category.")] = None,
    drafter: Annotated[
        list[DrafterName] | None,
        typer.Option(help="Default: adaptive. May be repeated: all of them write beside the same plain decoding."),
    ] = None,
    peer: Annotated[
        list[PeerName] | None,
        typer.Option(help="Let transformers write too, on the same prompts and weights; may be repeated."),
    ] = None,
    use_copy: Annotated[bool, typer.Option("--use-copy/--no-use-copy", help="Draft copies at all.")] = True,
    gamma: Annotated[
        int | None,
        typer.Option("--gamma", help="Tokens that must match before copying starts; of --drafter copyspec (3)."),
    ] = None,
    number_copy: Annotated[
        int | None, typer.Option("--number-copy", help="Tokens copied at a time; of --drafter copyspec (10).")
    ] = None,
    draft_path: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A draft model with the same vocabulary: hub name or folder.")
    ] = None,
    delta: Annotated[
        int | None, typer.Option(help="Tokens that the draft model writes before a pass, at most (5).")
    ] = None,
    draft_use: Annotated[
        DraftUse | None,
        typer.Option(
            help="What the draft model does beside copies: write into the same draft (in-tree, the default of "
            "adaptive), or where nothing is copied (after-copies, that of copyspec), or nothing (never)."
        ),
    ] = None,
    use_redundant: Annotated[
        bool, typer.Option("--use-redundant", help="Of mt-bench: the questions of mt-redundant.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-token", "--max-new-tokens", help="Most tokens of an answer.")
    ] = 1024,
    plain: Annotated[
        bool | None,
        typer.Option(
            "--plain/--no-plain", help="Write each answer without drafting too, side by side; default: if a model runs."
        ),
    ] = None,
    execute_code: Annotated[
        bool, typer.Option("--execute-code", help="Run the programs that the model wrote, confined, to score them.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the run here; one that was cut off goes on.")
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Recorded conversations instead of --data, whose answers are written again."),
    ] = None,
    replay_model: Annotated[str | None, typer.Option(help="Take the conversations of this model only.")] = None,
    tokenizer: Annotated[
        str, typer.Option(metavar="DIR", help="Of --replay: the folder with the tokenizer of that model.")
    ] = "bundled",
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of --replay: force the answers through random weights of this shape, and time them; default: count "
            "passes without a model.",
        ),
    ] = None,
    cost_model: Annotated[
        str | None,
        typer.Option(metavar="gpu|cpu|FILE", help="Of --replay without --shape: what a pass costs; default: gpu."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Run a benchmark turn by turn, greedily, with and without drafting.

    Exit code 1 if an answer differs from plain decoding in float32.
    """

    def run() -> int:
        name = str(context.info_name)
        if use_redundant and name != "mt-bench":
            raise ConfigError(f"Got --use-redundant with {name} but it is an option of mt-bench")
        for option, value in (
            ("--limit", limit),
            ("--per-category", per_category),
            ("--max-new-token", max_new_tokens),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"Got {option} {value} but expected at least 1")
        named = tuple(name.value for name in drafter or ())
        use = None if draft_use is None else draft_use.value
        draft = _draft_model(draft_path, delta, use)
        of_paper = {"min_match_tokens": gamma, "block": number_copy}
        chosen = _drafters(named, use_copy, of_paper, draft, use)
        config = engine_config(model, device, dtype, draft=draft)
        from copyspec_engine.lab.evaluation.answering import EvalOptions, run_eval

        options = EvalOptions(
            benchmark=BENCHMARKS["mt-redundant" if use_redundant else name],
            drafters=chosen,
            peers=tuple(name.value for name in peer or ()),
            config=config,
            model_id=model_id,
            data=data,
            limit=limit,
            per_category=per_category,
            max_new_tokens=max_new_tokens,
            plain=plain,
            execute_code=execute_code,
            output=output,
            replay=replay,
            replay_model=replay_model,
            tokenizer=tokenizer,
            shape=shape,
            cost_model=cost_model,
        )
        return run_eval(options, context.meta["command"], console())

    exit_with(run)


for _benchmark in BENCHMARKS.values():
    evaluations.command(name=_benchmark.name, help=f"{_benchmark.title}.", cls=RecordedCommand)(evaluate)


@evaluations.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of runs.")],
    markdown: Annotated[Path | None, typer.Option(metavar="OUT.md", help="Write the tables to this file.")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="OUT.html", help="Write one page with tables and charts to this file.")
    ] = None,
) -> None:
    """Compare runs side by side: speed by turn and category, accepted lengths, costs of a pass, equal outputs."""

    def run() -> int:
        from copyspec_engine.lab.evaluation.printed import run_eval_report

        return run_eval_report(runs, markdown, html, console())

    exit_with(run)
