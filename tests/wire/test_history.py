"""GET /history and GET /explain/{request_id}: what was decided about past requests, and who had spent the tokens."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from api_gateway.clients.api_keys import new_key
from tests.kit import (
    PATIENCE,
    FakeClocks,
    RawUpstream,
    RunningGateway,
    ask,
    eventually,
    in_front_of,
    refusing_url,
    reply,
    running_gateway,
)

TOKEN, READER = "t" * 40, "r" * 40
HEADERS = {"Authorization": f"Bearer {READER}"}
PATHS = ["fast", "asgi"]
SECRET = "s3cret-value"


def sections(*urls: str, **more: Any) -> dict[str, Any]:
    front = in_front_of(*urls, **more.pop("upstream", {}))
    front["tiers"] = {"FREE": {"rate": 1, "capacity": 3}}
    front["admin"] = {"token": TOKEN, "tokens": {"reader": {"role": "read", "token": READER}}}
    front["address_limit"] = {"rate": 0}
    return front | more


def explained(running: RunningGateway, request_id: str) -> dict[str, Any]:
    found = ask(f"{running.url}/explain/{request_id}", headers=HEADERS)
    assert found.status == 200, found.body
    (request,) = found.json()["requests"]
    assert found.json()["complete"]
    return dict(request)


def listed(running: RunningGateway, query: str = "") -> list[dict[str, Any]]:
    return list(ask(f"{running.url}/history?{query}", headers=HEADERS).json()["requests"])


def send(running: RunningGateway, path: str = "/api/x", **fields: str) -> Any:
    return ask(f"{running.url}{path}", headers={name.replace("_", "-"): value for name, value in fields.items()})


def test_a_refusal_names_the_requests_that_had_spent_the_tokens(tmp_path: Path, up: RawUpstream) -> None:
    clocks = FakeClocks()
    with running_gateway(sections(up.url), tmp_path, clocks.clocks) as running:
        send(running, "/api/early", X_Client_ID="acme")
        clocks.advance(60)  # the bucket is full again
        spent = [send(running, f"/api/{name}", X_Client_ID="acme") for name in "abc"]
        send(running, "/api/other", X_Client_ID="somebody")
        clocks.advance(0.25)
        refused = send(running, X_Client_ID="acme")
        body = refused.json()
        assert (refused.status, body["reason"]) == (429, "rate_limited")
        assert body["request_id"] == refused.headers["x-request-id"]
        request = explained(running, body["request_id"])
        assert (request["status"], request["reason"], request["result"]) == (429, "rate_limited", "refusal")
        assert request["detail"] == body["detail"]
        assert request["decision"] == {
            "allowed": False,
            "limit": "free",
            "source": "memory",
            "retry_after_seconds": 0.75,
        }
        (limit,) = request["limits"]
        spent_by = limit.pop("spent_by")
        assert limit == {
            "limit": "free",
            "capacity": 3,
            "refill_per_second": 1,
            "cost": 1,
            "allowed": False,
            "tokens_before": 0.25,
            "tokens_after": 0.25,
            "confirmed": True,
            "retry_after_seconds": 0.75,
            "processes": None,
            "concurrent": None,
        }
        assert [one["request_id"] for one in spent_by["requests"]] == [
            one.headers["x-request-id"] for one in reversed(spent)
        ]
        assert [(one["path"], one["tokens_before"], one["cost"]) for one in spent_by["requests"]] == [
            ("/api/c", 1, 1),
            ("/api/b", 2, 1),
            ("/api/a", 3, 1),
        ]
        assert spent_by["complete"]
        assert request["upstream_attempts"] == []
        allowed = explained(running, spent[1].headers["x-request-id"])
        assert (allowed["limits"][0]["tokens_before"], allowed["limits"][0]["tokens_after"]) == (2, 1)
        assert allowed["limits"][0]["spent_by"] is None


def test_every_limit_of_a_request_is_shown_by_its_name_without_values_of_header_fields(
    tmp_path: Path, up: RawUpstream
) -> None:
    limits = [{"name": "tenant", "key": "header:X-Tenant", "rate": 1, "capacity": 2, "cost": 2}]
    front = sections(up.url, limits=limits)
    front["tiers"] = {"FREE": {"rate": 1, "capacity": 10}}
    with running_gateway(front, tmp_path, FakeClocks().clocks) as running:
        first = send(running, f"/api/x?token={SECRET}", X_Client_ID="acme", X_Tenant=SECRET)
        refused = send(running, f"/api/x?token={SECRET}", X_Client_ID="acme", X_Tenant=SECRET)
        assert (first.status, refused.status) == (200, 429)
        request = explained(running, refused.headers["x-request-id"])
        found = {one["limit"]: one for one in request["limits"]}
        assert found["free"]["allowed"], "it would have allowed the request"
        assert (found["free"]["tokens_before"], found["free"]["retry_after_seconds"]) == (9, None)
        assert found["free"]["spent_by"] is None
        tenant = found["tenant"]
        assert (tenant["allowed"], tenant["tokens_before"], tenant["cost"]) == (False, 0, 2)
        assert tenant["retry_after_seconds"] == 2
        assert [one["cost"] for one in tenant["spent_by"]["requests"]] == [2]
        pages = ask(f"{running.url}/explain/{refused.headers['x-request-id']}", headers=HEADERS).body
        pages += ask(f"{running.url}/history", headers=HEADERS).body
        assert SECRET.encode() not in pages


@pytest.mark.parametrize("path", PATHS)
def test_each_attempt_is_shown_with_its_target_time_and_failure(tmp_path: Path, up: RawUpstream, path: str) -> None:
    """A connection that is closed, a status that is retried, and the response in the end."""
    down, broken = RawUpstream(lambda *_: False), RawUpstream(reply(b"no", status=b"503 Service Unavailable"))
    retry = {"attempts": 3, "min_retries_per_second": 100, "backoff": {"base": 0.001, "cap": 0.001}}
    front = sections(down.url, broken.url, up.url, upstream={"retry": retry, "balance": "round_robin"})
    headers = {"X-Client-ID": "acme"} | ({"X-A": "é"} if path == "asgi" else {})
    with running_gateway(front, tmp_path) as running:
        response = ask(f"{running.url}/api/x", headers=headers)
        request = explained(running, response.headers["x-request-id"])
        assert (response.status, request["attempts"]) == (200, 3)
        made = request["upstream_attempts"]
        assert [(one["target"], one["status"]) for one in made] == [(down.url, None), (broken.url, 503), (up.url, 200)]
        assert [one["failure"] for one in made] == ["upstream_reset", None, None]
        assert made[0]["detail"]
        starts = [one["started_after_ms"] for one in made]
        assert starts == sorted(starts)
        assert all(one["duration_ms"] >= 0 for one in made)
        assert request["result"] == "success"
    down.close()
    broken.close()


def test_a_failed_request_shows_the_error_of_its_last_attempt(tmp_path: Path) -> None:
    down = RawUpstream(lambda *_: False)
    with running_gateway(sections(down.url), tmp_path) as running:
        response = send(running)
        request = explained(running, response.json()["request_id"])
        assert (request["result"], request["status"], request["reason"]) == ("error", 502, "upstream_reset")
        made = [(one["target"], one["failure"], one["status"]) for one in request["upstream_attempts"]]
        assert made == [(down.url, "upstream_reset", None)] * request["attempts"]
        assert [one["client_id"] for one in listed(running, "result=error")] == ["127.0.0.1"]
    down.close()


def test_a_settlement_is_shown_with_the_decision_before_it(tmp_path: Path, up: RawUpstream) -> None:
    up.behave = reply(headers=((b"X-Gateway-Cost", b"3"),))
    with running_gateway(sections(up.url), tmp_path, FakeClocks().clocks) as running:
        response = send(running, X_Client_ID="acme")
        request = explained(running, response.headers["x-request-id"])
        assert request["cost"] == 3
        assert [(one["cost_before"], one["cost_after"]) for one in request["settlements"]] == [(1, 3)]
        (limit,) = request["limits"]
        assert (limit["tokens_before"], limit["cost"], limit["tokens_after"]) == (3, 1, 2)
        refused = explained(running, send(running, X_Client_ID="acme").headers["x-request-id"])
        assert [one["cost"] for one in refused["limits"][0]["spent_by"]["requests"]] == [3]


@pytest.mark.parametrize("is_out", [False, True], ids=["alone", "by share"])
def test_a_refusal_by_a_concurrency_limit_names_it_without_tokens(
    tmp_path: Path, up: RawUpstream, *, is_out: bool
) -> None:
    """Without the store, a limit of 2 is 1 for each of two gateways: the response and the history say so."""
    held = threading.Event()

    def hold(wire: Any, _request: Any) -> None:
        held.wait(PATIENCE)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    up.behave = hold
    limits = [{"name": "parallel", "key": "client", "concurrent": 2 if is_out else 1}]
    with running_gateway((outage if is_out else sections)(up.url, limits=limits), tmp_path) as running:
        first = threading.Thread(target=send, args=(running,), kwargs={"X_Client_ID": "acme"})
        first.start()
        eventually(lambda: bool(up.requests), "the first request is in flight")
        refused = send(running, X_Client_ID="acme")
        held.set()
        first.join()
        request = explained(running, refused.headers["x-request-id"])
        assert (refused.status, request["decision"]["limit"]) == (429, "parallel")
        found = {one["limit"]: one for one in request["limits"]}
        if not is_out:  # else the share of the tier refuses, too
            assert (found["free"]["allowed"], found["free"]["tokens_before"]) == (True, None)
        assert (found["parallel"]["allowed"], found["parallel"]["spent_by"]) == (False, None)
        assert figures(found["parallel"], "concurrent", "tokens_before", "processes") == [
            1,
            None,
            2 if is_out else None,
        ]
        assert figures(found["free"], "capacity", "processes") == ([1.5, 2] if is_out else [3, None])
        assert refused.json()["in_flight"] == 1
        assert ("each of 2 processes admits its share of 1" in refused.json()["detail"]) is is_out
        assert found["parallel"]["retry_after_seconds"] is not None


def outage(*urls: str, policy: str = "local_share", **more: Any) -> dict[str, Any]:
    """Return sections of one of two gateways whose store cannot be reached."""
    store = {"url": refusing_url().replace("http", "redis"), "on_failure": policy, "min_gateway_processes": 2}
    return sections(*urls, store=store | {"decision_timeout": 0.2, "timeout": 0.2, "clients": "sqlite"}, **more)


def predicted(running: RunningGateway, **described: Any) -> dict[str, Any]:
    body = json.dumps({"path": "/api/x", "client_id": "acme"} | described).encode()
    fields = HEADERS | {"Content-Type": "application/json"}
    found = ask(f"{running.url}/explain", method="POST", headers=fields, body=body)
    assert found.status == 200, found.body
    return dict(found.json())


def figures(row: dict[str, Any], *names: str) -> list[Any]:
    return [row[name] for name in names]


def test_while_the_store_is_unavailable_the_figures_are_those_of_the_share_of_this_process(
    tmp_path: Path, up: RawUpstream
) -> None:
    """Capacity 3 for two gateways: each has 1.5 at 0.5 a second, and a cost above that takes all of it."""
    limits = [{"name": "wide", "key": "client", "rate": 1, "capacity": 10, "cost": 6}]
    with running_gateway(outage(up.url, limits=limits), tmp_path, FakeClocks().clocks) as running:
        told = [{one["policy"]: one for one in predicted(running)["buckets"]}]
        first, refused = (send(running, X_Client_ID="acme") for _ in range(2))
        told.append({one["policy"]: one for one in predicted(running)["buckets"]})
        assert (first.status, refused.status) == (200, 429)
        found = ("tokens", "capacity", "cost", "allowed", "processes")
        assert [figures(one["free"], *found) for one in told] == [[1.5, 1.5, 1, True, 2], [0.5, 1.5, 1, False, 2]]
        assert [figures(one["wide"], *found) for one in told] == [[5, 5, 6, True, 2], [0, 5, 6, False, 2]]
        before, after = (
            {one["limit"]: one for one in explained(running, answer.headers["x-request-id"])["limits"]}
            for answer in (first, refused)
        )
        names = ("capacity", "refill_per_second", "tokens_before", "tokens_after", "retry_after_seconds", "processes")
        assert figures(before["free"], *names) == [1.5, 0.5, 1.5, 0.5, None, 2]
        assert figures(before["wide"], *names) == [5, 0.5, 5, 0, None, 2]
        assert figures(after["free"], *names) == [1.5, 0.5, 0.5, 0.5, 1, 2]
        assert figures(after["wide"], *names) == [5, 0.5, 0, 0, 10, 2]
        assert not [one for one in (*before.values(), *after.values()) if one["confirmed"] is not False]
        for one in after.values():
            assert figures(one["spent_by"], "complete", "missing_tokens") == [True, 0]
            assert [row["tokens_before"] for row in one["spent_by"]["requests"]] == [one["capacity"]]


@pytest.mark.parametrize("policy", ["deny", "allow"])
def test_a_policy_that_looks_at_no_tokens_states_none(tmp_path: Path, up: RawUpstream, policy: str) -> None:
    with running_gateway(outage(up.url, policy=policy), tmp_path, FakeClocks().clocks) as running:
        for _ in range(4):  # one more than the limit
            told = predicted(running)
            sent = send(running, X_Client_ID="acme")
            request = explained(running, sent.headers["x-request-id"])
            assert sent.status == (200 if policy == "allow" else 503)
            assert told["result"]["status"] == (None if policy == "allow" else 503)
            assert told["decision_source"] == request["decision"]["source"] == policy
            assert told["buckets"][0]["allowed"] is request["decision"]["allowed"] is (policy == "allow")
            (row,) = request["limits"]
            assert figures(row, "tokens_before", "tokens_after", "processes", "spent_by") == [None] * 4
            assert row["confirmed"] is False


def test_quotas_and_concurrency_limits_are_shown_with_what_was_left_also_if_another_limit_decides(
    tmp_path: Path, up: RawUpstream
) -> None:
    limits = [
        {"name": "monthly", "key": "client", "quota": 4, "period": "month"},
        {"name": "daily", "key": "client", "quota": 100, "period": "day"},
        {"name": "parallel", "key": "client", "concurrent": 2},
    ]
    clocks = FakeClocks()
    with running_gateway(sections(up.url, limits=limits), tmp_path, clocks.clocks) as running:
        sent = [send(running, X_Client_ID="acme") for _ in range(4)]  # the fourth is refused by the tier
        clocks.advance(10)
        sent += [send(running, X_Client_ID="acme") for _ in range(2)]  # the last one by the quota
        assert [one.status for one in sent] == [200, 200, 200, 429, 200, 429]
        rows = [
            {one["limit"]: one for one in explained(running, answer.headers["x-request-id"])["limits"]}
            for answer in sent
        ]
        names = ("allowed", "tokens_before", "tokens_after")
        assert [figures(one["monthly"], *names) for one in rows] == [
            [True, 4, 3],
            [True, 3, 2],
            [True, 2, 1],
            [True, 1, 1],
            [True, 1, 0],
            [False, 0, 0],
        ]
        left = [(100, 99), (99, 98), (98, 97), (97, 97), (97, 96), (96, 96)]
        assert [(one["daily"]["tokens_before"], one["daily"]["tokens_after"]) for one in rows] == left
        left = [(3, 2), (2, 1), (1, 0), (0, 0), (3, 2), (2, 2)]
        assert [(one["free"]["tokens_before"], one["free"]["tokens_after"]) for one in rows] == left
        assert {one["free"]["refill_per_second"] for one in rows} == {1}
        for one in rows:
            assert figures(one["parallel"], "allowed", "concurrent", "capacity", "tokens_before") == [
                True,
                2,
                None,
                None,
            ]


def test_an_unknown_id_is_told_what_is_kept_and_for_how_long(tmp_path: Path, up: RawUpstream) -> None:
    history = {"successes": 4, "refusals": 2, "errors": 1, "max_age": 600}
    clocks = FakeClocks()
    with running_gateway(sections(up.url, history=history), tmp_path, clocks.clocks) as running:
        first = send(running)
        missing = ask(f"{running.url}/explain/none", headers=HEADERS)
        assert (missing.status, missing.json()["reason"]) == (404, "no_route")
        detail = missing.json()["detail"]
        assert "no request with the id 'none'" in detail
        assert "It has 1 success, 0 refusals and 0 errors; the oldest ended at 2027-01-15T08:00:00" in detail
        assert "at most 4, 2 and 1 of them, for 600 s at most" in detail
        assert "It is the history of one process: processes that another server starts" in detail
        request_id = first.headers["x-request-id"]
        assert ask(f"{running.url}/explain/{request_id}", headers=HEADERS).status == 200
        clocks.advance(601)
        assert ask(f"{running.url}/explain/{request_id}", headers=HEADERS).status == 404
        assert listed(running) == []


def test_the_history_is_off_if_configured(tmp_path: Path, up: RawUpstream) -> None:
    with running_gateway(sections(up.url, history={"enabled": False}), tmp_path) as running:
        response = send(running)
        for path in ("/history", f"/explain/{response.headers['x-request-id']}"):
            found = ask(f"{running.url}{path}", headers=HEADERS)
            assert (found.status, found.json()["detail"]) == (
                404,
                "There is no history of requests: history.enabled is false.",
            )
        assert not running.server._app.state.gateway.history.sizes()["success"][0]


def test_requests_without_a_record_are_counted_and_the_tokens_that_they_spent_are_told(
    tmp_path: Path, up: RawUpstream
) -> None:
    """Of a client that uses up the budget; a client with few requests, and refusals, still have theirs."""
    history = {"successes": 8, "successes_per_second": 0.001}
    with running_gateway(sections(up.url, history=history), tmp_path, FakeClocks().clocks) as running:
        taken = [send(running, X_Client_ID=f"c{number}") for number in range(2)]
        own = [send(running, X_Client_ID="acme") for _ in range(3)]
        quiet = send(running, X_Client_ID="quiet")
        refused = send(running, X_Client_ID="acme")
        page = ask(f"{running.url}/history", headers=HEADERS).json()
        kept = [*taken, own[0], quiet, refused]
        assert [row["request_id"] for row in page["requests"]] == [one.headers["x-request-id"] for one in kept]
        assert page["not_kept"] == 2
        (limit,) = explained(running, refused.headers["x-request-id"])["limits"]
        assert [one["request_id"] for one in limit["spent_by"]["requests"]] == [own[0].headers["x-request-id"]]
        assert (limit["spent_by"]["missing_tokens"], limit["spent_by"]["complete"]) == (2, False)
        unknown = ask(f"{running.url}/explain/{own[1].headers['x-request-id']}", headers=HEADERS)
        assert unknown.status == 404
        assert "2 successes, 0 refusals and 0 errors since the start were not kept" in unknown.json()["detail"]
        assert "a worker keeps 0.001, 50 and 50 of them each second" in unknown.json()["detail"]


def test_requests_are_followed_without_gaps_and_repetitions(tmp_path: Path, up: RawUpstream) -> None:
    with running_gateway(sections(up.url, history={"successes": 100}), tmp_path) as running:
        send(running, "/api/before", X_Client_ID="before")
        position = ask(f"{running.url}/history?limit=1", headers=HEADERS).json()["next"]
        seen: list[str] = []
        for number in range(12):
            send(running, f"/api/{number}", X_Client_ID=f"c{number}")
            if number % 4 == 3:
                while True:
                    page = ask(f"{running.url}/history?after={position}&limit=3", headers=HEADERS).json()
                    position = page["next"]
                    seen += [row["path"] for row in page["requests"]]
                    if len(page["requests"]) < 3:
                        break
        assert seen == [f"/api/{number}" for number in range(12)]


def test_the_list_is_filtered(tmp_path: Path, up: RawUpstream) -> None:
    with running_gateway(sections(up.url), tmp_path, FakeClocks().clocks) as running:
        for _ in range(4):
            send(running, X_Client_ID="acme")
        send(running, X_Client_ID="other")
        send(running, X_Client_ID="bad id")
        assert [row["status"] for row in listed(running)] == [200, 200, 200, 429, 200, 400]
        assert [row["client_id"] for row in listed(running, "status=429")] == ["acme"]
        assert [row["status"] for row in listed(running, "status=4xx")] == [429, 400]
        assert [row["status"] for row in listed(running, "client=other")] == [200]
        assert [row["client_id"] for row in listed(running, "reason=client_id_invalid")] == [None]
        assert [row["route"] for row in listed(running, "route=all&result=refusal")] == ["all"]
        assert [row["status"] for row in listed(running, "limit=2")] == [200, 400]
        for wrong in ("status=99", "result=bad", "limit=0", "after=-1"):
            assert ask(f"{running.url}/history?{wrong}", headers=HEADERS).status == 422, wrong


def test_a_key_in_a_path_or_an_id_is_not_shown(tmp_path: Path, up: RawUpstream) -> None:
    key = new_key(b"k" * 32)
    with running_gateway(sections(up.url), tmp_path) as running:
        send(running, f"/api/{key}", X_Request_ID=key)
        body = ask(f"{running.url}/history", headers=HEADERS).body
        assert key[-20:].encode() not in body
        assert len(json.loads(body)["requests"]) == 1


def test_an_id_of_the_client_may_have_any_visible_character_and_several_requests(
    tmp_path: Path, up: RawUpstream
) -> None:
    with running_gateway(sections(up.url), tmp_path) as running:
        for name in ("one", "two"):
            send(running, f"/api/{name}", X_Request_ID="a/b%20?c", X_Client_ID=name)
        found = ask(f"{running.url}/explain/a%2Fb%2520%3Fc", headers=HEADERS).json()
        assert [row["path"] for row in found["requests"]] == ["/api/two", "/api/one"]


def test_operators_only_and_reading_is_enough(tmp_path: Path, up: RawUpstream) -> None:
    with running_gateway(sections(up.url), tmp_path) as running:
        request_id = send(running).headers["x-request-id"]
        for path in ("/history", f"/explain/{request_id}"):
            assert ask(f"{running.url}{path}").status == 401
            assert ask(f"{running.url}{path}", method="HEAD", headers=HEADERS).status == 200
            assert (
                ask(
                    f"{running.url}{path}", method="DELETE", headers=HEADERS | {"Authorization": f"Bearer {TOKEN}"}
                ).status
                == 405
            )


def test_metrics_show_its_size(tmp_path: Path, up: RawUpstream) -> None:
    with running_gateway(sections(up.url), tmp_path) as running:
        for _ in range(4):
            send(running)

        def figures() -> dict[str, float]:
            text = ask(f"{running.url}/metrics?format=prometheus", headers=HEADERS).body.decode()
            lines = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("gateway_history_")]
            return {name.removeprefix("gateway_history_"): float(value) for name, value in lines}

        success, refusal, error = (f'records{{result="{name}"}}' for name in ("success", "refusal", "error"))
        eventually(lambda: (figures()[success], figures()[refusal]) == (3, 1), "it counts the records")
        assert figures()[error] == 0
        assert figures()['requests_not_kept_total{result="success"}'] == 0
        assert figures()["bytes"] > 1000
