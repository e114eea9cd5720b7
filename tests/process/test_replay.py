"""The log of a gateway process: replayed, it gives every decision again, and it agrees with the usage of clients."""

import gzip
import http.client
import importlib.util
import json
import os
import random
import sqlite3
import subprocess
import sys
import threading
from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from api_gateway.clients.api_keys import digest_of, new_key
from api_gateway.config import load_config
from api_gateway.replay.log_replay import replay_logs
from api_gateway.replay.saved_state import read_snapshot
from api_gateway.usage.ledger import USAGE_FILE
from tests.forked import Fork
from tests.kit import PATIENCE, Answer, RawRequest, RawUpstream, Wire, ask, eventually, refusing_url, reply
from tests.processes import START, Running, hooked, process
from tests.unit.test_replay import Traffic, log_of

KEY = new_key(b"k" * 32)
CONFIG = """
upstreams:
  up: {{targets: [{{url: "{up}"}}]}}
  gone: {{targets: [{{url: "{gone}"}}], circuit_breaker: {{failure_threshold: 1000}}}}
routes:
  - {{name: up, path: /api/up, upstream: up, strip_prefix: /api, costs: [{{path: /api/up/x, cost: 4}}]}}
  - {{name: gone, path: /api/gone, upstream: gone, cost: 2.5}}
tiers: {{FREE: {{rate: 2, capacity: 12}}, PREMIUM: {{rate: 40, capacity: 90}}}}
address_limit: {{rate: 3, capacity: 15, exempt: []}}
clients: {{free: {{tier: FREE}}, pro: {{tier: PREMIUM}}, keyed: {{tier: BASIC, keys: {{one: {{digest: {digest}}}}}}}}}
identity: {{sources: [api_key, header, address]}}
server: {{trusted_proxies: [127.0.0.1], max_event_loop_lag: null}}
state_dir: {folder}
usage: {{enabled: true}}
limits:
  - {{name: own, key: [client, route], rate: 4, capacity: 9, tiers: {{FREE: null, PREMIUM: {{rate: 9, capacity: 9}}}}}}
  - {{name: everyone, key: route, routes: [up], methods: [POST], rate: 25, capacity: 120, cost: 1}}
  - {{name: nearby, key: [address, route], rate: 20, capacity: 100}}
  - {{name: daily, key: [client, route], quota: 20, period: day, tiers: [BASIC], warn_at: [0.9]}}
"""
REQUESTS, CONNECTIONS = 160, 3  # of each half, between which a snapshot is taken


def behaviour(wire: Wire, request: RawRequest) -> bool | None:
    """Respond, to some paths with a cost that is less or more than that of the route."""
    path = request.line.split()[1]
    if path.startswith(b"/up/priced"):
        return reply(headers=((b"X-Gateway-Cost", path.rpartition(b"/")[2]),))(wire, request)
    return reply()(wire, request)


def load(port: int, seed: int) -> None:
    """Send random requests of several clients, from several addresses, on one connection."""
    rng = random.Random(seed)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    for _ in range(REQUESTS):
        headers = {"X-Forwarded-For": f"192.0.2.{rng.randrange(3)}"}
        client = rng.choice(["free", "pro", "one", "two", None, "keyed", "wrong"])
        if client == "keyed":
            headers["X-API-Key"] = KEY
        elif client == "wrong":
            headers["X-API-Key"] = new_key(rng.randbytes(32))
        elif client is not None:
            headers["X-Client-ID"] = client
        priced = f"/api/up/priced/{rng.choice(['0', '0.5', '3', '7'])}"
        path = rng.choice(["/api/up/a%20b", "/api/up/x", "/api/gone", "/api/nowhere", priced, priced])
        connection.request(rng.choice(["GET", "POST"]), path, headers=headers)
        connection.getresponse().read()
    connection.close()


@dataclass
class Played:
    """What a gateway under load has left: its output, and the answers about usage at the end."""

    folder: Path
    running: Running
    usage: Answer
    own: Answer
    table: Answer  # the usage as CSV


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    """Run a gateway under load until it has ended."""
    folder = tmp_path_factory.mktemp("played")
    up = RawUpstream(behaviour)
    config = folder / "gateway.yaml"
    digest = digest_of(KEY.encode())
    config.write_text(CONFIG.format(up=up.url, gone=refusing_url(), digest=digest, folder=folder / "state"))
    with process("-m", "api_gateway", "--config", str(config), "--port", "0", cwd=folder) as running:
        port = running.port
        for seeds in (range(CONNECTIONS), range(CONNECTIONS, 2 * CONNECTIONS)):
            threads = [threading.Thread(target=load, args=(port, seed)) for seed in seeds]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            eventually(lambda: len(running.logged) >= REQUESTS * seeds.stop, "every line is written")  # noqa: B023
            if not seeds.start:
                (folder / "snapshot.json").write_bytes(running.ask("/limits/snapshot").body)
        usage = running.ask("/usage?by=client,route,day")
        table = running.ask("/usage?by=client,route,day&format=csv")
        own = ask(f"{running.url}/usage/me?by=route", headers={"X-API-Key": KEY, "X-Forwarded-For": "192.0.2.99"})
        assert running.terminate() == 0, running.errors
    up.close()
    return Played(folder, running, usage, own, table)


FORKED_JOBS = """
import multiprocessing
from api_gateway.replay import log_replay

log_replay.get_context = lambda _: multiprocessing.get_context("fork")  # a spawned one imports for a second
"""


def command(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Run `api-gateway replay`; return exit code, standard output and standard error."""
    (place := folder / "command").mkdir(exist_ok=True)
    with process("-m", "api_gateway", "replay", *arguments, cwd=place, **hooked(place, FORKED_JOBS)) as running:
        return running.exit_code(), running.output, running.errors


SUMS = ("requests", "limited", "failed", "tokens", "bytes_received", "bytes_sent")


def used(lines: list[dict[str, Any]]) -> dict[tuple[str, str, str], list[float]]:
    """Return the sums of log lines by client, route and day, in the order of `SUMS`."""
    found: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0] * len(SUMS))
    for line in lines:
        client = f"address {line['client_id']}" if line["tier_source"] == "address" else line["client_id"] or ""
        sums = found[client, line["route"] or "", line["time"][:10]]
        is_limited = line["decision"] is not None and line["decision"]["wait_ns"] != 0
        tokens = line["cost"] if line["decision"] is not None and not is_limited else 0
        counted = (1, is_limited, line["status"] >= 500, tokens, line["bytes_received"], line["bytes_sent"])
        sums[:] = [a + b for a, b in zip(sums, counted, strict=True)]
    return found


def test_the_usage_agrees_with_the_access_log_to_the_last_request(played: Played) -> None:
    """By client, route and day, from the endpoints and from the file after the end; a client sees its own alone."""
    lines = [line for line in played.running.logged if "request_id" in line]
    expected = used(lines)
    view = played.usage.json()
    found = {(row["client"], row["route"], row["day"]): [row[name] for name in SUMS] for row in view["rows"]}
    assert found == expected
    assert view["total"]["requests"] == len(lines)
    own = played.own.json()
    assert own["client"] == "keyed"
    assert {row["route"]: row["requests"] for row in own["rows"]} == {
        route: sum(sums[0] for (client, one, _), sums in expected.items() if (client, one) == ("keyed", route))
        for route in ("up", "gone", "")
        if any(key[:2] == ("keyed", route) for key in expected)
    }
    (path,) = (played.folder / "state").rglob(USAGE_FILE)
    with closing(sqlite3.connect(path)) as file:
        (total,) = file.execute("SELECT sum(requests) FROM usage").fetchone()
    assert total == len(lines)


def test_a_replay_under_its_own_configuration_makes_every_decision_again(played: Played) -> None:
    """Also with settlements in both directions, refunds, credentials that are verified, and shared addresses."""
    tmp_path, running = played.folder, played.running
    lines = [line for line in running.logged if "request_id" in line]
    decided = [line for line in lines if line["decision"]]
    refused = [line for line in decided if line["decision"]["wait_ns"]]
    assert {line["decision"]["limit"] for line in refused} >= {"FREE", "address", "daily"}
    assert {line["cost"] for line in decided if "settlements" in line["decision"]} >= {0.0, 0.5, 3.0, 7.0}
    assert any("credential_check" in line for line in lines)

    config = tmp_path / "gateway.yaml"
    found = replay_logs([running.stdout], load_config(config), load_config(config))
    tally, (part,) = found.tally, found.parts
    assert (tally.decisions, part.not_decided, part.incomplete) == (
        len(decided),
        len([line for line in lines if not line["decision"] and "credential_check" not in line]),
        0,
    )
    for agreement in (tally.agreement, tally.current_agreement):
        assert agreement.same == agreement.compared == len(decided), agreement.first_difference
    assert (tally.limited, tally.newly_limited_by.total()) == (len(refused), 0)
    ((least, greatest, count),) = part.spans.values()
    assert greatest - least + 1 == count, "every number is in the log once"


def test_a_replay_from_a_snapshot_makes_every_decision_after_it_again(played: Played) -> None:
    """The buckets and quotas of the running gateway at one instant suffice, without the log before it."""
    snapshot = read_snapshot(played.folder / "snapshot.json")
    assert snapshot.counters
    times = [line["decision"]["at_ns"] for line in played.running.logged if line.get("decision")]
    after = sum(at_ns > snapshot.at_ns for at_ns in times)
    assert len(times) > after > 0
    config = load_config(played.folder / "gateway.yaml")
    tally = replay_logs([played.running.stdout], config, config, snapshot=snapshot).tally
    assert (tally.decisions, tally.before_snapshot) == (after, len(times) - after)
    for agreement in (tally.agreement, tally.current_agreement):
        assert agreement.same == agreement.compared == after, agreement.first_difference


def test_the_command_replays_rotated_logs_in_several_processes_and_fails_a_pipeline(played: Played) -> None:
    folder, running = played.folder, played.running
    decided = len([line for line in running.logged if line.get("decision")])
    lines = running.stdout.read_bytes().splitlines(keepends=True)
    (folder / "access.log.2.gz").write_bytes(gzip.compress(b"".join(lines[: len(lines) // 3])))
    (folder / "access.log.1").write_bytes(b"".join(lines[len(lines) // 3 : -100]))
    (folder / "access.log").write_bytes(b"".join(lines[-100:]) + lines[-1][:80])
    text = (folder / "gateway.yaml").read_text()
    (folder / "candidate.yaml").write_text(text.replace("rate: 40, capacity: 90", "rate: 1, capacity: 10"))
    logs = [str(folder / name) for name in ("access.log", "access.log.1", "access.log.2.gz")]
    options = ["--config", str(folder / "candidate.yaml"), "--current", str(folder / "gateway.yaml")]
    failing = ["--fail-if", 'tier == "PREMIUM" and newly_limited > 0', "--html", str(folder / "page.html")]
    code, output, errors = command(folder, *logs, *options, *failing, "--json", "--jobs", "2")
    assert code == 1, errors
    document: dict[str, Any] = json.loads(output)
    assert document["log"]["incomplete_lines"] == 1
    assert document["log"]["missing_decisions"] == 0
    assert document["agreement"]["current"]["same"] == document["totals"]["decisions"] == decided
    assert document["newly_limited_by"].keys() == {"PREMIUM"}
    (pro,) = [client for client in document["clients"] if client["client"] == "pro"]
    assert pro["newly_limited"] == document["totals"]["newly_limited"] > 0
    assert pro["longest_wait_seconds"] > 0
    assert document["fail_if"]["clients"] == ["pro"]
    assert "'pro'" in errors
    assert "<svg" in (folder / "page.html").read_text()
    code, output, errors = command(folder, *logs, *options, "--fail-if", 'tier == "BASIC" and newly_limited > 0')
    assert (code, errors) == (0, "")
    assert "Not known:" in output


def test_the_command_never_fails_as_if_the_condition_were_true(tmp_path: Path) -> None:
    """Exit code 1 is that of a condition, also if the output cannot be written."""
    traffic = Traffic()
    traffic.request("acme")
    log, candidate = str(log_of(tmp_path, traffic.lines())), tmp_path / "new.yaml"
    candidate.write_text('upstreams: {up: {targets: [{url: "http://127.0.0.1:1"}]}}\n')
    arguments = ["replay", log, "--config", str(candidate)]
    errors, variables = tmp_path / "errors", {"XDG_STATE_HOME": str(tmp_path)}
    full = Fork("api_gateway", arguments, cwd=tmp_path, env=variables, stdout=Path("/dev/full"), stderr=errors)
    assert (full.wait(START), errors.read_text()) == (3, "output: no space left on device\n")
    command = [sys.executable, "-m", "api_gateway", *arguments]
    reader, writer = os.pipe()
    os.close(reader)
    found = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (found.returncode, found.stderr) == (3, "")


OF_LOCUST = """
upstreams: {{up: {{targets: [{{url: "{up}"}}]}}}}
state_dir: {folder}
admin: {{token: {token}}}
limits:
  - {{name: burst, key: [client, route], rate: 40, capacity: 60, tiers: [FREE, BASIC]}}
  - {{name: hourly, quota: 1000000, period: hour}}
"""


@pytest.mark.skipif(importlib.util.find_spec("locust") is None, reason="needs locust (extra load)")
def test_a_replay_of_a_locust_run_under_its_own_configuration_reproduces_every_decision(tmp_path: Path) -> None:
    """The load test registers clients of all tiers, and one class of them exceeds its limit."""
    up, config, token = RawUpstream(reply()), tmp_path / "gateway.yaml", "t" * 40
    config.write_text(OF_LOCUST.format(up=up.url, folder=tmp_path / "state", token=token))
    script = Path(__file__).parents[2] / "load_test.py"
    with process("-m", "api_gateway", "--config", str(config), "--port", "0", cwd=tmp_path) as running:
        for seconds in ("3", "30"):  # a busy machine needs longer until all clients have sent
            done = subprocess.run(
                [sys.executable, str(script), "--host", running.url, "--seconds", seconds, "--users", "10"],
                cwd=tmp_path,
                env={**os.environ, "GATEWAY_ADMIN__TOKEN": token, "LOAD_TEST_PATH": "/api/up/users"},
                capture_output=True,
                text=True,
                timeout=150,
                check=False,
            )
            assert "Flooder" in done.stdout, done.stdout + done.stderr
            decided = [line for line in running.logged if line.get("decision")]
            if len({line["tier"] for line in decided}) == 4 and any(line["decision"]["wait_ns"] for line in decided):
                break
        assert running.terminate() == 0, running.errors
    up.close()
    own = load_config(config)
    tally = replay_logs([running.stdout], own, own).tally
    decided = [line for line in running.logged if line.get("decision")]
    assert len({line["tier"] for line in decided}) == 4
    assert tally.limited == sum(line["decision"]["wait_ns"] != 0 for line in decided) > 0
    assert tally.agreement.same == tally.agreement.compared == len(decided), tally.agreement.first_difference
