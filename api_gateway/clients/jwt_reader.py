"""Reads JSON Web Tokens (RFC 7519) and refuses what no key can make valid, by the rules of RFC 8725. Pure.

A token is recognised if its claim `iss` is a configured issuer; any other value is not for the gateway. Its header
begins with `{"`, as every issuer writes it, so that most values need not be read (see `MARKER`). What the
token itself names is never fetched and never used as a key (`jku`, `x5u`, `jwk`, `x5c`).
"""

import binascii
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import Any, NoReturn

from api_gateway.clients.claim_paths import ClaimPath

MAX_HEADER_BYTES = 8_192  # of the encoded header; it may contain a chain of certificates
MAX_HEADERS = 256  # whose meaning is remembered
_MAX_KID = 512  # characters
_TOKEN = re.compile(rb"eyJ[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")
_EMBEDDED = re.compile(rb"(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]++\.[A-Za-z0-9_-]++\.[A-Za-z0-9_-]*+")
_MAX_EMBEDDED = 4  # tokens in one value
MARKER = b"eyJ"  # the beginning of an encoded object that begins with {"
_APPLICATION = "application/"


class TokenFault(StrEnum):
    """Why a recognised token is invalid, in words that contain no part of it."""

    TOO_LARGE = "The token is larger than identity.jwt.max_token_bytes."
    MALFORMED = "The token is malformed."
    REPEATED_MEMBER = "The token has a member twice, which readers understand in different ways."
    ALGORITHM = "The token's algorithm is not permitted for its issuer."
    CRITICAL = "The token has critical header parameters, which are not supported."
    TYPE = "The token is of another type, and no access token."
    NESTED = "The token contains another token."
    NO_EXPIRY = "The token never expires: it has no claim exp."
    TIMES = "The token's times (exp, nbf, iat) are not numbers, or contradict each other."
    EXPIRED = "The token has expired."
    NOT_YET_VALID = "The token is not valid yet."
    ISSUED_LATER = "The token was issued in the future."
    AUDIENCE = "The token is for another audience."
    BOUND = "The token is bound to a key or certificate of its client (cnf), whose proof the gateway does not verify."
    UNKNOWN_KEY = "The token was signed with a key that its issuer does not publish."
    SIGNATURE = "The token's signature is wrong."
    CLIENT = "The token does not name its client, or not by 1 to 128 visible ASCII characters that are no API key."


@dataclass(frozen=True, slots=True)
class IssuerTerms:
    """The requirements for the tokens of an issuer.

    `name` is its name in the configuration; `types` are in lower case.
    """

    name: str
    audiences: frozenset[str]
    algorithms: frozenset[str]
    types: frozenset[str] = frozenset({"jwt", "at+jwt"})
    leeway: float = 30.0
    audience: ClaimPath = field(default_factory=lambda: ClaimPath.of("aud"))
    accepts_bound: bool = False  # tokens that are bound to a key of the client (RFC 7800)


@dataclass(slots=True, repr=False)
class ReadToken:
    """A recognised token. Times are seconds since the epoch; `fault` is why no key can make it valid.

    `digest` is the SHA-256 of the token, by which it is remembered. The other fields are not set if there is a fault.
    """

    terms: IssuerTerms | None  # of its issuer; None if the token is too large or too deeply nested to be read
    digest: bytes
    fault: TokenFault | None = None
    algorithm: str = ""
    kid: str | None = None
    signed: bytes = b""
    signature: bytes = b""
    expires: float = 0.0
    not_before: float = -math.inf
    issued: float = -math.inf
    claims: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        name = None if self.terms is None else self.terms.name
        return f"<ReadToken of issuer {name!r}>"  # never the token or its claims


class _RepeatedMember(Exception):
    pass


class TokenReader:
    """Reads tokens under one configuration."""

    def __init__(self, issuers: Mapping[str, IssuerTerms], *, max_bytes: int) -> None:
        """`issuers` are the terms by the claim `iss`. A token of more than `max_bytes` is refused unread."""
        self._issuers = dict(issuers)
        self._max_bytes = max_bytes
        self._read_header = lru_cache(maxsize=MAX_HEADERS)(_object)  # tokens of one key have equal headers

    def __repr__(self) -> str:
        return f"<TokenReader of {len(self._issuers)} issuers>"

    def read(self, token: bytes) -> ReadToken | None:
        """Return a token of a configured issuer, or a fault; None for every other value.

        A value that has the form of a token, but is too large or too deeply nested to be read, is a fault: its issuer
        is unknown.
        """
        if _TOKEN.fullmatch(token) is None:
            return None
        segments = token.split(b".")
        if len(token) > self._max_bytes or len(segments[0]) > MAX_HEADER_BYTES:
            return ReadToken(None, b"", TokenFault.TOO_LARGE)
        header, header_fault = self._read_header(segments[0])
        claims, claims_fault = _object(segments[1])
        if header is None or claims is None or "alg" not in header:
            return None if claims is not None or claims_fault is None else ReadToken(None, b"", claims_fault)
        terms = self._terms_of(claims.get("iss"))
        if terms is None:
            return None
        digest = hashlib.sha256(token).digest()
        fault = header_fault or claims_fault
        fault = fault or _fault_of_header(header, terms) or _fault_of_claims(claims, terms)
        signature = None if fault is not None else _decoded(segments[2])
        if signature is None:
            return ReadToken(terms, digest, fault or TokenFault.MALFORMED)
        return ReadToken(
            terms,
            digest,
            algorithm=header["alg"],
            kid=header.get("kid"),
            signed=token[: -len(segments[2]) - 1] if segments[2] else token[:-1],
            signature=signature,
            expires=float(claims["exp"]),
            not_before=float(claims.get("nbf", -math.inf)),
            issued=float(claims.get("iat", -math.inf)),
            claims=claims,
        )

    def find(self, value: bytes) -> tuple[bytes, ReadToken] | None:
        """Return the first token of a configured issuer anywhere in a value, or a fault, and its text; else None.

        A lenient upstream may accept it, whatever surrounds it.
        """
        for number, found in enumerate(_EMBEDDED.finditer(value)):
            token = ReadToken(None, b"", TokenFault.MALFORMED) if number == _MAX_EMBEDDED else self.read(found[0])
            if token is not None:
                return found[0], token
        return None

    def _terms_of(self, issuer: Any) -> IssuerTerms | None:
        """Return the terms of a configured issuer; of the first one if there are several, which is a fault."""
        names = issuer if isinstance(issuer, tuple) else (issuer,)
        return next((self._issuers[name] for name in names if isinstance(name, str) and name in self._issuers), None)


def fault_of_time(token: ReadToken, leeway: float, now: float) -> TokenFault | None:
    """Return why a token is not valid at `now`, in seconds since the epoch; None if it is valid."""
    if now >= token.expires + leeway:
        return TokenFault.EXPIRED
    if now < token.not_before - leeway:
        return TokenFault.NOT_YET_VALID
    return TokenFault.ISSUED_LATER if now < token.issued - leeway else None


def _fault_of_header(header: Mapping[str, Any], terms: IssuerTerms) -> TokenFault | None:
    algorithm, kid, kind = header["alg"], header.get("kid"), header.get("typ")
    if not isinstance(algorithm, str) or algorithm not in terms.algorithms:
        return TokenFault.ALGORITHM
    if "crit" in header or "b64" in header:
        return TokenFault.CRITICAL
    if not (kid is None or (isinstance(kid, str) and len(kid) <= _MAX_KID)):
        return TokenFault.MALFORMED
    content = header.get("cty")
    if isinstance(content, str) and content.lower().removeprefix(_APPLICATION) == "jwt":
        return TokenFault.NESTED
    if not isinstance(kind, str | None):
        return TokenFault.MALFORMED
    kind = "jwt" if kind is None else kind.lower().removeprefix(_APPLICATION)
    return None if kind in terms.types else TokenFault.TYPE


def _fault_of_claims(claims: Mapping[str, Any], terms: IssuerTerms) -> TokenFault | None:
    if "exp" not in claims:
        return TokenFault.NO_EXPIRY
    times = [claims[name] for name in ("exp", "nbf", "iat") if name in claims]
    if not all(_is_time(value) for value in times):
        return TokenFault.TIMES
    if any(claims["exp"] <= claims[name] for name in ("nbf", "iat") if name in claims):
        return TokenFault.TIMES
    given: Sequence[Any] = terms.audience.values(claims)
    if not any(one in terms.audiences for one in given if isinstance(one, str)):
        return TokenFault.AUDIENCE
    return TokenFault.BOUND if "cnf" in claims and not terms.accepts_bound else None


def _is_time(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and -(2**53) < value < 2**53  # also false for NaN


def _object(segment: bytes) -> tuple[dict[str, Any] | None, TokenFault | None]:
    """Return the JSON object that a segment encodes, or None, and the fault for which a strict reader refuses it.

    What only some readers accept is read too, because an upstream may be one of them: the gateway must recognise the
    issuer that such a reader sees.
    """
    decoded = _decoded(segment)
    if decoded is None:
        return None, None
    fault = None
    try:
        try:
            found = _STRICT.decode(decoded.decode())
        except ValueError:
            found, fault = _LENIENT.decode(decoded.decode(errors="replace")), TokenFault.MALFORMED
        except _RepeatedMember:
            found, fault = _LENIENT.decode(decoded.decode()), TokenFault.REPEATED_MEMBER
    except ValueError:
        return None, None
    except RecursionError:
        return None, TokenFault.MALFORMED
    return (found if isinstance(found, dict) else None), fault


def _decoded(segment: bytes) -> bytes | None:
    try:
        return binascii.a2b_base64(segment.translate(_FROM_URL) + b"=" * (-len(segment) % 4))
    except binascii.Error:
        return None


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return members of which some are repeated: of each the last value, but all values of `iss` in a tuple."""
    issuers = tuple([value for name, value in pairs if name == "iss"])
    return dict(pairs) | ({"iss": issuers} if len(issuers) > 1 else {})


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _RepeatedMember
    return members


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


_FROM_URL = bytes.maketrans(b"-_", b"+/")
_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)
_LENIENT = json.JSONDecoder(object_pairs_hook=_members, parse_int=float)
