"""The sections of the server itself: where it listens, what it accepts, and what it writes."""

from typing import Annotated, Literal

from pydantic import Field

from api_gateway.settings.setting_types import FileMode, Host, Seconds, Section, TrustedProxy


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


class MetricsSection(Section):
    """Which latency percentiles are shown."""

    percentiles: list[Annotated[float, Field(gt=0, lt=100)]] = Field(default=[50, 90, 95, 99], min_length=1)


class LogSection(Section):
    """What is written to standard output."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    access: bool = Field(default=True, description="One JSON line for each proxied request.")
