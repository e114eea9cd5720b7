"""Sections of JSON Web Tokens: their issuers, what a token must have, and what a route requires of it."""

from typing import Annotated, Literal, get_args
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, model_validator

from api_gateway.http1.headers import inspected_headers
from api_gateway.settings.secret import Secret, SecretFile
from api_gateway.settings.setting_types import (
    CLAIM_PATH,
    CLAIM_PREFIX,
    OWN_HEADER,
    SCOPE,
    Duration,
    FilePath,
    Identifier,
    Section,
    Size,
    TierName,
)
from api_gateway.settings.value_checks import ValueCheck, ValueReader

HMAC = {"HS256": 32, "HS384": 48, "HS512": 64}  # the shortest secret in bytes (RFC 7518 section 3.2)
MAX_ISSUER = 512
_OF_HTTP = frozenset(
    {
        b"accept",
        b"accept-encoding",
        b"authorization",
        b"content-encoding",
        b"content-type",
        b"cookie",
        b"date",
        b"range",
    }
    | {b"origin", b"idempotency-key", b"if-match", b"if-none-match", b"sec-websocket-key", b"sec-websocket-protocol"}
)

Algorithm = Literal[
    "RS256",
    "RS384",
    "RS512",
    "PS256",
    "PS384",
    "PS512",
    "ES256",
    "ES384",
    "ES512",
    "EdDSA",
    "Ed25519",
    "Ed448",
    "HS256",
    "HS384",
    "HS512",
]
ASYMMETRIC = tuple([name for name in get_args(Algorithm) if name not in HMAC])
ClaimPathSetting = Annotated[str, Field(pattern=CLAIM_PATH)]
ScopeName = Annotated[str, Field(pattern=SCOPE)]
Text = Annotated[str, Field(min_length=1, max_length=512)]
_ClaimValue = Text | int | bool


def _issuer(value: str) -> str:
    """Check an issuer: it is compared as it is, so nothing of it is normalised."""
    if len(value) > MAX_ISSUER or not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError(f"must be at most {MAX_ISSUER} visible ASCII characters")
    return value


def _document_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be an https URL")
    if parts.username is not None or parts.fragment:
        raise ValueError("must have neither a user name nor a fragment")
    return value


def _listed(value: object) -> object:
    return [value] if isinstance(value, str | int | bool) else value


def _identity_header(name: str) -> str:
    if name.lower().encode() in inspected_headers(frozenset()) | _OF_HTTP:
        raise ValueError("has a meaning of its own, so it cannot have a claim")
    return name


IdentityHeader = Annotated[str, Field(pattern=OWN_HEADER), ValueCheck(_identity_header)]
IssuerName = Annotated[str, Field(min_length=1), ValueCheck(_issuer)]
DocumentUrl = Annotated[str, ValueCheck(_document_url)]


class IssuerSection(Section):
    """An issuer of tokens: where its keys are, what its tokens must have, and what their claims mean.

    The keys are those of `jwks_url`, `jwks_file` or `secret`; by default, those that the issuer's OpenID configuration
    names (`/.well-known/openid-configuration`).
    """

    issuer: IssuerName = Field(description="The claim iss of its tokens, compared character by character.")
    audiences: list[Text] = Field(min_length=1, description="A token must be for one of these.")
    audience_claim: ClaimPathSetting = Field(
        default="aud", description="The claim with the audience; Cognito: client_id."
    )
    jwks_url: DocumentUrl | None = Field(
        default=None, description="The URL of the key set. None: by the issuer's OpenID configuration."
    )
    jwks_file: FilePath | None = Field(default=None, description="A JSON Web Key Set, read again at refresh_interval.")
    secret: Secret | None = Field(default=None, description="For HS256, HS384 and HS512 only; at least 32 bytes.")
    secret_file: SecretFile = None
    allow_http: bool = Field(default=False, description="Whether keys may be fetched without TLS, except on loopback.")
    ca_file: FilePath | None = Field(default=None, description="A PEM file, instead of the system's authorities.")
    algorithms: list[Algorithm] | None = Field(
        default=None, min_length=1, description="None: all asymmetric ones; with a secret, HS256."
    )
    types: list[Text] = Field(
        default=["JWT", "at+jwt"], min_length=1, description="Values of typ; JWT also permits a token without typ."
    )
    accept_bound: bool = Field(
        default=False,
        description="Whether to accept tokens that are bound to a key (claim cnf), also as DPoP; upstreams verify it.",
    )
    leeway: Duration = Field(default=30, ge=0, le=600, description="Seconds by which clocks may differ.")
    client_claim: ClaimPathSetting = Field(default="sub", description="The claim with the id of the client.")
    client_prefix: str = Field(
        default="", pattern=CLAIM_PREFIX, description="Written before the claim, to keep clients of issuers apart."
    )
    tier_claim: ClaimPathSetting | None = Field(
        default=None, description="For clients that have no tier of their own."
    )
    tiers: dict[Text, TierName] = Field(default={}, description="The tier by value of tier_claim; {}: its own name.")
    organisation_claim: ClaimPathSetting | None = Field(
        default=None, description="The claim with the organisation of the client."
    )
    headers: dict[IdentityHeader, ClaimPathSetting] = Field(
        default={}, description="Header fields that upstreams receive, by name: the claim. Clients cannot send them."
    )
    scope_claims: list[ClaimPathSetting] = Field(default=["scope", "scp"], description="Claims that list scopes.")
    refresh_interval: Duration = Field(
        default=300, ge=10, le=86_400, description="Seconds between two fetches of keys."
    )
    unknown_key_interval: Duration = Field(
        default=10, ge=1, le=3600, description="Seconds between fetches for tokens whose key is unknown."
    )
    stale_for: Duration = Field(
        default=86_400, ge=0, le=31_536_000, description="Seconds for which keys are used if none can be fetched."
    )

    @model_validator(mode="after")
    def _agree(self) -> "IssuerSection":
        given = [name for name in ("jwks_url", "jwks_file", "secret") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"needs one source of keys, got {' and '.join(given)}")
        _check_secret(self.secret, self.algorithms)
        url = self.document_url
        if url is not None and not self.permits(url):
            setting = "jwks_url" if self.jwks_url is not None else "issuer"
            raise ValueError(
                f"{setting} must be an https URL, as whoever changes the keys on their way makes valid tokens;"
                " allow_http: true permits it"
            )
        return self

    @property
    def document_url(self) -> str | None:
        """The URL of the keys, or of the OpenID configuration; None if neither is fetched."""
        if self.secret is not None or self.jwks_file is not None:
            return None
        return self.jwks_url or f"{self.issuer.removesuffix('/')}/.well-known/openid-configuration"

    def permits(self, url: str) -> bool:
        """Return whether keys, or the URL of keys, may be fetched from `url`."""
        try:
            _document_url(url)
        except ValueError:
            return False
        return self.allow_http or _is_safe(url)

    @property
    def permitted(self) -> tuple[str, ...]:
        """The permitted algorithms: `algorithms`; by default HS256 with a secret, else all asymmetric ones."""
        if self.algorithms is not None:
            return tuple(self.algorithms)
        return ASYMMETRIC if self.secret is None else ("HS256",)


def _check_secret(secret: SecretStr | None, algorithms: list[Algorithm] | None) -> None:
    if secret is None:
        symmetric = [name for name in algorithms or () if name in HMAC]
        if symmetric:
            raise ValueError(f"{symmetric[0]} needs a secret or a secret_file: public keys never verify it")
        return
    chosen = algorithms or ["HS256"]
    others = [name for name in chosen if name not in HMAC]
    if others:
        raise ValueError(f"a secret is for HS256, HS384 and HS512, got {others[0]}")
    needed = max(HMAC[name] for name in chosen)
    if len(secret.get_secret_value().encode()) < needed:
        raise ValueError(f"the secret must have at least {needed} bytes")


def _is_safe(url: str) -> bool:
    parts = urlsplit(url)
    host = parts.hostname or ""
    is_loopback = host in ("localhost", "::1") or host.startswith("127.")
    return parts.scheme == "https" or (parts.scheme == "http" and is_loopback)


class JwtSection(Section):
    """JSON Web Tokens as identities: `Authorization: Bearer` with a token of one of the issuers."""

    issuers: dict[Identifier, IssuerSection] = Field(default={}, description="Issuers by name.")
    max_token_bytes: Size = Field(default=8192, ge=256, le=65_536, description="A larger token is refused unread.")
    forward: bool = Field(
        default=True, description="Whether upstreams receive tokens; if not, routes with forward_credentials."
    )
    max_remembered: int = Field(
        default=10_000,
        ge=1,
        le=10_000_000,
        description="Verified tokens that each worker remembers until they expire.",
    )


class RequireSection(Section):
    """The requirements of a route for tokens: every scope, and for each claim (by path) one of the values."""

    scopes: list[ScopeName] = Field(default=[], description="Scopes that a token must have, all of them.")
    claims: dict[
        ClaimPathSetting,
        Annotated[
            list[_ClaimValue],
            Field(min_length=1),
            ValueReader(
                _listed, json_schema_input_type=Annotated[list[_ClaimValue], Field(min_length=1)] | _ClaimValue
            ),
        ],
    ] = Field(default={}, description="Values by path; a claim that is a list must contain one of them.")

    @model_validator(mode="after")
    def _requires_something(self) -> "RequireSection":
        if not self.scopes and not self.claims:
            raise ValueError("must have scopes or claims")
        return self
