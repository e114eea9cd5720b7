"""A client of a route that strips a prefix stays behind the gateway: URLs in responses, on both paths."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.kit import RawClient, RawUpstream, RunningGateway, in_front_of, reply

StartGateway = Callable[[dict[str, Any]], RunningGateway]
StartUpstream = Callable[..., RawUpstream]

both_ways = pytest.mark.parametrize("way", [(), ("X-Odd:  two blanks",)], ids=["fast path", "general parser"])


def started(gateway: StartGateway, up: RawUpstream, host_header: str = "target", **route: Any) -> RunningGateway:
    sections = in_front_of(up.url)
    sections["upstreams"]["up"]["host_header"] = host_header
    sections["routes"] = [{"name": "cut", "path": "/api/cut", "upstream": "up", **route}]
    running = gateway(sections)
    with RawClient(running.port) as client:
        assert client.get("/api/cut/warm").status == 200
    return running


@both_ways
def test_redirects_of_a_stripped_route_get_the_prefix_and_the_upstream_is_told_of_it(
    gateway: StartGateway, upstream: StartUpstream, fast_path_spy: list[bool], way: tuple[str, ...]
) -> None:
    up = upstream()
    running = started(gateway, up, strip_prefix="/api")
    fields = (
        (b"Location", up.url.encode() + b"/cut/x?a"),
        (b"Content-Location", b"/cut/y"),
        (b"Refresh", b"5; url=/cut/z"),
        (b"Set-Cookie", b"a=b; Path=/cut"),
    )
    up.behave = reply(b"ok", b"302 Found", fields)
    fast_path_spy.clear()
    with RawClient(running.port) as client:
        answer = client.get("/api/cut/here", (*way, "X-Forwarded-Prefix: /forged"))
    assert fast_path_spy == [not way]
    names = ("location", "content-location", "refresh", "set-cookie")
    assert [answer.all(name) for name in names] == [
        [b"/api/cut/x?a"],
        [b"/api/cut/y"],
        [b"5; url=/api/cut/z"],
        [b"a=b; Path=/cut"],
    ]
    assert up.requests[-1].line == b"GET /cut/here HTTP/1.1"
    assert up.requests[-1].all("x-forwarded-prefix") == [b"/api"]


@both_ways
def test_cookies_get_it_by_a_setting(gateway: StartGateway, upstream: StartUpstream, way: tuple[str, ...]) -> None:
    up = upstream()
    running = started(gateway, up, strip_prefix="/api", rewrite_cookies=True)
    up.behave = reply(b"ok", b"200 OK", ((b"Set-Cookie", b"a=b; Domain=127.0.0.1; Path=/cut"),))
    with RawClient(running.port) as client:
        assert client.get("/api/cut/x", way).all("set-cookie") == [b"a=b; Path=/api/cut"]


@both_ways
def test_domains_of_cookies_are_replaced_without_a_prefix_too(
    gateway: StartGateway, upstream: StartUpstream, way: tuple[str, ...]
) -> None:
    up = upstream()
    running = started(gateway, up, cookie_domains={"Users.internal": "example.com", "*": ""})
    fields = ((b"Set-Cookie", b"a=b; Domain=users.internal"), (b"Set-Cookie", b"c=d; Domain=x; Path=/cut"))
    up.behave = reply(b"ok", b"302 Found", (*fields, (b"Location", up.url.encode())))
    with RawClient(running.port) as client:
        answer = client.get("/api/cut/x", way)
    assert answer.all("set-cookie") == [b"a=b; Domain=example.com", b"c=d; Path=/cut"]
    assert answer.all("location") == [up.url.encode()]
    assert not up.requests[-1].all("x-forwarded-prefix")


@both_ways
@pytest.mark.parametrize(
    ("host_header", "expected"),
    [("target", "{target}"), ("client", "shop.example.com:81"), ("users.internal:9000", "users.internal:9000")],
)
def test_the_upstream_gets_the_host_that_is_set(
    gateway: StartGateway,
    upstream: StartUpstream,
    fast_path_spy: list[bool],
    way: tuple[str, ...],
    host_header: str,
    expected: str,
) -> None:
    """X-Forwarded-Host has the client's, and a redirect that names the Host stays behind the gateway."""
    up = upstream()
    running = started(gateway, up, host_header, strip_prefix="/api", rewrite_cookies=True)
    host = expected.format(target=up.url.removeprefix("http://")).encode()
    fields = (
        (b"Location", b"http://%b/cut/y" % host),
        (b"Set-Cookie", b"a=b; Domain=" + host.partition(b":")[0]),
    )
    up.behave = reply(b"ok", b"302 Found", fields)
    fast_path_spy.clear()
    with RawClient(running.port) as client:
        client.send("\r\n".join(("GET /api/cut/x HTTP/1.1", "Host: shop.example.com:81", *way, "\r\n")).encode())
        answer = client.answer()
    assert fast_path_spy == [not way]
    request = up.requests[-1]
    assert request.all("host") == [host]
    assert request.all("x-forwarded-host") == [b"shop.example.com:81"]
    assert answer.all("location") == [b"/api/cut/y"]
    kept = b"a=b; Domain=shop.example.com" if host_header == "client" else b"a=b"
    assert answer.all("set-cookie") == [kept]


@both_ways
def test_any_target_of_the_upstream_and_the_client_s_host_count_as_its_own(
    gateway: StartGateway, upstream: StartUpstream, way: tuple[str, ...]
) -> None:
    """Upstreams that redirect to one fixed target, or to X-Forwarded-Host without X-Forwarded-Prefix."""
    first, second = upstream(), upstream()
    sections = in_front_of(first.url)
    sections["upstreams"]["up"]["targets"] = [{"url": first.url}, {"url": second.url}]
    sections["routes"] = [
        {"name": "cut", "path": "/api/cut", "upstream": "up", "strip_prefix": "/api"},
        {"name": "whole", "path": "/api/whole", "upstream": "up", "rewrite_urls": True, "rewrite_cookies": True},
    ]
    running = gateway(sections)
    fields = (
        (b"Location", first.url.encode() + b"/y"),
        (b"Content-Location", b"http://pub.test/y"),
        (b"Set-Cookie", b"a=b; Domain=127.0.0.1; Path=/"),
    )
    first.behave = second.behave = reply(b"ok", b"302 Found", fields)
    with RawClient(running.port) as client:
        for path, expected in (
            ("cut", [b"/api/y", b"/api/y", fields[2][1]]),
            ("whole", [b"/y", fields[1][1], b"a=b; Path=/"]),
        ):
            for _ in range(4):
                lines = (f"GET /api/{path}/x HTTP/1.1", "Host: pub.test", *way, "\r\n")
                client.send("\r\n".join(lines).encode())
                answer = client.answer()
                assert [answer.all(name.lower().decode())[0] for name, _ in fields] == expected
    assert first.requests
    assert second.requests
    assert first.requests[-1].all("x-forwarded-prefix") == second.requests[-1].all("x-forwarded-prefix") == []


@both_ways
@pytest.mark.parametrize(("host_header", "expected"), [("client", "{target}"), ("users.internal", "users.internal")])
def test_without_a_host_of_the_client_the_upstream_gets_that_of_the_target(
    gateway: StartGateway, upstream: StartUpstream, way: tuple[str, ...], host_header: str, expected: str
) -> None:
    """HTTP/1.0 needs none; and health checks have no client."""
    up = upstream()
    running = started(gateway, up, host_header)
    with RawClient(running.port) as client:
        client.send("\r\n".join(("GET /api/cut/x HTTP/1.0", *way, "\r\n")).encode())
        assert client.answer().status == 200
    assert up.requests[-1].all("host") == [expected.format(target=up.url.removeprefix("http://")).encode()]


@both_ways
@pytest.mark.parametrize("route", [{}, {"strip_prefix": "/api", "rewrite_urls": False}], ids=["whole", "switched off"])
def test_elsewhere_every_byte_passes(
    gateway: StartGateway, upstream: StartUpstream, way: tuple[str, ...], route: dict[str, Any]
) -> None:
    up = upstream()
    running = started(gateway, up, **route)
    url = up.url.encode() + b"/x"
    up.behave = reply(b"ok", b"302 Found", ((b"Location", url), (b"Refresh", b"5; url=/x")))
    with RawClient(running.port) as client:
        answer = client.get("/api/cut/x", way)
    assert (answer.all("location"), answer.all("refresh")) == ([url], [b"5; url=/x"])
    assert not up.requests[-1].all("x-forwarded-prefix")
