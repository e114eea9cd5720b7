"""HTTP methods: forwarded, refused, idempotent, and those that the gateway does not know (RFC 9110 section 9).

A method is any token. The gateway forwards one that it does not know unchanged, as unsafe, and never repeats it.
"""

PROXIED_METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
KNOWN_METHODS = frozenset(PROXIED_METHODS.split(", "))
# RFC 9110 section 9.3.8: TRACE would echo credentials. PRI begins a connection of HTTP/2 (RFC 9113 section 3.4).
REFUSED_METHODS = frozenset({"TRACE", "CONNECT", "PRI"})
IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})  # among the known; section 9.2.2
