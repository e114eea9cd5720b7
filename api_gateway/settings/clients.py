"""The sections of clients: how they are identified, their tiers, and the limit of addresses."""

from ipaddress import IPv4Network, IPv6Network
from typing import Literal

from pydantic import Field

from api_gateway.settings.setting_types import OWN_HEADER, NetworkSetting, Section, TierName


class IdentitySection(Section):
    """How a client says who it is."""

    mode: Literal["header"] = "header"
    header: str = Field(default="X-Client-ID", pattern=OWN_HEADER)


class AddressLimitSection(Section):
    """The second bucket of clients nobody registered: one for each peer address. `rate: 0` turns it off."""

    rate: float = Field(default=100, ge=0, le=1_000_000)
    capacity: int = Field(default=1000, ge=1, le=1_000_000_000)
    exempt: list[NetworkSetting] = Field(default=[IPv4Network("127.0.0.0/8"), IPv6Network("::1/128")])


class CandidateSection(Section):
    """Other terms for a tier, which are tried and counted but limit nobody."""

    rate: float = Field(gt=0, le=1_000_000)
    capacity: int = Field(ge=1, le=1_000_000_000)


class TierSection(Section):
    """Tokens a second, and tokens a full bucket holds."""

    rate: float = Field(gt=0, le=1_000_000)
    capacity: int = Field(ge=1, le=1_000_000_000)
    priority: int | None = Field(
        default=None, ge=0, le=1000, description="The lowest is shed first under overload. None: the lowest rate."
    )
    candidate: CandidateSection | None = None


class ClientSection(Section):
    """A client known from the start."""

    tier: TierName
