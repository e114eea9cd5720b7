"""Which requests are local: direct ones, from loopback, that name a loopback host."""

import pytest

from api_gateway.headers import FORWARDING
from api_gateway.locality import LoopbackRule, NothingIsLocal
from api_gateway.models import HeaderList

DIRECT: HeaderList = [(b"host", b"localhost:8000")]


async def is_local(headers: HeaderList, peer: tuple[str, int] | None = ("127.0.0.1", 5000)) -> bool:
    scope = {"type": "http", "headers": headers, "client": peer}
    assert not await NothingIsLocal().is_local(scope)
    return await LoopbackRule().is_local(scope)


@pytest.mark.parametrize("host", [b"localhost", b"LOCALHOST:8000", b"127.0.0.1:8000", b"[::1]:8000", b"[::1]"])
@pytest.mark.parametrize("peer", ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"])
async def test_a_direct_request_from_loopback_is_local(host: bytes, peer: str) -> None:
    assert await is_local([(b"Host", host)], (peer, 5000))


@pytest.mark.parametrize("name", sorted(FORWARDING | {b"via"}))
async def test_what_a_proxy_forwarded_is_not_local(name: bytes) -> None:
    assert not await is_local([*DIRECT, (name.title(), b"127.0.0.1")])


@pytest.mark.parametrize(
    "headers",
    [
        [(b"host", b"gateway.example")],
        [(b"host", b"localhost.evil.example")],
        [(b"host", b"")],
        [],
        [*DIRECT, *DIRECT],
    ],
)
async def test_a_request_for_another_host_is_not_local(headers: HeaderList) -> None:
    """A page in a local browser can reach us through a name that resolves here (DNS rebinding)."""
    assert not await is_local(headers)


@pytest.mark.parametrize("peer", [("192.0.2.1", 5000), ("2001:db8::1", 5000), ("", 0), None])
async def test_another_machine_is_not_local(peer: tuple[str, int] | None) -> None:
    assert not await is_local(DIRECT, peer)
