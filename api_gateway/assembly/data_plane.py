"""Builds the data plane of a gateway: the fast path, the ASGI application, and the factory of the explainer."""

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from api_gateway.assembly.extensions import Hooks, hooks_by_name
from api_gateway.assembly.forwarding import forwarding_of
from api_gateway.assembly.gateway import Gateway
from api_gateway.assembly.identity import identity_sources
from api_gateway.assembly.identity_observer import IdentityObserver
from api_gateway.assembly.routes import address_rules
from api_gateway.assembly.transition_log import log_target_transition, log_transition
from api_gateway.clients.api_keys import without_keys
from api_gateway.config import GatewayConfig
from api_gateway.exchanges.fast_path import FastPath
from api_gateway.exchanges.hooked_exchange import HookedExchange
from api_gateway.exchanges.mirroring_exchange import MirroringExchange
from api_gateway.http1.asgi import ASGIApp
from api_gateway.http1.via import Via
from api_gateway.limits.concurrency_headers import ConcurrencyHeaders
from api_gateway.limits.ratelimit_headers import RateLimitHeaders
from api_gateway.middleware import ExchangeRecords
from api_gateway.models import Exchange, HeaderList
from api_gateway.observability.access_log import LINE_BYTES, AccessLog
from api_gateway.observability.selected_lines import at_level, by_route, sampled, with_fields
from api_gateway.observability.text_log import TextLog
from api_gateway.proxy.address_stages import AddressStage, RouteAddressStage
from api_gateway.proxy.admission import Admission, Stage
from api_gateway.proxy.candidate_limits import CandidateLimits
from api_gateway.proxy.certificate_source import CertificateStage
from api_gateway.proxy.concurrency_stage import ConcurrencyStage
from api_gateway.proxy.cors_stages import CorsPolicies, CorsStage, PreflightStage
from api_gateway.proxy.cost_settlement import CostSettlement
from api_gateway.proxy.credential_stages import CredentialRouteStage, CredentialStage
from api_gateway.proxy.extension_stages import (
    ExtensionCostStage,
    ExtensionIdentityStage,
    ExtensionRequestStage,
    ResponseHooks,
)
from api_gateway.proxy.header_facts import HeaderReader
from api_gateway.proxy.identity_sources import IdentitySources
from api_gateway.proxy.jwt_source import RequirementStage
from api_gateway.proxy.limit_stage import LimitListStage, RateLimitStage
from api_gateway.proxy.route_stages import DirectResponseStage, stages_of_routes
from api_gateway.proxy.stages import (
    AmbiguityStage,
    DeadlineStage,
    DecisionNumberStage,
    FinalRecipientStage,
    IdentityStage,
    LoadSheddingStage,
    RouteStage,
)
from api_gateway.router import Router
from api_gateway.system.output import process_output

if TYPE_CHECKING:
    from api_gateway.admin.explainer import Explainer


def data_plane_of(
    gateway: Gateway, server_headers: frozenset[bytes], *, has_own_tls: bool
) -> tuple[ASGIApp, FastPath, Callable[[], "Explainer"]]:
    """Return the ASGI application, the fast path, and what makes explainers; they share one admission.

    `server_headers` are header fields that the server adds to responses, so those of upstreams are omitted.
    `has_own_tls`: `server.tls` is that of the connections, if it is configured.
    """
    config, recorder, clocks = gateway.config, gateway.recorder, gateway.clocks
    limit_headers = ConcurrencyHeaders() if gateway.quotas.concurrency else RateLimitHeaders()
    settlement = CostSettlement(
        limiter=gateway.charging,
        clock_ns=clocks.monotonic_ns,
        recorder=recorder,
        next_number=_next_number(gateway) or (_unnumbered if gateway.config.history.enabled else None),
    )
    sources = identity_sources(config, gateway.clients.keys, gateway.tokens, clocks.wall)
    cors = _cors(gateway)
    headers = _headers(gateway, sources, cors)
    router = _router(gateway, settlement, server_headers)
    limits = _limits(gateway)
    hooks = hooks_by_name(gateway.extensions, gateway.quotas.tiers, recorder.observe_hook)
    admission = _admission(gateway, router, limits, sources, cors, hooks)
    record = ExchangeRecords(
        recorder=recorder,
        observers=_observers(gateway),
        on_failure=settlement.on_failure,
        on_late_decision=settlement.on_late_decision,
    )
    fast_path = FastPath(
        record=record,
        admission=admission,
        headers=headers,
        router=router,
        limit_headers=limit_headers,
        clock=clocks.monotonic,
        clock_ns=clocks.monotonic_ns,
        cors=cors,
        open_exchanges=gateway.open_exchanges,
        tracer=gateway.tracing.tracer,
        added=hsts_fields(config) if has_own_tls else [],
    )
    response_hooks = ResponseHooks(hooks["on_response"])
    if hooks["on_response"]:
        fast_path.exchange_kind, fast_path.response_hooks = HookedExchange, response_hooks
    if any(route.mirroring is not None for route in gateway.routes):
        fast_path.exchange_kind, fast_path.mirrors = MirroringExchange, gateway.mirrors
    make_explainer = partial(
        _explainer,
        admission=admission,
        headers=headers,
        router=router,
        limits=limits,
        limiter=gateway.charging,
        shedder=gateway.event_loop_shedder,
        header=config.identity.header,
        is_known=gateway.clients.is_known,
        claim_of_key=sources.claim_of_key,
        response_calls=response_hooks.calls,
        clock=clocks.monotonic,
        clock_ns=clocks.monotonic_ns,
    )
    return fast_path.serve, fast_path, make_explainer


def _explainer(**parts: Any) -> "Explainer":
    explainer: Explainer = import_module("api_gateway.admin.explainer").Explainer(**parts)
    return explainer


def hsts_fields(config: GatewayConfig) -> HeaderList:
    """Return the header fields of every response over TLS; plain HTTP must have none (RFC 6797 section 7.2).

    A client uses the first one, an upstream's own if it has one (section 8.1).
    """
    section = config.server.tls
    if section is None or section.hsts is None:
        return []
    return [(b"strict-transport-security", section.hsts.encode())]


def _limits(gateway: Gateway) -> RateLimitStage:
    exempt, candidate_limits = gateway.config.address_limit.exempt, _candidate_limits(gateway)
    if gateway.quotas.concurrency:
        return ConcurrencyStage(
            limiter=gateway.charging,
            address_quota=gateway.address_quota,
            exempt=exempt,
            candidate_limits=candidate_limits,
            limits=gateway.quotas.limits,
            concurrency=gateway.quotas.concurrency,
            routes=gateway.table,
            slots=gateway.slots,
        )
    if not gateway.quotas.limits:
        return RateLimitStage(
            limiter=gateway.charging,
            address_quota=gateway.address_quota,
            exempt=exempt,
            candidate_limits=candidate_limits,
        )
    return LimitListStage(
        limiter=gateway.charging,
        address_quota=gateway.address_quota,
        exempt=exempt,
        candidate_limits=candidate_limits,
        limits=gateway.quotas.limits,
        routes=gateway.table,
    )


def _headers(gateway: Gateway, sources: IdentitySources, cors: CorsPolicies | None) -> HeaderReader:
    config = gateway.config
    claims = frozenset[bytes]() if gateway.tokens is None else gateway.tokens.identity_fields
    id_header = config.identity.header.lower().encode()
    unproved = frozenset[bytes]() if sources.accepts_header else {id_header, id_header.replace(b"-", b"_")}
    return HeaderReader(
        id_header=config.identity.header,
        trusted_proxies=config.server.trusted_proxies,
        max_body_bytes=config.server.max_body_bytes,
        via=Via(config.server.via or gateway.pseudonym),
        reads_origin=cors is not None,
        forwarding=forwarding_of(config.server.forwarded),
        sources=sources,
        identity_fields=claims | unproved,
        limit_fields=frozenset(
            part.removeprefix("header:").encode()
            for limit in (*gateway.quotas.limits, *gateway.quotas.concurrency)
            for part in limit.key
            if part.startswith("header:")
        ),
        route_fields=frozenset(name.lower().encode() for route in config.routes for name in route.match.headers),
    )


def _cors(gateway: Gateway) -> CorsPolicies | None:
    """Return the CORS policies, None if there are none."""
    default = gateway.cors
    if default is None and all(route.cors is None for route in gateway.routes):
        return None
    return CorsPolicies(gateway.table, default)


def _preflights(gateway: Gateway, cors: CorsPolicies) -> PreflightStage:
    priority = gateway.priorities.of(gateway.config.default_tier)
    return PreflightStage(cors, shedder=gateway.event_loop_shedder, priority=priority)


def _admission(
    gateway: Gateway,
    router: Router,
    limits: RateLimitStage,
    sources: IdentitySources,
    cors: CorsPolicies | None,
    hooks: Hooks,
) -> Admission:
    config, rules = gateway.config, address_rules(gateway.config.addresses)
    is_enforced = config.identity.mode == "enforce"
    observer = IdentityObserver(gateway.recorder, gateway.clocks.monotonic_ns, is_enforced=is_enforced)
    next_number = _next_number(gateway)
    identity: list[Stage] = []
    access: list[Stage] = []
    if sources.credentials:
        identity.append(
            CredentialStage(
                clients=gateway.clients,
                priorities=gateway.priorities,
                limiter=gateway.charging,
                charges_of_address=limits.charges_of_address,
                is_enforced=is_enforced,
                on_observed=observer.on_observed,
                next_number=_next_number(gateway),
            )
        )
        access.append(CredentialRouteStage(is_enforced=is_enforced, on_observed=observer.on_observed))
    identification: Stage = IdentityStage(
        clients=gateway.clients,
        priorities=gateway.priorities,
        sources=sources,
        is_enforced=is_enforced,
        on_bare=observer.on_bare,
        on_observed=observer.on_observed,
    )
    if hooks["identify"]:
        identification = ExtensionIdentityStage(hooks["identify"], identification, gateway.clients, gateway.priorities)
    access += _requirements(gateway)
    return Admission(
        [
            AmbiguityStage(),
            *([] if cors is None else [_preflights(gateway, cors)]),
            *identity,
            identification,
            *([] if rules is None else [AddressStage(rules)]),
            RouteStage(router.routes),
            *([] if cors is None else [CorsStage()]),
            *stages_of_routes(gateway.routes),
            *([ExtensionCostStage(hooks["cost"])] if hooks["cost"] else []),
            *([RouteAddressStage()] if any(route.addresses is not None for route in gateway.routes) else []),
            *access,
            DeadlineStage(
                {name: client.total_timeout for name, client in router.upstream_clients.items()},
                have_routes_timeouts=any(route.timeout is not None for route in gateway.routes),
            ),
            LoadSheddingStage(gateway.event_loop_shedder),
            *([] if next_number is None else [DecisionNumberStage(next_number)]),
            limits,
            *_last_stages(gateway, hooks),
        ]
    )


def _requirements(gateway: Gateway) -> Iterator[Stage]:
    """Yield the stages for what routes require of a request in addition to its identity, if any does."""
    if any(route.requirement is not None for route in gateway.routes):
        yield RequirementStage()
    if any(route.requires_certificate for route in gateway.routes):
        yield CertificateStage()


def _last_stages(gateway: Gateway, hooks: Hooks) -> list[Stage]:
    """Return the stages that respond in place of an upstream."""
    return [
        FinalRecipientStage(),
        *([ExtensionRequestStage(hooks["on_request"])] if hooks["on_request"] else []),
        *([DirectResponseStage()] if any(route.response is not None for route in gateway.routes) else []),
    ]


def _router(gateway: Gateway, settlement: CostSettlement, server_headers: frozenset[bytes]) -> Router:
    config, recorder, clocks = gateway.config, gateway.recorder, gateway.clocks
    return Router(
        gateway.table,
        gateway.upstream_clients,
        clock=clocks.monotonic,
        max_body_bytes=config.server.max_body_bytes,
        omit=server_headers,
        observe_attempt=recorder.observe_attempt,
        on_transition=log_transition,
        on_target_transition=log_target_transition,
        on_cost=settlement.on_cost,
        on_content_cost=settlement.on_content_cost,
        on_retry=recorder.observe_retry,
        on_denial=recorder.observe_denial,
        on_fallback=settlement.on_fallback,
        priorities=gateway.priorities,
        lag=gateway.event_loop_shedder,
    )


def _observers(gateway: Gateway) -> list[Callable[[Exchange], None]]:
    """Return the observers of ended exchanges.

    Only those of a configuration with concurrency limits release slots: a request ends under the configuration with
    which it began.
    """
    slots = [gateway.slots.release] if gateway.quotas.concurrency else []
    return [*slots, gateway.recorder.observe, *gateway.tracing.observers, *_records(gateway)]


def _records(gateway: Gateway) -> list[Callable[[Exchange], None]]:
    """Return the observers that record exchanges: access log, usage and history, as far as they are enabled."""
    history = [gateway.history.observer(gateway.clocks.wall)] if gateway.config.history.enabled else []
    return [*_writers(gateway), *history]


def _writers(gateway: Gateway) -> list[Callable[[Exchange], None]]:
    """Return the observer that writes to access log and usage, with one time for both; none if both are off."""
    writers = _access_logs(gateway)
    if gateway.usage is not None:
        writers.append(gateway.usage.count)
    if not writers:
        return []
    wall_clock, (first, *others) = gateway.clocks.wall, writers

    def record(exchange: Exchange) -> None:
        now = wall_clock()
        first(exchange, now)
        for write in others:
            write(exchange, now)

    return [record]


def _access_logs(gateway: Gateway) -> list[Callable[[Exchange, float], None]]:
    log = gateway.config.log
    if not log.access:
        return []
    output = process_output().out
    line: Callable[[Exchange, float], str]
    if log.format == "text" or (log.format == "auto" and output.is_terminal):
        line = TextLog(without_keys).line
    else:
        line = AccessLog(without_keys, gateway.numbers).line
        if log.fields is not None:
            line = with_fields(line, frozenset(log.fields))
    write_later = output.write_later

    def write(exchange: Exchange, now: float) -> None:
        write_later(line, exchange, now, LINE_BYTES + len(exchange.path))

    chosen = write if log.sample_successes == 1 else sampled(write, log.sample_successes)
    levels = {one.name: at_level(write, one.access_log) for one in gateway.config.routes if one.access_log != "all"}
    return [by_route(chosen, levels) if levels else chosen]


def _next_number(gateway: Gateway) -> Callable[[], int] | None:
    """Return the function that numbers decisions; None without an access log."""
    return gateway.numbers.next if gateway.config.log.access else None


def _unnumbered() -> int:
    """Return the number of a settlement that only the history records, which needs no numbers."""
    return 0


def _candidate_limits(gateway: Gateway) -> CandidateLimits | None:
    candidate_limits = CandidateLimits(
        limiter=gateway.charging,
        clock_ns=gateway.clocks.monotonic_ns,
        recorder=gateway.recorder,
        candidates=gateway.candidates,
        routes=gateway.routes,
        slots=gateway.slots,
    )
    return None if candidate_limits.is_empty else candidate_limits
