"""Lark rules for the values that fit a JSON schema, written as JSON or as Gemma writes them.

The members of an object may come in any order, each once. Nothing that fits is refused but other spellings of numbers;
what cannot be expressed of a schema is left out there, or refused where that was asked for.
"""

from __future__ import annotations

import json
import logging
import math
import re
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from copyspec_engine.grammar.letters import ANY_CHARACTER, EVERYTHING, integers, literal, one_of
from copyspec_engine.grammar.patterns import FORMATS, InvalidPatternError, UnreadablePatternError, pattern_terms
from copyspec_engine.grammar.schema import Json, Plain, SchemaReader, fits_limits, joined, merged, property_schema
from copyspec_engine.values.errors import ConfigError, shortened

__all__ = ["ANY_TEXT", "JsonSpelling", "key_regex", "plain_regex", "value_rules"]

logger = logging.getLogger(__name__)

_MOST_BITS = 62
"""Members of one object that are counted, of llguidance's 64."""
_MOST_WAYS = 200
"""Combinations of alternatives that are tried."""
_MOST_TIMES = 1_000_000
"""A number of repetitions beyond which it is as good as any number."""
_KEY_LETTERS = string.ascii_letters + string.digits + "_-. "
"""Letters of keys that nobody escapes: where they alone can follow they are forced, and drafted."""
ANY_TEXT = rf"/\x22{ANY_CHARACTER}*\x22/"
"""Any text in JSON, in Lark."""
_MOST_DEEP = 1000
"""Rules that lead to each other, which llguidance reads by recursion."""
_NOTHING = '""'
_NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+\-]?[0-9]+)?"
_INTEGER = "-?(?:0|[1-9][0-9]*)"


def key_regex(name: str) -> str:
    """A regular expression for a name in JSON: its letters may be escaped, but those that nobody escapes."""
    return rf"\x22{literal(name, escapes=True, plain=_KEY_LETTERS)}\x22"


def plain_regex(text: str) -> str:
    """A regular expression for a text as it is."""
    return literal(text, escapes=False)


@dataclass(frozen=True)
class JsonSpelling:
    """How values are written."""

    space: str = ""
    """A regular expression for what may stand between the parts."""
    comma: str = ","
    colon: str = ":"
    quote: str = ""
    """In Lark: opens and closes a text, in which nothing is escaped; keys stand bare. Empty: JSON."""


class _Way(NamedTuple):
    """One way to write a rule's value."""

    text: str
    needs: tuple[str, ...] = ()
    """Rules without which it is none."""


def value_rules(
    prefix: str, schema: Json, spelling: JsonSpelling, *, owner: str, lenient: bool, closed: bool
) -> list[str]:
    """Rules in Lark of which the first, named `prefix`, takes a value that fits a schema.

    Args:
        prefix: begins all names of rules, in small letters.
        schema: a JSON schema.
        spelling: how it is written.
        owner: whose schema it is, for messages.
        lenient: leave out what cannot be expressed, and log it.
        closed: objects take no properties but those that are named, where the schema does not say.

    Raises:
        ConfigError: it is no schema, no value fits it, or it says something that cannot be expressed.
    """
    return _Writer(prefix, schema, spelling, owner=owner, lenient=lenient, closed=closed).write(schema)


class _Writer:
    def __init__(
        self, prefix: str, root: Json, spelling: JsonSpelling, *, owner: str, lenient: bool, closed: bool
    ) -> None:
        self._prefix, self._spelling, self._owner = prefix, spelling, owner
        self._lenient, self._closed = lenient, closed
        self._reader = SchemaReader(root, self._leave_out, self._refused)
        self._rules: dict[str, list[_Way]] = {}
        self._counting: set[str] = set()
        """Rules that are handed the members that an object has."""
        self._terminals: dict[str, str] = {}
        self._waiting: list[tuple[str, Json, str]] = []
        self._known: dict[str, str] = {}
        self._unfit: dict[str, str] = {}
        """Why nothing fits a rule."""
        space, self._escapes = spelling.space, not spelling.quote
        self._open, self._close = rf"/\{{{space}/", rf"/{space}\}}/"
        self._open_list, self._close_list = rf"/\[{space}/", rf"/{space}\]/"
        self._comma = f"/{space}{spelling.comma}{space}/"
        self._colon = f"/{space}{spelling.colon}{space}/"

    def write(self, schema: Json) -> list[str]:
        top = self._value(schema, "")
        while self._waiting:
            name, part, where = self._waiting.pop(0)
            self._rules[name] = list(self._ways(self._reader.plain(part, where), where, name))
            if self._rules[name]:
                self._unfit[name] = f"it is endless, in {self._place(where)}"
        self._drop_empty()
        if not self._rules[top]:
            reasons = [reason for rule, reason in self._unfit.items() if not self._rules[rule]]
            raise ConfigError(f"Got {self._owner} that no value fits: {min(reversed(reasons), key=_is_endless)}")
        self._check_depth(top)
        written = [f"{self._prefix}: {top}"]
        for name, ways in self._rules.items():
            texts = " | ".join(way.text or _NOTHING for way in ways)
            written += [f"{name}{'::_' if name in self._counting else ''}: {texts}"] if ways else []
        return written + [f"{name}: {text}" for text, name in self._terminals.items()]

    def _drop_empty(self) -> None:
        """Leave only ways whose rules can come to an end."""
        full: set[str] = set()
        while True:
            more = {
                name
                for name, ways in self._rules.items()
                if name not in full and any(full.issuperset(way.needs) for way in ways)
            }
            if not more:
                break
            full |= more
        for name, ways in self._rules.items():
            self._rules[name] = [way for way in ways if full.issuperset(way.needs)]

    def _check_depth(self, top: str) -> None:
        """Refuse what llguidance would not come back from: it reads each rule where it is first met."""
        seen = {top}
        path = [iter(self._references(top))]
        while path:
            if len(path) > _MOST_DEEP:
                raise ConfigError(
                    f"Got {self._owner} with values nested more than {_MOST_DEEP // 3} deep: make it flatter"
                )
            below = next((name for name in path[-1] if name not in seen), None)
            if below is None:
                path.pop()
            else:
                seen.add(below)
                path.append(iter(self._references(below)))

    def _references(self, name: str) -> list[str]:
        return [found for way in self._rules[name] for found in re.findall(rf"\b{self._prefix}r\d+\b", way.text)]

    # ---- messages ------------------------------------------------------------------------------------------------

    def _place(self, where: str) -> str:
        return f"property {where.lstrip('.')!r} of {self._owner}" if where else self._owner

    def _refused(self, text: str, where: str) -> ConfigError:
        return ConfigError(f"Got {text}, in {self._place(where)}")

    def _leave_out(self, what: str, where: str) -> None:
        if not self._lenient:
            raise ConfigError(
                f"Got {what} in {self._place(where)} but grammars cannot express it: leave it out of the schema, or do "
                "not ask for strict answers"
            )
        logger.warning("Not held to by the grammar: %s, in %s", shortened(what), self._place(where))

    def _leave_out_pattern(self, what: str, error: UnreadablePatternError, where: str) -> None:
        if isinstance(error, InvalidPatternError):
            raise self._refused(f"{what}, which is no regular expression ({error})", where)
        self._leave_out(f"{what} ({error})", where)

    # ---- values --------------------------------------------------------------------------------------------------

    def _named(self, ways: Iterable[_Way]) -> str:
        name = f"{self._prefix}r{len(self._rules)}"
        self._rules[name] = []
        self._rules[name] = list(ways)
        return name

    def _terminal(self, text: str) -> str:
        return self._terminals.setdefault(text, f"{self._prefix.upper()}T{len(self._terminals)}")

    def _value(self, schema: Json, where: str) -> str:
        """The rule of the values that fit a schema; it is written later."""
        key = json.dumps(schema)
        if key not in self._known:
            self._known[key] = self._named([])
            self._waiting.append((self._known[key], schema, where))
        return self._known[key]

    def _ways(self, plain: Plain, where: str, name: str) -> Iterable[_Way]:
        if plain.choices:
            yield from self._chosen(plain, where, name)
            return
        if plain.constants is not None:
            values = [value for value in plain.constants if fits_limits(value, plain)]
            if not values:
                self._unfit[name] = f"no constant is left, in {self._place(where)}"
            yield from (self._constant(value, plain, where) for value in values)
            return
        if not plain.types:
            self._unfit[name] = f"no type of value is left, in {self._place(where)}"
        writers: dict[str, Callable[[Plain, str, str], Iterable[_Way]]] = {
            "null": lambda *_: [_Way('"null"')],
            "boolean": lambda *_: [_Way("/true|false/")],
            "integer": self._number,
            "number": self._number,
            "string": self._string,
            "array": self._array,
            "object": self._object,
        }
        for kind, writer in writers.items():
            if kind in plain.types:
                yield from writer(plain, where, name)

    def _chosen(self, plain: Plain, where: str, name: str) -> Iterable[_Way]:
        """The ways of plain forms that hold one of each choice's schemas."""
        if plain == Plain(choices=plain.choices[:1]):
            for option in plain.choices[0]:
                rule = self._value(option, where)
                yield _Way(rule, (rule,))
            if not plain.choices[0]:
                self._unfit[name] = f"anyOf is empty, in {self._place(where)}"
            return
        waiting, done = [plain], 0
        while waiting:
            done += 1
            if done > _MOST_WAYS:
                raise self._refused(f"more than {_MOST_WAYS} combinations of anyOf and oneOf", where)
            one = waiting.pop(0)
            if not one.choices:
                yield from self._ways(one, where, name)
                continue
            base = replace(one, choices=one.choices[1:])
            waiting += [merged(base, self._reader.plain(option, where)) for option in one.choices[0]]

    def _constant(self, value: Json, plain: Plain, where: str) -> _Way:
        if isinstance(value, str):
            return _Way(self._text(literal(value, escapes=self._escapes)) if value else self._text(""))
        if isinstance(value, list):
            asked = [*plain.prefix, *[plain.items] * (len(value) - len(plain.prefix))]
            parts = [joined(part, {"const": item}) for part, item in zip(asked, value, strict=False)]
            schema = {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}
        elif isinstance(value, dict):
            members = {key: joined(property_schema(plain, key), {"const": item}) for key, item in value.items()}
            schema = {"type": "object", "properties": members, "required": [*members], "additionalProperties": False}
        else:
            return _Way(json.dumps(json.dumps(value)))
        rule = self._value(schema, where)
        return _Way(rule, (rule,))

    def _number(self, plain: Plain, where: str, name: str) -> Iterable[_Way]:
        names = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
        limits = {key: plain.limits[key] for key in names if key in plain.limits}
        low = max(limits.get("minimum", -math.inf), limits.get("exclusiveMinimum", -math.inf))
        high = min(limits.get("maximum", math.inf), limits.get("exclusiveMaximum", math.inf))
        is_whole = "number" not in plain.types
        if is_whole:
            low, high = (
                _whole(low, limits.get("exclusiveMinimum"), up=True),
                _whole(high, limits.get("exclusiveMaximum"), up=False),
            )
        is_open = low in (limits.get("exclusiveMinimum"), -math.inf) or high == limits.get("exclusiveMaximum")
        is_empty = low > high or (low == high and is_open and not is_whole)
        if is_empty:
            self._unfit[name] = f"no number is left between {low} and {high}, in {self._place(where)}"
            return
        multiples = self._multiples(plain, where)
        if is_whole and not multiples:
            yield _Way(f"/{integers(low, high)}/")
            return
        kind = {"type": "integer" if is_whole else "number"} | ({"multipleOf": multiples[0]} if multiples else {})
        trouble = _json_trouble(kind | limits)
        if "Unsatisfiable" in trouble:
            self._unfit[name] = f"no number between {low} and {high} is a multiple, in {self._place(where)}"
            return
        if trouble:
            self._leave_out(", ".join(f"{key}={value}" for key, value in (kind | limits).items()), where)
        if trouble or not (limits or multiples):
            yield _Way(f"/{_INTEGER if is_whole else _NUMBER}/")
            return
        yield _Way(f"%json {json.dumps(kind | limits)}")
        if not is_whole and not multiples:  # with an exponent, as far as that says enough of its size
            small, large = r"[1-9](?:\.[0-9]+)?[eE]-0*[1-9][0-9]*", r"[1-9](?:\.[0-9]+)?[eE]\+?[0-9]+"
            ends = [(small, 0, 1), (large, 1, math.inf)]
            ways = [text for text, start, end in ends if low <= start and high >= end]
            ways += [f"-{text}" for text, start, end in ends if low <= -end and high >= -start]
            if ways:
                yield _Way(f"/{'|'.join(ways)}/")

    def _multiples(self, plain: Plain, where: str) -> tuple[float, ...]:
        """What a number must be a multiple of; at most one."""
        if len(plain.multiples) > 1:
            if all(isinstance(it, int) for it in plain.multiples):
                return (math.lcm(*map(int, plain.multiples)),)
            self._leave_out(f"multipleOf={list(plain.multiples)}", where)
        return plain.multiples[:1]

    # ---- texts ---------------------------------------------------------------------------------------------------

    def _text(self, regex: str, *others: str) -> str:
        """A text whose content matches a regular expression, and other terms in Lark that are over the whole of it."""
        quote = self._spelling.quote
        if quote:
            content = " & ".join((f"/{regex}/", *others))
            return f"{quote} {self._terminal(content) if regex else ''} {quote}"
        content = " & ".join((rf"/\x22{regex}\x22/", *others))
        return self._terminal(content) if others else content

    def _string(self, plain: Plain, where: str, name: str) -> Iterable[_Way]:
        least, most = int(plain.limits.get("minLength", 0)), plain.limits.get("maxLength", math.inf)
        if least > most:
            self._unfit[name] = f"minLength={least} is more than maxLength={most:g}, in {self._place(where)}"
            return
        self._unfit[name] = f"no text has this pattern and length, in {self._place(where)}"
        for way in self._string_terms(plain, where):
            terms = list(way)
            if least or most < _MOST_TIMES:
                one = one_of(EVERYTHING, escapes=self._escapes)
                terms.insert(0, (f"{one}{{{least},{int(most) if most < _MOST_TIMES else ''}}}", True))
            if not terms:
                yield _Way(self._text(f"{ANY_CHARACTER}*" if self._escapes else r"(?:.|\n)*"))
                continue
            (first, _), *others = sorted(terms, key=lambda term: not term[1])
            mark = "" if self._spelling.quote else r"\x22"
            conditions = [f"{'' if ok else '~'}/{mark}{text}{mark}/" for text, ok in others]
            if not conditions or _has_texts(" & ".join([f"/{mark}{first}{mark}/", *conditions])):
                yield _Way(self._text(first, *conditions))

    def _string_terms(self, plain: Plain, where: str) -> list[list[tuple[str, bool]]]:
        """What contents must match, or not: all of one of the lists."""
        ways: list[list[tuple[str, bool]]] = [[]]
        wanted = [(f"pattern={it!r}", it) for it in plain.patterns]
        for known in plain.formats:
            if known in FORMATS:
                wanted.append((f"format={known!r}", FORMATS[known]))
            else:
                self._leave_out(f"format={known!r}", where)
        for what, pattern in wanted:
            try:
                found = pattern_terms(pattern, escapes=self._escapes)
            except UnreadablePatternError as error:
                self._leave_out_pattern(what, error, where)
                continue
            ways = [[*one, *((term.regex, term.positive) for term in two)] for one in ways for two in found]
        return ways

    def _key(self, name: str) -> str:
        return plain_regex(name) if self._spelling.quote else key_regex(name)

    # ---- arrays and objects --------------------------------------------------------------------------------------

    def _array(self, plain: Plain, where: str, name: str) -> Iterable[_Way]:
        least, most = int(plain.limits.get("minItems", 0)), plain.limits.get("maxItems", math.inf)
        if least > most:
            self._unfit[name] = f"minItems={least} is more than maxItems={most:g}, in {self._place(where)}"
            return
        if not least:
            yield _Way(rf"/\[{self._spelling.space}\]/")
        inner, count = f"{where}[]", len(plain.prefix)
        item = self._value(plain.items, inner)
        if not count:
            if most:
                rest = _times(f"{self._comma} {item}", max(least - 1, 0), most - 1)
                yield _Way(f"{self._open_list} {item} {rest} {self._close_list}", (item,))
            return
        rest = self._named(self._rest_of_array(item, least - count, most - count))
        for at in range(count - 1, 0, -1):
            part = self._value(plain.prefix[at], inner)
            ways = [_Way("")] if at >= least else []
            ways += [_Way(f"{self._comma} {part} {rest}", (part, rest))] if at < most else []
            rest = self._named(ways)
        if most:
            first = self._value(plain.prefix[0], inner)
            yield _Way(f"{self._open_list} {first} {rest} {self._close_list}", (first, rest))

    def _rest_of_array(self, item: str, least: int, most: float) -> Iterable[_Way]:
        if least <= 0:
            yield _Way("")
        if most > 0:
            yield _Way(_times(f"{self._comma} {item}", max(least, 1), most), (item,))

    def _object(self, plain: Plain, where: str, name: str) -> Iterable[_Way]:
        names = sorted(dict.fromkeys([*plain.required, *plain.properties]), key=lambda it: it not in plain.required)
        least, most = int(plain.limits.get("minProperties", 0)), plain.limits.get("maxProperties", math.inf)
        members = [self._member(plain, it, where) for it in names]
        others = self._others(plain, names, where)
        empty = _Way(rf"/\{{{self._spelling.space}\}}/")
        self._unfit[name] = f"no object has these properties, and so many, in {self._place(where)}"
        if not names:
            other = self._named(_Way(it, (it,)) for it in others)
            if not least:
                yield empty
            if most and least <= most:
                rest = _times(f"{self._comma} {other}", max(least - 1, 0), most - 1)
                yield _Way(f"{self._open} {other} {rest} {self._close}", (other,))
            return
        if len(names) > _MOST_BITS:
            self._leave_out(f"that each of {len(names)} properties comes once and none is missing", where)
        counted, free = members[:_MOST_BITS], others + members[_MOST_BITS:]
        needed = min(len(plain.required), _MOST_BITS)
        if max(least, len(plain.required)) > most:
            return
        if free and (least > needed or most < math.inf):
            self._leave_out("minProperties or maxProperties beside other properties", where)
            least, most = 0, math.inf
        if not free and max(least, needed) > min(most, len(counted)):
            return
        rest = self._more_members(counted, free, needed, (least, most))
        if not needed and not least:
            yield empty
        requirements = tuple(counted[:needed])
        firsts = [(member, 1 << at) for at, member in enumerate(counted)] + [(member, 0) for member in free]
        for member, seen in firsts if most else ():
            text = f"{self._open} {member} {rest}::{seen:#x} {self._close}"
            yield _Way(text, (member, rest, *requirements))

    def _more_members(self, counted: list[str], free: list[str], needed: int, limits: tuple[float, float]) -> str:
        """The rule of the members behind the first; it is handed a bit for each counted one that has come.

        Args:
            counted: rules of members that come once.
            free: rules of members that may come again.
            needed: so many of the counted ones must come, the first.
            limits: fewest and most members.
        """
        least, most = limits
        complete = [f"is_ones([0:{needed}])"] if needed else []
        if least > needed:
            complete.append(f"bit_count_ge([0:{len(counted)}], {int(least)})")
        room = [f"bit_count_lt([0:{len(counted)}], {int(most)})"] if most < len(counted) else []
        rest = self._named([])
        self._counting.add(rest)
        ways = [_Way(f'"" {_condition(complete)}')]
        for at, member in enumerate(counted):
            condition = _condition([f"bit_clear({at})", *room])
            ways.append(_Way(f"{self._comma} {member} {rest}::set_bit({at}) {condition}", (member,)))
        ways += [_Way(f"{self._comma} {member} {rest}::_", (member,)) for member in free]
        self._rules[rest] = ways
        return rest

    def _member(self, plain: Plain, name: str, where: str) -> str:
        schema = property_schema(plain, name)
        if schema is None:  # required, but not described
            schema = name in plain.properties or not self._is_closed(plain)
        value = self._value(schema, f"{where}.{name}")
        return self._named([_Way(f"/{self._key(name)}/ {self._colon} {value}", (value,))])

    def _is_closed(self, plain: Plain) -> bool:
        return self._closed and bool(plain.properties or plain.pattern_properties)

    def _others(self, plain: Plain, names: list[str], where: str) -> list[str]:
        """Rules of the members that are not named."""
        quote = self._spelling.quote
        taken = f"~/{'|'.join(map(self._key, names))}/" if names else ""
        keys: list[tuple[str, Json]] = []
        patterns: list[str] = []
        for pattern, schema in plain.pattern_properties.items():
            try:
                ways = pattern_terms(pattern, escapes=not quote)
            except UnreadablePatternError as error:
                self._leave_out_pattern(f"patternProperties {pattern!r}", error, where)
                keys.append((self._any_key(taken), True))
                continue
            for way in ways:
                mark = "" if quote else r"\x22"
                terms = [f"{'' if term.positive else '~'}/{mark}{term.regex}{mark}/" for term in way]
                keys.append((" & ".join([*terms, taken] if taken else terms), schema))
                patterns.append(f"({' & '.join(terms)})")
        additional = not self._is_closed(plain) if plain.additional is None else plain.additional
        if additional is not False:
            unlike = [taken, *(f"~{pattern}" for pattern in patterns)]
            keys.append((self._any_key(*filter(None, unlike)), additional))
        members = []
        for key, schema in keys:
            value = self._value(schema, f"{where}.*")
            members.append(self._named([_Way(f"{self._terminal(key)} {self._colon} {value}", (value,))]))
        return members

    def _any_key(self, *unlike: str) -> str:
        return " & ".join((r"/[\w.\-]+/" if self._spelling.quote else ANY_TEXT, *unlike))


def _is_endless(reason: str) -> bool:
    """Whether a value only waits for others: they may have reasons of their own."""
    return reason.startswith("it is endless")


def _json_trouble(schema: Json) -> str:
    """What llguidance has against a schema of a number."""
    from llguidance import LLMatcher

    return LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(json.dumps(schema)))


@lru_cache(maxsize=256)
def _has_texts(terminal: str) -> bool:
    """Whether any text is as a terminal asks for, in Lark."""
    from llguidance import LLMatcher, LLTokenizer

    matcher = LLMatcher(LLTokenizer("byte"), LLMatcher.grammar_from_lark(f"start: TEXT\nTEXT: {terminal}"), log_level=0)
    if not matcher.is_stopped():
        matcher.compute_bitmask()
    return "NoExtensionBias" not in matcher.get_error()


def _condition(terms: list[str]) -> str:
    if not terms:
        return ""
    whole = terms[0]
    for term in terms[1:]:
        whole = f"and({whole}, {term})"
    return f"%if {whole}"


def _whole(limit: float, excluded: float | None, *, up: bool) -> float:
    """The first whole number within a limit."""
    if math.isinf(limit):
        return limit
    if up:
        return math.floor(limit) + 1 if limit == excluded else math.ceil(limit)
    return math.ceil(limit) - 1 if limit == excluded else math.floor(limit)


def _times(text: str, least: int, most: float) -> str:
    """A part that comes some times."""
    if not most:
        return ""
    return f"({text}){{{least},{int(most) if most < _MOST_TIMES else ''}}}"
