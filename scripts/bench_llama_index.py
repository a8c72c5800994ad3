"""What `CopySpec` adds to the engine's own time per call, whole and streamed, sync and async, side by side in one run.

Each round asks for the same answer of the bundled model in every way, in turn. Compared is the processor time of the
caller's thread, which other work on the machine does not lengthen, with the engine's whole time for the answer.

Run: python scripts/bench_llama_index.py [--tokens 200] [--rounds 15] [--drafter none]
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable

from llama_index.core.llms import ChatMessage

from copyspec_engine import Engine, EngineConfig, GenerationRequest, SamplingParams
from llama_index.llms.copyspec import CopySpec

PAIRS = {"chat": "generate", "achat": "agenerate", "stream_chat": "stream", "astream_chat": "astream"}
"""Our method, and the engine's."""


async def measure(tokens: int, rounds: int, drafter: str) -> dict[str, tuple[float, float]]:
    """Least seconds of a call, and of its caller's processor, by how it is made."""
    text = "\n".join(f"line {number}: all work and no play" for number in range(1 + tokens // 6))
    messages = [ChatMessage(text), ChatMessage("Repeat the document.")]
    with Engine(EngineConfig(model="bundled", drafter=drafter)) as engine:
        llm = CopySpec(engine=engine, max_tokens=tokens)

        def request(session: str) -> GenerationRequest:
            return GenerationRequest(
                messages=[{"role": "user", "content": message.content} for message in messages],
                sampling=SamplingParams(max_tokens=tokens),
                parse_reply=True,
                session_id=session,
            )

        async def plainly(answer: Callable[[], object]) -> None:
            answer()

        async def engine_astream(session: str) -> None:
            async for _ in engine.astream(request(session)):
                pass

        async def llm_astream(session: str) -> None:
            async for _ in await llm.astream_chat(messages, session_id=session):
                pass

        ways: dict[str, Callable[[str], Awaitable[object]]] = {
            "generate": lambda session: plainly(lambda: engine.generate(request(session))),
            "chat": lambda session: plainly(lambda: llm.chat(messages, session_id=session)),
            "agenerate": lambda session: engine.agenerate(request(session)),
            "achat": lambda session: llm.achat(messages, session_id=session),
            "stream": lambda session: plainly(lambda: list(engine.stream(request(session)))),
            "stream_chat": lambda session: plainly(lambda: list(llm.stream_chat(messages, session_id=session))),
            "astream": engine_astream,
            "astream_chat": llm_astream,
        }
        seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for number in range(rounds + 1):
            for way, ask in ways.items():
                session = f"{way}-{number}"
                await ask(session)  # its prompt is read then: a second call spends its time on the answer
                started, busy = time.perf_counter(), time.thread_time()
                await ask(session)
                if number:  # the first round warms up
                    seconds[way].append((time.perf_counter() - started, time.thread_time() - busy))
                engine.forget(session)
    return {way: (min(t for t, _ in times), min(t for _, t in times)) for way, times in seconds.items()}


def main() -> None:
    """Print milliseconds and overheads; exit code 1 if one is above 5 %."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=200, help="length of the answer")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--drafter", default="none", choices=["none", "adaptive", "copyspec"])
    options = parser.parse_args()
    fastest = asyncio.run(measure(options.tokens, options.rounds, options.drafter))
    print(f"{options.tokens} tokens, drafter {options.drafter}, fastest of {options.rounds} rounds")
    overheads = {}
    for ours, own in PAIRS.items():
        added = fastest[ours][1] - fastest[own][1]
        overheads[ours] = added / fastest[own][0]
        print(f"{own:>10} {fastest[own][0] * 1e3:8.1f} ms {ours:>14} {added * 1e3:+8.2f} ms {overheads[ours]:+8.1%}")
    raise SystemExit(max(overheads.values()) > 0.05)


if __name__ == "__main__":
    main()
