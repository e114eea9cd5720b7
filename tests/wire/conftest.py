"""Fixtures of the tests on real sockets: one upstream and one gateway for each module, a fresh client for each test.

A module that needs more than the default defines `sections` (the gateway's configuration), or a fixture on top of
`shared` (the upstream, which lives as long as the module) and `up` (the same, as if it were new).
"""

from collections.abc import Iterator
from typing import Any

import pytest

from api_gateway.exchanges.asgi_downstream import AsgiDownstream
from api_gateway.exchanges.fast_path import FastPath
from tests.kit import RawClient, RawRequest, RawUpstream, RunningGateway, Wire, in_front_of, running_gateway


@pytest.fixture(scope="module")
def sections(shared: RawUpstream) -> dict[str, Any]:
    """The configuration of `running`."""
    return in_front_of(shared.url)


@pytest.fixture(scope="module")
def running(sections: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """A gateway with the configuration of the module."""
    with running_gateway(sections, tmp_path_factory.mktemp("state")) as gateway:
        yield gateway


@pytest.fixture
def client(running: RunningGateway, up: RawUpstream) -> Iterator[RawClient]:
    """A client that is connected to the gateway; the upstream is as if it were new."""
    with RawClient(running.port) as found:
        yield found


@pytest.fixture
def fast_path_spy(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each read that the fast path was offered, whether it has taken the request."""
    seen: list[bool] = []
    try_handle = FastPath.try_handle

    def noting(self: FastPath, downstream: Any, received: bytes) -> bool:
        is_handled = try_handle(self, downstream, received)
        seen.append(is_handled)
        return is_handled

    monkeypatch.setattr(FastPath, "try_handle", noting)
    return seen


@pytest.fixture
def asgi_forwards(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The requests that come by ASGI."""
    seen: list[Any] = []
    run = AsgiDownstream.run

    def noting(self: AsgiDownstream) -> Any:
        seen.append(self)
        return run(self)

    monkeypatch.setattr(AsgiDownstream, "run", noting)
    return seen


@pytest.fixture
def trailing(up: RawUpstream) -> list[bytes]:
    """The end of the body as it came to the upstream, from the last chunk on."""
    ends: list[bytes] = []

    def behave(wire: Wire, _request: RawRequest) -> None:
        while (line := wire.read_until(b"\r\n")) != b"0\r\n":
            assert line is not None
            wire.read_exactly(int(line, 16) + 2)
        end = b""
        while not end.endswith(b"\r\n\r\n"):
            end += wire.read_until(b"\r\n") or b"\r\n\r\n"
            if end == b"\r\n":
                break
        ends.append(end)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    up.behave, up.reads_body = behave, False
    return ends
