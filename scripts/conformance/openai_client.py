"""The openai package, blocking and not: `python -m scripts.conformance.openai_client URL MODEL`.

Each behaviour runs with both clients, and reads their answers by `got`, `each` and `within` whichever it has.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

import openai

from scripts.conformance.asked import ANN, TOOL, WORDS, Person, Weather
from scripts.conformance.behaviours import KEY, Answer, Behaviour, Behaviours, Place, Result, same

__all__ = ["BEHAVIOURS", "KINDS", "OpenAIClient", "ask"]

BEHAVIOURS = Behaviours()
KINDS: dict[str, tuple[Answer, Answer]] = {
    "sync": (openai.OpenAI, openai.DefaultHttpxClient),
    "async": (openai.AsyncOpenAI, openai.DefaultAsyncHttpxClient),
}


@dataclass(frozen=True, slots=True)
class OpenAIClient:
    """A client, and the model that it asks.

    Args:
        api: `openai.OpenAI` or `openai.AsyncOpenAI`.
        model: its name.
    """

    api: Answer
    model: str

    @property
    def most(self) -> int:
        """Tokens of an answer; those of the scripted model are bytes."""
        return 400 if self.model == "scripted" else 60

    @property
    def lenient(self) -> Answer:
        """A client that also takes answers which its types have no place for, as a text's chunk without an end."""
        return self.api.with_options()

    async def chat(self, text: str, **options: Answer) -> Answer:
        """The answer to one message of a user; greedy, and of a few tokens, if nothing else is said."""
        given = {"temperature": 0, "max_completion_tokens": self.most, **options}
        return await got(self.api.chat.completions.create(model=self.model, messages=user(text), **given))

    async def chunks(self, text: str, **options: Answer) -> list[Answer]:
        """The same, streamed to its end."""
        return [chunk async for chunk in each(await self.chat(text, stream=True, **options))]

    async def text(self, prompt: Answer, **options: Answer) -> Answer:
        """The answer to a raw prompt."""
        return await got(
            self.lenient.completions.create(model=self.model, prompt=prompt, **{"temperature": 0, **options})
        )

    async def response(self, given: Answer, **options: Answer) -> Answer:
        """A response."""
        options = {"temperature": 0, "max_output_tokens": self.most, **options}
        return await got(self.api.responses.create(model=self.model, input=given, **options))

    async def events(self, given: Answer, **options: Answer) -> list[Answer]:
        """The same, streamed to its end."""
        return [event async for event in each(await self.response(given, stream=True, **options))]


async def ask(place: Place, kind: str, behaviour: Behaviour) -> None:
    """Run a behaviour with a client that takes answers only as its own types say they are, and tries nothing twice.

    Args:
        place: of the server.
        kind: one of `KINDS`.
        behaviour: one of `BEHAVIOURS`.
    """
    options = {"base_url": place.url, "api_key": KEY, "max_retries": 0, "_strict_response_validation": True}
    client, http_client = KINDS[kind]
    async with within(client(http_client=http_client(verify=False), **options)) as api:  # loads no certificates
        await got(behaviour.run(OpenAIClient(api, place.model)))


def main() -> None:
    """Run all behaviours with both clients."""
    place = Place(*sys.argv[1:])
    asked = [(kind, behaviour) for kind in KINDS for behaviour in BEHAVIOURS.of(place)]
    BEHAVIOURS.tell(
        "openai", (Result.of(f"{told.name} ({kind})", partial(ask, place, kind, told)) for kind, told in asked)
    )


# ---- the same code for both clients


async def got(value: Answer) -> Answer:
    """A value, awaited if it is to be."""
    return await value if inspect.isawaitable(value) else value


async def each(values: Answer) -> AsyncIterator[Answer]:
    """The values of an iterator of either kind."""
    if hasattr(values, "__aiter__"):
        async for value in values:
            yield value
    else:
        for value in values:
            yield value


@asynccontextmanager
async def within(manager: Answer) -> AsyncIterator[Answer]:
    """A context manager of either kind."""
    if isinstance(manager, AbstractContextManager):
        with manager as value:
            yield value
    else:
        async with manager as value:
            yield value


# ---- what is asked, and what is read of answers


BERN, ROME = '{"city": "Bern"}', '{"city": "Rome"}'
OWN_TOOL = {"type": "function", "strict": True, **TOOL["function"]}
"""The same for responses."""
NAMED = {"type": "function", "function": {"name": "weather"}}
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
    "required": ["ok", "kind"],
    "additionalProperties": False,
}


def user(text: str) -> list[dict[str, str]]:
    """One message of a user."""
    return [{"role": "user", "content": text}]


def words(answer: Answer, index: int = 0) -> str:
    """What a whole answer says."""
    return str(answer.choices[index].message.content)


def joined(chunks: list[Answer], index: int = 0) -> str:
    """What the chunks of a stream add up to."""
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


def calls_of(message: Answer) -> list[tuple[str, str]]:
    """Names and arguments of a message's calls."""
    return [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]


def parts_of(chunks: list[Answer]) -> dict[int, list[Answer]]:
    """What a stream says of calls, by their indices."""
    deltas = [delta for chunk in chunks for choice in chunk.choices for delta in choice.delta.tool_calls or ()]
    return {index: [delta for delta in deltas if delta.index == index] for index in {delta.index for delta in deltas}}


async def refused(asked: Answer, kind: type[Exception]) -> Answer:
    """The error of a call that fails as it should."""
    try:
        await got(asked)
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


# ---- chats


@BEHAVIOURS.any_model
async def chat_whole(at: OpenAIClient) -> None:
    """chat: a whole answer has its fields."""
    answer = await at.chat("Say hello.", max_completion_tokens=4)
    choice = answer.choices[0]
    same((answer.object, answer.model, choice.index), ("chat.completion", at.model, 0))
    same((choice.message.role, choice.message.refusal), ("assistant", None))
    assert answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint.startswith("fp_")
    assert choice.message.content
    usage = answer.usage
    same(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens)
    assert usage.prompt_tokens > 0


@BEHAVIOURS.scripted
async def chat_words(at: OpenAIClient) -> None:
    """chat: the words are the model's, whole and streamed."""
    for text in ("say Grüße, 🚢 ahoi", "say "):
        expected = text.removeprefix("say ")
        same(words(await at.chat(text)), expected)
        same(joined(await at.chunks(text)), expected)


@BEHAVIOURS.any_model
async def chat_stream(at: OpenAIClient) -> None:
    """chat: a stream adds up to the whole answer."""
    text = "Count from one to nine."
    chunks, whole = await at.chunks(text), await at.chat(text)
    same(joined(chunks), words(whole))
    same({chunk.id for chunk in chunks}, {chunks[0].id})
    same(chunks[0].choices[0].delta.role, "assistant")
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    same(reasons, [None] * (len(chunks) - 1) + [whole.choices[0].finish_reason])
    same([chunk.usage for chunk in chunks], [None] * len(chunks))


@BEHAVIOURS.any_model
async def chat_usage(at: OpenAIClient) -> None:
    """chat: stream_options.include_usage gives one last chunk without choices."""
    whole = await at.chat("Name a colour.", max_completion_tokens=5)
    chunks = await at.chunks("Name a colour.", max_completion_tokens=5, stream_options={"include_usage": True})
    same([chunk.usage is not None for chunk in chunks], [False] * (len(chunks) - 1) + [True])
    same(chunks[-1].choices, [])
    same(chunks[-1].usage.completion_tokens, whole.usage.completion_tokens)
    same(chunks[-1].usage.prompt_tokens, whole.usage.prompt_tokens)


@BEHAVIOURS.any_model
async def chat_n(at: OpenAIClient) -> None:
    """chat: n answers, whole, are drawn apart and count their prompt once."""
    one = await at.chat("Name an animal.", max_completion_tokens=4)
    three = await at.chat("Name an animal.", max_completion_tokens=4, n=3)
    same([choice.index for choice in three.choices], [0, 1, 2])
    same([words(three, index) for index in range(3)], [words(one)] * 3)
    same(three.usage.prompt_tokens, one.usage.prompt_tokens)
    same(three.usage.completion_tokens, 3 * one.usage.completion_tokens)


@BEHAVIOURS.any_model
async def chat_n_stream(at: OpenAIClient) -> None:
    """chat: n answers come in one stream by their indices."""
    options = {"n": 2, "seed": 5, "temperature": 1.0, "max_completion_tokens": 8}
    chunks = await at.chunks("Name an animal.", **options)
    whole = await at.chat("Name an animal.", **options)
    same([joined(chunks, index) for index in (0, 1)], [words(whole, index) for index in (0, 1)])
    same(sorted(c.choices[0].index for c in chunks if c.choices[0].finish_reason), [0, 1])


@BEHAVIOURS.scripted
async def chat_stop(at: OpenAIClient) -> None:
    """chat: stop is a text or a list, and ends the answer before it."""
    for stop in ("three", ["nine", "three"]):
        answer = await at.chat("say one two three four", stop=stop)
        same((words(answer), answer.choices[0].finish_reason), ("one two ", "stop"))
        same(joined(await at.chunks("say one two three four", stop=stop)), "one two ")


@BEHAVIOURS.any_model
async def chat_seed(at: OpenAIClient) -> None:
    """chat: a seed gives the same answer again."""
    options = {"temperature": 1.0, "seed": 42, "max_completion_tokens": 12}
    same(words(await at.chat("Tell a story.", **options)), words(await at.chat("Tell a story.", **options)))


@BEHAVIOURS.any_model
async def chat_sampling(at: OpenAIClient) -> None:
    """chat: temperature, top_p, penalties and logit_bias are taken."""
    options = {"temperature": 0.7, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": -0.5}
    answer = await at.chat("Tell a story.", logit_bias={"5": -100}, max_completion_tokens=6, **options)
    assert answer.usage.completion_tokens <= 6


@BEHAVIOURS.any_model
async def chat_length(at: OpenAIClient) -> None:
    """chat: max_completion_tokens and max_tokens end an answer with "length"."""
    for name, others in (("max_completion_tokens", {"max_tokens": 90}), ("max_tokens", {})):
        asked = at.api.chat.completions.create(
            model=at.model, messages=user("Count from one to a hundred."), temperature=0, **{name: 3}, **others
        )
        answer = await got(asked)
        same((answer.choices[0].finish_reason, answer.usage.completion_tokens), ("length", 3))


@BEHAVIOURS.any_model
async def chat_logprobs(at: OpenAIClient) -> None:
    """chat: logprobs tell of each token, and of the likeliest ones there."""
    answer = await at.chat("Name a fish.", logprobs=True, top_logprobs=3, max_completion_tokens=4)
    told = answer.choices[0].logprobs.content
    same(b"".join(bytes(entry.bytes) for entry in told).decode(errors="replace"), words(answer))
    for entry in told:
        assert entry.logprob <= 0
        same(len(entry.top_logprobs), 3)
        assert max(top.logprob for top in entry.top_logprobs) >= entry.logprob


@BEHAVIOURS.any_model
async def chat_logprobs_stream(at: OpenAIClient) -> None:
    """chat: logprobs of a stream are those of the whole answer."""
    options = {"logprobs": True, "top_logprobs": 1, "max_completion_tokens": 6}
    whole = (await at.chat("Name a fish.", **options)).choices[0].logprobs.content
    chunks = await at.chunks("Name a fish.", **options)
    told = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    same([entry.token for entry in told], [entry.token for entry in whole])


@BEHAVIOURS.scripted
async def chat_developer(at: OpenAIClient) -> None:
    """chat: roles developer and system, names, and contents in parts."""
    parts = [{"type": "text", "text": "say "}, {"type": "text", "text": "yes"}]
    for role in ("developer", "system"):
        messages = [{"role": role, "content": "Be kind."}, {"role": "user", "content": parts, "name": "ann"}]
        same(words(await got(at.api.chat.completions.create(model=at.model, messages=messages))), "yes")


@BEHAVIOURS.any_model
async def chat_history(at: OpenAIClient) -> None:
    """chat: an answer goes back into the chat as it came."""
    first = await at.chat("Name a river.", max_completion_tokens=6)
    messages = [*user("Name a river."), first.choices[0].message, *user("And another one.")]
    second = await got(at.api.chat.completions.create(model=at.model, messages=messages, max_tokens=4, temperature=0))
    assert second.usage.prompt_tokens > first.usage.total_tokens
    assert second.usage.prompt_tokens_details.cached_tokens > 0


@BEHAVIOURS.scripted
async def chat_prediction(at: OpenAIClient) -> None:
    """chat: a prediction is counted as far as it came true."""
    prediction = {"type": "content", "content": "one two three and more"}
    answer = await at.chat("say one two three", prediction=prediction)
    details = answer.usage.completion_tokens_details
    same((words(answer), details.accepted_prediction_tokens), ("one two three", len("one two three")))
    assert details.rejected_prediction_tokens > 0


@BEHAVIOURS.scripted
async def chat_reasoning(at: OpenAIClient) -> None:
    """chat: reasoning is apart from the answer and counted."""
    answer = await at.chat("think hm, so: It is four.", reasoning_effort="low")
    message = answer.choices[0].message
    same((message.content, message.model_extra["reasoning_content"]), ("It is four.", "hm, so"))
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0
    same(joined(await at.chunks("think hm, so: It is four.")), "It is four.")


@BEHAVIOURS.any_model
async def chat_ignored(at: OpenAIClient) -> None:
    """chat: metadata, user, store, service_tier and verbosity are taken, and those without effect are named."""
    options = {"metadata": {"a": "b"}, "user": "ann", "safety_identifier": "x", "prompt_cache_key": "k"}
    raw = await got(
        at.api.chat.completions.with_raw_response.create(
            model=at.model, messages=user("Hi."), max_tokens=2, store=True, service_tier="auto", verbosity="low",
            modalities=["text"], **options,
        )
    )  # fmt: skip
    same(raw.headers["x-copyspec-ignored"], "service_tier, verbosity, store, metadata")


# ---- tools


@BEHAVIOURS.scripted
async def tools_auto(at: OpenAIClient) -> None:
    """tools: the model calls if it likes."""
    choice = (await at.chat(f"call weather {BERN}", tools=[TOOL])).choices[0]
    same((choice.finish_reason, choice.message.content), ("tool_calls", None))
    same([(call.type, call.function.name) for call in choice.message.tool_calls], [("function", "weather")])
    same(calls_of(choice.message), [("weather", BERN)])
    choice = (await at.chat("say no", tools=[TOOL], tool_choice="auto")).choices[0]
    same((choice.finish_reason, choice.message.content, choice.message.tool_calls), ("stop", "no", None))


@BEHAVIOURS.any_model
async def tools_forced(at: OpenAIClient) -> None:
    """tools: required and a function's name force a call that fits its schema."""
    for choice in ("required", NAMED):
        answer = await at.chat(f"call weather {ROME}", tools=[TOOL], tool_choice=choice)
        ((name, arguments),) = calls_of(answer.choices[0].message)
        same((name, answer.choices[0].finish_reason), ("weather", "tool_calls"))
        assert Weather.model_validate_json(arguments).city in ("Bern", "Rome")


@BEHAVIOURS.any_model
async def tools_none(at: OpenAIClient) -> None:
    """tools: none forbids them."""
    choice = (await at.chat(f"call weather {BERN}", tools=[TOOL], tool_choice="none")).choices[0]
    same(choice.message.tool_calls, None)
    assert choice.message.content


@BEHAVIOURS.scripted
async def tools_parallel(at: OpenAIClient) -> None:
    """tools: several calls in one answer, unless parallel_tool_calls is false."""
    text = f"call weather {BERN}\ncall weather {ROME}"
    both = (await at.chat(text, tools=[TOOL])).choices[0].message
    same(calls_of(both), [("weather", BERN), ("weather", ROME)])
    same(len({call.id for call in both.tool_calls}), 2)
    one = (await at.chat(text, tools=[TOOL], parallel_tool_calls=False)).choices[0].message
    same(calls_of(one), [("weather", BERN)])


@BEHAVIOURS.scripted
async def tools_stream(at: OpenAIClient) -> None:
    """tools: a streamed call has its id and name first, and then its arguments."""
    chunks = await at.chunks(f"call weather {BERN}\ncall weather {ROME}", tools=[TOOL])
    parts = parts_of(chunks)
    same(sorted(parts), [0, 1])
    for index, expected in enumerate((BERN, ROME)):
        first, *later = parts[index]
        same((bool(first.id), first.type, first.function.name), (True, "function", "weather"))
        same([(part.id, part.function.name) for part in later], [(None, None)] * len(later))
        same("".join(part.function.arguments for part in parts[index]), expected)
    same(chunks[-1].choices[0].finish_reason, "tool_calls")


@BEHAVIOURS.scripted
async def tools_result(at: OpenAIClient) -> None:
    """tools: a result goes back to the model, which then answers."""
    messages: list[Answer] = user(f"call weather {BERN}")
    first = (await got(at.api.chat.completions.create(model=at.model, messages=messages, tools=[TOOL]))).choices[0]
    messages += [first.message, {"role": "tool", "tool_call_id": first.message.tool_calls[0].id, "content": "sunny"}]
    second = await got(at.api.chat.completions.create(model=at.model, messages=messages, tools=[TOOL]))
    same((words(second), second.choices[0].finish_reason), ("SUNNY", "stop"))


@BEHAVIOURS.scripted
async def tools_pydantic(at: OpenAIClient) -> None:
    """tools: parse gives the arguments of a pydantic function."""
    tool = openai.pydantic_function_tool(Weather)
    asked = at.api.chat.completions.parse(model=at.model, messages=user(f"call Weather {BERN}"), tools=[tool])
    (call,) = (await got(asked)).choices[0].message.tool_calls
    same(call.function.parsed_arguments, Weather(city="Bern"))


# ---- prescribed forms


@BEHAVIOURS.scripted
async def form_object(at: OpenAIClient) -> None:
    """response_format: json_object."""
    answer = await at.chat(f"say {ANN}", response_format={"type": "json_object"})
    same(words(answer), ANN)


@BEHAVIOURS.any_model
async def form_schema(at: OpenAIClient) -> None:
    """response_format: json_schema holds with any model, whole and streamed."""
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    text = 'say {"ok":true,"kind":"b"}'
    whole = await at.chat(text, response_format=form)
    assert words(whole) in [f'{{"ok":{ok},"kind":"{kind}"}}' for ok in ("true", "false") for kind in "ab"], words(whole)
    same(joined(await at.chunks(text, response_format=form)), words(whole))


@BEHAVIOURS.any_model
async def form_parse(at: OpenAIClient) -> None:
    """response_format: parse gives a pydantic object."""
    asked = at.api.chat.completions.parse(
        model=at.model, messages=user('say {"city":"Bern"}'), response_format=Weather, temperature=0, max_tokens=60
    )
    message = (await got(asked)).choices[0].message
    same(message.parsed, Weather.model_validate_json(message.content))


@BEHAVIOURS.any_model
async def form_cut(at: OpenAIClient) -> None:
    """response_format: parse tells of an answer that was cut."""
    asked = at.api.chat.completions.parse
    given = {"model": at.model, "messages": user(f"say {ANN}"), "response_format": Person, "max_completion_tokens": 3}
    error = None
    with suppress(AssertionError):
        error = await refused(_raised(asked, **given), openai.LengthFinishReasonError)
    assert error is not None, "no LengthFinishReasonError"
    same(error.completion.usage.completion_tokens, 3)


async def _raised(asked: Answer, **given: Answer) -> Answer:
    """Ask within an awaitable, whichever client it is: a blocking one raises at once."""
    return await got(asked(**given))


# ---- the helper for streams


@BEHAVIOURS.any_model
async def helper_text(at: OpenAIClient) -> None:
    """helper: deltas of the content, and the final completion."""
    asked = at.api.chat.completions.stream(
        model=at.model, messages=user("Name a tree."), temperature=0, stop=["."], max_completion_tokens=200
    )
    async with within(asked) as stream:
        events = [event async for event in each(stream)]
        final = await got(stream.get_final_completion())
    deltas = "".join(event.delta for event in events if event.type == "content.delta")
    same(deltas, words(final))
    same([event.content for event in events if event.type == "content.done"], [deltas])


@BEHAVIOURS.scripted
async def helper_form(at: OpenAIClient) -> None:
    """helper: an object that is parsed as it grows."""
    asked = at.api.chat.completions.stream(model=at.model, messages=user(f"say {ANN}"), response_format=Person)
    async with within(asked) as stream:
        events = [event async for event in each(stream)]
        final = await got(stream.get_final_completion())
    same(final.choices[0].message.parsed, Person(name="Ann", age=7))
    same([event.parsed for event in events if event.type == "content.done"], [Person(name="Ann", age=7)])


@BEHAVIOURS.scripted
async def helper_tools(at: OpenAIClient) -> None:
    """helper: arguments of calls as they grow."""
    tool = openai.pydantic_function_tool(Weather)
    text = f"call Weather {BERN}\ncall Weather {ROME}"
    async with within(at.api.chat.completions.stream(model=at.model, messages=user(text), tools=[tool])) as stream:
        events = [event async for event in each(stream)]
        final = await got(stream.get_final_completion())
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    same([event.parsed_arguments for event in done], [Weather(city="Bern"), Weather(city="Rome")])
    same([call.function.parsed_arguments.city for call in final.choices[0].message.tool_calls], ["Bern", "Rome"])


@BEHAVIOURS.any_model
async def helper_logprobs(at: OpenAIClient) -> None:
    """helper: log-probabilities as they come."""
    asked = at.api.chat.completions.stream(
        model=at.model, messages=user("Name a tree."), logprobs=True, temperature=0, max_completion_tokens=4
    )
    async with within(asked) as stream:
        events = [event async for event in each(stream)]
    told = [entry for event in events if event.type == "logprobs.content.delta" for entry in event.content]
    (done,) = [event.content for event in events if event.type == "logprobs.content.done"]
    same([entry.token for entry in told], [entry.token for entry in done])


# ---- errors


@BEHAVIOURS.any_model
async def error_overflow(at: OpenAIClient) -> None:
    """errors: too long a prompt is a BadRequestError with context_length_exceeded."""
    for options in ({}, {"stream": True}):
        error = await refused(_raised(at.chat, text="word " * 9_000, **options), openai.BadRequestError)
        same((error.code, error.type, error.param), ("context_length_exceeded", "invalid_request_error", "messages"))
        assert "This model's maximum context length is " in error.message


@BEHAVIOURS.any_model
async def error_model(at: OpenAIClient) -> None:
    """errors: an unknown model is a NotFoundError with model_not_found."""
    asked = at.api.chat.completions.create
    error = await refused(_raised(asked, model="gpt-0", messages=user("hi")), openai.NotFoundError)
    same((error.code, error.param), ("model_not_found", "model"))


@BEHAVIOURS.any_model
async def error_key(at: OpenAIClient) -> None:
    """errors: a wrong key is an AuthenticationError."""
    other = OpenAIClient(at.api.with_options(api_key="wrong"), at.model)
    error = await refused(other.chat("hi"), openai.AuthenticationError)
    same(error.code, "invalid_api_key")
    await refused(other.response("hi"), openai.AuthenticationError)


@BEHAVIOURS.any_model
async def error_param(at: OpenAIClient) -> None:
    """errors: what is wrong with a field is a BadRequestError that names it."""
    wrong: list[tuple[dict[str, Answer], str]] = [
        ({"temperature": -1}, "temperature"),
        ({"n": 0}, "n"),
        ({"top_logprobs": 99, "logprobs": True}, "top_logprobs"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice"),
        ({"functions": [TOOL["function"]]}, "functions"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x"}}]}]},
         "messages[0].content[0]"),
    ]  # fmt: skip
    for given, param in wrong:
        asked = {"model": at.model, "messages": user("hi"), **given}
        error = await refused(_raised(at.api.chat.completions.create, **asked), openai.BadRequestError)
        same((error.param, error.type), (param, "invalid_request_error"))


@BEHAVIOURS.any_model
async def error_elsewhere(at: OpenAIClient) -> None:
    """errors: endpoints that are not here are NotFoundErrors which say so."""
    error = await refused(_raised(at.api.embeddings.create, model=at.model, input="x"), openai.NotFoundError)
    same(error.code, "unsupported_endpoint")
    await refused(_raised(at.api.files.list), openai.NotFoundError)


# ---- headers, time-outs, retries, cancels


@BEHAVIOURS.any_model
async def headers_raw(at: OpenAIClient) -> None:
    """headers: with_raw_response shows the conversation and the request, whose id an answer has too."""
    raw = await got(
        at.api.chat.completions.with_raw_response.create(
            model=at.model, messages=user("Hi."), max_tokens=2,
            extra_headers={"X-Session-ID": "a/b%C3%BC", "X-Request-ID": "m1"},
        )
    )  # fmt: skip
    same((raw.headers["x-session-id"], raw.headers["x-request-id"]), ("a/b%C3%BC", "m1"))
    same(raw.parse()._request_id, "m1")
    error = await refused(at.chat("hi", n=0, extra_headers={"X-Request-ID": "m2"}), openai.BadRequestError)
    same((error.request_id, error.response.headers["x-should-retry"]), ("m2", "false"))


@BEHAVIOURS.any_model
async def headers_session(at: OpenAIClient) -> None:
    """headers: calls of one X-Session-ID go on from each other."""
    options = {"extra_headers": {"X-Session-ID": "conformance"}, "max_completion_tokens": 4}
    await at.chat(WORDS, **options)
    again = await at.chat(f"{WORDS} And more.", **options)
    assert again.usage.prompt_tokens_details.cached_tokens > 5


@BEHAVIOURS.any_model
async def streaming_response(at: OpenAIClient) -> None:
    """headers: with_streaming_response gives the lines of a stream, which ends with [DONE]."""
    asked = at.api.chat.completions.with_streaming_response.create(
        model=at.model, messages=user("Hi."), max_tokens=2, stream=True
    )
    async with within(asked) as response:
        same(response.headers["content-type"], "text/event-stream; charset=utf-8")
        lines = [line async for line in each(response.iter_lines()) if line]
    assert all(line.startswith("data: ") for line in lines)
    same(lines[-1], "data: [DONE]")


@BEHAVIOURS.scripted
async def cancel(at: OpenAIClient) -> None:
    """cancel: a stream that is closed gives its places back."""
    stream = await at.chat("for ever", stream=True, n=8, max_completion_tokens=9000)
    chunks = each(stream)
    await anext(chunks)
    await got(stream.close())
    await _all_places(at)


@BEHAVIOURS.scripted
async def timeout(at: OpenAIClient) -> None:
    """time-out: an APITimeoutError, and the call's places are given back."""
    impatient = OpenAIClient(at.api.with_options(timeout=0.3), at.model)
    await refused(impatient.chat("for ever", n=8, max_completion_tokens=9000), openai.APITimeoutError)
    await _all_places(at)


@BEHAVIOURS.scripted
async def retries(at: OpenAIClient) -> None:
    """retries: a busy server is a RateLimitError, and asked again when it says."""
    stream = await at.chat("for ever", stream=True, n=8, max_completion_tokens=9000)
    await anext(each(stream))
    error = await refused(at.chat("hi"), openai.RateLimitError)
    same((error.code, error.response.headers["retry-after"]), ("rate_limit_exceeded", "1"))
    assert "x-should-retry" not in error.response.headers
    await got(stream.close())
    patient = OpenAIClient(at.api.with_options(max_retries=5), at.model)
    same(words(await patient.chat("say x", n=1)), "x")


async def _all_places(at: OpenAIClient) -> None:
    """Have all of the places that one key has; they come back a moment after a client goes away."""
    for _ in range(500):
        with suppress(openai.RateLimitError):
            same([choice.message.content for choice in (await at.chat("say x", n=8)).choices], ["x"] * 8)
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the places were not given back")


# ---- completions


@BEHAVIOURS.any_model
async def text_whole(at: OpenAIClient) -> None:
    """completions: whole, streamed, and echoed are the same text, of 16 tokens at most."""
    whole = await at.text("once upon a time, in a land")
    same((whole.object, whole.choices[0].index), ("text_completion", 0))
    assert whole.usage.completion_tokens <= 16
    chunks = [chunk async for chunk in each(await at.text("once upon a time, in a land", stream=True))]
    same("".join(chunk.choices[0].text for chunk in chunks), whole.choices[0].text)
    echoed = await at.text("once upon a time, in a land", echo=True)
    same(echoed.choices[0].text, "once upon a time, in a land" + whole.choices[0].text)


@BEHAVIOURS.any_model
async def text_logprobs(at: OpenAIClient) -> None:
    """completions: logprobs have tokens and places."""
    choice = (await at.text("one two three", logprobs=2, max_tokens=3)).choices[0]
    same(len(choice.logprobs.tokens), len(choice.logprobs.token_logprobs))
    same("".join(choice.logprobs.tokens), choice.text)
    same(choice.logprobs.text_offset[0], 0)
    assert all(len(top) >= 2 for top in choice.logprobs.top_logprobs)


@BEHAVIOURS.scripted
async def text_options(at: OpenAIClient) -> None:
    """completions: token ids, stop, n, best_of and usage."""
    same((await at.text(list(b"abc"))).choices[0].text, "ABC")
    same((await at.text("abcd", stop=["C"])).choices[0].text, "AB")
    several = await at.text("ab", n=2, best_of=3)
    same([choice.text for choice in several.choices], ["AB", "AB"])
    stream = await at.text("ab", stream=True, stream_options={"include_usage": True})
    same([chunk async for chunk in each(stream)][-1].usage.completion_tokens, 3)
    error = await refused(at.text("ab", suffix="c"), openai.BadRequestError)
    same(error.param, "suffix")


# ---- responses


@BEHAVIOURS.any_model
async def response_whole(at: OpenAIClient) -> None:
    """responses: a whole response has its fields."""
    made = await at.response("Say hello.", metadata={"a": "b"}, instructions="Be brief.")
    same((made.object, made.model, made.error, made.metadata), ("response", at.model, None, {"a": "b"}))
    same(made.status, "completed" if made.incomplete_details is None else "incomplete")
    same([item.type for item in made.output], ["message"])
    assert made.output_text
    same(made.usage.total_tokens, made.usage.input_tokens + made.usage.output_tokens)


@BEHAVIOURS.any_model
async def response_stream(at: OpenAIClient) -> None:
    """responses: named events in order add up to the whole response."""
    whole = await at.response("Name a bird.", max_output_tokens=8)
    events = await at.events("Name a bird.", max_output_tokens=8)
    same([event.sequence_number for event in events], list(range(len(events))))
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    opening = ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    closing = ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
    same(kinds, [*opening, *closing, f"response.{whole.status}"])
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    same(deltas, whole.output_text)
    same(events[-1].response.output_text, whole.output_text)


@BEHAVIOURS.scripted
async def response_items(at: OpenAIClient) -> None:
    """responses: messages in parts, developers, and earlier answers as they came."""
    first = await at.response("say one")
    items = [
        {"role": "developer", "content": "Be kind."},
        *first.output,
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "say two"}]},
    ]
    same((await at.response(items)).output_text, "two")


@BEHAVIOURS.scripted
async def response_before(at: OpenAIClient) -> None:
    """responses: previous_response_id goes on from a response, and reuses its KV."""
    first = await at.response("say the ferry leaves at nine")
    second = await at.response("say two", previous_response_id=first.id)
    same((second.output_text, second.previous_response_id), ("two", first.id))
    assert second.usage.input_tokens > first.usage.total_tokens
    assert second.usage.input_tokens_details.cached_tokens > first.usage.input_tokens
    gone = at.response("x", previous_response_id="resp_none")
    same((await refused(gone, openai.NotFoundError)).param, "previous_response_id")


@BEHAVIOURS.any_model
async def response_kept(at: OpenAIClient) -> None:
    """responses: retrieved as made, deleted, and not kept with store=false."""
    made = await at.response("Say hello.", max_output_tokens=4)
    same((await got(at.api.responses.retrieve(made.id))).to_dict(), made.to_dict())
    await got(at.api.responses.delete(made.id))
    await refused(_raised(at.api.responses.retrieve, response_id=made.id), openai.NotFoundError)
    unkept = await at.response("Say hello.", max_output_tokens=4, store=False)
    await refused(_raised(at.api.responses.retrieve, response_id=unkept.id), openai.NotFoundError)


@BEHAVIOURS.any_model
async def response_inputs(at: OpenAIClient) -> None:
    """responses: what one was asked with is listed, page by page."""
    first = await at.response("Say hello.", max_output_tokens=4)
    second = await at.response("And again.", max_output_tokens=4, previous_response_id=first.id)
    listed = at.api.responses.input_items.list(second.id, limit=2)
    items = [item async for item in each(listed)]
    same([item.role for item in items], ["user", "assistant", "user"])
    same(items[-1].content[0].text, "Say hello.")


@BEHAVIOURS.scripted
async def response_tools(at: OpenAIClient) -> None:
    """responses: a function is called, and its result gives an answer."""
    first = await at.response(f"call weather {BERN}", tools=[OWN_TOOL])
    (call,) = first.output
    same((call.type, call.name, call.arguments), ("function_call", "weather", BERN))
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    second = await at.response([*user("hm"), call, result], tools=[OWN_TOOL])
    same(second.output_text, "SUNNY")
    third = await at.response([result], tools=[OWN_TOOL], previous_response_id=first.id)
    same(third.output_text, "SUNNY")


@BEHAVIOURS.any_model
async def response_tools_forced(at: OpenAIClient) -> None:
    """responses: tool_choice required, by name, and none."""
    for choice in ("required", {"type": "function", "name": "weather"}):
        (call,) = (await at.response(f"call weather {ROME}", tools=[OWN_TOOL], tool_choice=choice)).output
        assert Weather.model_validate_json(call.arguments).city in ("Bern", "Rome")
    free = await at.response(f"call weather {ROME}", tools=[OWN_TOOL], tool_choice="none")
    same([item.type for item in free.output], ["message"])


@BEHAVIOURS.scripted
async def response_tools_stream(at: OpenAIClient) -> None:
    """responses: calls in events, their arguments as they grow."""
    events = await at.events(f"call weather {BERN}\ncall weather {ROME}", tools=[OWN_TOOL])
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    same([(event.output_index, event.arguments) for event in done], [(0, BERN), (1, ROME)])
    for event in done:
        parts = [e for e in events if e.type == "response.function_call_arguments.delta" and e.item_id == event.item_id]
        same("".join(part.delta for part in parts), event.arguments)
    same([item.name for item in events[-1].response.output], ["weather", "weather"])


@BEHAVIOURS.any_model
async def response_parse(at: OpenAIClient) -> None:
    """responses: parse gives a pydantic object."""
    asked = at.api.responses.parse(
        model=at.model, input='say {"city":"Bern"}', text_format=Weather, temperature=0, max_output_tokens=60
    )
    parsed = await got(asked)
    same(parsed.output_parsed, Weather.model_validate_json(parsed.output_text))


@BEHAVIOURS.scripted
async def response_helper(at: OpenAIClient) -> None:
    """responses: the stream helper parses text and calls."""
    async with within(at.api.responses.stream(model=at.model, input=f"say {ANN}", text_format=Person)) as stream:
        kinds = {event.type async for event in each(stream)}
        same((await got(stream.get_final_response())).output_parsed, Person(name="Ann", age=7))
    assert "response.output_text.done" in kinds
    tool = openai.pydantic_function_tool(Weather)["function"]
    asked = at.api.responses.stream(model=at.model, input=f"call Weather {BERN}", tools=[{"type": "function", **tool}])
    async with within(asked) as stream:
        async for _ in each(stream):
            pass
        (call,) = (await got(stream.get_final_response())).output
    same((call.name, call.arguments), ("Weather", BERN))


@BEHAVIOURS.scripted
async def response_reasoning(at: OpenAIClient) -> None:
    """responses: reasoning is an item of its own."""
    made = await at.response("think hm: four", reasoning={"effort": "low"})
    same([item.type for item in made.output], ["reasoning", "message"])
    same((made.output[0].content[0].text, made.output_text), ("hm", "four"))
    again = await at.response([*user("x"), *made.output, *user("say on")])
    same(again.output_text, "on")
    events = await at.events("think hm: four")
    same("".join(event.delta for event in events if event.type == "response.reasoning_text.delta"), "hm")


@BEHAVIOURS.any_model
async def response_cut(at: OpenAIClient) -> None:
    """responses: max_output_tokens leaves a response incomplete."""
    made = await at.response("Count from one to a hundred.", max_output_tokens=3)
    same((made.status, made.incomplete_details.reason), ("incomplete", "max_output_tokens"))
    same(made.usage.output_tokens, 3)
    same((await at.events("Count from one to a hundred.", max_output_tokens=3))[-1].type, "response.incomplete")


@BEHAVIOURS.any_model
async def response_logprobs(at: OpenAIClient) -> None:
    """responses: logprobs are told where they are included."""
    include = ["message.output_text.logprobs"]
    made = await at.response("Name a fish.", include=include, top_logprobs=2, max_output_tokens=4)
    part = made.output[0].content[0]
    same("".join(entry.token for entry in part.logprobs), part.text)
    same([len(entry.top_logprobs) for entry in part.logprobs], [2] * len(part.logprobs))
    events = await at.events("Name a fish.", include=include, top_logprobs=2, max_output_tokens=4)
    told = [entry.token for event in events if event.type.endswith("text.delta") for entry in event.logprobs]
    same(told, [entry.token for entry in part.logprobs])


@BEHAVIOURS.any_model
async def response_errors(at: OpenAIClient) -> None:
    """responses: what cannot be done is a BadRequestError that names it."""
    wrong: list[tuple[dict[str, Answer], str]] = [
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"temperature": -1}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        ({"input": "word " * 9_000}, "input"),
    ]
    for given, param in wrong:
        asked = {"model": at.model, "input": "hi", **given}
        for stream in (False, True):
            error = await refused(_raised(at.api.responses.create, stream=stream, **asked), openai.BadRequestError)
            same(error.param, param)


# ---- conversations and models


@BEHAVIOURS.any_model
async def conversation_kept(at: OpenAIClient) -> None:
    """conversations: made, retrieved and deleted."""
    made = await got(at.api.conversations.create(metadata={"a": "b"}))
    same((await got(at.api.conversations.retrieve(made.id))).to_dict(), made.to_dict())
    same(made.metadata, {"a": "b"})
    assert (await got(at.api.conversations.delete(made.id))).deleted
    await refused(_raised(at.api.conversations.retrieve, conversation_id=made.id), openai.NotFoundError)


@BEHAVIOURS.any_model
async def conversation_grows(at: OpenAIClient) -> None:
    """conversations: responses go on in one, and its items are listed."""
    made = await got(at.api.conversations.create(items=[{"role": "user", "content": "Ann's boat is blue."}]))
    options = {"conversation": made.id, "max_output_tokens": 4}
    first = await at.response("Say hello.", **options)
    same(first.conversation.id, made.id)
    second = await at.response("Say goodbye.", **options)
    assert second.usage.input_tokens > first.usage.total_tokens
    listed = at.api.conversations.items.list(made.id, order="asc", limit=2)
    roles = [item.role async for item in each(listed)]
    same(roles, ["user", "user", "assistant", "user", "assistant"])


@BEHAVIOURS.any_model
async def models(at: OpenAIClient) -> None:
    """models: listed and retrieved by name; another is a NotFoundError."""
    listed = [model async for model in each(at.api.models.list())]
    assert at.model in [model.id for model in listed]
    same((await got(at.api.models.retrieve(at.model))).id, at.model)
    error = await refused(_raised(at.api.models.retrieve, model="gpt-0"), openai.NotFoundError)
    same(error.code, "model_not_found")


if __name__ == "__main__":
    main()
