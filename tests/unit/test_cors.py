"""CORS policies: which origins they allow, and which fields responses get, without doubling those of an upstream."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from api_gateway.config import load_config
from api_gateway.errors import LoadShed
from api_gateway.http1.fast_parser import pairs_of
from api_gateway.http1.headers import fields_of
from api_gateway.models import HeaderList
from api_gateway.proxy.admission import Admission, RequestPlan, StageResponse
from api_gateway.proxy.cors import (
    EXPOSED,
    CorsPolicy,
    Preflight,
    complete,
    complete_lines,
    origin_of,
    preflight_of,
)
from api_gateway.proxy.cors_stages import CorsPolicies, CorsStage, PreflightStage
from api_gateway.proxy.header_facts import HeaderReader
from api_gateway.proxy.route_table import Route, RouteTable
from api_gateway.resilience.event_loop_limit import LAG_SAMPLES, EventLoopShedder
from api_gateway.resilience.priorities import PriorityClasses
from api_gateway.settings.diagnostics import ConfigError
from api_gateway.settings.rules import access_warnings
from tests.cases import each

APP = b"https://app.example"
NAMES = ", ".join(EXPOSED).encode()
POLICY = CorsPolicy(origins=[APP.decode()], credentials=True)
OPEN = CorsPolicy(origins=["*"])
UPSTREAM = {"up": {"targets": [{"url": "http://127.0.0.1:9001"}]}}
ROUTE = {"name": "all", "path": "/api", "upstream": "up"}
BAD_ORIGIN = "must be an origin such as https://app.example.com or https://*.example.com, or '*'"
DEFAULT_PORT = "never matches, because browsers omit the default port: write 'https://a.example'"


@each(
    ("origin", "allowed", "others"),
    [
        (
            "https://app.example",
            ["https://app.example"],
            [
                "http://app.example",
                "https://app.example:8443",
                "https://app.example.evil.test",
                "https://xapp.example",
            ],
        ),
        (
            "https://*.example",
            ["https://a.example", "https://a.b.example", "https://x_y.example"],
            [
                "https://example",
                "https://.example",
                "https://a.example.evil",
                "https://evilexample",
                "https://a.example:1",
            ],
        ),
        ("https://*.example:8443", ["https://a.example:8443"], ["https://a.example", "https://a.example:84430"]),
        (
            "http://localhost:*",
            ["http://localhost", "http://localhost:3000"],
            ["http://localhost:x", "http://localhost:", "http://localhost.evil:1"],
        ),
        ("http://[::1]:8080", ["http://[::1]:8080"], ["http://[::1]"]),
        ("http://[::1]", ["http://[::1]"], ["http://[::1]:8080", "http://::1"]),
        ("null", ["null"], ["https://null", "NULL", ""]),
        ("app-1://localhost", ["app-1://localhost"], ["app-2://localhost"]),
        ("*", ["https://any.example", "null", "anything"], []),
    ],
)
def test_an_origin_matches_as_a_whole(origin: str, allowed: list[str], others: list[str]) -> None:
    policy = CorsPolicy(origins=["https://other.example", origin] if origin != "*" else [origin])
    assert [one for one in allowed if not policy.allows(one.encode())] == []
    assert [one for one in others if policy.allows(one.encode())] == []


@each(
    ("policy", "origin", "fields"),
    [
        (POLICY, APP, {"access-control-allow-origin": APP, "access-control-allow-credentials": b"true",
                       "access-control-expose-headers": NAMES, "vary": b"Origin"}),
        (POLICY, b"https://evil.example", {"vary": b"Origin"}),
        (POLICY, None, {"vary": b"Origin"}),
        (OPEN, APP, {"access-control-allow-origin": b"*", "access-control-expose-headers": NAMES}),
        (OPEN, None, {"access-control-allow-origin": b"*", "access-control-expose-headers": NAMES}),
        (CorsPolicy(origins=[APP.decode()], exposed=["X-Total", "retry-after"]), APP,
         {"access-control-allow-origin": APP,
          "access-control-expose-headers": NAMES.replace(b"Retry-After", b"retry-after") + b", X-Total",
          "vary": b"Origin"}),
    ],
)  # fmt: skip
def test_a_response_has_the_fields_of_its_origin(
    policy: CorsPolicy, origin: bytes | None, fields: dict[str, bytes]
) -> None:
    """What depends on the origin says so also to requests without one, for caches; others are always the same."""
    found = policy.fields(origin)
    assert {name.decode(): value for name, value in found.pairs} == fields
    assert found.lines == b"".join(b"%b: %b\r\n" % pair for pair in found.pairs)


@each(
    ("policy", "asked", "of_route", "fields"),
    [
        (CorsPolicy(origins=[APP.decode()]), Preflight(b"PUT", None), None,
         {"methods": b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS", "max-age": b"600"}),
        (CorsPolicy(origins=[APP.decode()]), Preflight(b"PURGE", None), None,
         {"methods": b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS, PURGE", "max-age": b"600"}),
        (CorsPolicy(origins=[APP.decode()]), Preflight(b"PUT", None), ["POST", "GET"],
         {"methods": b"GET, POST", "max-age": b"600"}),
        (CorsPolicy(origins=[APP.decode()], methods=["GET"], max_age=0), Preflight(b"PUT", None), None,
         {"methods": b"GET", "max-age": b"0"}),
        (CorsPolicy(origins=[APP.decode()], methods=["GET"]), Preflight(b"GET", b"x-a,x b, X-C"), None,
         {"methods": b"GET", "headers": b"x-a, X-C", "max-age": b"600"}),
        (CorsPolicy(origins=[APP.decode()], methods=["GET"], headers=["X-A", "X-B"]), Preflight(b"GET", b"x-c"), None,
         {"methods": b"GET", "headers": b"X-A, X-B", "max-age": b"600"}),
    ],
)  # fmt: skip
def test_a_preflight_is_told_what_the_policy_and_the_route_allow(
    policy: CorsPolicy, asked: Preflight, of_route: list[str] | None, fields: dict[str, bytes]
) -> None:
    found = policy.preflight_fields(APP, asked, of_route)
    expected = [(b"access-control-allow-origin", APP)]
    named = [name for name in ("methods", "headers") if name in fields]
    expected += [(f"access-control-allow-{name}".encode(), fields[name]) for name in named]
    assert found == [*expected, (b"access-control-max-age", fields["max-age"]), (b"vary", b"Origin")]


@each(
    ("headers", "origin", "preflight"),
    [
        ([(b"Origin", APP)], APP, None),
        ([(b"Origin", APP), (b"Origin", APP)], None, None),
        ([(b"Access-Control-Request-Method", b"PUT")], None, None),
        ([(b"Origin", APP), (b"Access-Control-Request-Method", b"PUT")], APP, Preflight(b"PUT", None)),
        (
            [
                (b"origin", APP),
                (b"access-control-request-method", b"PUT"),
                (b"access-control-request-headers", b"x-a"),
                (b"access-control-request-headers", b"x-b"),
            ],
            APP,
            Preflight(b"PUT", b"x-a,x-b"),
        ),
    ],
)
def test_a_preflight_has_one_origin_and_one_method(
    headers: HeaderList, origin: bytes | None, preflight: Preflight | None
) -> None:
    assert origin_of(fields_of(headers)) == origin
    assert preflight_of(fields_of(headers)) == preflight


@each(
    ("upstream", "expected"),
    [
        ([], POLICY.fields(APP).pairs),
        (
            [(b"Access-Control-Allow-Origin", b"*")],
            [
                (b"Access-Control-Allow-Origin", b"*"),
                (b"access-control-expose-headers", NAMES),
                (b"vary", b"Origin"),
            ],
        ),
        (
            [(b"access-control-allow-credentials", b"false")],
            [
                (b"access-control-allow-credentials", b"false"),
                (b"access-control-allow-origin", APP),
                (b"access-control-expose-headers", NAMES),
                (b"vary", b"Origin"),
            ],
        ),
        (
            [(b"Access-Control-Expose-Headers", b"X-Total, retry-after"), (b"Vary", b"Accept-Encoding")],
            [
                (b"Access-Control-Expose-Headers", b"X-Total, retry-after, " + NAMES.removeprefix(b"Retry-After, ")),
                (b"Vary", b"Accept-Encoding, Origin"),
                (b"access-control-allow-origin", APP),
                (b"access-control-allow-credentials", b"true"),
            ],
        ),
        ([(b"Vary", b"accept, ORIGIN"), *POLICY.fields(APP).pairs[:3]], None),
        ([(b"vary", b"*"), *POLICY.fields(APP).pairs[:3]], None),
        ([(b"vary", b"X-Origin"), *POLICY.fields(APP).pairs[:3]], [
            (b"vary", b"X-Origin, Origin"), *POLICY.fields(APP).pairs[:3]
        ]),
    ],
)  # fmt: skip
def test_no_field_of_an_upstream_is_doubled(upstream: HeaderList, expected: HeaderList | None) -> None:
    headers, added = complete(POLICY.fields(APP), upstream)
    assert [*headers, *added] == list(upstream if expected is None else expected)


VALUES = st.lists(
    st.sampled_from([b"Origin", b"origin", b"*", b"Accept", b"X-Origin", b"Retry-After", b"X-Total", b"RateLimit"]),
    min_size=1,
    max_size=4,
).map(b", ".join)
NAMED = st.sampled_from(
    [
        *(b"Vary", b"vary", b"X-Vary", b"Content-Type", b"Access-Control-Expose-Headers"),
        *(b"access-control-allow-origin", b"Access-Control-Allow-Credentials", b"Access-Control-Max-Age"),
    ]
)
POLICIES = [POLICY, OPEN, CorsPolicy(origins=[APP.decode()], exposed=["X-Total"])]


@given(st.lists(st.tuples(NAMED, VALUES), max_size=6), st.sampled_from(POLICIES), st.sampled_from([APP, None, b"x"]))
def test_a_plain_head_gets_the_same_fields_as_a_parsed_one(
    headers: HeaderList, policy: CorsPolicy, origin: bytes | None
) -> None:
    fields = policy.fields(origin)
    expected, added = complete(fields, headers)
    head, lines = complete_lines(fields, b"HTTP/1.1 200 OK" + b"".join(b"\r\n%b: %b" % pair for pair in headers))
    assert pairs_of(head) == expected
    assert pairs_of(b"\r\n" + lines) == added
    names = [name.lower() for name, _ in [*expected, *added]]
    given_names = [name.lower() for name, _ in headers]
    assert all(names.count(name) == max(1, given_names.count(name)) for name in names)


def test_the_policy_of_a_refused_request_is_that_of_any_route_with_its_path() -> None:
    table = RouteTable(
        [
            Route("a", "/api/a", "up", methods=frozenset({"GET"})),
            Route("deep", "/api/a/b/c", "up"),
            Route("hosted", "/api/a", "up", host="one.test"),
        ]
    )
    for host, path, name in [
        ("", "/api/a", "a"),
        ("one.test", "/api/a/x", "hosted"),
        ("", "/api/a/b", "a"),
        ("", "/api/a/b/c/d/e/f/g", "deep"),
        ("", "/api//a/./b", "a"),
        ("", "/api/ab", None),
        ("", "/api/" + "x/" * 30_000, None),
    ]:
        route = table.at(host, path)
        assert (None if route is None else route.name) == name


def problems(tmp_path: Path, cors: dict[str, Any], *, of_route: bool = False) -> list[str]:
    """Return the lines about a configuration with this section."""
    sections: dict[str, Any] = {"upstreams": {"up": {"targets": [{"url": "http://127.0.0.1:9001"}]}}}
    if of_route:
        sections["routes"] = [{"name": "r", "path": "/api", "upstream": "up", "cors": cors}]
    else:
        sections["cors"] = cors
    path = tmp_path / "gateway.yaml"
    path.write_text(yaml.safe_dump(sections))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return [line.removeprefix(f"{path}:").partition(": ")[2] for line in caught.value.problems]


@pytest.mark.parametrize(
    ("cors", "message"),
    [
        ({"origins": ["https://a.example", "*"], "credentials": True},
         "origins[1]: is any page, so credentials: true is refused: name the origins, got '*'"),
        ({"origins": ["null"], "credentials": True},
         "origins[0]: is any page, so credentials: true is refused: name the origins, got 'null'"),
        ({"origins": ["*", "https://a.example"]}, "origins[0]: allows every origin: leave out the others, got '*'"),
        ({"origins": []}, "origins: must name the origins that may read responses, or '*', got []"),
        ({"origins": ["https://a.example"], "exposed_headers": ["*"], "credentials": True},
         "exposed_headers[0]: exposes nothing with credentials: true: name the fields, got '*'"),
        ({"origins": ["https://a.example/"]},
         "origins[0]: must be an origin, which has no path: write 'https://a.example', got 'https://a.example/'"),
        ({"origins": ["https://a.example:443"]},
         f"origins[0]: {DEFAULT_PORT}, got 'https://a.example:443'"),
        ({"origins": ["a.example"]},
         f"origins[0]: {BAD_ORIGIN}, got 'a.example'"),
        ({"origins": ["https://*"]},
         f"origins[0]: {BAD_ORIGIN}, got 'https://*'"),
        ({"origins": ["https://a.example"], "headers": ["*"]},
         "headers[0]: names no header field: leave headers out to allow every field, got '*'"),
        ({"origins": ["https://a.example"], "max_age": -1},
         "max_age: must be greater than or equal to 0, got -1"),
    ],
)  # fmt: skip
def test_a_combination_that_browsers_refuse_is_a_mistake_with_place_and_value(
    tmp_path: Path, cors: dict[str, Any], message: str
) -> None:
    assert problems(tmp_path, cors) == [f"cors.{message}"]
    (line,) = problems(tmp_path, cors, of_route=True)
    assert line in (f"routes[0].cors.{message}", f"routes[0] (r).cors.{message}")


def test_a_section_that_is_off_needs_no_origins(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text("cors: {enabled: false}")
    config = load_config(path, {"upstreams": {"up": {"targets": [{"url": "http://127.0.0.1:1"}]}}})
    assert config.cors is not None
    assert not config.cors.enabled


def test_variables_set_the_section(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_CORS__ORIGINS", '["HTTPS://App.Example"]')
    config = load_config()
    assert config.cors is not None
    assert config.cors.origins == ["https://app.example"]


def asked(method: str = "OPTIONS", origin: bytes = APP) -> RequestPlan:
    """Return the plan of a preflight."""
    reader = HeaderReader(id_header="X-Client-ID", trusted_proxies=(), max_body_bytes=0, reads_origin=True)
    fields = fields_of([(b"Host", b"x"), (b"Origin", origin), (b"Access-Control-Request-Method", b"PUT")])
    return Admission.plan(reader.read("192.0.2.7", fields, "1.1"), method, "/api/a", b"/api/a", 0)


def test_preflights_are_shed_under_overload_as_requests_of_their_priority_are() -> None:
    """A page sees that the gateway is overloaded, and not that it may not ask."""
    policies = CorsPolicies(RouteTable([Route("a", "/api/a", "up", cors=POLICY)]), None)
    shedder = EventLoopShedder(0.1, PriorityClasses({"FREE": 0, "PAID": 1}), source=random.Random(1))
    stage = PreflightStage(policies, shedder=shedder, priority=0)
    plan = asked()
    assert isinstance(stage.decide(plan), StageResponse)
    for _ in range(LAG_SAMPLES):
        shedder.observe(10.0)
    refused = stage.decide(plan)
    assert isinstance(refused, LoadShed)
    assert refused.retry_after is not None
    assert plan.exchange.cors is POLICY.fields(APP)


def test_the_fields_are_remembered_with_the_header_set_for_one_route() -> None:
    open_route, own, none = (Route(name, f"/api/{name}", "up", cors=cors) for name, cors in CORS_OF.items())
    plan, stage = asked("GET"), CorsStage()
    for route in (own, own, open_route, none, own, None, open_route):
        plan.route = route
        assert stage.decide(plan) is None
        expected = None if route is None or route.cors is None else route.cors.fields(APP)
        assert plan.exchange.cors is expected


CORS_OF = {"open": OPEN, "own": POLICY, "none": None}


@each(
    ("origin", "is_public"),
    [
        *((f"https://*.{name}", True) for name in ("com", "io", "co.uk", "com.au", "github.io", "workers.dev")),
        ("http://*.com:*", True),
        *((f"https://*.{name}", False) for name in ("example.com", "example.co.uk", "acme.github.io", "internal")),
        *(("https://app.example.com", False), ("http://localhost:*", False), ("http://*.localhost", False)),
        *(("https://co.uk", False), ("https://*.corp.internal", False)),
    ],
)
def test_credentials_for_any_page_of_a_public_suffix_are_a_warning(origin: str, *, is_public: bool) -> None:
    section = {"origins": ["https://a.example", origin], "credentials": True}
    for sections, place in (
        ({"cors": section}, "cors.origins[1]"),
        ({"upstreams": UPSTREAM, "routes": [ROUTE | {"cors": section}]}, "routes[0] (all).cors.origins[1]"),
    ):
        told = [str(one) for one in access_warnings(load_config(None, sections))]
        assert [one.partition(": ")[0] for one in told] == ([place] if is_public else [])
        without = json.loads(json.dumps(sections).replace("true", "false"))
        assert not list(access_warnings(load_config(None, without)))
