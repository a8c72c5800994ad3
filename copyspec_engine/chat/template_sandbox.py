"""Jinja under limits: chat templates come with checkpoints, from anywhere, and must neither hang nor fill the memory.

Each rendering has a budget. Whatever makes a text or a list longer asks it first, so that nothing too large is ever
made; loops and calls ask it for time.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined, markup_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

__all__ = ["TemplateLimitError", "compile_template", "render_template"]

_MAX_SECONDS = 5.0
"""Time on the processor for one rendering; a thousand messages take some hundredths."""
_FREE_SIZE = 1 << 20
"""Characters that any template may write, however short the messages are."""
_TIMES_INPUTS = 4
"""A template may write this many times as many as it was given."""
_TIMES_WRITTEN = 64
"""And make this many times as many on the way: some put the text together by adding message after message."""
_LIST_ITEM = 8
"""What an element of a list costs, in characters."""
_UNBOUNDED = frozenset({"translate", "maketrans", "expandtabs", "format_map", "to_bytes", "from_bytes"})
"""Methods whose results may be of any size."""
_WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*(?:\*|\d{4})")
_WIDE_FIELD = re.compile(r"\{[^{}]*:[^{}]*(?:\{|\d{4})")
"""Fields of formats that are padded to a width of thousands, or to one that is computed."""


class TemplateLimitError(Exception):
    """A template wants more time or memory than any chat needs."""


class _Budget:
    """What one rendering may still take.

    Args:
        size: of what the template is given, in characters.
    """

    def __init__(self, size: int) -> None:
        self.most = _FREE_SIZE + _TIMES_INPUTS * size
        self._left = _TIMES_WRITTEN * self.most
        self._end, self._busy_end = time.perf_counter() + _MAX_SECONDS, time.thread_time() + _MAX_SECONDS

    def take(self, size: int) -> None:
        """Something of this size is made."""
        self._left -= size
        if size > self.most:
            raise TemplateLimitError(f"it makes a text or a list of more than {self.most:,} characters or elements")
        if self._left < 0:
            total = _TIMES_WRITTEN * self.most
            raise TemplateLimitError(f"it makes more than {total:,} characters and elements in all")
        # The thread's own time is slow to ask for, and never more than what has passed.
        if time.perf_counter() > self._end and time.thread_time() > self._busy_end:
            raise TemplateLimitError(f"it takes more than {_MAX_SECONDS:g} seconds")

    def size(self, value: object) -> int:
        """All that a value holds, in characters and elements, what it holds twice counted twice."""
        if isinstance(value, str):
            return len(value)
        size, stack = 0, [value]
        while stack:
            item = stack.pop()
            if isinstance(item, str | bytes):
                size += len(item)
            elif isinstance(item, Mapping):
                size += _LIST_ITEM * len(item)
                stack += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple | set | frozenset):
                size += _LIST_ITEM * len(item)
                stack += item
            elif isinstance(item, range):
                size += _LIST_ITEM * len(item)
            else:
                size += item.bit_length() // 3 + 1 if isinstance(item, int) else 1
            if size > self.most:
                self.take(size)
        return size


_budget: ContextVar[_Budget] = ContextVar("template_budget")


@contextmanager
def _limited_to(size: int) -> Iterator[None]:
    token = _budget.set(_Budget(size))
    try:
        yield
    finally:
        _budget.reset(token)


@functools.lru_cache(maxsize=32)
def compile_template(source: str) -> Template:
    """A template that `render_template` takes.

    Raises:
        jinja2.TemplateSyntaxError: it is not Jinja; `lineno` is where.
        TemplateLimitError: what it computes of constants is too large.
    """
    with _limited_to(len(source)):
        tree = _environment.parse(source)
        return _environment.from_string(_Counting().visit(tree))


def render_template(template: Template, variables: Mapping[str, Any], size: int) -> str:
    """The text that a template writes. May be called from any thread, by several at once.

    Args:
        template: a compiled one.
        variables: plain JSON values; the template cannot change them.
        size: of the values, in characters.

    Raises:
        TemplateLimitError: it would take too much time or memory.
        Exception: what the template itself raises, or a mistake in it.
    """
    with _limited_to(size):
        return template.render(variables)


class _Counting(NodeTransformer):
    """Puts a count into each loop, and what joins texts under the limits."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - Jinja's name
        self.generic_visit(node)
        text = sum(len(data.data) for part in node.body for data in part.find_all(nodes.TemplateData))
        node.iter = nodes.Filter(node.iter, "_counted", [nodes.Const(text)], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 - Jinja's name
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "_joined", [], [], None, None, lineno=node.lineno)

    def _nested(self, node: nodes.Expr) -> nodes.Node:
        """A list or dict that is written in the template: nested ones may hold the same one often."""
        self.generic_visit(node)
        is_target = getattr(node, "ctx", "load") != "load"
        if is_target or all(isinstance(part, nodes.Const) for part in node.iter_child_nodes()):
            return node
        return nodes.Filter(node, "_nested", [], [], None, None, lineno=node.lineno)

    visit_List = visit_Tuple = visit_Dict = _nested  # noqa: N815 - Jinja's names


class _Generation(Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here it is written as it is."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """Variables that a loop may set."""

    def __init__(*args: Any, **values: Any) -> None:  # noqa: ANN401 - `self` may be one of the values
        given = dict(*args[1:], **values)
        for name in given:
            _check_name(name)
        Namespace.__init__(args[0], given)

    def __setitem__(self, name: str, value: Any) -> None:  # noqa: ANN401
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"  # not what it holds, which may be itself


def _check_name(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: names begin with a letter")


class _Dict:
    """`dict(...)` and `dict.fromkeys(...)` without the class behind them."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:  # noqa: ANN401
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:  # noqa: ANN401
        return dict.fromkeys(*args)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja as chat templates know it (that of transformers), under limits."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=_written,
            cache_size=0,
        )
        self.filters = {name: _limited(name, function) for name, function in self.filters.items()}
        self.filters |= {"tojson": _tojson, "_counted": _counted, "_joined": _joined, "_nested": _nested}
        del self.filters["urlize"]
        self.globals = {"range": self.globals["range"], "namespace": _Namespace, "dict": _Dict()}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:  # noqa: ANN401
        return attr not in _UNBOUNDED and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401
        _budget.get().take(_binop_size(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **values: Any) -> Any:  # noqa: ANN401, N805
        budget = _budget.get()
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        subject = getattr(method, "__self__", None)
        given = [*args, *values.values()]
        if isinstance(subject, str | bytes):
            budget.take(_text_size(method.__name__, subject, given))
        elif isinstance(subject, _Dict) or isinstance(__obj, _Dict):
            budget.take(budget.size(given))
        result = super().call(__context, __obj, *args, **values)
        budget.take(_flat(result))
        return result


def _flat(value: object) -> int:
    """What a new value takes, without what its elements hold."""
    if isinstance(value, str | bytes):
        return len(value)
    return _LIST_ITEM * len(value) if isinstance(value, list | tuple | dict | set) else 1


def _binop_size(operator: str, left: Any, right: Any) -> int:  # noqa: ANN401
    """The size of what an operator makes, at most."""
    size = _budget.get().size
    if operator == "+":
        return _flat(left) + _flat(right)
    if operator == "%":
        return _text_size("%", left, [right]) if isinstance(left, str | bytes) else 1
    if operator == "**":
        return left.bit_length() * abs(right) // 8 + 1 if isinstance(left, int) and isinstance(right, int) else 1
    for many, times in ((left, right), (right, left)):
        if isinstance(many, str | bytes | list | tuple) and isinstance(times, int):
            return size(many) * max(times, 0)
    return sum(value.bit_length() // 8 + 1 for value in (left, right) if isinstance(value, int))


def _text_size(name: str, subject: Any, given: list[Any]) -> int:  # noqa: ANN401
    """The size of what a method of texts, or the filter of this name, makes of `subject`, at most."""
    size = _budget.get().size
    numbers = [abs(value) for value in given if isinstance(value, int)]
    texts = [value for value in given if isinstance(value, str | bytes)]
    length: int = len(subject) if hasattr(subject, "__len__") else size(subject)
    if name in ("center", "ljust", "rjust", "zfill", "batch", "slice"):
        return length + _LIST_ITEM * max(numbers, default=80)
    if name == "replace" and len(texts) > 1:
        return length + _count(subject, texts[0]) * len(texts[1])
    if name == "indent":
        return length + (_count(subject, "\n") + 1) * max([4, *numbers, *map(len, texts)])
    if name == "wordwrap":
        return length * (2 + max(map(len, texts), default=0))
    if name == "join" and isinstance(subject, str | bytes):
        return size(given) + len(subject) * (len(given[0]) if given and hasattr(given[0], "__len__") else 0)
    if name == "join":
        return size(subject) + length * max(map(len, texts), default=0)
    if name in ("%", "format"):
        wide, mark = (_WIDE_PERCENT, "%") if name == "%" else (_WIDE_FIELD, "{")
        if wide.search(str(subject)):
            raise TemplateLimitError("it pads texts to thousands of characters")
        return length + _count(str(subject), mark) * (size(given) + 1000)
    flattens = name in ("string", "pprint", "escape", "e", "forceescape", "urlencode", "xmlattr")
    return _TIMES_INPUTS * size(subject) if flattens else length


def _count(subject: object, part: str | bytes) -> int:
    """How often a part stands in a text."""
    if isinstance(subject, bytes) and isinstance(part, bytes):
        return subject.count(part)
    return str(subject).count(part) if isinstance(part, str) else 0


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that asks for the room it needs."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0
    name = "%" if name == "format" else name

    @functools.wraps(function)
    def run(*args: Any, **values: Any) -> Any:  # noqa: ANN401
        budget = _budget.get()
        if len(args) > first and isinstance(args[first], Iterator):
            args = (*args[:first], list(_counted(args[first], 0)), *args[first + 1 :])
        if len(args) > first and not isinstance(args[first], Undefined):
            budget.take(_text_size(name, args[first], [*args[first + 1 :], *values.values()]))
        result = function(*args, **values)
        budget.take(_flat(result))
        return result

    return run


def _counted(values: Iterable[Any], text: int) -> Iterator[Any]:
    """The same values; each takes as much as the template's own text around it."""
    take = _budget.get().take
    for value in values:
        take(text + _LIST_ITEM)
        yield value


def _joined(parts: list[Any]) -> str:
    """What `~` makes of values."""
    budget = _budget.get()
    budget.take(budget.size(parts))
    return markup_join(parts) if any(hasattr(part, "__html__") for part in parts) else "".join(map(str, parts))


def _nested(value: Any) -> Any:  # noqa: ANN401
    budget = _budget.get()
    budget.take(budget.size(value))
    return value


def _written(value: Any) -> Any:  # noqa: ANN401
    """What `{{ }}` writes."""
    budget = _budget.get()
    budget.take(len(value) if isinstance(value, str) else budget.size(value))
    return value


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes for HTML that Jinja's own filter makes."""
    budget, pieces = _budget.get(), []
    budget.take(_TIMES_INPUTS * budget.size(value))
    if isinstance(indent, int) and indent > 1000:
        raise TemplateLimitError(f"it indents JSON by {indent}")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    for piece in encoder.iterencode(value):
        budget.take(len(piece))
        pieces.append(piece)
    return "".join(pieces)


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


_environment = _Environment()
