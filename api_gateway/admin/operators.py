"""Operators, their roles, and the bearer tokens that identify them. Pure decisions on header fields."""

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from api_gateway.http1.headers import Fields


class Role(StrEnum):
    """The permissions of an operator token. `OPERATE` includes `READ`."""

    READ = "read"
    OPERATE = "operate"


@dataclass(frozen=True, slots=True)
class Operator:
    """An admitted caller of the operator endpoints: the holder of a named token, or a local process."""

    name: str
    role: Role
    is_local: bool = False

    @property
    def key(self) -> str:
        """Key of the operator's bucket."""
        return "local" if self.is_local else f"token:{self.name}"

    def may(self, role: Role) -> bool:
        """Return whether this operator has the permissions of `role`."""
        return role is Role.READ or self.role is Role.OPERATE


LOCAL = Operator("local", Role.OPERATE, is_local=True)


class Tokens:
    """The valid tokens, kept as SHA-256 digests only."""

    def __init__(self, tokens: Iterable[tuple[Operator, bytes]] = ()) -> None:
        self._known = tuple((_digest(token), operator) for operator, token in tokens)

    def __repr__(self) -> str:
        return f"<Tokens of {', '.join(dict.fromkeys(operator.name for _, operator in self._known)) or 'no operator'}>"

    def __bool__(self) -> bool:
        return bool(self._known)

    def find(self, given: bytes) -> Operator | None:
        """Return the operator with this token, else None. The time does not depend on which token matches."""
        digest, found = _digest(given), None
        for known, operator in self._known:
            if hmac.compare_digest(known, digest):
                found = operator
        return found


def bearer_token(fields: Fields) -> bytes | None:
    """Return the token of the `Authorization: Bearer` field (RFC 6750 section 2.1); None if there is no such field.

    More than one `Authorization` field is invalid: the result is the empty token, which matches none.
    """
    given = fields.get(b"authorization", ())
    if not given:
        return None
    if len(given) > 1:
        return b""
    scheme, _, token = given[0].partition(b" ")
    return token.strip(b" ") if scheme.lower() == b"bearer" else None


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
