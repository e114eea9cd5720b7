"""Outcomes of reloads: the result of one, and the counts of all. Values only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple


class ReloadResult(StrEnum):
    """How a reload ended."""

    SUCCESS = "success"
    INVALID = "invalid"  # the configuration has mistakes
    FAILED = "failed"  # the configuration is valid and could not be applied
    UNAVAILABLE = "unavailable"  # the gateway is draining, or a rolling restart is in progress


class ChangedSetting(NamedTuple):
    """A setting that differs. `old` and `new` are in JSON's types; None if not set, or secret."""

    setting: str
    old: Any
    new: Any
    is_secret: bool = False

    def __str__(self) -> str:
        return f"{self.setting}: changed" if self.is_secret else f"{self.setting}: {self.old!r} -> {self.new!r}"


@dataclass(frozen=True, slots=True)
class ReloadOutcome:
    """The outcome of one reload. `needs_restart` names changed settings that are not applied until a restart."""

    result: ReloadResult
    changes: tuple[ChangedSetting, ...] = ()
    needs_restart: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def state(self) -> dict[str, Any]:
        """Return the outcome in JSON's types."""
        return {
            "result": self.result.value,
            "changes": [list(change) for change in self.changes],
            "needs_restart": list(self.needs_restart),
            "problems": list(self.problems),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "ReloadOutcome":
        """Build an outcome from the result of `state`."""
        changes = tuple(ChangedSetting(*change) for change in state["changes"])
        return cls(ReloadResult(state["result"]), changes, tuple(state["needs_restart"]), tuple(state["problems"]))


@dataclass(frozen=True, slots=True)
class ReloadState:
    """The state after all reloads so far. Times are seconds since the epoch.

    `loaded_at` is when the configuration in force was read, `problems` why a newer one is not in force, and `counts`
    the number of reloads by result.
    """

    loaded_at: float = 0.0
    problems: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(map(str, ReloadResult), 0))

    @property
    def is_successful(self) -> bool:
        """True unless the last reload that was not UNAVAILABLE failed."""
        return not self.problems

    def after(self, outcome: ReloadOutcome, now: float) -> "ReloadState":
        """Return the state after one more reload."""
        counts = {**self.counts, outcome.result.value: self.counts[outcome.result.value] + 1}
        if outcome.result is ReloadResult.SUCCESS:
            return ReloadState(now, (), counts)
        problems = self.problems if outcome.result is ReloadResult.UNAVAILABLE else outcome.problems
        return ReloadState(self.loaded_at, problems, counts)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "ReloadState":
        """Build the state from the result of `asdict`, decoded from JSON."""
        return cls(state["loaded_at"], tuple(state["problems"]), state["counts"])
