"""Which file may have which route: overlaps between files, and what the main file gives to each of them."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api_gateway.config import load_config
from api_gateway.settings.route_ownership import RequestSpace
from tests.config_kit import UPSTREAM, Write, refused, writer

ORDERS = "upstreams: {orders: http://127.0.0.1:2}\nroutes:\n- {name: orders, path: /api/orders, upstream: orders}\n"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return writer(tmp_path)


def team_of(path: str, **more: str) -> str:
    """Return the file of another team, whose route is in its second line."""
    rest = "".join(f", {name}: {value}" for name, value in more.items())
    return f"upstreams: {{b: http://127.0.0.1:3}}\nroutes: [{{name: b, path: {path}, upstream: b{rest}}}]\n"


def overlapping(index: int, path: str, of: str, at: str, name: str = "orders", owned: str = "") -> str:
    return (
        f"conf.d/b.yaml:2: routes[{index}] (b).path: overlaps '{of}' of the route '{name}' at {at}, got '{path}';"
        " files must not take requests from each other, unless gateway.yaml says whose they are, as in"
        f" include: [{{path: conf.d/b.yaml, owns: [{owned or path}]}}]"
    )


A = "conf.d/a.yaml:3"
B_OWNS = "[{path: conf.d/b.yaml, owns: [/api/orders/refunds]}, conf.d/*.yaml]"
A_OWNS = "[conf.d/b.yaml, {path: conf.d/a.yaml, owns: [/api/orders, Orders.example]}]"
BOTH_OWN = "[{path: conf.d/b.yaml, owns: [/api/orders/refunds]}, {path: conf.d/a.yaml, owns: [/api/orders]}]"
NOT_BELOW = (
    "conf.d/b.yaml:2: routes[0] (b).path: must be below /api/orders/refunds, which gateway.yaml:1 gives the file, got"
    " '/api/orders/late'"
)


def of_another(owned: str, path: str) -> str:
    return f"conf.d/b.yaml:2: routes[0] (b).path: {owned} belongs to conf.d/a.yaml, by gateway.yaml:1, got '{path}'"


@pytest.mark.parametrize(
    ("include", "team", "lines"),
    [
        ("conf.d/*.yaml", team_of("/api/order"), []),
        (
            "conf.d/*.yaml",
            team_of("/api/orders/refunds"),
            [overlapping(1, "/api/orders/refunds", "/api/orders", A)],
        ),
        (
            "conf.d/*.yaml",
            team_of("/api/orders", match="{path: exact}"),
            [overlapping(1, "/api/orders", "/api/orders", A)],
        ),
        (
            "conf.d/*.yaml",
            team_of("/api/orders/x", host="a.example"),
            [overlapping(1, "a.example/api/orders/x", "/api/orders", A)],
        ),
        (
            "conf.d/*.yaml",
            team_of("'/api/{any}/x'", match="{path: template}"),
            [
                overlapping(1, "/api/{}/x", "/api/orders", A, owned="/api"),
                overlapping(1, "/api/{}/x", "/api/users", "gateway.yaml:2", "users", owned="/api"),
            ],
        ),
        (B_OWNS, team_of("/api/orders/refunds/late"), []),
        (B_OWNS, team_of("/api/orders/late"), [NOT_BELOW]),
        (A_OWNS, team_of("/api/orders/refunds"), [of_another("/api/orders", "/api/orders/refunds")]),
        (A_OWNS, team_of("/api/x", host="orders.example"), [of_another("orders.example/", "orders.example/api/x")]),
        (BOTH_OWN, team_of("/api/orders/refunds"), []),
        (A_OWNS, team_of("/api"), []),  # the main file says what of it is that of a.yaml
    ],
)
def test_no_included_file_takes_requests_from_another_unless_the_main_file_says_so(
    include: str, team: str, lines: list[str], write: Write
) -> None:
    path = write(f"include: {include}\n{UPSTREAM}")
    write(ORDERS, "conf.d/a.yaml")
    write(team, "conf.d/b.yaml")
    if lines:
        assert refused(path) == lines
    else:
        assert len(load_config(path).routes) == 3


@pytest.mark.parametrize(
    ("main", "include", "is_allowed"),
    [
        ("/api", "conf.d/*.yaml", False),  # would take the requests below /api/orders from the main file
        ("/api", "[{path: conf.d/*.yaml, owns: [/api/orders]}]", True),
        ("/api/orders/internal", "conf.d/*.yaml", True),  # the main file takes them
        ("/api/orders", "conf.d/*.yaml", False),
    ],
)
def test_the_main_file_decides_what_is_its_own(
    main: str,
    include: str,
    is_allowed: bool,  # noqa: FBT001 - a case of the table
    write: Write,
) -> None:
    route = f"{{name: all, path: {main}, upstream: users, methods: [PUT]}}"
    path = write(f"include: {include}\n{UPSTREAM}routes: [{route}]\n")
    write(ORDERS.replace("upstream: orders}", "upstream: orders, methods: [GET]}"), "conf.d/a.yaml")
    if is_allowed:
        assert {route.name for route in load_config(path).routes} == {"all", "orders"}
    else:
        (line,) = refused(path)
        assert f"{A}: routes[1] (orders).path: overlaps '{main}' of the route 'all' at gateway.yaml:3, got" in line


def test_the_route_of_an_upstream_without_routes_belongs_to_its_file_too(write: Write) -> None:
    path = write(f"include: {{path: conf.d/*.yaml, owns: [/api/orders]}}\n{UPSTREAM}")
    write("upstreams:\n  stock: http://127.0.0.1:2\n", "conf.d/a.yaml")
    (line,) = refused(path)
    assert line.startswith("conf.d/a.yaml:2: routes[1] (stock).path: must be below /api/orders, which gateway.yaml:1")


@pytest.mark.parametrize(
    ("owns", "message"),
    [
        ("[/api/*]", "include[0].owns[0]: a '*' is compared literally"),
        ("['http://a']", "include[0].owns[0]: "),
        ("/api", "include[0].owns: "),
        ("[1]", "include[0].owns[0]: "),
    ],
)
def test_what_a_file_owns_is_a_path_or_a_host(owns: str, message: str, write: Write) -> None:
    write("{}", "x/a.yaml")
    assert message in "".join(refused(write(f"include: [{{path: 'x/*.yaml', owns: {owns}}}]\n{UPSTREAM}")))


def test_routes_of_the_environment_belong_to_no_file(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(f"include: conf.d/*.yaml\n{UPSTREAM}")
    write(ORDERS, "conf.d/a.yaml")
    write(team_of("/api/orders/x"), "conf.d/b.yaml")
    monkeypatch.setenv("GATEWAY_ROUTES", '[{"name": "all", "path": "/api", "upstream": "b"}]')
    assert [route.name for route in load_config(path).routes] == ["all"]


SEGMENTS = st.lists(st.sampled_from(["a", "b", "{}"]), max_size=3).map(tuple)
SPACES = st.builds(
    RequestSpace, st.sampled_from(["", "x.test", "*.test", "*.x.test", "y.x.test"]), SEGMENTS, st.booleans()
)
REQUESTS = [
    (host, path)
    for host in ("x.test", "y.x.test", "z.y.x.test", "other")
    for size in range(5)
    for path in itertools.product(("a", "b", "c"), repeat=size)
]


def requests_in(space: RequestSpace) -> set[tuple[str, tuple[str, ...]]]:
    """Return those of some requests that are in a space, by its definition."""
    return {
        (host, path)
        for host, path in REQUESTS
        if (space.host in ("", host) or (space.host.startswith("*") and host.endswith(space.host[1:])))
        and (len(path) == len(space.segments) or (space.is_prefix and len(path) > len(space.segments)))
        and all(one in ("{}", other) for one, other in zip(space.segments, path, strict=False))
    }


@given(SPACES, SPACES)
def test_spaces_overlap_if_a_request_is_in_both_and_cover_if_all_are(one: RequestSpace, other: RequestSpace) -> None:
    assert one.overlaps(other) is bool(requests_in(one) & requests_in(other)) is other.overlaps(one)
    assert one.covers(other) is (requests_in(other) <= requests_in(one))


def test_routes_of_many_files_are_compared_with_few_others(write: Write) -> None:
    """By the beginnings of their paths; the test counts comparisons, which would be 72,000."""
    path = write(f"include: conf.d/*.yaml\n{UPSTREAM}")
    for number in range(10):
        routes = [f"- {{name: r{number}-{one}, path: /api/t{number}/{one}, upstream: u{number}}}" for one in range(40)]
        text = f"upstreams: {{u{number}: http://127.0.0.1:1}}\nroutes:\n" + "\n".join(routes)
        write(text, f"conf.d/{number}.yaml")
    counted = 0
    overlaps = RequestSpace.overlaps

    def counting(self: Any, other: Any) -> bool:
        nonlocal counted
        counted += 1
        return overlaps(self, other)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RequestSpace, "overlaps", counting)
        assert len(load_config(path).routes) == 401
    assert counted < 1000
