"""The limits of the number of connections: for each address, and in total with fair shares."""

from collections.abc import Callable

from api_gateway.resilience.fair_shares import MAX_CONNECTIONS, FairShares

SURPLUS_TIMEOUT = 2.0  # seconds within which the first head on a surplus connection must arrive
MAX_SURPLUS = 64  # connections beyond the limits that are kept open until they have been refused with a response


def no_principal(_address: str) -> None:
    """Return no principal, so that only the total number of connections is limited."""


class ConnectionSlots:
    """The connections of one listener, counted by address and by principal of a share.

    A connection beyond the limits is kept until it has received a response. At most MAX_SURPLUS such connections are
    kept, divided into fair shares. `share_principal` maps an address to the principal whose share a connection uses.
    """

    __slots__ = ("peers", "share_principal", "shares", "surplus")

    def __init__(
        self, shares: FairShares | None = None, share_principal: Callable[[str], str | None] = no_principal
    ) -> None:
        self.peers: dict[str, int] = {}
        self.shares = shares or FairShares(MAX_CONNECTIONS)
        self.surplus = FairShares(MAX_SURPLUS)
        self.share_principal = share_principal

    def __repr__(self) -> str:
        return f"<ConnectionSlots [{self.shares!r}, {self.surplus.in_use} surplus]>"

    def acquire(self, peer: str, limit: int) -> "Slot":
        """Return the slot of a new connection from the address `peer`; empty if the address is unknown.

        `limit` is the number of connections from one address, 0 for none.
        """
        peers = self.peers
        peers[peer] = count = peers.get(peer, 0) + 1
        principal, shares = self.share_principal(peer), self.shares
        if peer and 0 < limit < count:
            return self._surplus(peer, principal, f"Your address has more than {limit} connections.")
        if shares.try_acquire(principal):
            return Slot(self, peer, shares, principal)
        shares.refused += 1
        refusal = shares.refusal(principal, "connections")
        return self._surplus(peer, principal, f"The gateway accepts no more connections: {refusal}.")

    def _surplus(self, peer: str, principal: str | None, reason: str) -> "Slot":
        """Return the slot of a connection beyond the limits."""
        is_excess = not self.surplus.try_acquire(principal)
        if is_excess:
            principal = None  # an aborted connection counts against the total only
            self.surplus.acquire(principal)
        slot = Slot(self, peer, self.surplus, principal)
        slot.surplus, slot.is_excess = reason, is_excess
        return slot


class Slot:
    """The slot of one connection, which must be released once.

    `surplus` is the reason why the connection is to be refused, empty if it is admitted. `is_excess`: it is to be
    aborted at once.
    """

    __slots__ = ("_principal", "_shares", "_slots", "is_excess", "peer", "surplus")

    def __init__(self, slots: ConnectionSlots, peer: str, shares: FairShares, principal: str | None) -> None:
        self.peer = peer
        self.surplus = ""
        self.is_excess = False
        self._slots = slots
        self._shares = shares
        self._principal = principal

    def __repr__(self) -> str:
        return f"<Slot of {self.peer or 'an unknown address'} [{self.surplus or 'admitted'}]>"

    def release(self) -> None:
        """Release the slot. Must be called exactly once."""
        self._shares.release(self._principal)
        peers, peer = self._slots.peers, self.peer
        left = peers[peer] - 1
        if left:
            peers[peer] = left
        else:
            del peers[peer]
