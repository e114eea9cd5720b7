"""Sections of clients: tiers, registered clients, and the address limit."""

from ipaddress import IPv4Network, IPv6Network

from pydantic import Field

from api_gateway.settings.setting_types import NetworkSetting, Section, TierName


class AddressLimitSection(Section):
    """The second bucket of unregistered clients: one for each address. `rate: 0` disables it."""

    rate: float = Field(default=100, ge=0, le=1_000_000)
    capacity: int = Field(default=1000, ge=1, le=1_000_000_000)
    exempt: list[NetworkSetting] = Field(default=[IPv4Network("127.0.0.0/8"), IPv6Network("::1/128")])


class CandidateSection(Section):
    """A candidate quota for a tier: it is evaluated beside the quota in force and only counted."""

    rate: float = Field(gt=0, le=1_000_000)
    capacity: int = Field(ge=1, le=1_000_000_000)


class TierSection(Section):
    """A tier: `rate` in tokens per second, `capacity` in tokens, and its priority under overload."""

    rate: float = Field(gt=0, le=1_000_000)
    capacity: int = Field(ge=1, le=1_000_000_000)
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


class ClientSection(Section):
    """A client that is registered by the configuration."""

    tier: TierName | None = Field(default=None, description="None: the default tier.")
    verified_only: bool | None = Field(
        default=None, description="Whether a credential must prove the id. None: if the client has keys."
    )
