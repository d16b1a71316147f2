"""Grammars in GBNF, llama.cpp's notation (an EBNF with `::=`), written in Lark's.

Line breaks mean nothing: a rule ends where the next one begins. Every character becomes a terminal of its own, so that
nothing depends on which terminals match longest. What is in neither notation is refused with its line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from hf_accel.structured.syntax import StructureError

_TOKEN = re.compile(
    r"""(?P<space>\s+|\#[^\n]*)
    |(?P<rule>[\w-]+)\s*::=
    |(?P<name>[\w-]+)
    |(?P<literal>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
    |(?P<set>\[(?:\\.|[^\]\\\n])+\])
    |(?P<many>\{\s*(?P<low>\d+)\s*(?:(?P<comma>,)\s*(?P<high>\d*)\s*)?\})
    |(?P<mark>[.()|*+?])""",
    re.VERBOSE,
)
_CHAR = re.compile(r"\\x([0-9A-Fa-f]{2})|\\u([0-9A-Fa-f]{4})|\\U([0-9A-Fa-f]{8})|\\([\s\S])|([^\\])")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", **{c: c for c in "\"'\\[]-^/"}}
_STARTS = ("root", "start")


def is_gbnf(text: str) -> bool:
    """Whether a grammar is in GBNF and not in Lark's notation."""
    return re.search(r"(?m)^[ \t]*[\w-]+\s*::=", text) is not None


def to_lark(text: str) -> str:
    """A grammar in Lark's notation with the same texts.

    Raises:
        StructureError: it is not GBNF, or names a rule that it does not have.
    """
    rules = dict(_Reader(text).rules())
    start = next((name for name in _STARTS if name in rules), None)
    if start is None:
        raise StructureError("it has no rule named root: call the one that begins root")
    lark_names = {name: f"r{i}_{re.sub('[^a-z0-9]', '_', name.lower())}" for i, name in enumerate(rules)}
    lines = [f"start: {lark_names[start]}"]
    for name, parts in rules.items():
        spelled = []
        for part in parts:
            if isinstance(part, _Name) and part.name not in rules:
                raise StructureError(f"line {part.line} names the rule {part.name!r}, which it does not have")
            spelled.append(lark_names[part.name] if isinstance(part, _Name) else part)
        lines.append(f"{lark_names[name]}: {' '.join(spelled)}")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Name:
    name: str
    line: int


Part = str | _Name


class _Reader:
    """Reads rules as lists of parts in Lark's notation, rule names aside."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = list(self._split())
        self._at = 0

    def rules(self) -> Iterator[tuple[str, list[Part]]]:
        """(name, right side) of each."""
        seen = set()
        while self._at < len(self._tokens):
            kind, match = self._next()
            if kind != "rule":
                raise self._error(match, "a rule begins with its name and ::=")
            name = match["rule"]
            if name in seen:
                raise self._error(match, f"the rule {name!r} is there twice")
            seen.add(name)
            yield name, self._alternatives()
            if self._peek() not in ("rule", None):
                raise self._error(self._tokens[self._at][1], "there is a ) too many")

    def _split(self) -> Iterator[tuple[str, re.Match[str]]]:
        at = 0
        while at < len(self._text):
            match = _TOKEN.match(self._text, at)
            if match is None:
                raise StructureError(f"line {self._line(at)}: {self._text[at : at + 20]!r} is no part of GBNF")
            if match["space"] is None:
                yield next(k for k in ("rule", "name", "literal", "set", "many", "mark") if match[k]), match
            at = match.end()

    def _alternatives(self) -> list[Part]:
        parts = self._sequence()
        while self._peek() == "|":
            self._next()
            parts += ["|", *self._sequence()]
        return parts

    def _sequence(self) -> list[Part]:
        parts: list[Part] = []
        while self._peek() not in (None, "rule", "|", ")"):
            kind, match = self._next()
            if kind == "name":
                one: list[Part] = [_Name(match["name"], self._line(match.start()))]
            elif kind == "literal":
                one = [_terminal(c) for c in self._chars(match, match["literal"][1:-1])] or ['""']
            elif kind == "set":
                one = [self._set(match)]
            elif match[0] == ".":
                one = ["/(?s:.)/"]
            elif match[0] == "(":
                one = ["(", *self._alternatives(), ")"]
                if self._peek() != ")":
                    raise self._error(match, "a ) is missing")
                self._next()
            else:
                raise self._error(match, f"nothing stands before {match[0]!r}")
            parts += self._repeated(one)
        return parts or ['""']

    def _repeated(self, one: list[Part]) -> list[Part]:
        while self._peek() in ("*", "+", "?", "many"):
            kind, match = self._next()
            mark = match[0]
            if kind == "many":
                mark = f"{{{match['low']},{match['high'] if match['comma'] else match['low']}}}"
            one = ["(", *one, ")" + mark]
        return one

    def _set(self, match: re.Match[str]) -> str:
        inside = match["set"][1:-1]
        negated = inside.startswith("^")
        chars = self._chars(match, inside[negated:], ranges=True)
        return f"/[{'^' * negated}{''.join(chars)}]/"

    def _chars(self, match: re.Match[str], text: str, *, ranges: bool = False) -> list[str]:
        """Characters, escapes read; with `ranges`, as they are spelled in a class of a regex."""
        found: list[str] = []
        for i, c in enumerate(chars := list(_CHAR.finditer(text))):
            code = c[1] or c[2] or c[3]
            if c[4] is not None and c[4] not in _ESCAPES:
                raise self._error(match, f"the escape \\{c[4]} is not known")
            if code is not None and not _is_character(int(code, 16)):
                raise self._error(match, f"{c[0]} is no character")
            char = chr(int(code, 16)) if code else _ESCAPES[c[4]] if c[4] is not None else c[5]
            is_range = ranges and c[0] == "-" and 0 < i < len(chars) - 1
            found.append("-" if is_range else _spelled(char) if ranges else char)
        return found

    def _peek(self) -> str | None:
        """The next token's kind, or itself if it is a mark."""
        if self._at == len(self._tokens):
            return None
        kind, match = self._tokens[self._at]
        return match[0] if kind == "mark" else kind

    def _next(self) -> tuple[str, re.Match[str]]:
        self._at += 1
        return self._tokens[self._at - 1]

    def _line(self, at: int) -> int:
        return self._text.count("\n", 0, at) + 1

    def _error(self, match: re.Match[str], what: str) -> StructureError:
        return StructureError(f"line {self._line(match.start())}: {what}")


def _terminal(char: str) -> str:
    return json.dumps(char) if char.isascii() and char.isprintable() else f"/{_spelled(char)}/"


def _spelled(char: str) -> str:
    return char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):x}}}"


def _is_character(code: int) -> bool:
    return code < 0xD800 or 0xDFFF < code < 0x110000
