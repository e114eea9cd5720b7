"""The body of the endpoint that sets the mode of a circuit breaker."""

from pydantic import Field

from api_gateway.admin.request_schema import RequestBody
from api_gateway.models import BreakerMode


class ModeChange(RequestBody):
    """The body of POST /circuit-breakers/{name}: mode, duration (null: until changed) and comment."""

    mode: BreakerMode = Field(description="`auto` removes the operator's mode.", examples=["forced_open"])
    duration_seconds: float | None = Field(default=None, gt=0, le=3_200_000_000, examples=[600])
    comment: str = Field(default="", max_length=500, examples=["the database is being moved"])
