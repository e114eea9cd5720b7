"""The schema of the usage of clients."""

from pydantic import Field

from api_gateway.models import Body


class UsageSums(Body):
    """Sums over exchanges that have ended."""

    requests: int
    limited: int = Field(description="Refused by a rate limit.")
    failed: int = Field(description="With a status from 500.")
    tokens: float = Field(description="Charged in the end, after settlements.")
    bytes_received: int = Field(description="Of request bodies.")
    bytes_sent: int = Field(description="Of response bodies.")


class UsageRow(UsageSums):
    """The sums of one group. Only what is grouped by is present."""

    client: str | None = Field(
        default=None, description="Client id, or `address` and an address; empty if it was not identified."
    )
    route: str | None = Field(default=None, description="Empty for requests without a route.")
    day: str | None = Field(default=None, description="UTC, ISO 8601.")


class UsageView(Body):
    """Usage in a period, in total and by group."""

    first: str = Field(alias="from", description="First day, UTC.")
    last: str = Field(alias="to", description="Last day, UTC; included.")
    client: str | None = Field(description="The client that the usage is of, null for all.")
    by: list[str]
    total: UsageSums
    rows: list[UsageRow]

    @staticmethod
    def counted() -> list[str]:
        """Return the names of the sums."""
        return list(UsageSums.model_fields)
