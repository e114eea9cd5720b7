"""Cached analysis of header sets that requests repeat."""

from typing import NamedTuple

from api_gateway.models import Charge, Client, HeaderList


class HeaderProfile:
    """Cached analysis of the inspected header fields of requests from one address.

    `dropped` are the fields that are not forwarded, `added` the lines that are appended for the upstream. `client`,
    `charges`, `principal` and `priority` are valid for the registry version `version` and for `cost`; -1 means none.
    """

    __slots__ = (
        "added",
        "charges",
        "client",
        "cost",
        "dropped",
        "host",
        "is_trusted",
        "keep_alive",
        "length",
        "name",
        "owner",
        "peer",
        "principal",
        "priority",
        "request_id",
        "version",
    )

    def __init__(
        self,
        *,
        owner: object,
        framing: tuple[int, bool],
        host: str,
        caller: tuple[str, bool, str | None],
        request_id: str | None,
        dropped: HeaderList,
        added: bytes,
    ) -> None:
        self.owner = owner  # the fast path whose configuration was used
        self.length, self.keep_alive = framing
        self.host = host
        self.peer, self.is_trusted, self.name = caller
        self.request_id = request_id
        self.dropped = dropped
        self.added = added
        self.version = -1  # of the client registry at the last lookup
        self.client: Client | None = None
        self.cost = -1.0
        self.charges: list[Charge] = []  # for `client` and `cost`
        self.principal: str | None = None  # of `client`, for circuit breakers and fair shares
        self.priority = 0  # of `client`

    def __repr__(self) -> str:
        return f"<HeaderProfile of {self.name or self.peer!r}>"

    def for_client(self, name: str | None) -> "HeaderProfile":
        """Return a copy for the client id `name` (None for an address), without a client looked up."""
        other = HeaderProfile.__new__(HeaderProfile)  # cheaper than `__init__`
        other.owner, other.length, other.keep_alive = self.owner, self.length, self.keep_alive
        other.host, other.peer, other.is_trusted, other.name = self.host, self.peer, self.is_trusted, name
        other.request_id, other.dropped, other.added = self.request_id, self.dropped, self.added
        other.version, other.cost, other.client, other.charges = -1, -1.0, None, []
        other.principal = None
        return other


class RewrittenHeaders(NamedTuple):
    """The header lines of a request as received, their profile, and the lines as sent upstream."""

    received: bytes
    profile: HeaderProfile
    sent: bytes
