"""Calendar quotas on the wire: fields, refusals, warnings, settlement, the API of operators, and reloads."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from standardwebhooks import Webhook as Verifier

from api_gateway.config import GatewayConfig, load_config
from api_gateway.settings.diagnostics import ConfigError
from tests.kit import (
    Answer,
    FakeClocks,
    RawUpstream,
    RunningGateway,
    ask,
    eventually,
    in_front_of,
    reply,
    running_gateway,
)

NOON = datetime(2027, 1, 31, 12, tzinfo=UTC).timestamp()  # 13:00 in Berlin
HOUR = 3600
OPERATOR = {"Authorization": "Bearer operator"}
MONTHLY = {"name": "monthly", "quota": 10, "period": "month", "time_zone": "Europe/Berlin"}
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


class Gateway:
    """A gateway with quotas, and fake clocks."""

    def __init__(self, folder: Path, up: RawUpstream, limits: list[dict[str, Any]], **more: Any) -> None:
        self.clocks = FakeClocks(wall=NOON)
        sections = in_front_of(up.url) | {"limits": limits, "admin": {"token": "operator", "local": False}} | more
        self._live = running_gateway(sections, folder, self.clocks.clocks)
        self.running: RunningGateway = self._live.__enter__()

    def stop(self) -> None:
        """Stop it."""
        self._live.__exit__(None, None, None)

    def get(self, client: str = "acme", path: str = "/api/x") -> Answer:
        """Send a request of a client."""
        return ask(f"{self.running.url}{path}", headers={"X-Client-ID": client})

    def statuses(self, count: int, client: str = "acme") -> list[int]:
        """Send requests; return their statuses."""
        return [self.get(client).status for _ in range(count)]

    def call(self, method: str, path: str, body: Any = None) -> Answer:
        """Call an operator endpoint."""
        headers = OPERATOR | ({} if body is None else {"Content-Type": "application/json"})
        data = None if body is None else json.dumps(body).encode()
        return ask(f"{self.running.url}{path}", method=method, headers=headers, body=data)

    def quota(self, client: str = "acme") -> dict[str, Any]:
        """Return the only quota of a client."""
        (found,) = self.call("GET", f"/clients/{client}/quotas").json()["quotas"]
        return dict(found)


@pytest.fixture
def gateways(tmp_path: Path, up: RawUpstream) -> Iterator[Any]:
    running: list[Gateway] = []

    def start(*limits: dict[str, Any], **more: Any) -> Gateway:
        running.append(Gateway(tmp_path, up, list(limits), **more))
        return running[-1]

    up.behave = reply()
    yield start
    for one in running:
        one.stop()


def test_a_client_has_its_quota_in_each_month_and_the_refusal_says_until_when(gateways: Any) -> None:
    gateway = gateways(MONTHLY)
    first = gateway.get()
    assert first.headers["ratelimit-policy"] == '"free";q=100000;w=100, "monthly";q=10;w=2678400'
    assert first.headers["ratelimit"] == f'"monthly";r=9;t={11 * HOUR}'
    assert first.headers["x-ratelimit-reset"] == str(11 * HOUR)
    assert gateway.statuses(10) == [200] * 9 + [429]
    refused = gateway.get()
    assert refused.headers["retry-after"] == str(11 * HOUR)
    assert refused.headers["ratelimit"] == f'"monthly";r=0;t={11 * HOUR}'
    problem = refused.json()
    assert problem["detail"] == (
        "Limit 'monthly' allows 10 tokens in each month (Europe/Berlin); this request costs 1, 0 remain."
        f" Retry in {11 * HOUR}.000 s."
    )
    assert (problem["policy"], problem["violated-policies"]) == ("monthly", ["monthly"])
    assert (problem["limit"], problem["period"], problem["time_zone"]) == (10, "month", "Europe/Berlin")
    assert gateway.get("other").status == 200
    gateway.clocks.advance(11 * HOUR - 1)
    assert gateway.get().status == 429
    gateway.clocks.advance(1)
    assert gateway.statuses(11) == [200] * 10 + [429]


def test_the_longest_wait_of_buckets_and_quotas_is_the_retry_after(gateways: Any) -> None:
    gateway = gateways(
        {"name": "hourly", "quota": 2, "period": "hour"},
        {"name": "daily", "quota": 3, "period": "day"},
        {"name": "slow", "rate": 0.01, "capacity": 3},
    )
    gateway.clocks.advance(1800)
    assert gateway.statuses(3) == [200, 200, 429]
    assert gateway.get().headers["retry-after"] == "1800"
    gateway.clocks.advance(1800)
    assert gateway.statuses(2) == [200, 429]
    refused = gateway.get()
    assert refused.headers["retry-after"] == str(11 * HOUR)
    assert refused.json()["violated-policies"] == ["daily"]


def test_costs_from_upstreams_and_refunds_correct_quotas(gateways: Any, up: RawUpstream) -> None:
    gateway = gateways(MONTHLY)
    up.behave = reply(headers=((b"X-Gateway-Cost", b"4"),))
    assert gateway.get().headers["x-ratelimit-remaining"] == "6"
    assert gateway.quota()["used"] == 4
    up.behave = reply(headers=((b"X-Gateway-Cost", b"0"),))
    gateway.get()
    assert gateway.quota()["used"] == 4


def test_a_request_of_which_nothing_was_sent_is_refunded(tmp_path: Path) -> None:
    dead = RawUpstream()
    dead.close()
    gateway = Gateway(tmp_path, dead, [MONTHLY])
    assert gateway.get().status == 502
    assert gateway.quota()["used"] == 0
    gateway.stop()


def test_shares_are_told_in_a_field_a_log_line_a_metric_and_a_signed_webhook(
    gateways: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    receiver = RawUpstream(reply(status=b"204 No Content"))
    gateway = gateways(MONTHLY | {"warn_at": [0.5, 0.9]}, webhook={"url": f"{receiver.url}/hook", "secret": SECRET})
    assert [gateway.get().headers.get("x-quota-warning") for _ in range(4)] == [None] * 4
    assert gateway.get().headers["x-quota-warning"] == f'"monthly";at=0.5;r=5;t={11 * HOUR}'
    assert gateway.statuses(3) == [200] * 3
    assert gateway.get().headers["x-quota-warning"] == f'"monthly";at=0.9;r=1;t={11 * HOUR}'
    assert "quota monthly: client:acme has used 5 of 10 tokens, 50 %" in caplog.text
    figures = gateway.call("GET", "/metrics").json()["rate_limiter"]["quota_warnings"]
    assert figures == {"monthly": 2}
    text = gateway.call("GET", "/metrics?format=prometheus").body.decode()
    assert 'gateway_quota_warnings_total{limit="monthly"} 2.0' in text
    eventually(lambda: len(receiver.requests) == 2, "both events are delivered")
    events = [json.loads(request.body) for request in receiver.requests]
    assert [event["data"]["share"] for event in events] == [0.5, 0.9]
    assert events[0] == {
        "type": "quota.warning",
        "timestamp": "2027-01-31T12:00:00.000Z",
        "data": {
            "limit": "monthly",
            "holder": "client:acme",
            "share": 0.5,
            "used": 5.0,
            "quota": 10.0,
            "period_start": int(NOON) - 30 * 24 * HOUR - 13 * HOUR,
            "period_end": int(NOON) + 11 * HOUR,
        },
    }
    first = receiver.requests[0]
    fields = {name.decode().lower(): value.decode() for name, value in first.headers}
    signed = Verifier(SECRET).sign(fields["webhook-id"], datetime.fromtimestamp(NOON, UTC), first.body.decode())
    assert signed == fields["webhook-signature"]
    gateway.call("POST", "/clients/acme/quotas/monthly/reset")
    assert gateway.statuses(5) == [200] * 5
    eventually(lambda: len(receiver.requests) == 3, "after a reset, the same share is reached again")
    gateway.call("POST", "/clients/acme/quotas/monthly/carry-over", {"amount": 10})
    assert gateway.statuses(5) == [200] * 5
    eventually(lambda: len(receiver.requests) == 4, "so it is when half of a larger allowance is used")
    gateway.clocks.advance(11 * HOUR)
    assert gateway.statuses(5) == [200] * 5
    eventually(lambda: len(receiver.requests) == 5, "the next month's event is delivered")
    ids = [request.all("webhook-id")[0] for request in receiver.requests]
    assert len(set(ids)) == 5
    shares = [json.loads(request.body)["data"]["share"] for request in receiver.requests]
    assert shares == [0.5, 0.9, 0.5, 0.5, 0.5]
    assert gateway.call("GET", "/metrics").json()["rate_limiter"]["quota_warnings"] == {"monthly": 5}
    receiver.close()


def test_a_warning_that_could_not_be_delivered_is_delivered_after_a_restart(
    gateways: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Once: the peak is durable, so nothing else would tell of it; a reset before the restart counts after it, too."""
    receiver = RawUpstream(reply(status=b"503 Down"))
    webhook = {"url": f"{receiver.url}/hook", "secret": SECRET}
    first = gateways(MONTHLY | {"warn_at": [0.5]}, webhook=webhook)
    assert first.statuses(5) == [200] * 5
    first.call("POST", "/clients/acme/quotas/monthly/reset")
    assert first.statuses(5) == [200] * 5
    eventually(lambda: bool(receiver.requests), "it is tried")
    first.stop()
    first.stop = lambda: None
    assert "webhook: 2 events wait, and are sent after the next start" in caplog.text
    receiver.behave = reply(status=b"204 No Content")
    tried = len(receiver.requests)
    second = gateways(MONTHLY | {"warn_at": [0.5]}, webhook=webhook)
    eventually(lambda: len(receiver.requests) == tried + 2, "both are delivered")
    second.call("POST", "/clients/acme/quotas/monthly/reset")
    assert second.statuses(5) == [200] * 5
    eventually(lambda: len(receiver.requests) == tried + 3, "the next reset begins another event")
    ids = [request.all("webhook-id")[0] for request in receiver.requests]
    assert (len(set(ids)), ids[0]) == (3, ids[tried])
    receiver.close()


def test_operators_see_quotas_and_add_top_ups(gateways: Any) -> None:
    gateway = gateways(MONTHLY, {"name": "by-address", "key": "address", "quota": 1000, "period": "day"})
    assert gateway.statuses(10) == [200] * 10
    assert gateway.quota() == {
        "limit": "monthly",
        "route": None,
        "period": "month",
        "time_zone": "Europe/Berlin",
        "starts": "calendar",
        "quota": 10,
        "used": 10,
        "remaining": 0,
        "carried_over": 0,
        "top_up": 0,
        "top_up_expires": None,
        "period_start": "2026-12-31T23:00:00.000+00:00",
        "period_end": "2027-01-31T23:00:00.000+00:00",
    }
    added = gateway.call("POST", "/clients/acme/quotas/monthly/top-up", {"amount": 3})
    assert (added.status, added.json()["remaining"], added.json()["top_up"]) == (200, 3, 3)
    assert added.json()["top_up_expires"] == "2027-01-31T23:00:00.000+00:00"
    assert gateway.statuses(4) == [200] * 3 + [429]
    kept = {"amount": 5, "expires": "2027-02-10T00:00:00+01:00"}
    assert gateway.call("POST", "/clients/acme/quotas/monthly/top-up", kept).json()["top_up"] == 5
    assert gateway.call("POST", "/clients/acme/quotas/monthly/carry-over", {"amount": 2}).json()["remaining"] == 7
    assert gateway.statuses(3) == [200] * 3
    gateway.clocks.advance(11 * HOUR)
    assert gateway.quota()["remaining"] == 14  # 10, and 4 of the top-up
    assert gateway.call("POST", "/clients/acme/quotas/monthly/reset").json()["used"] == 0
    entries = gateway.call("GET", "/audit").json()["entries"]
    assert [(one["action"], one["subject"]) for one in entries] == [("quota_changed", "acme")] * 4


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (
            "nothing/top-up",
            {"amount": 1},
            "The client has no quota 'nothing'; its quotas that count by client are: monthly.",
        ),
        ("monthly/top-up", {"amount": 1, "expires": "2027-01-31T12:00:00Z"}, "body.expires: must be in the future"),
        ("monthly/top-up", {"amount": 0}, "amount"),
        ("monthly/carry-over", {"amount": -1}, "amount"),
        ("monthly/carry-over", {}, "amount"),
    ],
)
def test_an_invalid_change_is_refused_and_says_why(gateways: Any, path: str, body: Any, message: str) -> None:
    gateway = gateways(MONTHLY)
    refused = gateway.call("POST", f"/clients/acme/quotas/{path}", body)
    assert refused.status == 422
    assert message in refused.json()["detail"]
    assert gateway.quota()["remaining"] == 10


def test_a_tier_may_have_its_own_quota_and_keeps_what_was_used(gateways: Any) -> None:
    tiers = {"FREE": {"rate": 1000, "capacity": 100_000}, "PREMIUM": {"rate": 1000, "capacity": 100_000}}
    gateway = gateways(
        {"name": "monthly", "period": "month", "tiers": {"FREE": {"quota": 3}, "PREMIUM": {"quota": 5}}}, tiers=tiers
    )
    assert gateway.statuses(4) == [200] * 3 + [429]
    assert gateway.call("POST", "/clients/acme/tier", {"tier": "PREMIUM"}).status == 200
    assert gateway.statuses(3) == [200] * 2 + [429]
    shown = gateway.call("GET", "/limits").json()["limits"][-1]
    assert [(one["tier"], one["quota"], one["period"]) for one in shown["allowances"]] == [
        ("FREE", 3, "month"),
        ("PREMIUM", 5, "month"),
    ]


def test_explain_names_the_quota_that_would_refuse_and_charges_nothing(gateways: Any) -> None:
    gateway = gateways(MONTHLY)
    gateway.statuses(9)
    question = {"method": "GET", "path": "/api/x", "client_id": "acme", "address": "127.0.0.1"}
    for _ in range(2):
        assert gateway.call("POST", "/explain", question).json()["result"]["decision"] == "allowed"
    assert gateway.get().status == 200
    said = gateway.call("POST", "/explain", question).json()
    assert said["result"]["decision"] == "limited"
    assert said["result"]["retry_after_seconds"] == 11 * HOUR


def test_a_candidate_of_a_quota_is_counted_in_its_own_periods_and_refuses_nothing(gateways: Any) -> None:
    gateway = gateways(MONTHLY | {"candidate": {"quota": 3}, "warn_at": [0.5]})
    assert gateway.statuses(5) == [200] * 5
    assert gateway.statuses(2, "other") == [200] * 2
    recorder = gateway.running.live.recorder
    assert recorder.would_refuse["FREE"] == recorder.candidate_refusals["monthly", "FREE"] == 2
    assert recorder.quota_warnings["monthly"] == 1, "of the quota in force alone"
    assert (gateway.quota()["used"], gateway.quota()["remaining"]) == (5, 5)
    gateway.clocks.advance(11 * HOUR)
    assert gateway.statuses(4) == [200] * 4
    assert recorder.candidate_refusals["monthly", "FREE"] == 3, "the period of the candidate has begun anew"


def test_quotas_survive_a_restart(gateways: Any) -> None:
    first = gateways(MONTHLY)
    assert first.statuses(7) == [200] * 7
    first.stop()
    second = gateways(MONTHLY)
    first.stop = lambda: None
    assert second.statuses(4) == [200] * 3 + [429]


@pytest.mark.parametrize(
    ("limit", "place", "message"),
    [
        ({"quota": 5}, "limits[0]", "a quota needs a period: hour, day, week or month"),
        ({"period": "day"}, "limits[0]", "a period needs a quota, in tokens in each day"),
        ({"quota": 5, "period": "year"}, "limits[0].period", "must be one of hour, day, week, month, got 'year'"),
        (
            {"quota": 5, "period": "day", "time_zone": "Europe/Berln"},
            "limits[0].time_zone",
            "did you mean 'Europe/Berlin'?",
        ),
        ({"quota": 5, "period": "day", "time_zone": "Mars"}, "limits[0].time_zone", "no such time zone"),
        ({"quota": 5, "period": "day", "warn_at": [0.5, 1.5]}, "limits[0].warn_at[1]", "1.5"),
        ({"quota": 5, "period": "day", "warn_at": [0]}, "limits[0].warn_at[0]", "greater than 0"),
        ({"quota": 0, "period": "day"}, "limits[0].quota", "0"),
        ({"quota": 5, "period": "day", "candidate": {"quota": 0}}, "limits[0].candidate.quota", "0"),
        ({"quota": 5, "period": "day", "candidate": {"rate": 1, "capacity": 3}}, "limits[0]", "of a quota, it has"),
        ({"rate": 1, "capacity": 5, "candidate": {"quota": 3}}, "limits[0]", "needs quota beside it, got 3"),
        (
            {"quota": 5, "period": "day", "candidate": {"quota": 3, "concurrent": 2}},
            "limits[0].candidate",
            "must have either rate and capacity, or quota, or concurrent, got quota, concurrent",
        ),
        ({"rate": 1, "capacity": 5, "warn_at": [0.5]}, "limits[0]", "warn_at is for quotas"),
        ({"rate": 1, "capacity": 5, "quota": 5, "period": "day"}, "limits[0]", "write two limits"),
        ({"quota": 5, "period": "day", "cost": 6}, "limits[0]", "must be at least the limit's cost, 6"),
    ],
)
def test_a_mistake_in_a_quota_names_place_value_and_remedy(
    tmp_path: Path, limit: dict[str, Any], place: str, message: str
) -> None:
    file = tmp_path / "gateway.yaml"
    sections = in_front_of("http://127.0.0.1:1") | {"limits": [{"name": "monthly"} | limit]}
    file.write_text(yaml.safe_dump(sections))
    with pytest.raises(ConfigError) as error:
        load_config(file)
    text = str(error.value)
    assert message in text
    assert place.partition(".")[0] in text


def test_a_webhook_without_a_secret_is_a_mistake_and_a_quota_in_a_cluster_is_none() -> None:
    sections = in_front_of("http://127.0.0.1:1")
    GatewayConfig.model_validate(sections | {"limits": [MONTHLY], "store": {"url": "redis+cluster://h:1"}})
    with pytest.raises(ValueError, match="needs a secret or a secret_file"):
        GatewayConfig.model_validate(sections | {"webhook": {"url": "https://receiver.example/hook"}})
    with pytest.raises(ValueError, match="must be 24 to 64 random bytes"):
        GatewayConfig.model_validate(sections | {"webhook": {"url": "https://r.example/", "secret": "short"}})


@pytest.mark.parametrize(
    "time", ["9999-12-31T23:59:59-12:00", "9999-12-31T23:59:59.9999999Z", "0001-01-01T00:00:00+12:00"]
)
def test_a_time_that_cannot_be_shown_in_utc_is_refused_and_changes_nothing(gateways: Any, time: str) -> None:
    gateway = gateways(MONTHLY)
    gateway.get()
    before = gateway.quota()
    client = "/clients/acme"
    for path, body in (
        (f"{client}/quotas/monthly/top-up", {"amount": 5, "expires": time}),
        (f"{client}/grants", {"tier": "PREMIUM", "until": time}),
        (f"{client}/keys", {"expires_at": time}),
    ):
        answer = gateway.call("POST", path, body)
        assert (answer.status, "1970-01-01T00:00:00Z to 9999-12-31T23:59:59Z" in answer.json()["detail"]) == (
            422,
            True,
        )
    assert gateway.quota() == before
    assert gateway.call("GET", client).status == 200
    last = {"amount": 5, "expires": "9999-12-31T23:59:59Z"}
    assert gateway.call("POST", f"{client}/quotas/monthly/top-up", last).json()["top_up"] == 5


def test_the_sum_of_top_ups_is_limited(gateways: Any) -> None:
    gateway = gateways(MONTHLY)
    path, most = "/clients/acme/quotas/monthly/top-up", {"amount": 10**12}
    assert gateway.call("POST", path, most).status == 200
    refused = gateway.call("POST", path, {"amount": 1})
    assert (refused.status, refused.json()["reason"]) == (422, "invalid_value")
    assert "1e+12 tokens are left of earlier top-ups" in refused.json()["detail"]
    assert gateway.quota()["top_up"] == 10**12


@pytest.mark.parametrize("amount", [True, "5", 1.5, None])
@pytest.mark.parametrize("action", ["top-up", "carry-over"])
def test_an_amount_is_a_whole_number(gateways: Any, action: str, amount: Any) -> None:
    gateway = gateways(MONTHLY)
    answer = gateway.call("POST", f"/clients/acme/quotas/monthly/{action}", {"amount": amount})
    assert (answer.status, answer.json()["detail"][:12]) == (422, "body.amount:")
    assert gateway.quota()["remaining"] == 10


def test_the_list_of_limits_counts_the_counters_of_quotas(gateways: Any) -> None:
    gateway = gateways(MONTHLY, {"name": "own", "rate": 10, "capacity": 100})
    assert [gateway.get(name).status for name in "abc"] == [200] * 3
    listed = {one["name"]: one["buckets"] for one in gateway.call("GET", "/limits").json()["limits"]}
    assert (listed["monthly"], listed["own"]) == (3, 3)


def test_invented_ids_never_refuse_a_registered_client_nor_one_with_a_key(gateways: Any) -> None:
    gateway = gateways(
        {"name": "monthly", "quota": 3, "period": "month"},
        store={"max_buckets": 4},
        address_limit={"rate": 0},
        clients={"acme": {}},
    )
    key = gateway.call("POST", "/clients/shop/keys", {}).json()["key"]
    for number in range(200):
        gateway.get(f"invented-{number}")
    assert gateway.statuses(4) == [200, 200, 200, 429]
    with_key = [ask(f"{gateway.running.url}/api/x", headers={"X-API-Key": key}).status for _ in range(4)]
    assert with_key == [200, 200, 200, 429]
    for number in range(200, 300):
        gateway.get(f"invented-{number}")
    assert (gateway.quota()["remaining"], gateway.quota("shop")["remaining"]) == (0, 0)
    assert gateway.get().status == 429
    listed = {one["name"]: one["buckets"] for one in gateway.call("GET", "/limits").json()["limits"]}
    assert listed["monthly"] == 6, "two of registered clients, and four of invented ids"
    assert gateway.call("POST", "/clients/invented-299/quotas/monthly/top-up", {"amount": 1}).status == 200


def test_a_snapshot_has_what_is_left_of_buckets_and_quotas(gateways: Any) -> None:
    gateway = gateways(MONTHLY)
    assert gateway.statuses(3) == [200] * 3
    found = gateway.call("GET", "/limits/snapshot").json()
    ((process, buckets),) = found["buckets"].items()
    assert buckets["client:acme"] > found["at_ns"] > 0
    ((key, unit, *_),) = found["counters"]
    assert (key, unit, found["format"]) == ("limit:monthly:client:acme", "month", 1)
    gateway.clocks.advance(10**6)
    assert gateway.call("GET", "/limits/snapshot").json()["buckets"] == {process: {}}, "all are full"
    assert ask(f"{gateway.running.url}/limits/snapshot").status in (401, 403)
