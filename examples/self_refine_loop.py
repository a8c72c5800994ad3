"""Generate, criticise, rewrite: each draft stays in the session, so that the next one is mostly copied from it.

The critic is a few rules here; with a larger model it is one more prompt.

Uses the bundled copier, which needs no network and makes the edits that it is told word for word; give another model
for texts of its own.

Run: python examples/self_refine_loop.py
"""

from __future__ import annotations

from pathlib import Path

from copyspec_engine import Engine, EngineConfig, GenerationOutput, GenerationRequest

DOCUMENT = Path(__file__).parent / "documents" / "article.txt"
MAX_ROUNDS = 6


def criticise(draft: str) -> str | None:
    """What the next draft must do better, or None if nothing is left to say."""
    if "thirty" in draft:
        return 'Replace "thirty" with "forty".'
    if not draft.startswith("Local news"):
        return "Prepend this line:\nLocal news"
    if "correspondent" not in draft:
        return "Append this line:\nReporting by our harbour correspondent."
    return None


def write(engine: Engine, text: str, instruction: str) -> GenerationOutput:
    messages = ({"role": "user", "content": text}, {"role": "user", "content": instruction})
    return engine.generate(GenerationRequest(messages=messages, session_id="article"))


def main() -> None:
    with Engine(EngineConfig(model="bundled")) as engine:
        draft = write(engine, DOCUMENT.read_text(encoding="utf-8"), "Repeat the document.").text
        for number in range(1, MAX_ROUNDS + 1):
            feedback = criticise(draft)
            if feedback is None:
                break
            output = write(engine, draft, feedback)
            draft = output.text
            print(f"-- draft {number}: {output.tokens_per_forward:.1f} tokens per forward pass ({feedback!r})")
    print(draft)


if __name__ == "__main__":
    main()
