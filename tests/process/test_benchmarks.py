"""The comparison with other proxies: its arithmetic, its reading of processes and of wrk, and one short run of it."""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import create_server, socket
from xml.etree import ElementTree as ET

import pytest

from benchmarks import limiter, many_clients, overload
from benchmarks.compare import main
from benchmarks.flood import flood
from benchmarks.load import Failed, latencies, parse_wrk, percentile
from benchmarks.peers import PEERS, Place
from benchmarks.plot import Row, draw
from benchmarks.processes import cpu_seconds, free_port, reset_peak, resident_bytes, running
from benchmarks.report import Results, tables
from benchmarks.upstream import SIZES, SMALL

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


def test_every_peer_has_a_hint_or_needs_none_and_a_command(tmp_path: Path) -> None:
    for peer in PEERS:
        folder = tmp_path / peer.name
        folder.mkdir()
        launch = peer.launch(Place(folder, 1001, 1002))
        text = " ".join([*launch.command, *launch.env.values(), *(file.read_text() for file in folder.iterdir())])
        assert "1001" in text, peer.name
        assert "1002" in text, peer.name
        assert peer.hint or peer.found(), peer.name


def test_the_bodies_have_the_sizes_they_are_named_for() -> None:
    assert SIZES == {"small": 190, "10k": 10 * 2**10, "1m": 2**20, "100m": 100 * 2**20}


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


def test_a_table_shows_medians_spread_ratio_and_failures(results: Results) -> None:
    peers = [peer for peer in PEERS if peer.name in ("gateway", "nginx", "envoy")]
    lines = tables(results, peers).splitlines()
    assert lines[4:7] == [
        "| this gateway | 5,000 | 45 | 40 to 50 | 1.00 |",
        "| nginx, limit_req | 50,000 | 4 | 4 to 5 | 0.10 |",
        "| Envoy, local rate limit | failed |  |  |  |",
    ]
    assert {line.count("|") for line in lines[2:7]} == {6}
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
    assert "no such peer: apache; there are gateway, nginx" in capsys.readouterr().err


def test_the_limiters_that_need_no_library_are_timed_and_weighed() -> None:
    for contestant in limiter.CONTESTANTS[:2]:
        assert 0 < limiter.microseconds(contestant.build(), 1000) < 1000
        assert 50 < limiter.bytes_a_client(contestant.build, 2000) < 1000


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
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ") and "µs" not in line]
    assert [row[0] for row in rows] == ["| this gateway", "| uvicorn, constant response"]
    gateway, constant = (float(row[2].replace(",", "")) for row in rows)
    assert 0 < constant < gateway
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
