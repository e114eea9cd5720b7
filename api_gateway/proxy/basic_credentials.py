"""Credentials of the gateway within those of the scheme Basic, which are in base64 (RFC 7617 section 2)."""

import base64
import math
import re

_BITS = 6  # of a character
_NO_BASE64 = re.compile(rb"[^A-Za-z0-9+/]+")


def marks_in_base64(prefix: bytes) -> tuple[bytes, ...]:
    """Return what base64 of a text contains if the text contains `prefix`, behind 0, 1 or 2 bytes modulo 3.

    These are the characters that what surrounds the prefix does not change.
    """
    return tuple(_mark(prefix, before) for before in range(3))


def _mark(prefix: bytes, before: int) -> bytes:
    first, end = math.ceil(8 * before / _BITS), 8 * (before + len(prefix)) // _BITS
    return base64.b64encode(b"-" * before + prefix + b"---")[first:end]


def leniently_decoded(credentials: bytes) -> bytes:
    """Return what a decoder that ignores what is not base64 would read."""
    found = _NO_BASE64.sub(b"", credentials)
    if len(found) % 4 == 1:  # a last character alone is not a byte
        found = found[:-1]
    return base64.b64decode(found + b"=" * (-len(found) % 4))


def within_basic(value: bytes) -> bytes:
    """Return what a value of `Authorization` has in base64, leniently; empty with another scheme."""
    scheme, _, credentials = value.replace(b"\t", b" ").partition(b" ")
    return leniently_decoded(credentials) if scheme.lower() == b"basic" else b""
