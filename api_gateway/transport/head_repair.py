"""Errors of llhttp in header fields, and the repair of response heads with control characters in field values."""

import re

CONTROL_CHARACTER = "Invalid header value char"  # llhttp's words, as all in the next set
FIELD_ERRORS = frozenset(
    {
        CONTROL_CHARACTER,
        "Invalid header token",
        "Unexpected whitespace after header value",
        "Content-Length can't be present with Transfer-Encoding",
        "Missing expected LF after header value",
        "Missing expected CR after header value",
    }
)
_CONTROL = re.compile(rb"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]")  # not NUL, which is dangerous (RFC 9110 section 5.5)
_FRAMING = (b"content-length", b"transfer-encoding", b"connection")
_CONTROL_IN_FRAMING = re.compile(rb"\r\n(?i:%b)[^\r\n]*[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]" % b"|".join(_FRAMING))
_DANGEROUS = re.compile(rb"[\x00\r\n]")
_INTERIM_LINE = re.compile(rb"HTTP/1\.[01] 1[0-9][0-9]")


def without_control_characters(received: bytes) -> bytes | None:
    """Return the input from an unfinished final head on, with spaces for control characters in its field values.

    RFC 9110 section 5.5 permits the spaces. Preceding interim responses, which have been processed, are left out. None
    if there are no such characters, or if one is in a field that determines the framing.
    """
    start, end = 0, received.find(b"\r\n\r\n")
    while end >= 0 and _INTERIM_LINE.match(received, start):
        start, end = end + 4, received.find(b"\r\n\r\n", end + 4)
    end = len(received) if end < 0 else end
    head = received[start:end]
    if _CONTROL.search(head) is None or _CONTROL_IN_FRAMING.search(head) is not None:
        return None
    return _CONTROL.sub(b" ", head) + received[end:]


def repaired_value(name: bytes, value: bytes) -> bytes | None:
    """Return the value of a field with spaces for control characters; None if it may not be repaired.

    What is the end of a line or of the head in HTTP/1.1, NUL, and fields that determine the framing are not repaired.
    """
    repaired = _CONTROL.sub(b" ", value)
    if _DANGEROUS.search(repaired) is not None or (repaired != value and name.lower() in _FRAMING):
        return None
    return repaired
