"""Asks /health again and again, as a process of its own: `python -m scripts.serve_drill.probe HOST PORT`.

Whatever the clients of a drill do, they do not hold this one up. At the end of its standard input it writes the
seconds that each answer took, as JSON.
"""

from __future__ import annotations

import http.client
import json
import select
import sys
import time

_EVERY_S = 0.05


def main(host: str, port: str) -> None:
    """Probe until the standard input ends."""
    seconds: list[float] = []
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    while not select.select([sys.stdin], [], [], _EVERY_S)[0]:
        begin = time.perf_counter()
        connection.request("GET", "/health")
        response = connection.getresponse()
        response.read()
        if response.status != 200:
            raise RuntimeError(f"/health is {response.status}")
        seconds.append(time.perf_counter() - begin)
    json.dump(seconds, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
