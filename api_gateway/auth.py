"""Who may ask: the client's identifier, and the operator's right to see and change. Pure decisions on headers."""

import hmac
from collections.abc import Iterable

from api_gateway.errors import ClientIdInvalid, Forbidden, Unauthorized
from api_gateway.headers import FORWARDING, Fields, fields_of, host_name, is_visible_ascii, values
from api_gateway.models import HeaderList

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
_FORWARDED_BY_PROXY = FORWARDING | {b"via"}


def client_id(fields: Fields, name: bytes) -> str | None:
    """Return the identifier the client sent in header `name` (lower case), or None when it sent none.

    Raises ClientIdInvalid unless it came once and is 1 to 128 visible ASCII characters: a client that can vary the
    spelling of its name must not get a bucket for each.
    """
    found = fields.get(name)
    if not found:
        return None
    if len(found) > 1:
        raise ClientIdInvalid(f"{_spelt(name)} was sent {len(found)} times; send it once.")
    if not is_visible_ascii(found[0]):
        shown = found[0][:40].decode("latin-1").encode("unicode_escape").decode("ascii")
        raise ClientIdInvalid(
            f"{_spelt(name)} must be 1 to 128 visible ASCII characters, got {len(found[0])} bytes: '{shown}'."
        )
    return found[0].decode("ascii")


class AdminGuard:
    """Decides whether a request may use the operator's endpoints.

    With a token configured, only `Authorization: Bearer <token>` opens them, from anywhere. Without one, they answer
    requests that come from this machine, were not forwarded by a proxy, and name a loopback host (which keeps a
    page in a local browser from reaching them through a name that resolves here).
    """

    def __init__(self, token: str | None) -> None:
        self._expected = None if token is None else token.encode()

    def __repr__(self) -> str:
        return f"<AdminGuard [{'loopback only' if self._expected is None else 'bearer token'}]>"

    @property
    def has_token(self) -> bool:
        """True if whoever passes has shown the token."""
        return self._expected is not None

    def check(self, headers: HeaderList, *, is_loopback: bool) -> None:
        """Raise Unauthorized or Forbidden unless the request may pass."""
        if self._expected is not None:
            if not hmac.compare_digest(_bearer_token(headers), self._expected):
                raise Unauthorized(
                    "This endpoint needs the header 'Authorization: Bearer <admin token>'.",
                    headers={"www-authenticate": 'Bearer realm="api-gateway"'},
                )
        elif not is_loopback or _is_forwarded(headers) or host_name(fields_of(headers)) not in _LOOPBACK_NAMES:
            raise Forbidden(
                "Without an admin token this endpoint answers only direct requests from this machine to localhost. "
                "Set admin.token (GATEWAY_ADMIN__TOKEN) to reach it from elsewhere."
            )

    def allows(self, headers: HeaderList, *, is_loopback: bool) -> bool:
        """Tell whether the request may pass."""
        try:
            self.check(headers, is_loopback=is_loopback)
        except (Unauthorized, Forbidden):
            return False
        return True


def _bearer_token(headers: HeaderList) -> bytes:
    """Return the token of the one `Authorization: Bearer` header (RFC 6750 section 2.1), or nothing."""
    given = values(headers, b"authorization")
    scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
    return token.strip(b" ") if scheme.lower() == b"bearer" else b""


def _is_forwarded(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return any(name.lower() in _FORWARDED_BY_PROXY for name, _ in headers)


def _spelt(name: bytes) -> str:
    return "-".join("ID" if part == "id" else part.capitalize() for part in name.decode("ascii").split("-"))
