"""What passes through the gateway, byte for byte, with a raw client on one side and a raw upstream on the other."""

from collections.abc import Callable

from tests.kit import RawClient, RawUpstream, RunningGateway, in_front_of, reply

StartGateway = Callable[..., RunningGateway]
StartUpstream = Callable[..., RawUpstream]


def test_a_request_reaches_the_upstream_and_its_answer_the_client(gateway: StartGateway, upstream: StartUpstream):
    up = upstream(reply(b"hello", headers=((b"X-One", b"1"), (b"Set-Cookie", b"a=1"), (b"Set-Cookie", b"b=2"))))
    with RawClient(gateway(in_front_of(up.url)).port) as client:
        answer = client.get("/api/a%2Fb/../c//d?x=1&x=%zz", ("X-Client-ID: acme", "Accept: */*"))
    assert answer.status == 200
    assert answer.body == b"hello"
    assert answer.all("set-cookie") == [b"a=1", b"b=2"]
    assert up.requests[0].line == b"GET /api/a%2Fb/../c//d?x=1&x=%zz HTTP/1.1"
    assert up.requests[0].all("host") == [up.url.removeprefix("http://").encode()]
    assert up.requests[0].all("x-client-id") == [b"acme"]
