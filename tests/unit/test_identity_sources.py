"""Identity sources: which one decides, what is forwarded and remembered, and which ids anyone can claim."""

from collections.abc import Callable
from pathlib import Path

import pytest

from api_gateway.assembly.credential_watch import CredentialWatch
from api_gateway.clients.identity_rules import NO_RULES, IdentityRules
from api_gateway.clients.registry import ClientRegistry
from api_gateway.clients.sqlite_store import SqliteClientStore
from api_gateway.errors import (
    ClientIdInvalid,
    CredentialsInsufficient,
    CredentialsInvalid,
    CredentialsRequired,
    GatewayError,
    RateLimited,
)
from api_gateway.http1.headers import Fields, fields_of
from api_gateway.limits.limit_reached import LimitReached
from api_gateway.models import NANOSECONDS, Charge, Client, Exchange, Quota
from api_gateway.proxy.admission import Admission, RequestPlan, StageResult, Wait
from api_gateway.proxy.credential_stages import CredentialRouteStage, CredentialStage
from api_gateway.proxy.header_facts import HeaderReader
from api_gateway.proxy.identity_sources import (
    HEADER_AND_ADDRESS,
    NO_EXPIRY,
    Claim,
    CredentialQuery,
    IdentitySources,
    Proof,
    Verification,
)
from api_gateway.proxy.open_exchanges import OpenExchanges
from api_gateway.proxy.route_table import Route
from api_gateway.proxy.stages import IdentityStage
from api_gateway.rate_limiter import MemoryLimiter
from api_gateway.resilience.priorities import SINGLE_PRIORITY
from tests.cases import each

FREE = Quota.per_second("FREE", 1, 10)
PREMIUM = Quota.per_second("PREMIUM", 20, 200)
ADDRESS = Quota.per_second("address", 1, 3)
PEER = "192.0.2.7"
HOST = b"\r\nhost: gw.test"


class Tickets:
    """A credential source of this test: `Authorization: Ticket <client>`, verified by `results`."""

    name = "ticket"
    fields = frozenset({b"authorization"})
    markers = (b"Ticket ",)

    def __init__(self) -> None:
        self.results: dict[str, Callable[[Claim], Verification]] = {}
        self.verified = 0

    def claim(self, fields: Fields) -> Claim | None:
        found = [value for value in fields.get(b"authorization", ()) if value.startswith(b"Ticket ")]
        return Claim(self, found[0][7:].decode(), self.fields) if found else None

    def verify(self, claim: Claim, now_ns: int) -> Verification:
        self.verified += 1
        result = self.results.get(claim.value)
        return Proof(claim, claim.value) if result is None else result(claim)


class Restricted(Proof):
    """A proof for one route."""

    __slots__ = ()

    def refusal(self, route: Route) -> GatewayError | None:
        return None if route.name == "one" else CredentialsInsufficient("Only for route 'one'.")


class Setup:
    """A registry, the stages and a reader, for one source in an order."""

    def __init__(
        self,
        folder: Path,
        *,
        rules: IdentityRules = NO_RULES,
        order: tuple[str, ...] = ("ticket", "header", "address"),
        is_enforced: bool = True,
    ) -> None:
        self.tickets = Tickets()
        place = order.index("header") if "header" in order else len(order)
        self.sources = IdentitySources(
            first=(self.tickets,) if "ticket" in order[:place] else (),
            behind=(self.tickets,) if "ticket" in order[place:] else (),
            accepts_header="header" in order,
            accepts_address="address" in order,
        )
        self.clients = ClientRegistry(
            {"FREE": FREE, "PREMIUM": PREMIUM}, "FREE", {"acme": "PREMIUM"}, SqliteClientStore(folder), rules=rules
        )
        self.reader = self.another_reader()
        self.limiter = MemoryLimiter([ADDRESS])
        self.observed: list[GatewayError] = []
        self.bare: list[Client] = []
        self.credential_stage = CredentialStage(
            clients=self.clients,
            priorities=SINGLE_PRIORITY,
            limiter=self.limiter,
            charges_of_address=lambda peer: [Charge(f"peer:{peer}", ADDRESS, ADDRESS.cost_ns(1))],
            is_enforced=is_enforced,
            on_observed=lambda _, error: self.observed.append(error),
        )
        self.admission = Admission(
            [
                self.credential_stage,
                IdentityStage(
                    clients=self.clients,
                    priorities=SINGLE_PRIORITY,
                    sources=self.sources,
                    is_enforced=is_enforced,
                    on_bare=self.bare.append,
                    on_observed=lambda _, error: self.observed.append(error),
                ),
            ]
        )

    def another_reader(self) -> HeaderReader:
        """Return a reader that remembers nothing."""
        return HeaderReader(id_header="X-Client-ID", trusted_proxies=(), max_body_bytes=100, sources=self.sources)

    def plan(self, *lines: bytes, now: float = 0) -> RequestPlan:
        """Return a plan of a request on the fast path."""
        head = HOST + b"".join(b"\r\n" + line for line in lines) + b"\r\n"
        rewritten = self.reader.read_lines(PEER, "http", head, 100)
        assert rewritten is not None
        return Admission.plan(rewritten.facts, "GET", "/api", b"/api", int(now * NANOSECONDS))

    def decide(self, *lines: bytes, now: float = 0) -> tuple[RequestPlan, StageResult]:
        """Decide on a request on the fast path."""
        plan = self.plan(*lines, now=now)
        return plan, self.admission.decide(plan)

    def client(self, *lines: bytes, now: float = 0) -> str:
        """Return the id of the client of an admitted request."""
        plan, result = self.decide(*lines, now=now)
        assert result is None
        assert plan.exchange.client is not None
        return plan.exchange.client.id


TICKET = b"authorization: Ticket acme"


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


def test_without_configuration_the_id_decides_and_then_the_address() -> None:
    assert HEADER_AND_ADDRESS.credentials == ()
    assert HEADER_AND_ADDRESS.markers == ()
    assert HEADER_AND_ADDRESS.accepts_header
    assert HEADER_AND_ADDRESS.accepts_address


def test_the_first_source_that_applies_decides(setup: Setup, tmp_path: Path) -> None:
    assert setup.client(TICKET) == "acme"
    assert setup.client(b"x-client-id: initech") == "initech"
    assert setup.client() == PEER
    behind = Setup(tmp_path, order=("header", "ticket", "address"))
    assert behind.client(TICKET) == "acme"
    assert behind.client(b"x-client-id: initech", TICKET) == "initech"
    assert behind.tickets.verified == 1, "the ticket does not decide if there is an id"


def test_a_credential_of_others_belongs_to_the_upstream(setup: Setup) -> None:
    lines = HOST + b"\r\nauthorization: Bearer theirs\r\n"
    rewritten = setup.reader.read_lines(PEER, "http", lines, 100)
    assert rewritten is not None
    assert b"\r\nauthorization: Bearer theirs\r\n" in rewritten.sent
    assert rewritten.facts.claim is None


@pytest.mark.parametrize("name", ["Authorization", "X-Note", "X-Client-ID"])
def test_a_credential_is_found_whatever_came_before_on_the_connection(setup: Setup, name: str) -> None:
    """Requests before it differ from it, and from each other, in its value alone; a field of others has none."""
    before = None
    for value in ("Bearer a", "Bearer b", "Bearer c", "Ticket acme"):
        lines = HOST + f"\r\naccept: x\r\n{name}: {value}\r\n".encode()
        before = setup.reader.read_lines(PEER, "http", lines, 100, before)
        anew = setup.another_reader().read_lines(PEER, "http", lines, 100)
        assert before is not None
        assert anew is not None
        assert before.sent == anew.sent
        assert before.facts.credentials == anew.facts.credentials
        assert (before.facts.claim is None) == (anew.facts.claim is None)
    assert before is not None
    assert (before.facts.claim is None) == (name != "Authorization")


def test_a_credential_of_the_gateway_is_not_forwarded(setup: Setup) -> None:
    rewritten = setup.reader.read_lines(PEER, "http", HOST + b"\r\nAuthorization: Ticket acme\r\naccept: x\r\n", 100)
    assert rewritten is not None
    assert b"Ticket" not in rewritten.sent
    assert b"accept: x" in rewritten.sent
    assert rewritten.facts.credentials == [(b"Authorization", b"Ticket acme")]


def test_both_readers_find_the_same_credential(setup: Setup) -> None:
    parsed = setup.reader.read(PEER, fields_of([(b"Host", b"gw.test"), (b"Authorization", b"Ticket acme")]), "1.1")
    plain = setup.plan(TICKET).facts
    assert parsed.claim == plain.claim
    assert parsed.credentials == plain.credentials


def test_a_proof_is_remembered_until_the_registry_changes(setup: Setup) -> None:
    for _ in range(3):
        assert setup.client(TICKET) == "acme"
    assert setup.tickets.verified == 1
    setup.tickets.results["acme"] = lambda _: CredentialsInvalid("revoked")
    setup.clients.bump_version()
    for _ in range(3):
        assert isinstance(setup.decide(TICKET)[1], CredentialsInvalid)
    assert setup.tickets.verified == 4


def test_a_proof_is_remembered_until_it_expires(setup: Setup) -> None:
    setup.tickets.results["acme"] = lambda claim: Proof(claim, "acme", expires_ns=5 * NANOSECONDS)
    assert setup.client(TICKET, now=0) == "acme"
    setup.tickets.results["acme"] = lambda _: CredentialsInvalid("expired")
    assert setup.client(TICKET, now=4.99) == "acme"
    assert isinstance(setup.decide(TICKET, now=5)[1], CredentialsInvalid)


def test_an_invalid_credential_never_falls_through(setup: Setup) -> None:
    """Also not to the id in the same request, nor after the proof was remembered."""
    setup.tickets.results["bad"] = lambda _: CredentialsInvalid("The ticket is not valid.")
    plan, result = setup.decide(b"authorization: Ticket bad", b"x-client-id: acme")
    assert isinstance(result, CredentialsInvalid)
    assert (result.status, result.reason) == (401, "credentials_invalid")
    assert result.headers["www-authenticate"] == 'Bearer realm="api-gateway", error="invalid_token"'
    assert plan.exchange.client is not None
    assert plan.exchange.client.source == "address"
    assert plan.exchange.decision is None, "the fields about limits would be those of the address"


def test_invalid_credentials_are_charged_to_the_address(setup: Setup) -> None:
    setup.tickets.results["bad"] = lambda _: CredentialsInvalid("The ticket is not valid.")
    results = [type(setup.decide(b"authorization: Ticket bad")[1]) for _ in range(5)]
    assert results == [CredentialsInvalid] * 3 + [LimitReached] * 2
    assert setup.client(TICKET) == "acme", "who has a valid one is not affected"


async def test_a_question_is_asked_after_the_address_was_charged(setup: Setup) -> None:
    asked = 0

    def question(claim: Claim) -> CredentialQuery:
        async def ask() -> Proof | GatewayError:
            nonlocal asked
            asked += 1
            return Proof(claim, "initech")

        return CredentialQuery(ask)

    setup.tickets.results["later"] = question
    for number in range(5):
        plan, result = setup.decide(b"authorization: Ticket later", b"accept: %d" % number)
        if number < 3:
            assert isinstance(result, Wait)
            assert Admission.resume(plan, result, await result.reply(), 0) is None
            assert plan.exchange.client is not None
            assert plan.exchange.client.id == "initech"
            assert isinstance(plan.exchange.credential, Proof)
            setup.clients.bump_version()
        else:
            assert isinstance(result, RateLimited)
    assert asked == 3


async def test_what_was_asked_before_a_change_is_not_remembered_after_it(setup: Setup) -> None:
    """The answer is on its way when the credential is revoked; the next request must not be served by it."""

    def question(claim: Claim) -> CredentialQuery:
        async def ask() -> Proof | GatewayError:
            return Proof(claim, "initech")

        return CredentialQuery(ask)

    setup.tickets.results["later"] = question
    plan, result = setup.decide(b"authorization: Ticket later")
    assert isinstance(result, Wait)
    answer = await result.reply()
    setup.tickets.results["later"] = lambda _: CredentialsInvalid("revoked")
    setup.clients.bump_version()
    assert Admission.resume(plan, result, answer, 0) is None, "it arrived before the change"
    assert isinstance(setup.decide(b"authorization: Ticket later")[1], CredentialsInvalid)


class Stream:
    """An exchange that is open."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.errors: list[GatewayError] = []

    def end(self, error: GatewayError) -> None:
        self.errors.append(error)


@pytest.mark.parametrize("revoked", ["acme", "badge"])
@pytest.mark.parametrize("begins", ["before", "after"])
async def test_a_stream_ends_with_any_credential_of_its_request(setup: Setup, revoked: str, begins: str) -> None:
    """Also with one beside that which decides, and also if the response begins after the revocation."""
    plan = setup.plan(TICKET)
    plan.facts.further = (Claim(setup.tickets, "badge", frozenset()),)
    assert setup.admission.decide(plan) is None
    stream, streams = Stream(plan.exchange), OpenExchanges()
    watch = CredentialWatch(
        setup.clients,
        connections=lambda: (),
        open_exchanges=streams,
        has_credentials=lambda: False,
        adopted=lambda claim: claim,
        clock_ns=lambda: 0,
    )
    with streams.holding(stream):
        if begins == "before":
            plan.exchange.status = 200
        await watch.look()
        assert not stream.errors
        setup.tickets.results[revoked] = lambda _: CredentialsInvalid("revoked")
        setup.clients.bump_version()
        await watch.look()
        if begins == "after":
            assert not stream.errors, "it has no response yet"
            plan.exchange.status = 200
            await watch.look()
    assert [error.reason for error in stream.errors] == ["credentials_invalid"]


def test_an_id_that_contradicts_the_credential_is_refused(setup: Setup) -> None:
    """The upstream receives the id as it was sent, and would take it for proved."""
    assert setup.client(TICKET, b"x-client-id: acme") == "acme"
    result = setup.decide(TICKET, b"x-client-id: initech")[1]
    assert isinstance(result, ClientIdInvalid)
    assert "acme" not in result.detail


def test_a_credential_may_state_a_tier(setup: Setup) -> None:
    setup.tickets.results["initech"] = lambda claim: Proof(claim, "initech", tier="PREMIUM")
    plan, _ = setup.decide(b"authorization: Ticket initech")
    assert plan.exchange.client is not None
    assert plan.exchange.client.quota is PREMIUM


def test_a_credential_may_be_restricted_to_routes(setup: Setup) -> None:
    setup.tickets.results["acme"] = lambda claim: Restricted(claim, "acme", is_restricted=True)
    stage = CredentialRouteStage()
    plan, _ = setup.decide(TICKET)
    assert plan.exchange.credential is not None
    for name, reason in (("one", None), ("two", "credentials_insufficient")):
        plan.route = Route(name, "/api", "up")
        error = stage.decide(plan)
        assert (error.reason if isinstance(error, GatewayError) else None) == reason


def test_stages_of_credentials_do_not_concern_other_requests(setup: Setup) -> None:
    for _ in range(3):
        plan, _ = setup.decide(b"x-client-id: acme")
    assert plan.facts.stages is not None
    assert len(plan.facts.stages) == 1
    assert not setup.credential_stage.concerns(plan.facts)


def test_stages_of_bare_ids_do_not_concern_requests_with_a_credential_unless_it_is_only_observed(
    tmp_path: Path,
) -> None:
    for is_enforced, count in ((True, 1), (False, 2)):
        setup = Setup(tmp_path, is_enforced=is_enforced)
        for _ in range(3):
            plan, _ = setup.decide(TICKET)
            assert plan.exchange.client is not None
            assert plan.exchange.client.id == "acme"
        assert plan.facts.stages is not None
        assert len(plan.facts.stages) == count


# Ids that anyone can claim

VERIFIED = [IdentityRules(clients={"acme": True}), IdentityRules(tiers=frozenset({"PREMIUM"}))]


@pytest.mark.parametrize("rules", VERIFIED)
def test_a_bare_header_cannot_claim_a_client_that_is_verified_only(tmp_path: Path, rules: IdentityRules) -> None:
    setup = Setup(tmp_path, rules=rules)
    for _ in range(2):
        plan, result = setup.decide(b"x-client-id: acme")
        assert isinstance(result, CredentialsRequired)
        assert (result.status, result.reason) == (401, "credentials_required")
        assert result.headers["www-authenticate"] == 'Bearer realm="api-gateway"'
        assert plan.exchange.client is not None
        assert plan.exchange.client.source == "address", "the refusal does not count as a request of the client"
    assert setup.client(TICKET) == "acme"
    assert setup.client(b"x-client-id: initech") == "initech"
    assert len(setup.bare) == 2


@pytest.mark.parametrize("rules", VERIFIED)
def test_observing_admits_and_counts_what_would_be_refused(tmp_path: Path, rules: IdentityRules) -> None:
    setup = Setup(tmp_path, rules=rules, is_enforced=False)
    for _ in range(3):
        assert setup.client(b"x-client-id: acme") == "acme"
    assert [error.reason for error in setup.observed] == ["credentials_required"] * 3
    assert [client.id for client in setup.bare] == ["acme"] * 3


def test_observing_leaves_an_invalid_credential_to_the_next_source(tmp_path: Path) -> None:
    setup = Setup(tmp_path, is_enforced=False)
    setup.tickets.results["bad"] = lambda _: CredentialsInvalid("no")
    for _ in range(3):
        assert setup.client(b"authorization: Ticket bad", b"x-client-id: initech") == "initech"
        assert setup.client(b"authorization: Ticket bad") == PEER
    assert len(setup.observed) == 6


def test_observing_admits_an_id_that_contradicts_the_credential(tmp_path: Path) -> None:
    """As before the credential was read: a migration refuses nobody."""
    setup = Setup(tmp_path, is_enforced=False)
    for _ in range(3):
        assert setup.client(TICKET, b"x-client-id: initech") == "initech"
    assert [error.reason for error in setup.observed] == ["client_id_invalid"] * 3
    assert setup.client(TICKET) == "acme"


def test_a_refused_credential_stays_refused_while_its_id_is_looked_up_elsewhere(setup: Setup) -> None:
    """A proof that was remembered is not revived by another request with the same header set."""
    assert setup.client(TICKET) == "acme"
    setup.tickets.results["acme"] = lambda _: CredentialsInvalid("revoked")
    setup.clients.bump_version()
    assert isinstance(setup.decide(TICKET)[1], CredentialsInvalid)
    setup.client(b"x-client-id: acme")
    assert isinstance(setup.decide(TICKET)[1], CredentialsInvalid)


def test_without_header_and_address_a_credential_is_required(tmp_path: Path) -> None:
    setup = Setup(tmp_path, order=("ticket",))
    assert setup.client(TICKET) == "acme"
    for lines in ((), (b"x-client-id: acme",), (b"x-client-id: a b",)):
        assert isinstance(setup.decide(*lines)[1], CredentialsRequired)


def test_without_the_header_an_id_means_nothing(tmp_path: Path) -> None:
    setup = Setup(tmp_path, order=("ticket", "address"))
    assert setup.client(b"x-client-id: acme") == PEER


@each(
    ("rules", "stored", "has_keys", "expected"),
    [
        (NO_RULES, None, False, False),
        (NO_RULES, None, True, True),
        (NO_RULES, False, True, False),
        (NO_RULES, True, False, True),
        (IdentityRules(clients={"acme": False}), None, True, False),
        (IdentityRules(clients={"acme": False}), True, True, True),
        (IdentityRules(clients={"acme": True}), False, True, False),
        (IdentityRules(tiers=frozenset({"FREE"})), False, False, True),
    ],
)
def test_what_makes_an_id_verified_only(
    rules: IdentityRules,
    stored: bool | None,  # noqa: FBT001 - likewise
    has_keys: bool,  # noqa: FBT001 - a parameter of the test
    expected: bool,  # noqa: FBT001 - likewise
) -> None:
    """A tier that requires it, else the client's own setting, stored or configured, else whether it has keys."""
    assert rules.is_verified_only("acme", "FREE", stored=stored, has_keys=has_keys) is expected


def test_a_claim_and_a_proof_show_no_credential() -> None:
    claim = Claim(Tickets(), "secret", frozenset())
    assert "secret" not in repr(claim)
    assert "secret" not in repr(Proof(claim, "acme"))
    assert Proof(claim, "acme").expires_ns == NO_EXPIRY


def test_observing_an_expired_credential_forgets_the_client_that_it_proved(tmp_path: Path) -> None:
    setup = Setup(tmp_path, is_enforced=False)
    setup.tickets.results["acme"] = lambda claim: Proof(claim, "acme", expires_ns=5 * NANOSECONDS)
    assert setup.client(TICKET, now=1) == "acme"
    setup.tickets.results["acme"] = lambda _: CredentialsInvalid("expired")
    assert setup.client(TICKET, now=6) == PEER
