"""The comparison with other proxies: its arithmetic, its reading of processes and of wrk, and one short run of it."""

import asyncio
import gzip
import json
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from socket import create_server, socket
from xml.etree import ElementTree as ET

import pytest
import yaml

from api_gateway.config import GatewayConfig, from_values
from api_gateway.http1.headers import Fields
from api_gateway.proxy.api_key_source import ApiKeySource
from api_gateway.proxy.identity_sources import Claim
from api_gateway.settings.jwt import ASYMMETRIC
from benchmarks import (
    api_keys,
    key_times,
    limiter,
    many_clients,
    memory,
    over_admission,
    overload,
    scale,
    segments,
    tls,
    wrong_keys,
)
from benchmarks.cases import BALANCED, CORS, FALLBACK, LIMITED, LOG, TIMEOUT, TITLES, TLS, needs_of
from benchmarks.compare import main
from benchmarks.flood import flood
from benchmarks.load import Client, Failed, drive, latencies, parse_wrk, percentile, verify
from benchmarks.peers import PEERS, Peer, Place, compiled_wheel
from benchmarks.plot import Row, draw
from benchmarks.probe import PASSES, configuration
from benchmarks.probe import main as probe
from benchmarks.processes import cpu_seconds, reset_peak, resident_bytes, running
from benchmarks.report import Results, tables
from benchmarks.upstream import CHUNKED, SIZES, SMALL, TARGETS, TLS_ADDRESS, UPLOADED
from tests.cases import each
from tests.kit import free_port, soon

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"

WRK = """Running 1s test @ http://127.0.0.1:1/api/small
  1 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   791.00us  123.00us   5.02ms   90.00%
  {requests} requests in {time}, {read} read
{trouble}Requests/sec:  80000.00
Transfer/sec:     30.00MB
"""


# wrk


@pytest.mark.parametrize(
    ("time_", "seconds", "read", "size"),
    [("500.00ms", 0.5, "37.25MB", 37.25 * 2**20), ("1.10m", 66, "1.95GB", 1.95 * 2**30), ("4.00s", 4, "4.1MB", 4.1e6)],
)
def test_the_summary_of_wrk_is_read_in_its_units(time_: str, seconds: float, read: str, size: float) -> None:
    driven = parse_wrk(WRK.format(requests=20_000, time=time_, read=read, trouble=""), 190)
    assert driven.requests == 20_000
    assert driven.seconds == pytest.approx(seconds)
    assert driven.read == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trouble": "  Non-2xx or 3xx responses: 3\n"}, "Non-2xx or 3xx responses: 3"),
        ({"trouble": "  Socket errors: connect 0, read 7, write 0, timeout 0\n"}, "read 7"),
        ({"requests": 0}, "no response"),
        ({"read": "1.00MB"}, "20000 responses of 190 bytes"),
        ({"time": "a while"}, "unexpected output"),
    ],
)
def test_a_run_with_a_wrong_response_has_no_figures(changes: dict[str, str], message: str) -> None:
    summary = {"requests": "20000", "time": "1.00s", "read": "8.00MB", "trouble": ""} | changes
    with pytest.raises(Failed, match=message):
        parse_wrk(WRK.format(**summary), 190)


def test_a_case_that_is_refused_needs_refusals() -> None:
    refused = WRK.format(requests=1000, time="1.00s", read="1.00MB", trouble="  Non-2xx or 3xx responses: 995\n")
    assert parse_wrk(refused, 0, is_refused=True).requests == 1000
    for trouble in (
        "",
        "  Non-2xx or 3xx responses: 900\n",
        "  Socket errors: connect 0, read 7, write 0, timeout 0\n",
    ):
        with pytest.raises(Failed):
            parse_wrk(WRK.format(requests=1000, time="1.00s", read="1.00MB", trouble=trouble), 0, is_refused=True)


# One request of each case


def responding(*responses: bytes) -> Callable[[socket], None]:
    """Return a function that answers the requests of a connection by turns, beginning anew on each connection."""
    left = iter(responses)

    def serve(sock: socket) -> None:
        with sock:
            if sock.recv(65_536):
                sock.sendall(next(left))

    return serve


def response(status: int, body: bytes, *lines: str) -> bytes:
    head = "".join(f"{line}\r\n" for line in (*lines, f"Content-Length: {len(body)}"))
    return f"HTTP/1.1 {status} OK\r\n{head}\r\n".encode() + body


@each(
    ("case", "responses", "message"),
    [
        ("small", [response(200, SMALL)], None),
        ("small", [response(200, SMALL[:-1])], "status 200 with 189 bytes, not 200 with 190"),
        ("small", [response(429, b"{}")], "status 429 with 2 bytes"),
        ("small", [response(200, SMALL, "Connection: close")], "the connection is closed"),
        ("new", [response(200, SMALL, "Connection: close")], None),
        ("new", [response(200, SMALL)], "the connection is kept"),
        ("chunked", [response(200, gzip.compress(CHUNKED), "Content-Encoding: gzip")], None),
        ("chunked", [response(200, gzip.compress(SMALL), "Content-Encoding: gzip")], "with 190 bytes"),
        ("post", [response(200, SMALL)], None),
        ("refused", [response(200, SMALL)] * 10 + [response(429, b"{}")], None),
        ("refused", [response(200, SMALL)] * 100, "status 200"),
    ],
)
def test_a_response_that_is_not_that_of_the_case_is_an_error(
    case: str, responses: list[bytes], message: str | None
) -> None:
    with accepting(responding(*responses)) as port:
        if message is None:
            verify(port, case)
        else:
            with pytest.raises(Failed, match=message):
                verify(port, case)


def test_the_part_of_a_gateway_is_measured_by_the_timestamps_of_the_kernel() -> None:
    served, count = api_keys.Served(), 3

    def serve(sock: socket) -> None:
        with sock:
            for _ in range(count):
                assert sock.recv(65_536)
                time.sleep(0.02)
                sock.sendall(response(200, SMALL))

    with accepting(serve) as port, closing(api_keys.Stamped(port, "agw_any", served)) as client:
        for _ in range(count):
            client.ask()
    assert len(served.gateway) == len(served.client) == count
    assert min(served.gateway) > 0.015


class Written(asyncio.WriteTransport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[bytes | bytearray | memoryview] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.pieces.append(data)


async def test_the_body_of_a_request_follows_its_head_later() -> None:
    load, transports = segments.Load(b"head", b"body"), [Written(), Written()]
    for transport in transports:
        load.begin(transport)
    assert [transport.pieces for transport in transports] == [[b"head"], [b"head"]]
    await soon(lambda: len(transports[1].pieces) == 2, "the bodies are sent")
    assert [transport.pieces for transport in transports] == [[b"head", b"body"]] * 2


@pytest.mark.parametrize("status", [200, 502])
def test_a_run_in_segments_counts_responses_and_fails_at_a_wrong_status(status: int) -> None:
    def serve(sock: socket) -> None:
        received = b""
        with sock, suppress(OSError):  # the client resets the connection at its end
            while piece := sock.recv(65_536):
                received += piece
                while received.count(b"x") >= 1024:
                    received = received[received.rindex(b"\r\n") + 2 + 1024 :]
                    sock.sendall(response(status, UPLOADED))

    with accepting(serve) as port:
        if status == 200:
            driven = drive(port, "segments", core=0, seconds=1, connections=2)
            assert driven.requests > 0
            assert driven.read >= driven.requests * len(UPLOADED)
        else:
            with pytest.raises(Failed, match="status 502"):
                drive(port, "segments", core=0, seconds=1, connections=2)


# Memory of connections


@pytest.mark.heavy
def test_the_memory_of_connections_is_that_of_the_peer_for_each(tmp_path: Path) -> None:
    """The peer is a small program that keeps 100 KB for each connection, and proxies nothing."""
    program = """
import asyncio, sys
async def serve(reader, writer):
    kept = bytearray(100_000)
    while head := await reader.readuntil(b"\\r\\n\\r\\n"):
        held = b"/hold" in head
        await asyncio.sleep(3 if held else 0)
        body = b'{"stored": true}' if held else b"x" * 190
        writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body)
async def main():
    await (await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]))).serve_forever()
asyncio.run(main())
"""
    port = free_port()
    with (
        running([sys.executable, "-c", program, str(port)], core=0, port=port, folder=tmp_path) as pid,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(memory, "HOLD", 2.5)
        with closing(Client(port)) as first:
            first.ask()
        for measure in (memory.measure_idle, memory.measure_active):
            found = measure(pid, port, core=0, count=200)
            assert found["used"] > 200 * 100_000
            if measure is memory.measure_idle:
                assert 100_000 < found["each"] < 200_000


# Scale


def test_the_table_of_scale_has_the_ratio_to_one_route() -> None:
    one = scale.Found(1, 1.0, 60 * 2**20, [40.0, 50.0, 60.0], [1e4] * 3, 20_000, 0.01, 0.002, 0.001)
    many = scale.Found(1000, 1.5, 90 * 2**20, [48.0, 55.0, 75.0], [9e3] * 3, 900_000, 0.2, 0.009, 0.001)
    rows = scale.table([one, many]).splitlines()
    assert rows[2] == "| 1 | 1.00 | 60 | 10,000 | 50.0 | 1.00 | 20 | 10 | 2.0 | 1.0 |"
    assert rows[3] == "| 1,000 | 1.50 | 90 | 9,000 | 55.0 | 1.20 | 900 | 200 | 9.0 | 1.0 |"
    assert {row.count("|") for row in rows} == {11}


def test_the_configuration_of_scale_is_valid_and_written_as_people_do(tmp_path: Path) -> None:
    settings = scale.configuration(3, tmp_path, 1001, 1002, health_check={"path": "/api/small"})
    text = scale.as_yaml(settings)
    assert yaml.safe_load(text) == settings
    config = from_values(settings)
    assert [route.upstream for route in config.routes] == list(config.upstreams)
    assert scale.as_yaml({"a": [], "b": {}, "c": None}) == "a: []\nb: {}\nc: null"


# Latency at a fixed rate


@pytest.mark.parametrize(("share", "value"), [(0, 1), (0.5, 50), (0.501, 51), (0.99, 99), (1, 100)])
def test_a_percentile_is_the_nearest_rank(share: float, value: int) -> None:
    assert percentile(range(1, 101), share) == value
    assert percentile([7], share) == 7


@contextmanager
def server(answer: Callable[[], bytes]) -> Iterator[int]:
    """Answer every request on its own thread."""

    def serve(sock: socket) -> None:
        with sock:
            while sock.recv(65_536):
                body = answer()
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    with accepting(serve) as port:
        yield port


@contextmanager
def accepting(serve: Callable[[socket], None]) -> Iterator[int]:
    """Serve every connection on its own thread."""

    def accept() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(sock,), daemon=True).start()

    with create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(2)
        thread.join()


@contextmanager
def listening(seen: list[bytes]) -> Iterator[int]:
    """Answer every request with JSON, in two pieces, and keep it."""

    def serve(sock: socket) -> None:
        with sock:
            while request := sock.recv(65_536):
                seen.append(request)
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
                sock.sendall(b"{}")

    with accepting(serve) as port:
        yield port


@pytest.mark.heavy
def test_a_server_that_stalls_delays_all_that_was_due_meanwhile() -> None:
    began = time.monotonic()

    def answer() -> bytes:
        into = time.monotonic() - began
        if 0.2 < into < 0.4:
            time.sleep(0.4 - into)
        return SMALL

    with server(answer) as port:
        measured = latencies(port, core=0, rate=200, seconds=0.6)
    assert len(measured) == 120
    assert measured == sorted(measured)
    # 40 were due within the stall, evenly: 30 of them waited for 50 ms or more. A closed loop would have seen a few.
    assert sum(value > 0.05 for value in measured) == pytest.approx(30, abs=6)


def test_a_wrong_response_or_a_rate_not_held_is_no_latency() -> None:
    with server(lambda: b"short") as port, pytest.raises(Failed, match="status 200 with 5 bytes"):
        latencies(port, core=0, rate=100, seconds=0.1)
    began = time.monotonic()

    def slow() -> bytes:
        time.sleep(0.5 if time.monotonic() > began + 0.1 else 0)
        return SMALL

    with server(slow) as port, pytest.raises(Failed, match="does not hold 500 requests/s"):
        latencies(port, core=0, rate=500, seconds=1, most=20)


@pytest.mark.heavy
def test_a_flood_holds_its_rate_and_no_id_comes_twice_unless_it_shall() -> None:
    seen: list[bytes] = []
    for ids, expected in ((60, 60), (1, 1)):
        seen.clear()
        with listening(seen) as port:
            done = flood(port, rate=300, count=60, first=7, ids=ids)
        assert (done.requests, done.statuses) == (60, {"200": 60})
        assert done.seconds == pytest.approx(0.2, abs=0.1)
        assert len(seen) == 60
        assert len(set(seen)) == expected
        assert min(seen).endswith(b"X-Client-ID: id-000000007\r\n\r\n")


# Processes

FAMILY = """
import subprocess, sys, time
child = [sys.executable, "-c", "import sys, time\\nwhile time.process_time() < 0.4: pass\\n{end}"]
{start}
while time.process_time() < 0.2: pass
print("done", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("subprocess.run(child)", ""),
        (
            "process = subprocess.Popen(child, stdout=subprocess.PIPE); process.stdout.readline()",
            "print(flush=True); sys.stdin.read()",
        ),
    ],
    ids=["waited for", "living"],
)
def test_cpu_time_counts_a_process_and_its_children(start: str, end: str) -> None:
    program = FAMILY.format(start=start, end=end)
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        assert cpu_seconds(process.pid) == pytest.approx(0.6, abs=0.1)
        process.communicate()


def test_the_peak_of_memory_outlives_the_memory_until_it_is_reset() -> None:
    program = "import sys\nbytearray(80_000_000)\nprint(flush=True)\nsys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert resident_bytes(process.pid) < 60_000_000
        assert resident_bytes(process.pid, peak=True) > 80_000_000
        reset_peak(process.pid)
        assert resident_bytes(process.pid, peak=True) < 60_000_000
        process.communicate()


def test_a_server_that_does_not_start_is_reported_with_its_output(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such port here')"]
    with (
        pytest.raises(RuntimeError, match="no such port here"),
        running(command, core=0, port=free_port(), folder=tmp_path),
    ):
        pass


# Peers and report


def launched(peer: Peer, folder: Path, *needs: str, certificate: Path | None = None) -> tuple[list[str], str]:
    """Return the command of a peer, and everything that it is given; its folder is named by one letter."""
    folder.mkdir()
    launch = peer.launch(Place(folder, 1001, 1002, frozenset(needs), certificate))
    text = " ".join([*launch.command, *launch.env.values(), *(file.read_text() for file in folder.iterdir())])
    return launch.command, text.replace(str(folder), "")


@pytest.mark.parametrize("peer", PEERS, ids=[peer.name for peer in PEERS])
def test_every_peer_has_a_hint_or_needs_none_and_a_command(peer: Peer, tmp_path: Path) -> None:
    _, text = launched(peer, tmp_path / "a")
    assert "1001" in text
    assert "1002" in text
    assert peer.hint or peer.found()


def test_every_case_is_taken_by_this_gateway_and_those_of_the_budgets_by_envoy() -> None:
    ours, envoy = (next(peer for peer in PEERS if peer.name == name) for name in ("gateway", "envoy"))
    assert [case for case in TITLES if not ours.takes(case)] == []
    assert [case for case in TITLES if not envoy.takes(case)] == [CORS]  # compared with the gateway without it
    assert {case for peer in PEERS for case in peer.cases} <= TITLES.keys()


def test_the_compiled_gateway_is_measured_only_if_its_wheel_is_of_the_present_sources(tmp_path: Path) -> None:
    source, dist = tmp_path / "api_gateway" / "x.py", tmp_path / "dist"
    source.parent.mkdir()
    source.write_text("A = 1\n")
    dist.mkdir()
    assert compiled_wheel(tmp_path) is None
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    (dist / "api_gateway-1-py3-none-any.whl").write_bytes(b"")
    wheel = dist / f"api_gateway-1-{tag}-{tag}-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(source, "api_gateway/x.py")
    assert compiled_wheel(tmp_path) == wheel
    source.write_text("A = 2\n")
    assert compiled_wheel(tmp_path) is None


FEATURES = (TIMEOUT, LOG, BALANCED, LIMITED, TLS, FALLBACK)


@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer.features], ids=lambda peer: peer.name)
def test_every_feature_of_a_peer_changes_its_configuration_and_nothing_else_does(peer: Peer, tmp_path: Path) -> None:
    """Where a feature is not needed, the configuration is the same to the byte, so that the cases are comparable."""
    _, plain = launched(peer, tmp_path / "plain")
    for feature in FEATURES:
        _, text = launched(peer, tmp_path / feature, feature, certificate=Path("/upstream.pem"))
        assert (text != plain) is (feature in peer.features), feature
        if feature == BALANCED:
            assert all(f"{address}:1002" in text or f'"{address}"' in text for address in TARGETS)
        if feature == TLS:
            assert "/upstream.pem" in text
            assert TLS_ADDRESS in text


def checked(peer: Peer, command: list[str]) -> list[str] | None:
    """Return the command that checks the configuration of a peer, None if it has none."""
    name, last = peer.name, command[-1]
    return {
        "gateway": [*command, "--check"],
        "nginx": [*command, "-t"],
        "haproxy": ["haproxy", "-c", "-q", "-f", last],
        "envoy": [*command, "--mode", "validate"],
        "caddy": ["caddy", "validate", "--adapter", "caddyfile", "--config", last],
    }.get(name)


@pytest.mark.heavy
@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer.features], ids=lambda peer: peer.name)
def test_an_installed_peer_accepts_its_configuration_for_every_case(
    peer: Peer, tmp_path: Path, certificates: Path
) -> None:
    if not peer.found():
        pytest.skip(f"{peer.name} is not installed")
    for number, needs in enumerate(sorted({needs_of(case) for case in TITLES if peer.takes(case)}, key=sorted)):
        place = tmp_path / str(number)
        command, _ = launched(peer, place, *needs, certificate=certificates / "here.pem")
        check = checked(peer, command)
        if check is None:
            pytest.skip(f"{peer.name} cannot check a configuration")
        done = subprocess.run(check, cwd=place, capture_output=True, text=True, check=False)
        if not needs and "unrecognized global option" in done.stderr:
            pytest.skip(f"this version of {peer.name} is too old for any case")
        assert done.returncode == 0, f"{sorted(needs)}: {done.stdout}{done.stderr}"


def test_the_bodies_have_the_sizes_they_are_named_for() -> None:
    assert SIZES == {"small": 190, "10k": 10 * 2**10, "1m": 2**20, "100m": 100 * 2**20}
    assert len(CHUNKED) == pytest.approx(1024, rel=0.02)
    assert not set(b"'$;{}\\") & set(CHUNKED.replace(b"{", b"").replace(b"}", b"")), "nginx would interpret it"


@pytest.fixture
def results() -> Results:
    """Three rounds of two peers, and a third that failed."""
    found = Results()
    for rate, cpu in ((5000, 40), (4000, 50), (6000, 45)):
        found.add("small", "gateway", {"rate": rate, "cpu": cpu})
        found.add("small", "nginx", {"rate": rate * 10, "cpu": cpu / 10})
    found.add("small", "envoy", {"rate": 1, "cpu": 1})
    found.fail("small", "envoy", "Non-2xx or 3xx responses: 3")
    return found


def test_tables_show_medians_ranges_ratios_and_failures(results: Results) -> None:
    peers = [peer for peer in PEERS if peer.name in ("gateway", "nginx", "envoy")]
    lines = tables(results, peers).splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| GET of 190 bytes, 64")]
    assert lines[2] == "| | this gateway | nginx | Envoy |"
    assert [row[1:] for row in rows] == [
        ["45 (40 to 50)", "4 (4 to 5)", "failed |"],
        ["1.00", "0.10", "failed |"],
        ["5,000", "50,000", "failed |"],
    ]
    assert lines[-1] == "envoy, small: Non-2xx or 3xx responses: 3"


def test_a_plot_is_well_formed_and_each_bar_as_long_as_its_value() -> None:
    rows = [
        Row("a <b> & c", ours=False, middle=20, least=19, greatest=22),
        Row("ours", ours=True, middle=40, least=38, greatest=41),
        Row("far out", ours=False, middle=4000, least=3000, greatest=5000),
    ]
    root = ET.fromstring(draw(rows))  # noqa: S314 - our own words
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert texts[2:] == ["a <b> & c", "20", "ours", "40", "far out", "4,000"]
    bars = [bar.attrib for bar in root.iter(f"{SVG}polygon")]
    assert [bar["class"] for bar in bars] == ["bar", "bar ours", "bar", "bar"], "a bar too long is cut in two"
    corners = [[float(corner.split(",")[0]) for corner in bar["points"].split()] for bar in bars]
    lengths = [max(xs) - min(xs) for xs in corners]
    assert lengths[1] == pytest.approx(2 * lengths[0], rel=0.01)
    assert max(map(max, corners)) <= float(root.attrib["viewBox"].split()[2])


# Commands


def test_an_unknown_name_is_an_error_that_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--peers", "gateway,apache"])
    assert "no such peer: apache; there are gateway, compiled, nginx" in capsys.readouterr().err


def test_the_limiters_that_need_no_library_are_timed_and_weighed() -> None:
    for contestant in limiter.CONTESTANTS[:2]:
        assert 0 < limiter.microseconds(contestant.build(), 1000) < 1000
        assert 50 < limiter.bytes_a_client(contestant.build, 2000) < 1000


def test_clients_of_three_limits_are_weighed_and_timed() -> None:
    _, _, *rows = limiter.measure_clients(5_000).splitlines()
    for row in rows:
        weight, first, later = (float(cell.replace(",", "")) for cell in row.split("|")[2:5])
        assert 100 < weight < 5000
        assert 0 < later < 1000 > first > 0
    assert [row.split("|")[1].strip() for row in rows] == ["three limits", "two limits and a quota"]
    assert limiter.seconds_of_limits(limiter.WITH_QUOTA, 1000)[0] > 0


def test_each_failure_of_the_store_has_a_row_with_a_quota_that_is_the_tightest_limit() -> None:
    for bucket, row in zip(over_admission.ROWS[::2], over_admission.ROWS[1::2], strict=True):
        assert (bucket.act, bucket.quotas) == (row.act, None)
        assert 0 < row.bound(30, 3000) <= bucket.bound(30) or row.act is over_admission.half_cut
    names = [limit["name"] for limit in over_admission.limits(3000)]
    assert (names, over_admission.quota_of(30)) == (["client", "route", "daily"], 3000)


@pytest.mark.parametrize("name", ["limits", "throttled", "pyrate_limiter"])
def test_a_limiter_from_elsewhere_is_timed_where_it_is_installed(name: str) -> None:
    pytest.importorskip(name)
    for contestant in limiter.CONTESTANTS:
        if name in getattr(contestant.build, "__qualname__", ""):
            assert limiter.microseconds(contestant.build(), 100) > 0


def test_the_table_of_an_overload_holds_the_latencies_against_the_calmest() -> None:
    def found(name: str, calm: float, good: int, limit: float | None) -> overload.Found:
        quiet, loaded = ({tier: overload.Tally() for tier in overload.MIX} for _ in range(2))
        quiet["FREE"].good = [calm] * 100
        loaded["ENTERPRISE"] = overload.Tally(offered=2000, good=[0.15] * good, refused=2000 - good)
        return overload.Found(name, quiet, loaded, seconds=10, limit=limit)

    lines = overload.table([found("without", 0.2, 1000, None), found("with", 0.1, 1900, 42.5)]).splitlines()
    assert lines[2] == "| without | ENTERPRISE | 200 | 50.0% | 150 | 150 | 1.50 |"
    assert lines[5] == "| without | FREE | 0 | 0.0% | - | - | - |"
    assert lines[-3:] == [
        "- unloaded: p50 100 ms, p99 100 ms",
        "- without: goodput 50.0% of the capacity",
        "- with: goodput 95.0% of the capacity; the limit at the end: 42.5",
    ]


@pytest.mark.heavy
def test_a_short_overload_sheds_the_lowest_tier_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert overload.main(["--only", "limit: 40", "--seconds", "2", "--settling", "1", "--quiet", "1"]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| lim")]
    shares = {row[1]: float(row[3].rstrip("%")) for row in rows}
    assert list(shares) == ["ENTERPRISE", "PREMIUM", "BASIC", "FREE"]
    assert shares["ENTERPRISE"] > 80
    assert shares["FREE"] < 40


@pytest.mark.heavy
@pytest.mark.skipif(not shutil.which("nginx") or not shutil.which("wrk"), reason="needs nginx and wrk on the PATH")
def test_a_short_comparison_prints_a_table_and_writes_a_plot(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.compare", "--peers", "gateway,constant", "--only", "small"]
    files = ["--svg", str(tmp_path / "plot.svg"), "--json", str(tmp_path / "all.json")]
    done = subprocess.run(
        [*command, "--rounds", "1", "--seconds", "1", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    if done.returncode == 2:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    ratios = done.stdout.partition("as a multiple of this gateway's:")[2].splitlines()
    assert ratios[2] == "| | this gateway | uvicorn |"
    _, ours, constant = ratios[4].strip(" |").split(" | ")
    assert 0 < float(constant) < float(ours) == 1
    assert ">this gateway</text>" in (tmp_path / "plot.svg").read_text()
    assert json.loads((tmp_path / "all.json").read_text())["found"]["small"].keys() == {"gateway", "constant"}


@pytest.mark.heavy
@pytest.mark.skipif(not shutil.which("nginx"), reason="needs nginx on the PATH")
def test_a_short_flood_of_invented_ids_prints_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = many_clients.main(["memory", "--ids", "400", "--seconds", "0.8", "--rounds", "1"])
    except OSError as error:  # no second core to hold the gateway on
        pytest.skip(str(error))
    printed = capsys.readouterr().out
    assert code == 0, printed
    rows = {line.split(" | ")[0].strip("| "): line for line in printed.splitlines()}
    assert rows["memory: ids that never repeat"].endswith("| 0 |"), "nobody is refused"
    assert 300 <= int(rows["buckets"].split(" | ")[1].strip(" |")) <= 403, "each id has a bucket"


def costs_of(module: str, *arguments: str) -> dict[str, float]:
    """Return what a benchmark of costs prints in a process of its own; whether its claims hold is for others."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)
    lines = done.stdout.splitlines()
    verdicts = [line for line in lines if "claimed" in line]
    assert verdicts, done.stdout + done.stderr
    assert done.returncode == int(any("NOT" in line for line in verdicts)), done.stdout + done.stderr
    assert done.stderr.startswith("not shown to hold: ") is (done.returncode == 1), done.stderr
    table = [line for line in lines[1:] if "claimed" not in line and not line.startswith("load ")]
    rows = [line.rpartition(" to ")[0].rsplit(maxsplit=2) for line in table]
    return {name.strip(): float(middle) for name, middle, _ in rows}


def test_what_cors_costs_is_measured_within_one_process() -> None:
    found = costs_of("cors", "--rounds", "1")
    assert found.keys() >= {"with Origin: policy", "with Origin, route without a policy: policy"}
    assert min(found.values()) > 0


def verdicts_of(main_: Callable[[list[str]], int], *arguments: str) -> tuple[int, list[str]]:
    """Run a benchmark in this process; return the exit code and the lines with its verdicts."""
    with redirect_stdout(StringIO()) as printed, redirect_stderr(StringIO()) as message:
        code = main_([*arguments])
    lines = [line for line in printed.getvalue().splitlines() if "claimed" in line]
    assert code == int(any("NOT" in line for line in lines)), printed.getvalue() + message.getvalue()
    assert message.getvalue().startswith("not shown to hold: ") is (code == 1), message.getvalue()
    return code, [line.partition(":")[0] for line in lines]


def test_what_a_key_costs_is_measured_within_one_process() -> None:
    _, claims = verdicts_of(api_keys.main, "--parts", "costs", "--rounds", "1")
    assert claims == [claim.name for claim in api_keys.CLAIMS[:2]]


@pytest.mark.heavy
@pytest.mark.skipif(not shutil.which("nginx"), reason="needs nginx on the PATH")
def test_a_short_flood_of_wrong_keys_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_keys, "ROUNDS", 1)
    _, claims = verdicts_of(api_keys.main, "--parts", "flood", "--seconds", "0.2", "--scale", "0.01")
    assert len(claims) == 3


@pytest.mark.parametrize(
    ("tail", "memory", "expected"),
    [(0.002, [50, 51], [True] * 3), (0.005, [50, 51], [False, False, True]), (0.002, [50, 60], [True, True, False])],
)
def test_a_flood_that_a_client_with_a_key_notices_is_not_what_is_claimed(
    tail: float, memory: list[float], expected: list[bool]
) -> None:
    found = {
        name: api_keys.Flood(api_keys.Served([0.001] * 98 + [last] * 2, [0.0] * 100), [0.5], memory)
        for name, last in zip(api_keys.SITUATIONS, (0.002, 0.002, tail), strict=True)
    }
    assert [one.is_met for one in api_keys.verdicts_of_flood(found, 100)] == expected


def test_the_times_of_keys_are_compared_in_three_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_times, "STORED", 12)
    monkeypatch.setattr(key_times, "HELD", 8)
    _, claims = verdicts_of(key_times.main, "--count", "10")
    assert claims == [key_times.VERIFICATION] * 3 + [key_times.REQUEST, key_times.LOOK_UP]


@pytest.mark.parametrize(("more", "expected"), [(0.0, [True]), (1.0, [False]), (-1.0, [False])])
def test_times_that_differ_are_told_from_what_chance_makes(more: float, expected: list[bool]) -> None:
    absent = [10 + number % 20 / 10 for number in range(400)]  # some are equal
    times = {key_times.ABSENT: absent, key_times.ALIKE: [value + more for value in absent[::-1]]}
    assert [one.is_met for one in key_times.verdicts(key_times.REQUEST, times)] == expected


def test_a_gateway_that_takes_longer_for_a_key_that_begins_like_another_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_times, "STORED", 12)
    claim, seen = ApiKeySource.claim, set[bytes]()

    def revealing(self: ApiKeySource, fields: Fields) -> Claim | None:
        beginning = fields[b"x-api-key"][0][:20]
        if beginning in seen:
            end = time.thread_time_ns() + 500_000
            while time.thread_time_ns() < end:
                pass
        seen.add(beginning)
        return claim(self, fields)

    monkeypatch.setattr(ApiKeySource, "claim", revealing)
    found = asyncio.run(key_times.verifications(60, tmp_path))
    like_one, revoked, right = key_times.verdicts(key_times.VERIFICATION, found)
    assert not like_one.is_met, like_one.line
    assert not revoked.is_met, revoked.line
    assert not right.is_met, right.line


def test_wrong_keys_cause_no_more_look_ups_than_the_limit_of_their_address_admits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wrong_keys, "RATE", 1)  # so that a busy machine exceeds it too
    count = wrong_keys.CAPACITY + 200
    found = asyncio.run(wrong_keys.attack(count, tmp_path))
    assert sum(found.responses.values()) == count
    assert found.responses[b"429"] > 0
    look_ups, memory = wrong_keys.verdicts(found)
    assert look_ups.is_met, look_ups.line
    assert memory.is_met, memory.line


@pytest.mark.heavy
@pytest.mark.skipif(not shutil.which("nginx") or not shutil.which("wrk"), reason="needs nginx and wrk on the PATH")
@pytest.mark.parametrize(
    ("arguments", "algorithms"),
    [
        (("--rounds", "10"), ASYMMETRIC),
        (("--processes", "--rounds", "1", "--seconds", "1"), ("RS256", "ES256", "EdDSA")),
    ],
)
def test_tokens_print_the_cost_of_each_algorithm(arguments: tuple[str, ...], algorithms: tuple[str, ...]) -> None:
    found = costs_of("tokens", *arguments)
    for algorithm in algorithms:
        assert found[f"{algorithm}, new: tokens, none remembered"] > found[f"{algorithm}, new: no tokens"] > 0
    assert found["ES256: tokens"] > 0


@pytest.mark.heavy
@pytest.mark.skipif(not shutil.which("nginx") or not shutil.which("wrk"), reason="needs nginx and wrk on the PATH")
def test_tracing_prints_the_cost_of_each_ratio() -> None:
    found = costs_of("tracing", "--rounds", "1", "--seconds", "1")
    assert len(found) == 8
    assert found["no trace context: 100 %"] > found["no trace context: off"] > 0


def test_the_benchmark_of_tls_measures_this_gateway_with_and_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tls, "PROXIES", {title: tls.PROXIES[title] for title in ("gateway", tls.PLAIN)})
    assert tls.main(["--seconds", "0.05", "--rounds", "1"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| new", "| resumed", "| req"))]
    assert len(rows) == 5
    assert all(cell.strip().isdigit() for cell in rows[-1].split("|")[2:-1])


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_of_the_probe_has_a_gateway_with_its_settings(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The gateway's configuration is valid, and the probe gets the options of the pass and then those of the user."""
    config = GatewayConfig.model_validate(configuration(PASSES[name], str(tmp_path), 9001, 9002, "x" * 32))
    assert {route.upstream for route in config.routes} == {"up", "other"}
    script = tmp_path / "probe.py"
    script.write_text("import sys; print(*sys.argv[1:]); sys.exit('--fail' in sys.argv)")
    assert probe([str(script), "--pass", name, "-v"]) == 0
    printed = capfd.readouterr().out
    assert printed.startswith(f"== {name} ==\n--gateway http://127.0.0.1:")
    assert printed.strip().endswith(" ".join([*PASSES[name].options, "-v"]))
    assert probe([str(script), "--pass", name, "--fail"]) == 1
    assert capfd.readouterr().out.endswith(f"\nfailed: {name}\n")
