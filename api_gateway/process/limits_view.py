"""Limits as lines of text: all of them, what one key has left, and whose share the figures are."""

from collections.abc import Sequence

from api_gateway.printable_text import table
from api_gateway.process.operator_client import JsonObject


def limit_lines(found: JsonObject) -> list[str]:
    """Return the lines of a table: a row for each limit with allowances, refusals and requests in flight."""
    rows = [
        (
            one["name"],
            one["kind"],
            ", ".join(one["key"]),
            "; ".join(map(_allowance, one["allowances"])),
            one["buckets"],
            one["in_flight"],
            one["refusals"],
            one["configured_at"],
        )
        for one in found["limits"]
    ]
    header = ("LIMIT", "KIND", "KEY", "ALLOWANCE", "BUCKETS", "IN FLIGHT", "REFUSALS", "CONFIGURED AT")
    return table(header, rows)


def bucket_line(found: JsonObject) -> str:
    """Return a line with the rest of one key of a limit."""
    tier = "" if found["tier"] is None else f", tier {found['tier']}"
    bucket, quota, concurrency = found["bucket"], found["quota"], found["concurrency"]
    if bucket is not None:
        left = (
            f"{bucket['tokens']:.15g} of {bucket['capacity']:.15g} tokens, full in {bucket['reset_after_seconds']:g} s"
        )
    elif quota is not None:
        left = f"{quota['remaining']:.15g} tokens left, {quota['used']:.15g} of {quota['quota']} used in this"
        left += f" {quota['period']}, which ends {quota['period_end']}; top-ups: {quota['top_up']:.15g}"
        left += f", carried over: {quota['carried_over']:.15g}"
    else:
        left = f"{concurrency['in_flight']} of {concurrency['concurrent']} requests in flight"
    shares = share_lines([one for one in (bucket, concurrency) if one is not None])
    return "; ".join([f"{found['limit']} {', '.join(found['key'])}{tier}: {left}", *shares, *doubt_lines(found)])


def doubt_lines(found: JsonObject) -> list[str]:
    """Return the line that says that a client's record is not known; no line if the store has confirmed it."""
    if found.get("confirmed") is not False:
        return []
    return [
        "the client store is unavailable, so it is unknown whether it has a record of this client with another tier"
    ]


def share_lines(limits: Sequence[JsonObject], verb: str = "is") -> list[str]:
    """Return the line that says that the figures of limits are those of shares; no line if none of them is."""
    processes = next((one["processes"] for one in limits if one.get("processes") is not None), None)
    if processes is None:
        return []
    return [f"the store {verb} unavailable: the figures are those of the share of one of {processes} processes"]


def _allowance(one: JsonObject) -> str:
    words = f"{one['rate']:g}/s, {one['capacity']}" if one["rate"] is not None else ""
    if one.get("quota") is not None:
        words = f"{one['quota']} a {one['period']}"
    if one.get("concurrent") is not None:
        words = f"{one['concurrent']} in flight"
    return words if one.get("tier") is None else f"{one['tier']}: {words}"
