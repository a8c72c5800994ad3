"""The openai package over a socket, as its users have it: each behaviour of scripts/conformance, blocking and not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from copyspec_engine.testing import scripted_engine
from scripts.conformance.behaviours import KEY, Behaviour, Place
from scripts.conformance.openai_client import BEHAVIOURS, KINDS, ask
from scripts.conformance.replies import reply
from scripts.conformance.scripted_server import CONFIG, ENGINE_CONFIG
from tests.serve.servers import serving


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as environment, scripted_engine(reply, ENGINE_CONFIG) as engine:
        environment.setenv("COPYSPEC_API_KEY", KEY)
        with serving(engine, CONFIG) as url:
            yield Place(f"{url}/v1", "scripted")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda behaviour: behaviour.name)
def test_what_its_users_do(place: Place, behaviour: Behaviour, kind: str) -> None:
    asyncio.run(ask(place, kind, behaviour))
