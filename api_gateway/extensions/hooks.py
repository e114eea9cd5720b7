"""Calls hooks within a budget of time, and handles their failures.

A coroutine is cancelled when its budget is used up, and its request goes on, whether it ends or not. A function cannot
be interrupted: its time is measured, and one that exceeds its budget is counted and logged, but its result is used,
because it has already cost its time.

Whatever a hook raises is its failure, also KeyboardInterrupt: the servers handle SIGINT by a handler of their own,
which raises nothing. And however the task of a coroutine ends, its request gets a reply.
"""

import asyncio
import inspect
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Literal, NamedTuple

from api_gateway.errors import ExtensionFailed

logger = logging.getLogger(__name__)

AfterFailure = Literal["refuse", "ignore"]
HookResult = Literal["ok", "error", "timeout", "still_running"]
OnCall = Callable[[str, str, str, int], None]  # extension, hook, outcome, nanoseconds

MOST_LEFT = 100  # calls of a hook that were cancelled and have not ended; further calls fail at once
_GRACE_PERIOD = 1.0  # seconds within which a cancelled call should end
_LOG_EVERY_NS = 1_000_000_000  # the least time between two lines about the same hook


class HookPolicy(NamedTuple):
    """How a hook is called: its budget in seconds, and what follows a failure."""

    budget: float
    on_error: AfterFailure
    on_timeout: AfterFailure


class Hook:
    """One hook of one extension: calls it, enforces its budget, counts and logs its failures."""

    def __init__(
        self,
        extension: str,
        name: str,
        call: Callable[..., Any],
        policy: HookPolicy,
        check: Callable[[Any], Any],
        on_call: OnCall,
    ) -> None:
        """`check` returns the checked result, or raises; it is not called with None."""
        self.extension = extension
        self.name = name
        self.policy = policy
        self._call = call
        self._check = check
        self._on_call = on_call
        self._logged_ns = 0
        self._left: set[asyncio.Task[Any]] = set()  # cancelled, and not ended
        self._has_left = False

    def __repr__(self) -> str:
        return f"<Hook {self.name} of {self.extension}>"

    def begin(self, *arguments: object) -> Any:
        """Call the hook. Returns the checked result, or a `HookCall` that has it later; raises ExtensionFailed."""
        began = time.perf_counter_ns()
        if len(self._left) >= MOST_LEFT:
            return self.failed(began, "timeout", TimeoutError("too many calls have not ended after their budget"))
        try:
            result = self._call(*arguments)
            if inspect.isawaitable(result):
                return HookCall(self, result, began)
            found = None if result is None else self._check(result)
        except BaseException as error:  # noqa: BLE001 - see the first lines of this module
            return self.failed(began, "error", error)
        self._note(began)
        return found

    def finished(self, began: int, result: Any) -> Any:
        """Count a call of a coroutine, and return its checked result. Raises ExtensionFailed."""
        try:
            found = None if result is None else self._check(result)
        except BaseException as error:  # noqa: BLE001 - as above
            return self.failed(began, "error", error)
        self._on_call(self.extension, self.name, "ok", time.perf_counter_ns() - began)
        return found

    def leave(self, task: asyncio.Task[Any]) -> None:
        """Keep a reference to a cancelled task until it ends; check once whether it has ended in time."""
        self._left.add(task)
        task.add_done_callback(self._left.discard)
        asyncio.get_running_loop().call_later(_GRACE_PERIOD, self._look_after, task)

    def _look_after(self, task: asyncio.Task[Any]) -> None:
        """Count a task that continues although it was cancelled; log the first one."""
        if task.done():
            return
        self._on_call(self.extension, self.name, "still_running", 0)
        if not self._has_left:
            self._has_left = True
            logger.error(
                "extension %s: %s continues although its call was cancelled, because it catches CancelledError; its"
                " request did not wait for it. Further such calls are counted, not logged",
                self.extension,
                self.name,
            )

    def _note(self, began: int) -> None:
        """Count a call of a function, which may have exceeded its budget."""
        took = time.perf_counter_ns() - began
        is_late = took > self.policy.budget * 1e9
        self._on_call(self.extension, self.name, "timeout" if is_late else "ok", took)
        if is_late and self._may_log():
            logger.warning(
                "extension %s: %s held the event loop for %.0f ms; its budget is %.0f ms, and a function cannot be"
                " interrupted",
                self.extension,
                self.name,
                took / 1e6,
                self.policy.budget * 1e3,
            )

    def failed(self, began: int, outcome: HookResult, error: BaseException) -> None:
        """Count and log a failure. Raises ExtensionFailed, or returns None, as if the hook had returned that."""
        self._on_call(self.extension, self.name, outcome, time.perf_counter_ns() - began)
        policy = self.policy.on_timeout if outcome == "timeout" else self.policy.on_error
        if self._may_log():
            why = f"not done within {self.policy.budget * 1e3:.0f} ms" if outcome == "timeout" else "failed"
            done = "the request is refused" if policy == "refuse" else "it is ignored"
            trace = error if outcome == "error" else None
            logger.error("extension %s: %s %s; %s", self.extension, self.name, why, done, exc_info=trace)
        if policy == "refuse":
            words = "did not respond in time" if outcome == "timeout" else "failed"
            raise ExtensionFailed(f"The extension '{self.extension}' {words} in {self.name}.") from error

    def _may_log(self) -> bool:
        """Return True once in a second, so that a failing hook does not flood the log."""
        now = time.monotonic_ns()
        if self._logged_ns and now - self._logged_ns < _LOG_EVERY_NS:
            return False
        self._logged_ns = now
        return True


class HookCall:
    """A call of a coroutine. `ask` starts it, and replies once: when it ends, or when its budget is used up."""

    __slots__ = ("_awaited", "_began", "_hook", "_on_reply", "_timer")

    def __init__(self, hook: Hook, awaited: Awaitable[Any], began: int) -> None:
        self._hook = hook
        self._awaited = awaited
        self._began = began
        self._on_reply: Callable[[Any], None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<HookCall of {self._hook!r}>"

    def ask(self, on_reply: Callable[[Any], None]) -> None:
        """Have `on_reply` called with a tuple of the result, or of an ExtensionFailed."""
        self._on_reply = on_reply
        loop = asyncio.get_running_loop()
        task = loop.create_task(_contained(self._awaited))
        self._timer = loop.call_later(self._hook.policy.budget, self._on_budget, task)
        task.add_done_callback(self._on_done)

    def _on_budget(self, task: asyncio.Task[Any]) -> None:
        task.cancel()
        self._hook.leave(task)
        self._reply(partial(self._hook.failed, self._began, "timeout", TimeoutError()))

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        if self._on_reply is None:  # replied already, when the budget was used up
            return
        if self._timer is not None:
            self._timer.cancel()
        # The task is cancelled if the hook cancels it and then returns, and at the end of the event loop.
        result, error = (None, asyncio.CancelledError()) if task.cancelled() else task.result()
        if error is None:
            self._reply(partial(self._hook.finished, self._began, result))
        else:
            self._reply(partial(self._hook.failed, self._began, "error", error))

    def _reply(self, outcome: Callable[[], Any]) -> None:
        on_reply, self._on_reply = self._on_reply, None
        assert on_reply is not None  # noqa: S101 - the first reply, after `ask`
        try:
            reply = outcome()
        except ExtensionFailed as error:
            reply = error.with_traceback(None)
        on_reply((reply,))


async def _contained(awaited: Awaitable[Any]) -> tuple[Any, BaseException | None]:
    """Return the result of a hook, or what it raises: asyncio passes some exceptions of tasks on to the event loop."""
    try:
        return await awaited, None
    except BaseException as error:  # noqa: BLE001 - see the first lines of this module
        return None, error
