"""A grammar in two notations with a checker written by hand, a recursive schema, and what reads grammars byte by byte."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from hf_accel.structured.constraint import Constraint
from hf_accel.structured.dynamic import DynamicBackend, DynamicGrammar, Matcher
from hf_accel.structured.syntax import NotRegular
from hf_accel.structured.vocabulary import Vocabulary

ARITHMETIC = """
start: sum
sum: product (("+" | "-") product)*
product: atom (("*" | "/") atom)*
atom: NUMBER | "(" sum ")"
NUMBER: /[0-9]{1,3}/
"""
ARITHMETIC_GBNF = r"""
root    ::= sum   # where it begins
sum     ::= product ([-+] product)*
product ::= atom ("*" atom |
                  '/' atom)*
atom    ::= [0-9]{1,3} | "\x28" sum ")"
"""
TREE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "v": {"type": "integer", "minimum": 0, "maximum": 9},
        "kids": {"type": "array", "items": {"$ref": "#"}, "maxItems": 3},
    },
    "required": ["v"],
    "additionalProperties": False,
}


def scan_arithmetic(text: bytes) -> tuple[bool, bool]:
    """Whether a text begins one of ARITHMETIC's, and whether it is one."""
    depth, digits, after_value = 0, 0, False
    for char in text.decode("latin-1"):
        if char in "0123456789":
            if (after_value and not digits) or digits == 3:
                return False, False
            digits, after_value = digits + 1, True
        elif char == "(":
            if after_value:
                return False, False
            depth += 1
        elif char in "+-*/)":
            if not after_value or (char == ")" and not depth):
                return False, False
            depth, digits, after_value = depth - (char == ")"), 0, char == ")"
        else:
            return False, False
    return True, depth == 0 and after_value


def byte_vocabulary(*more: bytes | None, eos: int = 1) -> Vocabulary:
    """All bytes by their own ids, then some tokens (None: special), then `eos` ends of sequence."""
    tokens = (*(bytes([b]) for b in range(256)), *more, *[None] * eos)
    return Vocabulary(tokens, tuple(range(len(tokens) - eos, len(tokens))))


_BYTES = byte_vocabulary()


def compiled(constraint: Constraint, vocabulary: Vocabulary | None = None) -> DynamicGrammar:
    """What the dynamic backend makes of a constraint, whether or not it has an automaton."""
    return _backend(vocabulary or _BYTES).compile(constraint, NotRegular("asked for"))


@functools.lru_cache(maxsize=4)
def _backend(vocabulary: Vocabulary) -> DynamicBackend:
    return DynamicBackend(vocabulary)


def allowed(matcher: Matcher) -> set[int]:
    """Ids of the tokens that its mask allows."""
    return set(np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")).tolist())


def accepts(grammar: DynamicGrammar, text: str | bytes) -> bool:
    """Whether a text is allowed, byte by byte, and may end."""
    matcher = grammar.matcher()
    matcher.move_to(list(text.encode() if isinstance(text, str) else text))
    return not matcher.done and set(grammar.vocabulary.eos_token_ids) <= allowed(matcher)
