"""HTTP methods: forwarded, refused, idempotent (RFC 9110 section 9)."""

IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})


PROXIED_METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
REFUSED_METHODS = frozenset({"TRACE", "CONNECT"})  # RFC 9110 section 9.3.8: TRACE would echo credentials
