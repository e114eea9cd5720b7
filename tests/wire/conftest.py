"""Fixtures of the tests on real sockets: one upstream and one gateway for each module, a fresh client for each test.

A module that needs more than the default defines `sections` (the gateway's configuration), or a fixture on top of
`shared` (the upstream, which lives as long as the module) and `up` (the same, as if it were new).
"""

from collections.abc import Iterator
from typing import Any

import pytest

from api_gateway.fastpath.fast_exchange import FastExchange
from api_gateway.fastpath.fast_path import FastPath
from tests.kit import RawClient, RawUpstream, RunningGateway, in_front_of, reply, running_gateway


@pytest.fixture(scope="module")
def shared() -> Iterator[RawUpstream]:
    """An upstream that answers `ok`."""
    server = RawUpstream()
    yield server
    server.close()


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
def up(shared: RawUpstream) -> RawUpstream:
    """The upstream of the module as if it were new."""
    shared.behave, shared.reads_body = reply(), True
    shared.requests.clear()
    return shared


@pytest.fixture
def client(running: RunningGateway, up: RawUpstream) -> Iterator[RawClient]:
    """A client that is connected to the gateway; the upstream is as if it were new."""
    with RawClient(running.port) as found:
        yield found


@pytest.fixture
def fast_path_spy(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each request that the fast path was offered, whether it was refused there, or given to an upstream."""
    seen: list[bool] = []
    is_handed_over = False
    try_handle, hand_over = FastPath.try_handle, FastExchange._hand_over

    def noting(self: FastPath, downstream: Any, received: bytes) -> bool:
        nonlocal is_handed_over
        is_handed_over = False
        is_handled = try_handle(self, downstream, received)
        seen.append(is_handled and not is_handed_over)
        return is_handled

    def noting_hand_over(self: FastExchange, *error: Any) -> None:
        nonlocal is_handed_over
        is_handed_over = self.attempt is None
        hand_over(self, *error)

    monkeypatch.setattr(FastPath, "try_handle", noting)
    monkeypatch.setattr(FastExchange, "_hand_over", noting_hand_over)
    return seen


@pytest.fixture
def hand_overs(monkeypatch: pytest.MonkeyPatch) -> list[FastExchange]:
    """The exchanges that the fast path has begun and handed over to the ASGI path."""
    seen: list[FastExchange] = []
    hand_over = FastExchange._hand_over

    def noting(self: FastExchange, *error: Any) -> None:
        seen.append(self)
        hand_over(self, *error)

    monkeypatch.setattr(FastExchange, "_hand_over", noting)
    return seen
