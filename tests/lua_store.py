"""The real token_bucket.lua and the real limiter, with a virtual clock.

Lua 5.1 runs in this process with a dict as store; an object replaces the sockets between it and the limiter.
"""

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, cast

from lupa import lua51

from api_gateway.limits.redis_limiter import TOKEN_BUCKET_SCRIPT, RedisLimiter
from api_gateway.limits.script_batcher import ScriptBatcher, ScriptOp, _call
from api_gateway.models import Charge, Decision, Quota
from api_gateway.storage.redis_session import StoreSession

MICROSECOND = 1000  # in nanoseconds
DEADLINE = 0.02  # seconds
_PREPARE = """
function(text)
  local script = loadstring(text)
  return function(call, keys, argv)
    redis = {call = call, pcall = call}
    KEYS, ARGV = keys, argv
    return script()
  end
end
"""


@cache
def _lua() -> tuple[Any, Any]:
    """Return a runtime and the script, compiled once."""
    runtime = lua51.LuaRuntime(unpack_returned_tuples=True)
    return runtime, runtime.eval(_PREPARE)(TOKEN_BUCKET_SCRIPT.text)


class LuaStore:
    """The server's side of the script; `now_us` is its clock, in microseconds since 1970."""

    def __init__(self, now_us: int) -> None:
        self.now_us = now_us
        self.values: dict[str, tuple[str, int]] = {}  # with expiry times in milliseconds
        self.told: list[tuple[str, str]] = []
        self.writes = 0
        self._lua, self._run = _lua()

    def __repr__(self) -> str:
        return f"<LuaStore [{len(self.values)} keys, {self.now_us} us]>"

    def call(self, keys: Iterable[str], *arguments: str | int) -> list[int]:
        """Call the script, with all arguments as text, as from a client."""
        table = self._lua.table
        reply = self._run(self._command, table(*keys), table(*map(str, arguments)))
        return [int(value) for value in reply.values()]

    def pttl(self, key: str) -> int | None:
        """Return the remaining milliseconds of a key; None if it does not exist."""
        return self.values[key][1] - self.now_us // 1000 if self._get(key) is not None else None

    def sweep(self) -> None:
        """Delete expired keys, as a server does periodically; others are deleted at the next access."""
        for key in list(self.values):
            self._get(key)

    def _get(self, key: str) -> str | None:
        if key in self.values and self.now_us // 1000 > self.values[key][1]:
            del self.values[key]  # expires only after this time
        return self.values[key][0] if key in self.values else None

    def _set(self, key: str, value: str, option: str, at_ms: str) -> None:
        assert option == "PXAT", "a key without expiry would never be deleted"
        self.writes += 1
        self.values[key] = (value, int(at_ms))

    def _delete(self, key: str) -> None:
        self.writes += 1
        self.values.pop(key, None)

    def _command(self, verb: str, *words: str) -> Any:
        commands: dict[str, Callable[..., Any]] = {
            "TIME": lambda: self._lua.table(str(self.now_us // 1_000_000), str(self.now_us % 1_000_000)),
            "GET": lambda key: self._get(key) or False,  # the value of a missing key in a script
            "SET": self._set,
            "DEL": self._delete,
            "PUBLISH": lambda channel, message: self.told.append((channel, message)),
        }
        return commands[verb](*words)


class Wire(ScriptBatcher):
    """Sends operations to such a store: at once, or, if `is_slow`, when the test calls `execute` and `deliver`."""

    def __init__(self, store: LuaStore) -> None:
        self.store = store
        self.is_up = True
        self.is_slow = False
        self.deadline = DEADLINE
        self.waiting: list[ScriptOp] = []
        self.under_way: deque[tuple[list[ScriptOp], list[int]]] = deque()  # executed without a reply yet
        self.calls = self.operations = self.failures = 0
        self.last_error = None

    def __repr__(self) -> str:
        return f"<Wire [{len(self.waiting)} waiting, {len(self.under_way)} batches under way]>"

    @property
    def is_usable(self) -> bool:
        """Whether breaker and connections permit operations."""
        return self.is_up

    def submit(self, question: ScriptOp) -> None:
        """See `ScriptBatcher`."""
        self.waiting.append(question)
        if not self.is_slow:
            self.respond()

    def execute(self) -> None:
        """Execute all waiting operations in one call."""
        batch, self.waiting = self.waiting, []
        if batch:
            call = _call(batch)
            self.under_way.append((batch, self.store.call(call.keys, *call.arguments)))

    def deliver(self) -> None:
        """Deliver the oldest reply, if any."""
        if not self.under_way:
            return
        batch, (clock_us, *debts) = self.under_way.popleft()
        reply = iter(debts)
        for question in batch:
            question.read(clock_us, reply)
            question.is_over = True
        assert not [*reply], "a reply has exactly the requested values"

    def drop(self) -> None:
        """Send all waiting operations to a server that does not execute them, and let them miss the deadline."""
        _call(self.waiting)
        self.lose()

    def respond(self) -> None:
        """Execute all waiting operations, and deliver the replies."""
        self.execute()
        self.deliver()

    def lose_replies(self) -> None:
        """Execute all waiting operations, whose replies are lost."""
        self.execute()
        self.lose()

    def deliver_late(self) -> None:
        """Execute all waiting operations, and deliver the replies after the deadline."""
        self.execute()
        late = [*self.under_way]
        self.lose()
        for batch, (clock_us, *debts) in late:
            reply = iter(debts)
            for question in batch:
                question.read(clock_us, reply)

    def lose(self) -> None:
        """Let all waiting operations and replies miss the deadline."""
        lost = [question for batch, _ in self.under_way for question in batch] + self.waiting
        self.under_way.clear()
        self.waiting = []
        for question in lost:
            question.is_over = True
            question.fail()


class _Session:
    """The part of a session with such a store that the limiter uses."""

    is_divided = False

    def __init__(self, store: LuaStore) -> None:
        self.client = self
        self._store = store

    async def delete(self, key: str) -> None:
        self._store.values.pop(key, None)

    async def publish(self, channel: str, message: str) -> None:
        self._store.told.append((channel, message))


class LuaLimiter(RedisLimiter):
    """The limiter of a gateway with such a store. Without `remembers` every decision is made by the store."""

    def __init__(
        self,
        store: LuaStore,
        quotas: Iterable[Quota],
        *,
        processes: int = 1,
        remembers: bool = False,
        clock_ns: Callable[[], int] | None = None,
    ) -> None:
        super().__init__(
            cast("StoreSession", _Session(store)),
            quotas,
            policy="local_share",
            deadline=DEADLINE,
            processes=processes,
            bucket_limit=10_000,
            prefix="test",
            clock=lambda: 0.0,
            clock_ns=clock_ns or (lambda: store.now_us * MICROSECOND),
            source=random.Random(1),
        )
        self.wire = Wire(store)
        self.batcher = self.wire
        self._on_subscription(remembers)
        self.cache._valid_from_ns = -1

    def decided(self, charges: Sequence[Charge], now_ns: int) -> Decision:
        """Decide as a gateway does: at once, or after the reply of the store."""
        answers: list[Decision] = []
        decision = self.decide(charges, now_ns)
        if decision is None:
            self.decide_async(charges, now_ns, answers.append)
            (decision,) = answers
        return decision
