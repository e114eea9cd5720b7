"""The client's side: connections, pipelining, draining and the ASGI adapter. Knows no routes or upstreams."""
