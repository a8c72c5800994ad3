"""An option that is not known is answered with what to use in its place."""

from __future__ import annotations

from typing import Any

import pytest

from copyspec_engine import AdaptiveDrafter, ConfigError, EngineConfig, GenerationRequest, NoDrafter, SamplingParams
from copyspec_engine.adapters.model import AdapterOptions
from copyspec_engine.values.options import _NAMES, _NEEDLESS, _OURS, Options, _homes


class OfCalls(AdapterOptions):
    """What may be set for a model and for a call."""


class OfModels(OfCalls):
    """What may be set for a model only, besides."""

    model: str = "bundled"
    system_prompt: str = ""


def said(make: Any, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        make(**options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("make", "name", "says"),
    [
        (EngineConfig, "num_ctx", "for EngineConfig: use max_model_len"),
        (EngineConfig, "model_name", "use model"),
        (EngineConfig, "torch_dtype", "use dtype"),
        (EngineConfig, "load_in_8bit", 'use quantization="int8"'),
        (EngineConfig, "max_new_tokens", "use max_tokens of SamplingParams"),
        (EngineConfig, "template", "use chat_template"),
        (EngineConfig, "prompt_template", "use chat_template"),
        (EngineConfig, "max_draft_tokens", "use drafter=AdaptiveDrafter(max_draft_tokens=...)"),
        (SamplingParams, "max_new_tokens", "use max_tokens"),
        (SamplingParams, "maxTokens", "use max_tokens"),
        (SamplingParams, "temprature", "use temperature"),
        (SamplingParams, "timeout", "use timeout_s of GenerationRequest"),
        (SamplingParams, "num_beams", "leave it out, a call gives one answer"),
        (GenerationRequest, "num_predict", "use sampling=SamplingParams(max_tokens=...)"),
        (GenerationRequest, "temperature", "use sampling=SamplingParams(temperature=...)"),
        (GenerationRequest, "request_timeout", "use timeout_s"),
        (GenerationRequest, "json_schema", "use grammar=Grammar(json_schema=...)"),
        (GenerationRequest, "enable_thinking", 'use chat_template_kwargs={"enable_thinking": ...}'),
        (AdapterOptions, "request_timeout", "use timeout"),
        (AdapterOptions, "timeout_s", "use timeout"),
        (AdapterOptions, "context_window", "use max_model_len of EngineConfig"),
        (OfCalls, "system_promt", "use system_prompt of OfModels"),
        (OfCalls, "model_name", "use model of OfModels"),
        (AdapterOptions, "repeat_penalty", "use repetition_penalty"),
        (AdapterOptions, "endpoint", "use base_url of LocalModel"),
        (AdapterOptions, "organization", "leave it out, the model runs in this process, or behind base_url"),
        (AdaptiveDrafter, "recycled", "use recycle"),
        (NoDrafter, "zzz", "expected one of name"),
    ],
)
def test_the_answer_is_the_option_that_is_meant(make: type[Options], name: str, says: str) -> None:
    text = said(make, **{name: 1})
    assert text.startswith(f"Got unknown option {name}=1 for {make.__name__}: ")
    assert text.endswith(says) or (says.startswith("leave it out") and says in text)


def test_a_name_of_others_has_one_meaning_and_is_none_of_ours_in_its_place() -> None:
    names = " ".join([*_NAMES.values(), *_NEEDLESS.values()]).split()
    assert len(names) == len(set(names))
    ours = {name for kind in (*_homes(), AdapterOptions) for name in kind.model_fields}
    # One is a call's, the other a request's; a drafter says what the draft model does, the engine which one it is.
    assert set(names) & ours == {"timeout", "timeout_s"}


@pytest.mark.parametrize("ours", sorted(set(_OURS.values())))
def test_what_is_advised_exists(ours: str) -> None:
    fields = {name for kind in (*_homes(), AdapterOptions) for name in kind.model_fields}
    beside = {"response_format", "tool_choice"}  # of calls of the integrations
    beside |= {"base_url", "api_key"}  # of their models
    names = [name.split("=")[0] for name in (ours.split() if "=" not in ours else [ours])]
    assert set(names) <= fields | beside


def test_a_secret_is_not_repeated_and_a_long_value_is_cut() -> None:
    assert "sk-123" not in said(AdapterOptions, api_key="sk-123")
    text = said(SamplingParams, max_tokens="x" * 10_000)
    assert "max_tokens='xxx" in text
    assert "10002 characters" in text
    assert len(text) < 500


def test_of_a_million_wrong_values_one_is_told() -> None:
    """All of them took half a minute, in which no thread did anything else."""
    wrong = [-1] * 1_000_000
    assert said(SamplingParams, suppress_tokens=wrong).count("suppress_tokens") == 1
    assert said(GenerationRequest, prompt_token_ids=["x"] * 1_000_000).count("prompt_token_ids") == 1
    assert "max_tokens=a list of 1000000 but" in said(SamplingParams, max_tokens=wrong)
    params = SamplingParams(logit_bias=dict.fromkeys(range(100_000), 1.0))
    assert len(params.logit_bias) == 100_000
