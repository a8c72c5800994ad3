"""How many files and functions of this project one warm `invoke` with a thread_id runs through, in all its threads.

Uses the bundled model and no network: `python scripts/count_files.py`.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType

ROOT = Path(__file__).resolve().parents[1]


def traced(codes: Counter[CodeType]) -> None:
    """From now on count each call of a function of ours, in every thread that begins afterwards and in this one."""

    def note(frame: FrameType, event: str, _argument: object) -> None:
        if event == "call":
            codes[frame.f_code] += 1

    threading.setprofile(note)
    sys.setprofile(note)


def main() -> None:
    """Print the figures, and with --files the files with their calls."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--files", action="store_true", help="name the files")
    options = parser.parse_args()
    codes: Counter[CodeType] = Counter()
    traced(codes)  # before the engine's thread begins
    from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
    from langchain_core.runnables import RunnableConfig

    import copyspec_engine.bundled
    from langchain_copyspec import ChatCopySpec

    model = ChatCopySpec(model=str(Path(copyspec_engine.bundled.__file__).parent / "model"), temperature=0)
    config = RunnableConfig(configurable={"thread_id": "counted"})
    text = (
        "Replace 'Anna' with 'Zoe'.\n\nAnna met Ben in room 12. Later Anna wrote to Ben about the budget of the launch."
    )
    asked: list[BaseMessage] = [HumanMessage(text)]
    answer = model.invoke(asked, config)
    asked += [AIMessage(answer.content), HumanMessage(text.replace("12", "13"))]
    codes.clear()
    model.invoke(asked, config)
    sys.setprofile(None)
    ours: dict[str, Counter[CodeType]] = {}
    for code, count in codes.items():
        path = Path(code.co_filename)
        if path.is_relative_to(ROOT) and ".venv" not in path.parts and path != Path(__file__).resolve():
            ours.setdefault(path.relative_to(ROOT).as_posix(), Counter())[code] = count
    num_calls = sum(sum(counts.values()) for counts in ours.values())
    num_functions = sum(map(len, ours.values()))
    print(f"{len(ours)} files, {num_functions} functions, {num_calls} calls")
    for name in sorted(ours) if options.files else ():
        print(f"{name}: {len(ours[name])} functions, {sum(ours[name].values())} calls")


if __name__ == "__main__":
    main()
