"""Measures the bundled model: free-running exact match on unseen documents, alone and in chains of turns.

    python -m scripts.bundled_model.evaluate --model FOLDER --samples 20 --card

An answer counts only if every character is right and the model stops by itself. Documents are cut from standard
library files that neither tokenizer nor trainer saw (code; docstrings as prose) or made by generators with a seed of
their own (tables, configuration, lists, random characters), in equal parts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from copyspec_engine.bundled import bundled_model_path
from scripts.bundled_model.tasks import CHAIN, KINDS, TASKS, Documents, Message, edit, make_example

LENGTHS = (32, 64, 128, 256, 400)
MARK = "<!-- measured by scripts.bundled_model.evaluate: the rest of this file is generated -->"


@dataclass(frozen=True, kw_only=True)
class Score:
    """How many answers were exact."""

    exact: int
    total: int

    def __str__(self) -> str:
        return f"{self.exact}/{self.total}"


class Chat:
    """Greedy answers of a model folder."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = model.eval()  # type: ignore[no-untyped-call]
        self.model.to(torch.device(device))
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)

    def count_tokens(self, text: str) -> int:
        """Number of tokens of a text."""
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def answer(self, messages: Sequence[Message], max_new_tokens: int) -> str:
        """The answer without its stop token; "<no stop>" is added when the limit cut it off."""
        rendered = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        prompt = self.tokenizer(str(rendered), add_special_tokens=False, return_tensors="pt").to(self.model.device)
        with torch.inference_mode():
            output = self.model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)
        ids = output[0, prompt["input_ids"].shape[1] :].tolist()
        stopped = ids[-1] == self.model.config.eos_token_id
        return str(self.tokenizer.decode(ids[:-1] if stopped else ids)) + ("" if stopped else "<no stop>")


def _report(task: str, got: str, want: str) -> None:
    at = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))
    print(
        f"  wrong: {task}: at character {at}: got {got[at - 20 : at + 30]!r} want {want[at - 20 : at + 30]!r}",
        flush=True,
    )


def measure_tasks(
    chat: Chat, *, samples: int, seed: int, lengths: Sequence[int] = LENGTHS, tasks: Sequence[str] = TASKS
) -> dict[tuple[str, int], Score]:
    """Exact match by task and document length in tokens."""
    documents = Documents(chat.count_tokens, held_out=True, seed=seed)
    table = {}
    for task in tasks:
        for length in lengths:
            exact = 0
            for i in range(samples):
                example = make_example(task, documents, length, KINDS[i % len(KINDS)])
                got = chat.answer(example.messages, chat.count_tokens(example.answer) + 40)
                exact += got == example.answer
                if got != example.answer:
                    _report(f"{example.messages[-1]['content'][:60]!r}", got, example.answer)
            table[task, length] = Score(exact=exact, total=samples)
            print(f"{task} {length}: {table[task, length]}", flush=True)
    return table


def measure_chains(chat: Chat, *, samples: int, seed: int, turns: int = 5) -> list[Score]:
    """Exact match of turn 1..turns, each an edit of the previous answer; a wrong answer stays in the conversation."""
    documents = Documents(chat.count_tokens, held_out=True, seed=seed)
    exact = [0] * turns
    for i in range(samples):
        document = documents.draw(KINDS[i % len(KINDS)], (80, 200, 400)[i % 3])
        messages: list[Message] = [{"role": "user", "content": document}]
        for turn in range(turns):
            made = edit(documents.rng.choice(CHAIN), document, documents.rng, chat.count_tokens)
            made = made or ("Repeat the document.", document)
            messages.append({"role": "user", "content": made[0]})
            got = chat.answer(messages, chat.count_tokens(made[1]) + 40)
            exact[turn] += got == made[1]
            if got != made[1]:
                _report(f"turn {turn + 1} {made[0][:60]!r}", got, made[1])
            messages.append({"role": "assistant", "content": got})
            document = got if "\n" in got else "a\nb"
    return [Score(exact=count, total=samples) for count in exact]


def card_table(tasks: dict[tuple[str, int], Score], chains: list[Score], command: str) -> str:
    """The measured numbers as Markdown."""
    lengths = sorted({length for _, length in tasks})
    lines = [
        "| task | " + " | ".join(f"{length} tokens" for length in lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    lines += [
        f"| {task} | " + " | ".join(str(tasks[task, length]) for length in lengths) + " |"
        for task in dict.fromkeys(task for task, _ in tasks)
    ]
    lines += ["", "Chains, each turn an edit of the previous answer (documents of 80, 200 and 400 tokens):", ""]
    lines += ["| " + " | ".join(f"turn {i + 1}" for i in range(len(chains))) + " |", "|---" * len(chains) + "|"]
    lines += ["| " + " | ".join(str(score) for score in chains) + " |", "", f"Command: `{command}`"]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=bundled_model_path(), help="model folder")
    parser.add_argument("--samples", type=int, default=18, help="documents per task and length")
    parser.add_argument("--chains", type=int, default=18, help="conversations of five turns")
    parser.add_argument("--seed", type=int, default=1, help="draws the documents and edits")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--card", action="store_true", help="write the numbers into the folder's README.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    chat = Chat(options.model, options.device)
    tasks = measure_tasks(chat, samples=options.samples, seed=options.seed)
    chains = measure_chains(chat, samples=options.chains, seed=options.seed + 1)
    command = "python -m scripts.bundled_model.evaluate"
    command += f" --samples {options.samples} --chains {options.chains} --seed {options.seed}"
    table = card_table(tasks, chains, command)
    print(f"\n{table}\n\n{time.perf_counter() - start:.0f} s", flush=True)
    if options.card:
        card = options.model / "README.md"
        head = card.read_text(encoding="utf-8").split(MARK)[0] if card.exists() else ""
        card.write_text(f"{head.rstrip()}\n\n{MARK}\n\n{table}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
