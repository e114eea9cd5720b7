"""Two gateway processes on a cluster of three nodes: every limit is kept, also after a kill and a fail-over."""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from api_gateway.limits.concurrency_leases import RENEWAL_INTERVAL
from api_gateway.limits.concurrency_ops import LEASE
from tests.kit import RawClient, RawRequest, RawUpstream, Wire, ask, eventually, reply
from tests.process.test_concurrency import SHORT_LEASES
from tests.processes import Running, hooked, process
from tests.store.test_cluster_batcher import cluster, url_of
from tests.store_kit import StoreServer

__all__ = ["cluster"]  # a fixture of this module, too
pytestmark = pytest.mark.timeout(240)  # starts of processes take long on a busy machine

CAPACITY = 400
QUOTA = 60
SLOTS = 4
LONG = LEASE + 60


class Holding(RawUpstream):
    """An upstream that holds requests for /api/hold, and responds to others after a moment.

    `most` is the largest number of requests of a client at the same time.
    """

    def __init__(self) -> None:
        self.may_respond = threading.Event()
        self.lock = threading.Lock()
        self.open: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        super().__init__(self._respond)

    def _respond(self, wire: Wire, request: RawRequest) -> None:
        client = request.all("x-client-id")[0].decode()
        with self.lock:
            self.open[client] += 1
            self.most[client] = max(self.most[client], self.open[client])
        if b"/api/hold" in request.line:
            self.may_respond.wait(120)
        else:
            time.sleep(random.random() / 50)
        with self.lock:
            self.open[client] -= 1
        reply()(wire, request)


@pytest.fixture
def up() -> Iterator[Holding]:
    upstream = Holding()
    yield upstream
    upstream.may_respond.set()
    upstream.close()


@pytest.fixture
def gateways(tmp_path: Path, up: Holding, cluster: list[StoreServer]) -> Iterator[list[Running]]:
    """Run two gateways; the bucket of a client does not refill, and its quota is the tightest of its limits."""
    sections: dict[str, Any] = {
        "server": {"port": 0, "max_event_loop_lag": None},
        "tiers": {"FREE": {"rate": 0.001, "capacity": CAPACITY}},
        "address_limit": {"rate": 0},
        "upstreams": {"up": {"targets": [{"url": up.url}], "retry": {"attempts": 1}, "timeouts": {"response": 120}}},
        "routes": [{"name": "all", "path": "/api", "upstream": "up"}],
        "limits": [
            {"name": "hourly", "rate": 0.001, "capacity": 2 * QUOTA, "key": ["client", "route"]},
            {"name": "monthly", "quota": QUOTA, "period": "month"},
            {"name": "few", "concurrent": SLOTS},
        ],
        "store": {"url": url_of(cluster[:3]), "decision_timeout": 5, "min_gateway_processes": 2},
    }
    for node in cluster[:3]:
        node.admin.flushall()  # also the heartbeats of the gateways of a test before
    with ExitStack() as stack:
        running = []
        for name in ("one", "two"):
            folder = tmp_path / name
            folder.mkdir()
            path = folder / "gateway.yaml"
            path.write_text(yaml.safe_dump({**sections, "state_dir": str(folder / "state")}))
            hook = hooked(folder, SHORT_LEASES)
            running.append(
                stack.enter_context(process("-m", "api_gateway", "--config", str(path), cwd=folder, **hook))
            )
        for gateway in running:
            eventually(partial(is_sharing, gateway), "it decides by the store")
        yield running


def is_sharing(gateway: Running) -> bool:
    return bool(gateway.ask("/health").json()["store"]["decision_source"] == "store")


def status_of(gateway: Running, client: str, path: str = "/api/x") -> int:
    return ask(f"{gateway.url}{path}", headers={"X-Client-ID": client}).status


def in_flight(gateway: Running, client: str) -> int:
    answer = gateway.ask(f"/clients/{client}")
    return int(answer.json()["concurrency"][0]["in_flight"]) if answer.status == 200 else -1


def are_in_flight(gateways: list[Running], client: str, count: int) -> Callable[[], bool]:
    return lambda: [in_flight(one, client) for one in gateways] == [count] * len(gateways)


def hold(stack: ExitStack, gateway: Running, client: str, count: int) -> None:
    """Send requests that the upstream holds."""
    for _ in range(count):
        one = stack.enter_context(RawClient(gateway.port))
        one.request("GET", "/api/hold", (f"X-Client-ID: {client}",))


def is_refused(gateway: Running, client: str) -> bool:
    """Return whether a further request is refused, because there are as many in flight as the limit allows."""
    answer = ask(f"{gateway.url}/api/x", headers={"X-Client-ID": client})
    assert answer.status in (200, 429), answer.body
    return answer.status == 429 and json.loads(answer.body)["reason"] == "concurrency_exceeded"


def test_all_limits_are_kept_together_and_those_of_a_killed_gateway_return(
    gateways: list[Running], up: Holding
) -> None:
    """At random through both: as many as the quota has, charged to all limits or none. Then one is killed."""
    choose, clients = random.Random(16), ("acme", "beta")
    calls = [(choose.choice(gateways), choose.choice(clients)) for _ in range(280)]
    with ThreadPoolExecutor(12) as pool:
        statuses = list(pool.map(lambda call: status_of(*call), calls))
    assert set(statuses) <= {200, 429}
    for client in clients:
        eventually(are_in_flight(gateways, client, 0), "nothing is in flight")
        while (status := status_of(gateways[0], client)) == 200:  # what too many at a time had hindered
            statuses.append(status)
        assert status == 429
        seen = gateways[1].ask(f"/clients/{client}").json()
        tokens = [round(bucket["tokens"]) for bucket in (seen["bucket"], *seen["limits"])]
        assert tokens == [CAPACITY - QUOTA, 2 * QUOTA - QUOTA], "what the quota refused is refunded to the buckets"
    assert statuses.count(200) == 2 * QUOTA
    assert max(up.most.values()) <= SLOTS

    first, second = gateways
    with ExitStack() as stack:
        hold(stack, first, "gamma", 2)
        hold(stack, second, "gamma", 2)
        eventually(are_in_flight(gateways, "gamma", SLOTS), "four are in flight")
        assert [is_refused(one, "gamma") for one in gateways] == [True, True]
        killed = time.monotonic()
        first.popen.kill()
        first.popen.wait()
        is_held = is_refused(second, "gamma")
        assert is_held or time.monotonic() - killed > (LEASE - RENEWAL_INTERVAL) / 2, "until the lease has ended"
        eventually(are_in_flight([second], "gamma", 2), "its lease ends", LONG)
        hold(stack, second, "gamma", 2)
        eventually(are_in_flight([second], "gamma", SLOTS), "as many as were lost are admitted")
        assert is_refused(second, "gamma")
        up.may_respond.set()
        eventually(are_in_flight([second], "gamma", 0), "all have ended", LONG)
        assert status_of(second, "gamma") == 200


def test_a_fail_over_with_leases_held_loses_none_of_them(
    gateways: list[Running], up: Holding, cluster: list[StoreServer]
) -> None:
    """While the node of the key is gone, each gateway has its half of the limit; the elected replica then counts all.

    This ends the cluster as it was, so it is the last of the tests.
    """
    first, second = gateways
    client = client_on(cluster[2], first)
    for node in cluster:
        node.admin.config_set("cluster-node-timeout", "1000")
        node.admin.config_set("cluster-replica-validity-factor", "0")
    with ExitStack() as stack:
        hold(stack, first, client, SLOTS - 1)
        eventually(are_in_flight(gateways, client, SLOTS - 1), "three are in flight")
        cluster[2].kill()
        eventually(lambda: is_refused(first, client), "three are more than its half")
        hold(stack, second, client, SLOTS)
        eventually(lambda: up.open[client] == SLOTS - 1 + SLOTS // 2, "its half is admitted")
        assert is_refused(second, client)
        cluster[3].admin.config_set("cluster-replica-no-failover", "no")
        for gateway in gateways:
            eventually(partial(is_sharing, gateway), "the replica has taken over", LONG)
        most = SLOTS - 1 + SLOTS // 2
        eventually(are_in_flight(gateways, client, most), "the store counts all of them", LONG)
        assert [is_refused(one, client) for one in gateways] == [True, True]
        assert up.most[client] == most
        up.may_respond.set()
        eventually(are_in_flight(gateways, client, 0), "all have ended", LONG)
        assert [status_of(one, client) for one in gateways] == [200, 200]


def client_on(node: StoreServer, gateway: Running) -> str:
    """Return a client whose leases are on that node: those of a request that has ended are kept until they end."""
    for number in range(50):
        before = set(node.admin.keys("gateway:slots:*"))
        assert status_of(gateway, f"client-{number}") == 200
        if set(node.admin.keys("gateway:slots:*")) - before:
            return f"client-{number}"
    raise AssertionError("no client is on that node")
