"""The section of address rules: which addresses may send requests."""

from pydantic import Field

from api_gateway.settings.setting_types import Section, TrustedProxy


class AddressesSection(Section):
    """Address rules: the networks whose requests are accepted, and those whose requests are refused."""

    allow: list[TrustedProxy] = Field(
        default=[], description="Networks, and `unix` for Unix sockets. Not empty: requests of all others are refused."
    )
    deny: list[TrustedProxy] = Field(default=[], description="Also within allowed networks.")
