"""Serialises response heads, and refuses header fields that contain line breaks (response splitting)."""

from functools import lru_cache
from http import HTTPStatus

from api_gateway.models import HeaderList

_PHRASES = {status.value: status.phrase.encode() for status in HTTPStatus}
_COLON = b": ".join


def render_response_head(status: int, reason: bytes | None, headers: HeaderList) -> bytes:
    """Return a response head, with the standard phrase if `reason` is None.

    Raises RuntimeError if a field contains a line break or NUL.
    """
    lines = list(map(_COLON, headers))
    refuse_hidden_lines(lines)
    return b"\r\n".join([_status_line(status, reason), *lines, b"\r\n"])


def refuse_hidden_lines(lines: list[bytes]) -> None:
    """Raise RuntimeError if a line of a head contains CR, LF or NUL."""
    if any(b"\n" in line or b"\r" in line or b"\0" in line for line in lines):
        raise RuntimeError("a header field of the response contains a line break or NUL")


@lru_cache(maxsize=256)
def _status_line(status: int, reason: bytes | None) -> bytes:
    return b"HTTP/1.1 %d %b" % (status, _PHRASES.get(status, b"") if reason is None else reason)
