"""Engines of drills: everything real but the model, which writes a text that its question names."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Sequence

import torch

from copyspec_engine import Engine, EngineConfig
from copyspec_engine.execution.packing import Piece
from copyspec_engine.testing import loop_of, scripted_engine

__all__ = ["PASS_VARIABLE", "STICK", "scripted", "stick", "story"]

PASS_VARIABLE = "SCALE_DRILL_PASS_S"
"""Seconds that a forward pass takes at least."""
STICK = "stick-"
"""What the name of a story begins with that no engine comes back from."""
_ASKED = re.compile(r"(\d+) words of story (\S+?)[.]?<\|im_end\|>")


def story(name: str, num_words: int) -> str:
    """A text that is always the same, and another one for each name."""
    return " ".join(hashlib.sha256(f"{name} {number}".encode()).hexdigest()[:7] for number in range(num_words))


def stick() -> None:
    """Come back from no pass any more."""
    time.sleep(3600)


def _reply(prompt: str) -> str:
    asked = _ASKED.findall(prompt)
    if asked and asked[-1][1].startswith(STICK):
        stick()
    return story(asked[-1][1], int(asked[-1][0])) if asked else "ok"


def scripted(config: EngineConfig) -> Engine:
    """An engine that answers "12 words of story NAME." with that story."""
    engine = scripted_engine(_reply, config)
    pass_s = float(os.environ.get(PASS_VARIABLE, "0"))
    if pass_s:
        runner = loop_of(engine).model.runner
        forward = runner.forward

        def slow(pieces: Sequence[Piece]) -> torch.Tensor:
            time.sleep(pass_s)
            return forward(pieces)

        runner.forward = slow  # type: ignore[method-assign]
    return engine
