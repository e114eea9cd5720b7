"""Types of single settings: the values that each accepts, and the messages for other values."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
)
from pydantic_core import CoreSchema

from api_gateway.http1.headers import UNIX
from api_gateway.settings.bind_address import MAX_PORT, checked_host, checked_listen, file_mode
from api_gateway.settings.boolean_refusal import without_booleans
from api_gateway.settings.quantities import DURATION_TEXT, RATE_TEXT, SIZE_TEXT, bytes_of, rate_of, seconds_of
from api_gateway.settings.secret import MAY_HOLD_PASSWORD, PEM_BEGINNING, read_secret_files, secret_names
from api_gateway.settings.value_checks import ValueCheck, ValueReader, prepared

TOO_MANY_REQUESTS = 429
_AUTHORITY = re.compile(r"(\[(?P<ipv6>[^\[\]]*)\]|(?P<name>[\w.-]+))(:(?P<port>[^:]*))?")
_FRAMING = frozenset(
    {"connection", "content-length", "date", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
    | {"x-request-id", "x-gateway-fallback"}
)
_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
METHOD = r"^[A-Za-z][A-Za-z-]*$"
HEADER_NAME = r"^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}$"
_HEADER_VALUE = r"^[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?$"
PREFIX = r"^[A-Za-z0-9_.:-]{1,64}$"
OWN_HEADER = r"^[A-Za-z0-9-]{1,64}$"
PSEUDONYM = r"^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}$"
HASH_ON = r"^(client|header:[A-Za-z0-9-]{1,64})$"
_COOKIE_DOMAIN = r"^(\*|\.?[A-Za-z0-9_-][A-Za-z0-9_.-]{0,252})$"
_NEW_COOKIE_DOMAIN = r"^(|\.?[A-Za-z0-9_-][A-Za-z0-9_.-]{0,252})$"
CLIENT_ID = r"^[\x21-\x7e]{1,128}$"
CLAIM_PATH = r"^[\x21-\x7e]{1,256}$"
CLAIM_PREFIX = r"^[\x21-\x7e]{0,64}$"
LIMIT_KEY = r"^(client|address|organisation|route|header:[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}|claim:[\x21-\x7e]{1,256})$"
HSTS = r'^max-age="?[0-9]{1,10}"?(;[ ]?(includeSubDomains|preload))*$'
CIPHERS = r"^[A-Za-z0-9_:+!@=.-]{1,1024}$"
TEMPLATE_TEXT = r"^[\x20-\x7e]{0,4096}$"
UPSTREAM_PATH = r"^/[\x21\x24-\x3e\x40-\x7e]*$"
MEDIA_TYPE = r"^[A-Za-z0-9.+-]+/([A-Za-z0-9.+-]+|\*)$"
SCOPE = r"^[\x21\x23-\x5b\x5d-\x7e]{1,256}$"  # RFC 6749 section 3.3
# Descriptions of the texts that match each pattern, for messages.
PATTERNS = {
    _NAME: "must be 1 to 64 letters, digits, '_', '.' and '-', and begin with a letter or a digit",
    METHOD: "must be a method such as GET",
    HEADER_NAME: "must be the name of a header field, as in X-Source",
    _HEADER_VALUE: "must be visible ASCII characters, with spaces only between them",
    PREFIX: "must be 1 to 64 letters, digits, '_', '.', ':' and '-'",
    OWN_HEADER: "must be the name of a header field, 1 to 64 letters, digits and '-'",
    PSEUDONYM: "must be a token of 1 to 64 letters, digits and '-', as in edge-1",
    HASH_ON: "must be client, or header: with the name of a header field, as in header:X-Tenant",
    _COOKIE_DOMAIN: "must be a domain as in users.internal, or * for any other domain",
    _NEW_COOKIE_DOMAIN: "must be a domain as in example.com, or empty to remove it",
    LIMIT_KEY: (
        "must be client, address, organisation, route, header: with the name of a header field as in header:X-Tenant,"
        " claim: with the path of a claim as in claim:team, or a list of these"
    ),
    CLAIM_PATH: "must be the path of a claim, as in realm_access.roles or /https:~1~1example.com~1tier",
    CLAIM_PREFIX: "must be at most 64 visible ASCII characters",
    HSTS: "must be max-age= with seconds, then optionally '; includeSubDomains' and '; preload', as in max-age=86400",
    CIPHERS: "must be names of cipher suites as OpenSSL has them, separated by ':', as in ECDHE+AESGCM",
    TEMPLATE_TEXT: "must be at most 4096 printable ASCII characters",
    UPSTREAM_PATH: "must begin with '/', and have neither '?' nor '#', nor spaces or characters that are not ASCII",
    MEDIA_TYPE: "must be a media type such as application/json, or text/* for all of one kind",
    SCOPE: "must be one scope, without spaces, quotes and backslashes",
    CLIENT_ID: "must be a client's identifier of 1 to 128 visible ASCII characters",
}


@dataclass(frozen=True, slots=True)
class Spelling:
    """Metadata of a number that may also be text of this pattern, for the JSON Schema."""

    pattern: str

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Return the schema of the number and of the text."""
        schema = handler(core)
        return {**schema, "type": [schema["type"], "string"], "pattern": self.pattern}


@dataclass(frozen=True, slots=True)
class Shorthand:
    """How a section may be written as one value: what `expand` makes of it, its JSON Schema, and an example."""

    expand: Callable[[Any], Any]
    schema: Mapping[str, Any]
    example: str


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys are errors, numbers are not booleans, and secrets may be in files."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, defer_build=True)
    shorthand: ClassVar[Shorthand | None] = None

    @classmethod
    def defaults(cls) -> Self:
        """Return the section with all defaults, without a validator of this section alone: all defaults are valid."""
        return cast("Self", cls.model_construct())

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the schema of the section, in which true and false are not numbers."""
        schema: CoreSchema = without_booleans(prepared(handler(source), cls._preparations()), cls)
        return schema

    @classmethod
    def _preparations(cls) -> Iterator[Callable[[Any], Any]]:
        """Return the functions that given values pass before they are validated."""
        if secret_names(cls):
            yield partial(read_secret_files, cls)
        if cls.shorthand is not None:
            yield partial(_expanded, cls.shorthand.expand)

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Return the schema of the section, and that of its shorthand."""
        schema = handler(core)
        return schema if cls.shorthand is None else {"anyOf": [schema, dict(cls.shorthand.schema)]}


def _expanded(expand: Callable[[str], Any], given: Any) -> Any:
    return expand(given) if isinstance(given, str) else given


Cost = Annotated[float, Field(ge=0, le=1_000_000_000)]
Duration = Annotated[float, ValueReader(seconds_of), Spelling(DURATION_TEXT)]
Seconds = Annotated[float, Field(gt=0, le=86_400), ValueReader(seconds_of), Spelling(DURATION_TEXT)]
Size = Annotated[int, ValueReader(bytes_of), Spelling(SIZE_TEXT)]
Rate = Annotated[float, ValueReader(rate_of), Spelling(RATE_TEXT)]
Identifier = Annotated[str, Field(pattern=_NAME)]
TierName = Annotated[str, ValueReader(lambda name: name.upper() if isinstance(name, str) else name), Identifier]
Methods = Annotated[
    list[Annotated[str, ValueCheck(str.upper), Field(pattern=METHOD)]],
    Field(min_length=1),
]


def _network(value: Any) -> Any:
    if isinstance(value, IPv4Network | IPv6Network):
        return value
    try:
        network = ip_network(
            value if isinstance(value, str) else "", strict=False
        )  # a number would be taken as an address
    except ValueError:
        raise ValueError("must be an address or a network such as 10.0.0.0/8") from None
    if str(network.network_address) != str(ip_address(value.partition("/")[0])):
        raise ValueError(f"has bits set after its prefix: write {network}, or the address alone")
    return network


def _trusted_proxy(value: Any) -> Any:
    return value if value == UNIX else _network(value)


def _whole_path(path: str) -> str:
    if not path.startswith("/") or "?" in path or "#" in path:
        raise ValueError("must start with '/' and contain neither '?' nor '#'")
    return path.rstrip("/") or "/"


def _origin_url(url: str) -> str:
    """Check the URL of a target. Messages quote none of it: any part may belong to a password."""
    scheme, separator, rest = url.partition("://")
    if (
        not separator
        or scheme.lower() not in ("http", "https")
        or rest[:1] in ("", "/")
        or (rest[0] == ":" and rest[:2] != "::")
    ):
        raise ValueError("must be http://host[:port] or https://host[:port]")
    if "@" in rest:
        raise ValueError("must not contain a user name or password")
    origin, slash, path = rest.partition("/")
    if path or "?" in rest or "#" in rest:
        raise ValueError(
            "must contain only scheme, host and port; set the path with the route's path and strip_prefix"
        )
    found = _AUTHORITY.fullmatch(origin)
    if found is None or not _is_ipv6(found["ipv6"]):
        raise ValueError(
            "must contain a host name or an address, and optionally a port; an IPv6 address needs brackets, as in"
            " http://[::1]:80"
        )
    if not _is_port(found["port"]):
        raise ValueError(f"port must be 1 to {MAX_PORT}")
    return url.removesuffix(slash)


def _host_header(value: str) -> str:
    found = _AUTHORITY.fullmatch(value)
    if found is None or not value.isascii() or not _is_ipv6(found["ipv6"]) or not _is_port(found["port"]):
        raise ValueError("must be target, client, or a host as in users.example.com, optionally with a port")
    return value


def _is_port(port: str | None) -> bool:
    return port is None or (port.isascii() and port.isdecimal() and 1 <= int(port) <= MAX_PORT)


def _is_ipv6(address: str | None) -> bool:
    try:
        return address is None or bool(IPv6Address(address))
    except ValueError:
        return False


def _status_range(given: Any) -> Any:
    """Normalise a status, or a range of statuses, to the form `200-399`."""
    spelt = "" if isinstance(given, bool | float) else str(given)
    low, dash, high = spelt.partition("-")
    high = high if dash else low
    if not (low.isdecimal() and high.isdecimal()):
        raise ValueError("must be a status such as 204, or a range such as 200-399")
    if not 100 <= int(low) <= int(high) <= 599:  # noqa: PLR2004 - the statuses there are
        raise ValueError("must be within 100 to 599, the lower one first")
    return f"{int(low)}-{int(high)}"


StatusRange = Annotated[str, ValueReader(_status_range, json_schema_input_type=int | str)]


def _retried_status(status: int) -> int:
    if status != TOO_MANY_REQUESTS and not 500 <= status <= 599:  # noqa: PLR2004 - the class of server errors
        raise ValueError("must be 429 or 500 to 599")
    return status


def _own_header(name: str) -> str:
    if name.lower() in _FRAMING or name.lower().startswith(("x-ratelimit-", "ratelimit")):
        raise ValueError("is written by the gateway itself")
    return name


def path_of_file(path: Any) -> Any:
    """Refuse the content of a file, such as a private key, where its path belongs: paths are shown."""
    if isinstance(path, str) and ("\n" in path or PEM_BEGINNING in path):
        raise ValueError("must be a path, not the content of a file")
    return path


RetriedStatus = Annotated[int, ValueCheck(_retried_status)]
HeaderName = Annotated[str, Field(pattern=HEADER_NAME), ValueCheck(_own_header)]
HeaderValue = Annotated[str, Field(pattern=_HEADER_VALUE, max_length=4096)]
HostHeader = Annotated[str, ValueCheck(_host_header)]
CookieDomains = dict[Annotated[str, Field(pattern=_COOKIE_DOMAIN)], Annotated[str, Field(pattern=_NEW_COOKIE_DOMAIN)]]
NetworkSetting = Annotated[IPv4Network | IPv6Network, ValueReader(_network)]
WholePath = Annotated[str, ValueCheck(_whole_path)]
OriginUrl = Annotated[str, ValueCheck(_origin_url), MAY_HOLD_PASSWORD]
TrustedProxy = Annotated[IPv4Network | IPv6Network | Literal["unix"], ValueReader(_trusted_proxy)]
FilePath = Annotated[Path, ValueReader(path_of_file, json_schema_input_type=Path)]
FileMode = Annotated[int, ValueReader(file_mode)]
Host = Annotated[str, ValueCheck(checked_host)]
Listen = Annotated[str, ValueCheck(checked_listen)]
