"""Concurrency limits of several workers: one sum, also after a worker was killed, the store was lost, and a reload."""

import json
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from api_gateway.limits.concurrency_leases import RENEWAL_INTERVAL
from api_gateway.limits.concurrency_ops import LEASE
from tests.kit import RawClient, RawRequest, RawUpstream, RunningGateway, Wire, ask, eventually, reply, running_gateway
from tests.processes import Running, children, hooked, kill, process
from tests.store_kit import StoreServer
from tests.wire.test_concurrency import NEVER_OPEN, misbehaving, one_request

pytestmark = pytest.mark.timeout(240)  # starts of processes take long on a busy machine

CLIENT = "X-Client-ID: acme"
SHORT_LEASES = f"""
from api_gateway.limits import concurrency_leases, concurrency_ops, multi_node_claims

concurrency_leases.LEASE = {LEASE / 2}
concurrency_leases.RENEWAL_INTERVAL = {RENEWAL_INTERVAL / 2}
concurrency_ops.LEASE_MS = multi_node_claims.LEASE_MS = {LEASE * 500:.0f}
"""
LONG = LEASE + 60


class HoldingUpstream(RawUpstream):
    """An upstream that responds when it may, and knows how many requests wait; it never has more than `most`."""

    def __init__(self) -> None:
        self.may_respond = threading.Event()
        self.lock = threading.Lock()
        self.waiting = self.most = 0
        super().__init__(self._hold)

    def _hold(self, wire: Wire, request: RawRequest) -> None:
        with self.lock:
            self.waiting += 1
            self.most = max(self.most, self.waiting)
        self.may_respond.wait(60)
        with self.lock:
            self.waiting -= 1
        reply()(wire, request)


@pytest.fixture
def up() -> Iterator[HoldingUpstream]:
    upstream = HoldingUpstream()
    yield upstream
    upstream.may_respond.set()
    upstream.close()


def sections(url: str, most: int = 5, **more: Any) -> dict[str, Any]:
    return {
        "tiers": {"FREE": {"rate": 100_000, "capacity": 100_000}},
        "address_limit": {"rate": 0},
        "upstreams": {"up": {"targets": [{"url": url}], "retry": {"attempts": 1}}},
        "routes": [{"name": "all", "path": "/api", "upstream": "up"}],
        "limits": [{"name": "few", "concurrent": most}],
        "store": {"decision_timeout": 5},
        **more,
    }


@contextmanager
def workers(folder: Path, url: str) -> Iterator[Running]:
    server = {"port": 0, "max_event_loop_lag": None, "workers": 2}
    path = folder / "gateway.yaml"
    path.write_text(yaml.safe_dump(sections(url, server=server, state_dir=str(folder / "state"))))
    with process("-m", "api_gateway", "--config", str(path), cwd=folder, **hooked(folder, SHORT_LEASES)) as running:
        yield running


def in_flight(running: Running) -> int:
    answer = running.ask("/clients/acme")
    assert answer.status == 200, answer.body
    return int(answer.json()["concurrency"][0]["in_flight"])


def begin(stack: ExitStack, port: int, count: int) -> list[RawClient]:
    clients = [stack.enter_context(RawClient(port)) for _ in range(count)]
    for client in clients:
        client.request("GET", "/api/x", (CLIENT,))
    return clients


def refused(clients: list[RawClient], count: int) -> list[RawClient]:
    """Return the clients that are not refused; fail unless so many are refused, for this limit."""
    waiting, found = list(clients), 0
    for client in clients:
        client.sock.settimeout(0.05)

    def are_refused() -> bool:
        nonlocal found
        for client in [*waiting]:
            try:
                if client.fill():
                    client.sock.settimeout(30)
                    answer = client.answer()
                    assert (answer.status, json.loads(answer.body)["reason"]) == (429, "concurrency_exceeded")
                    waiting.remove(client)
                    found += 1
            except TimeoutError:
                continue
        return found >= count

    eventually(are_refused, f"{count} are refused")
    for client in waiting:
        client.sock.settimeout(30)
    assert found == count
    return waiting


def test_workers_share_a_limit_and_a_killed_worker_returns_its_slots(tmp_path: Path, up: HoldingUpstream) -> None:
    with workers(tmp_path, up.url) as running, ExitStack() as stack:
        clients = begin(stack, running.port, 16)
        refused(clients, 11)
        eventually(lambda: up.waiting == 5, "five are forwarded")
        assert in_flight(running) == 5
        pids = [pid for pid, words in children(running.popen.pid).items() if words and "gateway worker" in words[-1]]
        assert len(pids) == 2
        for pid in pids:  # all requests end with their workers, without a word to the store
            kill(pid)
        assert up.most == 5

        def has_room() -> bool:
            with RawClient(running.port) as client:
                client.request("GET", "/api/x", (CLIENT,))
                client.sock.settimeout(0.5)
                try:
                    return not client.fill()
                except TimeoutError:
                    return True
                except OSError:
                    return False

        eventually(has_room, "the slots are returned", LONG)
        up.may_respond.set()
        eventually(lambda: in_flight(running) == 0, "nothing is in flight", LONG)
        with RawClient(running.port) as client:
            assert client.get("/api/x", (CLIENT,)).status == 200


def test_a_reload_adopts_the_requests_that_are_open(tmp_path: Path, up: HoldingUpstream) -> None:
    with workers(tmp_path, up.url) as running, ExitStack() as stack:
        begin(stack, running.port, 4)
        eventually(lambda: up.waiting == 4, "four are forwarded")
        path = tmp_path / "gateway.yaml"
        changed = yaml.safe_load(path.read_text())
        changed["limits"] = [{"name": "few", "concurrent": 3, "routes": ["all"]}]
        path.write_text(yaml.safe_dump(changed))
        running.signal(signal.SIGHUP)
        eventually(lambda: "configuration reloaded (SIGHUP)" in running.errors, "it reloads", LONG)
        refused(begin(stack, running.port, 2), 2)
        assert in_flight(running) == 4
        up.may_respond.set()
        eventually(lambda: in_flight(running) == 0, "all have ended")
        with RawClient(running.port) as client:
            assert client.get("/api/x", (CLIENT,)).status == 200


def is_empty(found: set[str]) -> bool:
    return not found


def shown(gateway: RunningGateway) -> int:
    answer = ask(f"{gateway.url}/clients/acme", headers={"Authorization": "Bearer operator"})
    return int(answer.json()["concurrency"][0]["in_flight"])


def test_gateways_share_a_limit_in_a_store_that_is_lost_and_returns_empty(
    tmp_path: Path, up: HoldingUpstream, store: StoreServer
) -> None:
    described = sections(up.url, store={"url": store.url, "decision_timeout": 5}, admin={"token": "operator"})
    with (
        running_gateway(described, tmp_path / "one") as one,
        running_gateway(described, tmp_path / "two") as two,
        ExitStack() as stack,
    ):
        begin(stack, one.port, 3)
        eventually(lambda: up.waiting == 3, "three are forwarded")
        assert len(refused(begin(stack, two.port, 6), 4)) == 2
        assert (shown(one), shown(two)) == (5, 5)
        store.restart_empty()
        eventually(lambda: one.live.limiter.batcher.is_usable and two.live.limiter.batcher.is_usable, "it is back")
        eventually(lambda: shown(one) == 5, "both have told the store of their requests", LONG)
        assert refused(begin(stack, two.port, 2), 2) == []
        assert up.most == 5
        up.may_respond.set()
        eventually(lambda: (shown(one), shown(two)) == (0, 0), "all have ended")


def test_whatever_ends_requests_of_two_gateways_their_sum_returns_to_zero(tmp_path: Path, store: StoreServer) -> None:
    upstream = RawUpstream(misbehaving(2))
    described = sections(upstream.url, store={"url": store.url}, admin={"token": "operator"})
    described["upstreams"]["up"]["circuit_breaker"] = NEVER_OPEN
    paths = ("/api/x", "/api/y")
    with (
        running_gateway(described, tmp_path / "one") as one,
        running_gateway(described, tmp_path / "two") as two,
    ):

        def many(seed: int) -> None:
            choose = random.Random(seed)
            for _ in range(60):
                with suppress(OSError):
                    one_request(choose.choice((one, two)).port, choose, paths, ("acme",))

        threads = [threading.Thread(target=many, args=(seed,)) for seed in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        eventually(lambda: (shown(one), shown(two)) == (0, 0), "all have ended", LONG)
        for gateway in (one, two):
            slots = gateway.server._app.state.gateway.slots
            assert not slots.counters
            eventually(partial(is_empty, slots.unconfirmed), "the store knows all leases", LONG)
    upstream.close()
