"""The ASGI scope of a request, and the addresses of a connection in it."""

import asyncio
from typing import Any
from urllib.parse import quote, unquote

from uvicorn.protocols.utils import get_local_addr

from api_gateway.http1.asgi import UNIX_PEER
from api_gateway.http1.request_head import RequestHead

_MAPPED = "::ffff:"  # prefix of an IPv4-mapped IPv6 address
_VERSION = {"version": "3.0", "spec_version": "2.4"}
_EXTENSIONS: dict[str, Any] = {"http.response.trailers": {}}


def peer_of(transport: asyncio.Transport) -> tuple[str, int] | None:
    """Return address and port of the client, UNIX_PEER on a Unix socket, or None if the connection is already lost."""
    address = transport.get_extra_info("peername")
    if isinstance(address, tuple):
        return address[0].removeprefix(_MAPPED), address[1]
    return None if address is None else UNIX_PEER  # a Unix socket's address is a path, which clients rarely bind


def _plain(end: tuple[str, Any] | None) -> tuple[str, Any] | None:
    """Return the address with an IPv4-mapped IPv6 address, as from a dual-stack socket, converted to IPv4."""
    return (end[0].removeprefix(_MAPPED), end[1]) if end is not None else None


class ScopeBuilder:
    """Builds the scopes of one connection's requests."""

    __slots__ = ("_app_state", "_raw_root", "_root_path", "_template", "marks")

    def __init__(self, root_path: str, app_state: dict[str, Any]) -> None:
        self._root_path = root_path
        self._raw_root = quote(root_path).encode()
        self._app_state = app_state
        self.marks: dict[str, Any] = {}  # further keys, to be set before the first request
        self._template: dict[str, Any] | None = None  # what all requests have in common; None before the first one

    def __repr__(self) -> str:
        return f"<ScopeBuilder [root path {self._root_path!r}]>"

    def scope(
        self, head: RequestHead, transport: asyncio.Transport, client: tuple[str, int] | None, scheme: str
    ) -> dict[str, Any]:
        """Return the scope of one request. The root path comes before its path, as with uvicorn's own protocols."""
        if self._template is None:
            self._template = {
                "type": "http",
                "asgi": _VERSION,
                "server": _plain(get_local_addr(transport)),
                "client": client,
                "scheme": scheme,
                "root_path": self._root_path,
                "extensions": _EXTENSIONS,
                **self.marks,
            }
        raw_path, _, query = head.target.partition(b"?")
        path = raw_path.decode("ascii")
        path = unquote(path) if "%" in path else path
        if self._root_path and path[:1] == "/":  # not `*`
            path, raw_path = self._root_path + path, self._raw_root + raw_path
        return {
            **self._template,
            "http_version": head.version,
            "method": head.method,
            "path": path,
            "raw_path": raw_path,
            "query_string": query,
            "headers": [(name.lower(), value) for name, value in head.headers],
            "state": self._app_state.copy(),
        }
