"""Replaying records: reading them, what each call's prompt holds, and counting what drafts would have saved."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from copyspec_engine import ConfigError
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.lab.replay import (
    MAX_CONTEXT,
    History,
    Message,
    RecordedCall,
    Tally,
    accept,
    calls_of,
    load_conversations,
    load_cost_curve,
    load_tokenizer,
    replay,
)

CHATS = Path(__file__).parents[1] / "data" / "chats.jsonl"
ALL = 10**6


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("bundled")


def texts(conversation: Sequence[Message], tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(m.token_ids, skip_special_tokens=False) for m in conversation]


# Reading


def test_messages_are_read_in_the_chat_templates_form(tokenizer: Tokenizer) -> None:
    tools = load_conversations(CHATS, tokenizer, ALL)[1]
    calls = [{"type": "function", "function": {"name": "get_order", "arguments": '{"order_id": "W-1043"}'}}]
    assert texts(tools, tokenizer)[1:3] == [
        "<|im_start|>user\nWhere does my order W-1043 go, and what is in it?<|im_end|>\n",
        f"<|im_start|>assistant\n\n{json.dumps(calls)}<|im_end|>\n",
    ]
    assert tokenizer.decode(tools[1].head, skip_special_tokens=False) == "<|im_start|>user\n"


def test_a_gzipped_file_reads_like_a_plain_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    zipped = tmp_path / "chats.jsonl.gz"
    zipped.write_bytes(gzip.compress(CHATS.read_bytes(), mtime=0))
    assert load_conversations(zipped, tokenizer, ALL) == load_conversations(CHATS, tokenizer, ALL)


def test_reading_stops_behind_the_conversation_that_has_answers_enough(tokenizer: Tokenizer) -> None:
    conversations = load_conversations(CHATS, tokenizer, ALL)
    answers = [sum(len(m.body) for m in c if m.role == "assistant") for c in conversations]
    assert len(load_conversations(CHATS, tokenizer, 1)) == 1
    assert len(load_conversations(CHATS, tokenizer, answers[0])) == 1
    assert len(load_conversations(CHATS, tokenizer, answers[0] + 1)) == 2
    assert len(conversations) == 3


def test_lines_behind_the_last_conversation_needed_are_not_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(CHATS.read_text(encoding="utf-8") + "no JSON\n", encoding="utf-8")
    assert len(load_conversations(path, tokenizer, 1)) == 1
    with pytest.raises(ConfigError, match="line 4"):
        load_conversations(path, tokenizer, ALL)


def test_a_conversation_is_cut_behind_the_message_that_is_too_long(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    turns = [{"role": "user", "content": "a b c d " * MAX_CONTEXT}, {"role": "assistant", "content": "never read"}]
    path.write_text(json.dumps({"messages": [{"role": "assistant", "content": "read"}, *turns]}) + "\n", "utf-8")
    assert [message.role for message in load_conversations(path, tokenizer, ALL)[0]] == ["assistant", "user"]


def test_content_that_is_no_text_counts_as_its_json(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "parts.jsonl"
    parts = [{"type": "text", "text": "hello"}]
    path.write_text(json.dumps({"messages": [{"role": "assistant", "content": parts}]}), "utf-8")
    conversation = load_conversations(path, tokenizer, ALL)[0]
    assert texts(conversation, tokenizer) == [f"<|im_start|>assistant\n{json.dumps(parts)}<|im_end|>\n"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("plain.jsonl.gz", b'{"messages": []}', "Not a gzipped file"),
        ("cut.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9], "end-of-stream"),
        ("broken.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:15] + b"\xff" * 20, "Cannot read transcript"),
        ("text.jsonl", b"\nhello\n", "line 2, which is not JSON"),
        ("bytes.jsonl", b"\xff\xfe", "line 1, which is not JSON"),
        ("list.jsonl", b"[1]\n", "line 1 without messages"),
        ("none.jsonl", b'{"messages": []}\n', "line 1 without messages"),
        ("role.jsonl", b'{"messages": [{"content": "x"}]}\n', r'message \{"content": "x"\} in .* with a role'),
        ("number.jsonl", b'{"messages": [7]}\n', "message 7 in .* with a role"),
        ("user.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}\n', "nothing to replay"),
        ("empty.jsonl", b"", "nothing to replay"),
    ],
)
def test_a_file_that_is_no_transcript_is_named(
    name: str, content: bytes, message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as raised:
        load_conversations(tmp_path / name, tokenizer, ALL)
    assert name in str(raised.value)


def test_a_file_that_is_not_there_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for path in (tmp_path / "gone.jsonl", tmp_path):
        with pytest.raises(ConfigError, match=f"Got transcript {path} but there is no such file"):
            load_conversations(path, tokenizer, ALL)


def test_a_tokenizer_that_is_not_there_or_none_at_all_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"Got tokenizer {tmp_path} but there is no file"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="is no tokenizer"):
        load_tokenizer(str(tmp_path))


# What a pass costs


@pytest.mark.parametrize(("name", "share"), [("gpu", 0.002), ("cpu", 0.10)])
def test_the_named_curves_are_straight_lines(name: str, share: float) -> None:
    curve = load_cost_curve(name)
    for nodes in (0, 1, 10, 1000, 2000):
        assert curve.seconds(1 + nodes)[0] == pytest.approx(1 + share * nodes)


def test_a_measured_curve_comes_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "curve.json"
    path.write_text("[[1, 0.02], [3, 0.04]]", encoding="utf-8")
    curve = load_cost_curve(str(path))
    assert [curve.seconds(width)[0] for width in (1, 2, 3)] == pytest.approx([0.02, 0.03, 0.04])


@pytest.mark.parametrize(
    "content",
    [
        *("{}", "[]", "[[1, 1.0]]", "[[1, 1.0], [2]]", "[[1, 1.0], [2, null]]", "[[1, 1.0], [2.5, 2.0]]"),
        *("[[2, 1.0], [3, 2.0]]", "[[1, 1.0], [1, 2.0]]", "[[1, 2.0], [2, 1.0]]", "[[1, 0.0], [2, 1.0]]", "[1, 2]"),
        *("[[1, 1.0], [2, Infinity]]", "[[1, 1.0], [2, NaN], [3, 1.0]]", "[[1, true], [2, 2.0]]"),
    ],
)
def test_a_malformed_curve_is_shown_with_what_is_expected(content: str, tmp_path: Path) -> None:
    path = tmp_path / "curve.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"Got .* in cost model .*curve\.json but expected at least two pairs"):
        load_cost_curve(str(path))


def test_an_unknown_cost_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Got cost model tpu but expected gpu, cpu or a JSON file"):
        load_cost_curve("tpu")
    (tmp_path / "curve.json").write_text("hello", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"curve\.json, which is not JSON"):
        load_cost_curve(str(tmp_path / "curve.json"))


# What each call's prompt holds


def conversation(*roles: str) -> list[Message]:
    """The i-th message's head is (100 + i,), its body (200 + i,)."""
    return [Message(role, (100 + i,), (200 + i,)) for i, role in enumerate(roles)]


@pytest.mark.parametrize(
    ("history", "prompts"),
    [
        ("full", [[0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]),
        ("last-turn", [[0, 1], [0, 3], [0, 5]]),
        ("evaluator-optimizer", [[1], [1, 3], [1, 5]]),
    ],
)
def test_the_history_decides_which_messages_the_prompts_hold(history: History, prompts: list[list[int]]) -> None:
    messages = conversation("system", "user", "assistant", "tool", "assistant", "user", "assistant")
    calls = list(calls_of(messages, history))
    answers = (2, 4, 6)
    expected = [
        RecordedCall((*(token for i in kept for token in (100 + i, 200 + i)), 100 + answer), (200 + answer,))
        for kept, answer in zip(prompts, answers, strict=True)
    ]
    assert calls == expected


def test_a_conversation_that_the_model_opens_has_a_prompt_of_the_head_alone() -> None:
    for history in ("full", "last-turn", "evaluator-optimizer"):
        assert list(calls_of(conversation("assistant"), history)) == [RecordedCall((100,), (200,))]  # type: ignore[arg-type]


# Acceptance

ANSWER = (7, 8, 9)


@pytest.mark.parametrize(
    ("tokens", "parents", "done", "accepted", "written"),
    [
        ((), (), 0, (), (7,)),
        ((7, 8), (-1, 0), 0, (0, 1), (7, 8, 9)),
        ((7, 5, 9), (-1, 0, 1), 0, (0,), (7, 8)),  # what follows a wrong token never counts
        ((5, 7, 6, 8), (-1, -1, 0, 1), 0, (1, 3), (7, 8, 9)),  # the second branch
        ((7, 5, 8), (-1, 0, 0), 0, (0, 2), (7, 8, 9)),  # a fork below the first token
        ((8, 7), (-1, 0), 1, (0,), (8, 9)),
        ((7, 8, 9), (-1, 0, 1), 0, (0, 1, 2), (7, 8, 9)),  # the record ends: there is no next token
        ((7, 8, 9, 7), (-1, 0, 1, 2), 0, (0, 1, 2), (7, 8, 9)),  # and what is drafted behind it is refused
        ((9, 4), (-1, 0), 2, (0,), (9,)),
    ],
)
def test_the_path_that_equals_the_record_is_accepted(
    tokens: tuple[int, ...], parents: tuple[int, ...], done: int, accepted: tuple[int, ...], written: tuple[int, ...]
) -> None:
    assert accept(DraftTree(tokens, parents), ANSWER, done) == (accepted, written)


class Scripted:
    """Proposes the given drafts one after the other and notes what it is told."""

    def __init__(self, prompt_ids: Sequence[int], drafts: Sequence[DraftTree]) -> None:
        self.prompt_ids, self.drafts = prompt_ids, list(drafts)
        self.observed: list[tuple[DraftTree, tuple[int, ...], tuple[int, ...]]] = []
        self.finished = 0

    def propose(self, num_pending: int, room: int) -> DraftTree:
        assert num_pending == 1
        assert room > 100
        return self.drafts[len(self.observed)]

    def observe(self, draft: DraftTree, accepted: Sequence[int], tokens: Sequence[int]) -> None:
        self.observed.append((draft, tuple(accepted), tuple(tokens)))

    def finish(self) -> None:
        self.finished += 1


def chain(*tokens: int) -> DraftTree:
    return DraftTree(tokens, tuple(range(-1, len(tokens) - 1)))


def scripted(*drafts: DraftTree) -> tuple[Callable[[Sequence[int]], Scripted], list[Scripted]]:
    opened: list[Scripted] = []

    def begin(prompt_ids: Sequence[int]) -> Scripted:
        opened.append(Scripted(prompt_ids, drafts))
        return opened[-1]

    return begin, opened


def test_a_drafter_learns_of_every_pass_and_of_the_end() -> None:
    drafts = (chain(1, 9), chain(), chain(4))
    begin, opened = scripted(*drafts)
    replay(begin, [RecordedCall((50, 51), (1, 2, 3, 4))], Tally())
    (drafter,) = opened
    assert drafter.prompt_ids == (50, 51)
    assert drafter.observed == [(drafts[0], (0,), (1, 2)), (drafts[1], (), (3,)), (drafts[2], (0,), (4,))]
    assert drafter.finished == 1


def test_figures_of_a_replay_counted_by_hand() -> None:
    tree = DraftTree((1, 9, 2, 3), (-1, -1, 0, 2))
    begin, _ = scripted(tree, chain(5, 6), chain())
    tally = Tally()
    replay(begin, [RecordedCall((50, 51), (1, 2, 3, 4, 0, 0))] * 2, tally)
    figures: dict[str, Any] = tally.figures(load_cost_curve("cpu"))
    times = [key for key in figures if key.endswith(("_p50", "_p99", "_ms"))]
    assert all(figures.pop(key) >= 0 for key in times)
    assert figures == {
        "tokens": 12,
        "tokens_per_forward": 2.0,  # 4, then 1, then 1 token a pass
        "draft_nodes": 2.0,  # 4 + 2 + 0 over 3 passes
        "accepted_share": 0.5,  # 3 of 6 nodes
        "modelled_speedup": round(6 / (1.4 + 1.2 + 1.0), 4),
    }
    assert tally.tokens_read == 2 * (2 + 6)
    assert len(tally.propose_ns) == len(tally.observe_ns) == tally.num_passes == 6
