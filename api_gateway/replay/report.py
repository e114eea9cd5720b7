"""The result of a replay as a document for JSON, and as a table of text."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from api_gateway.assembly.stores import Quotas
from api_gateway.config import GatewayConfig
from api_gateway.models import NANOSECONDS, Decision
from api_gateway.printable_text import printable, shortened, table
from api_gateway.replay.log_lines import (
    AT_NS,
    ID_OF_CLIENT,
    LIMIT,
    REMAINING,
    WAIT_NS,
    LogEvent,
)
from api_gateway.replay.log_replay import PartSummary, ReplayResult, span_of
from api_gateway.replay.logged_routes import route_notes
from api_gateway.replay.simulation import SHARED, has_periods, logged_routes_of, unlogged_parts
from api_gateway.replay.tally import EXACT, Agreement

Document = dict[str, Any]

MAX_TEXT_LINE = 2000  # characters

UNKNOWN = (
    (
        "A client that is refused behaves differently: it may wait, repeat the request, or give up. The replay sends"
        " the same requests at the same times."
    ),
    "A request that was refused has no settlement in the log: its cost under the candidate is that of its route.",
    (
        "Identity, and tiers that were granted, registered or stated by a token, are those of the log. Changes of"
        " tiers are applied at the first request with the new tier; refilled buckets and reloads of the configuration"
        " are not in the log."
    ),
    (
        "Requests that did not get to the limits, such as those without a route or with an invalid credential, are not"
        " replayed. Load shedding, breakers and concurrency limits are not evaluated."
    ),
)
_FULL = "All buckets are full at the first decision of the log, or of a process; --from begins with others."
_FROM = (
    "Requests that were decided before the snapshot and settled after it keep the cost that they had; buckets of"
    " processes that the snapshot does not have are full at first."
)


def document_of(
    replayed: ReplayResult, candidate: tuple[str, GatewayConfig], current: tuple[str, GatewayConfig] | None
) -> Document:
    """Return everything that the replay has found. Both configurations come with the name of their file."""
    tally = replayed.tally
    clients = sorted(
        (client.figures(client_id, tier) for (client_id, tier, _), client in tally.clients.items()),
        key=lambda one: (-one["newly_limited"], -one["limited"], one["client"], one["tier"]),
    )
    return {
        "log": _log(replayed.parts),
        "candidate": candidate[0],
        "current": None if current is None else current[0],
        "compared_with": "log" if current is None else "current",
        "totals": {
            "decisions": tally.decisions,
            "before_snapshot": tally.before_snapshot,
            "limited_in_log": tally.limited_in_log,
            "limited_by_current": None if current is None else tally.limited_by_current,
            "limited": tally.limited,
            "newly_limited": tally.newly_limited_by.total(),
            "newly_allowed": sum(client["newly_allowed"] for client in clients),
            "not_evaluable": sum(client["not_evaluable"] for client in clients),
            "refused_otherwise": tally.refused_otherwise,
            "credential_checks_refused": tally.checks_refused,
            "clients": len(clients),
            "clients_newly_limited": sum(1 for client in clients if client["newly_limited"]),
        },
        "newly_limited_by": dict(tally.newly_limited_by.most_common()),
        "tiers": _tiers(clients),
        "clients": [_client(one) for one in clients if one["limited"] or one["limited_before"]],
        "timeline": {
            "slot_seconds": tally.slot_seconds,
            **dict(zip(("decisions", "log", "current", "candidate"), tally.timeline, strict=True)),
        },
        "agreement": {
            "candidate": _agreement(tally.agreement),
            "current": None if current is None else _agreement(tally.current_agreement),
        },
        "not_evaluable": list(_not_evaluable(replayed, candidate[1], has_current=current is not None)),
        "cannot_know": [*UNKNOWN, _FULL if replayed.snapshot is None else _FROM],
        "processes": replayed.processes,
        "seconds": round(replayed.seconds, 3),
    }


def _log(parts: Sequence[PartSummary]) -> Document:
    begin_ns, end_ns = span_of(parts)
    sources: Counter[str] = Counter()
    spans: dict[str, tuple[int, int, int]] = {}
    messages: list[str] = []
    line = 0
    for index, part in enumerate(parts):
        if not index or part.part.path != parts[index - 1].part.path:
            line = 0
        messages += [f"{part.part.path}, line {line + number}: {cause}" for number, cause in part.shown]
        line += part.lines
        if part.broken is not None:
            messages.append(f"{part.part.path}: cannot be read after line {line}: {part.broken}")
        sources.update(part.sources)
        for process, (least, greatest, count) in part.spans.items():
            held = spans.get(process, (least, greatest, 0))
            spans[process] = min(held[0], least), max(held[1], greatest), held[2] + count
    repeated = sum(max(count - (greatest - least + 1), 0) for least, greatest, count in spans.values())
    if repeated:
        messages.append(f"{repeated} or more decisions occur twice: the logs overlap, and the result is wrong")
    return {
        "files": list(dict.fromkeys(str(part.part.path) for part in parts)),
        "lines": sum(part.lines for part in parts),
        "foreign_lines": sum(part.foreign for part in parts),
        "incomplete_lines": sum(part.incomplete for part in parts),
        "not_decided": sum(part.not_decided for part in parts),
        "missing_decisions": sum(max(greatest - least + 1 - count, 0) for least, greatest, count in spans.values()),
        "processes": len(spans),
        "sources": dict(sources),
        "begin": time_of(begin_ns),
        "end": time_of(end_ns),
        "seconds": (end_ns - begin_ns) / NANOSECONDS,
        "messages": messages,
        "unread_files": [str(part.part.path) for part in parts if part.broken is not None],
    }


def _tiers(clients: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    tiers: dict[str, dict[str, int]] = {}
    for client in clients:
        tier = tiers.setdefault(client["tier"], dict.fromkeys((*_SUMS, *_COUNTS), 0))
        for name in _SUMS:
            tier[name] += client[name]
        tier["clients"] += 1
        tier["clients_newly_limited"] += client["newly_limited"] > 0
    return dict(sorted(tiers.items()))


_SUMS = ("requests", "limited_before", "limited", "newly_limited", "newly_allowed")
_COUNTS = ("clients", "clients_newly_limited")


def _client(figures: Mapping[str, Any]) -> Document:
    shown = {name: value for name, value in figures.items() if name not in ("first_ns", "last_ns")}
    is_new = figures["newly_limited"] > 0
    return shown | {
        "first_newly_limited": time_of(figures["first_ns"]) if is_new else None,
        "last_newly_limited": time_of(figures["last_ns"]) if is_new else None,
    }


def _agreement(agreement: Agreement) -> Document:
    return {
        "compared": agreement.compared,
        "same_decision": agreement.same_decision,
        "same": agreement.same,
        "first_difference": None if agreement.first_difference is None else _difference(*agreement.first_difference),
    }


def _difference(event: LogEvent, outcome: Decision | None) -> Document:
    return {
        "time": time_of(event[AT_NS]),
        "client": event[ID_OF_CLIENT],
        "in_log": {"limit": event[LIMIT], "wait_ns": event[WAIT_NS], "remaining": event[REMAINING]},
        "replayed": "refused by another rule"
        if outcome is None
        else {"limit": outcome.quota.name, "wait_ns": outcome.wait_ns, "remaining": outcome.remaining},
    }


def _not_evaluable(replayed: ReplayResult, candidate: GatewayConfig, *, has_current: bool) -> Iterator[str]:
    """Yield the settings of the candidate for which the log does not suffice."""
    yield from route_notes(logged_routes_of(candidate), replayed.tally.doubts, has_writer=has_current)
    quotas = Quotas.of(candidate)
    for limit in quotas.concurrency:
        yield (
            f"limit {limit.name}: requests in flight, which depend on how long the upstream takes; requests that it"
            " refused did not get to the other limits"
        )
    yield from _limits_not_evaluable(replayed, quotas)
    for tier in sorted(replayed.unknown_tiers):
        yield f"tier {tier}: clients have it in the log, and the candidate does not; they get their configured tier"
    sources: Counter[str] = Counter()
    for part in replayed.parts:
        sources.update({source: count for source, count in part.sources.items() if source not in EXACT})
    for source, count in sorted(sources.items()):
        yield (
            f"{count} decisions by {source}: they were made without the store's bucket; the replay decides as if the"
            " store had been available"
        )


def _limits_not_evaluable(replayed: ReplayResult, quotas: Quotas) -> Iterator[str]:
    if replayed.snapshot is not None:
        known = {process for part in replayed.parts for process in part.spans} | {SHARED}
        for process in sorted(replayed.snapshot.buckets.keys() - known):
            yield f"buckets of process {process} in the snapshot: the log has no decision of it"
    for limit in quotas.limits:
        parts = unlogged_parts(limit)
        if has_periods(limit) and not parts and replayed.snapshot is None:
            yield (
                f"limit {limit.name}: what was used of its calendar period before the log is not known, and counts as"
                " unused; changes by operators are not in the log"
            )
        if parts:
            refused = sum(replayed.tally.refused_unlogged[quota.name] for quota in limit.all_quotas)
            yield (
                f"limit {limit.name}: its key has {', '.join(parts)}, which is not logged; it is not evaluated"
                + (f", and neither are {refused} requests that it refused in the log" if refused else "")
            )


def time_of(at_ns: int) -> str | None:
    """Return a time since the epoch in ISO 8601; None for 0."""
    if not at_ns:
        return None
    return datetime.fromtimestamp(at_ns / NANOSECONDS, UTC).isoformat(timespec="milliseconds")


# Text


def text_of(document: Document, shown: int) -> str:
    """Return the document as text for a terminal, with at most `shown` clients."""
    log, totals = document["log"], document["totals"]
    lines = [
        (
            f"{', '.join(log['files'])}: {log['lines']} lines, {totals['decisions']} decisions"
            + (f" in {log['seconds']:.1f} s from {log['begin']}" if log["begin"] else "")
        ),
        (
            f"  {log['not_decided']} requests did not get to the limits; {log['foreign_lines']} foreign lines,"
            f" {log['incomplete_lines']} incomplete, {log['missing_decisions']} decisions missing by number"
        ),
        *([f"  {before} decisions before the snapshot"] if (before := totals["before_snapshot"]) else []),
        *(f"  {message}" for message in log["messages"]),
        "",
        *table(
            ("", "log", "current", "candidate"),
            [
                ("decisions", *[totals["decisions"]] * 3),
                ("limited", totals["limited_in_log"], totals["limited_by_current"], totals["limited"]),
            ],
            aligns_numbers=True,
        ),
        "",
        (
            f"Compared with {'the log' if document['current'] is None else document['current']}: newly limited"
            f" {totals['newly_limited']}, newly allowed {totals['newly_allowed']}, not evaluable"
            f" {totals['not_evaluable']}; clients newly limited"
            f" {totals['clients_newly_limited']} of {totals['clients']}"
        ),
    ]
    for limit, count in document["newly_limited_by"].items():
        lines.append(f"  by limit {limit}: {count}")
    lines += [
        "",
        *table(
            ("tier", *_SUMS, *_COUNTS),
            [(name, *tier.values()) for name, tier in document["tiers"].items()],
            aligns_numbers=True,
        ),
    ]
    lines += _client_lines(document["clients"], shown)
    lines += ["", *_agreement_lines(document["agreement"])]
    for title, notes in (("Not evaluable", document["not_evaluable"]), ("Not known", document["cannot_know"])):
        lines += ["", f"{title}:", *(f"- {note}" for note in notes)] if notes else []
    rate = log["lines"] / document["seconds"] if document["seconds"] else 0
    processes = "one process" if document["processes"] == 1 else f"{document['processes']} processes"
    how = f"{document['seconds']:.1f} s, {rate:,.0f} lines a second; decided in {processes}"
    lines += ["", how]
    return "\n".join([shortened(printable(line), MAX_TEXT_LINE) for line in lines]) + "\n"


def _client_lines(found: Sequence[Mapping[str, Any]], shown: int) -> list[str]:
    """Return a table of the first clients for which the candidate decides otherwise; nothing if there are none."""
    clients = [one for one in found if one["newly_limited"] or one["newly_allowed"]][:shown]
    if not clients:
        return []
    names = ("client", "tier", "requests", "limited_before", "limited", "newly_limited", "newly_allowed")
    rows = [
        (
            *(client[name] for name in names),
            f"{client['longest_wait_seconds']:.3f}",
            f"{client['limited_seconds']:.1f}",
            " ".join(client["limits"]),
            client["first_newly_limited"],
            client["last_newly_limited"],
        )
        for client in clients
    ]
    header = (*names, "longest wait", "limited s", "limits", "first", "last")
    return ["", *table(header, rows, aligns_numbers=True)]


def _agreement_lines(agreements: Mapping[str, Any]) -> Iterator[str]:
    for name, agreement in agreements.items():
        if agreement is not None:
            yield (
                f"The {name} configuration decides {agreement['same_decision']} of {agreement['compared']} requests as"
                f" in the log, {agreement['same']} with the same limit, wait and remainder"
            )
