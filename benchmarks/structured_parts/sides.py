"""The libraries that are compared on a constraint: how each is set up for a tokenizer, compiles, makes its first mask, reads a
text, and becomes a logits processor for `generate`. Knows no clock.

Each is used as its documentation says, in one thread and without a cache of compiled constraints.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import pickle
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch

from benchmarks.structured_parts.cases import Case


class Side:
    """A library, set up for one tokenizer; setting up is what the constructor does.

    Attributes:
        name: in the results.
        package: must be installed; "" for none.
    """

    name = ""
    package = ""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def forget(self) -> None:
        """Let go of everything that is kept of earlier compiles; not timed."""

    def compile(self, case: Case) -> Any:
        """The constraint, compiled from its text. Raises ValueError where the library refuses it."""
        raise NotImplementedError

    def first_mask(self, compiled: Any) -> None:
        """Make the mask of the first token."""
        raise NotImplementedError

    def num_bytes(self, compiled: Any) -> int | None:
        """Of the automaton, if the library says."""
        return None

    def accepts(self, compiled: Any, token_ids: Sequence[int]) -> bool:
        """Whether the tokens are allowed, one after the other."""
        raise NotImplementedError


class HfAccel(Side):
    """This package's own automata."""

    name = "hf_accel"

    def __init__(self, tokenizer: Any) -> None:
        from hf_accel.structured.vocabulary import Vocabulary

        super().__init__(tokenizer)
        self.vocabulary = Vocabulary.of(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
        # What all constraints of a vocabulary share is made with its first one; the kernels are loaded, or built.
        self.first_mask(self.compile(Case("", "regex", "a", lambda _: "a")))

    def forget(self) -> None:
        """Tables that hold no constraint (the members of `\\w`) stay, as they do in the compiled libraries."""
        for name, module in list(sys.modules.items()):
            if name.startswith("hf_accel.structured"):
                for value in vars(module).values():
                    bounded = getattr(value, "cache_parameters", dict)().get("maxsize")
                    if bounded is not None:
                        value.cache_clear()

    def compile(self, case: Case) -> Any:
        from hf_accel.structured.compiler import ConstraintCompiler

        compiled = ConstraintCompiler(self.vocabulary).compile(constraint_of(case))
        if not hasattr(compiled, "num_states"):
            raise ValueError(f"no automaton of it: a {type(compiled).__name__} masks it on the host")
        return compiled

    def first_mask(self, compiled: Any) -> None:
        table = self.table()
        table.masked(torch.zeros(1, self.vocabulary.size), torch.tensor([table.start(compiled)]))

    def num_bytes(self, compiled: Any) -> int | None:
        return int(compiled.num_bytes)

    def accepts(self, compiled: Any, token_ids: Sequence[int]) -> bool:
        table = self.table()
        states = torch.tensor([table.start(compiled)])
        for token_id in token_ids:
            if table.masked(torch.zeros(1, self.vocabulary.size), states)[0, token_id] != 0:
                return False
            states = table.advance(states, torch.tensor([token_id]))
        return True

    def table(self) -> Any:
        """An empty arena on the CPU."""
        from hf_accel.structured.mask_table import MaskTable

        return MaskTable(self.vocabulary.size, self.vocabulary.eos_token_ids, torch.device("cpu"))


def constraint_of(case: Case) -> Any:
    """The case as hf-accel takes it."""
    from hf_accel.structured.constraint import Constraint

    return Constraint.regex(case.value) if case.kind == "regex" else Constraint.json_schema(case.value)


class OutlinesCore(Side):
    """outlines_core, over the tokens' bytes."""

    name, package = "outlines_core", "outlines_core"

    def __init__(self, tokenizer: Any) -> None:
        from outlines_core import Vocabulary

        from hf_accel.structured.vocabulary import Vocabulary as Tokens

        super().__init__(tokenizer)
        by_bytes: dict[bytes, list[int]] = {}
        for token_id, token in enumerate(Tokens.of(tokenizer, len(tokenizer), [tokenizer.eos_token_id]).tokens):
            if token is not None:
                by_bytes.setdefault(token, []).append(token_id)
        self.vocabulary = Vocabulary(tokenizer.eos_token_id, by_bytes)

    def compile(self, case: Case) -> Any:
        from outlines_core import Index
        from outlines_core.json_schema import build_regex_from_schema

        pattern = case.value if case.kind == "regex" else build_regex_from_schema(json.dumps(case.value))
        return Index(pattern, self.vocabulary)

    def first_mask(self, compiled: Any) -> None:
        from outlines_core import Guide

        mask = torch.full((1, -(-len(self.tokenizer) // 32)), -1, dtype=torch.int32)
        Guide(compiled).write_mask_into(mask.data_ptr(), mask.numel(), mask.element_size())

    def num_bytes(self, compiled: Any) -> int | None:
        return len(pickle.dumps(compiled))

    def accepts(self, compiled: Any, token_ids: Sequence[int]) -> bool:
        from outlines_core import Guide

        return bool(Guide(compiled).accepts_tokens(list(token_ids)))


class XGrammar(Side):
    """xgrammar, on one thread, JSON with the spaces that `json.dumps` makes."""

    name, package = "xgrammar", "xgrammar"

    def __init__(self, tokenizer: Any) -> None:
        import xgrammar

        super().__init__(tokenizer)
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(tokenizer))
        self.compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, case: Case) -> Any:
        if case.kind == "regex":
            return self.compiler.compile_regex(case.value)
        return self.compiler.compile_json_schema(json.dumps(case.value), any_whitespace=False)

    def first_mask(self, compiled: Any) -> None:
        import xgrammar

        mask = xgrammar.allocate_token_bitmask(1, len(self.tokenizer))
        xgrammar.GrammarMatcher(compiled).fill_next_token_bitmask(mask)

    def num_bytes(self, compiled: Any) -> int | None:
        return int(compiled.memory_size_bytes)

    def accepts(self, compiled: Any, token_ids: Sequence[int]) -> bool:
        import xgrammar

        matcher = xgrammar.GrammarMatcher(compiled)
        return all(matcher.accept_token(token_id) for token_id in token_ids)


class LLGuidance(Side):
    """llguidance, which does most of its work while it makes masks."""

    name, package = "llguidance", "llguidance"

    def __init__(self, tokenizer: Any) -> None:
        from llguidance.hf import from_tokenizer

        super().__init__(tokenizer)
        self.llg_tokenizer = from_tokenizer(tokenizer)

    def compile(self, case: Case) -> Any:
        from llguidance import LLMatcher

        matcher = LLMatcher(self.llg_tokenizer, self.grammar(case), log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    def grammar(self, case: Case) -> str:
        """The case in llguidance's own notation."""
        from llguidance import LLMatcher

        if case.kind == "regex":
            return LLMatcher.grammar_from_regex(case.value)
        return LLMatcher.grammar_from_json_schema(json.dumps(case.value))

    def first_mask(self, compiled: Any) -> None:
        mask = torch.full((1, -(-len(self.tokenizer) // 32)), -1, dtype=torch.int32)
        compiled.deep_copy().unsafe_compute_mask_ptr(mask.data_ptr(), mask.numel() * mask.element_size())

    def accepts(self, compiled: Any, token_ids: Sequence[int]) -> bool:
        return bool(compiled.deep_copy().validate_tokens(list(token_ids)) == len(token_ids))


SIDES: dict[str, type[Side]] = {side.name: side for side in (HfAccel, OutlinesCore, XGrammar, LLGuidance)}
PEERS = ("outlines_core", "xgrammar", "llguidance", "outlines")
"""Packages; the processors of `outlines` need it beside the library that they run on."""


@functools.cache
def version(package: str) -> str:
    """Of an installed package; "" where it is not."""
    if importlib.util.find_spec(package) is None:
        return ""
    return metadata.version(package)


def describe(peers: Sequence[str]) -> str:
    """The peers with their versions."""
    return ", ".join(f"{peer} {version(peer)}" for peer in peers)
