"""An engine's answer as a record of a turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from copyspec_engine import ConfigError, GenerationOutput
from copyspec_engine.lab.evaluation.records import TurnRecord

__all__ = ["turn_record"]


def turn_record(
    task: str, category: str, turn: int, writer: str, messages: Sequence[Mapping[str, Any]], output: GenerationOutput
) -> TurnRecord:
    """What `output` says of itself, as one line of a run.

    Its seconds begin with the first forward pass, not with the call: what a request waits for others is not its work.
    `copies` are there if the request asked for them (`explain=True`).

    Args:
        task: the conversation's own id in its data set.
        category: of the task.
        turn: from 1.
        writer: name of the drafter.
        messages: of the request.
        output: the answer to it.

    Raises:
        ConfigError: the answer was over before its first token.
    """
    stats, timing = output.draft_stats, output.timing
    if not stats.num_forward_passes:
        raise ConfigError(
            f"Got turn {turn} of task {task} without a token (finish_reason={output.finish_reason!r}) but expected an "
            "answer: allow it more time"
        )
    accepted: Counter[str] = Counter()
    for copy in output.copies:
        accepted[copy.source] += copy.stop - copy.start
    return TurnRecord(
        task=task,
        category=category,
        turn=turn,
        writer=writer,
        messages=tuple(dict(message) for message in messages),
        text=output.text,
        token_ids=output.token_ids,
        prompt_tokens=output.usage.prompt_tokens,
        cached_tokens=output.usage.cached_tokens,
        finish_reason=output.finish_reason,
        forward_passes=stats.num_forward_passes,
        draft_lengths=stats.draft_lengths,
        accepted_lengths=stats.accepted_lengths,
        accepted_by_source=dict(accepted),
        copies=() if output.explanation is None else tuple(output.explanation.to_list()),
        prefill_s=timing.ttft_s - timing.queue_s,
        decode_s=timing.total_s - timing.ttft_s,
    )
