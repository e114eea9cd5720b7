"""The kept list of mutations: what is changed, and which tests must fail. Here those of the limiters."""

from tests.mutations.accounting import ACCOUNTING
from tests.mutations.mutant import of

_MEMORY = "tests/test_rate_limiter.py"
_INVARIANTS = "tests/store/test_limiter_invariants.py"
_LUA = "tests/store/test_token_bucket_lua.py"
_SHARES = "tests/store/test_share_debts.py"
_REFUNDS = "tests/store/test_refunds.py"
_NO_ORDER = "test_no_order_of_charges_refunds_and_outages_leaves_more_than_had_the_rest_alone_been_charged"
_HEARD = "test_gateways_refund_what_they_charged_and_hear_of_the_others"
_COUNTERS = "tests/unit/test_period_counters.py"
_QUOTAS = "tests/unit/test_quota_limiter.py"
_QUOTA_SCRIPT = "tests/store/test_quota_script.py"
_QUOTA_FILE = "tests/unit/test_period_store.py"
_PERIODS = "tests/unit/test_periods.py"
_LOST = "tests/store/test_lost_replies.py"
_NO_REPLIES = "test_no_order_of_replies_exceeds_the_bound"
_REFUSED_BY_OTHER = (
    "test_what_the_store_refuses_for_another_limit_stays_within_the_bound_when_its_reply_is_late_or_lost"
)
_LATE = "test_a_late_reply_tells_whether_the_store_is_still_to_be_charged"
_LOST_REPORTS = "test_reports_of_outages_that_are_late_or_lost_stay_within_the_bound"
_LEASES = "tests/store/test_concurrency_leases.py"
_SLOTS = "tests/unit/test_concurrency.py"
_NAMES_ALL = "test_a_refusal_for_lack_of_a_slot_names_the_limits_without_tokens"
_NO_SLOT = "test_what_a_share_admits_is_charged_if_a_late_reply_tells_that_no_slot_was_free"
_STAGE = "tests/unit/test_limit_stage.py"


MUTANTS = (
    *of(
        "rate_limiter.py",
        ("        base = now_ns + burst_ns\n", "        base = now_ns\n", _MEMORY),
        (
            "return base, wait_ns if increment_ns <= burst_ns else NEVER_NS",
            "return base, wait_ns",
            f"{_INVARIANTS}::test_a_cost_above_capacity_is_never_admitted_nor_charged_and_has_no_wait",
        ),
        (
            "return max(base, min(base + change_ns, now_ns + 2 * burst_ns))",
            "return base + change_ns",
            f"{_MEMORY}::test_a_later_charge_delays_by_exactly_its_time_and_never_beyond_a_second_budget",
        ),
        (
            "return max(base - min(-change_ns, max(charged_ns - now_ns, 0)), now_ns)",
            "return max(base + change_ns, now_ns)",
            f"{_MEMORY}::test_giving_back_never_leaves_more_than_had_it_not_been_charged",
        ),
        (
            "return now_ns - (-debt_ns * new.burst_ns // old.burst_ns)",
            "return now_ns + debt_ns * new.burst_ns // old.burst_ns",
            f"{_MEMORY}::test_rescaling_errs_to_the_stricter_side_by_less_than_a_nanosecond",
        ),
        ("        if debt_ns <= quota.burst_ns:\n", "        if debt_ns < quota.burst_ns:\n", _MEMORY),
        (
            "debt_ns - quota.burst_ns, held_debt_ns, now_ns)",
            "debt_ns - quota.burst_ns - 1, held_debt_ns, now_ns)",
            f"{_INVARIANTS}::test_every_decision_is_that_of_an_exact_token_bucket",
        ),
        ("            if debt_ns > burst_ns:\n", "            if debt_ns > 2 * burst_ns:\n", _MEMORY),
        (
            "if (not refused and charge.increment_ns) or after_ns < tat_ns:",
            "if charge.increment_ns:",
            f"{_MEMORY}::test_what_one_bucket_refuses_is_charged_to_none",
        ),
        (
            "key=lambda index: (taken[index][1] == NEVER_NS, taken[index][1])",
            "key=lambda index: taken[index][1]",
            f"{_MEMORY}::test_the_longest_refusal_binds_and_never_is_the_longest",
        ),
        (
            "further = (charge.quota.burst_ns - debts_ns[index]) / increment_ns",
            "further = charge.quota.burst_ns - debts_ns[index]",
            f"{_MEMORY}::test_the_tightest_of_buckets_with_different_rates_is_that_of_the_fewest_requests",
        ),
        (
            "further = (burst_ns - debt_ns) / increment_ns",
            "further = burst_ns - debt_ns",
            f"{_MEMORY}::test_the_tightest_bucket_has_tokens_for_the_fewest_further_requests",
        ),
        ("            self.previous = self.current\n", "            self.previous = {}\n", _MEMORY),
        (
            "return self._overflow.get(hash(key) % OVERFLOW_SLOTS, 0) if self._overflow else 0",
            "return 0",
            f"{_MEMORY}::test_no_key_gains_by_a_full_table",
        ),
        (
            "return self._refunds.end_of(key, at_ns, at_ns + debt_ns)",
            "return at_ns + debt_ns",
            f"{_MEMORY}::test_giving_back_never_leaves_more_than_had_it_not_been_charged",
        ),
        (
            "if is_earlier and one.made_ns >= at_ns:",
            "if one.made_ns >= at_ns:",
            f"{_REFUNDS}::test_each_refund_is_of_its_own_charge_whatever_the_order",
        ),
        (
            "if is_earlier and one.made_ns >= at_ns:",
            "if is_earlier:",
            f"{_REFUNDS}::test_each_refund_is_of_its_own_charge_whatever_the_order",
        ),
        ("if tat_ns > self._load(key, quota):", "if tat_ns:", _SHARES),
        (
            "            quotas.append(earlier.quota_of(key, quotas[-1]))\n",
            "            quotas.append(quotas[-1])\n",
            "tests/unit/test_convert_buckets.py",
        ),
    ),
    *of(
        "limits/quota_state.py",
        ("        return end * MICROSECONDS - now_us\n", "        return end * MICROSECONDS - now_us - 1\n", _QUOTAS),
        (
            "if latest.start == end and cost > quota.burst_ns + latest.carried - latest.used:",
            "if False:",
            f"{_COUNTERS}::test_the_wait_skips_a_later_period_that_is_used_up_already",
        ),
        ("count = latest if before is None else before\n", "count = latest\n", _COUNTERS),
        (
            "    if last.start == period.earlier:\n",
            "    if last.start:\n",
            f"{_COUNTERS}::test_what_is_left_is_carried_over_once_and_up_to_a_limit",
        ),
        (
            "carried=min(max(left, 0), quota.carry_over * UNITS_PER_TOKEN)",
            "carried=max(left, 0)",
            f"{_COUNTERS}::test_what_is_left_is_carried_over_once_and_up_to_a_limit",
        ),
        (
            "drawn = min(cost - free, counter.valid_balance(now))",
            "drawn = min(cost - free, counter.balance)",
            f"{_COUNTERS}::test_a_settlement_draws_nothing_from_a_top_up_that_has_expired",
        ),
        (
            "    drawn = min(amount, count.drawn)\n",
            "    drawn = 0\n",
            f"{_COUNTERS}::test_a_refund_returns_what_was_drawn_from_a_top_up_first",
        ),
        (
            "return use(replace(standing, count=count), min(change, most), now)",
            "return use(replace(standing, count=count), change, now)",
            f"{_COUNTERS}::test_a_charge_afterwards_may_exceed_the_allowance_by_a_second_one",
        ),
        ("    return past_at(counter) < now\n", "    return counter.end < now\n", _COUNTERS),
        (
            "if peak < share * allowance <= count.peak",
            "if share * allowance <= count.peak",
            f"{_COUNTERS}::test_each_share_is_reported_once_in_a_period",
        ),
    ),
    *of(
        "limits/period_counters.py",
        (
            "return (self.unverified if is_unverified else len(self.counters) - self.unverified) < self.limit",
            "return len(self.counters) < self.limit",
            f"{_COUNTERS}::test_invented_keys_take_no_room_and_no_allowance_from_verified_ones",
        ),
        (
            "hash(key) % OVERFLOW_COUNTERS, is_unverified",
            "hash(key) % OVERFLOW_COUNTERS, False",
            f"{_COUNTERS}::test_invented_keys_take_no_room_and_no_allowance_from_verified_ones",
        ),
        (
            "if held is not None and held.unit != quota.calendar.unit:",
            "if False:",
            f"{_QUOTAS}::test_a_charge_from_before_a_change_of_the_period_does_not_begin_counts_anew",
        ),
    ),
    *of(
        "limits/quota_limiter.py",
        (
            "if used > allowance or not count.start <= now < counter.end:",
            "if used > allowance:",
            f"{_QUOTAS}::test_the_short_way_of_a_decision_gives_the_same_result",
        ),
        (
            "if (allowance - used) * cost < left * increment:",
            "if allowance - used < left:",
            f"{_QUOTAS}::test_the_short_way_of_a_decision_gives_the_same_result",
        ),
        (
            "                self.counters.changed.add(charge.key)\n",
            "",
            f"{_QUOTAS}::test_each_charge_in_the_short_way_is_to_be_stored",
        ),
        (
            "            return decision\n        warned: list[QuotaWarning] = []\n        for (charge",
            "        warned: list[QuotaWarning] = []\n        for (charge",
            f"{_QUOTAS}::test_every_decision_and_every_wait_is_that_of_a_plain_model",
        ),
        (
            "if isinstance(change.quota, PeriodQuota) and change.increment_ns:",
            "if isinstance(change.quota, PeriodQuota) and change.increment_ns > 0:",
            f"{_QUOTAS}::test_a_settlement_corrects_buckets_and_counters_and_names_the_tightest_again",
        ),
    ),
    *of(
        "limits/quota_decisions.py",
        (
            "if standing.left * cost < left * charge.increment_ns:",
            "if standing.left * cost > left * charge.increment_ns:",
            f"{_QUOTAS}::test_the_tightest_limit_is_the_one_with_the_fewest_further_requests",
        ),
        (
            "key=lambda one: (one.wait_ns == NEVER_NS, one.wait_ns)",
            "key=lambda one: one.wait_ns",
            f"{_QUOTAS}::test_never_is_the_longest_wait_of_a_bucket_and_a_quota",
        ),
    ),
    *of(
        "limits/period_store.py",
        (
            'for condition in ("NOT is_unverified", "is_unverified"):',
            'for condition in ("1",):',
            f"{_QUOTA_FILE}::test_invented_keys_do_not_displace_others_at_a_start",
        ),
        (
            "            self.counters.changed.update(key for key, _ in changed)\n            if self.error is None:",
            "            if self.error is None:",
            f"{_QUOTA_FILE}::test_what_could_not_be_written_is_written_later",
        ),
    ),
    *of(
        "limits/periods.py",
        ("day=min(first.day, calendar.monthrange(years, month)[1])", "day=min(first.day, 28)", _PERIODS),
        (
            'midnight.weekday() if self.unit == "week" else 0',
            'midnight.weekday() if self.unit == "day" else 0',
            _PERIODS,
        ),
    ),
    *of(
        "limits/token_bucket.lua",
        (
            "if debt > 2 * written_under then",
            "if debt > 20 * written_under then",
            f"{_LUA}::test_an_impossible_debt_is_that_of_an_empty_bucket",
        ),
        (
            "whole and debt or math.floor(debt) + 1, true",
            "math.floor(debt), true",
            f"{_LUA}::test_another_budget_keeps_the_filled_fraction_rounded_to_the_stricter_side",
        ),
        (
            "math.min(tonumber(ARGV[at + 2]), math.max(owed(ARGV[at + 3]), 0), debt)",
            "math.min(tonumber(ARGV[at + 2]), debt)",
            f"{_LUA}::test_a_refund_gives_back_what_was_not_refilled_and_notifies_of_it",
        ),
        ("string.format('%.0f %.0f %s', given,", "string.format('%.0f %.0f %s', debt,", _LUA),
        (
            "math.min(debt + ARGV[at + 2], most)",
            "debt + ARGV[at + 2]",
            f"{_LUA}::test_a_reported_debt_is_charged_up_to_the_stated_debt",
        ),
        (
            "local drawn = math.min(cost - free, valid_balance(counter))",
            "local drawn = math.min(cost - free, counter[BALANCE])",
            f"{_QUOTA_SCRIPT}::test_the_script_decides_as_the_counters_in_memory_do",
        ),
        (
            "if held and held[UNIT] ~= q.unit then return at + ARGUMENTS + 1 end",
            "",
            f"{_QUOTA_SCRIPT}::test_a_charge_from_before_a_change_of_the_period_does_not_begin_counts_in_the_store_anew",
        ),
        (
            "math.max(counter[END] + 2 * (counter[END] - counter[START]) + 86400, counter[UNTIL])",
            "counter[END]",
            f"{_QUOTA_SCRIPT}::test_keys_expire_when_they_have_no_effect_and_not_earlier",
        ),
        ("(q.cost == 0 or q.cost <= left_of", "(q.cost <= left_of", _QUOTA_SCRIPT),
        ("math.min(math.max(left, 0), q.carry)", "math.max(left, 0)", _QUOTA_SCRIPT),
    ),
    *of(
        "limits/share_debts.py",
        (
            "held_ns = min(max(debt.held_ns, now_ns) + cost_ns, owed_ns) if is_held else debt.held_ns",
            "held_ns = debt.held_ns",
            f"{_SHARES}::test_a_request_whose_reply_was_lost_is_not_charged_again",
        ),
        (
            "return max(self.owed_ns, now_ns) - max(self.held_ns, now_ns)",
            "return max(self.owed_ns, now_ns) - now_ns",
            _SHARES,
        ),
        (
            "debt._replace(held_ns=debt.owed_ns, changed_ns=now_ns), now_ns)\n        return unreported_ns",
            "debt, now_ns)\n        return unreported_ns",
            _SHARES,
        ),
        (
            "debt.begun_ns <= at_ns <= now_ns",
            "at_ns <= now_ns",
            f"{_REFUNDS}::test_what_an_earlier_outage_admitted_makes_no_room_in_a_later_one",
        ),
        ("min(end_ns, debt.owed_ns) - max", "debt.owed_ns - max", f"{_REFUNDS}::{_NO_ORDER}"),
        ("debt.held_ns - charge.increment_ns * processes", "debt.held_ns", f"{_LOST}::{_LATE}"),
    ),
    *of(
        "limits/store_refunds.py",
        ("        if name != self.name:", "        if name:", f"{_REFUNDS}::{_HEARD}"),
        (
            "Refund(int(at), int(tat), int(made) * 1000, int(given))",
            "Refund(0, 0, int(made) * 1000, 0)",
            f"{_REFUNDS}::{_HEARD}",
        ),
    ),
    *of(
        "limits/script_ops.py",
        (
            "        self._refund.given_ns = next(reply)\n",
            "        next(reply)\n",
            f"{_REFUNDS}::test_each_refund_is_of_its_own_charge_whatever_the_order",
        ),
        (
            "        if not self.is_sent:\n            self._refund.given_ns = 0\n",
            "",
            f"{_REFUNDS}::test_a_refund_that_was_not_sent_makes_no_later_one_smaller",
        ),
        (
            "may_be_charged=self.is_sent)\n\n\nclass RefundOp",
            "may_be_charged=False)\n\n\nclass RefundOp",
            f"{_REFUNDS}::test_what_a_settlement_could_not_charge_is_charged_after_the_outage",
        ),
        ("        self._is_admitted = self.is_sent and decision.allowed\n", "", f"{_LOST}::{_LATE}"),
        (
            "            learn_late(self._limiter, self._charges, is_charged=False)\n",
            "            pass\n",
            f"{_LEASES}::{_NO_SLOT}",
        ),
    ),
    *of(
        "models.py",
        (
            "min(increment_ns * processes, burst_ns)",
            "min(increment_ns, burst_ns)",
            f"{_SHARES}::test_a_client_at_its_limit_gets_no_more_by_an_outage",
        ),
    ),
    *of(
        "limits/fallback_limiter.py",
        ("        if may_be_charged:\n            self.lose(charges, now_ns)\n", "", f"{_LOST}::{_REFUSED_BY_OTHER}"),
        (
            "            known_ns = max(known_ns, self._lost.until",
            "            max(known_ns, self._lost.until",
            f"{_LOST}",
        ),
        ("if not is_charged and not self._debts.release", "if not self._debts.release", f"{_LOST}::{_LATE}"),
    ),
    *of(
        "limits/quota_ops.py",
        (
            "self._limiter.settle_owed(charge.key, admitted, is_charged=is_charged)",
            "self._limiter.settle_owed(charge.key, admitted, is_charged=True)",
            f"{_LOST}::{_LATE}",
        ),
        (
            "is_charged = may_be_charged and not is_unanswered",
            "is_charged = not is_unanswered",
            f"{_LEASES}::{_NO_SLOT}",
        ),
        ("        if self.is_sent and decision.allowed:\n", "        if False:\n", f"{_LOST}::{_LATE}"),
        (
            "        self._limiter.buckets.fallback.lose(self._debts,",
            "        repr(self._debts,",
            f"{_LOST}::{_LOST_REPORTS}",
        ),
        (
            "            self._limiter.owe(self._key, self._change, self._start, is_sent=self.is_sent)\n",
            "            pass\n",
            f"{_LOST}::test_a_settlement_that_the_store_does_not_get_is_charged_afterwards",
        ),
    ),
    *of(
        "limits/concurrency.py",
        (
            "return None if refused is None else joint_refusal(refused, limiter.refusal(charges, now_ns))",
            "return refused",
            f"{_SLOTS}::test_a_refusal_for_lack_of_a_slot_names_the_limits_without_tokens_and_has_their_wait",
        ),
    ),
    *of(
        "limits/concurrency_ops.py",
        (
            "self._on_full(totals, refused)",
            "self._on_full(totals, None)",
            f"{_LEASES}::{_NAMES_ALL}",
        ),
        (
            "changed = [slot.key for slot, is_same in self._with_epochs() if not is_same]",
            "changed: list[str] = []",
            f"{_LEASES}::test_a_request_whose_lease_is_set_while_the_store_is_asked_counts",
        ),
        (
            "if total < 0 and is_same:",
            "if total < 0:",
            f"{_LEASES}::test_a_claim_that_a_new_epoch_has_overtaken_begins_no_other",
        ),
        (
            "is_quiet = self._key not in self._port.under_way",
            "is_quiet = True",
            f"{_LEASES}::test_a_renewal_compares_the_number_of_requests_only_while_no_operation_is_under_way",
        ),
        (
            "is_quiet = self._key not in self._port.under_way",
            "is_quiet = False",
            f"{_LEASES}::test_a_renewal_corrects_a_wrong_number_of_requests",
        ),
    ),
    *of(
        "limits/concurrency_leases.py",
        (
            "            if slot.key in self.unwritten:\n                continue\n",
            "",
            f"{_LEASES}::test_a_request_that_ends_before_its_lease_is_written_is_returned_once",
        ),
        (
            "batcher.submit(ReturnOp(self, slot.key))\n            else:\n                self.mark(slot.key)",
            "batcher.submit(ReturnOp(self, slot.key))",
            f"{_LEASES}::test_a_request_that_ends_during_an_outage_is_returned_after_it",
        ),
    ),
    *of(
        "rate_limiter.py",
        (
            "key=lambda refused: (refused.wait_ns == NEVER_NS, refused.wait_ns)",
            "key=lambda refused: refused.wait_ns",
            f"{_SLOTS}::test_a_refusal_has_the_hint_of_the_slots_if_that_is_the_longer_wait",
        ),
    ),
    *of(
        "limits/store_quota_limiter.py",
        ("held._replace(amount=amount, sent=held.sent - sent.amount)", "held._replace(amount=amount, sent=0)", _LOST),
        (
            " and held.generation <= sent.generation:",
            ":",
            f"{_QUOTA_SCRIPT}::test_after_a_reset_a_late_reply_to_an_earlier_request_changes_nothing",
        ),
        (
            "if known is not None and known.resets < resets:",
            "if known is not None:",
            f"{_QUOTA_SCRIPT}::test_a_reading_that_already_has_the_reset_is_kept",
        ),
        (
            "        self.owed.pop(key, None)\n        known",
            "        known",
            f"{_QUOTA_SCRIPT}::test_a_reset_ends_what_processes_admitted_without_the_store",
        ),
        (
            "amount = held.amount - sent.amount if is_charged else held.amount",
            "amount = held.amount - held.sent if is_charged else held.amount",
            f"{_LOST}::{_NO_REPLIES}",
        ),
    ),
    *of(
        "limits/redis_limiter.py",
        (
            "        self.fallback.reset(key)\n",
            "",
            f"{_SHARES}::test_a_refill_ends_what_gateways_admitted_without_the_store",
        ),
    ),
    *of(
        "limits/deny_cache.py",
        (
            "        for table in self._earlier.values():\n            table.drop(key)\n",
            "",
            f"{_SHARES}::test_a_refill_ends_what_gateways_admitted_without_the_store",
        ),
        (
            "        if asked_ns <= self._valid_from_ns:\n            return\n",
            "",
            f"{_INVARIANTS}::test_a_reply_in_progress_while_a_bucket_is_filled_otherwise_is_not_remembered",
        ),
    ),
    *of(
        "limits/ratelimit_headers.py",
        (
            "effective = (until_ns + _UP) // NANOSECONDS or 1",
            "effective = until_ns // NANOSECONDS or 1",
            "tests/wire/test_ratelimit_headers.py",
        ),
    ),
    *of(
        "limits/limit.py",
        (
            'return value.replace("%", "%25").replace("|", "%7C") if "%" in value or "|" in value else value',
            "return value",
            f"{_STAGE}::test_values_of_tuples_cannot_be_confused",
        ),
        (
            'owner = f"{tier}:" if self.quotas and not self.is_by_client else ""',
            'owner = ""',
            f"{_STAGE}::test_tiers_have_values_of_their_own",
        ),
        (
            'and "client" in self.key and not client.is_registered',
            "and False",
            f"{_STAGE}::test_a_key_that_anyone_could_have_invented_is_charged_as_such",
        ),
    ),
    *of(
        "proxy/limit_stage.py",
        (
            "increment_ns = quota.cost_ns(cost if limit.cost is None else limit.cost)",
            "increment_ns = quota.cost_ns(cost)",
            f"{_STAGE}::test_a_limit_may_have_a_cost_of_its_own",
        ),
        (
            "return values if len(values) == len(parts) else None",
            "return values or None",
            f"{_STAGE}::test_a_part_of_a_key_that_a_request_lacks_leaves_the_limit_out",
        ),
        (
            "key = exchange.route, exchange.method, exchange.cost",
            "key = exchange.route, exchange.method, 1.0",
            f"{_STAGE}::test_what_applies_is_computed_once_for_route_method_and_cost",
        ),
        (
            "return [exchange.route, *(others - {exchange.route})]",
            "return [exchange.route]",
            f"{_STAGE}::test_a_route_with_several_readings_is_charged_by_each",
        ),
        (
            "and not client.is_registered and not self._is_exempt(peer)",
            "and not self._is_exempt(peer)",
            f"{_STAGE}::test_only_clients_that_are_not_registered_are_charged_to_their_address",
        ),
    ),
    *of(
        "proxy/candidate_limits.py",
        (
            "increment_ns, charge.own_cost, charge.is_unverified)",
            "increment_ns, charge.own_cost)",
            f"{_STAGE}::test_invented_ids_take_no_room_from_the_quotas_of_others_through_a_candidate",
        ),
    ),
    *of(
        "proxy/cost_settlement.py",
        (
            "own = cost if charge.own_cost is None or is_whole else charge.own_cost",
            "own = cost",
            f"{_STAGE}::test_a_settlement_leaves_a_cost_of_its_own_unless_the_whole_charge_is_refunded",
        ),
        (
            "if error.is_retry_safe and not exchange.status and not exchange.has_reached:",
            "if error.is_retry_safe and not exchange.status:",
            "tests/wire/test_cost_settlement.py::test_what_an_upstream_may_have_begun_with_is_paid_for",
        ),
        (
            "cost if is_complete else max(cost, otherwise)",
            "cost",
            "tests/wire/test_content_cost.py",
        ),
        (
            "if decision is None or not decision.allowed or (cost == exchange.cost and not is_whole):",
            "if decision is None or (cost == exchange.cost and not is_whole):",
            f"{_STAGE}::test_a_refusal_gives_back_no_tokens_that_it_has_not_taken",
        ),
    ),
    *ACCOUNTING,
)
