"""JSON Web Tokens as a source of identities, and the stage for routes that require something of a token.

A token is read once with the header set. The address is charged before its signature is verified, at its first sight;
the verifier remembers it until it expires.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from api_gateway.clients.issuer_keys import IssuerKeys
from api_gateway.clients.jwt_reader import MARKER, ReadToken, TokenFault, TokenReader, fault_of_time
from api_gateway.clients.jwt_verifier import JwtVerifier, KeyNeeded, VerifiedToken
from api_gateway.errors import (
    CHALLENGE,
    CredentialsInsufficient,
    CredentialsInvalid,
    CredentialsRequired,
    GatewayError,
    IssuerUnavailable,
)
from api_gateway.http1.headers import Fields
from api_gateway.models import Clock
from api_gateway.proxy.admission import RequestPlan, StageResult
from api_gateway.proxy.basic_credentials import marks_in_base64, within_basic
from api_gateway.proxy.header_facts import HeaderFacts
from api_gateway.proxy.identity_sources import Claim, CredentialCheck, CredentialQuery, Proof, Verification
from api_gateway.proxy.requirements import Requirement
from api_gateway.proxy.route_table import Route

AUTHORIZATION = b"authorization"
_BEARER = b"bearer"
_DPOP = b"dpop"  # the scheme of tokens that are bound to a key (RFC 9449 section 7.1)
_OTHER_FORM = "Authorization has a token that is not in the form 'Bearer <token>'."
_SENT_TWICE = "Authorization was sent several times; send it once."


class JwtProof(Proof):
    """The proof by a verified token."""

    __slots__ = ("token",)

    def __init__(self, claim: Claim, token: VerifiedToken) -> None:
        super().__init__(
            claim,
            token.client_id,
            expires_ns=token.expires_ns,
            tier=token.tier,
            organisation=token.organisation,
            fields=token.fields,
        )
        self.token = token


class JwtSource:
    """Tokens of the configured issuers in `Authorization: Bearer`; see `identity_sources.CredentialSource`."""

    name = "jwt"
    fields = frozenset({AUTHORIZATION})
    markers = (MARKER, *marks_in_base64(MARKER))

    def __init__(
        self,
        reader: TokenReader,
        verifier: JwtVerifier,
        keys: Mapping[str, IssuerKeys],
        *,
        wall_clock: Clock,
        clock_ns: Callable[[], int],
        is_forwarded: bool = True,
        identity_fields: frozenset[bytes] = frozenset(),
        basis: object = None,
    ) -> None:
        """`keys` are by the name of the issuer. Both clocks show the same moment.

        `is_forwarded`: upstreams receive the tokens. `identity_fields` are the names (lower case) of all header fields
        that upstreams receive of tokens. `basis` are the settings that the source was built from; equal ones need no
        other source.
        """
        self.keys = dict(keys)
        self.identity_fields = identity_fields
        self.basis = basis
        self._withheld = frozenset[bytes]() if is_forwarded else self.fields
        self._reader = reader
        self._verifier = verifier
        self._wall_clock = wall_clock
        self._clock_ns = clock_ns

    def __repr__(self) -> str:
        return f"<JwtSource [{', '.join(self.keys)}; {self._verifier!r}]>"

    def claim(self, fields: Fields) -> Claim | None:
        """Return the token in header fields if its issuer is configured; a fault if it is in another form.

        An upstream might accept it in that form, as the identity of another client than the gateway's.
        """
        values = fields.get(AUTHORIZATION, ())
        for value in values:
            found = self._reader.find(value) or self._reader.find(within_basic(value))
            if found is not None:
                text, token = found
                if len(values) > 1:
                    return Claim(self, token, self._withheld, _SENT_TWICE, is_repeated=True)
                fault = token.fault or (None if _is_regular(value, text, token) else _OTHER_FORM)
                return Claim(self, token, self._withheld, None if fault is None else str(fault))
        return None

    def verify(self, claim: Claim, now_ns: int) -> Verification:
        """Return the proof of a token that was verified before; for any other, its `CredentialCheck`."""
        token: ReadToken = claim.value
        if claim.fault is not None:
            return claim.error(claim.fault)
        known = self._verifier.recall(token, now_ns)
        if known is not None:
            return JwtProof(claim, known)
        fault = fault_of_time(token, self._verifier.issuer_of(token).terms.leeway, self._wall_clock())
        return CredentialCheck(partial(self._verify_signature, claim)) if fault is None else CredentialsInvalid(fault)

    def adopted(self, claim: Claim) -> Claim | None:
        """Return the claim of a source that this one has replaced; None if the issuer or its terms are others now."""
        token: ReadToken = claim.value
        if token.terms is None or not self._verifier.has(token.terms):
            return None
        return replace(claim, source=self)

    def _verify_signature(self, claim: Claim) -> Verification:
        """Verify a token; a question if its key is unknown and may be among those that its issuer publishes now."""
        found = self._result(claim)
        if isinstance(found, KeyNeeded):
            if self._keys_of(claim).may_find():
                return CredentialQuery(partial(self._verify_with_new_keys, claim))
            return self._unknown_key(claim, found)
        return found

    async def _verify_with_new_keys(self, claim: Claim) -> Proof | GatewayError:
        """Wait for the keys of the token's issuer, and verify it with them."""
        await self._keys_of(claim).look_for_new()
        found = self._result(claim)
        return self._unknown_key(claim, found) if isinstance(found, KeyNeeded) else found

    def _result(self, claim: Claim) -> Proof | GatewayError | KeyNeeded:
        found = self._verifier.verify(claim.value, self._wall_clock(), self._clock_ns())
        if isinstance(found, VerifiedToken):
            return JwtProof(claim, found)
        return CredentialsInvalid(found) if isinstance(found, TokenFault) else found

    def _keys_of(self, claim: Claim) -> IssuerKeys:
        return self.keys[self._verifier.issuer_of(claim.value).terms.name]

    def _unknown_key(self, claim: Claim, found: KeyNeeded) -> GatewayError:
        """Return the error for a token whose key is unknown: that of the issuer if its keys could not be fetched."""
        keys = self._keys_of(claim)
        if not keys.is_empty and keys.error is None:
            return CredentialsInvalid(found.fault)
        return IssuerUnavailable(
            f"The keys of issuer '{keys.name}' cannot be obtained, so the token cannot be verified.",
            retry_after=keys.retry_after,
        )


def _is_regular(value: bytes, text: bytes, token: ReadToken) -> bool:
    """Return whether a value of `Authorization` has a token in the form of RFC 6750 section 2.1.

    Spaces alone separate it from the scheme; that of a token that is bound to a key may be `DPoP`.
    """
    scheme, _, credentials = value.partition(b" ")
    if credentials.lstrip(b" ") != text:
        return False
    accepts_bound = token.terms is not None and token.terms.accepts_bound
    return scheme.lower() == _BEARER or (scheme.lower() == _DPOP and accepts_bound)


class RequirementStage:
    """Refuses a request whose route requires scopes or claims that its token does not have.

    An API key has neither, so it does not suffice for such a route.
    """

    def decide(self, plan: RequestPlan) -> StageResult:
        """Refuse the request, or go on."""
        for route in plan.ruling_routes:
            error = self._refusal(plan, route)
            if error is not None:
                return error
        return None

    @staticmethod
    def _refusal(plan: RequestPlan, route: Route) -> GatewayError | None:
        if route.requirement is None:
            return None
        requirement, proof = route.requirement, plan.exchange.credential
        if proof is None:
            return CredentialsRequired(f"The route '{route.name}' requires a token.")
        if isinstance(proof, JwtProof):
            lacking = requirement.lacking(proof.token.scopes, proof.token.claims)
        else:
            lacking = "a token instead of a key"
        return None if lacking is None else _insufficient(route.name, requirement, lacking)

    def inspect(self, plan: RequestPlan) -> StageResult:
        """See `Stage`."""
        return self.decide(plan)

    def concerns(self, _facts: HeaderFacts) -> bool:
        """See `Stage`."""
        return True


def _insufficient(route: str, requirement: Requirement, lacking: str) -> CredentialsInsufficient:
    scopes = f', scope="{" ".join(requirement.scopes)}"' if requirement.scopes else ""
    return CredentialsInsufficient(
        f"The route '{route}' requires {lacking}.",
        headers={"www-authenticate": f'{CHALLENGE}, error="insufficient_scope"{scopes}'},
    )
