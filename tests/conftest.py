"""Fixtures shared by all tests."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.kit import (
    STORE_SERVERS,
    Behaviour,
    FakeClock,
    RawUpstream,
    RunningGateway,
    StoreServer,
    reply,
    running_gateway,
)


@pytest.fixture(autouse=True)
def _no_ambient_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A test sees no configuration of the machine it runs on: no variables, no .env, no state."""
    for name in list(os.environ):
        if name.upper().startswith("GATEWAY_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=STORE_SERVERS)
def store_server(request: pytest.FixtureRequest) -> Iterator[StoreServer]:
    """Run a shared store of each kind that is there; a socket's path must be short, so it is not in `tmp_path`."""
    program = STORE_SERVERS[request.param]
    if program is None:
        pytest.skip(f"{request.param}-server is not installed")
    with tempfile.TemporaryDirectory(prefix="store-") as folder:
        server = StoreServer(program, Path(folder))
        yield server
        server.stop()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def upstream() -> Iterator[Callable[..., RawUpstream]]:
    """Start raw upstreams; they are closed at the end."""
    started: list[RawUpstream] = []

    def start(behave: Behaviour | None = None, *, reads_body: bool = True) -> RawUpstream:
        started.append(RawUpstream(behave or reply(), reads_body=reads_body))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Callable[[dict[str, Any]], RunningGateway]]:
    """Start gateways; they are stopped at the end."""
    with ExitStack() as stack:
        count = 0

        def start(sections: dict[str, Any]) -> RunningGateway:
            nonlocal count
            count += 1
            return stack.enter_context(running_gateway(sections, tmp_path / f"state-{count}"))

        yield start
