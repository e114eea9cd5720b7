"""The command line as a process of its own: start, check, mistakes, stopping."""

import platform
import signal
import socket
import threading
import time
import traceback
from pathlib import Path

import pytest

import api_gateway
from api_gateway import __version__, rate_limiter
from api_gateway.cli import COMMANDS, main
from api_gateway.models import Quota
from api_gateway.rate_limiter import MemoryLimiter
from tests.kit import PATIENCE, RawClient, RawUpstream, Wire, ask, case, eventually, free_port, reply
from tests.kit import RawRequest as Request
from tests.processes import ROOT, WAYS, config_file, fresh_process, process


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_it_starts_without_configuration_and_stops_with_exit_code_0(way: list[str], tmp_path: Path) -> None:
    with fresh_process(*way, cwd=tmp_path) as running:
        assert ask(f"{running.url}/api/users", headers={"X-Client-ID": "c"}).status == 200
        assert running.terminate() == 0
    said = [line.rpartition("api_gateway.process.server: ")[2] for line in running.errors.splitlines()]
    assert [line.partition(":")[0] for line in said] == ["draining", "stopped"], running.errors
    assert running.output.count("curl") == 3, "three lines to paste"
    assert '"status":200' in running.output, "an access line"


def test_the_version_names_the_variant_that_runs(tmp_path: Path) -> None:
    with process("-m", "api_gateway", "--version", cwd=tmp_path) as running:
        assert running.exit_code() == 0
    variant = "pure Python" if rate_limiter.__file__.endswith(".py") else "compiled"
    assert running.output == f"api-gateway {__version__} ({variant}, CPython {platform.python_version()})\n"


HEAVY = {"fastapi", "pydantic", "uvicorn", "httpx", "redis", "yaml", "sqlite3", "asyncio", "prometheus_client"}
END = "=== end of a command ==="
HELP = """
import sys
from api_gateway.__main__ import main
for command in COMMANDS:
    sys.argv[1:] = command
    try:
        code = main()
    except SystemExit as end:
        code = end.code
    assert not code, (command, code)
    print("END")
    assert not set(sys.modules) & HEAVY, (command, set(sys.modules) & HEAVY)
"""


def test_help_and_version_import_no_gateway(tmp_path: Path) -> None:
    """So that they respond at once: what the gateway needs takes a second of CPU time to import."""
    commands = [["--help"], ["--version"], ["version"], *([name, "--help"] for name in COMMANDS)]
    program = HELP.replace("COMMANDS", repr(commands)).replace("HEAVY", repr(HEAVY)).replace("END", END)
    with fresh_process("-c", program, cwd=tmp_path, PYTHONPATH=str(ROOT)) as running:
        assert running.exit_code() == 0, running.errors
    *outputs, rest = running.output.split(f"{END}\n")
    assert (rest, running.errors) == ("", "")
    for command, output in zip(commands, outputs, strict=True):
        with case(*command):
            assert output.strip()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["toop"], "unknown command; did you mean top? the commands are breakers, "),
        (["start"], "unknown command; the commands are breakers, "),
        (["--watch", "keys"], "the command keys must be the first argument"),
        (["--prot", "9"], "unknown: --prot; use the file for other settings"),
    ],
)
def test_an_unknown_command_is_told_which_there_are(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert words in capsys.readouterr().err


def test_a_traceback_names_the_line_in_either_variant() -> None:
    limiter = MemoryLimiter([Quota.per_second("one", 1, 1)])
    with pytest.raises(AttributeError) as caught:
        limiter.decide([object()], 0)  # type: ignore[list-item]
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    source = Path(api_gateway.__file__).with_name("rate_limiter.py").read_text().splitlines()
    assert last.filename.endswith("api_gateway/rate_limiter.py")
    assert last.name == "decide"
    assert last.lineno is not None
    assert "charge." in source[last.lineno - 1]


@pytest.mark.parametrize("http", ["auto", "api_gateway.server:protocol"])
def test_uvicorn_serves_it_too_and_no_header_comes_twice(tmp_path: Path, http: str) -> None:
    port = free_port()
    arguments = ["-m", "uvicorn", "api_gateway.main:app", "--host", "127.0.0.1", "--port", str(port), "--http", http]
    with process(*arguments, cwd=tmp_path) as running:
        eventually(lambda: is_open(port) or running.popen.poll() is not None, "uvicorn listens")
        with RawClient(port) as client:
            client.request("GET", "/api/users", ("X-Client-ID: c",))
            answer = client.answer()
        says_what_is_missing = "--http api_gateway.server:protocol" in running.errors
    assert answer.status == 200
    assert answer.all("date")
    assert says_what_is_missing == (http == "auto")
    names = [name.lower() for name, _ in answer.headers]
    assert len(names) == len(set(names)), names


def is_open(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def test_a_wrong_setting_stops_the_start_with_exit_code_3_and_a_line_each(tmp_path: Path) -> None:
    path = config_file(tmp_path, "http://127.0.0.1:9", "server: {prot: 1}\ntiers: {FREE: {rate: -1}}\n")
    with process(*WAYS["python -m"], "--config", path, cwd=tmp_path) as running:
        assert running.exit_code() == 3
    assert running.errors.splitlines() == [
        f"{path}:2: server.prot: unknown key; did you mean 'port'?",
        f"{path}:3: tiers.FREE.rate: must be greater than 0, got -1",
    ]


def test_stock_uvicorn_stops_with_exit_code_3_too(tmp_path: Path) -> None:
    arguments = ["-m", "uvicorn", "api_gateway.main:app"]
    with process(*arguments, cwd=tmp_path, GATEWAY_SERVER__PORT="high") as running:
        assert running.exit_code() == 3
    assert "environment GATEWAY_SERVER__PORT: server.port:" in running.errors
    assert "Traceback" not in running.errors


def test_check_only_checks(tmp_path: Path) -> None:
    path = config_file(tmp_path, "http://127.0.0.1:9")
    with process(*WAYS["python -m"], "--check", "--config", path, cwd=tmp_path) as running:
        assert running.exit_code() == 0
    assert "1 route, 1 upstream, 4 tiers" in running.output
    assert not (tmp_path / "xdg-state").exists()


def test_a_busy_port_is_exit_code_3(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        with process("-m", "api_gateway", "--port", port, cwd=tmp_path) as running:
            assert running.exit_code() == 3
    assert "address already in use" in running.errors


def test_a_state_directory_that_cannot_be_used_is_exit_code_3(tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("a file, not a folder")
    with process(*WAYS["python -m"], cwd=tmp_path, GATEWAY_STATE_DIR=str(tmp_path / "occupied")) as running:
        assert running.exit_code() == 3
    assert running.errors.startswith("state_dir: ")
    assert len(running.errors.splitlines()) == 1


def test_the_command_line_beats_the_environment(tmp_path: Path) -> None:
    with process(*WAYS["python -m"], cwd=tmp_path, GATEWAY_SERVER__PORT="1") as running:
        assert ask(f"{running.url}/healthz").status == 200


def test_sigterm_lets_a_request_in_flight_finish_and_refuses_new_ones(tmp_path: Path) -> None:
    arrived, may_answer = threading.Event(), threading.Event()

    def behave(wire: Wire, request: Request) -> None:
        arrived.set()
        may_answer.wait(PATIENCE)
        reply(b"late but whole")(wire, request)

    upstream = RawUpstream(behave)
    with process(*WAYS["python -m"], "--config", config_file(tmp_path, upstream.url), cwd=tmp_path) as running:
        port = int(running.url.rpartition(":")[2])
        with RawClient(port) as client:
            client.request("GET", "/api/up")
            assert arrived.wait(PATIENCE)
            running.popen.send_signal(signal.SIGTERM)
            eventually(lambda: not is_open(port), "new connections are refused")
            may_answer.set()
            answer = client.answer()
        assert (answer.status, answer.body) == (200, b"late but whole")
        assert running.exit_code() == 0
    upstream.close()


def test_a_request_that_outlasts_the_drain_timeout_is_cut_off(tmp_path: Path) -> None:
    arrived, is_over = threading.Event(), threading.Event()

    def never(_wire: Wire, _request: Request) -> None:
        arrived.set()
        is_over.wait(PATIENCE)

    upstream = RawUpstream(never)
    path = config_file(tmp_path, upstream.url, "server: {drain_timeout: 1}\n")
    with process(*WAYS["python -m"], "--config", path, cwd=tmp_path) as running:
        with RawClient(int(running.url.rpartition(":")[2])) as client:
            client.request("GET", "/api/up")
            assert arrived.wait(PATIENCE)
            started = time.monotonic()
            assert running.terminate() == 4
        assert 0.9 < time.monotonic() - started < PATIENCE
        assert "cut off at the end of the drain timeout: 1 request" in running.errors
    is_over.set()
    upstream.close()


def test_a_gateway_that_gets_a_stop_signal_serves_during_the_drain_delay_but_is_not_ready(tmp_path: Path) -> None:
    upstream = RawUpstream(reply(b"fine"))
    path = config_file(
        tmp_path, upstream.url, "server: {drain_delay: 1.5}\ntiers: {FREE: {rate: 1000, capacity: 1000}}\n"
    )
    with process(*WAYS["python -m"], "--config", path, cwd=tmp_path) as running:
        port = running.port
        with RawClient(port) as early:
            assert early.get("/api/up").status == 200
            started = time.monotonic()
            running.signal(signal.SIGTERM)
            eventually(lambda: ask(f"{running.url}/readyz").status == 503, "it is not ready")
            while time.monotonic() - started < 0.4:  # a busy machine may take another second for the last
                with RawClient(port) as late:
                    answer = late.get("/api/up")
                    assert (answer.status, answer.all("connection")) == (200, [])
                assert early.get("/api/up").status == 200
                time.sleep(0.05)
            eventually(lambda: not is_open(port), "new connections are refused")
            last = early.get("/api/up")
            assert (last.status, last.all("connection")) == (200, [b"close"])
        assert running.exit_code() == 0
    upstream.close()


def test_a_tier_survives_kill_9(tmp_path: Path) -> None:
    way, headers = WAYS["python -m"], {"Content-Type": "application/json"}
    with process(*way, cwd=tmp_path) as running:
        changed = running.ask("/clients/survivor/tier", method="POST", headers=headers, body=b'{"tier": "BASIC"}')
        assert changed.status == 200
        running.popen.kill()
    with process(*way, cwd=tmp_path) as running:
        view = running.ask("/clients/survivor").json()
    assert (view["tier"]["name"], view["tier_source"]) == ("BASIC", "registered")


def test_no_request_of_a_client_imports_anything_and_operators_requests_do_so_once(tmp_path: Path) -> None:
    """An import reads files, and takes the interpreter from the event loop of everybody's requests."""
    with process("-X", "importtime", *WAYS["python -m"], cwd=tmp_path, PYTHONPATH=str(ROOT)) as running:
        eventually(lambda: ask(f"{running.url}/readyz").status == 200, "it serves")
        (token,) = (file.read_text().strip() for file in tmp_path.rglob("operator-token"))
        operator = {"Authorization": f"Bearer {token}"}

        def imported_by(*paths: str) -> set[str]:
            before = len(running.errors.splitlines())
            for path in paths:
                assert ask(f"{running.url}{path}", headers=operator).status == 200, path
            lines = [line for line in running.errors.splitlines()[before:] if line.startswith("import time:")]
            return {line.rpartition("|")[2].strip() for line in lines}

        assert not imported_by("/api/users", "/readyz", "/healthz", "/api/orders")
        views = ("/circuit-breakers", "/health", "/metrics", "/metrics/latency", "/clients", "/docs")
        imported = imported_by(*views)
        assert {"api_gateway.reporting.metrics_view", "api_gateway.reporting.upstream_schema"} <= imported
        assert not {"api_gateway.reporting.usage_schema", "redis"} & imported, "only what is asked for"
        assert not imported_by(*views, "/api/users")
