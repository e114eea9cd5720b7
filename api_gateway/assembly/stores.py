"""Builds quotas, the rate limiter, and the client registry with its store."""

import asyncio
import logging
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import compress
from operator import not_
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

from api_gateway.assembly.identity import identity_rules
from api_gateway.clients.client_tiers import PreviousClients
from api_gateway.clients.kept_proofs import ProofFile
from api_gateway.clients.key_directory import KeyDirectory
from api_gateway.clients.records import ClientStore
from api_gateway.clients.registry import ClientRegistry
from api_gateway.clients.sqlite_store import SqliteClientStore
from api_gateway.config import GatewayConfig
from api_gateway.errors import StartupError
from api_gateway.http1.methods import with_head
from api_gateway.limits.concurrency import ConcurrencyQuota
from api_gateway.limits.limit import Limit, limit_of, moved_buckets
from api_gateway.limits.periods import Calendar
from api_gateway.limits.quota_state import PeriodQuota
from api_gateway.models import Client, Quota
from api_gateway.rate_limiter import MemoryLimiter
from api_gateway.settings.limits import AllowanceSection, LimitCandidateSection, LimitSection
from api_gateway.settings.store_url import StoreUrl
from api_gateway.system.clocks import Clocks
from api_gateway.system.state_folder import (
    FolderInUse,
    FolderOfNewer,
    HolderUnknown,
    StateError,
    StateFolder,
    own_folder,
)

if TYPE_CHECKING:
    from api_gateway.limits.redis_limiter import RedisLimiter

    Limiter = MemoryLimiter | RedisLimiter

logger = logging.getLogger(__name__)

REPLACED_WITHIN = 5.0  # seconds that a worker may need to end when another one has been started in its place
_KNOWN_WITHIN = 1.0  # seconds that a process that has locked the state folder may need to write its ids
_RETRY_INTERVAL = 0.1  # seconds


class AnotherWorker(StartupError):
    """Another worker of the same server has the buckets in its memory."""


class UnknownWorker(StartupError):
    """An unknown process has locked the state folder. It may be a worker of the same server that has just started."""


@contextmanager
def state_folder(config: GatewayConfig) -> Iterator[None]:
    """Hold the state folder, which workers share if the buckets are in a store that they share.

    Raises StartupError if it is in use, or unusable and needed for registered clients; AnotherWorker; UnknownWorker.
    """
    # True for a worker of uvicorn or gunicorn, which shares the folder with the other workers of its server.
    is_worker = multiprocessing.parent_process() is not None or "gunicorn.arbiter" in sys.modules
    folder = None
    try:
        folder = StateFolder(config.state_dir, is_worker=is_worker)
    except HolderUnknown as error:
        raise UnknownWorker(str(error)) from error
    except StateError as error:
        if isinstance(error, FolderInUse | FolderOfNewer) or not config.store.keeps_clients:
            raise StartupError(str(error)) from error
        logger.warning("%s; until the folder can be used, modes of circuit breakers cannot be changed", error)
    try:
        if folder is not None and folder.sharer is not None and not config.store.is_shared:
            raise AnotherWorker(
                "store.url: with memory:// each worker would have buckets of its own, and each client several times"
                f" its limits; process {folder.sharer} is a worker of this server already. Use one worker, or a store"
                " that all workers share (GATEWAY_STORE__URL=redis://...), or the gateway's own server, whose workers"
                " share memory:// too: api-gateway --workers 2"
            )
        yield
    finally:
        if folder is not None:
            folder.close()


async def hold_state_folder(
    config: GatewayConfig, stack: AsyncExitStack, replaced_within: float = REPLACED_WITHIN
) -> None:
    """Hold the state folder until `stack` is closed. Raises StartupError.

    Another worker has `replaced_within` seconds to end, because a server may start its replacement first.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    while True:
        try:
            stack.enter_context(state_folder(config))
        except (AnotherWorker, UnknownWorker) as error:
            within = replaced_within if isinstance(error, AnotherWorker) else _KNOWN_WITHIN
            if loop.time() >= began + within:
                raise
            await asyncio.sleep(_RETRY_INTERVAL)
        else:
            return


@dataclass(frozen=True, slots=True)
class Quotas:
    """The quotas of a configuration: by tier, candidates by tier, and of the address limit (None if disabled).

    `limits` are the further limits of tokens with theirs, `concurrency` those of requests in flight.
    """

    tiers: Mapping[str, Quota]
    candidates: Mapping[str, Quota]
    address: Quota | None
    limits: tuple[Limit, ...] = ()
    concurrency: tuple[Limit, ...] = ()

    @classmethod
    def of(cls, config: GatewayConfig) -> "Quotas":
        """Return the quotas of a configuration."""
        limit = config.address_limit
        return cls(
            {name: Quota.per_second(name, tier.rate, tier.capacity) for name, tier in config.tiers.items()},
            {
                name: Quota.per_second(f"{name} candidate", tier.candidate.rate, tier.candidate.capacity)
                for name, tier in config.tiers.items()
                if tier.candidate is not None
            },
            Quota.per_second("address", limit.rate, limit.capacity) if limit.rate else None,
            *_limits(config.limits),
        )

    @property
    def all(self) -> list[Quota]:
        """All quotas of buckets, without their tiers."""
        quotas = [quota for limit in self.limits for quota in limit.all_quotas]
        further = [quota for quota in quotas if not isinstance(quota, PeriodQuota)]
        return [*self.tiers.values(), *self.candidates.values(), *([self.address] if self.address else []), *further]

    @property
    def all_candidates(self) -> dict[str, Quota]:
        """The candidates by the name of the quota in force."""
        found = dict(self.candidates)
        for limit in (*self.limits, *self.concurrency):
            found |= limit.candidates
        return found

    @property
    def slot_names(self) -> list[str]:
        """The names by which requests in flight are counted: of each concurrency limit, and of its candidate."""
        tried = [f"{limit.name} candidate" for limit in self.concurrency if limit.candidates]
        return [*(limit.name for limit in self.concurrency), *tried]


def _limits(sections: Sequence[LimitSection]) -> tuple[tuple[Limit, ...], tuple[Limit, ...]]:
    """Return the limits of tokens, and those of requests in flight."""
    limits = [_limit(section, index) for index, section in enumerate(sections)]
    of_slots = [section.concurrent is not None for section in sections]
    return tuple(compress(limits, map(not_, of_slots))), tuple(compress(limits, of_slots))


def _limit(section: LimitSection, index: int) -> Limit:
    """Return the limit that a section describes."""
    given = [(tier, own) for tier, own in (section.tiers or {}).items() if own is not None]
    quotas = {tier: quota for tier, own in given if (quota := _allowance(section, own, f"{section.name}:{tier}"))}
    quotas |= {
        tier: ConcurrencyQuota.of(f"{section.name}:{tier}", number, section.name)
        for tier, number in section.concurrent_by_tier.items()
    }
    sections = {section.name: section, **{f"{section.name}:{tier}": own for tier, own in given}}
    return Limit(
        name=section.name,
        key=tuple([part.lower() if part.startswith("header:") else part for part in section.key]),
        quota=_allowance(section, section, section.name),
        quotas=quotas,
        tiers=None if section.tiers is None else frozenset(section.tiers),
        routes=None if section.routes is None else frozenset(section.routes),
        methods=with_head(section.methods),
        cost=section.cost,
        candidates={
            name: tried
            for name, own in sections.items()
            if own.candidate is not None and (tried := _allowance(section, own.candidate, f"{name} candidate"))
        }
        | _concurrency_candidates(section),
        index=index,
    )


def _concurrency_candidates(section: LimitSection) -> dict[str, Quota]:
    """Return the candidates of a concurrency limit by the name of the quota in force."""
    candidate = section.candidate
    if candidate is None:
        return {}
    numbers = {f"{section.name}:{tier}": candidate.concurrent_of(tier) for tier in section.concurrent_by_tier}
    if isinstance(section.concurrent, int) and isinstance(candidate.concurrent, int):
        numbers[section.name] = candidate.concurrent
    return {
        name: ConcurrencyQuota.of(f"{name} candidate", number, section.name)
        for name, number in numbers.items()
        if number is not None
    }


def _allowance(limit: LimitSection, section: AllowanceSection | LimitCandidateSection, name: str) -> Quota | None:
    if section.quota is not None and limit.period is not None:
        return PeriodQuota.of(
            name,
            section.quota,
            Calendar(limit.period, ZoneInfo(limit.time_zone)),
            limit.name,
            is_from_start=limit.starts == "client",
            carry_over=limit.carry_over,
            warn_at=tuple(limit.warn_at),
        )
    if section is limit and isinstance(limit.concurrent, int):
        return ConcurrencyQuota.of(name, limit.concurrent, limit.name)
    if section.rate is None or section.capacity is None:
        return None
    return Quota.per_second(name, section.rate, section.capacity, limit.name)


@dataclass(frozen=True, slots=True)
class PreviousQuotas:
    """The quota that each bucket had before a reload."""

    quotas: Quotas
    clients: PreviousClients

    def of(self, key: str, present: Quota) -> Quota:
        """Return the previous quota of a bucket; `present` is its quota now."""
        kind, _, rest = key.partition(":")
        if kind == "peer":
            return self.quotas.address or present
        if kind == "candidate":
            own = self.of(rest, present)
            return self.quotas.all_candidates.get(own.name) or own
        if kind == "limit":
            return self._of_limit(key) or present
        return self.clients.quota_of(key)

    def _of_limit(self, key: str) -> Quota | None:
        """Return the previous quota of a bucket of a limit; None if there was no such limit."""
        name = limit_of(key)
        limit = next((limit for limit in self.quotas.limits if limit.name == name), None)
        if limit is None:
            return None
        tier = self.clients.quota_of(limit.client_key(key)).name if limit.is_by_client else ""
        return limit.previous_quota(key, tier)


def registry_of(
    config: GatewayConfig, quotas: Quotas, clocks: Clocks, on_change: Callable[[Client, Client], None]
) -> ClientRegistry:
    """Build the client registry; `on_change` converts the buckets of a client. Raises StartupError."""
    registry = ClientRegistry(
        quotas.tiers,
        config.default_tier,
        configured_clients(config),
        client_store(config),
        limit=config.store.max_cached_clients,
        deadline=config.store.decision_timeout,
        wall_clock=clocks.wall,
        rules=identity_rules(config),
        proof_file=_proof_file(config),
        on_change=on_change,
    )
    _change_keys(registry.keys, config)
    return registry


def _change_keys(keys: KeyDirectory, config: GatewayConfig) -> None:
    keys.change(
        outage_tolerance=config.identity.api_key.outage_tolerance,
        is_source="api_key" in config.identity.sources,
        routes=frozenset(route.name for route in config.routes),
    )


def _proof_file(config: GatewayConfig) -> ProofFile | None:
    """Return the file with the ids that must be proved.

    None if the clients themselves are in a file, without which the gateway does not start.
    """
    store = config.store
    if not store.keeps_clients:
        return None
    place = StoreUrl.parse(store.url.get_secret_value()).place
    return ProofFile(own_folder(config.state_dir), f"{place} {store.prefix}")


def configured_clients(config: GatewayConfig) -> dict[str, str]:
    """Return the tiers of configured clients by client id."""
    return {client_id: section.tier or config.default_tier for client_id, section in config.clients.items()}


def convert_buckets(
    limiter: "Limiter",
    clients: ClientRegistry,
    configs: tuple[GatewayConfig, GatewayConfig],
    quotas: tuple[Quotas, Quotas],
    now_ns: int,
) -> None:
    """Change the limiter, buckets and clients to another configuration. Both pairs are (before, after)."""
    before, after = configs
    clients.bump_version()
    _change_keys(clients.keys, after)
    store = after.store
    if isinstance(limiter, MemoryLimiter):
        limiter.bucket_limit = store.max_buckets
    else:
        limiter.reconfigure(
            store.on_failure, max(store.min_gateway_processes, after.server.workers), store.max_buckets
        )
    old, new = quotas
    rules = identity_rules(after)
    terms = (before.default_tier, before.clients), (after.default_tier, after.clients)
    if old == new and terms[0] == terms[1] and rules == identity_rules(before):
        return
    earlier = clients.change_tiers(new.tiers, after.default_tier, configured_clients(after), rules)
    limiter.change_quotas(new.all, PreviousQuotas(old, earlier).of, now_ns)


def limiter_of(config: GatewayConfig, quotas: list[Quota], clocks: Clocks) -> "Limiter":
    """Build the rate limiter. Raises StartupError if the TLS files of the store cannot be used."""
    store = config.store
    if not store.is_shared:
        return MemoryLimiter(quotas, bucket_limit=store.max_buckets)
    limiter: RedisLimiter = shared_store().shared_limiter(config, quotas, clocks)
    return limiter


def client_store(config: GatewayConfig) -> ClientStore:
    """Return the client store: the shared store, or a file. It is opened when it is loaded. Raises StartupError."""
    store = config.store
    if not store.keeps_clients:
        return SqliteClientStore(own_folder(config.state_dir))
    clients: ClientStore = shared_store().shared_clients(config)
    return clients


def shared_store() -> Any:
    """Return the module that builds what uses the shared store."""
    return import_module("api_gateway.assembly.shared_store")


def move_buckets(limiter: "Limiter", limits: Iterable[Limit], before: Client, after: Client, now_ns: int) -> None:
    """Change the quotas of a client's buckets: another gateway has changed its tier, or its grant has expired."""
    for key, old, new in moved_buckets(limits, before, after):
        limiter.change_quota(key, old, new, now_ns)
