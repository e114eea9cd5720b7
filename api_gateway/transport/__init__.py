"""Upstream connections: pool, connection, request, response, health probes and calls by httpx. Independent of retry policy."""
