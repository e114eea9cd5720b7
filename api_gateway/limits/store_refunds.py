"""Refunds of buckets in the store, made by this process or others, and the notifications of them and of resets."""

from collections.abc import Callable

from api_gateway.models import NANOSECONDS
from api_gateway.rate_limiter import Refund, Refunds

_MOST_DIGITS = 20  # of a number in a notification; `int` refuses thousands
KEPT_NS = 600 * NANOSECONDS  # usually longer than the time between a charge and its settlement


def invalidation(key: str) -> str:
    """Return the notification that a bucket has more tokens for another reason than a refund."""
    return f"0 {key}"


class StoreRefunds:
    """The recent refunds of all processes, on the store's clock. `name` is that of this process."""

    def __init__(self, name: str, clock_ns: Callable[[], int]) -> None:
        self.name = name
        self._clock_ns = clock_ns
        self.recent = Refunds()
        self._turn_ns = 0

    def __repr__(self) -> str:
        return f"<StoreRefunds of {len(self.recent)} buckets>"

    def note(self, key: str, refund: Refund) -> None:
        """Record a refund; its amount and time may be corrected when they are known."""
        now_ns = self._clock_ns()
        if self._turn_ns <= now_ns:
            self.recent.turn()
            self._turn_ns = now_ns + KEPT_NS
        self.recent.note(key, refund)

    def message(self, key: str, refund: Refund) -> str:
        """Return a notification of a refund but for its beginning, which the store adds: its amount and time."""
        return f"{self.name} {refund.at_ns} {refund.tat_ns} {key}"

    def reset_message(self, key: str, resets: int) -> str:
        """Return the notification that an operator has filled a bucket, or reset a quota for the `resets`-th time."""
        return f"reset {self.name} {resets} {key}"

    def read_reset(self, message: str) -> tuple[str, int] | None:
        """Return key and number of a notification of a reset by another process, else None."""
        kind, _, rest = message.partition(" ")
        name, _, rest = rest.partition(" ")
        resets, _, key = rest.partition(" ")
        is_other = kind == "reset" and name != self.name and key
        return (key, int(resets)) if is_other and _is_number(resets) else None

    def read(self, message: str) -> str | None:
        """Return the key of the bucket that a notification is about, None if it is invalid; record the refund.

        A refund of this process was recorded when it was sent. Gateways of earlier versions state no charge.
        """
        given, _, refunded = message.partition(" ")
        made, _, rest = refunded.partition(" ")
        name, _, rest = rest.partition(" ")
        at, _, rest = rest.partition(" ")
        tat, _, key = rest.partition(" ")
        if not _is_number(given) or not refunded:
            return None
        if given == "0" or not key or not all(map(_is_number, (made, at, tat))):
            return refunded
        if name != self.name:
            self.note(key, Refund(int(at), int(tat), int(made) * 1000, int(given)))
        return key


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) <= _MOST_DIGITS
