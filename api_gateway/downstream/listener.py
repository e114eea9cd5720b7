"""The protocol of a listener as the settings of the server describe it: limits and shares of its connections."""

from collections import Counter
from collections.abc import Callable, Collection
from functools import lru_cache

from api_gateway.downstream.connection_factory import ConnectionFactory
from api_gateway.downstream.connection_limits import ConnectionLimits
from api_gateway.http1.headers import Network, address_key, is_within
from api_gateway.http1.network_set import NetworkSet
from api_gateway.resilience.fair_shares import FairShares
from api_gateway.settings.server import ServerSection

DRAIN_LINGER = 2.0  # seconds; see `ConnectionLimits.drain_linger`


def protocol_of(
    section: ServerSection, refused: Counter[str], shares: FairShares, *, knows_proxy_protocol: bool = True
) -> ConnectionFactory:
    """Return the factory of the connections of one listener, limited by `shares`.

    `refused` counts the requests that it refuses, by reason.
    """
    factory = ConnectionFactory(connection_limits(section), refused, shares)
    factory.knows_proxy_protocol = knows_proxy_protocol
    change_protocol(factory, section)
    return factory


def change_protocol(factory: ConnectionFactory, section: ServerSection) -> None:
    """Apply other settings to new connections. Open ones keep their limits."""
    factory.limits = connection_limits(section)
    factory.slots.share_principal = _share_principal(section.trusted_proxies)
    senders = section.proxy_protocol if factory.knows_proxy_protocol else ()
    factory.header_senders = NetworkSet(senders) if senders else None


def connection_limits(section: ServerSection) -> ConnectionLimits:
    """Return the limits of downstream connections that the settings define."""
    return ConnectionLimits(
        header_bytes=section.max_header_bytes,
        header_lines=section.max_header_lines,
        header_timeout=section.header_timeout,
        keep_alive_timeout=section.keep_alive_timeout,
        idle_timeout=section.idle_timeout,
        drain_linger=min(DRAIN_LINGER, section.drain_timeout / 2),
        connections_per_peer=section.max_connections_per_peer,
        body_rate=section.min_body_rate,
        body_grace=section.min_body_rate_grace,
    )


def _share_principal(trusted: Collection[Network]) -> Callable[[str], str | None]:
    """Return a function from the address of a connection to the principal whose share it uses, or None.

    Connections from trusted proxies have no principal, because their clients are unknown until a head has arrived; nor
    have those from Unix sockets.
    """

    @lru_cache(maxsize=4096)
    def principal(address: str) -> str | None:
        return None if not address or is_within(address, trusted) else address_key(address)

    return principal
