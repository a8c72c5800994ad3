"""The page in a browser over a real server: turns, marks and their sources, stop, edits, the document pane."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from copyspec_engine import Engine, EngineConfig
from copyspec_engine.serve.config import ServeConfig
from copyspec_engine.testing import held_by, scripted_engine
from tests.serve.servers import serving

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
pytestmark = pytest.mark.enable_socket

FOX = "The quick brown fox jumps over the lazy dog, \U0001f98a and the lazy dog sleeps on."


def reply(prompt: str) -> str:
    """Replaces words of what was said before, thinks aloud, or goes on and on."""
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", prompt, flags=re.DOTALL)
    asked = [text for role, text in turns if role == "user"]
    answers = [text for role, text in turns if role == "assistant"]
    change = re.match(r"Replace (\w+) by (\w+)", asked[-1])
    if change is not None:
        return (answers or asked)[-1 if answers else 0].replace(change[1], change[2])
    if asked[-1] == "think":
        return f"<think>What was first?</think>First there was: {asked[0]}"
    if asked[-1] == "for ever":
        return "and on " * 4000
    return f"<b>{asked[-1]}</b>"


@pytest.fixture
def engine() -> Iterator[Engine]:
    with scripted_engine(reply, EngineConfig(model="scripted", max_model_len=60_000)) as engine:
        yield engine


@pytest.fixture
def address(engine: Engine) -> Iterator[str]:
    with serving(engine) as address:
        yield address


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """Afterwards the console is empty and only the server was asked."""
    said: list[str] = []
    asked: list[str] = []
    context = browser.new_context(viewport={"width": 900, "height": 700})
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    sync_api.expect(page.locator("#model")).to_have_text("scripted")
    yield page
    context.close()
    refused = "Failed to load resource: the server responded with a status of 503"  # the browser's own words for it
    assert [text for text in said if not text.startswith(refused)] == []
    assert {url.split("/")[2] for url in asked if not url.startswith("blob:")} == {address.removeprefix("http://")}


@pytest.fixture
def ask(page: Any) -> Callable[[str], Any]:
    """ask(text) -> the answer's item, once it is whole."""

    def ask(text: str) -> Any:
        count = page.locator("#messages li.assistant").count()
        page.fill("#say", text)
        page.press("#say", "Enter")
        page.locator("#messages li.assistant").nth(count).locator(".figures").wait_for()
        return page.locator("#messages li.assistant").nth(count)

    return ask


def text_of(item: Any) -> str:
    return str(item.locator(":scope > .text").inner_text())


def test_three_turns_show_what_was_copied_and_from_where(page: Any, ask: Callable[[str], Any]) -> None:
    assert text_of(ask(FOX)) == f"<b>{FOX}</b>", "text is text, never HTML"
    second = ask("Replace fox by cat")
    assert text_of(second) == f"<b>{FOX.replace('fox', 'cat')}</b>"
    marked = second.locator("mark")
    longest = max(marked.all_inner_texts(), key=len)
    assert "jumps over the lazy dog, \U0001f98a and the lazy dog sleeps on." in longest
    marked.filter(has_text="sleeps on").click()
    source = page.locator("#source")
    assert source.locator("#source-place").inner_text().startswith("message 2 of 3")
    assert source.locator("mark").inner_text() == longest
    page.keyboard.press("Escape")
    sync_api.expect(source).to_be_hidden()
    assert re.search(r"tokens per pass · \d+% copied · \d+ of \d+ prompt tokens reused", second.inner_text())
    third = ask("think")
    assert text_of(third) == f"First there was: {FOX}"
    assert third.locator(".reasoning .text").text_content() == "What was first?"


def test_an_answer_can_be_stopped_written_anew_and_its_question_changed(
    page: Any, ask: Callable[[str], Any], engine: Engine
) -> None:
    ask(FOX)
    page.fill("#say", "for ever")
    page.press("#say", "Enter")
    last = page.locator("#messages li.assistant").nth(1)
    sync_api.expect(last.locator(":scope > .text")).to_contain_text("and on and on")
    page.click("#stop")
    sync_api.expect(last.locator(".figures")).to_have_text("stopped")
    assert len(text_of(last)) < len("and on " * 4000)
    for _ in range(200):
        if not any(held_by(engine)):
            break
        page.wait_for_timeout(10)
    assert not any(held_by(engine)), "the model writes no more"
    page.locator("#messages li.user").nth(1).get_by_role("button", name="Edit").click()
    sync_api.expect(page.locator("#say")).to_have_value("for ever")
    again = ask("Replace dog by bird")
    expected = f"<b>{FOX.replace('dog', 'bird')}</b>"
    assert text_of(again) == expected
    again.get_by_role("button", name="Regenerate").click()
    sync_api.expect(page.locator("#stop")).to_be_hidden()
    assert text_of(page.locator("#messages li.assistant").nth(1)) == expected
    assert page.locator("#messages li").count() == 4


def test_a_conversation_outlives_a_reload_and_is_forgotten_when_a_new_one_begins(
    page: Any, ask: Callable[[str], Any], engine: Engine
) -> None:
    ask(FOX)
    page.reload()
    assert text_of(page.locator("#messages li.assistant").nth(0)) == f"<b>{FOX}</b>"
    assert text_of(ask("Replace fox by cat")) == f"<b>{FOX.replace('fox', 'cat')}</b>"
    with page.expect_download() as download:
        page.click("#save")
    said = json.loads(download.value.path().read_text(encoding="utf-8"))
    assert [message["role"] for message in said["messages"]] == ["user", "assistant"] * 2
    session = f"default/{said['session_id']}"
    assert len(engine.memory(session))
    with page.expect_response(re.compile("/v1/copyspec/conversations/")):
        page.click("#new")
    assert page.locator("#messages li").count() == 0
    assert not len(engine.memory(session))


def test_a_document_is_edited_its_changes_are_shown_and_can_be_undone(page: Any) -> None:
    page.click("#tab-document")
    page.fill("#text", FOX)
    page.fill("#edit", "Replace fox by cat")
    page.click("#editor button.primary")
    sync_api.expect(page.locator("#edit-figures")).to_contain_text("% copied")
    assert page.locator("#text").input_value() == FOX.replace("fox", "cat")
    assert page.locator("#diff del").all_inner_texts() == ["fox"]
    assert page.locator("#diff ins").all_inner_texts() == ["cat"]
    assert "jumps over the lazy dog" in "".join(page.locator("#diff mark").all_inner_texts())
    page.click("#undo")
    assert page.locator("#text").input_value() == FOX
    sync_api.expect(page.locator("#result")).to_be_hidden()


def test_a_server_with_keys_is_asked_with_the_one_that_is_typed(browser: Any, engine: Engine, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"ann {hashlib.sha256(b'key of ann').hexdigest()}")
    keys.chmod(0o600)
    with serving(engine, ServeConfig(api_keys=str(keys))) as address, browser.new_context() as context:
        page = context.new_page()
        page.goto(address)
        sync_api.expect(page.locator("#status")).to_contain_text("no API key")
        page.fill("#key", "key of ann")
        page.press("#key", "Enter")
        sync_api.expect(page.locator("#model")).to_have_text("scripted")
        page.fill("#say", "hello")
        page.press("#say", "Enter")
        sync_api.expect(page.locator("#messages li.assistant > .text")).to_have_text("<b>hello</b>")
        page.goto(f"{address}/docs")
        sync_api.expect(page.locator("h1")).to_contain_text("copyspec")


def test_the_page_can_be_used_by_keyboard_and_says_what_is_wrong(page: Any, engine: Engine) -> None:
    page.focus("#tab-chat")
    page.keyboard.press("ArrowRight")
    sync_api.expect(page.locator("#document")).to_be_visible()
    page.keyboard.press("ArrowLeft")
    sync_api.expect(page.locator("#chat")).to_be_visible()
    engine.close()
    page.fill("#say", "hello")
    page.press("#say", "Enter")
    sync_api.expect(page.locator("#status")).not_to_be_empty()
    sync_api.expect(page.locator("#say")).to_have_value("hello")  # what was said is not lost
