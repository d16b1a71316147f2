"""JSON Schema's `format` names as patterns: what every text that is let through satisfies (RFC 3339, 4122, 2673, 1123, 3986).

Some let fewer texts through than their RFC: none lets through more. A name that a draft of JSON Schema defines and that is
not here is refused. One that none defines (`path`, `color-hex`) asserts nothing to any validator: it is an annotation, and
said to be in the log.
"""

from __future__ import annotations

import functools
import logging

from hf_accel.structured.syntax import StructureError

_log = logging.getLogger(__name__)

_YEAR = r"(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"  # 0000 is none to most calendars
_LEAP = r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    rf"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    rf"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?"
_OFFSET = r"(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_PLAIN_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9]{0,61}[a-zA-Z0-9])?"
_HOST = rf"{_LABEL}(?:\.{_LABEL}){{0,3}}"
_GROUP = r"[0-9a-fA-F]{1,4}"
_IPV6 = "|".join(
    [rf"(?:{_GROUP}:){{7}}{_GROUP}", rf"(?:{_GROUP}:){{1,7}}:", rf"::(?:{_GROUP}:){{0,6}}{_GROUP}"]
    + [rf"(?:{_GROUP}:){{1,{7 - n}}}(?::{_GROUP}){{1,{n}}}" for n in range(1, 6)]
)
_PCHAR = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})"

_AUTHORITY = rf"//{_HOST}(?::[0-9]{{1,5}})?"
_TAIL = rf"(?:\?(?:{_PCHAR}|[/?])*)?(?:#(?:{_PCHAR}|[/?])*)?"
_URI = rf"[A-Za-z][A-Za-z0-9+.-]*:(?:{_AUTHORITY})?(?:/{_PCHAR}*)*{_TAIL}"
_FIRST = _PCHAR.replace(":@", "@").replace(";=:", ";=")  # a relative path has no colon before its first slash
_RELATIVE = rf"(?:{_AUTHORITY}(?:/{_PCHAR}*)*|/(?:{_PCHAR}+(?:/{_PCHAR}*)*)?|{_FIRST}+(?:/{_PCHAR}*)*)?{_TAIL}"
_POINTER = r"(?:/(?:[^~/]|~[01])*)*"
_ATOM = r"(?:[A-Za-z0-9 _@#%&=:;<>,/!~-]|\\[dDwWsS.*+?^$|()\[\]{}/\\-]|\.|\[\^?(?:[A-Za-z0-9_ .,:@/]|a-z|A-Z|0-9|\\[dwsDWS.-])+\])(?:[*+?]|\{[0-9]{1,2},?\}|\{[0-9],[1-9][0-9]\})?"
_VARIABLE = r"\{[+#./;?&]?[A-Za-z0-9_]+(?:\*|:[1-9][0-9]{0,3})?(?:,[A-Za-z0-9_]+(?:\*|:[1-9][0-9]{0,3})?)*\}"
FORMATS = {
    "date": _DATE,
    "time": f"{_TIME}{_OFFSET}",
    "date-time": f"{_DATE}T{_TIME}{_OFFSET}",
    "duration": r"P(?:[0-9]+W|(?:[0-9]+D|[0-9]+M(?:[0-9]+D)?|[0-9]+Y(?:[0-9]+M(?:[0-9]+D)?)?)"
    r"(?:T(?:[0-9]+S|[0-9]+M(?:[0-9]+S)?|[0-9]+H(?:[0-9]+M(?:[0-9]+S)?)?))?"
    r"|T(?:[0-9]+S|[0-9]+M(?:[0-9]+S)?|[0-9]+H(?:[0-9]+M(?:[0-9]+S)?)?))",
    "uuid": r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}",
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "ipv6": _IPV6,
    "hostname": _HOST,
    "email": rf"[A-Za-z0-9_+-]+(?:\.[A-Za-z0-9_+-]+)*@{_HOST}",
    "uri": _URI,
    "uri-reference": rf"(?:{_URI}|{_RELATIVE})",
    "uri-template": rf"(?:[A-Za-z0-9._~:/?#@!$&()*+,;=-]|%[0-9A-Fa-f]{{2}}|{_VARIABLE})*",
    "json-pointer": _POINTER,
    "relative-json-pointer": rf"(?:0|[1-9][0-9]*)(?:#|{_POINTER})",
    "regex": rf"\^?(?:{_ATOM})*(?:\|(?:{_ATOM})*)*\$?",
    "byte": r"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?",
}
"""Format -> pattern that the whole text must match."""

FORMATS |= {
    "iri": FORMATS["uri"],
    "iri-reference": FORMATS["uri-reference"],
    "idn-email": FORMATS["email"],
    "idn-hostname": rf"{_PLAIN_LABEL}(?:\.{_PLAIN_LABEL}){{0,3}}",
    "host-name": FORMATS["hostname"],  # of draft 3, as the next
    "ip-address": FORMATS["ipv4"],
}
_REFUSED = ("color", "phone", "style")  # of draft 3
_INTEGERS = {"int32": 31, "int64": 63}  # OpenAPI's, with "byte"


def format_pattern(name: str | None) -> str | None:
    """The pattern that the whole of a string must match, or None where the format says nothing of strings.

    Raises:
        StructureError: it says something that is not supported.
    """
    if name in _REFUSED:
        raise StructureError(
            f"the format {name!r} is not supported: use a pattern; supported: {', '.join(sorted(FORMATS))}"
        )
    if name is not None and not is_enforced(name):
        _say_unknown(name)
    return FORMATS.get(name) if name is not None else None


def integer_range(name: str | None) -> tuple[int, int] | None:
    """The least and the greatest number of a format of integers, or None."""
    bits = _INTEGERS.get(name) if name is not None else None
    return None if bits is None else (-(2**bits), 2**bits - 1)


def is_enforced(name: str) -> bool:
    """Whether a format is more than an annotation."""
    return name in FORMATS or name in _INTEGERS or name in _REFUSED


@functools.cache
def _say_unknown(name: str) -> None:
    _log.warning("structured output: no draft of JSON Schema defines the format %r: it is taken as an annotation", name)
