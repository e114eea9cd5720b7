"""Whether a request comes from the operator's own machine."""

from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network
from typing import Any, Protocol

from api_gateway.http1.headers import FORWARDING, Fields, fields_of, host_name, is_within

LOOPBACK = (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128"))
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
_FORWARDED_BY_PROXY = FORWARDING | {b"via"}


class Locality(Protocol):
    """Decides whether a request is local: made on this machine, by its operator."""

    async def is_local(self, scope: Mapping[str, Any]) -> bool:
        """Tell whether the request of this ASGI scope is local."""
        ...


class NothingIsLocal:
    """No request is local: only tokens admit."""

    async def is_local(self, scope: Mapping[str, Any]) -> bool:  # noqa: ARG002 - see `Locality`
        """See `Locality`."""
        return False


class LoopbackRule:
    """A request is local if its peer and its `Host` are loopback and it names no proxy that has forwarded it."""

    async def is_local(self, scope: Mapping[str, Any]) -> bool:
        """See `Locality`."""
        client = scope.get("client")
        return client is not None and is_within(client[0], LOOPBACK) and is_direct(fields_of(scope["headers"]))


def is_direct(fields: Fields) -> bool:
    """Tell whether a request names a loopback host, and no proxy that has forwarded it.

    The rule on `Host` keeps a page in a local browser from using a name of its own that resolves to this machine.
    """
    return host_name(fields) in _LOOPBACK_NAMES and not any(name in fields for name in _FORWARDED_BY_PROXY)
