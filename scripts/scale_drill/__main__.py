"""Drills of several replicas, on a Ray cluster of their own: `python -m scripts.scale_drill [DRILL ...] [options]`.

sticky       many calls of 500 conversations: each is answered where the one before was
lost         SIGKILL of a replica in the middle of streams, behind a front
lost-direct  the same where Ray's proxies ask the replicas themselves
lost-model   the same behind a front, with a real model and a processor for each replica: only where it is named
front        SIGKILL of the front
proxy        SIGKILL of Ray's proxy
scale        1, 2, 3, 2 and 1 replicas under load
rolling      another version in place of a running one
stuck        a loop that is stuck in a pass
together     what replicas answer together: lists, counts, erasing
speed        what two replicas write in a second against one, a processor each: only where it is named; a real model

They run in a network of their own (Linux, and a user who may have one). The exit code is 0 if all that was drilled
held, 1 if not, and 77 where there is no such network.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from scripts.scale_drill.network import enter_own_network

SKIPPED = 77


def main(words: list[str]) -> int:
    """Run the drills that are asked for; the exit code."""
    parser = argparse.ArgumentParser("scale_drill", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("drills", nargs="*", default=[], metavar="DRILL", help="default: all of them")
    parser.add_argument("--conversations", type=int, default=60, help="of most drills")
    parser.add_argument("--calls", type=int, default=10_000, help="of sticky")
    parser.add_argument("--rounds", type=int, default=2, help="kills of lost, lost-direct and lost-model")
    parser.add_argument("--pass-s", type=float, default=0.004, help="seconds that a pass of the scripted model takes")
    parser.add_argument("--memory-path", help="a store that the replicas share; default: a file for each")
    parser.add_argument("--model", default="smollm2", help="of speed and lost-model")
    parser.add_argument("--writes", type=int, default=4, help="calls of each conversation of speed")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(words)
    try:
        enter_own_network()
    except OSError as error:
        print(f"skipped: {error}", file=sys.stderr)
        return SKIPPED
    return _run(options, shlex.join(["python", "-m", "scripts.scale_drill", *words]), parser)


def _run(options: argparse.Namespace, command: str, parser: argparse.ArgumentParser) -> int:
    from copyspec_engine.lab.measuring import machine, versions, write_record
    from scripts.scale_drill.cluster import Cluster
    from scripts.scale_drill.drills import DRILLS, DrillOptions
    from scripts.scale_drill.models import PASS_VARIABLE
    from scripts.scale_drill.speed import measure_speed

    unknown = [name for name in options.drills if name not in (*DRILLS, "speed")]
    if unknown:
        parser.error(f"got {unknown[0]!r} but expected {', '.join(DRILLS)} or speed")
    os.environ[PASS_VARIABLE] = str(options.pass_s)
    os.environ["COPYSPEC_API_KEY"] = ""
    told: dict[str, dict[str, Any]] = {}
    all_held = True
    with tempfile.TemporaryDirectory() as folder, Cluster() as cluster:
        drills = DrillOptions(
            Path(folder), options.conversations, options.calls, options.rounds, options.memory_path, options.model
        )
        for name in options.drills or [name for name in DRILLS if name != "lost-model"]:
            if name == "speed":
                told[name] = {
                    way: asyncio.run(measure_speed(cluster, options.model, options.writes, direct=way == "direct"))
                    for way in ("front", "direct")
                }
                print(f"{name}: {told[name]}", flush=True)
                continue
            drill = replace(drills, folder=Path(folder, name))
            began = time.monotonic()
            found = asyncio.run(DRILLS[name](cluster, drill))
            seconds = round(time.monotonic() - began, 1)
            told[name] = {"held": not found.broken, "broken": found.broken, "seconds": seconds, **found.figures}
            all_held = all_held and not found.broken
            print(f"{name}: {told[name]}", flush=True)
    if options.json is not None:
        about = {
            "pass_s": options.pass_s,
            "shared_store": drills.is_shared,
            "versions": versions(),
            "machine": machine(),
        }
        write_record(options.json, {"drills": told, **about}, command)
    return int(not all_held)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
