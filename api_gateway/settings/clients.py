"""Sections of clients: tiers, registered clients, and the address limit."""

import re
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated

from pydantic import ConfigDict, Field

from api_gateway.models import KEY_PREFIX, Instant
from api_gateway.settings.setting_types import Identifier, NetworkSetting, Rate, Section, TierName
from api_gateway.settings.value_checks import ValueCheck

_DIGEST = re.compile(r"[0-9A-Fa-f]{64}")


class AddressLimitSection(Section):
    """The second bucket of unregistered clients: one for each address. `rate: 0` disables it."""

    rate: Rate = Field(default=100, ge=0, le=1_000_000, description="Tokens per second. 0: no such bucket.")
    capacity: int = Field(default=1000, ge=1, le=1_000_000_000, description="The maximum number of tokens.")
    exempt: list[NetworkSetting] = Field(
        default=[IPv4Network("127.0.0.0/8"), IPv6Network("::1/128")],
        description="Networks whose requests are not charged.",
    )


class CandidateSection(Section):
    """A candidate quota for a tier: it is evaluated beside the quota in force and only counted."""

    rate: Rate = Field(gt=0, le=1_000_000, description="Tokens per second.")
    capacity: int = Field(ge=1, le=1_000_000_000, description="The maximum number of tokens.")


class TierSection(Section):
    """A tier: `rate` in tokens per second, `capacity` in tokens, and its priority under overload."""

    # Of the default tiers, one setting may be changed alone.
    model_config = ConfigDict(json_schema_extra=lambda schema: schema.pop("required"))

    rate: Rate = Field(gt=0, le=1_000_000, description="Tokens per second.")
    capacity: int = Field(ge=1, le=1_000_000_000, description="The maximum number of tokens.")
    priority: int | None = Field(
        default=None,
        ge=0,
        le=1000,
        description="The lowest is shed first under overload. None for all: the order of the rates.",
    )
    candidate: CandidateSection | None = None
    verified_only: bool = Field(
        default=False, description="Whether a credential must prove the ids of clients with this tier."
    )


def _digest(value: str) -> str:
    if KEY_PREFIX in value:
        raise ValueError("must be the SHA-256 digest of a key, got a key; only its digest belongs here")
    digest = value.removeprefix("sha256:")
    if _DIGEST.fullmatch(digest) is None:
        raise ValueError("must be the SHA-256 digest of a key, 64 hexadecimal digits")
    return digest.lower()


class KeySection(Section):
    """An API key that is registered by the configuration: its digest, which is not a secret."""

    digest: Annotated[str, ValueCheck(_digest)] = Field(description="SHA-256 of the key, in hexadecimal digits.")
    expires_at: Instant | None = Field(default=None, description="ISO 8601 with UTC offset. None: never.")
    routes: list[str] | None = Field(default=None, min_length=1, description="Names of routes. None: all.")


class ClientSection(Section):
    """A client that is registered by the configuration."""

    tier: TierName | None = Field(default=None, description="None: the default tier.")
    verified_only: bool | None = Field(
        default=None, description="Whether a credential must prove the id. None: if the client has keys."
    )
    keys: dict[Identifier, KeySection] = Field(default={}, description="API keys by label.")
