"""Sections of routes: which requests match, their cost, and their fallbacks."""

from typing import Annotated, Literal, cast

from pydantic import Field, model_validator

from api_gateway.http1.headers import BODILESS
from api_gateway.settings.addresses import AddressesSection
from api_gateway.settings.cors import CorsSection
from api_gateway.settings.json_pointer import JsonPointer
from api_gateway.settings.jwt import RequireSection
from api_gateway.settings.route_actions import (
    CompressionSection,
    MirrorSection,
    RedirectSection,
    RequestHeadersSection,
    RespondSection,
    ResponseHeadersSection,
    RewriteSection,
    WeightedUpstreamSection,
)
from api_gateway.settings.route_match import MatchSection
from api_gateway.settings.setting_types import (
    CookieDomains,
    Cost,
    HeaderName,
    HeaderValue,
    Identifier,
    Methods,
    Seconds,
    Section,
    Size,
    WholePath,
)
from api_gateway.settings.value_checks import ValueCheck, ValueReader


class CostSection(Section):
    """A cost for some requests of a route, selected by method and path, instead of the route's own cost."""

    methods: Methods | None = Field(default=None, description="None: all.")
    path: WholePath | None = Field(
        default=None, description="This path and all below it. None: all paths of the route."
    )
    cost: float = Field(ge=0, le=1_000_000_000, description="Tokens for a request.")
    candidate_cost: Cost | None = Field(default=None, description="Evaluated beside the cost and only counted.")


class CostFromSection(Section):
    """Where the content of a response states what the request cost; `cost` is then an estimate, which is reserved."""

    pointer: JsonPointer = Field(description="JSON pointer to a number in a JSON response, or in events of a stream.")
    per: float = Field(default=1, gt=0, le=1_000_000_000, description="How many of its units cost one token.")
    otherwise: Cost | None = Field(
        default=None, description="The cost of a response without the number; null: what was reserved."
    )


class FallbackSection(Section):
    """The response if the upstream fails: from another upstream, or `status` with `headers` and `body`."""

    status: int | None = Field(default=None, ge=200, le=599, description="The status of the response.")
    headers: dict[HeaderName, HeaderValue] = Field(default={}, description="The header fields of the response.")
    body: str = Field(default="", description="The body of the response.")
    upstream: str | None = Field(default=None, description="The upstream that responds instead.")

    @model_validator(mode="after")
    def _agree(self) -> "FallbackSection":
        if (self.status is None) is (self.upstream is None):
            raise ValueError("must have either a status or an upstream")
        if self.upstream is not None and (self.headers or self.body):
            raise ValueError("headers and body need a status; the response of an upstream has its own")
        if self.body and self.status in BODILESS:
            raise ValueError(f"a response with status {self.status} has no body")
        return self


def _host(host: str) -> str:
    return host.lower().removesuffix(".")


def _log_level(level: object) -> object:
    """Refuse a value that is not a level, before each alternative says so."""
    is_number = isinstance(level, int | float) and not isinstance(level, bool)
    if level in _LOG_LEVELS or (is_number and 0 <= cast("float", level) <= 1):
        return level
    raise ValueError("must be all, errors or none, or a share from 0 to 1")


_LOG_LEVELS = ("all", "errors", "none")
_LogLevel = Annotated[Literal["all", "errors", "none"] | Annotated[float, Field(ge=0, le=1)], ValueReader(_log_level)]


class RouteSection(Section):
    """A rule that selects the upstream, cost and timeout of requests by path, host and method."""

    name: Identifier = Field(description="The name in metrics, logs and responses.")
    path: WholePath = Field(description="Requests with this path, or one below it, match.")
    upstream: str | None = Field(default=None, description="The name of the upstream that gets the requests.")
    upstreams: list[WeightedUpstreamSection] = Field(
        default=[], description="Instead of one upstream: several ones, by weight. A client stays with one of them."
    )
    respond: RespondSection | None = Field(default=None, description="A static response instead of an upstream.")
    redirect: RedirectSection | None = Field(default=None, description="A redirect instead of an upstream.")
    rewrite: RewriteSection | None = Field(default=None, description="Another path for the upstream.")
    request_headers: RequestHeadersSection = Field(
        default=RequestHeadersSection.defaults(), description="Changes to header fields for the upstream."
    )
    response_headers: ResponseHeadersSection = Field(
        default=ResponseHeadersSection.defaults(), description="Changes to header fields of the upstream's responses."
    )
    strip_prefix: WholePath | None = Field(
        default=None, description="The beginning of the path that the upstream does not get."
    )
    rewrite_urls: bool | None = Field(
        default=None,
        description="Whether Location, Content-Location and Refresh of responses lead back to the gateway."
        " None: with strip_prefix or rewrite.prefix.",
    )
    rewrite_cookies: bool = Field(
        default=False,
        description="Whether Path of cookies gets the stripped or replaced prefix, and Domain of a target is removed.",
    )
    cookie_domains: CookieDomains = Field(
        default={},
        description="Replacements of the Domain of cookies, by the domain; *: any other. An empty one removes it.",
    )
    methods: Methods | None = Field(default=None, description="Methods that match. None: all.")
    host: Annotated[str, ValueCheck(_host)] | None = Field(
        default=None, description="The host that matches: a name, or *. and a name for all names below it. None: all."
    )
    match: MatchSection = Field(default=MatchSection.defaults(), description="What else a request must have.")
    cost: float = Field(default=1.0, ge=0, le=1_000_000_000, description="Tokens for a request.")
    candidate_cost: Cost | None = Field(default=None, description="Evaluated beside the cost and only counted.")
    costs: list[CostSection] = Field(
        default=[], description="Other costs of some requests; the first that matches is used."
    )
    cost_from: CostFromSection | None = None
    timeout: Seconds | None = Field(
        default=None, description="Of the whole exchange, instead of the upstream's timeouts.total."
    )
    min_body_rate: float | None = Field(
        default=None, ge=0, le=1_000_000_000, description="Instead of the server's. 0: no limit."
    )
    max_body_bytes: Size | None = Field(
        default=None, ge=0, description="Largest request body, less than the server's. None: the server's."
    )
    max_header_bytes: Size | None = Field(
        default=None, ge=64, description="Largest head of a request, less than the server's. None: the server's."
    )
    max_header_lines: int | None = Field(
        default=None, ge=1, description="Most header lines of a request, less than the server's. None: the server's."
    )
    response_timeout: Seconds | None = Field(
        default=None,
        description="Of each attempt, until the head of the response, instead of the upstream's timeouts.response.",
    )
    compression: CompressionSection | None = Field(default=None, description="Compression of responses. None: off.")
    mirror: MirrorSection | None = Field(default=None, description="Copies of requests for another upstream.")
    access_log: _LogLevel = Field(
        default="all",
        description="Which requests are logged; errors: those with a status of 400 or more, or a reason."
        " A number: errors, and this share of the others, instead of log.sample_successes.",
    )
    forward_credentials: bool = Field(
        default=False, description="Whether the upstream receives the credential of the gateway in a request."
    )
    fallback: FallbackSection | None = None
    addresses: AddressesSection = Field(
        default=AddressesSection.defaults(), description="Besides those for all routes."
    )
    require: RequireSection | None = Field(
        default=None, description="Scopes and claims that a request's token must have."
    )
    require_certificate: bool = Field(
        default=False, description="Whether the connection must have a certificate of the client."
    )
    cors: CorsSection | None = Field(default=None, description="Instead of the setting for all routes.")

    @model_validator(mode="after")
    def _has_one_destination(self) -> "RouteSection":
        given = [name for name in ("upstream", "upstreams", "respond", "redirect") if getattr(self, name)]
        if len(given) != 1:
            shown = " and ".join(given) or "none"
            raise ValueError(f"must have one of upstream, upstreams, respond and redirect; it has {shown}")
        return self

    @property
    def upstream_names(self) -> list[str]:
        """The upstreams that requests may be sent to."""
        return [self.upstream] if self.upstream is not None else [one.name for one in self.upstreams]
