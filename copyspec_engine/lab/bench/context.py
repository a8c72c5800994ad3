"""`copyspec bench context`: a conversation about a document grows, and every way of decoding writes its next turn.

The model writes freely. Drafting writes each turn, since that is the fastest; where the prompt has reached one of the
lengths that are asked for, plain decoding and transformers write the same turn too, each time another one first.
Drafting and plain decoding reuse the KV of the turns before, transformers reads the whole prompt, as its users have it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from rich.console import Console

from copyspec_engine import (
    AdaptiveDrafter,
    ConfigError,
    DrafterConfig,
    Engine,
    GenerationRequest,
    NoDrafter,
    SamplingParams,
)
from copyspec_engine.cli.demo.figures import GENERATE, LOOKUP
from copyspec_engine.cli.documents import Document, load_document
from copyspec_engine.lab.bench.command import ContextOptions
from copyspec_engine.lab.display.tables import Table, figure, on_terminal
from copyspec_engine.lab.evaluation.loops import loop_tokens
from copyspec_engine.lab.measuring import Measured, drafting_engine, facts_of_engine

__all__ = ["OURS", "PLAIN", "measure_context"]

Message = dict[str, str]

OURS, PLAIN = "ours", "plain"
_LANES = {"generate": GENERATE, "prompt-lookup": LOOKUP}
"""The ways of transformers, and what they are called as peers."""
REQUESTS = (
    "Write the whole text again, with all mistakes corrected.",
    "Evaluate your text: what could still be better about it?",
    "Write the whole text again, with these changes.",
    "Change the first sentence and write the whole text again.",
)
"""What is asked, again and again."""
_DRAFTERS: dict[str, DrafterConfig] = {OURS: AdaptiveDrafter(), PLAIN: NoDrafter()}
"""The ways of this engine."""
_WARM_UP_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Written:
    """An answer, and how it came about."""

    token_ids: tuple[int, ...]
    forward_passes: int
    seconds: float
    """From the call to the last token."""
    decode_s: float
    """From the first token to the last."""
    text: str = ""


@dataclass(frozen=True, slots=True)
class MeasuredTurn:
    """A turn that every way wrote."""

    document: str
    turn: int
    length: int
    """The longest of the lengths that the prompt has reached."""
    prompt_tokens: int
    written: Mapping[str, Written]
    """By way."""


def measure_context(options: ContextOptions, console: Console) -> Measured:
    """Lets the conversations grow and prints the table; exit code 1 if drafts change a token where none may change.

    Raises:
        CopySpecError: an option cannot work, or the model cannot be loaded.
    """
    documents = [load_document(name) for name in dict.fromkeys(options.file)]
    with drafting_engine(options.config) as engine, ExitStack() as stack:
        _check(engine, options)
        ways = stack.enter_context(closing(_Ways(engine, options)))
        measured: list[MeasuredTurn] = []
        for number, document in enumerate(documents):
            with console.status(f"Writing about {document.name} ...") as status:
                for turn in ways.grow(document, number):
                    measured.append(turn)
                    status.update(f"Writing about {document.name}: {turn.prompt_tokens} tokens ...")
        info = engine.info
    results = _results(measured)
    console.print(on_terminal(_table(results)))
    same = sum(turn.written[OURS].token_ids == turn.written[PLAIN].token_ids for turn in measured)
    console.print(f"identical to plain decoding: {same}/{len(measured)}")
    return int(same < len(measured) and info.is_lossless), {
        "results": results,
        "turns": _turn_rows(measured),
        "identical": {"same": same, "of": len(measured)},
        "documents": [document.name for document in documents],
        "lengths": options.lengths,
        "max_tokens": options.max_tokens,
        **facts_of_engine(info),
    }


def _check(engine: Engine, options: ContextOptions) -> None:
    most = engine.info.max_model_len - options.max_tokens
    if options.lengths[-1] > most:
        raise ConfigError(
            f"Got --length {options.lengths[-1]} but the model holds {engine.info.max_model_len} tokens, of which "
            f"--max-tokens {options.max_tokens} are the answer's: ask for at most {most}"
        )


class _Ways:
    """The ways of decoding, on one model."""

    def __init__(self, engine: Engine, options: ContextOptions) -> None:
        self._engine, self._options = engine, options
        self._peers = None
        if options.peers:
            from copyspec_engine.cli.demo.peers import Peers

            self._peers = Peers(engine)
        self._ways = (*_DRAFTERS, *options.peers)
        for way in self._ways:
            self._write(way, [_user(REQUESTS[0])], "warm-up", _WARM_UP_TOKENS)
        self._forget("warm-up")

    def close(self) -> None:
        """End what was started for the peers."""
        if self._peers is not None:
            self._peers.close()

    def grow(self, document: Document, number: int) -> Iterator[MeasuredTurn]:
        """The turns that are measured of a conversation about a document.

        Args:
            document: what it begins with.
            number: of the conversation, from 0: says who writes first.
        """
        messages: list[Message] = []
        lengths = self._options.lengths
        for turn, request in enumerate(cycle(REQUESTS), 1):
            messages.append(_user(request if messages else f"{document.text}\n\n{request}"))
            size = len(self._tokenize(messages, document.name))
            reached = max((length for length in lengths if length <= size), default=None)
            if size + self._options.max_tokens > self._engine.info.max_model_len:
                break
            first = (number + turn) % len(self._ways) if reached else 0
            ways = (*self._ways[first:], *self._ways[:first]) if reached else (OURS,)
            written = {way: self._write(way, messages, document.name, self._options.max_tokens) for way in ways}
            if reached:
                yield MeasuredTurn(document.name, turn, reached, size, written)
                lengths = [length for length in lengths if length > reached]
                if not lengths:
                    break
            messages.append({"role": "assistant", "content": written[OURS].text})
        self._forget(document.name)

    def _tokenize(self, messages: Sequence[Message], name: str) -> list[int]:
        """The prompt, earlier answers in the very tokens in which they were written."""
        return self._engine.tokenize(GenerationRequest(messages=tuple(messages), session_id=f"{OURS} {name}"))

    def _write(self, way: str, messages: Sequence[Message], name: str, max_tokens: int) -> Written:
        if way not in _DRAFTERS:
            assert self._peers is not None
            answer = self._peers.ask(_LANES[way], self._tokenize(messages, name), max_tokens)
            token_ids, decode_s = answer.token_ids or (), answer.seconds - (answer.ttft_s or 0.0)
            return Written(token_ids, answer.forward_passes or len(token_ids), answer.seconds, decode_s)
        output = self._engine.generate(
            GenerationRequest(
                messages=tuple(messages),
                sampling=SamplingParams(max_tokens=max_tokens),
                drafter=_DRAFTERS[way],
                session_id=f"{way} {name}",
                continues=None if way == OURS else f"{OURS} {name}",
            )
        )
        timing = output.timing
        passes = output.draft_stats.num_forward_passes
        seconds, decode_s = timing.total_s - timing.queue_s, timing.total_s - timing.ttft_s
        return Written(output.token_ids, passes, seconds, decode_s, output.text)

    def _forget(self, name: str) -> None:
        for way in _DRAFTERS:
            self._engine.forget(f"{way} {name}")


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _results(measured: Sequence[MeasuredTurn]) -> list[dict[str, Any]]:
    """A row for each length and way; rates are sums over sums."""
    found = []
    for length in sorted({turn.length for turn in measured}):
        turns = [turn for turn in measured if turn.length == length]
        for way in turns[0].written:
            own = [turn.written[way] for turn in turns]
            tokens = sum(len(answer.token_ids) for answer in own)
            seconds, decode_s = sum(answer.seconds for answer in own), sum(answer.decode_s for answer in own)
            passes = sum(answer.forward_passes for answer in own)
            row = {
                "length": length,
                "way": way,
                "turns": len(turns),
                "prompt_tokens": round(sum(turn.prompt_tokens for turn in turns) / len(turns)),
                "tokens": tokens,
                "forward_passes": passes,
                "seconds": round(seconds, 4),
                "tokens_per_s": round(tokens / seconds, 4),
                "decode_tokens_per_s": round((tokens - len(own)) / decode_s, 4) if decode_s else None,
                "loop_share": round(sum(loop_tokens(answer.token_ids) for answer in own) / tokens, 4),
            }
            found.append({**row, "tokens_per_forward": round(tokens / passes, 4)})
    return found


def _turn_rows(measured: Sequence[MeasuredTurn]) -> list[dict[str, Any]]:
    """Each turn as each way wrote it."""
    return [
        {
            "document": turn.document,
            "turn": turn.turn,
            "prompt_tokens": turn.prompt_tokens,
            "way": way,
            "tokens": len(answer.token_ids),
            "forward_passes": answer.forward_passes,
            "seconds": round(answer.seconds, 4),
            "decode_s": round(answer.decode_s, 4),
            "loop_tokens": loop_tokens(answer.token_ids),
            "identical": answer.token_ids == turn.written[PLAIN].token_ids,
        }
        for turn in measured
        for way, answer in turn.written.items()
    ]


def _table(results: Sequence[Mapping[str, Any]]) -> Table:
    headings = ("context", "way", "turns", "tokens", "tokens per forward", "tokens/s", "decoding alone", "in loops")
    body = tuple(
        (
            str(row["prompt_tokens"]),
            row["way"],
            str(row["turns"]),
            str(row["tokens"]),
            f"{row['tokens_per_forward']:.2f}",
            f"{row['tokens_per_s']:.2f}",
            figure(row["decode_tokens_per_s"]),
            f"{row['loop_share']:.0%}",
        )
        for row in results
    )
    return Table("Speed by tokens of context", headings, body, 2)
