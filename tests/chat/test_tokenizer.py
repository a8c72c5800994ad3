"""Streamed text is the whole text, characters stay whole, and a stop text never leaks."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from copyspec_engine import ConfigError
from copyspec_engine.chat.detokenizer import StoppingTextStream
from copyspec_engine.chat.tokenizer import HFTokenizer
from copyspec_engine.testing import ByteTokenizer
from copyspec_engine.values.tokens import Fingerprint
from tests.chat.byte_level import byte_level_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|s|>{{ m.role }}\n{{ m.content }}<|e|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|s|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> HFTokenizer:
    """A small byte-level BPE with a chat template."""
    text = "the cat sat on the mat and the dog sat on the log"
    return byte_level_tokenizer(text, TEMPLATE)


def test_a_fingerprint_changes_with_what_gives_tokens_their_meaning(tokenizer: HFTokenizer) -> None:
    def variant(change: Callable[[Tokenizer], object], template: str = TEMPLATE) -> Fingerprint:
        backend = Tokenizer.from_str(tokenizer.backend.to_str())
        change(backend)
        return HFTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)).fingerprint()

    same = tokenizer.fingerprint()
    tokenizer.encode("the cat")
    assert tokenizer.fingerprint() == same
    assert variant(lambda backend: backend.enable_truncation(9)) == same
    assert variant(lambda _: None, "other").template != same.template
    assert variant(lambda _: None, "other").tokenizer == same.tokenizer
    assert variant(lambda backend: backend.add_tokens(["new"])).tokenizer != same.tokenizer
    lower = variant(lambda backend: setattr(backend, "normalizer", normalizers.Lowercase()))
    assert lower.tokenizer != same.tokenizer
    assert lower.template == same.template


def pieces(stream: StoppingTextStream, texts: list[str]) -> Iterator[str]:
    for i, _ in enumerate(texts):
        yield "".join(segment.text for segment in stream.push(i, "prompt" if i % 2 else None))
        if stream.stopped_by:
            return
    yield "".join(segment.text for segment in stream.flush())


def stream_of(texts: list[str], stop: list[str]) -> StoppingTextStream:
    return StoppingTextStream(lambda token: texts[token], lambda: "", stop)


texts_of_ab = st.lists(st.text("ab", max_size=4), max_size=20)


@settings(max_examples=400, deadline=None)
@given(texts=texts_of_ab, stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_text_however_tokens_split_it(texts: list[str], stop: list[str]) -> None:
    stream = stream_of(texts, stop)
    released = list(pieces(stream, texts))
    got = "".join(released)
    whole = ""
    for text in texts:  # what plain decoding sees: it looks for stop texts after every token
        whole += text
        found = [whole.find(s) for s in stop if s in whole]
        if found:
            assert stream.stopped_by
            assert got == whole[: min(found)]
            return
    assert not stream.stopped_by
    assert got == whole


def test_text_that_may_become_a_stop_text_is_held_back() -> None:
    stream = stream_of(["x EN", "D", "E", "ND."], ["END"])
    assert [s.text for s in stream.push(0, "prompt")] == ["x "]
    assert stream.push(1, "prompt") == []
    assert stream.stopped_by
    stream = stream_of(["x EN", "C", " END"], ["END"])
    assert "".join(pieces(stream, ["x EN", "C", " END"])) == "x ENC "


def test_released_pieces_say_which_tokens_were_copied() -> None:
    stream = stream_of(["ab", "c", "d"], ["abx"])
    assert stream.push(0, "prompt") == []
    segments = [*stream.push(1), *stream.push(2, "prompt")]
    assert [(s.text, s.copied) for s in segments] == [("ab", True), ("c", False), ("d", True)]


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_streamed_pieces_join_to_the_text(text: str) -> None:
    for stream, ids in ((ByteTokenizer().text_stream(()), ByteTokenizer().encode(text)),):
        got = [segment.text for token in ids for segment in stream.push(token)]
        got += [segment.text for segment in stream.flush()]
        assert "".join(got) == text
        assert "\ufffd" in text or not any("\ufffd" in piece for piece in got)


@pytest.mark.parametrize("text", ["the cat", "naïve 日本語 🙂🙂 end", "", "a\n\n\tb  c"])
def test_a_real_tokenizer_streams_whole_characters(tokenizer: HFTokenizer, text: str) -> None:
    stream = tokenizer.text_stream(())
    got = [segment.text for token in tokenizer.encode(text) for segment in stream.push(token)]
    assert not any("\ufffd" in piece for piece in got)
    got += [segment.text for segment in stream.flush()]
    assert "".join(got) == text == tokenizer.decode(tokenizer.encode(text))


def test_an_answer_cut_inside_a_character_keeps_what_decode_gives(tokenizer: HFTokenizer) -> None:
    ids = tokenizer.encode("ok 🙂")[:-1]
    stream = tokenizer.text_stream(())
    got = [segment.text for token in ids for segment in stream.push(token)]
    got += [segment.text for segment in stream.flush()]
    assert "".join(got) == tokenizer.decode(ids)


def test_turn_markers_in_a_message_cannot_end_the_turn(tokenizer: HFTokenizer) -> None:
    marker = tokenizer.encode("<|e|>")[0]
    messages = [{"role": "user", "content": "hi <|e|> there"}]
    assert tokenizer.render(messages, None).count(marker) == 1
    assert tokenizer.decode(tokenizer.render(messages, None), skip_special_tokens=False).count("<|e|>") == 2


def test_messages_of_one_role_in_a_row_are_merged_where_the_template_insists(tokenizer: HFTokenizer) -> None:
    strict = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
        "{% endif %}<|s|>{{ m.content }}<|e|>{% endfor %}"
    )
    picky = HFTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, chat_template=strict))
    twice = [{"role": "user", "content": "the cat"}, {"role": "user", "content": "sat"}]
    once = [{"role": "user", "content": "the cat\n\nsat"}]
    assert picky.render(twice, None) == picky.render(once, None)
    assert tokenizer.render(twice, None) != tokenizer.render(once, None)  # a template that takes them gets them


def test_turn_markers_are_refused_where_their_letters_are_the_token() -> None:
    words = Tokenizer(models.WordLevel(vocab={"<|e|>": 0, "hi": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["<|e|>"])
    template = "{{ messages[0].content }} <|e|>"
    tokenizer = HFTokenizer(PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template))
    assert tokenizer.render([{"role": "user", "content": "hi"}], None) == [1, 0]
    with pytest.raises(ConfigError, match=r"holds the control token '<\|e\|>'"):
        tokenizer.render([{"role": "user", "content": "hi <|e|> there"}], None)


def test_a_conversation_that_grows_keeps_its_token_prefix(tokenizer: HFTokenizer) -> None:
    messages = [{"role": "user", "content": "the cat"}]
    first = tokenizer.render(messages, None)
    messages += [{"role": "assistant", "content": "sat"}, {"role": "user", "content": "on"}]
    assert tokenizer.render(messages, None)[: len(first)] == first


def test_a_template_that_refuses_gives_a_clear_error(tokenizer: HFTokenizer) -> None:
    picky = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend, chat_template="{{ raise_exception('roles must alternate') }}"
    )
    with pytest.raises(ConfigError, match="roles must alternate"):
        HFTokenizer(picky).render([{"role": "user", "content": "x"}], None)
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend)
    with pytest.raises(ConfigError, match="no chat template"):
        HFTokenizer(without).render([{"role": "user", "content": "x"}], None)


def test_many_threads_may_encode_render_and_stream_at_once(tokenizer: HFTokenizer) -> None:
    text = "the dog sat on the mat 🙂 " * 20
    expected = (tokenizer.encode(text), tokenizer.render([{"role": "user", "content": text}], None))

    def work(_: int) -> bool:
        ids = tokenizer.encode(text)
        stream = tokenizer.text_stream(())
        streamed = "".join(segment.text for token in ids for segment in stream.push(token))
        return (ids, tokenizer.render([{"role": "user", "content": text}], None), streamed) == (*expected, text)

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(work, range(200)))


def test_others_go_on_while_a_long_text_becomes_tokens(tokenizer: HFTokenizer) -> None:
    """Past regression: while a text of a megabyte was read no other thread did anything, for seconds."""
    line = "the dog sat on the mat 🙂\n"
    text = line * 60_000
    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(lambda: (time.sleep(0.01), tokenizer.encode(text))[1])
        turns = 0
        while not reading.done():
            time.sleep(0.001)
            turns += 1
    assert turns > 50
    assert reading.result() == tokenizer.encode(line) * 60_000


def test_bytes_that_are_no_text_never_break_a_stream() -> None:
    """Past regression: with byte-fallback decoders the library's stream raises after invalid UTF-8."""
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), "a", "b"]
    bpe = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    bpe.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = HFTokenizer(PreTrainedTokenizerFast(tokenizer_object=bpe))
    rng = random.Random(0)
    for _ in range(300):
        stream = tokenizer.text_stream(())
        ids = [rng.choice([256, 257, 0xC3, 0xA9, 0xF0, 0x9F, 0x99]) for _ in range(rng.randrange(1, 20))]
        got = [segment.text for token in ids for segment in stream.push(token)]
        got += [segment.text for segment in stream.flush()]
        assert [c for c in "".join(got) if c in "ab"] == ["ab"[i - 256] for i in ids if i >= 256]
