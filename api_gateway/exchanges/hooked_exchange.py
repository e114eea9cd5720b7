"""An exchange whose response heads are seen by extensions, if there are any, before the client gets them."""

from functools import partial

from api_gateway.errors import GatewayError
from api_gateway.exchanges.http_exchange import HttpExchange
from api_gateway.extensions.fields import FieldChange, FieldsView, changed_lines, changed_pairs
from api_gateway.extensions.interface import ResponseView
from api_gateway.http1.headers import fields_of
from api_gateway.proxy.exchange import EXCHANGING, NONE


class HookedExchange(HttpExchange):
    """A `HttpExchange` that calls the hooks of a response once, as soon as its head is complete.

    While a hook is awaited, the connection to the upstream is not read, and what has arrived is kept.
    """

    _is_held = False
    _is_seen = False

    def on_progress(self) -> None:
        """Show the head to the extensions; then forward what has arrived."""
        if self._is_held:
            return
        hooks = self._context.response_hooks
        if hooks is None or self._is_seen or self.phase != EXCHANGING or self.response != NONE:
            super().on_progress()
            return
        if self.error is not None or not self.is_head_complete:
            super().on_progress()
            return
        self._is_seen = self._is_held = True
        view = ResponseView(self.status, FieldsView(self.headers), self.exchange.upstream or "")
        self.is_pending = True
        if (
            not hooks.begin(self.plan, view, partial(self._on_changes, self.generation))
            and self.connection is not None
        ):
            self.connection.pause_reading()

    def _forget(self) -> None:
        """See `ExchangeLife`."""
        super()._forget()
        self._is_seen = False

    def _on_changes(self, generation: int, changes: list[FieldChange] | GatewayError) -> None:
        """Change the head and forward it, unless the exchange has ended meanwhile."""
        if generation != self.generation:
            return
        self._is_held = False
        if isinstance(changes, GatewayError):
            self._refuse_response(changes)
            return
        if changes and self.passed:
            self.passed = changed_lines(self.passed, changes)
        elif changes:
            self._headers = changed_pairs(self.headers, changes)
            self._fields = fields_of(self._headers)
        super().on_progress()

    def _refuse_response(self, error: GatewayError) -> None:
        """Respond with an error; the charge is kept, because the upstream has served the request."""
        self.exchange.has_reached = True
        self.close()
        self._refuse(error)
