"""Which client sends a request and which tier it has: identity, registry, cache, stores. Enforces no limits."""
