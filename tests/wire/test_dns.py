"""Names of targets: what a resolution changes, what a failure leaves unchanged, and targets that come and go."""

import asyncio
import logging
import random
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from api_gateway.upstreams.dns import (
    MAX_ADDRESSES,
    HostName,
    Resolution,
    Resolve,
    resolve_host,
    resolve_once,
    resolve_periodically,
)
from tests.cases import each
from tests.kit import FakeClock, RawUpstream, RunningGateway, eventually, in_front_of, reply, running_gateway, soon
from tests.kit import ask as get

NOW = 1000.0


# What a response changes


def test_a_name_is_one_target_until_it_is_resolved() -> None:
    name = HostName("http://users.internal:8080", 3)
    (target,) = name.targets
    assert (target.url, target.weight, target.named, target.address) == ("http://users.internal:8080", 3, None, None)
    assert (name.addresses, name.error) == ((), None)
    assert repr(name) == "<HostName 'users.internal' [not resolved]>"


@each(
    ("url", "address", "expected"),
    [
        ("http://users.internal:8080", "10.0.0.1", "http://10.0.0.1:8080"),
        ("http://users.internal", "10.0.0.1", "http://10.0.0.1:80"),
        ("https://users.internal", "fd00::1", "https://[fd00::1]:443"),
    ],
)
def test_each_address_is_a_target_that_keeps_the_name(url: str, address: str, expected: str) -> None:
    name = HostName(url, 3)
    answer = name.update([address], NOW)
    (target,) = name.targets
    assert (target.url, target.named, target.address, target.weight) == (expected, url, address, 3)
    assert (answer.added, answer.removed, answer.is_change) == ((address,), (), True)


def test_an_address_that_stays_keeps_its_target() -> None:
    name = HostName("http://users.internal")
    name.update(["10.0.0.2", "10.0.0.1", "10.0.0.2"], NOW)
    one, two = name.targets
    answer = name.update(["10.0.0.3", "10.0.0.2"], NOW + 30)
    assert (answer.added, answer.removed) == (("10.0.0.3",), ("10.0.0.1",))
    assert name.targets[0] is two
    assert one not in name.targets
    assert name.addresses == ("10.0.0.2", "10.0.0.3")


def test_the_same_addresses_in_another_order_change_nothing() -> None:
    name = HostName("http://users.internal")
    name.update(["10.0.0.1", "10.0.0.2"], NOW)
    assert not name.update(["10.0.0.2", "10.0.0.1"], NOW + 30).is_change


def test_what_is_known_is_kept_when_nothing_can_be_learnt() -> None:
    name = HostName("http://users.internal")
    name.update(["10.0.0.1"], NOW)
    for answer in (name.fail("no such host", NOW + 30), name.update([], NOW + 60)):
        assert not answer.is_change
        assert name.addresses == ("10.0.0.1",)
    assert (name.error, name.asked_at) == ("it has no address", NOW + 60)
    answer = name.update(["10.0.0.1"], NOW + 90)
    assert (answer.is_recovered, answer.is_change, name.error) == (True, False, None)


def test_a_name_does_not_become_more_targets_than_are_of_use() -> None:
    name = HostName("http://users.internal")
    name.update([f"10.0.{number}.1" for number in range(256)], NOW)
    assert len(name.targets) == MAX_ADDRESSES


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_an_address_needs_no_resolving(host: str) -> None:
    assert HostName(f"http://{host}:80").is_address


# Asking


def answering(*addresses: str) -> Resolve:
    async def resolve(_host: str, _port: int) -> Sequence[str]:
        return addresses

    return resolve


def failing(error: Exception) -> Resolve:
    async def resolve(_host: str, _port: int) -> Sequence[str]:
        raise error

    return resolve


async def silent(_host: str, _port: int) -> Sequence[str]:
    """Answer never."""
    never: asyncio.Future[Sequence[str]] = asyncio.get_running_loop().create_future()
    return await never


@pytest.mark.parametrize(
    ("resolve", "error"),
    [
        (answering("10.0.0.1"), None),
        (answering(), "it has no address"),
        (failing(socket.gaierror(-2, "Name or service not known")), "Name or service not known"),
        (failing(OSError("all is lost")), "all is lost"),
        (failing(UnicodeError("label too long")), "label too long"),
        (silent, "no response within 0.01 s"),
    ],
)
async def test_asking_finds(resolve: Resolve, error: str | None) -> None:
    name = HostName("http://users.internal")
    await resolve_once(name, 0.01, resolve, FakeClock(NOW))
    assert (name.error, name.asked_at) == (error, NOW)


async def test_a_name_is_asked_for_with_its_port() -> None:
    asked: list[tuple[str, int]] = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        asked.append((host, port))
        return ["10.0.0.1"]

    await resolve_once(HostName("https://users.internal"), 1, resolve, FakeClock())
    assert asked == [("users.internal", 443)]


async def test_the_loops_resolver_finds_this_machine() -> None:
    assert "127.0.0.1" in await resolve_host("localhost", 80)


@asynccontextmanager
async def resolving(
    names: Sequence[HostName], resolve: Resolve, on_answer: Callable[[Resolution], None]
) -> AsyncIterator[None]:
    task = asyncio.create_task(
        resolve_periodically(names, 0.005, resolve, on_answer, clock=FakeClock(), source=random.Random(1))
    )
    try:
        yield
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_names_are_asked_for_again_and_again_and_addresses_never() -> None:
    asked: list[str] = []
    answers: list[Resolution] = []

    async def resolve(host: str, _port: int) -> Sequence[str]:
        asked.append(host)
        return ["10.0.0.1", f"10.0.0.{1 + min(3, len(asked))}"]

    names = [HostName("http://users.internal"), HostName("http://127.0.0.1:9001")]
    async with resolving(names, resolve, answers.append):
        await soon(lambda: len(answers) >= 5, "it is asked five times")
    assert set(asked) == {"users.internal"}
    assert [answer.is_change for answer in answers[:5]] == [True, True, True, False, False]


async def test_a_slow_name_delays_no_other() -> None:
    answers: list[Resolution] = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        return await silent(host, port) if host == "slow" else ["10.0.0.1"]

    fast = HostName("http://fast")
    async with resolving([HostName("http://slow"), fast], resolve, answers.append):
        await soon(lambda: sum(answer.name is fast for answer in answers) >= 3, "the fast one is asked")


# On the wire


class Zone:
    """A name server for tests: what it says of any name can be changed."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses
        self.error: OSError | None = None
        self.asked = 0

    async def __call__(self, _host: str, _port: int) -> Sequence[str]:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return self.addresses


class Places:
    """Upstreams on one port of several addresses of this machine, each of which answers with its address."""

    def __init__(self, *addresses: str) -> None:
        self.port = 0
        self.of: dict[str, RawUpstream] = {}
        for address in addresses:
            self.of[address] = RawUpstream(reply(address.encode()), address=(address, self.port))
            self.port = self.of[address].port

    def close(self) -> None:
        for upstream in self.of.values():
            upstream.close()


@pytest.fixture
def places() -> Iterator[Places]:
    found = None
    while found is None:
        with suppress(OSError):  # another test has the port on one of the addresses
            found = Places("127.0.0.1", "127.0.0.2", "127.0.0.3")
    yield found
    found.close()


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Zone:
    """What names stand for, asked for a hundred times as often as configured."""
    found = Zone("127.0.0.1", "127.0.0.2")
    monkeypatch.setattr("api_gateway.process.server.resolve_host", found)
    sleep = asyncio.sleep
    monkeypatch.setattr("api_gateway.upstreams.dns.asyncio.sleep", lambda seconds: sleep(seconds / 100))
    return found


def sections(places: Places, **upstream: Any) -> dict[str, Any]:
    return in_front_of(f"http://users.test:{places.port}", dns_refresh_interval=1, **upstream)


@pytest.fixture
def running(places: Places, zone: Zone, tmp_path: Path) -> Iterator[RunningGateway]:
    with running_gateway(sections(places), tmp_path) as gateway:
        eventually(lambda: len(gateway.live.upstreams["up"].targets) == 2, "the name is resolved")
        yield gateway


def served(running: RunningGateway, count: int = 6) -> set[str]:
    return {get(f"{running.url}/api/x").body.decode() for _ in range(count)}


def are_closed(upstream: RawUpstream) -> bool:
    """Return whether each of its connections has ended."""
    return all(wire.sock.fileno() == -1 for wire in upstream.wires)


def urls(running: RunningGateway) -> list[str]:
    return [target.url for target in running.live.upstreams["up"].targets]


def health(running: RunningGateway) -> Any:
    return get(f"{running.url}/health").json()["upstreams"]["up"]


def test_every_address_gets_requests_that_keep_the_name(running: RunningGateway, places: Places) -> None:
    assert served(running) == {"127.0.0.1", "127.0.0.2"}
    for address in ("127.0.0.1", "127.0.0.2"):
        assert {host for request in places.of[address].requests for host in request.all("host")} == {
            f"users.test:{places.port}".encode()
        }


def test_addresses_come_and_go(
    running: RunningGateway, places: Places, zone: Zone, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert served(running) == {"127.0.0.1", "127.0.0.2"}
    zone.addresses = ("127.0.0.2", "127.0.0.3")
    eventually(lambda: f"http://127.0.0.3:{places.port}" in urls(running), "the change is noticed")
    assert served(running) == {"127.0.0.2", "127.0.0.3"}
    gone = places.of["127.0.0.1"]
    eventually(lambda: are_closed(gone), "no idle connection is kept")
    assert "users.test is 127.0.0.2, 127.0.0.3 (+127.0.0.3 -127.0.0.1)" in caplog.text
    assert f"127.0.0.1:{places.port}" not in get(f"{running.url}/metrics?format=prometheus").body.decode()


def test_a_request_that_runs_on_an_address_that_is_gone_runs_to_its_end(
    running: RunningGateway, places: Places, zone: Zone
) -> None:
    """Then its connection is closed, and nothing of the target is left."""
    arrived, may_answer = threading.Event(), threading.Event()

    def behave(wire: Any, request: Any) -> None:
        arrived.set()
        assert may_answer.wait(10)
        reply(b"late")(wire, request)

    for address in ("127.0.0.1", "127.0.0.2"):
        places.of[address].behave = behave
    bodies: list[bytes] = []
    asking = threading.Thread(target=lambda: bodies.append(get(f"{running.url}/api/x").body))
    asking.start()
    assert arrived.wait(10)
    zone.addresses = ("127.0.0.3",)
    eventually(lambda: urls(running) == [f"http://127.0.0.3:{places.port}"], "the change is noticed")
    service = running.server._app.state.gateway.upstream_clients["up"]
    assert len(service._removed) == 1
    may_answer.set()
    asking.join(10)
    assert bodies == [b"late"]
    assert served(running) == {"127.0.0.3"}
    eventually(lambda: not service._removed, "the last target is let go")
    assert set(service.origins) == set(service.upstream.targets)
    assert len(service.transport._pools) == 1
    eventually(lambda: are_closed(places.of["127.0.0.1"]) and are_closed(places.of["127.0.0.2"]), "all is closed")


def test_an_address_that_returns_is_a_target_again(running: RunningGateway, places: Places, zone: Zone) -> None:
    for addresses in (("127.0.0.1",), ("127.0.0.2",), ("127.0.0.1", "127.0.0.2")):
        zone.addresses = addresses
        eventually(
            lambda: urls(running) == [f"http://{address}:{places.port}" for address in zone.addresses], "it follows"
        )
        assert served(running) == set(addresses)
    before = [len(places.of[address].wires) for address in ("127.0.0.1", "127.0.0.2")]
    served(running)
    assert [len(places.of[address].wires) for address in ("127.0.0.1", "127.0.0.2")] == before, "connections are kept"


def test_a_failed_resolution_keeps_what_is_known_and_says_so(
    running: RunningGateway, zone: Zone, caplog: pytest.LogCaptureFixture
) -> None:
    zone.error = socket.gaierror(-3, "Temporary failure in name resolution")
    eventually(lambda: bool(health(running)["dns_names"][0]["error"]), "the failure is shown")
    assert served(running) == {"127.0.0.1", "127.0.0.2"}
    view = health(running)
    assert view["status"] == "warn"
    assert view["dns_names"][0]["host"] == "users.test"
    assert view["dns_names"][0]["addresses"] == ["127.0.0.1", "127.0.0.2"]
    assert view["dns_names"][0]["error"] == "Temporary failure in name resolution"
    asked = zone.asked
    eventually(lambda: zone.asked > asked + 3, "it goes on asking")
    told = [record for record in caplog.records if "cannot be resolved" in record.getMessage()]
    assert len(told) == 1, "the log is told once"
    zone.error = None
    eventually(lambda: health(running)["status"] == "pass", "all is well again")


def test_a_resolved_target_is_checked_at_its_address_by_its_name(places: Places, zone: Zone, tmp_path: Path) -> None:
    checks = {"interval": 0.05, "unhealthy_threshold": 1}
    places.of["127.0.0.2"].behave = reply(b"no", b"503 Unavailable")
    with running_gateway(sections(places, health_check=checks), tmp_path) as running:
        eventually(
            lambda: [target.is_healthy for target in running.live.upstreams["up"].targets] == [True, False],
            "the bad one is found out",
        )
        assert served(running) == {"127.0.0.1"}
        (bad,) = [target for target in health(running)["targets"] if target["healthy"] is False]
        assert bad["configured_url"] == f"http://users.test:{places.port}"
        assert bad["active"]["last_error"] == "status 503"
        shown = get(f"{running.url}/circuit-breakers").json()["targets"]["up"]
        assert shown[f"{bad['configured_url']} ({bad['url']})"]["active"]["result"] == "status 503"
    asked = {host for request in places.of["127.0.0.2"].requests for host in request.all("host")}
    assert asked == {f"users.test:{places.port}".encode()}
