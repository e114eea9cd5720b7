"""Current problems: one sentence for each, with a link to the page of the dashboard that shows its cause.

Pure: the sentences follow from a snapshot of all workers and from the last points of the traffic history.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote

from api_gateway.errors import GatewayError, Reason
from api_gateway.metrics import AUDIT
from api_gateway.printable_text import counted
from api_gateway.reporting.issuer_snapshot import IssuerSnapshot
from api_gateway.reporting.snapshot import Status, TargetSnapshot, UpstreamSnapshot, WorkerSnapshot
from api_gateway.reporting.traffic_history import Point
from api_gateway.reporting.unwritten_state import KINDS
from api_gateway.resilience.breaker_policy import Mode, State

MAX_PROBLEMS = 100  # shown; the last entry then counts the others
RECENT_POINTS = 6  # a minute
MIN_REQUESTS = 20  # of the last minute, below which shares mean nothing
HIGH_REFUSALS = 0.2
HIGH_ERRORS = 0.05
HIGH_LAG = 0.1  # seconds
_LONGEST = 300  # characters of an error of another program
_SHED, _NO_KEYS = Reason.OVERLOADED.value, Reason.ISSUER_UNAVAILABLE.value


def _kinds(base: type[GatewayError]) -> Iterator[type[GatewayError]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _kinds(kind)


# The reasons of responses 4xx; all others are those of errors 5xx.
REFUSALS = frozenset(kind.reason.value for kind in _kinds(GatewayError) if kind.status < 500)  # noqa: PLR2004 - the class


@dataclass(frozen=True, slots=True)
class Alert:
    """A current problem. `link` is the page of the dashboard that shows its cause, as the fragment of its URL."""

    severity: Literal["fail", "warn"]
    text: str
    link: str


def find_problems(snapshot: WorkerSnapshot, points: Sequence[Point], modes_error: str | None) -> list[Alert]:
    """Return the problems, the gravest first; `modes_error` is why the file of modes cannot be used."""
    found = [*_of_gateway(snapshot, modes_error), *_of_resources(snapshot), *_of_traffic(points)]
    found += [*_of_records(snapshot, points), *_of_issuers(snapshot.issuers)]
    for name, upstream in snapshot.upstreams.items():
        found += _of_upstream(name, upstream)
    found.sort(key=lambda problem: problem.severity != "fail")
    if len(found) > MAX_PROBLEMS:
        rest = len(found) - MAX_PROBLEMS + 1
        found[MAX_PROBLEMS - 1 :] = [Alert("warn", f"{rest} more problems are not listed.", "#/upstreams")]
    return found


def status_of(problems: Sequence[Alert]) -> Status:
    """Return the gravest severity, `pass` if nothing is wrong."""
    words = {problem.severity for problem in problems}
    return "fail" if "fail" in words else "warn" if words else "pass"


def _of_gateway(snapshot: WorkerSnapshot, modes_error: str | None) -> Iterator[Alert]:
    state = snapshot.limiter
    if state.decision_source not in ("memory", "store"):
        cause = f": {_short(state.last_error)}" if state.last_error else ""
        how = {
            "local_share": f"each of {state.gateway_processes} processes applies its share of the limits",
            "allow": "requests are admitted without limits",
            "deny": "requests are refused",
        }.get(state.decision_source, f"decisions come from '{state.decision_source}'")
        yield Alert("fail", f"The store of limits is unavailable; {how}{cause}.", "#/configuration/store")
    if state.warning is not None:
        yield Alert("warn", f"Limits may be inexact: {_short(state.warning)}.", "#/configuration/store")
    if snapshot.client_store_error is not None:
        error = _short(snapshot.client_store_error)
        yield Alert("warn", f"The client store is unavailable, so tiers cannot be changed: {error}.", "#/clients")
    if snapshot.configuration.problems:
        first, *others = snapshot.configuration.problems
        more = f" (and {len(others)} more)" if others else ""
        yield Alert(
            "warn",
            f"The last reload failed, so the former configuration is in force: {_short(first)}{more}.",
            "#/configuration",
        )
    for problem in snapshot.tls.problems:
        yield Alert("warn", f"{_short(problem)}.", "#/configuration/server")
    if modes_error is not None:
        yield Alert("warn", f"The file of breaker modes cannot be used: {_short(modes_error)}.", "#/upstreams")


def _of_resources(snapshot: WorkerSnapshot) -> Iterator[Alert]:
    if snapshot.lag >= HIGH_LAG:
        yield Alert(
            "warn", f"The event loop is {snapshot.lag * 1000:.0f} ms late; each request waits that long.", "#/"
        )
    for resource in snapshot.resources:
        if resource.status == "warn":
            where = f" of upstream '{resource.upstream}'" if resource.upstream else ""
            used = f"{resource.in_use} of {resource.limit}"
            if resource.fullest > resource.in_use / resource.limit:
                used = f"{resource.used_ratio * 100:.0f} % in one worker, {used} in all"
            link = _upstream_link(resource.upstream) if resource.upstream else "#/"
            yield Alert("warn", f"Nearly all {resource.resource}{where} are in use: {used}.", link)


def _of_issuers(issuers: Mapping[str, IssuerSnapshot]) -> Iterator[Alert]:
    for name, issuer in issuers.items():
        if issuer.error is not None:
            severity: Literal["fail", "warn"] = "warn" if issuer.keys else "fail"
            then = "the last ones are still used" if issuer.keys else "there are none, so its tokens are refused"
            text = f"The keys of issuer '{name}' cannot be fetched; {then}: {_short(issuer.error)}."
            yield Alert(severity, text, "#/configuration/identity")


def _of_traffic(points: Sequence[Point]) -> Iterator[Alert]:
    recent = points[-RECENT_POINTS:]
    requests, refused, errors = (sum(point[name] for point in recent) for name in ("requests", "refused", "errors"))
    kinds: Counter[str] = Counter()
    for point in recent:
        kinds.update(point["kinds"])
    if kinds[_SHED]:
        yield Alert("fail", f"{_refused(kinds[_SHED])} in the last minute because of load.", "#/upstreams")
    if kinds[_NO_KEYS]:
        text = f"{_refused(kinds[_NO_KEYS])} in the last minute because the keys of an issuer were missing."
        yield Alert("fail", text, "#/configuration/identity")
    if requests < MIN_REQUESTS:
        return
    if errors / requests >= HIGH_ERRORS:
        kind = _most(kinds, gateway_refusals=False)
        yield Alert(
            "fail", f"{_percent(errors, requests)} of the last minute's requests had an error 5xx{kind}.", "#/"
        )
    if refused / requests >= HIGH_REFUSALS:
        kind = _most(kinds, gateway_refusals=True)
        yield Alert(
            "warn", f"{_percent(refused, requests)} of the last minute's requests were refused{kind}.", "#/clients"
        )


def _of_records(snapshot: WorkerSnapshot, points: Sequence[Point]) -> Iterator[Alert]:
    """Yield the problems of traces, logs, files of state and the audit log: what is missing in them."""
    spans, lines = (
        sum(point["lost"].get(name, 0) for point in points[-RECENT_POINTS:]) for name in ("spans", "lines")
    )
    if spans:
        text = f"{spans} spans of traces were lost in the last minute; the gateway's log has the cause."
        yield Alert("warn", text, "#/configuration/tracing")
    if lines:
        text = f"{lines} lines of the access log or the log were not written in the last minute."
        yield Alert("warn", text, "#/configuration/log")
    for name, error in snapshot.unwritten.items():
        if error is not None:
            yield Alert("warn", f"{KINDS[name].consequence}: {_short(error)}.", KINDS[name].link)
    changes = snapshot.recorder.dropped_lines[AUDIT]
    if changes:
        text = f"{changes} changes by operators since the start are in the log alone: the audit log was not writable."
        yield Alert("warn", text, "#/configuration")


def _refused(requests: int) -> str:
    return f"{counted(requests, 'request')} {'was' if requests == 1 else 'were'} refused"


def _most(kinds: Mapping[str, int], *, gateway_refusals: bool) -> str:
    """Return the most frequent kind, for the end of a sentence."""
    chosen = {kind: count for kind, count in kinds.items() if (kind in REFUSALS) is gateway_refusals}
    return f", mostly {max(chosen, key=chosen.__getitem__)}" if chosen else ""


def _of_upstream(name: str, upstream: UpstreamSnapshot) -> Iterator[Alert]:
    link, breaker = _upstream_link(name), upstream.breaker
    if breaker.mode is Mode.FORCED_OPEN:
        yield Alert("fail", f"An operator has forced the breaker of '{name}' open; it rejects all requests.", link)
    elif breaker.mode is Mode.FORCED_CLOSED:
        yield Alert("warn", f"An operator has forced the breaker of '{name}' closed; it rejects no request.", link)
    elif breaker.mode is Mode.OBSERVE:
        yield Alert("warn", f"The breaker of '{name}' only observes; it rejects no request.", link)
    if breaker.mode in (Mode.AUTO, Mode.OBSERVE) and breaker.state is State.OPEN:
        cause = f": {_short(breaker.opened_cause)}" if breaker.opened_cause else ""
        yield Alert("fail", f"The breaker of '{name}' is open{cause}.", link)
    elif breaker.mode is Mode.AUTO and breaker.state is State.HALF_OPEN:
        yield Alert("warn", f"The breaker of '{name}' is half-open: it admits only probes.", link)
    healthy = [target for target in upstream.targets if target.is_healthy]
    if not healthy and upstream.targets:
        yield Alert("fail", f"No target of '{name}' passes its health checks.", link)
    for target in upstream.targets:
        yield from _of_target(name, target, link, is_alone=not healthy)
    for host in upstream.names:
        if host.error is not None:
            yield Alert("warn", f"The name {host.host} of '{name}' was not resolved: {_short(host.error)}.", link)


def _of_target(name: str, target: TargetSnapshot, link: str, *, is_alone: bool) -> Iterator[Alert]:
    severity: Literal["fail", "warn"] = "fail" if is_alone else "warn"
    if not target.is_healthy:
        cause = f": {_short(target.checks.last_error)}" if target.checks.last_error else ""
        yield Alert(severity, f"Target {target.key} of '{name}' fails its health checks{cause}.", link)
    if target.passive is not None and target.passive.is_ejected:
        cause = f": {_short(target.passive.opened_cause)}" if target.passive.opened_cause else ""
        yield Alert("warn", f"Target {target.key} of '{name}' is ejected{cause}.", link)


def _upstream_link(name: str) -> str:
    return f"#/upstreams/{quote(name, safe='')}"


def _percent(part: int, whole: int) -> str:
    return f"{part / whole * 100:.0f} %"


def _short(text: str | None) -> str:
    given = (text or "").rstrip(".")
    return given if len(given) <= _LONGEST else f"{given[:_LONGEST]}…"
