"""The forms of a request target, reduced to one: path and query (RFC 9112 section 3.2)."""

import re
from typing import Any, cast

import httptools

_ABSOLUTE_FORM = re.compile(rb"[hH][tT][tT][pP][sS]?://[^/?@]*([/?].*)?", re.DOTALL)


def origin_form(method: str, target: bytes) -> tuple[bytes, bytes | None]:
    """Return path and query of a target, and the authority of an absolute form, which replaces Host.

    The absolute form of `*` has neither path nor query. Raises ValueError for a target with a fragment, or one that
    is neither in origin form, nor in absolute form, nor, for OPTIONS, `*` (section 3.2.4).
    """
    if ord("#") in target:
        raise ValueError("it contains a fragment")
    if target.startswith(b"/") or (target == b"*" and method == "OPTIONS"):
        return target, None
    absolute = _ABSOLUTE_FORM.fullmatch(target)
    if absolute is None:
        raise ValueError("it is neither a path nor an http or https URL without user information")
    url = cast("Any", httptools.parse_url(target))  # its stub says that a port is always there
    if not url.host:
        raise ValueError("it contains no host")
    host = b"[%b]" % url.host if ord(":") in url.host else url.host
    authority = host if url.port is None else b"%b:%d" % (host, url.port)
    rest = absolute[1] or b""
    if method == "OPTIONS" and not rest:
        return b"*", authority
    return rest if rest.startswith(b"/") else b"/" + rest, authority
