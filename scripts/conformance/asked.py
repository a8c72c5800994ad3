"""What clients ask for: objects, and a function to call; see `replies.py` for what the scripted model makes of it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

__all__ = ["ANN", "CALL", "SUNNY", "TOOL", "WORDS", "Kind", "Person", "Weather", "weather"]

ANN = '{"name":"Ann","age":7}'
CALL = 'call weather {"city": "Bern"}'
SUNNY = "SUNNY IN BERN"
"""What the scripted model makes of the function's result."""
WORDS = "Some words that are long enough to be kept."
"""The beginning of a conversation whose next call shows it again."""


class Person(BaseModel):
    """Somebody."""

    name: str
    age: int


class Kind(BaseModel):
    """What any model can fill in with a few tokens."""

    yes: bool


class Weather(BaseModel):
    """What the weather is like in a city."""

    city: str


def weather(city: str) -> str:
    """What the weather is like."""
    return f"sunny in {city}"


TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What the weather is like.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Bern", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
