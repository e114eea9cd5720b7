"""Keys, tokens and issuers for tests. Tokens are signed without the checks of a library, so they may be broken."""

import base64
import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from joserfc.jwk import ECKey, Key, OctKey, OKPKey, RSAKey
from joserfc.jws import JWSRegistry

from api_gateway.clients.api_keys import new_key
from api_gateway.clients.issuer_keys import VerificationKey
from api_gateway.clients.jwt_reader import TokenFault
from tests.kit import RawRequest, RawUpstream, Wire, reply

ISSUER = "https://issuer.test/realms/one"
AUDIENCE = "https://api.test"
NOW = 1_800_000_000.0  # `FakeClocks` begins at this wall clock
LEEWAY = 30  # seconds, the default
MAX_BYTES = 8192  # of a token, the default
DISCOVERY = "/.well-known/openid-configuration"


@cache
def key_for(algorithm: str, number: int = 1) -> Key:
    """Return a private key for an algorithm, always the same for one number."""
    parameters: Any = {"kid": f"{algorithm}-{number}", "use": "sig"}
    match algorithm[:2]:
        case "RS" | "PS":
            return RSAKey.generate_key(2048, parameters)
        case "ES":
            return ECKey.generate_key({"256": "P-256", "384": "P-384", "512": "P-521"}[algorithm[2:]], parameters)
        case "Ed":
            return OKPKey.generate_key("Ed448" if algorithm == "Ed448" else "Ed25519", parameters)
    return OctKey.generate_key(512, parameters)


def key_set(*keys: Key) -> bytes:
    """Return the key set that an issuer of these keys publishes."""
    return json.dumps({"keys": [key.as_dict(private=False) for key in keys]}).encode()


def encoded(value: Any) -> bytes:
    """Return a value as a segment of a token: bytes as they are, others as JSON."""
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(content).rstrip(b"=")


def claims_of(**changes: Any) -> dict[str, Any]:
    """Return the claims of a valid token of one hour, with changes; None removes a claim."""
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "acme", "iat": NOW - 10, "exp": NOW + 3600, **changes}
    return {name: value for name, value in claims.items() if value is not None}


def signed(
    claims: Any = None,
    *,
    algorithm: str = "ES256",
    key: Key | None = None,
    header: Mapping[str, Any] | bytes | None = None,
) -> bytes:
    """Return a token. `header` replaces parameters of the header, or all of it if it is bytes."""
    key = key or key_for(algorithm)
    usual = {"alg": algorithm, "typ": "JWT", "kid": key.kid}
    whole = header if isinstance(header, bytes) else {**usual, **(header or {})}
    if isinstance(whole, dict):
        whole = {name: value for name, value in whole.items() if value is not None}
    text = encoded(whole) + b"." + encoded(claims_of() if claims is None else claims)
    return text + b"." + encoded(JWSRegistry.algorithms[algorithm].sign(text, key))


class Keys:
    """The keys of an issuer, as `IssuerKeys` has them after a fetch."""

    def __init__(self, *keys: VerificationKey) -> None:
        self.keys = keys

    def candidates(self, kid: str | None, algorithm: str) -> list[VerificationKey]:
        """Return the keys for a token."""
        return [key for key in self.keys if algorithm in key.algorithms and (None in (kid, key.kid) or key.kid == kid)]


class Published:
    """An issuer's server: its OpenID configuration and its keys. `close` and `open` end and continue its service."""

    def __init__(self, slash: str = "") -> None:
        self.server = RawUpstream(self.behave)
        self.issuer = f"{self.server.url}{slash}"
        self.configuration: dict[str, Any] = {"issuer": self.issuer, "jwks_uri": f"{self.server.url}/keys"}
        self.documents: dict[str, bytes] = {"/keys": key_set(key_for("ES256"))}
        self.status = b"200 OK"
        self.delay: Callable[[], object] = bool

    def behave(self, wire: Wire, request: RawRequest) -> None:
        """Respond with a document."""
        self.delay()
        path = request.line.split(b" ")[1].decode()
        documents = {DISCOVERY: json.dumps(self.configuration).encode(), **self.documents}
        status = self.status if path in documents else b"404 Not Found"
        reply(documents.get(path, b""), status)(wire, request)

    def publish(self, *keys: Key) -> None:
        """Publish these keys and no others."""
        self.documents["/keys"] = key_set(*keys)

    @property
    def fetches(self) -> int:
        """How many times the keys were fetched."""
        return sum(request.line.startswith(b"GET /keys ") for request in self.server.requests)

    def signed(self, changes: Mapping[str, Any] | None = None, **settings: Any) -> str:
        """Return a token of this issuer, as text, with changed claims."""
        return signed(claims_of(iss=self.issuer, **(changes or {})), **settings).decode()


# Broken tokens: the list of RFC 8725, and a few more


def repeated(name: str, *values: Any) -> bytes:
    members = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in claims_of(**{name: None}).items()]
    return f"{{{', '.join([*members, *(f'{json.dumps(name)}: {json.dumps(one)}' for one in values)])}}}".encode()


def of_many_levels() -> dict[str, tuple[bytes, TokenFault]]:
    """Return a token with a claim of more levels than the parser takes; none if it takes all that fit in a token."""
    levels = b"[" * 2500 + b"]" * 2500
    try:
        json.loads(levels)
    except RecursionError:
        text = repeated("a", 1).replace(b'"a": 1', b'"a": ' + levels)
        return {"claim of many levels": (signed(text), TokenFault.MALFORMED)}
    return {}


def unsigned(algorithm: str) -> bytes:
    return encoded({"alg": algorithm, "kid": "ES256-1"}) + b"." + encoded(claims_of()) + b"."


def confused() -> bytes:
    """Return a token whose HMAC has the issuer's public key as its secret (RFC 8725 section 2.1)."""
    public = key_for("RS256").as_pem(private=False)
    text = encoded({"alg": "HS256", "kid": "RS256-1"}) + b"." + encoded(claims_of())
    mac = JWSRegistry.algorithms["HS256"].sign(text, OctKey(public, public))
    return text + b"." + encoded(mac)


def altered(change: Callable[[bytes, bytes, bytes], tuple[bytes, bytes, bytes]]) -> bytes:
    header, claims, signature = signed().split(b".")
    return b".".join(change(header, claims, signature))


STRANGER = ECKey.generate_key("P-256", {"kid": "ES256-1"})
BROKEN: dict[str, tuple[bytes, TokenFault]] = {
    "algorithm none": (unsigned("none"), TokenFault.ALGORITHM),
    "algorithm NoNe": (unsigned("NoNe"), TokenFault.ALGORITHM),
    "HMAC with the public key": (confused(), TokenFault.ALGORITHM),
    "algorithm that is a list": (signed(header={"alg": ["ES256"]}), TokenFault.ALGORITHM),
    "algorithm in lower case": (signed(header={"alg": "es256"}), TokenFault.ALGORITHM),
    "algorithm of another key": (signed(header={"alg": "ES384"}), TokenFault.UNKNOWN_KEY),
    "key of a stranger under a known id": (signed(key=STRANGER), TokenFault.SIGNATURE),
    "key within the token": (
        signed(key=STRANGER, header={"jwk": STRANGER.as_dict(private=False)}),
        TokenFault.SIGNATURE,
    ),
    "URL of keys within the token": (
        signed(key=STRANGER, header={"jku": "https://attacker.test/keys", "kid": "theirs"}),
        TokenFault.UNKNOWN_KEY,
    ),
    "key id that is a path": (signed(header={"kid": "../../dev/null"}), TokenFault.UNKNOWN_KEY),
    "key id that is a number": (signed(header={"kid": 1}), TokenFault.MALFORMED),
    "no signature": (unsigned("ES256"), TokenFault.SIGNATURE),
    "signature of zeros": (altered(lambda h, c, _: (h, c, encoded(bytes(64)))), TokenFault.SIGNATURE),
    "signature of another length": (altered(lambda h, c, _: (h, c, encoded(b"x" * 63))), TokenFault.SIGNATURE),
    "signature that is no base64": (altered(lambda h, c, s: (h, c, s[:85])), TokenFault.MALFORMED),
    "claims of another token": (
        altered(lambda h, _, s: (h, encoded(claims_of(sub="admin")), s)),
        TokenFault.SIGNATURE,
    ),
    "critical header": (signed(header={"crit": ["exp"], "exp": 1}), TokenFault.CRITICAL),
    "critical header that is empty": (signed(header={"crit": []}), TokenFault.CRITICAL),
    "payload that is not encoded": (signed(header={"b64": False}), TokenFault.CRITICAL),
    "type of another token": (signed(header={"typ": "logout+jwt"}), TokenFault.TYPE),
    "type of a proof of possession": (signed(header={"typ": "application/dpop+jwt"}), TokenFault.TYPE),
    "type that is a list": (signed(header={"typ": ["JWT"]}), TokenFault.MALFORMED),
    "token within a token": (signed(header={"cty": "JWT"}), TokenFault.NESTED),
    "expired": (signed(claims_of(iat=NOW - 100, exp=NOW - LEEWAY)), TokenFault.EXPIRED),
    "no expiry": (signed(claims_of(exp=None)), TokenFault.NO_EXPIRY),
    "expiry that is text": (signed(claims_of(exp=str(NOW + 60))), TokenFault.TIMES),
    "expiry that is true": (signed(claims_of(iat=None, exp=True)), TokenFault.TIMES),
    "expiry that is endless": (signed(repeated("exp", 1).replace(b'"exp": 1', b'"exp": 1e999')), TokenFault.TIMES),
    "expiry before the issue": (signed(claims_of(iat=NOW + 20, exp=NOW + 10)), TokenFault.TIMES),
    "not valid yet": (signed(claims_of(nbf=NOW + LEEWAY + 1)), TokenFault.NOT_YET_VALID),
    "not before that is text": (signed(claims_of(nbf="now")), TokenFault.TIMES),
    "issued in the future": (signed(claims_of(iat=NOW + LEEWAY + 1)), TokenFault.ISSUED_LATER),
    "another audience": (signed(claims_of(aud="https://elsewhere.test")), TokenFault.AUDIENCE),
    "audience that begins like ours": (signed(claims_of(aud=AUDIENCE + ".attacker.test")), TokenFault.AUDIENCE),
    "no audience": (signed(claims_of(aud=None)), TokenFault.AUDIENCE),
    "audience that is an object": (signed(claims_of(aud={"a": AUDIENCE})), TokenFault.AUDIENCE),
    "subject twice": (signed(repeated("sub", "acme", "admin")), TokenFault.REPEATED_MEMBER),
    "issuer twice, ours first": (signed(repeated("iss", ISSUER, "other")), TokenFault.REPEATED_MEMBER),
    "issuer twice, ours last": (signed(repeated("iss", "other", ISSUER)), TokenFault.REPEATED_MEMBER),
    "expiry that is no JSON": (signed(repeated("exp", 1).replace(b'"exp": 1', b'"exp": NaN')), TokenFault.MALFORMED),
    "expiry of 5000 digits": (
        signed(repeated("exp", 1).replace(b'"exp": 1', b'"exp": ' + b"9" * 5000)),
        TokenFault.MALFORMED,
    ),
    "claim that is no UTF-8": (signed(repeated("a", 1).replace(b'"a": 1', b'"a": "\xff"')), TokenFault.MALFORMED),
    **of_many_levels(),
    "algorithm twice": (signed(header=b'{"alg": "none", "alg": "ES256"}'), TokenFault.REPEATED_MEMBER),
    "bound to a key of the client": (signed(claims_of(cnf={"jkt": "x" * 43})), TokenFault.BOUND),
    "bound to nothing": (signed(claims_of(cnf={})), TokenFault.BOUND),
    "no subject": (signed(claims_of(sub=None)), TokenFault.CLIENT),
    "subject that is empty": (signed(claims_of(sub="")), TokenFault.CLIENT),
    "subject with a line break": (signed(claims_of(sub="acme\r\nX-Tier: PREMIUM")), TokenFault.CLIENT),
    "subject that is not ASCII": (signed(claims_of(sub="\u00e4cme")), TokenFault.CLIENT),
    "subject that is too long": (signed(claims_of(sub="a" * 129)), TokenFault.CLIENT),
    "subject that is an API key": (signed(claims_of(sub=new_key(bytes(32)))), TokenFault.CLIENT),
    "subject that is an object": (signed(claims_of(sub={"id": "acme"})), TokenFault.CLIENT),
    "too large": (signed(claims_of(more="x" * MAX_BYTES)), TokenFault.TOO_LARGE),
    "too large, of another issuer": (signed(claims_of(iss="x", more="x" * MAX_BYTES)), TokenFault.TOO_LARGE),
}
