"""A server over a scripted engine, as a process: `python -m tests.serve.server MEMORY_FILE WORDS [OPTION=JSON ...]`.

It says its address when it listens. With `hold=FILE` its engine is not there before the file is gone, and what is
written in it by then is why the load fails. With `stall=FILE` a call that says "stall" writes the file, and holds up
all that the engine does until it is gone. Its loggers say all that they have to say on stderr.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from copyspec_engine import ConfigError, CopySpecError, Engine, EngineConfig, LoadProgress, OnProgress
from copyspec_engine.serve.config import ServeConfig
from copyspec_engine.serve.lifecycle import listen, run_server
from copyspec_engine.testing import scripted_engine

MOST_TOKENS = 1 << 17


def load(url: str, hold: Path | None, stall: Path | None, check: OnProgress) -> Engine:
    path, words = sys.argv[1], int(sys.argv[2])

    def reply(prompt: str) -> str:
        if "die" in prompt:
            raise SystemExit("what no request should do to a loop")
        if stall is not None and "stall" in prompt:
            stall.touch()
            while stall.exists():
                time.sleep(0.01)
        return "word " * words

    if hold is not None:
        print(url, flush=True)
        with suppress(FileNotFoundError):
            while not (wrong := hold.read_text()):
                check(LoadProgress("read", "waiting"))
                time.sleep(0.01)
            raise ConfigError(wrong)
    config = EngineConfig(model="scripted", drafter="none", memory_path=path, max_model_len=MOST_TOKENS)
    return scripted_engine(reply, config)


def main() -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.DEBUG)
    options = dict(given.split("=", 1) for given in sys.argv[3:])
    hold, stall = (Path(options.pop(name)) if name in options else None for name in ("hold", "stall"))
    told = {name: json.loads(value) for name, value in options.items()}
    config = ServeConfig(**{"port": 0, "drain_notice_s": 0.0, "drain_s": 0.2, **told})
    listener = listen(config)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        begin = partial(load, url, hold, stall)
        code = run_server(begin, config, listener, lambda url: print(url, flush=True))
    except CopySpecError as error:
        print(error, flush=True)
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()
