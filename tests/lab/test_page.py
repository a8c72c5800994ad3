"""The provenance page says what the records say, whatever stands in their texts."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from copyspec_engine import ConfigError, EngineConfig
from copyspec_engine.cli.demo.chain import steps_for
from copyspec_engine.cli.documents import load_document
from copyspec_engine.cli.main import app
from copyspec_engine.lab.evaluation.records import RunFacts, RunFolder, TurnRecord
from copyspec_engine.lab.page import render_page, transcripts
from copyspec_engine.lab.page.explain import ExplainOptions, demo_records, run_explain
from copyspec_engine.lab.page.figures import Figures
from copyspec_engine.lab.page.passes import pass_ends
from copyspec_engine.testing import scripted_engine
from copyspec_engine.values.html import exact

DOCUMENT = "Ann books the room. Bo brings the slides."


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def copied(text: str, source: str, part: str, **place: Any) -> dict[str, Any]:
    """A span over the first `part` of an answer's text."""
    start = text.index(part)
    return {"start": start, "stop": start + len(part), "source": source, **place}


def record(text: str, *copies: dict[str, Any], messages: Sequence[dict[str, Any]] = (), **values: Any) -> TurnRecord:
    """An answer of eight tokens in three passes, which accepted three and two of them."""
    return TurnRecord(
        **{
            "task": "81",
            "category": "writing",
            "turn": 1,
            "writer": "adaptive",
            "messages": tuple(messages) or (user(DOCUMENT),),
            "text": text,
            "token_ids": tuple(range(8)),
            "prompt_tokens": 20,
            "finish_reason": "stop",
            "forward_passes": 3,
            "draft_lengths": (0, 4, 2),
            "accepted_lengths": (0, 3, 2),
            "accepted_by_source": {"prompt": 5},
            "copies": copies,
            "prefill_s": 0.1,
            "decode_s": 0.3,
            **values,
        }
    )


def page(*records: TurnRecord, writer: str = "adaptive") -> str:
    tasks = list(dict.fromkeys(record.task for record in records))
    return render_page("A run", ["a model"], writer, transcripts(records, writer, tasks))


def write(path: Path, *records: TurnRecord) -> Path:
    path.write_text("".join(f"{record.model_dump_json()}\n" for record in records), encoding="utf-8")
    return path


# Transcripts


def test_turns_that_follow_on_are_one_block_and_point_into_it() -> None:
    first, second = "Ann books the room.", "Bo brings the slides. Ann books the room."
    before = [user(DOCUMENT), assistant(first), user("And the slides?")]
    records = [
        record(first, copied(first, "prompt", first, message=0, offset=0)),
        record(
            second,
            copied(second, "prompt", "Bo brings", message=0, offset=20),
            copied(second, "prompt", "Ann books the", message=1, offset=0),
            messages=before,
            turn=2,
        ),
    ]
    (conversation,) = transcripts(records, "adaptive", ["81"])
    (block,) = conversation.blocks
    assert [(message.number, message.role, message.text) for message in block] == [
        *((number, message["role"], message["content"]) for number, message in enumerate(before)),
        (3, "assistant", second),
    ]
    places = [piece.place for piece in conversation.answers[1].pieces if piece.place]
    assert [place.message for place in places] == [block[0], block[1]]
    assert [(place.start, place.stop) for place in places] == [(20, 29), (0, 13)]


@pytest.mark.parametrize(
    "messages",
    [
        [user("Another text")],
        [user(DOCUMENT), assistant("not what was said"), user("And?")],
        [user(DOCUMENT), {"role": "user", "content": "Yes."}, user("And?")],
    ],
)
def test_a_call_that_does_not_follow_on_is_a_block_of_its_own(messages: list[dict[str, str]]) -> None:
    records = [record("Yes."), record("No.", messages=messages, turn=2)]
    (conversation,) = transcripts(records, "adaptive", ["81"])
    assert [len(block) for block in conversation.blocks] == [2, len(messages) + 1]
    assert conversation.blocks[1][0].number == 0


def test_each_writer_and_task_has_its_own_conversation() -> None:
    records = [record("a", task="1"), record("b", task="2"), record("c", task="1", writer="none")]
    found = transcripts(records, "adaptive", ["2", "1"])
    assert [(one.task, [answer.text for answer in one.answers]) for one in found] == [("2", ["b"]), ("1", ["a"])]
    assert [answer.plain for one in found for answer in one.answers] == [None, records[2]]


def test_turns_are_shown_in_order_whatever_the_order_of_the_lines() -> None:
    records = [record("two", turn=2), record("one", turn=1)]
    assert [answer.text for answer in transcripts(records, "adaptive", ["81"])[0].answers] == ["one", "two"]


def test_offsets_become_utf16_where_characters_take_two_units() -> None:
    text = "\U0001f600\U0001f600 room \U0001f600 end"
    answer = record(text, copied(text, "prompt", "room \U0001f600", message=0, offset=3), messages=[user(text)])
    (piece,) = [piece for piece in transcripts([answer], "adaptive", ["81"])[0].answers[0].pieces if piece.place]
    assert piece.place is not None
    units = text.encode("utf-16-le")
    assert units[2 * piece.place.start : 2 * piece.place.stop].decode("utf-16-le") == "room \U0001f600"
    assert piece.text == "room \U0001f600"


def test_spans_may_come_from_overlapping_places() -> None:
    text = "books the the room"
    spans = [
        copied(text, "prompt", "books the", message=0, offset=4),
        {"start": 10, "stop": 18, "source": "prompt", "message": 0, "offset": 10},
    ]
    pieces = transcripts([record(text, *spans)], "adaptive", ["81"])[0].answers[0].pieces
    assert [(piece.text, piece.place and piece.place.start) for piece in pieces] == [
        ("books the", 4),
        (" ", None),
        ("the room", 10),
    ]


def test_a_span_without_a_place_has_no_link_but_its_surroundings() -> None:
    text = "Ann sings"
    shown = page(record(text, copied(text, "earlier_answer", "sings", before="she <b>", after=" well")))
    assert 'href="#from-' not in shown
    assert 'data-before="she &lt;b&gt;" data-after=" well"' in shown
    assert "Copied from an earlier answer" in shown


def test_the_tab_key_passes_by_what_cannot_be_seen_or_says_no_more() -> None:
    text = "Ann\nbooks it"
    spans = [
        {"start": 0, "stop": 3, "source": "prompt", "message": 0, "offset": 0},
        {"start": 3, "stop": 4, "source": "prompt", "message": 0, "offset": 3},
        {"start": 4, "stop": 9, "source": "pool", "before": "x"},
        {"start": 10, "stop": 12, "source": "frequent"},
    ]
    shown = page(record(text, *spans, messages=[user(text)]))
    stops = re.findall(
        r'<(?:a|span) class="copy from-(\w+)" id="c\d+"(?: href="#from-c\d+")?(?: tabindex="(.*?)")?', shown
    )
    assert stops == [("prompt", ""), ("prompt", "-1"), ("pool", "0"), ("frequent", "")]


def test_a_span_of_the_answer_itself_points_into_the_answer() -> None:
    text = "la la land"
    (answer,) = transcripts(
        [record(text, {"start": 3, "stop": 6, "source": "answer", "offset": 0})], "adaptive", ["81"]
    )[0].answers
    assert answer.pieces[1].place is not None
    assert answer.pieces[1].place.message.key == answer.key


def test_parts_of_a_content_are_one_text_and_calls_are_shown() -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "Ann "}, {"type": "text", "text": "books"}]}
    calls = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "<i>"}}]}
    answer = record("books", copied("books", "prompt", "books", message=0, offset=4), messages=[parts, calls])
    shown = page(answer)
    assert ">Ann books</div>" in shown
    assert "&lt;i&gt;" in shown


# Broken records


@pytest.mark.parametrize(
    ("copy", "said"),
    [
        ({"start": 0, "stop": 3, "source": "prompt", "message": 4, "offset": 0}, "expected a place in one of its 1 "),
        ({"start": 0, "stop": 3, "source": "prompt", "message": 0, "offset": 39}, "expected a place in one of its 1 "),
        ({"start": 0, "stop": 3, "source": "prompt", "message": 0, "offset": 1}, "that place says 'nn ', not 'Ann'"),
        ({"start": 0, "stop": 30, "source": "grammar"}, "within its 10 characters"),
        ({"start": 3, "stop": 3, "source": "grammar"}, "expected them in order"),
        ({"start": 0, "stop": "x", "source": "grammar"}, "copies that are no spans: 0.stop"),
        ({"start": 0, "source": "grammar"}, "copies that are no spans: 0.stop"),
        ({"start": 0, "stop": 1, "source": "nowhere"}, "copies that are no spans: 0.source"),
    ],
)
def test_a_span_that_contradicts_the_texts_is_refused_with_its_line(copy: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=r"Got on line 2 ") as raised:
        page(record("fine", task="1"), record("Ann books.", copy))
    assert said in str(raised.value)


def test_spans_that_overlap_are_refused() -> None:
    spans = [{"start": 0, "stop": 4, "source": "grammar"}, {"start": 3, "stop": 5, "source": "grammar"}]
    with pytest.raises(ConfigError, match="in order, apart"):
        page(record("Ann books.", *spans))


# The file


NASTY = "</script><script>alert(1)</script> <img src=x onerror=alert(1)> \"quoted\" 'single' & &amp; {{ 7 * 7 }}"


def test_no_text_can_leave_its_place() -> None:
    answer = record(
        NASTY,
        copied(NASTY, "earlier_prompt", "<img", before=NASTY, after=NASTY),
        messages=[{"role": NASTY, "content": NASTY, "name": NASTY}],
        task=NASTY,
        category=NASTY,
    )
    shown = render_page(NASTY, [NASTY], NASTY, transcripts([answer], "adaptive", [NASTY]))
    assert shown.count("<script") == shown.count("</script") == 1
    assert "<img" not in shown
    assert "49" not in re.sub(r"(?s)<style>.*</style>|<script.*</script>", "", shown)
    for attribute in re.findall(r'data-(?:before|after)="([^"]*)"', shown):
        assert html.unescape(attribute) == NASTY


def test_texts_stand_in_the_page_character_by_character() -> None:
    assert exact("a\r\nb\rc\0<") == "a&#13;\nb&#13;c\N{REPLACEMENT CHARACTER}&lt;"


def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    shown = page(record("Ann"))
    assert "default-src 'none'" in shown
    assert not re.search(r"""(?:src|href)=["'](?!#|data:,)|url\(|@import|https?:""", shown)


def test_long_messages_are_folded_and_short_ones_are_not() -> None:
    shown = page(record("Ann", messages=[user("long " * 10_000), user("short")]))
    assert shown.count('class="text folded"') == 1
    assert "Show all 50,000 characters" in shown


def test_only_the_first_conversation_is_open_and_no_bar_is_in_the_file() -> None:
    shown = page(*(record("Ann", task=str(number)) for number in range(120)))
    assert shown.count("<details") == 120
    assert len(re.findall(r"<details[^>]* open", shown)) == 1
    assert 'class="pass"' not in shown


def test_the_legend_names_the_kinds_that_occur() -> None:
    legend = page(record("Ann", {"start": 0, "stop": 3, "source": "pool"})).split('class="legend"')[1].split("</ul>")[0]
    assert re.findall(r'class="copy from-(\w+)"', legend) == ["prompt", "pool"]


def test_an_answer_without_spans_says_that_they_are_missing() -> None:
    assert "not from where" in page(record("Ann"))
    assert "not from where" not in page(record("Ann", copied("Ann", "prompt", "Ann", message=0, offset=0)))


# Figures


def figures_of(*records: TurnRecord) -> Figures:
    return Figures.of(transcripts(records, "adaptive", ["81"])[0].answers)


def test_figures_are_sums_and_rates_of_sums() -> None:
    plain = record("Ann", writer="none", prefill_s=0.2, decode_s=1.4, accepted_lengths=(0,) * 8, forward_passes=8)
    found = figures_of(record("Ann"), plain)
    assert (found.tokens, found.passes, found.copied, found.by_source) == (8, 3, 5, {"prompt": 5})
    assert (found.tokens_per_forward, found.copied_share) == (8 / 3, 5 / 8)
    assert found.speedup == pytest.approx(4.0)
    assert found.same == 1


def test_other_tokens_than_plain_decodings_are_counted_as_such() -> None:
    assert figures_of(record("Ann"), record("Bob", writer="none", token_ids=(9,) * 8)).same == 0


def test_there_is_no_speedup_unless_both_wrote_every_turn() -> None:
    found = figures_of(record("Ann"), record("Ann", turn=2), record("Ann", writer="none"))
    assert (found.speedup, found.same, found.seconds) == (None, None, pytest.approx(0.8))


def test_where_no_model_ran_the_speedup_is_modelled() -> None:
    found = figures_of(record("Ann", prefill_s=None, decode_s=None, modelled_passes=4.0))
    assert (found.seconds, found.speedup, found.modelled_speedup) == (None, None, 2.0)
    assert "2.0x</b> plain, modelled" in page(record("Ann", prefill_s=None, decode_s=None, modelled_passes=4.0))


# The command


def explain(path: Path, output: Path, **options: Any) -> str:
    assert run_explain(ExplainOptions(EngineConfig(model="bundled"), output, path, **options), Console(quiet=True)) == 0
    return output.read_text(encoding="utf-8")


@pytest.fixture
def turns(tmp_path: Path) -> Path:
    records = [record(f"Answer {task}", task=task, writer=who) for task in "abc" for who in ("none", "adaptive")]
    return write(tmp_path / "turns.jsonl", *records)


def tasks_in(shown: str) -> list[str]:
    return re.findall(r'class="task">([^<]*)<', shown)


def test_the_runs_drafter_is_shown_unless_another_writer_is_asked_for(turns: Path, tmp_path: Path) -> None:
    assert "for the drafter adaptive" in explain(turns, tmp_path / "page.html")
    assert "for the drafter none" in explain(turns, tmp_path / "page.html", writer="none")


def test_conversations_can_be_picked(turns: Path, tmp_path: Path) -> None:
    assert tasks_in(explain(turns, tmp_path / "page.html")) == ["a", "b", "c"]
    assert tasks_in(explain(turns, tmp_path / "page.html", limit=2)) == ["a", "b"]
    assert tasks_in(explain(turns, tmp_path / "page.html", tasks=("c", "a"))) == ["a", "c"]


def test_a_folder_of_a_run_tells_what_was_run(turns: Path, tmp_path: Path) -> None:
    facts = RunFacts(
        benchmark="mt-bench",
        drafter="adaptive",
        writers=("adaptive",),
        model="some/model",
        data="x",
        num_tasks=3,
        max_new_tokens=8,
        command="copyspec eval",
        date="2026-01-02T03:04:05",
    )
    RunFolder(tmp_path).write_json("run.json", facts.model_dump(mode="json"))
    shown = explain(tmp_path, tmp_path / "page.html")
    assert "<h1>mt-bench</h1>" in shown
    assert "some/model" in shown


def test_a_tokenizer_tells_what_each_pass_wrote(tmp_path: Path) -> None:
    from copyspec_engine.lab.replay import load_tokenizer

    text = "Ann books the room"
    token_ids = tuple(load_tokenizer("bundled").encode(text, add_special_tokens=False).ids)
    accepted = (0, len(token_ids) - 2)
    answer = record(text, token_ids=token_ids, forward_passes=2, draft_lengths=accepted, accepted_lengths=accepted)
    path = write(tmp_path / "turns.jsonl", answer)
    assert 'data-ends=""' in explain(path, tmp_path / "page.html")
    (ends,) = re.findall(r'data-ends="(\d+) (\d+)"', explain(path, tmp_path / "page.html", tokenizer="bundled"))
    assert 0 < int(ends[0]) < int(ends[1]) == len(text)


def decode_bytes(token_ids: Sequence[int]) -> str:
    return bytes(token_ids).decode(errors="replace")


def test_a_character_that_two_passes_wrote_belongs_to_the_second() -> None:
    text = "né!"
    answer = record(text, token_ids=tuple(text.encode()), forward_passes=2, accepted_lengths=(1, 1))
    assert pass_ends(answer, decode_bytes) == (1, 3)


def test_passes_of_tokens_that_do_not_give_the_text_are_not_known() -> None:
    answer = record("cut", token_ids=tuple(b"cut off"), forward_passes=2, accepted_lengths=(2, 3))
    assert pass_ends(answer, decode_bytes) == ()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"limit": 0}, "Got --limit 0 but expected at least 1"),
        ({"tasks": ("d",)}, "Got --task d but expected one of a, b, c"),
        ({"writer": "copyspec"}, "Got --writer copyspec but expected one of none, adaptive"),
        ({"demo": True}, "expected either the turns.jsonl of a run, or --demo"),
        ({"tokenizer": "/nowhere"}, "Got tokenizer /nowhere"),
    ],
)
def test_bad_options_are_refused(turns: Path, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        explain(turns, tmp_path / "page.html", **options)
    assert not (tmp_path / "page.html").exists()


def test_two_drafters_in_one_file_have_to_be_told_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "turns.jsonl", record("a"), record("a", writer="copyspec"))
    with pytest.raises(ConfigError, match="answers of the writers adaptive, copyspec: choose one"):
        explain(path, tmp_path / "page.html")


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, ["explain", *words])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no answer"),
        ('{"role": "user"}\n', "line 1, which is no record of a turn"),
        ("not JSON\n", "line 1, which is no record of a turn"),
        ("{good}\n[1, 2]\n", "line 2, which is no record of a turn"),
        ("{good}\n\n", "line 2, which is no record of a turn"),
        (b"\xff\xfe\0\n", "line 1, which is no record of a turn"),
    ],
)
def test_anything_else_than_records_is_an_error_that_names_the_line(
    tmp_path: Path, content: str | bytes, said: str
) -> None:
    path = tmp_path / "some.jsonl"
    good = record("Ann").model_dump_json()
    path.write_bytes(content if isinstance(content, bytes) else content.replace("{good}", good).encode())
    result = invoke(str(path), "-o", str(tmp_path / "page.html"))
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "page.html").exists()


def test_the_command_writes_the_page_and_says_so(turns: Path, tmp_path: Path) -> None:
    result = invoke(str(turns), "-o", str(tmp_path / "page.html"), "--task", "a", "--task", "b", "--limit", "1")
    assert result.exit_code == 0, result.stderr
    assert "page.html: 1 answer in 1 conversation" in result.stdout
    assert tasks_in((tmp_path / "page.html").read_text()) == ["a"]


@pytest.mark.parametrize("words", [("missing.jsonl", "-o", "page.html"), ("-o", "page.html"), ("--demo", "-o", "no/p")])
def test_what_cannot_work_ends_with_2(words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke(*words).exit_code == 2


def test_the_demo_writes_the_chain_with_and_without_drafting() -> None:
    document = load_document(None)
    steps = steps_for(document)[:2]
    first = steps[0].apply(document.text)
    answers = {steps[0].instruction: first, steps[1].instruction: steps[1].apply(first)}

    def reply(prompt: str) -> str:
        return next((answers[asked] for asked in reversed(answers) if f"{asked}<|im_end|>" in prompt), "warm")

    told: list[str] = []
    with scripted_engine(reply, EngineConfig(model="scripted", max_model_len=20_000)) as engine:
        records = demo_records(engine, document, steps, told.append)
    assert [(record.turn, record.writer) for record in records] == [
        (1, "adaptive"),
        (1, "none"),
        (2, "none"),
        (2, "adaptive"),
    ]
    assert len(told) == 2
    (conversation,) = transcripts(records, "adaptive", [document.name])
    assert [answer.text for answer in conversation.answers] == list(answers.values())
    assert len(conversation.blocks) == 1
    assert Figures.of(conversation.answers).same == 2
    assert json.loads(records[0].model_dump_json())["copies"]
