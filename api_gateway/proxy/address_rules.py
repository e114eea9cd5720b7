"""Address rules: the addresses whose requests are refused, for all routes and by route."""

from collections.abc import Collection
from functools import lru_cache

from api_gateway.http1.headers import Network
from api_gateway.http1.network_set import NetworkSet

MAX_REMEMBERED_ADDRESSES = 4_096


class AddressRules:
    """Allowed and denied networks: an address is refused if it is denied, or if some are allowed and it is not."""

    def __init__(self, allow: Collection[Network] = (), deny: Collection[Network] = ()) -> None:
        self._allow, self._deny = NetworkSet(allow), NetworkSet(deny)
        self.cause = lru_cache(maxsize=MAX_REMEMBERED_ADDRESSES)(self._cause)

    def __repr__(self) -> str:
        return f"<AddressRules [{len(self._allow)} allowed, {len(self._deny)} denied]>"

    def _cause(self, address: str) -> str | None:
        """Return why an address is refused, in words, or None if it is accepted."""
        if address in self._deny:
            return "is denied"
        return "is not allowed" if len(self._allow) and address not in self._allow else None
