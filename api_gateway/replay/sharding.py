"""Divides the clients of a log among processes, so that no bucket is in two of them.

A request of a client that may be unregistered charges two buckets, its own and that of its address. Clients that have
sent from one address therefore belong to one shard, with all addresses of each of them. So do the clients that share
a bucket of a limit that is not by client, such as all of an organisation; a limit by route alone leaves one shard.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache

from api_gateway.config import GatewayConfig
from api_gateway.http1.headers import address_key, is_within
from api_gateway.replay.log_lines import (
    ADDRESS,
    CHECK,
    DECISION,
    HAS_KEYS,
    ID_OF_CLIENT,
    KIND,
    LIMITS,
    ORGANISATION,
    TIER_SOURCE,
    LogEvent,
)

UNREGISTERED = ("default", "configured")  # sources of the tier of clients that another configuration may not register
_key_of_address = lru_cache(maxsize=65_536)(address_key)


class SharedBuckets:
    """Which buckets a client shares with others under any of several configurations: of its address, and of limits."""

    def __init__(self, configs: Sequence[GatewayConfig]) -> None:
        limits = [limit for config in configs for limit in config.limits if "client" not in limit.key]
        self.of_limits = frozenset(("address" in limit.key, "organisation" in limit.key) for limit in limits)
        self._exempt = tuple(config.address_limit.exempt for config in configs if config.address_limit.rate)

    def apply_to(self, address: str) -> bool:
        """Return whether one of the configurations limits this address."""
        return any(not is_within(address, networks) for networks in self._exempt)


def shard_key(event: LogEvent) -> str:
    """Return the key that decides to which shard an event belongs."""
    if event[TIER_SOURCE] == "address":
        return f"a:{event[ID_OF_CLIENT]}"
    kind = event[KIND]
    if kind == CHECK or (kind == DECISION and event[LIMITS] == '"address"'):
        return f"a:{_key_of_address(event[ADDRESS])}"
    return f"c:{event[ID_OF_CLIENT]}"


def linked_address(event: LogEvent, is_limited: Callable[[str], bool]) -> str | None:
    """Return the key of the address whose bucket a decision may also charge; None if there is none."""
    if event[KIND] != DECISION or event[TIER_SOURCE] not in UNREGISTERED or event[HAS_KEYS]:
        return None
    address = event[ADDRESS]
    return f"a:{_key_of_address(address)}" if is_limited(address) else None


def linked_by_limits(event: LogEvent, of_limits: Iterable[tuple[bool, bool]]) -> Iterator[str]:
    """Yield the keys of what a decision may also charge by limits; their routes make no difference."""
    if event[KIND] != DECISION:
        return
    for has_address, has_organisation in of_limits:
        address = _key_of_address(event[ADDRESS]) if has_address else ""
        organisation = (event[ORGANISATION] or "") if has_organisation else ""
        yield f"l:{has_address:d}{has_organisation:d}:{address}|{organisation}"


def shards(counts: Mapping[str, int], links: Iterable[tuple[str, str]], number: int) -> tuple[dict[str, int], int]:
    """Return the shard of each key, and the number of events in the largest shard.

    `counts` are the events of each key, `links` the pairs of keys that belong to one shard.
    """
    parents: dict[str, str] = {}

    def root(key: str) -> str:
        top = key
        while (parent := parents.get(top, top)) != top:
            top = parent
        while key != top:
            parents[key], key = top, parents.get(key, top)
        return top

    for one, other in links:
        parents[root(one)] = root(other)
    sizes: dict[str, int] = {}
    for key, count in counts.items():
        top = root(key)
        sizes[top] = sizes.get(top, 0) + count
    loads = [0] * number
    places: dict[str, int] = {}
    for top, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        places[top] = lightest = loads.index(min(loads))
        loads[lightest] += size
    return {key: places[root(key)] for key in counts}, max(loads)
