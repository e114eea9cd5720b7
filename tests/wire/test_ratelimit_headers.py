"""The rate limit fields of responses, read by the parser of the RFC's editor (http-sf), on both paths."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any
from zoneinfo import ZoneInfo

import http_sf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api_gateway.limits.periods import Calendar
from api_gateway.limits.quota_state import PeriodQuota
from api_gateway.limits.ratelimit_headers import HEADER_NAMES, RateLimitHeaders
from api_gateway.models import NANOSECONDS, Charge, Decision, Quota
from api_gateway.rate_limiter import MemoryLimiter
from api_gateway.settings.rules import MAX_FILL
from tests.cases import each
from tests.kit import RawAnswer, RawClient, RawUpstream, RunningGateway, ask, in_front_of, reply

ODD = "X-Odd:  two blanks"  # which the general parser reads
WAYS = {"fast path": (), "general parser": (ODD,)}
START = 1_000 * NANOSECONDS
LARGEST = 10**15  # what an sf-integer stays below (RFC 9651 section 3.3.1)

Item = tuple[str, dict[str, Any]]


def items(values: list[bytes]) -> list[Item]:
    """Parse a list of strings with parameters, however many lines it came in."""
    parsed: Any = http_sf.parse(b", ".join(values), tltype="list")
    assert all(isinstance(name, str) for name, _ in parsed)
    return [(name, dict(parameters)) for name, parameters in parsed]


def limits(answer: RawAnswer) -> dict[str, Any]:
    """Return what a response says of our one bucket, after checking that it says it once and alike."""
    ((policy, terms),) = items(answer.all("ratelimit-policy"))
    ((name, left),) = items(answer.all("ratelimit"))
    assert policy == name
    (limit,), (remaining,), (reset,) = (answer.all(f"x-ratelimit-{one}") for one in ("limit", "remaining", "reset"))
    assert terms["q"] == int(limit)
    assert left["t"] >= 1
    return {"policy": policy, **terms, **left, "remaining": int(remaining), "reset": int(reset)}


@pytest.fixture(scope="module")
def sections(shared: RawUpstream) -> dict[str, Any]:
    sections = in_front_of(shared.url) | {
        "tiers": {
            "FREE": {"rate": 0.01, "capacity": 3},
            "a.b-c_d.": {"rate": 2.5, "capacity": 7},
            "ROOMY": {"rate": 1000, "capacity": 1_000_000_000},
        },
        "clients": {"odd": {"tier": "a.b-c_d."}, "roomy": {"tier": "ROOMY"}},
    }
    dead = {"targets": [{"url": "http://127.0.0.1:9"}], "circuit_breaker": {"failure_threshold": 1}}
    sections["upstreams"] |= {"dead": dead | {"retry": {"attempts": 1}}}
    sections["routes"] += [
        {"name": "dear", "path": "/api/dear", "upstream": "up", "cost": 4},
        {"name": "two", "path": "/api/two", "upstream": "up", "cost": 2},
        {"name": "dead", "path": "/api/dead", "upstream": "dead"},
        {"name": "only", "path": "/api/only", "upstream": "up", "methods": ["PUT"]},
    ]
    return sections


@pytest.fixture
def get(
    running: RunningGateway, up: RawUpstream, request: pytest.FixtureRequest, fast_path_spy: list[bool]
) -> Callable[..., RawAnswer]:
    """Ask on one of the two ways, with a client of one's own unless it is named."""
    up.behave = reply()
    assert ask(f"{running.url}/api/warm", headers={"X-Client-ID": "roomy"}).status == 200
    own = f"{request.node.name}"[:100].replace(" ", "-")

    def get(way: str, path: str = "/api/x", client: str = own) -> RawAnswer:
        with RawClient(running.port) as raw:
            answer = raw.get(path, (f"X-Client-ID: {client}", *WAYS[way]))
        assert fast_path_spy[-1] == (way == "fast path") or answer.status in (
            405,
            503,
        )  # no others leave it before they begin
        return answer

    return get


Get = Callable[..., RawAnswer]
both_ways = pytest.mark.parametrize("way", WAYS)


@both_ways
def test_every_proxied_response_has_policy_and_remaining_tokens(get: Get, way: str) -> None:
    assert limits(get(way)) == {"policy": "free", "q": 3, "w": 300, "r": 2, "t": 200, "remaining": 2, "reset": 100}
    assert limits(get(way)) == {"policy": "free", "q": 3, "w": 300, "r": 1, "t": 100, "remaining": 1, "reset": 200}
    last = limits(get(way))
    assert (last["r"], last["remaining"], last["reset"]) == (0, 0, 300)
    assert 99 <= last["t"] <= 100  # until there is one token


@both_ways
def test_a_refusal_has_the_same_wait_in_both_fields(get: Get, way: str) -> None:
    for _ in range(2):
        assert get(way).status == 200
    refused = get(way, "/api/two")
    assert refused.status == 429
    told = limits(refused)
    assert (told["r"], told["remaining"]) == (0, 1)  # nothing for this request, one for a cheaper one
    assert [b"%d" % told["t"]] == refused.all("retry-after")
    assert get(way).status == 200


@both_ways
def test_a_cost_above_the_capacity_gets_no_retry_after(get: Get, way: str) -> None:
    refused = get(way, "/api/dear")
    assert refused.status == 403
    assert b"cost_exceeds_capacity" in refused.body
    assert refused.all("retry-after") == []
    assert limits(refused) == {"policy": "free", "q": 3, "w": 300, "r": 3, "t": 300, "remaining": 3, "reset": 0}


@both_ways
@pytest.mark.parametrize("lines", [1, 2])
def test_an_upstreams_own_items_stay_beside_ours(get: Get, up: RawUpstream, way: str, lines: int) -> None:
    """They are lists: several lines mean the same as one, and nobody's items are taken out (draft section 7.2)."""
    up.behave = reply(
        headers=(
            *((b"RateLimit-Policy", b'"burst";q=100;w=60') for _ in range(lines)),
            (b"RateLimit", b'"daily";r=5;t=3600, "burst";r=9;t=1'),
            (b"X-RateLimit-Limit", b"77"),
            (b"X-RateLimit-Remaining", b"76"),
            (b"x-ratelimit-reset", b"75"),
        )
    )
    answer = get(way)
    assert items(answer.all("ratelimit-policy")) == [("burst", {"q": 100, "w": 60})] * lines + [
        ("free", {"q": 3, "w": 300})
    ]
    assert [name for name, _ in items(answer.all("ratelimit"))] == ["daily", "burst", "free"]
    assert [answer.all(f"x-ratelimit-{one}") for one in ("limit", "remaining", "reset")] == [[b"3"], [b"2"], [b"100"]]


@both_ways
def test_an_unusual_tier_is_named_as_it_is_spelt_in_lower_case(get: Get, way: str) -> None:
    told = limits(get(way, client="odd"))
    assert (told["policy"], told["q"], told["w"]) == ("a.b-c_d.", 7, 3)


@both_ways
def test_a_response_of_the_gateway_for_an_upstream_has_them_too(get: Get, way: str) -> None:
    statuses = set()
    for _ in range(3):
        answer = get(way, "/api/dead")
        statuses.add(answer.status)
        assert limits(answer)["remaining"] == 3  # it cost nothing
        assert answer.status == 502 or answer.all("retry-after")
    assert statuses <= {502, 503}
    assert 503 in statuses


@both_ways
@pytest.mark.parametrize(("path", "status"), [("/api/only", 405)])
def test_a_response_without_a_decision_has_no_rate_limit_fields(get: Get, way: str, path: str, status: int) -> None:
    answer = get(way, path)
    assert answer.status == status
    assert not [name for name, _ in answer.headers if name.lower() in HEADER_NAMES]


# The fields by themselves

BRISK = Quota.per_second("BRISK", 2, 10)  # half a second for each token, and five for all
UNEVEN = Quota.per_second("UNEVEN", 3, 10)
DAILY = PeriodQuota.of("daily", 100, Calendar("day", ZoneInfo("UTC")))


@each(
    ("quota", "allowed", "remaining", "wait", "reset", "limit", "left", "full"),
    [
        (BRISK, True, 7, 0.0, 1.2, "r=7;t=4", 7, 2),  # 3.5 seconds refill seven tokens
        (BRISK, True, 10, 0.0, 0.0, "r=10;t=5", 10, 0),
        (BRISK, True, 0, 0.0, 4.7, "r=0;t=1", 0, 5),
        (BRISK, True, 0, 0.0, 6.6, "r=0;t=3", 0, 7),  # in debt by 1.6 seconds, and half a second more for a token
        (BRISK, False, 3, 2.3, 3.2, "r=0;t=3", 3, 4),  # three are too few for this request
        (DAILY, True, 40, 0.0, 7200.5, "r=40;t=7201", 40, 7201),  # until the period ends
        (DAILY, True, 40, 0.0, 0.0, "r=40;t=1", 40, 0),
    ],
)
def test_the_fields_of_a_decision(
    quota: Quota,
    allowed: bool,  # noqa: FBT001
    remaining: int,
    wait: float,
    reset: float,
    limit: str,
    left: int,
    full: int,
) -> None:
    wait_ns, reset_ns = (round(seconds * NANOSECONDS) for seconds in (wait, reset))
    fields = RateLimitHeaders()
    found = dict(fields.headers(Decision("k", quota, allowed, remaining, wait_ns, reset_ns)))
    assert found[b"ratelimit"].decode() == f'"{quota.policy}";{limit}'
    assert (found[b"x-ratelimit-remaining"], found[b"x-ratelimit-reset"]) == (b"%d" % left, b"%d" % full)
    assert found[b"x-ratelimit-limit"] == b"%d" % quota.capacity


def test_all_policies_are_listed_with_the_seconds_in_which_they_fill_rounded_up() -> None:
    fields = RateLimitHeaders()
    decision = Decision("k", BRISK, True, 1, 0, 0)

    def policies(*quotas: Quota) -> bytes:
        charges = [Charge(quota.name, quota, 1) for quota in quotas]
        return dict(fields.headers(decision, charges))[b"ratelimit-policy"]

    for _ in range(2):
        assert policies(BRISK, UNEVEN) == b'"brisk";q=10;w=5, "uneven";q=10;w=4'
        assert policies(BRISK, DAILY) == b'"brisk";q=10;w=5, "daily";q=100;w=86400'
    assert policies(BRISK) == b'"brisk";q=10;w=5'


quotas = st.builds(
    Quota.per_second,
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", fullmatch=True),
    st.floats(1e-6, 1_000_000),
    st.integers(1, 1_000_000_000),
).filter(lambda quota: quota.capacity / quota.rate <= MAX_FILL)


@given(quota=quotas, filled=st.floats(-1, 1), wait=st.sampled_from([0, -1]) | st.integers(1, 10**18))
def test_the_fields_are_structured_and_their_integers_are_short_enough(quota: Quota, filled: float, wait: int) -> None:
    """Invariant 23, over every quota that may be configured, empty, full or owing."""
    reset_ns = round(quota.burst_ns * (1 - filled))
    left = max(quota.burst_ns - reset_ns, 0) // quota.emission_ns
    decision = Decision("k", quota, wait == 0, left, wait, reset_ns)
    headers = dict(RateLimitHeaders().headers(decision))
    assert headers.keys() == HEADER_NAMES - {b"x-quota-warning"}
    ((policy, terms),) = items([headers[b"ratelimit-policy"]])
    ((name, told),) = items([headers[b"ratelimit"]])
    assert policy == name == quota.name.lower()
    assert http_sf.ser([(policy, terms)]).encode() == headers[b"ratelimit-policy"]
    assert http_sf.ser([(name, told)]).encode() == headers[b"ratelimit"]
    for value in (
        *terms.values(),
        *told.values(),
        *(int(headers[one]) for one in headers if one.startswith(b"x-")),
    ):
        assert 0 <= value < LARGEST
    assert terms["q"] == quota.capacity
    assert terms["w"] >= 1
    assert 0 <= told["r"] <= quota.capacity
    assert told["t"] >= 1
    if told["r"]:  # the draft asks to cap r / t, and the rate is the cap
        assert Fraction(told["r"], told["t"]) <= Fraction(NANOSECONDS, quota.emission_ns)


@given(
    quota=quotas.filter(lambda quota: quota.capacity <= 1000),
    spent=st.integers(0, 1000),
    reserve=st.lists(st.floats(0, 3), min_size=1, max_size=40),
)
def test_a_client_that_paces_itself_by_r_and_t_is_never_refused(
    quota: Quota, spent: int, reserve: list[float]
) -> None:
    """It spends a token each t / r seconds, or waits t where r is 0; sometimes it takes more time than that."""
    limiter, now_ns, fields = MemoryLimiter([quota]), START, RateLimitHeaders()
    first = limiter.decide([Charge("k", quota, quota.cost_ns(min(spent, quota.capacity)))], now_ns)
    answered = first
    for more in reserve:
        (_, told), *_ = items([dict(fields.headers(answered))[b"ratelimit"]])
        wait = Fraction(told["t"], told["r"] or 1)
        now_ns += math.ceil(wait * NANOSECONDS * Fraction(max(1, more)))
        answered = limiter.decide([Charge("k", quota, quota.emission_ns)], now_ns)
        assert answered.allowed
