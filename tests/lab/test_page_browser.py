"""The provenance page in a browser: pointer, keyboard, contrast, and not a single request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from copyspec_engine.lab.evaluation.records import TurnRecord
from copyspec_engine.lab.page import render_page, transcripts

DOCUMENT = "Ann \U0001f600 books the room.\r\nBo <b>brings</b> the slides."
LONG = "word " * 3000 + "the needle " + "word " * 3000
FIRST, SECOND = "Ann \U0001f600 books the room, Ann says.", "the needle, and Ann \U0001f600 books; Eve sings."
SOURCES = ("prediction", "earlier_prompt", "earlier_answer", "earlier_prediction", "pool", "grammar", "frequent")


def span(text: str, part: str, source: str, **place: Any) -> dict[str, Any]:
    return {"start": text.index(part), "stop": text.index(part) + len(part), "source": source, **place}


def record(turn: int, messages: list[dict[str, str]], text: str, *copies: dict[str, Any], task: str) -> TurnRecord:
    return TurnRecord(
        task=task,
        category="writing",
        turn=turn,
        writer="adaptive",
        messages=tuple(messages),
        text=text,
        token_ids=tuple(range(12)),
        prompt_tokens=20,
        finish_reason="stop",
        forward_passes=4,
        draft_lengths=(0, 9, 4, 2),
        accepted_lengths=(0, 6, 0, 2),
        accepted_by_source=dict.fromkeys(("prompt", "answer", *SOURCES), 1),
        copies=copies,
        prefill_s=0.1,
        decode_s=0.2,
    )


def records(task: str) -> list[TurnRecord]:
    """Two turns with copies from messages, the answer itself, and from what is not in the page."""
    start = [{"role": "system", "content": LONG}, {"role": "user", "content": DOCUMENT}]
    first = record(
        1,
        start,
        FIRST,
        span(FIRST, "books the room", "prompt", message=1, offset=6),
        {"start": 22, "stop": 25, "source": "answer", "offset": 0},
        task=task,
    )
    second = record(
        2,
        [*start, {"role": "assistant", "content": FIRST}, {"role": "user", "content": "More."}],
        SECOND,
        span(SECOND, "the needle", "prompt", message=0, offset=LONG.index("the needle")),
        span(SECOND, "Ann \U0001f600 books", "prompt", message=2, offset=0),
        span(SECOND, "Eve", "earlier_answer", before="what ", after=" said"),
        task=task,
    )
    text = "abcdefg" * 3
    kinds = [{"start": 3 * n, "stop": 3 * n + 3, "source": source} for n, source in enumerate(SOURCES)]
    return [first, second, record(3, [{"role": "user", "content": "?"}], text, *kinds, task=task)]


def decode(token_ids: Any) -> str:
    """Every token of these answers is a part of the first one's text."""
    return "".join(FIRST[3 * token : 3 * token + 3 if token < 11 else None] for token in token_ids)


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    found = transcripts([*records("one"), *records("two")], "adaptive", ["one", "two"], decode)
    path.write_text(render_page("A run", ["a model"], "adaptive", found), encoding="utf-8")
    return path


@pytest.fixture
def open_page(browser: Any, page_path: Path) -> Iterator[Callable[..., Any]]:
    """open_page(**options of the context) -> the page; afterwards it has said nothing and asked for nothing else."""
    said: list[str] = []
    asked: list[str] = []
    contexts = []

    def open_it(**options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(page_path.as_uri())
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert said == []
    assert set(asked) == {page_path.as_uri()}


@pytest.fixture
def page(open_page: Callable[..., Any]) -> Any:
    return open_page()


def sees(page: Any, text: str) -> None:
    """Waits until the highlighted source is this text; the address changes first."""
    now = "text => text === [...(CSS.highlights.get('source') ?? [])].map(String).join('|')"
    page.wait_for_function(now, arg=text, timeout=10_000)


def copy(page: Any, part: str) -> Any:
    return page.locator("details[open] .text .copy", has_text=part).first


def tip(page: Any) -> Any:
    return page.locator("#tip")


def is_in_view(page: Any) -> bool:
    """Whether the highlighted source is on the screen."""
    box = page.evaluate("(([range]) => range.getBoundingClientRect().toJSON())([...CSS.highlights.get('source')])")
    height = page.viewport_size["height"]
    return bool(box["top"] >= 0 and box["bottom"] <= height)


# Texts


def test_texts_and_copies_are_those_of_the_records(page: Any) -> None:
    texts = page.locator("details[open] .text").evaluate_all("all => all.map(text => text.textContent)")
    assert texts[:5] == [LONG, DOCUMENT, FIRST, "More.", SECOND]
    copies = page.locator("details[open] .text .copy").evaluate_all("all => all.map(one => one.textContent)")
    assert copies[:5] == ["books the room", "Ann", "the needle", "Ann \U0001f600 books", "Eve"]


@pytest.mark.parametrize("count", [1, 2], ids=["one call", "two calls"])
def test_who_speaks_stands_beside_the_beginning_of_the_text(browser: Any, tmp_path: Path, count: int) -> None:
    path = tmp_path / "page.html"
    found = transcripts(records("one")[:count], "adaptive", ["one"], decode)
    path.write_text(render_page("A run", ["a model"], "adaptive", found), encoding="utf-8")
    page = browser.new_page()
    page.goto(path.as_uri())
    places = "all => all.map(who => [who.offsetTop - who.nextElementSibling.offsetTop, getComputedStyle(who).padding])"
    told = page.locator("details[open] article .who").evaluate_all(places)
    page.close()
    assert len(told) > 1
    assert all(abs(below) <= 1 and padding == "0px" for below, padding in told), told


# The pointer


def test_pointing_at_a_copy_tells_its_message_and_offset(page: Any) -> None:
    copy(page, "books the room").hover()
    assert tip(page).locator("strong").inner_text() == "Copied from the prompt"
    assert tip(page).locator("p").inner_text() == "message 1 (user), from character 6"
    assert tip(page).locator("mark").inner_text() == "books the room"
    assert tip(page).locator("blockquote").text_content() == DOCUMENT
    page.mouse.move(0, 0)
    tip(page).wait_for(state="hidden")


def test_a_copy_from_elsewhere_tells_its_surroundings(page: Any) -> None:
    copy(page, "Eve").hover()
    assert tip(page).locator("strong").inner_text() == "Copied from an earlier answer"
    assert tip(page).locator("blockquote").inner_text() == "what Eve said"


def test_a_click_goes_to_the_source_and_the_browsers_button_comes_back(page: Any) -> None:
    copy(page, "books the room").click()
    sees(page, "books the room")
    assert page.locator("#back span").inner_text() == "Source: message 1 (user), from character 6"
    page.go_back()
    sees(page, "")
    assert page.evaluate("document.activeElement.textContent") == "books the room"
    page.go_forward()
    sees(page, "books the room")


def test_a_jump_unfolds_a_long_message(page: Any) -> None:
    folded = page.locator("details[open] .text.folded")
    assert folded.count() == 1
    copy(page, "the needle").click()
    sees(page, "the needle")
    assert is_in_view(page)
    assert folded.count() == 0
    assert page.locator("details[open] .fold").get_attribute("aria-expanded") == "true"


def test_a_jump_into_an_answer_leads_on_to_where_that_came_from(page: Any) -> None:
    copy(page, "Ann \U0001f600 books").click()
    sees(page, "Ann \U0001f600 books")
    copy(page, "books the room").click()
    sees(page, "books the room")
    page.get_by_role("button", name="Go back").click()
    sees(page, "Ann \U0001f600 books")
    page.keyboard.press("Escape")
    sees(page, "")


def test_a_copy_of_the_answer_itself_leads_to_its_beginning(page: Any) -> None:
    copy(page, "Ann").click()
    sees(page, "Ann")
    assert page.locator("#back span").inner_text() == "Source: this answer, from character 0"


def test_an_address_with_a_source_opens_the_conversation_and_shows_it(open_page: Callable[..., Any]) -> None:
    page = open_page()
    closed = page.locator("details:not([open]) a.copy").first
    address = closed.get_attribute("href")
    page.evaluate("address => { location.hash = address }", address)
    sees(page, "books the room")
    assert page.locator("details[open]").count() == 2
    page.reload()
    sees(page, "books the room")
    page.keyboard.press("Escape")
    sees(page, "")
    assert page.locator("details[open]").count() == 2


def test_folding_by_hand(page: Any) -> None:
    button = page.locator("details[open] .fold")
    assert button.inner_text() == f"Show all {len(LONG):,} characters"
    button.click()
    assert button.inner_text() == "Show less"
    button.click()
    assert page.locator("details[open] .text.folded").count() == 1


# The keyboard


def press_until(page: Any, key: str, selector: str) -> None:
    for _ in range(30):
        page.keyboard.press(key)
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"{key} never reaches {selector}")


def test_the_keyboard_alone_is_enough(page: Any) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the answers"
    page.keyboard.press("Enter")
    press_until(page, "Tab", "a.copy")
    assert tip(page).locator("p").inner_text() == "message 1 (user), from character 6"
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
    page.keyboard.press("Enter")
    sees(page, "books the room")
    page.keyboard.press("Escape")
    sees(page, "")
    assert page.evaluate("document.activeElement.textContent") == "books the room"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Ann"
    page.keyboard.press("Escape")
    assert tip(page).is_hidden()


def test_what_has_the_focus_can_be_seen(page: Any) -> None:
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    press_until(page, "Tab", "a.copy")
    look = "getComputedStyle(document.activeElement).backgroundColor"
    focused = page.evaluate(look)
    copy(page, "books the room").evaluate("one => one.blur()")
    assert focused != copy(page, "books the room").evaluate("one => getComputedStyle(one).backgroundColor")


def test_arrow_keys_go_through_the_passes_and_show_what_each_wrote(page: Any) -> None:
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    press_until(page, "Tab", ".passes")
    assert tip(page).locator("strong").inner_text() == "Pass 1 of 4"
    page.keyboard.press("ArrowRight")
    assert tip(page).locator("p").inner_text() == "9 drafted, 6 accepted, 7 written"
    assert page.evaluate("[...CSS.highlights.get('pass')].map(String).join('|')") == FIRST[3:24]
    assert tip(page).locator("blockquote").inner_text() == FIRST[3:24]
    page.keyboard.press("End")
    assert tip(page).locator("strong").inner_text() == "Pass 4 of 4"
    assert tip(page).locator("p").inner_text() == "2 drafted, 2 accepted, 3 written"
    page.keyboard.press("ArrowRight")
    assert page.locator(".pass[aria-selected=true]").count() == 1


# Passes


def test_pointing_at_a_pass_tells_its_numbers(page: Any) -> None:
    page.locator("details[open] .passes").first.scroll_into_view_if_needed()
    page.locator("details[open] .pass").nth(2).hover()
    assert tip(page).locator("p").inner_text() == "4 drafted, 0 accepted, 1 written"


def test_bars_are_drawn_only_where_they_can_be_seen(page: Any) -> None:
    assert page.locator(".pass").count() == 0  # a long message stands in front
    page.locator("details[open] .passes").first.scroll_into_view_if_needed()
    page.locator("details[open] .pass").first.wait_for()
    assert page.locator("details:not([open]) .pass").count() == 0


# Colours

CONTRASTS = """() => {
  const parse = (colour) => {
    const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number);
    return colour.startsWith("color(") ? [255 * r, 255 * g, 255 * b, a] : [r, g, b, a];
  };
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour[3] === 1) return colour;
      if (colour[3] !== 0) throw new Error(`half transparent: ${at.outerHTML.slice(0, 80)}`);
    }
  };
  const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    if (!element.getClientRects().length) continue;
    const texts = [...element.childNodes].filter((node) => node.nodeType === 3 && node.data.trim());
    if (!texts.length && !element.dataset.mark) continue;
    const back = light(behind(element));
    if (texts.length)
      found.push([element.className || element.tagName, ratio(light(parse(getComputedStyle(element).color)), back)]);
    if (element.dataset.mark)
      found.push(["mark", ratio(light(parse(getComputedStyle(element, "::after").color)), back)]);
  }
  return found;
}"""


def assert_readable(page: Any) -> None:
    page.locator("details").evaluate_all("all => all.forEach(one => { one.open = true })")
    found = page.evaluate(CONTRASTS)
    assert {"copy from-prompt", "copy from-pool", "copy from-frequent", "mark", "number", "help"} <= {
        n for n, _ in found
    }
    assert [(name, round(ratio, 2)) for name, ratio in found if ratio < 4.5] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_a_contrast_of_at_least_4_5(open_page: Callable[..., Any], scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    assert_readable(page)
    copy(page, "books the room").hover()
    assert_readable(page)
    page.keyboard.press("Tab")
    copy(page, "books the room").focus()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")
    assert_readable(page)


def test_the_button_changes_the_theme(open_page: Callable[..., Any]) -> None:
    page = open_page(color_scheme="dark")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_role("button", name="Light theme").click()
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert light != dark
    assert_readable(page)
    page.get_by_role("button", name="Dark theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark


def test_kinds_differ_in_more_than_colour(page: Any) -> None:
    look = (
        "all => all.map(one => [getComputedStyle(one).textDecorationStyle, one.firstElementChild.dataset.mark].join())"
    )
    looks = page.locator(".legend .copy").evaluate_all(look)
    assert len(looks) == len(set(looks)) == 9


def test_a_narrow_screen_does_not_scroll_sideways(open_page: Callable[..., Any]) -> None:
    page = open_page(viewport={"width": 360, "height": 800})
    page.locator("details").evaluate_all("all => all.forEach(one => { one.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
