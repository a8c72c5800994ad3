"""A conversation that nobody names is found by who shows all of it, and by nobody else."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from typing import Any

import pytest

from copyspec_engine import Engine, EngineConfig, GenerationOutput, GenerationRequest, NoDrafter, SamplingParams
from copyspec_engine.adapters.conversations import ConversationFinder, Talk
from copyspec_engine.testing import scripted_engine
from tests.conftest import assert_all_slots_free

Message = dict[str, Any]
SHORT = SamplingParams(max_tokens=40)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def answer(text: str, **others: Any) -> Message:
    return {"role": "assistant", "content": text, **others}


def call(name: str, call_id: str, arguments: Any) -> Message:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def session(talk: Talk) -> str:
    return str(talk.request_options()["session_id"])


def have(conversations: ConversationFinder, messages: list[Message], last: Message, **shown: Any) -> str:
    """The session of a call that was answered."""
    talk = conversations.begin(None, messages, shown)
    talk.answered(last)
    return session(talk)


def find(conversations: ConversationFinder, messages: list[Message], **shown: Any) -> str | None:
    """The session from which a call goes on."""
    options = conversations.begin(None, messages, shown).request_options()
    assert not options["keep_texts"]
    return None if options["continues"] is None else str(options["continues"])


HISTORY = [user("hi"), answer("Hello!"), user("more")]


def test_who_shows_the_whole_talk_goes_on_from_it() -> None:
    conversations = ConversationFinder()
    first = have(conversations, HISTORY[:1], HISTORY[1])
    assert find(conversations, HISTORY) == find(conversations, HISTORY[:2]) == first
    second = have(conversations, HISTORY, answer("Yes."))
    assert find(conversations, [*HISTORY, answer("Yes."), user("and")]) == second != first
    assert find(conversations, [*HISTORY, answer("No."), user("and")]) == first


@pytest.mark.parametrize(
    "shown",
    [
        [user("hi")],
        [user("hi"), user("more")],
        [user("hi"), answer("Hello?"), user("more")],
        [user("hi"), user("Hello!"), user("more")],
        [user("hi"), answer("Hello!", tool_calls=[call("f", "1", {})]), user("more")],
        [user("hi"), answer("Hello!", reasoning_content="hm"), user("more")],
        [{**user("hi"), "name": "Bo"}, answer("Hello!"), user("more")],
        [{**user("hi"), "documents": ["x"]}, answer("Hello!"), user("more")],
        [{"role": "system", "content": "Be brief."}, *HISTORY],
        [answer("Hello!"), user("more")],
        [user("ho"), *HISTORY],
    ],
)
def test_who_shows_something_else_stands_alone(shown: list[Message]) -> None:
    conversations = ConversationFinder()
    first = have(conversations, HISTORY[:1], HISTORY[1])
    assert find(conversations, shown) is None
    have(conversations, shown, answer("Yes."))
    assert find(conversations, HISTORY) == first


def test_what_else_the_prompt_is_made_of_must_be_the_same() -> None:
    conversations, tools = ConversationFinder(), [{"function": {"name": "f"}}]
    first = have(conversations, HISTORY[:1], HISTORY[1], tools=tools)
    assert find(conversations, HISTORY) is None
    assert find(conversations, HISTORY, tools=[{"function": {"name": "g"}}]) is None
    assert find(conversations, HISTORY, tools=json.loads(json.dumps(tools))) == first


@pytest.mark.parametrize(
    ("given", "back"),
    [
        (answer("Hello!"), answer([{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}])),
        (answer("\n\nHello! "), answer("Hello!")),
        (answer("", tool_calls=[call("f", "x", {"a": 1})]), answer(None, tool_calls=[call("f", "y", '{"a": 1}')])),
        (answer("Hello!", reasoning_content="So ..."), answer("Hello!")),
        (answer("Hello!", reasoning_content="So ..."), answer("Hello!", reasoning_content=" So ...\n")),
        (answer("Hello!"), answer("Hello!", name="greeter", tool_calls=[], refusal=None)),
    ],
)
def test_an_answer_is_known_in_the_forms_in_which_frameworks_give_it_back(given: Message, back: Message) -> None:
    conversations = ConversationFinder()
    first = have(conversations, [user("hi")], given)
    assert find(conversations, [user("hi"), back, user("more")]) == first


def test_results_belong_to_their_calls_whatever_the_ids_are() -> None:
    conversations, calls = ConversationFinder(), [call("f", "a", {}), call("f", "b", {})]
    results = [{"role": "tool", "content": text, "tool_call_id": at} for text, at in (("one", "a"), ("two", "b"))]
    asked = [user("hi"), answer("", tool_calls=calls), *results]
    first = have(conversations, asked, answer("Done."))
    renamed = json.loads(json.dumps(asked).replace('"a"', '"1"').replace('"b"', '"2"'))
    assert find(conversations, [*renamed, answer("Done.")]) == first
    swapped = json.loads(json.dumps(asked).replace('"tool_call_id": "b"', '"tool_call_id": "a"'))
    assert find(conversations, [*swapped, answer("Done.")]) is None


@pytest.mark.parametrize("calls", [5, "f", {"name": "f"}, [5], [{"function": "f"}], [{"function": [1]}], [{"id": {}}]])
def test_calls_that_are_none_are_left_for_the_engine_to_refuse(calls: object) -> None:
    conversations, asked = ConversationFinder(), [user("hi"), answer("", tool_calls=calls)]
    first = have(conversations, asked, answer("Done."))
    assert find(conversations, [*asked, answer("Done.")]) == first


def test_everyone_goes_on_from_the_same_whatever_others_have_added() -> None:
    conversations = ConversationFinder()
    first = have(conversations, HISTORY[:1], HISTORY[1])
    branches = {have(conversations, [*HISTORY[:2], user(text)], answer("Yes.")) for text in ("one", "two", "two")}
    conversations.begin(None, [*HISTORY[:2], user("three")])  # it failed, or nobody waited for its end
    assert len(branches) == 3
    assert first not in branches
    assert find(conversations, HISTORY) == find(conversations, [*HISTORY[:2], user("three"), answer("Yes.")]) == first


def test_an_id_that_is_named_is_the_conversation_and_is_not_found() -> None:
    conversations = ConversationFinder()
    talk = conversations.begin("ann", HISTORY[:1])
    talk.answered(HISTORY[1])
    assert talk.named == "ann"
    assert talk.request_options() == {"session_id": "ann"}
    assert find(conversations, HISTORY) is None
    have(conversations, HISTORY[:1], HISTORY[1])
    assert conversations.begin("ann", HISTORY).request_options() == {"session_id": "ann"}
    assert conversations.begin(None, HISTORY).named is None
    assert conversations.begin(None, None).request_options() == {"session_id": None}  # a raw prompt


def test_copies_know_nothing_and_ids_cannot_be_guessed() -> None:
    conversations = ConversationFinder()
    first = have(conversations, HISTORY[:1], HISTORY[1])
    assert len({first, *(session(conversations.begin(None, HISTORY)) for _ in range(9))}) == 10
    assert len(first) > 32
    for other in (pickle.loads(pickle.dumps(conversations)), copy.deepcopy(conversations)):
        assert find(other, HISTORY) is None
        have(other, HISTORY[:1], HISTORY[1])
        assert find(other, HISTORY) not in (first, None)
        assert not set(other._sessions) & set(conversations._sessions)  # hashes with another secret


def test_the_conversations_that_can_be_found_are_bounded() -> None:
    conversations = ConversationFinder(3)
    sessions = [have(conversations, [user(str(number))], answer("ok")) for number in range(3)]
    assert find(conversations, [user("0"), answer("ok")]) == sessions[0]
    have(conversations, [user("3")], answer("ok"))
    assert len(conversations) == 3
    assert [find(conversations, [user(str(number)), answer("ok")]) for number in range(2)] == [sessions[0], None]


def test_it_may_be_used_from_many_threads() -> None:
    conversations, found = ConversationFinder(16), []

    def work(number: int) -> None:
        asked = [user(f"hi {number}")]
        found.extend(have(conversations, asked, HISTORY[1]) == find(conversations, [*asked, HISTORY[1]]) for _ in "abc")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 24


@pytest.mark.parametrize("others_talk", [False, True])
def test_from_cached_tokens_nobody_can_tell_what_others_have_asked(others_talk: bool) -> None:
    secret, conversations = "Ann's code is 4711, and the door is green. " * 3, ConversationFinder()

    def cached(*texts: str) -> int:
        asked = [user(text) if number % 2 == 0 else answer(text) for number, text in enumerate(texts)]
        talk = conversations.begin(None, asked)
        output = engine.generate(GenerationRequest(messages=asked, **talk.request_options()))
        talk.answered(answer(output.text))
        return output.usage.cached_tokens

    with scripted_engine(lambda prompt: "ok") as engine:
        if others_talk:
            cached(secret)
            cached(secret, "ok", "And the second key?")
        assert cached(secret) == cached(secret.replace("4711", "4712")) == 0
        # Who has asked the same goes on from that, as often as he likes, and no further.
        guesses = ("And the second key?", "And the second day?", "And the second key?", "What?")
        first, *others = [cached(secret, "ok", guess) for guess in guesses]
        assert others == [first] * 3
        assert first > len(secret)


def test_branches_of_a_talk_give_the_tokens_of_plain_decoding() -> None:
    text, conversations = "One two three four five six seven eight nine ten. " * 2, ConversationFinder()

    def ask(asked: list[Message]) -> GenerationOutput:
        talk = conversations.begin(None, asked)
        output = engine.generate(GenerationRequest(messages=asked, **talk.request_options(), sampling=SHORT))
        talk.answered(answer(output.text))
        plain = engine.generate(GenerationRequest(messages=asked, drafter=NoDrafter(), sampling=SHORT))
        assert output.text == plain.text
        return output

    with Engine(EngineConfig(model="bundled", kv_cache_tokens=2048)) as engine:
        first = ask([user(text), user("Repeat the document.")])
        talk = [user(text), user("Repeat the document."), answer(first.text)]
        for question in ("Again!", "Append this line:\n- x", "Again!"):
            second = ask([*talk, user(question)])
            assert second.usage.cached_tokens >= first.usage.total_tokens - 1
            ask([*talk, user(question), answer(second.text), user("Again!")])
        assert_all_slots_free(engine)
