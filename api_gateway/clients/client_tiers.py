"""Which client a record, an id or an address stands for: its tier by precedence, its bucket, and what it must prove.

Nothing here knows which records there are; see `registry`.
"""

from collections.abc import Mapping
from typing import NamedTuple

from api_gateway.clients.identity_rules import IdentityRules
from api_gateway.clients.records import ClientRecord
from api_gateway.models import Client, ClientSource, Clock, Quota

_CLIENT, _ADDRESS = "client:", "address:"  # prefixes of bucket keys


class PreviousClients(NamedTuple):
    """Tiers and clients before a change of tiers or configured clients."""

    tiers: Mapping[str, Quota]
    default: Quota
    registered: Mapping[str, Client]
    configured: Mapping[str, Client]

    def quota_of(self, key: str) -> Quota:
        """Return the previous quota of the bucket with this key."""
        client_id = key.removeprefix(_CLIENT)
        if client_id == key:  # an address
            return self.default
        known = self.registered.get(client_id) or self.configured.get(client_id)
        return self.default if known is None else known.quota


class ClientTiers:
    """The tiers, the configured clients, and the rules on ids.

    Precedence of tiers: granted, registered by the API, configured, default.
    """

    def __init__(
        self,
        tiers: Mapping[str, Quota],
        default_tier: str,
        configured: Mapping[str, str],
        rules: IdentityRules,
        wall_clock: Clock,
    ) -> None:
        """`tiers` maps upper-case names to quotas, `configured` client ids to names of tiers."""
        self._wall_clock = wall_clock
        self.change(tiers, default_tier, configured, rules)

    def __repr__(self) -> str:
        return f"<ClientTiers {', '.join(self.tiers)} [{len(self.configured)} clients configured]>"

    def change(
        self, tiers: Mapping[str, Quota], default_tier: str, configured: Mapping[str, str], rules: IdentityRules
    ) -> None:
        """Apply other tiers, configured clients and rules."""
        self.tiers = dict(tiers)
        self.default = self.tiers[default_tier]
        self.rules = rules
        self._keyed = rules.keyed_clients
        self.configured = {
            client_id: self._client(ClientRecord(client_id), self.tiers[tier], "configured")
            for client_id, tier in configured.items()
        }

    def of_record(self, record: ClientRecord) -> Client | None:
        """Return the client of a record; None if it is the one that an id without a record has."""
        grant = record.grant
        if grant is not None and grant.tier in self.tiers and grant.until > self._wall_clock():
            return self._client(record, self.tiers[grant.tier], "granted")
        registered = self.registered(record)
        if registered is None and (record.keys or record.verified_only is not None):
            return self.unregistered(record)
        return registered

    def registered(self, record: ClientRecord) -> Client | None:
        """Return the client of a record without its grant; None if it is not registered for a tier that exists."""
        quota = None if record.tier is None else self.tiers.get(record.tier)
        return None if quota is None else self._client(record, quota, "registered")

    def unregistered(self, record: ClientRecord) -> Client:
        """Return the client of a record without a tier of its own."""
        other = self.without_record(record.id)
        return self._client(record, other.quota, other.source)

    def without_record(self, client_id: str) -> Client:
        """Return a client that the store has no record of."""
        return self.configured.get(client_id) or self._client(ClientRecord(client_id), self.default, "default")

    def proved(self, client: Client, tier: str | None) -> Client:
        """Return a client whose id was proved. One that is not registered gets the tier that the credential states.

        Its id was not invented, so the address limit does not apply to it.
        """
        if client.is_registered:
            return client
        quota = self.tiers.get(tier or "", client.quota)
        return Client(client.id, client.key, quota, "credential", is_verified_only=client.is_verified_only)

    def by_address(self, address: str) -> Client:
        """Return the client of a request without a client id: the address."""
        return Client(address, f"{_ADDRESS}{address}", self.default, "address")

    def _client(self, record: ClientRecord, quota: Quota, source: ClientSource) -> Client:
        has_keys = bool(record.keys) or record.id in self._keyed
        is_verified_only = self.rules.is_verified_only(
            record.id, quota.name, stored=record.verified_only, has_keys=has_keys
        )
        return Client(record.id, bucket_key(record.id), quota, source, has_keys, is_verified_only)


def bucket_key(client_id: str) -> str:
    """Return the key of the bucket of a client id, which differs from that of any address."""
    return f"{_CLIENT}{client_id}"


def owner_of(key: str) -> tuple[str, bool]:
    """Return the client id or the address whose bucket has this key, and whether it is an address."""
    return (key[len(_ADDRESS) :], True) if key.startswith(_ADDRESS) else (key[len(_CLIENT) :], False)
