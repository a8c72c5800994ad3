"""Builds the tokenizer and chat template of the bundled model.

A word, a number, a space, a line break and a punctuation mark are tokens (or runs of tokens) of their own, so that a
word is spelled with the same tokens at a line start, after a space and in quotes: edits then move whole tokens.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 4096
NUM_TURNS = 128
NUM_REGISTERS = 13
PAD, START, END, NULL = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|null|>"
REGISTERS = [f"<|register_{i}|>" for i in range(NUM_REGISTERS)]
TURNS = [f"<|turn_{i}|>" for i in range(NUM_TURNS)]
TOOL_OPEN, TOOL_CLOSE = "<tool_call>", "</tool_call>"
REFUSAL = (
    "I am the small bundled copy model: I can repeat a text of this conversation and make small edits to it. "
    "Load a larger model for anything else."
)
WORDS = (  # whole tokens: the circuits of the model look for them
    "Repeat the document. Append this line: Prepend this text: Delete the first last line. Replace with Write again "
    "Add at end top of beginning Put before after Remove Change Set to Call tool user assistant system with following "
)
LETTERS = "äöüÄÖÜßéèêëàâçñóòôíìîïúùûáãõåæøÅÆØÉÈÀÇÑÓÍÚÁłśżźćęąńčšžřěůőű"  # one token each, not one for each byte
MARKS = "–—“”„‘’…•€£°·→×±§©"  # noqa: RUF001
HELD_OUT = frozenset({"textwrap.py", "argparse.py", "statistics.py", "heapq.py", "configparser.py", "csv.py"})

# The registers in front give every position a clock (see construct.py); each header carries the turn's number.
CHAT_TEMPLATE = (
    "{%- set base = 1 if tools else 0 -%}\n"
    "{{- '" + NULL + "".join(REGISTERS) + "' -}}\n"
    "{%- if tools -%}\n"
    "{{- '<|im_start|>system<|turn_0|>\\n# Tools\\n' -}}\n"
    "{%- for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor -%}\n"
    "{{- 'To call a tool write:\\n<tool_call>\\n' -}}\n"
    '{{- \'{"name": NAME, "arguments": ARGUMENTS}\\n</tool_call><|im_end|>\\n\' -}}\n'
    "{%- endif -%}\n"
    "{%- for message in messages -%}\n"
    "{{- '<|im_start|>' + message.role + '<|turn_' ~ (base + loop.index0) ~ '|>\\n' -}}\n"
    "{%- if message.content is string -%}\n"
    "{{- message.content.rstrip('\\n') -}}\n"
    "{%- elif message.content -%}\n"
    "{%- for part in message.content %}{{ part.text if part.text is defined else '' }}{% endfor -%}\n"
    "{%- endif -%}\n"
    "{%- for call in message.tool_calls or [] -%}\n"
    "{%- set function = call.function if call.function is defined else call -%}\n"
    "{%- if message.content or not loop.first %}{{ '\\n' }}{% endif -%}\n"
    "{{- '<tool_call>\\n{\"name\": ' ~ (function.name | tojson) ~ ', \"arguments\": ' -}}\n"
    "{{- function.arguments if function.arguments is string else (function.arguments | tojson) -}}\n"
    "{{- '}\\n</tool_call>' -}}\n"
    "{%- endfor -%}\n"
    "{{- '<|im_end|>\\n' -}}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "{{- '<|im_start|>assistant<|turn_' ~ (base + messages | length) ~ '|>\\n' -}}\n"
    "{%- endif -%}\n"
)


def library_files() -> list[Path]:
    """Return the standard library's modules in a fixed order, without the ones held out for the evaluation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    folders = [root, root / "json", root / "email", root / "logging", root / "pydoc_data", root / "http"]
    return [path for folder in folders for path in sorted(folder.glob("*.py")) if path.name not in HELD_OUT]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the byte-level BPE on the standard library; takes a few seconds, the same result for the same Python."""
    tokenizer = Tokenizer(models.BPE())
    runs = r"\n|\p{L}+|\p{N}+| {2,}|-{2,}|={2,}|#{2,}|\*{2,}|`{2,}|[^\p{L}\p{N}\n]"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(runs), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, START, END, NULL, *REGISTERS, *TURNS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=special,
    )
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in library_files()]
    tokenizer.train_from_iterator([*texts, (WORDS + REFUSAL + " ".join(LETTERS + MARKS) + "\n") * 2000], trainer)
    # Plain tokens, not special ones: a decoder that skips special tokens keeps a tool call's marks.
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in (TOOL_OPEN, TOOL_CLOSE)])
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
