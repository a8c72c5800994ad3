"""A tokenizer as many models have it, trained on next to nothing."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from copyspec_engine.chat.tokenizer import HFTokenizer


def byte_level_tokenizer(text: str, template: str, added: Sequence[str] = ()) -> HFTokenizer:
    """A byte-level BPE of 400 tokens, taught by a text, with a chat template.

    Its special tokens are <|s|> and <|e|>; those that are `added` are none.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|s|>", "<|e|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text] * 3, trainer)
    bpe.add_tokens(list(added))
    return HFTokenizer(PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|e|>", chat_template=template))
