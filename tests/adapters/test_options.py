"""The options of integrations are those of the engine: the same names, types and texts, all of them may be left out."""

from __future__ import annotations

from typing import Any

import pytest

from copyspec_engine import ConfigError, GenerationRequest, SamplingParams
from copyspec_engine.adapters.model import AdapterOptions, LocalModel
from copyspec_engine.values.config import ModelOptions

OWN = {"timeout", "session_id", "include_segments", "include_token_ids", "include_explanation"}
"""What the engine says otherwise, or not at all."""
NOT_OF_CALLS = {
    *(
        "messages",
        "tools",
        "prompt",
        "prompt_token_ids",
        "sampling",
        "grammar",
        "request_id",
        "timeout_s",
        "session_id",
    ),
    *("parse_reply", "explain", "keep_texts", "continues", "owner"),
}
"""What an integration makes of a call by itself."""


def test_every_option_of_the_engine_is_an_option_of_calls() -> None:
    engines = set(SamplingParams.model_fields) | (set(GenerationRequest.model_fields) - NOT_OF_CALLS)
    assert set(AdapterOptions.model_fields) == engines | OWN
    assert set(LocalModel.model_fields) == {
        *AdapterOptions.model_fields,
        *ModelOptions.model_fields,
        "engine",
        "base_url",
        "api_key",
        "on_progress",
    }


@pytest.mark.parametrize("name", sorted(set(AdapterOptions.model_fields) - OWN))
def test_an_option_is_told_of_as_the_engine_tells_of_it(name: str) -> None:
    owner = SamplingParams if name in SamplingParams.model_fields else GenerationRequest
    field = AdapterOptions.model_fields[name]
    assert field.description == owner.model_fields[name].description
    assert field.default is None
    assert AdapterOptions(**{name: None}).request_options() == AdapterOptions().request_options()


@pytest.mark.parametrize("name", sorted(set(SamplingParams.model_fields)))
def test_an_option_takes_and_refuses_what_the_engines_takes_and_refuses(name: str) -> None:
    beside: dict[str, Any] = {"logprobs": True} if name == "top_logprobs" else {}
    beside |= {"max_tokens": 10} if name == "min_tokens" else {}
    values: list[Any] = [-1, 0, 1, 2, 1.5, "x", True, ["x"], [1], {1: 2}, {"1": -1}, float("nan")]
    for value in values:
        given = {name: value, **beside}
        assert outcome(SamplingParams, name, given) == outcome(AdapterOptions, name, given), value


def outcome(kind: type[SamplingParams | AdapterOptions], name: str, given: dict[str, Any]) -> str:
    try:
        made = kind(**given)
    except ConfigError:
        return "refused"
    return repr(getattr(made if isinstance(made, SamplingParams) else made.sampling(), name))
