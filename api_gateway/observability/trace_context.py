"""W3C Trace Context (Level 2): the header fields `traceparent` and `tracestate`. Pure functions on bytes."""

import re
from functools import lru_cache
from typing import NamedTuple

from api_gateway.models import HeaderList

SAMPLED, RANDOM = 1, 2  # flags
FIELD_NAMES = b"\r\ntrace"  # the beginning of a line of either field, in lower case
# A version other than 00 may have further parts, which are ignored; ff is invalid, and so are ids of zeros.
_IDS = rb"-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})"
_PARENT = re.compile(rb"(?:00|(?!00|ff)[0-9a-f]{2}(?=.{53}(?:-|\Z)))" + _IDS + rb"(?P<more>-.*)?", re.DOTALL)
_KEY = rb"(?:[a-z0-9][a-z0-9_\-*/]{0,255}(?:@[a-z0-9][a-z0-9_\-*/]{0,13})?)"
_MEMBER = rb"[ \t]*(?:" + _KEY + rb"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e])?[ \t]*"
_STATE = re.compile(_MEMBER + rb"(?:," + _MEMBER + rb"){0,63}")
_MAX_MEMBERS = 32
# The values that plain heads can have (see `http1.fast_parser`): what is removed must not hide anything else.
_LINE = re.compile(rb"\r\n(?i:trace(?:(parent)|state)): ((?! )[\x20-\x7e\x80-\xff]++(?<! ))(?=\r\n)")
_USUAL_LINE = re.compile(rb"\r\n(?i:traceparent): 00" + _IDS + rb"(?=\r\n)")


class ParentContext(NamedTuple):
    """Trace and span of the sender of a request, in lower-case hexadecimal, and its flags."""

    trace_id: str
    span_id: str
    flags: int


def parent_context(values: list[bytes]) -> ParentContext | None:
    """Return the content of `traceparent`, given all of its values; None if there is not exactly one valid value."""
    if len(values) != 1:
        return None
    found = _PARENT.fullmatch(values[0])
    if found is None or (found["more"] is not None and values[0].startswith(b"00")):
        return None
    trace_id, span_id, flags, _ = found.groups()
    return ParentContext(trace_id.decode("ascii"), span_id.decode("ascii"), int(flags, 16))


def state_of(values: list[bytes]) -> bytes:
    """Return the members of `tracestate`, given all of its values; nothing if they are not valid."""
    return _valid_state(values[0] if len(values) == 1 else b",".join(values)) if values else b""


@lru_cache(maxsize=256)
def _valid_state(value: bytes) -> bytes:
    if _STATE.fullmatch(value) is None:
        return b""
    members = [member.strip(b" \t") for member in value.split(b",")]
    keys = [member.partition(b"=")[0] for member in members if member]
    if not keys or len(keys) > _MAX_MEMBERS or len(set(keys)) < len(keys):
        return b""
    return value.strip(b" \t")


def split_lines(lines: bytes) -> tuple[bytes, ParentContext | None, bytes]:
    """Return the header lines of a plain head without the trace context, the parent, and the state.

    The parent is None, and the state empty, if there is no valid parent. Lines are from the line break before them to
    the one after them. A line that is not plain is left.
    """
    lower = lines.lower()
    start = lower.find(FIELD_NAMES)
    if start < 0:
        return lines, None, b""
    usual = _USUAL_LINE.match(lines, start)
    if usual is not None and lower.find(FIELD_NAMES, usual.end()) < 0:  # the only line of both fields
        trace_id, span_id, flags = usual.groups()
        parent = ParentContext(trace_id.decode("ascii"), span_id.decode("ascii"), int(flags, 16))
        return lines[:start] + lines[usual.end() :], parent, b""
    parents: list[bytes] = []
    states: list[bytes] = []
    for is_parent, value in _LINE.findall(lines):
        (parents if is_parent else states).append(value)
    return _LINE.sub(b"", lines), *_context(parents, states)


def split_pairs(headers: HeaderList) -> tuple[HeaderList, ParentContext | None, bytes]:
    """Return header fields without the trace context, the parent, and the state; see `split_lines`."""
    parents: list[bytes] = []
    states: list[bytes] = []
    kept = []
    for pair in headers:
        lower = pair[0].lower()
        if lower == b"traceparent":
            parents.append(pair[1].strip(b" \t"))
        elif lower == b"tracestate":
            states.append(pair[1].strip(b" \t"))
        else:
            kept.append(pair)
    return kept, *_context(parents, states)


def _context(parents: list[bytes], states: list[bytes]) -> tuple[ParentContext | None, bytes]:
    parent = parent_context(parents)
    return parent, b"" if parent is None else state_of(states)
