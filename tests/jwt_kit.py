"""Keys, tokens and issuers for tests. Tokens are signed without the checks of a library, so they may be broken."""

import base64
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from joserfc.jwk import ECKey, Key, OctKey, OKPKey, RSAKey
from joserfc.jws import JWSRegistry

ISSUER = "https://issuer.test/realms/one"
AUDIENCE = "https://api.test"
NOW = 1_800_000_000.0  # `FakeClocks` begins at this wall clock


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
