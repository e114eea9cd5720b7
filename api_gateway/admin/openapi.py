"""What the schema says of every operator endpoint: the bearer token and the refusals; and views as responses."""

from typing import Any

from fastapi import Response, Security
from fastapi.security import HTTPBearer

from api_gateway.models import Body, Problem

PROBLEM: dict[str, Any] = {"model": Problem, "content": {"application/problem+json": {}}}
REFUSAL_RESPONSES: dict[int | str, dict[str, Any]] = {
    401: {"description": "The bearer token is missing or not valid.", **PROBLEM},
    403: {
        "description": "The caller is not an operator, or has only the role read; or a page of another origin.",
        **PROBLEM,
    },
    413: {"description": "The body is larger than 64 KiB.", **PROBLEM},
    429: {"description": "Too many requests of this token, or too many failed attempts of this address.", **PROBLEM},
}
CLIENT_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The client id is not 1 to 128 visible ASCII characters.", **PROBLEM},
    **REFUSAL_RESPONSES,
}
STORE_REFUSAL: dict[int | str, dict[str, Any]] = {
    503: {
        "description": "The store could not be used. The detail tells whether the change was not made, or may be.",
        **PROBLEM,
    }
}
TIER_REFUSALS: dict[int | str, dict[str, Any]] = {
    422: {"description": "No such tier, and the answer lists them; or another mistake in the body.", **PROBLEM},
    **STORE_REFUSAL,
}
# The gate checks the token; this says so in the schema.
TOKEN = Security(
    HTTPBearer(
        scheme_name="operator",
        auto_error=False,
        description="A token of the configuration, or the generated one in the file that the start names.",
    )
)


def rendered(view: Body) -> Response:
    """Return a view as it is, where the framework would validate and copy it: a large one would hold the loop."""
    return Response(view.model_dump_json(by_alias=True, exclude_unset=True), media_type="application/json")
