"""The section of the history of requests."""

from pydantic import Field

from api_gateway.settings.setting_types import Seconds, Section, Size


class HistorySection(Section):
    """The records of the last requests that are kept in memory, for `GET /explain/{request_id}` and `GET /history`."""

    enabled: bool = Field(default=True, description="Whether requests are kept.")
    successes: int = Field(default=1_500, ge=0, le=100_000, description="Most records, per worker. 0: none.")
    refusals: int = Field(default=2_000, ge=0, le=100_000, description="The same of refused requests.")
    errors: int = Field(default=2_000, ge=0, le=100_000, description="The same of failed and aborted requests.")
    successes_per_second: float = Field(
        default=10, gt=0, le=100_000, description="Most of them that are added, per worker, apart from bursts."
    )
    refusals_per_second: float = Field(default=50, gt=0, le=100_000, description="The same of refused requests.")
    errors_per_second: float = Field(default=50, gt=0, le=100_000, description="The same of the others.")
    max_bytes: Size = Field(
        default=16_777_216, ge=65_536, description="Of all records, per worker. Each of the three kinds has a third."
    )
    max_age: Seconds = Field(default=3600, description="How long a record is shown at most.")
