"""How a load is told of: seconds of each phase and the longest silence between two reports.

Run: python scripts/measure_load.py MODEL. An empty NUMBA_CACHE_DIR shows the first load after an installation.
"""

from __future__ import annotations

import sys
import time
from itertools import pairwise


def main(model: str) -> None:
    """Load the model and print what was told of it."""
    begin = time.perf_counter()
    from copyspec_engine import Engine, EngineConfig, LoadProgress

    said: list[tuple[float, str]] = [(begin, "the start")]

    def listen(progress: LoadProgress) -> None:
        said.append((time.perf_counter(), str(progress)))

    with Engine(EngineConfig(model=model), on_progress=listen) as engine:
        said.append((time.perf_counter(), "the end"))
        seconds = engine.info.load_seconds
    silence, after = max((later - at, text) for (at, text), (later, _) in pairwise(said))
    print(f"{said[-1][0] - begin:.1f} s:", ", ".join(f"{phase} {took:.1f}" for phase, took in seconds.items()))
    print(f"{len(said) - 2} reports; the longest silence {silence:.2f} s, after {after!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
