"""Arrays: items by their place, how many, how many of a kind, and no two equal where the values are few."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from hf_accel.structured.json_keywords import SOME_ITEM, Schema, atoms_of, same
from hf_accel.structured.json_values import Dicts, Values
from hf_accel.structured.syntax import EMPTY, NOTHING, Alt, Graph, Node, Repeat, Seq, StructureError, TooLarge, text

MAX_UNIQUE = 8  # values, of items that must differ
MAX_CONTAINS = 3
MAX_COUNTS = 2_000


@dataclass(frozen=True)
class _Kind:
    """From `low` to `high` items from an index on must be of a kind."""

    schema: Schema
    low: int
    high: int | None
    start: int


class ArrayCompiler:
    """The arrays that a conjunction of normal schemas allows."""

    def __init__(self, values: Values, schemas: Dicts) -> None:
        self._values = values
        self._prefixes = [s.get("prefixItems", []) for s in schemas]
        self._rests = [s.get("items", True) for s in schemas]
        self._num_prefix = max(map(len, self._prefixes), default=0)
        self._low = max((int(s["minItems"]) for s in schemas if "minItems" in s), default=0)
        self._high = min((int(s["maxItems"]) for s in schemas if "maxItems" in s), default=None)
        self._unique = any(s.get("uniqueItems") for s in schemas) and (self._high is None or self._high > 1)
        self._kinds = []
        for schema in schemas:
            if "contains" in schema:
                low, high = int(schema.get("minContains", 1)), schema.get("maxContains")
                if low > 0 or high is not None:
                    self._kinds.append(_Kind(schema["contains"], low, None if high is None else int(high), 0))
            if SOME_ITEM in schema:
                start, value = schema[SOME_ITEM]
                self._kinds.append(_Kind(value, 1, None, start))
        if len(self._kinds) > MAX_CONTAINS:
            raise TooLarge(f"more than {MAX_CONTAINS} conditions at once on what an array contains: use fewer")

    def node(self) -> Node:
        """Their texts."""
        if self._high is not None and self._low > self._high:
            return NOTHING
        if self._unique:
            return Seq((text("["), self._differing(), text("]")))
        if self._kinds:
            return Seq((text("["), self._counted(), text("]")))
        return self._plain()

    def _item(self, index: int, *more: Schema) -> Node:
        return self._values.nested([*self._item_schemas(index), *more])

    def _item_schemas(self, index: int) -> list[Schema]:
        return [p[index] if index < len(p) else rest for p, rest in zip(self._prefixes, self._rests, strict=True)]

    def _plain(self) -> Node:
        low, high = self._low, self._high
        num_prefix = self._num_prefix if high is None else min(self._num_prefix, high)
        after = Repeat(
            Seq((self._values.comma, self._item(num_prefix))),
            max(low - max(num_prefix, 1), 0),
            None if high is None else max(high - max(num_prefix, 1), 0),
        )
        if num_prefix == 0:
            some = Seq((self._item(0), after)) if high != 0 else NOTHING
            return Seq((text("["), some if low else Alt((EMPTY, some)), text("]")))
        tail: Node = after
        for index in reversed(range(num_prefix)):
            tail = Seq((self._values.comma if index else EMPTY, self._item(index), tail))
            if index >= low:
                tail = Repeat(tail, 0, 1)
        return Seq((text("["), tail, text("]")))

    # ---- arrays with a memory ----------------------------------------------------------------------------------

    def _counted(self) -> Node:
        """A state for each number of items and of items of each kind, both up to where more make no difference."""
        caps = [k.low if k.high is None else k.high for k in self._kinds]
        last = max([self._num_prefix, self._low, *(k.start for k in self._kinds), 1])
        graph = _Steps((0, (0,) * len(caps)), self._values.comma)
        for state in graph.todo:  # grows
            index, counts = state
            if index >= self._low and all(c >= k.low for c, k in zip(counts, self._kinds, strict=True)):
                graph.ends.append(state)
            if self._high is not None and index >= self._high:
                continue
            after = index + 1 if self._high is not None else min(index + 1, last)
            for which, item in self._choices(min(index, last)):
                counted = tuple(c + (i in which) for i, c in enumerate(counts))
                if any(k.high is not None and c > k.high for c, k in zip(counted, self._kinds, strict=True)):
                    continue
                target = (after, tuple(min(c, cap) for c, cap in zip(counted, caps, strict=True)))
                graph.step(state, index > 0, item, target)
        return graph.node()

    def _choices(self, index: int) -> list[tuple[tuple[int, ...], Node]]:
        """(kinds that are counted, the item): where no upper bound counts, an item of a kind may go uncounted."""
        parts: list[tuple[tuple[int, ...], tuple[Schema, ...]]] = [((), ())]
        for number, kind in enumerate(self._kinds):
            if index >= kind.start:
                other: tuple[Schema, ...] = () if kind.high is None else ({"not": kind.schema},)
                parts = [
                    (which + more, schemas + part)
                    for which, schemas in parts
                    for more, part in (((), other), ((number,), (kind.schema,)))
                ]
        nodes = [(which, self._item(index, *schemas)) for which, schemas in parts]
        return [(which, node) for which, node in nodes if node != NOTHING]

    def _differing(self) -> Node:
        """A state for each set of values that came already."""
        if self._kinds:
            raise StructureError("uniqueItems beside contains is not supported: express it without")
        last = self._num_prefix
        options: dict[int, list[Any]] = {i: self._finite(i) for i in range(last + 1)}
        values: list[Any] = []
        for value in itertools.chain.from_iterable(options.values()):
            if not any(same(value, v) for v in values):
                values.append(value)
        if len(values) > MAX_UNIQUE:
            raise TooLarge(f"uniqueItems is supported for items of at most {MAX_UNIQUE} values: leave it out")
        numbers = {i: [n for n, v in enumerate(values) if any(same(v, w) for w in options[i])] for i in options}
        graph = _Steps((0, frozenset[int]()), self._values.comma)
        for state in graph.todo:  # grows
            index, used = state
            if len(used) >= self._low:
                graph.ends.append(state)
            if self._high is not None and len(used) >= self._high:
                continue
            for number in numbers[index]:
                if number not in used:
                    item = self._values.constant(values[number])
                    graph.step(state, bool(used), item, (min(index + 1, last), used | {number}))
        return graph.node()

    def _finite(self, index: int) -> list[Any]:
        """The values that an item can have.

        Raises:
            StructureError: they are not named.
        """
        schemas = self._item_schemas(index)
        options: list[Any] | None = None
        for schema in schemas:
            if isinstance(schema, dict) and options is None:
                if "const" in schema or "enum" in schema:
                    options = schema.get("enum", [schema.get("const")])
                elif "type" in schema and atoms_of(schema) <= {"boolean", "null"}:
                    options = [
                        v
                        for v, kind in ((True, "boolean"), (False, "boolean"), (None, "null"))
                        if kind in atoms_of(schema)
                    ]
        if any(s is False for s in schemas):
            return []
        if options is None:
            raise StructureError(
                "uniqueItems is supported only for items of few values (enum, const, boolean) or maxItems of at most 1: "
                "leave it out"
            )
        return [v for v in options if not self._values.compile([*schemas, {"const": v}]).is_empty]


class _Steps:
    """Builds a `Graph` whose states are met one by one."""

    def __init__(self, start: Any, separator: Node) -> None:
        self._separator = separator
        self._ids = {start: 0}
        self._middles: dict[Any, int] = {}
        self._edges: list[tuple[Any, Node, Any]] = []
        self.todo = [start]
        self.ends: list[Any] = []

    def step(self, before: Any, separated: bool, item: Node, after: Any) -> None:
        """From one state to another by an item."""
        if after not in self._ids:
            if len(self._ids) > MAX_COUNTS:
                raise TooLarge("the bounds on an array's items are too large beside contains: use smaller ones")
            self._ids[after] = len(self._ids)
            self.todo.append(after)
        self._edges.append((before, Seq((self._separator, item)) if separated else item, after))

    def node(self) -> Node:
        """What was added."""
        edges = tuple((self._ids[a], part, self._ids[b]) for a, part, b in self._edges)
        return Graph(len(self._ids), edges, tuple(self._ids[end] for end in self.ends))
