"""`api-gateway keys`: keys of a running gateway from the command line."""

import base64
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from api_gateway.clients.api_keys import PATTERN, digest_of, new_key
from tests.kit import RawUpstream, ask, eventually, free_port, reply
from tests.processes import Running, config_file, process

WITHIN = 10.0  # seconds: the gateway promises one, and 20 requests take some on a busy machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    up = RawUpstream(reply(b"fine"))
    path = config_file(folder, up.url, f"state_dir: {folder / 'state'}")
    with process("-m", "api_gateway", "--config", path, "--port", "0", cwd=folder) as one:
        assert one.url
        yield one
    up.close()


def keys(folder: Path, running: Running, *arguments: str) -> tuple[int, str, str]:
    """Run the command; return exit code, standard output and standard error."""
    options = ("--config", str(folder / "gateway.yaml"), "--url", running.url)
    (place := folder / "commands").mkdir(exist_ok=True)
    with process("-m", "api_gateway", "keys", *arguments, *options, cwd=place) as command:
        return command.exit_code(), command.output, command.errors


def status(running: Running, key: str) -> int:
    return ask(f"{running.url}/api/up", headers={"X-API-Key": key.strip()}).status


def test_a_key_lives_from_its_creation_to_its_revocation(running: Running, folder: Path) -> None:
    code, key, told = keys(folder, running, "create", "acme", "--label", "laptop", "--expires-in", "3600")
    assert code == 0, told
    assert re.fullmatch(PATTERN, key.strip()), "the key alone is on standard output"
    key_id = digest_of(key.strip().encode())[:16]
    assert key_id in told
    assert "needs a credential from now on" in told
    assert status(running, key) == 200
    code, table, _ = keys(folder, running, "list", "acme")
    assert code == 0
    assert table.splitlines()[0].split() == [
        "ID",
        "LABEL",
        "CREATED",
        "EXPIRES",
        "REPLACED",
        "BY",
        "LAST",
        "USED",
        "ROUTES",
    ]
    assert table.splitlines()[1].startswith(f"{key_id}  laptop")
    assert key.strip() not in table
    code, successor, told = keys(folder, running, "rotate", "acme", key_id, "--overlap", "600")
    assert code == 0, told
    assert f"Key {key_id} is valid until" in told
    assert (status(running, key), status(running, successor)) == (200, 200)
    code, nothing, told = keys(folder, running, "revoke", "acme", key_id)
    assert (code, nothing) == (0, "")
    assert "valid keys left: 1." in told
    assert (status(running, key), status(running, successor)) == (401, 200)


def test_no_log_metric_error_or_explanation_contains_a_key(tmp_path: Path) -> None:
    """Wherever it was sent, right or wrong, also where an id belongs."""
    up = RawUpstream(reply(b"fine"))
    path = config_file(tmp_path, up.url, "log: {level: debug}")
    with process("-m", "api_gateway", "--config", path, "--port", "0", cwd=tmp_path) as one:
        content = {"Content-Type": "application/json"}
        made = one.ask("/clients/acme/keys", method="POST", body=b"{}", headers=content).json()
        key, bodies = made["key"], []
        for sent in (key, key[:-1], new_key(b"\7" * 32)):
            basic = base64.b64encode(f"{sent}:".encode()).decode()
            for name, value in (
                ("X-API-Key", sent),
                ("Authorization", f"Bearer {sent}"),
                ("Authorization", f"Basic {basic}"),
                ("Authorization", sent),
                ("X-Client-ID", sent),
            ):
                bodies += [
                    ask(f"{one.url}/api/up", method=method, headers={name: value}).body for method in ("GET", "TRACK")
                ]
        explained = json.dumps({"path": "/api/up", "client_id": None, "key_id": key}).encode()
        bodies.append(one.ask("/explain", method="POST", body=explained, headers=content).body)
        bodies += [
            one.ask(view).body
            for view in ("/metrics", "/metrics?format=prometheus", "/clients", "/clients/acme", "/clients/acme/keys")
        ]
        assert one.terminate() == 0
        told = one.output + one.errors + b"".join(bodies).decode()
    up.close()
    assert '"reason":"credentials_invalid"' in told.replace('": "', '":"')
    for sent in (key, new_key(b"\7" * 32)):
        assert sent[4:20] not in told
        assert base64.b64encode(sent.encode())[8:24].decode() not in told


def test_a_client_whose_bare_id_is_allowed_can_be_claimed(running: Running, folder: Path) -> None:
    code, key, told = keys(folder, running, "create", "open", "--allow-bare-id")
    assert (code, "can still be claimed by anyone" in told) == (0, True)
    assert status(running, key) == 200
    assert ask(f"{running.url}/api/up", headers={"X-Client-ID": "open"}).status == 200


def test_all_workers_accept_a_new_key_and_refuse_a_revoked_one_within_a_second(tmp_path: Path) -> None:
    """Also those that did not make the change. Each request is on a new connection, so that all workers get some."""
    up = RawUpstream(reply(b"fine"))
    path = config_file(tmp_path, up.url, "tiers: {FREE: {rate: 100000, capacity: 1000000}}")
    with process("-m", "api_gateway", "--config", path, "--port", "0", "--workers", "2", cwd=tmp_path) as several:
        content = {"Content-Type": "application/json"}
        made = several.ask("/clients/acme/keys", method="POST", body=b"{}", headers=content).json()
        changed = time.monotonic()
        eventually(lambda: {status(several, made["key"]) for _ in range(20)} == {200}, "all accept it")
        assert time.monotonic() - changed < WITHIN
        several.ask(f"/clients/acme/keys/{made['id']}", method="DELETE")
        changed = time.monotonic()
        eventually(lambda: {status(several, made["key"]) for _ in range(20)} == {401}, "all refuse it")
        assert time.monotonic() - changed < WITHIN
    up.close()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("revoke", "acme", "0123456789abcdef"), "404: Client 'acme' has no key"),
        (("create", "acme", "--route", "none"), "422: body.routes: there is no route 'none'"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_1(
    running: Running, folder: Path, arguments: tuple[str, ...], part: str
) -> None:
    code, output, told = keys(folder, running, *arguments)
    assert (code, output) == (1, "")
    assert part in told
    assert told.count("\n") == 1


def test_a_gateway_that_does_not_run_is_one_line_too(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with process("-m", "api_gateway", "keys", "list", "acme", "--url", url, cwd=tmp_path) as command:
        assert command.exit_code() == 6
    assert f"{url}: no usable response" in command.errors


def test_a_redirection_is_not_followed_as_the_token_is_for_one_server(tmp_path: Path) -> None:
    other = RawUpstream(reply(b"{}"))
    redirecting = RawUpstream(reply(b"", b"307 Temporary Redirect", headers=((b"Location", other.url.encode()),)))
    (tmp_path / "token").write_text("secret-of-an-operator")
    command = ("keys", "list", "acme", "--url", redirecting.url, "--token-file", str(tmp_path / "token"))
    with process("-m", "api_gateway", *command, cwd=tmp_path) as one:
        assert one.exit_code() == 1
    assert "307" in one.errors
    assert len(redirecting.requests) == 1
    assert not other.requests
    for server in (other, redirecting):
        server.close()


def test_a_key_for_the_configuration_is_generated_without_a_gateway(tmp_path: Path) -> None:
    with process("-m", "api_gateway", "keys", "generate", cwd=tmp_path) as command:
        assert command.exit_code() == 0
    key = command.output.strip()
    assert f"digest: sha256:{digest_of(key.encode())}" in command.errors
