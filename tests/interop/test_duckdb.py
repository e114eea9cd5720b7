"""DuckDB over the access log and the usage of a gateway under load: both agree, by client, route and day."""

import importlib.util
from typing import Any

import pytest

from tests.process import test_replay
from tests.process.test_replay import SUMS, Played

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(importlib.util.find_spec("duckdb") is None, reason="needs duckdb (extra interop)"),
]

played = test_replay.played  # the fixture

# What docs/usage.md and docs/access-log.md state, in SQL.
OF_LOG = """
WITH lines AS (
    SELECT *, (decision ->> 'wait_ns')::BIGINT AS wait_ns
    FROM read_json($log, format = 'newline_delimited', ignore_errors = true, columns = {
        request_id: 'VARCHAR', time: 'VARCHAR', client_id: 'VARCHAR', tier_source: 'VARCHAR', route: 'VARCHAR',
        status: 'INTEGER', cost: 'DOUBLE', bytes_received: 'BIGINT', bytes_sent: 'BIGINT', decision: 'JSON'})
    WHERE request_id IS NOT NULL
)
SELECT CASE tier_source WHEN 'address' THEN 'address ' || client_id ELSE coalesce(client_id, '') END AS client,
    coalesce(route, '') AS route, time[1:10] AS day, count(*),
    count(*) FILTER (wait_ns <> 0), count(*) FILTER (status >= 500), coalesce(sum(cost) FILTER (wait_ns = 0), 0),
    sum(bytes_received), sum(bytes_sent)
FROM lines GROUP BY ALL ORDER BY ALL
"""
SUMMED = ", ".join(f"{name}::DOUBLE" for name in SUMS)
OF_USAGE = f"""
SELECT regexp_replace(client, '^''', '') AS client, coalesce(regexp_replace(route, '^''', ''), '') AS route, day,
    {SUMMED}
FROM read_csv($usage, header = true, all_varchar = true, nullstr = '\\N') ORDER BY ALL
"""  # noqa: S608 - constant names


def test_the_usage_agrees_with_the_access_log_in_duckdb(played: Played) -> None:
    duckdb: Any = importlib.import_module("duckdb")
    table = played.folder / "usage.csv"
    table.write_bytes(played.table.body)
    logged = duckdb.execute(OF_LOG, {"log": str(played.running.stdout)}).fetchall()
    used = duckdb.execute(OF_USAGE, {"usage": str(table)}).fetchall()
    assert len(used) > 5
    assert logged == used
    assert {row[0] for row in used} >= {"free", "pro", "keyed", "address 192.0.2.1", ""} - {""}
