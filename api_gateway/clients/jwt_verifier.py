"""Verifies JSON Web Tokens, and remembers the valid ones until they expire. Reads no clock and fetches nothing."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from api_gateway.clients.api_keys import has_key
from api_gateway.clients.claim_paths import ClaimPath, scopes_of
from api_gateway.clients.issuer_keys import VerificationKey
from api_gateway.clients.jwt_reader import IssuerTerms, ReadToken, TokenFault, fault_of_time
from api_gateway.http1.headers import is_visible_ascii
from api_gateway.models import NANOSECONDS, HeaderList

MAX_FIELD_VALUE = 4_096  # bytes of a claim that upstreams receive as a header field
_FIELD_VALUE = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")


class Keys(Protocol):
    """The keys of an issuer, see `IssuerKeys`."""

    def candidates(self, kid: str | None, algorithm: str) -> Sequence[VerificationKey]:
        """Return the keys that a token's signature may be verified with."""
        ...


@dataclass(frozen=True, slots=True)
class ClaimMeanings:
    """The meanings of the claims of an issuer's tokens.

    `tiers` are the names of tiers by value of the claim `tier`, also in upper case; other values mean nothing.
    """

    client: ClaimPath = field(default_factory=lambda: ClaimPath.of("sub"))
    client_prefix: str = ""
    tier: ClaimPath | None = None
    tiers: Mapping[str, str] = field(default_factory=dict)
    organisation: ClaimPath | None = None
    scopes: tuple[ClaimPath, ...] = (ClaimPath.of("scope"), ClaimPath.of("scp"))
    fields: tuple[tuple[bytes, ClaimPath], ...] = ()  # header fields for upstreams, by name in lower case


@dataclass(frozen=True, slots=True)
class Issuer:
    """An issuer: what its tokens must have, what their claims mean, and its keys."""

    terms: IssuerTerms
    meanings: ClaimMeanings
    keys: Keys


@dataclass(slots=True, repr=False)
class VerifiedToken:
    """The content of a valid token. `expires_ns` is its end on the monotonic clock, with the leeway.

    `claims` are the values of those that routes require, by path.
    """

    issuer: str  # its name in the configuration
    client_id: str
    tier: str | None
    organisation: str | None
    scopes: frozenset[str]
    claims: Mapping[str, tuple[str | int | bool, ...]]
    expires_ns: int
    key: VerificationKey
    fields: HeaderList

    def __repr__(self) -> str:
        return f"<VerifiedToken of {self.client_id!r} by issuer {self.issuer!r}>"

    def is_valid(self, now_ns: int) -> bool:
        """Return whether the token is still valid: it has not expired, and its issuer still publishes its key."""
        return now_ns < self.expires_ns and not self.key.is_withdrawn


@dataclass(frozen=True, slots=True)
class KeyNeeded:
    """The result for a token whose key is not known: the keys may have to be fetched, otherwise it has this fault."""

    fault: TokenFault


class JwtVerifier:
    """Verifies tokens under one configuration. Its only state is the remembered tokens."""

    def __init__(self, issuers: Mapping[str, Issuer], *, max_remembered: int, kept: Sequence[ClaimPath] = ()) -> None:
        """`issuers` are by name. At most `max_remembered` valid tokens are remembered, each with its `kept` claims."""
        self._issuers = dict(issuers)
        self._kept = tuple(kept)
        self._limit = max_remembered
        self._remembered: dict[bytes, VerifiedToken] = {}  # by digest, the earliest first

    def __repr__(self) -> str:
        return f"<JwtVerifier [{len(self._remembered)} of {self._limit} tokens remembered]>"

    def issuer_of(self, token: ReadToken) -> Issuer:
        """Return the issuer of a token without a fault."""
        assert token.terms is not None  # noqa: S101 - see `ReadToken`
        return self._issuers[token.terms.name]

    def has(self, terms: IssuerTerms) -> bool:
        """Return whether this verifier has the same terms for the issuer."""
        known = self._issuers.get(terms.name)
        return known is not None and known.terms == terms

    def recall(self, token: ReadToken, now_ns: int) -> VerifiedToken | None:
        """Return the content of a token that was verified before and is still valid; else None."""
        known = self._remembered.get(token.digest)
        if known is None or known.is_valid(now_ns):
            return known
        del self._remembered[token.digest]
        return None

    def verify(self, token: ReadToken, now: float, now_ns: int) -> VerifiedToken | TokenFault | KeyNeeded:
        """Verify a token: its times, its signature, and that it names its client.

        `now` is seconds since the epoch, `now_ns` the same moment on the monotonic clock.
        """
        if token.fault is not None:
            return token.fault
        issuer = self.issuer_of(token)
        fault = fault_of_time(token, issuer.terms.leeway, now)
        if fault is not None:
            return fault
        candidates = issuer.keys.candidates(token.kid, token.algorithm)
        for key in candidates:
            if key.verify(token.algorithm, token.signed, token.signature):
                return self._accept(token, issuer, key, now, now_ns)
        if not candidates:
            return KeyNeeded(TokenFault.UNKNOWN_KEY)
        if any(token.kid is None or key.kid is None for key in candidates):
            return KeyNeeded(TokenFault.SIGNATURE)  # another key may have replaced them
        return TokenFault.SIGNATURE

    def _accept(
        self, token: ReadToken, issuer: Issuer, key: VerificationKey, now: float, now_ns: int
    ) -> VerifiedToken | TokenFault:
        meanings, claims = issuer.meanings, token.claims
        name = meanings.client.text_value(claims)
        client_id = None if not name else f"{meanings.client_prefix}{name}"
        if client_id is None or not client_id.isascii() or not _is_name(client_id.encode()):
            return TokenFault.CLIENT
        organisation = None if meanings.organisation is None else meanings.organisation.text_value(claims)
        verified = VerifiedToken(
            issuer.terms.name,
            client_id,
            _tier_of(meanings, claims),
            organisation,
            scopes_of(claims, meanings.scopes),
            {path.text: path.values(claims) for path in self._kept},
            now_ns + int((token.expires + issuer.terms.leeway - now) * NANOSECONDS),
            key,
            [(name, value) for name, path in meanings.fields if (value := _field_value(path, claims))],
        )
        self._remember(token.digest, verified)
        return verified

    def _remember(self, digest: bytes, verified: VerifiedToken) -> None:
        while len(self._remembered) >= self._limit:
            del self._remembered[next(iter(self._remembered))]
        self._remembered[digest] = verified


def _is_name(value: bytes) -> bool:
    return is_visible_ascii(value) and not has_key(value)  # ids are logged


def _field_value(path: ClaimPath, claims: Mapping[str, Any]) -> bytes:
    """Return a claim as the value of a header field, a list with commas; empty if it is none, or cannot be one."""
    values = [str(value).lower() if isinstance(value, bool) else str(value) for value in path.values(claims)]
    text = ",".join(values)
    if len(text) > MAX_FIELD_VALUE or not _FIELD_VALUE.fullmatch(text) or (len(values) > 1 and "," in "".join(values)):
        return b""
    return text.encode("ascii")


def _tier_of(meanings: ClaimMeanings, claims: Mapping[str, Any]) -> str | None:
    """Return the tier that a token names: the first of the values that is a tier."""
    if meanings.tier is None:
        return None
    values = [str(value) for value in meanings.tier.values(claims)]
    found = (meanings.tiers.get(value) or meanings.tiers.get(value.upper()) for value in values)
    return next((tier for tier in found if tier is not None), None)
