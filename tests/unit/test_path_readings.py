"""No spelling of a path evades its cost, its method restriction or its host, whatever server reads it.

Each function in `SERVERS` is a model of how a server normalises the path of a request before it dispatches it.
"""

import re
import time
from collections.abc import Callable
from urllib.parse import quote, unquote

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from api_gateway.errors import BadRequest, GatewayError, MethodNotAllowed, NoRoute
from api_gateway.http1.methods import with_head
from api_gateway.http1.request_paths import MAX_READINGS, is_below, is_unusual, matching_path, readings
from api_gateway.middleware import is_proxied
from api_gateway.proxy.path_table import EXACT_PATH
from api_gateway.proxy.route_table import CostRule, Route, RouteTable
from tests.cases import each
from tests.examples import examples

COSTLY = "/api/orders/export"
TABLE = RouteTable(
    [
        Route("all", "/api", "up"),
        Route("orders", "/api/orders", "up", costs=(CostRule(None, "/api/orders/free", 0), CostRule(None, COSTLY, 5))),
        Route("read", "/api/read", "up", methods=frozenset({"GET"})),
        Route("internal", "/api/internal", "up", host="internal.test", cost=7),
    ]
)


# How servers normalise


def merged(path: str) -> str:
    return re.sub("/+", "/", path)


def resolved(path: str) -> str:
    """RFC 3986 section 5.2.4: an empty segment counts."""
    kept: list[str] = []
    for segment in path.split("/")[1:]:
        if segment == "..":
            kept = kept[:-1]
        elif segment != ".":
            kept.append(segment)
    return "/" + "/".join(kept)


def without_parameters(path: str) -> str:
    return re.sub(";[^/]*", "", path)


def windows(path: str) -> str:
    """Backslashes are slashes; dots and blanks at the end of a segment do not count."""
    segments = path.replace("\\", "/").split("/")
    return "/".join(one if one in (".", "..") else one.rstrip(". ") for one in segments)


def matched(path: str) -> str:
    found = re.match("(.*)$", path)
    return path if found is None else found[1]


def upto_nul(path: str) -> str:
    return path.partition("\0")[0]


SERVERS: dict[str, Callable[[str], str]] = {
    "nginx": lambda raw: resolved(merged(unquote(raw))),
    "nginx, merge_slashes off": lambda raw: resolved(unquote(raw)),
    "nginx in front of Tomcat": lambda raw: merged(without_parameters(resolved(merged(unquote(raw))))),
    "Tomcat": lambda raw: resolved(merged(unquote(without_parameters(raw)))),
    "Tomcat, backslash allowed": lambda raw: resolved(merged(unquote(without_parameters(raw)).replace("\\", "/"))),
    "Jetty": lambda raw: unquote(resolved(without_parameters(raw))),
    "Jetty, compact": lambda raw: unquote(resolved(merged(without_parameters(raw)))),
    "Jetty, decoding first": lambda raw: resolved(without_parameters(unquote(raw))),
    "IIS": lambda raw: merged(windows(resolved(merged(unquote(raw).replace("\\", "/"))))),
    "IIS, decoding twice": lambda raw: windows(resolved(merged(windows(unquote(unquote(raw)))))),
    "Go, path.Clean": lambda raw: resolved(merged(unquote(raw))),
    "Go, URL.EscapedPath": lambda raw: unquote(resolved(merged(raw))),
    "Express": lambda raw: raw,
    "Express behind the URL parser": lambda raw: resolved(re.sub("(?i)%2e", ".", raw.replace("\\", "/"))),
    "WSGI": unquote,
    "WSGI, merging": lambda raw: merged(unquote(raw)),
    "WSGI behind a rewriting proxy": lambda raw: re.split("[?#]", unquote(unquote(raw)))[0],
    "C strings": lambda raw: resolved(merged(upto_nul(unquote(raw)))),
    "Express, ignoring letter case": lambda raw: raw.lower(),
    "IIS, ignoring letter case": lambda raw: merged(windows(resolved(unquote(raw).replace("\\", "/")))).lower(),
    "Starlette, whose $ matches before a line break at the end": lambda raw: matched(unquote(raw)),
    "Rails, whose $ matches before each line break": lambda raw: unquote(raw).partition("\n")[0],
    "Java, with $ and trim": lambda raw: re.sub("(\r\n|[\n\r\x85\u2028\u2029])\\Z", "", unquote(raw)).strip(),
    "decoding thrice": lambda raw: resolved(merged(unquote(unquote(unquote(raw))))),
}


def cost_of(raw: str, method: str = "GET", host: str = "h") -> float | type[GatewayError]:
    """Return the cost of a request, or the error that refuses it."""
    try:
        return TABLE.find(host, method, unquote(raw), raw.encode("latin-1") + b"?query=..;%00")[1]
    except GatewayError as error:
        return type(error)


# Spellings

PIECES = [
    *("orders", "export", "free", "read", "x", "api"),
    *("/", "/", "/", "//", "/./", "/../", "/..", "..", ".", "\\", "%5C", "%5c", "%2F", "%2f", "%252F", "%255C"),
    *(";", ";v=1", "%3B", "%3Bv", "%253B", "..;", "..%3B", "..\\", "%2e", "%2E%2e", "%252e%252e", "%2e%2e%2f"),
    *("%0a", "%0D", "%09", "%250a", "%7f", "%c2%85", "%E2%80%A8", "EXPORT", "Orders", "%45xport", "%4frders"),
    *("%20", "%2520", "...", ". ", "%00", "%2500", "%3F", "%23", "%253F", "%65xport", "%6frders", "%2565xport"),
]
ANY = st.lists(st.sampled_from(PIECES), max_size=8).map(lambda pieces: "/api" + "".join(pieces).replace(" ", "%20"))
JOINTS = [
    *("/", "/", "/", "//", "/./", "/x/../", "/x//..//", "//../orders/", "\\", "%5C", "%2F", "/%2e/", "/x%2f../"),
    *(";v/", "%3Bv/", "./", "%20/", "/;/", "/.../", "/..;/orders/", "/x/%2e%2e/", "/x/%252e%252e/", "%252F"),
]
ENDS = [
    "",
    "",
    "/",
    ";v=1",
    "%3Bv",
    "%20",
    ".",
    "..",
    "//..",
    "/x/..",
    "/./",
    "%2F..",
    "/%2e%2e%2f",
    "%00",
    "%3Fx",
    "%5C",
    "%0a",
    "%0A%0d",
    "%250a",
    "%09",
    "%c2%85",
]


def escape(word: str, at: int, times: int) -> str:
    """Percent-encode one letter of a word, several times over."""
    letter = word[at % len(word)]
    escaped = f"%{ord(letter):02x}" if times else letter
    for _ in range(times - 1):
        escaped = quote(escaped)
    at %= len(word)
    return word[:at] + escaped + word[at + 1 :]


WORDS = (
    st.builds(escape, st.sampled_from(["orders", "Orders"]), st.integers(0, 9), st.integers(0, 3)),
    st.builds(escape, st.sampled_from(["export", "EXPORT", "exporT"]), st.integers(0, 9), st.integers(0, 3)),
)
NEAR = st.builds(
    lambda first, orders, second, export, end: f"/api{first}{orders}{second}{export}{end}",
    st.sampled_from(JOINTS).filter(lambda joint: joint.startswith("/")),
    WORDS[0],
    st.sampled_from(JOINTS),
    WORDS[1],
    st.sampled_from(ENDS),
)
NAMED = [
    "/api/orders/export;v=1",
    "/api/orders/x/..;/export",
    "/api/orders/export%3Bv",
    "/api/orders\\export",
    "/api/orders%5Cexport",
    "/api/orders/export%00",
    "/api/orders/export%00.html",
    "/api/orders/export%20",
    "/api/orders/export.",
    "/api/orders/export//..",
    "/api/orders//../export",
    "/api/orders/x%2F../export",
    "/api/orders/export;x%2F..",
    "/api/orders/export/../x",
    "/api/orders/%2565xport",
    "/api/x/%252e%252e/orders/export",
    "/api/orders/.../export",
    "/api/orders/export%3Fx",
    "/api/x%5C..%5Corders/export",
    "/api/orders/free/../export;x",
    "/api/orders/export%0a",
    "/api/orders/export%0A",
    "/api/orders/export%0d%0a",
    "/api/orders/export%0ax",
    "/api/orders/export%09",
    "/api/orders/export%E2%80%A9",
    "/api/orders/EXPORT",
    "/api/Orders/export/1",
    "/api/orders/e%58port",
    "/api/ORDERS/x/../EXPORT.",
]


@settings(max_examples=examples(500))
@given(ANY | NEAR)
def test_a_path_that_some_server_takes_for_the_costly_one_costs_as_much_or_is_refused(raw: str) -> None:
    assume(is_proxied(unquote(raw)))
    found = cost_of(raw)
    for name, server in SERVERS.items():
        if is_below(merged(server(raw)), COSTLY):
            assert not isinstance(found, float | int) or found >= 5, f"{name} serves {server(raw)!r}"


@settings(max_examples=examples(500))
@given(ANY | NEAR, st.sampled_from(list(SERVERS)), st.sampled_from(list(SERVERS)))
def test_nor_is_it_cheaper_behind_a_chain_of_servers(raw: str, first: str, second: str) -> None:
    """The second server gets what the first has made of the path."""
    assume(is_proxied(unquote(raw)))
    passed = SERVERS[second](SERVERS[first](raw))
    found = cost_of(raw)
    if is_below(merged(passed), COSTLY):
        assert not isinstance(found, float | int) or found >= 5, passed


@each("raw", NAMED)
def test_the_spellings_that_are_known_from_attacks_cost_as_much_or_are_refused(raw: str) -> None:
    assert any(is_below(merged(server(raw)), COSTLY) for server in SERVERS.values()), "no server is deceived"
    assert cost_of(raw) in (5, BadRequest)


@each(
    "raw",
    [
        *("/api/x/..;/orders", "/api/x/..%3B/orders", "/api/x/..%253B/orders", "/api/x/.;/orders", "/api/x/..;v"),
        *("/api/x\\..\\orders", "/api/x%5C../orders", "/api/x/..%5Corders", "/api/x%5C..", "/api/x/%2e%2e%5C"),
        *("/api/%0a", "/api/x%0Ay", "/api/x%1b", "/api/x%7F", "/api/x%c2%85", "/api/x/%250a/y", "/api/%0d/x"),
        *("/api/%00", "/api/orders%00x", "/api/orders/%2500", "/api/x/..%20/orders", "/api/x/.%20"),
    ],
)
def test_an_ambiguous_path_is_refused_with_400(raw: str) -> None:
    assert cost_of(raw) is BadRequest


@each(
    ("raw", "expected"),
    [
        ("/api/orders/1", 1),
        ("/api/orders/free", 0),
        ("/api/orders/free/", 0),
        ("/api/orders/fr%65e", 0),
        ("/api/orders/free%20lunch", 1),
        ("/api/orders/free;v=1", 1),  # literally it is not the free path
        ("/api/orders/100%25", 1),
        ("/api/orders/caf%C3%A9/a%2Fb", 1),
        ("/api/orders/file.json", 1),
        ("/api/orders/.well-known/x", 1),
        ("/api/orders/j%40example.com", 1),
        ("/api/x/../orders/free", 1),
        ("/api/orders/FREE", 1),  # with letter case it is not the free path
        ("/api/orders/Ab1", 1),
        ("/api/x/Orders", 1),
    ],
)
def test_paths_that_only_look_unusual_keep_their_cost(raw: str, expected: float) -> None:
    assert cost_of(raw) == expected


@each("raw", ["/api/read;v", "/api/x/../read", "/api/read/../x", "/api/read%2Fx", "/api/read//..", "/api//read"])
def test_no_spelling_avoids_a_route_that_is_restricted_to_some_methods(raw: str) -> None:
    assert cost_of(raw, "POST") is MethodNotAllowed
    assert cost_of(raw) == 1


@each("raw", ["/api/internal", "/api/internal;v", "/api/internal/../x", "/api/internal//..", "/api/%69nternal%20"])
def test_the_readings_are_compared_for_the_host_of_the_request(raw: str) -> None:
    assert cost_of(raw, host="internal.test") == 7
    assert cost_of(raw, host="other.test") == 1


@each(
    ("raw", "names"),
    [
        ("/api/denied/keys", ["all", "denied"]),  # the route has an upper-case letter
        ("/api/denied/KEYS/", ["all", "denied"]),
        ("/api/x//../denied/Keys", ["denied", "all"]),
        ("/api/denied/Keys//..", ["all", "denied"]),
        ("/api/denied/Keys", ["denied"]),
        ("/api/denied/x", ["all"]),
        ("/api/Orders/Free", ["all", "orders"]),
        ("/api/orders/Free", ["orders"]),
    ],
)
def test_the_routes_of_other_readings_are_known_as_their_rules_of_access_apply(raw: str, names: list[str]) -> None:
    exact = Route("denied", "/api/denied/Keys", "up", match=EXACT_PATH)
    table = RouteTable([*TABLE, exact])
    for _ in range(2):
        route, _ = table.find("h", "GET", unquote(raw), raw.encode())
        assert [route.name, *(one.name for one in route.others)] == names
    assert table.read_as("h", "GET", unquote(raw), raw.encode()) | {names[0]} == set(names)


@each(
    ("method", "path", "expected"),
    [
        ("HEAD", "/api/read", 1),  # has the route of GET
        ("POST", "/api/READ", MethodNotAllowed),
        ("HEAD", "/api/both", 2),
        ("HEAD", "/api/named", 4),
        ("GET", "/api/named", 3),
        ("HEAD", "/api/post", MethodNotAllowed),
    ],
)
def test_head_has_the_route_of_get_unless_one_names_it(method: str, path: str, expected: object) -> None:
    """Servers run the handlers of GET for HEAD."""
    cases = [
        ("both", {"GET", "POST"}, 2.0),
        ("named", {"GET"}, 3.0),
        ("named", {"HEAD"}, 4.0),
        ("post", {"POST"}, 5.0),
        ("read", {"GET"}, 1.0),
    ]
    routes = [
        Route(f"{name}{cost:g}", f"/api/{name}", "up", methods=frozenset(one), cost=cost) for name, one, cost in cases
    ]
    table = RouteTable([*routes, Route("all", "/api", "up")])
    try:
        found: object = table.find("h", method, path, path.encode())[1]
    except MethodNotAllowed:
        found = MethodNotAllowed
    assert found == expected


def test_a_rule_for_get_is_one_for_head() -> None:
    assert sorted(with_head(["GET", "POST"]) or ()) == ["GET", "HEAD", "POST"]
    assert sorted(with_head(["POST"]) or ()) == ["POST"]
    assert with_head(None) is with_head([]) is None


@each("raw", ["/api/../secret", "/api/x/%252e%252e/%252e%252e/secret", "/api/..%2Fsecret", "/api/x//../../../s"])
def test_a_reading_that_leaves_all_routes_has_none(raw: str) -> None:
    assert cost_of(raw) is NoRoute


PLAIN = st.lists(st.text("abz-_.~@:", min_size=1, max_size=4), min_size=1, max_size=4).map(
    lambda found: "/" + "/".join(found)
)


@given(PLAIN)
@example("/api/.hidden/a.b")
def test_a_plain_path_has_one_reading(path: str) -> None:
    if is_unusual(path):
        assert any(one.endswith(".") for one in path.split("/"))
    else:
        assert readings(path) == [path] == [matching_path(path)]


@given(ANY | NEAR)
def test_the_form_for_matching_is_final_and_each_reading_is_an_absolute_path(raw: str) -> None:
    path = matching_path(unquote(raw))
    assert matching_path(path) == path
    try:
        found = readings(raw)
    except ValueError:
        return
    assert len(found) <= MAX_READINGS
    assert all(one.startswith("/") for one in found)
    assert unquote(raw) in found


@each(
    "raw",
    [
        *(
            "/api" + "/.." * 10_000,
            "/api" + "/a%2F..;x//" * 3_000,
            "/api" + "%25" * 20_000,
            "/api/" + "%2525" * 12_000,
        ),
        *("/api/" + "." * 60_000, "/api/" + "./" * 30_000, "/api/" + ".%20" * 15_000 + "x", "/api/" + ";" * 60_000),
        "/api/" + "%5C" * 20_000,
    ],
)
def test_a_long_path_is_read_in_little_time(raw: str) -> None:
    """In linear time: the number and total length of readings is limited."""
    path = unquote(raw)

    def read() -> float:
        begun = time.process_time()
        cost_of(raw)
        matching_path(path)
        return time.process_time() - begun

    assert min(read() for _ in range(3)) < 0.05
