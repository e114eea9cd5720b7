"""Certificates of clients as a source of identities, and the stage for routes that require one.

A certificate belongs to the connection; it is never read from a header field. TLS has verified its issuer, its dates
and, if that is configured, that it is not revoked. Only its expiry is checked again, for each request, because a
connection may outlive it.
"""

import re

from api_gateway.errors import CertificateRequired, CredentialsInvalid
from api_gateway.http1.headers import Fields
from api_gateway.models import NANOSECONDS, ClientCertificate, Clock
from api_gateway.proxy.admission import RequestPlan, StageResult
from api_gateway.proxy.header_facts import HeaderFacts
from api_gateway.proxy.identity_sources import Claim, Proof, Verification

_CLIENT_ID = re.compile(r"[\x21-\x7e]{1,128}")
_NO_FIELDS = frozenset[bytes]()


class CertificateSource:
    """See `identity_sources.CredentialSource`. A certificate without a name of the kind proves nothing."""

    name = "certificate"
    fields = _NO_FIELDS
    markers: tuple[bytes, ...] = ()

    def __init__(self, by: str, wall_clock: Clock) -> None:
        """`by` is the kind of name that is the client id, see `ClientCertificate`."""
        self.by = by
        self._wall_clock = wall_clock

    def __repr__(self) -> str:
        return f"<CertificateSource by {self.by}>"

    def claim(self, fields: Fields) -> Claim | None:  # noqa: ARG002 - of every source
        """Return None: header fields have no certificate."""
        return None

    def claim_of(self, certificate: ClientCertificate) -> Claim | None:
        """Return the claim of the certificate of a connection."""
        name = certificate.first(self.by)
        if name is None:
            return None
        fault = None
        if _CLIENT_ID.fullmatch(name) is None:
            fault = f"The {self.by} of the certificate is no client id: it must be 1 to 128 visible ASCII characters."
        return Claim(self, (name, certificate.not_after), _NO_FIELDS, fault)

    def verify(self, claim: Claim, now_ns: int) -> Verification:
        """See `CredentialSource`."""
        name, not_after = claim.value
        if claim.fault is not None:
            return claim.error(claim.fault)
        left = not_after - self._wall_clock()
        if left <= 0:
            return CredentialsInvalid("The certificate of the connection has expired.")
        return Proof(claim, name, expires_ns=now_ns + int(left * NANOSECONDS))


class CertificateStage:
    """Refuses requests without a certificate to routes that require one. It charges nothing."""

    def decide(self, plan: RequestPlan) -> StageResult:
        """Refuse the request, or go on."""
        if plan.facts.certificate is not None:
            return None
        for route in plan.ruling_routes:
            if route.requires_certificate:
                return CertificateRequired(f"The route '{route.name}' requires a certificate of the client, by TLS.")
        return None

    def inspect(self, plan: RequestPlan) -> StageResult:
        """See `Stage`."""
        return self.decide(plan)

    def concerns(self, facts: HeaderFacts) -> bool:
        """See `Stage`."""
        return facts.certificate is None
