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
_CONTROL_IN_REASON = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_INTERIM_LINE = re.compile(rb"HTTP/1\.[01] 1(?!01)[0-9][0-9]")  # behind 101 (Switching Protocols) there is no head
_HEAD_END = b"\r\n\r\n"


def without_control_characters(received: bytes) -> bytes | None:
    """Return the input from the first head with control characters on, with spaces for those in its field values.

    RFC 9110 section 5.5 permits the spaces. The interim responses before that head have been processed, and are left
    out; the heads behind it, up to the final one, get spaces too. None if there are no such characters, or if one is
    in a field that determines the framing.
    """
    heads: list[bytes] = []
    start = end = 0
    while start >= 0:
        following = received.find(_HEAD_END, start)
        head = received[start:] if following < 0 else received[start:following]
        if _CONTROL_IN_FRAMING.search(head) is not None:
            break
        if heads or _CONTROL.search(head) is not None:
            heads.append(_CONTROL.sub(b" ", head))
        end = start + len(head)
        start = end + len(_HEAD_END) if following >= 0 and _INTERIM_LINE.match(head) else -1
    return _HEAD_END.join(heads) + received[end:] if heads else None


def repaired_value(name: bytes, value: bytes) -> bytes | None:
    """Return the value of a field with spaces for control characters; None if it may not be repaired.

    What is the end of a line or of the head in HTTP/1.1, NUL, and fields that determine the framing are not repaired.
    """
    repaired = _CONTROL.sub(b" ", value)
    if _DANGEROUS.search(repaired) is not None or (repaired != value and name.lower() in _FRAMING):
        return None
    return repaired


def plain_reason(phrase: bytes) -> bytes:
    """Return a reason phrase with spaces for control characters (RFC 9112 section 4)."""
    return _CONTROL_IN_REASON.sub(b" ", phrase)
