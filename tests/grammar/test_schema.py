"""What fits a schema can be written in any order and however it is escaped; what does not fit cannot."""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from copyspec_engine import ConfigError, Grammar, ToolCalls
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.grammar import letters
from copyspec_engine.grammar.state import GrammarCompiler
from copyspec_engine.grammar.text import translate
from copyspec_engine.testing import ByteTokenizer
from tests.grammar.random_schemas import random_document, random_schema

END = 257
LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "object": ({}, '<tool_call>{{"name": "f", "arguments": {}}}</tool_call>'),
    "bare": ({"begin": "", "end": ""}, '{{"arguments": {}, "name": "f"}}'),
    "array": ({"style": "array", "begin": "[CALLS]", "end": ""}, '[CALLS][{{"name": "f", "arguments": {}}}]'),
    "named": ({"style": "named", "begin": "<f=", "end": "</f>", "name_ends": (">",)}, "<f=f>{}</f>"),
}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(ByteTokenizer(), 258, frozenset({END}))


def fits(compiler: GrammarCompiler, grammar: Grammar, text: str) -> bool:
    """Whether a text may be written, token by token, and may end there."""
    state = compiler.begin(grammar)
    try:
        state.advance(list(text.encode()))
    except RuntimeError:
        return False
    return state.is_terminated or bool(int(state.masks(DraftTree())[0, END // 32]) >> END % 32 & 1)


def all_escaped(document: Any) -> str:
    """JSON with each letter of a text as \\uXXXX, of keys those that are no letters of ASCII."""
    if isinstance(document, str):
        units = document.encode("utf-16-be")
        return '"' + "".join(f"\\u{units[at]:02X}{units[at + 1]:02x}" for at in range(0, len(units), 2)) + '"'
    if isinstance(document, list):
        return f"[{','.join(map(all_escaped, document))}]"
    if isinstance(document, dict):
        return "{" + ",".join(f"{json.dumps(key)}: {all_escaped(item)}" for key, item in document.items()) + "}"
    return json.dumps(document)


SPELLINGS: list[Callable[[Any], str]] = [
    json.dumps,
    lambda document: json.dumps(document, ensure_ascii=False),
    lambda document: json.dumps(document, separators=(",", ":")).replace("/", "\\/"),
    lambda document: json.dumps(document, indent=2),
    all_escaped,
]


def test_random_documents_pass_in_any_order_and_spelling(
    compiler: GrammarCompiler, pytestconfig: pytest.Config
) -> None:
    rng = random.Random(4)
    for _ in range(pytestconfig.getoption("--random-cases") // 4):
        schema = random_schema(rng)
        document = random_document(rng, schema)
        spell = rng.choice(SPELLINGS)
        assert fits(compiler, Grammar(json_schema=schema, closed=rng.random() < 0.5), spell(document)), (
            schema,
            document,
        )
        options, written = LAYOUTS[rng.choice(sorted(LAYOUTS))]
        parameters = {"type": "object", "properties": {"x": schema, "y": {"type": "null"}}}
        tools = ToolCalls(tools=({"function": {"name": "f", "parameters": parameters}},), tool_choice="f", **options)
        text = written.format(spell({"y": None, "x": document}))
        assert fits(compiler, Grammar(tools=tools, closed=True), text), (schema, text)


@pytest.mark.parametrize(
    "text",
    [
        "J\\u00fcrgen",
        "\\ud83d\\ude00",
        "\\uD83D\\uDE00",
        "a\\/b",
        '\\"\\\\\\b\\f\\n\\r\\t',
        "\\u0000\\u001F",
        "\x7f\u2028",
        "\\ud800",
    ],
)
def test_every_json_text_passes(compiler: GrammarCompiler, text: str) -> None:
    for grammar in (Grammar(json_object=True), Grammar(json_schema={"properties": {"a": {"type": "string"}}})):
        assert fits(compiler, grammar, f'{{"a": "{text}"}}')
    key = {"type": "object", "properties": {json.loads(f'"{text}"'): {}}, "additionalProperties": False}
    if "\\ud800" not in text:
        assert fits(compiler, Grammar(json_schema=key), f'{{"{text}": 1}}')
        assert fits(compiler, Grammar(json_schema={"const": json.loads(f'"{text}"')}), f'"{text}"')
        assert fits(compiler, Grammar(json_schema={"type": "string", "pattern": "^[^,]*$"}), f'"{text}"')


N, Q, K = {"type": "integer"}, {"q": {"type": "string"}}, {"k": {"type": "integer"}}
LINKED = {
    "$ref": "#/$defs/N",
    "$defs": {
        "N": {
            "type": "object",
            "properties": {"v": N, "next": {"anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}]}},
            "required": ["v", "next"],
        }
    },
}
EXPRESSION = {
    "$ref": "#/$defs/E",
    "$defs": {
        "E": {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"l": {"$ref": "#/$defs/E"}, "r": {"$ref": "#/$defs/E"}, "op": {"const": op}},
                    "required": ["l", "r", "op"],
                }
                for op in "+-"
            ]
            + [N]
        }
    },
}
FITTING: list[tuple[dict[str, Any], list[str], list[str]]] = [
    (
        {"allOf": [{"type": "object", "properties": Q}, {"type": "object", "properties": K}]},
        ['{"q":"a","k":1}', "{}", '{"k":1}'],
        ['{"q":1}', '{"z":1}'],
    ),
    (
        {"type": "object", "properties": Q | K, "required": ["q"]},
        ['{"k":1,"q":"a"}', '{"q":"a"}'],
        ['{"k":1}', '{"q":"a","q":"b"}', '{"q":"a",}'],
    ),
    (
        {
            "type": "object",
            "properties": {"a": N},
            "anyOf": [{"required": ["a"]}, {"properties": Q, "required": ["q"]}],
        },
        ['{"a":1}', '{"q":"x","a":2}'],
        ["{}", '{"a":"x"}'],
    ),
    ({"type": "string", "pattern": "^(?=.*[0-9])[a-z0-9]+$"}, ['"a1"', '"\\u0061\\u0031"'], ['"a"', '"A1"']),
    ({"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"}, ['"1.5"', '"-3"'], ['"-"', '"."']),
    ({"type": "string", "pattern": "^$|^x+$"}, ['""', '"xx"'], ['"y"']),
    ({"type": "string", "maxLength": 2}, ['"\\ud83d\\ude00x"', '"\\u00fc\u00fc"'], ['"abc"']),
    ({"type": "string", "format": "date"}, ['"2024-02-29"'], ['"2024-13-03"']),
    ({"type": "string", "format": "ipv6"}, ['"::1"', '"fe80::1:2"', '"::ffff:1.2.3.4"'], ['"fe80"', '"1::2::3"']),
    ({"enum": ["a/b", 1, None, [1, "x"], {"a": []}]}, ['"a\\/b"', "1", '[1, "x"]', '{"a":[]}'], ["2", "[1]"]),
    ({"type": "number", "minimum": 0}, ["5", "0.25", "1e-7", "1E+9"], ["-1", "-1e5"]),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 3}, ["1", "0.1"], ["0", "4", "1e3"]),
    ({"type": "integer", "multipleOf": 5, "minimum": 10}, ["10", "15"], ["5", "11"]),
    (LINKED, ['{"v":1,"next":{"next":null,"v":2}}'], ['{"v":1}']),
    (
        {"type": "object", "properties": {"a": N}, "additionalProperties": {"type": "string"}},
        ['{"b":"c","a":3}'],
        ['{"a":"x"}', '{"b":1}'],
    ),
    ({"type": "object", "patternProperties": {"^x-": N}, "additionalProperties": False}, ['{"x-a":1}'], ['{"y":1}']),
    (
        {"prefixItems": [N, {"type": "string"}], "type": "array", "items": False, "minItems": 1},
        ['[1,"a"]'],
        ["[]", '[1,"a",2]'],
    ),
    ({"type": "array", "items": N, "minItems": 2, "maxItems": 3}, ["[1,2]", "[1,2,3]"], ["[1]", "[1,2,3,4]"]),
    (
        {"type": "object", "properties": {"a": N, "b": N, "c": N}, "minProperties": 2, "maxProperties": 2},
        ['{"c":1,"a":1}'],
        ['{"a":1}', '{"a":1,"b":1,"c":1}'],
    ),
    (EXPRESSION, ['{"l":1,"r":{"l":2,"r":3,"op":"-"},"op":"+"}', "7"], ['{"l":1,"r":2,"op":"*"}']),
    ({"$ref": "#n", "$defs": {"N": {"$anchor": "n", "type": "integer"}}}, ["1"], ['"a"']),
    ({"type": "string", "nullable": True}, ['"a"', "null"], ["1"]),
    ({"enum": ["ab", "ba", 3], "pattern": "^a", "type": "string"}, ['"ab"'], ['"ba"', "3"]),
    ({"enum": [2, 3, 0.5], "multipleOf": 0.5, "maximum": 2}, ["2", "0.5"], ["3"]),
    ({"enum": [{"k": 1}, {"q": "a"}, {"k": "a"}], "properties": K, "required": ["k"]}, ['{"k":1}'], ['{"q":"a"}']),
    ({"enum": [[1], ["a"]], "items": N}, ["[1]"], ['["a"]']),
    ({"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": N}, ['{"z":1}'], ['{"z":""}']),
    (
        {"type": "object", "propertyNames": {"pattern": "^k"}, "properties": {**K, "a": {}}, "additionalProperties": N},
        ['{"k2":1,"k":2}'],
        ['{"a":1}', '{"z":1}', '{"k":""}'],
    ),
    (
        {"type": "object", "propertyNames": {"enum": ["k", "l"]}, "properties": K, "additionalProperties": {}},
        ['{"l":"","k":2}'],
        ['{"a":1}', '{"k":""}'],
    ),
    (
        {"type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1},
        [str(-(2**63)), "0", str(2**64 - 1)],
        [str(2**64)],
    ),
    ({"type": "integer", "minimum": 0, "maximum": 1e300}, ["1" + "0" * 299], ["-1"]),
]


def test_ranges_of_integers_hold_these_alone(compiler: GrammarCompiler) -> None:
    rng = random.Random(3)
    for _ in range(40):
        low, high = sorted(rng.randint(-(10**digits), 10**digits) for digits in (rng.randrange(5), rng.randrange(5)))
        near = [end + step for end in (low, high) for step in (-1, 0, 1)]
        tried = {*near, *(rng.randint(low - 200, high + 200) for _ in range(20)), *(10**at for at in range(5)), 0}
        grammar = Grammar(json_schema={"type": "integer", "minimum": low, "maximum": high})
        assert {it for it in tried if fits(compiler, grammar, str(it))} == {it for it in tried if low <= it <= high}


@pytest.mark.parametrize(("schema", "good", "bad"), FITTING)
def test_a_schema_allows_what_fits_and_nothing_else(
    compiler: GrammarCompiler, schema: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    grammar = Grammar(json_schema=schema, closed=True)
    assert [text for text in good if not fits(compiler, grammar, text)] == []
    assert [text for text in bad if fits(compiler, grammar, text)] == []


def test_an_object_of_many_properties_takes_them_in_any_order(compiler: GrammarCompiler) -> None:
    names = [f"p{number}" for number in range(90)]
    schema = {"type": "object", "properties": dict.fromkeys(names, N), "required": names[:40]}
    backwards = json.dumps(dict.fromkeys(reversed(names), 1))
    assert fits(compiler, Grammar(json_schema=schema, closed=True, lenient=True), backwards)
    assert not fits(compiler, Grammar(json_schema=schema, closed=True, lenient=True), '{"p1": 1}')
    with pytest.raises(ConfigError, match="each of 90 properties comes once"):
        compiler.begin(Grammar(json_schema=schema, closed=True))


TOOL = {"type": "object", "properties": {"q": {"type": "string", "pattern": r"(a)\1", "maxLength": 3}, "n": N}}


def test_a_lenient_grammar_is_loose_there_alone_and_says_where(
    compiler: GrammarCompiler, caplog: pytest.LogCaptureFixture
) -> None:
    tools = ToolCalls(tools=({"function": {"name": "find", "parameters": TOOL}},), tool_choice="find")
    call = '<tool_call>{{"name": "find", "arguments": {}}}</tool_call>'
    with caplog.at_level(logging.WARNING):
        grammar = Grammar(tools=tools, lenient=True)
        assert fits(compiler, grammar, call.format('{"q": "zz"}'))
    assert "pattern='(a)\\\\1' (groupref), in property 'q' of tool 'find'" in caplog.text
    assert not fits(compiler, grammar, call.format('{"q": "long"}'))
    assert not fits(compiler, grammar, call.format('{"n": "1"}'))
    with pytest.raises(ConfigError, match=r"pattern=.* in property 'q' of tool 'find' but grammars cannot express it"):
        compiler.begin(Grammar(tools=tools))


@pytest.mark.parametrize("pattern", ["(a", "a)", "[a", "*a", "a**", "a{3,1}", "a\\"])
@pytest.mark.parametrize("lenient", [True, False])
def test_a_pattern_that_is_none_is_refused(compiler: GrammarCompiler, pattern: str, lenient: bool) -> None:
    told = re.escape(repr(pattern)) + r", which is no regular expression \(.*\), in "
    for schema, where in (
        ({"type": "object", "properties": {"q": {"type": "string", "pattern": pattern}}}, "property 'q' of the JSON"),
        ({"type": "object", "patternProperties": {pattern: N}}, "the JSON schema"),
    ):
        with pytest.raises(ConfigError, match=told + where):
            compiler.begin(Grammar(json_schema=schema, lenient=lenient))


@pytest.mark.parametrize("pattern", [r"\p{L}+", "[]|a", "[^](", r"[\w-.]+", "(?<=a)b", r"\ca"])
def test_a_pattern_of_another_syntax_is_left_out(
    compiler: GrammarCompiler, pattern: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert fits(compiler, Grammar(json_schema={"type": "string", "pattern": pattern}, lenient=True), '"!"')
    assert f"Not held to by the grammar: pattern={pattern!r}" in caplog.text


def many_ways(number: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{at}": {"type": "string"} for at in range(number)}}


def test_a_grammar_that_is_too_large_to_be_followed_is_refused_before_anything_is_written(
    compiler: GrammarCompiler,
) -> None:
    tools = ToolCalls(tools=({"function": {"name": "f", "parameters": many_ways(3000)}},), tool_choice="required")
    for grammar, param in (
        (Grammar(json_schema=many_ways(3000), closed=True, lenient=True), "grammar"),
        (Grammar(tools=tools, closed=True, lenient=True), "tools"),
    ):
        with pytest.raises(ConfigError, match="give its objects fewer optional properties") as caught:
            compiler.begin(grammar).advance(list(b'<tool_call>{"name": "f", "arguments": {"p1": '))
        assert caught.value.param == param
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize("style", sorted(LAYOUTS))
def test_a_call_of_an_unknown_tool_stays_one(compiler: GrammarCompiler, style: str) -> None:
    options, written = LAYOUTS[style]
    tools = ({"function": {"name": "f", "parameters": TOOL}}, {"function": {"name": "find"}})
    unknown = written.format('{"a": [1]}').replace('"f"', '"fi"').replace("<f=f", "<f=fi")
    for text in (unknown, written.format('{"n": 1}')):
        assert fits(compiler, Grammar(tools=ToolCalls(tools=tools, **options), lenient=True), text)
    assert not fits(
        compiler, Grammar(tools=ToolCalls(tools=tools, **options), lenient=True), written.format('{"n": ""}')
    )
    for choice in ("required", "f"):
        grammar = Grammar(tools=ToolCalls(tools=tools, tool_choice=choice, **options), lenient=True)
        assert not fits(compiler, grammar, unknown)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "enum": []}, "no constant is left"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "no type of value is left"),
        ({"type": "string", "minLength": 3, "maxLength": 1}, "minLength=3 is more than maxLength=1"),
        ({"type": "string", "pattern": "^a$", "minLength": 3}, "no text has this pattern and length"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "in property 'a'"),
        ({"type": "array", "items": False, "minItems": 1}, "no type of value is left"),
        ({"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 2}, "no number is left"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "it is endless"),
        ({"anyOf": []}, "anyOf is empty"),
        ({"$ref": "#"}, "refers to itself without end"),
        ({"$ref": "#/nothing"}, "the schema has no such part"),
        ({"type": "object", "properties": {"a": {"maxLength": "x"}}}, "maxLength=.* in property 'a'"),
        ({"not": {}}, "no type of value is left"),
        ({"type": "string", "pattern": "^(?!a)a$"}, "no text has this pattern and length"),
        ({"type": "integer", "minimum": 1, "maximum": 4, "multipleOf": 5}, "no number between 1 and 4 is a multiple"),
        ({"multipleOf": 0}, "multipleOf=0 but expected a number above 0"),
        ({"type": "array", "maxItems": -1}, "maxItems=-1 but expected a number above -1"),
        ({"type": "object", "required": ["a"], "maxProperties": 0}, "no object has these properties, and so many"),
        ({"type": "object", "minProperties": 2, "maxProperties": 1}, "no object has these properties, and so many"),
        ({"$ref": "#nothing"}, "the schema has no such anchor"),
        ({"$ref": 5}, "ref=5 but expected a text"),
        ({"const": "b", "pattern": "^a"}, "no constant is left"),
    ],
)
def test_schemas_that_nothing_fits_are_refused(compiler: GrammarCompiler, schema: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compiler.begin(Grammar(json_schema=schema))
    tools = ({"function": {"name": "find", "parameters": {"properties": {"it": schema}, "required": ["it"]}}},)
    with pytest.raises(ConfigError, match=r"property 'it.*of tool 'find'|#"):
        compiler.begin(Grammar(tools=ToolCalls(tools=tools, tool_choice="find"), lenient=True))


@pytest.mark.parametrize("key", ["items", "anyOf", "allOf", "properties"])
def test_schemas_nested_too_deeply_are_refused(compiler: GrammarCompiler, key: str) -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(2000):
        schema = {key: [schema] if key.endswith("Of") else {"a": schema} if key == "properties" else schema}
    for make in (
        lambda: Grammar(json_schema=schema),
        lambda: ToolCalls(tools=({"function": {"name": "f", "parameters": schema}},)),
    ):
        with pytest.raises(ConfigError, match="nested more than 100 deep"):
            make()
    names = {f"d{at}": {"type": "array", "items": {"$ref": f"#/$defs/d{at + 1}"}} for at in range(2000)}
    chain = {"$ref": "#/$defs/d0", "$defs": names | {"d2000": N}}
    with pytest.raises(ConfigError, match="make it flatter"):
        compiler.begin(Grammar(json_schema=chain))


def test_the_letters_of_long_lists_are_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else thousands of words took minutes, and held a thread that others wait for."""
    written: list[object] = []
    one_of = letters.one_of
    monkeypatch.setattr(
        letters, "one_of", lambda ranges, *, escapes: written.append(ranges) or one_of(ranges, escapes=escapes)
    )
    words = [f"word {number}" for number in range(1000)]
    rules, *_ = translate(Grammar(json_schema={"enum": words}), lambda text: text)
    assert rules.count(letters.literal(words[-1], escapes=True)) == 1
    assert len(written) <= len(set("".join(words)))
