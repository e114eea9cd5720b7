"""Fair shares of a bounded resource: a holder may have as much of it as is still free.

So one holder alone never gets more than half, two end up with a third each, and n with 1/(n + 1) each: whatever one of
them does, the next finds a place. Pure arithmetic: no clock, no waiting.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from api_gateway.http1.headers import address_key
from api_gateway.models import Client

MIN_CONNECTIONS, MAX_CONNECTIONS = 64, 32_768  # that a process accepts, if the configuration does not say
NO_ADDRESSES = frozenset({"", "unix", "unknown"})  # of peers without one
NEARLY_EXHAUSTED = 0.8  # share of the places in use from which a resource is reported as such
_RESERVED = 256  # descriptors for listeners, files, the store and idle connections to upstreams


class FairShares:
    """How many places of one resource are in use, and by whom.

    Every `take` needs one `give_back` with the same holder; the table has no entry for a holder without a place, so it
    is never larger than `total`. The holder None stands for places that are counted against the total alone.
    `refused` counts what got no place, for the metrics; whoever refuses adds to it.
    """

    __slots__ = ("_held", "in_use", "refused", "total")

    def __init__(self, total: int) -> None:
        self.total = total
        self.in_use = 0
        self.refused = 0
        self._held: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"<FairShares [{self.in_use} of {self.total}, {len(self._held)} holders]>"

    def held(self, holder: str | None) -> int:
        """Return how many places the holder has."""
        return 0 if holder is None else self._held.get(holder, 0)

    def admits(self, holder: str | None) -> bool:
        """Tell whether the holder may have one more place."""
        free = self.total - self.in_use
        return free > 0 if holder is None else self._held.get(holder, 0) < free

    def acquire(self, holder: str | None) -> None:
        """Count one more place, which `admits` has allowed."""
        self.in_use += 1
        if holder is not None:
            self._held[holder] = self._held.get(holder, 0) + 1

    def try_acquire(self, holder: str | None) -> bool:
        """Take one more place if `admits` allows it, in one step; tell whether it did."""
        free = self.total - self.in_use
        if holder is None:
            if free <= 0:
                return False
        else:
            held = self._held.get(holder, 0)
            if held >= free:
                return False
            self._held[holder] = held + 1
        self.in_use += 1
        return True

    def release(self, holder: str | None) -> None:
        """Count one place less."""
        self.in_use -= 1
        if holder is not None:
            left = self._held[holder] - 1
            if left:
                self._held[holder] = left
            else:
                del self._held[holder]

    def refusal(self, holder: str | None, what: str) -> str:
        """Return why the holder got no place; `what` names the places, such as "connections"."""
        return share_refusal(self.held(holder), self.in_use, self.total, what)


def share_refusal(held: int, in_use: int, total: int, what: str) -> str:
    """Return why somebody who has `held` places got no other one."""
    if held == 0 or in_use >= total:
        return f"all {total} {what} are in use"
    return (
        f"of {total} {what} {in_use} are in use, {held} of them by you, and nobody may hold more than are still free"
    )


@dataclass(frozen=True, slots=True)
class ResourceState:
    """How a resource stands: "connections" of the gateway's clients, or "requests" and "tunnels" of an upstream."""

    resource: str
    upstream: str | None
    limit: int
    in_use: int
    refused: int

    @classmethod
    def of(cls, resource: str, shares: Iterable[FairShares], upstream: str | None = None) -> "ResourceState":
        """Look at the parts of one resource, such as an upstream's targets."""
        parts = list(shares)
        return cls(
            resource,
            upstream,
            sum(part.total for part in parts),
            sum(part.in_use for part in parts),
            sum(part.refused for part in parts),
        )

    @property
    def status(self) -> Literal["pass", "warn"]:
        """`warn` while it is nearly exhausted."""
        return "warn" if self.in_use >= NEARLY_EXHAUSTED * self.limit > 0 else "pass"


def merge_states(states: Iterable[ResourceState]) -> list[ResourceState]:
    """Return what the states of several workers come to: each has places of its own."""
    merged: dict[tuple[str, str | None], ResourceState] = {}
    for state in states:
        key = (state.resource, state.upstream)
        known = merged.get(key)
        merged[key] = (
            state
            if known is None
            else replace(
                known,
                limit=known.limit + state.limit,
                in_use=known.in_use + state.in_use,
                refused=known.refused + state.refused,
            )
        )
    return list(merged.values())


def holder_of(client: Client | None, address: str) -> str | None:
    """Return whose share a request takes: a registered client's, else its address's (of IPv6 its /64).

    None if that is not known, as behind a proxy on a Unix socket that does not say whom it forwards.
    """
    if client is not None and client.is_registered:
        return client.key
    return None if address in NO_ADDRESSES else address_key(address)


def default_connections(descriptors: int) -> int:
    """Return how many connections a process with so many descriptors accepts: each may need one to an upstream too."""
    return max(MIN_CONNECTIONS, min(MAX_CONNECTIONS, (descriptors - _RESERVED) // 2))
