"""An exchange whose request may be copied to another upstream."""

from api_gateway.errors import GatewayError
from api_gateway.exchanges.hooked_exchange import HookedExchange
from api_gateway.models import Outcome
from api_gateway.proxy.mirroring import INCOMPLETE, CopiedHead, Mirroring, RequestCopy
from api_gateway.proxy.route_table import Route


class MirroringExchange(HookedExchange):
    """A `HookedExchange`, with extensions or without, that copies requests of routes with a mirror.

    A request whose body is complete is copied once it is forwarded. Otherwise the pieces of the body are added to the
    copy as they arrive, and the copy is dropped if the exchange ends before they are complete.
    """

    copy: RequestCopy | None = None  # while its body arrives

    def forward(self) -> GatewayError | None:
        """See `HttpExchange`."""
        route, upload = self.plan.route, self.upload
        if route is None or route.mirroring is None:
            return super().forward()
        pieces = [] if upload is None else upload.held()
        if upload is not None and not upload.is_complete:
            self.copy = self._copied(route, pieces)
            return super().forward()
        error = super().forward()
        if error is None:
            copy = self._copied(route, pieces)
            if copy is not None:
                copy.complete(has_body=upload is not None)
        return error

    def _copied(self, route: Route, pieces: list[bytes]) -> RequestCopy | None:
        """Begin a copy; return None if this request has none."""
        plan, context, mirroring = self.plan, self._context, route.mirroring
        facts, mirrors = plan.facts, context.mirrors
        assert mirroring is not None  # noqa: S101 - the route has a mirror
        assert mirrors is not None  # noqa: S101 - or the exchange would be of another kind
        if not mirrors.admits(route.name, mirroring, facts.length):
            return None
        lines = plan.headers.sent
        if route.url_rewriter is None and facts.claim is None:
            lines = mirroring.kept_lines(lines, facts)
            return self._begin_copy(route.name, mirroring, lines.removesuffix(b"\r\n"), pieces)
        if route.url_rewriter is not None:
            editor = route.url_rewriter
            lines = editor.request_line + editor.edited(lines, facts, self.exchange, plan.raw_target)
        if facts.claim is not None:
            if mirroring.keeps_credentials:
                lines = self._credential_lines() + lines
            elif facts.proof is not None:
                lines = facts.proof.lines + lines
        return self._begin_copy(route.name, mirroring, mirroring.edits.kept_lines(lines.removesuffix(b"\r\n")), pieces)

    def _begin_copy(self, route: str, mirroring: Mirroring, lines: bytes, pieces: list[bytes]) -> RequestCopy:
        """Begin a copy with these header lines and the beginning of a body."""
        plan, context = self.plan, self._context
        mirrors, client = context.mirrors, context.router.upstream_clients[mirroring.upstream]
        assert mirrors is not None  # noqa: S101 - as in `_copied`
        fields = b"%b\r\nx-request-id: %b" % (lines, self.exchange.id.encode())
        head = CopiedHead(self.exchange.method, plan.target, plan.facts.host_field, fields, self._key(client))
        copy = mirrors.begin(route, mirroring, client, head)
        for piece in pieces:
            copy.add(piece)
        return copy

    def on_body_piece(self, piece: bytes) -> bool:
        """See `ExchangeLife`."""
        if self.copy is not None:
            self.copy.add(piece)
        return super().on_body_piece(piece)

    def on_body_end(self) -> None:
        """See `ExchangeLife`."""
        super().on_body_end()
        copy, self.copy = self.copy, None
        if copy is not None:
            copy.complete(has_body=True)

    def _end(self, now: float, outcome: Outcome, *, keep_alive: bool) -> None:
        """See `ExchangeLife`."""
        copy, self.copy = self.copy, None
        if copy is not None:
            copy.drop(INCOMPLETE)
        super()._end(now, outcome, keep_alive=keep_alive)
