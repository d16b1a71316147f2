"""Objects: named properties in the schema's order, then others; how many, and which of them together.

A name stands once: other names are none of those that are known. Other names among themselves may repeat, as no finite
automaton remembers them: the last one counts, so nothing rests on an earlier one, nor on there being two.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from hf_accel.structured.automaton import ByteDfa
from hf_accel.structured.json_keywords import SOME_PROPERTY, Schema
from hf_accel.structured.json_values import Dicts, Values, accepts, decoded, found, insides, language, not_found, quoted
from hf_accel.structured.syntax import EMPTY, NOTHING, Alt, Graph, Node, Seq, StructureError, TooLarge, text

MAX_PATTERNS = 4
MAX_SOME = 3
MAX_MEMORIES = 2_000


@dataclass(frozen=True)
class Some:
    """At least one property must have such a name and value."""

    other_than: list[str]
    unlike: list[str]
    like: str | None
    name: Schema
    value: Schema


@dataclass(frozen=True)
class _Memory:
    """What is known of the properties so far, as far as it matters."""

    pairs: int = 0  # up to a cap
    sure: int = 0  # pairs whose names certainly differ, up to a cap
    extra: bool = False
    present: frozenset[str] = frozenset()
    met: frozenset[int] = frozenset()  # of the `Some`s


class ObjectCompiler:
    """The objects that a conjunction of normal schemas allows."""

    def __init__(self, values: Values, schemas: Dicts) -> None:
        self._values = values
        self._schemas = schemas
        self._some = [Some(*s[SOME_PROPERTY]) for s in schemas if SOME_PROPERTY in s]
        if len(self._some) > MAX_SOME:
            raise TooLarge(
                f"more than {MAX_SOME} conditions at once on some property of an object (under not): use fewer"
            )
        for pattern in itertools.chain.from_iterable(s.get("patternProperties", {}) for s in schemas):
            found(pattern)  # raises for what is not supported
        self._required = dict.fromkeys(name for s in schemas for name in s.get("required", []))
        self._needs = [
            (a, b)
            for s in schemas
            for a, bs in s.get("dependentRequired", {}).items()
            for b in bs
            if b not in self._required
        ]
        named = dict.fromkeys(name for s in schemas for name in s.get("properties", {}))
        self._names = list(dict.fromkeys([*named, *self._required, *itertools.chain.from_iterable(self._needs)]))
        self._tracked = frozenset(itertools.chain.from_iterable(self._needs))
        rules = [s["propertyNames"] for s in schemas if "propertyNames" in s]
        self._name_rule = values.compile([{"type": "string"}, *rules]) if rules else None
        self._low = max((int(s["minProperties"]) for s in schemas if "minProperties" in s), default=0)
        self._high = min((int(s["maxProperties"]) for s in schemas if "maxProperties" in s), default=None)

    def node(self) -> Node:
        """Their texts."""
        members = [m for name in self._names if (m := self._member(name)) is not None]
        known = {name for name, _ in members}
        if any(name not in known for name in self._required):
            return NOTHING
        extra = self._extra(frozenset())
        if extra is None and self._high is not None and self._high >= len(members):
            self._high = None
        if self._low <= len(self._required):
            self._low = 0
        if self._low > len(members) + (extra is not None):
            if extra is not None:
                raise StructureError(
                    f"minProperties {self._low} needs several names that the schema does not name, which are not told "
                    "apart here: name the properties"
                )
            return NOTHING
        return Seq((text("{"), self._graph(members, extra), text("}")))

    # ---- the parts ---------------------------------------------------------------------------------------------

    def _member(self, name: str) -> tuple[str, dict[frozenset[int], Node]] | None:
        """(name, its pair by which `Some`s it meets), or None where the property is not allowed."""
        if self._name_rule is not None and not accepts(self._name_rule, name):
            return None
        schemas = [v for s in self._schemas for v in _value_schemas(s, name)]
        meets = [i for i, some in enumerate(self._some) if self._names_one(some, name)]
        pairs: dict[frozenset[int], Node] = {}
        for which in _subsets(meets):
            value = self._values.nested([*schemas, *(self._some[i].value for i in which)])
            if value != NOTHING:
                pairs[which] = Seq((self._values.constant(name), self._values.colon, value))
        return (name, pairs) if pairs else None

    def _names_one(self, some: Some, name: str) -> bool:
        if name in some.other_than or any(re.search(p, name) for p in some.unlike):
            return False
        if some.like is not None and not re.search(some.like, name):
            return False
        return some.name is True or accepts(self._values.compile([{"type": "string"}, some.name]), name)

    def _extra(self, which: frozenset[int]) -> Node | None:
        """Pairs of other names that meet these `Some`s, or None where there can be none."""
        patterns = list(dict.fromkeys(p for s in self._schemas for p in s.get("patternProperties", {})))
        if len(patterns) > MAX_PATTERNS:
            raise TooLarge(f"at most {MAX_PATTERNS} patternProperties are supported together")
        free = insides() - decoded(Alt(tuple(map(text, self._names))))
        somes = [self._some[i] for i in sorted(which)]
        for some in somes:
            free = free - decoded(Alt(tuple(map(text, some.other_than))))
            for pattern in some.unlike:
                free = free & not_found(pattern)
            if some.like is not None:
                free = free & found(some.like)
        rules = [self._values.compile([{"type": "string"}, some.name]) for some in somes if some.name is not True]
        rules += [self._name_rule] if self._name_rule is not None else []
        parts: list[Node] = []
        for matches in itertools.product((True, False), repeat=len(patterns)):
            inside = free
            for pattern, matched in zip(patterns, matches, strict=True):
                inside = inside & (found(pattern) if matched else not_found(pattern))
            names: ByteDfa = quoted(inside)
            for rule in rules:
                names = names & rule
            if names.is_empty:
                continue
            like = {p for p, matched in zip(patterns, matches, strict=True) if matched}
            schemas = [v for s in self._schemas for v in _extra_schemas(s, like)]
            value = self._values.nested([*schemas, *(some.value for some in somes)])
            if value != NOTHING:
                parts.append(Seq((language(names), self._values.colon, value)))
        return Alt(tuple(parts)) if parts else None

    # ---- their order -------------------------------------------------------------------------------------------

    def _graph(self, members: list[tuple[str, dict[frozenset[int], Node]]], extra: Node | None) -> Node:
        """A state for each place and memory; each pair is there once for each memory that follows it."""
        graph = _Graph(self._values.comma)
        here = [_Memory()]
        for index, (name, pairs) in enumerate(members):
            after: dict[_Memory, None] = {}
            for memory in here:
                if name not in self._required:
                    graph.skip((index, memory), (index + 1, memory))
                    after[memory] = None
                for which, pair in pairs.items():
                    if self._full(memory) or which & memory.met:
                        continue
                    target = self._with(memory, name, which)
                    graph.take((index, memory), bool(memory.pairs), pair, (index + 1, target), which)
                    after[target] = None
            here = list(after)
        self._others(graph, len(members), here, extra)
        return graph.node()

    def _others(self, graph: _Graph, place: int, here: list[_Memory], extra: Node | None) -> None:
        last: dict[frozenset[int], Node | None] = {}
        for memory in here:  # grows
            if self._done(memory):
                graph.ends.append((place, memory))
            if extra is None or self._full(memory):
                continue
            target = self._with(memory, None, frozenset())
            graph.take((place, memory), bool(memory.pairs), extra, (place, target), frozenset())
            if target not in here:
                here.append(target)
            unmet = frozenset(range(len(self._some))) - memory.met
            if unmet and self._done(self._with(memory, None, unmet)):  # nothing after it may take its name
                if unmet not in last:
                    last[unmet] = self._extra(unmet)
                if (pair := last[unmet]) is not None:
                    graph.take((place, memory), bool(memory.pairs), pair, (place + 1, None), unmet)
        graph.ends.append((place + 1, None))

    def _full(self, memory: _Memory) -> bool:
        return self._high is not None and memory.pairs >= self._high

    def _with(self, memory: _Memory, name: str | None, which: frozenset[int]) -> _Memory:
        sure = memory.sure + (name is not None or not memory.extra)
        return replace(
            memory,
            pairs=min(memory.pairs + 1, max(self._high or 0, 1)),
            sure=min(sure, self._low),
            extra=self._low > 0 and (memory.extra or name is None),
            present=memory.present | ({name} if name in self._tracked and name is not None else frozenset()),
            met=memory.met | which,
        )

    def _done(self, memory: _Memory) -> bool:
        needs = all(a not in memory.present or b in memory.present for a, b in self._needs)
        return needs and memory.sure >= self._low and len(memory.met) == len(self._some)


class _Graph:
    """Builds a `Graph` of named states; the first one named is the start."""

    def __init__(self, separator: Node) -> None:
        self._separator = separator
        self._ids: dict[Any, int] = {(0, _Memory()): 0}
        self._edges: list[tuple[int, Node, int]] = []
        self._taken: set[Any] = set()
        self.ends: list[Any] = []

    def _id(self, name: Any) -> int:
        if len(self._ids) > MAX_MEMORIES:
            raise TooLarge(
                "an object has too many combinations of properties to tell apart: use less of minProperties, "
                "maxProperties, dependentRequired and not"
            )
        return self._ids.setdefault(name, len(self._ids))

    def skip(self, before: Any, after: Any) -> None:
        """A way that reads nothing."""
        self._edges.append((self._id(before), EMPTY, self._id(after)))

    def take(self, before: Any, separated: bool, pair: Node, after: Any, which: frozenset[int]) -> None:
        """A way that reads a pair, after a separator or not; the same pair to the same state is there once."""
        middle = ("pair", before[0], after, which)
        self._edges.append((self._id(before), self._separator if separated else EMPTY, self._id(middle)))
        if middle not in self._taken:
            self._taken.add(middle)
            self._edges.append((self._id(middle), pair, self._id(after)))

    def node(self) -> Node:
        """What was added."""
        ends = tuple(self._ids[end] for end in self.ends if end in self._ids)
        return Graph(len(self._ids), tuple(self._edges), ends)


def _subsets(items: list[int]) -> Iterator[frozenset[int]]:
    for size in range(len(items) + 1):
        yield from map(frozenset, itertools.combinations(items, size))


def _value_schemas(schema: dict[str, Any], name: str) -> Iterable[Schema]:
    """What one schema says of the value of a property."""
    matched = [v for p, v in schema.get("patternProperties", {}).items() if re.search(p, name)]
    own = [schema["properties"][name]] if name in schema.get("properties", {}) else []
    return own + matched or [schema.get("additionalProperties", True)]


def _extra_schemas(schema: dict[str, Any], which: set[str]) -> Iterable[Schema]:
    """What one schema says of the value of a property that it does not name, whose name these patterns match."""
    matched = [v for p, v in schema.get("patternProperties", {}).items() if p in which]
    return matched or [schema.get("additionalProperties", True)]
