"""The endpoint `/explain`."""

from fastapi import APIRouter

from api_gateway.admin.context import Guarded
from api_gateway.admin.explain_schema import ExplainRequest, Explanation
from api_gateway.admin.openapi import PROBLEM, REFUSAL_RESPONSES, TOKEN

router = APIRouter(tags=["operator"], responses=REFUSAL_RESPONSES, dependencies=[TOKEN])


@router.post(
    "/explain",
    summary="What a request would be answered, and why",
    responses={
        400: {"description": "The client id is not 1 to 128 visible ASCII characters.", **PROBLEM},
        422: {"description": "The path is not proxied, or the body is not a question.", **PROBLEM},
    },
)
async def explain(request: ExplainRequest, context: Guarded) -> Explanation:
    """Answer who the client is, what the request costs, what every bucket says, and what would come of it.

    Nothing is charged, sent or moved by asking.
    """
    return await context.explainer.explain(request)
