"""Whether two models mean the same by every token id: only then one can draft for the other."""

from __future__ import annotations

from copyspec_engine.chat.tokenizer import ChatTokenizer
from copyspec_engine.values.errors import ModelLoadError

__all__ = ["refuse_other_vocabulary"]

_SHOWN = 3
"""Tokens that an error names."""


def refuse_other_vocabulary(name: str, tokenizer: ChatTokenizer, draft_name: str, draft: ChatTokenizer) -> None:
    """Compare the vocabularies of a model and its draft model token by token.

    Raises:
        ModelLoadError: an id stands for another token, or for none, in one of them.
    """
    own, other = _tokens(tokenizer), _tokens(draft)
    differing = sorted(token for token in own.keys() | other.keys() if own.get(token) != other.get(token))
    if differing:
        shown = "; ".join(
            f"id {token} is {_said(own.get(token))} and {_said(other.get(token))}" for token in differing[:_SHOWN]
        )
        more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise ModelLoadError(
            f"Got draft={draft_name!r} but its vocabulary is not that of {name}: {shown}{more}. Take a smaller "
            "model of the same family"
        )


def _tokens(tokenizer: ChatTokenizer) -> dict[int, str]:
    return {token_id: token for token, token_id in tokenizer.vocabulary().items()}


def _said(token: str | None) -> str:
    return "missing" if token is None else repr(token)
