"""Builds upstreams from their sections: targets, breakers, balancing, limits, transports, retries, checks."""

import random
import time
from collections.abc import Mapping
from functools import partial

import httpx

from api_gateway.balancer import Upstream
from api_gateway.breaker_policy import BreakerPolicy
from api_gateway.circuit_breaker import CircuitBreaker
from api_gateway.config_sections import RetrySection, UpstreamSection
from api_gateway.errors import StartupError
from api_gateway.gradient import AdaptivePolicy, Gradient
from api_gateway.guarded import GuardedTransport, http2_transport
from api_gateway.health import HealthPolicy
from api_gateway.overload import Bands, ConcurrencyLimit
from api_gateway.picks import Pick, least_requests, rendezvous_hash, round_robin, share_of_key
from api_gateway.resolution import Name, Resolve
from api_gateway.retry import RetryPolicy
from api_gateway.rotation import Draw, Rotation, RotationPolicy
from api_gateway.service import Service, Timeouts
from api_gateway.transport import UpstreamTransport, tls_context
from api_gateway.upkeep import Upkeep


def service_of(
    name: str,
    section: UpstreamSection,
    transport: httpx.AsyncBaseTransport | None,
    now: float,
    names: list[Name],
    bands: Bands,
) -> Service:
    """Build an upstream with what is needed to send to it; raises StartupError."""
    picks: dict[str, Pick] = {
        "round_robin": round_robin,
        "least_requests": least_requests(random.Random()),  # noqa: S311 - spreads load, guards nothing
        "hash": rendezvous_hash,
    }
    targets = [target for one in names for target in one.targets]
    _, _, header = section.hash_on.partition(":")
    upstream = Upstream(
        name,
        targets,
        _breaker(section, now),
        picks[section.balance],
        rotation=_rotation(section),
        limit=_concurrency(section, bands, now),
    )
    return Service(
        upstream,
        _transport(name, section) if transport is None else GuardedTransport(transport),
        Timeouts(**section.timeouts.model_dump()),
        retry=_retry_policy(section.retry),
        hash_header=header.lower().encode() or None,
    )


def _retry_policy(section: RetrySection) -> RetryPolicy:
    return RetryPolicy(
        attempts=section.attempts,
        budget=section.budget,
        floor=section.floor,
        base=section.backoff.base,
        cap=section.backoff.cap,
        max_retry_after=section.max_retry_after,
        statuses=frozenset(section.statuses),
        max_body_bytes=section.max_body_bytes,
    )


def names_of(section: UpstreamSection) -> list[Name]:
    """Return the configured targets of an upstream."""
    return [Name(target.url, target.weight) for target in section.targets]


def checking_transport(
    name: str, section: UpstreamSection, transports: Mapping[str, httpx.AsyncBaseTransport]
) -> UpstreamTransport | GuardedTransport | None:
    """Return a transport for health checks alone, or None if there are none or somebody has brought their own."""
    return None if section.health_check is None or name in transports else _transport(name, section)


def upkeep_of(
    section: UpstreamSection,
    service: Service,
    names: list[Name],
    resolve: Resolve,
    transport: UpstreamTransport | GuardedTransport | None,
) -> Upkeep:
    """Build the health checks and name look-ups of an upstream."""
    policy, check = None, section.health_check
    if check is not None:
        ranges = (spelt.split("-") for spelt in check.statuses)
        statuses = tuple(range(int(low), int(high) + 1) for low, high in ranges)
        policy = HealthPolicy(**check.model_dump(exclude={"statuses"}), statuses=statuses)
    return Upkeep(
        service,
        policy=policy,
        transport=transport,
        names=names if section.resolve is not None else (),
        interval=section.resolve or 0.0,
        resolve=resolve,
        clock=time.monotonic,
        source=random.Random(),  # noqa: S311 - spreads checks and questions, guards nothing
    )


def _breaker(section: UpstreamSection, now: float, **changes: float) -> CircuitBreaker:
    settings = section.circuit_breaker.model_dump(exclude={"per_target", "max_ejected"})
    return CircuitBreaker(BreakerPolicy(**settings | changes), now, random.Random())  # noqa: S311 - spreads probes


def _rotation(section: UpstreamSection) -> Rotation:
    return Rotation(
        RotationPolicy(section.circuit_breaker.max_ejected, section.slow_start),
        draw=share_of_key if section.balance == "hash" else _by_chance(random.Random()),  # noqa: S311 - as above
        # Traffic comes back to a target by its slow start, and by no ramp beside it.
        make_breaker=partial(_breaker, section, ramp=0.0) if section.circuit_breaker.per_target else None,
    )


def _by_chance(source: random.Random) -> Draw:
    return lambda _target, _key: source.random()


def _concurrency(section: UpstreamSection, bands: Bands, now: float) -> ConcurrencyLimit | None:
    concurrency, source = section.concurrency, random.Random()  # noqa: S311 - spreads load, guards nothing
    if concurrency is None:
        return None
    if concurrency.adaptive is not None:
        policy = AdaptivePolicy(**concurrency.adaptive.model_dump())
        return ConcurrencyLimit(Gradient(policy, now), bands, source=source)
    assert concurrency.limit is not None  # noqa: S101 - one of them is set
    return ConcurrencyLimit(concurrency.limit, bands, source=source)


def _transport(name: str, section: UpstreamSection) -> UpstreamTransport | GuardedTransport:
    tls = None
    if any(target.url.startswith("https:") for target in section.targets):
        try:
            tls = tls_context(section.tls.ca_file, section.tls.certificate, section.tls.key)
        except OSError as error:
            raise StartupError(f"upstreams.{name}.tls: the files cannot be used: {error}") from error
    pool = section.pool
    if not section.http2:
        return UpstreamTransport(
            max_connections=pool.max_connections,
            max_tunnels=pool.max_tunnels,
            idle_timeout=pool.idle_timeout,
            tls=tls,
        )
    try:
        return http2_transport(pool.max_connections, pool.idle_timeout, tls)
    except ImportError as error:
        raise StartupError(f"upstreams.{name}.http2: needs the package h2: pip install 'httpx[http2]'") from error
