r"""Patterns and formats of JSON schemas, as regular expressions over how a text may be written.

A pattern is read as ECMA's: \d and \w are ASCII, and it may match anywhere unless it is anchored. Looking ahead is
understood where the text begins; looking back, boundaries and references to groups are not.
"""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any, NamedTuple

from copyspec_engine.grammar.letters import EVERYTHING, Ranges, complement, one_of

__all__ = ["FORMATS", "InvalidPatternError", "Term", "UnreadablePatternError", "pattern_terms"]

# The standard library's own reader of regular expressions: it has no public name.
_reader: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

_Part = Any
"""What the reader makes of a part of a pattern: its kind, and what belongs to it."""
_DIGITS: Ranges = ((0x30, 0x39),)
_WORDS: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_SPACES: Ranges = (
    (0x09, 0x0D),
    (0x20, 0x20),
    (0xA0, 0xA0),
    (0x1680, 0x1680),
    (0x2000, 0x200A),
    (0x2028, 0x2029),
    (0x202F, 0x202F),
    (0x205F, 0x205F),
    (0x3000, 0x3000),
    (0xFEFF, 0xFEFF),
)
_CATEGORIES = {"CATEGORY_DIGIT": _DIGITS, "CATEGORY_WORD": _WORDS, "CATEGORY_SPACE": _SPACES}
_MOST_TIMES = 100_000
"""A number of repetitions beyond which it is as good as any number."""


_WRONG = re.compile(
    r"missing \), unterminated|unbalanced parenthesis|unterminated character set|nothing to repeat|multiple repeat"
    r"|min repeat greater|bad escape \(end of pattern\)"
)
"""What the reader says of patterns that are none in ECMA's syntax either; of others it may only not know that."""
_EMPTY_CLASS = re.compile(r"\[\^?\]")
"""A class that ECMA knows, and Python takes for the beginning of one that goes on."""


class UnreadablePatternError(ValueError):
    """A pattern that cannot be expressed; its text says what of it."""


class InvalidPatternError(UnreadablePatternError):
    """A pattern that is none: it means nothing that could be left out."""


class Term(NamedTuple):
    """What a whole text must match, or, if not `positive`, must not."""

    regex: str
    positive: bool = True


def pattern_terms(pattern: str, *, escapes: bool) -> list[list[Term]]:
    """What texts that match a pattern must match: all terms of one of the lists.

    Args:
        pattern: ECMA's syntax, as far as Python's is the same.
        escapes: letters may be escaped as in JSON.

    Raises:
        InvalidPatternError: it is none.
        UnreadablePatternError: it cannot be expressed.
    """
    try:
        tree = _reader.parse(re.sub(r"\(\?<(?![=!])", "(?P<", pattern))
    except (re.error, RecursionError, OverflowError) as error:
        if isinstance(error, re.error) and _WRONG.match(str(error)) and not _EMPTY_CLASS.search(pattern):
            raise InvalidPatternError(str(error)) from error
        raise UnreadablePatternError(str(error)) from error
    if tree.state.flags & ~re.UNICODE:
        raise UnreadablePatternError("flags")
    return [_alternative(way, escapes=escapes) for way in _expanded(list(tree))]


def _name(part: _Part) -> str:
    return str(part[0])


def _has_anchor(parts: list[_Part]) -> bool:
    return any(_name(part) == "AT" or any(_has_anchor(list(inner)) for inner in _inner(part)) for part in parts)


def _inner(part: _Part) -> list[_Part]:
    """What stands in a group or in the branches of one."""
    if _name(part) == "BRANCH":
        return list(part[1][1])
    return [part[1][3]] if _name(part) == "SUBPATTERN" and not (part[1][1] or part[1][2]) else []


def _expanded(parts: list[_Part]) -> list[list[_Part]]:
    """The ways through a pattern whose branches hold anchors."""
    for at, part in enumerate(parts):
        inner = _inner(part)
        if inner and _has_anchor([part]):
            return [way for branch in inner for way in _expanded([*parts[:at], *branch, *parts[at + 1 :]])]
    return [parts]


def _is_at(parts: list[_Part], index: int, *names: str) -> bool:
    return bool(parts) and _name(parts[index]) == "AT" and str(parts[index][1]) in names


def _alternative(parts: list[_Part], *, escapes: bool) -> list[Term]:
    terms: list[Term] = []
    begins = False
    while parts:
        if _is_at(parts, 0, "AT_BEGINNING", "AT_BEGINNING_STRING"):
            begins, parts = True, parts[1:]
        elif begins and _name(parts[0]) in ("ASSERT", "ASSERT_NOT") and parts[0][1][0] > 0:
            ahead = [_whole(way, begins=True, escapes=escapes) for way in _expanded(list(parts[0][1][1]))]
            terms.append(Term(f"(?:{'|'.join(ahead)})", _name(parts[0]) == "ASSERT"))
            parts = parts[1:]
        else:
            break
    return [Term(_whole(parts, begins=begins, escapes=escapes)), *terms]


def _whole(parts: list[_Part], *, begins: bool, escapes: bool) -> str:
    """What a text must match so that it holds these parts."""
    anything = one_of(EVERYTHING, escapes=escapes) + "*"
    while _is_at(parts, 0, "AT_BEGINNING", "AT_BEGINNING_STRING"):
        begins, parts = True, parts[1:]
    ends = False
    while _is_at(parts, -1, "AT_END", "AT_END_STRING"):
        ends, parts = True, parts[:-1]
    middle = "".join(_written(part, escapes=escapes) for part in parts)
    return ("" if begins else anything) + middle + ("" if ends else anything)


def _written(part: _Part, *, escapes: bool) -> str:
    """One part of a pattern."""
    name, value = _name(part), part[1]
    if name in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
        ranges = _ranges(name, value)
        if not ranges:
            raise UnreadablePatternError("a class without characters")
        return one_of(ranges, escapes=escapes)
    if _inner(part):
        ways = ["".join(_written(item, escapes=escapes) for item in way) for way in _inner(part)]
        return f"(?:{'|'.join(ways)})"
    if name in ("MAX_REPEAT", "MIN_REPEAT"):
        least, most, inner = int(value[0]), int(value[1]), value[2]
        if least > _MOST_TIMES:
            raise UnreadablePatternError(f"{least} repetitions")
        body = "".join(_written(item, escapes=escapes) for item in inner)
        return f"(?:{body}){{{least},{most if most <= _MOST_TIMES else ''}}}"
    raise UnreadablePatternError({"ASSERT": "looking ahead", "ASSERT_NOT": "looking ahead"}.get(name, name.lower()))


def _ranges(name: str, value: _Part) -> Ranges:
    """The characters that a part takes."""
    if name == "ANY":
        return complement([(0x0A, 0x0A)])
    if name != "IN":
        return complement([(value, value)]) if name == "NOT_LITERAL" else [(value, value)]
    found: list[tuple[int, int]] = []
    negated = False
    for kind, item in value:
        if str(kind) == "NEGATE":
            negated = True
        elif str(kind) == "CATEGORY":
            category = str(item)
            known = _CATEGORIES[category.replace("NOT_", "")]
            found += complement(known) if "NOT_" in category else known
        else:
            found.append((item, item) if str(kind) == "LITERAL" else item)
    taken = complement(found) if negated else found
    return taken if complement(taken) else EVERYTHING


_OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"(?:{_OCTET}\.){{3}}{_OCTET}"
_GROUP = "[0-9a-fA-F]{1,4}"
_LABEL = "[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_HOST = rf"{_LABEL}(?:\.{_LABEL})*"
_DATE = (
    "[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|[12][0-9]))"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:(?:[0-5][0-9]|60)(?:\.[0-9]+)?(?:[zZ]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_SECONDS = r"[0-9]+(?:\.[0-9]+)?S"
_CLOCK = rf"T(?:[0-9]+H(?:[0-9]+M)?(?:{_SECONDS})?|[0-9]+M(?:{_SECONDS})?|{_SECONDS})"
_ATOM = r"[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]+"
_IPV6 = "|".join(
    [
        rf"(?:{_GROUP}:){{7}}{_GROUP}",
        rf"(?:{_GROUP}:){{6}}{_IPV4}",
        *(
            rf"(?:(?:{_GROUP}:){{0,{before - 1}}}{_GROUP})?::(?:(?:{_GROUP}:){{0,{6 - before}}}{_GROUP})?"
            for before in range(1, 7)
        ),
        rf"(?:{_GROUP}:){{0,6}}{_GROUP}::",
        rf"(?:(?:{_GROUP}:){{0,4}}{_GROUP})?::(?:{_GROUP}:){{0,4}}{_IPV4}",
    ]
)

FORMATS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}[tT ]{_TIME}$",
    "duration": (
        f"^P(?:[0-9]+W|(?:[0-9]+Y(?:[0-9]+M)?(?:[0-9]+D)?|[0-9]+M(?:[0-9]+D)?|[0-9]+D)(?:{_CLOCK})?|{_CLOCK})$"
    ),
    "email": rf"^{_ATOM}(?:\.{_ATOM})*@(?:{_HOST}|\[{_IPV4}\])$",
    "hostname": f"^{_HOST}$",
    "ipv4": f"^{_IPV4}$",
    "ipv6": f"^(?:{_IPV6})$",
    "uuid": "^[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}$",
    "uri": r"^[a-zA-Z][a-zA-Z0-9+.-]*:[a-zA-Z0-9._~:/?#\[\]@!$&'()*+,;=%-]*$",
}
"""Patterns of the formats that are held to."""
