"""The conversations of `copyspec bench peers`: edits of documents, and tasks of the benchmarks of `copyspec eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from copyspec_engine.cli.demo.chain import chain_for
from copyspec_engine.cli.demo.frameworks import Message
from copyspec_engine.cli.documents import load_document
from copyspec_engine.lab.evaluation.benchmarks import BENCHMARKS
from copyspec_engine.lab.evaluation.data import SAMPLE, load_tasks, sampled

__all__ = ["REWRITE", "PeerConversation", "load_conversations"]

REWRITE = "rewrite"
"""The kind that is no benchmark: a document, and one edit of it after the other."""
REWRITE_TURNS = 3


@dataclass(frozen=True, slots=True)
class PeerConversation:
    """What is asked, turn by turn."""

    kind: str
    name: str
    requests: tuple[str, ...]
    """What the user says, one a turn; each answer is in front of the next one."""
    opening: tuple[Message, ...] = ()
    """What stands before the first request."""

    def messages(self, answers: Sequence[str]) -> list[Message]:
        """The messages of the turn behind `answers`."""
        found = [*self.opening]
        for request, answer in zip(self.requests, answers, strict=False):
            found += [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
        return [*found, {"role": "user", "content": self.requests[len(answers)]}]


def load_conversations(
    kinds: Sequence[str], data: Mapping[str, str], files: Sequence[str], model: str, limit: int
) -> list[PeerConversation]:
    """The conversations, one of each kind before the second of any: wherever a run ends, it has seen all kinds.

    Args:
        kinds: `REWRITE` and names of `BENCHMARKS`.
        data: see `load_tasks`, by kind; of kinds that are not there the few tasks that come with the package.
        files: documents of `REWRITE`.
        model: who is asked: the bundled one knows only words of its own.
        limit: most conversations of a kind.

    Raises:
        ConfigError: a file cannot be read, or holds something else.
    """
    by_kind = []
    for kind in kinds:
        if kind == REWRITE:
            by_kind.append([_rewrite(name, model) for name in files[:limit]])
        else:
            tasks = sampled(load_tasks(BENCHMARKS[kind], data.get(kind, SAMPLE)), limit)
            by_kind.append([PeerConversation(kind, task.id, task.prompts) for task in tasks])
    return [conversation for turn in zip_longest(*by_kind) for conversation in turn if conversation is not None]


def _rewrite(file: str, model: str) -> PeerConversation:
    """One growing talk: the document stands in it once, each later request is about the last answer."""
    document = load_document(file)
    task = chain_for(document, model)
    first, *others = (step.instruction for step in task.steps[:REWRITE_TURNS])
    if task.as_talk:
        opening: Message = {"role": "user", "content": document.text}
        return PeerConversation(REWRITE, document.name, (first, *others), (*task.opening, opening))
    return PeerConversation(REWRITE, document.name, (f"{first}\n\n{document.text}", *others), task.opening)
