"""The commands `explain`, `clients`, `breakers`, `limits` and `tail`: views of a running gateway, as text or JSON."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote

from api_gateway.printable_text import table
from api_gateway.process.limits_view import bucket_line, limit_lines
from api_gateway.process.operator_client import (
    NOT_REACHED,
    CommandFailed,
    JsonObject,
    OperatorClient,
    add_access_options,
    client_of,
    run_action,
    seconds_between,
    show,
)
from api_gateway.system.command_line import CommandParser

PAGE = 200  # requests that `tail` asks for at once
CERTIFICATE_NAMES = ("uri", "dns", "email", "common_name", "subject")  # of `DescribedCertificate`


def run_view(arguments: Sequence[str]) -> int:
    """Run one of these commands, whose name is the first argument; return the exit code."""
    options = _parser().parse_args(arguments)
    action: Callable[[OperatorClient, argparse.Namespace], None] = options.action
    return run_action(lambda: action(client_of(options), options))


def _parser() -> CommandParser:
    parser = CommandParser(prog="api-gateway", description="Views of a running gateway.")
    commands = parser.add_subparsers(metavar="command", required=True)
    explain = commands.add_parser("explain", help="what was decided about a request, or would be")
    explain.add_argument("request_id", nargs="?", help="as in X-Request-ID and in the body of a refusal")
    explain.add_argument("--path", help="instead of an id: explain how a request for this path would be decided")
    explain.add_argument("--client", metavar="ID", help="of that request")
    explain.add_argument("--method", default="GET", help="of that request (default: GET)")
    explain.add_argument(
        "--certificate",
        metavar="KIND=NAME",
        action="append",
        default=[],
        help=f"name in the certificate of its connection; kinds: {', '.join(CERTIFICATE_NAMES)}; repeat for others",
    )
    explain.set_defaults(action=_explain)
    clients = commands.add_parser("clients", help="the most limited clients, or one client")
    clients.add_argument("client", nargs="?", help="client id")
    clients.add_argument(
        "--sort", choices=("limited", "requests", "bare"), default="limited", help="(default: limited)"
    )
    clients.add_argument("--limit", type=int, default=20, help="most clients (default: 20)")
    clients.set_defaults(action=_clients)
    breakers = commands.add_parser("breakers", help="the circuit breakers and targets of the upstreams")
    breakers.set_defaults(action=_breakers)
    limits = commands.add_parser("limits", help="all limits, with refusals, or what one key of a limit has left")
    limits.add_argument("limit", nargs="?", metavar="NAME", help="show what a key has left of this limit")
    limits.add_argument(
        "values", nargs="*", metavar="VALUE", help="the value of each part of the limit's key, in their order"
    )
    limits.add_argument("--tier", help="of a limit with allowances by tier that does not count by client")
    limits.set_defaults(action=_limits)
    tail = commands.add_parser("tail", help="follow the requests as they end")
    tail.add_argument("--client", metavar="ID", help="only of this client")
    tail.add_argument("--status", help="only with this status, or a class such as 4xx")
    tail.add_argument("--reason", help="only with this reason")
    tail.add_argument("--route", help="only of this route")
    tail.add_argument(
        "--lines", type=int, default=10, metavar="N", help="show the last N requests first (default: 10)"
    )
    tail.add_argument("--no-follow", action="store_true", help="end after these")
    tail.add_argument(
        "--interval", type=seconds_between, default=1.0, metavar="SECONDS", help="between questions (default: 1)"
    )
    tail.set_defaults(action=_tail)
    for command in (explain, clients, breakers, limits, tail):
        words = "a line of JSON for each request" if command is tail else "the response of the gateway as JSON"
        command.add_argument("--json", action="store_true", help=f"print {words}")
        add_access_options(command)
    return parser


def _print_json(document: Any, *, is_line: bool = False) -> None:
    """Print JSON in ASCII, so that no text in it can affect a terminal."""
    print(json.dumps(document, indent=None if is_line else 2), flush=True)


def _show_all(lines: Sequence[str], indent: str = "") -> None:
    for line in lines:
        show(f"{indent}{line}")


# Explain


def _explain(client: OperatorClient, options: argparse.Namespace) -> None:
    if (options.request_id is None) == (options.path is None):
        raise CommandFailed("explain: give either the id of a request or --path")
    if options.path is not None:
        body: JsonObject = {"path": options.path, "method": options.method, "client_id": options.client}
        if options.certificate:
            body["certificate"] = _certificate_names(options.certificate)
        found = client.call("POST", "/explain", body)
        if options.json:
            _print_json(found)
        else:
            _show_prediction(found)
        return
    found = client.get(f"/explain/{quote(options.request_id, safe='')}")
    if options.json:
        _print_json(found)
        return
    for number, request in enumerate(found["requests"]):
        if number:
            show()
        _show_request(request)


def _certificate_names(given: Sequence[str]) -> dict[str, str]:
    """Return names of a certificate by kind. Raises CommandFailed."""
    names: dict[str, str] = {}
    for one in given:
        kind, is_pair, name = one.partition("=")
        if not is_pair or kind not in CERTIFICATE_NAMES or kind in names:
            raise CommandFailed(
                f"--certificate: must be KIND=NAME with one of {', '.join(CERTIFICATE_NAMES)}, each once, got '{one}'"
            )
        names[kind] = name
    return names


def _show_prediction(found: JsonObject) -> None:
    result, client = found["result"], found["client"]
    show(f"{result['outcome']}: {result['detail']}")
    show(f"  client {client['id']} ({client['tier']['name']}): {client['detail']}")
    if found["route"] is not None:
        route = found["route"]
        show(f"  route {route['name']} to {route['upstream']}, cost {route['cost']:g} ({route['cost_source']})")
    rows = [
        (
            one["policy"],
            one["tokens"],
            one["cost"],
            one["capacity"],
            _verdict(one["allowed"], one["retry_after_seconds"]),
        )
        for one in found["buckets"]
    ]
    _show_all(table(("LIMIT", "TOKENS", "COST", "CAPACITY", "RESULT"), rows), "  ")
    _show_shares(found["buckets"])


def _show_shares(limits: Sequence[JsonObject]) -> None:
    """Say that the figures are those of shares, if they are."""
    processes = next((one["processes"] for one in limits if one.get("processes") is not None), None)
    if processes is not None:
        show(f"  the store is unavailable: the figures are those of the share of one of {processes} processes")


def _show_request(request: JsonObject) -> None:
    who = "not identified" if request["client_id"] is None else f"{request['client_id']} ({request['tier']})"
    reason = "" if request["reason"] is None else f" {request['reason']}"
    show(f"{request['status']}{reason}  {request['method']} {request['path']}")
    show(f"  {request['time']}, {request['duration_ms']:g} ms, client {who}, from {request['client_address']}")
    if request["detail"]:
        show(f"  {request['detail']}")
    decision = request["decision"]
    if decision is not None:
        verdict = _verdict(decision["allowed"], decision["retry_after_seconds"])
        show(f"  {verdict}; decided by the limit {decision['limit']}, from {decision['source']}")
        header = ("LIMIT", "TOKENS BEFORE", "COST", "TOKENS AFTER", "CAPACITY", "RESULT")
        rows = [
            (
                one["limit"],
                one["tokens_before"],
                one["cost"],
                one["tokens_after"],
                one["capacity"],
                _verdict(one["allowed"], one["retry_after_seconds"]),
            )
            for one in request["limits"]
        ]
        _show_all(table(header, rows), "  ")
        _show_shares(request["limits"])
    for limit in request["limits"]:
        if limit["spent_by"] is not None:
            _show_spending(limit["limit"], limit["spent_by"])
    if request["upstream_attempts"]:
        show("  attempts:")
        names = ("AFTER MS", "TOOK MS", "UPSTREAM", "TARGET", "RESULT")
        _show_all(table(names, map(_attempt_row, request["upstream_attempts"])), "    ")
    for one in request["settlements"]:
        show(f"  cost settled from {one['cost_before']:g} to {one['cost_after']:g} after {one['after_ms']:g} ms")


def _attempt_row(one: JsonObject) -> tuple[object, ...]:
    result = f"status {one['status']}" if one["failure"] is None else one["failure"]
    if one["detail"]:
        result = f"{result}: {one['detail']}"
    return one["started_after_ms"], one["duration_ms"], one["upstream"], one["target"], result


def _show_spending(limit: str, spent_by: JsonObject) -> None:
    end = "" if spent_by["complete"] else ", and by earlier ones"
    if missing := spent_by.get("missing_tokens"):
        end = f", and {missing:g} tokens by requests that were not kept"
    show(f"  the tokens of {limit} were spent by {len(spent_by['requests'])} requests{end}:")
    header = ("TIME", "COST", "TOKENS BEFORE", "STATUS", "REQUEST", "ID")
    rows = [
        (
            one["time"],
            one["cost"],
            one["tokens_before"],
            one["status"],
            f"{one['method']} {one['path']}",
            one["request_id"],
        )
        for one in spent_by["requests"]
    ]
    _show_all(table(header, rows), "    ")


def _verdict(allowed: bool, wait: float | None) -> str:  # noqa: FBT001 - a value that is shown
    if allowed:
        return "allowed"
    return "refused" if wait is None else f"refused, {wait:g} s to wait"


# Other views


def _clients(client: OperatorClient, options: argparse.Namespace) -> None:
    if options.client is not None:
        found = client.get(f"/clients/{quote(options.client, safe='')}")
    else:
        found = client.get("/clients", sort=options.sort, limit=options.limit)
    if options.json:
        _print_json(found)
    elif options.client is not None:
        _show_client(found)
    else:
        header = ("CLIENT", "TIER", "SOURCE", "LIMITED", "REQUESTS", "WITHOUT PROOF")
        names = ("client_id", "tier", "tier_source", "limited", "requests", "bare")
        _show_all(table(header, ([one[name] for name in names] for one in found["clients"])))


def _show_client(found: JsonObject) -> None:
    tier, grant = found["tier"], found["grant"]
    show(f"{found['client_id']}: {tier['name']} ({tier['rate']:g}/s, {tier['capacity']}), {found['tier_source']}")
    if grant is not None:
        show(f"granted until {grant['until']}, then {grant['tier_after']}")
    buckets = [{"limit": tier["name"].lower(), "route": None, **found["bucket"]}, *found["limits"]]
    names = ("limit", "route", "tokens", "capacity", "reset_after_seconds")
    rows = ([one[name] for name in names] for one in buckets)
    _show_all(table(("LIMIT", "ROUTE", "TOKENS", "CAPACITY", "FULL IN S"), rows))


def _breakers(client: OperatorClient, options: argparse.Namespace) -> None:
    found = client.get("/circuit-breakers")
    if options.json:
        _print_json(found)
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
    _show_all(table(header, rows))
    show()
    targets = [
        (name, url, _health(one["healthy"]), _outliers(one["passive"]), _last_check(one["active"]))
        for name, found_targets in found["targets"].items()
        for url, one in found_targets.items()
    ]
    _show_all(table(("UPSTREAM", "TARGET", "HEALTH", "OUTLIER DETECTION", "LAST CHECK"), targets))


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
        path = f"/limits/{quote(options.limit, safe='')}/buckets"
        found = client.get(path, key=options.values, tier=options.tier)
    else:
        found = client.get("/limits")
    if options.json:
        _print_json(found)
        return
    _show_all(limit_lines(found) if options.limit is None else [bucket_line(found)])


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

    The words go to standard error, as the lines may be JSON.
    """
    if now > before:
        print(f"{now - before} further requests, of all clients, were not kept", file=sys.stderr)
    return now


def _show_page(requests: Sequence[JsonObject], *, is_json: bool) -> None:
    for request in requests:
        if is_json:
            _print_json(request, is_line=True)
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
        parts.append(f"[{request['request_id']}]")
    return "  ".join(parts)


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."  # noqa: PLR2004 - what fits into a few lines
