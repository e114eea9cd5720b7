"""The keys of the issuers of tokens as values: part of a worker's snapshot."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class IssuerSnapshot:
    """How many keys of an issuer are in use, when they were last fetched, and why the last fetch failed.

    `fetched_at`: monotonic seconds, None before the first success.
    """

    keys: int
    fetched_at: float | None
    error: str | None

    @property
    def status(self) -> Literal["pass", "warn"]:
        """`warn` if the last fetch failed, whether there are keys or not."""
        return "pass" if self.error is None else "warn"


def merge_issuers(workers: Iterable[Mapping[str, IssuerSnapshot]]) -> dict[str, IssuerSnapshot]:
    """Return the worst state of each issuer, by name: fewest keys, oldest fetch, and the error of any worker."""
    merged: dict[str, IssuerSnapshot] = {}
    for issuers in workers:
        for name, one in issuers.items():
            known = merged.get(name, one)
            times = (known.fetched_at, one.fetched_at)
            merged[name] = IssuerSnapshot(
                min(known.keys, one.keys),
                None if times[0] is None or times[1] is None else min(times[0], times[1]),
                known.error or one.error,
            )
    return merged
