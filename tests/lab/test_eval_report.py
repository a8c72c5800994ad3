"""Reports of evaluation runs: figures against hand-computed ones, files well-formed, errors in one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from copyspec_engine import ConfigError, CopySpecError
from copyspec_engine.lab.display.charts import Bars, Lines
from copyspec_engine.lab.display.conditions import hardware, shortened
from copyspec_engine.lab.display.plots import drawn_data, save
from copyspec_engine.lab.display.tables import Table, figure, markdown, percent, times
from copyspec_engine.lab.evaluation.command import ReportOptions
from copyspec_engine.lab.evaluation.records import RunFacts, RunFolder, TurnRecord
from copyspec_engine.lab.evaluation.report.compare import charts, load_runs, tables
from copyspec_engine.lab.evaluation.report.plots import run_plots, write_plots
from copyspec_engine.lab.evaluation.report.tables import summary_markdown
from copyspec_engine.lab.evaluation.report.write import run_eval_report
from copyspec_engine.lab.evaluation.summary import complete_tasks, histogram, summary

Drafted = tuple[str, str, int, int, tuple[int, ...], float]
DRAFTED: tuple[Drafted, ...] = (
    ("81", "writing", 1, 10, (1, 1, 1, 1, 1), 0.5),
    ("81", "writing", 2, 20, (8, 4, 4, 0), 0.5),
    ("82", "math", 1, 10, (0,) * 10, 1.0),
    ("82", "math", 2, 20, (12, *(0,) * 7), 1.0),
)
"""(task, category, turn, tokens, accepted in each pass, seconds); plain decoding takes 0.1 s a token."""
GOLDEN = """\
# mt-redundant, drafter adaptive

- model: some/model
- device: cuda, bfloat16 on NVIDIA H200
- data: tasks.jsonl
- tasks: 2
- drafter options: min_match=3
- date: 2026-11-21T18:04:11+00:00
- command: `copyspec eval mt-redundant`
- versions: torch 2.13.0

## Figures by turn and category

| turn | category | tokens | tokens per forward | copied | tokens/s | over plain |
|---|---|---:|---:|---:|---:|---:|
| 1 | writing | 10 | 2.00 | 50.0% | 20.0 | 2.00x |
| 1 | math | 10 | 1.00 | 0.0% | 10.0 | 1.00x |
| 1 | all | 20 | 1.33 (1.00 to 2.00) | 25.0% | 13.3 | 1.33x (1.00 to 2.00) |
| 2 | writing | 20 | 5.00 | 80.0% | 40.0 | 4.00x |
| 2 | math | 20 | 2.50 | 60.0% | 20.0 | 2.00x |
| 2 | all | 40 | 3.33 (2.50 to 5.00) | 70.0% | 26.7 | 2.67x (2.00 to 4.00) |
| all | writing | 30 | 3.33 | 70.0% | 30.0 | 3.00x |
| all | math | 30 | 1.67 | 40.0% | 15.0 | 1.50x |
| all | all | 60 | 2.22 (1.67 to 3.33) | 55.0% | 20.0 | 2.00x (1.50 to 3.00) |

tokens/s count from the call to the last token; over plain is the ratio to plain decoding of this run. In \
brackets 95 % intervals by the bootstrap over conversations.

identical outputs: 2/2 (tasks, token for token, beside plain decoding)

## Metrics

| metric | value |
|---|---:|
| accuracy | 0.8125 |
| by category | {"math": 1} |

## Loops

| turn | run | answers that loop | tokens in loops | tokens per forward before | other answers | tokens per \
forward | over plain |
|---|---|---:|---:|---:|---:|---:|---:|
| 1 | adaptive | 0 of 2 | 0.0% | 1.33 | 20 | 1.33 (1.00 to 2.00) | 1.33x (1.00 to 2.00) |
| 2 | adaptive | 0 of 2 | 0.0% | 3.33 | 40 | 3.33 (2.50 to 5.00) | 2.67x (2.00 to 4.00) |
| all | adaptive | 0 of 4 | 0.0% | 2.22 | 60 | 2.22 (1.67 to 3.33) | 2.00x (1.50 to 3.00) |

A token is in a loop if it ends a run of 8 tokens that the answer held twice before. The last three columns \
leave out every answer with such a token, the one before them what follows it.

## Draft tokens accepted in a pass

| accepted tokens | passes |
|---|---:|
| 0 | 66.7% |
| 1 | 18.5% |
| 2 | 0.0% |
| 3-4 | 7.4% |
| 5-8 | 3.7% |
| 9-16 | 3.7% |

## Accepted tokens by source

| source | tokens | share |
|---|---:|---:|
| prompt | 33 | 100.0% |
"""


def facts_of(**changes: Any) -> RunFacts:
    values: dict[str, Any] = {
        "benchmark": "mt-redundant",
        "drafter": "adaptive",
        "drafter_options": {"min_match": 3},
        "writers": ("adaptive", "none"),
        "model": "some/model",
        "device": "cuda",
        "dtype": "bfloat16",
        "data": "tasks.jsonl",
        "num_tasks": 2,
        "max_new_tokens": 64,
        "step_cost": ((1, 0.01), (16, 0.011), (64, 0.014)),
        "command": "copyspec eval mt-redundant",
        "date": "2026-11-21T18:04:11+00:00",
        "versions": {"torch": "2.13.0"},
        "machine": {"cpu_cores": 16, "gpu": "NVIDIA H200"},
    }
    return RunFacts(**{**values, **changes})


def records_of(facts: RunFacts, drafted: Sequence[Drafted] = DRAFTED, *, timed: bool = True) -> list[TurnRecord]:
    return [
        TurnRecord(
            task=task,
            category=category,
            turn=turn,
            writer=writer,
            messages=({"role": "user", "content": "Again, please."},),
            text="...",
            token_ids=tuple(range(tokens)),
            prompt_tokens=5,
            finish_reason="stop",
            forward_passes=tokens if writer == "none" else len(accepted),
            accepted_lengths=() if writer == "none" else accepted,
            accepted_by_source={} if writer == "none" or not sum(accepted) else {"prompt": sum(accepted)},
            prefill_s=0.0 if timed else None,
            decode_s=(0.1 * tokens if writer == "none" else seconds) if timed else None,
            modelled_passes=None if timed else float(tokens if writer == "none" else len(accepted)),
        )
        for task, category, turn, tokens, accepted, seconds in drafted
        for writer in facts.writers
    ]


def written(folder: Path, records: Sequence[TurnRecord] | None = None, **changes: Any) -> RunFolder:
    run, facts = RunFolder(folder), facts_of(**changes)
    run.begin(facts, {})
    for record in records_of(facts) if records is None else records:
        run.append(record)
    return run


def figures_of(facts: RunFacts, records: Sequence[TurnRecord]) -> dict[str, Any]:
    return summary(facts, records, {"accuracy": 0.8125, "by category": {"math": 1}})


def reported(paths: Sequence[Path], markdown_path: Path | None = None, html_path: Path | None = None) -> str:
    console = Console(file=StringIO(), width=160)
    assert run_eval_report(ReportOptions(runs=tuple(paths), markdown=markdown_path, html=html_path), console) == 0
    output = console.file.getvalue()  # type: ignore[attr-defined]
    return str(output)


def table_of(paths: Sequence[Path], title: str) -> Table:
    return next(table for table in tables(load_runs(paths)) if title in table.title)


def test_the_summary_says_what_was_run_and_what_came_out() -> None:
    facts = facts_of()
    records = records_of(facts)
    assert summary_markdown(facts, records, figures_of(facts, records)) == GOLDEN


def test_what_was_not_timed_says_that_it_is_modelled() -> None:
    facts = facts_of(model="", device="", dtype="", machine={}, writers=("adaptive",))
    records = records_of(facts, timed=False)
    text = summary_markdown(facts, records, figures_of(facts, records))
    assert "| all | all | 60 | 2.22 (1.67 to 3.33) | 55.0% | - | 2.22x modelled |" in text
    assert "Nothing was timed" in text
    assert "- model: no model, recorded answers replayed\n" in text
    assert "- device" not in text
    assert "identical outputs" not in text


def test_a_run_of_plain_decoding_compares_with_nothing() -> None:
    facts = facts_of(drafter="none", writers=("none",), num_tasks=80)
    records = records_of(facts)
    text = summary_markdown(facts, records, {**figures_of(facts, records), "metrics": {}})
    assert "- tasks: 2 of 80 so far\n" in text
    for absent in ("identical outputs", "accepted", "Metrics"):
        assert absent not in text
    assert [plot.name for plot in run_plots(facts, records, figures_of(facts, records))] == ["tokens_per_forward"]


def test_plots_are_drawn_as_svg_and_png_with_their_numbers(tmp_path: Path) -> None:
    run, facts = RunFolder(tmp_path), facts_of()
    records = records_of(facts)
    paths = write_plots(run, facts, records, figures_of(facts, records))
    names = ("speedup", "tokens_per_forward", "accepted_lengths")
    assert paths == [tmp_path / "plots" / f"{name}.{ending}" for name in names for ending in ("svg", "png")]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[1::2])
    plots = run_plots(facts, records, figures_of(facts, records))
    assert [drawn_data(path) for path in paths[::2]] == [plot.data for plot in plots]
    speed = plots[0].charts[0]
    assert isinstance(speed, Bars)
    assert speed.groups == ("writing", "math", "all")
    assert speed.series == (("turn 1", (2.0, 1.0, 1.3333)), ("turn 2", (4.0, 2.0, 2.6667)))
    assert plots[0].caption.endswith("some/model, bfloat16, NVIDIA H200, 2026-11-21\ncopyspec eval mt-redundant")
    assert save(plots[0], tmp_path / "again.svg").read_bytes() == paths[0].read_bytes()


def test_plots_need_matplotlib_and_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = facts_of()
    records = records_of(facts)
    (tmp_path / "plots").write_text("a file", encoding="utf-8")
    with pytest.raises(ConfigError, match="Cannot write plot"):
        write_plots(RunFolder(tmp_path), facts, records, figures_of(facts, records))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        CopySpecError, match=re.escape('matplotlib is not installed. Run: pip install "copyspec[eval]"')
    ):
        write_plots(RunFolder(tmp_path), facts, records, figures_of(facts, records))
    with pytest.raises(CopySpecError, match="matplotlib is not installed"):
        reported([tmp_path], None, tmp_path / "out.html")


def test_a_file_that_is_no_plot_has_no_data(tmp_path: Path) -> None:
    for name, text in (("a.svg", "<svg"), ("b.svg", "<svg/>")):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert drawn_data(tmp_path / name) == ""
    assert drawn_data(tmp_path / "gone.svg") == ""


def test_accepted_lengths_are_counted_in_bins() -> None:
    record = records_of(facts_of(), [("1", "a", 1, 200, (0, 3, 4, 5, 64, 65, 300, 0), 1.0)])[0]
    shares = {"0": 0.25, "1": 0, "2": 0, "3-4": 0.25, "5-8": 0.125, "9-16": 0, "17-32": 0, "33-64": 0.125, "65+": 0.25}
    assert histogram([record]) == shares
    assert histogram([]) == {}


def test_a_task_is_complete_with_every_turn_of_every_writer() -> None:
    facts = facts_of()
    records = records_of(facts)
    assert complete_tasks(facts, records) == records
    assert complete_tasks(facts, records[:-1]) == records[:4]  # plain decoding did not write the last turn
    assert complete_tasks(facts, records[:-2]) == records[:4]  # nobody wrote it, but the other task has it
    first_turns = [record for record in records if record.turn == 1]
    assert complete_tasks(facts, first_turns) == []  # cut off before any second turn
    assert complete_tasks(facts_of(recorded=True), records[:-2]) == records[:4]
    assert complete_tasks(facts, []) == []


@pytest.fixture
def two_runs(tmp_path: Path) -> list[Path]:
    """A run, and one of another drafter that is slower and wrote one task otherwise."""
    first = written(tmp_path / "first")
    first.write_json("summary.json", figures_of(first.facts(), first.turns()))
    facts = facts_of(drafter="copyspec", writers=("copyspec", "none"))
    records = records_of(facts, [(*row[:5], 2 * row[5]) for row in DRAFTED])
    records[6] = records[6].model_copy(update={"token_ids": (*range(19), 7)})
    written(
        tmp_path / "second", records, drafter="copyspec", writers=("copyspec", "none"), step_cost=((1, 2.0), (8, 3.0))
    )
    return [tmp_path / "first", tmp_path / "second"]


def test_runs_are_compared_by_turn_and_category(two_runs: list[Path]) -> None:
    rows = table_of(two_runs, "mt-redundant by turn and category").rows
    assert rows[:2] == (
        ("1", "writing", "A", "10", "2.00", "50.0%", "20.0", "2.00x"),
        ("1", "writing", "B", "10", "2.00", "50.0%", "10.0", "1.00x"),
    )
    assert rows[-2:] == (
        ("all", "all", "A", "60", "2.22 (1.67 to 3.33)", "55.0%", "20.0", "2.00x (1.50 to 3.00)"),
        ("all", "all", "B", "60", "2.22 (1.67 to 3.33)", "55.0%", "10.0", "1.00x (0.75 to 1.50)"),
    )
    assert len(rows) == 18


def test_answers_are_compared_token_for_token(two_runs: list[Path]) -> None:
    assert table_of(two_runs, "Identical outputs").rows == (
        ("A and B", "adaptive and copyspec", "1/2", "task 82, turn 2"),
        ("A and B", "none", "2/2", ""),
    )
    facts = {row[0]: row[1:] for row in table_of(two_runs, "Runs").rows}
    assert facts["identical to plain"] == ("2/2", "1/2")
    assert facts["tasks"] == ("2", "2")


def test_costs_metrics_and_accepted_tokens_stand_side_by_side(two_runs: list[Path]) -> None:
    assert table_of(two_runs, "T(k)").rows == (
        ("1", "1.00x", "1.00x"),
        ("8", "-", "1.50x"),
        ("16", "1.10x", "-"),
        ("64", "1.40x", "-"),
    )
    assert table_of(two_runs, "Metrics").rows == (("accuracy", "0.8125", "-"), ("by category", '{"math": 1}', "-"))
    assert table_of(two_runs, "accepted in a pass").rows[0] == ("0", "66.7%", "66.7%")


def test_other_models_and_other_benchmarks_are_not_compared(tmp_path: Path) -> None:
    written(tmp_path / "a")
    written(tmp_path / "b", model="other/model")
    written(tmp_path / "c", benchmark="mt-bench")
    paths = [tmp_path / name for name in "abc"]
    assert table_of(paths, "Identical outputs").rows == (("A and B", "any", "-", "not compared: not the same model"),)
    assert [table.title for table in tables(load_runs(paths))][1:3] == [
        "mt-redundant by turn and category",
        "mt-bench by turn and category",
    ]


def test_an_unfinished_run_counts_with_its_complete_tasks(tmp_path: Path) -> None:
    facts = facts_of()
    whole, cut = written(tmp_path / "whole"), written(tmp_path / "cut", records_of(facts)[:-1])
    with cut.turns_path.open("a", encoding="utf-8") as file:
        file.write('{"task": "82", "cat')  # the process was killed here
    output = reported([whole.path, cut.path])
    assert "1 of 2, unfinished" in output
    table = table_of([whole.path, cut.path], "by turn and category")
    assert ("all", "writing", "B", "30", "3.33", "70.0%", "30.0", "3.00x") in table.rows
    assert not any(row[1:3] == ("math", "B") for row in table.rows)
    assert table.note.endswith("These runs do not hold the same tasks.")
    empty = written(tmp_path / "empty", [])
    assert "0 of 2, unfinished" in reported([empty.path], None, tmp_path / "empty.html")


def test_charts_show_each_turn_by_category(two_runs: list[Path]) -> None:
    found = charts(load_runs(two_runs))
    assert [chart.title for chart in found] == [
        "Speed over plain decoding: mt-redundant, turn 1",
        "Tokens per forward pass: mt-redundant, turn 1",
        "Speed over plain decoding: mt-redundant, turn 2",
        "Tokens per forward pass: mt-redundant, turn 2",
        "Draft tokens accepted in a pass",
        "T(k): cost of a verify pass",
    ]
    assert found[2].series == (("A", (4.0, 2.0, 2.6667)), ("B", (2.0, 1.0, 1.3333)))
    assert isinstance(found[-1], Lines)
    assert found[-1].series[1] == ("B", ((1, 1.0), (8, 1.5)))


def test_one_category_is_shown_by_turn(tmp_path: Path) -> None:
    one = [row for row in DRAFTED if row[1] == "math"]
    written(tmp_path / "one", records_of(facts_of(), one), num_tasks=1)
    chart = charts(load_runs([tmp_path / "one"]))[0]
    assert isinstance(chart, Bars)
    assert (chart.groups, chart.series) == (("turn 1", "turn 2", "all turns"), (("A", (1.0, 2.0, 1.5)),))


def test_speed_is_modelled_only_where_nothing_was_timed(tmp_path: Path) -> None:
    facts = facts_of()
    written(tmp_path / "timed")
    written(tmp_path / "replayed", records_of(facts, timed=False))
    (alone, _, *_), (both, _, *_) = (
        charts(load_runs([tmp_path / name for name in names])) for names in (["replayed"], ["timed", "replayed"])
    )
    assert (alone.title, alone.series[0][1]) == (
        "Modelled speed over plain decoding: mt-redundant, turn 1",
        (2.0, 1.0, 1.3333),
    )
    assert (both.title, both.series[1][1]) == ("Speed over plain decoding: mt-redundant, turn 1", (None, None, None))


class Page(HTMLParser):
    """Checks that elements end in the order in which they began."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_accessible_and_needs_no_network(two_runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.html"
    assert f"Wrote {out}" in reported(two_runs, None, out)
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert "http" not in text
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in page.tags if tag == "th")
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    named = [name for _, attrs in page.tags for name in (attrs.get("aria-labelledby") or "").split()]
    assert set(named) <= set(ids)
    pictures = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(pictures) == 6
    for picture in pictures:
        drawn = ElementTree.fromstring(picture)
        assert [child.tag for child in drawn[:2]] == ["title", "desc"]
        assert "A: " in (drawn[1].text or "")
        assert {"A", "B"} <= {element.text for element in drawn.iter("text")} or "A, B" in picture
    assert "color-scheme: light dark" in text


def test_what_a_run_calls_itself_is_text_and_no_markup(tmp_path: Path) -> None:
    written(tmp_path / "run", benchmark="<b>[bold]a|b", model="<script>")
    text = reported([tmp_path / "run"], tmp_path / "out.md", tmp_path / "out.html")
    assert "[bold]" in text
    assert "<script>" not in (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "| benchmark | <b>[bold]a\\|b |" in (tmp_path / "out.md").read_text(encoding="utf-8")


def test_markdown_holds_every_table(two_runs: list[Path], tmp_path: Path) -> None:
    reported(two_runs, tmp_path / "out.md")
    text = (tmp_path / "out.md").read_text(encoding="utf-8")
    found = tables(load_runs(two_runs))
    assert text.startswith("# copyspec eval: mt-redundant\n\n## Runs\n")
    assert all(markdown(table) in text for table in found)
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({line.count("|") - line.count("\\|") for line in block.splitlines()}) == 1


def test_folders_that_are_no_run_are_refused_in_one_line(tmp_path: Path) -> None:
    run = written(tmp_path / "run")
    broken = written(tmp_path / "broken")
    broken.write("turns.jsonl", "{}\n")
    no_summary = written(tmp_path / "no_summary")
    no_summary.write("summary.json", "[]")
    (tmp_path / "no_turns").mkdir()
    RunFolder(tmp_path / "no_turns").write("run.json", facts_of().model_dump_json())
    for paths, message in (
        ([tmp_path / "gone"], "gone, which holds no run"),
        ([run.path, run.path], "twice but expected each folder once"),
        ([run.path, tmp_path / "broken" / ".." / "run"], "twice but expected each folder once"),
        ([run.path, broken.path], "turns.jsonl line 1, which is no record of a turn"),
        ([no_summary.path], "summary.json, which is no summary of a run"),
        ([tmp_path / "no_turns"], "Cannot read"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)) as caught:
            reported(paths)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=re.escape("Got --html")):
        reported([run.path], None, tmp_path / "gone" / "out.html")


def test_figures_are_written_with_three_digits() -> None:
    assert [figure(value) for value in (None, 0.0, 1.5, 12.345, 999.6)] == ["-", "0.00", "1.50", "12.3", "1000"]
    assert [times(value) for value in (None, 1.0, 12.345)] == ["-", "1.00x", "12.3x"]
    assert [percent(value) for value in (None, 0.5)] == ["-", "50.0%"]


def test_conditions_name_the_hardware_and_the_command() -> None:
    machine = {"cpu_cores": 2, "cpu": "AMD EPYC", "gpu": "NVIDIA H200"}
    assert hardware(machine, "cuda:0") == "NVIDIA H200"
    assert hardware(machine) == "2 CPU threads (AMD EPYC)"
    assert hardware({"cpu_cores": 2, "gpu": None}, "cuda") == "2 CPU threads"
    command = "copyspec bench drafts --transcripts a b c --tokenizer 'my dir' --json out.json --ingredients"
    assert shortened(command) == "copyspec bench drafts --transcripts a ...(2 more) --tokenizer 'my dir' --ingredients"
    command = "python -m copyspec_engine eval gsm8k --limit 3 --output runs/a"
    assert shortened(command) == "python -m copyspec_engine eval gsm8k --limit 3"


def test_a_cell_stays_in_its_row() -> None:
    table = Table("T", ("category", "n"), (("a|b\nc", "1"),))
    assert markdown(table, level=0).splitlines()[2:] == ["| a\\|b c | 1 |"]
