"""Serialises response heads, and refuses header fields that contain line breaks (response splitting)."""

from collections.abc import Mapping
from functools import lru_cache
from http import HTTPStatus

from api_gateway.models import HeaderList

_PHRASES = {status.value: status.phrase.encode() for status in HTTPStatus}
COLON = b": ".join
_LF, _CR, _NUL = b"\n\r\0"  # integers, which are found in bytes without an error that is raised and dropped
_HIDDEN_LINE = "a header field of the response contains a line break or NUL"


def render_response_head(status: int, reason: bytes | None, headers: HeaderList) -> bytes:
    """Return a response head, with the standard phrase if `reason` is None.

    Raises RuntimeError if a field contains a line break or NUL.
    """
    lines = list(map(COLON, headers))
    refuse_hidden_lines(lines)
    return b"\r\n".join([status_line(status, reason), *lines, b"\r\n"])


def render_fields(fields: Mapping[str, str]) -> bytes:
    """Return header fields as lines, each with its line break. Raises RuntimeError as `render_response_head` does."""
    text = ""
    for name, value in fields.items():
        line = f"{name}: {value}"
        if not line.isprintable() and ("\n" in line or "\r" in line or "\0" in line):
            raise RuntimeError(_HIDDEN_LINE)
        text += f"{line}\r\n"
    return text.encode()


def refuse_hidden_lines(lines: list[bytes]) -> None:
    """Raise RuntimeError if a line of a head contains CR, LF or NUL."""
    joined = b"".join(lines)
    if _LF in joined or _CR in joined or _NUL in joined:
        raise RuntimeError(_HIDDEN_LINE)


@lru_cache(maxsize=256)
def status_line(status: int, reason: bytes | None) -> bytes:
    """Return a status line without its line break, with the standard phrase if `reason` is None."""
    return b"HTTP/1.1 %d %b" % (status, _PHRASES.get(status, b"") if reason is None else reason)
