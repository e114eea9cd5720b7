"""The access log for people: a short line for each exchange."""

from collections.abc import Callable
from datetime import datetime

from api_gateway.models import Exchange
from api_gateway.printable_text import printable, shown_method

MAX_VALUE = 500  # characters of a path or detail; JSON has all of them


class TextLog:
    """Renders the lines; see `system.output` for the thread that does so and writes them.

    A line cannot affect a terminal: what is not printable in a value (line breaks, escape sequences, characters that
    change the direction of writing) is escaped.
    """

    def __init__(self, redact: Callable[[str], str] = str) -> None:
        """`redact` returns a line without secrets that a client has put into a path or an id."""
        self._redact = redact

    def line(self, exchange: Exchange, now: float) -> str:
        """Return the line of one finished exchange: time, status, request, duration, client, and what it went to.

        `now` is in seconds since the epoch.
        """
        client, reason = exchange.client, exchange.reason
        parts = [
            f"{datetime.fromtimestamp(now).astimezone():%H:%M:%S.%f}"[:-3],
            str(exchange.status),
            shown_method(exchange.method),
            self._value(exchange.path),
            f"{exchange.duration * 1000:.1f} ms",
            "-" if client is None else f"{printable(client.id)} ({client.quota.name})",
            "-" if exchange.upstream is None else f"-> {exchange.upstream}",
        ]
        if exchange.attempts > 1:
            parts.append(f"{exchange.attempts} attempts")
        if reason is not None:
            parts.append(f"{reason}: {self._value(exchange.detail)}" if exchange.detail else reason)
            trace = "" if exchange.trace is None else f" trace {exchange.trace.trace_id}"
            parts.append(f"[{printable(exchange.id)}{trace}]")
        return f"{self._redact('  '.join(parts))}\n"

    def _value(self, text: str) -> str:
        """Return a value as it is shown. Secrets are removed first: the beginning of one would not be recognised."""
        text = self._redact(printable(text))
        return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}..."
