"""One configuration, deciding again on logged requests: real admission, limiter and settlement on a virtual clock."""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace
from typing import Any, Final, cast

from api_gateway.assembly.identity import identity_rules
from api_gateway.assembly.routes import address_rules, route_of
from api_gateway.assembly.stores import Quotas, configured_clients
from api_gateway.clients.records import ClientStore
from api_gateway.clients.registry import ClientRegistry
from api_gateway.config import GatewayConfig
from api_gateway.limits.limit import Limit, limit_of, moved_buckets
from api_gateway.limits.period_counters import PeriodCounters
from api_gateway.limits.quota_limiter import QuotaLimiter
from api_gateway.limits.quota_state import MICROSECONDS, PeriodQuota
from api_gateway.metrics import Recorder
from api_gateway.models import Client, ClientSource, Decision, Exchange, Quota
from api_gateway.proxy.address_stages import AddressStage, RouteAddressStage
from api_gateway.proxy.admission import Admission, RequestPlan, Stage
from api_gateway.proxy.cost_settlement import CostSettlement
from api_gateway.proxy.header_facts import HeaderFacts
from api_gateway.proxy.limit_stage import DESCRIBED_ORGANISATION, LimitListStage, RateLimitStage
from api_gateway.proxy.route_table import UNKNOWN_TARGET, Route
from api_gateway.rate_limiter import MemoryLimiter, RateLimiter
from api_gateway.replay.log_lines import (
    ADDRESS,
    AT_NS,
    HAS_KEYS,
    ID_OF_CLIENT,
    LIMITS,
    ORGANISATION,
    PATH,
    PROCESS,
    REQUEST_METHOD,
    SETTLEMENT_COUNT,
    SOURCE,
    TIER,
    TIER_SOURCE,
    LogEvent,
)
from api_gateway.replay.logged_routes import LoggedRoutes, LoggedRouteStage
from api_gateway.replay.saved_state import ReplaySnapshot

MAX_PROCESSES = 64  # whose buckets are held at the same time; those of the least recent ones are dropped
MAX_FACTS = 50_000  # clients whose charges are remembered
SHARED = ""  # instead of a process: the buckets in a store
_UNLIMITED: Final = 1 << 62
_NO_QUOTA = Quota("", 1, 1, 1, 1)


# Facts, tier, source of the tier, has keys, organisation, and the address if it matters.
_LastFacts = tuple[HeaderFacts, str, str, bool, str | None, str | None]
_ClientKey = tuple[str, str, str, bool, str | None]  # id, tier, source of the tier, has keys, organisation


class _NoStore:
    """The client store of a replay: clients are those of the configuration and of the log."""

    name = "the log"
    is_remote = False

    def __getattr__(self, name: str) -> Any:
        return None


class _Buckets:
    """The buckets of one process, or of the store, with the admission that charges them."""

    def __init__(self, simulation: "Simulation", process: str) -> None:
        config = simulation.config
        # The table of a process is limited, that of a store is not.
        limit = _UNLIMITED if config.store.is_shared else config.store.max_buckets
        self.memory = MemoryLimiter(simulation.quotas.all, bucket_limit=limit)
        simulation.begin_from_snapshot(self.memory, process)
        self.limiter: MemoryLimiter | QuotaLimiter = self.memory
        if simulation.counters is not None:
            self.limiter = QuotaLimiter(self.memory, simulation.counters, wall_clock=lambda: simulation.wall)
        self.limits = simulation.stage_of(self.limiter)
        rules = address_rules(config.addresses)
        stages: list[Stage] = [
            *([] if rules is None else [AddressStage(rules)]),
            simulation.route_stage,
            RouteAddressStage(),
            self.limits,
        ]
        self.admission = Admission(stages)
        self.settlement = CostSettlement(
            limiter=self.limiter,
            clock_ns=lambda: simulation.now_ns,
            recorder=simulation.recorder,
        )
        self.facts: dict[tuple[Any, ...], HeaderFacts] = {}  # of clients whose address does not matter
        self.facts_by_address: dict[tuple[Any, ...], HeaderFacts] = {}
        self.clients: dict[str, Client] = {}  # as they were last, by key
        self.last: dict[str, _LastFacts] = {}  # by the id of a client: of its last request
        self.open: dict[int, tuple[Exchange, int]] = {}  # with settlements to come, by number of the decision


class Simulation:
    """Decides on events in their order. Buckets are full at first; each process has its own, except with a store.

    Counters of calendar quotas outlive a process, so all processes of a log have the same ones.
    """

    def __init__(
        self, config: GatewayConfig, snapshot: ReplaySnapshot | None = None, before: GatewayConfig | None = None
    ) -> None:
        """Begin with the state in `snapshot`, under the configuration `before` (None: this one)."""
        self.config = config
        self._snapshot = snapshot
        self._before = None if before is None else Quotas.of(before)
        self._tier = ""  # of the client of the current request, by the log
        self.quotas = Quotas.of(config)
        self.now_ns = 0
        self.wall = 0.0  # seconds since the epoch, which decide about calendar periods
        self.recorder = Recorder((), (), (), (50.0,), 0.0)
        routes = logged_routes_of(config)
        self._registry = ClientRegistry(
            self.quotas.tiers,
            config.default_tier,
            configured_clients(config),
            cast("ClientStore", _NoStore()),
            rules=identity_rules(config),
        )
        self.limits = evaluable(self.quotas.limits)
        # Names of the allowances of other limits: a request that one of these refused in the log is not decided again.
        self.unlogged = frozenset(
            quota.name for limit in self.quotas.limits if unlogged_parts(limit) for quota in limit.all_quotas
        )
        self.routes = LoggedRoutes(routes, self.limits, None if before is None else logged_routes_of(before))
        self.route_stage = LoggedRouteStage(self.routes)
        has_counters = any(isinstance(quota, PeriodQuota) for limit in self.limits for quota in limit.all_quotas)
        most = _UNLIMITED if config.store.is_shared else config.store.max_buckets
        self.counters = PeriodCounters(most) if has_counters else None
        if self.counters is not None and snapshot is not None:
            self.counters.restore(deepcopy(snapshot.counters).items())
        self.unknown_tiers: set[str] = set()
        self._clients: dict[_ClientKey, Client] = {}
        self._is_by_address = address_rules(config.addresses) is not None or any(
            "address" in limit.key for limit in self.limits
        )
        # If nothing but the cost depends on the route: by method and path, of requests that got to the limits.
        self._costs: dict[tuple[str, str], float] | None = None
        is_plain = not self.limits and not self.routes.is_conditional and address_rules(config.addresses) is None
        if is_plain and all(route.addresses is None for route in routes):
            self._costs = {}
        self._buckets: dict[str, _Buckets] = {}
        self._exchange = Exchange("", "", "", "", 0.0)
        self._plan = RequestPlan(self._exchange, _facts(""), UNKNOWN_TARGET, 0)

    def __repr__(self) -> str:
        return f"<Simulation [{len(self._buckets)} processes]>"

    def decide(self, event: LogEvent) -> Decision | None:
        """Decide on a logged request; None if another stage than the limits refuses it."""
        process, source, client_id = event[PROCESS], event[SOURCE], event[ID_OF_CLIENT]
        buckets = self._buckets_of(process, source)
        self.routes.doubtful = ()
        if event[LIMITS] == '"address"':  # of the verification of a credential
            return self._check(buckets, event[ADDRESS], event[AT_NS])
        costs, last = self._costs, buckets.last.get(client_id)
        if last is not None and costs is not None and not event[SETTLEMENT_COUNT]:
            facts, tier, tier_source, has_keys, organisation, address = last
            if (
                event[TIER] == tier
                and event[TIER_SOURCE] == tier_source
                and event[HAS_KEYS] is has_keys
                and event[ORGANISATION] == organisation
                and (address is None or address == event[ADDRESS])
                and costs.get((event[REQUEST_METHOD], event[PATH])) == facts.cost
            ):  # then the stages decide as they did on the client's last request
                return buckets.limiter.decide(facts.charges, event[AT_NS])
        return self._decide_by_stages(buckets, event)

    def _decide_by_stages(self, buckets: _Buckets, event: LogEvent) -> Decision | None:
        at_ns, number, _, _, _, _, client_id, tier_source, address, tier, has_keys, method, path, route, *rest = event
        settlements, organisation, wall_us = rest[-3:]
        self._set_wall(wall_us or -(-at_ns // 1000))
        self._tier = tier
        key = client_id, tier, tier_source, has_keys, organisation
        facts = self._facts_of(buckets, key, address)
        exchange = Exchange("", "", "", "", 0.0) if settlements else self._exchange
        plan = self._plan
        plan.exchange, plan.facts, plan.now_ns = exchange, facts, at_ns
        client = exchange.client = facts.client
        exchange.method, exchange.path, exchange.client_address = method, path, address
        exchange.decision = None
        self.route_stage.logged = route
        assert client is not None  # noqa: S101 - set with the facts
        self._follow_tier(buckets, client, at_ns)
        buckets.admission.decide(plan)
        decision = exchange.decision
        if decision is None:
            return None
        if self._costs is not None:
            if len(self._costs) >= MAX_FACTS:
                self._costs.clear()
            self._costs[method, path] = exchange.cost
            if len(buckets.last) >= MAX_FACTS:
                buckets.last.clear()
            place = None if key in buckets.facts else address
            buckets.last[client_id] = facts, tier, tier_source, has_keys, organisation, place
        if settlements and decision.allowed:
            buckets.open[number] = exchange, settlements
        return decision

    def _follow_tier(self, buckets: _Buckets, client: Client, at_ns: int) -> None:
        """Convert the buckets of a client whose tier has changed since its last request."""
        held = buckets.clients.get(client.key)
        if held is not client:
            if held is not None and held.quota is not client.quota:
                for moved in moved_buckets(self.limits, held, client):
                    buckets.memory.change_quota(*moved, at_ns)
            buckets.clients[client.key] = client

    def _set_wall(self, now_us: int) -> None:
        """Set the wall clock so that the limiter, which rounds it up, has this time in microseconds."""
        self.wall = (now_us - 0.4) / MICROSECONDS

    def stage_of(self, limiter: RateLimiter) -> RateLimitStage:
        """Return the stage that charges all limits which can be evaluated."""
        address_quota, exempt = self.quotas.address, self.config.address_limit.exempt
        if not self.limits:
            return RateLimitStage(limiter=limiter, address_quota=address_quota, exempt=exempt)
        return LimitListStage(
            limiter=limiter, address_quota=address_quota, exempt=exempt, limits=self.limits, routes=self.routes.table
        )

    def check(self, event: LogEvent) -> Decision:
        """Charge the address of a logged request for the verification of its credential."""
        return self._check(self._buckets_of(event[PROCESS], event[SOURCE]), event[ADDRESS], event[AT_NS])

    def begin_from_snapshot(self, memory: MemoryLimiter, process: str) -> None:
        """Give new buckets of a process the state that they had; they keep their filled fraction as on a reload."""
        snapshot, before = self._snapshot, self._before
        held = {} if snapshot is None else snapshot.buckets.get(process, {})
        if snapshot is None or not held:
            return
        some = self.quotas.all[0]  # makes no difference to buckets that are new
        for key, full_at_ns in held.items():
            memory.seed(key, some, full_at_ns, snapshot.at_ns)
        if before is not None and before != self.quotas:
            memory.change_quotas([*before.all, *self.quotas.all], self._quota_before, snapshot.at_ns)

    def state(self, at_ns: int) -> ReplaySnapshot:
        """Return the state after the last event, which was at `at_ns`."""
        buckets = {
            name: {key: tat_ns for key, tat_ns in found.memory.tats().items() if tat_ns > at_ns}
            for name, found in self._buckets.items()
        }
        return ReplaySnapshot(at_ns, buckets, {} if self.counters is None else self.counters.counters)

    def _quota_before(self, key: str, present: Quota) -> Quota:
        """Return the quota of a bucket under the configuration of the snapshot."""
        before, (kind, _, _) = self._before, key.partition(":")
        assert before is not None  # noqa: S101 - only called with another configuration
        if kind == "peer":
            return before.address or present
        if kind == "limit":
            limit = next((limit for limit in before.limits if limit.name == limit_of(key)), None)
            return present if limit is None else limit.previous_quota(key, self._tier) or present
        return before.tiers.get(self._tier, present)

    def settle(self, event: LogEvent) -> None:
        """Settle the cost of a request, if this configuration has admitted it."""
        *_, number, cost = event
        buckets = self._buckets_of(event[PROCESS], event[SOURCE])
        exchange, count = buckets.open.pop(number, (None, 0))
        if exchange is None:
            return
        if count > 1:
            buckets.open[number] = exchange, count - 1
        self.now_ns = event[AT_NS]
        self._set_wall(-(-event[AT_NS] // 1000))
        buckets.settlement.settle(exchange, cost)

    def _check(self, buckets: _Buckets, address: str, at_ns: int) -> Decision:
        charges = buckets.limits.charges_of_address(address)
        if not charges:
            return Decision("", _NO_QUOTA, True, 0, 0, 0)
        return buckets.memory.decide(charges, at_ns)

    def _buckets_of(self, process: str, source: str) -> _Buckets:
        name = process if source == "memory" else SHARED
        found = self._buckets.get(name)
        if found is None:
            if len(self._buckets) >= MAX_PROCESSES:
                del self._buckets[next(iter(self._buckets))]
            found = self._buckets[name] = _Buckets(self, name)
        return found

    def _facts_of(self, buckets: _Buckets, key: _ClientKey, address: str) -> HeaderFacts:
        facts = buckets.facts.get(key)
        if facts is None:  # the address matters, or the client is not remembered
            facts = buckets.facts_by_address.get((key, address)) or self._add_facts(buckets, key, address)
        return facts

    def _add_facts(self, buckets: _Buckets, key: _ClientKey, address: str) -> HeaderFacts:
        facts = _facts(address)
        if key[4] is not None:
            facts.keyed = {DESCRIBED_ORGANISATION: key[4]}
        client = facts.client = self._client(key)
        table, place = buckets.facts, cast("tuple[Any, ...]", key)
        if self._is_by_address or not client.is_registered:
            table, place = buckets.facts_by_address, (key, address)
        if len(table) >= MAX_FACTS:
            table.clear()
        table[place] = facts
        return facts

    def _client(self, key: _ClientKey) -> Client:
        """Return the client of a request, resolved once."""
        client = self._clients.get(key)
        if client is None:
            if len(self._clients) >= MAX_FACTS:
                self._clients.clear()
            client = self._clients[key] = self._resolve(*key[:4])
        return client

    def _resolve(self, client_id: str, tier: str, tier_source: str, has_keys: bool) -> Client:  # noqa: FBT001 - of a log
        """Return the client of a request: with the tier of the log, unless it was configured."""
        if tier_source == "address":
            return self._registry.by_address(client_id)
        client = self._registry.by_id(client_id)
        if has_keys and not client.has_keys:
            client = replace(client, has_keys=True)
        if tier_source not in ("granted", "registered", "credential"):
            return client
        quota = self._registry.tiers.get(tier)
        if quota is None:
            self.unknown_tiers.add(tier)
        if tier_source == "credential":
            return self._registry.proved(client, tier)
        return client if quota is None else replace(client, quota=quota, source=cast("ClientSource", tier_source))


def logged_routes_of(config: GatewayConfig) -> list[Route]:
    """Return the routes of a configuration, which remove no prefix: the target as it was sent is not logged."""
    return [replace(route_of(section), strip_prefix="") for section in config.routes]


def evaluable(limits: Iterable[Limit]) -> list[Limit]:
    """Return the limits by values that are logged."""
    return [limit for limit in limits if not unlogged_parts(limit)]


def has_periods(limit: Limit) -> bool:
    """Return whether a limit counts in calendar periods, which begin before the log."""
    return any(isinstance(quota, PeriodQuota) for quota in limit.all_quotas)


def unlogged_parts(limit: Limit) -> list[str]:
    """Return the parts of a limit's key whose values are not logged."""
    return [part for part in limit.key if part not in ("client", "address", "organisation", "route")]


def _facts(address: str) -> HeaderFacts:
    return HeaderFacts(None, "", address, False, None, ())
