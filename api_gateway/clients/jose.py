"""Keys and signatures of JSON Web Tokens: the only module that knows the library joserfc (extra `jwt`).

It is imported only if the configuration has issuers. Only public keys are read from a key set, never symmetric ones:
a published key must not become the secret of an HMAC.
"""

import base64
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from joserfc.errors import JoseError
from joserfc.jwk import JWKRegistry, Key, OctKey
from joserfc.jws import JWSRegistry

MAX_KEYS = 64  # of a key set
MIN_RSA_BITS, MAX_RSA_BITS = 2048, 8192  # weaker ones can be broken (RFC 7518 section 3.3), larger ones cost much time
_MAX_EXPONENT_BYTES = 8
_MAX_KID = 512  # characters
_EDWARDS = {"EdDSA": ("Ed25519", "Ed448"), "Ed25519": ("Ed25519",), "Ed448": ("Ed448",)}
_PUBLIC = frozenset({"kty", "kid", "use", "key_ops", "alg", "n", "e", "crv", "x", "y"})
_ASYMMETRIC = ("RSA", "EC", "OKP")


class JoseKey:
    """A key of an issuer; see `issuer_keys.VerificationKey`."""

    __slots__ = ("_key", "_verify", "algorithms", "identity", "is_withdrawn", "kid")

    def __init__(self, key: Key, kid: str | None, permitted: Collection[str]) -> None:
        """Raises ValueError if the key can be used with none of the permitted algorithms."""
        models = {name: JWSRegistry.algorithms[name] for name in permitted if _fits(key, name)}
        if not models:
            raise ValueError("the key is for none of the permitted algorithms")
        self.kid = kid
        self.algorithms = frozenset(models)
        self.identity = f"{kid}\n{key.thumbprint()}\n{' '.join(sorted(models))}"
        self.is_withdrawn = False
        self._key = key
        self._verify = {name: model.verify for name, model in models.items()}

    def __repr__(self) -> str:
        return f"<JoseKey {self.kid!r} [{' '.join(sorted(self.algorithms))}]>"

    def verify(self, algorithm: str, signed: bytes, signature: bytes) -> bool:
        """Return whether `signature` is a signature of `signed` by this key."""
        return bool(self._verify[algorithm](signed, signature, self._key))


def keys_of_set(document: bytes, permitted: Collection[str]) -> Sequence[JoseKey]:
    """Return the usable public keys of a JSON Web Key Set (RFC 7517). Blocks for a while.

    Keys of other types, uses and algorithms are ignored, as section 5 demands. Raises ValueError if none is left.
    """
    try:
        content = json.loads(document)
    except (ValueError, RecursionError):
        raise ValueError("it is no JSON") from None
    members = content.get("keys") if isinstance(content, dict) else None
    if not isinstance(members, list):
        raise ValueError("it is no JSON Web Key Set: it has no list 'keys'")  # noqa: TRY004 - of the content
    found = [key for member in members[:MAX_KEYS] if (key := _key(member, permitted)) is not None]
    if not found:
        raise ValueError(f"none of its {len(members)} keys can be used with {', '.join(sorted(permitted))}")
    return found


def key_of_secret(secret: bytes, permitted: Collection[str]) -> JoseKey:
    """Return the key for HMAC. Raises ValueError if the secret is a public key or a certificate."""
    return JoseKey(OctKey.import_key(secret), None, permitted)


def _key(member: Any, permitted: Collection[str]) -> JoseKey | None:
    if not isinstance(member, dict) or member.get("kty") not in _ASYMMETRIC:
        return None
    kid = member.get("kid")
    if not (kid is None or (isinstance(kid, str) and len(kid) <= _MAX_KID)) or not _has_good_size(member):
        return None
    public: Any = {name: value for name, value in member.items() if name in _PUBLIC}
    try:
        return JoseKey(JWKRegistry.import_key(public), kid, permitted)
    except (JoseError, ValueError, TypeError, KeyError, UnsupportedAlgorithm):
        return None


def _has_good_size(member: Mapping[str, Any]) -> bool:
    if member["kty"] != "RSA":
        return True
    modulus, exponent = member.get("n"), member.get("e")
    if not isinstance(modulus, str) or not isinstance(exponent, str):
        return False
    if len(modulus) > MAX_RSA_BITS // 4 or len(exponent) * 6 > _MAX_EXPONENT_BYTES * 8:
        return False
    try:
        number = int.from_bytes(base64.b64decode(f"{modulus}==", b"-_"))  # leading zeros add nothing to the size
    except ValueError:
        return False
    return MIN_RSA_BITS <= number.bit_length() <= MAX_RSA_BITS and number % 2 == 1


def _fits(key: Key, algorithm: str) -> bool:
    try:
        JWSRegistry.algorithms[algorithm].check_key(key)
        key.check_key_op("verify")
    except JoseError:
        return False
    curves = _EDWARDS.get(algorithm)
    return curves is None or key.get("crv") in curves
