"""Mutations of what is counted and told beside the decisions: replay, usage, costs, periods, leases, header fields."""

from tests.mutations.mutant import of

_REPLAY = "tests/unit/test_replay.py"
_SETTLED = f"{_REPLAY}::test_each_settlement_is_made_again_at_its_time"
_WHO = f"{_REPLAY}::test_who_is_registered_is_not_charged_to_its_address"
_NEWLY = f"{_REPLAY}::test_what_is_newly_limited_says_who_when_how_long_and_by_which_limit"
_SHARDS = f"{_REPLAY}::test_the_figures_of_all_shards_together_are_those_of_one_process"
_CHECKS = f"{_REPLAY}::test_verifications_of_credentials_charge_their_address"
_OTHERWISE = f"{_REPLAY}::test_requests_that_the_candidate_refuses_otherwise_are_not_limited"
_LOG_ENDS = f"{_REPLAY}::test_a_line_that_is_cut_off_is_recognised_after_any_number_of_blocks"
_CALENDAR = f"{_REPLAY}::test_calendar_quotas_are_evaluated_by_the_wall_clock_of_the_log_across_restarts"
_CONDITION = f"{_REPLAY}::test_a_condition_is_evaluated"
_PARSERS = f"{_REPLAY}::test_both_parsers_read_the_same_of_every_line"
_TWO_PARTS = f"{_REPLAY}::test_a_log_in_two_parts_is_replayed_from_the_state_at_the_end_of_the_first"
_PARTS = f"{_REPLAY}::test_each_line_belongs_to_one_part"
_ORDER = f"{_REPLAY}::test_events_are_merged_in_the_order_of_time_and_number"
_REMEMBERED = f"{_REPLAY}::test_what_is_remembered_of_a_client_and_a_path_changes_no_decision"
_USAGE = "tests/unit/test_usage.py"
_COUNTED = f"{_USAGE}::test_an_exchange_is_counted_once_with_what_was_charged"
_INVENTED = f"{_USAGE}::test_invented_ids_are_bounded_each_day_and_registered_ones_are_not"
_PUT_BACK = f"{_USAGE}::test_what_is_counted_during_a_write_that_fails_is_added_to_it"
_STATEMENT = "tests/wire/test_usage.py::test_operators_see_all_clients_in_three_forms"
_SCANNERS = "tests/unit/test_json_scanner.py"
_LEAVING = "test_a_client_that_leaves_after_the_event_that_ends_a_stream_pays_what_it_states"
_LEFT = f"tests/wire/test_content_cost.py::{_LEAVING}"
_PERIODS = "tests/unit/test_periods.py"
_DATES = f"{_PERIODS}::test_the_period_of_an_instant_is_the_one_that_a_calendar_shows"
_SINCE = f"{_PERIODS}::test_periods_from_a_start_keep_its_day_and_local_time"
_NO_GAP = f"{_PERIODS}::test_periods_have_neither_gap_nor_overlap"
_SLOTS = "tests/unit/test_concurrency.py"
_FIELDS = "tests/wire/test_ratelimit_headers.py"
_TOLD = f"{_FIELDS}::test_the_fields_of_a_decision"
_POLICIES = f"{_FIELDS}::test_all_policies_are_listed_with_the_seconds_in_which_they_fill_rounded_up"

ACCOUNTING = (
    *of(
        "replay/simulation.py",
        ("                and event[HAS_KEYS] is has_keys\n", "", _REMEMBERED),
        ("                and (address is None or address == event[ADDRESS])\n", "", _REMEMBERED),
        ("self._set_wall(wall_us or -(-at_ns // 1000))", "self._set_wall(-(-at_ns // 1000))", _CALENDAR),
        ("            buckets.open[number] = exchange, count - 1\n", "            pass\n", _SETTLED),
        ("        self.now_ns = event[AT_NS]\n", "", _SETTLED),
        (
            'exchange = Exchange("", "", "", "", 0.0) if settlements else self._exchange',
            "exchange = self._exchange",
            _SETTLED,
        ),
        ("snapshot.buckets.get(process, {})", "snapshot.buckets.get(SHARED, {})", _TWO_PARTS),
        ('quota=quota, source=cast("ClientSource", tier_source))', "quota=quota)", _WHO),
        ("            client = replace(client, has_keys=True)\n", "            pass\n", _WHO),
        (
            "for moved in moved_buckets(self.limits, held, client):",
            "for moved in ():",
            f"{_REPLAY}::test_a_bucket_keeps_its_filled_fraction_when_the_tier_changes_in_the_log",
        ),
    ),
    *of(
        "replay/tally.py",
        ("max((end_ns - begin_ns) // SLOTS + 1, 1)", "max((end_ns - begin_ns) // SLOTS, 1)", _NEWLY),
        ("            self.first_ns = self.first_ns or at_ns\n", "            self.first_ns = at_ns\n", _NEWLY),
        ("        if not self.refused_since_ns:\n", "        if self.limited:\n", _NEWLY),
        ("max(self.longest_wait_ns, outcome.wait_ns)", "outcome.wait_ns", _NEWLY),
        ("client.newly_allowed += was_limited", "client.newly_allowed += 1", _NEWLY),
        (".allowed and simulation is self._candidate:", ".allowed:", _CHECKS),
        ("agreement.same_decision += wait_ns != 0", "agreement.same_decision += wait_ns == 0", _OTHERWISE),
        ("other.first_difference[0] < self", "other.first_difference[0] > self", _SHARDS),
        ("        self.before_snapshot += other.before_snapshot\n", "", _SHARDS),
        ("        self.refused_unlogged += other.refused_unlogged\n", "", _SHARDS),
        ("        self.doubts += other.doubts\n", "", _SHARDS),
        ("        self.checks_refused += other.checks_refused\n", "", _SHARDS),
        (
            "    if event[SOURCE] not in EXACT:\n        return\n",
            "",
            f"{_REPLAY}::test_what_the_log_does_not_suffice_for_is_reported",
        ),
        (
            'event[ID_OF_CLIENT], event[TIER], event[TIER_SOURCE] == "address"',
            "event[ID_OF_CLIENT], event[TIER], False",
            f"{_REPLAY}::test_an_id_that_looks_like_an_address_is_another_client_than_that_address",
        ),
    ),
    *of(
        "replay/log_lines.py",
        ('_whole(decision["wait_ns"], -1)', '_whole(decision["wait_ns"])', _PARSERS),
        ('decision.get("remaining", members["remaining"])', 'members["remaining"]', _SETTLED),
        ("organisation, int(wall_us or 0)),", "organisation, 0),", _CALENDAR),
        ("intern(tier), keys is not None,", "intern(tier), False,", _WHO),
        ('number, _cost(one["cost"])))', 'number, _cost(decision["cost"])))', _SETTLED),
    ),
    *of(
        "replay/external_sort.py",
        ("bisect_right(block, min(heads[1:3])[0], begin)", "bisect_right(block, heads[1][0], begin)", _ORDER),
        ("        self._events.sort()\n", "", _ORDER),
    ),
    *of(
        "replay/log_files.py",
        ("file.seek(part.begin - 1)", "file.seek(part.begin)", _PARTS),
        ("            data += file.readline(MAX_LINE_BYTES)\n", "            pass\n", _PARTS),
    ),
    *of(
        "replay/condition.py",
        ("return bool, lambda figures: any(part", "return bool, lambda figures: all(part", _CONDITION),
        ("return all(test(*pair) for", "return any(test(*pair) for", _CONDITION),
    ),
    *of(
        "replay/log_replay.py",
        ("if event[AT_NS] > from_ns:", "if event[AT_NS] >= from_ns:", _TWO_PARTS),
        ("number == before + len(lines):", "number == len(lines):", _LOG_ENDS),
        (
            "max(greatest, *given), count + len(given)",
            "max(greatest, *given), len(given)",
            f"{_REPLAY}::test_a_refusal_by_a_concurrency_limit_charges_nothing_and_is_not_missing",
        ),
    ),
    *of(
        "replay/report.py",
        (
            "max(count - (greatest - least + 1), 0)",
            "max(count - (greatest - least), 0)",
            f"{_REPLAY}::test_a_log_that_is_given_twice_is_reported",
        ),
        (
            "{line + number}: {cause}",
            "{number}: {cause}",
            f"{_REPLAY}::test_clients_are_held_once_however_many_parts_a_log_has",
        ),
        (
            'if one["newly_limited"] or one["newly_allowed"]][:shown]',
            'if one["newly_limited"]][:shown]',
            f"{_REPLAY}::test_clients_that_the_candidate_refuses_less_are_listed",
        ),
    ),
    *of(
        "replay/saved_state.py",
        (" if was.get(key) != full_at_ns})", "})", _SHARDS),
        (" if was_counted.get(key) != one})", "})", _SHARDS),
    ),
    *of(
        "proxy/content_cost.py",
        (
            "return abs(round(value / self.per, 9))",
            "return abs(round(value, 9))",
            f"{_SCANNERS}::test_the_unit_is_divided_and_a_number_out_of_range_is_none",
        ),
        (
            "not 0 <= value / self.per <= MAX_CONTENT_COST",
            "not 0 <= value / self.per",
            f"{_SCANNERS}::test_the_unit_is_divided_and_a_number_out_of_range_is_none",
        ),
        (
            "is_complete and self._scanner.finish()",
            "self._scanner.finish()",
            f"{_SCANNERS}::test_a_response_that_was_cut_off_has_what_was_complete",
        ),
        (
            "(isinstance(self._scanner, EventScanner) and self._scanner.is_done)",
            "False",
            _LEFT,
        ),
        (
            "            if self._decompressor.eof:",
            "            if False:",
            f"{_SCANNERS}::test_gzip_and_deflate_are_decompressed_and_other_codings_have_no_number",
        ),
        (
            '.endswith((b"/json", b"+json"))',
            '.endswith(b"/json")',
            f"{_SCANNERS}::test_json_is_scanned_and_nothing_else",
        ),
    ),
    *of(
        "proxy/json_scanner.py",
        ("len(self._indices) < len(self._path) or", "False or", _SCANNERS),
        ("        if is_on_path:\n            self.value = None\n", "", _SCANNERS),
        (
            "self._path[len(self._indices) - 1] == str(index)",
            "self._path[len(self._indices) - 1] == str(index - 1)",
            f"{_SCANNERS}::test_elements_of_arrays_are_counted",
        ),
        (
            "            self._is_escaped = False\n            at += 1\n",
            "            self._is_escaped = False\n",
            _SCANNERS,
        ),
        ("at + self._depth)", "end_of(piece))", _SCANNERS),
        ("return self._state is _State.END", "return True", _SCANNERS),
        ("is _State.SCALAR and not self._indices", "is _State.SCALAR", _SCANNERS),
    ),
    *of(
        "proxy/event_scanner.py",
        ("self._is_after_return = at == end", "self._is_after_return = False", _SCANNERS),
        ('        self._begun = b""\n        self._json.restart()', "        self._json.restart()", _SCANNERS),
        (" and self._json.value is not None", "", _SCANNERS),
        ("self._json.finish() and ", "not self._json.finish() or ", _SCANNERS),
    ),
    *of(
        "limits/periods.py",
        ("if self._offset(end - 1) != offset:", "if False:", _DATES),
        ("zone, fold=0))\n", "zone, fold=1))\n", _DATES),
        ("while earlier == start:", "while False:", _NO_GAP),
        ("return began if count == 0 else self.instant", "return self.instant", _SINCE),
        ("if self._offset(start) != offset:", "if False:", _DATES),
        (
            "if not last.start <= now < last.end:",
            "if not last.start <= now <= last.end:",
            f"{_PERIODS}::test_a_year_of_days_has_365_of_them",
        ),
        (
            "self._hour_of(start - 1)[0])",
            "start - HOUR)",
            _NO_GAP,
        ),
    ),
    *of(
        "limits/concurrency.py",
        (
            "counter.in_flight >= slot.quota.capacity:",
            "counter.in_flight > slot.quota.capacity:",
            f"{_SLOTS}::test_five_at_a_time",
        ),
        (
            "            exchange.slots = ()\n",
            "",
            f"{_SLOTS}::test_a_slot_is_returned_once_however_often_the_end_is_recorded",
        ),
        (
            "            if not counter.in_flight:\n                del counters[slot.key]\n",
            "",
            f"{_SLOTS}::test_a_random_walk_agrees_with_sets_of_open_requests",
        ),
        (
            "sorted(durations)[len(durations) // 2]",
            "sorted(durations)[-1]",
            f"{_SLOTS}::test_a_refusal_names_the_limits_and_its_wait_is_the_median_duration_of_the_key",
        ),
    ),
    *of(
        "limits/ratelimit_headers.py",
        ("until_ns = left * quota.emission_ns", "until_ns = decision.reset_ns", _TOLD),
        ("usable, until_ns = 0, decision.wait_ns", "until_ns = decision.wait_ns", _TOLD),
        ("        elif is_period:\n            until_ns = decision.reset_ns\n", "", _TOLD),
        ("(until_ns + _UP) // NANOSECONDS or 1", "(until_ns + _UP) // NANOSECONDS", _TOLD),
        ("window = math.ceil(quota.burst_ns / NANOSECONDS)", "window = quota.burst_ns // NANOSECONDS", _POLICIES),
        ("{(decision.reset_ns + _UP) // NANOSECONDS}", "{decision.reset_ns // NANOSECONDS}", _TOLD),
        (
            "names = tuple([charge.quota.name for charge in charges])",
            "names = (quota.name,)",
            _POLICIES,
        ),
        ("decision.reset_ns - quota.burst_ns + quota.emission_ns", "decision.reset_ns - quota.burst_ns", _TOLD),
    ),
    *of(
        "usage/counts.py",
        (
            "            if decision.allowed:\n                row[3]",
            "            if decision:\n                row[3]",
            _COUNTED,
        ),
        ("exchange.status >= 500", "exchange.status > 500", _COUNTED),
        ("self._day, self._unregistered = day, set()", "self._day = day", _INVENTED),
        ("len(known) >= self._max_unregistered", "len(known) > self._max_unregistered", _INVENTED),
        ("client.is_registered or name in known:", "client.is_registered:", _INVENTED),
        ("counted if held is None else [a + b for a, b in zip(held, counted, strict=True)]", "counted", _PUT_BACK),
    ),
    *of(
        "usage/ledger.py",
        ("WHERE day <= ?", "WHERE day < ?", f"{_USAGE}::test_days_beyond_the_retention_are_deleted"),
        ("question.limit + 1)", "question.limit)", f"{_USAGE}::test_a_result_is_complete_or_an_error"),
        (
            "        if self._file.is_open:\n            await self.flush()\n",
            "",
            f"{_USAGE}::test_what_was_counted_is_written_at_the_end",
        ),
        (
            "            self._counts.put_back(rows)\n",
            "",
            f"{_USAGE}::test_a_write_that_fails_is_made_later_and_nothing_is_lost",
        ),
    ),
    *of(
        "admin/usage.py",
        ("day=monthrange(first.year, first.month)[1])", "day=28)", _STATEMENT),
        ("question.last_day, question.client, 1)", "question.last_day, None, 1)", _STATEMENT),
    ),
)
