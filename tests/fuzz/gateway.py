"""The gateway that is fuzzed: a process of its own, and what can be seen of it from outside."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent.parent
TOKEN = "for-the-operator-endpoints-of-a-fuzzed-gateway"
_STARTS_WITHIN = 90.0  # seconds
_ENDS_WITHIN = 60.0
_TICK = os.sysconf("SC_CLK_TCK")
_DEFECT = re.compile(r"Traceback|Fatal error|Exception in callback|never retrieved|never awaited|Unclosed|CRITICAL")

_ROUTES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("fast", "plain", {}),
    ("timed", "plain", {"timeout": 20}),
    ("fallback", "plain", {"fallback": {"status": 200, "body": "fallback"}}),
    ("retry", "retrying", {}),
    ("limited", "limited", {}),
)


def configuration(ports: list[int], state_dir: Path) -> str:
    """Return a configuration with routes for the fast path and for every way off it.

    All are there twice: those that begin with x lead to upstreams that may misbehave.
    """
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    breaker = {"failure_threshold": 1_000_000, "minimum_calls": 1_000_000, "per_target": False}
    up = {"circuit_breaker": breaker, "timeouts": {"connect": 2, "response": 3, "idle": 3, "tunnel": 3}}
    pool = {"pool": {"max_connections": 64, "idle_timeout": 2}}
    retry = {"attempts": 3, "budget": 1, "min_retries_per_second": 1000, "backoff": {"base": 0.001, "cap": 0.002}}
    return json.dumps(
        {
            "server": {
                "port": 0,
                "header_timeout": 2,
                "idle_timeout": 2,
                "keep_alive_timeout": 3,
                "drain_timeout": 2,
                "max_header_bytes": 16_384,
                "max_event_loop_lag": None,
                "worker_timeout": 10,
            },
            "state_dir": str(state_dir),
            "admin": {"token": TOKEN},
            "log": {"access": False},
            "tiers": {"FREE": {"rate": 1_000_000, "capacity": 10_000_000}},
            "upstreams": {
                f"{mark}{name}": upstream
                for mark, first, second in (("", *urls[:2]), ("x", *urls[2:]))
                for name, upstream in {
                    "plain": {"targets": [{"url": first}], **up, **pool, "retry": {"attempts": 1}},
                    "retrying": {"targets": [{"url": first}, {"url": second}], **up, **pool, "retry": retry},
                    "limited": {"targets": [{"url": second}], **up, "concurrency": {"limit": 64}},
                }.items()
            },
            "routes": [
                {"name": f"{mark}{name}", "path": f"/api/{mark}{name}", "upstream": f"{mark}{upstream}", **more}
                for mark in ("", "x")
                for name, upstream, more in _ROUTES
            ],
        },
        indent=1,
    )


@dataclass
class Gateway:
    """A running gateway."""

    folder: Path
    ports: list[int]
    process: "subprocess.Popen[bytes]" = field(init=False)
    port: int = field(init=False)
    _log: IO[bytes] = field(init=False)

    def start(self) -> None:
        """Start it and wait until it listens."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "gateway.yaml"
        path.write_text(configuration(self.ports, self.folder / "state"))
        self._log = (self.folder / "log.txt").open("wb")
        command = [sys.executable, str(ROOT / "run_gateway.py"), "--config", str(path)]
        kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("GATEWAY_")}
        self.process = subprocess.Popen(
            command, cwd=self.folder, env={**kept, "PYTHONUNBUFFERED": "1"}, stdout=self._log, stderr=subprocess.STDOUT
        )
        until = time.monotonic() + _STARTS_WITHIN
        while (found := re.search(r"Listening on http://[^:]+:(\d+)|http://localhost:(\d+)", self.log)) is None:
            if self.process.poll() is not None or time.monotonic() > until:
                self.kill()
                raise RuntimeError(f"the gateway does not start: {self.log}")
            time.sleep(0.05)
        self.port = int(found[1] or found[2])

    @property
    def log(self) -> str:
        """What it has written."""
        return (self.folder / "log.txt").read_text(errors="replace")

    def defect(self) -> str | None:
        """Return what its log says of a defect."""
        found = _DEFECT.search(self.log)
        return (
            None if found is None else f"the log holds {found[0]!r}:\n{self.log[max(0, found.start() - 400) :][:4000]}"
        )

    def end(self) -> str | None:
        """Return how it has ended, None while it has not."""
        code = self.process.poll()
        return None if code is None else f"the process has ended with {code}:\n{self.log[-4000:]}"

    def descriptors(self) -> int:
        """Return how many files and sockets it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))  # noqa: PTH208 - a number is all that is wanted

    def cpu_seconds(self) -> float:
        """Return the processor time it has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICK

    def stop(self) -> str | None:
        """Stop it; return what is wrong with how it ends."""
        if (ended := self.end()) is not None:
            return ended
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(_ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            self.kill()
            return "the process does not end after SIGTERM"
        finally:
            self._log.close()
        return None if code == 0 else f"the process has ended with {code}:\n{self.log[-4000:]}"

    def kill(self) -> None:
        """End it now."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._log.close()
