"""llama.cpp as a peer: a `llama-server` of this machine on the same GGUF file, asked with the same token ids.

Its arithmetic is another one (activations are rounded to 8 bits), so that its answer may be another text.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copyspec_engine import CopySpecError

__all__ = ["LlamaServer", "LlamaServerError", "ServerAnswer", "find_llama_server"]

HOST = "127.0.0.1"
CONTEXT_TOKENS = 8192
START_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 5.0


class LlamaServerError(CopySpecError):
    """The server did not start, serves another model, or gave no answer."""


@dataclass(frozen=True, slots=True)
class ServerAnswer:
    """What the server wrote behind the prompt."""

    text: str
    tokens: int
    seconds: float
    """From the request to the whole answer."""
    write_s: float
    """Of these, after the prompt, by the server's own clock."""


def find_llama_server() -> str | None:
    """Where `llama-server` is on the PATH; None if it is not there."""
    return shutil.which("llama-server")


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
        try:
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT
            )
        except OSError as error:
            self._log.close()
            raise LlamaServerError(f"{binary} cannot be run: {error.strerror or error}") from None
        try:
            self._await_start(start_timeout_s)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LlamaServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_tokens(self, text: str, token_ids: Sequence[int]) -> None:
        """Make sure that it cuts a text into the same tokens: another model's answers would be no comparison.

        Raises:
            LlamaServerError: it does not.
        """
        found = self._post("/tokenize", {"content": text, "add_special": False}, "tokens")
        if found["tokens"] != list(token_ids):
            raise LlamaServerError("llama-server cuts the document into other tokens: it serves another model")

    def answer(self, prompt_ids: Sequence[int], max_tokens: int) -> ServerAnswer:
        """The greedy answer; the KV of what this prompt shares with the last one is reused.

        Raises:
            LlamaServerError: the server failed, or was not done in time.
        """
        body = {"prompt": list(prompt_ids), "n_predict": max_tokens, "temperature": 0, "cache_prompt": True}
        started = time.perf_counter()
        said = self._post("/completion", body, "content", "tokens_predicted", "timings")
        seconds = time.perf_counter() - started
        return ServerAnswer(said["content"], said["tokens_predicted"], seconds, said["timings"]["predicted_ms"] / 1000)

    def close(self) -> None:
        """End the server; it is killed if it does not end by itself."""
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _await_start(self, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            code = self._process.poll()
            if code is not None:
                raise LlamaServerError(f"llama-server ended with exit code {code} at its start: {self._last_line()}")
            with contextlib.suppress(OSError, http.client.HTTPException):  # not listening yet
                if self._request("GET", "/health", None, timeout_s=2.0)[0] == http.client.OK:
                    return
            time.sleep(0.05)
        raise LlamaServerError(f"llama-server was not ready after {timeout_s:.0f} s: {self._last_line()}")

    def _post(self, path: str, body: dict[str, Any], *expected: str) -> dict[str, Any]:
        """The JSON object that comes back, which has the keys `expected`."""
        try:
            status, data = self._request("POST", path, json.dumps(body), timeout_s=self._timeout_s)
        except TimeoutError:
            raise LlamaServerError(f"llama-server gave no answer in {self._timeout_s:.0f} s") from None
        except (OSError, http.client.HTTPException) as error:
            code = self._process.poll()
            ended = f" (it ended with exit code {code})" if code is not None else ""
            raise LlamaServerError(f"llama-server gave no answer: {error or type(error).__name__}{ended}") from None
        if status != http.client.OK:
            raise LlamaServerError(
                f"llama-server answered {path} with status {status}: {data[:200].decode('utf-8', 'replace')}"
            )
        found: dict[str, Any] = json.loads(data)
        missing = [key for key in expected if key not in found]
        if missing:
            raise LlamaServerError(
                f"llama-server's answer to {path} lacks {', '.join(missing)}: is it another version?"
            )
        return found

    def _request(self, method: str, path: str, body: str | None, *, timeout_s: float) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=timeout_s)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
            response = connection.getresponse()
            return response.status, response.read()
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
