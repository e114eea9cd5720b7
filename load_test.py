"""Load test with locust: a class of clients for each tier, each within its limit, and one class that exceeds it.

`python load_test.py` runs headless against a running gateway and prints a summary by class.
`locust -f load_test.py --host http://127.0.0.1:8000` starts the web interface.

Every client first registers its tier as an operator: with the token in GATEWAY_ADMIN__TOKEN; else without a token;
else with the token that a gateway on this machine has generated, in the state folder of the configuration that the
environment selects.
"""

import argparse
import itertools
import os
import subprocess
import sys
import urllib.request
from contextlib import suppress
from functools import lru_cache
from typing import Any, ClassVar
from urllib.parse import urlsplit

try:  # before other imports: locust patches ssl and sockets
    import gevent
    from locust import FastHttpUser, constant_throughput, events, task
    from locust.exception import StopUser
    from locust.stats import RequestStats
except ModuleNotFoundError:
    raise SystemExit("load_test.py needs locust: pip install 'locust>=2.40,<3'") from None

from api_gateway.admin.operator_token import token_file
from api_gateway.config import load_config
from api_gateway.settings.diagnostics import ConfigError

PATH = os.environ.get("LOAD_TEST_PATH", "/api/users")
OK, UNAUTHORIZED, TOO_MANY_REQUESTS = 200, 401, 429
_numbers = itertools.count(1)
_allowed = RequestStats()
_limited = RequestStats()
_failed = RequestStats()


@lru_cache(maxsize=1)
def generated_token(host: str) -> str | None:
    """Return the token that a gateway on this machine generated, or None. It is not sent to other machines."""
    if urlsplit(host).hostname in ("localhost", "127.0.0.1", "::1"):
        with suppress(ConfigError, OSError):
            return token_file(load_config().state_dir).read_text().strip()
    return None


class TierClient(FastHttpUser):  # type: ignore[misc]  # locust is untyped for strict checkers
    """A client of one tier. All classes but Flooder stay below their rate, so that a 429 is a failure."""

    abstract = True
    tier: ClassVar[str]
    expects_limit: ClassVar[bool] = False
    connection_timeout = 5.0
    network_timeout = 10.0

    def on_start(self) -> None:
        """Register a new client id for the tier."""
        self.client_id = f"load-{type(self).__name__.lower()}-{os.getpid()}-{next(_numbers)}"
        token = os.environ.get("GATEWAY_ADMIN__TOKEN")
        if not self._register(token, may_fail=token is None):
            self._register(generated_token(self.host), may_fail=False)

    def _register(self, token: str | None, *, may_fail: bool) -> bool:
        """Register for the tier; return whether it succeeded. End the test if it failed and `may_fail` is false."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        url = f"/clients/{self.client_id}/tier"
        body = {"tier": self.tier}
        with self.client.post(url, json=body, headers=headers, name="register", catch_response=True) as response:
            if response.status_code == UNAUTHORIZED and may_fail:
                response.success()  # a token is needed, for instance by a program with a web interface
                return False
            if response.status_code != OK:
                response.failure(f"not registered: {response.status_code} {response.text}")
            is_registered = response.status_code == OK
        if not is_registered:
            gevent.spawn(self.environment.runner.quit)  # in another greenlet, because `quit` ends this one
            raise StopUser
        return True

    @task  # type: ignore[untyped-decorator]  # as above
    def get(self) -> None:
        """Send one request; count its response for this class."""
        name = type(self).__name__
        headers = {"X-Client-ID": self.client_id}
        with self.client.get(PATH, headers=headers, name=name, catch_response=True) as response:
            if response.status_code == TOO_MANY_REQUESTS:
                if self.expects_limit:
                    response.success()
                else:
                    response.failure("limited although within its rate")


class Free(TierClient):
    """FREE, 1 token per second."""

    tier = "FREE"
    weight = 3
    wait_time = constant_throughput(0.9)


class Basic(TierClient):
    """BASIC, 5 tokens per second."""

    tier = "BASIC"
    weight = 3
    wait_time = constant_throughput(4.5)


class Premium(TierClient):
    """PREMIUM, 20 tokens per second."""

    tier = "PREMIUM"
    weight = 2
    wait_time = constant_throughput(18)


class Enterprise(TierClient):
    """ENTERPRISE, 100 tokens per second; well below that, so that one machine is enough."""

    tier = "ENTERPRISE"
    weight = 1
    wait_time = constant_throughput(50)


class Flooder(TierClient):
    """FREE, with 50 times its rate: most of its requests must be refused."""

    tier = "FREE"
    weight = 1
    expects_limit = True
    wait_time = constant_throughput(50)


CLASSES: tuple[type[TierClient], ...] = (Free, Basic, Premium, Enterprise, Flooder)


@events.request.add_listener  # type: ignore[untyped-decorator]  # as above
def _count(name: str, response_time: float, response_length: int, response: Any, exception: Any, **_: Any) -> None:
    """Count allowed, limited and failed responses separately: the latency of refusals would distort the figures."""
    is_limited = getattr(response, "status_code", None) == TOO_MANY_REQUESTS
    stats = _failed if exception else _limited if is_limited else _allowed
    stats.log_request("GET", name, response_time, response_length)


@events.init.add_listener  # type: ignore[untyped-decorator]  # as above
def _set_the_clock(**_: Any) -> None:
    """Update gevent's clock, which does not advance during imports, so that the run has its full length."""
    gevent.get_hub().loop.update_now()


@events.quitting.add_listener  # type: ignore[untyped-decorator]  # as above
def _check(environment: Any, **_: Any) -> None:
    """Let a run without any request fail."""
    counts = (
        stats.get(kind.__name__, "GET").num_requests for kind in CLASSES for stats in (_allowed, _limited, _failed)
    )
    if not any(counts):
        sys.stderr.write("No request was sent: no client could register, or the run was too short.\n")
        environment.process_exit_code = 1


@events.quit.add_listener  # type: ignore[untyped-decorator]  # as above
def _print_summary(**_: Any) -> None:
    """Print the summary after locust's own tables."""
    sys.stdout.write(f"\n{summary()}\n")


def summary() -> str:
    """Return a table by class: requests sent, allowed, limited and failed, and the latency of allowed ones in ms."""
    counts = "".join(f"{title:>9}" for title in ("sent", "allowed", "limited", "failed", "p50", "p95", "p99"))
    lines = [f"{'class':<12}{'tier':<12}{counts}"]
    for kind in CLASSES:
        name = kind.__name__
        allowed = _allowed.get(name, "GET")
        answers = [stats.get(name, "GET").num_requests for stats in (_allowed, _limited, _failed)]
        times = [round(allowed.get_response_time_percentile(share)) for share in (0.5, 0.95, 0.99)]
        cells = "".join(f"{cell:>9}" for cell in (sum(answers), *answers, *times))
        lines.append(f"{name:<12}{kind.tier:<12}{cells}")
    return "\n".join([*lines, "Latencies are of allowed requests, in milliseconds."])


def main() -> int:
    """Run headless. Return locust's exit code, 0, or 1 if any request failed; 2 if there is no gateway."""
    parser = argparse.ArgumentParser(description="Load test of a running gateway, with a summary by class of client.")
    parser.add_argument("--host", default="http://127.0.0.1:8000", help="(default: %(default)s)")
    parser.add_argument("--users", type=int, default=10, help="number of clients (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=20, help="length of the run in seconds (default: %(default)s)")
    options = parser.parse_args()
    try:
        with urllib.request.urlopen(f"{options.host}/healthz", timeout=5):  # noqa: S310 - the operator's own gateway
            pass
    except OSError as error:
        sys.stderr.write(f"No gateway responds at {options.host}: {error}. Start one: python run_gateway.py\n")
        return 2
    run = ["--headless", "--only-summary", "-u", str(options.users), "-r", str(options.users)]
    length = ["-t", f"{options.seconds}s", "--host", options.host, "--loglevel", "WARNING"]
    command = [sys.executable, "-m", "locust", "-f", os.path.abspath(__file__), *run, *length]  # noqa: PTH100
    return subprocess.run(command, check=False).returncode  # noqa: S603 - fixed arguments


if __name__ == "__main__":
    raise SystemExit(main())
