"""HTTP methods: forwarded, refused, idempotent, and those that the gateway does not know (RFC 9110 section 9).

A method is any token. The gateway forwards one that it does not know unchanged, as unsafe, and never repeats it.
"""

from collections.abc import Iterable

PROXIED_METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
KNOWN_METHODS = frozenset(PROXIED_METHODS.split(", "))
# RFC 9110 section 9.3.8: TRACE would echo credentials. PRI begins a connection of HTTP/2 (RFC 9113 section 3.4).
REFUSED_METHODS = frozenset({"TRACE", "CONNECT", "PRI"})
_GET_AND_HEAD = frozenset({"GET", "HEAD"})
IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})  # among the known; section 9.2.2


def with_head(methods: Iterable[str] | None) -> frozenset[str] | None:
    """Return the methods of a rule, with HEAD if GET is one: servers run handlers of GET for it (section 9.3.2)."""
    if not methods:
        return None
    named = frozenset(methods)
    return named | _GET_AND_HEAD if "GET" in named else named
