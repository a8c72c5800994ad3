"""Answers of a prescribed form: always valid, the same whatever is drafted, and cheaper than their tokens."""

from __future__ import annotations

import builtins
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import llguidance
import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field

from copyspec_engine import (
    AdaptiveDrafter,
    ConfigError,
    CopySpecDrafter,
    CopySpecError,
    Engine,
    EngineConfig,
    GenerationOutput,
    GenerationRequest,
    Grammar,
    RequestFailedError,
    SamplingParams,
    ToolCalls,
)
from copyspec_engine.chat.formats import find_chat_format
from copyspec_engine.drafting.tree import FORCED, DraftTree
from copyspec_engine.grammar.state import GrammarCompiler, GrammarState
from copyspec_engine.sampling.processors import _unpacked, _unpacked_octets, mask_tokens
from copyspec_engine.testing import ByteTokenizer, loop_of, scripted_engine
from tests.conftest import END, Written, assert_all_slots_free
from tests.loop.test_lossless import OracleTrees, ids_of, same_answer

MakeEngine = Callable[..., Engine]

COMPACT = {"x-guidance": {"whitespace_flexible": False}}
"""Random models would write white space for ever."""
PROMPT = ids_of('records: {"name":"bob","age":3,"kind":"cat"} and {"name":"al","age":12,"kind":"dog"} and so on; ')
SAMPLINGS: list[dict[str, Any]] = [{}, {"temperature": 0.7, "seed": 5}]


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str = Field(max_length=6)
    age: int = Field(ge=0, le=99)
    kind: Literal["cat", "dog"]


RECORD = Grammar(json_schema=Record.model_json_schema() | COMPACT)
LARK = Grammar(lark='start: "<" item ("," item){0,3} ">"\nitem: /[a-c]{1,3}/ | "(" item ")"')
VALID: list[tuple[Grammar, Callable[[str], object]]] = [
    (RECORD, Record.model_validate_json),
    (Grammar(regex=r"(the (cat|dog) sat[.!]){1,3}"), re.compile(r"(the (cat|dog) sat[.!]){1,3}").fullmatch),
    (Grammar(choice=("the cat", "the cat sat", "a dog ☃")), lambda text: text in ("the cat", "the cat sat", "a dog ☃")),
    (LARK, lambda text: re.fullmatch(r"<[a-c()]+(,[a-c()]+){0,3}>", text) and text.count("(") == text.count(")")),
]


def masked_by(logits: torch.Tensor, bitmask: torch.Tensor) -> torch.Tensor:
    scores = logits.clone()
    mask_tokens(scores, bitmask)
    return scores


def ask(
    engine: Engine, grammar: Grammar | None, drafter: Any, session: str | None = None, **sampling: Any
) -> GenerationOutput:
    return engine.generate(
        GenerationRequest(
            prompt_token_ids=PROMPT,
            grammar=grammar,
            drafter=drafter,
            session_id=session,
            sampling=SamplingParams(**{"max_tokens": 200, **sampling}),
        )
    )


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "seeded"])
@pytest.mark.parametrize(("grammar", "is_valid"), VALID, ids=["schema", "regex", "choice", "lark"])
def test_answers_are_valid_and_the_same_whatever_is_drafted(
    make_engine: MakeEngine, grammar: Grammar, is_valid: Callable[[str], object], sampling: dict[str, Any]
) -> None:
    engine = make_engine("llama")
    for seed in range(3):
        plain = ask(engine, grammar, "none", **sampling)
        if plain.finish_reason == "stop":
            assert is_valid(plain.text)
        for drafter in ("adaptive", "copyspec", AdaptiveDrafter(max_draft_tokens=3)):
            drafted = ask(engine, grammar, drafter, session="s", **sampling)
            assert same_answer(plain, drafted)
            assert drafted.draft_stats.num_forward_passes < plain.draft_stats.num_forward_passes
        sampling = {"temperature": 1.0, "seed": seed}
    assert ask(engine, grammar, "none", **sampling).finish_reason == "stop"
    assert_all_slots_free(engine)


def test_50_random_cases_draft_on_equals_off(make_engine: MakeEngine) -> None:
    """Grammars, markers, stop texts, cuts by max_tokens, sessions and drafters of all kinds."""
    rng = random.Random(0)
    engine = make_engine("llama", kv_cache_tokens=2048, max_prefill_tokens=24, max_sessions=3)
    free = {json.dumps(s): ask(engine, None, "none", max_tokens=60, **s).text for s in SAMPLINGS}
    num_accepted = num_marked = num_cut = 0
    for _ in range(50):
        grammar, is_valid = rng.choice(VALID)
        sampling = rng.choice(SAMPLINGS)
        text, marker = free[json.dumps(sampling)], None
        if rng.random() < 0.4:
            marker = rng.choice(re.findall(f"[!-~]{{{rng.randrange(1, 3)}}}", text))
            grammar = grammar.model_copy(update={"start_after": marker})
        options = dict(sampling) | {"max_tokens": rng.choice([1, 5, 30, 90])}
        if rng.random() < 0.3:
            options["stop"] = rng.choice(["at", '"', "a", ">"])
        plain = ask(engine, grammar, "none", **options)
        drafter = rng.choice([AdaptiveDrafter(), AdaptiveDrafter(max_draft_tokens=4), CopySpecDrafter(block=6)])
        drafted = ask(engine, grammar, drafter, rng.choice("abcd"), **options)
        assert same_answer(plain, drafted), (grammar, options, drafter)
        if plain.finish_reason == "stop" and "stop" not in options and (marker is None or marker in plain.text):
            assert is_valid(plain.text.partition(marker)[2] if marker else plain.text)
        num_accepted += drafted.draft_stats.num_accepted_tokens
        num_marked += marker is not None and plain.text.find(marker) > 0
        num_cut += plain.finish_reason == "length"
    assert num_accepted > 200
    assert num_marked > 4
    assert num_cut > 8
    assert_all_slots_free(engine)


def test_draft_trees_with_wrong_branches_give_the_plain_tokens(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine("gemma3")
    verified = watch_verified(engine, monkeypatch)
    for grammar, _ in VALID:
        plain = ask(engine, grammar, "none", temperature=1.0, seed=2)
        for seed in range(3):
            loop_of(engine).core.policy = OracleTrees(plain.token_ids, seed)  # type: ignore[assignment]
            assert same_answer(plain, ask(engine, grammar, "adaptive", temperature=1.0, seed=2))
        for written, draft in verified:
            assert_allowed(grammar, written, draft)
        assert any(not draft.is_chain for _, draft in verified) or grammar is not RECORD
        verified.clear()
    assert_all_slots_free(engine)


_LAYOUTS = {
    layout.model_dump_json(): path.stem
    for path in sorted((Path(__file__).parents[1] / "data" / "chat_templates").glob("*.jinja"))
    if (layout := find_chat_format(path.read_text(encoding="utf-8"), None).calls) is not None
}
DIALECTS = {name: json.loads(layout) for layout, name in _LAYOUTS.items()}
"""Layouts of calls by a model that writes them."""


@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_calls_are_the_same_whatever_is_drafted_in_every_dialect(make_engine: MakeEngine, name: str) -> None:
    engine = make_engine("llama")
    tools = ToolCalls(tools=TOOLS, tool_choice="required", **DIALECTS[name])
    grammar = Grammar(tools=tools)
    policy = loop_of(engine).core.policy
    for options in ({}, {"temperature": 1.0, "seed": 5}):
        plain = ask(engine, grammar, "none", **options)
        for _ in range(2):
            assert same_answer(plain, ask(engine, grammar, "adaptive", **options))
        loop_of(engine).core.policy = OracleTrees(plain.token_ids, 1)  # type: ignore[assignment]
        assert same_answer(plain, ask(engine, grammar, "adaptive", **options))
        loop_of(engine).core.policy = policy
    assert_all_slots_free(engine)


def watch_verified(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], DraftTree]]:
    """What was written before each draft that an engine verifies from now on, and the draft."""
    verified: list[tuple[list[int], DraftTree]] = []
    forward = loop_of(engine).model.runner.forward

    written = Written()

    def watched(pieces: Any) -> Any:
        verified.extend((written.of(piece), piece.draft) for piece in pieces)
        return forward(pieces)

    monkeypatch.setattr(loop_of(engine).model.runner, "forward", watched)
    return verified


def matcher_of(grammar: Grammar) -> llguidance.LLMatcher:
    matcher = GrammarCompiler(ByteTokenizer(), 258, frozenset({END})).begin(grammar)._position.matcher
    assert matcher is not None
    return matcher


def assert_allowed(grammar: Grammar, written: list[int], draft: DraftTree) -> None:
    """Every path of a draft fits the grammar behind what was written."""
    matcher = matcher_of(grammar)
    assert matcher.consume_tokens(written)
    paths: list[list[int]] = [[]]
    for parent, token in zip(draft.parents, draft.tokens, strict=True):
        paths.append([*paths[parent + 1], token])
        assert matcher.validate_tokens(paths[-1]) == len(paths[-1])


def test_drafts_that_the_grammar_refuses_are_never_verified(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine("llama")
    verified = watch_verified(engine, monkeypatch)
    ask(engine, None, "adaptive", "s")
    refused = max((draft for _, draft in verified), key=len)
    with pytest.raises(AssertionError):
        assert_allowed(RECORD, [], refused)
    verified.clear()
    for _ in range(3):
        ask(engine, RECORD, "adaptive", "s")
    assert sum(len(draft) for _, draft in verified) > 50
    for written, draft in verified:
        assert_allowed(RECORD, written, draft)


def test_forced_tokens_save_forward_passes(make_engine: MakeEngine) -> None:
    text = "nothing like this was written before: " * 3
    engine = make_engine("llama")
    for start_after in (None, engine.decode(ask(engine, None, "none").token_ids[5:7])):
        grammar = Grammar(regex=re.escape(text), start_after=start_after)
        plain, drafted = ask(engine, grammar, "none"), ask(engine, grammar, CopySpecDrafter(min_match_tokens=64))
        assert same_answer(plain, drafted)
        assert plain.text.endswith(text)
        assert plain.draft_stats.num_forward_passes == len(plain.token_ids)
        free = len(plain.token_ids) - len(text)
        assert drafted.draft_stats.num_forward_passes <= free + 3


def test_a_draft_stays_within_the_options_and_the_room(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine("llama")
    verified = watch_verified(engine, monkeypatch)
    grammar = Grammar(regex="x{300}")
    assert len(ask(engine, grammar, AdaptiveDrafter(max_draft_tokens=7)).token_ids) == 200
    assert max(len(draft) for _, draft in verified) == 7
    verified.clear()
    assert len(ask(engine, grammar, "adaptive", max_tokens=30).token_ids) == 30
    assert sum(len(draft) + 1 for _, draft in verified) == 30


class Spy:
    """A matcher that must not be asked for anything once it has stopped, but to take tokens back."""

    grammar_from_json_schema = llguidance.LLMatcher.grammar_from_json_schema
    grammar_from_regex = llguidance.LLMatcher.grammar_from_regex
    grammar_from_lark = llguidance.LLMatcher.grammar_from_lark
    num_masks = num_stopped = 0

    def __init__(self, *args: Any, real: Any = None, **options: Any) -> None:
        self._real = real or REAL(*args, **options)

    def __getattr__(self, name: str) -> Any:
        if name not in ("is_stopped", "rollback", "is_error", "get_error"):
            assert not self._real.is_stopped(), name
        Spy.num_masks += name == "unsafe_compute_mask_ptr"
        return getattr(self._real, name)

    def is_stopped(self) -> bool:
        Spy.num_stopped += self._real.is_stopped()
        return bool(self._real.is_stopped())

    def deep_copy(self) -> Spy:
        return Spy(real=self._real.deep_copy())


REAL = llguidance.LLMatcher


def test_a_terminated_matcher_is_never_asked(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llguidance, "LLMatcher", Spy)
    engine = make_engine("llama")
    for grammar, _ in VALID:
        for drafter in ("none", "adaptive", "copyspec"):
            for _ in range(2):
                ask(engine, grammar, drafter, "s", temperature=1.0, seed=1)
    assert Spy.num_masks > 100
    assert Spy.num_stopped > 20


def test_an_answer_that_may_go_on_ends_with_an_end_of_sequence_token(make_engine: MakeEngine) -> None:
    engine = make_engine("llama")
    answers = [ask(engine, Grammar(regex="[a-d]*"), "adaptive", temperature=1.5, seed=n) for n in range(5)]
    assert all(answer.token_ids[-1] == END and answer.finish_reason == "stop" for answer in answers)
    assert ask(engine, Grammar(regex="ab"), "none").token_ids == ids_of("ab")  # no end token where nothing can follow


def test_grammars_and_free_answers_run_together_and_over_sessions(make_engine: MakeEngine) -> None:
    engine = make_engine("qwen2", max_running=4, max_prefill_tokens=16)
    grammars = [None, *(grammar for grammar, _ in VALID)] * 2
    alone = [ask(engine, grammar, "none", temperature=0.9, seed=n, max_tokens=60) for n, grammar in enumerate(grammars)]
    handles = [
        engine.stream(
            GenerationRequest(
                prompt_token_ids=PROMPT,
                grammar=grammar,
                session_id="ab"[n % 2],
                sampling=SamplingParams(max_tokens=60, temperature=0.9, seed=n),
            )
        )
        for n, grammar in enumerate(grammars)
    ]
    for expected, handle in zip(alone, handles, strict=True):
        assert same_answer(expected, handle.result())
    again = ask(engine, RECORD, "adaptive", "a")
    assert again.usage.cached_tokens > 0
    assert same_answer(again, ask(engine, RECORD, "none"))
    assert_all_slots_free(engine)


def test_stop_texts_and_max_tokens_cut_as_ever(make_engine: MakeEngine) -> None:
    engine = make_engine("llama")
    whole = ask(engine, RECORD, "none")
    for drafter in ("none", "adaptive"):
        stopped = ask(engine, RECORD, drafter, stop='"kind"')
        assert stopped.text == whole.text[: whole.text.index('"kind"')]
        assert stopped.finish_reason == "stop"
        cut = ask(engine, RECORD, drafter, max_tokens=10)
        assert (cut.token_ids, cut.finish_reason) == (whole.token_ids[:10], "length")
        full = ask(engine, RECORD, drafter, max_tokens=len(whole.token_ids))
        assert (full.text, full.finish_reason) == (whole.text, "stop")


def test_a_cancelled_answer_leaves_nothing_behind(make_engine: MakeEngine) -> None:
    engine = make_engine("llama")
    request = GenerationRequest(
        prompt_token_ids=PROMPT, grammar=Grammar(regex="[a-z]{400}"), drafter=AdaptiveDrafter(max_draft_tokens=2)
    )
    stream = engine.stream(request)
    next(stream)
    engine.cancel(request.request_id)
    assert stream.result().finish_reason == "cancelled"
    assert same_answer(ask(engine, RECORD, "adaptive"), ask(engine, RECORD, "none"))
    assert_all_slots_free(engine)


def test_an_error_in_one_grammar_fails_that_request_alone(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine("llama")
    expected = ask(engine, RECORD, "none")
    masks = GrammarState.masks

    def failing(state: GrammarState, draft: DraftTree) -> torch.Tensor:
        if state is broken:
            raise RuntimeError("the parser is too complex")
        return masks(state, draft)

    monkeypatch.setattr(GrammarState, "masks", failing)
    begin, broken = GrammarCompiler.begin, None

    def breaking(compiler: GrammarCompiler, grammar: Grammar) -> GrammarState:
        nonlocal broken
        state = begin(compiler, grammar)
        broken = state if grammar.regex else broken
        return state

    monkeypatch.setattr(GrammarCompiler, "begin", breaking)
    handles = [
        engine.stream(
            GenerationRequest(prompt_token_ids=PROMPT, grammar=grammar, sampling=SamplingParams(max_tokens=200))
        )
        for grammar in (RECORD, Grammar(regex="[ab]{50}"), RECORD)
    ]
    with pytest.raises(RequestFailedError, match="too complex"):
        handles[1].result()
    assert all(same_answer(expected, handles[n].result()) for n in (0, 2))
    assert_all_slots_free(engine)


# ---- free text before the grammar ------------------------------------------------------------------------------


def scripted(reply: str, grammar: Grammar, prompt: str, drafter: Any) -> GenerationOutput:
    with scripted_engine([reply], EngineConfig(model="scripted", step_cost=((1, 1.0), (200, 1.1)))) as engine:
        return engine.generate(GenerationRequest(prompt=prompt, grammar=grammar, drafter=drafter))


@pytest.mark.parametrize("drafter", ["none", "adaptive", "copyspec"])
def test_the_grammar_begins_behind_the_marker(drafter: str) -> None:
    thoughts = 'A record: {"name" perhaps? </thin </think'
    reply = thoughts + '></think>{"name":"bo","age":7,"kind":"cat"} and more'
    grammar = RECORD.model_copy(update={"start_after": "</think>"})
    answer = scripted(reply, grammar, "Think. " + reply, drafter)
    assert answer.text.startswith(thoughts + ">")
    text = answer.text.partition("</think>")[2]
    assert Record.model_validate_json(text.removeprefix("</think>"))
    assert answer.finish_reason == "stop"
    assert scripted("no record at all", grammar, "Think.", drafter).text == "no record at all"


def test_a_marker_in_the_middle_of_an_accepted_draft_starts_the_grammar_there() -> None:
    grammar = Grammar(regex="[0-9]{4}", start_after="</think>")
    reply = "the answer lies in the sum of the parts</think>12 is what they say"
    plain, drafted = (scripted(reply, grammar, reply, drafter) for drafter in ("none", "adaptive"))
    assert same_answer(plain, drafted)
    assert re.fullmatch(r"the answer .*</think>12[0-9]{2}", drafted.text)
    lengths = drafted.draft_stats.accepted_lengths
    ends = [sum(lengths[: n + 1]) + n + 1 for n in range(len(lengths))]
    inside = len("the answer lies in the sum of the parts</think>1")
    assert inside not in ends  # the grammar began within a draft, which went on behind the marker


def test_tokens_that_would_run_over_the_marker_are_refused_unless_they_fit() -> None:
    class Tokenizer(ByteTokenizer):
        """Bytes, and some longer tokens."""

        longer = (b"k>", b">12", b">x", b"think>9", b"ink>x3")

        def grammar_tokenizer(self, vocab_size: int, eos_token_ids: Any) -> Any:
            class Vocabulary:
                tokens = [*(bytes([n]) for n in range(256)), b"<|a|>", b"<|b|>", *self.longer]  # noqa: RUF012
                special_token_ids = (256, 257)
                bos_token_id, eos_token_id = None, 257

                def __call__(self, text: Any) -> list[int]:
                    return list(text.encode() if isinstance(text, str) else text)

            return llguidance.LLTokenizer(
                llguidance.TokenizerWrapper(Vocabulary()), n_vocab=vocab_size, eos_token=list(eos_token_ids)
            )

    compiler = GrammarCompiler(Tokenizer(), 270, frozenset({257}))
    grammar = Grammar(regex="[0-9]{3}", start_after="<think>")

    def allowed(written: list[int]) -> list[int]:
        state = compiler.begin(grammar)
        state.advance(written)
        kept = masked_by(torch.zeros(1, 270), state.masks(DraftTree()))[0]
        return [token for token in range(270) if kept[token] == 0.0]

    everything = list(range(270))
    assert allowed([]) == everything
    assert allowed(list(b"<thin")) == everything
    assert allowed(list(b"<think")) == [token for token in everything if token != 260]
    assert allowed(list(b"<th")) == [token for token in everything if token != 262]
    state = compiler.begin(grammar)
    state.advance([ord("<"), 261])  # "<", "think>9": one digit is written
    state.advance(list(b"12"))
    assert state.is_terminated
    state = compiler.begin(grammar)
    tree = DraftTree((259, 260, ord("5"), ord("x"), ord("7"), 258), (-1, -1, 0, 0, 2, 2))
    state.advance(list(b"<think"))
    pruned = state.prune(tree, 10)
    assert (pruned.tokens, pruned.parents) == ((259, ord("5")), (-1, 0))  # ">12", "5": nothing can follow


# ---- calls of functions ----------------------------------------------------------------------------------------

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "move",
            "parameters": {
                "type": "object",
                "properties": {"to": {"$ref": "#/$defs/Place"}},
                "required": ["to"],
                "additionalProperties": False,
                "$defs": {"Place": {"type": "integer", "minimum": 0, "maximum": 9}},
            },
        },
    },
    {"type": "function", "function": {"name": "wait"}},
]
MOVE, WAIT = '{"name":"move","arguments":{"to":4}}', '{"name": "wait", "arguments": {}}'
CALLS = f"<tool_call>\n{MOVE}\n</tool_call>"


@pytest.mark.parametrize("drafter", ["none", "adaptive"])
def test_calls_are_written_as_they_are_meant(drafter: str) -> None:
    both = f"{CALLS}\n<tool_call>{WAIT}</tool_call>"
    mixed = f"I move. {CALLS} and wait {CALLS}. Done."
    for tool_choice, reply in (("required", both), ("auto", both), ("auto", mixed), ("move", CALLS), ("auto", "No.")):
        grammar = Grammar(tools=ToolCalls(tools=TOOLS, tool_choice=tool_choice))
        answer = scripted(reply, grammar, reply if drafter == "adaptive" else "Call!", drafter)
        assert answer.text == reply, tool_choice
        assert answer.finish_reason == "stop"
    single = Grammar(tools=ToolCalls(tools=TOOLS, parallel=False))
    assert scripted(mixed, single, mixed, drafter).text == f"I move. {CALLS}"


@pytest.mark.parametrize("drafter", ["none", "adaptive"])
def test_calls_that_are_wrong_cannot_be_written(drafter: str) -> None:
    wrong = CALLS.replace("4", "47")
    free = scripted("Fly! " + wrong + " so.", Grammar(tools=ToolCalls(tools=TOOLS[:1])), wrong, drafter)
    begun, _, rest = free.text.partition("<tool_call>")
    assert begun == "Fly! "
    assert json.loads(rest.partition("</tool_call>")[0])["arguments"] == {"to": 4}
    unknown = f"I fly. {CALLS.replace('move', 'fly')}"
    assert scripted(unknown, Grammar(tools=ToolCalls(tools=TOOLS)), unknown, drafter).text == unknown
    forced = Grammar(tools=ToolCalls(tools=TOOLS, tool_choice="wait", parallel=False))
    answer = scripted("I would rather not.", forced, wrong, drafter)
    assert json.loads(answer.text.removeprefix("<tool_call>").removesuffix("</tool_call>"))["name"] == "wait"


# ---- a tokenizer of a checkpoint -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled() -> Iterator[Engine]:
    with Engine(EngineConfig(model="bundled", step_cost=((1, 1.0), (8, 1.3), (64, 2.4)), max_model_len=512)) as engine:
        yield engine


def chat(engine: Engine, grammar: Any, drafter: str, **options: Any) -> GenerationOutput:
    document = '[\n  {"name": "Bo", "age": 41, "kind": "cat"},\n  {"name": "Al", "age": 7, "kind": "dog"}\n]'
    return engine.generate(
        GenerationRequest(
            messages=[{"role": "user", "content": document}, {"role": "user", "content": "Repeat the document."}],
            grammar=grammar,
            drafter=drafter,
            sampling=SamplingParams(max_tokens=120, **options),
        )
    )


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "seeded"])
def test_the_bundled_model_copies_json_under_a_schema(bundled: Engine, sampling: dict[str, Any]) -> None:
    schema = {"type": "array", "items": Record.model_json_schema(), "minItems": 2, "maxItems": 2}
    plain, drafted = (chat(bundled, Grammar(json_schema=schema), name, **sampling) for name in ("none", "adaptive"))
    assert same_answer(plain, drafted)
    assert drafted.draft_stats.num_forward_passes < plain.draft_stats.num_forward_passes / 2
    assert [Record.model_validate(record) for record in json.loads(drafted.text)]


def test_the_bundled_model_calls_functions_with_its_own_markers(bundled: Engine) -> None:
    tools = ToolCalls(tools=TOOLS, tool_choice="required", parallel=False)
    plain, drafted = (chat(bundled, Grammar(tools=tools), name) for name in ("none", "adaptive"))
    assert same_answer(plain, drafted)
    marker = bundled.encode("<tool_call>", special_tokens=False)
    assert drafted.token_ids[: len(marker)] == tuple(marker)
    assert drafted.finish_reason == "stop"


def test_text_that_looks_like_a_special_token_stays_text(bundled: Engine) -> None:
    text = "say <|im_end|> and <tool_call> twice"
    plain, drafted = (chat(bundled, Grammar(choice=(text,)), name) for name in ("none", "adaptive"))
    assert same_answer(plain, drafted)
    assert drafted.text == text


def test_openai_formats_are_understood(bundled: Engine) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"const": True}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    wrapped = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    assert json.loads(chat(bundled, wrapped, "adaptive").text) == {"ok": True}
    request = GenerationRequest(prompt="x", grammar={"type": "json_object"})
    assert request.grammar == Grammar(json_object=True)
    assert chat(bundled, {"type": "json_object"}, "adaptive").text.startswith("{")
    assert GenerationRequest(prompt="x", grammar={"type": "text"}).grammar is None
    named = ToolCalls(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "wait"}})
    assert named.tool_choice == "wait"


# ---- what cannot work ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar(regex="("), "llguidance refuses.*unclosed group"),
        (Grammar(lark="start: nothing"), "llguidance refuses.*unknown name"),
        (Grammar(lark="start: A\nA: /a/ & /b/"), "no text fits"),
        (Grammar(json_schema={"type": "objekt"}), "Got type='objekt' but expected one of null, boolean"),
        (Grammar(json_schema={"not": {"const": 1}}), "Got not=.* in the JSON schema but grammars cannot express it"),
    ],
)
def test_a_grammar_that_cannot_be_read_fails_at_submit(make_engine: MakeEngine, grammar: Grammar, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        make_engine("llama").stream(GenerationRequest(prompt="x", grammar=grammar))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Grammar, "Got no grammar but expected exactly one of json_schema"),
        (lambda: Grammar(regex="a", choice=("b",)), "Got regex and choice but expected exactly one"),
        (lambda: Grammar(choice=("a", "")), "at least one character"),
        (lambda: Grammar(json_schema={"enum": [{1}]}), "json_schema"),
        (lambda: ToolCalls(tools=TOOLS, tool_choice="fly"), "Got tool_choice='fly' but expected auto, required or one"),
        (lambda: ToolCalls(tools=TOOLS, tool_choice={"type": "x"}), "Got tool_choice={'type': 'x'}"),
        (lambda: ToolCalls(tools=[{"name": "x"}]), "Got tool {'name': 'x'} but expected"),
        (lambda: ToolCalls(tools=[TOOLS[1], TOOLS[1]]), "different names"),
        (lambda: ToolCalls(tools=[{"function": {"name": "x", "parameters": "y"}}]), "Got parameters='y'"),
        (lambda: Grammar(start_after="x", tools=ToolCalls(tools=TOOLS)), "Got start_after='x' with tool_choice='auto'"),
        (lambda: GenerationRequest(prompt="x", grammar={"type": "json_schema"}), "Got grammar=.* but expected a Gram"),
        (
            lambda: GenerationRequest(prompt="x", grammar=RECORD, sampling=SamplingParams(ignore_eos=True)),
            "Got ignore_eos=True with a grammar",
        ),
    ],
)
def test_options_that_cannot_work_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_without_llguidance_the_error_says_what_to_install(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **options: Any) -> Any:
        if name == "llguidance":
            raise ImportError(name)
        return real(name, *args, **options)

    engine = make_engine("llama")
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(CopySpecError, match=r'pip install "copyspec\[grammar\]"'):
        engine.stream(GenerationRequest(prompt="x", grammar=RECORD))


def test_a_model_without_an_end_token_takes_no_grammar() -> None:
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        GrammarCompiler(ByteTokenizer(), 258, frozenset()).begin(RECORD)


# ---- parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [5, 32, 40, 64, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bitmask_refuses_zeros_and_whatever_lies_beyond_it(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    bitmask = torch.randint(-(2**31), 2**31, (3, 2), generator=generator).to(torch.int32)
    logits = torch.randn((3, width), generator=generator).to(dtype)
    masked = masked_by(logits, bitmask)
    assert masked.dtype == dtype
    for node in range(3):
        for token in range(width):
            allowed = token < 64 and (int(bitmask[node, token // 32]) >> token % 32) & 1
            assert masked[node, token] == (logits[node, token] if allowed else -torch.inf)
    assert torch.equal(_unpacked_octets(bitmask.view(torch.uint8)), _unpacked(bitmask))  # as on a GPU


def test_every_end_token_may_end_an_answer_and_ids_without_a_token_are_never_allowed(bundled: Engine) -> None:
    ends = {bundled.encode(name)[0] for name in ("<|im_end|>", "<|endoftext|>")}
    width = loop_of(bundled).model.runner.vocab_size + 50
    state = GrammarCompiler(loop_of(bundled).model.tokenizer, width, frozenset(ends)).begin(Grammar(regex="(.|\n)*"))
    kept = masked_by(torch.zeros(1, width), state.masks(DraftTree()))[0] == 0.0
    assert all(kept[end] for end in ends)
    assert int(kept.sum()) > 3000
    assert not kept[-50:].any()
    for end in ends:
        assert state.prune(DraftTree.chain((end, end)), 2).tokens == (end,)


@pytest.mark.parametrize("reply", ['{"x": 1}', '<tool_call>{"name": "f", "arguments": {}}</tool_call>', "Well, no."])
def test_with_an_answers_schema_the_answer_is_calls_or_that(reply: str) -> None:
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    tools = ({"type": "function", "function": {"name": "f"}},)
    grammar = Grammar(tools=ToolCalls(tools=tools, answer_schema=schema))
    with scripted_engine(lambda _: reply) as engine:
        request = GenerationRequest(prompt="go", grammar=grammar, sampling=SamplingParams(max_tokens=60))
        assert (engine.generate(request).text == reply) == (reply != "Well, no.")
    with pytest.raises(ConfigError, match="answer_schema with tool_choice='required'"):
        ToolCalls(tools=tools, answer_schema=schema, tool_choice="required")


def test_a_lenient_grammar_leaves_out_what_cannot_be_expressed() -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    with scripted_engine(lambda _: "[1, 2]") as engine:
        with pytest.raises(ConfigError, match="uniqueItems"):
            engine.generate(GenerationRequest(prompt="go", grammar=Grammar(json_schema=schema)))
        assert (
            engine.generate(GenerationRequest(prompt="go", grammar=Grammar(json_schema=schema, lenient=True))).text
            == "[1, 2]"
        )


def test_white_space_in_json_comes_to_an_end() -> None:
    state = GrammarCompiler(ByteTokenizer(), 258, frozenset({END})).begin(Grammar(json_object=True))
    for text, kept in (("{\r\n" + " " * 40 + '"', 44), ("{" + " " * 99, 41), ("{" + "\n" * 99, 3)):
        assert len(state.prune(DraftTree.chain(ids_of(text)), 0)) == kept


def test_masks_do_not_depend_on_what_was_asked_before() -> None:
    compiler = GrammarCompiler(ByteTokenizer(), 258, frozenset({END}))
    asked, fresh = compiler.begin(RECORD), compiler.begin(RECORD)
    rng = random.Random(3)
    for token in ids_of('{"name":"bo","age":7,"kind":"dog"}'):
        tokens = tuple(rng.choice(b'{"nameb:,7}') for _ in range(12))
        tree = DraftTree(tokens, tuple(rng.randrange(-1, node) for node in range(12)))
        tree = asked.prune(tree, 40)
        masks = asked.masks(tree)
        assert masks.shape == (1 + len(tree), (258 + 31) // 32)
        assert torch.equal(masks[:1], fresh.masks(DraftTree()))
        asked.advance((token,))
        fresh.advance((token,))
    assert asked.is_terminated
    assert fresh.is_terminated
    with pytest.raises(RuntimeError, match="does not allow it here"):
        asked.advance((32,))


def test_parts_of_a_tree_keep_what_is_known_of_their_nodes() -> None:
    import numpy as np

    tree = DraftTree((5, 6, 7, 8), (-1, 0, 0, 2), np.array([0.9, 0.5, 0.3, 0.2]), np.array([4, 5, 6, 7]))
    kept = tree.kept((0, 2, 3))
    assert (kept.tokens, kept.parents) == ((5, 7, 8), (-1, 0, 1))
    assert (kept.probabilities.tolist(), kept.sources.tolist()) == ([0.9, 0.3, 0.2], [4, 6, 7])
    joined = kept.joined(-1, (5, 7, 9, 9, 9), 5)
    assert (joined.tokens, joined.parents) == ((5, 7, 8, 9, 9), (-1, 0, 1, 1, 3))
    assert joined.probabilities.tolist() == [1.0, 1.0, 0.2, 1.0, 1.0]
    assert joined.sources.tolist() == [4, 6, 7, FORCED, FORCED]
    assert joined.joined(2, (1,), 6).probabilities[-1] == 0.2
    plain = DraftTree.chain((1, 2)).joined(1, (3,), 9)
    assert (plain.tokens, plain.parents, len(plain.probabilities)) == ((1, 2, 3), (-1, 0, 1), 0)
