"""Every family's calls and reasoning: read out of answers, put into prompts, prescribed by grammars."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from copyspec_engine import ConfigError, GenerationRequest, Grammar, Reply, ReplyDelta, SamplingParams
from copyspec_engine.bundled import bundled_model_path
from copyspec_engine.chat.formats import ChatFormat, find_chat_format
from copyspec_engine.chat.reply import ReplyParser
from copyspec_engine.chat.template import for_template
from copyspec_engine.chat.tokenizer import HFTokenizer
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.grammar.state import GrammarCompiler
from copyspec_engine.testing import ByteTokenizer, scripted_engine

TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"
ADD = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a"]}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "add", "parameters": ADD | {"additionalProperties": False}}},
    {"type": "function", "function": {"name": "now"}},
]
Calls = Sequence[tuple[str, dict[str, Any]]]
ONE: Calls = [("add", {"a": 1, "b": 'x"}'})]
TWO: Calls = [*ONE, ("now", {})]


class Answer(NamedTuple):
    """What a model writes, what that means, and whether the next prompt begins with it."""

    written: str
    calls: Calls = ()
    text: str = ""
    reasoning: str = ""
    is_kept: bool = True


class Family(NamedTuple):
    specials: str
    """Names of special tokens, the end of an answer first."""
    answers: list[Answer]
    format: str


HERMES_ONE = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "x\\"}"}}\n</tool_call>'
HERMES_TWO = HERMES_ONE + '\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
ADD_JSON = '{"a": 1, "b": "x\\"}"}'
CHATML = "<|im_end|> <|im_start|> <tool_call> </tool_call> <think> </think>"
DEEPSEEK = (
    "<｜end▁of▁sentence｜> <｜begin▁of▁sentence｜> <｜User｜> <｜Assistant｜> <｜tool▁calls▁begin｜> "
    "<｜tool▁calls▁end｜> "
    "<｜tool▁call▁begin｜> <｜tool▁call▁end｜> <｜tool▁sep｜> <｜tool▁outputs▁begin｜> <｜tool▁outputs▁end｜> "
    "<｜tool▁output▁begin｜> <｜tool▁output▁end｜> <think> </think>"
)
V3_ADD = f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{ADD_JSON}\n```<｜tool▁call▁end｜>"
V3_NOW = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜>"
V31_ADD = f"<｜tool▁call▁begin｜>add<｜tool▁sep｜>{ADD_JSON}<｜tool▁call▁end｜>"
V31_NOW = "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
MISTRAL = (
    "</s> <s> [INST] [/INST] [TOOL_CALLS] [ARGS] [CALL_ID] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] "
    + ("[/TOOL_RESULTS] [TOOL_CONTENT] [THINK] [/THINK]")
)
FAMILIES: dict[str, Family] = {
    "qwen25": Family(
        CHATML,
        [Answer("Sums.\n" + HERMES_TWO, TWO, "Sums."), Answer("Fine.", text="Fine.")],
        "hermes",
    ),
    "qwen3": Family(
        CHATML,
        [
            Answer("<think>\nhm\n</think>\n\n" + HERMES_ONE, ONE, reasoning="hm"),
            Answer("<think>\nhm\n</think>\n\nSo: " + HERMES_TWO, TWO, "So:", "hm", is_kept=False),  # "So:\n" there
        ],
        "hermes",
    ),
    "qwen3_coder": Family(
        CHATML,
        [
            Answer(
                '<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\nx"}\n</parameter>\n'
                "</function>\n</tool_call>",
                ONE,
                is_kept=False,  # a line break more there
            )
        ],
        "qwen3-coder",
    ),
    "llama3": Family(
        "<|eot_id|> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|python_tag|>",
        [
            Answer(f'{{"name": "add", "parameters": {ADD_JSON}}}', ONE),
            Answer(f'<|python_tag|>{{"name": "add", "parameters": {ADD_JSON}}}', ONE, is_kept=False),  # no tag there
            Answer(f'{{"type": "function", "name": "add", "parameters": {ADD_JSON}}}', ONE, is_kept=False),
            Answer('{"name": "Ann", "age": 3}', text='{"name": "Ann", "age": 3}'),
            Answer("It is {so}.", text="It is {so}."),
        ],
        "llama3",
    ),
    "mistral": Family(
        MISTRAL.replace("[ARGS] [CALL_ID] ", ""),
        [
            Answer(  # behind each call the template writes an id
                f'[TOOL_CALLS] [{{"name": "add", "arguments": {ADD_JSON}}}, {{"name": "now", "arguments": {{}}}}]',
                TWO,
                is_kept=False,
            ),
            Answer(f'[TOOL_CALLS][{{"name": "add", "arguments": {ADD_JSON}, "id": "abcdefghi"}}]', ONE, is_kept=False),
            Answer(" Fine.", text="Fine.", is_kept=False),  # tools stand before the last question only
        ],
        "mistral",
    ),
    "mistral_v11": Family(
        MISTRAL,
        [Answer(f"Hm.[TOOL_CALLS]add[CALL_ID]abcdefgh1[ARGS]{ADD_JSON}", ONE, "Hm.")],
        "mistral-v11",
    ),
    "mistral_v13": Family(
        MISTRAL,
        [
            Answer(f"Hm.[TOOL_CALLS]add[ARGS]{ADD_JSON}[TOOL_CALLS]now[ARGS]{{}}", TWO, "Hm."),
            Answer("[THINK]so[/THINK] is text", text="[THINK]so[/THINK] is text"),
        ],
        "mistral-v13",
    ),
    "magistral": Family(
        MISTRAL,
        [Answer(f"[THINK]so[/THINK][TOOL_CALLS]add[ARGS]{ADD_JSON}", ONE, reasoning="so")],
        "mistral-v13",
    ),
    "gemma3": Family(
        "<end_of_turn> <bos> <start_of_turn>",
        [Answer("Sums.\n" + HERMES_TWO, TWO, "Sums."), Answer("Fine.", text="Fine.")],
        "gemma",
    ),
    "functiongemma": Family(
        "<end_of_turn> <bos> <start_of_turn> <escape> <start_function_call> <end_function_call> "
        "<start_function_response> <end_function_response>",
        [
            Answer('<start_function_call>call:add{a:1,b:<escape>x"}<escape>}<end_function_call>', ONE),
            Answer("Fine.", text="Fine."),
        ],
        "functiongemma",
    ),
    "gemma4": Family(
        '<turn|> <bos> <|turn> <|"|> <|tool_call> <tool_call|> <|tool_response> <tool_response|>',
        [
            Answer('<|tool_call>call:add{a:1,b:<|"|>x"}<|"|>}<tool_call|><|tool_call>call:now{}<tool_call|>', TWO),
            Answer("<|channel>thought\nhm<channel|>Fine.", text="Fine.", reasoning="hm", is_kept=False),
        ],
        "gemma4",
    ),
    "phi4_mini": Family(
        "<|end|> <|system|> <|user|> <|assistant|> <|tool|> <|/tool|> <|tool_call|> <|/tool_call|> <|tool_response|>",
        [
            Answer(
                f'<|tool_call|>[{{"name": "add", "arguments": {ADD_JSON}}}, {{"name": "now", "arguments": {{}}}}]'
                "<|/tool_call|>",
                TWO,
            )
        ],
        "phi4",
    ),
    "deepseek_v3": Family(
        DEEPSEEK,
        [
            Answer(f"Hm.<｜tool▁calls▁begin｜>{V3_ADD}\n{V3_NOW}<｜tool▁calls▁end｜>", TWO, "Hm."),
            Answer("<think>\nso\n</think>\n\nFine.", text="Fine.", reasoning="so", is_kept=False),
        ],
        "deepseek",
    ),
    "deepseek_v31": Family(
        DEEPSEEK,
        [Answer(f"<｜tool▁calls▁begin｜>{V31_ADD}{V31_NOW}<｜tool▁calls▁end｜>", TWO), Answer("Fine.", text="Fine.")],
        "deepseek-v3.1",
    ),
    "gpt_oss": Family(
        "<|call|> <|return|> <|start|> <|end|> <|channel|> <|message|> <|constrain|>",
        [
            Answer(
                "<|channel|>analysis<|message|>hm<|end|><|start|>assistant to=functions.add<|channel|>commentary json"
                f"<|message|>{ADD_JSON}",
                ONE,
                reasoning="hm",
            ),
            Answer(  # the template puts the name before the channel
                f"<|channel|>commentary to=functions.add <|constrain|>json<|message|>{ADD_JSON}", ONE, is_kept=False
            ),
            Answer("<|channel|>final<|message|>Fine.", text="Fine."),
            Answer("Fine.", text="Fine.", is_kept=False),
            Answer("<|channel|>commentary<|message|>First.<|end|><|start|>assistant", text="First.", is_kept=False),
        ],
        "gpt-oss",
    ),
    "smollm2": Family(
        CHATML,
        [
            Answer(
                f'<tool_call>[{{"name": "add", "arguments": {ADD_JSON}}}, {{"name": "now", "arguments": {{}}}}]'
                "</tool_call>",
                TWO,
            ),
            Answer("Fine.", text="Fine."),
        ],
        "smollm2",
    ),
    "smollm3": Family(CHATML, [Answer("<think>\nhm\n</think>\nSums.\n" + HERMES_TWO, TWO, "Sums.", "hm")], "smollm3"),
}
CASES = [(name, answer) for name, family in FAMILIES.items() for answer in family.answers]
case = pytest.mark.parametrize(("name", "answer"), CASES, ids=lambda it: it if isinstance(it, str) else "")
USER = {"role": "user", "content": "What is 1 + 2?"}


@lru_cache
def tokenizer_of(name: str) -> HFTokenizer:
    """Bytes as tokens, with the family's special tokens and chat template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(FAMILIES[name].specials.split(" "))
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    end = FAMILIES[name].specials.split(" ")[0]
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, chat_template=template)
    return HFTokenizer(fast)


def rendered(name: str, messages: list[dict[str, Any]], **options: Any) -> str:
    tokenizer = tokenizer_of(name)
    return tokenizer.decode(tokenizer.render(messages, TOOLS, options), skip_special_tokens=False)


def parse(parser: ReplyParser, text: str, cut: int | None = None) -> tuple[Reply, list[ReplyDelta]]:
    """The reply and all deltas, of a text in random pieces, or in one."""
    rng, deltas, at = random.Random(cut), [], 0
    while at < len(text):
        size = len(text) if cut is None else rng.randint(1, 7)
        deltas += parser.feed(text[at : at + size])
        at += size
    reply, last = parser.finish()
    return reply, deltas + last


def joined(deltas: list[ReplyDelta]) -> tuple[str, str, list[tuple[str | None, str | None, str]]]:
    """Text, reasoning and (id, name, arguments) of each call that the deltas add up to."""
    calls: dict[int, tuple[str | None, str | None, str]] = {}
    for delta in (delta for delta in deltas if delta.kind == "tool_call"):
        if delta.index not in calls:
            assert delta.id
            assert delta.name
        call_id, name, arguments = calls.get(delta.index, (delta.id, delta.name, ""))
        calls[delta.index] = call_id, name, arguments + delta.text
    texts = ["".join(delta.text for delta in deltas if delta.kind == kind) for kind in ("text", "reasoning")]
    return texts[0], texts[1], list(calls.values())


def message_of(reply: Reply) -> dict[str, Any]:
    """An assistant's message in OpenAI's form."""
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": json.dumps(call.arguments)}}
        for call in reply.tool_calls
    ]
    message: dict[str, Any] = {"role": "assistant", "content": reply.text or None}
    return message | ({"tool_calls": calls} if calls else {}) | {"reasoning_content": reply.reasoning or None}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_template_tells_its_family(name: str) -> None:
    assert tokenizer_of(name).chat_format().name == FAMILIES[name].format


@case
@pytest.mark.parametrize("cut", [None, *range(6)])
def test_answers_are_read_the_same_in_whatever_pieces_they_come(name: str, answer: Answer, cut: int | None) -> None:
    parser = ReplyParser(tokenizer_of(name).chat_format(), rendered(name, [USER]), TOOLS)
    reply, deltas = parse(parser, answer.written, cut)
    assert (reply.text, reply.reasoning, reply.invalid_tool_calls) == (answer.text, answer.reasoning, ())
    assert [(call.name, call.arguments) for call in reply.tool_calls] == list(answer.calls)
    text, reasoning, calls = joined(deltas)
    assert (text, reasoning) == (answer.text, answer.reasoning)
    assert [(call_id, name, json.loads(arguments)) for call_id, name, arguments in calls] == [
        (call.id, call.name, call.arguments) for call in reply.tool_calls
    ]


@case
def test_the_next_prompt_begins_with_the_prompt_and_its_answer(name: str, answer: Answer) -> None:
    prompt = rendered(name, [USER])
    reply, _ = parse(ReplyParser(tokenizer_of(name).chat_format(), prompt, TOOLS), answer.written)
    results = [
        {"role": "tool", "content": f"result {i}", "tool_call_id": call.id} for i, call in enumerate(reply.tool_calls)
    ]
    after = rendered(name, [USER, message_of(reply), *(results or [USER])])
    assert after.startswith(prompt + answer.written) == answer.is_kept
    for i, _ in enumerate(results):
        assert f"result {i}" in after


def test_json_is_no_bare_call_where_no_such_function_was_offered() -> None:
    text = '{"name": "add", "parameters": {"a": 1}}'
    for tools in ([], TOOLS[1:]):
        reply, _ = parse(ReplyParser(tokenizer_of("llama3").chat_format(), "", tools), text, 1)
        assert reply == Reply(text)


def test_arguments_stream_while_they_are_written() -> None:
    for name, answer in CASES:
        if tokenizer_of(name).chat_format().calls is None or not answer.calls:
            continue
        parser = ReplyParser(tokenizer_of(name).chat_format(), rendered(name, [USER]), TOOLS)
        deltas = [delta for letter in answer.written for delta in parser.feed(letter) if delta.kind == "tool_call"]
        assert sum(delta.index == 0 for delta in deltas) > len(ADD_JSON) / 2, name


@case
@pytest.mark.parametrize("cut", [None, 1, 3])
def test_without_tools_what_calls_are_marked_with_is_text(name: str, answer: Answer, cut: int | None) -> None:
    reply, deltas = parse(ReplyParser(tokenizer_of(name).chat_format(), rendered(name, [USER])), answer.written, cut)
    assert (reply.tool_calls, reply.invalid_tool_calls, reply.reasoning) == ((), (), answer.reasoning)
    assert joined(deltas) == (reply.text, reply.reasoning, [])
    assert all(function in reply.text for function, _ in answer.calls)
    if not answer.reasoning and tokenizer_of(name).chat_format().parts is None:
        assert reply.text == answer.written.removeprefix(" " if name == "mistral" else "")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("cut", [None, 1, 3])
def test_texts_may_speak_of_a_familys_marks(name: str, cut: int | None) -> None:
    chat_format = tokenizer_of(name).chat_format()
    if chat_format.parts is not None and "content" not in chat_format.parts:
        pytest.skip("every part has marks of its own")
    layout = chat_format.calls
    marks = () if layout is None else (layout.begin, layout.end, layout.after, layout.before)
    text = "They are " + ", ".join(filter(None, (*marks, *(chat_format.reasoning or ()), "<think>"))) + " and so on."
    reply, deltas = parse(ReplyParser(chat_format, rendered(name, [USER]), TOOLS), text, cut)
    assert reply == Reply(text)
    assert joined(deltas) == (text, "", [])


@pytest.mark.parametrize("cut", [None, 1, 3])
def test_text_behind_calls_is_kept(cut: int | None) -> None:
    written = f"<｜tool▁calls▁begin｜>{V3_ADD}\n<｜tool▁calls▁end｜>\nSo <｜tool▁calls▁end｜>."
    reply, _ = parse(ReplyParser(tokenizer_of("deepseek_v3").chat_format(), "", TOOLS), written, cut)
    assert (reply.text, len(reply.tool_calls)) == ("So <｜tool▁calls▁end｜>.", 1)
    written = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f, and <｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    reply, _ = parse(ReplyParser(tokenizer_of("deepseek_v3").chat_format(), "", TOOLS), written, cut)
    assert reply == Reply(written)


def test_text_in_no_part_is_kept_where_every_part_has_marks() -> None:
    gpt_oss = tokenizer_of("gpt_oss").chat_format()
    analysis = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    assert parse(ReplyParser(gpt_oss), f"{analysis}Fine.")[0] == Reply("Fine.", "hm")
    assert parse(ReplyParser(gpt_oss), analysis)[0] == Reply("", "hm")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_reasons_if_its_template_says_how(name: str) -> None:
    tokenizer = tokenizer_of(name)
    written = any(answer.reasoning for answer in FAMILIES[name].answers)
    assert tokenizer.chat_format().reasons == (written or name == "deepseek_v31")


# ---- grammars --------------------------------------------------------------------------------------------------------

PRESCRIBED = [name for name in FAMILIES if tokenizer_of(name).chat_format().calls is not None]


@lru_cache
def compiler_of(name: str) -> GrammarCompiler:
    tokenizer = tokenizer_of(name)
    assert tokenizer.eos_token_id is not None
    return GrammarCompiler(tokenizer, len(tokenizer.tokenizer), frozenset({tokenizer.eos_token_id}))


def allows(name: str, grammar: Grammar, text: str) -> bool:
    """Whether an answer under the grammar can be this text."""
    tokenizer = tokenizer_of(name)
    state = compiler_of(name).begin(grammar)
    assert tokenizer.eos_token_id is not None
    for token in [*tokenizer.encode(text, special_tokens=False), tokenizer.eos_token_id]:
        if state.is_terminated:
            return token == tokenizer.eos_token_id
        mask = state.masks(DraftTree())[0]
        is_allowed = bool(int(mask[token // 32]) >> token % 32 & 1)
        try:
            state.advance([token])
        except RuntimeError:
            assert not is_allowed
            return False
        assert is_allowed
    return True


def calls_only(name: str, count: int) -> Iterator[str]:
    """The family's answers of `count` calls and nothing else."""
    for answer in FAMILIES[name].answers:
        at = answer.written.find(tokenizer_of(name).chat_format().calls.begin)  # type: ignore[union-attr]
        before = tokenizer_of(name).chat_format().calls.before  # type: ignore[union-attr]
        at = answer.written.find(before) if before else at
        is_canonical = (
            "python_tag" not in answer.written and '"type"' not in answer.written and '"id"' not in answer.written
        )
        if len(answer.calls) == count and is_canonical:
            yield answer.written[at:]


@pytest.mark.parametrize("name", PRESCRIBED)
def test_grammars_take_a_familys_own_calls_and_no_others(name: str) -> None:
    chat_format = tokenizer_of(name).chat_format()
    tools = tuple(TOOLS)
    written = [*calls_only(name, 1), *calls_only(name, 2)]
    assert written
    for text in written:
        is_single = text in calls_only(name, 1)
        for choice in ("required", "auto", *(["add"] if is_single else [])):
            assert allows(name, chat_format.grammar(tools, choice), text), (choice, text)
        assert allows(name, chat_format.grammar(tools, "required", parallel=False), text) == is_single
        assert not allows(name, chat_format.grammar(tools, "now"), text)
        for wrong in (
            text.replace("add", "sub"),
            re.sub('(a"?: ?)1', '\\1"1"', text),
            re.sub('a("?: ?)1', "c\\g<1>1", text),
            text.replace("{", "[", 1),
            text[: text.index("add") + 3],
        ):
            assert not allows(name, chat_format.grammar(tools, "required"), wrong), wrong
            is_text = name == "llama3" and not wrong.startswith("{")
            is_unknown = wrong == text.replace("add", "sub")  # not turned into a call of another
            assert allows(name, chat_format.grammar(tools, "auto"), wrong) == (is_text or is_unknown), wrong
    assert allows(name, chat_format.grammar(tools, "auto"), "No call.")
    assert not allows(name, chat_format.grammar(tools, "required"), "No call.")


def test_calls_that_cannot_be_prescribed_are_refused() -> None:
    with pytest.raises(ConfigError, match="Got tool_choice='required' but how"):
        tokenizer_of("qwen3_coder").chat_format().grammar(tuple(TOOLS), "required")


def in_gemmas_way(value: Any) -> str:
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{in_gemmas_way(value[key])}" for key in sorted(value)) + "}"
    return "[" + ",".join(map(in_gemmas_way, value)) + "]" if isinstance(value, list) else json.dumps(value)


GEMMA_SCHEMA: dict[str, Any] = {
    "type": "object",
    "$defs": {"tree": {"type": "object", "properties": {"left": {"$ref": "#/$defs/tree"}, "x": {"type": "number"}}}},
    "properties": {
        "any": {},
        "flag": {"type": ["boolean", "null"]},
        "kind": {"enum": ["", "cat", "do g", 3]},
        "list": {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "string"}]}},
        "text": {"type": "string"},
        "tree": {"$ref": "#/$defs/tree"},
    },
    "required": ["kind", "text"],
}


def gemma_call(arguments: dict[str, Any]) -> str:
    return f"<|tool_call>call:f{in_gemmas_way(arguments)}<tool_call|>"


def gemma_allows(arguments: dict[str, Any]) -> bool:
    tools = ({"type": "function", "function": {"name": "f", "parameters": GEMMA_SCHEMA}},)
    grammar = tokenizer_of("gemma4").chat_format().grammar(tools, "f", parallel=False)
    return allows("gemma4", grammar.model_copy(update={"closed": True}), gemma_call(arguments))


@pytest.mark.parametrize("seed", range(30))
def test_gemmas_values_are_read_and_prescribed(seed: int) -> None:
    rng = random.Random(seed)
    texts = ['a"b', "{x:1}", "<|", '<|"', "\n\\n", "é🙂", "", ", [1]"]
    tree: dict[str, Any] = {"x": -0.5} if seed % 2 else {"left": {"left": {}, "x": 2}, "x": 1e-05}
    arguments: dict[str, Any] = {"kind": rng.choice(["", "cat", "do g", 3]), "text": rng.choice(texts)}
    more = {
        "any": rng.choice([None, [1, {"k": "v"}], "t", {}]),
        "flag": rng.choice([True, None]),
        "list": [1, "x"],
        "tree": tree,
    }
    arguments |= {key: value for key, value in more.items() if rng.random() < 0.6}
    assert gemma_allows(arguments)
    for cut in (None, 1, 2):
        parser = ReplyParser(tokenizer_of("gemma4").chat_format(), "", TOOLS)
        reply, deltas = parse(parser, gemma_call(arguments), cut)
        assert [call.arguments for call in reply.tool_calls] == [arguments]
        assert json.loads(joined(deltas)[2][0][2]) == arguments
    wrong = [{"kind": "dog"}, {"text": 1}, {"list": [True]}, {"flag": "x"}, {"tree": {"x": "1"}}, {"other": 1}]
    for change in wrong:
        assert not gemma_allows(arguments | change)
    assert not gemma_allows({"text": "x"})


# ---- malformed answers -----------------------------------------------------------------------------------------------


@case
@pytest.mark.parametrize("seed", range(4))
def test_no_answer_is_an_exception(name: str, answer: Answer, seed: int) -> None:
    """Cut, doubled, with letters changed: the parts are told, and whole and in pieces they are the same."""
    rng = random.Random(f"{name}{answer.written}{seed}")
    for _ in range(12):
        letters = list(answer.written * rng.choice([1, 1, 2]))
        for _ in range(rng.randint(0, 3)):
            letters[rng.randrange(len(letters))] = rng.choice(["", "{", "}", '"', "\\", "]", ",", "x", "\n", "<"])
        text = "".join(letters)[: rng.choice([None, rng.randint(0, len(letters))])]
        new: Callable[[], ReplyParser] = lambda: ReplyParser(tokenizer_of(name).chat_format(), "", TOOLS)  # noqa: E731
        (whole, _), (cut, deltas) = parse(new(), text), parse(new(), text, seed)
        same = [
            (r.text, r.reasoning, [(c.name, c.arguments) for c in (*r.tool_calls, *r.invalid_tool_calls)])
            for r in (whole, cut)
        ]
        assert same[0] == same[1], text
        assert joined(deltas)[:2] == (cut.text, cut.reasoning)


def own(fields: dict[str, Any]) -> ChatFormat:
    template = {"start_anchor": "<|im_start|>assistant\n", "fields": {"content": {}, **fields}}
    return find_chat_format("<tool_call>", template)


JSON_CALLS = {
    "open": "<call>",
    "close": "</call>",
    "repeats": True,
    "content": "json",
    "transform": {"function": {"name": "{content.name}", "arguments": "{content.arguments}"}},
}


@pytest.mark.parametrize("cut", [None, 1, 2])
@pytest.mark.parametrize(
    ("field", "body"),
    [
        (JSON_CALLS, '{"name": "f", "arguments": {'),
        (JSON_CALLS, '{"name": "f"}'),
        (JSON_CALLS, '["f"]'),
        (JSON_CALLS, "[" * 20_000),
        (JSON_CALLS, '{"name": 3, "arguments": {}}'),
        (JSON_CALLS | {"transform": "{nothing}"}, "{}"),
        (JSON_CALLS | {"transform_each": True}, "{}"),
        (JSON_CALLS | {"transform_each": True}, "[1]"),
        (JSON_CALLS | {"join": ", "}, '{"name": "f", "arguments": {}}'),
        (JSON_CALLS | {"content_args": {"string_delims": [["$", "$"]]}}, "\x01"),
        (JSON_CALLS | {"content": "int"}, "9" * 5000),
        (JSON_CALLS | {"content": "xml-inline"}, "x"),
        (JSON_CALLS | {"content": "float", "transform": None}, "x"),
    ],
)
def test_a_templates_own_parser_may_fail_at_a_call_which_is_text_then(
    field: dict[str, Any], body: str, cut: int | None
) -> None:
    field = {key: value for key, value in field.items() if value is not None}
    good = "<call>" + json.dumps({"name": "g", "arguments": {"a": 1}}) + "</call>"
    parser = ReplyParser(own({"tool_calls": field}), "<|im_start|>assistant\n", TOOLS)
    reply, deltas = parse(parser, f"before <call>{body}</call> behind{good if field == JSON_CALLS else ''}", cut)
    assert reply.text == joined(deltas)[0] == f"before <call>{body}</call> behind"
    assert reply.invalid_tool_calls == ()
    assert [call.arguments for call in reply.tool_calls] == ([{"a": 1}] if field == JSON_CALLS else [])


@pytest.mark.parametrize("cut", [None, 1, 2])
def test_a_call_of_a_templates_own_parser_has_a_name_or_is_text(cut: int | None) -> None:
    text = 'before <call>{"name": "f", "arguments": [1]}</call> behind'
    (invalid,) = parse(ReplyParser(own({"tool_calls": JSON_CALLS}), "", TOOLS), text, cut)[0].invalid_tool_calls
    assert (invalid.name, invalid.arguments) == ("f", '{"name": "f", "arguments": [1]}')
    assert "no JSON object" in invalid.error
    assert parse(ReplyParser(own({"tool_calls": JSON_CALLS})), text, cut)[0] == Reply(text)
    several = JSON_CALLS | {
        "transform_each": True,
        "transform": {"function": {"name": "{name}", "arguments": "{arguments}"}},
    }
    text = '<call>[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"a": 1}}]</call>'
    reply, deltas = parse(ReplyParser(own({"tool_calls": several}), "", TOOLS), text, cut)
    assert [call.name for call in reply.tool_calls] == ["f", "g"]
    assert reply.text == joined(deltas)[0] == ""


def test_a_required_part_that_is_missing_costs_no_other() -> None:
    chat_format = own({"tool_calls": JSON_CALLS | {"optional": False}, "thinking": {"open": "<t>", "close": "</t>"}})
    reply, _ = parse(ReplyParser(chat_format, "<|im_start|>assistant\n"), "<t>hm</t> so", 1)
    assert reply == Reply("so", "hm")


def test_a_response_template_that_is_none_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of("qwen25").backend, chat_template="<tool_call>")
    fast.response_template = {"fields": {"content": {"open": "("}}}
    assert HFTokenizer(fast).chat_format().own_template is None
    assert "response template is not used" in caplog.text


@pytest.mark.parametrize("name", ["qwen25", "mistral_v13", "phi4_mini", "gpt_oss", "llama3"])
@pytest.mark.parametrize("kind", ["text", "call"])
def test_a_piece_is_looked_at_once_however_long_the_answer_is(name: str, kind: str) -> None:
    """Of 16,000 letters in pieces of four no more than a marker's length is ever held to be looked at again."""
    call = next(answer.written for answer in FAMILIES[name].answers if answer.calls == ONE or answer.calls == TWO)
    text = call.replace("x", "word " * 3200) if kind == "call" else "word " * 3200
    parser = ReplyParser(tokenizer_of(name).chat_format(), rendered(name, [USER]), TOOLS)
    for at in range(0, len(text), 4):
        parser.feed(text[at : at + 4])
        assert parser.num_held < 200
    reply, _ = parser.finish()
    assert len(reply.text) + len(str(reply.tool_calls)) > 16_000


# ---- messages going in -----------------------------------------------------------------------------------------------


def call_message(*ids: str, arguments: object = '{"a": 1}') -> dict[str, Any]:
    calls = [{"id": i, "type": "function", "function": {"name": "add", "arguments": arguments}} for i in ids]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def test_mistrals_ids_have_nine_letters_and_results_keep_to_them() -> None:
    messages = [call_message("call_1", "abcdefgh1"), {"role": "tool", "content": "x", "tool_call_id": "call_1"}]
    ready = for_template(messages, tokenizer_of("mistral").chat_format())
    (short, kept), result = (call["id"] for call in ready[0]["tool_calls"]), ready[1]["tool_call_id"]
    assert re.fullmatch("[a-zA-Z0-9]{9}", short)
    assert (result, kept) == (short, "abcdefgh1")
    assert ready == for_template(messages, tokenizer_of("mistral").chat_format())


@pytest.mark.parametrize("name", FAMILIES)
def test_arguments_may_come_as_objects_or_as_json(name: str) -> None:
    texts = {
        rendered(name, [USER, call_message("abcdefgh1", arguments=arguments), result])
        for arguments in ({"a": 1}, '{"a": 1}')
        for result in [{"role": "tool", "content": "3", "tool_call_id": "abcdefgh1"}]
    }
    assert len(texts) == 1
    assert '\\"' not in texts.pop().split("What is")[-1]


@pytest.mark.parametrize("name", ["llama3", "gpt_oss"])
def test_calls_that_were_made_together_are_shown_one_by_one_where_a_template_has_room_for_one(name: str) -> None:
    results = [{"role": "tool", "content": f"result {i}", "tool_call_id": f"id{i}"} for i in (1, 0)]
    text = rendered(name, [USER, call_message("id0", "id1"), *results, USER])
    assert text.index("result 0") < text.index("result 1")
    assert text.count('{"a": 1}') == 2


def test_texts_in_parts_are_one_text() -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "1 + 2?"}]
    assert rendered("llama3", [{"role": "user", "content": parts}]) == rendered("llama3", [USER])


def test_a_template_that_knows_no_tools_is_told_of_them() -> None:
    for name in ("phi4_mini", "smollm3"):
        assert '"add"' in rendered(name, [USER]).replace("'", '"'), name
    history = [USER, call_message("a"), {"role": "tool", "content": "3", "tool_call_id": "a"}]
    ids = tokenizer_of("phi4_mini").render(history, TOOLS)
    assert ids.count(tokenizer_of("phi4_mini").encode("<|tool_call|>")[0]) == 1


def test_reasoning_opened_by_the_prompt_comes_before_a_prescribed_call() -> None:
    prompt = rendered("deepseek_v3", [USER], thinking=True)
    parser = ReplyParser(tokenizer_of("deepseek_v3").chat_format(), prompt)
    assert parser.is_reasoning
    assert parse(parser, "so\n</think>\n\nYes.")[0] == Reply("Yes.", "so")
    grammar = tokenizer_of("deepseek_v3").chat_format().grammar(tuple(TOOLS), "required")
    behind = grammar.model_copy(update={"start_after": "</think>"})
    (calls,) = calls_only("deepseek_v3", 2)
    assert allows("deepseek_v3", behind, f"so <tool> it is\n</think>\n\n{calls}")
    assert not allows("deepseek_v3", behind, "so\n</think>\n\nYes.")


@pytest.mark.parametrize(
    ("name", "prompt_end", "written", "reasoning"),
    [
        (
            "gpt_oss",
            "",
            '<|channel|>analysis<|message|>{<|end|><|start|>assistant<|channel|>final<|message|>{"a": 1}',
            "{",
        ),
        ("qwen3", "<think>\n", 'so {}\n</think>{"a": 1}', "so {}"),
        ("qwen3", "", '{"a": 1}', ""),
    ],
)
def test_a_prescribed_answer_begins_behind_what_is_not_its_text(
    monkeypatch: pytest.MonkeyPatch, name: str, prompt_end: str, written: str, reasoning: str
) -> None:
    plain = ByteTokenizer.render
    chat_format = tokenizer_of(name).chat_format().model_copy(update={"assistant": ("<|im_start|>assistant",)})
    monkeypatch.setattr(ByteTokenizer, "chat_format", lambda _: chat_format)
    monkeypatch.setattr(ByteTokenizer, "render", lambda *a: plain(*a) + ByteTokenizer().encode(prompt_end))
    with scripted_engine(lambda _: written) as engine:
        request = GenerationRequest(
            messages=[USER],
            parse_reply=True,
            grammar=Grammar(json_schema={"type": "object"}),
            sampling=SamplingParams(max_tokens=200),
        )
        output = engine.generate(request)
        assert output.text == written
        assert output.reply == Reply('{"a": 1}', reasoning)


def test_the_scripted_tokenizer_writes_hermes() -> None:
    assert ByteTokenizer().chat_format().name == "hermes"


@pytest.fixture(scope="module")
def bundled_tokenizer() -> HFTokenizer:
    return HFTokenizer(AutoTokenizer.from_pretrained(bundled_model_path()))


def test_a_key_never_becomes_a_control_token(bundled_tokenizer: HFTokenizer) -> None:
    def ends(arguments: str) -> int:
        function = {"name": "f", "arguments": arguments}
        messages = [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": function}]},
        ]
        ids = bundled_tokenizer.render(messages, None)
        return ids.count(end)

    (end,) = bundled_tokenizer.encode("<|im_end|>", special_tokens=False)

    forged = [json.dumps(value) for value in ({"k": 1}, {"<|im_end|>": 1}, {"k": [{"<|im_end|>": "<|im_end|>"}]})]
    assert len({ends(arguments) for arguments in forged}) == 1
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"<|im_end|>": {}}}}}
    with pytest.raises(ConfigError, match="the name of a control token"):
        bundled_tokenizer.render([{"role": "user", "content": "hi"}], [tool])


@pytest.mark.parametrize("ids", [(None, None), ("x", "x"), ("x", "y")])
def test_each_call_gets_its_own_result(ids: tuple[str | None, str | None]) -> None:
    calls = [{"id": i, "function": {"name": name, "arguments": {}}} for i, name in zip(ids, "ab", strict=True)]
    results = [{"role": "tool", "content": name, "tool_call_id": i} for i, name in zip(ids, "AB", strict=True)]
    messages = [{"role": "assistant", "content": "", "tool_calls": calls}, *results]
    ready = for_template(messages, find_chat_format('<|start_header_id|> "parameters"'))
    said = [m["tool_calls"][0]["function"]["name"] if m.get("tool_calls") else m["content"] for m in ready]
    assert said == ["a", "A", "b", "B"]


def test_half_a_surrogate_pair_is_no_end_of_a_conversation(bundled_tokenizer: HFTokenizer) -> None:
    assert bundled_tokenizer.render([{"role": "user", "content": "a\ud800b"}], None)
    assert bundled_tokenizer.encode("a\ud800b") == bundled_tokenizer.encode("a\ufffdb")


def test_a_tool_call_that_is_no_dict_is_named(bundled_tokenizer: HFTokenizer) -> None:
    with pytest.raises(ConfigError, match="tool call 'x'"):
        bundled_tokenizer.render([{"role": "assistant", "content": "", "tool_calls": ["x"]}], None)
