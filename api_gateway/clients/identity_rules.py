"""Which client ids a credential must prove. Pure decisions; `registry` knows the stored clients."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from api_gateway.clients.api_keys import KnownKey


@dataclass(frozen=True, slots=True)
class IdentityRules:
    """The rules of one configuration.

    `tiers` are the names of tiers, and `clients` the settings by client id, that require a credential. `keys` are the
    configured API keys by digest. `can_prove`: some credential can prove an id.
    """

    tiers: frozenset[str] = frozenset()
    clients: Mapping[str, bool] = field(default_factory=dict)
    keys: Mapping[str, KnownKey] = field(default_factory=dict)
    can_prove: bool = True

    @property
    def keyed_clients(self) -> frozenset[str]:
        """The ids of clients with configured keys."""
        return frozenset(known.client_id for known in self.keys.values())

    def is_verified_only(self, client_id: str, tier: str, *, stored: bool | None, has_keys: bool) -> bool:
        """Return whether a credential must prove the id.

        A tier that requires it takes precedence, then the client's own setting: stored, else configured. Without any,
        a client with keys needs a credential.
        """
        if tier in self.tiers:
            return True
        explicit = self.clients.get(client_id) if stored is None else stored
        return has_keys if explicit is None else explicit


NO_RULES = IdentityRules()
