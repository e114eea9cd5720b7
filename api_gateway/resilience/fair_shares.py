"""Fair shares of a limited resource: a principal can use at most as much as is free.

So one principal alone gets at most half, two get a third each, and n get 1/(n + 1) each: some slots are always left
for the next principal. Pure arithmetic: no clock, no waiting.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from api_gateway.http1.headers import address_key
from api_gateway.models import Client

MIN_CONNECTIONS, MAX_CONNECTIONS = 64, 32_768  # range of the default limit of a process
NO_ADDRESSES = frozenset({"", "unix", "unknown"})  # values for peers without an address
NEARLY_EXHAUSTED = 0.8  # share of slots in use from which the status is `warn`
_RESERVED = 256  # descriptors for listeners, files, the store and idle connections to upstreams


class FairShares:
    """The slots of one resource in use, in total and by principal.

    Every `acquire` must be followed by one `release` with the same principal. The table has entries only for
    principals with slots, so it is never larger than `total`. Slots of the principal None count only for the total.
    `refused` counts refusals for the metrics; the caller that refuses increments it.
    """

    __slots__ = ("_held", "in_use", "refused", "total")

    def __init__(self, total: int) -> None:
        self.total = total
        self.in_use = 0
        self.refused = 0
        self._held: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"<FairShares [{self.in_use} of {self.total}, {len(self._held)} principals]>"

    def held(self, principal: str | None) -> int:
        """Return the number of slots of a principal."""
        return 0 if principal is None else self._held.get(principal, 0)

    def admits(self, principal: str | None) -> bool:
        """Return whether the principal can get one more slot."""
        free = self.total - self.in_use
        return free > 0 if principal is None else self._held.get(principal, 0) < free

    def acquire(self, principal: str | None) -> None:
        """Take a slot that `admits` has admitted."""
        self.in_use += 1
        if principal is not None:
            self._held[principal] = self._held.get(principal, 0) + 1

    def try_acquire(self, principal: str | None) -> bool:
        """Take a slot if `admits` would admit it; return whether it was taken."""
        free = self.total - self.in_use
        if principal is None:
            if free <= 0:
                return False
        else:
            held = self._held.get(principal, 0)
            if held >= free:
                return False
            self._held[principal] = held + 1
        self.in_use += 1
        return True

    def release(self, principal: str | None) -> None:
        """Release a slot."""
        self.in_use -= 1
        if principal is not None:
            left = self._held[principal] - 1
            if left:
                self._held[principal] = left
            else:
                del self._held[principal]

    def refusal(self, principal: str | None, what: str) -> str:
        """Return why the principal got no slot; `what` names the resource, such as "connections"."""
        return share_refusal(self.held(principal), self.in_use, self.total, what)


def share_refusal(held: int, in_use: int, total: int, what: str) -> str:
    """Return why a principal with `held` slots got no other one."""
    if held == 0 or in_use >= total:
        return f"all {total} {what} are in use"
    return (
        f"{in_use} of {total} {what} are in use, {held} of them by you, and one client can use at most as many as are"
        " free"
    )


@dataclass(frozen=True, slots=True)
class ResourceState:
    """The use of a resource: "connections" of clients, or "requests", "tunnels" or "aborted_calls" of an upstream.

    Of several workers, `limit`, `in_use` and `refused` are sums; `fullest` is the used share of the fullest worker,
    which refuses when its own slots are in use, whatever others have free.
    """

    resource: str
    upstream: str | None
    limit: int
    in_use: int
    refused: int
    fullest: float = 0.0

    @classmethod
    def of(cls, resource: str, shares: Iterable[FairShares], upstream: str | None = None) -> "ResourceState":
        """Return the sum of the parts of one resource, such as the targets of an upstream."""
        parts = list(shares)
        return cls(
            resource,
            upstream,
            sum(part.total for part in parts),
            sum(part.in_use for part in parts),
            sum(part.refused for part in parts),
        )

    @property
    def used_ratio(self) -> float:
        """The used share, 0 to 1; of several workers, that of the fullest."""
        return max(self.fullest, self.in_use / self.limit if self.limit else 0.0)

    @property
    def status(self) -> Literal["pass", "warn"]:
        """`warn` while the resource is nearly exhausted, in any worker."""
        return "warn" if self.used_ratio >= NEARLY_EXHAUSTED else "pass"


def merge_states(states: Iterable[ResourceState]) -> list[ResourceState]:
    """Return the sums of the states of several workers, each of which has its own slots."""
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
                fullest=max(known.used_ratio, state.used_ratio),
            )
        )
    return list(merged.values())


def principal_of(client: Client | None, address: str) -> str | None:
    """Return the principal of a request: a registered client, else its address (for IPv6, the /64).

    None if the address is unknown, for instance behind a proxy on a Unix socket that does not send it.
    """
    if client is not None and client.is_registered:
        return client.key
    return None if address in NO_ADDRESSES else address_key(address)


def default_connections(descriptors: int) -> int:
    """Return the default limit of connections: half of the descriptors, since each may need one to an upstream too."""
    return max(MIN_CONNECTIONS, min(MAX_CONNECTIONS, (descriptors - _RESERVED) // 2))
