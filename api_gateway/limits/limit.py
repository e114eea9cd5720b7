"""A further limit, of the list `limits`: its key, its allowances, and the requests that it applies to. Pure."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from api_gateway.limits.quota_state import PeriodQuota
from api_gateway.models import Client, Quota

LIMIT_PREFIX = "limit:"  # of the keys of buckets
_LONGEST_VALUE = 256  # characters of a value in a bucket's key
_BY_CLIENT = ("client",)
_VERIFIED_PARTS = ("client", "route", "organisation")  # and claims; those of clients that are registered


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit by the configuration.

    `key` are the parts of a bucket's key, such as `client` or `header:x-tenant`: each combination of their values has
    a bucket. `quota` is the allowance of tiers that have none in `quotas`; None if there are no such tiers. `tiers`,
    `routes` and `methods` (upper case) are those that the limit applies to, None for all. `cost` is that of a request
    in tokens, None for the cost by its route. `candidates` are candidate allowances by the name of the quota, and
    `index` is the place in the configuration's list.
    """

    name: str
    key: tuple[str, ...]
    quota: Quota | None
    quotas: Mapping[str, Quota] = field(default_factory=dict)
    tiers: frozenset[str] | None = None
    routes: frozenset[str] | None = None
    methods: frozenset[str] | None = None
    cost: float | None = None
    candidates: Mapping[str, Quota] = field(default_factory=dict)
    index: int = 0

    @property
    def all_quotas(self) -> list[Quota]:
        """All allowances, with the candidates."""
        return [*([] if self.quota is None else [self.quota]), *self.quotas.values(), *self.candidates.values()]

    @property
    def is_by_client(self) -> bool:
        """True if each client has one bucket, which keeps its filled fraction when the client's tier changes."""
        return self.key == _BY_CLIENT

    def is_unverified(self, client: Client | None) -> bool:
        """Return whether anyone could have invented the key of a bucket of this limit for a client.

        Routes, organisations and claims have been verified; header fields and addresses never are. A key without a
        client needs none.
        """
        if any(part not in _VERIFIED_PARTS and not part.startswith("claim:") for part in self.key):
            return True
        return client is not None and "client" in self.key and not client.is_registered

    def quota_of(self, tier: str) -> Quota | None:
        """Return the allowance of a tier; None if the limit does not apply to it."""
        if self.tiers is not None and tier not in self.tiers:
            return None
        return self.quotas.get(tier) or self.quota

    def concerns(self, route: str | None, method: str) -> bool:
        """Return whether the limit applies to requests of a route with a method (in upper case)."""
        return (self.routes is None or route in self.routes) and (self.methods is None or method in self.methods)

    def bucket_key(self, values: Sequence[str], tier: str) -> str:
        """Return the key of the bucket for the values of the key's parts.

        If tiers have allowances of their own, each has its own bucket, unless the limit is by client.
        """
        owner = f"{tier}:" if self.quotas and not self.is_by_client else ""
        return f"{LIMIT_PREFIX}{self.name}:{owner}{'|'.join([_escaped(value) for value in values])}"

    def client_key(self, bucket_key: str) -> str:
        """Return the key of the client's own bucket, of a bucket of a limit that is by client."""
        value = bucket_key.removeprefix(f"{LIMIT_PREFIX}{self.name}:")
        return value.replace("%7C", "|").replace("%25", "%")

    def previous_quota(self, bucket_key: str, tier: str) -> Quota | None:
        """Return the allowance that a bucket had; `tier` is that of the client if the limit is by client."""
        if self.quotas and not self.is_by_client:
            tier = bucket_key.removeprefix(f"{LIMIT_PREFIX}{self.name}:").partition(":")[0]
        return self.quotas.get(tier) or self.quota


def _escaped(value: str) -> str:
    """Return a value escaped so that joined values are unambiguous; of a long one, the beginning and a digest."""
    if len(value) > _LONGEST_VALUE:
        digest = hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        value = f"{value[:64]}…{digest}"
    return value.replace("%", "%25").replace("|", "%7C") if "%" in value or "|" in value else value


def limit_of(bucket_key: str) -> str:
    """Return the name of the limit whose bucket has this key."""
    return bucket_key.removeprefix(LIMIT_PREFIX).partition(":")[0]


class OwnBucket(NamedTuple):
    """A bucket that belongs to one client: key, allowance, limit (None: that of the tier), and route, if any."""

    key: str
    quota: Quota
    limit: str | None = None
    route: str | None = None


def client_buckets(limits: Iterable[Limit], client: Client, routes: Sequence[str] = ()) -> list[OwnBucket]:
    """Return the buckets that only a client has: that of its tier, and of limits by client, or by client and route.

    `routes` are the names of all routes. The buckets of limits by client and something else are not among them,
    because the values are not known.
    """
    return [OwnBucket(client.key, client.quota), *limits_of_client(limits, client, routes)]


def limits_of_client(limits: Iterable[Limit], client: Client, routes: Sequence[str]) -> list[OwnBucket]:
    """Return the buckets and slots of limits by client, or by client and route, that belong to one client."""
    return [one for one in _all_of_client(limits, client, routes) if not isinstance(one.quota, PeriodQuota)]


def quotas_of_client(limits: Iterable[Limit], client: Client, routes: Sequence[str]) -> list[OwnBucket]:
    """Return the counters that only a client has: of calendar quotas by client, or by client and route."""
    return [one for one in _all_of_client(limits, client, routes) if isinstance(one.quota, PeriodQuota)]


def _all_of_client(limits: Iterable[Limit], client: Client, routes: Sequence[str]) -> list[OwnBucket]:
    tier, found = client.quota.name, list[OwnBucket]()
    for limit in limits:
        quota = limit.quota_of(tier)
        if quota is not None and limit.is_by_client:
            found.append(OwnBucket(limit.bucket_key((client.key,), tier), quota, limit.name))
        elif quota is not None and set(limit.key) == {"client", "route"}:
            for route in routes if limit.routes is None else sorted(limit.routes):
                values = [client.key if part == "client" else route for part in limit.key]
                found.append(OwnBucket(limit.bucket_key(values, tier), quota, limit.name, route))
    return found


def moved_buckets(limits: Iterable[Limit], before: Client, after: Client) -> list[tuple[str, Quota, Quota]]:
    """Return the buckets of a client whose allowance a change of its tier changes: key, allowance before and after."""
    limits = [limit for limit in limits if limit.is_by_client]
    present = {bucket.key: bucket.quota for bucket in client_buckets(limits, after)}
    old = client_buckets(limits, before)
    return [(bucket.key, bucket.quota, present[bucket.key]) for bucket in old if bucket.key in present]
