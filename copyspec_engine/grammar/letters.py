"""Characters of texts as regular expressions (Rust's syntax) over how they may be written: as they are, or escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

__all__ = ["ANY_CHARACTER", "EVERYTHING", "complement", "integers", "literal", "one_of"]

Ranges = Sequence[tuple[int, int]]
"""Code points, both ends included."""

EVERYTHING: Ranges = ((0, 0x10FFFF),)
_SHORT = {'"': '"', "\\": "\\", "/": "/", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
_NEVER_PLAIN = ((0, 0x1F), (0x22, 0x22), (0x5C, 0x5C))
_SURROGATES = (0xD800, 0xDFFF)
_PLAIN = r"[^\x00-\x1f\x22\x5c]"
_HEX = "[0-9a-fA-F]"
_DECIMAL = "0123456789"
_HEXADECIMAL = (*_DECIMAL, "aA", "bB", "cC", "dD", "eE", "fF")

ANY_CHARACTER = rf"(?:{_PLAIN}|\\[\x22\x5c\x2fbfnrt]|\\u{_HEX}{{4}})"
"""What may stand in a JSON text, halves of surrogate pairs included: a pair counts as two."""
_ANY_SCALAR = (
    rf"(?:{_PLAIN}|\\[\x22\x5c\x2fbfnrt]|\\u(?:[0-9a-ce-fA-CE-F]{_HEX}{{3}}|[dD][0-7]{_HEX}{{2}}"
    rf"|[dD][89abAB]{_HEX}{{2}}\\u[dD][c-fC-F]{_HEX}{{2}}))"
)


def one_of(ranges: Ranges, *, escapes: bool) -> str:
    """A regular expression for one of these characters.

    Args:
        ranges: the characters.
        escapes: as JSON writes them in a text; else they stand as they are.
    """
    if not escapes:
        return _class(without(ranges, [_SURROGATES]))
    if tuple(ranges) == EVERYTHING:
        return _ANY_SCALAR
    ways = [_class(plain)] if (plain := without(ranges, [*_NEVER_PLAIN, _SURROGATES])) else []
    short = [letter for char, letter in _SHORT.items() if any(low <= ord(char) <= high for low, high in ranges)]
    if short:
        ways.append(rf"\\{_class([(ord(letter), ord(letter)) for letter in short])}")
    for low, high in ranges:
        if low <= 0xFFFF:
            ways += [rf"\\u{digits}" for digits in _hexadecimal(low, min(high, 0xFFFF), 4)]
        if high > 0xFFFF:
            ways += _pairs(max(low, 0x10000) - 0x10000, high - 0x10000)
    return f"(?:{'|'.join(ways)})"


def literal(text: str, *, escapes: bool, plain: str = "") -> str:
    """A regular expression for a text; its letters may be escaped, but those in `plain`."""
    return "".join(_letter(char, escapes and char not in plain) for char in text)


@lru_cache(maxsize=4096)  # a schema may list thousands of words, of the same few letters
def _letter(char: str, escapes: bool) -> str:
    return one_of([(ord(char), ord(char))], escapes=escapes)


def complement(ranges: Ranges) -> Ranges:
    """All characters but these and halves of surrogate pairs."""
    return without(EVERYTHING, [*ranges, _SURROGATES])


def without(ranges: Ranges, others: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The characters of `ranges` that are not among `others`."""
    left = list(ranges)
    for low, high in others:
        left = [
            (start, end)
            for first, last in left
            for start, end in ((first, min(last, low - 1)), (max(first, high + 1), last))
            if start <= end
        ]
    return left


def _class(ranges: Ranges) -> str:
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        char = chr(ranges[0][0])
        return char if char.isascii() and char.isalnum() else rf"\x{{{ranges[0][0]:x}}}"
    return "[" + "".join(rf"\x{{{low:x}}}-\x{{{high:x}}}" for low, high in ranges) + "]"


def integers(low: float, high: float) -> str:
    """A regular expression for the integers from `low` to `high` in decimal digits; infinite: without an end."""
    ways: list[str] = []
    if low < 0:
        ways += [f"-{way}" for way in _naturals(max(1, -high), -low)]
        ways += ["-0"] if high >= 0 else []
    if high >= 0:
        ways += _naturals(max(0, low), high)
    return f"(?:{'|'.join(ways)})"


def _naturals(low: float, high: float) -> list[str]:
    """The numbers from `low`, which is at least 0, to `high`."""
    least = len(str(int(low)))
    if math.isinf(high):
        return [*_ways(int(low), 10**least - 1, least, _DECIMAL), f"[1-9][0-9]{{{least},}}"]
    most = len(str(int(high)))
    if least == most:
        return _ways(int(low), int(high), least, _DECIMAL)
    between = [f"[1-9][0-9]{{{least},{most - 2}}}"] if most - least > 1 else []
    firsts = _ways(int(low), 10**least - 1, least, _DECIMAL)
    return [*firsts, *between, *_ways(10 ** (most - 1), int(high), most, _DECIMAL)]


def _hexadecimal(low: int, high: int, width: int) -> list[str]:
    """The numbers from `low` to `high` in hexadecimal digits, both cases, as few expressions."""
    return _ways(low, high, width, _HEXADECIMAL)


def _ways(low: int, high: int, width: int, digits: Sequence[str]) -> list[str]:
    """The numbers from `low` to `high` in as many digits, as few expressions.

    Args:
        low: the first.
        high: the last.
        width: digits of each.
        digits: how each is written, one letter for every case.
    """
    size = len(digits) ** (width - 1)
    first, last = low // size, high // size
    rest = f"{_letters(digits)}{{{width - 1}}}" if width > 1 else ""
    if low % size == 0 and high % size == size - 1:
        return [_letters(digits[first : last + 1]) + rest]
    head, tail = _letters(digits[first : first + 1]), _letters(digits[last : last + 1])
    if first == last:
        return [head + way for way in _ways(low % size, high % size, width - 1, digits)]
    ways = [head + way for way in _ways(low % size, size - 1, width - 1, digits)]
    if last - first > 1:
        ways.append(_letters(digits[first + 1 : last]) + rest)
    return ways + [tail + way for way in _ways(0, high % size, width - 1, digits)]


def _letters(digits: Sequence[str]) -> str:
    letters = "".join(digits)
    return letters if len(letters) == 1 else f"[{letters}]"


def _pairs(low: int, high: int) -> list[str]:
    """Surrogate pairs of the code points from `low` to `high`, counted from 0x10000."""
    first, last = low >> 10, high >> 10
    blocks = [(first, last, 0, 0x3FF)]
    if first == last:
        blocks = [(first, first, low & 0x3FF, high & 0x3FF)]
    elif low & 0x3FF or high & 0x3FF != 0x3FF:
        blocks = [(first, first, low & 0x3FF, 0x3FF), (last, last, 0, high & 0x3FF)]
        blocks += [(first + 1, last - 1, 0, 0x3FF)] if last - first > 1 else []
    return [
        rf"\\u(?:{'|'.join(_hexadecimal(0xD800 + a, 0xD800 + b, 4))})"
        rf"\\u(?:{'|'.join(_hexadecimal(0xDC00 + c, 0xDC00 + d, 4))})"
        for a, b, c, d in blocks
    ]
