"""What tracing costs a request: gateways that do not trace, or sample none, 1 % or all of their requests.

`python -m benchmarks.tracing` runs gateways on one core; upstream (nginx), load and the collector use the other. All
gateways run at the same time and are driven in turns, so that ratios hold on a machine that is not idle. Included is
the thread that encodes and sends spans, as it belongs to the gateway's process. `--before` is a checkout of another
commit, whose gateway is measured too.
"""

import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from benchmarks.api_keys import LOAD_CORE, ROOT, gateway
from benchmarks.cases import Case
from benchmarks.claims import Claim, print_costs
from benchmarks.load import alternating_costs
from benchmarks.processes import pinned
from benchmarks.upstream import upstream

RATIOS = {"unsampled": 0.0, "1 %": 0.01, "100 %": 1.0}
PLAIN, IN_TRACE = "no trace context", "trace context"
# A client that begins a trace with each request, and leaves the decision to the gateway (`parent: ignore`).
_TRACES_LUA = """
local number = 0
request = function()
  number = number + 1
  local id = number * 2654435761 % 4294967296
  wrk.headers["traceparent"] = string.format("00-%016x%016x-%016x-00", number, id, number)
  return wrk.format()
end
"""
UNSAMPLED, SAMPLED = 3.0, 12.0  # microseconds that may be added
CLAIMS = [
    Claim(f"not sampled, {PLAIN}", f"{PLAIN}: unsampled", f"{PLAIN}: off", UNSAMPLED),
    Claim(f"not sampled, {IN_TRACE}", f"{IN_TRACE}: unsampled", f"{IN_TRACE}: off", UNSAMPLED),
    Claim(f"1 %, {PLAIN}", f"{PLAIN}: 1 %", f"{PLAIN}: off", UNSAMPLED + SAMPLED / 100),
    Claim(f"100 %, {PLAIN}", f"{PLAIN}: 100 %", f"{PLAIN}: off", SAMPLED),
    Claim("off, compared with the commit before", f"{PLAIN}: off", f"{PLAIN}: before", 0.5),
]


class _Sink(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Accept anything."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the signature is the library's
        """Log nothing."""


@contextmanager
def collector() -> Iterator[str]:
    """Run a collector that forgets what it gets; yield its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Sink)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def measure(seconds: float, rounds: int, before: Path | None) -> dict[str, list[float]]:
    """Return the CPU time of a request in microseconds, by what was measured, in each round. Raises Failed."""
    cases = {PLAIN: Case(PLAIN), IN_TRACE: Case(IN_TRACE, lua=_TRACES_LUA)}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "origin").mkdir()
        origin = stack.enter_context(upstream(folder / "origin", LOAD_CORE))
        with pinned(LOAD_CORE):
            url = stack.enter_context(collector())
        gateways = {"off": stack.enter_context(gateway(ROOT, folder / "off", origin, None))}
        for number, (name, ratio) in enumerate(RATIOS.items()):
            settings = {"enabled": True, "endpoint": url, "ratio": ratio, "parent": "ignore"}
            own = {"tracing": settings}
            gateways[name] = stack.enter_context(gateway(ROOT, folder / str(number), origin, None, own))
        if before is not None:
            gateways["before"] = stack.enter_context(gateway(before, folder / "before", origin, None))
        runs = [(name, case) for case in cases for name in gateways]
        return alternating_costs(gateways, cases, runs, core=LOAD_CORE, seconds=seconds, rounds=rounds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the table and the claims."""
    return print_costs("benchmarks.tracing", __doc__, measure, CLAIMS, arguments)


if __name__ == "__main__":
    sys.exit(main())
