"""New, rotated and revoked keys on several gateways and workers: how soon each of them follows.

`pytest -s` shows the measured times.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.kit import RawClient, RawUpstream, eventually, reply
from tests.processes import Running, children, config_file, process
from tests.store_kit import StoreServer

PROMISED = 1.0  # seconds until a change holds everywhere
ROUNDS = 5
CONNECTIONS = 16  # to a gateway with two workers, so that both have some
OVERLAP = 2.0  # seconds for which a rotated key stays valid
GENEROUS = "tiers: {FREE: {rate: 100000, capacity: 1000000}}\naddress_limit: {rate: 0}\nlog: {access: false}\n"


@pytest.fixture(scope="module")
def up() -> Iterator[RawUpstream]:
    upstream = RawUpstream(reply(b"fine"))
    yield upstream
    upstream.close()


class Place:
    """A kept connection to one gateway or worker, by which it is asked whether it accepts a key."""

    def __init__(self, port: int) -> None:
        self.client = RawClient(port)

    def status(self, key: str) -> int:
        """Return the status of a request with a key."""
        return self.client.get("/api/up", (f"X-API-Key: {key}",)).status


@contextmanager
def places_at(*ports: int) -> Iterator[list[Place]]:
    """Connect to these ports, and close the connections at the end."""
    places = [Place(port) for port in ports]
    try:
        yield places
    finally:
        for place in places:
            place.client.close()


def until_all(places: list[Place], key: str, expected: int) -> float:
    """Return the seconds until every place responds with this status, each asked in a thread of its own."""
    began, ended = time.monotonic(), []

    def follow(place: Place) -> None:
        eventually(lambda: place.status(key) == expected, f"status {expected}")
        ended.append(time.monotonic())

    threads = [threading.Thread(target=follow, args=(place,)) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ended) == len(places), "a place has not followed"
    return max(ended) - began


def call(running: Running, method: str, path: str, **body: Any) -> Any:
    """Call an operator endpoint, which must succeed."""
    content = {"Content-Type": "application/json"}
    answer = running.ask(path, method=method, headers=content, body=json.dumps(body).encode() if body else b"{}")
    assert answer.status < 300, answer.body
    return answer.json()


def measure(operated: list[Running], places: list[Place], show: Callable[[str], None]) -> None:
    """Create, rotate and revoke keys at each gateway in turn, and measure how soon all places follow.

    The keys are rotated one after the other, and then their overlaps end.
    """
    times: dict[str, list[float]] = {"created": [], "rotated": [], "revoked": []}
    rotated: list[tuple[Running, float, Any, Any]] = []  # where, when, the former key and its successor
    for number in range(ROUNDS):
        one = operated[number % len(operated)]
        made = call(one, "POST", "/clients/acme/keys", label=f"round {number}")
        times["created"].append(until_all(places, made["key"], 200))
        began = time.monotonic()
        path = f"/clients/acme/keys/{made['id']}/rotate"
        new = call(operated[-1 - number % len(operated)], "POST", path, overlap_seconds=OVERLAP)
        times["rotated"].append(until_all(places, new["key"], 200))
        if time.monotonic() - began < OVERLAP:
            statuses = {place.status(made["key"]) for place in places}
            assert statuses == {200} or time.monotonic() - began >= OVERLAP, "both are valid in the overlap"
        rotated.append((one, began, made, new))
    for one, began, made, new in rotated:
        until_all(places, made["key"], 401)
        assert time.monotonic() - began >= OVERLAP, "not before the overlap is over"
        assert {place.status(new["key"]) for place in places} == {200}, "the successor stays valid"
        call(one, "DELETE", f"/clients/acme/keys/{new['id']}")
        times["revoked"].append(until_all(places, new["key"], 401))
    for name, found in times.items():
        show(f"{name}: median {median(found) * 1000:.0f} ms, longest {max(found) * 1000:.0f} ms of {ROUNDS}")
        assert median(found) < PROMISED, (name, found)


@contextmanager
def two_gateways(up: RawUpstream, server: StoreServer, folder: Path, extra: str = "") -> Iterator[list[Running]]:
    """Run two gateways with one store, each with its own folder, as on two machines."""
    with ExitStack() as stack:
        running = []
        for name in ("one", "other"):
            (place := folder / name).mkdir()
            store = f'store: {{url: "{server.url}", timeout: 0.5, decision_timeout: 0.1}}\n'
            path = config_file(place, up.url, f"state_dir: {place / 'state'}\n{GENEROUS}{store}{extra}")
            running.append(
                stack.enter_context(process("-m", "api_gateway", "--config", path, "--port", "0", cwd=place))
            )
        for one in running:
            assert one.port
        yield running


def test_two_machines_with_one_store_follow_within_a_second(
    up: RawUpstream, store_server: StoreServer, tmp_path: Path
) -> None:
    with (
        two_gateways(up, store_server, tmp_path) as gateways,
        places_at(*(one.port for one in gateways)) as places,
    ):
        measure(gateways, places, print)


def test_two_workers_with_one_file_follow_within_a_second(up: RawUpstream, tmp_path: Path) -> None:
    path = config_file(tmp_path, up.url, f"state_dir: {tmp_path / 'state'}\n{GENEROUS}")
    with process("-m", "api_gateway", "--config", path, "--port", "0", "--workers", "2", cwd=tmp_path) as running:
        assert running.port
        workers = [
            pid for pid, words in children(running.popen.pid).items() if not any("guard" in word for word in words)
        ]
        before = {pid: descriptors(pid) for pid in workers}
        with places_at(*[running.port] * CONNECTIONS) as places:
            for place in places:
                assert place.client.get("/api/up").status == 200
            busy = [pid for pid in workers if descriptors(pid) > before[pid]]
            assert len(busy) >= 2, "the connections are of both workers"
            measure([running], places, print)


def descriptors(pid: int) -> int:
    """Return the number of open descriptors of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def test_without_the_store_known_keys_are_accepted_for_the_stated_time(
    up: RawUpstream, store_server: StoreServer, tmp_path: Path
) -> None:
    """Then they are refused with 503, until the store has returned; a key that is not known is refused at once."""
    tolerance = 1.5
    extra = f"identity: {{api_key: {{outage_tolerance: {tolerance}}}}}\n"
    with (
        two_gateways(up, store_server, tmp_path, extra) as gateways,
        places_at(*(one.port for one in gateways)) as places,
    ):
        made = call(gateways[0], "POST", "/clients/acme/keys")
        until_all(places, made["key"], 200)
        store_server.pause()
        began = time.monotonic()
        statuses = [place.status(made["key"]) for place in places]
        assert statuses == [200, 200] or time.monotonic() - began > tolerance
        took = until_all(places, made["key"], 503)
        assert took >= tolerance - 0.1
        print(f"accepted for {took:.1f} s after the store became unavailable, of {tolerance:g} s stated")
        answer = places[0].client.get("/api/up", (f"X-API-Key: {made['key']}",))
        assert json.loads(answer.body)["reason"] == "store_unavailable"
        assert places[1].client.get("/api/up").status == 200, "a client without a key is served"
        store_server.resume()
        until_all(places, made["key"], 200)
