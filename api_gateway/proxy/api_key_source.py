"""API keys as an identity source: in `X-API-Key`, as a bearer token, or as the user name of Basic.

A key in another form in these fields is refused as malformed: a key of this gateway is neither forwarded nor left to
the next source. The same applies to a key in `X-API-Key` if another field is configured for keys.
"""

import base64
import binascii
import re
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from functools import partial

from api_gateway.clients.api_keys import KnownKey, digest_of, fault_of, has_plain_key
from api_gateway.clients.key_directory import USE_PRECISION, KeyDirectory, KeyState
from api_gateway.errors import CredentialsInsufficient, CredentialsInvalid, GatewayError, StoreUnavailable
from api_gateway.http1.headers import Fields, spellings
from api_gateway.models import KEY_PREFIX, NANOSECONDS
from api_gateway.proxy.basic_credentials import leniently_decoded, marks_in_base64
from api_gateway.proxy.identity_sources import NO_EXPIRY, Claim, CredentialQuery, Proof, Verification
from api_gateway.proxy.route_table import Route

_PREFIX = KEY_PREFIX.encode()
_IN_BASE64 = marks_in_base64(_PREFIX)
_PREFIX_IN_BASE64 = _IN_BASE64[0]
_AUTHORIZATION = b"authorization"
_USUAL = b"x-api-key"  # where clients send keys unless another field is configured
_RETRY_AFTER = 1.0  # seconds
_SECOND_WORD = re.compile(rb"\S++[ \t]++" + _PREFIX)
_OTHER_FORM = b" "  # stands for a key in `Authorization` in another form; the value of no field


class KeyProof(Proof):
    """The proof by an API key. Its use is recorded once a minute."""

    __slots__ = ("_directory", "_routes")

    def __init__(self, claim: Claim, known: KnownKey, directory: KeyDirectory, expires_ns: int) -> None:
        super().__init__(claim, known.client_id, expires_ns=expires_ns, is_restricted=known.key.routes is not None)
        self._directory = directory
        self._routes = known.key.routes or ()
        self.note_after_ns = -1

    def refusal(self, route: Route) -> GatewayError | None:
        """Return the error if the key is not for this route."""
        if route.name in self._routes:
            return None
        return CredentialsInsufficient(f"The API key is not valid for route '{route.name}'.")

    def note_use(self, now_ns: int) -> None:
        """Note the use of the key, at most once a minute."""
        self.note_after_ns = now_ns + USE_PRECISION * NANOSECONDS
        self._directory.note_use(self.claim.value)


class ApiKeySource:
    """Identifies clients by API keys. Other values of the same header fields belong to the upstream."""

    name = "api_key"
    markers = (_PREFIX, *_IN_BASE64)

    def __init__(self, directory: KeyDirectory, header: str) -> None:
        """`header` is the name of the header field for keys alone."""
        self._directory = directory
        self._name, self._header = header, header.lower().encode()
        # Also with underscores, which CGI does not distinguish.
        self._spellings = spellings(self._header)
        self.fields = frozenset({*self._spellings, *spellings(_USUAL), _AUTHORIZATION})

    def __repr__(self) -> str:
        return f"<ApiKeySource of {self._directory!r}>"

    def claim(self, fields: Fields) -> Claim | None:
        """Return the key in header fields; a fault if there are several, or if it is malformed."""
        found = [(name, key) for name in self.fields for key in self._keys_in(name, fields.get(name, ()))]
        if not found:
            return None
        names, key = frozenset(name for name, _ in found), found[0][1]
        repeated = _repetition_in(fields, names, {key for _, key in found})
        if repeated is not None:
            return Claim(self, None, names, repeated, is_repeated=True)
        fault = self._fault_of(names, key)
        return Claim(self, None if fault is not None else digest_of(key), names, fault)

    @staticmethod
    def _keys_in(name: bytes, values: Iterable[bytes]) -> Iterator[bytes]:
        for value in values:
            if name == _AUTHORIZATION:
                key = _key_in_authorization(value)
                if key is not None:
                    yield key
            elif value.startswith(_PREFIX) or has_plain_key(value):
                yield value

    def _fault_of(self, names: frozenset[bytes], key: bytes) -> str | None:
        """Return why a key in header fields with these names is invalid, whatever is stored."""
        if not names <= {self._header, _AUTHORIZATION}:
            if names <= {*self._spellings, _AUTHORIZATION}:
                return "The name of the header field with the API key has underscores."
            return f"The header field X-API-Key has an API key; send the key in {self._name}."
        if key == _OTHER_FORM:
            return "Authorization has an API key that is neither a Bearer token nor the user name of Basic."
        fault = fault_of(key)
        return None if fault is None else f"The API key is malformed: {fault}."

    def claim_of_id(self, credential_id: str) -> Claim | None:
        """Return the claim of the key that operators know by this id, without the key; None if it is not held."""
        digest = self._directory.digest_of_id(credential_id)
        return None if digest is None else Claim(self, digest, frozenset())

    def verify(self, claim: Claim, now_ns: int) -> Verification:
        """Return the proof by a key, from memory; a question if the store must be asked."""
        if claim.fault is not None:
            return claim.error(claim.fault)
        found = self._directory.find(claim.value)
        if found is KeyState.UNKNOWN:
            return CredentialQuery(partial(self._ask, claim, now_ns))
        return self._result_of(claim, found, now_ns)

    async def _ask(self, claim: Claim, now_ns: int) -> Proof | GatewayError:
        return self._result_of(claim, await self._directory.look_up(claim.value), now_ns)

    def _result_of(self, claim: Claim, found: KnownKey | KeyState, now_ns: int) -> Proof | GatewayError:
        if found is KeyState.UNAVAILABLE:
            return StoreUnavailable(
                "The API key cannot be verified now, because the client store is unavailable.",
                retry_after=_RETRY_AFTER,
            )
        if isinstance(found, KeyState):
            return CredentialsInvalid("The API key is not valid.")
        if found.key.expires_at is None:
            return KeyProof(claim, found, self._directory, NO_EXPIRY)
        left = found.key.expires_at - self._directory.wall_clock()
        if left <= 0:
            return CredentialsInvalid("The API key has expired.")
        return KeyProof(claim, found, self._directory, now_ns + int(left * NANOSECONDS))


def _repetition_in(fields: Fields, names: frozenset[bytes], keys: AbstractSet[bytes]) -> str | None:
    """Return why a request is malformed that has these keys, in header fields with these names; None if it is not.

    One key in two fields is accepted: both say the same.
    """
    if len(keys) > 1:
        return "The request has several API keys; send one."
    if any(len(fields[name]) > 1 for name in names):
        return "The header field with the API key was sent several times; send it once."
    return None


def _key_in_authorization(value: bytes) -> bytes | None:
    """Return the API key in a value of `Authorization`; None if it contains none.

    Only spaces separate scheme and credentials (RFC 9110 section 11.4); with a tab, the key has another form.
    """
    scheme, _, rest = value.partition(b" ")
    rest = rest.lstrip(b" ")
    if scheme.lower() == b"bearer" and rest.startswith(_PREFIX):
        return rest
    is_basic = scheme.lower() == b"basic"
    if is_basic and (user := _user_of_basic(rest)) is not None:
        return user
    is_ours = value.startswith(_PREFIX) or _SECOND_WORD.match(value) is not None or has_plain_key(value)
    is_ours = is_ours or (is_basic and _has_key_within(rest))
    return _OTHER_FORM if is_ours else None


def _user_of_basic(credentials: bytes) -> bytes | None:
    """Return the user name of Basic credentials (RFC 7617 section 2) if it is one of our keys."""
    if _PREFIX_IN_BASE64 not in credentials:
        return None
    try:
        user = base64.b64decode(credentials, validate=True).partition(b":")[0]
    except binascii.Error:
        return b"" if _is_read_as_key(credentials) else None  # recognised, and malformed
    return user if user.startswith(_PREFIX) else None


def _has_key_within(credentials: bytes) -> bool:
    """Return whether Basic credentials have a key in another place than that of the user name, as the password is."""
    return any(part in credentials for part in _IN_BASE64) and has_plain_key(leniently_decoded(credentials))


def _is_read_as_key(credentials: bytes) -> bool:
    """Return whether a decoder that ignores what is not base64 would find a key, or its beginning."""
    return leniently_decoded(credentials).startswith(_PREFIX)
