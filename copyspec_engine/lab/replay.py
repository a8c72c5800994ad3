r"""Recorded conversations replayed through a drafter: what its drafts would have saved, without a model.

A recorded assistant message stands for the model's output, so a draft is accepted along the path that equals the
record. Under greedy decoding that is what the engine would have accepted, had its model written these answers.

A message is read as the tokens of `<|im_start|>role\n`, its text, `<|im_end|>` and a line end; tool calls follow the
text as JSON. The prompt of a call ends with the assistant's `<|im_start|>assistant\n`; the call writes the text and
`<|im_end|>`, behind which no drafter drafts, as in an engine that knows how answers end.

Not covered: sampling noise, grammars, prefill (the pass that reads a prompt is the first to verify a draft), batching.
"""

from __future__ import annotations

import gzip
import json
import math
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from copyspec_engine.bundled import bundled_model_path
from copyspec_engine.drafting.cost import CostCurve
from copyspec_engine.drafting.drafter import Drafter
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.sampling.verify import verify
from copyspec_engine.values.errors import ConfigError

__all__ = [
    "MAX_CONTEXT",
    "Begin",
    "History",
    "Message",
    "RecordedCall",
    "Tally",
    "calls_of",
    "end_token",
    "in_tokens",
    "load_conversations",
    "load_cost_curve",
    "load_tokenizer",
    "messages_of",
    "read_conversations",
    "read_json_lines",
    "replay",
]

MAX_CONTEXT = 24_000
"""A conversation is cut behind the message that takes it over this many tokens."""
ROOM = 4096
"""Levels that a draft may have: nobody knows how long the answer will get, so every drafter gets the same."""
END_OF_MESSAGE = "<|im_end|>"
END_OF_RECORD = -1
"""What verification samples behind the last recorded token: no draft holds it."""

COSTS = {"gpu": 0.002, "cpu": 0.10}
"""Cost of one more token in a pass, as a share of a pass of one token, by the name of the cost model."""

History = Literal["full", "last-turn", "evaluator-optimizer"]
"""What a call's prompt holds of the messages before it.

full: all of them. last-turn: the system message and the last message that is not the model's own.
evaluator-optimizer: the task (the first user message) and the last message that is not the model's own.
"""


Begin = Callable[[Sequence[int]], Drafter]
"""Opens a call of one conversation on its prompt; what it keeps between calls is that conversation's memory."""


@dataclass(frozen=True, slots=True)
class Message:
    """One recorded message in tokens: the template's head with the role, the text and its end, and the line end."""

    role: str
    head: tuple[int, ...]
    body: tuple[int, ...]
    tail: tuple[int, ...] = ()

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All of them in order."""
        return (*self.head, *self.body, *self.tail)


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """One model call: what it read and what it wrote."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a folder with a `tokenizer.json`, or the bundled model's for "bundled".

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    folder = bundled_model_path() if name == "bundled" else Path(name)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"Got tokenizer {name} but there is no file {path}: name a folder that holds tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise ConfigError(f"Got tokenizer {name} but {path} is no tokenizer: {error}") from None


def end_token(tokenizer: Tokenizer) -> int | None:
    """The token that ends a message, if the tokenizer has one for it."""
    token: int | None = tokenizer.token_to_id(END_OF_MESSAGE)
    return token


def load_cost_curve(name: str) -> CostCurve:
    """The cost of a pass by its tokens: "gpu" is 1 + 0.002 k for k draft nodes, "cpu" is 1 + 0.10 k, or a JSON file.

    The file holds measured [[tokens, seconds], ...] from 1 token on.

    Raises:
        ConfigError: no such name or file, or the file holds no curve.
    """
    if name in COSTS:
        return CostCurve(((1, 1.0), (1001, 1.0 + 1000 * COSTS[name])))
    path = Path(name)
    if not path.is_file():
        raise ConfigError(
            f"Got cost model {name} but expected {', '.join(COSTS)} or a JSON file [[tokens, seconds], ...]"
        )
    try:
        points = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"Got cost model {name}, which is not JSON: {error}") from None
    if not _is_curve(points):
        raise ConfigError(
            f"Got {json.dumps(points)[:80]} in cost model {name} but expected at least two pairs [tokens, seconds] in "
            "ascending order, starting at 1 token, with positive seconds"
        )
    return CostCurve(tuple((int(tokens), float(seconds)) for tokens, seconds in points))


def _is_curve(points: object) -> bool:
    if not isinstance(points, list) or len(points) < 2:
        return False
    for pair in points:
        if not (isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int and type(pair[1]) in (int, float)):
            return False
    widths, seconds = [pair[0] for pair in points], [pair[1] for pair in points]
    ascending = widths == sorted(set(widths)) and seconds == sorted(seconds)
    return widths[0] == 1 and ascending and seconds[0] > 0 and all(map(math.isfinite, seconds))


def load_conversations(path: Path, tokenizer: Tokenizer, max_tokens: int) -> list[tuple[Message, ...]]:
    """The first conversations of a transcript, up to the one that brings their answers to `max_tokens` tokens.

    A transcript is JSON lines, gzipped if its name ends with .gz: {"messages": [{"role", "content", "tool_calls"?}]}.

    Raises:
        ConfigError: it cannot be read, or a line is no conversation, or there is no answer to replay.
    """
    conversations, answered = [], 0
    for conversation in read_conversations(path, tokenizer):
        conversations.append(conversation)
        answered += sum(len(message.body) for message in conversation if message.role == "assistant")
        if answered >= max_tokens:
            break
    if not answered:
        raise ConfigError(f"Got transcript {path} without an assistant message: there is nothing to replay")
    return conversations


def read_conversations(path: Path, tokenizer: Tokenizer) -> Iterator[tuple[Message, ...]]:
    """A transcript's conversations in tokens, each cut behind the message that takes it over `MAX_CONTEXT` tokens.

    Raises:
        ConfigError: see `load_conversations`.
    """
    for messages in read_transcript(path):
        yield tuple(in_tokens(messages, tokenizer))


def read_transcript(path: Path) -> Iterator[list[dict[str, Any]]]:
    """The messages of one conversation after the other, as they are recorded.

    Raises:
        ConfigError: see `load_conversations`.
    """
    for where, record in read_json_lines(path, "transcript"):
        yield messages_of(record, where)


def read_json_lines(path: Path, what: str) -> Iterator[tuple[str, Any]]:
    """(where it stands, value) of each line of a JSON Lines file that is not blank; gzipped if its name ends with .gz.

    Args:
        path: the file.
        what: what to call it in errors.

    Raises:
        ConfigError: the file cannot be read, or a line is not JSON.
    """
    if not path.is_file():
        raise ConfigError(f"Got {what} {path} but there is no such file")
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    value = json.loads(line)
                    if "\\ud" in line.lower():  # half of a character is no text
                        json.dumps(value, ensure_ascii=False).encode()
                    yield f"{path} line {number}", value
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"Cannot read {what} {path}: {error}") from None
    except ValueError as error:  # of JSON or of UTF-8
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"Got {what} {path} line {number or 1}, which is not JSON: {error}") from None


def messages_of(record: object, where: str) -> list[dict[str, Any]]:
    """The messages of one line of a transcript.

    Raises:
        ConfigError: it holds none.
    """
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ConfigError(
            f'Got {where} without messages but expected {{"messages": [{{"role": ..., "content": ...}}]}}'
        )
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ConfigError(f"Got message {json.dumps(message)[:80]} in {where} but expected an object with a role")
    return messages


def in_tokens(messages: Iterable[dict[str, Any]], tokenizer: Tokenizer) -> Iterator[Message]:
    """Messages in tokens, up to the one that takes them over `MAX_CONTEXT`."""

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False).ids)

    total = 0
    for message in messages:
        text = message.get("content") or ""
        text = text if isinstance(text, str) else json.dumps(text)
        if message.get("tool_calls"):
            text += "\n" + json.dumps(message["tool_calls"])
        head, body, tail = encode(f"<|im_start|>{message['role']}\n"), encode(text + END_OF_MESSAGE), encode("\n")
        yield Message(message["role"], head, body, tail)
        total += len(head) + len(body) + len(tail)
        if total > MAX_CONTEXT:
            return


def calls_of(conversation: Sequence[Message], history: History) -> Iterator[RecordedCall]:
    """The calls that wrote a conversation's assistant messages, in order; see `History` for their prompts."""
    for position, message in enumerate(conversation):
        if message.role == "assistant":
            kept = _kept(conversation[:position], history)
            prompt = [token for earlier in kept for token in earlier.token_ids]
            yield RecordedCall((*prompt, *message.head), message.body)


def _kept(earlier: Sequence[Message], history: History) -> Sequence[Message]:
    if history == "full":
        return earlier
    asked = [message for message in earlier if message.role not in ("assistant", "system")]
    if history == "last-turn":
        return [*(message for message in earlier if message.role == "system"), *asked[-1:]]
    task = next((message for message in asked if message.role == "user"), None)
    return [task, *(message for message in asked[-1:] if message is not task)] if task else asked[-1:]


@dataclass(slots=True)
class Tally:
    """Counts over every pass of a replay."""

    tokens: int = 0
    """Answer tokens written."""
    tokens_read: int = 0
    """Prompt and answer tokens of all calls; a prompt that repeats the call before it counts again."""
    draft_lengths: array[int] = field(default_factory=lambda: array("l"))
    """Draft nodes of each forward pass."""
    accepted_lengths: array[int] = field(default_factory=lambda: array("l"))
    """Draft nodes on the accepted path of each forward pass."""
    propose_ns: array[int] = field(default_factory=lambda: array("q"))
    """Nanoseconds of each `propose`."""
    observe_ns: array[int] = field(default_factory=lambda: array("q"))
    """Nanoseconds of each `observe`."""
    call_ns: int = 0
    """Nanoseconds of opening and finishing calls."""

    @property
    def num_passes(self) -> int:
        return len(self.draft_lengths)

    @property
    def accepted(self) -> int:
        """Draft nodes on accepted paths."""
        return sum(self.accepted_lengths)

    def modelled_passes(self, cost: CostCurve) -> float:
        """What all passes cost, in passes of one token."""
        widths = Counter(self.draft_lengths)
        seconds = sum(count * float(cost.seconds(1 + width)[0]) for width, count in widths.items())
        return seconds / float(cost.seconds(1)[0])

    def figures(self, cost: CostCurve) -> dict[str, float]:
        """The replay in figures; the keys are documented in docs/measuring.md."""
        passes, nodes = self.num_passes, sum(self.draft_lengths)
        return {
            "tokens": self.tokens,
            "tokens_per_forward": round(self.tokens / passes, 4),
            "draft_nodes": round(nodes / passes, 3),
            "accepted_share": round(self.accepted / nodes, 4) if nodes else 0.0,
            "modelled_speedup": round(self.tokens / self.modelled_passes(cost), 4),
            "propose_us_p50": _percentile_us(self.propose_ns, 50),
            "propose_us_p99": _percentile_us(self.propose_ns, 99),
            "observe_us_p50": _percentile_us(self.observe_ns, 50),
            "index_ms": round(self.call_ns / 1e6 / self.tokens_read * 100_000, 3),
        }


def _percentile_us(nanoseconds: array[int], percent: float) -> float:
    return round(float(np.percentile(np.frombuffer(nanoseconds, dtype=np.int64), percent)) / 1000, 2)


def replay(begin: Begin, calls: Iterable[RecordedCall], tally: Tally) -> None:
    """Write the answers of one conversation's calls with the drafts of `begin`'s drafters; adds to `tally`."""
    clock = time.perf_counter_ns
    for call in calls:
        start = clock()
        drafter = begin(call.prompt_ids)
        tally.call_ns += clock() - start
        _write(drafter, call.answer_ids, tally)
        start = clock()
        drafter.finish()
        tally.call_ns += clock() - start
        tally.tokens += len(call.answer_ids)
        tally.tokens_read += len(call.prompt_ids) + len(call.answer_ids)


def _write(drafter: Drafter, answer: Sequence[int], tally: Tally) -> None:
    clock, done = time.perf_counter_ns, 0
    while done < len(answer):
        start = clock()
        draft = drafter.propose(1, ROOM)
        tally.propose_ns.append(clock() - start)
        accepted, tokens = accept(draft, answer, done)
        start = clock()
        drafter.observe(draft, accepted, tokens)
        tally.observe_ns.append(clock() - start)
        tally.draft_lengths.append(len(draft))
        tally.accepted_lengths.append(len(accepted))
        done += len(tokens)


def accept(draft: DraftTree, answer: Sequence[int], done: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(accepted nodes, tokens written) by a pass behind the first `done` tokens of `answer`.

    The tokens are those of the nodes and the record's next one, which is missing only where the record ends.
    """
    levels = (0, *draft.depths())
    sampled = [answer[done + level] if done + level < len(answer) else END_OF_RECORD for level in levels]
    verdict = verify(draft, sampled)
    tokens = verdict.tokens
    return verdict.accepted, tokens[:-1] if tokens[-1] == END_OF_RECORD else tokens
