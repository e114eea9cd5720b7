"""Converts values from other servers, applications and transports to the types that the request path expects.

They may pass any iterables and any objects with a buffer; compiled code accepts lists, tuples and bytes only.
"""

from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from api_gateway.http1.asgi import UNIX_PEER, Scope
from api_gateway.models import HeaderList

Octets = bytes | bytearray | memoryview


def complete_scope(scope: Scope) -> None:
    """Add to a scope what ASGI leaves optional; header fields become pairs, and the client's address one."""
    scope["headers"] = plain_pairs(scope.get("headers", ()))
    scope.setdefault("scheme", "http")
    scope["query_string"] = bytes(scope.get("query_string") or b"")
    scope["raw_path"] = bytes(scope.get("raw_path") or quote(scope["path"]).encode("ascii"))
    client = scope.get("client")
    scope["client"] = (client[0], int(client[1] or 0)) if client and client[0] else _peer_without_address(scope)


def _peer_without_address(scope: Scope) -> tuple[str, int] | None:
    """Return the peer on a Unix socket, which ASGI shows by a server without port; otherwise None: unknown."""
    server = scope.get("server")
    return UNIX_PEER if server is not None and server[1] is None else None


def plain_pairs(headers: Iterable[Iterable[Any]]) -> HeaderList:
    """Return header fields as a list of pairs of bytes. Raises TypeError or ValueError if they are none."""
    return [(bytes(name), bytes(value)) for name, value in headers]


def plain_bytes(octets: Octets) -> bytes:
    """Return octets as bytes, which bytes themselves are already. Raises TypeError for what is neither."""
    return octets if type(octets) is bytes else bytes(memoryview(octets))
