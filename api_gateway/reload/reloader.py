"""Reloads the configuration: reads it, compares it with the one in force, and has it put into force or keeps the old.

The same for one process and for the supervisor of several; what differs is handed in as a function. One reload at a
time: those that come meanwhile wait for their turn, as what they want to be seen may have been written since.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from api_gateway.config import GatewayConfig
from api_gateway.errors import StartupError
from api_gateway.reload.changes import changes_between, keep_restart_settings
from api_gateway.reload.outcome import ReloadOutcome, ReloadResult, ReloadState
from api_gateway.settings.diagnostics import ConfigError

logger = logging.getLogger(__name__)

MAX_LOGGED = 50  # changes


class ApplyError(Exception):
    """A valid configuration could not be put into force; the message says where and why. The old one is in force."""


class Reloader:
    """Knows the configuration in force. `state` is what became of the reloads so far."""

    def __init__(
        self,
        config: GatewayConfig,
        read: Callable[[], GatewayConfig] | None,
        apply: Callable[[GatewayConfig], Awaitable[None]],
        *,
        wall_clock: Callable[[], float],
    ) -> None:
        """`read` reads the configuration anew, may block, and raises ConfigError; None if there is nothing to read.

        `apply` puts a configuration into force, or raises StartupError or ApplyError and leaves everything as it was.
        """
        self.config = config
        self.state = ReloadState(wall_clock())
        self._read = read
        self._apply = apply
        self._wall_clock = wall_clock
        self._lock = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<Reloader [{'in force' if self.state.is_successful else 'the last reload failed'}]>"

    async def reload(self, origin: str) -> ReloadOutcome:
        """Reload the configuration. `origin` says in the log where the wish came from."""
        async with self._lock:
            outcome = await self._reload()
            return self.record(outcome, origin)

    async def idle(self) -> None:
        """Wait until no reload runs or waits for its turn."""
        async with self._lock:
            return

    def record(self, outcome: ReloadOutcome, origin: str) -> ReloadOutcome:
        """Count an outcome and log it."""
        self.state = self.state.after(outcome, self._wall_clock())
        if outcome.result is not ReloadResult.SUCCESS:
            for problem in outcome.problems:
                logger.error("configuration not reloaded (%s): %s", origin, problem)
            return outcome
        for change in outcome.changes[:MAX_LOGGED]:
            if change.setting in outcome.needs_restart:
                logger.warning("configuration: %s; needs a restart of the gateway, and stays as it was", change)
            else:
                logger.info("configuration: %s", change)
        count = len(outcome.changes) - len(outcome.needs_restart)
        logger.info("configuration reloaded (%s): %d settings changed", origin, count)
        return outcome

    async def _reload(self) -> ReloadOutcome:
        if self._read is None:
            return ReloadOutcome(
                ReloadResult.FAILED, problems=("the program that runs the gateway gave it its configuration",)
            )
        try:
            read = await asyncio.to_thread(self._read)
        except ConfigError as error:
            return ReloadOutcome(ReloadResult.INVALID, problems=tuple(error.problems))
        config, needs_restart = keep_restart_settings(self.config, read)
        changes = tuple(changes_between(self.config, read))
        try:
            await self._apply(config)
        except StartupError as error:
            return ReloadOutcome(ReloadResult.INVALID, problems=(str(error),))
        except ApplyError as error:
            return ReloadOutcome(ReloadResult.FAILED, problems=(str(error),))
        except Exception as error:
            logger.exception("configuration")
            return ReloadOutcome(ReloadResult.FAILED, problems=(f"the gateway failed: {type(error).__name__}",))
        self.config = config
        return ReloadOutcome(ReloadResult.SUCCESS, changes, tuple(needs_restart))


def refused_reload(problem: str) -> ReloadOutcome:
    """Return the outcome of a reload that comes at a bad time."""
    return ReloadOutcome(ReloadResult.UNAVAILABLE, problems=(problem,))
