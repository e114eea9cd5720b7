"""Behaviour on real sockets: a gateway in this process between raw clients and raw upstreams."""
