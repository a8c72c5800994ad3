"""Instructor: `python -m scripts.conformance.instructor_client URL MODEL`."""

from __future__ import annotations

from collections.abc import Iterable

import instructor
import openai
from pydantic import field_validator

from scripts.conformance.asked import ANN, Kind, Person
from scripts.conformance.behaviours import KEY, Answer, Behaviours, Place, same

BEHAVIOURS = Behaviours()
BO = '{"name":"Bo","age":8}'


class Adult(Person):
    """Somebody who is not a child."""

    @field_validator("age")
    @classmethod
    def _grown(cls, age: int) -> int:
        if age < 18:
            raise ValueError('too young\nsay {"name":"Ann","age":70}')
        return age


def client(place: Place, mode: instructor.Mode, **options: Answer) -> Answer:
    """A blocking client."""
    return instructor.from_openai(openai.OpenAI(base_url=place.url, api_key=KEY, max_retries=0, **options), mode=mode)


def asked(place: Place, text: str, kind: Answer, **options: Answer) -> dict[str, Answer]:
    """What is asked: an object of a kind."""
    messages = [{"role": "user", "content": text}]
    most = {"temperature": 0, "max_tokens": 400 if place.is_scripted else 80}
    return {"model": place.model, "messages": messages, "response_model": kind, "max_retries": 1, **most, **options}


@BEHAVIOURS.scripted
def modes(place: Place) -> None:
    """An object as a call, a strict call, JSON, a JSON schema, and JSON in Markdown."""
    said = {
        instructor.Mode.TOOLS: f"call Person {ANN}",
        instructor.Mode.TOOLS_STRICT: f"call Person {ANN}",
        instructor.Mode.JSON: f"say {ANN}",
        instructor.Mode.JSON_SCHEMA: f"say {ANN}",
        instructor.Mode.MD_JSON: f"say ```json\\n{ANN}\\n```",
    }
    for mode, text in said.items():
        found = client(place, mode).chat.completions.create(**asked(place, text, Person))
        same((mode, found.model_dump()), (mode, {"name": "Ann", "age": 7}))


@BEHAVIOURS.any_model
def forms(place: Place) -> None:
    """An object of any model fits its class, by a call and by a JSON schema."""
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        found = client(place, mode).chat.completions.create(**asked(place, 'call Kind {"yes": true}', Kind))
        assert isinstance(found.yes, bool)
        assert found._raw_response.usage.total_tokens > 0


@BEHAVIOURS.any_model
async def awaited(place: Place) -> None:
    """The same, awaited."""
    async with openai.AsyncOpenAI(base_url=place.url, api_key=KEY, max_retries=0) as api:
        found = await instructor.from_openai(api).create(**asked(place, 'call Kind {"yes": true}', Kind))
    assert isinstance(found.yes, bool)


@BEHAVIOURS.scripted
def partial(place: Place) -> None:
    """An object grows as it is streamed, as a call and as JSON."""
    for mode, text in ((instructor.Mode.TOOLS, f"call PartialPerson {ANN}"), (instructor.Mode.JSON, f"say {ANN}")):
        parts = list(client(place, mode).create_partial(**asked(place, text, Person)))
        assert len(parts) > 1
        same((parts[-1].name, parts[-1].age), ("Ann", 7))


@BEHAVIOURS.scripted
def several(place: Place) -> None:
    """Several objects of one answer, one after the other."""
    text = f'call IterablePerson {{"tasks": [{ANN}, {BO}]}}'
    found = list(client(place, instructor.Mode.TOOLS).create_iterable(**asked(place, text, Person)))
    same([person.name for person in found], ["Ann", "Bo"])


@BEHAVIOURS.scripted
def parallel(place: Place) -> None:
    """Several calls in one answer."""
    text = f"call Person {ANN}\ncall Person {BO}"
    options = asked(place, text, Iterable[Person], tool_choice="auto")
    found = list(client(place, instructor.Mode.PARALLEL_TOOLS).chat.completions.create(**options))
    same([person.name for person in found], ["Ann", "Bo"])


@BEHAVIOURS.scripted
def asked_again(place: Place) -> None:
    """An object that is not as it should be is asked for again, with what is wrong with it."""
    found = client(place, instructor.Mode.JSON).chat.completions.create(
        **asked(place, f"say {ANN}", Adult, max_retries=2)
    )
    same(found.model_dump(), {"name": "Ann", "age": 70})


@BEHAVIOURS.scripted
def response(place: Place) -> None:
    """An object by POST /v1/responses."""
    api = client(place, instructor.Mode.RESPONSES_TOOLS)
    found = api.responses.create(model=place.model, input=f"call Person {ANN}", response_model=Person)
    same(found.model_dump(), {"name": "Ann", "age": 7})


@BEHAVIOURS.any_model
def session(place: Place) -> None:
    """The header X-Session-ID names the conversation."""
    api = client(place, instructor.Mode.TOOLS, default_headers={"X-Session-ID": "instructor"})
    for cached in (False, True):
        found = api.chat.completions.create(**asked(place, 'call Kind {"yes": true}', Kind))
        same(found._raw_response.usage.prompt_tokens_details.cached_tokens > 5, cached)


if __name__ == "__main__":
    BEHAVIOURS.main("instructor")
