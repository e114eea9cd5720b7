"""The page on calendar quotas: its recipes do what it says, and its numbers are right."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import yaml
from joserfc import jwt
from joserfc.jwk import OctKey

from api_gateway.limits.period_counters import OVERFLOW_COUNTERS
from api_gateway.limits.period_store import QUOTA_WRITE_INTERVAL, QUOTAS_FILE
from api_gateway.limits.quota_state import KEPT, KEPT_LONGER
from api_gateway.settings.limits import LimitSection
from api_gateway.transport.webhook_events import MAX_QUEUED
from api_gateway.transport.webhooks import FIRST_DELAY, MAX_ATTEMPTS, MAX_WEBHOOK_DELAY
from tests.kit import FakeClocks, RawUpstream, RunningGateway, ask, eventually, in_front_of, reply, running_gateway

PAGE = (Path(__file__).parents[2] / "docs" / "quotas.md").read_text()
RECIPES = {
    title: yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)[0])
    for title, text in re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", PAGE, flags=re.DOTALL | re.MULTILINE)
}
SECRET = "0123456789abcdef0123456789abcdef"


def at(text: str, zone: str = "UTC") -> float:
    """Return seconds since the epoch."""
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


def spend(running: RunningGateway, count: int, **headers: str) -> list[int]:
    """Send requests; return their statuses."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return [ask(f"{running.url}/api/chat", headers=fields).status for _ in range(count)]


def sections(title: str, up: RawUpstream, **more: Any) -> dict[str, Any]:
    """Return a configuration with a recipe."""
    rates = {name: {"rate": 1000, "capacity": 1_000_000} for name in ("FREE", "PREMIUM")}
    front = in_front_of(up.url) | {"tiers": rates, "address_limit": {"rate": 0}}
    front["routes"] = [{"name": "chat", "path": "/api/chat", "upstream": "up"}]
    front |= RECIPES[title]
    return front | more


def test_each_recipe_has_a_test() -> None:
    assert set(RECIPES) == {
        "Ten thousand a month",
        "A quota for each tier, and a rate",
        "From the day of the contract",
        "Tokens of a language model for an organisation",
    }


def test_ten_thousand_a_month(tmp_path: Path, up: RawUpstream) -> None:
    clocks = FakeClocks(wall=at("2027-01-31 23:59:00", "Europe/Berlin"))
    up.behave = reply(headers=((b"X-Gateway-Cost", b"5000"),))
    with running_gateway(sections("Ten thousand a month", up), tmp_path, clocks.clocks) as running:
        assert spend(running, 3, X_Client_ID="acme") == [200, 200, 429]
        assert ask(f"{running.url}/api/chat", headers={"X-Client-ID": "acme"}).headers["retry-after"] == "60"
        clocks.advance(60)
        assert spend(running, 3, X_Client_ID="acme") == [200, 200, 429]


def test_a_quota_for_each_tier_and_a_rate(tmp_path: Path, up: RawUpstream) -> None:
    clocks = FakeClocks(wall=at("2027-03-13 23:00:00", "America/New_York"))
    more = {"clients": {"rich": {"tier": "PREMIUM"}}}
    with running_gateway(
        sections("A quota for each tier, and a rate", up, **more), tmp_path, clocks.clocks
    ) as running:
        assert spend(running, 21, X_Client_ID="acme") == [200] * 20 + [429]  # the bucket
        assert ask(f"{running.url}/api/chat", headers={"X-Client-ID": "acme"}).headers["retry-after"] == "1"
        for _ in range(4):
            clocks.advance(4)
            assert spend(running, 20, X_Client_ID="acme") == [200] * 20
        clocks.advance(4)
        assert spend(running, 1, X_Client_ID="acme") == [429]  # the quota
        refused = ask(f"{running.url}/api/chat", headers={"X-Client-ID": "acme"})
        assert refused.headers["retry-after"] == str(3600 - 20)
        assert spend(running, 1, X_Client_ID="rich") == [200]
        clocks.advance(3600 - 20)
        assert spend(running, 20, X_Client_ID="acme") == [200] * 20


def test_from_the_day_of_the_contract(tmp_path: Path, up: RawUpstream) -> None:
    clocks = FakeClocks(wall=at("2027-01-31 08:00:00"))
    up.behave = reply(headers=((b"X-Gateway-Cost", b"500"),))
    with running_gateway(sections("From the day of the contract", up), tmp_path, clocks.clocks) as running:
        assert spend(running, 3, X_Client_ID="acme") == [200, 200, 429]
        for now, earlier in (("2027-02-28", "2027-01-31"), ("2027-03-31", "2027-02-28"), ("2027-04-30", "2027-03-31")):
            clocks.advance(at(f"{now} 08:00:00") - at(f"{earlier} 08:00:00") - 1)
            assert spend(running, 1, X_Client_ID="acme") == [429]
            clocks.advance(1)
            assert spend(running, 3, X_Client_ID="acme") == [200, 200, 429]
        clocks.advance(31 * 86_400)
        up.behave = reply(headers=((b"X-Gateway-Cost", b"100"),))
        assert spend(running, 1, X_Client_ID="acme") == [200]
        clocks.advance(30 * 86_400)
        assert spend(running, 13, X_Client_ID="acme") == [200] * 12 + [429]  # 200 of 900 are carried over


def test_tokens_of_a_language_model_for_an_organisation(tmp_path: Path, up: RawUpstream) -> None:
    receiver = RawUpstream(reply(status=b"204 No Content"))
    title = "Tokens of a language model for an organisation"
    webhook = RECIPES[title]["webhook"] | {"url": receiver.url}
    (shown,) = RECIPES[title]["identity"]["jwt"]["issuers"].values()
    issuer = {name: value for name, value in shown.items() if name != "jwks_url"} | {"secret": SECRET}
    identity = {"sources": ["jwt"], "jwt": {"issuers": {"own": issuer}}}
    clocks = FakeClocks(wall=at("2027-01-31 12:00:00"))

    def token(subject: str) -> str:
        claims = {
            "iss": issuer["issuer"],
            "aud": "gateway",
            "sub": subject,
            "org": "acme",
            "exp": clocks.clocks.wall() + 9,
        }
        return f"Bearer {jwt.encode({'alg': 'HS256'}, claims, OctKey.import_key(SECRET))}"

    up.behave = reply(headers=((b"X-Gateway-Cost", b"1000000"),))
    front = sections(title, up, webhook=webhook, identity=identity)
    with running_gateway(front, tmp_path, clocks.clocks) as running:
        assert spend(running, 1, Authorization=token("ann")) == [200]
        assert spend(running, 1, Authorization=token("bob")) == [200]
        assert spend(running, 1, Authorization=token("ann")) == [429]
        assert spend(running, 1, X_Client_ID="stranger") == [401]
        eventually(lambda: len(receiver.requests) == 2, "both warnings are delivered")
    events = [json.loads(request.body)["data"] for request in receiver.requests]
    assert [(event["holder"], event["share"]) for event in events] == [("acme", 0.8), ("acme", 0.95)]
    receiver.close()


def test_the_numbers_of_the_page_are_those_of_the_code() -> None:
    assert (KEPT, KEPT_LONGER) == (2, 86_400)  # two periods and a day
    assert f"written every {QUOTA_WRITE_INTERVAL:g} s" in PAGE
    assert f"`{QUOTAS_FILE}`" in PAGE
    assert f"share {OVERFLOW_COUNTERS:,} counters" in PAGE
    assert f"At most {MAX_QUEUED:,} events wait" in PAGE
    assert (FIRST_DELAY, MAX_WEBHOOK_DELAY, MAX_ATTEMPTS) == (1, 15 * 60, 12)
    defaults = LimitSection(name="x", quota=1, period="day")
    for name, shown in re.findall(
        r"^\| `(time_zone|starts|carry_over)` \|.*\| `?(\w+)`? \|$", PAGE, flags=re.MULTILINE
    ):
        assert str(getattr(defaults, name)) == shown


def test_the_months_of_the_page_are_those_of_the_calendar() -> None:
    event = json.loads(re.findall(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)[0])["data"]
    assert datetime.fromtimestamp(event["period_start"], UTC) == datetime(2026, 12, 31, 23, tzinfo=UTC)
    assert datetime.fromtimestamp(event["period_end"], UTC) == datetime(2027, 1, 31, 23, tzinfo=UTC)
