r"""Fits the weights that acceptance starts from, by replaying recorded conversations: writes acceptance.json.

    python scripts/fit_acceptance.py --skip-tokens 15000 --out acceptance.json \
        --with TOKENIZER TRANSCRIPTS... --with OTHER_TOKENIZER TRANSCRIPTS...

A transcript is JSON lines of conversations, or `turns.jsonl` of a run of `copyspec eval`: what a model wrote freely,
of which the answers of plain decoding are taken. Every conversation is replayed under one of two cost curves, drawn at
random, while one set of weights learns from all of them, online as in the engine. What is written is their mean over
all epochs but the first. `--skip-tokens` leaves the first conversations of each file out, so that they can be measured
with weights that have not seen them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from copyspec_engine.drafting.drafter import Drafter, DraftingPolicy
from copyspec_engine.lab.evaluation.records import PLAIN, TURNS_FILE, read_turns
from copyspec_engine.lab.replay import (
    Message,
    Tally,
    calls_of,
    end_token,
    in_tokens,
    load_conversations,
    load_cost_curve,
    load_tokenizer,
    replay,
)
from copyspec_engine.memory.acceptance import Acceptance, first_guess
from copyspec_engine.memory.conversation import SessionMemory
from copyspec_engine.values.config import AdaptiveDrafter

MAX_SESSION_TOKENS = 1_000_000

Work = tuple[str, int | None, Sequence[Message]]
"""Where a conversation is from, the token that ends a message, and the conversation."""


def main() -> None:
    """Parse the arguments, fit, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--with", dest="groups", nargs="+", action="append", required=True, metavar="FILE")
    parser.add_argument(
        "--skip-tokens", type=int, default=0, help="answer tokens at the start of each file to leave out"
    )
    parser.add_argument("--max-tokens", type=int, default=60_000, help="answer tokens of each file to read")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    work: list[Work] = []
    for name, *paths in args.groups:
        tokenizer = load_tokenizer(name)
        for path in map(Path, paths):
            seen = 0
            for conversation in conversations_of(path, tokenizer, args.max_tokens):
                seen += sum(len(message.body) for message in conversation if message.role == "assistant")
                if seen > args.skip_tokens:
                    work.append((f"{path.parent.name}/{path.name}", end_token(tokenizer), conversation))
    weights = fit(work, args.epochs, args.seed)
    args.out.write_text(json.dumps({"weights": np.round(weights, 3).tolist()}) + "\n", encoding="utf-8")
    print(f"{len(work)} conversations, {args.epochs} epochs: wrote {args.out}")


def conversations_of(path: Path, tokenizer: Tokenizer, max_tokens: int) -> list[tuple[Message, ...]]:
    """The first conversations of a file, see `load_conversations`; of a run each is as its last turn has it."""
    if path.name != TURNS_FILE:
        return load_conversations(path, tokenizer, max_tokens)
    last = {record.task: record for record in read_turns(path) if record.writer == PLAIN}
    found, answered = [], 0
    for record in last.values():
        messages = [*record.messages, {"role": "assistant", "content": record.text}]
        found.append(tuple(in_tokens(messages, tokenizer)))
        answered += sum(len(message.body) for message in found[-1] if message.role == "assistant")
        if answered >= max_tokens:
            break
    return found


def fit(work: Sequence[Work], epochs: int, seed: int) -> npt.NDArray[np.float64]:
    """Mean weights after replaying conversations; the pace is learnt for each source and curve."""
    random = np.random.default_rng(seed)
    policies = {name: DraftingPolicy(load_cost_curve(name), first_guess()) for name in ("gpu", "cpu")}
    weights = policies["gpu"].acceptance.of(None).weights
    states: dict[tuple[str, str], Acceptance] = {}
    total, count = np.zeros_like(weights), 0
    for epoch in range(epochs):
        for place in random.permutation(len(work)):
            source, end, conversation = work[place]
            eos = frozenset() if end is None else frozenset((end,))
            curve = "gpu" if random.random() < 0.5 else "cpu"
            policy, memory = policies[curve], SessionMemory(MAX_SESSION_TOKENS)
            fresh = policy.acceptance.of(None).copy()._replace(weights=weights)
            memory.acceptance = states.setdefault((source, curve), fresh)

            def begin(
                prompt_ids: Sequence[int],
                policy: DraftingPolicy = policy,
                memory: SessionMemory = memory,
                eos: frozenset[int] = eos,
            ) -> Drafter:
                return policy.begin(AdaptiveDrafter(max_draft_tokens=1024), memory, prompt_ids, eos)

            replay(begin, calls_of(conversation, "full"), Tally())
            if epoch > 0 or epochs == 1:
                total += weights
                count += 1
    return total / count


if __name__ == "__main__":
    main()
