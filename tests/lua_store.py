"""The real text of token_bucket.lua under a virtual clock: Lua 5.1 in this process, and a store that is a dict."""

from collections.abc import Callable, Sequence
from typing import Any

from lupa import lua51

from api_gateway.models import Charge, Decision, Quota
from api_gateway.rate_limiter import joint_decision, take
from api_gateway.redis_limiter import SCRIPT

MICROSECOND = 1000  # in nanoseconds
_RUN = """
function(text, call, keys, argv)
  redis = {call = call, pcall = call}
  KEYS, ARGV = keys, argv
  return loadstring(text)()
end
"""


class LuaStore:
    """What a server does for the script; `now_us` is its clock, in microseconds since 1970."""

    def __init__(self, now_us: int) -> None:
        self.now_us = now_us
        self.values: dict[str, tuple[str, int]] = {}  # and when they expire, in milliseconds
        self.told: list[tuple[str, str]] = []
        self._lua = lua51.LuaRuntime(unpack_returned_tuples=True)
        self._run = self._lua.eval(_RUN)

    def call(self, keys: Sequence[str], *arguments: str | int) -> list[int]:
        """Call the script; every argument is text to it, as from a client."""
        table = self._lua.table
        reply = self._run(SCRIPT.text, self._command, table(*keys), table(*map(str, arguments)))
        return [int(value) for value in reply.values()]

    def pttl(self, key: str) -> int | None:
        """Return the milliseconds a key has left; None if it is not there."""
        return self.values[key][1] - self.now_us // 1000 if self._get(key) is not None else None

    def _get(self, key: str) -> str | None:
        if key in self.values and self.now_us // 1000 > self.values[key][1]:
            del self.values[key]  # expired: only once the clock is past it
        return self.values[key][0] if key in self.values else None

    def _command(self, verb: str, *words: str) -> Any:
        commands: dict[str, Callable[..., Any]] = {
            "TIME": lambda: self._lua.table(str(self.now_us // 1_000_000), str(self.now_us % 1_000_000)),
            "GET": lambda key: self._get(key) or False,  # what a script gets of nothing
            "SET": lambda key, value, _pxat, at: self.values.__setitem__(key, (value, int(at))),
            "DEL": lambda key: self.values.pop(key, None),
            "PUBLISH": lambda channel, message: self.told.append((channel, message)),
        }
        return commands[verb](*words)


class LuaLimiter:
    """The memory limiter's synchronous methods on such a store, for tests that run on both."""

    def __init__(self, now_ns: int) -> None:
        self.store = LuaStore(now_ns // MICROSECOND)

    def decide(self, charges: Sequence[Charge], now_ns: int) -> Decision:
        """Decide as `redis_limiter` does: by what the script found, and the same rule."""
        self.store.now_us = now_ns // MICROSECOND
        keys = [charge.key for charge in charges]
        words = [
            word for i, charge in enumerate(charges, 1) for word in (i, charge.quota.burst_ns, charge.increment_ns)
        ]
        clock_us, *debts = self.store.call(keys, len(charges), *words)
        at_ns = clock_us * MICROSECOND
        taken = [
            take(at_ns + debt, charge.quota.burst_ns, charge.increment_ns, at_ns)
            for charge, debt in zip(charges, debts, strict=True)
        ]
        return joint_decision(charges, taken, at_ns)

    def peek(self, key: str, quota: Quota, now_ns: int) -> Decision:
        """Look at a bucket."""
        return self.decide([Charge(key, quota, 0)], now_ns)

    def settle(self, charges: Sequence[Charge], decision: Decision, now_ns: int) -> int:
        """Settle one bucket; return what it owes then, in nanoseconds."""
        self.store.now_us = now_ns // MICROSECOND
        (charge,) = charges
        charged_ns = decision.at_ns + decision.reset_ns
        _, debt = self.store.call(
            [charge.key], "settle", 1, charge.quota.burst_ns, charge.increment_ns, max(charged_ns, 0)
        )
        return debt
