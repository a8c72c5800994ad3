"""`copyspec bench report`: tables and plots are what the result files give, and whatever differs is found."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import pytest
import torch
from typer.testing import CliRunner, Result

from copyspec_engine.cli.main import app
from copyspec_engine.lab.display.charts import Bars, Lines, Plot
from copyspec_engine.lab.display.plots import DESCRIPTION, drawn_data, figure_of, save
from copyspec_engine.lab.display.tables import Table
from copyspec_engine.lab.evaluation.records import RunFacts
from copyspec_engine.lab.measuring import machine
from copyspec_engine.lab.results import fill
from copyspec_engine.lab.results.files import KINDS, load_results
from copyspec_engine.lab.results.fill import BLOCK, BLOCKS, COMMANDS, PLOTS

ROOT = Path(__file__).parents[2]
CPU = {"cpu_cores": 2, "cpu": "AMD EPYC"}
H200 = {"cpu_cores": 16, "gpu": "NVIDIA H200"}
EMPTY = "# Figures\n\n{}\nBehind them.\n"


def drafts(tokens: dict[str, float], *, curve: str = "gpu", history: str = "full", **more: Any) -> dict[str, Any]:
    """One source, tokens per forward of each drafter; half of it is the modelled speed."""
    rows = [
        {"source": "chats", "drafter": name, "tokens_per_forward": value, "modelled_speedup": value / 2}
        for name, value in tokens.items()
    ]
    ratio = {"ratio": tokens["adaptive"] / tokens.get("arctic-tuned", 1.0)}
    return {
        "results": rows,
        "comparison": [{"source": "chats", "tokens_per_forward": ratio, "modelled_speedup": {"ratio": 1.25}}],
        "cost_model": curve,
        "history": history,
        "max_tokens": 100,
        "tokenizer": "bundled",
        "command": f"copyspec bench drafts --transcripts a b c --cost-model {curve} --json out.json",
        "machine": CPU,
        **more,
    }


def engine(*turns: tuple[int, int, dict[str, float]], at_once: int = 1, **more: Any) -> dict[str, Any]:
    """Turns of one source: (turn, prompt tokens, seconds of each peer); ten tokens in each, ours in two passes."""
    results = [
        {
            "source": "chats",
            "conversation": 1,
            "turn": turn,
            "peer": peer,
            "concurrency": at_once,
            "prompt_tokens": prompt,
            "tokens": 10,
            "forward_passes": 2 if peer == "ours" else 10,
            "seconds": seconds,
            "tokens_per_s": 10 / seconds,
            "tokens_per_forward": 5.0 if peer == "ours" else 1.0,
        }
        for turn, prompt, peers in turns
        for peer, seconds in peers.items()
    ]
    return {
        "results": results,
        "summary": [{**row, "over_generate": 1 / row["seconds"]} for row in results],
        "shape": "bundled",
        "device": "cpu",
        "dtype": "float32",
        "command": "copyspec bench engine --json out.json",
        "machine": CPU,
        "date": "2026-11-20T10:00:00+00:00",
        **more,
    }


def run_summary() -> dict[str, Any]:
    facts = RunFacts(
        benchmark="gsm8k",
        drafter="adaptive",
        writers=("adaptive", "none"),
        model="some/model",
        device="cuda",
        dtype="bfloat16",
        data="gsm8k.jsonl",
        num_tasks=4,
        max_new_tokens=64,
        command="copyspec eval gsm8k",
        date="2026-11-21T10:00:00+00:00",
        machine=H200,
    )
    rows = [
        {
            "turn": turn,
            "category": "all",
            "tokens": 100,
            "tokens_per_s": 50.0,
            "tokens_per_forward": 2.0,
            "copied_share": 0.5,
            "speedup": speed,
            "modelled_speedup": None,
        }
        for turn, speed in ((1, 1.5), (2, 3.0), ("all", 2.0))
    ]
    record = {"benchmark": "gsm8k", "drafter": "adaptive", "model": "some/model", "metrics": {"accuracy": 0.75}}
    return {**record, "rows": rows, "identical": {"same": 4, "of": 4}, "facts": facts.model_dump(mode="json")}


def free_run(drafter: str, passes: float, speed: float) -> dict[str, Any]:
    """A run of one turn and category in which the model wrote freely, transformers beside it."""
    whole = run_summary()
    interval = {"speedup_interval": [1.1, 2.9]}
    peer = {"tokens_per_s": 20.0, "speedup": 2.5, **interval, "identical": {"same": 7, "of": 8}}
    row = {
        **whole["rows"][0],
        "category": "code",
        "tokens_per_forward": passes,
        "speedup": speed,
        **interval,
        "answers": 8,
        "looping_answers": 2,
        "loop_share": 0.125,
        "tokens_per_forward_before_loops": 2.75,
        "without_loops": {"tokens": 80, "tokens_per_forward": 2.0, "speedup": 1.75, **interval},
        "peers": {"generate": peer} if drafter == "adaptive" else {},
    }
    record = {"benchmark": "humaneval", "drafter": drafter, "model": "some/model", "metrics": {}, "num_tasks": 8}
    facts = {**whole["facts"], "benchmark": "humaneval", "drafter": drafter}
    return {**record, "rows": [row, {**row, "turn": "all"}], "identical": {"same": 8, "of": 8}, "facts": facts}


def recorded(drafter: str, model: str, passes: float, speed: float | None) -> dict[str, Any]:
    """A run of recorded answers of one category, through a drafter or a shape."""
    whole = run_summary()
    row = {**whole["rows"][0], "category": "stem", "tokens_per_forward": passes, "speedup": speed}
    facts = {**whole["facts"], "benchmark": "mt-bench", "drafter": drafter, "model": model, "recorded": True}
    record = {"benchmark": "mt-bench", "drafter": drafter, "model": model, "metrics": {}}
    return {**record, "rows": [row, {**row, "turn": "all"}], "identical": {"same": 0, "of": 0}, "facts": facts}


PEERS = (
    ("llama", 2.0, False),
    ("ours", 1.0, True),
    ("ours-langchain", 1.25, True),
    ("ours-plain", 4.0, True),
    ("llama-langchain", 2.5, False),
)
"""Who wrote, the seconds of each turn, and whether it was the answer of plain decoding."""
ALL: dict[str, dict[str, Any]] = {
    "drafts_gpu": drafts({"none": 1.0, "copyspec": 1.5, "arctic-tuned": 2.0, "adaptive": 3.0}),
    "drafts_cpu": drafts({"arctic-tuned": 2.0, "adaptive": 2.5}, curve="cpu"),
    "history": drafts({"adaptive": 2.8, "adaptive-no-memory": 1.4}, history="last-turn"),
    "ingredients": drafts({"adaptive": 3.0, "adaptive-no-tree": 2.4}),
    "propose": {
        "results": [
            {
                "memory_tokens": 16_000,
                "propose_us_p50": 52.6,
                "propose_us_p99": 388.8,
                "index_ms": 35.0,
                "bytes_per_token": 100.0,
            }
        ],
        "indexed_tokens": 100_000,
        "tokenizer": "bundled",
        "command": "copyspec bench propose",
        "machine": CPU,
    },
    "context": {
        "results": [
            {
                "length": length,
                "way": way,
                "turns": 2,
                "prompt_tokens": length + 10,
                "tokens": 64,
                "tokens_per_forward": passes,
                "tokens_per_s": speed,
                "loop_share": 0.125,
            }
            for length in (500, 1000)
            for way, passes, speed in (("generate", 1.0, 5.0), ("ours", 4.0, 30.0), ("plain", 1.0, 10.0))
        ],
        "lengths": [500, 1000],
        "documents": ["article.txt"],
        "model": "some/model",
        "device": "cpu",
        "dtype": "float32",
        "command": "copyspec bench context --model some/model",
        "machine": CPU,
    },
    "demo": {
        "turns": [
            {
                "edit": "append",
                "tokens": 100,
                "forward_passes": 5,
                "seconds": 1.0,
                "plain_seconds": 4.0,
                "llama_cpp_seconds": 2.0,
                "llama_cpp_tokens": 50,
                "identical": True,
            }
        ],
        "framework": "langchain",
        "model": "some/model",
        "device": "cpu",
        "dtype": "float32",
        "command": "copyspec demo --compare",
        "machine": CPU,
    },
    "peers": {
        "results": [
            {
                "peer": peer,
                "kind": "rewrite",
                "conversation": "letter.txt",
                "turn": turn,
                "tokens": 100,
                "seconds": seconds,
                "ttft_s": 0.25,
                "same_as_plain": same,
            }
            for peer, seconds, same in PEERS
            for turn in (1, 2)
            if (peer, turn) != ("llama", 2)
        ],
        "memory": [
            {"process": "copyspec", "peers": ["ours", "ours-langchain", "ours-plain"], "peak_bytes": 1_234_000_000},
            {"process": "llama", "peers": ["llama"], "peak_bytes": None},
        ],
        "left_out": {"llama": "llama-server gave no answer"},
        "threads": 2,
        "max_tokens": 256,
        "model": "models/some.gguf",
        "device": "cpu",
        "dtype": "float32",
        "command": "copyspec bench peers --model some.gguf",
        "machine": CPU,
    },
    "serve": {
        "results": [
            {
                "clients": 2,
                "batch": number,
                "way": way,
                "tokens": 100,
                "chunks": 25,
                "seconds": seconds,
                "ttft_s": ttft_s,
                "loop_s": loop_s,
                "process_s": 1.0,
                "client_cpu_s": client_cpu_s,
            }
            for number in (0, 1)
            for way, seconds, ttft_s, loop_s, client_cpu_s in (
                ("in-process", 1.0, [0.020, 0.040], 0.010, 0.0),
                ("http", 1.25, [0.024, 0.044], 0.016, 0.002),
            )
        ],
        "rounds": 2,
        "max_tokens": 50,
        "threads": 2,
        "different": 0,
        "model": "some/model",
        "device": "cpu",
        "dtype": "float32",
        "command": "copyspec bench serve --model some/model",
        "machine": CPU,
    },
    "scale_sim": {
        "results": [
            {
                "policy": policy,
                "steady": {"kv": kv, "file": file, "store": 1.0, "second": 0.0},
                "scaling": {"kv": 0.9, "file": file, "store": 0.9996, "second": 0.0},
                "moved": moved,
                "busiest": 1.25,
                "busiest_at_once": 2.0,
                "wait_s": 0.25,
                "longest_wait_s": 12.0,
            }
            for policy, kv, file, moved in (
                ("rendezvous", 0.9912, 0.9998, {"out": 0.0909, "in": 0.0909}),
                ("random", 0.0101, None, {"out": None, "in": None}),
            )
        ],
        "replicas": 1000,
        "conversations": 10_000_000,
        "calls": 1.0,
        "lost": 0.01,
        "grow": 0.1,
        "seed": 0,
        "command": "copyspec bench scale-sim",
        "machine": CPU,
    },
    "scale_drill": {
        "drills": {
            "sticky": {"held": True, "broken": [], "calls": 10_000, "sticky_hit_rate": 1.0},
            "lost": {
                "held": False,
                "broken": ["a stream takes back what it has said"],
                "streams_lost": 3,
                "streams_of_survivor": 24,
                "next_call_s": [{"median": 0.2, "longest": 0.5}, {"median": 0.2, "longest": 1.25}],
                "replaced_after_s": [9.0, 12.5],
                "copied_from_memory": 5640,
            },
            "scale": {"held": True, "broken": [], "kept": [{"from": 1, "to": 2, "kept": 0.5, "calls_meanwhile": 10}]},
            "speed": {
                "front": {"replicas_1": {"tokens_per_s": 200.0}, "replicas_2": {"tokens_per_s": 350.0}, "speedup": 1.75}
            },
        },
        "pass_s": 0.004,
        "command": "python -m scripts.scale_drill",
        "machine": CPU,
    },
    "serve_drill": {
        "drills": {
            "load": {
                "clients": 64,
                "minutes": 10.0,
                "counts": {
                    "answers compared": 1234,
                    "left before the first byte": 5,
                    "left in the middle of a stream": 6,
                    "malformed calls": 7,
                    "half bodies": 8,
                },
                "statuses": {"200": 1300, "400": 9, "429": 20, "503": 1},
                "broken": {"wrong answers": 2},
                "health": {"asked": 100, "median_s": 0.002, "p99_s": 0.05, "max_s": 0.25},
                "memory": {"first_third_mb": 1500.0, "last_third_mb": 1510.0},
                "peaks": {"sessions": 24.0},
                "left": {'kv_slots{state="running"}': 3.0},
            }
        },
        "model": "some/model",
        "command": "python -m scripts.serve_drill load",
        "machine": CPU,
    },
    "free_text": {
        "results": [
            {
                "temperature": 0.0,
                "way": "copies and recycled",
                "tokens": 1000,
                "forward_passes": 625,
                "seconds": 12.5,
                "tokens_per_forward": 1.6,
                "tokens_per_s": 80.0,
                "over_plain": 1.25,
            }
        ],
        "prompts": 6,
        "rounds": 2,
        "cost_model": "measured",
        "model": "bundled",
        "device": "cpu",
        "dtype": "float32",
        "command": "copyspec bench free-text",
        "machine": CPU,
        "date": "2026-11-21T10:00:00+00:00",
    },
    "lossless": {
        "cases": 2000,
        "differences": 3,
        "differences_per_1000_tokens": 0.1234,
        "tokens": 25_000,
        "by_feature": {"greedy": {"cases": 900, "differences": 3}},
        "model": "some/model",
        "device": "cpu",
        "dtype": "bfloat16",
        "exact": False,
        "command": "copyspec bench lossless",
        "machine": CPU,
    },
    "engine": engine(
        (1, 5, {"ours": 1.0, "ours-plain": 1.0, "generate": 2.0}),
        (2, 25, {"ours": 0.5, "ours-plain": 2.0, "generate": 4.0}),
        (3, 45, {"ours": 0.5, "generate": 6.0}),
    ),
    "engine_at_once": engine((1, 5, {"ours": 1.0, "generate-batch": 3.0}), at_once=2),
    "engine_draft": engine(
        (2, 25, {"ours-plain": 1.0, "ours": 0.5, "ours-draft": 0.8, "ours-tree": 0.4}),
        draft_shape="bundled",
        agreement=0.7,
    ),
    "eval_gsm8k": run_summary(),
    "eval_humaneval_adaptive": free_run("adaptive", 3.0, 2.5),
    "eval_humaneval_copyspec": free_run("copyspec", 1.5, 1.25),
}
ALL["engine_at_once"]["concurrency"] = [
    {"source": "chats", "peer": peer, "concurrency": at_once, "tokens_per_s": speed}
    for peer, at_once, speed in (("ours", 1, 10.0), ("ours", 2, 15.0), ("generate-batch", 2, 5.0))
]


def not_drawn(plot: Plot, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'<svg xmlns:dc="{DESCRIPTION[1:-12]}"><dc:description>{escape(plot.data)}</dc:description></svg>')
    return path


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """report(*words) runs the command in a folder with results of every kind and a page with every block.

    Plots are written without a drawing, which takes long.
    """
    monkeypatch.setattr(fill, "save", not_drawn)
    monkeypatch.chdir(tmp_path)
    Path("benchmarks/results").mkdir(parents=True)
    for name, record in ALL.items():
        Path(f"benchmarks/results/{name}.json").write_text(json.dumps(record), encoding="utf-8")
    blocks = "\n".join(f"<!-- bench: begin {name} -->\n<!-- bench: end -->\n" for name in (*BLOCKS, COMMANDS))
    Path("README.md").write_text(EMPTY.format(blocks), encoding="utf-8")

    def run(*words: str) -> Result:
        return CliRunner().invoke(app, ["bench", "report", "--page", "README.md", *words])

    return run


def tables_of(name: str) -> list[Table]:
    return BLOCKS[name](load_results(Path("benchmarks/results")))


def block_of(name: str) -> str:
    found = {block[2]: block[3] for block in BLOCK.finditer(Path("README.md").read_text(encoding="utf-8"))}
    return str(found[name])


def test_every_kind_of_result_comes_into_its_block(report: Callable[..., Result]) -> None:
    result = report()
    assert result.exit_code == 0, result.output
    expected = {
        "drafts": "| chats | 1.50 | - | 2.00 | **3.00** | 1.50x | 1.25x | 1.25x | 1.40 | 2.80 |",
        "history": "| chats | 1.40 | 2.80 |",
        "ingredients": "| chats | 3.00 / 1.50 | -20.0% / -20.0% |",
        "propose": "| 16,000 | 53 us | 389 us | 35 ms | 2 MB |",
        "context": "| some/model | 1,010 | 2 | **30.0** | 10.0 | 5.00 | 3.00x | 6.00x | 4.00 | 12.5% |",
        "demo": "| 1, append | **100** | 25.0 | 25.0 |",
        "peers": "|  | over plain decoding | over llama.cpp | over llama.cpp in LangChain |",
        "serve": "| 2 | 4 | 4.00 | 100 | 80.0 | 80.0% (80.0% to 80.0%) |",
        "scale-sim": "| rendezvous | 99.120% | 99.980% | 100.0% | 0.0% | 1.25x | 2.00x | 0.2 s | 12.0 s |",
        "serve-drill": "| answers compared with plain decoding | 1,234 |",
        "scale-drill": "| sticky | yes | 10,000 calls, 100.0% where the one before was |",
        "free-text": "| measured | 0 | copies and recycled | 1,000 | 1.60 | 80.0 | 1.25x |",
        "lossless": "| some/model | bfloat16 | no | 2,000 | 25,000 | 3 | 0.12 |",
        "engine": "| chats | 2 | 10 | **20.0** | 5.00 | 2.50 | 4.00x | 8.00x | 5.00 |",
        "draft-models": "| chats | 2 | 0.7 | 10.0 | 2.00x | 1.25x | - | 2.50x | - | 2.00x |",
        "speed": "| chats | 2 to 3 | **20.0** | 4.00x | 10.0x | - | 5.00 |",
        "eval": "| gsm8k | adaptive | all | 100 | 2.00 | 50.0% | 50.0 | 2.00x | 4/4 | accuracy 0.75 |",
        "free-eval": "| humaneval | 1 | 8 | 1.50 | 3.00 | 1.25x (1.10 to 2.90) | 2.50x (1.10 to 2.90) | 8/8 |",
        "reproduction": "",
        "reproduction-categories": "",
    }
    assert set(expected) == set(BLOCKS)
    for name, row in expected.items():
        assert row in block_of(name)
    assert "| 1, append | 4.00x | 4.00x | 1/1 |" in block_of("demo")
    assert "| humaneval | 1 | 12.5% | 2.75 | 6 of 8 | 2.00 | 1.75x |" in block_of("free-eval")
    text = Path("README.md").read_text(encoding="utf-8")
    assert text.startswith("# Figures\n\n<!-- bench: begin drafts -->\n|")
    assert text.endswith("<!-- bench: end -->\n\nBehind them.\n")


def test_evaluation_runs_share_a_table_if_they_were_measured_alike(report: Callable[..., Result]) -> None:
    for place in ("first", "second"):
        run = run_summary()
        run["facts"] = {**run["facts"], "date": "2026-11-25T10:00:00+00:00"}
        run["metrics"], run["identical"] = {}, {"same": 0, "of": 0}
        Path(f"benchmarks/results/eval_{place}.json").write_text(json.dumps(run), encoding="utf-8")
    assert report().exit_code == 0
    table = next(table for table in tables_of("eval") if "2026-11-25" in table.title)
    assert len(table.rows) == 6
    assert not {"identical", "metrics"} & set(table.headings)
    assert "`eval_first.json`, `eval_second.json`" in table.note


def test_recorded_answers_of_the_paper_and_of_ours_share_a_row(report: Callable[..., Result]) -> None:
    runs = {
        "eval_paper": recorded("copyspec", "", 1.1, None),
        "eval_ours": recorded("adaptive", "", 1.7, None),
        "eval_ours_timed": recorded("adaptive", "shape bundled", 1.5, 1.4),
    }
    for name, record in runs.items():
        Path(f"benchmarks/results/{name}.json").write_text(json.dumps(record), encoding="utf-8")
    assert report().exit_code == 0
    assert "| mt-bench | 1 | 1.10 | 1.70 | - | 1.40x |\n| mt-bench | all | 1.10" in block_of("reproduction")
    assert "| mt-bench | 1 | stem | 1.10 | 1.70 | - | 1.40x |\n\n" in block_of("reproduction-categories")


def test_each_table_says_where_its_figures_come_from(report: Callable[..., Result]) -> None:
    assert report().exit_code == 0
    assert "2 CPU threads (AMD EPYC), date not recorded: `drafts_gpu.json`" in block_of("drafts")
    assert "Bundled, float32, 2 CPU threads (AMD EPYC), 2026-11-20: `engine.json`." in block_of("engine")
    assert "Some/model, bfloat16, NVIDIA H200, 2026-11-21: `eval_gsm8k.json`," in block_of("eval")
    for name, command in (
        ("drafts_gpu.json", "copyspec bench drafts --transcripts a b c --cost-model gpu --json out.json"),
        ("eval_gsm8k.json", "copyspec eval gsm8k"),
    ):
        files = next(part for part in block_of(COMMANDS).split("```\n\n") if f"`{name}`" in part)
        assert files.removesuffix("```\n").splitlines()[-2:] == ["```bash", command]


def test_peers_are_compared_where_both_wrote_and_frameworks_with_each_other(report: Callable[..., Result]) -> None:
    assert report().exit_code == 0
    speeds, ratios, counts = block_of("peers").split("*\n\n")[1:]
    shown = [[line.strip("| ").split(" | ") for line in part.splitlines()] for part in (speeds, ratios)]
    column = 1 + shown[0][0].index("llama.cpp")  # headings lack the empty one
    assert [row[column] for row in shown[0][2:5]] == ["50.0", "-", "50.0"]
    assert [row[0] for row in shown[0][2:5]] == ["rewrite 1", "rewrite 2", "all"]
    assert shown[1][0] == ["over plain decoding", "over llama.cpp", "over llama.cpp in LangChain"]
    assert [row[1:] for row in shown[1][2:5]] == [
        ["4.00x", "2.00x", "2.00x"],
        ["4.00x", "-", "2.00x"],
        ["4.00x", "2.00x", "2.00x"],
    ]
    assert "| copyspec | 2 | 250 ms | 2/2 | 1,234 MB |" in counts
    assert "| llama.cpp | 1 | 250 ms | 0/1 | - |" in counts
    assert "2 CPU threads (AMD EPYC), date not recorded: `peers.json`." in counts


def test_a_server_is_compared_with_its_engine(report: Callable[..., Result]) -> None:
    assert report().exit_code == 0
    first, processor = block_of("serve").split("*\n\n")[2:]
    assert "| 2 | 30.0 | 34.0 | 4.00 (4.00 to 4.00) | 40.0 | 44.0 |" in first
    assert "| 2 | 3.00 | 60.0 | 20.0 |" in processor
    assert "2 CPU threads (AMD EPYC), date not recorded: `serve.json`." in processor


def test_a_drill_shows_what_must_not_be_beside_what_was_seen(report: Callable[..., Result]) -> None:
    assert report().exit_code == 0
    lines = (line.strip("| ") for line in block_of("serve-drill").splitlines())
    shown = dict(line.split(" | ") for line in lines if " | " in line)
    assert shown["of them wrong"] == "2"
    assert shown["texts that held another tenant's word"] == "0"
    assert shown["clients that left before their answer was whole"] == "11"
    assert shown["calls refused for now, by 429 or 503 with Retry-After"] == "21"
    assert shown["KV slots that calls hold once all clients have gone"] == "3"
    assert shown["/health: median, 99th percentile and longest, ms"] == "2.00, 50.0, 250"
    assert [value for name, value in shown.items() if name.startswith("memory ")] == ["1500, 1510"]


def test_drills_of_replicas_show_what_did_not_hold_and_the_longest_times(report: Callable[..., Result]) -> None:
    assert report().exit_code == 0
    shown = block_of("scale-drill")
    assert (
        "| lost | no | 3 streams lost, 24 of the survivor whole; next calls answered after 1.25 s at most; replaced "
        "after 12.5 s at most; 5,640 characters copied from what calls did not show |"
    ) in shown
    assert "| scale | yes | 1 to 2: 50.0% stay |" in shown
    assert "| behind a front | 200 | 350 | 1.75x |" in shown
    assert "| speed |" not in shown


def test_files_of_one_run_share_its_command(report: Callable[..., Result]) -> None:
    command = f"copyspec bench lossless --seed {'1' * 60} --seed {'2' * 60}"
    for name in ("twice_a", "twice_b"):
        path = Path(f"benchmarks/results/{name}.json")
        path.write_text(json.dumps({**ALL["lossless"], "command": command}), encoding="utf-8")
    assert report().exit_code == 0
    shown = command.replace(" --seed 2", " \\\n  --seed 2")
    assert f"`twice_a.json`, `twice_b.json`\n\n```bash\n{shown}\n```\n" in block_of(COMMANDS)


def test_conversations_at_once_are_compared_to_one_by_one(report: Callable[..., Result]) -> None:
    assert report().exit_code == 0
    assert "| chats | 2 | copyspec | 15.0 | 1.50x | 3.00x |" in block_of("engine")
    assert "| chats | 1, 2 at once | **15.0** | - | - | 3.00x | 5.00 |" in block_of("speed")


def test_machines_do_not_share_a_table(report: Callable[..., Result]) -> None:
    other = engine((1, 5, {"ours": 0.1, "generate": 0.2}), device="cuda:0", dtype="bfloat16", machine=H200)
    Path("benchmarks/results/engine_gpu.json").write_text(json.dumps(other), encoding="utf-8")
    result = report()
    assert "Wrote docs/plots/context_bundled_cuda_bfloat16.svg" in result.output.replace("\\", "/")
    titles = [table.title for table in tables_of("engine")]
    assert titles == [
        "Tokens per second, bundled, float32, 2 CPU threads (AMD EPYC), 2026-11-20",
        "Tokens per second, bundled, bfloat16, NVIDIA H200, 2026-11-20",
        "Conversations at once, bundled, float32, 2 CPU threads (AMD EPYC), 2026-11-20",
    ]
    assert all(f"*{title}*\n" in block_of("engine") for title in titles)
    (speed,) = tables_of("speed")
    assert "bundled, bfloat16, NVIDIA H200, 2026-11-20" in {row[2] for row in speed.rows}


def test_plots_hold_what_the_results_give(report: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill, "save", save)
    assert report().exit_code == 0
    plots = {plot.name: plot for make in PLOTS for plot in make(load_results(Path("benchmarks/results")))}
    names = {
        "front_light",
        "front_dark",
        "front_light_narrow",
        "front_dark_narrow",
        "drafts_gpu",
        "context_bundled_cpu_float32",
        "growth_model_cpu_float32",
        "peers_some.gguf_cpu",
        "scale_sim",
        "workloads_bundled_cpu_float32",
        "evaluation",
    }
    assert set(plots) == names == {path.stem for path in Path("docs/plots").iterdir()}
    for name, plot in plots.items():
        path = Path(f"docs/plots/{name}.svg")
        assert drawn_data(path) == plot.data
        ElementTree.parse(path)
    (bars,) = plots["front_dark"].charts
    assert isinstance(bars, Bars)
    assert bars.series == (("copyspec", (100.0,)), ("plain decoding", (25.0,)), ("llama.cpp", (25.0,)))
    assert all(bars == plots[name].charts[0] for name in names if name.startswith("front_"))
    wide, narrow = (figure_of(plots[f"front_light{which}"]) for which in ("", "_narrow"))
    assert narrow.get_figwidth() < wide.get_figwidth() / 2
    speeds, ratios = plots["context_bundled_cpu_float32"].charts
    assert isinstance(speeds, Lines)
    assert speeds.series[0] == ("copyspec", ((10.0, 10.0), (30.0, 20.0), (50.0, 20.0), None))
    assert ratios.series[1] == ("generate", ((10.0, 2.0), (30.0, 8.0), (50.0, 12.0), None))
    (bars,) = plots["drafts_gpu"].charts
    assert isinstance(bars, Bars)
    assert bars.series == (("adaptive", (3.0,)), ("copyspec (paper)", (1.5,)), ("Arctic, tuned", (2.0,)))
    (runs,) = plots["evaluation"].charts
    assert runs.series == (("some/model, adaptive", (1.5, 3.0, 2.5)), ("some/model, copyspec", (None, None, 1.25)))
    (bars,) = plots["peers_some.gguf_cpu"].charts
    assert isinstance(bars, Bars)
    assert bars.groups == ("rewrite, turn 1", "rewrite, turn 2", "all")
    assert bars.series == (
        ("copyspec", (100.0, 100.0, 100.0)),
        ("plain decoding", (25.0, 25.0, 25.0)),
        ("llama.cpp", (50.0, None, 50.0)),
    )
    speeds, passes = plots["growth_model_cpu_float32"].charts
    assert isinstance(speeds, Lines)
    assert speeds.series[0] == ("copyspec", ((510.0, 30.0), (1010.0, 30.0)))
    assert passes.series[2] == ("generate", ((510.0, 1.0), (1010.0, 1.0)))
    assert "AMD EPYC" in plots["drafts_gpu"].caption


def test_check_finds_what_differs_and_writes_nothing(report: Callable[..., Result]) -> None:
    assert report("--check").exit_code == 1
    assert not Path("docs").exists()
    assert report().exit_code == 0
    assert report("--check").exit_code == 0
    assert report().output == ""  # nothing is left to write
    readme, plot = Path("README.md"), Path("docs/plots/drafts_gpu.svg")
    text = readme.read_text(encoding="utf-8")
    readme.write_text(text.replace("**3.00**", "**9.99**"), encoding="utf-8")
    result = report("--check")
    assert (result.exit_code, len(result.output.splitlines())) == (1, 1)
    assert "README.md is not what" in result.output
    readme.write_text(text, encoding="utf-8")
    plot.write_text(plot.read_text(encoding="utf-8").replace("3.0", "9.9"), encoding="utf-8")
    result = report("--check")
    assert (result.exit_code, "drafts_gpu.svg is not what" in result.output) == (1, True)
    assert report().exit_code == 0
    assert report("--check").exit_code == 0


def test_new_figures_change_table_and_plot(report: Callable[..., Result]) -> None:
    assert report().exit_code == 0
    path = Path("benchmarks/results/drafts_gpu.json")
    changed = drafts({"none": 1.0, "arctic-tuned": 2.0, "adaptive": 4.0})
    path.write_text(json.dumps(changed), encoding="utf-8")
    assert len(report("--check").output.splitlines()) == 2
    output = report().output
    assert ("README.md" in output, "drafts_gpu.svg" in output, "context" in output) == (True, True, False)
    assert "**4.00**" in block_of("drafts")


def test_a_plot_without_results_goes_and_other_pictures_stay(report: Callable[..., Result]) -> None:
    assert report().exit_code == 0
    mine = Path("docs/plots/mine.svg")
    mine.write_text("<svg/>", encoding="utf-8")
    for path in Path("benchmarks/results").glob("eval_*.json"):
        path.unlink()
    assert report("--check").exit_code == 1
    assert "Deleted" in report().output
    assert not Path("docs/plots/evaluation.svg").exists()
    assert mine.exists()
    assert block_of("eval") == ""


def test_a_file_without_ours_has_nothing_to_show(report: Callable[..., Result]) -> None:
    alone = engine((1, 5, {"generate": 0.2}), shape="peerless")
    Path("benchmarks/results/peerless.json").write_text(json.dumps(alone), encoding="utf-8")
    assert report().exit_code == 0
    text = Path("README.md").read_text(encoding="utf-8").replace(block_of(COMMANDS), "")
    assert "peerless" not in text
    assert not Path("docs/plots/context_peerless_cpu_float32.svg").exists()


def test_results_that_no_page_shows_are_named(report: Callable[..., Result]) -> None:
    Path("README.md").write_text("<!-- bench: begin drafts -->\n<!-- bench: end -->\n", encoding="utf-8")
    output = report().output
    for name in set(BLOCKS) - {"drafts", "reproduction", "reproduction-categories"}:
        assert f"Left out {name}: no --page has a block" in output


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("benchmarks/results/x.json", "{", "x.json, which is no JSON"),
        ("benchmarks/results/x.json", "[1]", "x.json, which is no result of drafts, history"),
        ("benchmarks/results/x.json", '{"turns": []}', "x.json, which is no result of drafts, history"),
        ("benchmarks/results/x.json", json.dumps({**ALL["engine"], "results": []}), "x.json, a result of engine with"),
        ("benchmarks/results/x.json", json.dumps({**ALL["propose"], "results": [{}]}), "propose without bytes_per_tok"),
        ("README.md", "No blocks.", "README.md without blocks that begin and end"),
        ("README.md", "<!-- bench: begin drafts -->\n", "README.md without blocks that begin and end"),
        ("README.md", "<!-- bench: begin x -->\n<!-- bench: end -->", "Got block 'x' in README.md but expected one of"),
    ],
)
def test_broken_files_are_refused_in_one_line(
    report: Callable[..., Result], name: str, text: str, message: str
) -> None:
    Path(name).write_text(text, encoding="utf-8")
    result = report()
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.splitlines()) == 1
    assert not Path("docs").exists()


def test_folders_that_are_not_there_are_refused(report: Callable[..., Result]) -> None:
    Path("none").mkdir()
    for words, message in (
        (("--results", "gone"), "Got --results gone, which is no folder"),
        (("--results", "none"), "Got --results none, which holds no JSON file"),
        (("--page", "gone.md"), "Cannot read --page gone.md"),
    ):
        result = report(*words)
        assert (result.exit_code, message in result.output) == (2, True), result.output


def test_writing_needs_matplotlib_and_checking_does_not(
    report: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Path("README.md").read_text(encoding="utf-8")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = report()
    assert result.exit_code == 2
    assert 'matplotlib is not installed. Run: pip install "copyspec[eval]"' in result.output
    assert Path("README.md").read_text(encoding="utf-8") == before
    assert report("--check").exit_code == 1


def test_the_pages_and_plots_are_what_the_results_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails: `copyspec bench report`."""
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(app, ["bench", "report", "--check"])
    assert result.exit_code == 0, result.output
    texts = [Path(f"docs/{name}.md").read_text(encoding="utf-8") for name in ("benchmarks", "result_files", "scale")]
    assert max(len(line) for text in texts for line in text.splitlines()) <= 400


def test_every_result_of_this_repository_is_shown() -> None:
    pages = ("benchmarks", "result_files", "scale")
    texts = [(ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in pages]
    shown = {block[2] for text in texts for block in BLOCK.finditer(text)}
    assert {kind for kind, files in load_results(ROOT / "benchmarks" / "results").items() if files} <= shown
    assert set(KINDS) <= set(BLOCKS)


def test_records_say_when_and_on_which_cpu(tmp_path: Path) -> None:
    chats, out = ROOT / "tests" / "data" / "chats.jsonl", tmp_path / "out.json"
    words = ["bench", "drafts", "--tokenizer", "bundled", "--drafters", "none", "--max-tokens", "1"]
    assert CliRunner().invoke(app, [*words, "--transcripts", str(chats), "--json", str(out)]).exit_code == 0
    record = json.loads(out.read_text(encoding="utf-8"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record["date"])
    assert record["machine"]["cpu"] == machine()["cpu"] != ""


def test_a_machine_names_the_gpu_that_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", {"cuda:1": "NVIDIA H200"}.__getitem__)
    assert machine("cuda:1")["gpu"] == "NVIDIA H200"
    assert "gpu" not in machine()
