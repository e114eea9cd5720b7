"""The responses that refuse a request: what is rendered once for each quota equals what is rendered each time."""

import itertools
import json
import re
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from api_gateway.errors import BadRequest, GatewayError, MethodNotAllowed, RateLimited, Unavailable, problem
from api_gateway.http1.serializer import refuse_hidden_lines, render_response_head
from api_gateway.limits.concurrency import ConcurrencyQuota
from api_gateway.limits.refusal import _BY_BUCKET, MOST_REMEMBERED_REFUSALS, refusal
from api_gateway.models import NANOSECONDS, Client, Decision, Exchange, Quota
from api_gateway.proxy.problem_response import instance_in, instance_of, problem_body, problem_message, send_problem
from api_gateway.rate_limiter import NEVER_NS
from tests.cases import each

FREE = Quota.per_second("FREE", 1, 10)
QUOTAS = st.builds(
    Quota.per_second,
    st.text("ABCXYZ019_.-", min_size=1, max_size=20),
    st.floats(1e-6, 1e6) | st.integers(1, 1_000_000),
    st.integers(1, 1_000_000_000),
)
VISIBLE = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=128)
PATHS = st.text(st.characters(exclude_categories=["Cs"]))
PEERS = st.sampled_from(["192.0.2.7", "2001:db8:1:2::1", "unix"])
COSTS = st.floats(0, 1e9) | st.integers(0, 1_000_000_000)


def refused(
    exchange: Exchange, quota: Quota, client_id: str, wait_ns: int, remaining: int, *, by_address: bool
) -> GatewayError:
    """Return the error for a request that the client's bucket, or that of its address, refuses."""
    exchange.client = Client(client_id, f"client:{client_id}", FREE if by_address else quota, "default")
    key = f"peer:{exchange.client_address}" if by_address else exchange.client.key
    decision = Decision(key, quota, allowed=False, remaining=remaining, wait_ns=wait_ns, reset_ns=wait_ns)
    return refusal(exchange, decision)


@each("processes", [None, 2, 8])
def test_a_refusal_by_the_share_of_a_concurrency_limit_states_the_share(processes: int | None) -> None:
    quota = ConcurrencyQuota.of("few", 4, "few")
    exchange = Exchange("id", "GET", "/", "192.0.2.7", 0.0, client=Client("acme", "client:acme", FREE, "default"))
    decision = Decision("few:acme", quota, allowed=False, remaining=0, wait_ns=NANOSECONDS, reset_ns=NANOSECONDS)
    if processes is not None:
        decision.processes, decision.source = processes, "local_share"
    error = refusal(exchange, decision)
    share = {None: 4, 2: 2, 8: 1}[processes]
    words = f"; the store is unavailable, so each of {processes} processes admits its share of {share}"
    assert error.detail == (
        f"Limit 'few' allows 4 requests in flight{words if processes else ''}. Retry in about 1 s, when one has ended."
    )
    assert (error.extra["limit"], error.extra["in_flight"]) == (4, share)


def rendered_each_time(error: GatewayError, path: str, request_id: str | None) -> bytes:
    return json.dumps(problem(error, instance=path, request_id=request_id), ensure_ascii=False).encode()


@given(QUOTAS, VISIBLE, VISIBLE, PATHS, PEERS, COSTS, st.integers(1, 10**20), st.integers(0, 10**9), st.booleans())
@example(FREE, '"\\%s%', '\\"%d', '/api/\r\n\x00\x7f\u2028é😀"%s\\', "unix", 0.1, 1, 0, False)
def test_a_refusal_has_the_body_that_the_general_renderer_gives_it(
    quota: Quota,
    client_id: str,
    request_id: str,
    path: str,
    peer: str,
    cost: float,
    wait_ns: int,
    remaining: int,
    by_address: bool,  # noqa: FBT001 - generated
) -> None:
    exchange = Exchange(request_id, "GET", path, peer, 0.0, cost=cost)
    error = refused(exchange, quota, client_id, wait_ns, remaining, by_address=by_address)
    assert isinstance(error, RateLimited)
    assert problem_body(error, instance=path, request_id=request_id) == rendered_each_time(error, path, request_id)
    assert problem_body(error, instance=path, request_id=None) == rendered_each_time(error, path, None)


def test_quotas_of_one_name_do_not_share_what_is_rendered_once() -> None:
    """A reload changes a quota and keeps its name; 1 and 1.0 are equal, but not in JSON."""
    for rate, capacity in ((1, 10), (1.0, 10), (2, 10), (2, 20), (1, 10)):
        exchange = Exchange("id-1", "GET", "/api/x", "192.0.2.7", 0.0, cost=1)
        error = refused(exchange, Quota.per_second("FREE", rate, capacity), "acme", NANOSECONDS, 0, by_address=False)
        assert problem_body(error, instance="/api/x", request_id="id-1") == rendered_each_time(error, "/api/x", "id-1")


def test_refusals_by_one_bucket_do_not_share_what_differs_between_them() -> None:
    """What is rendered is remembered by bucket; many clients share that of an address, and costs and tiers change."""
    gold = Quota.per_second("GOLD", 5, 50)
    for client_id, tier, quota, cost in itertools.product(("acme", '"b"'), (FREE, gold), (FREE, gold), (1.0, 2.5)):
        exchange = Exchange("id-1", "GET", "/api/x", "192.0.2.7", 0.0, cost=cost)
        client = exchange.client = Client(client_id, f"client:{client_id}", tier, "default")
        for key, holder in (("peer:192.0.2.7", "Address '192.0.2.7'"), (client.key, f"Client '{client_id}'")):
            decision = Decision(key, quota, allowed=False, remaining=3, wait_ns=NANOSECONDS, reset_ns=NANOSECONDS)
            error = refusal(exchange, decision)
            body = json.loads(problem_body(error, instance="/api/x", request_id="id-1"))
            assert body["detail"].startswith(holder)
            assert f"{quota.capacity} tokens at once" in body["detail"]
            assert [body[name] for name in ("client_id", "tier", "policy", "cost")] == [
                client_id,
                tier.name,
                quota.policy,
                cost,
            ]
            assert body == json.loads(rendered_each_time(error, "/api/x", "id-1"))


def test_what_is_remembered_of_refusals_is_limited() -> None:
    for number in range(2 * MOST_REMEMBERED_REFUSALS):
        exchange = Exchange("id-1", "GET", "/api/x", "192.0.2.7", 0.0, cost=1.0)
        refused(exchange, FREE, f"invented-{number}", NANOSECONDS, 0, by_address=False)
        assert len(_BY_BUCKET) <= MOST_REMEMBERED_REFUSALS


OTHERS = [
    refused(Exchange("id-1", "GET", "/", "192.0.2.7", 0.0, cost=11), FREE, "a", NEVER_NS, 9, by_address=False),
    refused(Exchange("id-1", "GET", "/", "192.0.2.7", 0.0, cost=3), FREE, "a", 2_750_000_000, 1, by_address=True),
    RateLimited("Wait.", retry_after=2.5, extra={"tier": "FREE"}),
    RateLimited("Wait."),
    BadRequest('The "request" is ambiguous.', headers={"connection": "close"}),
    MethodNotAllowed("No.", headers={"allow": "GET, HEAD"}),
    Unavailable("Later.", retry_after=0.2, headers={"x-one": "1", "x-two": "2"}),
]


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: type(error).__name__)
async def test_a_response_is_the_same_over_asgi_and_on_the_servers_own_connections(error: GatewayError) -> None:
    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    more = [(b"x-request-id", b"id-1"), (b"date", b"today")]
    size = await send_problem(error, send, instance="/é", request_id="id-1", headers=more)
    lines = b"x-request-id: id-1\r\ndate: today\r\n"
    head, body = problem_message(error, instance="/é", request_id="id-1", lines=lines)
    start, end = sent
    assert body == end["body"] == rendered_each_time(error, "/é", "id-1")
    assert size == len(body)
    assert head == render_response_head(error.status, None, start["headers"])


@each("hidden", ["\r", "\n", "\0", "\r\n"])
def test_no_field_of_an_error_begins_another_line(hidden: str) -> None:
    error = MethodNotAllowed("No.", headers={"allow": "GET", "x-one": f"1{hidden}x-two: 2"})
    with pytest.raises(RuntimeError, match="line break or NUL"):
        problem_message(error, instance="/", request_id="id-1", lines=b"")


@given(st.lists(st.binary(max_size=4), max_size=6))
def test_lines_are_refused_exactly_if_one_hides_another(lines: list[bytes]) -> None:
    if any(byte in b"\r\n\0" for line in lines for byte in line):
        with pytest.raises(RuntimeError):
            refuse_hidden_lines(lines)
    else:
        refuse_hidden_lines(lines)


PATHS_AS_SENT = [
    (b"/api/users", "/api/users"),
    (b"/api/users?name=ada", "/api/users"),
    (b"/api/~a-b_c.d/(1)*;v=1,2!'", "/api/~a-b_c.d/(1)*;v=1,2!'"),
    (b"/api/a%2Fb", "/api/a%2Fb"),
    (b"/api/100%25", "/api/100%25"),
    (b"/api/%C3%BC", "/api/%C3%BC"),
    ("/api/\u00fc".encode(), "/api/%C3%BC"),
    (b'/api/"<a>"?b', "/api/%22%3Ca%3E%22"),
    (b"/api/{a}|b^c`d\\e", "/api/%7Ba%7D%7Cb%5Ec%60d%5Ce"),
    (b"/api/a#b", "/api/a%23b"),
    (b"/api/[1]", "/api/%5B1%5D"),
]


@each(("raw", "instance"), PATHS_AS_SENT)
def test_the_instance_is_the_path_as_sent_as_a_uri_reference(raw: bytes, instance: str) -> None:
    sent, _, _ = raw.partition(b"?")
    path = unquote(sent.decode())
    assert instance_of(path, raw) == instance
    assert instance_in({"path": path, "raw_path": sent}) == instance


@given(st.binary())
def test_an_instance_has_no_character_that_a_uri_reference_excludes(raw: bytes) -> None:
    path = unquote_to_bytes(raw.partition(b"?")[0]).decode("utf-8", "replace")
    assert re.fullmatch(r"[!$%&'()*+,./0-9:;=@A-Z_a-z~-]*", instance_of(path, raw))
