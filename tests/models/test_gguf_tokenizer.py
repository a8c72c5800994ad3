"""Tokenizers out of GGUF files: text is cut as the file names it, and control tokens are found whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from copyspec_engine.models.gguf_file import GgufFile
from copyspec_engine.models.gguf_tokenizer import build_tokenizer, end_tokens
from copyspec_engine.values.errors import ModelLoadError, UnsupportedModelError

BYTES = list(bytes_to_unicode().values())
MERGES = ["1 2", "12 3", "123 4", "Ġ Ġ", "Ġ a", "a b", "ab c", "Ġa b", "Ġ 1", "Ċ Ċ", "' s", "A B"]
CONTROL = ["<|start|>", "<|im_end|>"]
ODD = [
    "",
    " ",
    "a",
    "  12  345\n\n\t 6",
    "👩‍👩‍👧 naïve\r\n\n x",
    "trailing   ",
    "it's IT'S ab'c",
    "<|start|>ab<|im_end|>\n",
    "日本語 text, ABab",
    "\u00a0a\u200bb",
]


def file_of(**values: Any) -> GgufFile:
    metadata = {"general.architecture": values.pop("architecture", "llama")}
    metadata |= {f"tokenizer.{'' if key == 'chat_template' else 'ggml.'}{key}": value for key, value in values.items()}
    return GgufFile((Path("m.gguf"),), metadata, ())


def byte_level(pre: str, **values: Any) -> GgufFile:
    normal = [*BYTES, *(merge.replace(" ", "") for merge in MERGES)]
    options: dict[str, Any] = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*normal, *CONTROL, "<think>"],
        "token_type": [1] * len(normal) + [3, 3, 4],
        "merges": MERGES,
        "eos_token_id": len(normal) + 1,
        "bos_token_id": len(normal),
    }
    return file_of(**{**options, **values})


PIECES = ["▁", "bc", "▁a", "ab", "▁ab", "a", "b", "c", "▁▁", "\n", "▁▁▁", "x"]


def sentencepiece(**values: Any) -> GgufFile:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES, "<|user|>", "<|end|>"]
    options: dict[str, Any] = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-float(i) for i in range(len(PIECES))] + [0.0] * 2,
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(PIECES) + [3, 3],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return file_of(**{**options, **values})


def pieces(file: GgufFile, text: str) -> list[str]:
    tokenizer = build_tokenizer(file)
    return tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize(
    ("pre", "text", "cut"),
    [
        ("smollm", "  12", ["ĠĠ", "1", "2"]),
        ("gpt-2", "  12", ["Ġ", "Ġ", "12"]),
        ("llama-bpe", "1234", ["123", "4"]),
        ("llama-bpe", "  12", ["Ġ", "Ġ", "12"]),
        ("qwen2", "1234", ["1", "2", "3", "4"]),
        ("tekken", "ABab", ["AB", "ab"]),
        ("gpt-4o", "ab's", ["ab", "'s"]),
        ("llama-bpe", "\n\nab", ["ĊĊ", "ab"]),
    ],
)
def test_text_is_cut_as_the_file_names_it(pre: str, text: str, cut: list[str]) -> None:
    assert pieces(byte_level(pre), text) == cut


def test_qwen_2_is_cut_as_by_transformers_own_tokenizer() -> None:
    normal = [*BYTES, *(merge.replace(" ", "") for merge in MERGES)]
    own: Any = Qwen2Tokenizer
    expected = own(
        vocab={token: i for i, token in enumerate([*normal, *CONTROL])},
        merges=[tuple(merge.split(" ")) for merge in MERGES],
        unk_token=None,
        eos_token=CONTROL[1],
        pad_token=None,
        additional_special_tokens=CONTROL,
    )
    got = build_tokenizer(byte_level("qwen2"))
    for text in [*ODD, "e\u0301"]:
        assert got.encode(text) == expected.encode(text), text


@pytest.mark.parametrize(
    "file", [byte_level(pre) for pre in ("smollm", "gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o")]
)
def test_what_is_encoded_is_decoded_again(file: GgufFile, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(file)
    tokenizer.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in ODD:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(ids) == text


@pytest.mark.parametrize("prefix", [True, False])
def test_what_sentencepiece_encodes_is_decoded_again(prefix: bool, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(sentencepiece(add_space_prefix=prefix))
    tokenizer.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in (text for text in ODD if "<|" not in text):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert again.encode(text) == tokenizer.encode(text) == [1, *ids]


def test_control_tokens_are_found_whole_and_user_defined_ones_are_not_special() -> None:
    tokenizer = build_tokenizer(byte_level("smollm"))
    ids = tokenizer.encode("a<|start|>b<think>c<|im_end|>")
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "<|start|>", "b", "<think>", "c", "<|im_end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<think>c"
    assert len(tokenizer) == len(byte_level("smollm").metadata["tokenizer.ggml.tokens"])
    assert (tokenizer.bos_token, tokenizer.eos_token) == tuple(CONTROL)


def test_text_begins_with_bos_where_the_file_says_so_or_its_kind_does() -> None:
    start = build_tokenizer(byte_level("smollm")).bos_token_id
    for pre, values, begins in [
        ("smollm", {}, False),
        ("smollm", {"add_bos_token": True}, True),
        ("llama-bpe", {}, True),
        ("llama-bpe", {"add_bos_token": False}, False),
    ]:
        ids = build_tokenizer(byte_level(pre, **values)).encode("ab")
        assert (ids[0] == start) == begins
    assert build_tokenizer(sentencepiece()).encode("x")[0] == 1
    assert build_tokenizer(sentencepiece(add_bos_token=False, add_eos_token=True)).encode("x")[-1] == 2


def test_sentencepiece_joins_the_best_scores_first_and_falls_back_to_bytes() -> None:
    assert pieces(sentencepiece(), "ab c") == ["▁ab", "▁", "c"]
    assert pieces(sentencepiece(add_space_prefix=False), "abab c") == ["ab", "ab", "▁", "c"]
    assert pieces(sentencepiece(add_space_prefix=False), "abc") == ["a", "bc"]
    assert pieces(sentencepiece(), "é") == ["▁", "<0xC3>", "<0xA9>"]


def test_gemma_spells_runs_of_spaces_as_spaces() -> None:
    tokens = [piece.replace("▁", " ") if set(piece) == {"▁"} and len(piece) > 1 else piece for piece in PIECES]
    vocabulary = ["<pad>", "<eos>", "<bos>", *(f"<0x{byte:02X}>" for byte in range(256)), *tokens]
    file = sentencepiece(
        architecture="gemma3",
        tokens=vocabulary,
        token_type=[3] * 3 + [6] * 256 + [1] * len(tokens),
        scores=[0.0] * len(vocabulary),
        bos_token_id=2,
        eos_token_id=1,
    )
    assert pieces(file, "a  b   c") == ["a", "▁▁", "b", "▁▁▁", "c"]
    assert build_tokenizer(file).encode("a")[0] == 2


def test_control_tokens_of_phi_3_take_the_spaces_behind_them() -> None:
    assert pieces(sentencepiece(architecture="phi3"), "<|user|>\nab<|end|>\n") == ["<|user|>", "▁ab", "<|end|>"]
    assert pieces(sentencepiece(), "<|user|>\nx") == ["<|user|>", "▁", "\n", "x"]


def test_answers_end_with_the_tokens_that_end_a_turn() -> None:
    template = "{{ '<|start|>' + message + '<|im_end|>' }}"
    last = len(BYTES) + len(MERGES)
    assert end_tokens(byte_level("smollm", chat_template=template)) == [last + 1]
    assert end_tokens(byte_level("smollm", chat_template=template, eos_token_id=0)) == [0, last + 1]
    assert end_tokens(byte_level("smollm", eot_token_id=5)) == [last + 1, 5]
    assert build_tokenizer(byte_level("smollm", chat_template=template)).chat_template == template


@pytest.mark.parametrize(
    ("file", "error", "says"),
    [
        (
            byte_level("unheard-of"),
            UnsupportedModelError,
            "cuts text in the way 'unheard-of' .* known here are .*, smollm",
        ),
        (byte_level("smollm", model="rwkv"), UnsupportedModelError, "a tokenizer of the kind 'rwkv'"),
        (byte_level("smollm", tokens=[]), ModelLoadError, "m.gguf has no tokenizer"),
        (byte_level("smollm", tokens=["a", "a"], token_type=[1, 1]), ModelLoadError, "tokens 0 and 1 are both 'a'"),
        (byte_level("smollm", merges=["ab"]), ModelLoadError, "'ab' is no merge of two"),
        (byte_level("smollm", merges=["ab zz"]), ModelLoadError, "'ab zz' is no merge of two"),
        (sentencepiece(scores=None), ModelLoadError, "its tokenizer has no scores"),
    ],
)
def test_a_tokenizer_that_cannot_be_built_is_refused(file: GgufFile, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        build_tokenizer(file)
