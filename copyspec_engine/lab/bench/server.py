"""`copyspec bench serve`: what the HTTP server costs beside the same engine asked in process.

One process holds the engine and its server, this one the clients. Batch by batch, as small as they can be, both ways
make the same calls, each time the other one first; while one is at work the other is silent.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from copyspec_engine.cli.demo.frameworks import Message
from copyspec_engine.cli.demo.peer_process import PeerProcess
from copyspec_engine.cli.documents import load_document
from copyspec_engine.cli.serve import check_serve_installed
from copyspec_engine.lab.bench.command import ServerOptions
from copyspec_engine.lab.bench.free_text import PROMPTS
from copyspec_engine.lab.bench.server_client import read_answer, request_bytes, stream_all
from copyspec_engine.lab.bench.server_process import Asked, CpuTimes, ServerSide, Written
from copyspec_engine.lab.display.tables import on_terminal
from copyspec_engine.lab.measuring import Measured
from copyspec_engine.lab.results.server import HTTP, IN_PROCESS, server_tables_of

__all__ = ["measure_server"]

DOCUMENTS = ("letter.txt", "meeting_notes.md")
"""What is to be repeated besides the answers to `PROMPTS`: there many tokens come in one pass."""
NUM_PROMPTS = len(PROMPTS) + len(DOCUMENTS)
WARM_UP_TOKENS = 16


@dataclass(frozen=True, slots=True)
class _Answers:
    """To the calls of a batch, in their order."""

    way: str
    seconds: float
    """From the first call to the end of the last answer."""
    written: list[Written]
    cpu: CpuTimes
    """Of the process of engine and server."""
    client_cpu_s: float
    """Of the process of the clients; where the engine is asked in process there are none."""

    def figures(self) -> dict[str, Any]:
        return {
            "way": self.way,
            "tokens": sum(answer.tokens for answer in self.written),
            "chunks": sum(answer.num_chunks for answer in self.written),
            "seconds": round(self.seconds, 6),
            "ttft_s": [round(answer.ttft_s, 6) for answer in self.written],
            **{name: round(value, 6) for name, value in asdict(self.cpu).items()},
            "client_cpu_s": round(self.client_cpu_s, 6),
        }


def measure_server(options: ServerOptions, console: Console) -> Measured:
    """Makes all calls both ways and prints the tables.

    Returns:
        Exit code 1 if an answer over HTTP is another one although the engine promises the same.

    Raises:
        CopySpecError: an option cannot work, the extra "serve" is not installed, or the model cannot be loaded.
    """
    check_serve_installed()
    rows, num_different = list[dict[str, Any]](), 0
    with PeerProcess("the server", options.num_threads, ServerSide, config=options.config) as side:
        facts = side.call("facts")
        ways = _Ways(side)
        with console.status("Warming up ...") as status:
            for clients in options.numbers:
                ways.answers(0, clients, WARM_UP_TOKENS)
            for round_ in range(options.rounds):
                for clients in options.numbers:
                    status.update(f"Round {round_ + 1}/{options.rounds}, {clients} at once ...")
                    num_batches = -(-NUM_PROMPTS // clients)
                    for batch in range(round_ * num_batches, (round_ + 1) * num_batches):
                        found = ways.answers(batch, clients, options.max_tokens)
                        rows += [{"clients": clients, "batch": batch, **found[way].figures()} for way in found]
                        pairs = zip(*(answers.written for answers in found.values()), strict=True)
                        num_different += sum(own.text != other.text for own, other in pairs)
    record = {
        "results": rows,
        "rounds": options.rounds,
        "max_tokens": options.max_tokens,
        "threads": options.num_threads,
        "different": num_different,
        **facts,
    }
    for table in server_tables_of(record):
        console.print(on_terminal(table))
    if num_different:
        console.print(f"[bold red]Other answers over HTTP than in process: {num_different}[/]")
    return int(num_different > 0 and facts["is_lossless"]), record


class _Ways:
    """The two ways to ask the engine of a process."""

    def __init__(self, side: PeerProcess) -> None:
        self._side = side
        self._port, self._model = side.call("address")
        documents = (f"Repeat this text.\n\n{load_document(name).text}" for name in DOCUMENTS)
        self._prompts = (*PROMPTS, *documents)

    def answers(self, batch: int, clients: int, max_tokens: int) -> dict[str, _Answers]:
        """What both ways give of a batch: as many calls as there are clients, all at once, of the next prompts."""
        ask = {IN_PROCESS: self._in_process, HTTP: self._over_http}
        in_turn = list(ask) if batch % 2 == 0 else list(reversed(ask))
        found = {way: ask[way](self._calls(way, batch, clients, max_tokens)) for way in in_turn}
        self._side.call("forget")
        return {way: found[way] for way in ask}

    def _calls(self, way: str, batch: int, clients: int, max_tokens: int) -> list[Asked]:
        contents = [self._prompts[(batch * clients + call) % len(self._prompts)] for call in range(clients)]
        messages: list[Message] = [{"role": "user", "content": content} for content in contents]
        return [Asked(f"{way}-{call}", (message,), max_tokens) for call, message in enumerate(messages)]

    def _in_process(self, calls: Sequence[Asked]) -> _Answers:
        seconds, cpu, written = self._side.call("write", calls)
        return _Answers(IN_PROCESS, seconds, written, cpu, 0.0)

    def _over_http(self, calls: Sequence[Asked]) -> _Answers:
        sent = [request_bytes(asked, self._model) for asked in calls]
        before, client_before_s = self._side.call("cpu_times"), time.process_time()
        seconds, came = stream_all(self._port, sent)
        client_cpu_s, cpu = time.process_time() - client_before_s, self._side.call("cpu_times") - before
        return _Answers(HTTP, seconds, [read_answer(*answer) for answer in came], cpu, client_cpu_s)
