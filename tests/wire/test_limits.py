"""Limits beside those of the tiers, on the wire: by route, header field, organisation and tuples; their operation."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import OctKey

from api_gateway.config import load_config
from api_gateway.settings.diagnostics import ConfigError, path_text
from api_gateway.settings.rules import find_warnings
from tests.kit import Answer, RawUpstream, RunningGateway, ask, in_front_of, reply

ODD = {"X-Odd": " two blanks"}
TOKEN = {"Authorization": "Bearer operator"}
SECRET = "0123456789abcdef0123456789abcdef"
SLOW = {"rate": 0.001, "capacity": 3}
LIMITS: list[dict[str, Any]] = [
    {"name": "Login", "key": "address", **SLOW, "routes": ["login"], "methods": ["post"], "cost": 1},
    {"name": "tenant", "key": ["header:X-Tenant"], "rate": 0.001, "capacity": 4, "routes": ["tenants"]},
    {"name": "org", "key": "organisation", "rate": 0.001, "capacity": 5},
    {"name": "team", "key": "claim:team.id", "rate": 0.001, "capacity": 6, "routes": ["teams"]},
    {
        "name": "exports",
        "key": ["client", "route"],
        "tiers": {"FREE": {"rate": 0.001, "capacity": 2}, "PREMIUM": None},
        "rate": 0.001,
        "capacity": 7,
        "routes": ["exports", "reports"],
    },
    {"name": "own", "tiers": {"FREE": {"rate": 0.001, "capacity": 8}, "PREMIUM": {"rate": 0.001, "capacity": 16}}},
]


def sections_with(limits: list[dict[str, Any]], url: str, **more: Any) -> dict[str, Any]:
    sections = in_front_of(url) | {"limits": limits}
    names = ("login", "tenants", "teams", "exports", "reports")
    sections["routes"] += [{"name": name, "path": f"/api/{name}", "upstream": "up"} for name in names]
    return sections | more


@pytest.fixture(scope="module")
def sections(shared: RawUpstream) -> dict[str, Any]:
    issuer = {
        "issuer": "https://issuer.example",
        "audiences": ["gateway"],
        "secret": SECRET,
        "organisation_claim": "org",
    }
    sections = sections_with(
        LIMITS,
        shared.url,
        admin={"token": "operator", "local": False},
        identity={"sources": ["jwt", "header", "address"], "jwt": {"issuers": {"own": issuer}}},
        clients={"rich": {"tier": "PREMIUM"}, "poor": {"tier": "SCARCE"}},
    )
    sections["tiers"]["SCARCE"] = {"rate": 0.001, "capacity": 2}
    return sections


def token(subject: str, **claims: Any) -> dict[str, str]:
    stated = {"iss": "https://issuer.example", "aud": "gateway", "sub": subject, "exp": int(time.time()) + 600}
    encoded = jwt.encode({"alg": "HS256"}, stated | claims, OctKey.import_key(SECRET))
    return {"Authorization": f"Bearer {encoded}"}


@pytest.fixture
def get(running: RunningGateway, up: RawUpstream) -> Callable[..., Answer]:
    up.behave = reply()

    def get(path: str, method: str = "GET", **headers: str) -> Answer:
        return ask(f"{running.url}{path}", method=method, headers=headers)

    return get


Get = Callable[..., Answer]


def statuses(get: Get, count: int, path: str, method: str = "GET", **headers: str) -> list[int]:
    return [get(path, method, **headers).status for _ in range(count)]


@pytest.mark.parametrize("extra", [{}, ODD], ids=["fast path", "ASGI path"])
def test_a_limit_by_header_field_and_route(get: Get, extra: dict[str, str]) -> None:
    extra = extra | {"X-Client-ID": f"many-{len(extra)}"}
    red, blue = ({"X-Tenant": f"{name}-{len(extra)}", **extra} for name in ("red", "blue"))
    assert statuses(get, 5, "/api/tenants", **red) == [200] * 4 + [429]
    assert get("/api/tenants", **blue).status == 200
    assert get("/api/x", **red).status == 200, "another route"
    assert get("/api/tenants", **extra).status == 200, "without the field the limit does not apply"


def test_a_limit_by_address_holds_for_invented_ids_of_a_route_and_method(get: Get) -> None:
    made = [get("/api/login", "POST", **{"X-Client-ID": f"invented-{number}"}).status for number in range(5)]
    assert made == [200, 200, 200, 429, 429]
    assert get("/api/login", **{"X-Client-ID": "invented-1"}).status == 200
    for path in ("/api//login", "/api/x/../login", "/api/x;/..%2flogin", "/api/%6cogin"):
        assert get(path, "POST", **{"X-Client-ID": "invented-2"}).status != 200, "no spelling avoids the limit"


def test_a_refusal_names_the_limit_and_its_fields_are_those_of_the_tightest(get: Get) -> None:
    me = {"X-Client-ID": "me"}
    first = get("/api/exports", **me)
    assert first.headers["ratelimit-policy"] == ('"free";q=100000;w=100, "exports";q=2;w=2000, "own";q=8;w=8000')
    assert first.headers["ratelimit"] == '"exports";r=1;t=1000'
    assert first.headers["x-ratelimit-limit"] == "2"
    assert statuses(get, 2, "/api/exports", **me) == [200, 429]
    refused = get("/api/exports", **me)
    problem = json.loads(refused.body)
    assert (problem["policy"], problem["violated-policies"]) == ("exports", ["exports"])
    assert problem["detail"].startswith("Limit 'exports' allows 2 tokens at once and 0.001 per second")
    assert refused.headers["ratelimit-policy"] == first.headers["ratelimit-policy"]
    assert statuses(get, 3, "/api/reports", **me) == [200, 200, 429], "each route has a bucket"
    assert statuses(get, 8, "/api/exports", **{"X-Client-ID": "rich"}) == [200] * 7 + [429], "tiers differ"


def test_an_organisation_and_a_claim_are_shared_by_users(get: Get) -> None:
    users = [token(f"user-{number}", org="acme", team={"id": 7}) for number in range(3)]
    made = [get("/api/x", **user).status for _ in range(2) for user in users]
    assert made == [200] * 5 + [429]
    assert get("/api/x", **token("user-9", org="other")).status == 200
    assert [get("/api/teams", **token(f"u{number}", team={"id": 7})).status for number in range(7)] == [200] * 6 + [
        429
    ]
    assert get("/api/teams", **token("u9", team={"id": 8})).status == 200


def test_operators_see_and_fill_the_buckets_of_each_limit(get: Get, running: RunningGateway) -> None:
    me = {"X-Client-ID": "seen"}
    assert statuses(get, 3, "/api/exports", **me) == [200, 200, 429]
    shown = json.loads(get("/clients/seen", **TOKEN).body)
    assert [(one["limit"], one["route"], int(one["tokens"])) for one in shown["limits"]] == [
        ("exports", "exports", 0),
        ("exports", "reports", 2),
        ("own", None, 6),
    ]
    filled = json.loads(get("/clients/seen/reset", "POST", **TOKEN).body)
    assert {one["limit"]: one["tokens_after"] for one in filled["limits"]} == {"exports": 2, "own": 8}
    assert get("/api/exports", **me).status == 200
    moved = ask(
        f"{running.url}/clients/seen/tier",
        method="POST",
        headers=TOKEN | {"Content-Type": "application/json"},
        body=b'{"tier": "PREMIUM"}',
    )
    assert moved.status == 200
    shown = json.loads(get("/clients/seen", **TOKEN).body)
    (own,) = (one for one in shown["limits"] if one["limit"] == "own")
    assert (own["capacity"], int(own["tokens"])) == (16, 14), "the filled fraction stays"


def test_each_limit_that_refuses_shows_the_bucket_and_a_tier_its_clients(get: Get) -> None:
    def shown() -> dict[str, dict[str, int]]:
        limits = json.loads(get("/limits", **TOKEN).body)["limits"]
        return {one["name"]: {heavy["value"]: heavy["refusals"] for heavy in one["heaviest"]} for one in limits}

    me = {"X-Client-ID": "twice"}
    assert statuses(get, 2, "/api/exports", **me) == [200, 200]
    assert statuses(get, 6, "/api/x", **me) == [200] * 6
    refused = get("/api/exports", **me)
    assert json.loads(refused.body)["violated-policies"] == ["exports", "own"]
    assert statuses(get, 2, "/api/x", **me) == [429, 429]
    found = shown()
    assert (found["exports"]["FREE:client:twice|exports"], found["own"]["client:twice"]) == (1, 3)
    assert "twice" not in found["free"], "the tier has not refused it"
    assert statuses(get, 4, "/api/x", **{"X-Client-ID": "poor"}) == [200, 200, 429, 429]
    assert (shown()["scarce"], shown()["free"]) == ({"poor": 2}, found["free"])


def test_limits_and_tiers_are_listed(get: Get) -> None:
    listed = {one["name"]: one for one in json.loads(get("/limits", **TOKEN).body)["limits"]}
    assert list(listed)[-6:] == ["Login", "tenant", "org", "team", "exports", "own"]
    assert listed["free"]["kind"] == "tier"
    assert listed["address"]["configured_at"] == "address_limit"
    exports = listed["exports"]
    assert (exports["configured_at"], exports["key"], exports["routes"]) == (
        "limits[4]",
        ["client", "route"],
        ["exports", "reports"],
    )
    assert [(one["tier"], one["capacity"]) for one in exports["allowances"]] == [("FREE", 2), ("PREMIUM", 7)]
    before = listed["tenant"]["refusals"]
    assert 429 in statuses(get, 5, "/api/tenants", **{"X-Tenant": "heavy"})
    tenant = next(one for one in json.loads(get("/limits", **TOKEN).body)["limits"] if one["name"] == "tenant")
    assert tenant["refusals"] == before + 1
    assert tenant["buckets"] >= 1
    assert "heavy" in [one["value"] for one in tenant["heaviest"]]
    tiers = {one["name"]: one for one in json.loads(get("/tiers", **TOKEN).body)["tiers"]}
    assert (tiers["FREE"]["default"], tiers["FREE"]["limits"]) == (
        True,
        ["Login", "tenant", "org", "team", "exports", "own"],
    )
    assert tiers["BASIC"]["limits"] == ["Login", "tenant", "org", "team"]
    scraped = get("/metrics?format=prometheus", **TOKEN).body.decode()
    assert 'gateway_rate_limit_refusals_total{limit="tenant",tier="FREE"}' in scraped


def test_an_explanation_has_each_limit_and_why_others_do_not_apply(get: Get, running: RunningGateway) -> None:
    def explained(**described: Any) -> dict[str, Any]:
        body = json.dumps({"client_id": "told", "path": "/api/tenants", **described}).encode()
        headers = TOKEN | {"Content-Type": "application/json"}
        answer = ask(f"{running.url}/explain", method="POST", headers=headers, body=body)
        assert answer.status == 200, answer.body
        told: dict[str, Any] = json.loads(answer.body)
        return told

    told = explained(headers={"X-Tenant": "told"}, organisation="told", claims={"team.id": "1"})
    assert [one["policy"] for one in told["buckets"]] == ["free", "tenant", "org", "own"]
    assert told["limiting_bucket"] == "limit:tenant:told"
    assert {one["name"]: one["detail"] for one in told["limits_not_applied"]} == {
        "Login": "not for the method GET",
        "team": "not for the route",
        "exports": "not for the route",
    }
    for _ in range(4):
        assert get("/api/tenants", **{"X-Client-ID": "told", "X-Tenant": "told"}).status == 200
    told = explained(headers={"X-Tenant": "told"})
    refused = get("/api/tenants", **{"X-Client-ID": "told", "X-Tenant": "told"})
    assert (told["result"]["status"], told["result"]["detail"][:30]) == (
        refused.status,
        json.loads(refused.body)["detail"][:30],
    )
    assert {one["name"] for one in told["limits_not_applied"]} == {"Login", "org", "team", "exports"}


# Mistakes


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"name": "Free"}, "limits[0] (Free).name: is also the name of the tier FREE, and responses name limits"),
        ({"name": "address"}, "limits[0] (address).name: is also the name of the address limit"),
        ({"key": "adress"}, "limits[0].key[0]: must be client, address, organisation, route, header: with the name"),
        ({"key": "claim:x"}, "limits[0] (one).key[0]: needs jwt in identity.sources, as only tokens have claims"),
        ({"key": "organisation"}, "limits[0] (one).key[0]: needs jwt in identity.sources"),
        ({"key": "header:Cookie"}, "limits[0] (one).key[0]: may have a credential; use client, got 'header:Cookie'"),
        ({"key": "header:x-client-id"}, "limits[0] (one).key[0]: names the client; use client"),
        ({"key": ["client", "client"]}, "limits[0].key: must not name a part twice"),
        ({"tiers": ["gold"]}, "limits[0] (one).tiers.GOLD: no such tier, got 'GOLD'; the tiers are FREE,"),
        ({"tiers": ["free", "FREE"]}, "limits[0].tiers: must not name a tier twice"),
        ({"routes": ["al"]}, "limits[0] (one).routes[0]: no such route, got 'al'; did you mean 'all'?"),
        ({"methods": ["CONNECT"]}, "limits[0] (one).methods[0]: is never proxied, so it is never limited"),
        ({"routes": ["reads"], "methods": ["PUT"]}, "limits[0] (one).methods[0]: none of the routes (reads) takes"),
        ({"cost": 11}, "limits[0] (one).capacity: must be at least the limit's cost, 11, or no request is allowed"),
        ({"capacity": 4}, "limits[0] (one).capacity: must be at least 5, the cost of route 'reads', or none of its"),
        (
            {"rate": None, "capacity": None, "tiers": {"FREE": {"rate": 1, "capacity": 4}}},
            "limits[0] (one).tiers.FREE.capacity: must be at least 5, the cost of route 'reads', or none of its",
        ),
        ({"rate": None, "capacity": None}, "limits[0] (one): needs rate and capacity"),
        ({"capacity": None}, "limits[0]: needs capacity too"),
        ({"rate": 1e-9}, "limits[0]: the bucket must fill within"),
        ({"tiers": {"FREE": {"rate": 1}}}, "limits[0].tiers.FREE: needs capacity too"),
        ({"capacity": 1.5e300}, "limits[0].capacity: is too large a number, got 1.5e+300"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_mistake_has_place_value_and_remedy(limit: dict[str, Any], message: str, tmp_path: Path) -> None:
    sections = in_front_of("http://127.0.0.1:9")
    sections["routes"].append({"name": "reads", "path": "/api/r", "upstream": "up", "cost": 5, "methods": ["GET"]})
    sections["limits"] = [{"name": "one", "key": "client", "rate": 1, "capacity": 10} | limit]
    path = tmp_path / "gateway.yaml"
    path.write_text(json.dumps(sections))
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    (problem,) = raised.value.problems
    assert message in problem
    assert problem.startswith(f"{path}:1: limits[0]")


@pytest.mark.parametrize(
    ("tiers", "limit", "warned"),
    [
        ({"FREE": 5, "BASIC": 100}, {}, ["tiers.FREE.capacity: is below 50, a cost of route 'export': the tier FREE"]),
        ({"FREE": 50, "BASIC": 100}, {}, []),
        (
            {"FREE": 100, "BASIC": 100},
            {"tiers": {"FREE": {"rate": 1, "capacity": 9}, "BASIC": {"rate": 1, "capacity": 60}}},
            ["limits[0].tiers.FREE.capacity: is below 50, a cost of route 'export': the tier FREE"],
        ),
        (
            {"FREE": 100, "BASIC": 100},
            {"period": "day", "quota": 40, "tiers": {"FREE": None, "BASIC": {"quota": 60}}},
            ["limits[0].quota: is below 50, a cost of route 'export': the tier FREE"],
        ),
        ({"FREE": 100, "BASIC": 100}, {"rate": 1, "capacity": 9, "cost": 1}, []),
        ({"FREE": 100, "BASIC": 100}, {"rate": 1, "capacity": 9, "routes": ["all"]}, []),
    ],
)
def test_a_cost_that_one_tier_cannot_pay_and_another_can_is_a_warning(
    tmp_path: Path, tiers: dict[str, int], limit: dict[str, Any], warned: list[str]
) -> None:
    """Requests of that tier get 403, which may be intended. What no tier can pay is a mistake."""
    sections = in_front_of("http://127.0.0.1:9")
    sections["tiers"] = {name: {"rate": 1, "capacity": capacity} for name, capacity in tiers.items()}
    sections["tiers"] |= {name: {"rate": 1, "capacity": 100} for name in ("PREMIUM", "ENTERPRISE")}
    costs = [{"methods": ["POST"], "cost": 50}]
    sections["routes"].append({"name": "export", "path": "/api/export", "upstream": "up", "costs": costs})
    sections["limits"] = [{"name": "one"} | limit] if limit else []
    path = tmp_path / "gateway.yaml"
    path.write_text(json.dumps(sections))
    found = [f"{path_text(one.path)}: {one.message}" for one in find_warnings(load_config(path))]
    assert len(found) == len(warned), found
    assert all(words in line for words, line in zip(warned, found, strict=True)), found


def test_names_of_limits_differ_in_more_than_letter_case(tmp_path: Path) -> None:
    limit = {"name": "one", "rate": 1, "capacity": 10}
    path = tmp_path / "gateway.yaml"
    path.write_text(json.dumps(in_front_of("http://127.0.0.1:9") | {"limits": [limit, limit | {"name": "ONE"}]}))
    with pytest.raises(ConfigError, match=r"\(ONE\)\.name: is also the name of limits\[0\].*than letter case"):
        load_config(path)


# All registered clients


def test_registered_clients_are_listed_in_pages(get: Get, running: RunningGateway) -> None:
    for number in range(7):
        answer = ask(
            f"{running.url}/clients/listed-{number}/tier",
            method="POST",
            headers=TOKEN | {"Content-Type": "application/json"},
            body=json.dumps({"tier": "BASIC" if number % 2 else "ENTERPRISE"}).encode(),
        )
        assert answer.status == 200

    def pages(**query: str) -> tuple[list[dict[str, Any]], int]:
        found: list[dict[str, Any]] = []
        after, count = "", 0
        while True:
            text = "&".join(f"{name}={value}" for name, value in {**query, "after": after}.items())
            page = get(f"/clients?{text}", **TOKEN).json()
            found, count = found + page["clients"], count + 1
            if page["next"] is None:
                return found, count
            after = page["next"]

    every, count = pages(tier="*", limit="2")
    listed = {one["client_id"]: one["tier"] for one in every}
    assert count >= len(every) / 2
    assert len(every) == len(listed)
    assert {f"listed-{number}" for number in range(7)} | {"rich"} <= listed.keys()
    assert all(one["tier_source"] in ("registered", "configured", "granted") for one in every)
    rich = next(one for one in every if one["client_id"] == "rich")
    assert (rich["tier"], rich["tier_source"], rich["keys"], rich["grant_until"]) == ("PREMIUM", "configured", 0, None)
    basic, _ = pages(tier="basic", limit="100")
    assert [one["client_id"] for one in basic] == ["listed-1", "listed-3", "listed-5"]
    assert get("/clients?tier=gold", **TOKEN).status == 422
    wrong = get("/clients?tier=*&after=nowhere", **TOKEN)
    assert (wrong.status, json.loads(wrong.body)["detail"]) == (422, "after: must be next of a page, got 'nowhere'.")
