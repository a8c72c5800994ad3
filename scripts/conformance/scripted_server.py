"""A server over a scripted model, as a process: `python -m scripts.conformance.scripted_server` prints its address."""

from __future__ import annotations

import sys

from copyspec_engine import EngineConfig
from copyspec_engine.serve.config import ServeConfig
from copyspec_engine.serve.lifecycle import listen, run_server
from copyspec_engine.testing import scripted_engine
from scripts.conformance.replies import reply

__all__ = ["CONFIG", "ENGINE_CONFIG"]

CONFIG = ServeConfig(port=0, max_in_flight=8, drain_notice_s=0.0, drain_s=1.0)
ENGINE_CONFIG = EngineConfig(model="scripted", max_model_len=16_000, drafter="copyspec")


def main() -> None:
    """Serve until SIGTERM."""
    code = run_server(
        lambda _: scripted_engine(reply, ENGINE_CONFIG), CONFIG, listen(CONFIG), lambda url: print(url, flush=True)
    )
    sys.exit(code)


if __name__ == "__main__":
    main()
