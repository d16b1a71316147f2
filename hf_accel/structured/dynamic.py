"""Constraints that no automaton of ours holds: grammars, recursive schemas. llguidance computes their masks on the host.

Owns all that knows llguidance, which is optional. Knows no tensors: a mask is packed words in numpy. llguidance chooses between
terminals by the longest match, so a grammar may let through less than its notation says; never more.
"""

from __future__ import annotations

import copy
import json
import re
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from hf_accel.structured.constraint import Constraint
from hf_accel.structured.gbnf import is_gbnf, to_lark
from hf_accel.structured.json_dynamic import schema_for_llguidance
from hf_accel.structured.json_endless import is_endless
from hf_accel.structured.syntax import NothingMatches, StructureError
from hf_accel.structured.vocabulary import Vocabulary

KINDS = ("grammar", "json_schema")
INSTALL = "pip install 'hf-accel[grammar]'"
_OPTIONS = '%llguidance {"no_forcing": true}'  # every spelling of a text is allowed, not only the tokenizer's own
_GRAMMAR_BYTES = 1 << 20  # about what one takes
_SKIPPED = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|#[^\n]*|/(?:\\.|[^/\\\n])+/')
_REFUSED_IN_LARK = (
    (re.compile(r"<\[|<[A-Za-z_|/]"), "a special token (<...>), which a constraint never allows: spell it as text"),
    (re.compile(r"\bstop\s*[=\]]"), "the rule option stop: use suffix, or a rule for what ends the text"),
    (re.compile(r"\bmax_tokens\s*="), "the rule option max_tokens: bound the text by a repetition"),
    (re.compile(r"\btemperature\s*="), "the rule option temperature: give it to the request"),
)


class DynamicBackend:
    """Compiles constraints for one vocabulary by llguidance.

    Args:
        vocabulary: of the model.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._lock = threading.Lock()
        self._tokenizer: Any = None

    def compile(self, constraint: Constraint, refusal: StructureError) -> DynamicGrammar:
        """A constraint as a grammar of llguidance's.

        Args:
            constraint: its kind is one of `KINDS`.
            refusal: why it has no automaton.

        Raises:
            StructureError: llguidance is missing, or refuses the constraint too.
        """
        is_grammar = constraint.kind == "grammar"
        try:
            import llguidance
        except ImportError:
            remedy = f"the dynamic backend {'takes' if is_grammar else 'may take'} it: {INSTALL}"
            raise StructureError(f"{refusal}; {remedy}") from refusal
        try:
            return self._checked(llguidance, lark_of(constraint))
        except StructureError as error:
            if is_grammar:
                raise StructureError(f"the grammar: {error}") from None
            raise StructureError(f"{refusal} (the dynamic backend: {error})") from refusal

    def _checked(self, llguidance: Any, lark: str) -> DynamicGrammar:
        matcher = llguidance.LLMatcher
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = _tokenizer(llguidance, self.vocabulary)
        grammar = matcher.grammar_from_lark(lark)
        wrong, messages = matcher.validate_grammar_with_warnings(grammar, self._tokenizer)
        if wrong or messages:
            raise StructureError(f"it is not accepted: {_words(messages[0])}")
        limits = llguidance.LLParserLimits(verbose_errors=False)
        prototype = matcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if prototype.is_error():
            raise StructureError(f"it is not accepted: {_words(prototype.get_error())}")
        found = DynamicGrammar(prototype, self.vocabulary)
        found.matcher().mask()  # raises if not even a first token is possible
        return found


class DynamicGrammar:
    """A constraint on one vocabulary, as llguidance holds it. Immutable; any number of rows may be in it."""

    num_bytes = _GRAMMAR_BYTES

    def __init__(self, prototype: Any, vocabulary: Vocabulary) -> None:
        self._prototype = prototype
        self.vocabulary = vocabulary

    def matcher(self) -> Matcher:
        """A text that is empty yet."""
        return Matcher(self)

    def fresh(self) -> Any:
        """llguidance's own matcher, of nothing yet."""
        return self._prototype.deep_copy()

    @cached_property
    def eos_words(self) -> np.ndarray:
        """[num_words] int32: what is allowed after the end."""
        return _packed(self.vocabulary.eos_token_ids, self.vocabulary.size)

    @cached_property
    def usable_words(self) -> np.ndarray:
        """[num_words] int32: tokens of text, and ends."""
        texts = [i for i, token in enumerate(self.vocabulary.tokens) if token is not None]
        return _packed((*texts, *self.vocabulary.eos_token_ids), self.vocabulary.size)


class Matcher:
    """Where one row's text stands in a grammar. For one thread at a time.

    Attributes:
        done: whether the row has ended: by an end of sequence, or by a token that was not allowed.
    """

    def __init__(self, grammar: DynamicGrammar) -> None:
        self._grammar = grammar
        self._matcher = grammar.fresh()
        self._tokens: list[int] = []  # that llguidance has consumed
        self.done = False

    def move_to(self, token_ids: list[int]) -> None:
        """Stand behind this output: go on, or where it does not go on from the last one, begin again.

        llguidance's own rollback is not used: masks after it are wrong (1.9.1, grammars of many small terminals).

        Raises:
            StructureError: llguidance gave up, on one of its limits.
        """
        num_known = len(self._tokens)
        if token_ids[:num_known] != self._tokens:
            self._begin_again()
        rest = token_ids[len(self._tokens) :]
        self.done = bool(rest) and self._consume(rest) < len(rest)

    def copy(self) -> Matcher:
        """Another one in the same place."""
        found = copy.copy(self)
        found._matcher, found._tokens = self._matcher.deep_copy(), list(self._tokens)
        return found

    def mask(self) -> np.ndarray:
        """[num_words] int32, bit i % 32 of word i // 32: token i is allowed next; after the end, every end of sequence.

        Raises:
            StructureError: nothing is: this vocabulary cannot spell what must follow, or llguidance gave up.
        """
        if self.done:
            return self._grammar.eos_words
        usable = self._grammar.usable_words
        allowed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32, count=len(usable))
        words: np.ndarray = allowed & usable
        if self._matcher.is_error() or not words.any():
            raise self._failure()
        return words

    def _consume(self, token_ids: list[int]) -> int:
        """How many of these were allowed and are consumed."""
        tokens = self._grammar.vocabulary.tokens
        ends = (i for i, t in enumerate(token_ids) if not (0 <= t < len(tokens)) or tokens[t] is None)
        text = token_ids[: next(ends, len(token_ids))]
        count = int(self._matcher.try_consume_tokens(text)) if text else 0
        if self._matcher.is_error():
            raise self._failure()
        self._tokens += text[:count]
        return count

    def _begin_again(self) -> None:
        self._matcher, self._tokens = self._grammar.fresh(), []

    def _failure(self) -> StructureError:
        length, reason, words = len(self._tokens), self._matcher.stop_reason(), _words(self._matcher.get_error())
        self._begin_again()
        why = f"{reason}: {words}" if words else reason
        return StructureError(
            f"the constraint has no way on after {length} tokens of output ({why}): look for rules that cannot end, and for "
            "characters that this vocabulary has no token for"
        )


def lark_of(constraint: Constraint) -> str:
    """A grammar or schema in llguidance's notation.

    Raises:
        StructureError: it uses what is not supported here.
    """
    if constraint.kind == "json_schema":
        asked = json.loads(constraint.value)
        if is_endless(asked):
            raise StructureError("every value would hold another one without end: do not require what recurs")
        schema = schema_for_llguidance(asked, constraint.whitespace)
        return f"start: %json {json.dumps(schema)}\n{_OPTIONS}\n"
    if is_gbnf(constraint.value):
        return f"{to_lark(constraint.value)}\n{_OPTIONS}\n"
    code = _SKIPPED.sub('""', constraint.value)
    for pattern, what in _REFUSED_IN_LARK:
        if pattern.search(code):
            raise StructureError(f"it uses {what}")
    if "allow_invalid_utf8" in constraint.value:
        raise StructureError("it uses the option allow_invalid_utf8: outputs are texts")
    return f"{constraint.value}\n{_OPTIONS}\n"


def is_allowed(error: StructureError, kind: str) -> bool:
    """Whether the dynamic backend may be asked for a constraint of this kind that has no automaton for this reason.

    A schema that our own front end refuses may be one that llguidance implements (it refuses by name what it does not); one
    that it has found to allow nothing is lost.
    """
    return kind in KINDS and not isinstance(error, NothingMatches)


class _Tokens:
    """A vocabulary in the form in which llguidance takes one: bytes by id, empty for what is never allowed."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = vocabulary.eos_token_ids[0]
        # Byte 255 is in no text, and means a special token to llguidance.
        self.tokens = [b"" if t is None or b"\xff" in t else t for t in vocabulary.tokens]

    def __call__(self, text: str) -> list[int]:
        return []  # only for forced text, which is off


def _tokenizer(llguidance: Any, vocabulary: Vocabulary) -> Any:
    return llguidance.LLTokenizer(_Tokens(vocabulary), eos_token=list(vocabulary.eos_token_ids))


def _words(message: str) -> str:
    """llguidance's own words, less its dumps of state and of the text."""
    message = message.split("<state>")[0].split("<non-verbose/>")[0].strip()
    schema = re.match(r"at \d+\(\d+\): failed to compile JSON schema: (.*)", message, re.DOTALL)
    return schema[1].split("\n   1 |")[0].strip() if schema else message


def _packed(token_ids: Sequence[int], size: int) -> np.ndarray:
    bits = np.zeros(-(-size // 32) * 32, dtype=np.uint8)
    bits[[i for i in token_ids if i < size]] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)
