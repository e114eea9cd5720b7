"""The command `doctor`: for each check an environment that is broken, and the exact line that it prints."""

# ruff: noqa: E501 - the exact lines that are printed

import asyncio
import json
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from api_gateway.config import GatewayConfig, from_values
from api_gateway.doctor.access_checks import check_exposure, check_tokens
from api_gateway.doctor.checks import Check, CheckResult, Level, good, run_checks
from api_gateway.doctor.machine_checks import (
    check_certificates,
    check_descriptors,
    check_files,
    check_ports,
    check_state,
    check_time_zones,
    validity,
)
from api_gateway.doctor.options import run_doctor
from api_gateway.doctor.store_checks import store_checks, store_results
from api_gateway.doctor.upstream_checks import issuer_checks, upstream_checks
from api_gateway.storage.store_probe import StoreFacts
from api_gateway.system.x509 import facts_of_pem
from tests.cases import each
from tests.kit import RawUpstream, reply
from tests.store_kit import SERVERS, StoreServer

NOW = datetime(2026, 6, 1, tzinfo=UTC)
HERE = sys.executable


def made(folder: Path, **sections: Any) -> GatewayConfig:
    return from_values({"upstreams": {"users": "http://127.0.0.1:1"}, "state_dir": str(folder), **sections})


def lines(results: Iterable[CheckResult]) -> list[str]:
    return [str(one) for one in results]


def run(checks: Iterable[Check]) -> list[str]:
    """Run checks and return their lines."""
    return lines(asyncio.run(run_checks(list(checks))))


def no_place(_: object) -> str:
    return ""


@contextmanager
def listening() -> Iterator[int]:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield server.getsockname()[1]


def closed_port() -> int:
    with listening() as port:
        return port


# This machine


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    upstream = {"targets": ["https://127.0.0.1:1"], "tls": {"ca_file": str(tmp_path / "ca.pem")}}
    config = made(tmp_path, upstreams={"users": upstream})
    assert lines(check_files(config, lambda _: "gateway.yaml:3: ")) == [
        (
            f"failed   gateway.yaml:3: upstreams.users.tls.ca_file: cannot be read: no such file or directory, got"
            f" '{tmp_path}/ca.pem'. Correct the file or the setting, or install the package."
        )
    ]
    assert lines(check_files(made(tmp_path), no_place)) == [
        "ok       files and packages: those that the configuration names can be used"
    ]


def test_a_setting_without_effect_is_a_warning(tmp_path: Path) -> None:
    config = made(tmp_path, upstreams={"users": {"targets": ["http://a"], "tls": {"ca_file": "ca.pem"}}})
    assert (
        "warning  upstreams.users.tls: has no effect without an https target. Change or remove the setting."
        in lines(check_files(config, no_place))
    )


def test_a_state_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert lines(check_state(made(tmp_path / "file"))) == [
        (
            f"failed   state_dir: '{tmp_path}/file' is not a folder, got '{tmp_path}/file'. Give the user of the gateway"
            " write access, or set state_dir to another folder."
        )
    ]
    assert lines(check_state(made(tmp_path))) == [f"ok       state_dir: '{tmp_path}' can be written"]
    if os.access("/proc", os.W_OK):  # for root, whom the permissions of /proc do not stop
        (line,) = lines(check_state(made(Path("/proc/nope"))))
        assert line.startswith("failed   state_dir: no file can be created in '/proc', got '/proc/nope'.")


def test_a_port_in_use_names_the_process_that_uses_it(tmp_path: Path) -> None:
    with listening() as port:
        found = lines(check_ports(made(tmp_path, server={"port": port})))
    name = Path("/proc/self/comm").read_text().strip()
    assert found == [
        (
            f"failed   server.port: 127.0.0.1:{port} is in use by process {os.getpid()} ({name}). End that process, or set"
            " another port."
        )
    ]
    assert lines(check_ports(made(tmp_path, server={"port": port}))) == [
        f"ok       server.port: 127.0.0.1:{port} is free"
    ]


def test_an_address_of_another_machine_and_a_folder_of_a_socket_are_named(tmp_path: Path) -> None:
    sections = {"server": {"host": "192.0.2.1", "port": 8000}, "admin": {"listen": f"unix:{tmp_path}/none/socket"}}
    assert lines(check_ports(made(tmp_path, **sections))) == [
        (
            "failed   server.port: cannot listen on 192.0.2.1:8000: cannot assign requested address. Set an address of"
            " this machine."
        ),
        (
            f"failed   admin.listen: the folder '{tmp_path}/none' cannot be written. Create the folder, writable for the"
            " user of the gateway."
        ),
    ]


def test_too_few_descriptors_are_a_warning(tmp_path: Path) -> None:
    config = made(tmp_path, server={"max_connections": 1000})
    assert lines(check_descriptors(config, lambda: 1024)) == [
        (
            "warning  open files: 1024 open files for 1000 clients and up to 512 connections to targets. Raise the limit"
            " (ulimit -n, LimitNOFILE=) to 1612, or lower server.max_connections."
        )
    ]
    assert [one.level for one in check_descriptors(config, lambda: 4096)] == [Level.OK]


def test_a_time_zone_that_is_unknown_is_named(tmp_path: Path) -> None:
    limit = {"name": "a", "quota": 5, "period": "day", "time_zone": "Europe/Berlin"}
    config = made(tmp_path, limits=[limit])
    assert lines(check_time_zones(config, set)) == [
        "failed   time zones: unknown: Europe/Berlin. Install the package tzdata."
    ]
    assert lines(check_time_zones(config)) == ["ok       time zones: known: Europe/Berlin"]


@each(
    ("days", "line"),
    [
        (-1, "failed   a: the certificate has expired at 2026-05-31 00:00 UTC. Renew it."),
        (
            13,
            "warning  a: the certificate expires at 2026-06-14 00:00 UTC. Renew it, and check what should have done so.",
        ),
        (15, "ok       a: the certificate is valid until 2026-06-16 00:00 UTC"),
    ],
)
def test_a_certificate_is_renewed_in_time(days: int, line: str) -> None:
    assert str(validity("a", NOW + timedelta(days=days), NOW)) == line


def test_the_end_of_a_certificate_is_the_one_that_openssl_reports(certificates: Path) -> None:
    path = certificates / "here.pem"
    said = subprocess.run(["openssl", "x509", "-enddate", "-noout", "-in", path], capture_output=True, check=True)
    text = said.stdout.decode().strip().removeprefix("notAfter=")
    end = datetime.strptime(text, "%b %d %H:%M:%S %Y GMT").replace(tzinfo=UTC)
    assert facts_of_pem(path.read_bytes()).not_after == end.timestamp()


def test_the_certificates_of_all_sections_are_checked(tmp_path: Path, certificates: Path) -> None:
    (tmp_path / "broken.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    files = {"users": certificates / "here.pem", "orders": tmp_path / "broken.pem", "more": tmp_path / "none.pem"}
    upstreams = {name: {"targets": ["https://a"], "tls": {"cert_file": str(path)}} for name, path in files.items()}
    found = lines(check_certificates(made(tmp_path, upstreams=upstreams), datetime.now(UTC)))
    assert found[0].startswith("warning  upstreams.users.tls.cert_file: the certificate expires at ")
    assert found[1:] == [
        (
            f"failed   upstreams.orders.tls.cert_file: '{tmp_path}/broken.pem' cannot be used: is not a certificate. Name a"
            " PEM file with the certificate."
        ),
        (
            f"failed   upstreams.more.tls.cert_file: '{tmp_path}/none.pem' cannot be used: no such file or directory. Name"
            " a PEM file with the certificate."
        ),
    ]


# Operators


def test_a_token_that_can_be_guessed_is_a_warning_that_does_not_show_it(tmp_path: Path) -> None:
    admin = {"token": "passwordpassword", "tokens": {"a": {"token": "0f3c9a7e5b1d2846e7f09a1c3b5d7e92"}}}
    assert lines(check_tokens(made(tmp_path, admin=admin))) == [
        (
            "warning  admin.token: can be guessed, as it has 16 characters, 7 of them different. Use a random one, as"
            " openssl rand -hex 32 prints it."
        ),
        "ok       admin.tokens.a.token: is long enough that it cannot be guessed",
    ]


def test_operator_endpoints_that_others_can_reach_are_a_warning(tmp_path: Path) -> None:
    assert lines(check_exposure(made(tmp_path, server={"host": "0.0.0.0"}))) == [
        (
            "warning  server.host: operator endpoints are on 0.0.0.0:8000, which other machines can reach. Set admin.listen"
            " to 127.0.0.1:9901, so that clients cannot even try a token."
        )
    ]
    assert lines(check_exposure(made(tmp_path, admin={"listen": "10.0.0.1:9901"}))) == [
        (
            "warning  admin.listen: operator endpoints are on 10.0.0.1:9901, which other machines can reach. Let a firewall"
            " admit operators only, or listen on a loopback address."
        )
    ]
    public = {"server": {"host": "::"}, "admin": {"listen": "[::1]:9901"}}
    assert lines(check_exposure(made(tmp_path, **public))) == [
        "ok       admin.listen: operator endpoints are on [::1]:9901, for this machine only"
    ]


# Upstreams and issuers


def test_a_target_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    port = closed_port()
    upstreams = {"users": f"http://127.0.0.1:{port}", "orders": "http://nowhere.invalid"}
    found = run(upstream_checks(made(tmp_path, upstreams=upstreams)))
    assert found[0] == (
        f"failed   upstreams.users http://127.0.0.1:{port}: no connection: connection refused. Start the service, or"
        " correct the URL or the firewall."
    )
    assert found[1].startswith("failed   upstreams.orders http://nowhere.invalid: the name cannot be resolved: ")
    assert found[1].endswith(". Correct the host in the URL, or the DNS of this machine.")


def test_a_target_that_responds_with_another_status_is_named(tmp_path: Path) -> None:
    up = RawUpstream(reply(b"no", status=b"500 Internal Server Error"))
    check = {"path": "/alive", "statuses": [204, "200-299"]}
    config = made(tmp_path, upstreams={"users": {"targets": [up.url], "health_check": check}})
    found = run(upstream_checks(config))
    up.close()
    assert found[0].startswith(f"ok       upstreams.users {up.url}: accepts connections, after ")
    assert found[1:] == [
        (
            f"failed   upstreams.users {up.url}: GET /alive responds with 500, which is not among 204-204, 200-299. Look at"
            " the service, or set path and statuses of health_check to what it responds with."
        )
    ]


def test_a_target_that_responds_is_ok(tmp_path: Path) -> None:
    up = RawUpstream(reply(b"fine"))
    config = made(tmp_path, upstreams={"users": {"targets": [up.url], "health_check": {}}})
    found = run(upstream_checks(config))
    up.close()
    assert found[1] == f"ok       upstreams.users {up.url}: GET /health responds with 200"


@contextmanager
def tls_server(certificates: Path) -> Iterator[str]:
    """Accept TLS connections on a free port, in a thread of its own."""
    program = (
        "import socket, ssl, sys\n"
        "context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); context.load_cert_chain(*sys.argv[1:])\n"
        "server = socket.create_server(('127.0.0.1', 0)); print(server.getsockname()[1], flush=True)\n"
        "while True:\n"
        "    sock, _ = server.accept()\n"
        "    try: context.wrap_socket(sock, server_side=True).recv(1)\n"
        "    except OSError: pass\n"
    )
    files = [str(certificates / f"here.{kind}") for kind in ("pem", "key")]
    popen = subprocess.Popen([HERE, "-c", program, *files], stdout=subprocess.PIPE)
    assert popen.stdout is not None
    try:
        yield f"https://127.0.0.1:{int(popen.stdout.readline())}"
    finally:
        popen.kill()
        popen.wait()
        popen.stdout.close()


def test_the_certificate_of_a_target_is_verified_and_its_end_reported(tmp_path: Path, certificates: Path) -> None:
    with tls_server(certificates) as url:
        trusted = {"targets": [url], "tls": {"ca_file": str(certificates / "here.pem")}}
        found = run(upstream_checks(made(tmp_path, upstreams={"a": url, "b": trusted})))
    assert found[0] == (
        f"failed   upstreams.a {url}: its certificate is not accepted: self-signed certificate. Renew the certificate,"
        " correct its names, or name its authority in tls.ca_file."
    )
    assert found[1].startswith(f"warning  upstreams.b {url}: accepts connections, after ")
    assert "; the certificate expires at " in found[1]


def test_an_issuer_whose_keys_cannot_be_fetched_is_named(tmp_path: Path) -> None:
    up = RawUpstream(reply(json.dumps({"keys": []}).encode()))
    issuers = {
        "a": {"issuer": "https://a.example", "audiences": ["x"], "jwks_url": f"http://127.0.0.1:{closed_port()}/keys"},
        "b": {"issuer": "https://b.example", "audiences": ["x"], "jwks_url": f"{up.url}/keys"},
    }
    config = made(tmp_path, identity={"sources": ["jwt", "address"], "jwt": {"issuers": issuers}})
    found = run(issuer_checks(config))
    up.close()
    assert found[0].startswith(f"failed   identity.jwt.issuers.a: no keys: {issuers['a']['jwks_url']}: ")
    assert found[1] == (
        f"warning  identity.jwt.issuers.b: {up.url}/keys has no keys. Look at the issuer: without keys all its tokens"
        " are refused."
    )


@pytest.mark.parametrize(
    ("curves", "settings", "end"),
    [
        (["P-256", "Ed448", ["P-384"]], {}, "has 3 keys"),
        (["P-384"], {"algorithms": ["ES256", "ES512"]}, "has 1 keys"),
        (
            ["P-256", "P-521", "P-384"],
            {},
            "has 3 keys, some of them for ES384 and ES512: the first request with a token takes 0.4 to 0.8 ms of CPU time",
        ),
    ],
)
def test_keys_of_an_issuer_that_verify_slowly_are_named(
    tmp_path: Path, curves: list[Any], settings: dict[str, Any], end: str
) -> None:
    up = RawUpstream(reply(json.dumps({"keys": [{"kty": "EC", "crv": curve} for curve in curves]}).encode()))
    issuer = {"issuer": "https://a.example", "audiences": ["x"], "jwks_url": f"{up.url}/keys", **settings}
    config = made(tmp_path, identity={"sources": ["jwt", "address"], "jwt": {"issuers": {"a": issuer}}})
    (found,) = run(issuer_checks(config))
    up.close()
    assert found == f"ok       identity.jwt.issuers.a: {up.url}/keys {end}"


# The store


def test_a_store_that_is_not_there_is_named_with_what_happens_meanwhile(tmp_path: Path) -> None:
    config = made(tmp_path, store={"url": f"redis://:hunter-two@127.0.0.1:{closed_port()}"})
    (line,) = run(store_checks(config))
    assert line.startswith("failed   store.url: cannot be used: ")
    assert line.endswith(". Start it or correct store.url; until then store.on_failure applies (local_share).")
    assert "hunter" not in line


@pytest.mark.skipif(SERVERS["valkey"] is None, reason="no Valkey")
def test_a_store_that_may_lose_keys_is_a_warning(tmp_path: Path) -> None:
    with StoreServer(SERVERS["valkey"] or "", "maxmemory 50mb", "maxmemory-policy allkeys-lru") as server:
        found = run(store_checks(made(tmp_path, store={"url": server.url, "decision_timeout": 30})))
    assert found[0].startswith("ok       store.url: Valkey ")
    assert found[1:4] == [
        "ok       store scripts: are permitted",
        (
            "warning  store memory: the store deletes buckets when its memory is full (maxmemory-policy allkeys-lru). Set"
            " maxmemory-policy noeviction, and enough maxmemory."
        ),
        (
            "warning  store persistence: registered clients are lost when the store restarts. Set appendonly yes in the"
            " store, or store.clients: sqlite."
        ),
    ]
    assert found[4].startswith("ok       store latency: ")
    assert found[5] == "ok       clocks: 0.0 s between the store and this machine"


@pytest.mark.skipif(SERVERS["valkey"] is None, reason="no Valkey")
def test_a_user_of_the_store_without_scripts_is_named(tmp_path: Path) -> None:
    rules = "user limited on nopass ~* &* +@all -eval -evalsha -script"
    with StoreServer(SERVERS["valkey"] or "", rules, "appendonly yes") as server:
        url = server.url.replace("unix://", "unix://limited:x@")
        found = run(store_checks(made(tmp_path, store={"url": url, "decision_timeout": 30})))
    (line,) = [one for one in found if "store scripts" in one]
    assert line.startswith("failed   store scripts: are refused: ")
    assert line.endswith("Allow the user of store.url the commands EVAL, EVALSHA and SCRIPT LOAD.")
    assert "ok       store persistence: keys survive a restart of the store" in found


@each(
    ("facts", "line"),
    [
        ({"version": (6, 0, 9)}, "failed   store.url: Redis 6.0.9 is too old. Use Redis 6.2 or newer, or Valkey."),
        (
            {"latency": 0.05},
            (
                "failed   store latency: 50.0 ms for a command, of 20 ms (store.decision_timeout). Move the store nearer,"
                " or raise store.decision_timeout; late decisions are made without it."
            ),
        ),
        (
            {"latency": 0.015},
            (
                "warning  store latency: 15.0 ms for a command, of 20 ms (store.decision_timeout). Move the store nearer,"
                " or raise store.decision_timeout; late decisions are made without it."
            ),
        ),
        (
            {"clock_difference": -7.25},
            (
                "warning  clocks: 7.2 s between the store and this machine. Synchronise both with NTP; times in logs and"
                " quotas differ until then."
            ),
        ),
    ],
)
def test_what_a_store_reports_is_judged(facts: dict[str, Any], line: str) -> None:
    calm = StoreFacts(
        "Redis", (7, 2, 4), None, is_persistent=True, latency=0.001, clock_difference=0, script_error=None
    )
    found = lines(store_results(calm._replace(**facts), decision_timeout=0.02, keeps_clients=True))
    assert line in found
    assert sum(not one.startswith("ok ") for one in found) == 1


# The whole


def test_a_check_that_never_ends_is_bounded_and_one_that_fails_hides_no_other() -> None:
    async def stuck() -> list[CheckResult]:
        await asyncio.Event().wait()
        return []

    async def faulty() -> list[CheckResult]:
        raise KeyError("secret")

    async def fine() -> list[CheckResult]:
        return [good("c", "fine")]

    checks = [Check("a", stuck), Check("b", faulty), Check("c", fine)]
    assert lines(asyncio.run(run_checks(checks, seconds=0.05))) == [
        "failed   a: not done within 0.05 s. Find out what does not respond, and run this again.",
        "failed   b: the check itself failed: KeyError. Report it with the output of api-gateway config show.",
        "ok       c: fine",
    ]


@pytest.fixture
def doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def ran(text: str, *arguments: str) -> tuple[int, str]:
        path = tmp_path / "gateway.yaml"
        path.write_text(f"{text}\nstate_dir: {tmp_path}\n")
        code = run_doctor(["--config", str(path), *arguments])
        return code, capsys.readouterr().out

    return ran


def test_the_exit_code_is_that_of_the_worst_result(doctor: Any, tmp_path: Path) -> None:
    up = RawUpstream(reply(b"fine"))
    server = f"server: {{port: 0}}\nupstreams: {{users: '{up.url}'}}"
    code, output = doctor(server)
    assert code == 0, output
    assert output.splitlines()[-1].endswith(" ok, 0 warnings, 0 failed.")
    assert doctor(f"{server}\nadmin: {{token: password}}")[0] == 1
    up.close()
    assert doctor(server)[0] == 2
    code, output = doctor("server: {port: x}")
    assert code == 2
    assert output.splitlines()[0] == (
        f"failed   configuration: {tmp_path}/gateway.yaml:1: server.port: must be a whole number, got 'x'. Correct the"
        " configuration; the other checks need it."
    )


def test_json_has_the_same_results(doctor: Any) -> None:
    code, output = doctor("server: {port: 0}\nupstreams: {users: 'http://nowhere.invalid'}", "--json")
    found = json.loads(output)
    assert (code, found["status"]) == (2, "failed")
    assert {"about", "level", "detail", "remedy"} == set(found["checks"][0])
    assert ssl.OPENSSL_VERSION
