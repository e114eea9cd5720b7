"""The lines of an access log as events: decisions, settlements, and charges for the verification of credentials.

An event is a plain tuple, which `pickle` can write and read fast, texts that repeat once for many events. All begin
with the time in nanoseconds, the number, the place and the kind. The place of the line in the logs makes each event
different, so that sorting never compares what follows.
"""

import json
import re
from collections.abc import Mapping
from sys import intern
from typing import Any

LogEvent = tuple[Any, ...]

MAX_WHOLE = 10**19  # above all times and numbers of a log; nanoseconds of the year 2286
_MAX_CAUSE = 200  # characters of the reason why a line is foreign, which may contain a value of it

DECISION, SETTLEMENT, CHECK = 0, 1, 2  # kinds

# Positions in an event of any kind. SOURCE is that of the decision, TIER_SOURCE that of the client's tier.
AT_NS, NUMBER, PLACE, KIND, PROCESS, SOURCE, ID_OF_CLIENT, TIER_SOURCE, ADDRESS = range(9)
# In a decision, these follow. WALL_US is 0 if it is not logged.
TIER, HAS_KEYS, REQUEST_METHOD, PATH, ROUTE, REQUEST_COST, LIMITS = range(9, 16)
LIMIT, WAIT_NS, REMAINING, SETTLEMENT_COUNT, ORGANISATION, WALL_US = range(16, 22)
# In a settlement, the number of its decision and the new cost follow.

_TEXT = r'"([^"\\]*)"'  # with an escape, the general parser is used
_COST = r"\d{1,30}(?:\.\d{1,30})?(?:e[+-]?\d{1,2})?"
_SKIPPED = r'(?:null|"[^"\\]*")'
_HEAD = re.compile(
    rf'\{{"time":"[^"]*","request_id":"[^"\\]*","client_address":{_TEXT},"client_id":{_TEXT},"tier":{_TEXT}'
    rf',"tier_source":"(\w+)"(,"has_keys":true)?(?:,"organisation":{_TEXT})?,"method":{_TEXT},"path":{_TEXT}'
    rf',"status":\d+,"reason":{_SKIPPED},"detail":{_SKIPPED},"source":"\w+","route":(?:null|{_TEXT})'
)
_TAIL = re.compile(
    r',"cost":[^,]*,"remaining":(\d{1,18}),"bytes_received":\d+,"bytes_sent":\d+,"duration_ms":[^,]*'
    r',"upstream_duration_ms":[^,]*,"decision":\{"at_ns":(\d{1,19}),"number":(\d{1,18}),"process":"(\w+)","source":"(\w+)"'
    rf',"limits":\[([^\]\\]+)\],"limit":{_TEXT},"wait_ns":(-1|\d{{1,19}}),"cost":({_COST})'
    r'(?:,"wall_us":(\d{1,16}))?\}\}\s*'
)


class ForeignLine(Exception):
    """A line is not one of an access log that can be replayed; the message says why."""


class NotDecided(Exception):
    """The request of a line did not get to the rate limits.

    `numbered` is process and number of the decision if a concurrency limit has refused it, which charged nothing.
    """

    numbered: tuple[str, int] | None = None


def events_of(line: str, place: int) -> list[LogEvent]:
    """Return the events of a line, which was decoded as Latin-1. Raises ForeignLine and NotDecided."""
    head = _HEAD.match(line)
    if head is not None:
        tail = _TAIL.fullmatch(line, line.find(',"cost":', head.end()))
        if tail is not None:
            address, client, tier, tier_source, keys, organisation, method, path, route = head.groups()
            remaining, at_ns, number, process, source, limits, limit, wait_ns, cost, wall_us = tail.groups()
            return [
                (
                    *(int(at_ns), int(number), place, DECISION, intern(process), intern(source), client),
                    *(intern(tier_source), address, intern(tier), keys is not None, intern(method), path),
                    *(route and intern(route), float(cost), intern(limits), intern(limit)),
                    *(int(wait_ns), int(remaining), 0, organisation, int(wall_us or 0)),
                )
            ]
    return _events_of_any(line, place)


def _events_of_any(line: str, place: int) -> list[LogEvent]:
    try:
        members = json.loads(line.encode("latin-1"))
    except (ValueError, RecursionError):
        raise ForeignLine("is not JSON") from None
    if not isinstance(members, dict) or "request_id" not in members or "client_address" not in members:
        raise ForeignLine("is not a line of the access log")
    if "decision" not in members:
        raise ForeignLine("has no 'decision': it was written by an earlier version of the gateway")
    try:
        return _of_members(members, place)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        cause = f"has no usable decision: {type(error).__name__}: {error}"
        raise ForeignLine(cause if len(cause) <= _MAX_CAUSE else f"{cause[:_MAX_CAUSE]}...") from None


def _of_members(members: Mapping[str, Any], place: int) -> list[LogEvent]:
    decision, check = members["decision"], members.get("credential_check")
    found: list[LogEvent] = []
    address = _text(members["client_address"])
    if check is not None:
        times = _whole(check["at_ns"]), _whole(check["number"])
        found.append((*times, place, CHECK, _text(check["process"]), _text(check["source"]), "", "", address))
    if decision is None:
        if found:
            return found
        raise NotDecided
    process, source = _text(decision["process"]), _text(decision["source"])
    if decision["limits"] == [] and not found:
        other = NotDecided()
        other.numbered = process, _whole(decision["number"])
        raise other
    client, tier_source = _text(members["client_id"]), _text(members["tier_source"])
    settlements = decision.get("settlements", [])
    number, what = _whole(decision["number"]), (process, source, client, tier_source, address)
    route = members["route"]
    found.append(
        (
            *(_whole(decision["at_ns"]), number, place, DECISION, *what),
            *(_text(members["tier"]), members.get("has_keys") is True, _text(members["method"])),
            *(_text(members["path"]), None if route is None else _text(route), _cost(decision["cost"])),
            *(json.dumps(decision["limits"], separators=(",", ":"))[1:-1], _text(decision["limit"])),
            *(_whole(decision["wait_ns"], -1), _whole(decision.get("remaining", members["remaining"]))),
            len(settlements),
            None if members.get("organisation") is None else _text(members["organisation"]),
            _whole(decision.get("wall_us", 0), most=MAX_WHOLE // 1000),
        )
    )
    for one in settlements:
        times = _whole(one["at_ns"]), _whole(one["number"])
        found.append((*times, place, SETTLEMENT, *what, number, _cost(one["cost"])))
    return found


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {value!r}")
    return value


def _whole(value: object, least: int = 0, most: int = MAX_WHOLE) -> int:
    if type(value) is not int or not least <= value < most:
        raise ValueError(f"expected a whole number from {least} to {most:.0e}, got {_shown(value)}")
    return value


def _cost(value: object) -> float:
    if type(value) not in (int, float) or not 0 <= value < MAX_WHOLE:  # type: ignore[operator]  # a number by its type
        raise ValueError(f"expected a cost, got {_shown(value)}")
    return float(value)  # type: ignore[arg-type]  # likewise


def _shown(value: object) -> str:
    return "a number of many digits" if isinstance(value, int) and abs(value) >= MAX_WHOLE else repr(value)
