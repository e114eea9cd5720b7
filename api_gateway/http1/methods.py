"""HTTP methods: forwarded, refused, idempotent (RFC 9110 section 9)."""

PROXIED_METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
REFUSED_METHODS = frozenset({"TRACE", "CONNECT"})  # RFC 9110 section 9.3.8: TRACE would echo credentials
IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})  # among them; section 9.2.2
