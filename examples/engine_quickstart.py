"""The engine by itself: stream an answer, see what was copied, and ask again in the same conversation.

Uses the bundled copier, which needs no network and makes the edits that it is told word for word; give another model
for texts of its own.

Run: python examples/engine_quickstart.py
"""

from __future__ import annotations

from pathlib import Path

from copyspec_engine import Engine, EngineConfig, GenerationOutput, GenerationRequest

DOCUMENT = Path(__file__).parent / "documents" / "service.ini"


def ask(engine: Engine, messages: list[dict[str, str]]) -> GenerationOutput:
    request = GenerationRequest(messages=tuple(messages), session_id="settings")
    for chunk in engine.stream(request):
        print(chunk.text, end="", flush=True)
        if chunk.output is not None:
            return chunk.output
    raise AssertionError("the last chunk has the output")


def main() -> None:
    messages = [{"role": "user", "content": DOCUMENT.read_text(encoding="utf-8")}]
    with Engine(EngineConfig(model="bundled")) as engine:
        for instruction in ("Append this line:\nchecksum = yes", 'Set "port" to "9000".'):
            messages.append({"role": "user", "content": instruction})
            output = ask(engine, messages)
            messages.append({"role": "assistant", "content": output.text})
            usage, passes = output.usage, output.draft_stats.num_forward_passes
            print(f"\n-- {usage.completion_tokens} tokens in {passes} forward passes, {output.copied_share:.0%} copied")
            print(f"-- {usage.cached_tokens} of {usage.prompt_tokens} prompt tokens were read in an earlier turn\n")


if __name__ == "__main__":
    main()
