"""A template renders as in transformers, and neither hangs nor fills the memory, whatever is written in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

import copyspec_engine.chat.template_sandbox as sandbox
from copyspec_engine import ConfigError
from copyspec_engine.bundled import bundled_model_path
from copyspec_engine.chat.template import ChatTemplate, describe_template, for_template, given_template
from copyspec_engine.chat.tokenizer import HFTokenizer

TEMPLATES = sorted((Path(__file__).parents[1] / "data" / "chat_templates").glob("*.jinja"))
TEMPLATES += [bundled_model_path() / "chat_template.jinja"]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}
CALL = {"id": "abcdefgh1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Was ist „1 + 2“? <b>"}],
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "So: ", "tool_calls": [CALL], "reasoning_content": "hm"},
        {"role": "tool", "content": "3", "tool_call_id": "abcdefgh1"},
        {"role": "assistant", "content": "It is 3."},
        {"role": "user", "content": " and\n"},
    ],
]
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["no tools", "tools"])
def test_a_template_renders_as_in_transformers(path: Path, tools: list[dict[str, Any]] | None) -> None:
    source = path.read_text(encoding="utf-8")
    chat_format = describe_template(source, NAMES)
    template = ChatTemplate(source, NAMES)
    for chat in CHATS:
        ready = for_template(chat, chat_format)
        try:
            given = {"tools": tools, "chat_template": source, "add_generation_prompt": True, **NAMES}
            expected = render_jinja_template([json.loads(json.dumps(ready))], **given)[0][0]
        except Exception as error:  # a template's own, which is then ours too
            with pytest.raises(type(error)):
                template.render(ready, tools, {}, 1000)
        else:
            assert template.render(ready, tools, {}, 1000) == expected


DOUBLED = "{%% set ns = namespace(x=%s) %%}{%% for i in range(60) %%}{%% set ns.x = %s %%}{%% endfor %%}{{ ns.x }}"
GREEDY = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}" + "text" * 500 + "{% endfor %}{% endfor %}",
    "{% set x %}{% for i in range(99999) %}{{ 'a' * 1000000 }}{% endfor %}{% endset %}",
    "{% macro m(n) %}{{ m(n - 1) if n }}{{ m(n - 1) if n }}{% endmacro %}{{ m(60) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * [1] }}",
    "{{ 2 ** (10**9) }}",
    DOUBLED % ("'ab'", "ns.x ~ ns.x"),
    DOUBLED % ("'ab'", "ns.x + ns.x"),
    DOUBLED % ("[1]", "[ns.x, ns.x]"),
    DOUBLED % ("[1]", "(ns.x, ns.x)"),
    DOUBLED % ("[1]", "{'a': ns.x, 'b': ns.x}"),
    DOUBLED % ("[1]", "dict(a=ns.x, b=ns.x)"),
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ ('%s' * 10000) % (('a' * 10000,) * 10000) }}",
    "{{ '%999999999d'|format(1) }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**9) }}",
    "{{ ('{0}' * 10000).format('a' * 10000) }}",
    "{{ 'a'|center(10**9) }}",
    "{% filter center(10**9) %}a{% endfilter %}",
    "{{ 'a'.center(10**9) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ 'a'.zfill(10**9) }}",
    "{{ 'a'.encode().rjust(10**9) }}",
    "{{ 'a\n'|indent(10**9, true) }}",
    "{{ ('a\n' * 1000)|indent('b' * 10000) }}",
    "{{ ('a' * 10000)|replace('', 'b' * 10000) }}",
    "{{ ('a' * 10000).replace('a', 'b' * 10000) }}",
    "{{ range(99999)|join('x' * 100000) }}",
    "{{ ('x' * 100000).join('y' * 100000) }}",
    "{{ range(99999)|map('center', 10**6)|list }}",
    "{{ range(99999)|map('replace', '9', 'b' * 100000)|list }}",
    "{{ [1]|batch(10**9, 1)|list }}",
    "{{ [1]|slice(10**9)|list }}",
    "{{ ('a b ' * 1000)|wordwrap(1, true, 'x' * 10000) }}",
    "{{ [1]|tojson(indent=10**9) }}",
    "{{ [[['a' * 1000] * 100] * 100] * 100 }}",
    "{{ 'a'.translate({97: 'b' * 100000}) }}",
    "{{ '\t'.expandtabs(10**9) }}",
    "{{ (1).to_bytes(10**9, 'big') }}",
    "{{ lipsum(n=10**6) }}",
    "{% for a in [1] recursive %}{{ loop([1]) }}{{ loop([1]) }}{% endfor %}",
    "{{ ''.__class__.__mro__ }}",
    "{{ namespace(_x=1) }}",
]


@pytest.mark.parametrize("source", GREEDY)
def test_no_template_hangs_or_fills_the_memory(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """Each would take minutes or gigabytes; here it has little of both, and writes nothing."""
    monkeypatch.setattr(sandbox, "_MAX_SECONDS", 0.5)
    monkeypatch.setattr(sandbox, "_TIMES_WRITTEN", 8)
    with pytest.raises(Exception) as caught:  # noqa: PT011 - ours, or Jinja's own
        assert not ChatTemplate(source, {}).render([{"role": "user", "content": "Hi"}], None, {}, 10)
    assert not isinstance(caught.value, AssertionError | MemoryError)


def test_a_template_that_was_stopped_is_named() -> None:
    with pytest.raises(ConfigError, match=r"stopped: it makes a text or a list of more than 1,0\d\d,\d\d\d characters"):
        ChatTemplate("{{ messages[0].content * 10**9 }}", {}).render([{"content": "a"}], None, {}, 10)


def test_limits_grow_with_what_a_template_is_given() -> None:
    text = "word " * 400_000
    assert ChatTemplate("{{ messages[0].content }}", {}).render([{"content": text}], None, {}, len(text)) == text


@pytest.mark.parametrize(
    ("source", "written"),
    [
        ("{{ '%s of %02d' % ('a', 7) }}", "a of 07"),
        ("{{ '%s: %d'|format('a', 7) }}", "a: 7"),
        ("{{ '50% in 2024: {} {:>5}'.format('a', 7) }}", "50% in 2024: a     7"),
        ("{{ messages|map(attribute='content')|join(', ')|replace('H', 'h')|indent(2, true) }}", "  hi, ho"),
        ("{{ [1, [2]]|tojson(indent=1) ~ 'x' * 3 ~ none }}", "[\n 1,\n [\n  2\n ]\n]xxxNone"),
        ("{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}{% endfor %}", "1/2,2/2"),
        ("{% for k, v in messages[0].items() %}{{ k, v }}{% break %}{% endfor %}", "('content', 'Hi')"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "Hi"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
    ],
)
def test_what_templates_do_works_under_limits(source: str, written: str) -> None:
    assert ChatTemplate(source, {}).render([{"content": "Hi"}, {"content": "Ho"}], None, {}, 10) == written


def test_a_template_that_is_no_jinja_is_refused_with_its_line() -> None:
    with pytest.raises(ConfigError, match="not Jinja: line 3: "):
        ChatTemplate("{% if a %}\n{% endif %}\n{% for %}", {})
    with pytest.raises(ConfigError, match="cannot be used"):
        ChatTemplate("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", {})
    with pytest.raises(ConfigError, match="cannot be used"):
        ChatTemplate("{% for a in b %}" * 40 + "{% endfor %}" * 40, {})


@pytest.mark.parametrize("template", ["{% for %}", {"odd": "{{ messages }}"}])
def test_a_checkpoint_whose_template_is_broken_reads_prompts_all_the_same(
    template: str | dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
    tokenizer.chat_template = template
    prompts = HFTokenizer(tokenizer)
    assert "Only raw prompts can be read" in caplog.text
    assert prompts.encode("Hi")
    assert not prompts.chat_format().is_chat
    with pytest.raises(ConfigError, match=r"give (?:another|one) as chat_template="):
        prompts.render([{"role": "user", "content": "Hi"}], None)
    with pytest.raises(ConfigError, match="not Jinja"):
        HFTokenizer(tokenizer, chat_template="{% for %}")
    mended = HFTokenizer(tokenizer, chat_template="{{ messages[0].content }}")
    assert mended.render([{"role": "user", "content": "Hi"}], None) == mended.encode("Hi", special_tokens=False)


def test_a_template_is_given_as_text_or_as_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages }}", encoding="utf-8")
    assert given_template("{% if a %}{% endif %}") == "{% if a %}{% endif %}"
    assert given_template(str(file)) == "{{ messages }}"
    with pytest.raises(ConfigError, match="Got chat_template='nowhere' but expected Jinja text or the path"):
        given_template("nowhere")
