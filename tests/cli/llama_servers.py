"""A stand-in for `llama-server`: a script that answers as the real one does, and fails as it is told to."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["is_running", "put_stand_in", "starts"]

STAND_IN = """#!{python}
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

if "--version" in sys.argv:
    sys.exit("version: 7 (stand-in)")
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
mode = {mode!r}
with open({record!r}, "a") as file:
    file.write(json.dumps([os.getpid(), sys.argv[1:]]) + "\\n")
if mode == "crash":
    print("loading", flush=True)
    sys.exit("cannot read the file")
if mode == "no AMX" and "--no-repack" not in sys.argv:
    os.kill(os.getpid(), 11)
if mode == "never ready":
    time.sleep(60)

class Handler(BaseHTTPRequestHandler):
    answered = 0

    def say(self, data, status=200):
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def stream(self, pieces, fails):
        self.send_response(200)
        self.end_headers()
        for piece in pieces:
            self.wfile.write(b"data: " + json.dumps(piece).encode() + b"\\n\\n")
            self.wfile.flush()
            if fails:
                self.wfile.write(b"error: " + json.dumps({{"message": "out of memory"}}).encode() + b"\\n\\n")
                return
            time.sleep(0.05)

    def do_GET(self):
        self.say({{"status": "ok"}})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            tokens = json.loads({tokens!r})
            return self.say({{"tokens": tokens[1:] if mode == "other model" else tokens}})
        if self.path == "/v1/chat/completions":
            assert asked["temperature"] == 0 and asked["stream"] is True
            return self.stream([
                {{"choices": [{{"index": 0, "delta": {{"content": "sa"}}}}]}},
                {{"choices": [{{"index": 0, "delta": {{"content": "id"}}, "finish_reason": "stop"}}]}},
                {{"choices": [], "usage": {{"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16}}}},
            ], fails=False)
        assert self.path == "/completion" and asked["temperature"] == 0
        assert asked["cache_prompt"] is True and asked["stream"] is True
        assert all(isinstance(token, int) for token in asked["prompt"])
        Handler.answered += 1
        if mode == "slow":
            time.sleep(60)
        if mode == "dies" and Handler.answered > 1:
            os._exit(7)
        if mode == "refuses":
            return self.say({{"error": "too long"}}, 400)
        end = {{"content": "id", "tokens_predicted": asked["n_predict"], "timings": {{"predicted_ms": 2.0}}}}
        if mode == "other version":
            end = {{"content": "x"}}
        self.stream([{{"content": "sa"}}, end], fails=mode == "fails on the way")

    def log_message(self, *_):
        pass

HTTPServer((words["--host"], int(words["--port"])), Handler).serve_forever()
"""


def put_stand_in(folder: Path, mode: str, probe_ids: Sequence[int]) -> Path:
    """Writes the script `llama-server`; returns the file to which each start adds its process and command line.

    Args:
        folder: where both lie.
        mode: how it behaves, of those in the script; "answers" is well.
        probe_ids: the tokens that it cuts every text into.
    """
    record, program = folder / "started", folder / "llama-server"
    tokens = json.dumps(list(probe_ids))
    program.write_text(STAND_IN.format(python=sys.executable, mode=mode, record=str(record), tokens=tokens))
    program.chmod(0o755)
    return record


def starts(record: Path) -> list[Any]:
    return [json.loads(line) for line in record.read_text().splitlines()]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
