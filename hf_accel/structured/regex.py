"""Python's regular expressions as syntax trees: the grammar is Python's own parser's, the meaning that of `re.fullmatch`.

Owns which constructs are refused. What a single character matches (classes, escapes, ignored case) is asked of `re` itself.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from hf_accel.structured.charset import ANY_CHAR, LAST_CODE_POINT, CharSet
from hf_accel.structured.syntax import EMPTY, NOTHING, Alt, Chars, Node, Repeat, Seq, StructureError

_parser: Any = re._parser  # type: ignore[attr-defined]
_compiler: Any = re._compiler  # type: ignore[attr-defined]

_ECMA_SPACE = CharSet.of_chars("\t\n\v\f\r \u00a0\u1680\u2028\u2029\u202f\u205f\u3000\ufeff") | CharSet.of(
    [(0x2000, 0x200A)]
)

_ECMA_LINE_ENDS = "\n\r\u2028\u2029"

_MANY_RANGES = 100

_STARTS = ("AT_BEGINNING", "AT_BEGINNING_STRING")
_ENDS = ("AT_END", "AT_END_STRING")
_TYPE_FLAGS = re.ASCII | re.LOCALE | re.UNICODE
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


def parse_regex(pattern: str, *, part: bool = False) -> Node:
    """The texts that `re.fullmatch(pattern, text)` matches; as a part of a larger text it may have no anchors.

    Raises:
        StructureError: the pattern is no regular expression, or uses what no finite automaton can (or we do not) decide:
            lookaround, backreferences, conditionals, atomic groups, possessive repetition, `\\b`, anchors in the middle.
    """
    data, flags = _parsed(pattern)
    return _Translator(pattern).sequence(data, flags, at_start=not part, at_end=not part)


def parse_search(pattern: str, *, wide: bool = False) -> Node:
    """The texts in which the pattern is found somewhere, as JSON Schema's `pattern` has it.

    Where ECMAScript and Python differ (the members of `\\d`, `\\w` and `\\s`) only what matches in both is let through;
    with `wide`, what matches in either, so that whatever is left over matches in neither.

    Raises:
        StructureError: as `parse_regex`.
    """
    data, flags = _parsed(pattern)
    node = _Translator(pattern, searching=True, wide=wide).sequence(data, flags, at_start=True, at_end=True)
    end = (
        Repeat(Chars(CharSet.of_chars("\n")), 0, 1) if wide else EMPTY
    )  # Python's `$` also holds before a last newline
    return _unanchored(_unanchored(node, _START, 0, EMPTY), _END, -1, end)


def _parsed(pattern: str) -> tuple[Any, int]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parsed = _parser.parse(pattern)
    except re.error as error:
        raise StructureError(f"not a regular expression: {error} in {pattern!r}") from None
    except (OverflowError, RecursionError) as error:
        raise StructureError(f"the regular expression is too large: {error}") from None
    return parsed.data, parsed.state.flags


_START, _END = Seq((NOTHING, EMPTY)), Seq((EMPTY, NOTHING))  # stand for anchors; no pattern translates to these
_ANYTHING = Repeat(Chars(ANY_CHAR), 0, None)


def _unanchored(node: Node, anchor: Node, side: int, instead: Node) -> Node:
    """Let anything stand before (side 0) or after (side -1) the tree, but where an anchor stands there only `instead`."""
    if node == anchor:
        return instead
    if isinstance(node, Alt):
        return Alt(tuple(_unanchored(part, anchor, side, instead) for part in node.parts))
    if isinstance(node, Repeat) and _has(node, anchor):  # (^a)?: its low and high are 0 or 1 and 1
        once = _unanchored(node.part, anchor, side, instead)
        return once if node.low else Alt((once, _ANYTHING))
    if isinstance(node, Seq) and node.parts and _has(node.parts[side], anchor):
        if side == 0:
            return Seq((_unanchored(node.parts[0], anchor, side, instead), *node.parts[1:]))
        return Seq((*node.parts[:-1], _unanchored(node.parts[-1], anchor, side, instead)))
    return Seq((_ANYTHING, node)) if side == 0 else Seq((node, _ANYTHING))


def _has(node: Node, anchor: Node) -> bool:
    if isinstance(node, (Seq, Alt)):
        return node == anchor or any(_has(part, anchor) for part in node.parts)
    return isinstance(node, Repeat) and _has(node.part, anchor)


class _Translator:
    """Walks Python's parse tree; `at_start` and `at_end` say whether an anchor there would hold by itself.

    Args:
        pattern: for messages.
        searching: keep anchors as `_START` and `_END`, and take character classes narrowly.
        wide: take them widely instead.
    """

    def __init__(self, pattern: str, searching: bool = False, wide: bool = False) -> None:
        self.pattern = pattern
        self.wide = wide
        self.searching = searching

    def sequence(self, items: Sequence[tuple[Any, Any]], flags: int, at_start: bool, at_end: bool) -> Node:
        parts: list[Node] = []
        for index, (op, value) in enumerate(items):
            first = at_start and all(_is_empty(part) or part == _START for part in parts)
            last = at_end and all(_is_anchor(op, _ENDS) for op in items[index + 1 :])
            parts.append(self.item(str(op), value, flags, first, last))
        kept = tuple(
            p for i, p in enumerate(parts) if not _is_empty(p) and not (p in (_START, _END) and p in parts[:i])
        )
        return kept[0] if len(kept) == 1 else Seq(kept)

    def item(self, op: str, value: Any, flags: int, at_start: bool, at_end: bool) -> Node:
        if op in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            return Chars(self.charset(op, value, flags))
        if op == "BRANCH":
            return Alt(tuple(self.sequence(part, flags, at_start, at_end) for part in value[1]))
        if op == "SUBPATTERN":
            _, added, removed, part = value
            kept = flags & ~_TYPE_FLAGS if added & _TYPE_FLAGS else flags  # (?a:...) and (?u:...) undo each other
            return self.sequence(part, (kept | added) & ~removed, at_start, at_end)
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, part = value
            once = high == 1
            node = self.sequence(part, flags, at_start and once, at_end and once)
            return Repeat(node, low, None if high is _parser.MAXREPEAT else high)
        if op == "AT":
            return self.anchor(str(value), at_start, at_end)
        raise self.refusal(_REFUSED.get(op, f"the construct {op}"))

    def anchor(self, kind: str, at_start: bool, at_end: bool) -> Node:
        if kind in _STARTS and at_start:
            return _START if self.searching else EMPTY
        if kind in _ENDS and at_end:
            return _END if self.searching else EMPTY
        if kind in _STARTS + _ENDS:
            raise self.refusal("an anchor (^ or $) in the middle")
        raise self.refusal(r"a word boundary (\b or \B)")

    def charset(self, op: str, value: Any, flags: int) -> CharSet:
        if self.searching and op == "IN":
            ours = _members(value, self.category)
            if not flags & re.IGNORECASE:
                return ours
            asked = _asked(_freeze((op, value)), flags & re.IGNORECASE)
            return ours | asked if self.wide else ours & asked
        if flags & re.IGNORECASE or (flags & re.ASCII and op == "IN"):
            return _asked(_freeze((op, value)), flags & (re.IGNORECASE | re.ASCII | re.DOTALL | re.UNICODE))
        if op == "LITERAL":
            return CharSet.of([(value, value)])
        if op == "NOT_LITERAL":
            return ~CharSet.of([(value, value)])
        if op == "ANY":
            if flags & re.DOTALL:
                return ANY_CHAR
            return ~CharSet.of_chars(_ECMA_LINE_ENDS if self.searching and not self.wide else "\n")
        return _members(value, lambda name, _: _category(name))

    def category(self, name: str, negated: bool) -> CharSet:
        """A class as both ECMAScript and Python have it; inside a negated set, as either of them has it."""
        ours, narrow = _category(name), CharSet.of([(0, 127)])
        negative = "NOT" in name
        if name in ("CATEGORY_SPACE", "CATEGORY_NOT_SPACE"):
            theirs = _ECMA_SPACE if name == "CATEGORY_SPACE" else ~_ECMA_SPACE
        else:
            theirs = ours | ~narrow if negative else ours & narrow
        found = ours | theirs if negated != self.wide else ours & theirs
        if self.wide and len(found.ranges) > _MANY_RANGES:  # wider still: spelling them all takes too many states
            return found & narrow if negated else found | ~narrow
        return found

    def refusal(self, construct: str) -> StructureError:
        return StructureError(
            f"the pattern {self.pattern!r} has {construct}, which structured output does not support: write it without"
        )


def _is_empty(node: Node) -> bool:
    return isinstance(node, Seq) and not node.parts


def _is_anchor(item: tuple[Any, Any], kinds: Sequence[str]) -> bool:
    return str(item[0]) == "AT" and str(item[1]) in kinds


def _members(value: Any, category: Callable[[str, bool], CharSet]) -> CharSet:
    """The set that a bracket expression names."""
    negated = any(str(kind) == "NEGATE" for kind, _ in value)
    members = CharSet(())
    for kind, argument in value:
        name = str(kind)
        if name == "LITERAL":
            members |= CharSet.of([(argument, argument)])
        elif name == "RANGE":
            members |= CharSet.of([argument])
        elif name == "CATEGORY":
            members |= category(str(argument), negated)
    return ~members if negated else members


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
