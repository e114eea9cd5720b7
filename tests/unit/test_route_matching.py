"""Matching by host, exact path, template, header field and query: precedence, and that no spelling evades a cost."""

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from api_gateway.errors import BadRequest, GatewayError, MethodNotAllowed, NoRoute
from api_gateway.http1.headers import fields_of, host_name
from api_gateway.middleware import proxied_paths
from api_gateway.models import HeaderList
from api_gateway.proxy.header_facts import HeaderReader
from api_gateway.proxy.path_table import EXACT_PATH, PATH_TEMPLATE
from api_gateway.proxy.route_conditions import (
    MAX_PARAMETERS,
    FieldCondition,
    QueryCondition,
    RouteCondition,
    ValueTest,
)
from api_gateway.proxy.route_table import Route, RouteTable
from tests.cases import each
from tests.examples import examples
from tests.unit.test_path_readings import ANY, SERVERS, merged, resolved


def header(name: str, **test: bytes) -> RouteCondition:
    return FieldCondition(name.encode(), ValueTest(**test))


def query(name: str, **test: bytes) -> RouteCondition:
    return QueryCondition(name.encode(), ValueTest(**test))


def route(name: str, path: str, match: str = "prefix", *conditions: RouteCondition, **more: Any) -> Route:
    return Route(name, path, "up", match=match, conditions=conditions, **more)


ROUTES = [
    route("prefix", "/api/users"),
    route("exact", "/api/users/me", EXACT_PATH),
    route("orders", "/api/users/{id}/orders", PATH_TEMPLATE),
    route("own orders", "/api/users/me/{what}", PATH_TEMPLATE),
    route("deep", "/api/users/7/orders"),
    route("below deep", "/api/users/7/orders/archive"),
    route("beta", "/api/users", "prefix", header("x-beta", exact=b"1")),
    route("beta debug", "/api/users", "prefix", header("x-beta", exact=b"1"), query("debug")),
    route("v2", "/api/users", "prefix", query("v", prefix=b"2")),
    route("sub", "/api", host="*.example.com"),
    route("sub sub", "/api", host="*.eu.example.com"),
    route("host", "/api", host="shop.example.com"),
    route("host users", "/api/users", host="shop.example.com"),
    route("elsewhere", "/shop"),
]
TABLE = RouteTable(ROUTES)


def found(target: str, host: str = "h", method: str = "GET", table: RouteTable = TABLE, *fields: bytes) -> str:
    """Return the name of the route of a request, or the error that refuses it."""
    pairs = [tuple(line.split(b": ", 1)) for line in fields]
    selecting = fields_of(pairs)  # type: ignore[arg-type]
    try:
        return table.find(host, method, unquote(target.partition("?")[0]), target.encode(), selecting)[0].name
    except GatewayError as error:
        return type(error).__name__


@each(
    ("target", "host", "fields", "expected"),
    [
        ("/api/users/8", "h", (), "prefix"),
        ("/api/users/me", "h", (), "exact"),
        ("/api/users/me/", "h", (), "exact"),
        ("/api/users/me/x/y", "h", (), "prefix"),
        ("/api/users/8/orders", "h", (), "orders"),
        ("/api/users/7/orders", "h", (), "orders"),
        ("/api/users/7/orders/1", "h", (), "deep"),
        ("/api/users/7/orders/archive/1", "h", (), "below deep"),
        ("/api/users/me/orders", "h", (), "own orders"),
        ("/api/users//orders", "h", (), "prefix"),
        ("/api/users/8", "h", (b"x-beta: 1",), "beta"),
        ("/api/users/8", "h", (b"x-beta: 2",), "prefix"),
        ("/api/users/8?debug", "h", (b"x-beta: 1",), "beta debug"),
        ("/api/users/8?v=21", "h", (), "v2"),
        ("/api/users/8?v=12", "h", (), "prefix"),
        ("/api/users/7/orders/1?v=2", "h", (b"x-beta: 1",), "deep"),
        ("/api/other", "h", (), "NoRoute"),
        ("/api/users/8", "shop.example.com", (b"x-beta: 1",), "host users"),
        ("/api/x", "shop.example.com", (), "host"),
        ("/api/users/me", "a.b.example.com", (), "sub"),
        ("/api/users/me", "a.eu.example.com", (), "sub sub"),
        ("/api/users/me", "example.com", (), "exact"),
        ("/shop/x", "shop.example.com", (), "elsewhere"),
        ("/api/x", "notexample.com", (), "NoRoute"),
    ],
)
def test_the_most_specific_host_then_path_then_conditions_win(
    target: str, host: str, fields: tuple[bytes, ...], expected: str
) -> None:
    """In whatever order the routes are configured."""
    for routes in (ROUTES, ROUTES[::-1]):
        assert found(target, host, "GET", RouteTable(routes), *fields) == expected


def test_of_equal_routes_the_first_one_wins() -> None:
    first = route("first", "/api", "prefix", header("x-a"))
    second = route("second", "/api", "prefix", header("x-b"))
    fields = (b"x-a: ", b"x-b: 1")
    assert found("/api", "h", "GET", RouteTable([first, second]), *fields) == "first"
    assert found("/api", "h", "GET", RouteTable([second, first]), *fields) == "second"


def rank(one: Route, path: str) -> tuple[Any, ...] | None:
    """Return what orders the routes that match a path, None if the route does not: written down without an index."""
    if one.match == "prefix":
        is_below = path == one.path or path.startswith(f"{one.path.rstrip('/')}/")
        return (2, -len(one.path)) if is_below else None
    segments, mine = path.rstrip("/").split("/")[1:], one.path.split("/")[1:]
    if len(segments) != len(mine):
        return None
    pairs = list(zip(segments, mine, strict=True))
    if not all(given == own or (own[0] == "{" and given) for given, own in pairs):
        return None
    return (0,) if one.match == EXACT_PATH else (1, [own[0] == "{" for own in mine])


SEGMENT = st.sampled_from(["a", "b", "{x}", "{y}"])
SHAPES = st.lists(SEGMENT, min_size=1, max_size=4).map(lambda found: "/" + "/".join(found))


@st.composite
def tables(draw: st.DrawFn) -> list[Route]:
    routes = []
    for number, path in enumerate(draw(st.lists(SHAPES, min_size=1, max_size=7, unique=True))):
        match = PATH_TEMPLATE if "{" in path else draw(st.sampled_from(["prefix", EXACT_PATH]))
        conditions = draw(st.sampled_from([(), (header("x-a"),)]))
        routes.append(route(str(number), path, match, *conditions))
    return routes


@settings(max_examples=examples(300))
@given(routes=tables(), segments=st.lists(st.sampled_from(["a", "b", "c"]), max_size=5), has_field=st.booleans())
def test_the_table_finds_what_a_search_through_all_routes_finds(
    routes: list[Route], segments: list[str], *, has_field: bool
) -> None:
    path = "/" + "/".join(segments)
    ranks = {one.name: order for one in routes if (order := rank(one, path)) is not None}
    matching = [one for one in routes if one.name in ranks and (has_field or not one.conditions)]
    name = found(path, "h", "GET", RouteTable(routes), *((b"x-a: 1",) if has_field else ()))
    if not matching:
        assert name == "NoRoute"
    else:
        best = min(matching, key=lambda one: (ranks[one.name], -len(one.conditions)))
        chosen = next(one for one in routes if one.name == name)
        assert ranks[name] == ranks[best.name]
        assert len(chosen.conditions) == len(best.conditions)


# Methods

BY_METHOD = RouteTable(
    [
        route("all", "/api"),
        route("read", "/api/{id}/doc", PATH_TEMPLATE, methods=frozenset({"GET"})),
        route("write", "/api/{name}/doc", PATH_TEMPLATE, methods=frozenset({"PUT"})),
        route("one", "/api/one", EXACT_PATH, methods=frozenset({"GET"})),
        route("beta", "/api/beta", "prefix", header("x-b"), methods=frozenset({"GET"})),
        route("there", "/api", host="a.test", methods=frozenset({"GET"})),
        route("users", "/api/users"),
    ]
)


@each(
    ("method", "target", "host", "fields", "expected"),
    [
        ("PUT", "/api/1/doc", "h", (), "write"),
        ("POST", "/api/1/doc", "h", (), "GET, HEAD, PUT"),
        ("POST", "/api/one", "h", (), "GET, HEAD"),
        ("POST", "/api/one/x", "h", (), "all"),
        ("POST", "/api/beta", "h", (b"x-b: 1",), "GET, HEAD"),
        ("POST", "/api/beta", "h", (), "all"),
        ("POST", "/api/x", "a.test", (), "all"),
        ("POST", "/api/users", "a.test", (), "all"),
    ],
)
def test_the_first_path_that_matches_decides_which_methods_are_allowed(
    method: str, target: str, host: str, fields: tuple[bytes, ...], expected: str
) -> None:
    """Routes of the same path for less specific hosts may add some."""
    name = found(target, host, method, BY_METHOD, *fields)
    if name == "MethodNotAllowed":
        with pytest.raises(MethodNotAllowed) as refused:
            BY_METHOD.find(host, method, target, target.encode(), {b"x-b": [b"1"]} if fields else {})
        name = refused.value.headers["allow"]
    assert name == expected


# Evasion of a cost

COSTLY = RouteTable(
    [
        route("all", "/api"),
        route("export", "/api/export", EXACT_PATH, cost=5),
        route("orders", "/api/users/{id}/orders", PATH_TEMPLATE, cost=5),
        route("hidden", "/api/hidden", host="internal.test", cost=5),
        route("suffix", "/api/hidden", host="*.internal.test", cost=5),
        route("full", "/api/report", "prefix", query("full", exact=b"1"), cost=5),
        route("fast", "/api/report", "prefix", header("x-priority", exact=b"high"), cost=5),
        route("cheap", "/api/report", "prefix", query("preview"), cost=0),
        route("report", "/api/report", cost=2),
    ]
)


def cost_of(raw: str, host: str = "h", fields: Mapping[bytes, Sequence[bytes]] = {}) -> float | type[GatewayError]:
    path = unquote(raw.partition("?")[0])
    try:
        return COSTLY.find(host, "GET", path, raw.encode("latin-1"), fields)[1]
    except GatewayError as error:
        return type(error)


def is_costly(path: str) -> bool:
    """Return whether a server that matches decoded paths, with or without a slash at the end, serves a costly one."""
    return re.fullmatch("/api/export/?|/api/users/[^/]+/orders/?", path) is not None


def by_segments(raw: str) -> bool:
    """Return whether a server that splits the path before it decodes it serves a costly one."""
    segments = [unquote(one) for one in resolved(merged(raw)).rstrip("/").split("/")]
    return segments == ["", "api", "export"] or (
        len(segments) == 5 and segments[:3] == ["", "api", "users"] and bool(segments[3]) and segments[4] == "orders"
    )


ENDS = st.sampled_from(["", "/", ";v=1", "%20", "//", "/.", "%2F", "%3Bx"])
MIDDLE = st.sampled_from(["7", "a%2Fb", "a%5Cb", "a%2fb%2Fc", "..;", "%2e", "7;v", "a%252Fb", "%2F", "x/..%2F7", "."])
NEAR = st.builds("/api/users/{}/orders{}".format, MIDDLE, ENDS) | st.builds("/api/export{}".format, ENDS)


@settings(max_examples=examples(600))
@given(NEAR | ANY)
def test_no_spelling_of_a_path_evades_an_exact_path_or_a_template(raw: str) -> None:
    assume(unquote(raw).startswith("/api"))
    cost = cost_of(raw)
    is_served = by_segments(raw) or any(is_costly(merged(server(raw))) for server in SERVERS.values())
    if is_served and isinstance(cost, int | float):
        assert cost >= 5


@each(
    ("raw", "expected"),
    [
        ("/api/users/7/orders", 5),
        ("/api/users/a%2Fb/orders", BadRequest),
        ("/api/users/a%5cb/orders", BadRequest),
        ("/api/users/a%252Fb/orders", 5),
        ("/api/users/7/orders;v=1", 5),
        ("/api/users/7;v=1/orders", 5),
        ("/api/users/..;/orders", BadRequest),
        ("/api/users/x%2F..%2F7/orders", 5),
        ("/api/export;v=1", 5),
        ("/api/export%2F", BadRequest),
        ("/api/export//", 5),
        ("/api/x/../export", 5),
        ("/api/a%2Fb", 1),
        ("/api/users/7/order", 1),
    ],
)
def test_the_spellings_that_are_known_from_attacks_cost_as_much_or_are_refused(raw: str, expected: object) -> None:
    assert cost_of(raw) == expected


@each(
    ("host", "expected"),
    [
        *((host, 5) for host in ("internal.test", "INTERNAL.test", "internal.test:8080", "internal.test.")),
        *((host, 5) for host in ("internal.TEST.:80", "a.internal.test", "a.b.Internal.test.:1")),
        *((host, BadRequest) for host in ("internal%2Etest", "internal.test..", "a..internal.test")),
        *((host, 1) for host in ("notinternal.test", "internal.test.evil", "[::1]:80", "other.test")),
    ],
)
def test_no_spelling_of_a_host_evades_its_routes(host: str, expected: object) -> None:
    assert cost_of("/api/hidden", host_name({b"host": [host.encode()]})) == expected


@each(
    ("text", "expected"),
    [
        ("", 2),
        ("?full=1", 5),
        ("?%66ull=%31", 5),
        ("?a=b&full=1&c", 5),
        ("?full=1&full=1", 5),
        ("?full=0&full=2", 2),
        ("?preview", 0),
        ("?preview=", 0),
        *((text, BadRequest) for text in ("?full=0&full=1", "?full=1&full=0", "?Full=1", "?full[]=1", "?full[0]=1")),
        *((text, BadRequest) for text in ("?x=1;full=1", "?full=1;x", "?full%00x=1", "?ful%256C=1", "?full=%2531")),
        *((text, BadRequest) for text in ("?+full=1", "?PREVIEW=1", "?x;preview")),
        ("?full=1" + "&x" * MAX_PARAMETERS, BadRequest),
        ("?" + "x&" * MAX_PARAMETERS + "preview", BadRequest),
    ],
)
def test_a_query_that_servers_read_differently_is_refused_where_a_route_depends_on_it(
    text: str, expected: object
) -> None:
    assert cost_of("/api/report" + text) == expected
    assert cost_of("/api/elsewhere" + text) == 1, "nothing there depends on it"


@each(
    ("values", "expected"),
    [
        ((b"high",), 5),
        ((b"High",), 2),
        ((b"low", b"low"), 2),
        ((b"high", b"low"), BadRequest),
        ((b"low", b"high"), BadRequest),
        ((b"high", b"high"), BadRequest),  # joined it is another value
        ((b"high, low",), 2),
    ],
)
def test_a_field_that_servers_read_differently_is_refused_where_a_route_depends_on_it(
    values: tuple[bytes, ...], expected: object
) -> None:
    assert cost_of("/api/report", fields={b"x-priority": values}) == expected


def test_what_is_remembered_of_header_sets_tells_all_apart_that_decides() -> None:
    """Two requests that differ only in host, or in a field with a condition, are not mixed up, in any order."""
    reader = HeaderReader(
        id_header="X-Client-ID", trusted_proxies=(), max_body_bytes=0, route_fields=frozenset({b"x-priority"})
    )

    def facts(*pairs: tuple[bytes, bytes]) -> tuple[str, dict[bytes, list[bytes]]]:
        lines = b"".join(b"%b: %b\r\n" % pair for pair in pairs)
        read = reader.read_lines("192.0.2.1", "http", b"\r\n" + lines, 50, last[0] if last else None)
        assert read is not None
        last[:] = [read]
        return read.facts.host, {name: list(values) for name, values in read.facts.selecting.items()}

    last: list[Any] = []
    cases: list[HeaderList] = [
        [(b"Host", b"a.test")],
        [(b"Host", b"b.test")],
        [(b"Host", b"a.test"), (b"X-Priority", b"high")],
        [(b"Host", b"a.test"), (b"x-priority", b"low")],
        [(b"Host", b"a.test"), (b"X-Priority", b"high"), (b"X-Priority", b"low")],
        [(b"Host", b"a.test"), (b"X-Client-ID", b"c"), (b"X-Priority", b"high")],
        [(b"Host", b"a.test"), (b"X-Client-ID", b"d"), (b"X-Priority", b"low")],
    ]
    for case in cases * 2 + cases[::-1]:
        values = [value for name, value in case if name.lower() == b"x-priority"]
        assert facts(*case) == (case[0][1].decode(), {b"x-priority": values} if values else {})


def test_plain_routes_are_found_by_one_look_up_and_only_paths_near_others_take_longer() -> None:
    table = COSTLY._any
    assert {path for path, routes in table.plain.items() if routes} == {"/api"}
    assert {path for path, routes in table.plain.items() if not routes} == {"/api/export", "/api/users", "/api/report"}


def test_the_paths_that_routes_have_are_proxied_and_no_others() -> None:
    usual = proxied_paths([route("a", "/api/a"), route("b", "/api")])
    more = proxied_paths([route("a", "/v1/a"), route("b", "/shop", EXACT_PATH)])
    every = proxied_paths([route("a", "/{tenant}/a", PATH_TEMPLATE)])
    paths = ["/api", "/api/x", "/apix", "/v1", "/v1/b", "/shop/x", "/v1;x", "/health", "/", "*", "//v1"]
    assert [path for path in paths if usual(path)] == ["/api", "/api/x"]
    assert [path for path in paths if more(path)] == ["/api", "/api/x", "/v1", "/v1/b", "/shop/x"]
    assert [path for path in paths if every(path)] == [path for path in paths if path != "*"]


def test_an_empty_table_and_an_unknown_host_have_no_route() -> None:
    with pytest.raises(NoRoute):
        RouteTable([route("a", "/api", host="a.test")]).find("b.test", "GET", "/api")
