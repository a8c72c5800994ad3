"""Builds the bundled model, and optionally trains it further: one command, the same result for the same seed.

    python -m scripts.bundled_model.train --out FOLDER --seed 0
    python -m scripts.bundled_model.train --out FOLDER --seed 0 --steps 200 --device auto

The tokenizer is trained on the standard library, the weights are constructed (see construct.py): together a few
seconds, and what ships. `--steps` trains the neurons of the last two layers on top, on conversations made from the
standard library and from generators; a rerun continues at the last checkpoint and ends at the same weights.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.bundled_model.construct import construct
from scripts.bundled_model.package import save_folder
from scripts.bundled_model.tasks import TASKS, Documents, Example, make_example
from scripts.bundled_model.tokenizer_builder import END, build_tokenizer

CARD = Path(__file__).with_name("model_card.md")
DECISION_WEIGHT = 5.0  # of an answer's first token and of its stop
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of a run.

    Attributes:
        out: model folder to write; the checkpoint lies beside the weights until the run ends.
        seed: deals the token codes and draws the training conversations.
        steps: optimizer steps on top of the construction, >= 0.
        batch: conversations per step, >= 1.
        max_tokens: document length in tokens is drawn from 16..max_tokens.
        learning_rate: peak of a linear warm-up, then constant.
        warm_up: steps of the warm-up, >= 1.
        checkpoint_every: steps between checkpoints, >= 1.
        device: "cpu", "cuda" or "auto".
        stop_after: end early after this many steps of this call, as an interrupt would; None runs to the end.
    """

    out: Path
    seed: int = 0
    steps: int = 0
    batch: int = 4
    max_tokens: int = 256
    learning_rate: float = 1e-6
    warm_up: int = 20
    checkpoint_every: int = 50
    device: str = "auto"
    stop_after: int | None = None


def encode(example: Example, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Token ids of the conversation with its answer, and the labels: the answer and its stop."""
    prompt = tokenizer.apply_chat_template(example.messages, add_generation_prompt=True, return_dict=False)
    answer = [*tokenizer.encode(example.answer, add_special_tokens=False), tokenizer.convert_tokens_to_ids(END)]
    return [*prompt, *answer], [IGNORED] * len(prompt) + answer


def make_batch(tokenizer: PreTrainedTokenizerFast, options: TrainOptions, step: int) -> tuple[Tensor, Tensor]:
    """Ids and labels of step `step`: (batch, length) each, padded on the right; a function of its arguments."""
    documents = Documents(
        lambda text: len(tokenizer.encode(text, add_special_tokens=False)),
        held_out=False,
        seed=options.seed * 10**6 + step,
    )
    rows = []
    for _ in range(options.batch):
        length = documents.rng.randint(16, options.max_tokens)
        rows.append(encode(make_example(documents.rng.choice(TASKS), documents, length), tokenizer))
    longest = max(len(ids) for ids, _ in rows)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows])
    return ids, torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows])


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Weighted cross-entropy of the answer tokens: logits (batch, length, vocabulary), labels (batch, length)."""
    targets = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
    )
    answers = targets != IGNORED
    before, after = torch.nn.functional.pad(answers[:, :-1], (1, 0)), torch.nn.functional.pad(answers[:, 1:], (0, 1))
    edges = answers & (~before | ~after)
    weights = answers.float() + (DECISION_WEIGHT - 1) * edges.float()
    return (losses * weights).sum() / weights.sum()


def _trainable(model: LlamaForCausalLM) -> list[torch.nn.Parameter]:
    """The neurons of the last two layers: the sharp heads before them are exact and stay."""
    model.requires_grad_(requires_grad=False)
    chosen = [parameter for layer in model.model.layers[-2:] for parameter in layer.mlp.parameters()]
    for parameter in chosen:
        parameter.requires_grad_()
    return chosen


def fine_tune(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, options: TrainOptions) -> bool:
    """Train in place, continuing at the checkpoint if there is one; returns whether all steps are done."""
    device = options.device if options.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    model.train()
    model.to(torch.device(device))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(_trainable(model), lr=options.learning_rate, weight_decay=0.0)
    checkpoint, done = options.out / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
        print(f"continuing after step {done}", flush=True)
    start, first = time.perf_counter(), done
    while done < options.steps:
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min(1.0, (done + 1) / options.warm_up)
        ids, labels = make_batch(tokenizer, options, done)
        loss = answer_loss(model(ids.to(device)).logits, labels.to(device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(_trainable(model), 1.0)
        optimizer.step()
        done += 1
        stop = options.stop_after is not None and done - first >= options.stop_after
        if done % options.checkpoint_every == 0 or stop:
            partial = checkpoint.with_suffix(".partial")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}, partial)
            os.replace(partial, checkpoint)
        if done % 10 == 0 or done == options.steps:
            print(f"step {done}/{options.steps} loss {loss.item():.5f} {time.perf_counter() - start:.0f} s", flush=True)
        if stop:
            break
    model.eval()  # type: ignore[no-untyped-call]
    model.to(torch.device("cpu"))  # type: ignore[arg-type]
    return done >= options.steps


def train(options: TrainOptions, tokenizer: PreTrainedTokenizerFast | None = None) -> bool:
    """Build, train and write the model folder; returns False when `stop_after` ended the run before its last step.

    Args:
        options: see `TrainOptions`.
        tokenizer: one that `build_tokenizer` made; default: make it.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    tokenizer = tokenizer or build_tokenizer()
    model = construct(tokenizer, options.seed)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters constructed", flush=True)
    if options.steps and not fine_tune(model, tokenizer, options):
        return False
    save_folder(model, tokenizer, options.out)
    card = options.out / "README.md"
    if not card.exists():
        card.write_text(CARD.read_text(encoding="utf-8"), encoding="utf-8")
    (options.out / "checkpoint.pt").unlink(missing_ok=True)
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps on top of the construction")
    parser.add_argument("--batch", type=int, default=4, help="conversations per step")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest training document")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--warm-up", type=int, default=20, help="steps")
    parser.add_argument("--checkpoint-every", type=int, default=50, help="steps")
    parser.add_argument("--device", choices=("cpu", "cuda", "auto"), default="auto")
    train(TrainOptions(**vars(parser.parse_args(arguments))))


if __name__ == "__main__":
    main()
