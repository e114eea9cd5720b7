"""The text of a first configuration file, with comments."""

import json
from collections.abc import Iterator, Mapping, Sequence

from api_gateway.settings.openapi_routes import DescribedRoute

SCHEMA_FILE = "gateway.schema.json"
_EXAMPLE = {"users": "http://127.0.0.1:9001"}


def starter_text(upstreams: Mapping[str, str], routes: Sequence[DescribedRoute] = (), default: str = "") -> str:
    """Return a file with these upstreams, by name, and these routes to the upstream `default`, if there are any."""
    return "\n".join(_lines(upstreams or _EXAMPLE, routes, default)) + "\n"


def _lines(upstreams: Mapping[str, str], routes: Sequence[DescribedRoute], default: str) -> Iterator[str]:
    yield f"# yaml-language-server: $schema={SCHEMA_FILE}"
    yield f"# For completion in editors: api-gateway schema > {SCHEMA_FILE}"
    yield "# Check this file with: api-gateway --check --config FILE"
    yield ""
    yield "# The services behind the gateway, by name."
    yield "upstreams:"
    for name, url in upstreams.items():
        yield f"  {_quoted(name)}: {_quoted(url)}"
    yield "  # Or a section with more settings:"
    yield "  # orders:"
    yield '  #   targets: ["http://10.0.0.1:8080", "http://10.0.0.2:8080"]'
    yield "  #   health_check: {path: /health, interval: 5s}"
    yield "  #   timeouts: {connect: 2s, response: 30s}"
    yield ""
    yield from _of_routes(upstreams, routes, default)
    yield from _REST


def _of_routes(upstreams: Mapping[str, str], routes: Sequence[DescribedRoute], default: str) -> Iterator[str]:
    if not routes:
        first = next(iter(upstreams))
        yield f"# Without routes, /api/{first} is forwarded to the upstream {first} as /{first}, and so on."
        yield "# routes:"
        yield f"#   - {{name: {first}, path: /api/{first}, upstream: {first}, strip_prefix: /api, cost: 1}}"
        yield ""
        return
    yield "# A route matches its path and all paths below it. A cost is what a request takes from its client's bucket."
    yield "routes:"
    for route in routes:
        yield f"  - name: {_quoted(route.name)}"
        yield f"    path: {_quoted(route.path)}"
        yield f"    upstream: {_quoted(default)}"
        if route.strip_prefix is not None:
            yield f"    strip_prefix: {route.strip_prefix}"
        yield f"    methods: [{', '.join(route.methods)}]"
        yield "    # cost: 1"
        yield f"    # costs: [{{methods: [{route.methods[-1]}], path: {_quoted(route.path)}, cost: 5}}]"
        for operation in route.operations:
            yield f"    # {operation}"
    yield ""


_REST = (
    "# How much each client may use: tokens per second, and how many it can save up.",
    "# tiers:",
    "#   FREE: {rate: 1/s, capacity: 10}",
    "#   PREMIUM: {rate: 1200/min, capacity: 200}",
    "# clients:",
    "#   acme: {tier: PREMIUM}",
    "",
    "# server:",
    "#   host: 0.0.0.0        # clients from other machines; the default is 127.0.0.1",
    "#   port: 8000",
    "#   workers: 2",
    "",
    "# Operators on other machines need a token.",
    "# admin: {token_file: /run/secrets/gateway-token}",
    "",
    "# Buckets of several machines are kept in Redis or Valkey.",
    "# store: {url: 'redis://${STORE_HOST:-127.0.0.1}:6379'}",
)


def _quoted(text: str) -> str:
    """Return text as YAML; JSON is part of it."""
    return json.dumps(text)
