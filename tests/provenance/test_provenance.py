"""Where an answer's copied tokens came from is true to the token, and to the character."""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoTokenizer

import copyspec_engine
from copyspec_engine import (
    AdaptiveDrafter,
    ConfigError,
    ConversationMemory,
    CopiedSpan,
    Copy,
    CopySpecDrafter,
    Engine,
    EngineConfig,
    EngineStoppedError,
    Explanation,
    GenerationOutput,
    GenerationRequest,
    Grammar,
    NoDrafter,
    SamplingParams,
)
from copyspec_engine.chat.tokenizer import HFTokenizer
from copyspec_engine.provenance.explain import _contents, _marked, _texts
from copyspec_engine.provenance.trail import find_around
from copyspec_engine.testing import loop_of, scripted_engine
from copyspec_engine.values.outputs import NOT_COPIED

DOCUMENT = "The quick brown fox jumps over the lazy dog, and the dog, being lazy, does not mind this at all; nor do I."
TEMPLATES = sorted((Path(__file__).parents[1] / "data" / "chat_templates").glob("*.jinja"))
WORDS = ("fox", "über", "dog", "the", "quick", "日本", "brown", "jumps", "\n", "a")


def messages(*texts: str) -> tuple[dict[str, str], ...]:
    return tuple({"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts))


def ask(engine: Engine, *texts: str, **options: Any) -> tuple[GenerationRequest, GenerationOutput]:
    request = GenerationRequest(messages=messages(*texts), **{"session_id": "s", **options})
    return request, engine.generate(request)


def sources(output: GenerationOutput) -> set[str]:
    return {copy.source for copy in output.copies}


def source_tokens(engine: Engine, request: GenerationRequest, output: GenerationOutput, copy: Copy) -> list[int]:
    """The tokens at the place that a copy names."""
    assert copy.offset is not None
    if copy.source == "prompt":
        text: Sequence[int] = output.prompt_token_ids
    elif copy.source == "answer":
        assert copy.offset < copy.start
        text = output.token_ids
    elif copy.source == "prediction":
        text = engine.encode(request.prediction or "", special_tokens=False)
    else:
        assert request.session_id is not None
        stored = {text.number: text.token_ids for text in engine.memory(request.session_id).texts()}
        text = stored[copy.stored_text or 0]
        around = [*copy.before, *text[copy.offset : copy.offset + copy.stop - copy.start], *copy.after]
        assert tuple(around[len(copy.before) :]) == text[copy.offset :][: len(around) - len(copy.before)]
    return list(text[copy.offset : copy.offset + copy.stop - copy.start])


def check(engine: Engine, request: GenerationRequest, output: GenerationOutput) -> None:
    """The laws that hold for every answer."""
    end = 0
    for copy in output.copies:
        assert end <= copy.start < copy.stop <= len(output.token_ids)
        end = copy.stop
        assert 0 <= copy.text_start <= copy.text_stop <= len(output.text)
        if copy.source in ("grammar", "frequent", "recycled", "pool"):
            assert copy.offset is copy.stored_text is None
            assert copy.before == copy.after == ()
        else:
            copied = list(output.token_ids[copy.start : copy.stop])
            assert source_tokens(engine, request, output, copy) == copied
    assert sum(copy.stop - copy.start for copy in output.copies) == output.draft_stats.num_accepted_tokens
    copied_parts = [copy for copy in output.copies if copy.source not in NOT_COPIED]
    written = "".join(output.text[copy.text_start : copy.text_stop] for copy in copied_parts)
    assert written == "".join(segment.text for segment in output.segments if segment.copied)
    for source in sources(output):
        told = "".join(output.text[copy.text_start : copy.text_stop] for copy in output.copies if copy.source == source)
        assert told == "".join(segment.text for segment in output.segments if segment.source == source)
    check_explanation(request, output, engine.explain(request, output))


def check_explanation(request: GenerationRequest, output: GenerationOutput, explanation: Explanation) -> None:
    assert "".join(text for text, _ in explanation.pieces()) == explanation.text == output.text
    assert Explanation.from_list(output.text, json.loads(json.dumps(explanation.to_list()))) == explanation
    end = 0
    for span in explanation.spans:
        assert end <= span.start < span.stop <= len(output.text)
        end = span.stop
        if span.offset is not None:
            assert source_text(request, output, span)[span.offset :][: span.stop - span.start] == text_of(output, span)
    covered = {at for span in explanation.spans for at in range(span.start, span.stop)}
    copied_parts = [copy for copy in output.copies if copy.source not in NOT_COPIED]
    assert covered >= {at for copy in copied_parts for at in range(copy.text_start, copy.text_stop)}


def source_text(request: GenerationRequest, output: GenerationOutput, span: CopiedSpan) -> str:
    """The text in which a span has its place."""
    if span.message is None:
        return {"prompt": request.prompt, "answer": output.text, "prediction": request.prediction}[span.source] or ""
    assert request.messages is not None
    content = request.messages[span.message]["content"]
    return str(content) if isinstance(content, str) else "".join(part["text"] for part in content)


def text_of(output: GenerationOutput, span: CopiedSpan) -> str:
    return output.text[span.start : span.stop]


@pytest.mark.parametrize("drafter", [AdaptiveDrafter(), CopySpecDrafter()])
def test_copies_stand_where_they_are_said_to(drafter: AdaptiveDrafter | CopySpecDrafter) -> None:
    chance, seen = random.Random(0), set[str]()
    for _ in range(8):
        text = " ".join(chance.choices(WORDS, k=60))
        cuts = [(chance.randrange(40), chance.randrange(100, 300)) for _ in range(4)]
        replies = [text[first:stop] + chance.choice(["", text]) for first, stop in cuts]
        with scripted_engine(replies, EngineConfig(drafter=drafter)) as engine:
            history: list[str] = []
            for reply in replies:
                if chance.random() < 0.3:
                    history.clear()
                history.append(chance.choice([text, "again", " what?\n"]))
                stop = (text[200:204],) if chance.random() < 0.3 else ()
                prediction = text if chance.random() < 0.3 else None
                asked = ask(engine, *history, prediction=prediction, sampling=SamplingParams(stop=stop))
                check(engine, *asked)
                seen |= sources(asked[1])
                assert reply.startswith(asked[1].text)
                history.append(asked[1].text)
    assert seen >= {"prompt", "answer"}


def test_a_document_in_a_message_is_named_by_message_and_character() -> None:
    with scripted_engine([DOCUMENT[4:]]) as engine:
        request, output = ask(engine, "a", "Hello.", f"  {DOCUMENT}\n")
        check(engine, request, output)
        long = [span for span in engine.explain(request, output).spans if span.stop - span.start > 16]
        assert {(span.message, (span.offset or 0) - span.start) for span in long} == {(2, 6)}
        assert engine.explain(request, output).copied_share > 0.8


def test_text_parts_count_as_one_content() -> None:
    with scripted_engine([DOCUMENT]) as engine:
        parts = [{"type": "text", "text": DOCUMENT[:40]}, {"type": "text", "text": DOCUMENT[40:]}]
        request = GenerationRequest(messages=[{"role": "user", "content": parts}])
        output = engine.generate(request)
        check(engine, request, output)
        spans = engine.explain(request, output).spans
        assert {(span.message, span.offset == span.start) for span in spans if span.source == "prompt"} == {(0, True)}


def test_what_is_only_in_memory_is_named_as_such() -> None:
    with scripted_engine(["Yes.", DOCUMENT, DOCUMENT]) as engine:
        ask(engine, DOCUMENT)
        _, output = asked = ask(engine, "Again?")
        check(engine, *asked)
        assert "earlier_prompt" in sources(output)
        assert not any(copy.source == "prompt" and copy.stop - copy.start > 3 for copy in output.copies)
        spans = [span for span in engine.explain(*asked).spans if span.source == "earlier_prompt"]
        assert all(span.message is span.offset is None for span in spans)
        assert any(span.before.endswith("user\n") or DOCUMENT.find(span.before[-20:]) >= 0 for span in spans)
        _, output = asked = ask(engine, "And again?")
        check(engine, *asked)
        assert "earlier_answer" in sources(output)


def test_an_earlier_answer_that_is_in_the_prompt_is_a_message() -> None:
    with scripted_engine([DOCUMENT, DOCUMENT]) as engine:
        ask(engine, "Say something.")
        asked = ask(engine, "Say something.", DOCUMENT, "Again!")
        check(engine, *asked)
        spans = engine.explain(*asked).spans
        assert {span.message for span in spans if span.stop - span.start > 16} == {1}


def test_the_answers_own_words_and_predictions_and_strangers_are_told_apart() -> None:
    pangram = "Sphinx of black quartz, judge my vow! "
    with scripted_engine([pangram * 4, DOCUMENT, "-", DOCUMENT]) as engine:
        _, output = asked = ask(engine, "Talk.", session_id="a")
        check(engine, *asked)
        assert max(copy.stop - copy.start for copy in output.copies if copy.source == "answer") > 16
        _, output = asked = ask(engine, "Talk.", session_id="b", prediction=DOCUMENT)
        check(engine, *asked)
        assert max(copy.stop - copy.start for copy in output.copies if copy.source == "prediction") > 16
        ask(engine, DOCUMENT, session_id="c", memory_pool="p")
        _, output = asked = ask(engine, "Talk.", session_id="d", memory_pool="p")
        check(engine, *asked)
        assert max(copy.stop - copy.start for copy in output.copies if copy.source == "pool") > 16


SECRET = "The vault code is 8714-2290-5531, and the alarm is off from two to three; Ann holds the second key."


@pytest.mark.parametrize("session_ids", [("a", "b"), ("a", None), (None, None), (None, "b")])
def test_a_pool_tells_no_one_what_others_have_put_in(session_ids: tuple[str | None, str | None]) -> None:
    reply = f"Well: {SECRET[:40]} I do not know {SECRET[8:60]} or so."
    with scripted_engine(["ok", reply]) as engine:
        ask(engine, SECRET, session_id=session_ids[0], memory_pool="team")
        request, output = asked = ask(engine, "And?", session_id=session_ids[1], memory_pool="team", explain=True)
        check(engine, *asked)
        told = [span for span in engine.explain(request, output).spans if span.source == "pool"]
        assert sum(span.stop - span.start for span in told) > 40
        assert all(span == CopiedSpan(span.start, span.stop, "pool") for span in told)
        everything = repr(output) + repr(engine.explain(request, output)) + repr(engine.metrics())
        assert not any(secret in everything for secret in ("two to three", "Ann", "second key"))


def test_a_session_without_texts_in_a_pool_is_one_of_its_strangers() -> None:
    with scripted_engine(["ok", SECRET]) as engine:
        ask(engine, SECRET, session_id="a", memory_pool="team", keep_texts=False)
        _, output = asked = ask(engine, "And?", session_id="a", memory_pool="team", keep_texts=False)
        check(engine, *asked)
        assert "pool" in sources(output)
        assert not any(source.startswith("earlier") for source in sources(output) - {"earlier_prompt"})


def test_what_a_grammar_forces_is_named_as_such() -> None:
    with scripted_engine(['{"colour":"green"}'] * 2) as engine:
        schema = {"type": "object", "properties": {"colour": {"type": "string"}}, "required": ["colour"]}
        grammar = Grammar(json_schema={**schema, "x-guidance": {"whitespace_flexible": False}})
        _, output = asked = ask(engine, "Which?", grammar=grammar)
        check(engine, *asked)
        assert "grammar" in sources(output)
        assert output.copied_share == 0
        assert "grammar" in {segment.source for segment in output.segments}


def test_raw_prompts_are_sources_too() -> None:
    with scripted_engine([DOCUMENT]) as engine:
        request = GenerationRequest(prompt=f"Text: {DOCUMENT}\nText: ")
        output = engine.generate(request)
        check(engine, request, output)
        spans = [span for span in engine.explain(request, output).spans if span.source == "prompt"]
        assert {(span.message, (span.offset or 0) - span.start) for span in spans} == {(None, 6)}


def test_nothing_drafted_is_nothing_copied() -> None:
    with scripted_engine([DOCUMENT]) as engine:
        asked = ask(engine, DOCUMENT, drafter=NoDrafter())
        assert asked[1].copies == ()
        assert engine.explain(*asked) == Explanation(DOCUMENT, ())


def test_streams_and_batches_say_the_same() -> None:
    def reply(prompt: str) -> str:
        return DOCUMENT + prompt[20:60]

    questions = [f"{DOCUMENT[i:]} {i}" for i in range(6)]
    with scripted_engine(reply) as engine:
        alone = [engine.generate(GenerationRequest(messages=messages(text))) for text in questions]
    with scripted_engine(reply) as engine:
        handles = [engine.stream(GenerationRequest(messages=messages(text))) for text in questions]
        together = [list(handle)[-1].output for handle in handles]
    for one, other in zip(alone, together, strict=True):
        assert other is not None
        assert one.token_ids == other.token_ids
        cover = [{at for copy in out.copies for at in range(copy.start, copy.stop)} for out in (one, other)]
        assert len(cover[1]) == other.draft_stats.num_accepted_tokens
        places = [{(copy.source, (copy.offset or 0) - copy.start) for copy in out.copies} for out in (one, other)]
        assert places[1] <= places[0] | {
            (source, -copy.start) for copy in other.copies for source in ("frequent", "recycled")
        }


def test_places_hold_while_calls_share_a_small_memory_that_forgets() -> None:
    chance = random.Random(1)
    texts = [" ".join(chance.choices(WORDS, k=120)) for _ in range(6)]

    def reply(prompt: str) -> str:
        first = sum(prompt.encode()) % 6
        return texts[first][first:] + texts[first - 1] * 2

    config = EngineConfig(model="scripted", memory_tokens=4096, kv_cache_tokens=40_000)
    with scripted_engine(reply, config) as engine:
        for turn in range(3):
            requests = [
                GenerationRequest(
                    messages=messages(chance.choice(texts), "Yes.", f"{chance.choice(texts)} {turn} {i}"),
                    session_id=chance.choice("ab"),
                    memory_pool=chance.choice(("p", None)),
                    prediction=chance.choice((*texts, None)),
                )
                for i in range(6)
            ]
            for request, handle in [(request, engine.stream(request)) for request in requests]:
                output = handle.result()
                calls_own = [copy for copy in output.copies if copy.source in ("prompt", "answer", "prediction")]
                for copy in calls_own:
                    copied = list(output.token_ids[copy.start : copy.stop])
                    assert source_tokens(engine, request, output, copy) == copied
                covered = sum(copy.stop - copy.start for copy in output.copies)
                assert covered == output.draft_stats.num_accepted_tokens
                check_explanation(request, output, engine.explain(request, output))
        assert len(calls_own) > 1


async def test_an_explanation_comes_with_the_answer_if_asked_for() -> None:
    with scripted_engine(lambda _: DOCUMENT) as engine:
        asked = GenerationRequest(messages=messages(DOCUMENT), explain=True)
        outputs = [engine.generate(asked), await engine.agenerate(asked), list(engine.stream(asked))[-1].output]
        for output in outputs:
            assert output is not None
            assert output.explanation == engine.explain(asked, output) != Explanation(DOCUMENT, ())
        assert ask(engine, DOCUMENT)[1].explanation is None


def test_an_explanation_that_fails_costs_no_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> Explanation:
        raise ArithmeticError("no idea")

    with scripted_engine([DOCUMENT]) as engine:
        monkeypatch.setattr(engine, "explain", fail)
        with engine.stream(GenerationRequest(messages=messages(DOCUMENT), explain=True)) as handle:
            output = handle.result()
            assert (output.text, output.explanation) == (DOCUMENT, None)
            assert handle.result() == output
    assert "could not be resolved" in caplog.text


def test_erased_texts_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Erasing in the middle of an answer leaves no stored text in what the answer says of itself."""
    secret = "The password is swordfish, and nobody else must ever hear of it, whatever they offer."
    with scripted_engine(lambda prompt: secret * 3 if "Say" in prompt else "No.") as engine:
        ask(engine, secret + " Keep it.")
        forward, passes, forgotten = loop_of(engine).model.runner.forward, itertools.count(), threading.Event()

        def held(*args: Any) -> Any:
            assert next(passes) < 2 or forgotten.wait(30)  # the answer must not be over before it is forgotten
            return forward(*args)

        monkeypatch.setattr(loop_of(engine).model.runner, "forward", held)
        handle = engine.stream(GenerationRequest(messages=messages("Say it."), session_id="s"))
        next(handle)
        done = threading.Thread(target=engine.forget, args=("s",))
        done.start()
        time.sleep(0.5)  # until it waits for the step to end
        forgotten.set()
        done.join()
        output = [chunk.output for chunk in handle][-1]
        assert output is not None
        assert not any(copy.before or copy.after for copy in output.copies if copy.source == "earlier_prompt")
        assert sum(copy.stop - copy.start for copy in output.copies) == output.draft_stats.num_accepted_tokens
        assert len(engine.memory("s")) == 0
        _, output = ask(engine, "Say it again.")
        assert not any(source.startswith("earlier") for source in sources(output))


def test_find_around_prefers_the_place_with_more_of_the_surroundings() -> None:
    tokens = np.array([1, 2, 3, 9, 7, 2, 3, 4, 8, 2, 3], dtype=np.int64)
    text = np.array([7, 2, 3, 4], dtype=np.int64)
    assert find_around(tokens, text, 1, 3) == (5, 4)
    assert find_around(tokens, text[1:3].copy(), 0, 2) == (9, 2)
    assert find_around(tokens, np.array([5, 5]), 0, 2) == (-1, 0)


def test_a_memory_can_be_looked_at_taken_along_and_cleared(tmp_path: Path) -> None:
    config = EngineConfig(model="scripted", memory_path=str(tmp_path / "memory"))
    with scripted_engine(["Yes."], config) as engine:
        memory = engine.memory("s")
        assert (len(memory), memory.num_tokens, memory.num_bytes, memory.texts()) == (0, 0, 0, ())
        ask(engine, DOCUMENT)
        assert [text.kind for text in memory.texts()] == ["prompt", "answer"]
        assert memory.texts()[0].text == f"<|im_start|>user\n{DOCUMENT}<|im_end|>\n<|im_start|>assistant\n"
        assert memory.num_tokens == sum(len(text.token_ids) for text in memory.texts()) < memory.num_bytes
        exported = json.loads(memory.export())
        assert [text["text"] for text in exported["texts"]] == [text.text for text in memory.texts()]
    with scripted_engine([DOCUMENT], config) as engine:  # it is only on disk now
        memory = engine.memory("s")
        assert [text["text"] for text in exported["texts"]] == [text.text for text in memory.texts()]
        _, output = asked = ask(engine, "Again!")
        check(engine, *asked)
        assert "earlier_prompt" in sources(output)
        assert memory.clear()
        assert not memory.clear()
        assert len(memory) == len(engine.memory("never seen")) == 0
        assert engine.metrics().num_sessions == 0
    with pytest.raises(EngineStoppedError):
        memory.texts()


def told(memory: ConversationMemory) -> list[tuple[str, tuple[int, ...], str]]:
    return [(text.kind, text.token_ids, text.text) for text in memory.texts()]


def test_a_memory_can_be_handed_over(tmp_path: Path) -> None:
    config = EngineConfig(model="scripted", memory_path=str(tmp_path / "memory"), memory_tokens=4096)
    with scripted_engine([DOCUMENT, "ok"]) as engine:
        ask(engine, "Write.", prediction="A sphinx of black quartz.")
        ask(engine, "Judge my vow.")
        texts, exported = told(engine.memory("s")), engine.memory("s").export()
        assert {kind for kind, _, _ in texts} == {"prompt", "answer", "prediction"}
        assert engine.memory("s").load(exported) == 0
    with scripted_engine(["-", DOCUMENT], config) as engine:
        ask(engine, "Hello.", session_id="s")
        own = told(engine.memory("s"))
        assert engine.memory("s").load(exported, owner="ann") == len(texts)
        assert engine.memory("s").load(exported) == 0
        assert told(engine.memory("s")) == own + texts
        assert engine.memory("new").load(exported, owner="ann") == len(texts)
        assert [(info.session_id, info.owner) for info in engine.sessions()] == [("s", None), ("new", "ann")]
        _, output = asked = ask(engine, "Again!", session_id="new")
        check(engine, *asked)
        assert max(copy.stop - copy.start for copy in output.copies if copy.source == "earlier_answer") > 16
        long = json.loads(exported) | {
            "texts": [{"kind": "answer", "token_ids": [number] * 1000} for number in range(40, 50)]
        }
        assert 0 < engine.memory("long").load(json.dumps(long)) == len(engine.memory("long")) < 10
        kept = told(engine.memory("long"))
        assert kept[-1][1] == (49,) * 1000
        assert engine.memory("long").num_tokens <= 4096
    with scripted_engine([], config) as engine:  # it is only on disk now
        assert told(engine.memory("s")) == own + texts
        assert told(engine.memory("long")) == kept


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda _: "{", "the JSON of `export`"),
        (lambda _: "[]", "an object with fingerprint and texts"),
        (lambda export: export | {"texts": {}}, "an object with fingerprint and texts"),
        (
            lambda export: export | {"fingerprint": {"tokenizer": "x"}},
            "Got an export with tokenizer 'x' but the model's",
        ),
        (
            lambda export: export | {"fingerprint": export["fingerprint"] | {"template": 5}},
            "Got an export with template 5 but the model's",
        ),
        (lambda export: export | {"texts": [*export["texts"], 5]}, r"texts\[2\] with kind=None"),
        (lambda export: export | {"texts": [{"kind": [], "token_ids": [1]}]}, r"texts\[0\] with kind=\[\]"),
        (lambda export: export | {"texts": [{"kind": "answer", "token_ids": []}]}, "a list of at least one id"),
        (lambda export: export | {"texts": [{"kind": "answer", "token_ids": [1, 258]}]}, "token id 258 but expected"),
        (lambda export: export | {"texts": [{"kind": "answer", "token_ids": [True]}]}, "token id True but expected"),
    ],
)
def test_what_is_no_export_of_the_model_is_refused_whole(change: Callable[[Any], Any], says: str) -> None:
    with scripted_engine(["Yes."]) as engine:
        ask(engine, "Hello.")
        changed = change(json.loads(engine.memory("s").export()))
        with pytest.raises(ConfigError, match=says) as caught:
            engine.memory("other").load(changed if isinstance(changed, str) else json.dumps(changed))
        assert caught.value.param == "exported"
        assert [info.session_id for info in engine.sessions()] == ["s"]


def test_the_real_tokenizer_and_template_give_true_places(make_bundled: Callable[[], Engine]) -> None:
    engine = make_bundled()
    lines = "name,price\napples,3\npears,4\nplums,12\n"
    document, question = messages(lines)[0], {"role": "user", "content": "Repeat the document."}
    request = GenerationRequest(messages=[document, question], session_id="s")
    output = engine.generate(request)
    assert output.text.strip() == lines.strip()
    check(engine, request, output)
    explanation = engine.explain(request, output)
    assert {span.message for span in explanation.spans if span.stop - span.start > 9} == {0}
    engine.forget("s")


@pytest.fixture(scope="module")
def make_bundled() -> Callable[[], Engine]:
    from copyspec_engine import EngineConfig, shared_engine

    return lambda: shared_engine(EngineConfig(model="bundled"))


@pytest.mark.parametrize(
    ("content", "is_marked"),
    [
        ("{{ m.content }}", True),
        ("{{ m.content | trim }}", True),
        ("{{ m.content.split('</think>')[-1] }}", True),  # as many do with earlier answers
        ("{{ '!' if m.content[-1] == '.' }}{{ m.content }}", False),
    ],
)
def test_contents_are_found_whatever_a_template_does_to_them(content: str, is_marked: bool) -> None:
    plain = AutoTokenizer.from_pretrained(Path(copyspec_engine.__file__).parent / "bundled" / "model")
    plain.chat_template = "{% for m in messages %}[{{ m.role }}]" + content + "{% endfor %}[assistant]"
    tokenizer = HFTokenizer(plain)
    said = messages("user", "<think>A user.</think> It is a user. ", "  Who?\n", "user", "A user.")
    request = GenerationRequest(messages=said)
    rendered = tokenizer.decode(tokenizer.render(said, None), skip_special_tokens=False)
    parts = _contents(tokenizer, request, said, rendered)
    assert [part.message for part in parts] == [0, 1, 2, 3, 4]
    for part in parts:
        assert part.message is not None
        there = said[part.message]["content"][part.offset :][: part.stop - part.start]
        assert rendered[part.start : part.stop] == there
        assert len(there) >= len("user")
    if is_marked:
        assert all(rendered[: part.start].endswith(("]", "] ", "]\n")) for part in parts)


@pytest.mark.parametrize("path", TEMPLATES, ids=[path.stem for path in TEMPLATES])
def test_contents_are_found_in_every_familys_template(path: Path) -> None:
    plain = AutoTokenizer.from_pretrained(Path(copyspec_engine.__file__).parent / "bundled" / "model")
    plain.chat_template = path.read_text()
    tokenizer = HFTokenizer(plain)
    said = messages("user", "<think>\nA user?\n</think>\n\nIt is a user.", " Who?\n")
    rendered = tokenizer.decode(tokenizer.render(said, None), skip_special_tokens=False)
    texts = list(_texts(said))
    parts = _marked(tokenizer, GenerationRequest(messages=said), texts, rendered)
    assert parts is not None
    assert sorted(part.message or 0 for part in parts) == [0, 1, 2]
    for part in parts:
        there = said[part.message or 0]["content"][part.offset :][: part.stop - part.start]
        assert rendered[part.start : part.stop] == there
        assert there.strip() in (texts[part.message or 0].text, "It is a user.")


def test_an_explanation_can_be_printed() -> None:
    with scripted_engine([DOCUMENT, "Yes. " + DOCUMENT]) as engine:
        asked = ask(engine, DOCUMENT)
        console = Console(record=True, width=200)
        console.print(engine.explain(*asked))
        shown = console.export_text()
        assert DOCUMENT[:30] in shown.replace("[1]", "")
        assert "message 0, from character" in shown
