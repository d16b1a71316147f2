"""Python's regular expressions as syntax trees: the grammar is Python's own parser's, the meaning that of `re.fullmatch`.

Owns which constructs are refused. What a single character matches (classes, escapes, ignored case) is asked of `re` itself.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Sequence
from typing import Any

from hf_accel.structured.charset import ANY_CHAR, LAST_CODE_POINT, CharSet
from hf_accel.structured.syntax import EMPTY, Alt, Chars, Node, Repeat, Seq, StructureError

_parser: Any = re._parser  # type: ignore[attr-defined]
_compiler: Any = re._compiler  # type: ignore[attr-defined]

_STARTS = ("AT_BEGINNING", "AT_BEGINNING_STRING")
_ENDS = ("AT_END", "AT_END_STRING")
_CATEGORY_PATTERNS = {
    "CATEGORY_DIGIT": r"\d",
    "CATEGORY_NOT_DIGIT": r"\D",
    "CATEGORY_SPACE": r"\s",
    "CATEGORY_NOT_SPACE": r"\S",
    "CATEGORY_WORD": r"\w",
    "CATEGORY_NOT_WORD": r"\W",
}
_REFUSED = {
    "ASSERT": "a lookahead or lookbehind",
    "ASSERT_NOT": "a negative lookahead or lookbehind",
    "GROUPREF": "a backreference",
    "GROUPREF_EXISTS": "a conditional group",
    "ATOMIC_GROUP": "an atomic group (?>...)",
    "POSSESSIVE_REPEAT": "a possessive repetition",
}


def parse_regex(pattern: str) -> Node:
    """The texts that `re.fullmatch(pattern, text)` matches.

    Raises:
        StructureError: the pattern is no regular expression, or uses what no finite automaton can (or we do not) decide:
            lookaround, backreferences, conditionals, atomic groups, possessive repetition, `\\b`, anchors in the middle.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parsed = _parser.parse(pattern)
    except re.error as error:
        raise StructureError(f"not a regular expression: {error} in {pattern!r}") from None
    except (OverflowError, RecursionError) as error:
        raise StructureError(f"the regular expression is too large: {error}") from None
    return _Translator(pattern).sequence(parsed.data, parsed.state.flags, at_start=True, at_end=True)


class _Translator:
    """Walks Python's parse tree; `at_start` and `at_end` say whether an anchor there would hold by itself."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern

    def sequence(self, items: Sequence[tuple[Any, Any]], flags: int, at_start: bool, at_end: bool) -> Node:
        parts = []
        for index, (op, value) in enumerate(items):
            first = at_start and all(_is_empty(part) for part in parts)
            last = at_end and all(_is_anchor(op, _ENDS) for op in items[index + 1 :])
            parts.append(self.item(str(op), value, flags, first, last))
        kept = tuple(part for part in parts if not _is_empty(part))
        return kept[0] if len(kept) == 1 else Seq(kept)

    def item(self, op: str, value: Any, flags: int, at_start: bool, at_end: bool) -> Node:
        if op in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            return Chars(self.charset(op, value, flags))
        if op == "BRANCH":
            return Alt(tuple(self.sequence(part, flags, at_start, at_end) for part in value[1]))
        if op == "SUBPATTERN":
            _, added, removed, part = value
            return self.sequence(part, (flags | added) & ~removed, at_start, at_end)
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, part = value
            once = high == 1
            node = self.sequence(part, flags, at_start and once, at_end and once)
            return Repeat(node, low, None if high is _parser.MAXREPEAT else high)
        if op == "AT":
            return self.anchor(str(value), at_start, at_end)
        raise self.refusal(_REFUSED.get(op, f"the construct {op}"))

    def anchor(self, kind: str, at_start: bool, at_end: bool) -> Node:
        if (kind in _STARTS and at_start) or (kind in _ENDS and at_end):
            return EMPTY
        if kind in _STARTS + _ENDS:
            raise self.refusal("an anchor (^ or $) in the middle")
        raise self.refusal(r"a word boundary (\b or \B)")

    def charset(self, op: str, value: Any, flags: int) -> CharSet:
        if flags & re.IGNORECASE or (flags & re.ASCII and op == "IN"):
            return _asked(_freeze((op, value)), flags & (re.IGNORECASE | re.ASCII | re.DOTALL | re.UNICODE))
        if op == "LITERAL":
            return CharSet.of([(value, value)])
        if op == "NOT_LITERAL":
            return ~CharSet.of([(value, value)])
        if op == "ANY":
            return ANY_CHAR if flags & re.DOTALL else ~CharSet.of_chars("\n")
        members, negated = CharSet(()), False
        for kind, argument in value:
            name = str(kind)
            if name == "NEGATE":
                negated = True
            elif name == "LITERAL":
                members |= CharSet.of([(argument, argument)])
            elif name == "RANGE":
                members |= CharSet.of([argument])
            else:
                members |= _category(str(argument))
        return ~members if negated else members

    def refusal(self, construct: str) -> StructureError:
        return StructureError(
            f"the pattern {self.pattern!r} has {construct}, which structured output does not support: write it without"
        )


def _is_empty(node: Node) -> bool:
    return isinstance(node, Seq) and not node.parts


def _is_anchor(item: tuple[Any, Any], kinds: Sequence[str]) -> bool:
    return str(item[0]) == "AT" and str(item[1]) in kinds


def _freeze(value: Any) -> Any:
    return tuple(map(_freeze, value)) if isinstance(value, (list, tuple)) else value


@functools.cache
def _category(name: str) -> CharSet:
    return _matching(re.compile(_CATEGORY_PATTERNS[name]))


@functools.lru_cache(maxsize=512)
def _asked(item: Any, flags: int) -> CharSet:
    """The characters that `re` itself matches by one element of a parse tree under flags."""
    op, value = item
    state = _parser.State()
    state.flags, state.str = flags, ""
    data = [(op_code(op), list(value) if op == "IN" else value)]
    return _matching(_compiler.compile(_parser.SubPattern(state, data), flags))


def op_code(name: str) -> Any:
    """The parser's constant of that name."""
    return getattr(_parser, name)


@functools.cache
def _every_char() -> str:
    return "".join(map(chr, [*range(0xD800), *range(0xE000, LAST_CODE_POINT + 1)]))


def _matching(pattern: re.Pattern[str]) -> CharSet:
    """Every character that the one-character pattern matches."""
    return CharSet.of((ord(m.group()), ord(m.group())) for m in pattern.finditer(_every_char()))
