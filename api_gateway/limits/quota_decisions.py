"""Decisions on buckets and counters of calendar quotas together. Pure.

A charge whose quota is a `PeriodQuota` is one of a counter. In the `debts_ns` of a decision, its value is the start of
the period that was charged, in seconds since the epoch.
"""

from collections.abc import Sequence
from dataclasses import replace

from api_gateway.limits.quota_state import MICROSECONDS, PeriodQuota, QuotaState, reached
from api_gateway.models import Charge, Decision, Notice, processes_of
from api_gateway.rate_limiter import NEVER_NS, debts_of


def of_buckets(charges: Sequence[Charge]) -> list[Charge]:
    """Return the charges whose quota is a bucket, in their order."""
    return [charge for charge in charges if not isinstance(charge.quota, PeriodQuota)]


def of_counters(charges: Sequence[Charge]) -> list[tuple[Charge, PeriodQuota]]:
    """Return the charges of counters, each with its quota."""
    return [(charge, charge.quota) for charge in charges if isinstance(charge.quota, PeriodQuota)]


def without_counters(decision: Decision, changes: Sequence[Charge]) -> Decision:
    """Return the decision as its buckets need it for a settlement; `changes` are in the order of the charges."""
    values = zip(changes, debts_of(decision), strict=True)
    kept = [debt_ns for change, debt_ns in values if not isinstance(change.quota, PeriodQuota)]
    return replace(decision, debts_ns=tuple(kept))


def counter_decision(charge: Charge, standing: QuotaState, now_us: int, now_ns: int) -> Decision:
    """Return the decision of a counter alone."""
    wait_us = standing.wait_us(charge.increment_ns, now_us)
    quota = charge.quota
    decision = Decision(
        charge.key,
        quota,
        wait_us == 0,
        max(standing.left, 0) // quota.emission_ns,
        wait_us * 1000 if wait_us > 0 else wait_us,
        (standing.end * MICROSECONDS - now_us) * 1000,
        now_ns,
    )
    decision.left = (standing.left,)
    return decision


def counter_allowance(charge: Charge, standing: QuotaState, now_us: int, now_ns: int) -> Decision:
    """Return the decision of a counter alone on a request that it has allowed; `standing` is that after the charge."""
    decision = counter_decision(charge, standing, now_us, now_ns)
    decision.allowed, decision.wait_ns, decision.debts_ns = True, 0, (standing.count.start,)
    return decision


def refusal_of(decisions: Sequence[Decision], charges: Sequence[Charge] = ()) -> Decision:
    """Return the longest refusal of several decisions, with the quotas of all that refuse.

    With `charges`, those of the decisions, it states the time until each of the buckets is full.
    """
    refusals = [decision for decision in decisions if not decision.allowed]
    longest = max(refusals, key=lambda one: (one.wait_ns == NEVER_NS, one.wait_ns))
    longest.violated = tuple([decision.quota for decision in refusals])
    longest.left = tuple([left for decision in decisions for left in getattr(decision, "left", ())])
    if charges:
        longest.debts_ns = tuple(
            [
                max(one.reset_ns - (charge.increment_ns if one.allowed else 0), 0)
                for one, charge in zip(decisions, charges, strict=True)
                if not isinstance(charge.quota, PeriodQuota)
            ]
        )
    return longest


def joint_allowance(
    charges: Sequence[Charge],
    decision: Decision,
    standings: Sequence[QuotaState],
    now_us: int,
    charged: Sequence[int] = (),
) -> Decision:
    """Return the decision of the tightest bucket or counter on a request that all of them have allowed.

    `decision` is that of the buckets, and `standings` those of the counters, both after the charge. `charged` has, in
    the order of `charges`, the starts of the charged periods; by default the current ones.
    """
    tightest, debts, notices = decision, list[int](), list[Notice]()
    left = decision.quota.burst_ns - decision.reset_ns
    cost = next((charge.increment_ns for charge in charges if charge.key == decision.key), 0)
    buckets, counters = iter(debts_of(decision)), iter(standings)
    for index, charge in enumerate(charges):
        quota = charge.quota
        if not isinstance(quota, PeriodQuota):
            debts.append(next(buckets))
            continue
        standing = next(counters)
        debts.append(charged[index] if charged else standing.count.start)
        if quota.warn_at and (shares := reached(quota, standing.count)):
            seconds = standing.end - now_us // MICROSECONDS
            remaining = max(standing.left, 0) // quota.emission_ns
            notices.append(Notice(quota.policy, quota.warn_at[shares - 1], remaining, seconds))
        if standing.left * cost < left * charge.increment_ns:
            left, cost = standing.left, charge.increment_ns
            tightest = counter_decision(charge, standing, now_us, decision.at_ns)
    if tightest is not decision:
        tightest.allowed, tightest.wait_ns, tightest.source = True, 0, decision.source
        if decision.source == "local_share":
            tightest.processes = processes_of(decision)
    tightest.debts_ns, tightest.notices = tuple(debts), tuple(notices)
    tightest.left = tuple([standing.left for standing in standings])
    return tightest
