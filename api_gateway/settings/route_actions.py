"""Sections on what a route does with requests and responses other than forwarding them."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from api_gateway.http1.headers import BODILESS, COST, FORWARDING, HOP_BY_HOP, PROTECTED, REQUEST_TIMEOUT
from api_gateway.settings.setting_types import (
    HEADER_NAME,
    MEDIA_TYPE,
    TEMPLATE_TEXT,
    UPSTREAM_PATH,
    HeaderName,
    HeaderValue,
    Seconds,
    Section,
    Size,
    WholePath,
)
from api_gateway.settings.value_checks import ValueCheck

_LOWEST, _HIGHEST = 200, 599  # statuses of static responses
_OF_REQUESTS = HOP_BY_HOP | PROTECTED | FORWARDING | {b"x-request-id", b"proxy", REQUEST_TIMEOUT, COST}
_OF_RESPONSES = (HOP_BY_HOP - {b"proxy-authenticate"}) | {b"content-length", b"via", b"date", b"content-encoding"}
_CREDENTIALS = frozenset({"authorization", "cookie", "proxy-authorization", "set-cookie"})
_NAMED = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_OF_ANY_REQUEST = ("client", "request_id")
# A scheme and a host that end before the first placeholder, or a path that cannot begin a host.
_LOCATION = re.compile(r"(https?://[^/?#{}\\@\s]+(?=\{path\}|[/?#]|$)|/(?![/\\{])|/$|/(?=\{(?!path\})))")


def named_in(text: str) -> set[str]:
    """Return the names of the placeholders in a text."""
    return set(_NAMED.findall(text))


def stray_braces(text: str) -> bool:
    """Return whether a text has braces that are not a placeholder."""
    return "{" in _NAMED.sub("", text) or "}" in _NAMED.sub("", text)


def _sound(text: str) -> str:
    if stray_braces(text):
        raise ValueError("has braces that are no placeholder: names are letters, digits and '_', as in {client}")
    if text != text.strip():
        raise ValueError("must neither begin nor end with a space")
    return text


def _assignable(name: str) -> str:
    if name.lower() in _CREDENTIALS:
        raise ValueError("has credentials, which a configuration would show: leave it to the client and the upstream")
    return name


def _of_request(name: str) -> str:
    if name.lower().encode() in _OF_REQUESTS:
        raise ValueError("is written by the gateway itself, or belongs to one connection")
    return name


def _of_response(name: str) -> str:
    low = name.lower()
    if low.encode() in _OF_RESPONSES or low.startswith("access-control-"):
        raise ValueError("is written by the gateway itself (see cors, compression), or belongs to one connection")
    return name


_Template = Annotated[str, Field(pattern=TEMPLATE_TEXT), ValueCheck(_sound)]
_RequestName = Annotated[HeaderName, ValueCheck(_of_request)]
_ResponseName = Annotated[HeaderName, ValueCheck(_of_response)]
_Removable = Annotated[str, Field(pattern=HEADER_NAME)]


class RequestHeadersSection(Section):
    """Changes to the header fields that the upstream gets. Values may have placeholders such as {client}."""

    set: dict[Annotated[_RequestName, ValueCheck(_assignable)], _Template] = Field(
        default={}, description="Fields that replace all of the same name."
    )
    add: dict[Annotated[_RequestName, ValueCheck(_assignable)], _Template] = Field(
        default={}, description="Fields that are added to those that are there."
    )
    remove: list[_RequestName] = Field(default=[], description="Names of fields that are removed.")


class ResponseHeadersSection(Section):
    """Changes to the header fields of the upstream's responses. Values may have placeholders such as {client}."""

    set: dict[Annotated[_ResponseName, ValueCheck(_assignable)], _Template] = Field(
        default={}, description="Fields that replace all of the same name."
    )
    add: dict[Annotated[_ResponseName, ValueCheck(_assignable)], _Template] = Field(
        default={}, description="Fields that are added to those that are there."
    )
    remove: list[_ResponseName] = Field(default=[], description="Names of fields that are removed.")


class RewriteSection(Section):
    """The path that the upstream gets: `prefix` in place of the route's path, or `path` as a whole."""

    prefix: WholePath | None = Field(default=None, description="What replaces the route's path.")
    path: Annotated[str, Field(pattern=UPSTREAM_PATH), ValueCheck(_sound)] | None = Field(
        default=None, description="The whole path, in which {name} is a segment of the route's template."
    )

    @model_validator(mode="after")
    def _is_one(self) -> "RewriteSection":
        if (self.prefix is None) is (self.path is None):
            raise ValueError("must have either a prefix or a path")
        return self


class RespondSection(Section):
    """A response to all requests, in place of an upstream."""

    status: int = Field(default=200, ge=_LOWEST, le=_HIGHEST, description="The status code.")
    headers: dict[HeaderName, HeaderValue] = Field(default={}, description="Header fields, such as Content-Type.")
    body: str = Field(default="", max_length=65_536, description="The body, sent as UTF-8.")

    @model_validator(mode="after")
    def _agree(self) -> "RespondSection":
        if self.body and self.status in BODILESS:
            raise ValueError(f"a response with status {self.status} has no body")
        return self


def _location(text: str) -> str:
    if _LOCATION.match(text) is None or re.search(r"/\{path\}", text) is not None:
        raise ValueError(
            "must begin with https:// or http:// and a host that ends before the first placeholder other than {path},"
            " or with one slash; a slash before {path} is its own, so write https://host{path}: otherwise a client"
            " could be sent to any host"
        )
    return text


class RedirectSection(Section):
    """A redirect of all requests, in place of an upstream."""

    to: Annotated[_Template, ValueCheck(_location)] = Field(
        description="A URL or path; {path}, {query} with its '?', and segments of the route's template."
    )
    status: Literal[301, 302, 307, 308] = Field(default=308, description="307 and 308 keep method and body.")


class MirrorSection(Section):
    """Copies of a share of the requests for another upstream, whose responses are thrown away."""

    upstream: str = Field(description="The name of the upstream that gets the copies, and no other requests.")
    share: float = Field(default=1, ge=0, le=1, description="The share of the requests that are copied, at random.")
    max_in_flight: int = Field(
        default=64, ge=1, le=10_000, description="Copies at a time in each worker; further ones are dropped."
    )
    max_body_bytes: Size = Field(
        default=65_536, ge=0, le=16_777_216, description="A request with a larger body is not copied."
    )
    max_response_bytes: Size = Field(
        default=1_048_576, ge=0, description="A response with a larger body is broken off."
    )
    timeout: Seconds = Field(default=5, description="Of a copy, from the complete request to the end of its response.")
    credentials: bool = Field(
        default=False, description="Whether copies keep Authorization, Cookie and fields with API keys."
    )
    remove: list[Annotated[str, Field(pattern=HEADER_NAME)]] = Field(
        default=[], description="Names of further header fields that copies do not have."
    )


class WeightedUpstreamSection(Section):
    """One of several upstreams of a route. A client stays with one as long as the weights do not change."""

    name: str = Field(description="The name of the upstream.")
    weight: float = Field(
        default=1, ge=0, le=1_000_000, description="Its share of the clients, relative to the others."
    )


class CompressionSection(Section):
    """Compression of responses. Off unless a route has this section.

    A response that has both a secret and text of the requester lets others learn the secret by its length (BREACH).
    """

    codings: list[Literal["zstd", "gzip"]] = Field(
        default=["gzip"], min_length=1, description="In the order of preference among those that a client likes alike."
    )
    types: list[Annotated[str, Field(pattern=MEDIA_TYPE)]] = Field(
        default=[
            *("text/*", "application/json", "application/problem+json", "application/javascript"),
            *("application/xml", "application/x-ndjson", "image/svg+xml"),
        ],
        description="Media types of responses that are compressed; text/* stands for all of text.",
    )
    min_bytes: Size = Field(default=1_024, ge=0, description="Shorter responses are not compressed.")
    level: int = Field(default=5, ge=1, le=9, description="1: fastest, 9: smallest.")
