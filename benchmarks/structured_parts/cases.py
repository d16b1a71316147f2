"""The constraints that are measured, each with texts that satisfy it. Knows no library."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

NAMES = (
    "Alice Johnson",
    "Bob Fischer",
    "Carla Diaz",
    "Dmitri Ivanov",
    "Emma Li",
    "Farid Haddad",
    "Grace Okafor",
    "Hugo Blanc",
)
CITIES = ("New York", "Berlin", "Madrid", "Kyoto", "Lagos", "Toronto", "Lima", "Oslo")
WORDS = (
    "river",
    "stone",
    "quiet",
    "market",
    "signal",
    "winter",
    "garden",
    "letter",
    "bridge",
    "copper",
    "harbour",
    "meadow",
)


@dataclass(frozen=True)
class Case:
    """A constraint.

    Attributes:
        name: in the results.
        kind: "regex" or "json_schema".
        value: the pattern, or the schema.
        draw: a random text that it allows (JSON as `json.dumps` prints it).
    """

    name: str
    kind: str
    value: Any
    draw: Callable[[random.Random], str]

    def instances(self, count: int, seed: int = 11) -> list[str]:
        """Random texts that it allows; the same at every call."""
        rng = random.Random(seed)
        return [self.draw(rng) for _ in range(count)]


def _sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def _text(rng: random.Random, length: int) -> str:
    return _sentence(rng, length // 4)[:length].strip()


def _closed(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


STRING = {"type": "string"}
CHOICES = tuple(
    f"{first} {second}"
    for first in ("apple", "orange", "blueberry", "cherry", "lemon")
    for second in ("pie", "cake", "jam", "tea")
)
CODES = tuple(
    f"{a}{b}-{n:03}"
    for n, (a, b) in enumerate((a, b) for a in ("north", "south", "east", "west", "centre") for b in "abcdefghij")
)
HOUSES = ("Acorn", "Birch", "Cedar", "Dogwood")
PERSON = _closed({"name": STRING, "age": {"type": "integer"}, "email": STRING, "city": STRING})
CHARACTER = _closed(
    {
        "name": {"type": "string", "maxLength": 30},
        "house": {"enum": list(HOUSES)},
        "occupation": {"type": "string", "maxLength": 30},
        "status": {"enum": ["alive", "dead", "unknown"]},
        "tool": _closed(
            {
                "wood": {"type": "string", "maxLength": 20},
                "core": {"type": "string", "maxLength": 20},
                "length": {"type": "integer"},
            }
        ),
        "friend": {"type": "string", "maxLength": 30},
        "fear": {"type": "string", "maxLength": 20},
    }
)
NESTED = {
    "type": "array",
    "items": _closed(
        {
            "id": {"type": "integer"},
            "title": STRING,
            "done": {"type": "boolean"},
            "tags": {"type": "array", "items": STRING},
            "owner": _closed({"name": STRING, "score": {"type": "number"}}),
        }
    ),
}
OPTIONAL = _closed({f"field_{word}": STRING for word in WORDS}, required=[])
MAX_LENGTH = _closed({"title": {"type": "string", "maxLength": 256}})
ENUM = _closed({"code": {"enum": list(CODES)}})


def _person(rng: random.Random) -> str:
    name = rng.choice(NAMES)
    email = name.lower().replace(" ", ".") + "@example.com"
    return json.dumps({"name": name, "age": rng.randint(18, 90), "email": email, "city": rng.choice(CITIES)})


def _character(rng: random.Random) -> str:
    tool = {"wood": rng.choice(WORDS), "core": rng.choice(WORDS), "length": rng.randint(5, 15)}
    first = {"name": rng.choice(NAMES), "house": rng.choice(HOUSES), "occupation": _sentence(rng, 2), "status": "alive"}
    return json.dumps({**first, "tool": tool, "friend": rng.choice(NAMES), "fear": rng.choice(WORDS)})


def _nested(rng: random.Random) -> str:
    items = [
        {
            "id": rng.randint(1, 999),
            "title": _sentence(rng, 3),
            "done": rng.random() < 0.5,
            "tags": rng.choices(WORDS, k=2),
            "owner": {"name": rng.choice(NAMES), "score": round(rng.uniform(0, 9), 2)},
        }
        for _ in range(2)
    ]
    return json.dumps(items)


def _optional(rng: random.Random) -> str:
    return json.dumps(
        {f"field_{word}": _sentence(rng, 2) for word in WORDS if rng.random() < 0.6} or {"field_river": "a"}
    )


def _email(rng: random.Random) -> str:
    return f"{rng.choice(WORDS)}.{rng.choice(WORDS)}@{rng.choice(WORDS)}.org"


def _address(rng: random.Random) -> str:
    return ".".join(str(rng.randint(0, 255)) for _ in range(4))


def _phone(rng: random.Random) -> str:
    return f"+1 ({rng.randint(200, 999)}) {rng.randint(200, 999)}-{rng.randint(1000, 9999)}"


def _uuid(rng: random.Random) -> str:
    return "-".join("".join(rng.choices("0123456789abcdef", k=n)) for n in (8, 4, 4, 4, 12))


def _date(rng: random.Random) -> str:
    return f"{rng.randint(1900, 2099)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"


def _url(rng: random.Random) -> str:
    return f"https://www.{rng.choice(WORDS)}.org/{rng.choice(WORDS)}/{rng.choice(WORDS)}?page={rng.randint(1, 99)}"


def _sentences(rng: random.Random) -> str:
    return " ".join(_sentence(rng, rng.randint(4, 9)).capitalize() + "." for _ in range(3))


OCTET = r"(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
HEX = "[0-9a-f]"
CASES = {
    c.name: c
    for c in (
        Case("int", "regex", r"-?(0|[1-9][0-9]*)", lambda rng: str(rng.randint(10**5, 10**9))),
        Case("date", "regex", r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])", _date),
        Case("phone", "regex", r"(\+[0-9]{1,3} )?(\([0-9]{3}\)|[0-9]{3})[ -][0-9]{3}[ -][0-9]{4}", _phone),
        Case("ipv4", "regex", rf"{OCTET}(\.{OCTET}){{3}}", _address),
        Case("uuid", "regex", f"{HEX}{{8}}(-{HEX}{{4}}){{3}}-{HEX}{{12}}", _uuid),
        Case("email", "regex", r"[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,}", _email),
        Case(
            "url",
            "regex",
            r"https?://(www\.)?[A-Za-z0-9.-]+\.[a-z]{2,}(/[A-Za-z0-9._~%/-]*)?(\?[A-Za-z0-9=&_%-]*)?",
            _url,
        ),
        Case("choice20", "regex", "|".join(CHOICES), lambda rng: rng.choice(CHOICES)),
        Case("any_line", "regex", ".*", lambda rng: _sentence(rng, 12)),
        Case("words", "regex", r"\w+( \w+){0,9}", lambda rng: _sentence(rng, 8)),
        Case("string200", "regex", r'"[^"\\]{1,200}"', lambda rng: f'"{_text(rng, 150)}"'),
        Case("sentences", "regex", r"([A-Z][a-z]*( [a-z]+){2,12}\.( |)){1,5}", _sentences),
        Case("person", "json_schema", PERSON, _person),
        Case("character", "json_schema", CHARACTER, _character),
        Case("nested", "json_schema", NESTED, _nested),
        Case("optional12", "json_schema", OPTIONAL, _optional),
        Case("maxLength256", "json_schema", MAX_LENGTH, lambda rng: json.dumps({"title": _text(rng, 200)})),
        Case("enum50", "json_schema", ENUM, lambda rng: json.dumps({"code": rng.choice(CODES)})),
    )
}
MASK_CASES = ("person", "nested", "maxLength256")
