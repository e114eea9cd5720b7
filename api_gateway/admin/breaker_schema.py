"""The body of the endpoint that sets the mode of a circuit breaker."""

from typing import Annotated

from pydantic import AfterValidator, Field

from api_gateway.admin.request_schema import RequestBody, one_line
from api_gateway.models import BreakerMode


class ModeChange(RequestBody):
    """The body of POST /circuit-breakers/{name}: mode, duration (null: until changed) and comment."""

    mode: BreakerMode = Field(description="`auto` removes the operator's mode.", examples=["forced_open"])
    duration_seconds: float | None = Field(default=None, gt=0, le=3_200_000_000, examples=[600])
    comment: Annotated[str, Field(max_length=500), AfterValidator(one_line)] = Field(
        default="", examples=["the database is being moved"]
    )
