"""The stages for optional features of routes. A stage exists only if some route needs it."""

from collections.abc import Sequence

from api_gateway.errors import BadRequest, BodyTooLarge, HeadersTooLarge
from api_gateway.proxy.admission import RequestPlan, Stage, StageResponse, StageResult
from api_gateway.proxy.cors import with_cors_fields
from api_gateway.proxy.head_editing import HeadEditor
from api_gateway.proxy.route_table import Route
from api_gateway.proxy.stages import ReadOnlyStage


class SplitStage(ReadOnlyStage):
    """Chooses the upstream of a request whose route has several ones."""

    def decide(self, plan: RequestPlan) -> StageResult:
        """Replace the route by the same one with the upstream of the client."""
        route, client = plan.route, plan.exchange.client
        if route is not None and route.split is not None and client is not None:
            plan.route = route.variants[route.split.upstream_of(client.key)]
        return None


class PathRewritingStage(ReadOnlyStage):
    """Determines the target for the upstream of routes that rewrite the path, or use parts of it elsewhere."""

    def decide(self, plan: RequestPlan) -> StageResult:
        """Set the target; refuse a request whose path is spelt in an unusual way."""
        route = plan.route
        if route is None:
            return None
        try:
            if route.rewriting is not None:
                plan.target = route.rewriting.target_of(plan.raw_target)
            if isinstance(route.url_rewriter, HeadEditor):
                route.url_rewriter.values_of(plan.exchange, plan.raw_target)  # which must not fail later
        except BadRequest as error:
            return error.with_traceback(None)
        return None


class BodyLimitStage(ReadOnlyStage):
    """Refuses requests whose body is known to be larger than their route permits; others, see `ExchangeBody`."""

    def decide(self, plan: RequestPlan) -> StageResult:
        """Refuse with 413."""
        route, length = plan.route, plan.facts.length
        limit = None if route is None else route.max_body_bytes
        if limit is None or length is None or length <= limit:
            return None
        return BodyTooLarge(f"The body is larger than {limit} bytes.", headers={"connection": "close"})

    def inspect(self, plan: RequestPlan) -> StageResult:
        """See `Stage`; a described request has no body."""


class HeadLimitStage(ReadOnlyStage):
    """Refuses requests whose head is larger than their route permits, before they are charged.

    The size is that of the request line and of the header lines without superfluous white space, and without the trace
    context if the gateway traces requests.
    """

    def decide(self, plan: RequestPlan) -> StageResult:
        """Refuse with 431."""
        route, lines = plan.route, plan.headers.received
        if route is None:
            return None
        most = route.max_header_bytes
        if most is not None and _head_size(plan, lines) > most:
            return HeadersTooLarge(f"The head of the request is larger than {most} bytes.")
        most = route.max_header_lines
        if most is not None and lines.count(b"\r\n") - 1 > most:
            return HeadersTooLarge(f"The request has more than {most} header lines.")
        return None


def _head_size(plan: RequestPlan, lines: bytes) -> int:
    """Return the size of a head in bytes; `lines` are the header lines with the line breaks before and after them."""
    return len(plan.exchange.method) + len(plan.raw_target) + len("  HTTP/1.1") + len(lines) + len("\r\n")


class DirectResponseStage(ReadOnlyStage):
    """Responds in place of an upstream, on routes that say so. It comes last, so such requests are charged too."""

    def decide(self, plan: RequestPlan) -> StageResult:
        """Respond, or go on."""
        route = plan.route
        response = None if route is None else route.response
        if response is None:
            return None
        try:
            fields = response.fields(plan.raw_target)
        except BadRequest as error:
            return error.with_traceback(None)
        return StageResponse(response.status, with_cors_fields(plan.exchange.cors, fields), response.body)


def stages_of_routes(routes: Sequence[Route]) -> list[Stage]:
    """Return the stages that some of the routes need, to be put right after the route is known."""
    return [
        *([SplitStage()] if any(route.split is not None for route in routes) else []),
        *([PathRewritingStage()] if any(route.uses_path for route in routes) else []),
        *([HeadLimitStage()] if any(route.limits_head for route in routes) else []),
        *([BodyLimitStage()] if any(route.max_body_bytes is not None for route in routes) else []),
    ]
