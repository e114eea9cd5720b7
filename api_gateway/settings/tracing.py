"""The section `tracing`: where traces are exported, and which."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from api_gateway.settings.secret import MAY_HOLD_PASSWORD, Secret
from api_gateway.settings.setting_types import HEADER_NAME, Seconds, Section

TRACES_PATH = "/v1/traces"  # of a collector, by the OTLP specification


def collector_url(url: str) -> str:
    """Check the URL of a collector, and add the path of traces if it has none. Messages quote none of it."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme.lower() not in ("http", "https") or rest[:1] in ("", "/", ":", "?", "#"):
        raise ValueError("must be a URL that begins with http:// or https://")
    place, slash, path = rest.partition("/")
    if "@" in place:
        raise ValueError("must not contain a user name or password; set headers instead")
    if "#" in url or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("must be visible ASCII characters without '#'")
    port = place.rpartition("]")[2].partition(":")[2]
    if port and not (port.isdecimal() and 1 <= int(port) <= 65_535):  # noqa: PLR2004 - the ports there are
        raise ValueError("port must be 1 to 65535")
    return url if path else f"{url.removesuffix(slash)}{TRACES_PATH}"


CollectorUrl = Annotated[str, Field(max_length=2048), AfterValidator(collector_url), MAY_HOLD_PASSWORD]
AttributeName = Annotated[str, Field(min_length=1, max_length=256)]


class TracingSection(Section):
    """Whether exchanges are traced, which of them are exported, and to which OpenTelemetry collector.

    A setting that is None is that of OpenTelemetry's environment variable, see `assembly.tracing`.
    """

    enabled: bool = False
    endpoint: CollectorUrl | None = Field(
        default=None, description="OTLP over HTTP. Without a path, /v1/traces is added."
    )
    headers: dict[Annotated[str, Field(pattern=HEADER_NAME)], Secret] = Field(
        default={}, description="Of the requests to the collector, such as Authorization."
    )
    timeout: Seconds = 10
    service_name: str | None = Field(default=None, min_length=1, max_length=256)
    resource: dict[AttributeName, str] = Field(default={}, description="Further attributes of the gateway.")
    ratio: float | None = Field(default=None, ge=0, le=1, description="Share of the traces that are sampled.")
    parent: Literal["obey", "ignore", "restart"] | None = Field(
        default=None,
        description="obey: the client's decision holds. ignore: the ratio decides, in the client's trace. restart: the"
        " ratio decides, in a new trace.",
    )
    keep_errors: bool = Field(default=True, description="Export failed exchanges that are not sampled.")
    keep_slower_than: Seconds | None = Field(
        default=None, description="Export exchanges that are not sampled if their response began later than this."
    )
    max_kept_per_second: int = Field(
        default=100, ge=0, description="Of exchanges that are not sampled, for each process."
    )
    client_attributes: bool = Field(default=False, description="Whether spans have the client's id and address.")
    max_queue: int = Field(
        default=4096, ge=1, le=1_000_000, description="Exchanges that wait for the collector, for each process."
    )
