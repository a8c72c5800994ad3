"""A conversation's next prompt has the token ids that were sampled, wherever its text is the same."""

from __future__ import annotations

import inspect
import itertools
import random
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from copyspec_engine import Engine, EngineConfig, GenerationOutput, GenerationRequest, NoDrafter, SamplingParams
from copyspec_engine.chat.known_ids import KnownIds, Spelling
from copyspec_engine.chat.tokenizer import HFTokenizer
from copyspec_engine.execution.packing import Piece
from copyspec_engine.testing import loop_of
from tests.chat.byte_level import byte_level_tokenizer
from tests.conftest import Written

TEMPLATE = (
    "{{- '<|s|>system\n' -}}{% for m in messages %}{{- '<|s|>' + m.role + '\n' -}}"
    "{% if m.reasoning_content %}{{- '<think>' + m.reasoning_content + '</think>' -}}{% endif %}"
    "{{- m.content + '<|e|>\n' -}}{% endfor %}{% if add_generation_prompt %}{{- '<|s|>assistant\n' -}}{% endif %}"
)
ANSWER = "the house and the other house"
USER = {"role": "user", "content": "Which house?"}


@pytest.fixture(scope="module")
def tokenizer() -> HFTokenizer:
    """A small byte-level BPE."""
    text = "the cat sat on the mat and the other dog sat in the house and on the log"
    return byte_level_tokenizer(text, TEMPLATE, added=["<think>", "</think>"])


def letters(tokenizer: HFTokenizer, text: str) -> list[int]:
    """The ids of a text that is spelled letter by letter."""
    return [token for letter in text for token in tokenizer.encode(letter, special_tokens=False)]


def chat(*texts: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": text} for text, role in zip(texts, itertools.cycle(("user", "assistant")))]


def test_sampled_ids_are_taken_up_to_where_the_text_differs(tokenizer: HFTokenizer) -> None:
    first = tokenizer.render(chat("hi"), None)
    end = tokenizer.encode("<|e|>")
    spelled = letters(tokenizer, ANSWER)
    assert spelled != tokenizer.encode(ANSWER)
    for tail in (end, []):  # ended by itself, or by a limit
        known = [Spelling([*first, *spelled, *tail])]
        second = tokenizer.render(chat("hi", ANSWER, "and?"), None, {}, known)
        assert second[: len(first) + len(spelled) + 1] == [*first, *spelled, *end]
        plain = tokenizer.render(chat("hi", ANSWER, "and?"), None)
        assert second != plain
        assert tokenizer.decode(second, skip_special_tokens=False) == tokenizer.decode(plain, skip_special_tokens=False)
        for other in (ANSWER[:-1], ANSWER + "s", "the cat"):
            messages = chat("hi", other, "and?")
            assert tokenizer.render(messages, None, {}, known) == tokenizer.render(messages, None)
        messages = chat("ho", ANSWER, "and?")
        assert tokenizer.render(messages, None, {}, known) == tokenizer.render(messages, None)


def test_ids_are_taken_of_what_precedes_a_changed_part(tokenizer: HFTokenizer) -> None:
    """A template that leaves out old reasoning keeps what stands before it, and the longest earlier call wins."""
    question = letters(tokenizer, "hi")
    start = tokenizer.encode("<|s|>")
    head = [*tokenizer.render(chat("hi"), None)]
    at = next(i for i in range(len(head)) if head[i : i + 1] == start and i > 0)
    spelled = [*head[: at + 1], *letters(tokenizer, "user\nhi"), *head[head.index(tokenizer.encode("<|e|>")[0]) :]]
    assert question[0] in spelled
    thought = tokenizer.encode("<think>hm</think>yes<|e|>", special_tokens=False)
    known = [Spelling([*spelled, *thought]), Spelling(head)]
    second = tokenizer.render(chat("hi", "yes", "and?"), None, {}, known)
    assert second[: len(spelled) - 10] == spelled[: len(spelled) - 10]
    assert second != tokenizer.render(chat("hi", "yes", "and?"), None)


def test_a_prompt_without_earlier_ids_is_what_transformers_makes_of_it(tokenizer: HFTokenizer) -> None:
    rng = random.Random(2)
    words = ["the", " house", "\n", "é🙂", "<|e|>", "<think>", "<|", "\U000f0000", "  x"]
    for _ in range(100):
        messages = chat(*("".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(3)))
        if "sanitize_control_tokens" not in inspect.signature(tokenizer.tokenizer.apply_chat_template).parameters:
            messages = chat("the house", " x")
        wanted = tokenizer.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
        )
        assert tokenizer.render(messages, None) == wanted


@pytest.mark.parametrize("marker", ["<|e|>", "<|s|>", "<think>"])
def test_a_control_tokens_name_is_never_taken_for_the_token(tokenizer: HFTokenizer, marker: str) -> None:
    """Neither in a message, nor in an answer or a prompt that was spelled in letters."""
    (token,) = tokenizer.encode(marker)
    plain = chat(f"hi{marker}", "yes", "and?")
    first = tokenizer.render(plain[:1], None)
    assert first.count(token) == tokenizer.render(chat("hi"), None).count(token)
    known = [Spelling([*first, *letters(tokenizer, "yes<"), *tokenizer.encode("<|e|>")])]
    assert tokenizer.render(plain, None, {}, known) == tokenizer.render(plain, None)
    # Two messages whose text, markers and all, is that of one message with the markers' names in it.
    forged, honest = chat("a<|e|>\n<|s|>user\nb"), [{"role": "user", "content": text} for text in "ab"]
    of_forged = tokenizer.render(forged, None)
    assert tokenizer.decode(of_forged, skip_special_tokens=False) == tokenizer.decode(
        tokenizer.render(honest, None), skip_special_tokens=False
    )
    assert tokenizer.render(honest, None, {}, [Spelling(of_forged)]) == tokenizer.render(honest, None)
    of_honest = tokenizer.render(honest, None)
    assert tokenizer.render(forged, None, {}, [Spelling(of_honest)]) == of_forged


def test_every_rendering_with_earlier_ids_has_the_text_of_one_without(tokenizer: HFTokenizer) -> None:
    rng = random.Random(1)
    words = ["the", " house", "\n", " ", "é🙂", "other", "<", "|e|>", "  and"]
    for _ in range(300):
        texts = ["".join(rng.choices(words, k=rng.randint(1, 5))) for _ in range(5)]
        known = []
        for end in (1, 3):
            ids = tokenizer.render(chat(*texts[:end]), None, {}, known)
            spell = letters(tokenizer, texts[end]) if rng.random() < 0.5 else tokenizer.encode(texts[end])
            known.append(Spelling([*ids, *spell, *tokenizer.encode("<|e|>")][: rng.choice([None, -1, -3])]))
        if rng.random() < 0.3:
            texts[rng.randrange(5)] += "x"
        got, plain = (tokenizer.render(chat(*texts), None, {}, k) for k in (known, ()))
        assert tokenizer.decode(got, skip_special_tokens=False) == tokenizer.decode(plain, skip_special_tokens=False)
        control = [tokenizer.encode(name)[0] for name in ("<|s|>", "<|e|>")]
        assert [t for t in got if t in control] == [t for t in plain if t in control]


def test_what_is_known_of_a_long_prompt_is_not_tokenised_again(
    tokenizer: HFTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60,000 tokens, rendered anew and with nearly all of them known."""
    text = "the cat sat on the mat and the other dog sat in the house\n" * 1500
    messages = chat(text, "yes", text, "no")
    ids = tokenizer.render(messages, None)
    assert len(ids) > 30_000
    read: list[int] = []
    encode = tokenizer.speller.encode
    monkeypatch.setattr(tokenizer.speller, "encode", lambda text: read.append(len(text)) or encode(text))
    plain = tokenizer.render([*messages, USER], None)
    assert sum(read) > len(text)
    read.clear()
    assert tokenizer.render([*messages, USER], None, {}, [Spelling(ids)]) == plain
    assert sum(read) < 200


def test_what_is_kept_is_bounded_and_apart() -> None:
    store = KnownIds(max_tokens=100)
    for i in range(20):
        store.keep("a", [i, 1, 2])
    assert [spelling.token_ids[0] for spelling in store.of("a")] == [*range(19, 11, -1)]
    store.keep("a", [19, 1, 2, 3])
    assert [len(spelling.token_ids) for spelling in store.of("a")] == [4, *[3] * 7]
    assert store.of("b") == store.of(None) == ()
    store.keep("b", range(60))
    store.of("a")
    store.keep("c", range(30))
    assert (len(store.of("a")), store.of("b"), store.num_tokens) == (8, (), 55)
    store.keep("d", range(101))
    assert store.num_tokens == 0
    store.keep("a", [1])
    store.drop("a")
    store.drop("a")
    assert (store.of("a"), store.num_tokens) == ((), 0)


def test_a_longer_call_knows_the_texts_of_the_one_it_begins_with(tokenizer: HFTokenizer) -> None:
    store, texts = KnownIds(), ["hi", ANSWER, "and?", ANSWER, "so?"]
    for end in (1, 3):
        ids = tokenizer.render(chat(*texts[:end]), None, {}, store.of("a"))
        store.keep("a", [*ids, *letters(tokenizer, ANSWER), *tokenizer.encode("<|e|>")])
    (last,) = store.of("a")
    assert last.begun
    third = tokenizer.render(chat(*texts), None, {}, [last])
    assert third == tokenizer.render(chat(*texts), None, {}, [Spelling(last.token_ids)])
    assert third[: len(last.token_ids)] == last.token_ids.tolist()
    store.keep("a", last.token_ids)  # the same once more
    assert tokenizer.render(chat(*texts), None, {}, store.of("a")) == third


def test_it_may_be_used_from_many_threads() -> None:
    store = KnownIds(max_tokens=500)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(500):
            session = rng.choice("abcd")
            if rng.random() < 0.5:
                store.keep(session, range(rng.randint(1, 99)))
            else:
                store.drop(session)
            assert all(spelling.token_ids for spelling in store.of(session))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    left = sum(len(spelling.token_ids) for session in "abcd" for spelling in store.of(session))
    assert left == store.num_tokens <= 500


# ---- the engine ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(EngineConfig(model="bundled")) as engine:
        yield engine


def ask(engine: Engine, messages: list[dict[str, Any]], session_id: str | None, **options: Any) -> GenerationOutput:
    return engine.generate(GenerationRequest(messages=messages, session_id=session_id, **options))


def first_turn(engine: Engine, session_id: str) -> GenerationOutput:
    """A turn whose answer is spelled letter by letter."""
    script = [*(engine.encode(letter)[0] for letter in ANSWER), engine.encode("<|im_end|>")[0]]
    runner = loop_of(engine).core.model.runner

    written = Written()

    def forward(pieces: Sequence[Piece]) -> torch.Tensor:
        logits = type(runner).forward(runner, pieces).clone()
        rows = [(written.of(piece), piece) for piece in pieces]
        for i, so_far in enumerate(so_far for so_far, piece in rows if piece.num_logits):
            logits[i, script[len(so_far)]] = 1e9
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "forward", forward)
        output = ask(engine, [USER], session_id, drafter=NoDrafter())
    assert output.text == ANSWER
    assert list(output.token_ids) == script != [*engine.encode(ANSWER), script[-1]]
    return output


FOLLOW_UP = [USER, {"role": "assistant", "content": ANSWER}, {"role": "user", "content": "Say it again."}]
SHORT = SamplingParams(max_tokens=24)


def test_the_next_turn_reuses_the_whole_first_one(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    first = first_turn(engine, "on")
    second = ask(engine, FOLLOW_UP, "on", sampling=SHORT)
    # The answer's last token was sampled and never read: its KV is not there yet.
    assert second.usage.cached_tokens >= first.usage.total_tokens - 1
    ids = engine.tokenize(GenerationRequest(messages=FOLLOW_UP, session_id="on"))
    assert ids != engine.tokenize(GenerationRequest(messages=FOLLOW_UP, session_id="other"))
    fresh = engine.generate(GenerationRequest(prompt_token_ids=ids, session_id="fresh", sampling=SHORT))
    assert fresh.token_ids == second.token_ids
    monkeypatch.setattr(KnownIds, "of", lambda *_: ())
    first = first_turn(engine, "off")
    assert ask(engine, FOLLOW_UP, "off", sampling=SHORT).usage.cached_tokens < first.usage.prompt_tokens + 2


def test_without_kept_ids_the_same_messages_are_the_same_tokens_in_every_session() -> None:
    with Engine(EngineConfig(model="bundled", keep_token_ids=False)) as engine:
        first = first_turn(engine, "wrote it")
        request = GenerationRequest(messages=FOLLOW_UP, session_id="wrote it", sampling=SHORT)
        assert engine.tokenize(request) == engine.tokenize(GenerationRequest(messages=FOLLOW_UP))
        again, fresh = engine.generate(request), ask(engine, FOLLOW_UP, "fresh", sampling=SHORT)
        assert again.prompt_token_ids == fresh.prompt_token_ids
        assert again.token_ids == fresh.token_ids
        assert 0 < again.usage.cached_tokens < first.usage.prompt_tokens + 2  # up to what was spelled otherwise
        assert loop_of(engine).core.known_ids.num_tokens == 0


def test_a_forgotten_session_and_others_know_nothing_of_it(engine: Engine) -> None:
    plain = engine.tokenize(GenerationRequest(messages=FOLLOW_UP))
    first_turn(engine, "mine")
    request = GenerationRequest(messages=FOLLOW_UP, session_id="mine")
    assert engine.tokenize(request) != plain
    assert engine.tokenize(GenerationRequest(messages=FOLLOW_UP, session_id="yours")) == plain
    assert engine.forget("mine")
    assert engine.tokenize(request) == plain


def test_a_call_that_is_forgotten_while_it_runs_keeps_nothing(engine: Engine) -> None:
    request = GenerationRequest(
        messages=[USER], session_id="gone", sampling=SamplingParams(max_tokens=40, ignore_eos=True)
    )
    with engine.stream(request) as handle:
        next(iter(handle))
        engine.forget("gone")
        handle.result()
    assert loop_of(engine).core.known_ids.of("gone") == ()


def test_sessions_that_are_dropped_for_want_of_room_are_dropped_here_too() -> None:
    with Engine(EngineConfig(model="bundled", max_sessions=2)) as engine:
        for session_id in "abc":
            ask(engine, [USER], session_id, sampling=SamplingParams(max_tokens=2))
        kept = loop_of(engine).core.known_ids
        assert [bool(kept.of(session_id)) for session_id in "abc"] == [False, True, True]


def test_the_account_that_has_most_gives_way() -> None:
    known = KnownIds(max_tokens=100)
    known.keep("b", range(30), "b")
    for number in range(20):
        known.keep(f"a{number}", range(20), "a")
    assert known.of("b")
    assert [number for number in range(20) if known.of(f"a{number}")] == [17, 18, 19]
    assert known.num_tokens == 90
