"""`copyspec bench propose`: what drafting costs as a conversation's memory grows."""

from __future__ import annotations

import gc
import random
import statistics
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from itertools import chain, islice, pairwise
from typing import Any

from rich.console import Console

from copyspec_engine.lab.bench.command import ProposeOptions
from copyspec_engine.lab.bench.drafts import sources
from copyspec_engine.lab.contestants import OURS, Session
from copyspec_engine.lab.display.tables import Table, on_terminal
from copyspec_engine.lab.measuring import Measured, machine, versions
from copyspec_engine.lab.replay import (
    Message,
    RecordedCall,
    Tally,
    calls_of,
    end_token,
    load_cost_curve,
    load_tokenizer,
    replay,
)

__all__ = ["measure_propose"]

INDEXED_TOKENS = 100_000
"""Length of the prompt whose indexing is timed."""
INDEX_REPEATS = 5
ALL = 10**12
"""More answer tokens than any file holds."""
PIECE, PIECES = (8, 40), 500
"""Tokens in a piece of text, least and most, and the pieces that make up a text."""

Conversation = tuple[Message, ...]


def measure_propose(options: ProposeOptions, console: Console) -> Measured:
    """Measures at each memory size and prints the table.

    Raises:
        ConfigError: an option or a file cannot work.
    """
    loaded = sources(options.transcripts, options.tokenizer, ALL, console)
    end = end_token(load_tokenizer(options.tokenizer))
    replayed, filler = _split(list(chain.from_iterable(loaded.values())), options.max_tokens)
    results = []
    for size in options.memory_tokens:
        with console.status(f"Measuring with {size:,} tokens of memory ..."):
            results.append(_measure(size, replayed, filler, end))
    console.print(on_terminal(_table(results)))
    return 0, {
        "results": results,
        "indexed_tokens": INDEXED_TOKENS,
        "tokenizer": options.tokenizer,
        "versions": versions(),
        "machine": machine(),
    }


def _split(conversations: list[Conversation], max_tokens: int) -> tuple[list[Conversation], list[Conversation]]:
    """(conversations to replay, drawn over all files up to `max_tokens`; the others, which fill memories).

    A single conversation is both.
    """
    shuffled = random.Random(0).sample(conversations, len(conversations))
    count, tokens = 0, 0
    while count < len(shuffled) and tokens < max_tokens:
        tokens += sum(len(message.body) for message in shuffled[count] if message.role == "assistant")
        count += 1
    return shuffled[:count], shuffled[count:] or shuffled


def _measure(
    size: int, replayed: Sequence[Conversation], filler: Sequence[Conversation], end: int | None
) -> dict[str, Any]:
    cost = load_cost_curve("gpu")
    replay(Session(cost).begin, [RecordedCall((1, 2), (3,))], Tally())  # compiles what is not compiled yet
    index_ms = [_index_ms(Session(cost), filler) for _ in range(INDEX_REPEATS)]
    session = Session(cost, end)
    gc.collect()
    tracemalloc.start()
    _fill(session, size, filler)
    gc.collect()
    num_bytes, held = tracemalloc.get_traced_memory()[0], session.num_tokens
    tracemalloc.stop()
    tally = Tally()
    for conversation in replayed:
        replay(session.begin, calls_of(conversation, "full"), tally)
    figures = tally.figures(cost)
    return {
        "memory_tokens": held,
        "bytes_per_token": round(num_bytes / held, 1),
        "index_ms": round(statistics.median(index_ms), 3),
        **{key: figures[key] for key in ("propose_us_p50", "propose_us_p99", "tokens", "tokens_per_forward")},
    }


def _fill(session: Session, size: int, filler: Sequence[Conversation]) -> None:
    """Let the memory hold `size` tokens, or a few more: it takes in only what it does not hold yet."""
    for text in chain.from_iterable(_rounds(filler)):
        if session.num_tokens >= size:
            return
        session.begin(text[: size - session.num_tokens]).finish()


def _rounds(filler: Sequence[Conversation]) -> Iterator[Iterator[list[int]]]:
    """Texts without end: the conversations in random order, then again and again pieces of them, shuffled."""
    order = random.Random(1)
    yield (_tokens(conversation) for conversation in order.sample(list(filler), len(filler)))
    tokens = list(chain.from_iterable(map(_tokens, filler)))
    while True:
        yield _pieced(tokens, order)


def _pieced(tokens: Sequence[int], order: random.Random) -> Iterator[list[int]]:
    """The tokens cut into pieces too short to be known again, in random order, as texts of some thousand tokens."""
    cuts = [0]
    while cuts[-1] < len(tokens):
        cuts.append(cuts[-1] + order.randint(*PIECE))
    pieces = list(pairwise(cuts))
    order.shuffle(pieces)
    for first in range(0, len(pieces), PIECES):
        yield [token for start, stop in pieces[first : first + PIECES] for token in tokens[start:stop]]


def _tokens(conversation: Conversation) -> list[int]:
    return [token for message in conversation for token in message.token_ids]


def _index_ms(session: Session, filler: Sequence[Conversation]) -> float:
    texts = chain.from_iterable(_rounds(filler))
    prompt = list(islice(chain.from_iterable(texts), INDEXED_TOKENS))
    start = time.perf_counter_ns()
    session.begin(prompt).finish()
    return (time.perf_counter_ns() - start) / 1e6


def _table(results: Sequence[dict[str, Any]]) -> Table:
    headings = ("memory tokens", "propose us, p50", "p99", "index ms of 100k tokens", "bytes per token")
    body = tuple(
        (
            f"{row['memory_tokens']:,}",
            *(f"{row[key]:.1f}" for key in ("propose_us_p50", "propose_us_p99", "index_ms", "bytes_per_token")),
            f"{row['tokens_per_forward']:.3f}",
        )
        for row in results
    )
    return Table(f"{OURS}, by tokens of memory", (*headings, "tokens per forward"), body)
