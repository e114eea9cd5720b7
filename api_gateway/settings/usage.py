"""The section of the usage of clients."""

from pydantic import Field

from api_gateway.settings.setting_types import Section


class UsageSection(Section):
    """Whether the usage of clients is counted by day and route, and how much of it is kept."""

    enabled: bool = Field(default=False, description="Whether the usage is counted.")
    retention_days: int = Field(default=400, ge=1, le=36_500, description="Days that are kept.")
    max_unregistered_clients: int = Field(
        default=10_000, ge=0, description="Counted by id each day, per process; the others are counted together."
    )
