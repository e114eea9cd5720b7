"""The endpoint `/explain`."""

from fastapi import APIRouter

from api_gateway.admin.context import Guarded
from api_gateway.admin.explain_schema import ExplainRequest, Explanation
from api_gateway.admin.openapi import PROBLEM, REFUSAL_RESPONSES, TOKEN

router = APIRouter(tags=["operator"], responses=REFUSAL_RESPONSES, dependencies=[TOKEN])


@router.post(
    "/explain",
    summary="What the gateway would do with a request, and why",
    responses={
        400: {"description": "The client id is not 1 to 128 visible ASCII characters.", **PROBLEM},
        422: {"description": "The path is not proxied, or the body is invalid.", **PROBLEM},
    },
)
async def explain(request: ExplainRequest, context: Guarded) -> Explanation:
    """Return client, route, cost and buckets of a described request, and the decision it would get.

    Nothing is charged, sent or changed.
    """
    return await context.explainer.explain(request)
