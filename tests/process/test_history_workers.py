"""The history of requests of several workers: each is asked, whichever gets the operator's request."""

from pathlib import Path

from tests.kit import RawUpstream, ask, reply
from tests.processes import config_file, process

SETTINGS = """
tiers: {FREE: {rate: 0.01, capacity: 12}}
server: {workers: 2}
store: {decision_timeout: 10, timeout: 10}
"""


def test_requests_of_all_workers_are_found_with_those_that_had_spent_the_tokens(tmp_path: Path) -> None:
    up = RawUpstream(reply(b"fine"))
    path = config_file(tmp_path, up.url, SETTINGS)
    with process("-m", "api_gateway", "--config", path, "--port", "0", cwd=tmp_path) as running:
        position = running.ask("/history").json()["next"]
        sent = [
            ask(f"{running.url}/api/up/{number}", headers={"X-Client-ID": "acme", "X-Request-ID": f"number-{number}"})
            for number in range(30)  # with ids of their own, as forked workers of tests generate the same
        ]
        refused = [one for one in sent if one.status == 429]
        allowed = [one.headers["x-request-id"] for one in sent if one.status == 200]
        assert len(allowed) == 12
        page = running.ask(f"/history?after={position}&limit=500&client=acme").json()
        assert page["complete"]
        assert {row["path"] for row in page["requests"]} == {f"/api/up/{number}" for number in range(30)}
        assert len(page["requests"]) == 30
        for one in refused[:3]:
            found = running.ask(f"/explain/{one.json()['request_id']}").json()
            (request,) = found["requests"]
            limit = next(row for row in request["limits"] if row["limit"] == "free")
            spent_by = limit["spent_by"]["requests"]
            assert sorted(row["request_id"] for row in spent_by) == sorted(allowed)
            assert limit["spent_by"]["complete"]
        missing = running.ask("/explain/none").json()
        assert "It has 12 successes, 18 refusals and 0 errors" in missing["detail"]
    up.close()
