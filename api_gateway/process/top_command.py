"""The command `top`: the figures of a running gateway on one screen, drawn anew every few seconds."""

import argparse
import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from api_gateway.printable_text import printable, table
from api_gateway.process.operator_client import (
    NOT_REACHED,
    CommandFailed,
    JsonObject,
    OperatorClient,
    add_access_options,
    client_of,
    run_action,
    seconds_between,
    whole_number,
)
from api_gateway.process.view_commands import line_of
from api_gateway.system.command_line import CommandParser

_CLIENTS, _REQUESTS = 8, 6  # rows at most
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # alternate screen, without a cursor
_HOME, _END_OF_LINE, _BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
_ABSENT = 404  # status: the history is disabled, or the gateway is of a version without the endpoint


def run_top(arguments: Sequence[str]) -> int:
    """Run `api-gateway top` with these arguments; return the exit code."""
    options = _parser().parse_args(arguments)
    return run_action(lambda: _top(client_of(options), options))


def _parser() -> CommandParser:
    parser = CommandParser(prog="api-gateway top", description="Show a live screen of a running gateway.")
    parser.add_argument(
        "--interval", type=seconds_between, default=2.0, metavar="SECONDS", help="seconds between screens (default: 2)"
    )
    parser.add_argument(
        "--count", type=whole_number, default=0, metavar="N", help="end after N screens (default: 0, never)"
    )
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each screen")
    add_access_options(parser)
    return parser


def _top(client: OperatorClient, options: argparse.Namespace) -> None:
    figures: JsonObject | None = None
    is_absent = False  # the gateway, and this has been said
    with _screen(is_used=sys.stdout.isatty() and not options.json):
        shown = 0
        while True:
            found = _figures(client, figures) if figures is None else _later_figures(client, figures)
            if found is None:
                if not is_absent:
                    _show_absence(client, is_json=options.json)
            elif options.json:
                print(json.dumps(_public(found)), flush=True)
            else:
                _draw(screen_lines(found, _rows()))
            figures, is_absent = found or figures, found is None
            shown += 1
            if shown == options.count:
                return
            time.sleep(max(options.interval, 0.2))


def _figures(client: OperatorClient, before: JsonObject | None) -> JsonObject:
    """Return the figures of one screen. Rates are those since `before`, or of the last minute without it."""
    metrics, health = client.get("/metrics"), client.get("/health")
    wrong = _problems(client) or {"status": health["status"], "problems": []}
    now, minute = time.monotonic(), metrics["rates"]["last_60s"]
    total = metrics["requests"]["total"]
    rate = minute["requests_per_second"]
    if before is not None and total >= before["requests"]:  # else the gateway was restarted
        rate = (total - before["requests"]) / (now - before["_at"])
    return {
        "url": client.url,
        "version": health["version"],
        "status": wrong["status"],
        "problems": wrong["problems"],
        "uptime_seconds": health["uptime_seconds"],
        "requests": total,
        "requests_per_second": round(rate, 1),
        "in_flight": metrics["requests"]["in_flight"],
        "limited_ratio": minute["limited_rate"],
        "error_ratio": minute["error_rate"],
        "latency_ms": metrics["latency"]["overall"]["last_60s"]["percentiles_ms"],
        "event_loop_lag_seconds": health["event_loop"]["lag_seconds"],
        "decision_source": health["store"]["decision_source"],
        "upstreams": [
            _upstream(name, one, metrics["latency"]["upstreams"][name]["last_60s"])
            for name, one in health["upstreams"].items()
            if name in metrics["latency"]["upstreams"]  # a reload between the two responses may have added it
        ],
        "clients": client.get("/clients", sort="limited", limit=_CLIENTS)["clients"],
        "last_refusals_and_errors": _last_failures(client),
        "_at": now,
    }


def _later_figures(client: OperatorClient, before: JsonObject) -> JsonObject | None:
    """Return the figures of the next screen; None while no gateway responds, as in a restart."""
    try:
        return _figures(client, before)
    except CommandFailed as error:
        if error.code != NOT_REACHED:
            raise
        return None


def _show_absence(client: OperatorClient, *, is_json: bool) -> None:
    """Say that no gateway responds: on the screen, and not among lines of JSON."""
    line = f"{client.url}  no response; asking again"
    if is_json:
        print(line, file=sys.stderr, flush=True)
    else:
        _draw([printable(line)])


def _public(figures: JsonObject) -> JsonObject:
    return {name: value for name, value in figures.items() if not name.startswith("_")}


def _upstream(name: str, one: JsonObject, minute: JsonObject) -> JsonObject:
    targets = one["targets"]
    return {
        "name": name,
        "status": one["status"],
        "circuit_breaker": one["circuit_breaker"],
        "targets": len(targets),
        "unhealthy_targets": sum(target["healthy"] is False for target in targets),
        "in_flight": one["concurrency"]["in_flight"],
        "calls_last_60s": minute["count"],
        "latency_ms": minute["percentiles_ms"],
    }


def _problems(client: OperatorClient) -> JsonObject | None:
    """Return the problems that the dashboard shows; None if the gateway's version does not state them."""
    try:
        found: JsonObject = client.get("/dashboard/problems")
    except CommandFailed as error:
        if error.status == _ABSENT:
            return None
        raise
    return found


def _last_failures(client: OperatorClient) -> list[JsonObject] | None:
    """Return the last refusals and errors, oldest first; None if the gateway keeps no history."""
    try:
        found = [
            row
            for result in ("refusal", "error")
            for row in client.get("/history", result=result, limit=_REQUESTS)["requests"]
        ]
    except CommandFailed as error:
        if error.status == _ABSENT:
            return None
        raise
    return sorted(found, key=lambda row: int(row["number"]))[-_REQUESTS:]


def screen_lines(figures: JsonObject, rows: int | None = None) -> list[str]:
    """Return the lines of a screen of so many rows, or with everything; the lines themselves are not shortened."""
    percentiles = "  ".join(f"{name} {_number(value)}" for name, value in figures["latency_ms"].items())
    gateway = (
        figures["url"],
        f"api-gateway {figures['version']}",
        figures["status"],
        f"up {_span(figures['uptime_seconds'])}",
    )
    traffic = (
        f"{figures['requests_per_second']:g} requests/s",
        f"{figures['in_flight']} in flight",
        f"{figures['limited_ratio']:.1%} limited",
        f"{figures['error_ratio']:.1%} errors",
        f"event loop lag {figures['event_loop_lag_seconds'] * 1000:.0f} ms",
        f"decisions from {figures['decision_source']}",
    )
    head = ["  ".join(gateway), "  ".join(traffic), f"latency of the last minute in ms: {percentiles}", ""]
    parts = [part for part in (_wrong(figures), *_tables(figures)) if part is not None]
    sizes = [len(part) - 1 for part in parts]
    if rows is not None:
        sizes = shares(sizes, rows - len(head) - 2 * len(parts) + 1)
    return [printable(line) for line in [*head, *_joined(parts, sizes)]]


def shares(wanted: Sequence[int], room: int) -> list[int]:
    """Return the number of rows for each part of the screen: all of its lines, or an equal share of the space."""
    given = [0] * len(wanted)
    while room > 0 and given != list(wanted):
        for index, size in enumerate(wanted):
            if given[index] < size and room > 0:
                given[index] += 1
                room -= 1
    return given


def _joined(parts: Sequence[Sequence[str]], sizes: Sequence[int]) -> Iterator[str]:
    """Yield the heading of each part and its first lines, and an empty line between two parts."""
    for number, ((heading, *lines), size) in enumerate(zip(parts, sizes, strict=True)):
        if number:
            yield ""
        yield heading if size == len(lines) else f"{heading}  ({size} of {len(lines)} are shown)"
        yield from lines[:size]


def _wrong(figures: JsonObject) -> list[str] | None:
    """Return the lines of the problems, the gravest first; None if there are none."""
    lines = [f"{one['severity']}  {one['text']}" for one in figures["problems"]]
    return ["WHAT IS WRONG NOW", *lines] if lines else None


def _tables(figures: JsonObject) -> Iterator[list[str] | None]:
    """Yield the upstreams, the clients and the last failures: a heading and lines; None without a history."""
    header = ("UPSTREAM", "STATUS", "BREAKER", "TARGETS", "UNHEALTHY", "IN FLIGHT", "CALLS/MIN", "P50 MS", "P99 MS")
    rows = [
        (
            one["name"],
            one["status"],
            one["circuit_breaker"],
            one["targets"],
            one["unhealthy_targets"],
            one["in_flight"],
            one["calls_last_60s"],
            one["latency_ms"].get("p50"),
            one["latency_ms"].get("p99"),
        )
        for one in sorted(figures["upstreams"], key=_gravity)
    ]
    yield table(header, rows)
    names = ("client_id", "tier", "limited", "requests")
    limited = [[one[name] for name in names] for one in figures["clients"]]
    yield table(("MOST LIMITED CLIENT", "TIER", "LIMITED", "REQUESTS"), limited)
    failures = figures["last_refusals_and_errors"]
    yield None if failures is None else ["LAST REFUSALS AND ERRORS", *map(line_of, reversed(failures))]


def _gravity(upstream: JsonObject) -> tuple[int, int]:
    """Return the sort key of an upstream: failing ones come first, then the busiest."""
    return ("fail", "warn", "pass").index(upstream["status"]), -upstream["calls_last_60s"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _span(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _rows() -> int | None:
    """Return how many lines a screen has, without the last one, where the cursor stays; None unless on a terminal."""
    return shutil.get_terminal_size().lines - 1 if sys.stdout.isatty() else None


def _draw(lines: Sequence[str]) -> None:
    """Draw a screen on a terminal, or print all its lines elsewhere."""
    if not sys.stdout.isatty():
        print("\n".join(lines), flush=True)
        return
    columns, rows = shutil.get_terminal_size()
    fitting = "\r\n".join(f"{line[:columns]}{_END_OF_LINE}" for line in lines[: rows - 1])
    sys.stdout.write(f"{_HOME}{fitting}\r\n{_BELOW}")
    sys.stdout.flush()


@contextmanager
def _screen(*, is_used: bool) -> Iterator[None]:
    """Use the alternate screen within this block, and leave it however the block ends."""
    if not is_used:
        yield
        return
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.stdout.write(_ENTER)
    try:
        yield
    finally:
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt
