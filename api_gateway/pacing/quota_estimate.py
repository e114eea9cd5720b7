"""How many tokens a server's quota has, estimated between the responses that state it. Reads no clock.

A response states whole tokens, and the moment of the statement is known only to lie between the sending of the request
and the arrival of the response. So an estimate is a range. `low` decides whether a request is sent; both ends tell
what a request has cost.
"""

from api_gateway.pacing.stated_limits import Remaining, StatedPolicy

_ROUNDING = 1.001  # seconds in which two statements about the same bucket agree, because both are rounded up


class QuotaEstimate:
    """The tokens of one quota: a bucket that refills at `quota / window`, or a window that is restored at its end.

    Until a response states otherwise, the quota is a bucket that was full when it was first seen.
    """

    __slots__ = ("_ends", "_is_bucket", "_is_classified", "high", "is_stated", "low", "policy", "since")

    def __init__(self, policy: StatedPolicy, now: float) -> None:
        self.policy = policy
        self.low = self.high = float(policy.quota)
        self.since = now
        self.is_stated = False  # whether a response has stated what is left
        self._is_bucket = True
        self._is_classified = False
        self._ends = now  # of the window, if it is none

    def __repr__(self) -> str:
        kind = "bucket" if self._is_bucket else "window"
        return f"<QuotaEstimate {self.policy.name}: {kind} with {self.low:.2f} to {self.high:.2f} tokens>"

    def advance(self, now: float, in_flight: float) -> None:
        """Add what has been refilled until `now`.

        `in_flight` is the cost of requests that the server may not have decided yet. A bucket that stays full until
        the server decides them has at most its capacity minus their cost, however long they take.
        """
        if self._is_bucket:
            self.low = min(self.policy.quota - in_flight, self.low + self.refilled_in(now - self.since))
            self.high = min(float(self.policy.quota), self.high + self._most_refilled_in(now - self.since))
        elif now >= self._ends:
            self.low, self.high = self.policy.quota - in_flight, float(self.policy.quota)
            self._ends = now + self.policy.window
        self.since = now

    def charge(self, cost: float) -> None:
        """Subtract the expected cost of a request that is sent."""
        self.low -= cost

    def wait(self, cost: float) -> float:
        """Return the seconds until a request of this cost is certainly allowed. Call `advance` before."""
        missing = min(cost, float(self.policy.quota)) - self.low
        if missing <= 0:
            return 0.0
        if not self._is_bucket:
            return max(0.0, self._ends - self.since)
        return missing * self.policy.window / self.policy.quota

    def refilled_in(self, seconds: float) -> float:
        """Return how many tokens a bucket gets in this time; 0 for a window."""
        return max(0.0, seconds) * self.policy.quota / self.policy.window if self._is_bucket else 0.0

    def _most_refilled_in(self, seconds: float) -> float:
        """Return the most tokens that a bucket gets in this time: its window is rounded up to whole seconds."""
        window = self.policy.window - 1
        return max(0.0, seconds) * self.policy.quota / window if window else float(self.policy.quota)

    def take_statement(self, stated: Remaining, uncounted: float, sent: float, now: float) -> bool:
        """Correct the estimate by a response to a request that was sent at `sent`. Call `advance` before.

        `uncounted` is the cost of all requests that the server may have decided after this one. Returns True if the
        estimate was too high: another process spends the same tokens, or costs are higher than expected.
        """
        was_stated, self.is_stated = self.is_stated, True
        self._classify(stated, now)
        tokens = float(stated.tokens)
        meanwhile = self._most_refilled_in(now - sent) if self._is_bucket else 0.0
        most = min(float(self.policy.quota), tokens + 1.0 + meanwhile)
        certain = tokens - uncounted
        if self._is_bucket and stated.seconds is not None and stated.seconds > self._expected(stated) + _ROUNDING:
            # In debt, because a request has cost more than was reserved: the first token comes after the stated time.
            certain = min(certain, 1.0 - self.refilled_in(stated.seconds) - uncounted)
        is_too_high = self.low > most
        self.low = certain if is_too_high or not uncounted else max(self.low, certain)
        self.high = most
        return is_too_high and was_stated

    def _classify(self, stated: Remaining, now: float) -> None:
        """Tell a bucket from a window by the stated time, in which a bucket refills the stated tokens."""
        if stated.seconds is None or (self._is_classified and self._is_bucket):
            return
        self._is_bucket = stated.seconds <= self._expected(stated) + _ROUNDING
        self._is_classified = stated.tokens > 1
        if not self._is_bucket:
            self._ends = now + stated.seconds

    def _expected(self, stated: Remaining) -> float:
        """Return the time in which a bucket refills what is stated, or its next token."""
        return max(1, stated.tokens) * self.policy.window / self.policy.quota
