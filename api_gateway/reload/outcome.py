"""Outcomes of reloads: the result of one, and the counts of all. Values only."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple

MAX_RECENT = 10  # reloads that are remembered
MAX_CHANGES = 30  # changes and problems of each
MAX_TEXT = 300  # characters of a value or problem


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
class ReloadRecord:
    """One of the last reloads: when it ended (seconds since the epoch), who requested it, and its outcome.

    Of many changes or problems only the first are kept, and `omitted` is the number of the others.
    """

    at: float
    origin: str
    outcome: ReloadOutcome
    omitted: int = 0

    @classmethod
    def of(cls, at: float, origin: str, outcome: ReloadOutcome) -> "ReloadRecord":
        """Return the record of a reload."""
        kept = replace(
            outcome,
            changes=tuple(map(_shortened, outcome.changes[:MAX_CHANGES])),
            needs_restart=outcome.needs_restart[:MAX_CHANGES],
            problems=tuple(problem[:MAX_TEXT] for problem in outcome.problems[:MAX_CHANGES]),
        )
        listed, shown = (len(one.changes) + len(one.problems) for one in (outcome, kept))
        return cls(at, origin, kept, listed - shown)

    def state(self) -> dict[str, Any]:
        """Return the record in JSON's types."""
        return {"at": self.at, "origin": self.origin, "outcome": self.outcome.state(), "omitted": self.omitted}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "ReloadRecord":
        """Build a record from the result of `state`."""
        return cls(state["at"], state["origin"], ReloadOutcome.from_state(state["outcome"]), state["omitted"])


def _shortened(change: ChangedSetting) -> ChangedSetting:
    """Return a change whose values are shown in full only if they are short."""
    old, new = (value if len(str(value)) <= MAX_TEXT else f"{str(value)[:MAX_TEXT]}…" for value in change[1:3])
    return ChangedSetting(change.setting, old, new, change.is_secret)


@dataclass(frozen=True, slots=True)
class ReloadState:
    """The state after all reloads so far. Times are seconds since the epoch.

    `loaded_at` is when the configuration in force was read, `problems` why a newer one is not in force, and `counts`
    the number of reloads by result. `recent` has the last `MAX_RECENT` reloads, newest first. `digest` identifies the
    configuration in force, see `serialization.digest_of`.
    """

    loaded_at: float = 0.0
    problems: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(map(str, ReloadResult), 0))
    recent: tuple[ReloadRecord, ...] = ()
    digest: str = ""

    @property
    def is_successful(self) -> bool:
        """True unless the last reload that was not UNAVAILABLE failed."""
        return not self.problems

    def after(self, outcome: ReloadOutcome, now: float, origin: str = "", digest: str = "") -> "ReloadState":
        """Return the state after one more reload, which `origin` requested; `digest` is then that in force."""
        counts = {**self.counts, outcome.result.value: self.counts[outcome.result.value] + 1}
        recent = (ReloadRecord.of(now, origin, outcome), *self.recent)[:MAX_RECENT]
        if outcome.result is ReloadResult.SUCCESS:
            return ReloadState(now, (), counts, recent, digest)
        problems = self.problems if outcome.result is ReloadResult.UNAVAILABLE else outcome.problems
        return ReloadState(self.loaded_at, problems, counts, recent, self.digest)

    def state(self) -> dict[str, Any]:
        """Return the state in JSON's types."""
        return {
            "loaded_at": self.loaded_at,
            "problems": list(self.problems),
            "counts": dict(self.counts),
            "recent": [record.state() for record in self.recent],
            "digest": self.digest,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "ReloadState":
        """Build the state from the result of `state`, decoded from JSON."""
        recent = tuple(map(ReloadRecord.from_state, state["recent"]))
        return cls(state["loaded_at"], tuple(state["problems"]), state["counts"], recent, state["digest"])
