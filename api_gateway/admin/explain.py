"""The endpoint `/explain`."""

from fastapi import APIRouter

from api_gateway.admin.context import AdminContext
from api_gateway.admin.dependencies import Guarded
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

    One worker decides, as of a real request: that whose number is in `worker`. Nothing is charged, sent or changed.
    """
    found = await context.explainer.explain(request)
    return await _with_workers(context, found) if context.aggregator.worker else found


async def _with_workers(context: AdminContext, found: Explanation) -> Explanation:
    """Return an explanation with the worker that has decided, and the state of the breaker in all of them."""
    upstream = found.upstream
    if upstream is not None:
        snapshot = (await context.aggregator.gather()).upstreams.get(upstream.name)
        states = {} if snapshot is None else snapshot.breaker.workers
        upstream = upstream.model_copy(update={"workers": {name: state.value for name, state in states.items()}})
    return found.model_copy(update={"worker": context.aggregator.worker, "upstream": upstream})
