"""An answer's text goes on where its prompt ends, whatever the tokenizer does with the beginnings of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from copyspec_engine import Engine, EngineConfig, GenerationRequest, SamplingParams
from copyspec_engine.chat.detokenizer import answer_stream
from copyspec_engine.chat.tokenizer import HFTokenizer
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.execution.packing import Piece
from copyspec_engine.testing import loop_of, scripted_engine
from tests.conftest import Written

SPACE = "\u2581"
KINDS = ("legacy", "first", "always", "never")
MERGES = ["t h", "th e", f"{SPACE} the", "r o", "ro o", "roo m", f"{SPACE} room", "i s", f"{SPACE} is"]
TEMPLATE = "<s>{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"


@lru_cache
def tokenizer_of(kind: str, *, ends: bool = False) -> HFTokenizer:
    """A small tokenizer of the sentencepiece kind: Llama 2's normalizer, or Metaspace with a scheme.

    Args:
        kind: one of `KINDS`.
        ends: it also appends the end-of-sequence token to a text.
    """
    specials = ["<unk>", "<s>", "</s>", "<|endoftext|>"]
    letters = [
        SPACE,
        *"theromisa",
        "is",
        "the",
        "room",
        "th",
        "ro",
        "roo",
        *(f"{SPACE}{w}" for w in ("the", "room", "is")),
    ]
    pieces = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(letters)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [(one, other) for one, other in (merge.split(" ") for merge in MERGES)]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    if kind == "legacy":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
        strip = decoders.Strip(" ", 1, 0)
        backend.decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), strip]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=kind, split=False)
        metaspace = decoders.Metaspace(replacement=SPACE, prepend_scheme=kind)
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace])
    backend.add_special_tokens(specials)
    single = "<s> $A </s>" if ends else "<s> $A"
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )
    return HFTokenizer(fast)


def ids(kind: str, *pieces: str) -> list[int]:
    vocabulary = tokenizer_of(kind).vocabulary()
    return [vocabulary[piece] for piece in pieces]


def streamed(kind: str, prompt: Sequence[int], answer: Sequence[int], stop: Sequence[str] = ()) -> str:
    """The text of an answer to a raw prompt, as it comes token by token."""
    request = GenerationRequest(prompt_token_ids=list(prompt))
    stream = answer_stream(tokenizer_of(kind), request, prompt, stop)
    got = [segment.text for token in answer for segment in stream.push(token)]
    return "".join(got + [segment.text for segment in stream.flush()])


@pytest.mark.parametrize("kind", KINDS)
def test_a_continuation_keeps_its_first_space(kind: str) -> None:
    prompt = tokenizer_of(kind).encode("the room")
    assert streamed(kind, prompt, ids(kind, f"{SPACE}is", f"{SPACE}the")) == " is the"
    assert streamed(kind, prompt, ids(kind, "is")) == "is"
    assert streamed(kind, prompt, ids(kind, SPACE, f"{SPACE}is")) == "  is"


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_space_of_an_answer_to_messages_is_the_decoders(kind: str) -> None:
    request = GenerationRequest(messages=[{"role": "user", "content": "hi"}])
    tokenizer = tokenizer_of(kind)
    for parse_reply in (False, True):
        asked = request.model_copy(update={"parse_reply": parse_reply})
        stream = answer_stream(tokenizer, asked, tokenizer.encode("the room"))
        answer = ids(kind, f"{SPACE}is", f"{SPACE}the")
        got = "".join(segment.text for token in answer for segment in stream.push(token))
        assert got == tokenizer.decode(answer)


@pytest.mark.parametrize("kind", KINDS)
def test_stop_texts_hold_over_the_first_space(kind: str) -> None:
    prompt, answer = tokenizer_of(kind).encode("the room"), ids(kind, f"{SPACE}is", f"{SPACE}the")
    assert streamed(kind, prompt, answer, [" is"]) == ""
    assert streamed(kind, prompt, answer, ["is t"]) == " "
    assert streamed(kind, prompt, answer, [" the"]) == " is"


WORDS = ["the", "room", "is", f"{SPACE}the", f"{SPACE}room", f"{SPACE}is", SPACE, "<s>", "</s>", "a"]
BYTES = ["<0xC3>", "<0xA9>", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>"]


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    prompt=st.lists(st.sampled_from(WORDS), min_size=1, max_size=40),
    answer=st.lists(st.sampled_from(WORDS), max_size=12),
)
@example(kind="legacy", prompt=["<s>", "a", *["</s>"] * 20], answer=[f"{SPACE}is"])
def test_an_answers_text_is_that_of_prompt_and_answer_without_the_prompts(
    kind: str, prompt: list[str], answer: list[str]
) -> None:
    tokenizer = tokenizer_of(kind)
    before, behind = ids(kind, "a", *prompt), ids(kind, *answer)
    assert tokenizer.decode(before) + streamed(kind, before, behind) == tokenizer.decode(before + behind)


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    prompt=st.lists(st.sampled_from(WORDS + BYTES), min_size=1, max_size=12),
    answer=st.lists(st.sampled_from(WORDS + BYTES), max_size=12),
)
@example(kind="legacy", prompt=["<0xC3>", "<0xA9>", "<0xC3>"], answer=[f"{SPACE}the"])
def test_bytes_that_are_no_text_cost_no_letters_and_no_spaces(kind: str, prompt: list[str], answer: list[str]) -> None:
    got = streamed(kind, ids(kind, "a", *prompt), ids(kind, *answer))
    written = "".join(piece for piece in answer if piece not in (*BYTES, "<s>", "</s>"))
    assert [letter for letter in got if letter in " aehimorst"] == list(written.replace(SPACE, " "))


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_completes_a_character_of_the_prompts(kind: str) -> None:
    prompt = ids(kind, "<s>", "a", "<0xC3>")
    assert streamed(kind, prompt, ids(kind, "<0xA9>", "a")) == "éa"
    assert streamed(kind, prompt, ids(kind, "a")) == "a"
    assert streamed(kind, prompt, []) == ""
    assert streamed(kind, prompt, ids(kind, "<0xF0>")) == "\ufffd"  # the prompt's own is not given again


# ---- what a tokenizer adds to prompts --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ends", [False, True])
def test_a_prompt_has_the_beginning_once_and_no_end(kind: str, ends: bool) -> None:
    tokenizer = tokenizer_of(kind, ends=ends)
    bare = tokenizer.encode("the room", special_tokens=False)
    begin, end = ids(kind, "<s>", "</s>")
    assert tokenizer.encode("the room") == [begin, *bare]
    written = tokenizer.encode("<s>the room")
    assert (written.count(begin), written[0], tokenizer.decode(written)) == (1, begin, "the room")
    assert tokenizer.encode("<s>the room</s>") == [*written, end]  # the caller's own
    assert tokenizer.encode("<s>") == [begin]


@pytest.mark.parametrize("single", ["$A </s>", "$A", "<s> <|endoftext|> $A </s>"])
def test_tokenizers_without_a_beginning_or_with_a_longer_one(single: str) -> None:
    backend = Tokenizer.from_str(tokenizer_of("first").backend.to_str())
    names = [("<s>", 1), ("</s>", 2), ("<|endoftext|>", 3)]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=names)
    tokenizer = HFTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    begin = [1, 3] if "<s>" in single else []
    assert tokenizer.encode("the") == [*begin, *tokenizer.encode("the", special_tokens=False)]
    assert tokenizer.encode("<s><|endoftext|>the")[:3].count(1) == 1


# ---- the engine ------------------------------------------------------------------------------------------------------


class _Script:
    """A runner that writes given ids, then the end of the sequence."""

    def __init__(self, answer: Sequence[int], vocab_size: int) -> None:
        self._answer, self.vocab_size = [*answer, 2], vocab_size
        self.num_forward_passes = 0
        self._written, self.num_rows = Written(), 0

    def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        rows = [(self._written.of(piece), piece) for piece in pieces]
        logits = [self._logits(written, piece.draft) for written, piece in rows if piece.num_logits]
        return torch.cat([torch.empty((0, self.vocab_size)), *logits])

    def _logits(self, written: list[int], draft: DraftTree) -> torch.Tensor:
        depths = [len(written)]
        for parent in draft.parents:
            depths.append(depths[parent + 1] + 1)
        logits = torch.zeros((len(depths), self.vocab_size))
        for node, depth in enumerate(depths):
            logits[node, self._answer[min(depth, len(self._answer) - 1)]] = 100.0
        return logits

    def release(self, key: str) -> None:
        """Nothing is kept."""


def engine_of(kind: str, *pieces: str) -> Engine:
    tokenizer = tokenizer_of(kind)
    with scripted_engine([]) as scripted:
        model = loop_of(scripted).model
    runner = _Script(ids(kind, *pieces), len(tokenizer.vocabulary()))
    model = replace(model, runner=runner, tokenizer=tokenizer, eos_token_ids=frozenset({2}))
    return Engine(EngineConfig(model="scripted"), model=model)


@pytest.fixture(params=KINDS)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    the, room, is_ = (SPACE + word for word in ("the", "room", "is"))
    with engine_of(request.param, is_, the, room, is_, the, room, is_) as engine:
        yield engine


TEXT = " is the room is the room is"


@pytest.mark.parametrize("drafter", ["adaptive", "copyspec", "none"])
def test_an_engine_goes_on_with_a_raw_prompt(engine: Engine, drafter: str) -> None:
    request = GenerationRequest(prompt="the room is the room", drafter=drafter, explain=True)
    chunks = list(engine.stream(request))
    output = chunks[-1].output
    assert output is not None
    assert output.text == TEXT == "".join(chunk.text for chunk in chunks)
    assert (drafter == "none") == (not output.copies)
    assert output.explanation is not None
    for span in output.explanation.spans:
        assert span.stop <= len(TEXT)
        there = {"prompt": "the room is the room", "answer": TEXT}[span.source]
        if span.offset is not None:
            assert there[span.offset : span.offset + span.stop - span.start] == TEXT[span.start : span.stop]
    given_ids = engine.generate(GenerationRequest(prompt_token_ids=output.prompt_token_ids, drafter=drafter))
    assert (given_ids.text, given_ids.token_ids) == (TEXT, output.token_ids)
    stopped = engine.generate(GenerationRequest(prompt="the room", sampling=SamplingParams(stop=(" room",))))
    assert stopped.text == " is the"


def test_an_engine_answers_messages_without_the_decoders_space(engine: Engine) -> None:
    messages = [{"role": "user", "content": "the room"}]
    for parse_reply in (False, True):
        output = engine.generate(GenerationRequest(messages=messages, parse_reply=parse_reply))
        assert output.text == engine.decode(output.token_ids)
        assert output.reply is None or output.reply.text == output.text


# ---- special tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parse_reply", [False, True])
def test_no_special_tokens_name_is_text_but_one_that_is_written_in_letters_is(parse_reply: bool) -> None:
    name = "<|endoftext|>"
    letters = [f"<0x{byte:02X}>" for byte in name.encode()]
    with engine_of("first", "a", name, "<s>", "is", *letters, "a") as engine:
        messages = [{"role": "user", "content": "hi"}]
        request = GenerationRequest(messages=messages, parse_reply=parse_reply, explain=True)
        output = engine.generate(request)
        assert output.text == f"ais{name}a"
        assert output.reply is None or output.reply.text == output.text
        sampling = SamplingParams(ignore_eos=True, max_tokens=40)
        assert engine.generate(request.model_copy(update={"sampling": sampling})).text == output.text
        for stopping in (SamplingParams(stop=(name,)), SamplingParams(stop_token_ids=(3,))):
            stopped = engine.generate(request.model_copy(update={"sampling": stopping}))
            assert (stopped.text, stopped.finish_reason) == ("a", "stop")


def test_special_tokens_that_mark_parts_are_read_as_marks() -> None:
    backend = Tokenizer.from_str(tokenizer_of("first").backend.to_str())
    backend.add_special_tokens(["<tool_call>", "</tool_call>", "<|im_start|>"])
    template = "<tool_call>{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", chat_template=template)
    tokenizer = HFTokenizer(fast)
    written = tokenizer.encode("a<tool_call>is</tool_call><|im_start|></s>the", special_tokens=False)
    texts = {}
    for special in ("none", "parts", "all"):
        stream = tokenizer.text_stream((), special=special)  # type: ignore[arg-type]
        texts[special] = "".join(s.text for token in written for s in stream.push(token))
    assert texts["none"] == "aisthe"
    assert texts["parts"] == "a<tool_call>is</tool_call>the"
    assert texts["all"] == "a<tool_call>is</tool_call><|im_start|></s>the"
    assert tokenizer.special_ids(["<tool_call>", "the"]) == set(fast.convert_tokens_to_ids(["<tool_call>"]))
