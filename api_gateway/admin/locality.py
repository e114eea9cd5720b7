"""The rules that decide whether a request is local: made by a program that an operator runs on this machine."""

from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network
from typing import Any, Protocol

from api_gateway.http1.asgi import RELAYED
from api_gateway.http1.headers import FORWARDING, Fields, fields_of, host_name, is_within

LOOPBACK = (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128"))
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
_FORWARDED_BY_PROXY = FORWARDING | {b"via"}


class Locality(Protocol):
    """A rule that decides whether a request is local."""

    async def is_local(self, scope: Mapping[str, Any]) -> bool:
        """Return whether the request of this ASGI scope is local."""
        ...


class NothingIsLocal:
    """No request is local: a token is required."""

    async def is_local(self, scope: Mapping[str, Any]) -> bool:  # noqa: ARG002 - see `Locality`
        """Return False."""
        return False


class LoopbackRule:
    """A request is local if peer and `Host` are loopback and no field shows that a proxy has forwarded it."""

    async def is_local(self, scope: Mapping[str, Any]) -> bool:
        """Return whether the request of this ASGI scope is local."""
        client = scope.get("client")
        return (
            client is not None
            and RELAYED not in scope
            and is_within(client[0], LOOPBACK)
            and is_direct(fields_of(scope["headers"]))
        )


def is_direct(fields: Fields) -> bool:
    """Return whether `Host` is a loopback name and no field shows that a proxy has forwarded the request.

    The rule on `Host` prevents DNS rebinding: a page in a local browser, under a name that resolves to this machine.
    """
    return host_name(fields) in _LOOPBACK_NAMES and not any(name in fields for name in _FORWARDED_BY_PROXY)
