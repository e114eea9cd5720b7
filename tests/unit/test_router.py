"""Parts of the router without a socket: route table, costs and paths."""

import contextlib
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from api_gateway.clients.api_keys import new_key
from api_gateway.errors import BadRequest, MethodNotAllowed, NoRoute
from api_gateway.http1.request_paths import is_below, matching_path
from api_gateway.models import Exchange
from api_gateway.proxy.candidate_limits import CandidateCost
from api_gateway.proxy.route_table import CostRule, Route, RouteTable, upstream_target
from tests.cases import each


def route(path: str, **options: Any) -> Route:
    options.setdefault("name", path)
    return Route(path=path, upstream="up", **options)


def exchange(method: str = "GET", path: str = "/api/x") -> Exchange:
    return Exchange(id="1", method=method, path=path, client_address="192.0.2.1", started=0.0)


# Matching


@each(
    ("path", "expected"),
    [
        ("/api", "/api"),
        ("/api/", "/api"),
        ("/api/other", "/api"),
        ("/api/users", "/api/users"),
        ("/api/users/", "/api/users"),
        ("/api/users/7", "/api/users"),
        ("/api/usersx", "/api"),
        ("/api/user", "/api"),
        ("/api/users/7/orders", "/api/users/7/orders"),
        ("/api/users/7/orders/9", "/api/users/7/orders"),
        ("/api/users/8/orders", "/api/users"),
        ("/api/USERS", "/api"),
    ],
)
def test_the_longest_prefix_of_whole_segments_wins(path: str, expected: str) -> None:
    table = RouteTable([route("/api"), route("/api/users"), route("/api/users/7/orders")])
    assert table.find("any", "GET", path)[0].path == expected


@each("path", ["/", "", "/ap", "/apix", "/metrics", "/x/api/users"])
def test_a_path_below_no_route_has_none(path: str) -> None:
    with pytest.raises(NoRoute):
        RouteTable([route("/api"), route("/api/users")]).find("any", "GET", path)


@each(
    ("path", "shown"),
    [
        ("/nowhere", "'/nowhere'"),
        ("/a\u202e\u2066b", r"'/a\u202e\u2066b'"),
        (f"/{'x' * 500}", f"'/{'x' * 99}'"),
        (f"/{'x' * 80}{new_key(bytes(32))}", f"'/{'x' * 80}agw_...'"),
    ],
)
def test_a_refusal_names_the_path_in_a_form_that_can_do_no_harm(path: str, shown: str) -> None:
    table = RouteTable([route(path, methods=frozenset({"POST"}))])
    with pytest.raises(MethodNotAllowed) as refused:
        table.find("", "GET", path)
    assert refused.value.detail == f"{shown} allows POST, not GET."
    with pytest.raises(NoRoute) as absent:
        RouteTable([route("/api")]).find("", "GET", path)
    assert absent.value.detail == f"No route matches {shown}."


def test_an_empty_table_has_no_route() -> None:
    with pytest.raises(NoRoute):
        RouteTable([]).find("any", "GET", "/api")


SEGMENTS = st.lists(st.sampled_from(["a", "b", "ab", ""]), max_size=5)
PATHS = st.builds(lambda segments: "/" + "/".join(segments), SEGMENTS)
PREFIXES = st.builds(lambda segments: "/" + "/".join(filter(None, segments)), SEGMENTS).filter(
    lambda path: path != "/"
)


@given(st.lists(PREFIXES, unique=True, max_size=6), PATHS)
@example(["/a", "/a/b"], "/a//b")
def test_the_table_finds_what_a_search_through_all_routes_finds(prefixes: list[str], path: str) -> None:
    clean = matching_path(path)
    matching = [prefix for prefix in prefixes if clean == prefix or clean.startswith(prefix + "/")]
    table = RouteTable([route(prefix) for prefix in prefixes])
    try:
        found = table.find("any", "GET", path)[0].path
    except NoRoute:
        assert not matching
    else:
        assert found == max(matching, key=len)


@each("is_reversed", [False, True])
@each(("host", "expected"), [("a.test", "for a"), ("b.test", "for b"), ("c.test", "for any")])
def test_a_route_for_the_host_comes_before_one_for_any(host: str, expected: str, *, is_reversed: bool) -> None:
    """In whatever order they are configured."""
    routes = [
        route("/api", name="for any"),
        route("/api", name="for a", host="a.test"),
        route("/api", name="for b", host="b.test"),
    ]
    table = RouteTable(routes[::-1] if is_reversed else routes)
    assert table.find(host, "GET", "/api/x")[0].name == expected


def test_a_longer_prefix_for_another_host_is_passed_over() -> None:
    table = RouteTable([route("/api"), route("/api/users", host="a.test")])
    assert table.find("b.test", "GET", "/api/users")[0].path == "/api"
    assert table.find("a.test", "GET", "/api/users")[0].path == "/api/users"


def test_routes_share_a_path_by_method() -> None:
    table = RouteTable(
        [
            route("/api", name="read", methods=frozenset({"GET", "HEAD"})),
            route("/api", name="write", methods=frozenset({"POST"})),
        ]
    )
    assert [table.find("", method, "/api")[0].name for method in ("GET", "HEAD", "POST")] == ["read", "read", "write"]


def test_a_method_no_route_takes_is_refused_with_those_taken() -> None:
    """By the longest prefix; a shorter one that takes the method is another resource."""
    table = RouteTable(
        [
            route("/api"),
            route("/api/x", name="read", methods=frozenset({"GET", "HEAD"})),
            route("/api/x", name="write", methods=frozenset({"POST"})),
        ]
    )
    with pytest.raises(MethodNotAllowed) as refused:
        table.find("", "DELETE", "/api/x/1")
    assert refused.value.headers == {"allow": "GET, HEAD, POST"}


def test_a_method_the_hosts_route_does_not_take_may_be_taken_by_the_one_for_any() -> None:
    table = RouteTable(
        [route("/api", name="host", host="a.test", methods=frozenset({"GET"})), route("/api", name="any")]
    )
    assert table.find("a.test", "POST", "/api")[0].name == "any"


@each("path", ["/" * 30_000, "/api" + "/" * 30_000, "/api" + "/a" * 15_000, "/api" + "/.." * 10_000])
def test_a_path_of_very_many_segments_is_matched_quickly(path: str) -> None:
    """In milliseconds: no more segments are looked at than the deepest route has."""
    table = RouteTable([route("/api"), route("/api/a/b/c")])
    rule = CostRule(None, "/api/a/b", 2)

    def match() -> float:
        begun = time.perf_counter()
        clean = matching_path(path)
        with contextlib.suppress(NoRoute):
            table.find("", "GET", clean)
        rule.matches("GET", clean)
        return time.perf_counter() - begun

    assert min(match() for _ in range(5)) < 0.02


# Costs


@each(
    ("method", "path", "cost"),
    [
        ("GET", "/api/x", 1),
        ("POST", "/api/x/export", 5),
        ("POST", "/api/x/export/all", 5),
        ("POST", "/api/x/exports", 3),
        ("GET", "/api/x/export", 1),
        ("GET", "/api/x/free", 0),
        ("POST", "/api/x/free", 3),
    ],
)
def test_the_first_rule_that_matches_sets_the_cost(method: str, path: str, cost: float) -> None:
    rules = (
        CostRule(frozenset({"POST"}), "/api/x/export", 5),
        CostRule(frozenset({"POST"}), None, 3),
        CostRule(None, "/api/x/free", 0),
    )
    assert route("/api/x", costs=rules).cost_of(method, path) == cost


@each(
    ("path", "prefix", "expected"),
    [
        ("/a", "/a", True),
        ("/a/b", "/a", True),
        ("/a/", "/a", True),
        ("/ab", "/a", False),
        ("/", "/a", False),
        ("/a", "/", True),
        ("/", "/", True),
    ],
)
def test_below_means_by_whole_segments(path: str, prefix: str, *, expected: bool) -> None:
    assert is_below(path, prefix) is expected


@each(
    ("path", "expected"),
    [
        ("/api/x", "/api/x"),
        ("/api/x/", "/api/x/"),
        ("/api/a.b/c..d", "/api/a.b/c..d"),
        ("/api/.hidden", "/api/.hidden"),
        ("/api/...", "/api/"),
        ("/api/x;v=1", "/api/x"),
        ("/api/x;v=1/y;w", "/api/x/y"),
        (r"/api\x", "/api/x"),
        ("/api/x. ./y..", "/api/x/y"),
        ("/api/a b", "/api/a b"),
        ("/api/100%", "/api/100%"),
        ("/api/./x", "/api/x"),
        ("/api/x/.", "/api/x"),
        ("/api/a/../x", "/api/x"),
        ("/api/a/..", "/api"),
        ("/api//x", "/api/x"),
        ("//api/x", "/api/x"),
        ("///api///x", "/api/x"),
        ("/api/../metrics", "/metrics"),
        ("/../../api", "/api"),
        ("/..", "/"),
    ],
)
def test_dot_segments_and_repeated_slashes_are_resolved(path: str, expected: str) -> None:
    assert matching_path(path) == expected


@given(st.builds(lambda parts: "/" + "".join(parts), st.lists(st.sampled_from(["/", ".", "..", "a", "/../", "//"]))))
def test_a_resolved_path_has_nothing_left_to_resolve(path: str) -> None:
    resolved = matching_path(path)
    assert resolved.startswith("/")
    assert "//" not in resolved
    assert not {".", ".."} & set(resolved.split("/"))
    assert matching_path(resolved) == resolved


@each(
    "path",
    [
        "/api/x/export",
        "/api/x/free/../export",
        "/api/x//export",
        "/api/x/./export",
        "/api/x/free/..//./export/",
        "//api/x/export",
        "/api/x/free/../../x/export/all",
    ],
)
def test_no_spelling_of_a_path_reaches_a_cheaper_rule(path: str) -> None:
    rules = (CostRule(None, "/api/x/free", 0), CostRule(None, "/api/x/export", 5))
    table = RouteTable([route("/api"), route("/api/x", costs=rules)])
    assert table.find("", "GET", path)[1] == 5


def test_a_candidate_cost_is_that_of_the_dearest_reading() -> None:
    rules = (CostRule(None, "/api/x/free", 0, 0.5), CostRule(None, "/api/x/export", 5, 8))
    one = route("/api/x", costs=rules)
    assert CandidateCost(one).of("GET", "/api/x/free") == 0.5
    assert CandidateCost(one).of("GET", "/api/x/y") is None
    for path in ("/api/x/export", "/api/x/export;v=1", "/api/x/free/../export", "/api/x/export//..", r"/api/x\export"):
        assert CandidateCost(one).of("GET", path) == 8, path
    cheaper = route("/api/x", cost=3, costs=(CostRule(None, "/api/x/free", 0, 0.5),))
    assert CandidateCost(cheaper).of("GET", "/api/x/free;v=1") == 3, "a literal reading costs what the route costs"


# The target for the upstream


@each(
    ("prefix", "target", "expected"),
    [
        ("", b"/api/a%2Fb/../c?x=%zz", b"/api/a%2Fb/../c?x=%zz"),
        ("", b"/api", b"/api"),
        ("/api", b"/api/x", b"/x"),
        ("/api", b"/api/x?", b"/x?"),
        ("/api", b"/api/x?q", b"/x?q"),
        ("/api", b"/api?q", b"/?q"),
        ("/api", b"/api/", b"/"),
        ("/api", b"/api//x.test/y?a=//b", b"/x.test/y?a=//b"),
        ("/api", b"/api///", b"/"),
        ("/api/x", b"/api/x/api/x", b"/api/x"),
    ],
)
def test_the_target_is_path_and_query_as_sent_less_the_prefix(prefix: str, target: bytes, expected: bytes) -> None:
    assert upstream_target(route("/api", strip_prefix=prefix), target) == expected


@each("path", [b"/%61pi/x", b"//api/x", b"/apix", b"/x/../api"])
def test_a_prefix_that_is_not_there_letter_by_letter_is_not_taken_off(path: bytes) -> None:
    with pytest.raises(BadRequest):
        upstream_target(route("/api", strip_prefix="/api"), path)
