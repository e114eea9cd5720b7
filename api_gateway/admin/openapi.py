"""The parts of the schema that operator endpoints share: the bearer token and the error responses."""

from typing import Any

from fastapi import Response, Security
from fastapi.security import HTTPBearer

from api_gateway.models import Body, Problem

PROBLEM: dict[str, Any] = {"model": Problem, "content": {"application/problem+json": {}}}
REFUSAL_RESPONSES: dict[int | str, dict[str, Any]] = {
    401: {"description": "The bearer token is missing or not valid.", **PROBLEM},
    403: {
        "description": "No operator was identified, the token's role is read, or another origin made the request.",
        **PROBLEM,
    },
    413: {"description": "The body is larger than 64 KiB.", **PROBLEM},
    429: {"description": "Too many requests of this operator, or failed attempts of this address.", **PROBLEM},
}
CLIENT_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The client id is not 1 to 128 visible ASCII characters.", **PROBLEM},
    **REFUSAL_RESPONSES,
}
STORE_REFUSAL: dict[int | str, dict[str, Any]] = {
    503: {
        "description": "The store is unavailable. `detail` states whether the change may have been made.",
        **PROBLEM,
    }
}
TIER_REFUSALS: dict[int | str, dict[str, Any]] = {
    422: {"description": "No such tier (the response lists all), or another error in the body.", **PROBLEM},
    **STORE_REFUSAL,
}
# For the schema only: the gate checks the token.
TOKEN = Security(
    HTTPBearer(
        scheme_name="operator",
        auto_error=False,
        description="A configured token, or the generated one in the file operator-token in state_dir.",
    )
)


def rendered(view: Body) -> Response:
    """Return a view as a JSON response.

    The framework would validate and copy it again; for a large view that blocks the event loop.
    """
    return Response(view.model_dump_json(by_alias=True, exclude_unset=True), media_type="application/json")
