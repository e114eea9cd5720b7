"""Sets of networks, for look-ups whose time does not grow with the number of networks."""

from collections.abc import Collection

from api_gateway.http1.headers import UNIX, Network
from api_gateway.ip_addresses import parse_address


class NetworkSet:
    """A set of networks of addresses; immutable. A look-up takes one step for each length of a prefix."""

    def __init__(self, networks: Collection[Network]) -> None:
        self._has_unix = UNIX in networks
        self._prefixes: dict[tuple[int, int], set[int]] = {}  # by version and bits to cut off
        for network in networks:
            if not isinstance(network, str):
                cut = network.max_prefixlen - network.prefixlen
                prefixes = self._prefixes.setdefault((network.version, cut), set())
                prefixes.add(int(network.network_address) >> cut)

    def __repr__(self) -> str:
        return f"<NetworkSet of {len(self)}>"

    def __len__(self) -> int:
        return sum(map(len, self._prefixes.values())) + self._has_unix

    def __contains__(self, address: str) -> bool:
        """Return whether an address is in one of the networks; of strings that are not addresses, only `unix` may be.

        An IPv4-mapped IPv6 address is compared as the IPv4 address; a zone is ignored.
        """
        try:
            parsed = parse_address(address)
        except ValueError:
            return self._has_unix and address == UNIX
        version, number = parsed.version, int(parsed)
        return any(version == known and number >> cut in prefixes for (known, cut), prefixes in self._prefixes.items())
