"""URLs in responses of a route that strips a prefix: what leads past the gateway is rewritten, the rest is left."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from api_gateway.assembly.routes import route_of
from api_gateway.proxy.url_rewriting import Authorities, UrlRewriter
from api_gateway.settings.routes import RouteSection
from tests.cases import each

REWRITER = UrlRewriter(b"/api", cookies=True)
AUTHORITY = b"10.0.0.1:8080"
TARGET = Authorities((AUTHORITY,))


@each(
    ("url", "expected"),
    [
        ("/users/7", "/api/users/7"),
        ("/", "/api/"),
        ("/apix", "/api/apix"),
        ("/users?next=/a#b", "/api/users?next=/a#b"),
        ("http://10.0.0.1:8080/users/7", "/api/users/7"),
        ("HTTP://10.0.0.1:8080", "/api/"),
        ("http://10.0.0.1:8080?a", "/api/?a"),
        ("//10.0.0.1:8080/x", "/api/x"),
        ("http://user@10.0.0.1:8080/x", "/api/x"),
        ("http://10.0.0.1:8080/api/x", "/api/x"),
    ],
)
def test_a_url_that_leads_past_the_gateway_becomes_a_path_below_the_prefix(url: str, expected: str) -> None:
    assert REWRITER.url(url.encode(), TARGET).decode() == expected


@each(
    "url",
    [
        *("/api", "/api/users", "/api?a", "/api#a", "users/8", "../x", "?page=2", "#top", ""),
        *("https://example.com/x", "http://10.0.0.1/x", "http://10.0.0.1:8081/x", "//cdn.example.com/x"),
        *("mailto:a@example.com", "http://10.0.0.1:8080.example.com/x"),
    ],
)
def test_any_other_reference_stays_as_it_is(url: str) -> None:
    assert REWRITER.url(url.encode(), TARGET).decode() == url


@each(
    ("url", "authority"),
    [("http://up/x", "up:80"), ("http://up:80/x", "up"), ("https://up:443/x", "UP"), ("https://UP/x", "up:443")],
)
def test_a_default_port_may_be_missing(url: str, authority: str) -> None:
    assert REWRITER.url(url.encode(), Authorities((authority.encode(),))) == b"/api/x"


@each(
    ("url", "expected"),
    [
        ("/v2/users/7?x=/v2", "/api/v1/users/7?x=/v2"),
        ("/v2", "/api/v1"),
        ("/v2//evil.test", "/api/v1//evil.test"),
        ("http://10.0.0.1:8080/v2#a", "/api/v1#a"),
        *(
            (url, url)
            for url in ("/login", "/v20/x", "/api/v1/x", "//evil.test/v2/x", "https://evil.test/v2/x", "v2/x")
        ),
        *((url, url) for url in ("http://10.0.0.1:8080/login", "http://10.0.0.1:8080")),
    ],
)
def test_a_replaced_prefix_comes_back_and_paths_that_the_route_does_not_reach_stay(url: str, expected: str) -> None:
    section = RouteSection.model_validate(
        {"name": "v1", "path": "/api/v1", "upstream": "up", "rewrite": {"prefix": "/v2"}, "rewrite_cookies": True}
    )
    rewriter = route_of(section).url_rewriter
    assert isinstance(rewriter, UrlRewriter)
    assert rewriter.url(url.encode(), TARGET).decode() == expected
    assert rewriter.rewrite([(b"Set-Cookie", b"a=b; Path=/v2/x")], TARGET) == [(b"Set-Cookie", b"a=b; Path=/api/v1/x")]
    assert rewriter.request_line == b"", "X-Forwarded-Prefix is for a prefix that is stripped"


def test_a_route_for_all_paths_or_without_rewriting_leaves_urls_alone() -> None:
    """Else `/v2//evil.test` would become a reference to another host."""
    for more in ({"path": "/"}, {"rewrite_urls": False}, {"rewrite": {"path": "/v2"}}):
        assert rewriter_of(**{"rewrite": {"prefix": "/v2"}, **more}) is None


def rewriter_of(**more: Any) -> UrlRewriter | None:
    section = {"name": "v1", "path": "/api/v1", "upstream": "up", **more}
    rewriter = route_of(RouteSection.model_validate(section)).url_rewriter
    assert rewriter is None or isinstance(rewriter, UrlRewriter)
    return rewriter


@each("more", [{}, {"rewrite": {"path": "/v2"}}, {"path": "/"}])
@each(
    ("url", "expected"),
    [
        ("http://10.0.0.1:8080/login?a", "/login?a"),
        ("http://10.0.0.1:8080", "/"),
        ("http://10.0.0.1:8080//evil.test/x", "/evil.test/x"),
        *((url, url) for url in ("/login", "login", "//evil.test/x", "http://shop.test/x", "http://10.0.0.2:8080/x")),
    ],
)
def test_without_a_prefix_a_url_that_names_a_target_becomes_a_path_by_the_setting(
    more: dict[str, Any], url: str, expected: str
) -> None:
    rewriter = rewriter_of(rewrite_urls=True, **more)
    assert rewriter is not None
    assert rewriter.rewrite([(b"Location", url.encode())], TARGET._replace(public=b"shop.test")) == [
        (b"Location", expected.encode())
    ]
    assert rewriter.request_line == b""
    assert rewriter_of(**more) is None


def test_a_prefix_that_replaces_no_path_comes_back_by_the_setting() -> None:
    rewriter = rewriter_of(path="/", rewrite={"prefix": "/v2"}, rewrite_urls=True)
    assert rewriter is not None
    for url, expected in (("/v2/x", "/x"), ("/v2", "/"), ("/v2//evil.test", "/evil.test"), ("/v2/\\evil", "/evil")):
        assert rewriter.url(url.encode(), TARGET) == expected.encode()


@each("urls", [None, True, False])
def test_cookies_are_rewritten_by_their_own_setting(*, urls: bool | None) -> None:
    given = [(b"Set-Cookie", b"a=b; Domain=10.0.0.1; Path=/x"), (b"Location", b"/x")]
    for more, path, location in (({}, b"/x", b"/x"), ({"strip_prefix": "/api/v1"}, b"/api/v1/x", b"/api/v1/x")):
        rewriter = rewriter_of(rewrite_cookies=True, rewrite_urls=urls, **more)
        assert rewriter is not None
        assert rewriter.rewrite(given, TARGET) == [
            (b"Set-Cookie", b"a=b; Path=" + path),
            (b"Location", b"/x" if urls is False else location),
        ]


@given(url=st.binary(max_size=40), authority=st.sampled_from([b"up", b"up:80", AUTHORITY]))
def test_rewriting_twice_changes_nothing_more(url: bytes, authority: bytes) -> None:
    authorities = Authorities((authority,))
    once = REWRITER.url(url, authorities)
    assert REWRITER.url(once, authorities) == once


@each("host", ["users.internal", "users.internal:9000"])
@each("is_public", [True, False])  # the client's `Host`, or one of the upstream
def test_a_url_that_names_the_host_that_the_upstream_got_leads_past_the_gateway_too(
    host: str, *, is_public: bool
) -> None:
    authorities = Authorities((AUTHORITY,), host.encode()) if is_public else Authorities((AUTHORITY, host.encode()))
    for own in (AUTHORITY.decode(), host):
        assert REWRITER.url(f"http://{own}/x".encode(), authorities) == b"/api/x"
    assert REWRITER.url(b"http://other.internal/x", authorities) == b"http://other.internal/x"
    cookie = b"a=b; Domain=users.internal"
    kept = cookie if is_public else b"a=b"
    assert REWRITER.rewrite([(b"Set-Cookie", cookie)], authorities) == [(b"Set-Cookie", kept)]


@each(
    ("value", "expected"),
    [
        ("5; url=/x", "5; url=/api/x"),
        ("0;URL='/x'", "0;URL='/api/x'"),
        ('1, url = "http://10.0.0.1:8080/x"', '1, url = "/api/x"'),
        ("3;/x", "3;/api/x"),
        ("3 /x", "3 /api/x"),
        ("3 url=/x", "3 url=/api/x"),
        ("3;\t'/x' and text", "3;\t'/api/x' and text"),
        ('3; url="/x', '3; url="/api/x'),
        ('3; url="http://10.0.0.1:8080";\'', '3; url="/api/";\''),
        (".5;url=http://10.0.0.1:8080 ", ".5;url=/api/"),
        *((value, value) for value in ("3/x", "3 ", "3; url /x", "3; ur=/x", "x; /x", "3;; /x")),
        ("5", "5"),
        ("5; url=https://example.com/", "5; url=https://example.com/"),
    ],
)
def test_the_url_of_refresh(value: str, expected: str) -> None:
    assert REWRITER.rewrite([(b"Refresh", value.encode())], TARGET) == [(b"Refresh", expected.encode())]


@each(
    ("value", "expected"),
    [
        ("a=b; Path=/users; Secure", "a=b; Path=/api/users; Secure"),
        ("a=b; Path=/", "a=b; Path=/api"),
        ("a=b; path=/api/x", "a=b; path=/api/x"),
        ("a=/x; Domain=10.0.0.1; HttpOnly", "a=/x; HttpOnly"),
        ("a=b; Domain=example.com", "a=b; Domain=example.com"),
        ("a=b", "a=b"),
        ("Path=/x; Secure", "Path=/x; Secure"),
        ("__Host-a=b; Path=/; Secure", "__Host-a=b; Path=/; Secure"),
        (" __host-a=b; Secure; Path=/", " __host-a=b; Secure; Path=/"),
        ("__Secure-a=b; Path=/; Secure", "__Secure-a=b; Path=/api; Secure"),
    ],
)
def test_cookies(value: str, expected: str) -> None:
    assert REWRITER.rewrite([(b"Set-Cookie", value.encode())], TARGET) == [(b"Set-Cookie", expected.encode())]
    plain = UrlRewriter(b"/api")
    assert plain.rewrite([(b"Set-Cookie", value.encode())], TARGET) == [(b"Set-Cookie", value.encode())]


@each("prefix", [b"", b"/api"])
@each("cookies", [True, False])
@each(
    ("domains", "value", "expected"),
    [
        ({"users.internal": "example.com"}, "a=b; Domain=users.internal; Secure", "a=b; Domain=example.com; Secure"),
        ({"users.internal": "example.com"}, "a=b; domain = .Users.Internal", "a=b; domain =example.com"),
        ({"users.internal": "example.com"}, "a=b; Domain=x.users.internal", "a=b; Domain=x.users.internal"),
        ({"users.internal": ""}, "a=b; Domain=users.internal; Secure", "a=b; Secure"),
        ({"*": ""}, "a=b; Domain=users.internal", "a=b"),
        ({"users.internal": "example.com", "*": ""}, "a=b; Domain=users.internal", "a=b; Domain=example.com"),
        ({"10.0.0.1": "example.com"}, "a=b; Domain=10.0.0.1", "a=b; Domain=example.com"),
        ({"*": "example.com"}, "Domain=x; Secure", "Domain=x; Secure"),
        ({"*": "example.com"}, "a=b; Domain; Path=rel", "a=b; Domain; Path=rel"),
    ],
)
def test_domains_of_cookies(
    domains: dict[str, str], value: str, expected: str, prefix: bytes, *, cookies: bool
) -> None:
    pairs = tuple((domain.encode(), new.encode()) for domain, new in domains.items())
    rewriter = UrlRewriter(prefix, cookies and bool(prefix), pairs)
    assert rewriter.rewrite([(b"Set-Cookie", value.encode())], TARGET) == [(b"Set-Cookie", expected.encode())]
    head = b"HTTP/1.1 200 OK\r\nset-cookie: "
    assert rewriter.rewrite_lines(head + value.encode(), TARGET) == head + expected.encode()


def test_without_a_prefix_urls_and_paths_pass() -> None:
    rewriter = rewriter_of(cookie_domains={"*": ""})
    assert rewriter is not None
    fields = [(b"Location", b"http://10.0.0.1:8080/x"), (b"Refresh", b"5; url=/x"), (b"Set-Cookie", b"a=b; Path=/x")]
    assert rewriter.rewrite(fields, TARGET) == fields
    assert rewriter.request_line == b""


def test_the_lines_of_a_plain_head_are_rewritten_as_the_fields_are() -> None:
    head = b"HTTP/1.1 201 Made\r\nLocation: /x\r\nX-Location: /x\r\ncontent-location: /y\r\nSet-Cookie: a=b; Path=/"
    assert REWRITER.rewrite_lines(head, TARGET) == (
        b"HTTP/1.1 201 Made\r\nLocation: /api/x\r\nX-Location: /x\r\ncontent-location: /api/y\r\n"
        b"Set-Cookie: a=b; Path=/api"
    )
