"""A reload changes what is configured and nothing else: under load nothing is lost, refilled or counted anew."""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Self

import pytest

from api_gateway.reporting.reload_schema import Reloaded
from tests.kit import PATIENCE, Answer, RawClient, RawRequest, RawUpstream, Wire, ask, eventually, reply
from tests.processes import ROOT, Running, children, hooked, is_alive, kill, process

TOKEN = "a-token-for-tests"
LONG = 60.0  # seconds that processes may take on a busy machine
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
HANDSHAKE = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: eA==")


@dataclass
class Site:
    """A gateway whose configuration is a file that tests write anew."""

    folder: Path
    sections: dict[str, Any]
    running: Running = field(init=False)

    def __post_init__(self) -> None:
        self.file = self.folder / "gateway.yaml"
        self.sections.setdefault("admin", {"token": TOKEN})
        self.sections.setdefault("log", {"access": False})
        self.write()

    def write(self) -> None:
        """Write the configuration, by renaming as editors do."""
        fresh = self.folder / "fresh.yaml"
        fresh.write_text(json.dumps(self.sections))
        fresh.replace(self.file)

    def operate(self, path: str, method: str = "GET", token: str = TOKEN) -> Answer:
        return ask(f"{self.running.url}{path}", method=method, headers={"Authorization": f"Bearer {token}"})

    def reload(self) -> Any:
        self.write()
        answer = self.operate("/reload", "POST")
        assert answer.status == 200, answer.body
        return answer.json()

    def hang_up(self) -> None:
        """Reload by signal, and wait until it is done."""
        self.write()
        count = self.running.errors.count("configuration reloaded (SIGHUP)")
        self.running.signal(signal.SIGHUP)
        eventually(lambda: self.running.errors.count("configuration reloaded (SIGHUP)") > count, "it reloads", LONG)

    def counters(self) -> dict[str, float]:
        """Return every counter of the metrics by its series."""
        text = self.operate("/metrics?format=prometheus").body.decode()
        names = re.findall(r"^# TYPE (\S+) (?:counter|histogram)$", text, re.MULTILINE)
        found = re.findall(r"^(\S+?)(\{.*\})? ([0-9.e+-]+)$", text, re.MULTILINE)
        return {name + labels: float(value) for name, labels, value in found if name.startswith(tuple(names))}

    def await_series(self, labels: str) -> None:
        """Wait for a series with these labels: a worker reports a request after its response."""
        eventually(lambda: any(labels in series for series in self.counters()), f"{labels} is counted", LONG)

    def health(self) -> Any:
        return self.operate("/health").json()


@contextmanager
def site(folder: Path, sections: dict[str, Any], *options: str) -> Iterator[Site]:
    """Run a gateway; it ends without an error."""
    one = Site(folder, sections)
    arguments = ["-m", "api_gateway", "--port", "0", "--config", str(one.file), *options]
    with process(
        *arguments, cwd=folder, GATEWAY_STORE__DECISION_TIMEOUT="5"
    ) as running:  # a busy machine's store is patient
        one.running = running
        eventually(lambda: "Listening on" in running.output or running.popen.poll() is not None, "it listens", LONG)
        yield one
        assert running.terminate() == 0, running.errors


def in_front_of(*urls: str, **upstream: Any) -> dict[str, Any]:
    return {
        "upstreams": {"up": {"targets": [{"url": url} for url in urls], **upstream}},
        "routes": [{"name": "all", "path": "/api", "upstream": "up"}],
        "tiers": {"FREE": {"rate": 100_000, "capacity": 1_000_000}, "POOR": {"rate": 0.001, "capacity": 10}},
        "clients": {"poor": {"tier": "POOR"}},
    }


def streams_and_sockets(wire: Wire, request: RawRequest) -> bool | None:
    """Answer with events without end, as a WebSocket that echoes, or plainly."""
    if b"/events" in request.line:
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number in range(100_000):
            wire.send(b"%x\r\ndata: %08d\n\n\r\n" % (16, number))
            time.sleep(0.01)
    elif b"/socket" in request.line:
        wire.send(SWITCH)
        while wire.buffer or wire.fill():
            data, wire.buffer = wire.buffer, b""
            wire.send(data)
        return False
    else:
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfine")
    return None


class Load:
    """Clients on connections that they keep. `failures` is all that was not answered well."""

    def __init__(self, port: int, count: int = 6) -> None:
        self.failures: list[str] = []
        self.answered = 0
        self._port = port
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(count)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(PATIENCE)

    def _run(self) -> None:
        try:
            with RawClient(self._port) as client:
                while not self._is_over.wait(0.001):
                    answer = client.get("/api/up")
                    assert (answer.status, answer.body, answer.all("connection")) == (200, b"fine", []), answer
                    self.answered += 1
        except (OSError, AssertionError) as error:
            self.failures.append(repr(error))


@contextmanager
def events(port: int) -> Iterator[Callable[[], None]]:
    """Open an event stream; yields a function that asserts that the next events come, none left out."""
    with RawClient(port) as client:
        client.request(target="/api/events")
        assert b"200 OK" in (client.read_until(b"\r\n\r\n") or b"")
        last = -1

        def go_on() -> None:
            nonlocal last
            for _ in range(3):
                found = re.search(rb"data: (\d+)", client.read_until(b"\n\n") or b"")
                assert found is not None, "the stream has ended"
                assert int(found[1]) == last + 1
                last += 1

        yield go_on


@contextmanager
def web_socket(port: int) -> Iterator[Callable[[], None]]:
    """Open a WebSocket; yields a function that asserts that it echoes."""
    with RawClient(port) as client:
        client.request(target="/api/socket", headers=HANDSHAKE)
        assert b" 101 " in (client.read_until(b"\r\n\r\n") or b"")

        def go_on() -> None:
            client.send(b"\x81\x02hi")
            assert client.read_exactly(4) == b"\x81\x02hi"

        yield go_on


def variants(url: str) -> Iterator[dict[str, Any]]:
    """Yield ever new settings of an upstream, every kind of setting among them."""
    for number in range(1, 100):
        yield {
            "targets": [{"url": url, "weight": 1 + number % 3}],
            "timeouts": {"connect": 1 + number % 5, "response": 20 + number},
            "retry": {"attempts": 1 + number % 3},
            "pool": {"max_connections": 100 + number},
            "balance": ["round_robin", "least_requests"][number % 2],
            "circuit_breaker": {"failure_threshold": 5 + number, "window": 10 + number},
            "concurrency": [None, {"limit": 300}, {"adaptive": {"min_limit": 200}}][number % 3],
            "health_check": [None, {"path": "/api/up", "interval": 1}][number % 2],
        }


@pytest.mark.parametrize("workers", [1, 2])
def test_reloads_under_load_lose_nothing_and_forget_nothing(tmp_path: Path, workers: int) -> None:
    up = RawUpstream(streams_and_sockets)
    with site(tmp_path, in_front_of(up.url), "--workers", str(workers)) as one:
        port = one.running.port
        with RawClient(port) as poor:
            statuses = [poor.get(headers=("X-Client-ID: poor",)).status for _ in range(11)]
            assert statuses == [200] * 10 + [429]
        with events(port) as stream, web_socket(port) as socket, RawClient(port) as kept, Load(port) as load:
            eventually(lambda: load.answered > 100, "it is under load", LONG)
            before = one.counters()
            for number, settings in zip(range(6), variants(up.url), strict=False):
                one.sections["upstreams"]["up"] = settings
                one.sections["routes"][1:] = [{"name": f"new{number}", "path": f"/api/{number}", "upstream": "up"}]
                one.sections["tiers"]["POOR"] = {"rate": 0.001 * (number + 2), "capacity": 10 * (number + 2)}
                if number % 2:
                    one.hang_up()
                else:
                    Reloaded.model_validate(one.reload())
                stream()
                socket()
                assert kept.get(f"/api/{number}").status == 200
                after = one.counters()
                lost = {series: value for series, value in before.items() if after.get(series, -1) < value}
                assert not lost, "a counter fell"
                one.await_series(f'route="new{number}"')
                assert kept.get(headers=("X-Client-ID: poor",)).status == 429, "a bucket was refilled"
                before = after
            answered = load.answered
            eventually(lambda: load.answered > answered + 100, "it is still under load", LONG)
            stream()
            socket()
        assert load.failures == []
        assert "ERROR" not in one.running.errors
        assert len({wire.sock for wire in up.wires}) < 60, "connections to the upstream were kept"
    up.close()


def test_a_breaker_that_is_open_stays_open_and_goes_by_its_new_terms(tmp_path: Path) -> None:
    up = RawUpstream(reply(b"no", b"500 Oops"))
    breaker = {"failure_threshold": 3, "recovery_timeout": 600, "max_recovery_timeout": 600, "jitter": 0}
    with site(tmp_path, in_front_of(up.url, circuit_breaker=breaker)) as one:
        with RawClient(one.running.port) as client:
            assert [client.get().status for _ in range(4)] == [500, 500, 500, 503]
            before = one.operate("/circuit-breakers").json()["circuit_breakers"]["up"]
            breaker.update(failure_threshold=4, recovery_timeout=300)
            changes = {change["setting"]: (change["old"], change["new"]) for change in one.reload()["changes"]}
            assert changes["upstreams.up.circuit_breaker.failure_threshold"] == (3, 4)
            after = one.operate("/circuit-breakers").json()["circuit_breakers"]["up"]
            assert client.get().status == 503
        assert (after["state"], after["opened_total"]) == ("OPEN", 1)
        since = [datetime.fromisoformat(view["since"]) for view in (before, after)]
        assert abs(since[1] - since[0]) < timedelta(seconds=1), "an age and two clocks, read one after the other"
        assert after["last_opened"] == before["last_opened"]
        assert after["thresholds"]["failure_threshold"] == 4
        assert before["next_probe_in_seconds"] > 500
        assert after["next_probe_in_seconds"] < 301, "what is left changes with recovery_timeout"
        history = one.operate("/circuit-breakers/up/history").json()["history"]
        assert [move["to"] for move in history] == ["OPEN"]
        one.sections["upstreams"]["other"] = one.sections["upstreams"].pop("up")  # renamed: it starts anew
        one.sections["routes"][0]["upstream"] = "other"
        one.reload()
        assert list(one.operate("/circuit-breakers").json()["circuit_breakers"]) == ["other"]
        one.sections["upstreams"]["up"] = one.sections["upstreams"].pop("other")  # and back: it is remembered
        one.sections["routes"][0]["upstream"] = "up"
        one.reload()
        back = one.operate("/circuit-breakers").json()["circuit_breakers"]["up"]
        assert (back["state"], back["opened_total"]) == ("OPEN", 1)
    up.close()


def test_targets_that_stay_keep_what_is_known_of_them(tmp_path: Path) -> None:
    good, bad, new = RawUpstream(), RawUpstream(reply(b"no", b"500 Oops")), RawUpstream()
    breaker = {"failure_threshold": 3, "recovery_timeout": 600, "max_recovery_timeout": 600, "minimum_calls": 1000}
    settings = {"circuit_breaker": breaker, "retry": {"attempts": 1}, "slow_start": 600}
    with site(tmp_path, in_front_of(good.url, bad.url, **settings)) as one, RawClient(one.running.port) as client:
        for _ in range(30):
            client.get()
        targets = one.operate("/circuit-breakers").json()["targets"]["up"]
        assert targets[bad.url]["passive"]["ejected"]
        one.sections["upstreams"]["up"]["targets"] = [{"url": url} for url in (bad.url, new.url, good.url)]
        one.reload()
        targets = one.operate("/circuit-breakers").json()["targets"]["up"]
        assert targets[bad.url]["passive"]["ejected"]
        assert targets[bad.url]["passive"]["ejections_total"] == 1
        assert targets[good.url]["slow_start_ratio"] == 1
        assert targets[new.url]["slow_start_ratio"] < 0.5, "a new target starts slowly"
        wires = len(good.wires)
        assert {client.get().status for _ in range(30)} == {200}
        assert len(good.wires) == wires, "its connection was kept"
        one.sections["upstreams"]["up"]["targets"] = [{"url": new.url}]
        one.reload()
        assert client.get().status == 200
        eventually(lambda: all(wire.sock.fileno() < 0 for wire in good.wires), "idle connections are closed")
        assert list(one.operate("/circuit-breakers").json()["targets"]["up"]) == [new.url]
    for each in (good, bad, new):
        each.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_wrong_configuration_changes_nothing_and_shows(tmp_path: Path, workers: int) -> None:
    up = RawUpstream()
    with site(tmp_path, in_front_of(up.url), "--workers", str(workers)) as one:
        one.file.write_text(json.dumps({**one.sections, "server": {"prot": 1}, "default_tier": "NONE"}))
        answer = one.operate("/reload", "POST")
        assert (answer.status, answer.json()["reason"]) == (422, "invalid_value")
        assert any("server.prot" in line for line in answer.json()["errors"])
        assert ask(f"{one.running.url}/api/x").status == 200
        eventually(lambda: one.health()["status"] == "warn", "it shows", LONG)
        assert any("server.prot" in line for line in one.health()["configuration"]["errors"])
        assert ask(f"{one.running.url}/health").json() == {"status": "warn"}
        counters = one.operate("/metrics?format=prometheus").body.decode()
        assert "gateway_config_last_reload_successful 0.0" in counters
        assert 'gateway_config_reloads_total{result="invalid"} 1.0' in counters
        one.reload()
        eventually(lambda: one.health()["status"] == "pass", "it is right again", LONG)
        counters = one.operate("/metrics?format=prometheus").body.decode()
        assert "gateway_config_last_reload_successful 1.0" in counters
        assert 'gateway_config_reloads_total{result="success"} 1.0' in counters
        one.sections["upstreams"]["up"]["targets"] = [{"url": "https://127.0.0.1:1"}]
        one.sections["upstreams"]["up"]["tls"] = {"ca_file": str(tmp_path / "missing.pem")}
        one.write()
        answer = one.operate("/reload", "POST")  # found only when it is tried
        assert (answer.status, answer.json()["reason"]) == (422, "invalid_value")
        assert ask(f"{one.running.url}/api/x").status == 200
    up.close()


def test_a_half_written_file_does_not_replace_services_by_the_demo(tmp_path: Path) -> None:
    """A file that is cut before its upstreams may be valid; its requests would get responses of the demo."""
    up = RawUpstream(reply(b"own"))
    with site(tmp_path, in_front_of(up.url)) as one:
        for cut in ({"server": {"drain_timeout": 7}}, {"tiers": one.sections["tiers"]}, {"state_dir": None}):
            one.file.write_text(json.dumps(cut))
            answer = one.operate("/reload", "POST")
            assert (answer.status, answer.json()["reason"]) == (422, "invalid_value"), cut
            assert "does not replace services by the demo" in answer.json()["errors"][0]
            assert ask(f"{one.running.url}/api/users").body == b"own"
        one.running.signal(signal.SIGHUP)
        eventually(lambda: "configuration not reloaded (SIGHUP)" in one.running.errors, "it is refused", LONG)
        assert ask(f"{one.running.url}/api/users").body == b"own"
    up.close()


def test_settings_that_need_a_restart_are_named_and_stay_and_secrets_are_not_shown(tmp_path: Path) -> None:
    up = RawUpstream()
    with site(tmp_path, in_front_of(up.url)) as one:
        one.sections["server"] = {"host": "127.0.0.2", "drain_timeout": 7}
        one.sections["state_dir"] = str(tmp_path / "elsewhere")
        one.sections["admin"] = {"token": "another-secret-token"}
        result = one.reload()
        assert result["needs_restart"] == ["server.host", "state_dir"]
        assert f"127.0.0.1:{one.running.port}" in one.running.url
        (token,) = [change for change in result["changes"] if change["setting"] == "admin.token"]
        assert (token["secret"], token["old"], token["new"]) == (True, None, None)
        assert one.operate("/metrics").status == 401
        assert one.operate("/metrics", token="another-secret-token").status == 200
        assert "another-secret-token" not in json.dumps(result) + one.running.errors
        line = "server.host: '127.0.0.1' -> '127.0.0.2'; needs a restart"
        eventually(lambda: line in one.running.errors, "it is logged", LONG)
    up.close()


def test_a_request_ends_on_the_configuration_that_it_began_with(tmp_path: Path) -> None:
    go_on = threading.Event()

    def behave(wire: Wire, request: RawRequest) -> None:
        if b"/slow" in request.line:
            go_on.wait(LONG)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    up = RawUpstream(behave)
    with site(tmp_path, in_front_of(up.url, timeouts={"response": 60})) as one:  # noqa: SIM117 - the second needs the first
        with RawClient(one.running.port) as slow, RawClient(one.running.port) as kept:
            slow.request(target="/api/slow")
            eventually(lambda: any(b"/slow" in request.line for request in up.requests), "it is under way")
            assert kept.get("/api/x").status == 200
            one.sections["routes"][0]["path"] = "/api/elsewhere"
            one.sections["upstreams"] = {"new": {"targets": [{"url": up.url}], "timeouts": {"response": 0.2}}}
            one.sections["routes"][0]["upstream"] = "new"
            one.reload()
            assert kept.get("/api/x").status == 404
            assert kept.get("/api/elsewhere").status == 200
            go_on.set()
            assert (slow.answer().body, slow.get("/api/x").status) == (b"ok", 404)
    up.close()


def test_clients_and_tiers_follow_and_buckets_keep_their_share(tmp_path: Path) -> None:
    up = RawUpstream()
    with site(tmp_path, in_front_of(up.url)) as one:
        one.sections["tiers"] |= {"GOLD": {"rate": 0.01, "capacity": 100}}
        one.sections["clients"]["named"] = {"tier": "POOR"}
        one.reload()
        with RawClient(one.running.port) as client:

            def left(name: str) -> tuple[int, str]:
                answer = client.get(headers=(f"X-Client-ID: {name}",))
                view = one.operate(f"/clients/{name}").json()
                return int(answer.all("x-ratelimit-remaining")[0]), view["tier"]["name"]

            assert [left("named")[0] for _ in range(5)] == [9, 8, 7, 6, 5]
            one.sections["clients"]["named"] = {"tier": "GOLD"}
            one.reload()
            assert left("named") == (49, "GOLD")
            one.sections["default_tier"] = "POOR"
            one.sections["tiers"]["POOR"] = {"rate": 0.01, "capacity": 50}
            one.reload()
            assert left("stranger") == (49, "POOR")
            registered = ask(
                f"{one.running.url}/clients/registered/tier",
                method="POST",
                headers={"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"},
                body=b'{"tier": "GOLD"}',
            )
            assert registered.status == 200
            assert [left("registered")[0] for _ in range(50)][-1] == 50
            del one.sections["tiers"]["GOLD"]
            one.sections["clients"] = {}
            one.reload()
            assert left("registered") == (24, "POOR"), "half of another bucket, less one"
            assert left("named") == (23, "POOR")
            line = "clients registered for a tier that is no longer configured: 1 (registered)"
            eventually(lambda: line in one.running.errors, "it is logged", LONG)
    up.close()


def workers_of(one: Site) -> set[int]:
    found = children(one.running.popen.pid).items()
    return {pid for pid, arguments in found if arguments and "gateway worker" in arguments[-1]}


def test_a_worker_that_is_replaced_has_the_configuration_in_force(tmp_path: Path) -> None:
    up = RawUpstream()
    with site(tmp_path, in_front_of(up.url), "--workers", "2") as one:
        one.sections["routes"] = [{"name": "new", "path": "/api/new", "upstream": "up"}]
        one.reload()
        one.file.write_text("half: [")  # what the file says now is of no concern to a worker
        for pid in workers_of(one):
            kill(pid)
            eventually(lambda: not is_alive(pid) and len(workers_of(one)) == 2, "it is replaced", LONG)  # noqa: B023
        eventually(lambda: len(workers_of(one)) == 2 and answers(one, "/api/new"), "they serve", LONG)
        assert {ask(f"{one.running.url}/api/new").status for _ in range(12)} == {200}
        assert {ask(f"{one.running.url}/api/x").status for _ in range(12)} == {404}
    up.close()


def answers(one: Site, path: str) -> bool:
    try:
        return ask(f"{one.running.url}{path}").status == 200
    except OSError:
        return False


def test_a_rolling_restart_refuses_a_reload_and_keeps_the_configuration(tmp_path: Path) -> None:
    up = RawUpstream()
    with site(tmp_path, in_front_of(up.url), "--workers", "2") as one:
        before = workers_of(one)
        one.sections["default_tier"] = "POOR"
        one.write()
        one.running.signal(signal.SIGUSR2)
        refused: list[Answer] = []

        def is_restarted() -> bool:
            answer = one.operate("/reload", "POST")
            if answer.status == 503:
                refused.append(answer)
            return "rolling restart complete" in one.running.errors or answer.status == 200

        eventually(is_restarted, "the workers are restarted", LONG)
        assert {(answer.status, answer.json()["reason"]) for answer in refused} <= {(503, "draining")}
        eventually(lambda: not before & workers_of(one), "all workers are new", LONG)
    up.close()


OFTEN = """
from api_gateway.process.config_watch import ConfigWatch

ConfigWatch.__init__.__defaults__ = (0.2,)  # seconds between checks
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_watch_notices_how_kubernetes_and_editors_change_files(tmp_path: Path, workers: int) -> None:
    up = RawUpstream()
    sections = in_front_of(up.url)
    mounted = tmp_path / "mounted"

    def swap(version: str, text: str, token: str) -> None:
        folder = mounted / version
        folder.mkdir(parents=True)
        (folder / "gateway.yaml").write_text(text)
        (folder / "token").write_text(token)
        link = mounted / "..new"
        link.symlink_to(version)
        link.replace(mounted / "..data")

    sections |= {"admin": {"token_file": str(mounted / "token")}, "log": {"access": False}}
    swap("..1", json.dumps(sections), TOKEN)
    for name in ("gateway.yaml", "token"):
        (mounted / name).symlink_to(f"..data/{name}")
    arguments = ("-m", "api_gateway", "--port", "0", "--config", str(mounted / "gateway.yaml"), "--watch")
    with process(*arguments, "--workers", str(workers), cwd=tmp_path, **hooked(tmp_path, OFTEN)) as running:
        eventually(lambda: "Listening on" in running.output, "it listens", LONG)

        def has(token: str, path: str) -> bool:
            operator = ask(f"{running.url}/metrics", headers={"Authorization": f"Bearer {token}"}).status
            return (operator, ask(f"{running.url}{path}").status) == (200, 200)

        assert has(TOKEN, "/api/x")
        sections["routes"][0]["path"] = "/api/second"
        text = json.dumps(sections)
        swap("..2", text, "the-second-token")
        eventually(lambda: has("the-second-token", "/api/second/x"), "a swapped link is noticed", LONG)
        assert not has(TOKEN, "/api/second/x")
        file = (mounted / "gateway.yaml").resolve()
        file.write_text(text[:-20])  # half written, and left so
        eventually(lambda: "configuration not reloaded (--watch)" in running.errors, "it is read and refused", LONG)
        assert has("the-second-token", "/api/second/x")
        file.write_text(text.replace("/api/second", "/api/third"))
        eventually(lambda: has("the-second-token", "/api/third/x"), "writing in place is noticed", LONG)
        assert running.terminate() == 0
    up.close()


def test_any_server_can_reload_what_came_from_the_usual_sources(tmp_path: Path) -> None:
    up = RawUpstream()
    one = Site(tmp_path, in_front_of(up.url))
    variables = {"GATEWAY_CONFIG": str(one.file), "HOME": str(tmp_path)}
    arguments = ("-m", "uvicorn", "api_gateway.main:app", "--port", "0", "--log-level", "info")
    with process(*arguments, cwd=tmp_path, **variables) as running:
        eventually(lambda: "running on" in running.errors, "it listens", LONG)
        found = re.search(r"http://127.0.0.1:(\d+)", running.errors)
        assert found is not None
        assert ask(f"{found[0]}/api/new/x").status == 200
        one.sections["routes"][0]["path"] = "/api/only"
        one.write()
        answer = ask(f"{found[0]}/reload", method="POST", headers={"Authorization": f"Bearer {TOKEN}"})
        assert (answer.status, answer.json()["result"]) == (200, "reloaded")
        assert ask(f"{found[0]}/api/new/x").status == 404
        assert ask(f"{found[0]}/api/only/x").status == 200
    up.close()


def test_signals_that_mean_nothing_end_nothing(tmp_path: Path) -> None:
    up = RawUpstream()
    with site(tmp_path, in_front_of(up.url)) as one:
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            os.kill(one.running.popen.pid, number)
        eventually(lambda: one.running.errors.count("is ignored") == 2, "it says so", LONG)
        assert one.reload()["result"] == "unchanged"
        assert ask(f"{one.running.url}/api/x").status == 200
    up.close()


def test_a_signal_during_the_start_of_workers_ends_nothing_and_is_heeded_afterwards(tmp_path: Path) -> None:
    """For a single process see `test_early_signals`."""
    up = RawUpstream()
    one = Site(tmp_path, in_front_of(up.url))
    options = ("--port", "0", "--workers", "2", "--config", str(one.file))
    with process(str(ROOT / "run_gateway.py"), *options, cwd=tmp_path, PYTHONPATH=str(ROOT)) as running:
        libraries = Path(f"/proc/{running.popen.pid}/maps")
        eventually(lambda: "pydantic_core" in libraries.read_text(), "it imports what it needs", LONG)
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            running.signal(number)
        eventually(lambda: "Listening on" in running.output or running.popen.poll() is not None, "it listens", LONG)
        assert running.popen.poll() is None, running.popen.returncode
        eventually(lambda: "configuration reloaded (SIGHUP)" in running.errors, "it reloads", LONG)
        assert ask(f"{running.url}/api/x").status == 200
        assert running.terminate() == 0, running.errors
    up.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_reload_by_an_operator_is_in_the_audit_log_of_every_worker(tmp_path: Path, workers: int) -> None:
    with site(tmp_path, in_front_of("http://127.0.0.1:9"), "--workers", str(workers)) as one:
        one.sections["tiers"]["POOR"]["capacity"] = 20
        one.reload()
        one.write()  # nothing has changed
        assert one.operate("/reload", "POST").status == 200
        for _ in range(4):  # each worker responds to some
            (changed,) = one.operate("/audit").json()["entries"]
            assert changed["action"] == "configuration_reloaded"
            assert (changed["before"], changed["after"]) == ({"tiers.POOR.capacity": 10}, {"tiers.POOR.capacity": 20})
