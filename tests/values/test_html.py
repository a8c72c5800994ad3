"""What notebooks show of answers and figures: escaped, in colours of either theme; and short reprs of models."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from html.parser import HTMLParser
from typing import Any

import pytest
from IPython.core.formatters import HTMLFormatter
from langchain_core.language_models import BaseChatModel

from copyspec_engine import CopiedSpan, Engine, EngineConfig, Explanation, GenerationRequest
from copyspec_engine.adapters.remote import RemoteEngine
from copyspec_engine.testing import scripted_engine
from copyspec_engine.values.html import Marked, marked_text
from langchain_copyspec import ChatCopySpec
from llama_index.llms.copyspec import CopySpec

HOSTILE = "<script>alert('x')</script>\r\n<img src=x onerror=\"y\"> &amp; \0"


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    """make_engine(replies) -> a scripted engine; closed after the test."""
    with ExitStack() as engines:
        yield lambda replies: engines.enter_context(scripted_engine(replies))


class Reader(HTMLParser):
    """What a browser would make of HTML: its text, and the elements and attributes that it has."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.found = "", set[str]()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.found |= {tag, *(f"{tag} {name}" for name, _ in attrs)}
        self.text += "\n" if tag in ("div", "tr", "br") else " " * (tag == "td")

    def handle_data(self, data: str) -> None:
        self.text += data


ALLOWED = {"div", "div style", "span", "span style", "span title", "sup", "br", "b", "table", "table style", "tr"} | {
    *("th", "th scope", "th style", "td", "td style")
}


def html_of(shown: Any) -> str:
    """What a notebook shows."""
    return str(HTMLFormatter()(shown))


def read(shown: Any) -> str:
    """The text of what a notebook shows, which has no elements but those of ours."""
    page = Reader(html_of(shown))
    assert page.found <= ALLOWED
    return page.text


def test_an_explanation_shows_its_text_in_colour_with_its_places() -> None:
    spans = (
        CopiedSpan(0, 14, "prompt", message=1, offset=4),
        CopiedSpan(14, 28, "earlier_answer", before="<b>", after="'"),
        CopiedSpan(30, 43, "prompt", message=1, offset=4),
        CopiedSpan(44, 47, "answer", offset=0),
        CopiedSpan(47, 48, "grammar"),
        CopiedSpan(48, 49, "frequent"),
    )
    explanation = Explanation("one at a time\nothers at once, one at a time one.!?", spans)
    assert read(explanation).strip() == (
        "one at a time1\nothers at once2, one at a time1 one.!?\n1 message 1, from character 4\n"
        '2 an earlier answer, not in this prompt: "<b>[...]\'"'
    )
    page = html_of(explanation)
    colours = re.findall(r"background:(rgb\([^)]*\))", page)
    assert len(colours) == len(spans)
    assert len(set(colours)) == 4
    assert all(colour.endswith("/0.22)") for colour in colours)  # what is behind it shows through, light or dark
    assert not re.search(r"[;\"]color:", page)  # the text has the page's own colour


def test_hostile_texts_stay_texts(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine([HOSTILE])
    request = GenerationRequest(messages=[{"role": "user", "content": HOSTILE}], session_id=HOSTILE, explain=True)
    output = engine.generate(request)
    assert output.copied_share > 0.5
    seen = HOSTILE.replace("\r", "").replace("\0", "\N{REPLACEMENT CHARACTER}")

    def text_of(shown: Any) -> str:
        return re.sub(r"\r|(?<=>|;|y)\d", "", read(shown))

    assert output.explanation is not None
    assert seen in text_of(output.explanation)
    assert "tokens in" in read(output)
    assert "alert('x')" in read(engine.memory(HOSTILE))
    assert read(Explanation(HOSTILE, ())).lstrip("\n").replace("\r", "") == seen


def test_half_a_surrogate_pair_can_be_sent_to_a_browser() -> None:
    assert html_of(Explanation("a\ud800b", ())).encode().decode().count("a\N{REPLACEMENT CHARACTER}b") == 1


def test_the_memory_of_an_engine_that_was_closed_says_so(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(["an answer"])
    memory = engine.memory("notes")
    engine.close()
    assert "notes" in read(memory)
    assert "it was closed" in read(memory)


def test_an_answer_shows_what_was_copied_and_its_figures(make_engine: Callable[..., Engine]) -> None:
    text = "the letter of Ann to Bo says: come on Monday"
    output = make_engine([text]).generate(GenerationRequest(prompt=text))
    shown = read(output)
    figures = f"{output.usage.completion_tokens} tokens in {output.draft_stats.num_forward_passes} passes"
    assert shown.startswith(f"\n{text}\n{figures} · {output.tokens_per_forward:.1f} per pass")
    assert f"{output.copied_share:.0%} copied" in shown
    assert "<span" in html_of(output)


def test_a_memory_shows_its_latest_texts_shortened(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(lambda prompt: f"{prompt[-40:]} and {len(prompt)} " + "long " * 100)
    for turn in range(12):
        engine.generate(GenerationRequest(prompt=f"{turn} {turn * 7919}" * 3, session_id="notes"))
    memory = engine.memory("notes")
    shown = read(memory)
    assert len(memory) > 20
    assert f"notes: {len(memory)} texts of {memory.num_tokens:,} tokens, the last 20 of them" in shown
    assert shown.count(" tokens") == 1 + 20
    assert "..." in shown
    assert read(engine.memory("nobody")).strip() == "nobody: 0 texts of 0 tokens"


def test_metrics_are_a_table(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(["yes yes yes yes"])
    assert "finished none" in read(engine.metrics())
    engine.generate(GenerationRequest(prompt="yes yes"))
    shown = read(engine.metrics())
    assert "finished 1 stop" in shown
    assert "requests 0 running, 0 waiting" in shown


def test_pieces_of_other_sources_are_plain() -> None:
    assert "<span" not in marked_text([Marked("a", "draft_model"), Marked("b", "recycled"), Marked("c")])


def test_reprs_are_short_and_hold_no_secrets(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine([])
    assert repr(engine) == "Engine('scripted', cpu, float32, 8,192 tokens)"
    engine.close()
    assert repr(engine) == "Engine('scripted', cpu, float32, 8,192 tokens, closed)"
    url = "http://ann:pass@127.0.0.1:1/v1"
    assert repr(RemoteEngine(url, "key", "tiny")) == "RemoteEngine('http://127.0.0.1:1/v1', model='tiny')"


@pytest.mark.parametrize("kind", [ChatCopySpec, CopySpec])
def test_a_model_shows_what_was_set(kind: Any, make_engine: Callable[..., Engine]) -> None:
    name = kind.__name__
    assert repr(kind()) == f"{name}(model='smollm2')"
    long = {"prediction": "text " * 1000, "cache_salt": "salt", "chat_template": "{{ messages }}"}
    assert repr(kind(model="bundled", max_tokens=20, stop="x", **long)) == (
        f"{name}(model='bundled', max_tokens=20, stop=['x'])"
    )
    url = "http://ann:pass@127.0.0.1:1/v1"
    assert repr(kind(base_url=url, api_key="key")) == f"{name}(base_url='http://127.0.0.1:1/v1')"
    assert repr(kind(engine=EngineConfig(model="bundled", device="cpu"))) == f"{name}(model='bundled', device='cpu')"
    made = kind(engine=make_engine([]))
    assert repr(made) == f"{name}(model='scripted')"
    if isinstance(made, BaseChatModel):
        assert made.profile
        assert "max_input_tokens" not in repr(made)
