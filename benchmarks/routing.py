"""What each feature of a route costs a request, compared with a route that has a path prefix alone.

`python -m benchmarks.routing` runs a gateway for each feature on one core; upstream (nginx) and load use the other.
All gateways run at the same time and are driven in turns, so that ratios hold on a machine that is not idle.
`--before` is a checkout of another commit, whose gateway with a plain route is measured too.
"""

import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.api_keys import LOAD_CORE, ROOT, gateway
from benchmarks.cases import Case
from benchmarks.claims import Claim, print_costs
from benchmarks.load import alternating_costs
from benchmarks.upstream import upstream

PLAIN = "plain"


class Feature(NamedTuple):
    """A feature: what the route has, what requests have, and the microseconds that it may cost a request."""

    route: Mapping[str, Any]
    limit: float
    headers: Mapping[str, str] = {}
    path: str = "small"
    others: Sequence[Mapping[str, Any]] = ()  # further routes
    body: bytes | None = b""  # what the response has, if it is another one than that of the upstream; None: unknown
    status: int = 200
    more: Mapping[str, Any] = {}  # further sections


_COMPRESSED = {"types": ["application/json", "application/octet-stream", "text/*"], "min_bytes": 1}
_LOGGED = {"log": {"access": True, "format": "json"}}
FEATURES: Mapping[str, Feature] = {
    "another route with conditions": Feature(
        {}, 0.5, others=[{"path": "/api/else", "match": {"headers": {"X-A": "1"}}}]
    ),
    "host": Feature({"host": "127.0.0.1"}, 0.5),
    "host, wildcard": Feature({"host": "*.0.0.1"}, 0.5),
    "exact path": Feature({"path": "/api/small", "match": {"path": "exact"}}, 4),
    "template": Feature({"path": "/api/{name}", "match": {"path": "template"}}, 4),
    "header field": Feature({"match": {"headers": {"X-Beta": "1"}}}, 4, {"X-Beta": "1"}),
    "query": Feature({"match": {"query": {"v": "1"}}}, 6, path="small?v=1"),
    "rewrite, prefix": Feature({"path": "/api/small", "rewrite": {"prefix": "/api/small"}}, 6),
    "rewrite, template": Feature(
        {"path": "/api/{name}", "match": {"path": "template"}, "rewrite": {"path": "/api/{name}"}}, 10
    ),
    "request header fields": Feature({"request_headers": {"set": {"X-Caller": "{client}"}, "remove": ["Referer"]}}, 5),
    "response header fields": Feature(
        {"response_headers": {"set": {"Cache-Control": "no-store"}, "remove": ["Server"]}}, 5
    ),
    "two upstreams": Feature({"upstream": None, "upstreams": [{"name": "up"}, {"name": "other", "weight": 0}]}, 1),
    "another route with a mirror": Feature({}, 4, others=[{"path": "/api/else", "mirror": {"upstream": "other"}}]),
    "mirror, all requests": Feature({"mirror": {"upstream": "other"}}, 120),
    "limit of the body": Feature({"max_body_bytes": 1000}, 0.5),
    "limit of header bytes": Feature({"max_header_bytes": 4096}, 2),
    "limit of header lines": Feature({"max_header_lines": 50}, 2),
    "response timeout": Feature({"response_timeout": 5}, 2),
    "static response": Feature({"upstream": None, "respond": {"body": "ready"}}, 0, body=b"ready"),
    "redirect": Feature(
        {"upstream": None, "redirect": {"to": "https://new.test{path}{query}"}}, 0, body=None, status=308
    ),
    "access log, all requests": Feature({}, 20, more=_LOGGED),
    "access log, errors": Feature({"access_log": "errors"}, 4, more=_LOGGED),
    "compression, not accepted": Feature({"compression": _COMPRESSED}, 15),
    "compression, gzip": Feature({"compression": _COMPRESSED}, 60, {"Accept-Encoding": "gzip"}),
    "compression, zstd": Feature(
        {"compression": {**_COMPRESSED, "codings": ["zstd"]}}, 110, {"Accept-Encoding": "zstd"}, body=None
    ),
}
CLAIMS = [Claim(name, f"{name}: {name}", f"{PLAIN}: {PLAIN}", feature.limit) for name, feature in FEATURES.items()]


def sections(feature: Feature, origin: int) -> dict[str, Any]:
    """Return the sections of a gateway with a feature; `origin` is the port of the upstream."""
    route = {"name": "all", "path": "/api", "upstream": "up", **feature.route}
    further = [{"name": f"other-{number}", "upstream": "up", **one} for number, one in enumerate(feature.others)]
    upstreams = {name: {"targets": [{"url": f"http://127.0.0.1:{origin}"}]} for name in ("up", "other")}
    return {"upstreams": upstreams, "routes": [route, *further], **feature.more}


def case_of(name: str, feature: Feature) -> Case:
    """Return what is requested for a feature."""
    case = Case(name, path=feature.path, headers=feature.headers, status=feature.status)
    return case if feature.body == b"" else replace(case, body=feature.body)


def measure(seconds: float, rounds: int, before: Path | None) -> dict[str, list[float]]:
    """Return the CPU time of a request in microseconds, by what was measured, in each round. Raises Failed."""
    cases = {PLAIN: Case(PLAIN), **{name: case_of(name, feature) for name, feature in FEATURES.items()}}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "origin").mkdir()
        origin = stack.enter_context(upstream(folder / "origin", LOAD_CORE))
        gateways = {PLAIN: stack.enter_context(gateway(ROOT, folder / PLAIN, origin, None))}
        for number, (name, feature) in enumerate(FEATURES.items()):
            more = sections(feature, origin)
            gateways[name] = stack.enter_context(gateway(ROOT, folder / str(number), origin, None, more, cases[name]))
        runs = [(name, name) for name in cases]
        if before is not None:
            gateways["before"] = stack.enter_context(gateway(before, folder / "before", origin, None))
            runs.append(("before", PLAIN))
        return alternating_costs(gateways, cases, runs, core=LOAD_CORE, seconds=seconds, rounds=rounds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the table and the claims."""
    return print_costs("benchmarks.routing", __doc__, measure, CLAIMS, arguments)


if __name__ == "__main__":
    sys.exit(main())
