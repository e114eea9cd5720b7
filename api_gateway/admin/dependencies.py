"""The FastAPI dependencies of operator endpoints: their context, their operator, and checks of parameters."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from api_gateway.admin.audit_log import AuditAction, AuditEntry, AuditLog
from api_gateway.admin.context import AdminContext
from api_gateway.admin.gate import OPERATOR, REQUEST_ID
from api_gateway.admin.operators import Operator
from api_gateway.admin.utc_times import wall_time
from api_gateway.clients.api_keys import has_key
from api_gateway.errors import ChangeUnconfirmed, ClientIdInvalid, Forbidden, InvalidValue
from api_gateway.http1.headers import is_visible_ascii
from api_gateway.http1.request_paths import unescaped
from api_gateway.models import Clock
from api_gateway.settings.suggestions import nearest


def _parameters(dependant: Dependant) -> list[str]:
    """Return the names of the query parameters of an endpoint, with those of its dependencies."""
    own = [field.alias for field in dependant.query_params]
    return [*own, *(name for further in dependant.dependencies for name in _parameters(further))]


def _check_query(request: Request) -> None:
    """Raise InvalidValue if the endpoint does not have a parameter of the query: it would be ignored otherwise."""
    route = request.scope.get("route")
    if not request.url.query or not isinstance(route, APIRoute):
        return
    known = list(dict.fromkeys(_parameters(route.dependant)))
    for name in request.query_params:
        if name not in known:
            shown = f"the parameters are {', '.join(known)}" if known else "the endpoint has none"
            hint = nearest(name, known).removesuffix("?")
            raise InvalidValue(f"query.{name[:100]}: unknown parameter{hint}; {shown}.", extra={"parameters": known})


def _context(request: Request) -> AdminContext:
    _check_query(request)
    context: AdminContext = request.app.state.admin_context
    return context


def _operator(request: Request) -> Operator:
    """Return the operator that the gate admitted. Raises Forbidden if the request did not pass the gate."""
    operator: Operator | None = request.scope.get(OPERATOR)
    if operator is None:
        raise Forbidden("This endpoint is for operators.")
    return operator


def _guard(request: Request) -> AdminContext:
    _operator(request)
    return _context(request)


def _client_id(client_id: str) -> str:
    """Return the client id in a path, where %2F stands for a slash. Raises ClientIdInvalid."""
    name = unescaped(client_id)
    if has_key(name.encode()):
        raise ClientIdInvalid("The path has an API key instead of a client id.")
    if not is_visible_ascii(name.encode()):
        raise ClientIdInvalid(f"A client id is 1 to 128 visible ASCII characters, got {name[:200]!r}.")
    return name


def _address(request: Request) -> str:
    return request.client.host if request.client is not None else "unknown"


class Audit:
    """Records the changes of one request of an operator."""

    def __init__(self, log: AuditLog, clock: Clock, request_id: str, operator: str, address: str) -> None:
        self._log = log
        self._clock = clock
        self._request_id = request_id
        self._operator = operator
        self._address = address

    def __repr__(self) -> str:
        return f"<Audit of {self._request_id} by {self._operator}>"

    async def __call__(
        self, action: AuditAction, subject: str | None, before: Any, after: Any, *, is_confirmed: bool = True
    ) -> None:
        """Record a change, with what was in force before and what is now."""
        entry = AuditEntry(
            time=wall_time(self._clock()),
            request_id=self._request_id,
            operator=self._operator,
            address=self._address,
            action=action,
            subject=subject,
            before=before,
            after=after,
            confirmed=is_confirmed,
        )
        await self._log.record(entry)

    @asynccontextmanager
    async def change(
        self, action: AuditAction, subject: str, before: Any, shown_at: str | None = None
    ) -> AsyncIterator[None]:
        """Make a change within this block, and record it if it is not confirmed, as it may have been made.

        `shown_at` is where the operator can see that, if the error does not say so.
        """
        try:
            yield
        except ChangeUnconfirmed as error:
            await self(action, subject, before, None, is_confirmed=False)
            if shown_at is None:
                raise
            detail = f"{error.detail} {shown_at} when the store is available again."
            raise ChangeUnconfirmed(detail, retry_after=error.retry_after) from error


def _audit(request: Request) -> Audit:
    operator, context = _operator(request), _context(request)
    request_id: str = request.scope[REQUEST_ID]
    return Audit(context.audit, context.clocks.wall, request_id, operator.name, _address(request))


Audited = Annotated[Audit, Depends(_audit)]
ClientId = Annotated[str, Depends(_client_id)]
Guarded = Annotated[AdminContext, Depends(_guard)]
Open = Annotated[AdminContext, Depends(_context)]


def who(request: Request) -> str:
    """Return the operator's name for the log: token and address, or the address alone for a local operator."""
    operator = _operator(request)
    host = _address(request)
    return host if operator.is_local else f"token '{operator.name}', from {host}"
