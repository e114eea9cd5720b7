"""The calls of hooks: their time, their errors, and what follows from them.

A coroutine is ended when its budget is used up. A function cannot be interrupted: its time is measured, and one that
exceeds its budget is counted and logged, but its result is used, as it has cost its time already.
"""

import asyncio
import inspect
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal, NamedTuple

from api_gateway.errors import ExtensionFailed

logger = logging.getLogger(__name__)

AfterFailure = Literal["refuse", "ignore"]
HookResult = Literal["ok", "error", "timeout"]
OnCall = Callable[[str, str, str, int], None]  # extension, hook, outcome, nanoseconds

_LOG_EVERY_NS = 1_000_000_000  # the least time between two lines about the same hook


class HookPolicy(NamedTuple):
    """How a hook is called: its budget in seconds, and what follows a failure."""

    budget: float
    on_error: AfterFailure
    on_timeout: AfterFailure


class Hook:
    """One hook of one extension."""

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

    def __repr__(self) -> str:
        return f"<Hook {self.name} of {self.extension}>"

    def begin(self, *arguments: object) -> Any:
        """Call the hook. Returns the checked result, or an awaitable of it; raises ExtensionFailed."""
        began = time.perf_counter_ns()
        try:
            result = self._call(*arguments)
            if inspect.isawaitable(result):
                return self._finished(result, began)
            found = None if result is None else self._check(result)
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001 - whatever the code of an extension raises, such as SystemExit
            return self._failed(began, "error", error)
        self._note(began)
        return found

    async def _finished(self, awaited: Awaitable[Any], began: int) -> Any:
        try:
            async with asyncio.timeout(self.policy.budget) as timeout:
                result = await awaited
            found = None if result is None else self._check(result)
        except TimeoutError as error:
            return self._failed(began, "timeout" if timeout.expired() else "error", error)
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # the request has ended; any other cancellation is a failure within the hook
            return self._failed(began, "error", error)
        self._on_call(self.extension, self.name, "ok", time.perf_counter_ns() - began)
        return found

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

    def _failed(self, began: int, outcome: HookResult, error: BaseException) -> None:
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
