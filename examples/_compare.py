"""What the LangChain examples share: run something twice, with drafting and without, and show what it saves."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from langchain_core.messages import AIMessage

from copyspec_engine import Engine, EngineConfig
from langchain_copyspec import ChatCopySpec


def copier() -> Engine:
    """An engine with the copier, which needs no network and does what the examples ask for word for word."""
    return Engine(EngineConfig(model="bundled"))


def compare(
    run: Callable[[ChatCopySpec], Sequence[AIMessage]], make_engine: Callable[[], Engine] = copier
) -> Sequence[AIMessage]:
    """The answers with drafting, after the same run without it, each on an engine of its own, gave the same tokens."""
    tokens, passes, seconds, found = [], [], [], []
    for drafter in ("adaptive", "none"):
        with make_engine() as engine:
            llm = ChatCopySpec(engine=engine, drafter=drafter, include_token_ids=True)
            llm.invoke("Warm up.", session_id="warm-up")
            started = time.perf_counter()
            answers = run(llm)
            seconds.append(time.perf_counter() - started)
        found.append(answers)
        stats = [answer.response_metadata["copyspec"] for answer in answers]
        tokens.append([answer["token_ids"] for answer in stats])
        passes.append(sum(answer["num_forward_passes"] for answer in stats))
    if tokens[0] != tokens[1]:
        raise AssertionError("drafting changed an answer")
    count = sum(map(len, tokens[0]))
    print(f"-- {count} tokens in {len(tokens[0])} answers, the same without drafting")
    print(f"-- {count / passes[0]:.1f} tokens per forward pass, {seconds[1] / seconds[0]:.1f} times as fast")
    return found[0]
