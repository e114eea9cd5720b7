"""The meaning of header sets that requests repeat, worked out once for each."""

from typing import NamedTuple

from api_gateway.models import Charge, Client, HeaderList


class HeaderProfile:
    """What the noted headers of requests from one address come to; it is worked out once for all that have the same.

    `dropped` are those that do not go upstream, `added` the lines that go there behind the client's own.
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
        self.owner = owner  # by whose configuration it was worked out
        self.length, self.keep_alive = framing
        self.host = host
        self.peer, self.is_trusted, self.name = caller
        self.request_id = request_id
        self.dropped = dropped
        self.added = added
        self.version = -1  # of the registry, when it was asked for
        self.client: Client | None = None
        self.cost = -1.0
        self.charges: list[Charge] = []  # for that client and cost
        self.principal: str | None = None  # who that client is to circuit breakers and shares
        self.priority = 0  # of that client

    def __repr__(self) -> str:
        return f"<HeaderProfile of {self.name or self.peer!r}>"

    def for_client(self, name: str | None) -> "HeaderProfile":
        """Return what the same headers come to with a client's name beside them."""
        other = HeaderProfile.__new__(HeaderProfile)  # the arguments of `__init__` would be taken apart a second time
        other.owner, other.length, other.keep_alive = self.owner, self.length, self.keep_alive
        other.host, other.peer, other.is_trusted, other.name = self.host, self.peer, self.is_trusted, name
        other.request_id, other.dropped, other.added = self.request_id, self.dropped, self.added
        other.version, other.cost, other.client, other.charges = -1, -1.0, None, []
        other.principal = None
        return other


class RewrittenHeaders(NamedTuple):
    """The header lines of a request as they came, what they come to, and as they go upstream."""

    received: bytes
    profile: HeaderProfile
    sent: bytes
