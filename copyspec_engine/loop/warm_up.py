"""Using once, before any call, whatever is compiled."""

from __future__ import annotations

import numpy as np

from copyspec_engine.compiled import counting_compilations
from copyspec_engine.drafting.cost import CostCurve, LiveCost
from copyspec_engine.drafting.drafter import DraftingPolicy, likely_nodes, wants_alternatives
from copyspec_engine.execution.lane_products import kernel
from copyspec_engine.execution.lanes import KINDS
from copyspec_engine.execution.narrow_kernels import compile_pass
from copyspec_engine.memory.alternatives import NUM_ALTERNATIVES, Alternatives
from copyspec_engine.memory.conversation import SessionMemory
from copyspec_engine.provenance.trail import find_around
from copyspec_engine.sampling.gumbel import warm_up_noise
from copyspec_engine.values.config import AdaptiveDrafter
from copyspec_engine.values.progress import LoadProgress, OnProgress

__all__ = ["compile_ahead", "warm_up"]


def compile_ahead() -> None:
    """Compile, after an installation, what drafting and the passes of any model need, so that no load has to."""
    warm_up()
    compile_pass()
    for kind in KINDS:
        kernel(kind)


def warm_up(on_progress: OnProgress = lambda _: None) -> None:
    """Load the compiled code of drafting and sampling, or compile it.

    Everything that a call does is done here first, so that no call ever waits for a compiler. Once after an
    installation that takes about 20 seconds.

    Args:
        on_progress: told of each function that is compiled, in this thread.
    """
    on_progress(LoadProgress("compile", "loading the compiled drafting code"))

    def told(count: int) -> None:
        text = "compiling the drafting code, once after an installation"
        on_progress(LoadProgress("compile", text, done=count, unit="it"))

    with counting_compilations(told):
        _use_everything()


def _use_everything() -> None:
    """Draft, observe and sample once, on made-up tokens."""
    policy, memory = DraftingPolicy(CostCurve(((1, 1.0), (64, 1.1)))), SessionMemory(4096)
    prompt = [*range(200), *range(100)]
    for _ in range(2):
        drafter = policy.begin(AdaptiveDrafter(recycle=True), memory, prompt, prediction_ids=range(50, 150))
        draft = drafter.propose(1, 64)
        likely_nodes(drafter, draft)
        policy.share((drafter, drafter), (draft, draft), 1)
        drafter.observe(draft, (), (0,))
        drafter.finish()
        for size in (1, 1000) if wants_alternatives(drafter) else ():  # until the table grows
            likely = np.ones((2, size, NUM_ALTERNATIVES))
            contexts = np.arange(2 * size).reshape(-1, 2)
            memory.alternatives.add(Alternatives(contexts, likely[0].astype(np.int32), likely[1].astype(np.int8)))
    LiveCost(((1, 1.0), (64, 1.1)), is_fixed=False).observe(1, 1.0)
    tokens = np.arange(8)
    find_around(tokens, tokens, 2, 4)
    warm_up_noise()
