"""POST /v1/chat/completions: what each field does, and that none of them is ignored without a word."""

from __future__ import annotations

from collections.abc import Callable

from copyspec_engine import Engine, GenerationRequest
from tests.serve.conftest import CHAT, Client, body, events, texts

MakeEngine = Callable[..., Engine]


async def test_a_whole_answer_and_a_streamed_one_are_the_engines_own(echo: Engine, client: Client) -> None:
    http = client(echo)
    expected = echo.generate(GenerationRequest(messages=body("füße")["messages"])).text
    whole = (await http.post(CHAT, json=body("füße"))).json()
    stream = await http.post(CHAT, json=body("füße", stream=True))
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": expected, "refusal": None}
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert texts(events(stream)) == {0: expected}
    assert stream.text.endswith("data: [DONE]\n\n")
    assert [e["choices"][0]["finish_reason"] for e in events(stream)][-1] == "stop"
    assert all(e["choices"][0]["delta"] for e in events(stream)[:-1]), "no empty delta before the end"
