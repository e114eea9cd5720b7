"""New, rotated and revoked keys on several gateways and workers: how soon each of them follows, and streams end.

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

from tests.kit import RawClient, RawRequest, RawUpstream, Wire, eventually, reply
from tests.processes import Running, children, config_file, process
from tests.store_kit import StoreServer

PROMISED = 1.0  # seconds until a change holds everywhere
ROUNDS = 5
CONNECTIONS = 16  # to a gateway with two workers, so that both have some
STREAMS_END = 10.0  # seconds: two are promised, the rest is for a busy machine
OVERLAP = 2.0  # seconds for which a rotated key stays valid
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nbegun\r\n"
GENEROUS = "tiers: {FREE: {rate: 100000, capacity: 1000000}}\naddress_limit: {rate: 0}\nlog: {access: false}\n"


def behave(wire: Wire, request: RawRequest) -> None:
    if b"/stream" in request.line:
        wire.send(STREAM)  # and no end
    else:
        reply(b"fine")(wire, request)


@pytest.fixture(scope="module")
def up() -> Iterator[RawUpstream]:
    upstream = RawUpstream(behave)
    yield upstream
    upstream.close()


class Place:
    """A kept connection to one gateway or worker, by which it is asked whether it accepts a key."""

    def __init__(self, port: int) -> None:
        self.client = RawClient(port)

    def status(self, key: str) -> int:
        """Return the status of a request with a key."""
        return self.client.get("/api/up", (f"X-API-Key: {key}",)).status

    def open_stream(self, key: str) -> None:
        """Send a request with a key whose response does not end, and read what there is of it."""
        self.client.request("GET", "/api/up/stream", (f"X-API-Key: {key}",))
        assert self.client.read_until(b"begun\r\n") is not None


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
def two_gateways(
    up: RawUpstream, server: StoreServer, folder: Path, extra: str = "", workers: str = "1"
) -> Iterator[list[Running]]:
    """Run two gateways with one store, each with its own folder, as on two machines; the other one has `workers`."""
    with ExitStack() as stack:
        running = []
        for name, count in (("one", "1"), ("other", workers)):
            (place := folder / name).mkdir()
            store = f'store: {{url: "{server.url}", timeout: 0.5, decision_timeout: 0.1}}\n'
            path = config_file(place, up.url, f"state_dir: {place / 'state'}\n{GENEROUS}{store}{extra}")
            command = ("-m", "api_gateway", "--config", path, "--port", "0", "--workers", count)
            running.append(stack.enter_context(process(*command, cwd=place)))
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
        before = {pid: descriptors(pid) for pid in workers_of(running)}
        with places_at(*[running.port] * CONNECTIONS) as places:
            for place in places:
                assert place.client.get("/api/up").status == 200
            busy = [pid for pid, count in before.items() if descriptors(pid) > count]
            assert len(busy) >= 2, "the connections are of both workers"
            measure([running], places, print)


def workers_of(running: Running) -> list[int]:
    """Return the workers of a gateway; with one, the gateway itself."""
    found = children(running.popen.pid)
    return [pid for pid, words in found.items() if not any("guard" in word for word in words)]


def test_streams_of_a_revoked_key_end_in_all_workers_and_machines(
    up: RawUpstream, any_store: StoreServer, tmp_path: Path
) -> None:
    """Those of another key of the same client go on."""
    with two_gateways(up, any_store, tmp_path, workers="2") as (one, other):
        revoked, kept = (call(one, "POST", "/clients/acme/keys") for _ in range(2))
        before = {pid: descriptors(pid) for pid in workers_of(other)}
        ports = (one.port, *[other.port] * CONNECTIONS)
        with places_at(*ports) as ending, places_at(one.port, other.port) as going_on:
            for places, made in ((ending, revoked), (going_on, kept)):
                until_all(places, made["key"], 200)
                for place in places:
                    place.open_stream(made["key"])
            busy = [pid for pid, count in before.items() if descriptors(pid) >= count + 2]  # client and upstream
            assert len(busy) >= 2, "both workers have streams"
            began = time.monotonic()
            call(one, "DELETE", f"/clients/acme/keys/{revoked['id']}")
            for place in ending:
                left = began + STREAMS_END - time.monotonic()
                assert place.client.is_closed(max(left, 0.1)), f"a stream has not ended within {STREAMS_END:g} s"
            print(f"all {len(ending)} streams ended within {time.monotonic() - began:.1f} s")
            assert not any(place.client.is_closed(0.1) for place in going_on)


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
