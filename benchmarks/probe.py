"""Run a black-box HTTP probe against a gateway.

The probe is both upstream and client, on loopback; it starts and stops the gateway itself. Some of its cases need a
gateway with a small limit, with a breaker that opens, or with a small limit of bodies, so there are several passes.
Another is under uvicorn with h11, whose parser forwards framing that the gateway's own refuses.
"""

import argparse
import json
import secrets
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.processes import free_port

ROOT = Path(__file__).parent.parent
_NEVER = 1_000_000  # failures: more than the probe has requests
BURST, FAILURES, OPEN_SECONDS, MAX_BODY = 60, 5, 2, 1_048_576


class Pass(NamedTuple):
    """One run of the probe: its options, what differs from `configuration`, and the command of the server."""

    options: tuple[str, ...] = ()
    tier: dict[str, float] = {"rate": 1000, "capacity": 100_000}  # noqa: RUF012 - replaced, never modified
    breaker: dict[str, float] = {"failure_threshold": _NEVER, "minimum_calls": _NEVER}  # noqa: RUF012 - as above
    max_body: int = 104_857_600
    server: str = "{python} {root}/run_gateway.py --config {config} --port {port}"


_H11 = "env GATEWAY_CONFIG={config} {python} -m uvicorn api_gateway.main:app --http h11 --port {port} --app-dir {root}"
PASSES = {
    "cases": Pass(),
    "slow": Pass(("--only", "SLOW", "--slow")),
    "limits": Pass(
        ("--only", "LIM", "--limit-burst", str(BURST), "--limit-key", "X-Client-ID"),
        tier={"rate": 1, "capacity": BURST},
    ),
    "breaker": Pass(
        ("--only", "CB", "--breaker-failures", str(FAILURES), "--breaker-open", str(OPEN_SECONDS)),
        breaker={
            "failure_threshold": FAILURES,
            "recovery_timeout": OPEN_SECONDS,
            "half_open_max_calls": 1,
            "jitter": 0,
            "ramp": 0,
        },
    ),
    "bodies": Pass(("--only", "BODY-12", "--max-body", str(MAX_BODY)), max_body=MAX_BODY),
    "h11": Pass(("--only", "SMUG"), server=_H11),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the passes; return 1 if a case of one has failed, 2 for a usage error, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.probe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Further options are those of the probe, such as --only SMUG,ORIG-01 or -v; PROBE --help lists them.",
        allow_abbrev=False,
    )
    parser.add_argument("probe", type=Path, help="path of probe_proxy.py")
    parser.add_argument("--pass", dest="passes", choices=PASSES, action="append", help="may be repeated; default: all")
    chosen, options = parser.parse_known_args(arguments)
    if not chosen.probe.is_file():
        parser.error(f"{chosen.probe}: there is no such file")
    failed = []
    for name in chosen.passes or PASSES:
        sys.stdout.write(f"== {name} ==\n")
        sys.stdout.flush()
        if _run(chosen.probe, PASSES[name], options):
            failed.append(name)
    if failed:
        sys.stdout.write(f"failed: {', '.join(failed)}\n")
    return 1 if failed else 0


def _run(probe: Path, kind: Pass, options: list[str]) -> int:
    """Run the probe once; return its exit code."""
    gateway, upstream, token = free_port(), free_port(), secrets.token_hex(16)
    # The probe has a listener, so its requests are not local; it has no option for header fields of this request.
    metrics = f"/metrics?format=prometheus HTTP/1.1\r\nAuthorization: Bearer {token}\r\nX-Request-Line:"
    with tempfile.TemporaryDirectory() as folder, _other_upstream() as other:
        config = Path(folder) / "gateway.yaml"
        config.write_text(json.dumps(configuration(kind, folder, upstream, other, token)))
        start = kind.server.format(python=sys.executable, root=ROOT, config=config, port=gateway)
        command = [sys.executable, "-B", str(probe), "--gateway", f"http://127.0.0.1:{gateway}/api"]
        command += ["--gateway2", f"http://127.0.0.1:{gateway}/other"]
        command += ["--listen", f"127.0.0.1:{upstream}", "--start-cmd", start]
        command += ["--control", f"http://127.0.0.1:{gateway}", "--metrics", metrics]
        command += ["--health", "/health", *kind.options, *options]
        return subprocess.run(command, check=False).returncode  # noqa: S603 - arguments of the user


def configuration(kind: Pass, folder: str, upstream: int, other: int, token: str) -> dict[str, Any]:
    """Return the configuration that the probe requires: short timeouts, and the limit and the breaker of the pass."""
    return {
        "state_dir": f"{folder}/state",
        "log": {"access": False, "level": "warning"},
        "admin": {"tokens": {"probe": {"role": "read", "token": token}}},
        "server": {"drain_timeout": 8, "max_body_bytes": kind.max_body},
        "tiers": {"FREE": kind.tier},
        "address_limit": {"rate": 0},
        "upstreams": {
            "up": {
                "targets": [{"url": f"http://127.0.0.1:{upstream}"}],
                "timeouts": {"connect": 2, "response": 3, "idle": 3},
                "circuit_breaker": kind.breaker,
            },
            "other": {"targets": [{"url": f"http://127.0.0.1:{other}"}]},
        },
        "routes": [
            {"name": "all", "path": "/api", "upstream": "up"},
            {"name": "other", "path": "/other", "upstream": "other"},
        ],
    }


class _Other(BaseHTTPRequestHandler):
    """Responds to every GET with 200."""

    def do_GET(self) -> None:
        """Respond."""
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - of the base class
        """Log nothing."""


@contextmanager
def _other_upstream() -> Iterator[int]:
    """Serve the second upstream in a thread; the value is its port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Other)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


if __name__ == "__main__":
    sys.exit(main())
