"""What `ChatCopySpec` adds to the engine's own time per call, whole and streamed, side by side in one run.

Each round asks for the same answer of the bundled model four ways, in turn; medians of all rounds are compared. Beside
wall-clock time, which other work on the machine disturbs, it shows the processor time that the calling thread spends
more than with the engine alone, as a share of the engine's wall-clock time.

Run: python scripts/bench_langchain.py [--tokens 300] [--rounds 15] [--drafter none]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from langchain_core.messages import HumanMessage

from copyspec_engine import Engine, EngineConfig, GenerationRequest, SamplingParams
from langchain_copyspec import ChatCopySpec


def measure(tokens: int, rounds: int, drafter: str) -> dict[str, tuple[float, float]]:
    """Median seconds of a call and of its thread's processor time, by how it is made."""
    text = "\n".join(f"line {number}: all work and no play" for number in range(tokens // 5))
    messages = [HumanMessage(text), HumanMessage("Repeat the document.")]
    with Engine(EngineConfig(model="bundled", drafter=drafter)) as engine:
        request = {
            "messages": [{"role": "user", "content": str(message.content)} for message in messages],
            "sampling": SamplingParams(max_tokens=tokens),
            "parse_reply": True,
        }
        llm = ChatCopySpec(engine=engine, max_tokens=tokens)
        ways: dict[str, Callable[[str], object]] = {
            "generate": lambda session: engine.generate(GenerationRequest(**request, session_id=session)),
            "invoke": lambda session: llm.invoke(messages, session_id=session),
            "engine.stream": lambda session: list(engine.stream(GenerationRequest(**request, session_id=session))),
            "llm.stream": lambda session: list(llm.stream(messages, session_id=session)),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        own: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds + 1):
            for way, ask in ways.items():
                session = f"{way}-{number}"
                started, worked = time.perf_counter(), time.thread_time()
                ask(session)
                if number:  # the first round warms up
                    seconds[way].append(time.perf_counter() - started)
                    own[way].append(time.thread_time() - worked)
                engine.forget(session)
    return {way: (statistics.median(seconds[way]), statistics.median(own[way])) for way in ways}


def main() -> None:
    """Print times and overheads; exit code 1 if more than 5 % is added."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=300, help="length of the answer")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--drafter", default="none", choices=["none", "adaptive", "copyspec"])
    options = parser.parse_args()
    medians = measure(options.tokens, options.rounds, options.drafter)
    print(f"{options.tokens} tokens, drafter {options.drafter}, median of {options.rounds} rounds")
    overheads = []
    for own, ours in (("generate", "invoke"), ("engine.stream", "llm.stream")):
        (engine_s, engine_cpu), (our_s, our_cpu) = medians[own], medians[ours]
        overheads.append((our_cpu - engine_cpu) / engine_s)
        print(
            f"{own:>14} {engine_s * 1e3:8.1f} ms {ours:>11} {our_s * 1e3:8.1f} ms {our_s / engine_s - 1:+7.1%}   "
            f"processor {(our_cpu - engine_cpu) * 1e3:+6.1f} ms {overheads[-1]:+.1%}"
        )
    raise SystemExit(max(overheads) > 0.05)


if __name__ == "__main__":
    main()
