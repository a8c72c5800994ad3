"""LlamaIndex's OpenAILike: `python -m scripts.conformance.llama_index_client URL MODEL`."""

from __future__ import annotations

import openai
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike, OpenAILikeResponses

from scripts.conformance.asked import ANN, CALL, SUNNY, WORDS, Person, weather
from scripts.conformance.behaviours import KEY, Answer, Behaviours, Place, same

BEHAVIOURS = Behaviours()


def llm(place: Place, kind: Answer = OpenAILike, **options: Answer) -> Answer:
    """The server's model."""
    given = {"temperature": 0.0, "max_tokens": 400 if place.is_scripted else 12, "context_window": 8192, **options}
    return kind(
        model=place.model, api_base=place.url, api_key=KEY, max_retries=0, is_function_calling_model=True, **given
    )


def chat_llm(place: Place, **options: Answer) -> Answer:
    """The same for chats."""
    return llm(place, is_chat_model=True, **options)


@BEHAVIOURS.any_model
async def chat(place: Place) -> None:
    """Chats: whole, streamed, awaited, and both."""
    hi = [ChatMessage("Be kind.", role=MessageRole.SYSTEM), ChatMessage("Name a colour.")]
    whole = chat_llm(place).chat(hi)
    *_, streamed = chat_llm(place).stream_chat(hi)
    awaited = await chat_llm(place).achat(hi)
    async for both in await chat_llm(place).astream_chat(hi):
        last = both
    said = [answer.message.content for answer in (whole, streamed, awaited, last)]
    assert said[0]
    same(said, said[:1] * 4)
    assert whole.raw.usage.total_tokens > 0


@BEHAVIOURS.any_model
def complete(place: Place) -> None:
    """Prompts: as a chat, and as a raw text, whole and streamed."""
    for own in (llm(place, is_chat_model=True), llm(place, is_chat_model=False)):
        *_, streamed = own.stream_complete("once upon a time")
        same(streamed.text, own.complete("once upon a time").text)


@BEHAVIOURS.scripted
def tools(place: Place) -> None:
    """A tool is called, by chat_with_tools and predict_and_call, and its result gives an answer."""
    own, tool = chat_llm(place), FunctionTool.from_defaults(weather)
    answer = own.chat_with_tools([tool], CALL)
    (call,) = own.get_tool_calls_from_response(answer)
    same((call.tool_name, call.tool_kwargs), ("weather", {"city": "Bern"}))
    *_, streamed = own.stream_chat_with_tools([tool], CALL)
    same([call.tool_kwargs for call in own.get_tool_calls_from_response(streamed)], [{"city": "Bern"}])
    result = ChatMessage("sunny in Bern", role=MessageRole.TOOL, additional_kwargs={"tool_call_id": call.tool_id})
    same(own.chat([ChatMessage(CALL), answer.message, result]).message.content, SUNNY)
    same(own.predict_and_call([tool], CALL).response, "sunny in Bern")


@BEHAVIOURS.scripted
async def objects(place: Place) -> None:
    """Objects: as a call and as a JSON schema, whole and awaited."""
    for native, text in ((False, f"call Person {ANN}"), (True, f"say {ANN}")):
        own, prompt = chat_llm(place, should_use_structured_outputs=native), PromptTemplate("{text}")
        same(own.structured_predict(Person, prompt, text=text), Person(name="Ann", age=7))
        same(await own.astructured_predict(Person, prompt, text=text), Person(name="Ann", age=7))
        same(own.as_structured_llm(Person).chat([ChatMessage(text)]).raw, Person(name="Ann", age=7))


@BEHAVIOURS.any_model
def logprobs(place: Place) -> None:
    """Log-probabilities of tokens."""
    told = chat_llm(place, logprobs=True, top_logprobs=2).chat([ChatMessage("Name a fish.")])
    assert all(len(entries) == 2 for entries in told.logprobs)
    assert told.logprobs


@BEHAVIOURS.any_model
def response(place: Place) -> None:
    """POST /v1/responses, whole and streamed."""
    own = llm(place, OpenAILikeResponses)
    *_, streamed = own.stream_chat([ChatMessage("Name a colour.")])
    same(streamed.message.content, own.chat([ChatMessage("Name a colour.")]).message.content)


@BEHAVIOURS.any_model
def session(place: Place) -> None:
    """The header X-Session-ID names the conversation."""
    own = chat_llm(place, default_headers={"X-Session-ID": "llama-index"})
    own.chat([ChatMessage(WORDS)])
    again = own.chat([ChatMessage(f"{WORDS} And more.")])
    assert again.raw.usage.prompt_tokens_details.cached_tokens > 5


@BEHAVIOURS.any_model
def errors(place: Place) -> None:
    """Errors are those of the openai package."""
    wrong: list[tuple[Answer, type[Exception]]] = [
        (chat_llm(Place(place.url, "gpt-0")), openai.NotFoundError),
        (chat_llm(place, additional_kwargs={"temprature": 1}), TypeError),
        (chat_llm(place, additional_kwargs={"n": 99}), openai.BadRequestError),
    ]
    for own, kind in wrong:
        try:
            own.chat([ChatMessage("hi")])
        except kind:
            continue
        raise AssertionError(f"no {kind.__name__}")


if __name__ == "__main__":
    BEHAVIOURS.main("llama-index-llms-openai-like")
