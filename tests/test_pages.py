"""Pages that people look at: the built docs, a page of answers, a report and the server's page.

Their links lead somewhere, nothing needs a network, they fit a telephone, and axe finds nothing that keeps anybody out,
on light ground and on dark. `make a11y` fetches axe.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from copyspec_engine import Engine, EngineConfig
from copyspec_engine.lab.display.charts import Bars
from copyspec_engine.lab.display.tables import Table
from copyspec_engine.lab.evaluation.report.html import page as report_page
from copyspec_engine.lab.page import render_page, transcripts
from tests.lab.test_page_browser import decode, records
from tests.serve.servers import serving

pytestmark = pytest.mark.enable_socket
ROOT = Path(__file__).parents[1]
AXE = ROOT / ".node" / "node_modules" / "axe-core" / "axe.min.js"
PAGES = ("docs", "docs of options", "docs of benchmarks", "docs of the API", "answers", "report", "chat", "document")
SCHEMES = ("light", "dark")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip('the site needs pip install "copyspec[docs]"')
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="module")
def docs(site: Path) -> Iterator[str]:
    """Where the docs are served: of files alone a browser shows them without their search."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site))) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with Engine(EngineConfig(model="bundled")) as engine, serving(engine) as address:
        yield address


@pytest.fixture(scope="module")
def addresses(docs: str, server: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pages")
    found = transcripts([*records("one"), *records("two")[:1]], "adaptive", ["one", "two"], decode)
    (folder / "answers.html").write_text(render_page("A run", ["a model"], "adaptive", found), encoding="utf-8")
    table = Table("Speed-up", ("run", "category", "speed-up"), (("a", "writing", "1.5"), ("b", "maths", "2.5")), 2)
    words = Table("Runs", ("run", "command"), (("a", "copyspec eval mt-bench --model smollm2 --turns 2"),))
    chart = Bars("Speed-up", "times", ("writing", "maths"), (("a", (1.5, 2.0)), ("b", (2.5, None))), reference=1.0)
    (folder / "report.html").write_text(report_page("Two runs", (table, words), (chart,)), encoding="utf-8")
    files = {name: (folder / f"{name}.html").as_uri() for name in ("answers", "report")}
    pages = {"docs": f"{docs}/index.html", "docs of options": f"{docs}/options.html"}
    pages |= {"docs of benchmarks": f"{docs}/benchmarks.html", "docs of the API": f"{docs}/api.html"}
    return files | pages | dict.fromkeys(("chat", "document"), server)


def shown(browser: Any, addresses: dict[str, str], name: str, **options: Any) -> Any:
    """The page in a browser, with something on it."""
    page = browser.new_context(bypass_csp=True, reduced_motion="reduce", **options).new_page()
    page.set_default_timeout(30_000)
    page.goto(addresses[name])
    if name == "chat":
        page.fill("#say", "Repeat this line:\nAnn books the room and Bo brings the slides.")
        page.press("#say", "Enter")
        page.locator("#messages li.assistant .figures").wait_for()
        page.locator("#options summary").click()
    if name == "document":
        page.click("#tab-document")
        page.fill("#text", "# Notes\n- Ann books the room")
        page.fill("#edit", "Append this line:\n- Bo brings the slides")
        page.click("#editor button.primary")
        page.locator("#result").wait_for()
    return page


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing(browser: Any, addresses: dict[str, str], name: str, scheme: str) -> None:
    if not AXE.is_file():
        pytest.skip("needs axe-core: `make a11y` fetches it")
    page = shown(browser, addresses, name, color_scheme=scheme)
    page.add_script_tag(path=str(AXE))
    found = page.evaluate("axe.run({resultTypes: ['violations']})")
    page.context.close()
    assert found["testEngine"]["name"] == "axe-core"
    told = [
        (wrong["id"], [(node["html"][:120], node["any"][:1] and node["any"][0]["message"]) for node in wrong["nodes"]])
        for wrong in found["violations"]
    ]
    assert not told


@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_a_telephone(browser: Any, addresses: dict[str, str], name: str) -> None:
    page = shown(browser, addresses, name, viewport={"width": 390, "height": 844})
    width = page.evaluate("document.documentElement.scrollWidth")
    page.context.close()
    assert width <= 390


def test_nothing_but_what_is_meant_to_is_moved_sideways_on_a_desk(browser: Any, docs: str, site: Path) -> None:
    page = browser.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce").new_page()
    wider = []
    for name in sorted(path.name for path in site.glob("*.html") if path.name != "404.html"):
        page.goto(f"{docs}/{name}")
        page.locator(".md-content h1").wait_for()
        wider += page.evaluate(
            "name => [...document.querySelectorAll('.md-typeset table, pre > code')]"
            ".filter(part => Math.max(part.scrollWidth, part.offsetWidth) > part.closest('article').clientWidth)"
            ".map(part => [name, part.textContent.slice(0, 60)])",
            name,
        )
    page.context.close()
    assert not wider


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("width", "ending"), [(1280, ".svg"), (390, "_narrow.svg")])
def test_the_front_picture_is_that_of_the_page(browser: Any, docs: str, scheme: Any, width: int, ending: str) -> None:
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 844})
    page = context.new_page()
    page.goto(f"{docs}/index.html")
    shown = page.evaluate(
        "[...document.querySelectorAll('picture img')].filter(image => image.offsetWidth > 0)"
        ".map(image => image.currentSrc.split('/').pop().split('#')[0])"
    )
    context.close()
    assert shown == [f"front_{scheme}{ending}"]


class Links(HTMLParser):
    """What a page links to, and the places of it that can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.places: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value and tag != "base":
                self.targets.add(value)
            if name in ("id", "name") and value:
                self.places.add(value)


def test_every_link_of_the_site_leads_to_a_place(site: Path) -> None:
    pages = {path.resolve(): Links(path) for path in site.rglob("*.html")}
    assert len(pages) > 10
    broken = []
    for path, links in pages.items():
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc or path.name == "404.html":  # whose links begin at the site's root
                continue
            leads_to = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            place = unquote(parts.fragment)
            if not leads_to.exists() or (place and leads_to in pages and place not in pages[leads_to].places):
                broken.append((path.name, target))
    assert not broken


def test_the_site_needs_no_network(site: Path) -> None:
    start = (site / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=\"(?:https?:)?//[^\"]+\.(?:js|css|woff2?)", start)
