"""The command `explain`: what was decided about a request of the history, or would be about a described one."""

import argparse
from collections.abc import Sequence

from api_gateway.printable_text import counted, table
from api_gateway.process.limits_view import share_lines
from api_gateway.process.operator_client import (
    CommandFailed,
    JsonObject,
    OperatorClient,
    print_json,
    segment,
    show,
    show_all,
)

CERTIFICATE_NAMES = ("uri", "dns", "email", "common_name", "subject")  # of `DescribedCertificate`


def add_explain_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command; those of a described request have the names of its members in the API."""
    parser.add_argument("request_id", nargs="?", help="id of a past request, from X-Request-ID or a problem body")
    parser.add_argument("--path", help="instead of an id: explain how a request for this path would be decided now")
    parser.add_argument("--client", metavar="ID", help="client id of the described request")
    parser.add_argument("--method", default="GET", help="method of the described request (default: GET)")
    parser.add_argument("--host", help="Host of the described request")
    for option, form, words in (
        ("--header", "'NAME: VALUE'", "header field of the described request; may be repeated"),
        ("--claim", "PATH=VALUE", "claim of its token; may be repeated"),
    ):
        parser.add_argument(option, metavar=form, action="append", default=[], help=words)
    parser.add_argument("--address", help="address of the peer (default: 127.0.0.1)")
    parser.add_argument("--forwarded", metavar="VALUE", help="field in which a trusted proxy reports the client")
    parser.add_argument("--key-id", metavar="ID", help="id of its API key; the secret is not needed")
    parser.add_argument("--organisation", metavar="NAME", help="organisation in its token")
    parser.add_argument(
        "--certificate",
        metavar="KIND=NAME",
        action="append",
        default=[],
        help=f"name in the certificate of its connection; kinds: {', '.join(CERTIFICATE_NAMES)}; may be repeated",
    )


def run_explanation(client: OperatorClient, options: argparse.Namespace) -> None:
    """Show what was decided about a request with an id, or would be about a described one. Raises CommandFailed."""
    if (options.request_id is None) == (options.path is None):
        raise CommandFailed("explain: give either the id of a request or --path")
    if options.path is not None:
        found = client.call("POST", "/explain", _described(options))
    else:
        found = client.get(f"/explain/{segment(options.request_id, 'request id')}")
    if options.json:
        print_json(found)
    elif options.path is not None:
        _show_prediction(found)
    else:
        for number, request in enumerate(found["requests"]):
            if number:
                show()
            _show_request(request)
        if not found["complete"]:
            show("A worker did not respond in time: requests, or those that had spent the tokens, may be missing.")


def _described(options: argparse.Namespace) -> JsonObject:
    """Return the body that describes the request; what is not given is left to the gateway. Raises CommandFailed."""
    body: JsonObject = {"path": options.path, "method": options.method, "client_id": options.client}
    given = {name: getattr(options, name) for name in ("host", "address", "key_id", "forwarded", "organisation")}
    body |= {name: value for name, value in given.items() if value is not None}
    pairs = {
        "headers": _pairs("--header", "NAME: VALUE", ":", options.header),
        "claims": _pairs("--claim", "PATH=VALUE", "=", options.claim),
        "certificate": _pairs("--certificate", "KIND=NAME", "=", options.certificate, CERTIFICATE_NAMES),
    }
    return body | {name: value for name, value in pairs.items() if value}


def _pairs(option: str, form: str, separator: str, given: Sequence[str], known: Sequence[str] = ()) -> dict[str, str]:
    """Return values by name; names must be among the `known` ones, if there are any. Raises CommandFailed."""
    pairs: dict[str, str] = {}
    for one in given:
        name, is_pair, value = (part.strip() for part in one.partition(separator))
        if not is_pair or not name or name in pairs or (known and name not in known):
            fault = f"'{name}'" if is_pair else f"one without '{separator}'"  # a value may be a secret
            if name in pairs:
                fault = f"'{name}' twice"
            among = f" with one of {', '.join(known)}" if known else ""
            raise CommandFailed(f"{option}: must be '{form}'{among}, each name once, got {fault}")
        pairs[name] = value
    return pairs


def _show_prediction(found: JsonObject) -> None:
    result, client = found["result"], found["client"]
    show(f"{result['decision']}: {result['detail']}")
    show(f"  address {found['address']['address']}: {found['address']['detail']}")
    show(f"  client {client['id']} ({client['tier']['name']}): {client['detail']}")
    if found["route"] is not None:
        route = found["route"]
        show(f"  route {route['name']}: {_matched(route)} -> {route['destination']}")
        show(f"  cost {route['cost']:g} ({route['cost_source']})")
    rows = [_bucket_row(one) for one in found["buckets"]]
    rows += [_slot_row(one) for one in found["concurrency"]]
    if found["candidate"] is not None:
        rows.append(_bucket_row(found["candidate"], "candidate "))
    rows += [_slot_row(one, "candidate ") for one in found["candidate_concurrency"]]
    show_all(table(("LIMIT", "LEFT", "COST", "CAPACITY", "RESULT"), rows), "  ")
    show_all(share_lines([*found["buckets"], *found["concurrency"]]), "  ")
    for one in found["limits_not_applied"]:
        show(f"  the limit {one['name']} does not apply: {one['detail']}")
    for one in found["routes_passed_over"]:
        show(f"  not the route {one['name']}: {one['detail']}")
    for one in found["extensions"]:
        show(f"  extension {one['extension']}, {one['hook']}: {one['result']}")
    if found["upstream"] is not None:
        _show_upstream(found["upstream"])
    if found["fallback"] is not None:
        show(f"  fallback {found['fallback']['name']}: {'used' if found['fallback']['used'] else 'not needed'}")
    if found["event_loop"]["shed_ratio"]:
        show(f"  load shedding refuses {found['event_loop']['shed_ratio']:.1%} of the requests of this tier")
    if found.get("worker") is not None:
        show(f"  decided by worker {found['worker']}: breaker, concurrency and load are its own")


def _matched(route: JsonObject) -> str:
    """Return what a route matches: host, path and conditions."""
    how = [] if route["match"] == "prefix" else [route["match"]]
    conditions = ", ".join([*how, *route["conditions"]])
    return f"{route['host'] or ''}{route['path']}{f' ({conditions})' if conditions else ''}"


def _bucket_row(one: JsonObject, kind: str = "") -> tuple[object, ...]:
    words = _decision_words(one["allowed"], one["retry_after_seconds"])
    return f"{kind}{one['policy']}", one["tokens"], one["cost"], one["capacity"], words


def _slot_row(one: JsonObject, kind: str = "") -> tuple[object, ...]:
    words = f"{_decision_words(one['allowed'], None)}, {one['in_flight']} in flight"
    return f"{kind}{one['policy']}", one["concurrent"] - one["in_flight"], 1, one["concurrent"], words


def _show_upstream(one: JsonObject) -> None:
    limit, states = one["concurrency"], one.get("workers") or {}
    where = f" ({', '.join(f'worker {name}: {state}' for name, state in states.items())})" if states else ""
    probe = "" if one["next_probe_in_seconds"] is None else f", next probe in {one['next_probe_in_seconds']:g} s"
    flying = "" if limit is None else f", {limit['in_flight']} in flight, admitted below {limit['tier_limit']}"
    healthy = f"{one['healthy_targets']} of {one['targets']} targets healthy, {one['unchecked_targets']} unchecked"
    show(f"  upstream {one['name']}: breaker {one['circuit_breaker']}{where}{probe}; {healthy}{flying}")


def _show_request(request: JsonObject) -> None:
    who = "not identified" if request["client_id"] is None else f"{request['client_id']} ({request['tier']})"
    reason = "" if request["reason"] is None else f" {request['reason']}"
    show(f"{request['status']}{reason}  {request['method']} {request['path']}")
    show(f"  {request['time']}, {request['duration_ms']:g} ms, client {who}, from {request['client_address']}")
    trace = f", trace {request['trace_id']}" if request.get("trace_id") else ""
    show(f"  request id {request['request_id']}{trace}")
    if request["detail"]:
        show(f"  {request['detail']}")
    decision = request["decision"]
    if decision is not None:
        words = _decision_words(decision["allowed"], decision["retry_after_seconds"])
        show(f"  {words}; decided by the limit {decision['limit']}, from {decision['source']}")
        header = ("LIMIT", "TOKENS BEFORE", "COST", "TOKENS AFTER", "CAPACITY", "RESULT")
        rows = [
            (
                one["limit"],
                one["tokens_before"],
                one["cost"],
                one["tokens_after"],
                f"{one['concurrent']} in flight" if one.get("concurrent") else one["capacity"],
                _decision_words(one["allowed"], one["retry_after_seconds"]),
            )
            for one in request["limits"]
        ]
        show_all(table(header, rows), "  ")
        show_all(share_lines(request["limits"], "was"), "  ")
        unconfirmed = [one["limit"] for one in request["limits"] if one.get("confirmed") is False]
        if unconfirmed:
            show(f"  not confirmed by the store, which was unavailable: {', '.join(unconfirmed)}")
    for limit in request["limits"]:
        if limit["spent_by"] is not None:
            _show_spending(limit["limit"], limit["spent_by"])
    if request["upstream_attempts"]:
        show("  attempts:")
        names = ("AFTER MS", "TOOK MS", "UPSTREAM", "TARGET", "RESULT")
        show_all(table(names, map(_attempt_row, request["upstream_attempts"])), "    ")
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
    show(f"  the tokens of {limit} were spent by {counted(len(spent_by['requests']), 'request')}{end}:")
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
    show_all(table(header, rows), "    ")


def _decision_words(allowed: bool, wait: float | None) -> str:  # noqa: FBT001 - a value that is shown
    if allowed:
        return "allowed"
    return "refused" if wait is None else f"refused, {wait:g} s to wait"
