"""README and docs: their snippets run as they stand, links lead somewhere, and commands and options exist.

The snippets of docs/langchain.md and docs/llama_index.md run in the tests of the integrations.
"""

from __future__ import annotations

import re
import runpy
import shlex
import socket
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import httpx  # noqa: F401 - see below
import pytest

import copyspec_engine
from copyspec_engine import Engine, EngineConfig
from copyspec_engine.cli.documents import shipped_names
from copyspec_engine.values.options import Options

# docs/serve.md talks to a server through openai and then through ollama, which imports httpx. A stream of openai's that
# is collected as garbage while that import is under way looks into the module and fails on what is not there yet.

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("integrations/*/README.md"))]
MARKDOWN = [*PAGES, *(ROOT / name for name in ("CHANGELOG.md", "SECURITY.md", "benchmarks/README.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in MARKDOWN}
RECORDED = ("docs/result_files.md", "CHANGELOG.md")
"""What was once: commands as they were typed, options as they were called."""
RUN_ELSEWHERE = ("docs/langchain.md", "docs/llama_index.md")
EXPECTED = {
    "README.md": "# Notes\n- Ann books the room\n- Bo brings the slides\nDRAFT\n# Notes\n- Ann books the room ",
    "docs/engine.md": "# Notes\n- Ann books the room",
    "docs/serve.md": "# Notes\n- Ann books the room\n",
    "integrations/langchain/README.md": "# Notes\n- Ann books the room\n- Cy orders lunch",
    "integrations/llama_index/README.md": "# Notes\n- Ann books the room\n- Cy orders lunch",
}
"""What the snippets of a page print, at its beginning."""
OTHERS = {
    "--index-url",
    "--extra-index-url",
    "--slow",
    "--target",
    "--from-file",
    "--from-literal",
    "--random-cases",
    "--spec-type",
    "--jinja",
    "--json",
    "--write",
    "--openai-document",
}
"""Options of other programs and of scripts."""
HOOK = runpy.run_path(str(ROOT / "scripts" / "docs_hook.py"))
COMMANDS = HOOK["commands"]()


def options_of(command: str) -> set[str]:
    options = COMMANDS[command].params
    return {name for option in options for name in (*option.opts, *option.secondary_opts)} | {"--help"}


def content_of(html: str) -> str:
    return str(HOOK["on_page_content"](html, page=SimpleNamespace(toc=SimpleNamespace(items=[]))))


def snippets(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", TEXTS[page], flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def port() -> Iterator[int]:
    """Where `copyspec serve bundled` listens."""
    uvicorn = pytest.importorskip("uvicorn")
    from copyspec_engine.serve.app import create_app

    with socket.socket() as listener, Engine(EngineConfig(model="bundled")) as engine:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(create_app(engine), log_level="error"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()


@pytest.fixture
def provider_of_one_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenTelemetry's provider of spans can be set once in a process: here it ends with the test."""
    trace = pytest.importorskip("opentelemetry.trace")
    monkeypatch.setattr(
        trace, "set_tracer_provider", lambda made: monkeypatch.setattr(trace, "get_tracer_provider", lambda: made)
    )


@pytest.mark.parametrize("page", [page for page in TEXTS if snippets(page) and page not in RUN_ELSEWHERE])
def test_the_snippets_run_in_order_and_print_what_they_say(
    page: str, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    names = {"__name__": "snippet"}
    if page == "docs/traces.md":
        request.getfixturevalue("provider_of_one_test")
    for code in snippets(page):
        if page == "docs/serve.md":
            code = code.replace("8000", str(request.getfixturevalue("port")))
        exec(compile(code, page, "exec", dont_inherit=True), names)
    assert capsys.readouterr().out.startswith(EXPECTED.get(page, ""))


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_and_picture_leads_to_a_file(page: str) -> None:
    found = re.findall(r"\]\(([^)#:]+)[^):]*\)|src(?:set)?=\"([^\"]+)\"", TEXTS[page])
    for target in (link or picture for link, picture in found):
        assert (ROOT / page).parent.joinpath(target.partition("#")[0]).exists(), target


def test_the_readme_is_short_and_every_line_of_prose_fits() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 140
    for page, text in TEXTS.items():
        for line in text.splitlines():
            assert len(line) <= 120 or line.startswith("| "), f"{page}: {line}"


@pytest.mark.parametrize("page", [page for page in TEXTS if page.startswith("docs/")])
def test_every_line_of_code_fits_the_page(page: str) -> None:
    """The site has room for 97 letters beside its contents, in a window of 1280 pixels."""
    for code in re.findall(r"^```\w*\n(.*?)^```", TEXTS[page], flags=re.DOTALL | re.MULTILINE):
        assert not [line for line in code.splitlines() if len(line) > 97]


def test_no_paragraph_stands_in_two_places() -> None:
    paragraphs = Counter(
        " ".join(paragraph.split())
        for text in TEXTS.values()
        for paragraph in re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE).split("\n\n")
        if not re.search(r"^\||_\w+\.json`", paragraph)  # tables, and where their figures come from
    )
    assert not [paragraph for paragraph, times in paragraphs.items() if times > 1 and len(paragraph) > 150]


@pytest.mark.parametrize("name", ["demo", "test", "docs", "conformance", "dist", "scale-drills"])
def test_the_commands_of_make_are_targets(name: str) -> None:
    assert any(f"make {name}" in text for text in TEXTS.values())
    assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_names_and_figures_of_a_page_are_not_broken() -> None:
    page = "<code>demo [--compare]</code> <td>1.6x (-1.03 to 4.77)</td> <td><b>mt-redundant</b></td> a-b Phi-4-mini --c"
    whole = re.findall(r'<span class="whole">(.*?)</span>', content_of(page))
    assert whole == ["--compare", "(-1.03 to 4.77)", "mt-redundant", "Phi-4-mini"]
    assert (
        content_of("<pre><code>copyspec demo --compare</code></pre>")
        == "<pre><code>copyspec demo --compare</code></pre>"
    )


def test_a_column_without_a_heading_has_none_for_a_screen_reader_either() -> None:
    assert content_of("<tr><th></th><th>turns</th></tr>") == "<tr><td></td><th>turns</th></tr>"


def test_a_long_name_in_a_table_may_be_broken_at_its_dots_only() -> None:
    cell = content_of('<td><code>Config(a_b="x", p=1.5)</code> 1.5, e.g.</td><p><code>a.b</code></p>')
    assert cell == '<td><code>Config(<wbr>a_b=<wbr>"x", p=1.5)</code> 1.5, e.g.</td><p><code>a.b</code></p>'


def test_the_name_of_a_test_in_a_table_goes_on_in_the_next_line() -> None:
    name = "test_every_method_gives_the_tokens"
    broken = name.replace("_", '_<wbr class="long">')
    assert content_of(f"<td><code>{name}</code></td>") == f"<td><code>{broken}</code></td>"


def test_an_option_that_a_page_names_leads_to_where_it_is_described() -> None:
    page = "<code>EngineConfig.device</code> <code>EngineConfig.other</code> <code>Engine.info</code>"
    linked, *others = content_of(page).split(" <code>")
    assert linked == '<a href="options.html#EngineConfig.device"><code>EngineConfig.device</code></a>'
    assert others == ["EngineConfig.other</code>", "Engine.info</code>"]
    assert "{ #EngineConfig.device }" in HOOK["on_page_markdown"]("<!-- options: EngineConfig -->")


def test_a_tag_that_an_option_speaks_of_is_no_html() -> None:
    page = HOOK["on_page_markdown"]("<!-- options: Grammar -->\n<!-- options: ToolCalls -->")
    assert '"&lt;/think>"' in page
    assert "`str = '<tool_call>'`" in page


def test_the_contents_beside_a_page_list_classes_and_no_attributes_of_theirs() -> None:
    field, method = SimpleNamespace(id="C.x", children=[]), SimpleNamespace(id="C.f", children=[])
    shown = SimpleNamespace(items=[SimpleNamespace(id="C", children=[field, method])])
    html = '<div class="doc doc-object doc-attribute">\n\n<h4 id="C.x" class="doc doc-heading">'
    HOOK["on_page_content"](html, page=SimpleNamespace(toc=shown))
    assert shown.items[0].children == [method]


def test_every_command_has_its_place_on_the_page_of_commands() -> None:
    page = TEXTS["docs/commands.md"]
    benchmarks = {words for words in COMMANDS if words.startswith("eval ")} - {"eval report"}
    for words in COMMANDS.keys() - benchmarks:
        assert re.search(rf"^##+ copyspec {words}$", page, flags=re.MULTILINE), words
    filled = HOOK["on_page_markdown"](page)
    for words in COMMANDS.keys() - benchmarks | {"eval mt-bench"}:
        for option in options_of(words) - {"--help"}:
            assert f"`{option}`" in filled or not option.startswith("-"), (words, option)


@pytest.mark.parametrize("page", [page for page in TEXTS if page not in RECORDED])
def test_commands_and_options_that_are_named_exist(page: str) -> None:
    text = TEXTS[page].replace("\\\n", " ")
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))
    assert named <= OTHERS.union(*map(options_of, COMMANDS))
    for line in re.findall(r"^(copyspec .*)$|`(copyspec [^`\n]*)`", text, flags=re.MULTILINE):
        words = shlex.split(line[0] or line[1], comments=True)[1:]
        place = max((n for n in range(len(words) + 1) if " ".join(words[:n]) in COMMANDS), default=0)
        if (place and words[0] != "eval") or place > 1:
            assert {word for word in words if word.startswith("-")} <= options_of(" ".join(words[:place])), line


def test_the_page_of_options_has_every_field_of_every_class() -> None:
    page = TEXTS["docs/options.md"]
    kinds = [kind for name in copyspec_engine.__all__ if isinstance(kind := getattr(copyspec_engine, name), type)]
    classes = [kind for kind in kinds if issubclass(kind, Options)]
    assert set(re.findall(r"<!-- options: (\w+) -->", page)) == {kind.__name__ for kind in classes}
    filled = unescape(HOOK["on_page_markdown"](page))
    for kind in classes:
        for name, field in kind.model_fields.items():
            assert f"**`{name}`**" in filled
            assert " ".join((field.description or "").split()) in " ".join(filled.split()), name


def test_the_page_of_the_server_has_every_metric(port: int) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        told = set(re.findall(r"^# TYPE (\S+)", answer.read().decode(), flags=re.MULTILINE))
    filled = HOOK["on_page_markdown"](TEXTS["docs/serve.md"])
    named = set(re.findall(r"^\| `(copyspec_\w+)` \|", filled, flags=re.MULTILINE))
    assert named == {name for name in told if not name.endswith("_created")}


def test_the_figures_stand_with_their_command_and_hardware() -> None:
    measured = TEXTS["docs/benchmarks.md"].split("<!-- measured: begin -->\n")[1].split("<!-- measured: end -->")[0]
    rows = [line for line in measured.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(shipped_names())
    assert all(row.endswith("| yes |") for row in rows)
    for text in ("`python scripts/measure_demo.py`", "CPU threads", "torch", "load average"):
        assert text in " ".join(measured.split())
