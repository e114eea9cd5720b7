"""The sections of the configuration: their settings, types, limits and defaults."""

import re
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator

from api_gateway.bind_address import checked_host, checked_listen, file_mode
from api_gateway.headers import UNIX
from api_gateway.heads import BODILESS
from api_gateway.secret import MAY_HOLD_PASSWORD, Secret, SecretFile, read_secret_files
from api_gateway.store_url import MAX_PORT, MEMORY, StoreUrl

MIN_TOKEN_LENGTH = 8
LONGEST_RECOVERY = 300  # seconds a breaker stays open at most, unless it is told otherwise
TOO_MANY_REQUESTS = 429
_AUTHORITY = re.compile(r"(\[(?P<ipv6>[^\[\]]*)\]|(?P<name>[\w.-]+))(:(?P<port>.*))?")
_FRAMING = frozenset(
    {"connection", "content-length", "date", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
    | {"x-request-id", "x-gateway-fallback"}
)


_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
_METHOD = r"^[A-Za-z][A-Za-z-]*$"
_HEADER_NAME = r"^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}$"
_HEADER_VALUE = r"^[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?$"
_PREFIX = r"^[A-Za-z0-9_.:-]{1,64}$"
_OWN_HEADER = r"^[A-Za-z0-9-]{1,64}$"
_HASH_ON = r"^(client|header:[A-Za-z0-9-]{1,64})$"
CLIENT_ID = r"^[\x21-\x7e]{1,128}$"
# What a text must be like to match each of them.
PATTERNS = {
    _NAME: "must be 1 to 64 letters, digits, '_', '.' and '-', and begin with a letter or a digit",
    _METHOD: "must be a method such as GET",
    _HEADER_NAME: "must be the name of a header field, as in X-Source",
    _HEADER_VALUE: "must be visible ASCII characters, with spaces only between them",
    _PREFIX: "must be 1 to 64 letters, digits, '_', '.', ':' and '-'",
    _OWN_HEADER: "must be the name of a header field, 1 to 64 letters, digits and '-'",
    _HASH_ON: "must be client, or header: with the name of a header field, as in header:X-Tenant",
    CLIENT_ID: "must be a client's identifier of 1 to 128 visible ASCII characters",
}


class Section(BaseModel):
    """Base of all sections: frozen, an unknown key is a mistake, and secrets may be read from files."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _read_secret_files(cls, given: Any) -> Any:
        return read_secret_files(cls, given)


Cost = Annotated[float, Field(ge=0, le=1_000_000_000)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Identifier = Annotated[str, Field(pattern=_NAME)]
TierName = Annotated[str, BeforeValidator(lambda name: name.upper() if isinstance(name, str) else name), Identifier]
Methods = Annotated[
    list[Annotated[str, AfterValidator(str.upper), Field(pattern=_METHOD)]],
    Field(min_length=1),
]


def _network(value: Any) -> Any:
    if isinstance(value, IPv4Network | IPv6Network):
        return value
    try:
        network = ip_network(value if isinstance(value, str) else "", strict=False)  # a number would be an address
    except ValueError:
        raise ValueError("must be an address or a network such as 10.0.0.0/8") from None
    if str(network.network_address) != str(ip_address(value.partition("/")[0])):
        raise ValueError(f"has bits set behind its prefix: write {network}, or the address alone")
    return network


def _trusted_proxy(value: Any) -> Any:
    return value if value == UNIX else _network(value)


def _whole_path(path: str) -> str:
    if not path.startswith("/") or "?" in path or "#" in path:
        raise ValueError("must start with '/' and hold neither '?' nor '#'")
    return path.rstrip("/") or "/"


def _origin_url(url: str) -> str:
    """Check the URL of a target. A message quotes nothing of it: any part may be a piece of a password."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme.lower() not in ("http", "https") or rest[:1] in ("", "/", ":"):
        raise ValueError("must be http://host[:port] or https://host[:port]")
    if "@" in rest:
        raise ValueError("must hold no user name and no password")
    origin, slash, path = rest.partition("/")
    if path or "?" in rest or "#" in rest:
        raise ValueError("must hold only scheme, host and port; a route's path and strip_prefix shape the path")
    found = _AUTHORITY.fullmatch(origin)
    if found is None or not _is_ipv6(found["ipv6"]):
        raise ValueError("must hold a host name or an address, an IPv6 address in brackets, and a port if any")
    port = found["port"]
    if port is not None and not (port.isascii() and port.isdecimal() and 1 <= int(port) <= MAX_PORT):
        raise ValueError(f"port must be 1 to {MAX_PORT}")
    return url.removesuffix(slash)


def _is_ipv6(address: str | None) -> bool:
    try:
        return address is None or bool(IPv6Address(address))
    except ValueError:
        return False


def _status_range(given: Any) -> Any:
    """Spell a number, or a range of two, as `200-399`."""
    spelt = "" if isinstance(given, bool | float) else str(given)
    low, dash, high = spelt.partition("-")
    high = high if dash else low
    if not (low.isdecimal() and high.isdecimal()):
        raise ValueError("must be a status such as 204, or a range such as 200-399")
    if not 100 <= int(low) <= int(high) <= 599:  # noqa: PLR2004 - the statuses there are
        raise ValueError("must lie within 100 to 599, the lower one first")
    return f"{int(low)}-{int(high)}"


StatusRange = Annotated[str, BeforeValidator(_status_range)]


def _retried_status(status: int) -> int:
    if status != TOO_MANY_REQUESTS and not 500 <= status <= 599:  # noqa: PLR2004 - the class of server errors
        raise ValueError("must be 429 or 500 to 599")
    return status


def _own_header(name: str) -> str:
    if name.lower() in _FRAMING or name.lower().startswith(("x-ratelimit-", "ratelimit")):
        raise ValueError("is written by the gateway itself")
    return name


RetriedStatus = Annotated[int, AfterValidator(_retried_status)]
HeaderName = Annotated[str, Field(pattern=_HEADER_NAME), AfterValidator(_own_header)]
HeaderValue = Annotated[str, Field(pattern=_HEADER_VALUE, max_length=4096)]
Network = Annotated[IPv4Network | IPv6Network, BeforeValidator(_network)]
WholePath = Annotated[str, AfterValidator(_whole_path)]
OriginUrl = Annotated[str, AfterValidator(_origin_url), MAY_HOLD_PASSWORD]

TrustedProxy = Annotated[IPv4Network | IPv6Network | Literal["unix"], BeforeValidator(_trusted_proxy)]
FileMode = Annotated[int, BeforeValidator(file_mode)]
Host = Annotated[str, AfterValidator(checked_host)]
Listen = Annotated[str, AfterValidator(checked_listen)]


class ServerSection(Section):
    """Where the gateway listens, and what it accepts there."""

    host: Host = Field(
        default="127.0.0.1", description="An address, a name, `::` for every address of both kinds, or unix:/path."
    )
    port: int = Field(default=8000, ge=0, le=65_535, description="0 takes any free port.")
    socket_mode: FileMode = Field(default=0o660, description="Permissions of the file of a Unix socket.")
    workers: int = Field(default=1, ge=1)
    max_body_bytes: int = Field(default=104_857_600, ge=0)
    max_header_bytes: int = Field(default=65_536, ge=1024)
    max_header_lines: int = Field(default=200, ge=10)
    max_connections: int | None = Field(
        default=None,
        ge=2,
        le=10_000_000,
        description="Of all clients; each worker counts its own. None: as many as the descriptor limit has room for.",
    )
    max_connections_per_peer: int = Field(default=0, ge=0, description="0 is no limit. Each worker counts its own.")
    header_timeout: Seconds = 10
    idle_timeout: Seconds = Field(default=60, description="How long a client may stall within a body or an answer.")
    min_body_rate: float = Field(
        default=240,
        ge=0,
        le=1_000_000_000,
        description="Bytes a second of a request's body while it is awaited. 0: no such limit.",
    )
    min_body_rate_grace: Seconds = Field(default=10, description="What a body may be behind at its start.")
    keep_alive_timeout: Seconds = 75
    drain_delay: float = Field(
        default=0,
        ge=0,
        le=3600,
        description="How long a gateway that was told to stop still accepts, not ready any more, before it drains.",
    )
    drain_timeout: Seconds = 30
    worker_timeout: float = Field(
        default=30,
        ge=2,
        le=86_400,
        description="How long the event loop may be blocked before the process is ended; a worker is replaced.",
    )
    max_event_loop_lag: Seconds | None = Field(
        default=0.25, description="How late the event loop may run before requests are shed by tier. None: never."
    )
    trusted_proxies: list[TrustedProxy] = Field(default=[], description="Networks, and `unix` for Unix sockets.")


def _store_url(url: SecretStr) -> SecretStr:
    if url.get_secret_value() != MEMORY:
        StoreUrl.parse(url.get_secret_value())
    return url


class StoreSection(Section):
    """Where buckets are kept. All but the first and the last speak of shared stores.

    Several workers with `memory://` share an embedded store that the gateway starts for them.
    """

    url: Annotated[Secret, AfterValidator(_store_url)] = SecretStr(MEMORY)
    url_file: SecretFile = None
    on_failure: Literal["local_share", "deny", "allow"] = "local_share"
    decision_timeout: Seconds = Field(default=0.02, description="How long a request waits for the store.")
    timeout: Seconds = Field(default=1, description="For everything else that is asked of the store.")
    min_gateway_processes: int = Field(
        default=1, ge=1, description="How many gateway processes there are at least, on all machines."
    )
    prefix: str = Field(default="gateway", pattern=_PREFIX, description="Begins every key.")
    max_buckets: int = Field(default=1_000_000, ge=1)
    clients: Literal["auto", "sqlite", "store"] = Field(
        default="auto",
        description="Where registered clients are kept: a file in state_dir, or the store. auto: in a shared store.",
    )
    max_cached_clients: int = Field(default=100_000, ge=1, description="Registered clients held in memory.")

    @property
    def keeps_clients(self) -> bool:
        """True when registered clients are kept in the store itself, not in a file in `state_dir`."""
        return self.is_shared if self.clients == "auto" else self.clients == "store"

    @property
    def is_shared(self) -> bool:
        """True if buckets are kept elsewhere than in this process."""
        return self.url.get_secret_value() != MEMORY


def _long_enough(token: SecretStr) -> SecretStr:
    if len(token.get_secret_value()) < MIN_TOKEN_LENGTH:
        raise ValueError(f"must have at least {MIN_TOKEN_LENGTH} characters")
    return token


OperatorToken = Annotated[Secret, AfterValidator(_long_enough)]


class TokenSection(Section):
    """A named token; it may read (views, metrics) or operate (change tiers, modes and the rest, too)."""

    role: Literal["read", "operate"] = "read"
    token: OperatorToken | None = None
    token_file: SecretFile = None

    @model_validator(mode="after")
    def _has_token(self) -> "TokenSection":
        if self.token is None:
            raise ValueError("needs a token or a token_file")
        return self


class AdminSection(Section):
    """Who may use the operator endpoints; without any token they answer this machine only."""

    token: OperatorToken | None = Field(default=None, description="A token named 'admin' of the role operate.")
    token_file: SecretFile = None
    tokens: dict[Identifier, TokenSection] = Field(
        default={}, description="Further tokens by name. Several may hold at once, so that one can be replaced."
    )
    local: bool = Field(default=True, description="Whether programs of this machine need no token; see the docs.")
    listen: Listen | None = Field(
        default=None, description="host:port or unix:/path: a listener for the operator endpoints alone."
    )
    socket_mode: FileMode = Field(default=0o600, description="Permissions of the file of that Unix socket.")


class IdentitySection(Section):
    """How a client says who it is."""

    mode: Literal["header"] = "header"
    header: str = Field(default="X-Client-ID", pattern=_OWN_HEADER)


class AddressLimitSection(Section):
    """The second bucket of clients nobody registered: one for each peer address. `rate: 0` turns it off."""

    rate: float = Field(default=100, ge=0, le=1_000_000)
    capacity: int = Field(default=1000, ge=1, le=1_000_000_000)
    exempt: list[Network] = [IPv4Network("127.0.0.0/8"), IPv6Network("::1/128")]


class CandidateSection(Section):
    """Other terms for a tier, which are tried and counted but limit nobody."""

    rate: float = Field(gt=0, le=1_000_000)
    capacity: int = Field(ge=1, le=1_000_000_000)


class TierSection(Section):
    """Tokens a second, and tokens a full bucket holds."""

    rate: float = Field(gt=0, le=1_000_000)
    capacity: int = Field(ge=1, le=1_000_000_000)
    priority: int | None = Field(
        default=None, ge=0, le=1000, description="The lowest is shed first under overload. None: the lowest rate."
    )
    candidate: CandidateSection | None = None


class ClientSection(Section):
    """A client known from the start."""

    tier: TierName


class TargetSection(Section):
    """One address of an upstream."""

    url: OriginUrl
    weight: int = Field(default=1, ge=1, le=100)


class TimeoutsSection(Section):
    """Seconds: to connect, until the answer's head, between pieces of a body, and for all of it (null: no limit).

    `tunnel` is how long a WebSocket may be silent both ways.
    """

    connect: Seconds = 2
    response: Seconds = 30
    idle: Seconds = 60
    total: Seconds | None = None
    tunnel: Seconds = 3600


class PoolSection(Section):
    """Connections to each target: those of requests, and beside them those of WebSockets and event streams."""

    max_connections: int = Field(default=512, ge=1)
    max_tunnels: int = Field(default=4096, ge=1, description="WebSockets and event streams at once.")
    idle_timeout: Seconds = 60


class HealthCheckSection(Section):
    """Active checks of every target. A status that is one of `statuses` is a good result."""

    path: WholePath = "/health"
    interval: Seconds = 5
    timeout: Seconds = 2
    healthy_threshold: int = Field(default=2, ge=1)
    unhealthy_threshold: int = Field(default=3, ge=1)
    statuses: list[StatusRange] = Field(default=["200-399"], min_length=1)


class CircuitBreakerSection(Section):
    """When the upstream's breaker opens and how it recovers; durations in seconds.

    `slow_call_duration` and `slow_call_rate` come together. `window_calls` counts the last so many calls instead of
    those of `window`. `jitter` is the share of its open time by which a breaker may stay open longer.
    """

    failure_threshold: int = Field(default=5, ge=1)
    failure_rate: float = Field(default=0.5, gt=0, le=1)
    slow_call_duration: Seconds | None = None
    slow_call_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    minimum_calls: int = Field(default=20, ge=1)
    window: Seconds = 30
    window_calls: Annotated[int, Field(ge=1, le=100_000)] | None = None
    recovery_timeout: Seconds = 30
    max_recovery_timeout: Seconds = LONGEST_RECOVERY
    jitter: float = Field(default=0.1, ge=0, le=1)
    half_open_max_calls: int = Field(default=1, ge=1)
    ramp: float = Field(default=10, ge=0, le=3600, description="Seconds until all traffic is back; 0 is at once.")
    per_target: bool = Field(default=True, description="A breaker of each target beside the upstream's own.")
    max_ejected_ratio: float = Field(default=0.5, ge=0, le=1, description="Share of the targets, rounded down.")

    @model_validator(mode="before")
    @classmethod
    def _reach(cls, given: Any) -> Any:
        """Let the longest recovery be no shorter than the first, unless both are given."""
        first = given.get("recovery_timeout") if isinstance(given, Mapping) else None
        if isinstance(first, int | float) and first > LONGEST_RECOVERY and "max_recovery_timeout" not in given:
            return {**given, "max_recovery_timeout": first}
        return given


class BackoffSection(Section):
    """Seconds of the longest pause before the second try, doubled with each one after it, and its bound."""

    base: float = Field(default=0.025, ge=0, le=60)
    cap: float = Field(default=0.25, ge=0, le=60)


class RetrySection(Section):
    """Tries per request in all, retries as a share of live requests (0: none), and what is tried again."""

    attempts: int = Field(default=2, ge=1, le=10)
    budget: float = Field(default=0.2, ge=0, le=1)
    min_retries_per_second: float = Field(
        default=1, ge=0, le=1000, description="Retries that are allowed in addition to the budget."
    )
    backoff: BackoffSection = BackoffSection()
    max_retry_after: float = Field(
        default=1, ge=0, le=60, description="An upstream that asks for a longer wait is not asked again."
    )
    statuses: list[RetriedStatus] = [502, 503, 504]
    max_body_bytes: int = Field(default=65_536, ge=0, le=16_777_216, description="Kept of a body, to send it again.")


class AdaptiveSection(Section):
    """A limit found from the upstream's latency, which is held near `tolerance` times what it is without a queue."""

    min_limit: int = Field(default=10, ge=1, le=1_000_000)
    max_limit: int = Field(default=1000, ge=1, le=1_000_000)
    tolerance: float = Field(default=1.4, ge=1.1, le=10)


class ConcurrencySection(Section):
    """What each gateway process may have under way at the upstream at once: a fixed limit, or one that adapts."""

    limit: int | None = Field(default=None, ge=1, le=1_000_000)
    adaptive: AdaptiveSection | None = None


class TlsSection(Section):
    """PEM files for https targets: whom to trust instead of the system's store, and what to show of ourselves."""

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None


class UpstreamSection(Section):
    """A service behind the gateway. `http2` speaks HTTP/2 to https targets that offer it (needs the package h2)."""

    targets: list[TargetSection] = Field(min_length=1)
    dns_refresh_interval: float | None = Field(
        default=None, ge=1, le=86_400, description="Seconds after which the names of targets are resolved anew."
    )
    balance: Literal["round_robin", "least_requests", "hash"] = "round_robin"
    hash_on: str = Field(
        default="client",
        pattern=_HASH_ON,
        description="What `balance: hash` goes by: client, or header:X-Name.",
    )
    slow_start: float = Field(
        default=10, ge=0, le=86_400, description="Seconds over which a target that returns gets its full share."
    )
    timeouts: TimeoutsSection = TimeoutsSection()
    pool: PoolSection = PoolSection()
    tls: TlsSection = TlsSection()
    http2: bool = False
    health_check: HealthCheckSection | None = None
    circuit_breaker: CircuitBreakerSection = CircuitBreakerSection()
    retry: RetrySection = RetrySection()
    concurrency: ConcurrencySection | None = None


class CostSection(Section):
    """What some of a route's requests cost instead of the route's own cost."""

    methods: Methods | None = None
    path: WholePath | None = None
    cost: float = Field(ge=0, le=1_000_000_000)
    candidate_cost: Cost | None = None


class FallbackSection(Section):
    """What answers if the upstream cannot: another upstream, or `status` with `headers` and `body`."""

    status: int | None = Field(default=None, ge=200, le=599)
    headers: dict[HeaderName, HeaderValue] = {}
    body: str = ""
    upstream: str | None = None

    @model_validator(mode="after")
    def _agree(self) -> "FallbackSection":
        if (self.status is None) is (self.upstream is None):
            raise ValueError("must have either a status or an upstream")
        if self.upstream is not None and (self.headers or self.body):
            raise ValueError("headers and body belong to a status; what an upstream answers has its own")
        if self.body and self.status in BODILESS:
            raise ValueError(f"an answer with status {self.status} has no body")
        return self


def _host(host: str) -> str:
    return host.lower().removesuffix(".")


class RouteSection(Section):
    """Which requests go to which upstream, at what cost."""

    name: Identifier
    path: WholePath
    upstream: str
    strip_prefix: WholePath | None = None
    methods: Methods | None = None
    host: Annotated[str, AfterValidator(_host)] | None = None
    cost: float = Field(default=1, ge=0, le=1_000_000_000)
    candidate_cost: Cost | None = Field(default=None, description="Tried beside the cost, and charged to nobody.")
    costs: list[CostSection] = []
    timeout: Seconds | None = Field(default=None, description="For all of a request, instead of the upstream's total.")
    min_body_rate: float | None = Field(
        default=None, ge=0, le=1_000_000_000, description="Instead of the server's. 0: no limit."
    )
    fallback: FallbackSection | None = None


class MetricsSection(Section):
    """Which latency percentiles are shown."""

    percentiles: list[Annotated[float, Field(gt=0, lt=100)]] = Field(default=[50, 90, 95, 99], min_length=1)


class LogSection(Section):
    """What is written to standard output."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    access: bool = Field(default=True, description="One JSON line for each proxied request.")
