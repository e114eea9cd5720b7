"""Tokens as identities, on the wire: who is identified, what is refused and how, rotation and failures of issuers."""

import asyncio
import base64
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from api_gateway.assembly.issuers import Issuers
from api_gateway.clients.api_keys import digest_of, new_key
from api_gateway.config import GatewayConfig
from api_gateway.errors import StartupError
from api_gateway.process.start_check import startup_errors
from tests.cases import each
from tests.jwt_kit import AUDIENCE, BROKEN, ISSUER, LEEWAY, Published, claims_of, key_for, key_set, signed
from tests.kit import (
    Answer,
    FakeClocks,
    RawClient,
    RawRequest,
    RawUpstream,
    RunningGateway,
    Wire,
    ask,
    eventually,
    in_front_of,
    reason,
    refusing_url,
    running_gateway,
)

Gateway = Callable[..., RunningGateway]
METHODS = ["GET", "TRACK"]  # on the fast path, and on the ASGI path
KEYS = ("ES256", "RS256")


@pytest.fixture(scope="module")
def sections(shared: RawUpstream, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    file.write_bytes(key_set(*map(key_for, KEYS)))
    return with_issuer(shared, issuer=ISSUER, jwks_file=str(file))


@pytest.fixture(scope="module")
def running(sections: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with running_gateway(sections, tmp_path_factory.mktemp("state"), FakeClocks().clocks) as gateway:
        yield gateway


@pytest.fixture
def issuer() -> Iterator[Published]:
    published = Published()
    yield published
    published.server.close()


@pytest.fixture
def clocks() -> FakeClocks:
    return FakeClocks()


def with_issuer(
    upstream: RawUpstream, *, order: tuple[str, ...] = ("jwt", "header", "address"), **issuer: Any
) -> dict[str, Any]:
    """Return the sections of a gateway with one issuer of tokens."""
    sections = in_front_of(upstream.url)
    sections["tiers"] |= {"GOLD": {"rate": 1000, "capacity": 77_777}}
    one = {"audiences": [AUDIENCE], "leeway": LEEWAY, **issuer}
    return sections | {"identity": {"sources": list(order), "jwt": {"issuers": {"one": one}}}}


def get(
    running: RunningGateway, token: str | bytes, *, method: str = "GET", path: str = "/api/x", **more: str
) -> Answer:
    text = token if isinstance(token, str) else token.decode()
    fields = {"Authorization": f"Bearer {text}", **{name.replace("_", "-"): value for name, value in more.items()}}
    return ask(f"{running.url}{path}", method=method, headers=fields)


def told(answer: Answer) -> tuple[int, str | None]:
    """Return status and reason of a response."""
    return answer.status, answer.json()["reason"] if answer.status >= 400 else None


def event_stream(wire: Wire, request: RawRequest) -> None:
    """Begin an event stream that does not end."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    wire.send(head + b"5\r\nbegun\r\n")
    wire.fill()


def clients_of(running: RunningGateway) -> set[str]:
    """Return the keys of the buckets that were charged."""
    return set(running.live.limiter._table.current)


# Who is identified


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("algorithm", KEYS)
def test_a_token_identifies_its_client_and_is_forwarded(
    running: RunningGateway, up: RawUpstream, method: str, algorithm: str
) -> None:
    name = f"{algorithm}-{method}"
    token = signed(claims_of(sub=name), algorithm=algorithm)
    for _ in range(3):
        assert get(running, token, method=method).status == 200
    assert f"client:{name}" in clients_of(running)
    assert [request.all("authorization") for request in up.requests] == [[b"Bearer " + token]] * 3


def test_a_remembered_token_stays_on_the_fast_path(
    running: RunningGateway, up: RawUpstream, fast_path_spy: list[bool]
) -> None:
    token = signed(claims_of(sub="fast"))
    for _ in range(3):
        assert get(running, token).status == 200
    assert fast_path_spy == [True] * 3


@pytest.mark.parametrize("method", METHODS)
def test_a_value_that_is_no_token_of_an_issuer_belongs_to_the_upstream(
    running: RunningGateway, up: RawUpstream, method: str
) -> None:
    spaced = signed(header=b'{ "alg": "ES256"}').decode()
    values = [signed(claims_of(iss="https://elsewhere.test")).decode(), "opaque", "eyJ.a.b", spaced, ""]
    for number, value in enumerate(values):
        assert get(running, value, method=method, X_Client_ID=f"bare-{number}").status == 200
        assert f"client:bare-{number}" in clients_of(running)
    assert [request.all("authorization") for request in up.requests] == [
        [f"Bearer {value}".strip().encode()] for value in values
    ]


@pytest.mark.parametrize("method", METHODS)
def test_a_client_id_must_be_that_of_the_token(running: RunningGateway, up: RawUpstream, method: str) -> None:
    assert get(running, signed(), method=method, X_Client_ID="acme").status == 200
    assert told(get(running, signed(), method=method, X_Client_ID="other")) == (400, "client_id_invalid")


def test_the_order_of_the_sources_decides(gateway: Gateway, sections: dict[str, Any], clocks: FakeClocks) -> None:
    identity = {**sections["identity"], "sources": ["header", "jwt", "address"]}
    running = gateway(sections | {"identity": identity}, clocks.clocks)
    assert get(running, signed(), X_Client_ID="bare").status == 200
    assert {one for one in clients_of(running) if one.startswith("client:")} == {"client:bare"}
    assert get(running, signed()).status == 200
    assert "client:acme" in clients_of(running)
    assert get(running, signed(claims_of(aud="else")), X_Client_ID="bare").status == 200
    assert told(get(running, signed(claims_of(aud="else")))) == (401, "credentials_invalid")


def test_a_claim_can_name_the_tier(gateway: Gateway, sections: dict[str, Any], clocks: FakeClocks) -> None:
    one = sections["identity"]["jwt"]["issuers"]["one"]
    one = {**one, "tier_claim": "plan", "tiers": {"g": "GOLD"}, "client_prefix": "one:"}
    running = gateway(
        sections | {"identity": {"sources": ["jwt", "address"], "jwt": {"issuers": {"one": one}}}}, clocks.clocks
    )
    assert get(running, signed(claims_of(plan="g"))).headers["X-RateLimit-Limit"] == "77777"
    assert get(running, signed(claims_of(plan="none such"))).headers["X-RateLimit-Limit"] == "100000"
    assert "client:one:acme" in clients_of(running)


def test_the_own_tier_of_a_client_takes_precedence_over_a_claim(
    gateway: Gateway, sections: dict[str, Any], clocks: FakeClocks
) -> None:
    one = {**sections["identity"]["jwt"]["issuers"]["one"], "tier_claim": "plan"}
    identity = {"sources": ["jwt", "address"], "jwt": {"issuers": {"one": one}}}
    running = gateway(sections | {"identity": identity, "clients": {"acme": {"tier": "FREE"}}}, clocks.clocks)
    assert get(running, signed(claims_of(plan="GOLD"))).headers["X-RateLimit-Limit"] == "100000"
    assert get(running, signed(claims_of(plan="gold", sub="new"))).headers["X-RateLimit-Limit"] == "77777"


@pytest.mark.parametrize("method", METHODS)
def test_clients_with_tokens_share_no_limit_of_their_address(
    gateway: Gateway, sections: dict[str, Any], clocks: FakeClocks, method: str
) -> None:
    limit = {"address_limit": {"rate": 1, "capacity": 5, "exempt": []}}
    running = gateway(sections | limit, clocks.clocks)
    for number in range(4):
        token = signed(claims_of(sub=f"client-{number}"))
        for _ in range(5):
            assert get(running, token, method=method).status == 200
    assert told(get(running, signed(claims_of(sub="client-5")), method=method)) == (200, None)
    assert told(get(running, signed(claims_of(sub="client-6")), method=method)) == (
        429,
        "rate_limited",
    )  # first sights
    assert get(running, signed(claims_of(sub="client-0"), algorithm="RS256"), method=method).status == 429
    clocks.advance(1)
    assert get(running, signed(claims_of(sub="client-6")), method=method).status == 200


@pytest.mark.parametrize("method", METHODS)
def test_tokens_can_be_withheld_from_upstreams(
    gateway: Gateway, sections: dict[str, Any], clocks: FakeClocks, up: RawUpstream, method: str
) -> None:
    routes = [
        {"name": "all", "path": "/api", "upstream": "up"},
        {"name": "kept", "path": "/api/kept", "upstream": "up", "forward_credentials": True},
    ]
    jwt = {**sections["identity"]["jwt"], "forward": False}
    identity = {**sections["identity"], "jwt": jwt}
    running = gateway(sections | {"routes": routes, "identity": identity}, clocks.clocks)
    token = signed()
    for _ in range(2):
        assert get(running, token, method=method).status == 200
        assert get(running, token, method=method, path="/api/kept").status == 200
        assert get(running, "opaque", method=method).status == 200
    found = [request.all("authorization") for request in up.requests]
    assert found == [[], [b"Bearer " + token], [b"Bearer opaque"]] * 2


@pytest.mark.parametrize("method", METHODS)
def test_upstreams_receive_claims_as_header_fields_that_clients_cannot_send(
    gateway: Gateway, sections: dict[str, Any], clocks: FakeClocks, up: RawUpstream, method: str
) -> None:
    one = {**sections["identity"]["jwt"]["issuers"]["one"], "headers": {"X-User": "sub", "X-Roles": "roles"}}
    running = gateway(
        sections | {"identity": {**sections["identity"], "jwt": {"issuers": {"one": one}}}}, clocks.clocks
    )
    forged = ("X-User: admin", "x_user: admin", "X-Roles: admin", "Connection: close, X-User")
    tokens = {
        signed(claims_of(roles=["reader", "writer"])): [[b"acme"], [b"reader,writer"]],
        signed(claims_of(roles=["a,b", "c"])): [[b"acme"], []],
        signed(claims_of(roles="admin\r\nX-User: root")): [[b"acme"], []],
        signed(claims_of(iss="https://elsewhere.test")): [[], []],
        b"opaque": [[], []],
        b"": [[], []],
    }
    variants: list[tuple[str, ...]] = [(), forged[:1], forged[:3], forged]
    for token, expected in tokens.items():
        for fields in variants:
            for _ in range(2):  # the second time it is remembered
                up.requests.clear()
                given: tuple[str, ...] = (f"Authorization: Bearer {token.decode()}",) if token else ()
                with RawClient(running.port) as client:
                    client.request(method, headers=fields + given)
                    assert client.answer().status == 200
                (request,) = up.requests
                assert [request.all(name) for name in ("x-user", "x-roles")] == expected
                assert not request.all("x_user")


@pytest.mark.parametrize("method", METHODS)
def test_an_expired_token_states_no_claims_where_it_is_only_observed(
    gateway: Gateway, sections: dict[str, Any], clocks: FakeClocks, up: RawUpstream, method: str
) -> None:
    one = {**sections["identity"]["jwt"]["issuers"]["one"], "headers": {"X-User": "sub"}}
    identity = {**sections["identity"], "mode": "observe", "jwt": {"issuers": {"one": one}}}
    running = gateway(sections | {"identity": identity}, clocks.clocks)
    token = signed(claims_of(exp=claims_of()["iat"] + 110))
    for expected in ([b"acme"], []):
        up.requests.clear()
        for _ in range(2):
            assert get(running, token, method=method).status == 200
        assert [request.all("x-user") for request in up.requests] == [expected] * 2
        clocks.advance(200)


# Broken tokens


@each("method", METHODS)
@each("name", BROKEN)
def test_a_broken_token_is_refused_and_nothing_of_it_is_shown(
    running: RunningGateway, up: RawUpstream, caplog: pytest.LogCaptureFixture, name: str, method: str
) -> None:
    caplog.set_level(logging.DEBUG, "api_gateway")
    token, fault = BROKEN[name]
    answer = get(running, token, method=method, X_Client_ID="acme")
    assert told(answer) == (401, "credentials_invalid")
    assert answer.json()["detail"] == str(fault)
    assert answer.headers["WWW-Authenticate"] == 'Bearer realm="api-gateway", error="invalid_token"'
    assert not up.requests
    metrics = ask(f"{running.url}/metrics?format=prometheus").body.decode()
    shown = f"{answer.body!r} {answer.headers} {caplog.text} {metrics} {running.server._app.state.gateway.tokens!r}"
    for part in token.decode().split("."):
        assert not part or part not in shown


@pytest.mark.parametrize("method", METHODS)
def test_a_token_sent_with_another_credential_is_refused(
    running: RunningGateway, up: RawUpstream, method: str
) -> None:
    with RawClient(running.port) as client:
        client.request(method, headers=(f"Authorization: Bearer {signed().decode()}", "Authorization: Basic YTpi"))
        answer = client.answer()
    assert reason(answer) == (400, "bad_request")
    assert answer.all("www-authenticate") == [b'Bearer realm="api-gateway", error="invalid_request"']
    assert b"several times" in answer.body


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", [("api_key", "jwt", "address"), ("jwt", "api_key", "address")])
def test_all_credentials_of_a_request_must_be_valid(
    gateway: Gateway,
    sections: dict[str, Any],
    clocks: FakeClocks,
    up: RawUpstream,
    method: str,
    order: tuple[str, ...],
) -> None:
    """An upstream receives the token, although the key decides who the client is; the other way round too."""
    key, unknown = (new_key(bytes([number]) * 32) for number in (1, 2))
    clients = {"program": {"keys": {"one": {"digest": digest_of(key.encode())}}}}
    issuers = sections["identity"]["jwt"]
    running = gateway(
        sections | {"identity": {"sources": list(order), "jwt": issuers}, "clients": clients}, clocks.clocks
    )
    token, short = signed(claims_of(sub="user")), signed(claims_of(sub="user", exp=claims_of()["iat"] + 60))
    decisive = "program" if order[0] == "api_key" else "user"

    def ask_with(token: bytes, key: str) -> tuple[int, str | None]:
        return told(get(running, token, method=method, X_API_Key=key))

    for _ in range(3):
        assert ask_with(token, key) == ask_with(short, key) == (200, None)
    assert f"client:{decisive}" in clients_of(running)
    assert len(clients_of(running) & {"client:program", "client:user"}) == 1
    for broken in ("algorithm none", "signature of zeros", "expired", "another audience"):
        assert ask_with(BROKEN[broken][0], key) == (401, "credentials_invalid"), broken
    assert ask_with(token, unknown) == (401, "credentials_invalid")
    clocks.advance(60 + LEEWAY)
    assert ask_with(short, key) == (401, "credentials_invalid"), "also one that was valid before"
    assert ask_with(token, key) == (200, None)
    assert len(up.requests) == 7


@pytest.mark.parametrize("method", METHODS)
def test_observing_admits_an_invalid_credential_beside_a_valid_one(
    gateway: Gateway, sections: dict[str, Any], clocks: FakeClocks, method: str
) -> None:
    key = new_key(bytes([1]) * 32)
    clients = {"program": {"keys": {"one": {"digest": digest_of(key.encode())}}}}
    identity = {"sources": ["api_key", "jwt", "address"], "mode": "observe", "jwt": sections["identity"]["jwt"]}
    running = gateway(sections | {"identity": identity, "clients": clients}, clocks.clocks)
    for _ in range(2):
        assert get(running, BROKEN["algorithm none"][0], method=method, X_API_Key=key).status == 200
    assert "client:program" in clients_of(running)
    assert running.live.recorder.identity_would_refuse["credentials_invalid"] == 2


OTHER_FORMS = {
    "a tab": "Bearer\t{}",
    "a space and a tab": "Bearer \t{}",
    "a tab and a space": "bearer\t {}",
    "no scheme": "{}",
    "another scheme": "JWT {}",
    "the scheme of bound tokens": "DPoP {}",
    "no separator": "Bearer:{}",
    "quotes": 'Bearer "{}"',
    "a parameter": 'Token token="{}"',
    "padding": "Bearer {}==",
    "a character within the signature": "Bearer {}*",
    "a second word": "Bearer {} x",
    "a list": "Bearer {}, Bearer x",
    "the user name of Basic": "Basic {basic[0]}",
    "the password of Basic": "basic {basic[1]}",
    "the password of a longer user name": "BASIC {basic[2]}",
    "a tab behind Basic": "Basic\t{basic[0]}",
    "behind a token of others": f"Bearer {signed(claims_of(iss='https://elsewhere.test')).decode()} {{}}",
}


@each("method", METHODS)
@each("form", OTHER_FORMS.values(), ids=OTHER_FORMS.keys())
def test_a_token_in_another_form_is_refused(running: RunningGateway, up: RawUpstream, method: str, form: str) -> None:
    """An upstream might accept it, while the gateway would count the request for another client."""
    with RawClient(running.port) as client:
        for _ in range(2):
            token = signed()
            basic = [base64.b64encode(user + token).decode() for user in (b"", b"u:", b"us:")]
            value = form.format(token.decode(), basic=basic)
            client.request(method, headers=(f"Authorization: {value}", "X-Client-ID: other"))
            answer = client.answer()
            assert reason(answer) == (401, "credentials_invalid")
            assert b"not in the form" in answer.body
    assert not up.requests


@pytest.mark.parametrize("method", METHODS)
def test_spaces_alone_separate_a_token_from_its_scheme(running: RunningGateway, up: RawUpstream, method: str) -> None:
    with RawClient(running.port) as client:
        for number, separator in enumerate((" ", "    ")):
            token = signed(claims_of(sub=f"spaced-{number}")).decode()
            client.request(method, headers=(f"Authorization: bEARER{separator}{token}",))
            assert client.answer().status == 200
            assert f"client:spaced-{number}" in clients_of(running)


@pytest.mark.parametrize("method", METHODS)
def test_many_tokens_in_one_value_are_refused_and_cost_no_time(
    running: RunningGateway, up: RawUpstream, method: str
) -> None:
    foreign = signed(claims_of(iss="https://elsewhere.test")).decode()
    for value in (" ".join([foreign] * 20), "eyJ9.e30." * 2000, "eyJ" * 5000, "eyJ." * 5000):
        with RawClient(running.port) as client:
            client.request(method, headers=(f"Authorization: Bearer {value}",))
            assert client.answer().status == (200 if value.startswith(("eyJe", "eyJ.")) else 401), value[:20]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", ["Bearer", "DPoP", "dpop"])
def test_bound_tokens_are_accepted_if_upstreams_verify_the_proof(
    gateway: Gateway, sections: dict[str, Any], clocks: FakeClocks, up: RawUpstream, method: str, scheme: str
) -> None:
    issuer = sections["identity"]["jwt"]["issuers"]["one"] | {"accept_bound": True}
    identity = sections["identity"] | {"jwt": {"issuers": {"one": issuer}}}
    running = gateway(sections | {"identity": identity}, clocks.clocks)
    token = signed(claims_of(sub="bound", cnf={"jkt": "x" * 43})).decode()
    with RawClient(running.port) as client:
        for _ in range(2):
            client.request(method, headers=(f"Authorization: {scheme} {token}",))
            assert client.answer().status == 200
    assert "client:bound" in clients_of(running)


def test_a_token_ends_when_it_expires_also_one_that_is_remembered(
    gateway: Gateway, sections: dict[str, Any], clocks: FakeClocks
) -> None:
    running = gateway(sections, clocks.clocks)
    token = signed(claims_of(exp=claims_of()["iat"] + 110))
    for method in METHODS:
        assert get(running, token, method=method).status == 200
    clocks.advance(100 + LEEWAY - 0.001)
    for method in METHODS:
        assert get(running, token, method=method).status == 200
    clocks.advance(0.001)
    for method in METHODS:
        answer = get(running, token, method=method)
        assert (told(answer), answer.json()["detail"]) == ((401, "credentials_invalid"), "The token has expired.")


def test_first_sights_are_charged_to_the_address(
    gateway: Gateway, sections: dict[str, Any], clocks: FakeClocks
) -> None:
    limit = {"address_limit": {"rate": 1, "capacity": 20, "exempt": []}}
    running = gateway(sections | limit, clocks.clocks)
    known = signed(claims_of(sub="known"))
    assert get(running, known).status == 200
    forged = signed(claims_of(sub="known")).rpartition(b".")[0] + b"."
    found = [told(get(running, forged + f"c2ln{number:04}".encode())) for number in range(30)]
    assert found[0] == (401, "credentials_invalid")
    assert set(found) == {(401, "credentials_invalid"), (429, "rate_limited")}
    assert found.count((401, "credentials_invalid")) <= 20


# Keys


@pytest.mark.parametrize("method", METHODS)
def test_keys_rotate(gateway: Gateway, issuer: Published, up: RawUpstream, clocks: FakeClocks, method: str) -> None:
    running = gateway(with_issuer(up, issuer=issuer.issuer), clocks.clocks)
    first, second = issuer.signed(), issuer.signed(key=key_for("ES256", 2))
    fetches = running.live.recorder.key_fetches  # another gateway may ask for what was at the issuer's port before
    assert get(running, first, method=method).status == 200
    assert fetches == {("one", "success"): 1}
    assert told(get(running, second, method=method)) == (401, "credentials_invalid")  # within unknown_key_interval
    assert fetches == {("one", "success"): 1}
    issuer.publish(key_for("ES256"), key_for("ES256", 2))
    clocks.advance(10)
    assert get(running, second, method=method).status == 200
    assert get(running, first, method=method).status == 200
    issuer.publish(key_for("ES256", 2))
    clocks.advance(10)
    assert told(get(running, issuer.signed(key=key_for("ES256", 3)), method=method)) == (401, "credentials_invalid")
    assert told(get(running, first, method=method)) == (401, "credentials_invalid")  # although it was remembered
    assert get(running, second, method=method).status == 200
    assert fetches == {("one", "success"): 3}
    metrics = ask(f"{running.url}/metrics?format=prometheus").body.decode()
    assert 'gateway_issuer_key_fetches_total{issuer="one",result="success"} 3' in metrics


@pytest.mark.parametrize("ending", ["expired", "withdrawn"])
def test_a_stream_ends_with_its_token(
    gateway: Gateway, issuer: Published, up: RawUpstream, clocks: FakeClocks, ending: str
) -> None:
    up.behave = event_stream
    issuer.publish(key_for("ES256"), key_for("ES256", 2))
    running = gateway(with_issuer(up, issuer=issuer.issuer), clocks.clocks)
    ends = issuer.signed({"exp": claims_of()["iat"] + 110})
    goes_on = issuer.signed(key=key_for("ES256", 2))
    with RawClient(running.port) as ended, RawClient(running.port) as going:
        for client, token in ((ended, ends), (going, goes_on)):
            client.request("GET", headers=(f"Authorization: Bearer {token}",))
            assert client.read_until(b"begun") is not None
        if ending == "expired":
            clocks.advance(100 + LEEWAY)
        else:
            issuer.publish(key_for("ES256", 2))
            clocks.advance(10)
            assert get(running, issuer.signed(header={"kid": "unknown"})).status == 401  # the keys are fetched
        ended.read_exactly(10_000)  # to the end of the connection
        going.sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            going.fill()


def test_all_first_requests_share_one_fetch(gateway: Gateway, issuer: Published, up: RawUpstream) -> None:
    opened = threading.Event()
    issuer.delay = opened.wait
    running = gateway(with_issuer(up, issuer=issuer.issuer), FakeClocks().clocks)
    tokens = [issuer.signed({"sub": f"client-{number}"}) for number in range(30)]
    with ThreadPoolExecutor(len(tokens)) as pool:
        asked = [pool.submit(get, running, token) for token in tokens]
        eventually(lambda: running.live.recorder.in_flight == len(tokens), "all requests wait")
        opened.set()
        assert {one.result().status for one in asked} == {200}
    assert issuer.fetches == 1


def test_unknown_keys_cause_a_bounded_number_of_fetches(
    gateway: Gateway, issuer: Published, up: RawUpstream, clocks: FakeClocks
) -> None:
    running = gateway(with_issuer(up, issuer=issuer.issuer), clocks.clocks)
    for number in range(50):
        token = issuer.signed(header={"kid": f"forged-{number}"})
        assert told(get(running, token)) == (401, "credentials_invalid")
        clocks.advance(0.5)
    assert issuer.fetches <= 1 + 25 / 10


@pytest.mark.parametrize("method", METHODS)
def test_an_issuer_that_is_down_stops_no_token_whose_key_is_known(
    gateway: Gateway, issuer: Published, up: RawUpstream, clocks: FakeClocks, method: str
) -> None:
    running = gateway(with_issuer(up, issuer=issuer.issuer), clocks.clocks)
    assert get(running, issuer.signed(), method=method).status == 200
    issuer.server.close()
    clocks.advance(10)
    other = issuer.signed(key=key_for("ES256", 2))
    answer = get(running, other, method=method)
    assert told(answer) == (503, "issuer_unavailable")
    assert answer.headers["Retry-After"] == "10"
    assert issuer.server.url not in answer.body.decode()
    assert get(running, issuer.signed({"sub": "new"}), method=method).status == 200
    issuer.publish(key_for("ES256", 2))
    issuer.server.listen(issuer.server.port)
    clocks.advance(10)
    assert get(running, other, method=method).status == 200


def test_keys_that_are_too_old_are_not_used(
    gateway: Gateway, issuer: Published, up: RawUpstream, clocks: FakeClocks
) -> None:
    running = gateway(with_issuer(up, issuer=issuer.issuer, stale_for=600), clocks.clocks)
    token = issuer.signed()
    assert get(running, token).status == 200
    issuer.server.close()
    clocks.advance(601)
    assert told(get(running, issuer.signed(key=key_for("ES256", 2)))) == (503, "issuer_unavailable")
    assert told(get(running, token)) == (503, "issuer_unavailable")


def test_a_gateway_starts_without_its_issuer(gateway: Gateway, up: RawUpstream, clocks: FakeClocks) -> None:
    url = refusing_url()
    running = gateway(with_issuer(up, issuer=url), clocks.clocks)
    answer = get(running, signed(claims_of(iss=url)))
    assert told(answer) == (503, "issuer_unavailable")
    assert int(answer.headers["Retry-After"]) >= 1
    assert ask(f"{running.url}/api/x", headers={"X-Client-ID": "bare"}).status == 200


def test_operators_see_an_issuer_whose_keys_cannot_be_fetched(
    gateway: Gateway, issuer: Published, up: RawUpstream, clocks: FakeClocks
) -> None:
    """Before any request has failed; the gateway stays ready."""
    down, token = "127.0.0.1", issuer.signed()
    issuer.server.close()
    running = gateway(with_issuer(up, issuer=issuer.issuer), clocks.clocks)

    def shown(keys: int, *, is_down: bool) -> str | None:
        """Check the views of the issuer; return the time of its last fetch."""
        eventually(lambda: running.live.recorder.key_fetches.total() > 0, "the first fetch")
        clocks.advance(1)  # a second after which /health is rendered again
        health = ask(f"{running.url}/health").json()
        one = health["issuers"]["one"]
        assert (health["status"], one["status"]) == (("warn", "warn") if is_down else ("pass", "pass"))
        assert one["keys"] == keys
        assert (down in one["error"]) if is_down else one["error"] is None
        metrics = ask(f"{running.url}/metrics").json()
        assert metrics["identity"]["issuers"] == {"one": one}
        assert f'gateway_issuer_keys{{issuer="one"}} {keys}.0' in (
            ask(f"{running.url}/metrics?format=prometheus").body.decode()
        )
        assert ask(f"{running.url}/readyz").status == 200
        return None if one["fetched_at"] is None else str(one["fetched_at"])

    assert shown(0, is_down=True) is None
    issuer.server.listen(issuer.server.port)
    assert get(running, token).status == 200
    assert shown(1, is_down=False) is not None
    issuer.server.close()
    clocks.advance(10)
    fetched_at = ask(f"{running.url}/health").json()["issuers"]["one"]["fetched_at"]
    assert told(get(running, issuer.signed(key=key_for("ES256", 2)))) == (503, "issuer_unavailable")
    assert shown(1, is_down=True) == fetched_at


def test_what_a_token_names_is_never_fetched(
    gateway: Gateway, issuer: Published, up: RawUpstream, clocks: FakeClocks
) -> None:
    other = Published()
    running = gateway(with_issuer(up, issuer=issuer.issuer), clocks.clocks)
    assert get(running, other.signed(), X_Client_ID="bare").status == 200  # the upstream's
    named = {"jku": f"{other.server.url}/keys", "x5u": f"{other.server.url}/keys", "kid": "theirs"}
    clocks.advance(10)
    assert told(get(running, issuer.signed(header=named))) == (401, "credentials_invalid")
    other.server.close()
    assert not other.server.requests


# Routes that require something


@pytest.mark.parametrize("method", METHODS)
def test_a_route_can_require_scopes_and_claims(
    gateway: Gateway, sections: dict[str, Any], clocks: FakeClocks, method: str
) -> None:
    routes = [
        {"name": "all", "path": "/api", "upstream": "up"},
        {"name": "scoped", "path": "/api/scoped", "upstream": "up", "require": {"scopes": ["read", "write"]}},
        {"name": "claimed", "path": "/api/claimed", "upstream": "up", "require": {"claims": {"org.role": "admin"}}},
    ]
    running = gateway(sections | {"routes": routes}, clocks.clocks)

    def at(path: str, **claims: Any) -> Answer:
        return get(running, signed(claims_of(**claims)), method=method, path=f"/api/{path}")

    for _ in range(2):
        assert at("free").status == 200
        assert at("scoped", scope="read write more").status == 200
        assert at("claimed", org={"role": ["user", "admin"]}).status == 200
        refused = at("scoped", scope="read writer")
        assert told(refused) == (403, "credentials_insufficient")
        assert refused.json()["detail"] == "The route 'scoped' requires the scope 'write'."
        assert refused.headers["WWW-Authenticate"] == (
            'Bearer realm="api-gateway", error="insufficient_scope", scope="read write"'
        )
        assert told(at("claimed", org={"role": "user"})) == (403, "credentials_insufficient")
        bare = ask(f"{running.url}/api/scoped", method=method, headers={"X-Client-ID": "acme"})
        assert told(bare) == (401, "credentials_required")
        assert bare.headers["WWW-Authenticate"] == 'Bearer realm="api-gateway"'
        assert told(get(running, "opaque", method=method, path="/api/scoped")) == (401, "credentials_required")


# Start and reload


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"jwks_file": "missing.json"}, "identity.jwt.issuers.one.jwks_file: cannot be used: No such file"),
        ({"jwks_file": None, "ca_file": "missing.pem"}, "identity.jwt.issuers.one.ca_file: cannot be used"),
    ],
)
def test_a_file_that_cannot_be_used_is_found_by_a_check(
    running: RunningGateway, change: dict[str, Any], message: str
) -> None:
    config = changed(running.config, **change)
    found = [str(finding) for finding in startup_errors(config)]
    assert any(message in line for line in found), found


def test_a_missing_package_is_found_by_a_check(running: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise StartupError("identity.sources: jwt needs the package joserfc")

    monkeypatch.setattr("api_gateway.assembly.issuers.jose", missing)
    found = [str(finding) for finding in startup_errors(running.config)]
    assert "identity.sources: jwt needs the package joserfc" in found


def changed(config: Any, **issuer: Any) -> Any:
    """Return a configuration with other settings of its issuer."""
    jwt = config.identity.jwt
    one = jwt.issuers["one"].model_copy(update={k: Path(v) if isinstance(v, str) else v for k, v in issuer.items()})
    identity = config.identity.model_copy(update={"jwt": jwt.model_copy(update={"issuers": {"one": one}})})
    return config.model_copy(update={"identity": identity})


async def test_a_reload_keeps_keys_and_tokens_that_have_not_changed(tmp_path: Path, issuer: Published) -> None:
    def config(**changes: Any) -> GatewayConfig:
        one = {"issuer": issuer.issuer, "audiences": [AUDIENCE]}
        two = {"issuer": "any", "audiences": [AUDIENCE], "secret": "x" * 32, **changes}
        identity = {"sources": ["jwt", "address"], "jwt": {"issuers": {"one": one, "two": two}}}
        return GatewayConfig.model_validate({"state_dir": tmp_path, "identity": identity})

    issuers = Issuers(FakeClocks().clocks, lambda: None, lambda _issuer, _succeeded: None)
    first = issuers.plan(config(), None)
    assert first is not None
    issuers.follow(first)
    assert issuers.plan(config(), first) is first
    second = issuers.plan(config(leeway=5), first)
    assert second is not None
    assert (second is first, second.keys["one"] is first.keys["one"]) == (False, True)
    assert second.keys["two"] is not first.keys["two"]
    issuers.follow(second)
    assert len(issuers._tasks) == 2
    issuers.follow(None)
    assert not issuers._tasks
    await issuers.close()
    await asyncio.sleep(0)
    assert not issuers._ending
