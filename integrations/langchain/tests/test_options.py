"""Construction, bad input, pickling, and what LangChain asks about a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from pydantic import BaseModel

from copyspec_engine import (
    AdaptiveDrafter,
    ConfigError,
    Engine,
    EngineConfig,
    SamplingParams,
)
from langchain_copyspec import ChatCopySpec

MakeEngine = Callable[..., Engine]


def test_it_is_a_chat_model() -> None:
    assert isinstance(ChatCopySpec(), BaseChatModel)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"stop": ["a"], "stop_sequences": ["b"]}, "both stop and stop_sequences"),
        ({"max_retries": -1}, "max_retries=-1"),
    ],
)
def test_a_bad_option_raises_by_name_and_value(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ChatCopySpec(**options)


@pytest.mark.parametrize("stop", [{"stop": "x"}, {"stop": ["x"]}, {"stop_sequences": ["x"]}, {"stop_sequences": "x"}])
def test_stop_has_two_names_and_may_be_one_text(stop: dict[str, Any]) -> None:
    assert ChatCopySpec(**stop).stop == ["x"]


def test_the_profile_comes_from_the_models_own_files(make_engine: MakeEngine) -> None:
    profile = ChatCopySpec(model="bundled").profile
    assert profile is not None
    assert (profile["name"], profile["max_input_tokens"], profile["tool_calling"]) == ("bundled", 8192, True)
    assert not profile["image_inputs"]
    limited = ChatCopySpec(engine=EngineConfig(model="bundled", max_model_len=512)).profile
    assert limited is not None
    assert limited["max_input_tokens"] == 512
    scripted = ChatCopySpec(engine=make_engine([], max_model_len=256)).profile
    assert scripted is not None
    assert scripted["max_input_tokens"] == 256
    assert ChatCopySpec(model="no/such-model").profile is None
    assert ChatCopySpec(model="/no/such/folder").profile is None


def test_another_model_of_a_call_is_loaded_as_by_its_own_constructor(
    monkeypatch: pytest.MonkeyPatch, make_engine: MakeEngine
) -> None:
    engine, other = make_engine(lambda prompt: "own"), make_engine(lambda prompt: "other")
    asked: list[EngineConfig] = []

    def load(config: EngineConfig, _on_progress: object) -> Engine:
        asked.append(config)
        return other

    monkeypatch.setattr("copyspec_engine.adapters.model.shared_engine", load)
    llm = ChatCopySpec(engine=engine, output_version="v0")
    assert llm.invoke("hi", model="scripted").text == "own"
    assert asked == []
    for answer in (llm.invoke("hi", model="some/model"), llm.bind(model="some/model").invoke("hi")):
        assert (answer.text, answer.response_metadata["model_name"]) == ("other", "some/model")
    assert asked == [EngineConfig(model="some/model")] * 2
    assert llm._get_ls_params(model="some/model")["ls_model_name"] == "some/model"


def test_all_sampling_options_reach_the_engine(make_engine: MakeEngine) -> None:
    llm = ChatCopySpec(engine=make_engine(lambda prompt: "abcdef"))
    assert llm.invoke("go", stop_token_ids=[ord("c")]).text == "ab"
    assert llm.invoke("go", ignore_eos=True, max_tokens=9).response_metadata["finish_reason"] == "length"
    assert llm.bind(min_p=0.5, presence_penalty=1, frequency_penalty=1, repetition_penalty=1.1).invoke("go").text
    with pytest.raises(ConfigError, match="min_p=3"):
        llm.invoke("go", min_p=3)
    with pytest.raises(ConfigError, match="logit_bias with 9999"):  # the engine knows its own ids
        llm.invoke("go", logit_bias={"9999": 1})
    options: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.5,
        "frequency_penalty": 0.5, "logit_bias": {5: 1.0}, "logprobs": True, "top_logprobs": 2, "seed": 3, "stop": ["x"],
        "max_tokens": 7, "stop_token_ids": [4], "ignore_eos": True, "min_tokens": 3, "bad_words": ["x", [1, 2]],
        "suppress_tokens": [7], "begin_suppress_tokens": [8], "no_repeat_ngram_size": 4,
    }  # fmt: skip
    assert options.keys() == SamplingParams.model_fields.keys()
    assert ChatCopySpec(**options).sampling() == SamplingParams(**options)
    others = {"cache_salt": "s", "chat_template_kwargs": {"a": 1}}
    requested = ChatCopySpec(timeout=3, **others).request_options()
    assert {**others, "timeout_s": 3}.items() <= requested.items()


def test_what_identifies_a_model_is_what_decides_its_answer(make_engine: MakeEngine) -> None:
    llm = ChatCopySpec(engine=make_engine([]), temperature=0.5, session_id="s", timeout=3, max_retries=1)
    params = llm._identifying_params
    assert (params["model"], params["temperature"]) == ("scripted", 0.5)
    assert params["engine"]["model"] == "scripted"
    assert not {"session_id", "timeout", "max_retries", "streaming"} & set(params)
    assert json.loads(json.dumps(params)) == params


def cache_key(llm: ChatCopySpec, **options: Any) -> str:
    """What LangChain's caches know a call by."""
    return llm._get_llm_string(**options)


def test_the_conversation_is_no_part_of_cache_keys_and_traces() -> None:
    llm = ChatCopySpec()
    for name, value in {
        "session_id": "a",
        "memory_pool": "team",
        "prediction": "text",
        "cache_salt": "salt",
        "timeout": 3.0,
        "max_retries": 2,
    }.items():
        assert cache_key(llm, **{name: value}) == cache_key(llm)
        assert cache_key(ChatCopySpec(**{name: value})) == cache_key(llm)
    assert "session_id" not in llm._get_invocation_params(session_id="a")
    assert "prediction" not in llm._get_invocation_params(prediction="text")
    assert "a" not in llm._get_ls_params(session_id="a").values()


DECIDING: list[dict[str, Any]] = [
    {"temperature": 0.5},
    {"seed": 3},
    {"max_tokens": 5},
    {"stop": ["x"]},
    {"logit_bias": {5: 1.0}},
    {"repetition_penalty": 1.5},
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"logprobs": True},
    {"include_segments": True},
    {"model": "another"},
]


def test_a_cache_key_has_what_decides_an_answer_whoever_says_it() -> None:
    plain = cache_key(ChatCopySpec())
    keys = {plain}
    for options in DECIDING:
        key = cache_key(ChatCopySpec(), **options)
        assert cache_key(ChatCopySpec(**options)) == key
        keys.add(key)
    assert len(keys) == 1 + len(DECIDING)
    assert cache_key(ChatCopySpec(output_version="v1")) not in keys
    assert cache_key(ChatCopySpec(), stop_sequences="x") == cache_key(ChatCopySpec(), stop=["x"])


def test_a_cache_key_has_the_tools_and_the_form_of_a_call() -> None:
    def add(a: int) -> int:
        """Add."""
        return a

    class Sum(BaseModel):
        total: int

    def other() -> type[BaseModel]:
        class Sum(BaseModel):
            total: str

        Sum.__qualname__ = "Sum"
        return Sum

    llm = ChatCopySpec()
    calls: list[dict[str, Any]] = [
        {},
        {"tools": [add]},
        {"tools": [add], "tool_choice": "any"},
        {"tools": [add], "tool_choice": "none"},
        {"tools": [add], "strict": True},
        {"tools": [add], "parallel_tool_calls": False},
        {"response_format": Sum},
        {"response_format": other()},
        {"response_format": {"type": "json_object"}},
    ]
    assert len({cache_key(llm, **options) for options in calls}) == len(calls)
    assert cache_key(llm, tools=[add]) == cache_key(llm, **llm.bind_tools([add]).kwargs)
    assert cache_key(llm, tools=[add], tool_choice=True) == cache_key(llm, tools=[add], tool_choice="any")


@pytest.mark.parametrize(
    "options",
    [
        {"quantization": "int8"},
        {"max_model_len": 512},
        {"dtype": "bfloat16"},
        {"model": "other"},
        {"device": "cpu"},
        {"exact": True},
        {"kv_cache_tokens": 512},
        {"trust_remote_code": True},
    ],
)
def test_a_cache_key_has_what_an_engine_decides(options: dict[str, Any]) -> None:
    assert cache_key(ChatCopySpec(engine=EngineConfig(**options))) != cache_key(ChatCopySpec())


def test_a_cache_key_lacks_how_much_an_engine_does_at_once() -> None:
    config = EngineConfig(max_running=2, max_waiting=3, max_sessions=4, memory_path="m", step_cost="remeasure")
    assert cache_key(ChatCopySpec(engine=config)) == cache_key(ChatCopySpec())
    every = set(EngineConfig.model_fields)
    assert every > set(ChatCopySpec()._identifying_params["engine"]) > {"model", "dtype", "quantization", "drafter"}


def test_traces_name_the_options_in_force() -> None:
    llm = ChatCopySpec(temperature=0.5, max_tokens=7, stop=["x"])
    params = llm._get_ls_params()
    assert params == {
        "ls_provider": "copyspec",
        "ls_model_type": "chat",
        "ls_model_name": "smollm2",
        "ls_temperature": 0.5,
        "ls_max_tokens": 7,
        "ls_stop": ["x"],
    }
    assert llm._get_ls_params(stop=["y"], temperature=0.7)["ls_stop"] == ["y"]


def test_a_call_says_what_a_draft_model_does() -> None:
    with Engine(EngineConfig(model="bundled", draft_model="bundled", max_model_len=1024)) as engine:
        llm = ChatCopySpec(engine=engine, max_tokens=40)
        accepted, answers = [], set()
        for drafter in (AdaptiveDrafter(draft_model_use="never"), "draft-model", None):
            before = engine.metrics().accepted_by_source.get("draft_model", 0)
            answers.add(
                llm.invoke("Repeat: one two three four five six.", drafter=drafter, session_id=f"{drafter}").text
            )
            accepted.append(engine.metrics().accepted_by_source.get("draft_model", 0) - before)
        assert len(answers) == 1
        assert accepted[0] == 0 < accepted[1]


def test_drafting_by_a_model_needs_a_draft_model(echo: Engine) -> None:
    with pytest.raises(ConfigError, match="drafter='draft-model' but no draft model"):
        ChatCopySpec(engine=echo, drafter="draft-model").invoke("Hi")


def test_a_listener_to_loading_decides_no_answer() -> None:
    told, untold = ChatCopySpec(on_progress=print), ChatCopySpec()
    assert cache_key(told) == cache_key(untold)
    assert told._identifying_params == untold._identifying_params
    bound: Any = told.bind(temperature=0.5).bound
    assert bound.on_progress is print
