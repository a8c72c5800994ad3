"""One run of `copyspec eval`: loads tasks and model, writes answers, prints figures and leaves them in a folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from copyspec_engine import ConfigError, Engine, EngineInfo, NoDrafter
from copyspec_engine.cli.exits import loading
from copyspec_engine.cli.options import BUNDLED
from copyspec_engine.lab.display.plots import check_installed
from copyspec_engine.lab.display.tables import on_terminal
from copyspec_engine.lab.evaluation.benchmarks import Task
from copyspec_engine.lab.evaluation.command import EvalOptions
from copyspec_engine.lab.evaluation.data import load_recorded, load_tasks, sampled
from copyspec_engine.lab.evaluation.differences import differences
from copyspec_engine.lab.evaluation.records import PLAIN, RunFacts, RunFolder, TurnRecord
from copyspec_engine.lab.evaluation.report.plots import write_plots
from copyspec_engine.lab.evaluation.report.tables import figures_table, summary_markdown
from copyspec_engine.lab.evaluation.scoring.scores import RUNS_CODE, check_scoring, score
from copyspec_engine.lab.evaluation.summary import summary
from copyspec_engine.lab.evaluation.writing import EngineSubject, ReplaySubject, Subject, Writer, run_tasks, writers_of
from copyspec_engine.lab.measuring import facts_of_engine, machine, versions
from copyspec_engine.lab.replay import load_tokenizer

__all__ = ["run_eval"]


def run_eval(options: EvalOptions, command: str, console: Console) -> int:
    """Runs the benchmark and returns the exit code: 1 if an answer differs from plain decoding in float32, else 0.

    Raises:
        CopySpecError: an option, the data or the model cannot work; found before anything is written.
    """
    _check(options)
    if options.replay is None:
        check_scoring(options.benchmark.name, execute_code=options.execute_code)
    if options.output is not None:
        check_installed()
    tasks = _tasks(options)
    with _folder(options) as folder, _subject(options, console) as (subject, about):
        runs_model = options.replay is None or options.shape is not None
        measured = _measured(options)
        (first, about_first), *others = [(writer.name, _about_drafter(options, writer)) for writer in measured]
        writers = writers_of(measured, plain=runs_model if options.plain is None else options.plain)
        writers += tuple(Writer(name, NoDrafter()) for name in options.peers)
        facts = RunFacts(
            benchmark=options.benchmark.name,
            drafter=first,
            drafter_options=about_first,
            others=dict(others),
            writers=tuple(writer.name for writer in writers),
            data=_data_name(options),
            recorded=options.replay is not None,
            num_tasks=len(tasks),
            max_new_tokens=options.max_new_tokens,
            execute_code=options.execute_code,
            command=command,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **about,
        )
        with _Bar(console, facts, tasks) as bar:
            records, left_out = run_tasks(subject, tasks, writers, folder, facts, bar.advance)
        for task, reason in left_out.items():
            console.print(f"Left out task {escape(task)}: {escape(reason)}", soft_wrap=True)
        answered = [task for task in tasks if task.id not in left_out]
        facts, same = folder.facts(), []
        for drafter in facts.drafters:
            with console.status("Scoring the answers ..."):
                metrics = _metrics(facts, drafter, answered, records, folder)
                plain = _metrics(facts, PLAIN, answered, records, folder) if _has_plain(facts) else {}
            own = facts.of(drafter)
            different = differences(own, records, subject.gap)
            found = {**summary(own, records, metrics, plain, different), "left_out": left_out}
            same.append(found["identical"]["same"] == found["identical"]["of"])
            _print(found, own, console)
            if options.output is not None:
                _write(found, facts, drafter, records, folder)
        if options.output is not None:
            console.print(f"Wrote {escape(str(folder.path))}", soft_wrap=True)
    return 0 if all(same) or facts.dtype not in ("float32", "") else 1


def _has_plain(facts: RunFacts) -> bool:
    """Plain decoding stands beside the drafters."""
    return PLAIN in facts.writers and facts.drafter != PLAIN


def _metrics(
    facts: RunFacts, writer: str, tasks: Sequence[Task], records: Sequence[TurnRecord], folder: RunFolder
) -> dict[str, float]:
    """What the answers of one writer are worth; nothing where they were recorded before."""
    own = [record for record in records if record.writer == writer]
    if facts.recorded:
        return {}
    name = "samples.jsonl"
    samples = facts.file(name, writer) if writer in facts.drafters else f"samples_{writer}.jsonl"
    return score(facts.benchmark, tasks, own, folder, execute_code=facts.execute_code, samples=samples)


def _write(
    found: dict[str, Any], run: RunFacts, drafter: str, records: Sequence[TurnRecord], folder: RunFolder
) -> None:
    """Leave what was found of one drafter in the run's folder."""
    facts = run.of(drafter)
    folder.write_json(run.file("summary.json", drafter), found)
    folder.write(run.file("summary.md", drafter), summary_markdown(facts, records, found))
    write_plots(folder, facts, records, found, f"plots/{drafter}" if run.others else "plots")


def _check(options: EvalOptions) -> None:
    if options.execute_code and options.benchmark.name not in RUNS_CODE:
        raise ConfigError(
            f"Got --execute-code with {options.benchmark.name} but only {' and '.join(RUNS_CODE)} ask for programs"
        )
    if options.plain and any(isinstance(drafter, NoDrafter) for drafter in options.drafters):
        raise ConfigError("Got --plain with plain decoding, which has nothing beside it: leave it out")
    if options.replay is None:
        _check_without_replay(options)
    else:
        _check_replay(options)


def _check_replay(options: EvalOptions) -> None:
    if options.data is not None:
        raise ConfigError(f"Got --data {options.data} with --replay {options.replay}: tasks come from one of them")
    if options.execute_code:
        raise ConfigError("Got --execute-code with --replay but recorded answers say nothing about this model")
    if options.model != BUNDLED:
        raise ConfigError(f"Got --model-path {options.model} with --replay: name a --shape, whose weights are random")
    if options.shape is None and options.plain:
        raise ConfigError(
            "Got --plain with --replay but plain decoding takes one pass a token: add a --shape to time it"
        )
    if options.draft_path is not None:
        raise ConfigError("Got --draft-path with --replay: `copyspec bench engine --draft-shape` replays with one")
    if options.peers:
        raise ConfigError("Got --peer with --replay: `copyspec bench engine` lets transformers write recorded answers")
    if options.shape is None and (options.device, options.dtype) != ("auto", "auto"):
        raise ConfigError("Got --device or --dtype with --replay but no model runs: add a --shape")
    if options.shape is not None and options.cost_model is not None:
        raise ConfigError(f"Got --cost-model {options.cost_model} with --shape, whose passes are measured")


def _check_without_replay(options: EvalOptions) -> None:
    if options.tokenizer != BUNDLED:
        raise ConfigError(f"Got --tokenizer {options.tokenizer} without --replay: a model has its own")
    for option, value in (
        ("--shape", options.shape),
        ("--replay-model", options.replay_model),
        ("--cost-model", options.cost_model),
    ):
        if value is not None:
            raise ConfigError(f"Got {option} {value} without --replay: name the recorded conversations")


def _measured(options: EvalOptions) -> tuple[Writer, ...]:
    """The writers that are measured."""
    return tuple(Writer(drafter.name, drafter) for drafter in options.drafters)


def _about_drafter(options: EvalOptions, writer: Writer) -> dict[str, Any]:
    """A drafter's options as they go into the run's facts, with the draft model's if there is one."""
    draft, about = options.config.draft_model, writer.drafter.model_dump(mode="json", exclude={"name"})
    if draft is None:
        return {name: value for name, value in about.items() if name != "draft_model_use"}
    return {**about, "draft": draft.name, "delta": draft.max_tokens}


def _data_name(options: EvalOptions) -> str:
    """What the tasks or the recorded answers are called in the run's facts."""
    if options.replay is None:
        return options.data or options.benchmark.name
    return f"{options.replay}, {options.replay_model}" if options.replay_model else str(options.replay)


def _tasks(options: EvalOptions) -> list[Task]:
    """The tasks that are asked for, in the order in which they are written."""
    if options.replay is None:
        tasks = load_tasks(options.benchmark, options.data)
    else:
        tasks = load_recorded(options.benchmark, options.replay, options.replay_model)
    return sampled(tasks, options.limit, options.per_category)


@contextmanager
def _folder(options: EvalOptions) -> Iterator[RunFolder]:
    """Where the run goes: the folder that was named, or one that is gone afterwards."""
    if options.output is not None:
        folder = RunFolder(options.output.expanduser())
        try:
            yield folder
        finally:
            folder.close()
        return
    with tempfile.TemporaryDirectory(prefix="copyspec-eval-") as path:
        yield RunFolder(Path(path))


@contextmanager
def _subject(options: EvalOptions, console: Console) -> Iterator[tuple[Subject, dict[str, Any]]]:
    """What answers, and what is to be said of it."""
    most = options.max_new_tokens
    if options.replay is not None and options.shape is None:
        replayed = ReplaySubject(load_tokenizer(options.tokenizer), options.cost_model or "gpu", most)
        about = {"model": options.model_id or "", "step_cost": replayed.cost.points}
        yield replayed, {**about, "versions": versions(), "machine": machine()}
    elif options.shape is not None:
        from copyspec_engine.lab.recorded.engine import open_recorded

        with console.status(f"Building a model of the shape {escape(options.shape)} ..."):
            opened = open_recorded(
                options.shape,
                options.tokenizer,
                device=options.device,
                dtype=options.dtype,
            )
            recorded = opened.__enter__()
        try:
            name = options.model_id or f"shape {options.shape}"
            facts = {**facts_of_engine(recorded.engine.info), "model": name}
            yield EngineSubject(recorded.engine, most, recorded), facts
        finally:
            opened.__exit__(None, None, None)
    else:
        with loading(options.model) as shown:
            engine = Engine(options.config, on_progress=shown)
        with engine:
            written = EngineSubject(engine, most)
            about = {**facts_of_engine(engine.info), "model": options.model_id or options.model}
            if options.peers:
                from copyspec_engine.lab.evaluation.with_peers import WithPeers

                with closing(WithPeers(written, _measured(options)[0].name)) as subject:
                    yield subject, about
            else:
                yield written, about


class _Bar:
    """Progress over all answers, with tokens per second of each writer so far."""

    def __init__(self, console: Console, facts: RunFacts, tasks: Sequence[Task]) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._name = facts.benchmark
        self._total = len(facts.writers) * sum(len(task.prompts) for task in tasks)
        self._task: TaskID | None = None
        self._sums: dict[str, list[float]] = {writer: [0, 0.0] for writer in facts.writers}

    def __enter__(self) -> _Bar:
        self._progress.start()
        self._task = self._progress.add_task(self._name, total=self._total)
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, record: TurnRecord) -> None:
        """One answer is there."""
        assert self._task is not None
        sums = self._sums[record.writer]
        sums[0] += record.num_tokens
        sums[1] += record.seconds or 0.0
        rates = [f"{name} {tokens / seconds:.1f}" for name, (tokens, seconds) in self._sums.items() if seconds]
        shown = f"{self._name}  {', '.join(rates)} tokens/s" if rates else self._name
        self._progress.update(self._task, advance=1, description=shown)


def _print(found: dict[str, Any], facts: RunFacts, console: Console) -> None:
    console.print(f"[italic]{facts.benchmark}, {facts.drafter}, {escape(facts.model or 'no model')}[/]")
    table = figures_table(found)
    console.print(on_terminal(table))
    console.print(table.note)
    if _has_plain(facts):
        same = found["identical"]
        console.print(f"identical outputs: {same['same']}/{same['of']}")
        if same["same"] < same["of"] and facts.dtype:
            console.print(
                f"Promised in {facts.dtype}: {EngineInfo.promised(facts.dtype, exact=False)}.", soft_wrap=True
            )
    for name, value in found["metrics"].items():
        console.print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
