"""Sections of addresses: which ones may send requests, and how proxies report them."""

from typing import Literal

from pydantic import Field

from api_gateway.settings.setting_types import Section, TrustedProxy


class AddressesSection(Section):
    """Address rules: the networks whose requests are accepted, and those whose requests are refused."""

    allow: list[TrustedProxy] = Field(
        default=[], description="Networks, and `unix` for Unix sockets. Not empty: requests of all others are refused."
    )
    deny: list[TrustedProxy] = Field(default=[], description="Also within allowed networks.")


class ForwardedSection(Section):
    """How trusted proxies report the client's address, and how upstreams get it."""

    read: Literal["x-forwarded-for", "forwarded"] = Field(
        default="x-forwarded-for", description="The field that trusted proxies write; the other one is not read."
    )
    send: Literal["x-forwarded", "forwarded", "both"] = Field(
        default="x-forwarded", description="X-Forwarded-For, -Proto and -Host, or Forwarded (RFC 7239), or both."
    )
