"""The section `tracing`: where traces are exported, and which."""

import re
from typing import Annotated, Literal
from urllib.parse import unquote

from pydantic import Field, SecretStr

from api_gateway.settings.secret import MAY_HOLD_PASSWORD, Secret, SecretFile
from api_gateway.settings.setting_types import HEADER_NAME, Seconds, Section
from api_gateway.settings.value_checks import ValueCheck

_NOT_PAIRS = "must be pairs such as name=value, separated by commas"
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


def decoded_pairs(text: str) -> dict[str, str]:
    """Return the pairs of a list such as `a=1,b=2`, which are percent-encoded. Messages quote nothing."""
    found = {}
    for item in filter(None, (one.strip() for one in text.split(","))):
        name, separator, value = item.partition("=")
        if not separator or not name.strip():
            raise ValueError(_NOT_PAIRS)
        found[unquote(name.strip())] = unquote(value.strip())
    return found


def header_pairs(text: str) -> dict[str, str]:
    """Return the header fields in such a list."""
    found = decoded_pairs(text)
    if any(re.fullmatch(HEADER_NAME, name) is None for name in found):
        raise ValueError(_NOT_PAIRS)
    if any(not value.isascii() or not value.isprintable() for value in found.values()):
        raise ValueError("must have values of visible ASCII characters")
    return found


def _headers(secret: SecretStr) -> SecretStr:
    header_pairs(secret.get_secret_value())
    return secret


CollectorUrl = Annotated[str, Field(max_length=2048), ValueCheck(collector_url), MAY_HOLD_PASSWORD]
AttributeName = Annotated[str, Field(min_length=1, max_length=256)]


class TracingSection(Section):
    """Whether exchanges are traced, which of them are exported, and to which OpenTelemetry collector.

    A setting that is None is that of OpenTelemetry's environment variable, see `assembly.tracing`.
    """

    enabled: bool = Field(default=False, description="Whether exchanges are traced.")
    endpoint: CollectorUrl | None = Field(
        default=None, description="OTLP over HTTP. Without a path, /v1/traces is added."
    )
    headers: Annotated[Secret, ValueCheck(_headers)] | None = Field(
        default=None,
        description="Of requests to the collector: name=value, separated by commas, with percent-encoded values.",
    )
    headers_file: SecretFile = None
    timeout: Seconds = Field(default=10, description="For a request to the collector.")
    service_name: str | None = Field(
        default=None, min_length=1, max_length=256, description="The name of this service. None: as OTEL_SERVICE_NAME."
    )
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
