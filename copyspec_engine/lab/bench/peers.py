"""`copyspec bench peers`: a model writes freely, beside what else would run it on the same CPU.

Turn by turn every peer writes, each time another one first, so that a machine that slows down slows all of them down
alike; only one is at work at a time. All go on from the answer of plain decoding, so that all read the same prompts:
their tokens go to transformers and to llama.cpp, their messages to this engine and through LangChain. What a peer keeps
of a conversation is its own: KV here and in each server.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from copyspec_engine import ConfigError, CopySpecError
from copyspec_engine.cli.demo.figures import GENERATE, LOOKUP, PeerAnswer
from copyspec_engine.cli.demo.frameworks import check_framework
from copyspec_engine.cli.demo.llama_server import (
    CONTEXT_TOKENS,
    LlamaServer,
    LlamaServerError,
    LlamaServers,
    find_llama_server,
    gguf_file,
    server_version,
)
from copyspec_engine.cli.demo.peer_process import PeerProcess, TransformersSide
from copyspec_engine.lab.bench.command import PeersOptions
from copyspec_engine.lab.bench.peer_conversations import PeerConversation, load_conversations
from copyspec_engine.lab.bench.peer_processes import AskedTurn, EngineSide, through_langchain
from copyspec_engine.lab.display.tables import on_terminal
from copyspec_engine.lab.measuring import Measured, memory_of, version, write_record
from copyspec_engine.lab.results.peers import OURS, PLAIN, peers_tables_of

__all__ = ["measure_peers"]

IN_ENGINE = (OURS, PLAIN, "ours-langchain")
IN_TRANSFORMERS = {"generate": GENERATE, "prompt-lookup": LOOKUP}
SERVER_OPTIONS: dict[str, tuple[str, ...]] = {
    "llama": (),
    "llama-ngram-mod": ("--spec-type", "ngram-mod"),
    "llama-ngram-simple": ("--spec-type", "ngram-simple"),
    "llama-langchain": (),
}
"""Peers with a server of their own, and the words of its command line."""
WARM_UP = "Write one sentence about the sea."
WARM_UP_TOKENS = 8


def measure_peers(options: PeersOptions, console: Console, command: str) -> Measured:
    """Lets all write and prints the tables; exit code 1 if drafts change a token.

    Args:
        options: of the command.
        console: of the tables.
        command: stands in the file of `options.json`, which is written anew whenever a conversation ends.

    Raises:
        CopySpecError: an option cannot work, the model cannot be loaded, or a peer that was asked for cannot take part.
    """
    conversations = load_conversations(options.kinds, options.files_by_kind, options.file, options.model, options.limit)
    left_out = _cannot_take_part(options)
    asked_for = [name for name in left_out if name in {chosen.value for chosen in options.peer}]
    if asked_for:
        raise ConfigError(f"Got --peer {asked_for[0]}, which cannot take part: {left_out[asked_for[0]]}")
    with _Running(options, left_out) as running:
        record = running.record(_read(options.json) if options.resume and options.json else None)
        done = {(row["kind"], row["conversation"]) for row in record["results"]} | set(map(tuple, record["cut_off"]))
        to_do = [(number, each) for number, each in enumerate(conversations) if (each.kind, each.name) not in done]
        ends_at = time.monotonic() + 60 * options.minutes if options.minutes else math.inf
        with console.status("Warming up ...") as status:
            running.warm_up()
            for number, conversation in to_do:
                if time.monotonic() > ends_at:
                    break
                status.update(
                    f"Writing {conversation.kind} {conversation.name} ({number + 1}/{len(conversations)}) ..."
                )
                rows = list(running.write(conversation, number))
                record["results"] += rows
                if len({row["turn"] for row in rows}) < len(conversation.requests):
                    record["cut_off"].append([conversation.kind, conversation.name])
                record |= {"memory": running.memory(), "left_out": {**left_out, **running.failed}}
                if options.json:
                    write_record(options.json, record, command)
    if not record["results"]:
        raise ConfigError("Got conversations that all are longer than the model's context: take others")
    return _show(record, console), record


def _read(path: Path) -> dict[str, Any]:
    """The figures of a run that is to go on."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        missing = {"results", "cut_off", "model", "threads", "max_tokens", "machine"} - set(record)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"Got --resume but --json {path} cannot be read: {error}") from None
    if missing:
        raise ConfigError(f"Got --resume but --json {path} is of another command: it lacks {sorted(missing)[0]}")
    return dict(record)


def _show(record: Mapping[str, Any], console: Console) -> int:
    """Prints the tables, and who was left out; the exit code."""
    for table in peers_tables_of(record):
        console.print(on_terminal(table))
    left_out = record["left_out"]
    for reason in dict.fromkeys(left_out.values()):
        _note(console, f"Left out {', '.join(name for name in left_out if left_out[name] == reason)}: {reason}")
    for kind, name in record["cut_off"]:
        _note(console, f"Cut off {kind} {name}: the context is full")
    ours = [row["same_as_plain"] for row in record["results"] if row["peer"] == OURS]
    if ours:
        console.print(f"identical to plain decoding: {sum(ours)}/{len(ours)}")
    return int(record["is_lossless"] and not all(ours))


def _note(console: Console, text: str) -> None:
    console.print(f"[yellow]{escape(text)}[/]", soft_wrap=True)


def _cannot_take_part(options: PeersOptions) -> dict[str, str]:
    """Why a peer cannot take part, by name; found before anything is loaded."""
    if options.llama_server is not None and not options.llama_server.is_file():
        raise ConfigError(f"Got --llama-server {options.llama_server} but there is no such file")
    found: dict[str, str] = {}
    wanted = [name for name in options.peers if name in SERVER_OPTIONS]
    if _binary(options) is None:
        found |= dict.fromkeys(
            wanted,
            "there is no llama-server on the PATH: build it with scripts/build_llama_server.sh, or name it with "
            "--llama-server",
        )
    elif gguf_file(options.model) is None:
        found |= dict.fromkeys(wanted, f"{options.model} is no GGUF file, which llama-server needs")
    if "llama-langchain" in wanted and importlib.util.find_spec("langchain_openai") is None:
        found.setdefault("llama-langchain", "langchain-openai is not installed: pip install langchain-openai")
    if "ours-langchain" in options.peers:
        try:
            check_framework("langchain")
        except CopySpecError as error:
            found["ours-langchain"] = str(error)
    return found


def _binary(options: PeersOptions) -> str | None:
    return str(options.llama_server) if options.llama_server is not None else find_llama_server()


class _Running:
    """The peers that take part, until the `with` block is left."""

    def __init__(self, options: PeersOptions, left_out: Mapping[str, str]) -> None:
        self._options = options
        self._peers = [name for name in options.peers if name not in left_out]
        self._lanes: dict[str, Callable[[AskedTurn], PeerAnswer | None]] = {}
        self._processes: dict[str, PeerProcess] = {}
        self._servers: LlamaServers | None = None
        with ExitStack() as stack:
            self._start(stack)
            self._close = stack.pop_all().close

    def __enter__(self) -> _Running:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _start(self, stack: ExitStack) -> None:
        config, threads = self._options.config, self._options.num_threads
        langchain = "ours-langchain" in self._peers
        self._engine = stack.enter_context(
            PeerProcess("the engine", threads, EngineSide, config=config, langchain=langchain)
        )
        self._facts: dict[str, Any] = self._engine.call("facts")
        self._processes["copyspec"] = self._engine
        if set(self._peers) & set(IN_TRANSFORMERS):
            started = PeerProcess(
                "transformers",
                threads,
                TransformersSide,
                model=config.model,
                device=config.device,
                dtype=config.dtype,
                trust_remote_code=config.trust_remote_code,
            )
            self._processes["transformers"] = stack.enter_context(started)
        gguf, binary = gguf_file(config.model), _binary(self._options)
        if gguf is not None and binary is not None:
            self._servers = LlamaServers(binary, gguf, threads)
            stack.callback(self._servers.close)
        for name in self._peers:
            self._lanes[name] = self._lane(name)

    def _lane(self, name: str) -> Callable[[AskedTurn], PeerAnswer | None]:
        if name in IN_TRANSFORMERS:
            process = self._processes["transformers"]
            return lambda asked: process.call("answer", IN_TRANSFORMERS[name], asked.prompt_ids, asked.max_tokens)
        if name in IN_ENGINE:
            return lambda asked: self._engine.call("answer", name, asked)
        servers = self._servers
        assert servers is not None, "see _cannot_take_part"
        servers.start(name, SERVER_OPTIONS[name], WARM_UP, self._engine.call("encode", WARM_UP))
        if name != "llama-langchain":
            return lambda asked: servers.answer(name, asked.prompt_ids, asked.max_tokens)
        server = servers.running.get(name)
        chat = _chat_openai(server) if server is not None else None
        return lambda asked: servers.ask(name, lambda: _over_openai(chat, asked))

    @property
    def failed(self) -> dict[str, str]:
        """Why a server took part no more, by peer."""
        return self._servers.notes if self._servers is not None else {}

    def warm_up(self) -> None:
        """Every peer writes once, in a conversation that is then forgotten."""
        self._ask(self._asked("warm-up", [{"role": "user", "content": WARM_UP}], WARM_UP_TOKENS), 0)
        self._engine.call("forget", "warm-up")

    def write(self, conversation: PeerConversation, number: int) -> Iterator[dict[str, Any]]:
        """A row for each turn and peer, until the context is full.

        Args:
            conversation: is forgotten at its end.
            number: of it, from 0: says who writes first.
        """
        name, answers = f"{conversation.kind} {conversation.name}", list[str]()
        for turn in range(1, len(conversation.requests) + 1):
            asked = self._asked(name, conversation.messages(answers), self._options.max_tokens)
            if asked.max_tokens < 1:
                break
            written = self._ask(asked, number + turn)
            plain = written[PLAIN]
            for peer in (peer for peer in self._peers if peer in written):
                answer = written[peer]
                yield {
                    "peer": peer,
                    "kind": conversation.kind,
                    "conversation": conversation.name,
                    "turn": turn,
                    "prompt_tokens": len(asked.prompt_ids),
                    "tokens": answer.tokens,
                    "seconds": round(answer.seconds, 6),
                    "ttft_s": None if answer.ttft_s is None else round(answer.ttft_s, 6),
                    "same_as_plain": answer.same_as(plain),
                }
            assert plain.text is not None, "an answer of the engine has both tokens and text"
            answers.append(plain.text)
        self._engine.call("forget", name)

    def _asked(self, name: str, messages: Sequence[Mapping[str, str]], max_tokens: int) -> AskedTurn:
        prompt_ids = self._engine.call("prompt", name, messages)
        room = min(self._facts["max_model_len"], CONTEXT_TOKENS) - len(prompt_ids)
        return AskedTurn(name, tuple(messages), tuple(prompt_ids), min(max_tokens, room))

    def _ask(self, asked: AskedTurn, turn: int) -> dict[str, PeerAnswer]:
        """The answers of all that take part, asked one after the other from the peer `turn` on."""
        peers = [name for name in self._peers if name not in self.failed]
        first = turn % len(peers)
        found = {name: self._lanes[name](asked) for name in (*peers[first:], *peers[:first])}
        return {name: answer for name, answer in found.items() if answer is not None}

    def record(self, earlier: Mapping[str, Any] | None) -> dict[str, Any]:
        """What the file of figures holds before a conversation is written.

        Args:
            earlier: figures that it goes on with.

        Raises:
            ConfigError: those hang on something else.
        """
        record = {
            "results": [],
            "cut_off": [],
            "peers": self._peers,
            "threads": self._options.num_threads,
            "max_tokens": self._options.max_tokens,
            **self._facts_of_all(),
        }
        if earlier is None:
            return record
        for name in ("model", "dtype", "threads", "max_tokens", "peers", "machine"):
            if earlier.get(name) != record[name]:
                raise ConfigError(
                    f"Got --resume of figures with {name} {earlier.get(name)}, but now it is {record[name]}: name "
                    "another file, or run it as before"
                )
        return {**record, "results": list(earlier["results"]), "cut_off": list(earlier["cut_off"])}

    def _facts_of_all(self) -> dict[str, Any]:
        others, binary = {}, _binary(self._options)
        if self._servers is not None and binary is not None:
            repacks = not any(server.is_without_repacking for server in self._servers.running.values())
            others["llama-server"] = server_version(binary) + ("" if repacks else ", --no-repack")
        if "ours-langchain" in self._peers:
            others["langchain-core"] = version("langchain-core")
        if "llama-langchain" in self._peers:
            others["langchain-openai"] = version("langchain-openai")
        return {**self._facts, "versions": {**self._facts["versions"], **others}}

    def memory(self) -> list[dict[str, Any]]:
        """What each process holds, and who answers in it; figures are None where the system does not tell."""
        running = self._servers.running if self._servers is not None else {}
        found: dict[str, tuple[int, list[str]]] = {
            name: (process.pid, [peer for peer in self._peers if peer in members])
            for (name, process), members in zip(self._processes.items(), (IN_ENGINE, IN_TRANSFORMERS), strict=False)
        }
        found |= {name: (server.pid, [name]) for name, server in running.items()}
        nothing = {"bytes": None, "peak_bytes": None}
        return [
            {"process": name, "peers": peers, **(memory_of(pid) or nothing)} for name, (pid, peers) in found.items()
        ]


def _chat_openai(server: LlamaServer) -> Any:  # noqa: ANN401 - of a package that need not be there
    made = importlib.import_module("langchain_openai").ChatOpenAI
    return made(base_url=f"{server.url}/v1", api_key="none", model="llama", temperature=0, stream_usage=True)


def _over_openai(chat: Any, asked: AskedTurn) -> PeerAnswer:  # noqa: ANN401
    """The answer of a chat model of `langchain_openai`, with its errors as those of the server."""
    failures = importlib.import_module("openai").OpenAIError
    try:
        return through_langchain(chat, asked)
    except failures as error:
        raise LlamaServerError(f"llama-server gave no answer: {error}") from None
