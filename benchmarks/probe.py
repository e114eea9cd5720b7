"""Run a black-box HTTP probe against a gateway: `python -m benchmarks.probe path/to/probe_proxy.py [option ...]`.

The probe is both upstream and client, on loopback; it starts and stops the gateway itself.
"""

import json
import secrets
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def main(arguments: list[str]) -> int:
    """Run the probe with this path and options; return its exit code."""
    if not arguments:
        sys.stderr.write("usage: python -m benchmarks.probe path/to/probe_proxy.py [option ...]\n")
        return 2
    probe, *options = arguments
    gateway, upstream, token = _free_port(), _free_port(), secrets.token_hex(16)
    # The probe has a listener, so its requests are not local; it has no option for header fields of this request.
    metrics = f"/metrics?format=prometheus HTTP/1.1\r\nAuthorization: Bearer {token}\r\nX-Request-Line:"
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "gateway.yaml"
        config.write_text(json.dumps(_config(folder, upstream, token)))
        start = f"{sys.executable} {ROOT / 'run_gateway.py'} --config {config} --port {gateway}"
        command = [sys.executable, "-B", probe, "--gateway", f"http://127.0.0.1:{gateway}/api"]
        command += ["--listen", f"127.0.0.1:{upstream}", "--start-cmd", start]
        command += ["--control", f"http://127.0.0.1:{gateway}", "--metrics", metrics]
        command += ["--health", "/health", *options]
        return subprocess.run(command, check=False).returncode  # noqa: S603 - arguments of the user


def _config(folder: str, upstream: int, token: str) -> dict[str, object]:
    """Return the configuration that the probe requires: short timeouts, a limit and a breaker that never act."""
    return {
        "state_dir": f"{folder}/state",
        "log": {"access": False, "level": "warning"},
        "admin": {"tokens": {"probe": {"role": "read", "token": token}}},
        "server": {"drain_timeout": 8},
        "tiers": {"FREE": {"rate": 1000, "capacity": 100_000}},
        "address_limit": {"rate": 0},
        "upstreams": {
            "up": {
                "targets": [{"url": f"http://127.0.0.1:{upstream}"}],
                "timeouts": {"connect": 2, "response": 3, "idle": 3},
                "circuit_breaker": {"failure_threshold": 1_000_000, "minimum_calls": 1_000_000},
            }
        },
        "routes": [{"name": "all", "path": "/api", "upstream": "up"}],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
