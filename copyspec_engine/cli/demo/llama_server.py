"""llama.cpp as a peer: a `llama-server` of this machine on the same GGUF file, asked with the same token ids.

Its arithmetic is another one (activations are rounded to 8 bits), so that its answer may be another text.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from copyspec_engine import CopySpecError
from copyspec_engine.cli.demo.figures import PeerAnswer
from copyspec_engine.models import find_model

__all__ = [
    "CONTEXT_TOKENS",
    "LlamaServer",
    "LlamaServerError",
    "LlamaServers",
    "find_llama_server",
    "gguf_file",
    "server_version",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")

HOST = "127.0.0.1"
CONTEXT_TOKENS = 8192
START_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 5.0


class LlamaServerError(CopySpecError):
    """The server did not start, serves another model, or gave no answer."""


def find_llama_server() -> str | None:
    """Where `llama-server` is on the PATH; None if it is not there."""
    return shutil.which("llama-server")


def server_version(binary: str) -> str:
    """What the program says of its version; "unknown" if it says nothing of it."""
    try:
        said = subprocess.run(
            [binary, "--version"], capture_output=True, text=True, timeout=STOP_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    found = re.search(r"^version: (.+)$", said.stdout + said.stderr, flags=re.MULTILINE)
    return found[1].strip() if found else "unknown"


def gguf_file(model: str) -> Path | None:
    """The GGUF file that a model is read from; None for another kind of checkpoint."""
    found = find_model(model)
    return found.path if found is not None and found.path.suffix.lower() == ".gguf" else None


class LlamaServer:
    """A running server; `close` ends it, and so does leaving its `with` block.

    Args:
        binary: path of the program.
        gguf: the model's file.
        threads: how many threads compute.
        options: further words of its command line, as `("--spec-type", "ngram-mod")`.
        start_timeout_s: how long loading may take.
        answer_timeout_s: how long an answer may take.

    Raises:
        LlamaServerError: it did not start in time, or ended.
    """

    def __init__(
        self,
        binary: str,
        gguf: Path,
        *,
        threads: int,
        options: Sequence[str] = (),
        start_timeout_s: float = START_TIMEOUT_S,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        self._timeout_s = answer_timeout_s
        self._port = _free_port()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the server writes
        words = [binary, "-m", str(gguf), "--host", HOST, "--port", str(self._port), "-t", str(threads)]
        words += ["-c", str(CONTEXT_TOKENS), "-np", "1", "--jinja", *options]
        self.is_without_repacking = False
        """Whether it was started with --no-repack, which costs it the fastest instructions of some machines."""
        self._process = self._started(words)
        try:
            try:
                self._await_start(start_timeout_s)
            except LlamaServerError as error:
                if (self._process.poll() or 0) >= 0:
                    raise
                # Some machines name instructions for matrices (AMX) that they do not let a program use.
                logger.warning("%s; started again with --no-repack, which leaves such instructions alone", error)
                self._process = self._started([*words, "--no-repack"])
                self.is_without_repacking = True
                self._await_start(start_timeout_s)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LlamaServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{HOST}:{self._port}"

    def check_tokens(self, text: str, token_ids: Sequence[int]) -> None:
        """Make sure that it cuts a text into the same tokens: another model's answers would be no comparison.

        Raises:
            LlamaServerError: it does not.
        """
        found = self._post("/tokenize", {"content": text, "add_special": False}, "tokens")
        if found["tokens"] != list(token_ids):
            raise LlamaServerError("llama-server cuts the document into other tokens: it serves another model")

    def answer(self, prompt_ids: Sequence[int], max_tokens: int) -> PeerAnswer:
        """The greedy answer; the KV of what this prompt shares with the last one is reused.

        Raises:
            LlamaServerError: the server failed, or was not done in time.
        """
        body = {
            "prompt": list(prompt_ids),
            "n_predict": max_tokens,
            "temperature": 0,
            "cache_prompt": True,
            "stream": True,
        }
        started = time.perf_counter()
        text, end, ttft_s = "", dict[str, Any](), 0.0
        for end in self._pieces("/completion", body):
            ttft_s = ttft_s or time.perf_counter() - started
            text += self._checked(end, "/completion", "content")["content"]
        seconds = time.perf_counter() - started
        self._checked(end, "/completion", "tokens_predicted", "timings")
        write_s = end["timings"]["predicted_ms"] / 1000
        return PeerAnswer(end["tokens_predicted"], seconds, text=text, write_s=write_s, ttft_s=ttft_s)

    def close(self) -> None:
        """End the server; it is killed if it does not end by itself."""
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _started(self, words: Sequence[str]) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT)
        except OSError as error:
            self._log.close()
            raise LlamaServerError(f"{words[0]} cannot be run: {error.strerror or error}") from None

    def _await_start(self, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            code = self._process.poll()
            if code is not None:
                raise LlamaServerError(f"llama-server ended with exit code {code} at its start: {self._last_line()}")
            with (
                contextlib.suppress(OSError, http.client.HTTPException),  # not listening yet
                self._response("GET", "/health", None, timeout_s=2.0) as response,
            ):
                if response.status == http.client.OK:
                    return
            time.sleep(0.05)
        raise LlamaServerError(f"llama-server was not ready after {timeout_s:.0f} s: {self._last_line()}")

    def _post(self, path: str, body: dict[str, Any], *expected: str) -> dict[str, Any]:
        """The JSON object that comes back, which has the keys `expected`."""
        with self._asked(path, body) as response:
            found: dict[str, Any] = json.loads(response.read())
        return self._checked(found, path, *expected)

    def _pieces(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The JSON objects of an answer that comes in server-sent events."""
        end = time.monotonic() + self._timeout_s
        with self._asked(path, body) as response:
            for line in response:
                if time.monotonic() > end:
                    raise TimeoutError
                kind, _, data = line.decode("utf-8").strip().partition(": ")
                if kind == "error":
                    raise LlamaServerError(f"llama-server answered {path} with an error: {data[:200]}")
                if kind == "data":
                    yield json.loads(data)

    @contextlib.contextmanager
    def _asked(self, path: str, body: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
        """The response to a POST, whose status is OK; what goes wrong until it is read is told of."""
        try:
            with self._response("POST", path, json.dumps(body), timeout_s=self._timeout_s) as response:
                if response.status != http.client.OK:
                    said = response.read()[:200].decode("utf-8", "replace")
                    raise LlamaServerError(f"llama-server answered {path} with status {response.status}: {said}")
                yield response
        except TimeoutError:
            raise LlamaServerError(f"llama-server gave no answer in {self._timeout_s:.0f} s") from None
        except (OSError, http.client.HTTPException) as error:
            code = self._process.poll()
            ended = f" (it ended with exit code {code})" if code is not None else ""
            raise LlamaServerError(f"llama-server gave no answer: {error or type(error).__name__}{ended}") from None

    @staticmethod
    def _checked(found: dict[str, Any], path: str, *expected: str) -> dict[str, Any]:
        missing = [key for key in expected if key not in found]
        if missing:
            raise LlamaServerError(
                f"llama-server's answer to {path} lacks {', '.join(missing)}: is it another version?"
            )
        return found

    @contextlib.contextmanager
    def _response(
        self, method: str, path: str, body: str | None, *, timeout_s: float
    ) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=timeout_s)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
            yield connection.getresponse()
        finally:
            connection.close()

    def _last_line(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1].strip()[:200] if lines else "it said nothing"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


class LlamaServers:
    """Servers on one model file, by the names of those that they stand for; `close` ends all.

    One that fails is ended and asked no more, and `notes` says why.

    Args:
        binary: path of the program.
        gguf: the model's file.
        threads: how many threads each computes with.
    """

    def __init__(self, binary: str, gguf: Path, threads: int) -> None:
        self._binary, self._gguf, self._threads = binary, gguf, threads
        self._servers: dict[str, LlamaServer] = {}
        self.notes: dict[str, str] = {}
        """Why one takes no further part, by name."""

    @property
    def running(self) -> dict[str, LlamaServer]:
        """Those that take part."""
        return dict(self._servers)

    def start(self, name: str, options: Sequence[str], probe: str, probe_ids: Sequence[int]) -> None:
        """Start one more.

        Args:
            name: of it.
            options: see `LlamaServer`.
            probe: a text.
            probe_ids: the tokens of `probe` that it must find too.
        """
        try:
            server = LlamaServer(self._binary, self._gguf, threads=self._threads, options=options)
        except LlamaServerError as error:
            self.notes[name] = str(error)
            return
        self._servers[name] = server
        self.ask(name, lambda: server.check_tokens(probe, probe_ids))

    def answer(self, name: str, prompt_ids: Sequence[int], max_tokens: int) -> PeerAnswer | None:
        """See `LlamaServer.answer`; None from one that fails."""
        return self.ask(name, lambda: self._servers[name].answer(prompt_ids, max_tokens))

    def ask(self, name: str, call: Callable[[], T]) -> T | None:
        """What a call of a running server gives; None if it fails, with which the server's part is over."""
        try:
            return call()
        except LlamaServerError as error:
            self.notes[name] = str(error)
            self._servers.pop(name).close()
            return None

    def close(self) -> None:
        """End all that run."""
        for server in self._servers.values():
            server.close()
        self._servers.clear()
