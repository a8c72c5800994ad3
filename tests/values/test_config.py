"""A bad value is refused with its name, the value and what was expected."""

from __future__ import annotations

import pickle
import re
from typing import Any

import pytest
from pydantic import BaseModel

import copyspec_engine
from copyspec_engine import (
    AdaptiveDrafter,
    ConfigError,
    ContextOverflowError,
    CopySpecDrafter,
    DraftModel,
    EngineConfig,
    EngineStoppedError,
    GenerationRequest,
    NoDrafter,
    SamplingParams,
)
from copyspec_engine.adapters.model import LocalModel
from copyspec_engine.values import errors
from copyspec_engine.values.options import Documented

MESSAGES = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (SamplingParams, {"temperature": -1}, "Got temperature=-1 but expected greater than or equal to 0"),
        (SamplingParams, {"temperature": float("nan")}, "temperature=nan"),
        (SamplingParams, {"top_p": 0}, "top_p=0"),
        (SamplingParams, {"top_k": 0}, "top_k=0"),
        (SamplingParams, {"seed": 2**63}, f"seed={2**63} but expected less than"),
        (SamplingParams, {"seed": -(2**63) - 1}, f"seed={-(2**63) - 1}"),
        (SamplingParams, {"max_tokens": 0}, "max_tokens=0"),
        (SamplingParams, {"stop": ("",)}, "at least one character"),
        (SamplingParams, {"min_p": 1.5}, "Got min_p=1.5 but expected less than or equal to 1"),
        (SamplingParams, {"repetition_penalty": 0}, "repetition_penalty=0"),
        (SamplingParams, {"repetition_penalty": float("inf")}, "repetition_penalty=inf"),
        (SamplingParams, {"presence_penalty": 2.5}, "Got presence_penalty=2.5 but expected less than or equal to 2"),
        (SamplingParams, {"frequency_penalty": -3}, "frequency_penalty=-3"),
        (SamplingParams, {"frequency_penalty": float("nan")}, "frequency_penalty=nan"),
        (SamplingParams, {"logit_bias": {7: 101}}, "Got logit_bias={7: 101} but expected token ids from 0"),
        (SamplingParams, {"logit_bias": {"7": float("nan")}}, "Got logit_bias={'7': nan}"),
        (SamplingParams, {"logit_bias": {"the": 1}}, "Got logit_bias={'the': 1}"),
        (SamplingParams, {"logit_bias": {-1: 1}}, "Got logit_bias={-1: 1}"),
        (SamplingParams, {"logit_bias": {7: "1"}}, "Got logit_bias={7: '1'}"),
        (SamplingParams, {"logit_bias": {7: 1, "7": 2}}, "token id 7 more than once"),
        (SamplingParams, {"logit_bias": ((7, 300),)}, "less than or equal to 100"),
        (SamplingParams, {"logprobs": True, "top_logprobs": 21}, "top_logprobs=21"),
        (SamplingParams, {"top_logprobs": 2}, "Got top_logprobs=2 without logprobs: set logprobs=True"),
        (
            GenerationRequest,
            {"prompt": "a", "sampling": {"temperature": -1}},
            "Got temperature=-1 but expected greater",
        ),
        (SamplingParams, {"temprature": 1}, "unknown option temprature=1 for SamplingParams"),
        (EngineConfig, {"drafter": "fast"}, "drafter='fast' but expected one of adaptive, copyspec, draft-model, none"),
        (EngineConfig, {"drafter": {"block": 5}}, "Got drafter={'block': 5} but expected one of adaptive, copyspec"),
        (GenerationRequest, {"prompt": "a", "drafter": 5}, "Got drafter=5 but expected one of adaptive, copyspec"),
        (EngineConfig, {"draft_model": 5}, "Got draft_model=5 but expected the name of a model, or a DraftModel"),
        (EngineConfig, {"step_cost": None}, "Got step_cost=None but expected 'measured', 'remeasure' or (tokens"),
        (EngineConfig, {"dtype": "int4"}, "dtype='int4'"),
        (EngineConfig, {"device": "tpu"}, "device='tpu'"),
        (EngineConfig, {"model": ""}, "Got model='' but expected at least 1 character"),
        (EngineConfig, {"max_running": 0}, "max_running=0"),
        (EngineConfig, {"step_cost": ((2, 1.0), (3, 1.0))}, "starting at 1 token"),
        (EngineConfig, {"step_cost": ((1, 1.0), (3, 0.0))}, "positive seconds"),
        (EngineConfig, {"step_cost": ((1, 1.0), (3, float("inf")))}, "finite number"),
        (EngineConfig, {"step_cost": "never"}, "step_cost='never' but expected 'measured', 'remeasure' or (tokens,"),
        (EngineConfig, {"step_cost": (1, 2)}, "step_cost=(1, 2) but expected (tokens, seconds) pairs"),
        (CopySpecDrafter, {"block": 0}, "block=0"),
        (AdaptiveDrafter, {"max_draft_tokens": 0}, "max_draft_tokens=0"),
        (NoDrafter, {"block": 3}, "unknown option block=3"),
        (GenerationRequest, {}, "Got no input but expected exactly one of"),
        (GenerationRequest, {"prompt": "a", "messages": MESSAGES}, "Got messages and prompt"),
        (GenerationRequest, {"messages": []}, "empty messages"),
        (GenerationRequest, {"prompt": ""}, "empty prompt"),
        (GenerationRequest, {"prompt": "a", "tools": ({},)}, "tools without messages"),
        (GenerationRequest, {"messages": MESSAGES, "tools": [{"function": [5]}]}, "tools[0] with function=[5]"),
        (GenerationRequest, {"prompt": "a", "session_id": ""}, "session_id=''"),
        (GenerationRequest, {"prompt": "a", "memory_pool": ""}, "memory_pool=''"),
        (GenerationRequest, {"prompt": "a", "prediction": 5}, "prediction=5"),
        (GenerationRequest, {"prompt": "a", "prediction": {"type": "file", "content": "x"}}, "expected a text, or {"),
        (GenerationRequest, {"prompt": "a", "prediction": {"type": "content"}}, "expected a text, or {"),
        (GenerationRequest, {"prompt": "a", "prediction": {"type": "content", "content": ["x"]}}, "expected parts of"),
        (EngineConfig, {"memory_tokens": 100}, "memory_tokens=100"),
        (EngineConfig, {"max_pools": 3}, "unknown option max_pools=3 for EngineConfig: use memory_tokens"),
        (EngineConfig, {"max_session_tokens": 1}, "use memory_tokens"),
        (
            EngineConfig,
            {"assistant_model": "d"},
            "unknown option assistant_model='d' for EngineConfig: use draft_model",
        ),
        (EngineConfig, {"max_draft_model_tokens": 5}, "use draft_model=DraftModel(name, max_tokens=...)"),
        (EngineConfig, {"draft_model_device": "cpu"}, "use draft_model=DraftModel(name, device=...)"),
        (EngineConfig, {"draft_model_step_cost": ()}, "use draft_model=DraftModel(name, step_cost=...)"),
        (EngineConfig, {"combine": "tree"}, "use drafter=AdaptiveDrafter(draft_model_use=...)"),
        (GenerationRequest, {"prompt": "a", "combine": "tree"}, "use drafter=AdaptiveDrafter(draft_model_use=...)"),
        (EngineConfig, {"calibrate": "always"}, 'use step_cost="remeasure"'),
        (EngineConfig, {"device_map": "auto"}, 'use device="all"'),
        (EngineConfig, {"cache_salt": "s"}, "use cache_salt of GenerationRequest"),
        (DraftModel, {"name": "d", "max_token": 3}, "use max_tokens"),
    ],
)
def test_bad_values_are_named(make: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**options)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("make", "options", "param"),
    [
        (SamplingParams, {"temperature": -1}, "temperature"),
        (SamplingParams, {"temprature": 1}, "temprature"),
        (SamplingParams, {"top_p": 0, "top_k": 0}, "top_p"),
        (SamplingParams, {"stop": ["x", 5]}, "stop"),
        (SamplingParams, {"stop": ""}, "stop"),
        (SamplingParams, {"logit_bias": {7: 101}}, "logit_bias"),
        (SamplingParams, {"top_logprobs": 2}, "top_logprobs"),
        (SamplingParams, {"max_tokens": 1, "min_tokens": 2}, "min_tokens"),
        (GenerationRequest, {"prompt": "a", "sampling": {"temperature": -1}}, "temperature"),
        (GenerationRequest, {"prompt": "a", "tools": ()}, "tools"),
        (GenerationRequest, {"prompt": ""}, "prompt"),
        (GenerationRequest, {}, "messages"),
        (GenerationRequest, {"messages": MESSAGES, "tools": [{"function": [5]}]}, "tools[0].function"),
        (GenerationRequest, {"prompt": "a", "grammar": {"regex": "a", "lark": "b"}}, "grammar"),
        (EngineConfig, {"max_running": 0}, "max_running"),
        (EngineConfig, {"memory": "narrow", "dtype": "bfloat16"}, "memory"),
        (EngineConfig, {"drafter": {"name": "copyspec", "block": 0}}, "block"),
        (LocalModel, {"temperature": -1}, "temperature"),
        (LocalModel, {"temprature": 1}, "temprature"),
    ],
)
def test_an_error_says_which_option_it_is_about(make: Any, options: dict[str, Any], param: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**options)
    assert caught.value.param == param
    assert pickle.loads(pickle.dumps(caught.value)).param == param


def test_options_are_frozen_hashable_and_picklable() -> None:
    config = EngineConfig(model="m", drafter="copyspec")
    assert config.drafter == CopySpecDrafter()
    assert hash(config) == hash(EngineConfig(model="m", drafter=CopySpecDrafter()))
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(ValueError, match="frozen"):
        config.model = "other"  # type: ignore[misc]


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name.endswith("Error")])
def test_no_error_is_of_a_kind_that_frameworks_take_for_a_malformed_answer(name: str) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, errors.CopySpecError)
    assert not issubclass(kind, (ValueError, TypeError, KeyError, LookupError, RuntimeError, OSError))


@pytest.mark.parametrize("error", [ContextOverflowError(10, 5, "the pool"), EngineStoppedError(TypeError("x"))])
def test_errors_survive_pickling(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert repr(vars(again)) == repr(vars(error))


@pytest.mark.parametrize(
    "content", ["ab\n", [{"type": "text", "text": "a"}, {"type": "text", "text": "b\n"}]], ids=["text", "parts"]
)
def test_a_prediction_may_have_openais_form(content: object) -> None:
    assert GenerationRequest(prompt="x", prediction={"type": "content", "content": content}).prediction == "ab\n"
    assert GenerationRequest(prompt="x", prediction="ab\n").prediction == "ab\n"


def test_a_logit_bias_may_have_openais_form_and_stays_hashable() -> None:
    params = SamplingParams(logit_bias={"50": -100, 7: 2.5})
    assert params.logit_bias == ((7, 2.5), (50, -100.0))
    assert hash(params) == hash(SamplingParams(logit_bias=params.logit_bias))
    assert SamplingParams(**params.model_dump()) == params


OPTIONS = [
    kind
    for name in copyspec_engine.__all__
    if isinstance(kind := getattr(copyspec_engine, name), type) and issubclass(kind, Documented)
]


@pytest.mark.parametrize("kind", [*OPTIONS, LocalModel])
def test_help_shows_of_each_option_its_type_its_default_and_what_it_does(kind: type[BaseModel]) -> None:
    told = (kind.__doc__ or "").split("\nOptions:\n")[1]
    entries = re.findall(r"^    (\w+): (\S.*)\n((?:        \S.*(?:\n|$))+)", told, flags=re.MULTILINE)
    assert [name for name, _, _ in entries] == list(kind.model_fields)
    for name, declared, text in entries:
        field = kind.model_fields[name]
        is_given = field.is_required() or field.default_factory is not None
        assert re.match(r".+(, required|, made anew)" if is_given else r".+ = .+", declared), declared
        assert " ".join(text.split()) == " ".join((field.description or "").split()) != "", name


def test_help_reads_well() -> None:
    told = EngineConfig.__doc__ or ""
    assert "    max_model_len: int | None = None (>= 2)\n        Longest prompt plus answer, in tokens; " in told
    assert "    dtype: 'auto' | 'float32' | 'bfloat16' | 'float16' = 'auto'\n" in told
    assert "    step_cost: tuple[tuple[int, float], ...] | 'measured' | 'remeasure' = 'measured'\n" in told
    assert "    draft_model: DraftModel | None = None\n" in told
    assert "    drafter: AdaptiveDrafter | CopySpecDrafter | DraftModelDrafter | NoDrafter = Adaptive" in told
    assert "    temperature: float = 0.0 (>= 0.0, <= 100.0)\n        0 is greedy" in (SamplingParams.__doc__ or "")


def test_the_defaults_are_greedy_and_adaptive() -> None:
    assert EngineConfig().drafter == AdaptiveDrafter()
    assert SamplingParams().temperature == 0.0
    assert SamplingParams(stop="END").stop == ("END",)
    assert (CopySpecDrafter().min_match_tokens, CopySpecDrafter().block) == (3, 10)


def test_a_draft_model_has_one_name() -> None:
    with pytest.raises(ConfigError, match=r"Got name='b' for DraftModel\('a'\) but expected one name"):
        DraftModel("a", name="b")
