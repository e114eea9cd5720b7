"""The stages of admission for requests with a credential. They do not concern other requests."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from api_gateway.clients.registry import ClientRegistry
from api_gateway.errors import ClientIdInvalid, GatewayError
from api_gateway.http1.headers import address_key
from api_gateway.limits.refusal import refusal
from api_gateway.models import Charge, Client, Decision
from api_gateway.proxy.admission import OnReply, RequestPlan, StageResult, Wait
from api_gateway.proxy.header_facts import HeaderFacts
from api_gateway.proxy.identity_sources import Claim, CredentialCheck, CredentialQuery, Proof, Verification
from api_gateway.rate_limiter import RateLimiter
from api_gateway.resilience.fair_shares import principal_of
from api_gateway.resilience.priorities import PriorityClasses

ChargesOf = Callable[[str], list[Charge]]


class CredentialStage:
    """Determines the client of a request with a credential. `IdentityStage` determines that of all others.

    If there are several, all must be valid, because upstreams may receive them; the first source's decides. A verified
    credential is remembered with the header set until the registry changes or the credential expires. A credential
    that is invalid, or that cannot be verified from memory, is first charged to the address: so guessing cannot flood
    a store, and all guesses take the same time.
    """

    def __init__(
        self,
        *,
        clients: ClientRegistry,
        priorities: PriorityClasses,
        limiter: RateLimiter,
        charges_of_address: ChargesOf,
        is_enforced: bool = True,
        on_observed: Callable[[RequestPlan, GatewayError], None] | None = None,
        next_number: Callable[[], int] | None = None,
    ) -> None:
        """`charges_of_address` returns the charges of a failed attempt from an address, none if it is exempt.

        `next_number` numbers these decisions, which are then recorded in the exchange; None: they are not recorded.

        Unless `is_enforced`, a request with an invalid credential is identified as if it had none, and `on_observed`
        is called with the error that would have refused it.
        """
        self._clients = clients
        self._priorities = priorities
        self._limiter = limiter
        self._charges_of_address = charges_of_address
        self._is_enforced = is_enforced
        self.on_observed = on_observed
        self._next_number = next_number
        self._silent = self  # the same without callback
        if on_observed is not None:
            self._silent = CredentialStage(
                clients=clients,
                priorities=priorities,
                limiter=limiter,
                charges_of_address=charges_of_address,
                is_enforced=is_enforced,
            )

    def decide(self, plan: RequestPlan) -> StageResult:
        """Set client, priority and principal, and the credential of the exchange."""
        facts = plan.facts
        proof = facts.proof
        if proof is not None and facts.version == self._clients.version and plan.now_ns < proof.expires_ns:
            exchange = plan.exchange
            exchange.client, exchange.credential = facts.client, proof
            plan.principal, plan.priority = facts.principal, facts.priority
            if plan.now_ns >= proof.note_after_ns:
                proof.note_use(plan.now_ns)
            return None
        claim = facts.claim
        if claim is None:
            return None
        return self._verify(plan, _Chain((*facts.further, claim), is_charged=True))

    def inspect(self, plan: RequestPlan) -> StageResult:
        """Find out what `decide` would return. Nothing is charged."""
        claim = plan.facts.claim
        if claim is None:
            return None
        return self._silent._verify(plan, _Chain((*plan.facts.further, claim), is_charged=False))  # noqa: SLF001 - of the same class

    def concerns(self, facts: HeaderFacts) -> bool:
        """See `Stage`."""
        return facts.claim is not None

    def _verify(self, plan: RequestPlan, chain: "_Chain") -> StageResult:
        """Verify the first claim of a chain, and then the others."""
        claim = chain.claims[0]
        found = claim.source.verify(claim, plan.now_ns)
        if isinstance(found, Proof) or (isinstance(found, GatewayError) and not self._is_enforced):
            return self._settle(plan, found, chain)
        plan.exchange.client = self._clients.by_address(address_key(plan.facts.client_address))
        charge = self._charge if chain.is_charged else self._inspect_charge
        return charge(plan, partial(self._proceed, plan, found, chain))

    def _proceed(
        self, plan: RequestPlan, found: GatewayError | CredentialQuery | CredentialCheck, chain: "_Chain"
    ) -> StageResult:
        """Refuse, verify or ask, once the attempt has been charged to the address."""
        plan.exchange.decision = None
        result: Verification = found
        while isinstance(result, CredentialCheck):
            result = result.do()
        if isinstance(result, CredentialQuery):
            # What is proved is as old as the question: a change meanwhile may have revoked it.
            chain = chain._replace(version=self._clients.version)
            return Wait.on(partial(_result_of, result), partial(self._on_verified, chain=chain))
        return self._settle(plan, result, chain)

    def _on_verified(self, plan: RequestPlan, reply: tuple[Proof | GatewayError], *, chain: "_Chain") -> StageResult:
        return self._settle(plan, reply[0], chain)

    def _settle(self, plan: RequestPlan, found: Proof | GatewayError, chain: "_Chain") -> StageResult:
        is_last = len(chain.claims) == 1
        if isinstance(found, GatewayError):
            if self._is_enforced:
                return found
            if is_last:
                return self._observe(plan, found)
            if self.on_observed is not None:
                self.on_observed(plan, found)
        elif is_last:
            found.beside = chain.proofs
            return self._admit(plan, found, self._clients.version if chain.version is None else chain.version)
        else:
            chain = chain._replace(proofs=(*chain.proofs, found))
        return self._verify(plan, chain._replace(claims=chain.claims[1:], version=None))

    # The client

    def _admit(self, plan: RequestPlan, proof: Proof, version: int) -> StageResult:
        """Set the client. `version` is that of the registry for which the proof is valid."""
        facts = plan.facts
        if facts.name_error is not None:
            return ClientIdInvalid(facts.name_error)
        if facts.name is not None and facts.name != proof.client_id:
            error = ClientIdInvalid(
                "The client id names another client than the credential. Send the client's own id, or no id."
            )
            return error if self._is_enforced else self._observe(plan, error)
        client = self._clients.try_get(proof.client_id)
        if client is None:
            return Wait.on(partial(self._clients.look_up, proof.client_id), partial(self._set, proof=proof))
        if facts.further:  # they are verified for every request, because each may expire
            return self._set(plan, client, proof=proof)
        facts.client = self._set_client(plan, proof, client)
        facts.proof, facts.cost, facts.version = proof, -1.0, version
        facts.principal, facts.priority = plan.principal, plan.priority
        return None

    def _set(self, plan: RequestPlan, client: Client, *, proof: Proof) -> StageResult:
        self._set_client(plan, proof, client)
        plan.facts.proof = proof  # for the header fields that upstreams receive
        return None

    def _set_client(self, plan: RequestPlan, proof: Proof, client: Client) -> Client:
        client = self._clients.proved(client, proof.tier)
        plan.exchange.client, plan.exchange.credential = client, proof
        plan.principal = principal_of(client, plan.facts.client_address)
        plan.priority = self._priorities.of(client.quota.name)
        if plan.now_ns >= proof.note_after_ns:
            proof.note_use(plan.now_ns)
        return client

    def _observe(self, plan: RequestPlan, error: GatewayError) -> StageResult:
        """Leave the request to the next source."""
        if self.on_observed is not None:
            self.on_observed(plan, error)
        plan.exchange.client, plan.facts.proof = None, None
        plan.facts.version = -1  # the client that the credential proved before is not that of the next source
        return None

    # The charge of a failed attempt

    def _charge(self, plan: RequestPlan, proceed: Callable[[], StageResult]) -> StageResult:
        charges = self._charges_of_address(plan.facts.client_address)
        if not charges:
            return proceed()
        plan.exchange.cost = 1.0
        plan.exchange.charges = charges
        if self._next_number is not None:
            plan.exchange.number = self._next_number()
        decision = self._limiter.decide(charges, plan.now_ns)
        if decision is None:
            return Wait(partial(self._ask, charges, plan.now_ns), partial(_on_decision, proceed=proceed))
        return _on_decision(plan, decision, proceed=proceed)

    def _inspect_charge(self, plan: RequestPlan, proceed: Callable[[], StageResult]) -> StageResult:
        """Find out whether the address could be charged."""
        charges = self._charges_of_address(plan.facts.client_address)
        if not charges:
            return proceed()
        plan.exchange.cost = 1.0
        inspect = partial(self._limiter.inspect, charges, plan.now_ns)
        return Wait.on(inspect, partial(_on_inspected, proceed=proceed))

    def _ask(self, charges: list[Charge], now_ns: int, on_reply: OnReply) -> None:
        self._limiter.decide_async(charges, now_ns, on_reply)


class _Chain(NamedTuple):
    """The credentials of one request that are still to be verified; the last one decides who the client is.

    `proofs` are what those before have proved. `version` is that of the registry when a question on the first claim
    began; None if there is none.
    """

    claims: tuple[Claim, ...]
    is_charged: bool
    proofs: tuple[Proof, ...] = ()
    version: int | None = None


async def _result_of(query: CredentialQuery) -> tuple[Proof | GatewayError]:
    """Return the result in a tuple: a bare error would be taken for a failure of the query (`Admission.resume`)."""
    return (await query.ask(),)


def _on_decision(plan: RequestPlan, decision: Decision, *, proceed: Callable[[], StageResult]) -> StageResult:
    exchange = plan.exchange
    if decision.allowed:
        if exchange.number:
            exchange.credential_check, exchange.number = (exchange.number, decision), 0
        exchange.charges = ()
        return proceed()
    exchange.decision = decision
    return refusal(exchange, decision)


def _on_inspected(
    plan: RequestPlan, decisions: Sequence[Decision], *, proceed: Callable[[], StageResult]
) -> StageResult:
    (decision,) = decisions
    return proceed() if decision.allowed else refusal(plan.exchange, decision)


class CredentialRouteStage:
    """Refuses a request whose credential does not permit its route."""

    def __init__(
        self, *, is_enforced: bool = True, on_observed: Callable[[RequestPlan, GatewayError], None] | None = None
    ) -> None:
        """Unless `is_enforced`, the request is admitted, and `on_observed` is called with the error."""
        self._is_enforced = is_enforced
        self.on_observed = on_observed

    def decide(self, plan: RequestPlan) -> StageResult:
        """Refuse the request, or go on."""
        proof = plan.exchange.credential
        if not isinstance(proof, Proof) or not proof.is_restricted:
            return None
        errors = map(proof.refusal, plan.ruling_routes)
        error = next((one for one in errors if one is not None), None)
        if error is None or self._is_enforced:
            return error
        if self.on_observed is not None:
            self.on_observed(plan, error)
        return None

    def inspect(self, plan: RequestPlan) -> StageResult:
        """See `Stage`; nothing is counted."""
        return CredentialRouteStage(is_enforced=self._is_enforced).decide(plan)

    def concerns(self, facts: HeaderFacts) -> bool:
        """See `Stage`."""
        return facts.claim is not None
