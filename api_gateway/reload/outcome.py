"""What became of reloads: one result, and the counts of all. Values only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple


class ReloadResult(StrEnum):
    """How a reload ends."""

    SUCCESS = "success"
    INVALID = "invalid"  # the configuration is wrong
    FAILED = "failed"  # it is right and could not be put into force
    UNAVAILABLE = "unavailable"  # the gateway drains, or its workers are being restarted


class ChangedSetting(NamedTuple):
    """A setting that differs. Values are None where it was or is not set, and where they are secret."""

    setting: str
    old: Any
    new: Any
    is_secret: bool = False

    def __str__(self) -> str:
        return f"{self.setting}: changed" if self.is_secret else f"{self.setting}: {self.old!r} -> {self.new!r}"


@dataclass(frozen=True, slots=True)
class ReloadOutcome:
    """What one reload came to. `needs_restart` names changed settings that stay as they were."""

    result: ReloadResult
    changes: tuple[ChangedSetting, ...] = ()
    needs_restart: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def state(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {
            "result": self.result.value,
            "changes": [list(change) for change in self.changes],
            "needs_restart": list(self.needs_restart),
            "problems": list(self.problems),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "ReloadOutcome":
        """Build the outcome whose `state` this is."""
        changes = tuple(ChangedSetting(*change) for change in state["changes"])
        return cls(ReloadResult(state["result"]), changes, tuple(state["needs_restart"]), tuple(state["problems"]))


@dataclass(frozen=True, slots=True)
class ReloadState:
    """The last reload that was carried out, and how many ended how. Times are seconds since the epoch.

    `loaded_at` is when the configuration in force was read; `problems` are why a newer one is not in force.
    """

    loaded_at: float = 0.0
    problems: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(map(str, ReloadResult), 0))

    @property
    def is_successful(self) -> bool:
        """True unless the last reload failed."""
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
        """Build the state that `asdict` and JSON have made this of."""
        return cls(state["loaded_at"], tuple(state["problems"]), state["counts"])
