"""The gateway beside nginx, in one run on one machine: requests a second, and CPU time a request.

`python -m benchmarks.compare` starts nginx as upstream on the second core, then by turns each peer on the first core,
and drives it with wrk from the second: GET of a 190-byte JSON answer over 64 keep-alive connections. CPU is user and
system time of the peer's processes. Needs nginx and wrk (Debian packages of those names) and Linux.
"""

import argparse
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PEER_CORE, LOAD_CORE = "0", "1"
BODY = json.dumps({"id": 7, "name": "Ada Lovelace", "pad": "x" * 141})
CONNECTIONS = 64
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Peer:
    """Something that proxies: its name, and how to start it in a folder in front of an upstream port."""

    name: str
    command: Callable[[Path, int, int], list[str]]


@dataclass(frozen=True)
class Measurement:
    """One round of one peer."""

    requests_per_second: float
    cpu_microseconds: float


def gateway_command(folder: Path, port: int, upstream: int) -> list[str]:
    """Start this gateway with limiter, breaker and metrics on, and a limit that is never reached."""
    config = folder / "gateway.yaml"
    config.write_text(
        json.dumps(
            {
                "state_dir": str(folder / "state"),
                "log": {"access": False},
                "tiers": {"FREE": {"rate": 1_000_000, "capacity": 1_000_000}},
                "upstreams": {"up": {"targets": [{"url": f"http://127.0.0.1:{upstream}"}]}},
                "routes": [{"name": "all", "path": "/api", "upstream": "up"}],
            }
        )
    )
    return [sys.executable, "-m", "api_gateway", "--config", str(config), "--port", str(port)]


def nginx_command(folder: Path, port: int, upstream: int) -> list[str]:
    """Start nginx as a proxy with limit_req by client id and keep-alive to the upstream."""
    location = f"""
        limit_req_zone $http_x_client_id zone=clients:10m rate=1000000r/s;
        upstream up {{ server 127.0.0.1:{upstream}; keepalive 128; }}
        server {{
            listen 127.0.0.1:{port};
            keepalive_requests 1000000000;
            location /api {{
                limit_req zone=clients burst=100000 nodelay;
                proxy_pass http://up; proxy_http_version 1.1; proxy_set_header Connection "";
                proxy_set_header X-Forwarded-For $remote_addr;
            }}
        }}"""
    return _nginx(folder, location)


def upstream_command(folder: Path, port: int) -> list[str]:
    """Start nginx as the upstream that answers a constant."""
    location = f"""
        server {{
            listen 127.0.0.1:{port};
            keepalive_requests 1000000000;
            location / {{ default_type application/json; return 200 '{BODY}'; }}
        }}"""
    return _nginx(folder, location)


def _nginx(folder: Path, http: str) -> list[str]:
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr crit;\n"
        f"events {{ worker_connections 4096; }}\nhttp {{ access_log off; {http} }}\n"
    )
    return ["nginx", "-p", str(folder), "-c", str(config)]


PEERS = (Peer("this gateway", gateway_command), Peer("nginx, limit_req", nginx_command))


@contextmanager
def running(command: list[str], core: str, port: int) -> Iterator[int]:
    """Run a server pinned to a core until it listens; yield its process id and stop it afterwards."""
    process = subprocess.Popen(  # noqa: S603 - our own words
        ["taskset", "-c", core, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _await_port(process, port)
        yield process.pid
    finally:
        process.terminate()
        process.wait(40)


def _await_port(process: "subprocess.Popen[bytes]", port: int) -> None:
    deadline = time.monotonic() + 15
    while process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"{process.args!r} does not listen on port {port}")


def measure(peer: Peer, upstream: int, seconds: float) -> Measurement:
    """Start a peer, warm it up, and measure one round."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        with running(peer.command(Path(folder), port, upstream), PEER_CORE, port) as pid:
            _drive(port, 1)
            before = cpu_seconds(pid)
            requests, elapsed = _drive(port, seconds)
            used = cpu_seconds(pid) - before
    return Measurement(requests / elapsed, used / requests * 1e6)


def _drive(port: int, seconds: float) -> tuple[int, float]:
    """Run wrk; return requests answered and the seconds it took. Any answer but 2xx and 3xx is an error."""
    url = f"http://127.0.0.1:{port}/api/users"
    wrk = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds:g}s", "-H", "X-Client-ID: bench", url]
    output = subprocess.run(  # noqa: S603 - our own words
        ["taskset", "-c", LOAD_CORE, *wrk], capture_output=True, text=True, check=True
    ).stdout
    if "Non-2xx" in output or "Socket errors" in output:
        raise RuntimeError(f"wrk saw errors:\n{output}")
    found = re.search(r"(\d+) requests in ([\d.]+)(m?s|m),", output)
    if found is None:
        raise RuntimeError(f"wrk said something else:\n{output}")
    return int(found[1]), float(found[2]) * {"ms": 0.001, "s": 1, "m": 60}[found[3]]


def cpu_seconds(pid: int) -> float:
    """Return user and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def free_port() -> int:
    """Return a port nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def table(rounds: dict[str, list[Measurement]]) -> str:
    """Return the medians as a Markdown table, with the spread of CPU time and each peer's ratio to the last."""
    base = statistics.median(one.cpu_microseconds for one in list(rounds.values())[-1])
    lines = ["| | requests/s | CPU µs/request | least to most | ratio |", "|---|---:|---:|---:|---:|"]
    for name, measured in rounds.items():
        rates = [one.requests_per_second for one in measured]
        costs = [one.cpu_microseconds for one in measured]
        middle = statistics.median(costs)
        spread = f"{min(costs):.0f} to {max(costs):.0f}"
        lines.append(f"| {name} | {statistics.median(rates):,.0f} | {middle:.0f} | {spread} | {middle / base:.1f} |")
    return "\n".join(lines)


def main() -> int:
    """Measure all peers by turns and print the table."""
    parser = argparse.ArgumentParser(description="The gateway beside nginx: requests a second and CPU a request.")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5, help="length of one round (default: %(default)s)")
    options = parser.parse_args()
    missing = [name for name in ("nginx", "wrk", "taskset") if shutil.which(name) is None]
    if missing:
        sys.stderr.write(f"not found: {', '.join(missing)} (Debian packages: nginx, wrk, util-linux)\n")
        return 2
    rounds: dict[str, list[Measurement]] = {peer.name: [] for peer in PEERS}
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        with running(upstream_command(Path(folder), port), LOAD_CORE, port):
            for _ in range(options.rounds):
                for peer in PEERS:
                    rounds[peer.name].append(measure(peer, port, options.seconds))
    sys.stdout.write(f"{table(rounds)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
