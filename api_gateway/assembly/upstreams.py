"""Builds upstreams from their sections, and changes live ones to other sections.

`plan_upstream` does everything that can fail and changes nothing; `build_upstream` and `change_upstream` cannot fail.
"""

import hashlib
import random
import ssl
from collections import defaultdict
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial

import httpx

from api_gateway.assembly.transition_log import log_target_transition
from api_gateway.circuit_breaker import CircuitBreaker
from api_gateway.errors import StartupError
from api_gateway.models import Clock
from api_gateway.resilience.adaptive_limit import AdaptivePolicy, GradientController
from api_gateway.resilience.breaker_policy import BreakerPolicy
from api_gateway.resilience.concurrency_limit import ConcurrencyLimit
from api_gateway.resilience.priorities import PriorityClasses
from api_gateway.resilience.retry import RetryPolicy
from api_gateway.settings.upstreams import RetrySection, UpstreamSection
from api_gateway.transport.http1_transport import AnyTransport, UpstreamTransport, tls_context
from api_gateway.transport.shielded import ShieldedTransport, http2_transport
from api_gateway.upstreams.dns import HostName, Resolve
from api_gateway.upstreams.health_checks import HealthPolicy
from api_gateway.upstreams.load_balancing import Picker, least_requests, rendezvous_hash, round_robin, share_of_key
from api_gateway.upstreams.monitor import UpstreamMonitor
from api_gateway.upstreams.outlier_detection import Draw, OutlierDetector, OutlierPolicy
from api_gateway.upstreams.target import Target
from api_gateway.upstreams.upstream import Upstream
from api_gateway.upstreams.upstream_client import Timeouts, UpstreamClient

Transport = UpstreamTransport | ShieldedTransport


@dataclass(frozen=True, slots=True)
class Tls:
    """The TLS context of an upstream, and a digest of its files, by which changes are detected."""

    context: ssl.SSLContext | None = None
    digest: bytes = b""


NO_TLS = Tls()
TlsByFiles = MutableMapping[tuple[bytes, bool], Tls]  # by digest, and whether it is for HTTP/2


@dataclass(frozen=True, slots=True)
class LiveUpstream:
    """An upstream at run time, with its section. `is_retired`: no longer configured, and its monitor is stopped."""

    section: UpstreamSection
    tls: Tls
    names: tuple[HostName, ...]
    upstream_client: UpstreamClient
    monitor: UpstreamMonitor
    is_retired: bool = False

    @property
    def transports(self) -> tuple[AnyTransport, ...]:
        """The transport of requests and, if health checks have their own, that one."""
        checking = self.monitor.transport
        return (self.upstream_client.transport,) if checking is None else (self.upstream_client.transport, checking)


@dataclass(frozen=True, slots=True)
class UpstreamPlan:
    """A planned upstream. The transports are new ones; None if the existing ones are kept."""

    name: str
    section: UpstreamSection
    tls: Tls
    transport: Transport | None
    checking: Transport | None


def plan_upstream(
    name: str,
    section: UpstreamSection,
    live: LiveUpstream | None,
    override: httpx.AsyncBaseTransport | None,
    created: TlsByFiles,
) -> UpstreamPlan:
    """Do everything that can fail when applying a section; `live` is the current upstream. Blocks.

    `override` replaces the gateway's own transport. `created` has the TLS contexts of the same plan, which upstreams
    with the same files share, because loading the system's certificates takes milliseconds. Raises StartupError.
    """
    tls = _tls(name, section, live, created)
    is_new = live is None or section.uses_http2 != live.section.uses_http2
    if live is not None and section.uses_http2:  # httpx's transport cannot be changed
        is_new |= live.is_retired or section.pool != live.section.pool or tls is not live.tls
    transport: Transport | None = None
    if override is not None:
        transport = ShieldedTransport(override) if live is None else None
        return UpstreamPlan(name, section, tls, transport, None)
    if is_new:
        transport = _transport(name, section, tls)
    checking = None
    if section.health_check is not None and (is_new or live is None or live.monitor.transport is None):
        checking = _transport(name, section, tls)
    return UpstreamPlan(name, section, tls, transport, checking)


def build_upstream(
    plan: UpstreamPlan, resolve: Resolve, clock: Clock, source: random.Random, priorities: PriorityClasses
) -> LiveUpstream:
    """Build a new upstream from its plan. All upstreams share one random source, which is large."""
    section, now = plan.section, clock()
    assert plan.transport is not None  # noqa: S101 - a new upstream has no transport to keep
    names = tuple(HostName(target.url, target.weight) for target in section.targets)
    upstream = Upstream(
        plan.name,
        [target for name in names for target in name.targets],
        _breaker(section, source, now),
        _picker(section, source),
        outliers=OutlierDetector(
            _rotation_policy(section),
            draw=_draw(section, source),
            make_breaker=_make_breaker(section, source),
            on_unprobed_return=partial(log_target_transition, plan.name),
        ),
        limit=_limit(section, None, priorities, source, now),
    )
    upstream_client = UpstreamClient(
        upstream,
        plan.transport,
        Timeouts(**section.timeouts.model_dump()),
        retry=_retry_policy(section.retry),
        source=source,
        hash_header=_hash_header(section),
        host_header=section.host_header,
        max_aborted=section.pool.max_connections,
    )
    return LiveUpstream(
        section,
        plan.tls,
        names,
        upstream_client,
        _upkeep(section, upstream_client, names, resolve, plan.checking, clock, source),
    )


def change_upstream(
    plan: UpstreamPlan,
    live: LiveUpstream,
    resolve: Resolve,
    clock: Clock,
    source: random.Random,
    priorities: PriorityClasses,
) -> LiveUpstream:
    """Change a live upstream to another section. Breakers, unchanged targets, pools, budgets and limits are kept.

    A new target begins with slow start if others remain.
    """
    section, upstream, now = plan.section, live.upstream_client.upstream, clock()
    upstream.breaker.change_policy(_breaker_policy(section), now)
    upstream.rebalance(_picker(section, source))
    upstream.outliers.change(
        _rotation_policy(section),
        _draw(section, source),
        _make_breaker(section, source),
        _breaker_policy(section, ramp=0.0),
        upstream.targets,
        now,
    )
    upstream.limit = _limit(section, upstream.limit, priorities, source, now)
    transport = live.upstream_client.transport if plan.transport is None else plan.transport
    upstream_client = live.upstream_client.succeeded_by(
        Timeouts(**section.timeouts.model_dump()),
        _retry_policy(section.retry),
        _hash_header(section),
        transport,
        section.host_header,
        section.pool.max_connections,
    )
    if plan.transport is None:
        _change_transport(transport, plan)
    names = _names(section, live)
    _retarget(upstream_client, [target for name in names for target in name.targets], now)
    checking = plan.checking or (None if section.health_check is None else live.monitor.transport)
    if plan.checking is None and checking is not None:
        _change_transport(checking, plan)
    if live.is_retired:
        monitor = _upkeep(section, upstream_client, names, resolve, checking, clock, source)
    else:
        monitor = live.monitor
        monitor.change(upstream_client, _health_policy(section), checking, *_resolved(section, names))
    return LiveUpstream(section, plan.tls, names, upstream_client, monitor)


def rerank(live: LiveUpstream, priorities: PriorityClasses, source: random.Random, now: float) -> None:
    """Apply other priorities of tiers to the concurrency limit."""
    limit = live.upstream_client.upstream.limit
    live.upstream_client.upstream.limit = _limit(live.section, limit, priorities, source, now)


def _retarget(upstream_client: UpstreamClient, targets: list[Target], now: float) -> None:
    upstream = upstream_client.upstream
    before = upstream.targets
    upstream_client.set_targets(targets, now)
    if any(target in before for target in targets):
        for target in targets:
            if target not in before:
                upstream.outliers.start_slow_start(target, now)


def _names(section: UpstreamSection, live: LiveUpstream) -> tuple[HostName, ...]:
    """Return the names of the configured targets, keeping existing ones with their addresses."""
    known: Mapping[str, list[HostName]] = defaultdict(list)
    for name in live.names:
        if (
            section.dns_refresh_interval is not None or not name.addresses
        ):  # resolved addresses are dropped without `dns_refresh_interval`
            known[name.url].append(name)
    found = []
    for target in section.targets:
        if known[target.url]:
            name = known[target.url].pop(0)
            name.set_weight(target.weight)
        else:
            name = HostName(target.url, target.weight)
        found.append(name)
    return tuple(found)


def _change_transport(transport: AnyTransport, plan: UpstreamPlan) -> None:
    if isinstance(transport, UpstreamTransport):
        pool = plan.section.pool
        transport.change(
            pool.max_connections,
            pool.max_tunnels,
            pool.idle_timeout,
            plan.tls.context,
            max_requests=pool.max_requests,
            max_age=pool.max_age,
        )
        transport.revive()


def _picker(section: UpstreamSection, source: random.Random) -> Picker:
    pickers: dict[str, Picker] = {
        "round_robin": round_robin,
        "least_requests": least_requests(source),
        "hash": rendezvous_hash,
    }
    return pickers[section.balance]


def _hash_header(section: UpstreamSection) -> bytes | None:
    _, _, header = section.hash_on.partition(":")
    return header.lower().encode() or None


def _retry_policy(section: RetrySection) -> RetryPolicy:
    return RetryPolicy(
        attempts=section.attempts,
        budget=section.budget,
        floor=section.min_retries_per_second,
        base=section.backoff.base,
        cap=section.backoff.cap,
        max_retry_after=section.max_retry_after,
        statuses=frozenset(section.statuses),
        max_body_bytes=section.max_body_bytes,
    )


def _health_policy(section: UpstreamSection) -> HealthPolicy | None:
    check = section.health_check
    if check is None:
        return None
    ranges = (spelt.split("-") for spelt in check.statuses)
    statuses = tuple(range(int(low), int(high) + 1) for low, high in ranges)
    return HealthPolicy(**check.model_dump(exclude={"statuses"}), statuses=statuses)


def _resolved(section: UpstreamSection, names: tuple[HostName, ...]) -> tuple[tuple[HostName, ...], float]:
    """Return the names to resolve, and the interval in seconds."""
    return (names, section.dns_refresh_interval) if section.dns_refresh_interval is not None else ((), 0.0)


def _upkeep(
    section: UpstreamSection,
    upstream_client: UpstreamClient,
    names: tuple[HostName, ...],
    resolve: Resolve,
    checking: Transport | None,
    clock: Clock,
    source: random.Random,
) -> UpstreamMonitor:
    followed, interval = _resolved(section, names)
    return UpstreamMonitor(
        upstream_client,
        policy=_health_policy(section),
        transport=checking,
        names=followed,
        interval=interval,
        resolve=resolve,
        clock=clock,
        source=source,
    )


def _breaker_policy(section: UpstreamSection, **changes: float) -> BreakerPolicy:
    settings = section.circuit_breaker.model_dump(exclude={"per_target", "max_ejected_ratio"})
    return BreakerPolicy(**settings | changes)


def _breaker(section: UpstreamSection, source: random.Random, now: float, **changes: float) -> CircuitBreaker:
    return CircuitBreaker(_breaker_policy(section, **changes), now, source)


def _rotation_policy(section: UpstreamSection) -> OutlierPolicy:
    return OutlierPolicy(section.circuit_breaker.max_ejected_ratio, section.slow_start)


def _make_breaker(section: UpstreamSection, source: random.Random) -> "partial[CircuitBreaker] | None":
    # Without ramp: slow start already increases the traffic of a target that returns to service.
    return partial(_breaker, section, source, ramp=0.0) if section.circuit_breaker.per_target else None


def _draw(section: UpstreamSection, source: random.Random) -> Draw:
    return share_of_key if section.balance == "hash" else _by_chance(source)


def _by_chance(source: random.Random) -> Draw:
    return lambda _target, _key: source.random()


def _limit(
    section: UpstreamSection,
    limit: ConcurrencyLimit | None,
    priorities: PriorityClasses,
    source: random.Random,
    now: float,
) -> ConcurrencyLimit | None:
    """Return the limit of the section: the existing `limit`, changed, or a new one."""
    concurrency = section.concurrency
    if concurrency is None:
        return None
    terms: float | AdaptivePolicy
    if concurrency.adaptive is not None:
        terms = AdaptivePolicy(**concurrency.adaptive.model_dump())
    else:
        assert concurrency.limit is not None  # noqa: S101 - one of them is set
        terms = concurrency.limit
    if limit is not None:
        limit.change(terms, priorities, now)
        return limit
    start = GradientController(terms, now) if isinstance(terms, AdaptivePolicy) else terms
    return ConcurrencyLimit(start, priorities, source=source)


def _tls(name: str, section: UpstreamSection, live: LiveUpstream | None, created: TlsByFiles) -> Tls:
    """Return the TLS context: that of `live` if neither the paths nor the contents of the files have changed.

    A context for HTTP/2 is not shared with others, because its transport sets the protocols to negotiate.
    """
    if not any(target.url.startswith("https:") for target in section.targets):
        return NO_TLS
    files = (section.tls.ca_file, section.tls.cert_file, section.tls.key_file)
    try:
        digest = hashlib.blake2b(
            b"\0".join(str(path).encode() + (path.read_bytes() if path is not None else b"") for path in files)
        ).digest()
        if live is not None and live.tls.digest == digest:
            return live.tls
        key = (digest, section.uses_http2)
        if key not in created:
            created[key] = Tls(tls_context(*files), digest)
        return created[key]
    except OSError as error:
        raise StartupError(f"upstreams.{name}.tls: the files cannot be used: {error}") from error


def _transport(name: str, section: UpstreamSection, tls: Tls) -> Transport:
    pool = section.pool
    if not section.uses_http2:
        return UpstreamTransport(
            max_connections=pool.max_connections,
            max_tunnels=pool.max_tunnels,
            idle_timeout=pool.idle_timeout,
            max_requests=pool.max_requests,
            max_age=pool.max_age,
            tls=tls.context,
        )
    try:
        return http2_transport(pool.max_connections, pool.idle_timeout, tls.context)
    except ImportError as error:
        raise StartupError(f"upstreams.{name}.http2: needs the package h2: pip install 'httpx[http2]'") from error
