"""POST /v1/completions: what each field does, and that none of them is ignored without a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from copyspec_engine import Engine, GenerationRequest, SamplingParams
from tests.serve.conftest import Client, events

MakeEngine = Callable[..., Engine]
COMPLETIONS = "/v1/completions"


def body(prompt: Any = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": "scripted", "prompt": prompt, **fields}


def joined(stream: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for event in stream for choice in event["choices"]]
    return "".join(choice["text"] for choice in choices if choice["index"] == index)


@pytest.mark.parametrize("prompt", ["füße", ["füße"], list("füße".encode()), [list("füße".encode())]])
async def test_a_whole_answer_and_a_streamed_one_are_the_engines_own(echo: Engine, client: Client, prompt: Any) -> None:
    http = client(echo)
    expected = echo.generate(GenerationRequest(prompt="füße")).text
    whole = (await http.post(COMPLETIONS, json=body(prompt))).json()
    stream = await http.post(COMPLETIONS, json=body(prompt, stream=True, stream_options={"include_usage": True}))
    assert whole["object"] == "text_completion"
    assert whole["choices"] == [{"index": 0, "text": expected, "logprobs": None, "finish_reason": "stop"}]
    assert joined(events(stream)) == expected
    assert [event["usage"] for event in events(stream)][-2:] == [None, whole["usage"]]
    assert whole["usage"]["prompt_tokens"] == len("füße".encode())
    assert stream.text.endswith("data: [DONE]\n\n")


async def test_every_option_reaches_the_engine(echo: Engine, client: Client, asked: list[GenerationRequest]) -> None:
    sampling = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "max_tokens": 2, "stop": "X", "logit_bias": {"7": 1.5}}
    others = {"session_id": "s", "prompt_cache_key": "k", "prediction": "old", "copyspec": {"drafter": "none"}}
    response = await client(echo, timeout_s=9).post(COMPLETIONS, json=body(logprobs=3, user="u", **sampling, **others))
    await client(echo).post(COMPLETIONS, json=body())
    first, second = asked
    assert response.json()["choices"][0]["finish_reason"] == "length"
    assert response.headers["x-session-id"] == "s"
    assert first.sampling == SamplingParams(**sampling, logprobs=True, top_logprobs=3)
    assert (first.prompt, first.session_id, first.prediction, first.timeout_s) == ("hi", "default/s", "old", 9)
    assert first.drafter is not None
    assert first.drafter.name == "none"
    assert first.cache_salt not in (None, "k")
    assert second.sampling == SamplingParams(temperature=1.0, max_tokens=16)
    assert (second.session_id, second.cache_salt) == (None, None)


@pytest.mark.parametrize("prompt", ["<|x", list(b"<|x")])
async def test_an_answer_may_begin_with_its_prompt(echo: Engine, client: Client, prompt: Any) -> None:
    http = client(echo)
    whole = (await http.post(COMPLETIONS, json=body(prompt, echo=True))).json()
    stream = events(await http.post(COMPLETIONS, json=body(prompt, echo=True, stream=True)))
    assert whole["choices"][0]["text"] == joined(stream) == "<|x<|X"


async def test_logprobs_of_a_stream_are_those_of_the_whole_answer(echo: Engine, client: Client) -> None:
    http = client(echo)
    whole = (await http.post(COMPLETIONS, json=body("abä", logprobs=2))).json()["choices"][0]["logprobs"]
    bare = (await http.post(COMPLETIONS, json=body("abä", logprobs=0))).json()["choices"][0]["logprobs"]
    parts = [
        event["choices"][0] for event in events(await http.post(COMPLETIONS, json=body("abä", logprobs=2, stream=True)))
    ]
    told = [part["logprobs"] for part in parts if part["logprobs"]]
    assert {name: [entry for part in told for entry in part[name]] for name in whole} == whole
    assert whole["tokens"][:2] == ["A", "B"]
    assert whole["text_offset"] == [0, 1, 2, 2]
    assert [len(top) for top in whole["top_logprobs"]] == [2, 2, 2, 2]
    chosen = [{token: one} for token, one in zip(whole["tokens"], whole["token_logprobs"], strict=True)]
    assert bare == {**whole, "top_logprobs": chosen}


async def test_several_answers_come_in_one_and_count_their_prompt_once(client: Client, make_engine: MakeEngine) -> None:
    http = client(make_engine(["one " * 20, "two " * 20, "three " * 20], drafter="none"))
    given = {"n": 3, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 500}
    stream = events(await http.post(COMPLETIONS, json=body(**given)))
    assert sorted(joined(stream, index) for index in range(3)) == ["one " * 20, "three " * 20, "two " * 20]
    assert stream[-1]["usage"]["prompt_tokens"] == 2
    assert stream[-1]["usage"]["completion_tokens"] == len(("one " + "two " + "three ") * 20) + 3


async def test_the_best_answers_are_those_of_the_likeliest_tokens(client: Client, make_engine: MakeEngine) -> None:
    """One answer may not go by its script, and goes to a token that the model holds for impossible."""
    replies = iter(["a", "b", "c"])
    engine = make_engine(lambda prompt: next(replies))
    forced = {"suppress_tokens": [ord("b")], "temperature": 0}
    response = (await client(engine).post(COMPLETIONS, json=body(n=2, best_of=3, max_tokens=1, **forced))).json()
    assert [choice["text"] for choice in response["choices"]] == ["a", "c"]
    assert [choice["logprobs"] for choice in response["choices"]] == [None, None]
    assert response["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("given", "param"),
    [
        *(({"prompt": prompt}, "prompt") for prompt in ("", [], ["a", "b"], [1, "a"], [[1], [2]], None, [True], [-1])),
        *(({"prompt": prompt}, "prompt") for prompt in ([258], "x" * 9000)),
        ({"suffix": "end"}, "suffix"),
        ({"echo": True, "logprobs": 1}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"n": 9}, "n"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"stream_options": {}}, "stream_options"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(
    echo: Engine, client: Client, given: dict[str, Any], param: str
) -> None:
    response = await client(echo).post(COMPLETIONS, json=body(**given))
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


async def test_what_copyspec_tells_is_told_where_it_is_asked_for(echo: Engine, client: Client) -> None:
    http, text = client(echo), "THE WHOLE LINE IS REPEATED"
    given = {"copyspec": {"segments": True, "explain": True, "stats": True}, "max_tokens": 100}
    whole = (await http.post(COMPLETIONS, json=body(text, **given))).json()["choices"][0]["copyspec"]
    stream = events(await http.post(COMPLETIONS, json=body(text, stream=True, **given)))
    said = [event["choices"][0].get("copyspec", {}) for event in stream]
    assert whole["explanation"]["spans"][0]["source"] == "prompt"
    assert whole["stats"]["num_accepted_tokens"] > 0
    assert "".join(segment["text"] for segment in whole["segments"]) == text
    assert "".join(segment["text"] for part in said for segment in part.get("segments", ())) == text
    assert said[-1]["explanation"] == whole["explanation"]
