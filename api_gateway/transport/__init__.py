"""Upstream connections: pool, connection, request, response and the httpx adapter. Independent of retry policy."""
