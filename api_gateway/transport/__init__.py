"""Upstream connections: pool, request, response, health probes and calls by httpx. Independent of retry policy."""
