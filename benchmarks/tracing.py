"""What tracing costs a request: gateways that do not trace, or sample none, 1 % or all of their requests.

`python -m benchmarks.tracing` runs gateways on one core; upstream (nginx), load and the collector use the other. All
gateways run at the same time and are driven in short turns, forwards and backwards, so that ratios hold on a machine
that is not idle. Two processes of the same code differ by up to two microseconds a request, so there are two of each
kind, and a round's figure is their mean; the difference of the two that do not trace is printed as well. Included is
the thread that encodes and sends spans, as it belongs to the gateway's process. It takes about two and a half minutes.
`--before` is a checkout of another commit, whose gateways that do not trace are measured too.
"""

import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import fmean
from typing import Any

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
_ONCE, _AGAIN = ", first process", ", second process"
CLAIMS = [
    Claim(f"not sampled, {PLAIN}", f"{PLAIN}: unsampled", f"{PLAIN}: off", UNSAMPLED),
    Claim(f"not sampled, {IN_TRACE}", f"{IN_TRACE}: unsampled", f"{IN_TRACE}: off", UNSAMPLED),
    Claim(f"1 %, {PLAIN}", f"{PLAIN}: 1 %", f"{PLAIN}: off", UNSAMPLED + SAMPLED / 100),
    Claim(f"100 %, {PLAIN}", f"{PLAIN}: 100 %", f"{PLAIN}: off", SAMPLED),
    Claim("off, compared with the commit before", f"{PLAIN}: off", f"{PLAIN}: before", 0.5),
    Claim("off, one process compared with another", f"{PLAIN}: off{_AGAIN}", f"{PLAIN}: off{_ONCE}", 2.0),
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
        kinds: dict[str, tuple[Path, dict[str, Any]]] = {"off": (ROOT, {})}
        for name, ratio in RATIOS.items():
            section = {"enabled": True, "endpoint": url, "ratio": ratio, "parent": "ignore"}
            kinds[name] = ROOT, {"tracing": section}
        if before is not None:
            kinds["before"] = before, {}
        gateways = {
            f"{name}{process}": stack.enter_context(
                gateway(checkout, folder / f"{number}{process}", origin, None, own)
            )
            for process in (_ONCE, _AGAIN)
            for number, (name, (checkout, own)) in enumerate(kinds.items())
        }
        runs = [(name, PLAIN) for name in gateways]
        runs += [(f"{name}{process}", IN_TRACE) for process in (_ONCE, _AGAIN) for name in ("off", "unsampled")]
        found = alternating_costs(gateways, cases, runs, core=LOAD_CORE, seconds=seconds, rounds=rounds)
    return _means(found) | {name: values for name, values in found.items() if name.startswith(f"{PLAIN}: off")}


def _means(found: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Return the means of both processes of each kind, by round."""
    return {
        name.removesuffix(_ONCE): list(map(fmean, zip(values, found[name.removesuffix(_ONCE) + _AGAIN], strict=True)))
        for name, values in found.items()
        if name.endswith(_ONCE)
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the table and the claims."""
    return print_costs("benchmarks.tracing", __doc__, measure, CLAIMS, arguments, seconds=1.0, rounds=9)


if __name__ == "__main__":
    sys.exit(main())
