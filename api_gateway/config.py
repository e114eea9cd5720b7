"""Configuration: what may be set, its defaults, and one clear line for every mistake.

Precedence, highest first: command line, environment (`GATEWAY_`, `__` nests), `.env`, YAML file, the defaults below.
Knows nothing of how the values are used.
"""

import logging
import os
from collections.abc import Collection, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

from dotenv import dotenv_values
from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from api_gateway.config_sections import (
    AddressLimitSection,
    AdminSection,
    CandidateSection,
    ClientSection,
    IdentitySection,
    LogSection,
    MetricsSection,
    Name,
    RouteSection,
    ServerSection,
    StoreSection,
    TierName,
    TierSection,
    UpstreamSection,
)
from api_gateway.diagnosis import NO_FILE, ConfigError, Sources, explain, nearest, read_yaml
from api_gateway.secret import Unusable
from api_gateway.state_folder import StateError, default_state_dir

ENV_PREFIX = "GATEWAY_"
ENV_FILE = ".env"
CONFIG_VARIABLE = "GATEWAY_CONFIG"
LONGEST_BUDGET = 2_000_000  # seconds; twice as many nanoseconds are exact in the store's arithmetic
MAX_FILL = 10 * 365.25 * 86_400  # seconds a bucket may take to fill: all its times keep to 15 digits, and to 63 bits

logger = logging.getLogger(__name__)

DEFAULT_TIERS: dict[str, dict[str, float]] = {
    "FREE": {"rate": 1, "capacity": 10},
    "BASIC": {"rate": 5, "capacity": 50},
    "PREMIUM": {"rate": 20, "capacity": 200},
    "ENTERPRISE": {"rate": 100, "capacity": 1000},
}

_file_path: ContextVar[Path | None] = ContextVar("_file_path", default=None)
_file_values: ContextVar[dict[str, Any]] = ContextVar("_file_values", default={})  # noqa: B039 - never mutated


def _default_state_dir() -> Path | Unusable:
    try:
        return default_state_dir(_file_path.get(), os.environ)
    except StateError as error:
        return Unusable(str(error).removeprefix("state_dir: "))


def _folder(given: Any) -> Any:
    if isinstance(given, Unusable):
        raise ValueError(given.cause)  # noqa: TRY004 - it becomes a message of the validation
    if given == "":
        raise ValueError("must name a folder")
    return Path(given).expanduser() if isinstance(given, str) else given


class GatewayConfig(BaseSettings):
    """The whole configuration."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        env_file=ENV_FILE,
        dotenv_filtering="only_existing",
        extra="forbid",
        frozen=True,
        validate_default=True,
        hide_input_in_errors=True,
    )

    server: ServerSection = ServerSection()
    store: StoreSection = StoreSection()
    state_dir: Annotated[Path, BeforeValidator(_folder)] = Field(
        default=Path(), description="None: a folder of the configuration file's own, see `state_folder`."
    )
    admin: AdminSection = AdminSection()
    identity: IdentitySection = IdentitySection()
    address_limit: AddressLimitSection = AddressLimitSection()
    tiers: dict[Name, TierSection] = Field(default={}, validate_default=True)
    default_tier: TierName = "FREE"
    clients: dict[Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,128}$")], ClientSection] = {}
    upstreams: dict[Name, UpstreamSection] = {}
    routes: list[RouteSection] = []
    metrics: MetricsSection = MetricsSection()
    log: LogSection = LogSection()

    @property
    def is_demo(self) -> bool:
        """True when nothing to proxy to is configured."""
        return not self.upstreams and not self.routes

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the signature is the library's
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources, highest precedence first, each spelling the names of tiers alike."""
        given = [init_settings(), env_settings(), dotenv_settings(), _file_values.get()]
        return tuple(InitSettingsSource(settings_cls, _with_upper_tiers(values)) for values in given)

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Lay the configured tiers over the default ones; give an upstream without routes a route of its name."""
        if given.get("state_dir") is None:
            given = given | {"state_dir": _default_state_dir()}
        tiers = given.get("tiers", {})
        if isinstance(tiers, Mapping):
            given = given | {"tiers": _merge_tiers(tiers)}
        upstreams = given.get("upstreams")
        if isinstance(upstreams, Mapping) and not given.get("routes"):
            routes = [
                {"name": name, "path": f"/api/{name}", "upstream": name, "strip_prefix": "/api"} for name in upstreams
            ]
            given = given | {"routes": routes}
        return given

    @model_validator(mode="after")
    def _agree(self) -> "GatewayConfig":
        problems = [
            *_server_problems(self),
            *_store_problems(self),
            *_admin_problems(self),
            *_tier_problems(self),
            *_upstream_problems(self),
            *_breaker_problems(self),
            *_overload_problems(self),
            *_route_problems(self),
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self


def config_path(path: str | Path | None = None) -> Path | None:
    """Return the YAML file to be read: `path`, else the one that the environment names, else none."""
    chosen = path or _variables().get(CONFIG_VARIABLE)
    return Path(chosen) if chosen else None


def _variables() -> dict[str, str | None]:
    return {name.upper(): value for name, value in (*dotenv_values(ENV_FILE).items(), *os.environ.items())}


def load_config(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> GatewayConfig:
    """Read the configuration from all its sources.

    `path` is a YAML file; without it `GATEWAY_CONFIG` names one, or there is none. `overrides` is what the command
    line says, nested as the sections are. Raises ConfigError.
    """
    variables = _variables()
    chosen = config_path(path)
    file = NO_FILE if chosen is None else read_yaml(chosen)
    sources = Sources(overrides or {}, ENV_PREFIX, variables, file)
    token, path_token = _file_values.set(file.values), _file_path.set(file.path)
    try:
        _warn_of_unknown(variables)
        return GatewayConfig(**sources.overrides)
    except ValidationError as error:
        lines = [line for detail in error.errors() for line in explain(detail, GatewayConfig, sources)]
    except SettingsError as error:
        lines = [f"environment: {error}: {error.__cause__}"]
    finally:
        _file_values.reset(token)
        _file_path.reset(path_token)
    raise ConfigError(lines)  # outside of the handlers: their errors quote values, and would be shown with this one


def _warn_of_unknown(variables: Collection[str]) -> None:
    """Name variables that look like ours and are not. Platforms set such by themselves, so they stop nothing."""
    known = [f"{ENV_PREFIX}{name.upper()}" for name in GatewayConfig.model_fields]
    for name in sorted(variables):
        if name.startswith(ENV_PREFIX) and name != CONFIG_VARIABLE and name.partition("__")[0] not in known:
            logger.warning("environment: %s is not a setting and is ignored%s", name, nearest(name, known))


def _with_upper_tiers(values: dict[str, Any]) -> dict[str, Any]:
    tiers = values.get("tiers")
    if not isinstance(tiers, Mapping):
        return values
    return values | {"tiers": {str(name).upper(): terms for name, terms in tiers.items()}}


# Rules between sections


def _merge_tiers(given: Mapping[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = dict(DEFAULT_TIERS)
    for name, terms in given.items():
        upper = str(name).upper()
        if terms is None:
            merged.pop(upper, None)
        elif isinstance(terms, Mapping) and isinstance(merged.get(upper), Mapping):
            merged[upper] = {**merged[upper], **terms}
        else:
            merged[upper] = terms
    return merged


def _server_problems(config: GatewayConfig) -> Iterator[str]:
    if config.store.is_shared:
        yield from _budget_problems(config)


def _budget_problems(config: GatewayConfig) -> Iterator[str]:
    terms: dict[str, TierSection | AddressLimitSection] = {
        f"tiers.{name}": tier for name, tier in config.tiers.items()
    }
    for place, term in {**terms, "address_limit": config.address_limit}.items():
        if term.rate and term.capacity / term.rate > LONGEST_BUDGET:
            yield (
                f"{place}: takes {term.capacity / term.rate:g} s to fill, and in a shared store a bucket may take"
                f" {LONGEST_BUDGET} at most"
            )


def _store_problems(config: GatewayConfig) -> Iterator[str]:
    if config.store.clients == "store" and not config.store.is_shared:
        yield "store.clients: memory:// outlives no restart, so clients go into a file: sqlite or auto, got 'store'"


def _admin_problems(config: GatewayConfig) -> Iterator[str]:
    tokens = [(f"admin.tokens.{name}", section.token) for name, section in config.admin.tokens.items()]
    places: dict[str, str] = {}
    for place, token in (("admin.token", config.admin.token), *tokens):
        if token is not None:
            first = places.setdefault(token.get_secret_value(), place)
            if first != place:
                yield f"{place}: is the same token as {first}"


def _tier_problems(config: GatewayConfig) -> Iterator[str]:
    known = ", ".join(config.tiers)
    if config.default_tier not in config.tiers:
        yield f"default_tier: no such tier, got {config.default_tier!r}; the tiers are {known}"
    for place, terms in _all_terms(config):
        seconds = terms.capacity / terms.rate if terms.rate else 0.0
        if seconds > MAX_FILL:
            yield f"{place}: the bucket must fill within {MAX_FILL:g} s (ten years), got {seconds:g}"
    for client_id, client in config.clients.items():
        if client.tier not in config.tiers:
            yield f"clients.{client_id}.tier: no such tier, got {client.tier!r}; the tiers are {known}"


def _overload_problems(config: GatewayConfig) -> Iterator[str]:
    unranked = [name for name, tier in config.tiers.items() if tier.priority is None]
    if unranked and len(unranked) < len(config.tiers):
        yield f"tiers.{unranked[0]}.priority: every tier needs one as soon as one has, got None"
    for name, upstream in config.upstreams.items():
        section, place = upstream.concurrency, f"upstreams.{name}.concurrency"
        if section is None:
            continue
        if (section.limit is None) == (section.adaptive is None):
            got = "both" if section.limit is not None else "neither"
            yield f"{place}: needs either limit or adaptive, got {got}"
        adaptive = section.adaptive
        if adaptive is not None and adaptive.floor > adaptive.ceiling:
            yield f"{place}.adaptive.floor: must be at most the ceiling {adaptive.ceiling}, got {adaptive.floor}"


def _all_terms(config: GatewayConfig) -> Iterator[tuple[str, TierSection | CandidateSection | AddressLimitSection]]:
    yield "address_limit", config.address_limit
    for name, tier in config.tiers.items():
        yield f"tiers.{name}", tier
        if tier.candidate is not None:
            yield f"tiers.{name}.candidate", tier.candidate


def _upstream_problems(config: GatewayConfig) -> Iterator[str]:
    for name, upstream in config.upstreams.items():
        if upstream.hash_on != "client" and upstream.balance != "hash":
            yield f"upstreams.{name}.hash_on: needs balance: hash, got {upstream.hash_on!r} with {upstream.balance!r}"


def _breaker_problems(config: GatewayConfig) -> Iterator[str]:
    for name, upstream in config.upstreams.items():
        breaker, place = upstream.circuit_breaker, f"upstreams.{name}.circuit_breaker"
        if breaker.max_recovery_timeout < breaker.recovery_timeout:
            yield (
                f"{place}.max_recovery_timeout: must be at least recovery_timeout ({breaker.recovery_timeout:g}),"
                f" got {breaker.max_recovery_timeout:g}"
            )
        if breaker.slow_call_rate is not None and breaker.slow_call_duration is None:
            yield f"{place}.slow_call_rate: needs slow_call_duration, got {breaker.slow_call_rate:g} alone"
        if breaker.slow_call_duration is not None and breaker.slow_call_rate is None:
            yield f"{place}.slow_call_duration: needs slow_call_rate, got {breaker.slow_call_duration:g} alone"
        if breaker.window_calls is not None and breaker.window_calls < breaker.minimum_calls:
            yield (
                f"{place}.window_calls: must be at least minimum_calls ({breaker.minimum_calls}), or no rate is ever"
                f" reached, got {breaker.window_calls}"
            )


def _fallback_problems(config: GatewayConfig, route: RouteSection, place: str) -> Iterator[str]:
    other = None if route.fallback is None else route.fallback.upstream
    if other is not None and other not in config.upstreams:
        hint = nearest(other, config.upstreams)
        yield f"{place}.fallback.upstream: no such upstream, got {other!r}{hint}"
    elif other == route.upstream:
        yield f"{place}.fallback.upstream: must be another upstream than the route's own, got {other!r}"


def _route_problems(config: GatewayConfig) -> Iterator[str]:
    largest = max((terms.capacity for place, terms in _all_terms(config) if place != "address_limit"), default=0)
    names: dict[str, int] = {}
    matches: dict[tuple[object, ...], str] = {}
    for index, route in enumerate(config.routes):
        place = f"routes[{index}] ({route.name})"
        if route.name in names:
            yield f"{place}.name: already the name of routes[{names[route.name]}]"
        names.setdefault(route.name, index)
        if route.path != "/api" and not route.path.startswith("/api/"):
            yield f"{place}.path: must be /api or begin with /api/, got {route.path!r}"
        if route.upstream not in config.upstreams:
            hint = nearest(route.upstream, config.upstreams)
            yield f"{place}.upstream: no such upstream, got {route.upstream!r}{hint}"
        yield from _fallback_problems(config, route, place)
        if route.strip_prefix and not f"{route.path}/".startswith(f"{route.strip_prefix.rstrip('/')}/"):
            yield f"{place}.strip_prefix: must be a prefix of the path {route.path!r}, got {route.strip_prefix!r}"
        for method in route.methods or ["any"]:
            other = matches.setdefault((route.host, route.path, method), route.name)
            if other != route.name:
                yield f"{place}.path: route {other!r} has this host, path and method, got {route.path!r} ({method})"
        for key, cost in [
            ("cost", route.cost),
            ("candidate_cost", route.candidate_cost),
            *((f"costs[{i}].cost", c.cost) for i, c in enumerate(route.costs)),
            *((f"costs[{i}].candidate_cost", c.candidate_cost) for i, c in enumerate(route.costs)),
        ]:
            if cost is not None and cost > largest:
                yield f"{place}.{key}: above the capacity of every tier (at most {largest}), got {cost:g}"
