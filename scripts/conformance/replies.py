"""What the scripted model says: whatever the last message tells it to."""

from __future__ import annotations

import re

__all__ = ["reply"]

_FOR_EVER = "and on " * 2000


def reply(prompt: str) -> str:
    r"""The answer to a prompt.

    The last message's first line of one of these forms says it; without one the message comes back in capitals.

    - `say WORDS`: these words, `\n` being the end of a line
    - `call NAME ARGUMENTS`, and more such lines: these calls, if the prompt tells of their functions
    - `think WORDS: ANSWER`: an answer behind reasoning
    - `for ever`: a text that has no end
    """
    if "<|im_start|>" not in prompt:
        return prompt.upper()
    text = prompt.rpartition("<|im_end|>")[0].rpartition("<|im_start|>")[2].partition("\n")[2]
    if re.search(r"^for ever$", text, flags=re.MULTILINE):
        return _FOR_EVER
    said = re.search(r"^say (.*)$", text, flags=re.MULTILINE)
    if said is not None:
        return said[1].replace("\\n", "\n")
    thought = re.search(r"^think (.*?): (.*)$", text, flags=re.MULTILINE)
    if thought is not None:
        return f"<think>\n{thought[1]}\n</think>\n\n{thought[2]}"
    calls = re.findall(r"^call (\w+) (\{.*\})$", text, flags=re.MULTILINE)
    told = [(name, arguments) for name, arguments in calls if f'"name": "{name}"' in prompt.partition("<|im_end|>")[0]]
    if told:
        return "\n".join(
            f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>' for name, arguments in told
        )
    return text.upper()
