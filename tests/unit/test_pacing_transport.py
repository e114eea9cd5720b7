"""`PacingTransport`: clients use their whole budget and are never refused, in virtual time, on the real arithmetic."""

import asyncio
import json
import random
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api_gateway import PacingTransport, SyncPacingTransport
from api_gateway.limits.ratelimit_headers import RateLimitHeaders
from api_gateway.models import Charge, Quota
from api_gateway.pacing.client_budgets import PacingTimeout, is_replayable
from api_gateway.pacing.cost_estimates import CostEstimates
from api_gateway.pacing.stated_limits import Remaining, StatedPolicy, policies_of, remaining_of, stated_retry_after
from api_gateway.rate_limiter import MemoryLimiter
from tests import virtual_time

SECOND = 1_000_000_000


@dataclass
class Server:
    """A server with the gateway's limiter and header fields, with a delay each way."""

    quotas: list[Quota]
    cost_of: Callable[[str], float] = lambda _path: 1.0
    delays: tuple[float, float] = (0.004, 0.006)
    source: random.Random | None = None  # of random delays, at most those
    refused: int = 0
    spent: dict[str, float] = field(default_factory=dict)
    most_at_once: int = 0

    def __post_init__(self) -> None:
        self.limiter = MemoryLimiter(self.quotas)
        self.fields = RateLimitHeaders()
        self.at_once = 0

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await self.delay(self.delays[0])
            response = self.decide(request.headers.get("x-client-id", ""), request.url.path)
            await self.delay(self.delays[1])
            return response
        finally:
            self.at_once -= 1

    async def delay(self, longest: float) -> None:
        await asyncio.sleep(longest if self.source is None else self.source.uniform(0, longest))

    def decide(self, client: str, path: str) -> httpx.Response:
        """Charge all quotas of a client now."""
        cost = self.cost_of(path)
        now_ns = SECOND * 1000 + round(asyncio.get_running_loop().time() * SECOND)
        charges = [Charge(f"{quota.name}:{client}", quota, quota.cost_ns(cost)) for quota in self.quotas]
        decision = self.limiter.decide(charges, now_ns)
        headers = [(name.decode(), value.decode()) for name, value in self.fields.headers(decision, charges)]
        if decision.allowed:
            self.spent[client] = self.spent.get(client, 0) + cost
            return httpx.Response(200, headers=headers, content=b"ok")
        self.refused += 1
        after = str(max(1, -(-decision.wait_ns // SECOND)))
        headers += [("retry-after", after), ("content-type", "application/problem+json")]
        return httpx.Response(429, headers=headers, content=json.dumps({"cost": cost}).encode())


def bucket(rate: float, capacity: int, name: str = "tier") -> Quota:
    return Quota.per_second(name, rate, capacity)


def client_of(server: Any, **options: Any) -> httpx.AsyncClient:
    clock = asyncio.get_running_loop().time
    transport = PacingTransport(httpx.MockTransport(server), clock=clock, **options)
    return httpx.AsyncClient(transport=transport, base_url="http://gateway.test")


async def send_for(client: httpx.AsyncClient, seconds: float, path: Callable[[int], str], name: str) -> list[int]:
    statuses: list[int] = []
    end = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < end:
        response = await client.get(path(len(statuses)), headers={"x-client-id": name})
        statuses.append(response.status_code)
    return statuses


@pytest.mark.parametrize(
    ("quotas", "clients", "tasks", "costs"),
    [
        ([bucket(0.25, 10)], 20, 1, [1]),
        ([bucket(20, 20)], 1, 5, [1]),
        ([bucket(5, 10)], 2, 8, [1]),
        ([bucket(7, 20)], 2, 1, [1, 5, 2.5]),
        ([bucket(7, 20)], 2, 4, [1, 5]),
        ([bucket(10, 10, "second"), bucket(2, 100, "minute")], 2, 1, [1]),
        ([bucket(10, 10, "second"), bucket(2, 100, "minute")], 2, 6, [1]),
    ],
    ids=["many", "tasks", "more tasks than tokens", "costs", "costs and tasks", "limits", "limits and tasks"],
)
def test_clients_use_at_least_98_percent_of_their_budget_without_one_refusal(
    quotas: list[Quota], clients: int, tasks: int, costs: list[float]
) -> None:
    server, seconds = Server(quotas, lambda path: costs[int(path[2:])]), 200.0 if clients == 20 else 60.0

    async def main() -> None:
        async with client_of(server) as client:
            await asyncio.gather(
                *(
                    send_for(client, seconds, lambda count: f"/p{count % len(costs)}", f"c{number}")
                    for number in range(clients)
                    for _ in range(tasks)
                )
            )

    virtual_time.run(main())
    budget = min(quota.capacity + quota.rate * seconds for quota in quotas)
    assert server.refused == 0
    assert min(server.spent.values()) >= 0.98 * budget
    assert max(server.spent.values()) <= budget + tasks * max(costs) + max(quota.rate for quota in quotas)


@pytest.mark.parametrize(("tasks", "quota"), [(1, bucket(4, 4)), (4, bucket(4, 4)), (1, bucket(7, 20))])
def test_delays_of_the_network_and_of_the_event_loop_lose_no_budget(tasks: int, quota: Quota) -> None:
    source = random.Random(18)
    server, seconds = Server([quota], delays=(0.1, 0.1), source=source), 120.0

    async def sleep_too_long(wait: float) -> None:
        await asyncio.sleep(wait + source.uniform(0, 0.2))

    async def main() -> None:
        async with client_of(server, sleep=sleep_too_long) as client:
            names = [f"c{number}" for number in range(2) for _ in range(tasks)]
            await asyncio.gather(*(send_for(client, seconds, lambda _: "/x", name) for name in names))

    virtual_time.run(main())
    share = min(server.spent.values()) / (quota.capacity + quota.rate * seconds)
    print(f"share of the budget: {share:.3f}")  # for a run with -s
    assert server.refused == 0
    assert share >= 0.98


def test_a_request_that_arrives_late_at_a_full_bucket_finds_its_token() -> None:
    server = Server([bucket(4, 4)], delays=(0.0, 0.0))

    class Slow(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            await asyncio.sleep(0.51 if request.url.path == "/late" else 0)
            return await server(request)

    async def main() -> None:
        transport = PacingTransport(Slow(), max_retries=0, clock=asyncio.get_running_loop().time)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway.test") as client:
            for path in ("/late", "/x"):  # so that the cost of both is known
                await client.get(path)
            await asyncio.sleep(10)
            late = asyncio.create_task(client.get("/late"))
            await asyncio.sleep(0.5)  # the bucket was full all the while
            answers = await asyncio.gather(*(client.get("/x") for _ in range(4)), late)
            assert [answer.status_code for answer in answers] == [200] * 5

    virtual_time.run(main())


def test_no_request_is_delayed_while_tokens_remain_and_the_first_one_finds_out() -> None:
    server = Server([bucket(1, 10)])

    async def main() -> float:
        async with client_of(server) as client:
            responses = await asyncio.gather(*(client.get("/x") for _ in range(10)))
            assert [response.status_code for response in responses] == [200] * 10
            return asyncio.get_running_loop().time()

    assert virtual_time.run(main()) == pytest.approx(0.02)  # one alone, then nine at once
    assert server.most_at_once == 9


def test_another_process_with_the_same_id_leads_to_waits_and_retries_and_to_no_429_for_the_caller() -> None:
    server = Server([bucket(5, 10)])

    async def main() -> list[int]:
        async def greedy() -> None:
            while True:
                server.decide("c", "/x")
                await asyncio.sleep(0.3)

        other = asyncio.create_task(greedy())
        async with client_of(server) as client:
            statuses = await send_for(client, 60, lambda _: "/x", "c")
        other.cancel()
        return statuses

    statuses = virtual_time.run(main())
    assert set(statuses) == {200}
    assert len(statuses) >= 60 * (5 - 1 / 0.3) * 0.8


def test_a_429_is_returned_if_the_body_cannot_be_sent_again_or_the_retries_are_used_up() -> None:
    requests: list[bool] = []

    class Refusing(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            requests.append(is_replayable(request))
            return httpx.Response(429, headers={"retry-after": "3"})

    async def pieces() -> AsyncIterator[bytes]:
        yield b"once"

    async def main() -> float:
        transport = PacingTransport(Refusing(), max_retries=2, clock=asyncio.get_running_loop().time)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway.test") as client:
            assert (await client.post("/x", content=b"again")).status_code == 429
            assert requests == [True] * 3
            began = asyncio.get_running_loop().time()
            assert (await client.post("/x", content=pieces())).status_code == 429
            assert requests[3:] == [False]
            return began

    assert virtual_time.run(main()) == pytest.approx(6)


def test_a_longer_wait_than_max_wait_raises_before_the_request_is_sent() -> None:
    server = Server([bucket(0.1, 1)])

    async def main() -> None:
        async with client_of(server, max_wait=5) as client:
            await client.get("/x")
            with pytest.raises(PacingTimeout, match=r"GET /x would have to wait (9\.9|10\.0) s; max_wait is 5 s"):
                await client.get("/x")

    virtual_time.run(main())
    assert server.refused == 0


def test_cancelled_requests_leave_the_others_their_turn_and_their_tokens() -> None:
    server = Server([bucket(1, 2)])

    async def main() -> float:
        async with client_of(server) as client:
            await client.get("/x")
            await client.get("/x")
            waiting = [asyncio.create_task(client.get("/x")) for _ in range(5)]
            await asyncio.sleep(0.5)
            for task in waiting[:4]:
                task.cancel()
            assert (await waiting[4]).status_code == 200
            sent = asyncio.create_task(client.get("/x"))  # cancelled while in flight: its token is counted as spent
            await asyncio.sleep(1.005)
            sent.cancel()
            await asyncio.wait([sent])
            assert (await client.get("/x")).status_code == 200
            return asyncio.get_running_loop().time()

    took = virtual_time.run(main())
    assert server.refused == 0
    assert 2.9 < took < 4.2


def test_clients_with_ids_of_their_own_have_budgets_of_their_own() -> None:
    server = Server([bucket(0.1, 1)])

    async def main() -> float:
        async with client_of(server) as client:
            for name in ("a", "b", "c"):
                assert (await client.get("/x", headers={"x-client-id": name})).status_code == 200
            return asyncio.get_running_loop().time()

    assert virtual_time.run(main()) < 0.1


def test_a_server_that_states_no_limits_is_not_paced() -> None:
    async def main() -> float:
        async def respond(_request: httpx.Request) -> httpx.Response:
            await asyncio.sleep(0.01)
            return httpx.Response(200)

        async with client_of(respond) as client:
            await asyncio.gather(*(client.get("/x") for _ in range(100)))
            return asyncio.get_running_loop().time()

    assert virtual_time.run(main()) == pytest.approx(0.02)


def test_a_window_is_waited_for_to_its_end() -> None:
    state = {"left": 3, "ends": 60.0}

    async def respond(_request: httpx.Request) -> httpx.Response:
        now = asyncio.get_running_loop().time()
        if now >= state["ends"]:
            state.update(left=3, ends=now + 60)
        if not state["left"]:
            return httpx.Response(429, headers={"retry-after": "60"})
        state["left"] -= 1
        left, until = state["left"], -int(-(state["ends"] - now) // 1)
        fields = {"ratelimit-policy": '"w";q=3;w=60', "ratelimit": f'"w";r={left};t={until}'}
        return httpx.Response(200, headers=fields)

    async def main() -> float:
        async with client_of(respond) as client:
            for _ in range(6):
                assert (await client.get("/x")).status_code == 200
            return asyncio.get_running_loop().time()

    assert 60 <= virtual_time.run(main()) < 63


def test_the_transport_runs_on_trio_as_well() -> None:
    pytest.importorskip("trio")

    async def main() -> None:
        transport = PacingTransport(httpx.MockTransport(lambda _request: httpx.Response(200)))
        async with httpx.AsyncClient(transport=transport) as client:
            assert (await client.get("http://gateway.test/x")).status_code == 200

    anyio.run(main, backend="trio")


@pytest.mark.parametrize(
    ("policy", "limit", "expected"),
    [
        ('"a";q=10;w=60', '"a";r=9;t=6', ([StatedPolicy("a", 10, 60)], [Remaining("a", 9, 6)])),
        ('"a,b;q=1";q=10;w=60, "c";w=1;q=2;qu="requests"', '"c";r=0', None),
        ('a;q=1;w=1, "b";q=-1;w=1, "c";q=x;w=1, "d";q=1', '"b";r=-1;t=1, "c";t=1', ([], [])),
        ("\x00" * 100, '"' * 9000, ([], [])),
    ],
)
def test_fields_are_parsed_and_invalid_items_left_out(policy: str, limit: str, expected: Any) -> None:
    found = (
        list(policies_of({"ratelimit-policy": policy})),
        list(remaining_of({"ratelimit": limit})),
    )
    assert found == (
        expected or ([StatedPolicy("a,b;q=1", 10, 60), StatedPolicy("c", 2, 1)], [Remaining("c", 0, None)])
    )


@pytest.mark.parametrize(
    ("given_value", "expected"),
    [
        ("7", 7.0),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 37.0),
        ("", None),
        ("soon", None),
        ("-1", None),
        ("9" * 400, 999999999.0),
    ],
)
def test_retry_after_is_seconds_or_a_date(given_value: str, expected: float | None) -> None:
    assert stated_retry_after({"retry-after": given_value}, 784111740.0) == expected


@given(cost=st.integers(0, 50), phases=st.lists(st.floats(0, 0.999), min_size=8, max_size=8))
def test_the_cost_of_an_endpoint_is_learned_from_what_is_missing(cost: int, phases: list[float]) -> None:
    costs = CostEstimates()
    for phase in [*phases, 0.0, 0.999]:
        before = 1000 + phase  # tokens; the client knows 1000 of them, and that it is less than one more
        after = int(before - cost)
        costs.learn("GET /x", 1000 - after - 1, 1001 - after)
    assert abs(costs.expected("GET /x") - cost) <= 1


def test_paths_with_numbers_and_identifiers_are_one_endpoint() -> None:
    names = {CostEstimates.endpoint_of("GET", f"/users/{one}/x") for one in ("7", "12", "0" * 32)}
    assert names == {"GET /users/*/x"}


def test_threads_share_a_budget() -> None:
    lock, state, refused = threading.Lock(), {"left": 5}, []

    def respond(_request: httpx.Request) -> httpx.Response:
        with lock:
            state["left"] -= 1
            refused.extend([1] if state["left"] < 0 else [])
            left = max(0, state["left"])
        fields = {"ratelimit-policy": '"b";q=5;w=5000', "ratelimit": f'"b";r={left};t={max(1, left) * 1000}'}
        return httpx.Response(200, headers=fields)

    outcomes: list[object] = []
    with httpx.Client(transport=SyncPacingTransport(httpx.MockTransport(respond), max_wait=20)) as client:

        def send() -> None:
            try:
                outcomes.append(client.get("http://gateway.test/x").status_code)
            except PacingTimeout:
                outcomes.append("late")

        threads = [threading.Thread(target=send) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(map(str, outcomes)) == ["200"] * 5 + ["late"] * 3
    assert not refused
