"""The budget of a ring of records: which are kept when they arrive too fast for the ring to reach back minutes."""

_SHARES = 8  # a client's own part of a budget is one of so many
_MAX_HOLDERS = 4_096  # clients whose use is remembered


class RecordBudget:
    """A token bucket for all clients together, of which each has a part of its own.

    While more than half of the tokens are left, any client may use them, so that at low rates every record is kept.
    The other half is for clients that have not used their own part: a client with few requests finds them in the ring,
    however many requests others send. The bucket has tokens for half of the ring; so one half of a ring is not older
    than a burst, and the other reaches back over its time at the budget's rate.

    Before `full_until` (monotonic seconds) it keeps no record. Its state is times at which tokens become available, as
    in GCRA (see `rate_limiter`). Times are monotonic seconds.
    """

    __slots__ = ("_due", "_dues", "_half", "_interval", "full_until")

    def __init__(self, rate: float, most: int) -> None:
        """`rate` are records in a second, `most` those that the ring can hold."""
        self.change(rate, most)

    def __repr__(self) -> str:
        return f"<RecordBudget [{1 / self._interval:g} a second, {len(self._dues)} clients]>"

    def change(self, rate: float, most: int) -> None:
        """Apply another rate or another size of the ring, with all tokens."""
        self._dues: dict[str, float] = {}  # by client: when its own part has a token
        self._due = self.full_until = 0.0  # when more than half of the tokens are left, and when any
        self._interval = 1 / rate
        self._half = most / 4 * self._interval

    def takes(self, principal: str, now: float) -> bool:
        """Charge a record of a client, and return whether it is kept."""
        if now < self._due:
            if now < self.full_until:
                return False
            due = self._dues.get(principal)
            if due is not None and now < due:
                return False
        self._charge(principal, now)
        return True

    def _charge(self, principal: str, now: float) -> None:
        self._due = max(self._due, now - self._half) + self._interval
        self.full_until = self._due - self._half
        if len(self._dues) >= _MAX_HOLDERS:
            self._dues = {name: due for name, due in self._dues.items() if due > now}
            if len(self._dues) >= _MAX_HOLDERS:
                self._dues.clear()
        # Its part is an eighth of rate and burst. What a client uses of the parts of others is not charged to it.
        due = min(max(self._dues.get(principal, 0.0), now - 2 * self._half), now)
        self._dues[principal] = due + _SHARES * self._interval
