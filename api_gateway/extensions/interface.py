"""The public interface of extensions: views of requests and responses, and the results of hooks."""

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from api_gateway.extensions.fields import RESPONSE_FIXED, FieldChanges, FieldsView, checked_changes
from api_gateway.http1.headers import BODILESS
from api_gateway.models import HeaderList

_MAX_COST = 1_000_000_000


@dataclass(frozen=True, slots=True)
class RequestClient:
    """The client of a request, once it is identified."""

    id: str
    tier: str


@dataclass(frozen=True, slots=True)
class RequestView:
    """A request as a hook sees it. Immutable; the body is not in it, because it has not arrived.

    `path` is percent-decoded, `query` is as received, without the question mark. `client_address` is the one that a
    trusted proxy reports, else that of the connection. `client` is None in `identify`, `route` (its name) is None
    there too. `cost` is in tokens, 0 before it is known.
    `is_explained`: an operator asks by `/explain` what would happen; nothing must be changed or counted.
    """

    id: str
    method: str
    path: str
    query: str
    headers: FieldsView
    host: str
    client_address: str
    client: RequestClient | None = None
    route: str | None = None
    cost: float = 0.0
    is_explained: bool = False


@dataclass(frozen=True, slots=True)
class ResponseView:
    """The head of a response of an upstream, as a hook sees it."""

    status: int
    headers: FieldsView
    upstream: str


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the client is. `tier` applies unless the client is registered; None: the default tier."""

    id: str
    tier: str | None = None


@dataclass(frozen=True, slots=True)
class Respond:
    """A response of the gateway in place of the upstream's. Raises ValueError or TypeError if it is not valid HTTP."""

    status: int
    body: bytes | str = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.status, int):
            raise TypeError(f"the status of a response must be a whole number, got {type(self.status).__name__}")
        if not isinstance(self.body, str | bytes | bytearray | memoryview):
            raise TypeError(f"the body of a response must be bytes or text, got {type(self.body).__name__}")
        if not 200 <= self.status <= 599:  # noqa: PLR2004 - a final response
            raise ValueError(f"the status of a response must be 200 to 599, got {self.status}")
        if self.status in BODILESS and self.body:
            raise ValueError(f"a response with status {self.status} has no body")
        checked_changes(self.headers, RESPONSE_FIXED)

    @property
    def content(self) -> bytes:
        """The body as bytes."""
        return self.body.encode() if isinstance(self.body, str) else bytes(self.body)

    def fields(self) -> HeaderList:
        """Return the header fields, with the length and, for a text, its type."""
        given = [(name, value) for name, value in checked_changes(self.headers, RESPONSE_FIXED) if value is not None]
        if isinstance(self.body, str) and self.body and not any(name.lower() == b"content-type" for name, _ in given):
            given.append((b"content-type", b"text/plain; charset=utf-8"))
        return given if self.status in BODILESS else [*given, (b"content-length", b"%d" % len(self.content))]


class CheckedResponse(NamedTuple):
    """What is sent for a `Respond`."""

    status: int
    fields: HeaderList
    content: bytes


class IdentifyHook(Protocol):
    """An extension that determines the client; None leaves it to the next one, and to the gateway."""

    def identify(self, request: RequestView, /) -> Identity | Awaitable[Identity | None] | None: ...  # noqa: D102


class CostHook(Protocol):
    """An extension that determines the cost of a request, in tokens; None leaves the cost as it is."""

    def cost(self, request: RequestView, route: str, /) -> float | Awaitable[float | None] | None: ...  # noqa: D102


class RequestHook(Protocol):
    """An extension that sees each admitted request: it may change header fields, or respond."""

    def on_request(  # noqa: D102
        self, request: RequestView, /
    ) -> FieldChanges | Respond | Awaitable[FieldChanges | Respond | None] | None: ...


class ResponseHook(Protocol):
    """An extension that sees the head of each response of an upstream: it may change header fields."""

    def on_response(  # noqa: D102
        self, request: RequestView, response: ResponseView, /
    ) -> FieldChanges | Awaitable[FieldChanges | None] | None: ...


# The checks return values of the exact types. The methods of a subclass are code of the extension, so they are called
# within the check, where an exception is a failure of the hook.


def checked_identity(result: object) -> Identity:
    """Return the result of `identify`. Raises TypeError or ValueError."""
    if not isinstance(result, Identity):
        raise TypeError(f"identify must return an Identity or None, got {type(result).__name__}")
    if not isinstance(result.id, str) or not isinstance(result.tier, str | None):
        raise TypeError("the id and the tier of an Identity must be text")
    client_id = str.__str__(result.id)
    is_id = 1 <= len(client_id) <= 128 and client_id.isascii()  # noqa: PLR2004 - see CLIENT_ID
    if not is_id or not client_id.isprintable() or " " in client_id:
        raise ValueError("the id of an Identity must be 1 to 128 visible ASCII characters")
    return Identity(client_id, None if result.tier is None else str.__str__(result.tier))


def checked_cost(result: object) -> float:
    """Return the result of `cost`. Raises TypeError or ValueError."""
    if isinstance(result, bool) or not isinstance(result, int | float):
        raise TypeError(f"cost must return a number or None, got {type(result).__name__}")
    cost = int(result) if isinstance(result, int) else float(result)
    if not 0 <= cost <= _MAX_COST:  # also NaN
        raise ValueError(f"a cost must be 0 to {_MAX_COST}, got {result}")
    return cost


def checked_response(result: Respond) -> CheckedResponse:
    """Return what is sent for a result of `on_request`. Raises TypeError or ValueError."""
    body = str.__str__(result.body) if isinstance(result.body, str) else bytes(result.body)
    plain = Respond(int(result.status), body, dict(result.headers))
    return CheckedResponse(plain.status, plain.fields(), plain.content)
