"""A server over a scripted engine, as a process: `python -m tests.serve.server MEMORY_FILE WORDS`."""

from __future__ import annotations

import sys

from copyspec_engine import CopySpecError, EngineConfig
from copyspec_engine.serve.config import ServeConfig
from copyspec_engine.serve.lifecycle import listen, run_server
from copyspec_engine.testing import scripted_engine


def main() -> None:
    path, words = sys.argv[1], int(sys.argv[2])
    config = ServeConfig(port=0, drain_notice_s=0.0, drain_s=0.2)

    def reply(prompt: str) -> str:
        if "die" in prompt:
            raise SystemExit("what no request should do to a loop")
        return "word " * words

    engine = scripted_engine(reply, EngineConfig(model="scripted", drafter="none", memory_path=path))
    try:
        code = run_server(engine, config, listen(config), lambda url: print(url, flush=True))
    except CopySpecError as error:
        print(error, flush=True)
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()
