"""`api-gateway top|tail|explain|clients|breakers|limits` against a running gateway, and their errors."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from api_gateway.process import operator_client, view_commands
from api_gateway.process.operator_client import NOT_REACHED, OperatorClient
from api_gateway.process.view_commands import run_view
from tests.kit import RawRequest, RawUpstream, Wire, ask, eventually, free_port, reply
from tests.processes import ROOT, Running, process


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("views")


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    up = RawUpstream(reply(b"fine"))
    tiers = "tiers: {FREE: {rate: 0.001, capacity: 2}}"
    store = "store: {decision_timeout: 10, timeout: 10}"  # else a busy machine divides the tokens among the workers
    (path := folder / "gateway.yaml").write_text(
        f"upstreams:\n  up: {{targets: [{{url: '{up.url}'}}]}}\n"
        "  down: {targets: [{url: 'http://127.0.0.1:1'}],"
        " circuit_breaker: {failure_threshold: 1, recovery_timeout: 600}}\n"
        f"state_dir: {folder / 'state'}\n{tiers}\n{store}\n"
    )
    with process("-m", "api_gateway", "--config", str(path), "--port", "0", "--workers", "2", cwd=folder) as one:
        assert one.url
        yield one
    up.close()


def command(folder: Path, *arguments: str, **variables: str) -> tuple[int, str, str]:
    (place := folder / "commands").mkdir(exist_ok=True)
    with process("-m", "api_gateway", *arguments, cwd=place, **variables) as one:
        return one.exit_code(), one.output, one.errors


def access(folder: Path, running: Running) -> tuple[str, ...]:
    return "--config", str(folder / "gateway.yaml"), "--url", running.url


def test_a_refused_request_is_explained_by_its_id(folder: Path, running: Running) -> None:
    sent = [
        ask(f"{running.url}/api/up/{number}", headers={"X-Client-ID": "acme", "X-Request-ID": f"complaint-{number}"})
        for number in range(3)  # with ids of their own, as forked workers of tests generate the same
    ]
    assert [one.status for one in sent] == [200, 200, 429]
    request_id = sent[2].json()["request_id"]
    code, out, errors = command(folder, "explain", request_id, *access(folder, running))
    assert (code, errors) == (0, "")
    assert "429 rate_limited  GET /api/up/2" in out
    assert "the tokens of free were spent by 2 requests:" in out
    assert all(one.headers["x-request-id"] in out for one in sent[:2])
    code, out, _ = command(folder, "explain", request_id, "--json", *access(folder, running))
    assert json.loads(out)["requests"][0]["request_id"] == request_id
    code, _, errors = command(folder, "explain", "none", *access(folder, running))
    assert code == 1
    assert "404: The history has no request with the id 'none'" in errors
    assert "of one process" not in errors, "it is that of both workers"


def test_an_explanation_names_the_worker_that_decided_and_the_breaker_of_each(folder: Path, running: Running) -> None:
    code, out, _ = command(
        folder, "explain", "--path", "/api/up/x", "--client", "a", "--json", *access(folder, running)
    )
    found = json.loads(out)
    assert (code, found["worker"] in ("1", "2")) == (0, True)
    assert found["upstream"]["workers"] == {"1": "CLOSED", "2": "CLOSED"}


def test_tail_shows_requests_of_all_workers_as_they_end(folder: Path, running: Running) -> None:
    (place := folder / "tail").mkdir()
    arguments = (
        "tail",
        "--lines",
        "0",
        "--interval",
        "0.1",
        "--client",
        "followed",
        "--json",
        *access(folder, running),
    )
    with process("-m", "api_gateway", *arguments, cwd=place) as tail:

        def paths() -> set[str]:
            return {json.loads(line)["path"] for line in tail.output.splitlines(keepends=True) if line.endswith("\n")}

        def sent_and_seen() -> bool:
            ask(f"{running.url}/api/up/first", headers={"X-Client-ID": "followed"})
            return bool(paths())

        eventually(sent_and_seen, "it follows")
        ask(f"{running.url}/api/up/other", headers={"X-Client-ID": "another"})
        wanted = {f"/api/up/{number}" for number in range(20)}
        for path in sorted(wanted):
            ask(f"{running.url}{path}", headers={"X-Client-ID": "followed"})
        eventually(lambda: paths() == wanted | {"/api/up/first"}, "all are shown, and no other")
        tail.signal(signal.SIGINT)
        assert tail.exit_code() == 130


@pytest.mark.parametrize("name", ["clients", "breakers", "limits", "top"])
def test_each_view_is_text_or_json(folder: Path, running: Running, name: str) -> None:
    once = ("--count", "1") if name == "top" else ()
    ask(f"{running.url}/api/up/viewed", headers={"X-Client-ID": "viewed"})  # else there may be no client yet

    def rows() -> int:
        code, out, errors = command(folder, name, *once, *access(folder, running))
        assert (code, errors) == (0, "")
        return len(out.splitlines()) - 1

    eventually(lambda: rows() > 0, "the workers have reported it")
    code, out, _ = command(folder, name, *once, "--json", *access(folder, running))
    assert code == 0
    assert json.loads(out)


def test_the_cause_of_an_opened_breaker_is_shown_and_top_says_what_the_dashboard_says(
    folder: Path, running: Running
) -> None:
    failed = ask(f"{running.url}/api/down/1", headers={"X-Client-ID": "unlucky"})
    assert failed.status == 502

    def row() -> list[str]:
        code, out, errors = command(folder, "breakers", *access(folder, running))
        assert (code, errors) == (0, "")
        (found,) = [line for line in out.splitlines() if line.startswith("down") and "127.0.0.1" not in line]
        return re.split(r" {2,}", found)

    eventually(lambda: row()[1] == "OPEN", "the workers have reported it")
    upstream, _, mode, _, _, _, opened, next_probe, cause = row()  # the window begins anew when it opens
    assert (upstream, mode, opened) == ("down", "auto", "1")
    assert 0 < float(next_probe) < 1200, "with jitter"
    assert "1 consecutive failure" in cause

    def top() -> str:
        code, out, _ = command(folder, "top", "--count", "1", *access(folder, running))
        assert code == 0
        return out

    def says_so(told: str) -> bool:
        first = told.splitlines()[0].split("  ")[2]
        return first == "fail" and "fail  The breaker of 'down' is open: 1 consecutive failure" in told

    eventually(lambda: says_so(top()), "all workers report it")
    code, out, _ = command(folder, "top", "--count", "1", "--json", *access(folder, running))
    assert code == 0
    (found,) = [one for one in json.loads(out)["upstreams"] if one["name"] == "down"]
    assert (found["circuit_breaker"], found["targets"], found["unhealthy_targets"]) == ("OPEN", 1, 0)


def test_top_uses_the_terminal_and_leaves_it_as_it_was(folder: Path, running: Running) -> None:
    """Also when it is interrupted; what a client sends is inert."""
    for _ in range(3):  # the last is refused
        ask(f"{running.url}/api/up/%1b%5b31mred%0a", headers={"X-Client-ID": "red"})
    ours, theirs = pty.openpty()
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    arguments = ["top", "--interval", "0.2", *access(folder, running)]
    with subprocess.Popen(
        [sys.executable, "-m", "api_gateway", *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=variables
    ) as top:
        os.close(theirs)
        seen = b""
        until = time.monotonic() + 60
        while seen.count(b"requests/s") < 3 and time.monotonic() < until:
            seen += os.read(ours, 65_536)
        top.send_signal(signal.SIGINT)
        try:
            while piece := os.read(ours, 65_536):
                seen += piece
        except OSError:  # the other end is closed
            pass
        assert top.wait(60) == 130
    os.close(ours)
    assert seen.startswith(b"\x1b[?1049h\x1b[?25l")
    assert seen.endswith(b"\x1b[?25h\x1b[?1049l")
    assert b"\x1b[31m" not in seen
    assert b"\\x1b[31mred\\n" in seen


@pytest.mark.parametrize("name", ["tail", "top", "explain", "clients", "breakers", "limits"])
def test_a_gateway_that_does_not_run_is_one_line(folder: Path, name: str) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    more = ("x",) if name == "explain" else ()
    code, out, errors = command(folder, name, *more, "--url", url)
    assert (code, out) == (6, "")
    assert errors.startswith(f"{url}: no usable response: ")
    assert "--url" in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", NOT_REACHED),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n{", NOT_REACHED),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 90\r\n\r\n{", NOT_REACHED),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", NOT_REACHED),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", operator_client.FAILED),
    ],
)
def test_a_server_that_is_no_gateway_is_a_line(
    sent: bytes, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of another protocol, one that ends within the body, and two with JSON of their own."""

    def behave(wire: Wire, _: RawRequest) -> bool:
        wire.send(sent)
        return False

    upstream = RawUpstream(behave)
    monkeypatch.setattr(view_commands, "client_of", lambda _: OperatorClient(upstream.url, None))
    try:
        assert run_view(["clients"]) == code
    finally:
        upstream.close()
    out, errors = capsys.readouterr()
    assert (out, errors.count("\n")) == ("", 1)
    assert "--url" in errors


def test_a_wrong_token_is_one_line_that_names_its_file(folder: Path, running: Running) -> None:
    (file := folder / "wrong").write_text("not-the-token")
    code, out, errors = command(folder, "limits", "--token-file", str(file), *access(folder, running))
    assert (code, out) == (7, "")
    assert f"The token is from {file}" in errors
    assert "not-the-token" not in errors
    assert errors.count("\n") == 1
