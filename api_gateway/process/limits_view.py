"""Limits as lines of text, for the command `limits`: all of them, and what one key has left."""

from api_gateway.printable_text import table
from api_gateway.process.operator_client import JsonObject


def limit_lines(found: JsonObject) -> list[str]:
    """Return a table of all limits."""
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
    """Return what one key of a limit has left."""
    tier = "" if found["tier"] is None else f", tier {found['tier']}"
    bucket, quota, concurrency = found["bucket"], found["quota"], found["concurrency"]
    if bucket is not None:
        left = f"{bucket['tokens']:g} of {bucket['capacity']} tokens, full in {bucket['reset_after_seconds']:g} s"
    elif quota is not None:
        left = f"{quota['remaining']:.15g} tokens left, {quota['used']:.15g} of {quota['quota']} used in this"
        left += f" {quota['period']}, which ends {quota['period_end']}; top-ups: {quota['top_up']:.15g}"
        left += f", carried over: {quota['carried_over']:.15g}"
    else:
        left = f"{concurrency['in_flight']} of {concurrency['concurrent']} requests in flight"
    return f"{found['limit']} {', '.join(found['key'])}{tier}: {left}"


def _allowance(one: JsonObject) -> str:
    words = f"{one['rate']:g}/s, {one['capacity']}" if one["rate"] is not None else ""
    if one.get("quota") is not None:
        words = f"{one['quota']} a {one['period']}"
    if one.get("concurrent") is not None:
        words = f"{one['concurrent']} in flight"
    return words if one.get("tier") is None else f"{one['tier']}: {words}"
