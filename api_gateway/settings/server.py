"""Sections of the server: listeners, limits, timeouts, metrics and logs."""

from typing import Annotated, Literal

from pydantic import Field

from api_gateway.observability.access_log import LINE_FIELDS
from api_gateway.settings.addresses import ForwardedSection
from api_gateway.settings.setting_types import (
    PSEUDONYM,
    Duration,
    FileMode,
    Host,
    Seconds,
    Section,
    Size,
    TrustedProxy,
)
from api_gateway.settings.tls import ServerTlsSection
from api_gateway.settings.value_checks import ValueCheck


class ServerSection(Section):
    """The listener for clients, its limits and timeouts, and how the process starts and stops."""

    host: Host = Field(
        default="127.0.0.1", description="An address, a name, `::` for every IPv4 and IPv6 address, or unix:/path."
    )
    port: int = Field(default=8000, ge=0, le=65_535, description="0: any free port.")
    socket_mode: FileMode = Field(default=0o660, description="File permissions of a Unix socket.")
    workers: int = Field(default=1, ge=1, description="Processes that serve requests.")
    max_body_bytes: Size = Field(default=104_857_600, ge=0, description="The largest request body.")
    max_header_bytes: Size = Field(default=65_536, ge=1024, description="The largest head of a request.")
    max_header_lines: int = Field(default=200, ge=10, description="The most header lines of a request.")
    max_connections: int | None = Field(
        default=None,
        ge=2,
        le=10_000_000,
        description="Of all clients, per worker. None: as many as the limit of open files permits.",
    )
    max_connections_per_peer: int = Field(default=0, ge=0, description="Per worker. 0: no limit.")
    header_timeout: Seconds = Field(default=10, description="The longest time for the head of a request to arrive.")
    idle_timeout: Seconds = Field(
        default=60, description="How long a client may stall within a request body or a response."
    )
    min_body_rate: float = Field(
        default=240,
        ge=0,
        le=1_000_000_000,
        description="Bytes per second of a request body while the gateway waits for it. 0: no limit.",
    )
    min_body_rate_grace: Seconds = Field(default=10, description="Seconds by which a body may be late at its start.")
    keep_alive_timeout: Seconds = Field(default=75, description="How long a connection may be idle between requests.")
    drain_delay: Duration = Field(
        default=0,
        ge=0,
        le=3600,
        description="How long a stopping gateway still accepts connections, while not ready, before it drains.",
    )
    drain_timeout: Seconds = Field(default=30, description="How long a stopping gateway waits for requests in flight.")
    worker_timeout: Duration = Field(
        default=30,
        ge=2,
        le=86_400,
        description="How long the event loop may be blocked before the process is ended; a worker is then replaced.",
    )
    max_event_loop_lag: Seconds | None = Field(
        default=0.25, description="How late the event loop may run before requests are shed by tier. None: never."
    )
    via: str | None = Field(
        default=None,
        pattern=PSEUDONYM,
        description="The gateway's name in Via. A request that returns with it is refused. None: a random name.",
    )
    forwarded: ForwardedSection = ForwardedSection.defaults()
    proxy_protocol: list[TrustedProxy] = Field(
        default=[],
        description="Load balancers whose connections begin with a PROXY protocol header: networks, and `unix`.",
    )
    trusted_proxies: list[TrustedProxy] = Field(default=[], description="Networks, and `unix` for Unix sockets.")
    tls: ServerTlsSection | None = Field(default=None, description="None: plain HTTP.")


class MetricsSection(Section):
    """The latency percentiles in views."""

    percentiles: list[Annotated[float, Field(gt=0, lt=100)]] = Field(
        default=[50, 90, 95, 99], min_length=1, description="Percentiles of latency."
    )


def _access_log_field(name: str) -> str:
    if name not in LINE_FIELDS:
        raise ValueError(f"must be a field of the access log: {', '.join(LINE_FIELDS)}")
    return name


AccessLogField = Annotated[str, ValueCheck(_access_log_field)]


class LogSection(Section):
    """The logs: messages from `level` up, and the access log."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="The lowest level of the messages that are logged."
    )
    format: Literal["auto", "text", "json"] = Field(
        default="auto",
        description="Of messages and access log. auto: text; JSON for an access log that is not on a terminal.",
    )
    access: bool = Field(default=True, description="One line for each proxied request.")
    fields: list[AccessLogField] | None = Field(
        default=None, min_length=1, description="Fields of the access log in JSON, without the others. None: all."
    )
    sample_successes: float = Field(
        default=1.0, ge=0, le=1, description="Share of the requests without an error that the access log has."
    )
