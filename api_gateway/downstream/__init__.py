"""Downstream connections: parsing, pipelining, draining and the ASGI adapter. Independent of routes and upstreams."""
