"""LiteLLM: `python -m scripts.conformance.litellm_client URL MODEL`."""

from __future__ import annotations

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for one

import litellm

from scripts.conformance.asked import ANN, CALL, SUNNY, TOOL, WORDS, Person
from scripts.conformance.behaviours import KEY, Answer, Behaviours, Place, same

BEHAVIOURS = Behaviours()
litellm.suppress_debug_info = True


def given(place: Place, text: str, **options: Answer) -> dict[str, Answer]:
    """What `completion` and its kin take."""
    most = {"max_tokens": 400 if place.is_scripted else 40, "temperature": 0, "num_retries": 0}
    return {**reached(place), "messages": [{"role": "user", "content": text}], **most, **options}


def reached(place: Place) -> dict[str, Answer]:
    """How LiteLLM finds the server."""
    return {"model": f"openai/{place.model}", "api_base": place.url, "api_key": KEY}


@BEHAVIOURS.any_model
def chat(place: Place) -> None:
    """Completion gives an answer and its usage."""
    answer = litellm.completion(**given(place, "Say hello."))
    same(answer.choices[0].message.role, "assistant")
    assert answer.choices[0].message.content
    same(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens)


@BEHAVIOURS.any_model
def stream(place: Place) -> None:
    """A stream adds up to the whole answer, with usage at its end."""
    whole = litellm.completion(**given(place, "Name a colour."))
    chunks = list(
        litellm.completion(**given(place, "Name a colour.", stream=True, stream_options={"include_usage": True}))
    )
    built = litellm.stream_chunk_builder(chunks)
    same(built.choices[0].message.content, whole.choices[0].message.content)
    same(built.usage.completion_tokens, whole.usage.completion_tokens)


@BEHAVIOURS.any_model
async def awaited(place: Place) -> None:
    """Acompletion, whole and streamed."""
    whole = await litellm.acompletion(**given(place, "Name a colour."))
    chunks = [chunk async for chunk in await litellm.acompletion(**given(place, "Name a colour.", stream=True))]
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    same(said, whole.choices[0].message.content)


@BEHAVIOURS.scripted
def tools(place: Place) -> None:
    """A function is called, whole and streamed, and its result gives an answer."""
    asked = given(place, CALL, tools=[TOOL], tool_choice="auto")
    message = litellm.completion(**asked).choices[0].message
    same(
        [(call.function.name, call.function.arguments) for call in message.tool_calls],
        [("weather", '{"city": "Bern"}')],
    )
    built = litellm.stream_chunk_builder(list(litellm.completion(**asked, stream=True)))
    same([call.function.arguments for call in built.choices[0].message.tool_calls], ['{"city": "Bern"}'])
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny in Bern"}
    asked["messages"] += [message, result]
    same(litellm.completion(**asked).choices[0].message.content, SUNNY)


@BEHAVIOURS.any_model
def forced(place: Place) -> None:
    """A call is forced by tool_choice."""
    named = {"type": "function", "function": {"name": "weather"}}
    message = litellm.completion(**given(place, CALL, tools=[TOOL], tool_choice=named)).choices[0].message
    same([call.function.name for call in message.tool_calls], ["weather"])


@BEHAVIOURS.scripted
def form(place: Place) -> None:
    """A pydantic class as response_format."""
    answer = litellm.completion(**given(place, f"say {ANN}", response_format=Person))
    same(Person.model_validate_json(answer.choices[0].message.content), Person(name="Ann", age=7))


@BEHAVIOURS.scripted
def reasoning(place: Place) -> None:
    """Reasoning is told as reasoning_content, whole and streamed."""
    message = litellm.completion(**given(place, "think hm: four")).choices[0].message
    same((message.content, message.reasoning_content), ("four", "hm"))
    built = litellm.stream_chunk_builder(list(litellm.completion(**given(place, "think hm: four", stream=True))))
    same(built.choices[0].message.reasoning_content, "hm")


@BEHAVIOURS.any_model
def session(place: Place) -> None:
    """The header X-Session-ID names the conversation, and the prompt's cached part is told."""
    headers = {"X-Session-ID": "litellm"}
    litellm.completion(**given(place, WORDS, extra_headers=headers))
    again = litellm.completion(**given(place, f"{WORDS} And more.", extra_headers=headers))
    assert again.usage.prompt_tokens_details.cached_tokens > 5


@BEHAVIOURS.any_model
def text(place: Place) -> None:
    """text_completion goes on with a raw prompt."""
    options = {"max_tokens": 8, "temperature": 0, **reached(place), "model": f"text-completion-openai/{place.model}"}
    whole = litellm.text_completion(prompt="once upon a time", **options)
    chunks = litellm.text_completion(prompt="once upon a time", stream=True, **options)
    same("".join(chunk.choices[0].text or "" for chunk in chunks), whole.choices[0].text)


@BEHAVIOURS.any_model
def response(place: Place) -> None:
    """A response, one that goes on from it, and a stream of events."""
    options = {**reached(place), "max_output_tokens": 8, "temperature": 0}
    first = litellm.responses(input="Say hello.", **options)
    same(first.output[0].type, "message")
    second = litellm.responses(input="And again.", previous_response_id=first.id, **options)
    assert second.usage.input_tokens > first.usage.input_tokens
    kinds = [event.type for event in litellm.responses(input="Say hello.", stream=True, **options)]
    same(kinds[0], "response.created")
    assert kinds[-1] in ("response.completed", "response.incomplete"), kinds


@BEHAVIOURS.any_model
def errors(place: Place) -> None:
    """Errors have their classes: key, model, field, and too long a prompt."""
    wrong: list[tuple[dict[str, Answer], type[Exception]]] = [
        ({"api_key": "wrong"}, litellm.AuthenticationError),
        ({"model": "openai/gpt-0"}, litellm.NotFoundError),
        ({"temperature": -1}, litellm.BadRequestError),
        ({"messages": [{"role": "user", "content": "word " * 9_000}]}, litellm.ContextWindowExceededError),
    ]
    for options, kind in wrong:
        try:
            litellm.completion(**given(place, "hi", **options))
        except kind:
            continue
        raise AssertionError(f"no {kind.__name__} of {list(options)}")


@BEHAVIOURS.any_model
async def router(place: Place) -> None:
    """A Router asks the server under a name of its own."""
    params = {**reached(place), "max_tokens": 8, "temperature": 0}
    one = litellm.Router(model_list=[{"model_name": "ours", "litellm_params": params}], num_retries=0)
    answer = await one.acompletion(model="ours", messages=[{"role": "user", "content": "Say hello."}])
    assert answer.choices[0].message.content


if __name__ == "__main__":
    BEHAVIOURS.main("litellm")
