"""Documents, instructions and the answers they ask for: shared by the trainer and the evaluation."""

from __future__ import annotations

import ast
import functools
import json
import random
import re
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scripts.bundled_model.tokenizer_builder import HELD_OUT, REFUSAL, TOOL_CLOSE, TOOL_OPEN, library_files

Message = dict[str, str]
MAX_FOUND_TOKENS = 5  # the longest text that "Replace" and "Set" can look for
KINDS = ("prose", "code", "table", "config", "list", "random")
TASKS = (
    "repeat",
    "append",
    "prepend",
    "delete first",
    "delete last",
    "replace",
    "set",
    "repeat this",
    "tool call",
    "other",
)
CHAIN = ("repeat", "append", "prepend", "delete first", "delete last", "replace")

_NAMES = (
    "Ada", "Bo", "Chen", "Dara", "Emil", "Farah", "Goran", "Hana", "Ines", "Jomo", "Kaja", "Lev", "Mira", "Nils",
    "Oona", "Pavel", "Quyen", "Rosa", "Sven", "Tuva",
)  # fmt: skip
_NOUNS = (
    "budget", "release", "server", "harbour", "garden", "report", "lamp", "bridge", "invoice", "ticket", "sensor",
    "cable", "kitchen", "meeting",
)  # fmt: skip
_VERBS = (
    "reviews", "moves", "repairs", "orders", "closes", "delays", "measures", "paints", "tests", "ships", "records",
    "prepares",
)  # fmt: skip
_KEYS = (
    "timeout", "retries", "host", "port", "level", "cache_size", "batch", "colour", "region", "backend", "verbose",
    "threshold", "user", "path",
)  # fmt: skip
_OTHER = (
    "Hello!", "What is the capital of France?", "Write a poem about the sea.", "Explain this in simple words.",
    "Translate the document into German.", "How are you today?", "Summarise the text above.", "2 + 2 = ?",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Example:
    """A conversation that ends with an instruction, and the answer it asks for."""

    task: str
    messages: list[Message]
    answer: str


def _sentence(rng: random.Random) -> str:
    who, verb, noun = rng.choice(_NAMES), rng.choice(_VERBS), rng.choice(_NOUNS)
    tails = (f"on day {rng.randint(1, 31)}", f"for {rng.choice(_NAMES)}", f"near the {rng.choice(_NOUNS)}", "again")
    return f"{who} {verb} the {noun} {rng.choice(tails)}."


def _value(rng: random.Random) -> str:
    options = (str(rng.randint(0, 9999)), f"0.{rng.randint(1, 99)}", rng.choice(_NOUNS), rng.choice(("true", "false")))
    return rng.choice(options)


def _table_row(rng: random.Random) -> str:
    return f"| {rng.choice(_NAMES)} | {rng.choice(_NOUNS)} | {rng.randint(1, 999)} | {rng.uniform(0, 50):.2f} |"


def _config_line(rng: random.Random) -> str:
    if rng.random() < 0.15:
        return f"[{rng.choice(_NOUNS)}]"
    return f"{rng.choice(_KEYS)}{rng.choice(('_a', '_b', '2', ''))} = {_value(rng)}"


def _list_line(rng: random.Random) -> str:
    return rng.choice(
        (f"- {_sentence(rng)}", f"  - {rng.choice(_NOUNS)}: {rng.randint(1, 99)}", f"- [ ] {_sentence(rng)}")
    )


def _random_line(rng: random.Random) -> str:
    alphabet = rng.choice(
        ("ab ", "0123456789", "äöüßéñçøåæ αβγδ", "!#$%&()*+,-./:;=?@[]^_{|}~ ", "日本語文字列 ", "xyz_QWERTY 01")
    )
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(3, 40))).strip() or "x"


@functools.cache
def _library_lines(held_out: bool, prose: bool) -> tuple[str, ...]:
    """Lines of the standard library's sources, or of their docstrings."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [root / name for name in sorted(HELD_OUT)] if held_out else library_files()[::7]
    lines: list[str] = []
    for path in files:
        source = path.read_text(encoding="utf-8", errors="replace")
        if prose:
            nodes = [
                node
                for node in ast.walk(ast.parse(source))
                if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module)
            ]
            source = "\n".join(text for node in nodes if (text := ast.get_docstring(node)))
        lines += [line.rstrip() for line in source.split("\n")]
    return tuple(lines)


class Documents:
    """Draws documents of about a wanted number of tokens.

    With `held_out`, code and prose come from library files that neither the tokenizer nor the trainer saw.
    """

    def __init__(self, count_tokens: Callable[[str], int], *, held_out: bool, seed: int) -> None:
        self.count = count_tokens
        self._lines = {"code": _library_lines(held_out, prose=False), "prose": _library_lines(held_out, prose=True)}
        self.rng = random.Random(seed)

    def draw(self, kind: str, num_tokens: int) -> str:
        """A document of at least two lines, `num_tokens` tokens or the line that reaches it."""
        rng = self.rng
        makers = {"table": _table_row, "config": _config_line, "list": _list_line, "random": _random_line}
        while True:
            lines = {"table": ["| name | item | count | price |", "|---|---|---|---|"]}.get(kind, [])
            source = self._lines.get(kind)
            at = rng.randrange(len(source) - 200) if source else 0
            while self.count("\n".join(lines)) < num_tokens and len(lines) < 200:
                lines.append(source[at + len(lines)] if source else makers[kind](rng))
            text = "\n".join(lines).strip("\n")
            if "\n" in text and self.count(text) <= 1.5 * num_tokens + 20:
                return text


def _replace(document: str, rng: random.Random, count: Callable[[str], int]) -> tuple[str, str] | None:
    words = [word for word in re.findall(r"(?<!\w)[^\W_]{2,}(?!\w)", document) if count(word) <= MAX_FOUND_TOKENS]
    if not words:
        return None
    old, new = rng.choice(words), rng.choice((*_NAMES, *_NOUNS, "two words", "x_1", "Überfall"))
    # The model replaces the first occurrence that ends where a word ends.
    changed = re.sub(rf"(?<!\w){re.escape(old)}(?!\w)", lambda _: new, document, count=1)
    return f'Replace "{old}" with "{new}".', changed


def _set(document: str, rng: random.Random) -> tuple[str, str] | None:
    settings = re.findall(r"^(\w+)( = |=|: )([^\n\",]+)$", document, flags=re.MULTILINE)
    if not settings:
        return None
    key, separator, value = rng.choice(settings)
    new = _value(rng)
    changed = re.sub(
        rf"^{key}{separator}.*$", lambda _: f"{key}{separator}{new}", document, count=1, flags=re.MULTILINE
    )
    return (f'Set "{key}" to "{new}".', changed) if value else None


def _call(rng: random.Random) -> tuple[str, str]:
    arguments = {rng.choice(_KEYS): _value(rng), rng.choice(_NOUNS): rng.choice(_NAMES)}
    call = json.dumps({"name": f"{rng.choice(_VERBS)}_{rng.choice(_NOUNS)}", "arguments": arguments})
    return f"Call this tool:\n{call}", f"{TOOL_OPEN}\n{call}\n{TOOL_CLOSE}"


def edit(task: str, document: str, rng: random.Random, count: Callable[[str], int]) -> tuple[str, str] | None:
    """An instruction for `task` and the answer it asks for; None where the document has nothing to change."""
    lines = document.split("\n")
    new = rng.choice((_list_line, _config_line, _table_row, _random_line))(rng)
    simple = {
        "repeat": (rng.choice(("Repeat the document.", "Write the document again.")), document),
        "append": (rng.choice(("Append this line:", "Add this at the end:")) + f"\n{new}", f"{document}\n{new}"),
        "prepend": (rng.choice(("Prepend this line:", "Add this at the top:")) + f"\n{new}", f"{new}\n{document}"),
        "delete first": (rng.choice(("Delete", "Remove")) + " the first line.", "\n".join(lines[1:])),
        "delete last": (rng.choice(("Delete", "Remove")) + " the last line.", "\n".join(lines[:-1])),
        "repeat this": (f"Repeat this text:\n{document}", document),
        "other": (rng.choice(_OTHER), REFUSAL),
        "tool call": _call(rng),
    }
    if task in simple:
        return simple[task]
    return _replace(document, rng, count) if task == "replace" else _set(document, rng)


def make_example(task: str, documents: Documents, num_tokens: int, kind: str | None = None) -> Example:
    """One conversation: the document as a message of its own, then the instruction."""
    rng = documents.rng
    while True:
        document = documents.draw("config" if task == "set" else kind or rng.choice(KINDS), num_tokens)
        made = edit(task, document, rng, documents.count)
        if made:
            messages = [{"role": "user", "content": document}, {"role": "user", "content": made[0]}]
            return Example(task=task, messages=messages, answer=made[1])
