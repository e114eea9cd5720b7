"""The commands `explain`, `clients`, `breakers`, `limits` and `tail`: views of a running gateway, as text or JSON."""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus

from api_gateway.printable_text import counted, printable, table
from api_gateway.process.explain_command import add_explain_options, run_explanation
from api_gateway.process.limits_view import bucket_line, doubt_lines, limit_lines, share_lines
from api_gateway.process.operator_client import (
    NOT_REACHED,
    CommandFailed,
    JsonObject,
    OperatorClient,
    add_access_options,
    client_of,
    print_json,
    run_action,
    seconds_between,
    segment,
    show,
    show_all,
)
from api_gateway.system.command_line import CommandParser

_QUOTA_COLUMNS = {
    "QUOTA": "limit",
    "ROUTE": "route",
    "PERIOD": "period",
    "USED": "used",
    "OF": "quota",
    "CARRIED OVER": "carried_over",
    "TOP-UP": "top_up",
    "REMAINING": "remaining",
    "PERIOD ENDS": "period_end",
}
_SLOT_COLUMNS = {"CONCURRENCY": "limit", "ROUTE": "route", "IN FLIGHT": "in_flight", "OF": "concurrent"}
PAGE = 200  # requests that `tail` asks for at once


def run_view(arguments: Sequence[str]) -> int:
    """Run one of these commands, whose name is the first argument; return the exit code."""
    options = _parser().parse_args(arguments)
    action: Callable[[OperatorClient, argparse.Namespace], None] = options.action
    return run_action(lambda: action(client_of(options), options))


def _parser() -> CommandParser:
    parser = CommandParser(prog="api-gateway", description="Views of a running gateway.")
    explain = parser.add_command("explain", "show what was decided about a request, or would be")
    add_explain_options(explain)
    explain.set_defaults(action=run_explanation)
    clients = parser.add_command("clients", "show the most limited clients, or one client")
    clients.add_argument("client", nargs="?", help="client id")
    clients.add_argument(
        "--sort",
        choices=("limited", "requests", "bare"),
        default="limited",
        help="what to sort by, highest first: limited requests, all requests, or requests with a bare client id"
        " (default: limited)",
    )
    clients.add_argument("--limit", type=int, default=20, help="maximum number of clients (default: 20)")
    clients.set_defaults(action=_clients)
    breakers = parser.add_command("breakers", "show the circuit breakers and targets of the upstreams")
    breakers.set_defaults(action=_breakers)
    limits = parser.add_command("limits", "show all limits, with refusals, or what one key of a limit has left")
    limits.add_argument("limit", nargs="?", metavar="NAME", help="show what a key has left of this limit")
    limits.add_argument(
        "values", nargs="*", metavar="VALUE", help="the value of each part of the limit's key, in their order"
    )
    limits.add_argument(
        "--tier", help="the tier, if the limit has an allowance for each tier and does not count by client"
    )
    limits.set_defaults(action=_limits)
    tail = parser.add_command("tail", "follow the requests as they end")
    tail.add_argument("--client", metavar="ID", help="only of this client")
    tail.add_argument("--status", help="only with this status, or a class such as 4xx")
    tail.add_argument("--reason", help="only with this reason")
    tail.add_argument("--route", help="only of this route")
    tail.add_argument(
        "--lines", type=int, default=10, metavar="N", help="show the last N requests first (default: 10)"
    )
    tail.add_argument("--no-follow", action="store_true", help="print the last requests and exit")
    tail.add_argument(
        "--interval",
        type=seconds_between,
        default=1.0,
        metavar="SECONDS",
        help="seconds between two requests to the gateway (default: 1)",
    )
    tail.set_defaults(action=_tail)
    for command in (explain, clients, breakers, limits, tail):
        words = "a line of JSON for each request" if command is tail else "the response of the gateway as JSON"
        command.add_argument("--json", action="store_true", help=f"print {words}")
        add_access_options(command)
    return parser


# Other views


def _clients(client: OperatorClient, options: argparse.Namespace) -> None:
    if options.client is not None:
        place = f"/clients/{segment(options.client, 'client id')}"
        found = client.get(place)
        found["quotas"] = _quotas(client, f"{place}/quotas")
    else:
        found = client.get("/clients", sort=options.sort, limit=options.limit)
    if options.json:
        print_json(found)
    elif options.client is not None:
        _show_client(found)
    else:
        header = ("CLIENT", "TIER", "SOURCE", "LIMITED", "REQUESTS", "WITHOUT PROOF")
        names = ("client_id", "tier", "tier_source", "limited", "requests", "bare")
        show_all(table(header, ([one[name] for name in names] for one in found["clients"])))


def _quotas(client: OperatorClient, path: str) -> list[JsonObject] | None:
    """Return the calendar quotas of a client; None, with the reason, while the store that has them is unavailable."""
    try:
        quotas: list[JsonObject] = client.get(path)["quotas"]
    except CommandFailed as error:
        if error.status != HTTPStatus.SERVICE_UNAVAILABLE:
            raise
        print(printable(f"quotas: {error}"), file=sys.stderr)
        return None
    return quotas


def _show_client(found: JsonObject) -> None:
    tier, grant = found["tier"], found["grant"]
    show(f"{found['client_id']}: {tier['name']} ({tier['rate']:g}/s, {tier['capacity']}), {found['tier_source']}")
    show_all(doubt_lines(found))
    if grant is not None:
        show(f"granted until {grant['until']}, then {grant['tier_after']}")
    buckets = [{"limit": tier["name"].lower(), "route": None, **found["bucket"]}, *found["limits"]]
    names = ("limit", "route", "tokens", "capacity", "reset_after_seconds")
    rows = ([one[name] for name in names] for one in buckets)
    show_all(table(("LIMIT", "ROUTE", "TOKENS", "CAPACITY", "FULL IN S"), rows))
    if found["quotas"]:
        show_all(["", *_table_of(_QUOTA_COLUMNS, found["quotas"])])
    if found["concurrency"]:
        show_all(["", *_table_of(_SLOT_COLUMNS, found["concurrency"])])
    show_all(share_lines([*buckets, *found["concurrency"]]))


def _table_of(columns: Mapping[str, str], rows: Sequence[JsonObject]) -> list[str]:
    return table(list(columns), ([one[name] for name in columns.values()] for one in rows))


def _breakers(client: OperatorClient, options: argparse.Namespace) -> None:
    found = client.get("/circuit-breakers")
    if options.json:
        print_json(found)
        return
    header = ("UPSTREAM", "STATE", "MODE", "CALLS", "FAILURES", "SLOW", "OPENED", "NEXT PROBE IN S", "LAST CAUSE")
    rows = [
        (
            name,
            one["state"],
            one["mode"],
            one["window_calls"],
            one["window_failures"],
            one["window_slow_calls"],
            one["opened_total"],
            one["next_probe_in_seconds"],
            None if one["last_opened"] is None else one["last_opened"]["detail"],
        )
        for name, one in found["circuit_breakers"].items()
    ]
    show_all(table(header, rows))
    show()
    targets = [
        (name, url, _health(one["healthy"]), _outliers(one["passive"]), _last_check(one["active"]))
        for name, found_targets in found["targets"].items()
        for url, one in found_targets.items()
    ]
    show_all(table(("UPSTREAM", "TARGET", "HEALTH", "OUTLIER DETECTION", "LAST CHECK"), targets))


def _health(healthy: bool | None) -> str:  # noqa: FBT001 - a value that is shown
    return "unchecked" if healthy is None else ("healthy" if healthy else "unhealthy")


def _outliers(passive: JsonObject | None) -> str | None:
    return None if passive is None else passive["circuit_breaker"]


def _last_check(active: JsonObject | None) -> str | None:
    return None if active is None else active["result"]


def _limits(client: OperatorClient, options: argparse.Namespace) -> None:
    if options.limit is None and options.tier:
        raise CommandFailed(f"limits: --tier belongs to a limit: give its name and a key, too, got {options.tier!r}")
    if options.limit is not None:
        path = f"/limits/{segment(options.limit, 'limit')}/buckets"
        found = client.get(path, key=options.values, tier=options.tier)
    else:
        found = client.get("/limits")
    if options.json:
        print_json(found)
        return
    show_all(limit_lines(found) if options.limit is None else [bucket_line(found)])


# Tail


def _tail(client: OperatorClient, options: argparse.Namespace) -> None:
    """Show the last requests, then those that end."""
    filters = {name: getattr(options, name) for name in ("client", "status", "reason", "route")}
    if not 0 <= options.lines <= PAGE:
        raise CommandFailed(f"--lines: must be from 0 to {PAGE}, got {options.lines}")
    page = client.get("/history", limit=max(1, options.lines), **filters)
    _show_page(page["requests"][-options.lines :] if options.lines else [], is_json=options.json)
    not_kept = page.get("not_kept", 0)  # which gateways of an earlier version do not state
    while not options.no_follow:
        time.sleep(max(options.interval, 0.1))
        page = _next_page(client, page, filters)
        while len(page["requests"]) == PAGE:
            _show_page(page["requests"], is_json=options.json)
            page = _next_page(client, page, filters)
        _show_page(page["requests"], is_json=options.json)
        not_kept = _show_not_kept(not_kept, page.get("not_kept", 0))


def _next_page(client: OperatorClient, page: JsonObject, filters: JsonObject) -> JsonObject:
    """Return the next page; while no gateway responds, as in a restart, an empty one."""
    try:
        found: JsonObject = client.get("/history", after=page["next"], limit=PAGE, **filters)
    except CommandFailed as error:
        if error.code != NOT_REACHED:
            raise
        if not page.get("is_retried"):
            print(f"{client.url}: no response; asking again", file=sys.stderr)
        return {"requests": [], "next": page["next"], "not_kept": page.get("not_kept", 0), "is_retried": True}
    return found


def _show_not_kept(before: int, now: int) -> int:
    """Say how many requests have no line since `before`, which is larger after a restart; return the number `now`.

    The words go to standard error, because the lines may be JSON.
    """
    if now > before:
        print(f"{counted(now - before, 'more request')} (of all clients) not in the history", file=sys.stderr)
    return now


def _show_page(requests: Sequence[JsonObject], *, is_json: bool) -> None:
    for request in requests:
        if is_json:
            print_json(request, is_line=True)
        else:
            show(line_of(request))


def line_of(request: JsonObject) -> str:
    """Return one request of the history as a line."""
    who = "-" if request["client_id"] is None else f"{request['client_id']} ({request['tier']})"
    parts = [request["time"][11:23], str(request["status"]), request["method"], _short(request["path"])]
    parts += [f"{request['duration_ms']:.1f} ms", who]
    parts.append("-" if request["upstream"] is None else f"-> {request['upstream']}")
    if request["attempts"] > 1:
        parts.append(f"{request['attempts']} attempts")
    if request["reason"] is not None:
        parts.append(request["reason"])
    if request["reason"] is not None or request["status"] >= HTTPStatus.BAD_REQUEST:
        trace = f" trace {request['trace_id']}" if request.get("trace_id") else ""
        parts.append(f"[{request['request_id']}{trace}]")
    return "  ".join(parts)


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."  # noqa: PLR2004 - what fits into a few lines
