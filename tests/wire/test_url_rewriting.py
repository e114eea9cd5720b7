"""A client of a route that strips a prefix stays behind the gateway: URLs in responses, on both paths."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.kit import RawClient, RawUpstream, RunningGateway, in_front_of, reply

StartGateway = Callable[[dict[str, Any]], RunningGateway]
StartUpstream = Callable[..., RawUpstream]

both_ways = pytest.mark.parametrize("way", [(), ("X-Odd:  two blanks",)], ids=["fast path", "general path"])


def started(gateway: StartGateway, up: RawUpstream, **route: Any) -> RunningGateway:
    sections = in_front_of(up.url)
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
