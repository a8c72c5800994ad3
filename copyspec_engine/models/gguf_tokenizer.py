"""The tokenizer of a GGUF file, built from its vocabulary by the rules that llama.cpp gives the names of.

Two kinds are read: byte-level BPE ("gpt2") with the ways of cutting text in _CUTS, and SentencePiece's BPE ("llama").
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from copyspec_engine.models.gguf_file import GgufFile
from copyspec_engine.values.errors import ModelLoadError, UnsupportedModelError

__all__ = ["build_tokenizer", "end_tokens"]

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
"""GGUF's numbers of kinds of tokens."""
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}|{_PUNCTUATION}|{_SPACES}"
_GPT4O = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+{_ENGLISH}?|{_BEFORE}{_UPPER}+{_LOWER}*{_ENGLISH}?"
    rf"|\p{{N}}{{1,3}}|{_PUNCTUATION}|{_SPACES}"
)
_CUTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "olmo", "phi-2", "jina-en"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "dbrx", "smaug-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
    **dict.fromkeys(("gpt-4o", "llama4"), (_GPT4O,)),
}
"""Expressions by which text is cut into words, one after the other, by the name in tokenizer.ggml.pre."""
_WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"}
"""Where a word that is a token is taken whole, whatever the merges say."""
_BEGINS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"}
"""Where text begins with the bos token unless the file says otherwise."""
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>", "<|eom_id|>", "</s>")
_NOT_STRIPPING = {"<unk>", "<s>", "<|endoftext|>"}
"""The only control tokens of Phi-3 that spaces are kept behind; files do not say so."""


def build_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """The tokenizer, with the chat template if the file has one.

    Raises:
        ModelLoadError: the file has none, or its tokens cannot be told apart.
        UnsupportedModelError: one of another kind, or that cuts text in another way.
    """
    read = _Vocabulary(file)
    kind = read.of("model")
    if kind == "gpt2":
        tokenizer = _byte_level(read)
    elif kind == "llama":
        tokenizer = _sentencepiece(read)
    else:
        raise UnsupportedModelError(
            f"{file.paths[0]} has a tokenizer of the kind {kind!r}, but gpt2 and llama are read from GGUF: use the "
            "checkpoint that it was made from"
        )
    _add_tokens(tokenizer, read)
    special = file.special_tokens
    _add_ends(tokenizer, read, special)
    build: Any = PreTrainedTokenizerFast
    whole: PreTrainedTokenizerFast = build(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        **special,
    )
    if file.chat_template is not None:
        whole.chat_template = file.chat_template
    return whole


class _Vocabulary:
    """The keys of a file that describe its tokenizer."""

    def __init__(self, file: GgufFile) -> None:
        self.path, self.unknown = file.paths[0], file.special_tokens.get("unk_token")
        self._metadata = file.metadata
        self.tokens: list[str] = self.of("tokens", [])
        if not self.tokens:
            raise ModelLoadError(
                f"{self.path} has no tokenizer (tokenizer.ggml.tokens): use a file that has one, or the checkpoint "
                "that it was made from"
            )
        self.kinds: list[int] = self.of("token_type", [1] * len(self.tokens))
        self.is_gemma = file.architecture.startswith("gemma")
        self.strips = file.architecture == "phi3" and self.of("model") == "llama"

    def of(self, key: str, default: Any = None) -> Any:  # noqa: ANN401 - texts, numbers and lists
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    def ids(self, tokens: list[str]) -> dict[str, int]:
        numbers: dict[str, int] = {}
        for number, token in enumerate(tokens):
            if numbers.setdefault(token, number) != number:
                raise ModelLoadError(f"{self.path} is broken: tokens {numbers[token]} and {number} are both {token!r}")
        return numbers


def _byte_level(read: _Vocabulary) -> Tokenizer:
    name = read.of("pre", "")
    cuts = _CUTS.get(name)
    if cuts is None:
        raise UnsupportedModelError(
            f"{read.path} cuts text in the way {name!r} (tokenizer.ggml.pre), but known here are "
            f"{', '.join(sorted(_CUTS))}: use the checkpoint that it was made from"
        )
    numbers = read.ids(read.tokens)
    merges = [_halves(merge, numbers, read) for merge in read.of("merges", [])]
    tokenizer = Tokenizer(models.BPE(numbers, merges, ignore_merges=name in _WHOLE_WORDS))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(cut), behavior="isolated") for cut in cuts),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _halves(merge: str, numbers: dict[str, int], read: _Vocabulary) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not {left, right, left + right} <= numbers.keys():
        raise ModelLoadError(f"{read.path} is broken: {merge!r} is no merge of two tokens to a third. Fetch it again")
    return left, right


def _sentencepiece(read: _Vocabulary) -> Tokenizer:
    tokens, scores = read.tokens, read.of("scores")
    if read.is_gemma:  # it spells runs of spaces as such, and its order of merges is that of its tokens
        tokens = ["▁" * len(token) if token and not token.strip(" ") else token for token in tokens]
        scores = [-float(i) for i in range(len(tokens))]
    if scores is None:
        raise ModelLoadError(f"{read.path} is broken: its tokenizer has no scores")
    numbers = read.ids(tokens)
    unknown = read.unknown or (tokens[0] if read.kinds[0] == _UNKNOWN else None)
    tokenizer = Tokenizer(
        models.BPE(numbers, _merges(tokens, scores, numbers), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", "▁")
    ends: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if read.of("add_space_prefix", not read.is_gemma):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        ends.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(ends)
    return tokenizer


def _merges(tokens: list[str], scores: list[float], numbers: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of tokens that join to a token, the best score first."""
    merges: list[tuple[float, int, int, str, str]] = []
    for token, score in zip(tokens, scores, strict=True):
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if left in numbers and right in numbers:
                merges.append((-score, numbers[left], numbers[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges, key=lambda merge: merge[:3])]


def _add_tokens(tokenizer: Tokenizer, read: _Vocabulary) -> None:
    """Tokens that are found whole in a text: control tokens, and those that a user of the vocabulary added."""
    pairs = list(zip(read.tokens, read.kinds, strict=True))
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True, rstrip=read.strips and token not in _NOT_STRIPPING)
            for token, kind in pairs
            if kind in (_CONTROL, _UNKNOWN)
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False)
            for token, kind in pairs
            if kind == _USER_DEFINED and tokenizer.token_to_id(token) is not None
        ]
    )


def _add_ends(tokenizer: Tokenizer, read: _Vocabulary, special: dict[str, str]) -> None:
    """Begin, or end, each text with a token where the file says so."""
    begins = read.of("add_bos_token", read.of("model") == "llama" or read.of("pre") in _BEGINS)
    ends = read.of("add_eos_token", False)
    before = special.get("bos_token") if begins else None
    after = special.get("eos_token") if ends else None
    if before is None and after is None:
        return
    parts = [*([before] if before else []), "$A", *([after] if after else [])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=parts, special_tokens=[(token, tokenizer.token_to_id(token)) for token in {before, after} if token]
    )


def end_tokens(file: GgufFile) -> list[int]:
    """Tokens that end an answer: eos, end of turn and of message, and what the chat template ends turns with."""
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])
    template = file.metadata.get("tokenizer.chat_template", "")
    ids = [file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    ids += [tokens.index(token) for token in _TURN_ENDS if token in template and token in tokens]
    return list(dict.fromkeys(number for number in ids if number is not None))
