"""Response heads as bytes. Refuses a header field that would hide another line."""

from functools import lru_cache
from http import HTTPStatus

from api_gateway.models import HeaderList

_PHRASES = {status.value: status.phrase.encode() for status in HTTPStatus}
_COLON = b": ".join


def render_response_head(status: int, reason: bytes | None, headers: HeaderList) -> bytes:
    """Return a head; raises RuntimeError if one of its lines hides another."""
    lines = list(map(_COLON, headers))
    refuse_hidden_lines(lines)
    return b"\r\n".join([_status_line(status, reason), *lines, b"\r\n"])


def refuse_hidden_lines(lines: list[bytes]) -> None:
    """Raise RuntimeError if there is a break within a line of a head."""
    if any(b"\n" in line or b"\r" in line or b"\0" in line for line in lines):
        raise RuntimeError("a header of the answer holds a line break")


@lru_cache(maxsize=256)
def _status_line(status: int, reason: bytes | None) -> bytes:
    return b"HTTP/1.1 %d %b" % (status, _PHRASES.get(status, b"") if reason is None else reason)
