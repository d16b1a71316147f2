"""Random texts that an automaton accepts, and random JSON Schemas."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from hypothesis import strategies as st

from hf_accel.structured.automaton import ByteDfa

FAR = 1 << 20


def random_text(dfa: ByteDfa, rng: random.Random, budget: int = 60) -> bytes:
    """A random walk to acceptance, each step through a random class of bytes; past the budget by the shortest way."""
    distance = _distances(dfa)
    table, state, made = dfa.bytes_table, 0, bytearray()
    while True:
        choices: dict[int, list[int]] = {}
        for byte in np.flatnonzero(table[state] >= 0).tolist():
            if len(made) <= budget or distance[table[state, byte]] < distance[state]:
                choices.setdefault(int(dfa.classes[byte]), []).append(byte)
        if dfa.accepting[state] and (not choices or rng.random() < 0.3 or len(made) > budget):
            return bytes(made)
        byte = rng.choice(choices[rng.choice(list(choices))])
        made.append(byte)
        state = int(table[state, byte])


def _distances(dfa: ByteDfa) -> np.ndarray:
    """[num_states] bytes to the nearest accepting state."""
    distance = np.where(dfa.accepting, 0, FAR)
    while True:
        nearer = np.minimum(distance, 1 + np.append(distance, FAR)[dfa.table].min(axis=1))
        if (nearer == distance).all():
            return distance
        distance = nearer


FEW: list[Any] = [{"type": ["boolean", "null"]}, {"enum": [1, True, 1.0, "a", [2]]}, {"const": None}]
NAMES = st.sampled_from(["a", "b", "c", 'd"e', "é"])
SCALARS: list[st.SearchStrategy[Any]] = [
    st.just({"type": "null"}),
    st.just({"type": "boolean"}),
    st.fixed_dictionaries(
        {"type": st.just("integer")},
        optional={
            "minimum": st.integers(-20, 20),
            "maximum": st.integers(-20, 40),
            "multipleOf": st.integers(1, 7),
            "exclusiveMinimum": st.integers(-20, 20),
        },
    ),
    st.fixed_dictionaries(
        {"type": st.just("number")},
        optional={
            "minimum": st.sampled_from([-3, -1.5, 0, 0.25, 7]),
            "maximum": st.sampled_from([-3, -1.5, 0, 0.25, 7, 12.5]),
            "exclusiveMaximum": st.sampled_from([0, 1, 10.5, 100]),
            "multipleOf": st.sampled_from([1, 2, 0.5, 1.25]),
        },
    ),
    st.fixed_dictionaries(
        {"type": st.just("string")},
        optional={
            "minLength": st.integers(0, 3),
            "maxLength": st.integers(0, 5),
            "pattern": st.sampled_from(["^a", "b$", "[0-9]+", "^[a-z]{1,3}$", r"\s", r"^\W"]),
        },
    ),
    st.fixed_dictionaries(
        {
            "type": st.just("string"),
            "format": st.sampled_from(["date", "time", "date-time", "uuid", "ipv4", "ipv6", "email"]),
        }
    ),
    st.fixed_dictionaries(
        {"enum": st.lists(st.sampled_from([1, "a", None, True, 1.5, [1], {"a": 2}, "é"]), min_size=1, max_size=3)}
    ),
    st.fixed_dictionaries({"const": st.sampled_from([1, "a", {"k": [1, 2]}])}),
    st.just({}),
    st.just(True),
    st.fixed_dictionaries(
        {"type": st.lists(st.sampled_from(["null", "string", "integer", "number"]), min_size=1, unique=True)},
        optional={"minLength": st.integers(0, 3), "minimum": st.integers(-5, 5)},
    ),
]


def schemas(depth: int = 2) -> st.SearchStrategy[Any]:
    """JSON Schemas of the keywords that are supported, nested to a depth."""
    if depth == 0:
        return st.one_of(SCALARS)
    inner = schemas(depth - 1)
    objects = st.fixed_dictionaries(
        {"type": st.just("object")},
        optional={
            "properties": st.dictionaries(NAMES, inner, max_size=3),
            "required": st.lists(NAMES, max_size=2, unique=True),
            "additionalProperties": st.one_of(st.booleans(), inner),
            "patternProperties": st.dictionaries(st.sampled_from(["^a", "b"]), inner, max_size=2),
            "propertyNames": st.sampled_from([{"maxLength": 2}, {"pattern": "^[a-c]"}, {"not": {"const": "b"}}]),
            "minProperties": st.integers(0, 3),
            "maxProperties": st.integers(0, 3),
            "dependentRequired": st.dictionaries(NAMES, st.lists(NAMES, max_size=2), max_size=2),
            "dependentSchemas": st.dictionaries(NAMES, inner, max_size=1),
        },
    )
    arrays = st.fixed_dictionaries(
        {"type": st.just("array")},
        optional={
            "items": inner,
            "prefixItems": st.lists(inner, min_size=1, max_size=2),
            "minItems": st.integers(0, 2),
            "maxItems": st.integers(0, 3),
            "contains": inner,
            "minContains": st.integers(0, 2),
            "maxContains": st.integers(0, 3),
        },
    )
    combined = st.one_of(
        *(
            st.fixed_dictionaries({keyword: st.lists(inner, min_size=1, max_size=most)})
            for keyword, most in (("anyOf", 3), ("allOf", 2), ("oneOf", 3))
        )
    )
    unique = st.fixed_dictionaries(
        {"type": st.just("array"), "uniqueItems": st.just(True), "items": st.sampled_from(FEW)},
        optional={"minItems": st.integers(0, 2), "prefixItems": st.lists(st.sampled_from(FEW), max_size=2)},
    )
    negated = st.one_of(
        st.fixed_dictionaries({"not": inner}),
        st.fixed_dictionaries({"not": objects}),
        st.fixed_dictionaries({"not": arrays}),
        st.fixed_dictionaries({"type": st.just("object"), "not": objects}),
        st.fixed_dictionaries({"if": objects}, optional={"then": inner, "else": inner}),
    )
    return st.one_of(*SCALARS[:5], objects, objects, arrays, combined, negated, unique)
