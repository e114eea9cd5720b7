"""The sources by which clients are identified: credentials that prove an id, the header field that only claims one.

Reading is pure: what header fields claim is found once and remembered with the header set (`header_facts`).
`credential_stages` verifies: from memory if possible, else by a question to a store or an issuer.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from api_gateway.errors import CredentialsInvalid, CredentialsRepeated, GatewayError
from api_gateway.http1.headers import Fields
from api_gateway.models import ClientCertificate, HeaderList
from api_gateway.proxy.route_table import Route

NO_EXPIRY = 1 << 63  # of a proof that does not expire, in nanoseconds


@dataclass(frozen=True, slots=True)
class Claim:
    """A credential of one of the sources in header fields; what it proves is not known yet.

    `value` belongs to the source and is not a secret that could be shown; it may be a digest. `names` are the header
    fields (lower case) that have the credential. `fault` is why the credential is invalid whatever is stored, in
    words; `is_repeated`: because the request has several, so that it is malformed whether or not they are valid.
    """

    source: "CredentialSource"
    value: Any = field(repr=False)
    names: frozenset[bytes]
    fault: str | None = None
    is_repeated: bool = False

    def error(self, fault: str) -> CredentialsInvalid | CredentialsRepeated:
        """Return a new error for the fault."""
        return CredentialsRepeated(fault) if self.is_repeated else CredentialsInvalid(fault)


class Proof:
    """The proof by a verified credential: the client, until a time on the monotonic clock.

    `tier` is that of a client that is not registered; None is the default. `organisation` is written to the access
    log. `fields` are header fields for upstreams, `lines` the same, each after a line break. `is_restricted`:
    `refusal` may return an error. `note_use` is called for each admitted request from `note_after_ns` on.
    `beside` are the proofs of other credentials of the same request, which must stay valid too.
    `confirmed_version` is the registry version for which the credential was last found valid while streams use it, -1
    if it was not looked at yet.
    """

    __slots__ = (
        "beside",
        "claim",
        "client_id",
        "confirmed_version",
        "expires_ns",
        "fields",
        "is_restricted",
        "lines",
        "note_after_ns",
        "organisation",
        "tier",
    )

    def __init__(
        self,
        claim: Claim,
        client_id: str,
        *,
        expires_ns: int = NO_EXPIRY,
        tier: str | None = None,
        organisation: str | None = None,
        fields: HeaderList | None = None,
        is_restricted: bool = False,
    ) -> None:
        self.claim = claim
        self.client_id = client_id
        self.expires_ns = expires_ns
        self.tier = tier
        self.organisation = organisation
        self.fields = fields or []
        self.lines = b"".join([b"\r\n%b: %b" % pair for pair in self.fields])
        self.is_restricted = is_restricted
        self.note_after_ns = NO_EXPIRY
        self.beside: tuple[Proof, ...] = ()
        self.confirmed_version = -1

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.client_id!r} by {self.claim.source.name}>"

    def refusal(self, route: Route) -> GatewayError | None:  # noqa: ARG002 - for subclasses
        """Return the error if the credential does not permit this route."""
        return None

    def note_use(self, now_ns: int) -> None:
        """Note that a request with the credential was admitted, and set when to be called again."""


@dataclass(frozen=True, slots=True)
class CredentialQuery:
    """A credential that memory does not suffice to verify: `ask` returns the proof or the error."""

    ask: Callable[[], Awaitable[Proof | GatewayError]]


@dataclass(frozen=True, slots=True)
class CredentialCheck:
    """A verification that takes much CPU time but does not wait, such as that of a signature.

    `do` returns the proof, an error, or a question.
    """

    do: Callable[[], "Verification"]


Verification = Proof | GatewayError | CredentialQuery | CredentialCheck


class CredentialSource(Protocol):
    """A source that proves an id by a credential."""

    @property
    def name(self) -> str:
        """The name in `identity.sources`."""
        ...

    @property
    def fields(self) -> frozenset[bytes]:
        """Names (lower case) of the header fields that may have a credential."""
        ...

    @property
    def markers(self) -> tuple[bytes, ...]:
        """Byte strings one of which is in the header section whenever `claim` returns a claim."""
        ...

    def claim(self, fields: Fields) -> Claim | None:
        """Return the credential in header fields; None if there is none that this source issued or accepts. Pure."""
        ...

    def verify(self, claim: Claim, now_ns: int) -> Verification:
        """Return the proof by a claim of this source. Neither waits nor changes anything."""
        ...


class ConnectionSource(CredentialSource, Protocol):
    """A source whose credential belongs to the connection."""

    def claim_of(self, certificate: ClientCertificate) -> Claim | None:
        """Return the claim of the certificate of a connection; None if it has no name that is an id."""
        ...


@runtime_checkable
class KeySource(Protocol):
    """A source whose credentials operators know by an id."""

    def claim_of_id(self, credential_id: str) -> Claim | None:
        """Return the claim of the credential with this id; None if there is none."""
        ...


@dataclass(frozen=True, slots=True)
class IdentitySources:
    """The sources in their order. Credentials are before or behind the header field; the address is last.

    `accepts_header`: an id in the header field identifies a client. `accepts_address`: a request that no other source
    applies to is that of its address.
    """

    first: tuple[CredentialSource, ...] = ()  # before the header field
    behind: tuple[CredentialSource, ...] = ()  # behind it: they apply only to requests without an id
    accepts_header: bool = True
    accepts_address: bool = True
    connection: ConnectionSource | None = None  # also one of `first` or `behind`

    @property
    def credentials(self) -> tuple[CredentialSource, ...]:
        """The sources that prove an id."""
        return self.first + self.behind

    def claim_of_key(self, key_id: str) -> Claim | None:
        """Return the claim of the credential that operators know by this id; None if there is none."""
        found = (source.claim_of_id(key_id) for source in self.credentials if isinstance(source, KeySource))
        return next((claim for claim in found if claim is not None), None)

    @property
    def fields(self) -> frozenset[bytes]:
        """Names (lower case) of all header fields that may have a credential."""
        return frozenset[bytes]().union(*(source.fields for source in self.credentials))

    @property
    def markers(self) -> tuple[bytes, ...]:
        """The markers of all sources; header sections without any of them have no credential."""
        return tuple(dict.fromkeys(marker for source in self.credentials for marker in source.markers))

    def claims(self, fields: Fields, *, has_name: bool) -> tuple[Claim | None, tuple[Claim, ...]]:
        """Return the claim that decides, None if none does, and all other claims of these sources."""
        found = [claim for source in self.credentials if (claim := source.claim(fields)) is not None]
        if not found or (has_name and self.accepts_header and found[0].source in self.behind):
            return None, tuple(found)
        return found[0], tuple(found[1:])

    def with_certificate(
        self, claim: Claim | None, further: tuple[Claim, ...], certificate: ClientCertificate, *, has_name: bool
    ) -> tuple[Claim | None, tuple[Claim, ...]]:
        """Return `claims` for a request whose header fields have these, on a connection with this certificate."""
        own = None if self.connection is None else self.connection.claim_of(certificate)
        if own is None:
            return claim, further
        places, known = self.credentials, further if claim is None else (claim, *further)
        found = sorted((*known, own), key=lambda one: places.index(one.source))
        if has_name and self.accepts_header and found[0].source in self.behind:
            return None, tuple(found)
        return found[0], tuple(found[1:])


HEADER_AND_ADDRESS = IdentitySources()
