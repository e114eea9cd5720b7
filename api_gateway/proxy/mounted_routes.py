"""Routes of a mounted gateway: URLs in responses get the root that was stripped from paths before."""

from dataclasses import replace

from api_gateway.proxy.admission import RequestPlan, StageResult
from api_gateway.proxy.head_editing import HeadEditor
from api_gateway.proxy.header_facts import HeaderFacts
from api_gateway.proxy.route_table import Route
from api_gateway.proxy.stages import RouteStage
from api_gateway.proxy.url_rewriting import UrlRewriter

_NOTHING_STRIPPED = UrlRewriter(b"")


class MountedRouteStage:
    """Determines the route of a request as `RouteStage` does, and replaces it by the same one below a root."""

    def __init__(self, stage: RouteStage, root: bytes) -> None:
        self._stage = stage
        self._root = root
        self._mounted: dict[str, Route] = {}  # by name, of routes without `others`

    def decide(self, plan: RequestPlan) -> StageResult:
        """See `RouteStage`."""
        error = self._stage.decide(plan)
        if error is None and plan.route is not None:
            plan.route = self._below(plan.route)
        return error

    def _below(self, route: Route) -> Route:
        if route.others:  # which depend on the spelling of the path, and not only on the name
            return route_below(route, self._root)
        mounted = self._mounted.get(route.name)
        if mounted is None:
            mounted = self._mounted[route.name] = route_below(route, self._root)
        return mounted

    def inspect(self, plan: RequestPlan) -> StageResult:
        """See `Stage`."""
        return self.decide(plan)

    def concerns(self, _facts: HeaderFacts) -> bool:
        """See `Stage`."""
        return True


def route_below(route: Route, root: bytes) -> Route:
    """Return a route for clients whose paths begin with `root`."""
    editor = route.url_rewriter
    urls = editor.urls if isinstance(editor, HeadEditor) else editor
    if route.rewrites_urls:
        urls = replace(urls or _NOTHING_STRIPPED, root=root, urls=True)
        editor = replace(editor, urls=urls) if isinstance(editor, HeadEditor) else urls
    return replace(
        route,
        url_rewriter=editor,
        response=None if route.response is None else replace(route.response, root=root),
        variants={name: route_below(one, root) for name, one in route.variants.items()},
    )
