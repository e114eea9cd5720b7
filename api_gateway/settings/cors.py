"""The section of CORS (Fetch standard): which origins may read responses, and which requests their pages may send."""

import re
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from api_gateway.settings.setting_types import HEADER_NAME, Methods, Section
from api_gateway.settings.value_checks import ValueCheck

_ANY = "*"
_OPAQUE = "null"  # of sandboxed frames, local files and others, which all share it
_ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>\[[0-9a-f:.]+\]|(?:\*\.)?[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?)"
    r"(?::(?P<port>[0-9]{1,5}|\*))?"
)
_DEFAULT_PORTS = {"http": "80", "https": "443"}
_EXAMPLES = "an origin such as https://app.example.com or https://*.example.com, or '*'"


def _origin(text: str) -> str:
    if text in (_ANY, _OPAQUE):
        return text
    lower = text.lower()
    found = _ORIGIN.fullmatch(lower)
    if found is None:
        start = _ORIGIN.match(lower)
        if start is not None and lower[start.end()] in "/?#":
            raise ValueError(f"must be an origin, which has no path: write {start[0]!r}")
        if not text.isascii():
            raise ValueError(f"must be {_EXAMPLES}; browsers send the ASCII form of a host name")
        raise ValueError(f"must be {_EXAMPLES}")
    if found["port"] is not None and found["port"] == _DEFAULT_PORTS.get(found["scheme"]):
        origin = f"{found['scheme']}://{found['host']}"
        raise ValueError(f"never matches, because browsers omit the default port: write {origin!r}")
    return lower


def _requested_header(name: str) -> str:
    if name == _ANY:
        raise ValueError("names no header field: leave headers out to allow every field")
    return name


# Suffixes below which anyone can have a name: labels that countries put before their own, and hosts of others' sites.
# The complete list (publicsuffix.org) changes daily; these are the ones that are seen most.
_OF_COUNTRIES = frozenset({"ac", "co", "com", "edu", "gob", "gov", "ltd", "ne", "net", "or", "org"})
_COUNTRY = 2  # letters
_OF_HOSTS = frozenset(
    {
        *("amazonaws.com", "appspot.com", "azurewebsites.net", "blogspot.com", "cloudfront.net", "firebaseapp.com"),
        *(
            "fly.dev",
            "github.io",
            "gitlab.io",
            "glitch.me",
            "herokuapp.com",
            "netlify.app",
            "ngrok-free.app",
            "ngrok.io",
        ),
        *(
            "onrender.com",
            "pages.dev",
            "replit.app",
            "run.app",
            "surge.sh",
            "trycloudflare.com",
            "vercel.app",
            "web.app",
        ),
        "workers.dev",
    }
)
# Top-level names below which no name can be registered.
_PRIVATE = frozenset({"internal", "intranet", "lan", "local", "localhost", "test"})


OriginPattern = Annotated[str, ValueCheck(_origin)]
_HeaderName = Annotated[str, Field(pattern=HEADER_NAME)]
_RequestedHeader = Annotated[_HeaderName, ValueCheck(_requested_header)]


class CorsSection(Section):
    """CORS: which origins may read responses, and which requests their pages may send."""

    enabled: bool = Field(
        default=True, description="false: the gateway adds nothing, and preflights reach the upstream."
    )
    origins: list[OriginPattern] = Field(
        default=[], description="Origins; `https://*.example.com`: all subdomains; `http://localhost:*`: any port."
    )
    methods: Methods | None = Field(default=None, description="None: those of the route.")
    headers: list[_RequestedHeader] | None = Field(
        default=None, description="Request fields that pages may set. None: those that they ask for."
    )
    exposed_headers: list[_HeaderName] = Field(
        default=[], description="Response fields that pages may read, besides those of the gateway."
    )
    credentials: bool = Field(default=False, description="Whether requests may have cookies and HTTP authentication.")
    max_age: int = Field(
        default=600, ge=0, le=86_400, description="Seconds for which browsers may keep the response to a preflight."
    )


def cors_findings(section: CorsSection) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield key and message of each combination of settings that browsers refuse, or that has no effect."""
    if not section.enabled:
        return
    if not section.origins:
        yield ("origins",), "must name the origins that may read responses, or '*', got []"
    for number, origin in enumerate(section.origins):
        key = ("origins", str(number))
        if origin in (_ANY, _OPAQUE) and section.credentials:
            yield (
                key,
                f"is any page, so credentials: true is refused: name the origins, got {origin!r}",
            )
        elif origin == _ANY and len(section.origins) > 1:
            yield key, "allows every origin: leave out the others, got '*'"
    for number, name in enumerate(section.exposed_headers):
        if name == _ANY and section.credentials:
            message = "exposes nothing with credentials: true: name the fields, got '*'"
            yield ("exposed_headers", str(number)), message


def cors_warnings(section: CorsSection) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield key and message of each origin whose pages may use credentials although anyone can have such a page."""
    for number, origin in enumerate(section.origins):
        found = _ORIGIN.fullmatch(origin)
        if section.enabled and section.credentials and found is not None and found["host"].startswith("*."):
            parent = found["host"].removeprefix("*.")
            if _is_public_suffix(parent):
                message = f"anyone can have a page below {parent}, which may use credentials, got {origin!r}"
                yield ("origins", str(number)), message


def _is_public_suffix(name: str) -> bool:
    first, _, rest = name.strip(".").partition(".")
    if not rest:
        return first not in _PRIVATE
    return (first in _OF_COUNTRIES and len(rest) == _COUNTRY and rest.isalpha()) or name in _OF_HOSTS
