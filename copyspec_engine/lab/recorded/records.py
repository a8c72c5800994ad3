"""What is written: recorded conversations as calls, cut to a number of tokens, in ids that the shape has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer

from copyspec_engine.lab.replay import Message, calls_of, end_token, read_conversations
from copyspec_engine.values.errors import ConfigError

__all__ = ["ROOM", "Turn", "Written", "check", "load_turns", "renumbered"]

ROOM = 1024
"""Tokens that every answer may have beyond its end: nobody knows how long it will get, so all get the same."""
MIN_ANSWER = 16
"""A conversation whose answers would be cut shorter than this is not begun."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One call: what is read, and the recorded answer, which ends with the end token."""

    source: str
    conversation: int
    """From 1, in the order of the file."""
    number: int
    """From 1, in the conversation."""
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]

    @property
    def place(self) -> tuple[str, int]:
        """The conversation that it belongs to."""
        return self.source, self.conversation

    @property
    def max_tokens(self) -> int:
        """Most tokens that a peer may write."""
        return len(self.answer_ids) + ROOM


@dataclass(frozen=True, slots=True)
class Written:
    """What a peer wrote in one turn, and what it took."""

    token_ids: tuple[int, ...]
    seconds: float
    """From the call to its return."""
    ttft_s: float
    """From the call to the first token."""
    passes: int
    """Forward passes that gave a token."""
    cached_tokens: int = 0
    """Prompt tokens whose KV was reused."""
    prefill_s: float | None = None
    """What the turn's new tokens alone take to the first token, as a request of their own."""


class RecordMismatchError(Exception):
    """A peer wrote something else than the record: its figures would be worthless."""


def check(peer: str, turn: Turn, written: Written) -> None:
    """Raises `RecordMismatchError` if what was written is not the record, token for token."""
    got, expected = written.token_ids, turn.answer_ids
    if got == expected:
        return
    at = next((i for i, pair in enumerate(zip(got, expected, strict=False)) if pair[0] != pair[1]), None)
    at = min(len(got), len(expected)) if at is None else at
    raise RecordMismatchError(
        f"{peer} did not write the record of {turn.source} conversation {turn.conversation} turn {turn.number}: token "
        f"{at} is {got[at : at + 1] or 'missing'} but expected {expected[at : at + 1] or 'the end'}"
    )


def load_turns(
    path: Path,
    source: str,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    max_context: int,
    turns: int | None,
    conversations: int | None,
) -> list[list[Turn]]:
    """The first conversations of a transcript as calls, up to `max_tokens` answer tokens.

    Where a conversation's answers are longer than what is left they are cut to one length, in later prompts too, so
    that every answer ends with the end token and every prompt begins with the one before it.

    Args:
        path: the transcript.
        source: its name.
        tokenizer: what encodes it.
        max_tokens: answer tokens, all conversations together.
        max_context: tokens of a prompt and its answer, at most; a conversation ends in front of a longer turn.
        turns: turns of a conversation, at most.
        conversations: conversations, at most; then each gets an even share of `max_tokens`.

    Raises:
        ConfigError: the transcript cannot be read, or it holds nothing to write, or `max_tokens` is too small.
    """
    end, left = end_token(tokenizer), max_tokens
    chosen: list[list[Turn]] = []
    if end is None:
        raise ConfigError("Got a tokenizer without <|im_end|> but answers have to end: name another --tokenizer")
    for place, messages in enumerate(read_conversations(path, tokenizer), 1):
        share = left if conversations is None else left // (conversations - len(chosen))
        kept = _fitting(list(_first_turns(messages, turns)), max_context)
        if not kept:
            continue
        cap = _cap([len(message.body) for message in kept if message.role == "assistant"], share)
        if cap < MIN_ANSWER and (chosen or conversations is not None):
            break
        cut = [_shortened(message, cap, end) for message in kept]
        calls = enumerate(calls_of(cut, "full"), 1)
        chosen.append([Turn(source, place, number, call.prompt_ids, call.answer_ids) for number, call in calls])
        left -= sum(len(turn.answer_ids) for turn in chosen[-1])
        if left <= 0 or len(chosen) == conversations:
            break
    if not chosen:
        raise ConfigError(
            f"Got transcript {path} without an answer that fits in a context of {max_context} tokens and in "
            f"--max-tokens {max_tokens}: give another file, a larger shape or more tokens"
        )
    return chosen


def _first_turns(messages: Sequence[Message], turns: int | None) -> Iterator[Message]:
    """A conversation up to its last answer, or the answer of turn `turns`."""
    places = [place for place, message in enumerate(messages) if message.role == "assistant"]
    last = places[:turns][-1] if places else -1
    yield from messages[: last + 1]


def _fitting(messages: Sequence[Message], max_context: int) -> list[Message]:
    """The messages up to the last answer that fits."""
    total, keep = 0, 0
    for place, message in enumerate(messages, 1):
        total += len(message.head) + len(message.body)
        if total > max_context:
            break
        total += len(message.tail)
        keep = place if message.role == "assistant" else keep
    return list(messages[:keep])


def _cap(lengths: Sequence[int], share: int) -> int:
    """The length to which answers have to be cut so that they are `share` tokens together."""
    for place, length in enumerate(sorted(lengths)):
        even = share // (len(lengths) - place)
        if length >= even:
            return even
        share -= length
    return max(lengths)


def _shortened(message: Message, cap: int, end: int) -> Message:
    if message.role != "assistant" or len(message.body) <= cap:
        return message
    return replace(message, body=(*message.body[: max(cap, 1) - 1], end))


def renumbered(conversations: Iterable[Sequence[Turn]], vocab_size: int) -> tuple[list[list[Turn]], dict[int, int]]:
    """The same turns in ids below `vocab_size`, and what each id that had to change is now.

    A shape may have fewer tokens than the tokenizer. Ids that it lacks become ids that no turn uses: to random weights
    one id is as good as another, and equal tokens stay equal.

    Raises:
        ConfigError: the turns use more ids than there are.
    """
    turns = [list(conversation) for conversation in conversations]
    used = {token for conversation in turns for turn in conversation for token in (*turn.prompt_ids, *turn.answer_ids)}
    lacking = sorted(token for token in used if token >= vocab_size)
    if not lacking:
        return turns, {}
    if len(used) > vocab_size:
        raise ConfigError(
            f"Got transcripts with {len(used)} different tokens but the shape has {vocab_size}: take fewer tokens or "
            "another --shape"
        )
    unused = (token for token in range(vocab_size - 1, -1, -1) if token not in used)
    new = dict(zip(lacking, unused, strict=False))

    def ids(tokens: Sequence[int]) -> tuple[int, ...]:
        return tuple(new.get(token, token) for token in tokens)

    return [
        [replace(turn, prompt_ids=ids(turn.prompt_ids), answer_ids=ids(turn.answer_ids)) for turn in conversation]
        for conversation in turns
    ], new
