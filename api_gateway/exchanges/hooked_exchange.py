"""An exchange whose responses are seen by extensions, if there are any, before the client gets them."""

from functools import partial

from api_gateway.errors import GatewayError
from api_gateway.exchanges.http_exchange import HttpExchange
from api_gateway.extensions.fields import FieldChange, FieldsView, changed_lines, changed_pairs
from api_gateway.extensions.interface import ResponseView
from api_gateway.http1.headers import cgi_form, fields_of
from api_gateway.models import HeaderList
from api_gateway.upstreams.upstream import Attempt

_NO_CHANGES: list[FieldChange] = []


class HookedExchange(HttpExchange):
    """A `HttpExchange` that calls the hooks of a response once it is decided that the client gets it.

    While a hook is awaited, the connection to the upstream is not read, and what has arrived is kept.
    """

    _held = 0  # the number of the call that is awaited, 0 for none
    _calls = 0
    _found: list[FieldChange] | GatewayError = _NO_CHANGES  # of a call that was not awaited
    _changed: frozenset[bytes] = frozenset()  # names in CGI's form of the fields that the hooks have set or removed

    def on_progress(self) -> None:
        """Forward what has arrived, unless a hook is awaited."""
        if not self._held:
            super().on_progress()

    def _write_head(self, attempt: Attempt) -> bool:
        """Show the head to the extensions; then send it with what has arrived of the body."""
        hooks = self._context.response_hooks
        if hooks is None:
            return super()._write_head(attempt)
        view = ResponseView(self.status, FieldsView(self.headers), self.exchange.upstream or "")
        self._calls += 1
        if hooks.begin(self.plan, view, partial(self._on_changes, self._calls)):
            return self._write_changed(attempt, self._found)
        self._held, self.is_pending = self._calls, True
        if self.connection is not None:
            self.connection.pause_reading()
            self.connection.timer.clear()
        return False

    def _forget(self) -> None:
        """See `ExchangeLife`."""
        super()._forget()
        self._held, self._found, self._changed = 0, _NO_CHANGES, frozenset()

    def _invalidate(self) -> None:
        """See `ExchangeLife`."""
        super()._invalidate()
        self._held = 0

    def trailers_for_client(self) -> HeaderList:
        """Return the trailers that are forwarded: none has the name of a field that the hooks have set or removed."""
        return [pair for pair in super().trailers_for_client() if cgi_form(pair[0]) not in self._changed]

    def _on_changes(self, call: int, changes: list[FieldChange] | GatewayError) -> None:
        """Note the result of a call that is not awaited; go on with the response after one that is.

        The result of one that was awaited is dropped if the exchange has ended meanwhile.
        """
        if self._held != call:
            self._found = changes
            return
        self._held = 0
        attempt = self.attempt or self._last_attempt
        if attempt is not None and self._write_changed(attempt, changes):
            self._go_on(self._context.clock())

    def _write_changed(self, attempt: Attempt, changes: list[FieldChange] | GatewayError) -> bool:
        """Change the head and send it, or respond with an error; return True if it was sent."""
        if isinstance(changes, GatewayError):
            self._refuse_response(changes)
            return False
        if changes:
            self._changed = frozenset(cgi_form(name) for name, _ in changes)
            if self.passed:
                self.passed = changed_lines(self.passed, changes)
            else:
                self._headers = changed_pairs(self.headers, changes)
                self._fields = fields_of(self._headers)
        return super()._write_head(attempt)

    def _refuse_response(self, error: GatewayError) -> None:
        """Respond with an error; the charge is kept, because the upstream has served the request."""
        self.exchange.has_reached = True
        self.close()
        self._refuse(error)
