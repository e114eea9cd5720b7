"""Reloads the configuration: reads it, compares it with the one in force, and applies it or keeps the old one.

Used by a single process and by the supervisor; how to read and apply is passed in. Reloads run one at a time. A reload
that is requested meanwhile is queued and not merged, because the files may have changed since.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from api_gateway.config import GatewayConfig
from api_gateway.errors import StartupError
from api_gateway.printable_text import counted
from api_gateway.reload.changes import changes_between, keep_restart_settings
from api_gateway.reload.outcome import ReloadOutcome, ReloadResult, ReloadState
from api_gateway.reload.serialization import configuration_digest
from api_gateway.settings.diagnostics import ConfigError

logger = logging.getLogger(__name__)

MAX_LOGGED = 50  # changes
# A file that an editor has written in part may be valid without them.
NO_DEMO = (
    "upstreams, routes: none is configured any more, and a reload does not replace services by the demo; configure an"
    " upstream, or restart the gateway for the demo"
)


class ApplyError(Exception):
    """A valid configuration could not be applied; the message says where and why. The old one is in force."""


class Reloader:
    """Holds the configuration in force (`config`) and the state of reloads (`state`)."""

    def __init__(
        self,
        config: GatewayConfig,
        read: Callable[[], GatewayConfig] | None,
        apply: Callable[[GatewayConfig], Awaitable[None]],
        *,
        wall_clock: Callable[[], float],
    ) -> None:
        """`read` reads the configuration again, may block, and raises ConfigError; None if there is nothing to read.

        `apply` puts a configuration into force, or raises StartupError or ApplyError and changes nothing.
        """
        self.config = config
        self.state = ReloadState(wall_clock(), digest=configuration_digest(config))
        self._read = read
        self._apply = apply
        self._wall_clock = wall_clock
        self._lock = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<Reloader [{'in force' if self.state.is_successful else 'the last reload failed'}]>"

    async def reload(self, origin: str) -> ReloadOutcome:
        """Reload the configuration. `origin` names in the log who requested it."""
        async with self._lock:
            outcome = await self._reload()
            return self.record(outcome, origin)

    async def idle(self) -> None:
        """Wait until no reload is running or queued."""
        async with self._lock:
            return

    def record(self, outcome: ReloadOutcome, origin: str) -> ReloadOutcome:
        """Count an outcome, log it, and return it."""
        self.state = self.state.after(outcome, self._wall_clock(), origin, configuration_digest(self.config))
        if outcome.result is not ReloadResult.SUCCESS:
            for problem in outcome.problems:
                logger.error("configuration not reloaded (%s): %s", origin, problem)
            return outcome
        for change in outcome.changes[:MAX_LOGGED]:
            if change.setting in outcome.needs_restart:
                logger.warning("configuration: %s; needs a restart of the gateway and is not applied", change)
            else:
                logger.info("configuration: %s", change)
        count = len(outcome.changes) - len(outcome.needs_restart)
        logger.info("configuration reloaded (%s): %s changed", origin, counted(count, "setting"))
        return outcome

    async def _reload(self) -> ReloadOutcome:
        if self._read is None:
            return ReloadOutcome(
                ReloadResult.FAILED, problems=("the embedding program set the configuration; there is none to read",)
            )
        try:
            read = await asyncio.to_thread(self._read)
        except ConfigError as error:
            return ReloadOutcome(ReloadResult.INVALID, problems=tuple(error.problems))
        if read.is_demo and not self.config.is_demo:
            return ReloadOutcome(ReloadResult.INVALID, problems=(NO_DEMO,))
        return await self._put_into_force(read)

    async def _put_into_force(self, read: GatewayConfig) -> ReloadOutcome:
        config, needs_restart = keep_restart_settings(self.config, read)
        changes = tuple(changes_between(self.config, read))
        try:
            await self._apply(config)
        except StartupError as error:
            return ReloadOutcome(ReloadResult.INVALID, problems=(str(error),))
        except ApplyError as error:
            return ReloadOutcome(ReloadResult.FAILED, problems=(str(error),))
        except Exception as error:
            logger.exception("configuration not reloaded: internal error")
            return ReloadOutcome(ReloadResult.FAILED, problems=(f"internal error: {type(error).__name__}",))
        self.config = config
        return ReloadOutcome(ReloadResult.SUCCESS, changes, tuple(needs_restart))


def refused_reload(problem: str) -> ReloadOutcome:
    """Return the outcome of a reload that is not possible at present."""
    return ReloadOutcome(ReloadResult.UNAVAILABLE, problems=(problem,))
