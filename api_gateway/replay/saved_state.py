"""The state of all limits at an instant, from which a replay starts instead of full buckets and unused quotas."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from api_gateway.limits.period_store import CounterRow, counter_of, row_of
from api_gateway.limits.quota_state import QuotaCounter
from api_gateway.replay.errors import ReplayError
from api_gateway.replay.log_lines import MAX_WHOLE

_FORMAT = 1


@dataclass(slots=True)
class ReplaySnapshot:
    """The snapshot that `GET /limits/snapshot` returns and `--save` writes. Times are nanoseconds since the epoch.

    `buckets` are the times at which buckets will be full, by process (empty: of the store) and key; full ones are left
    out. `counters` are those of calendar quotas.
    """

    at_ns: int = 0
    buckets: dict[str, dict[str, int]] = field(default_factory=dict)
    counters: dict[str, QuotaCounter] = field(default_factory=dict)

    def add(self, other: "ReplaySnapshot", before: "ReplaySnapshot | None") -> None:
        """Add the state of other clients at the same time.

        Both have begun with the state `before`, which has all clients: what is still as it was then is not theirs.
        """
        for process, buckets in other.buckets.items():
            held = self.buckets.get(process)
            if held is None:
                self.buckets[process] = buckets
                continue
            was = {} if before is None else before.buckets.get(process, {})
            held.update({key: full_at_ns for key, full_at_ns in buckets.items() if was.get(key) != full_at_ns})
            for key in [key for key, full_at_ns in was.items() if full_at_ns > other.at_ns and key not in buckets]:
                held.pop(key, None)  # full by a refund
        was_counted = {} if before is None else before.counters
        self.counters.update({key: one for key, one in other.counters.items() if was_counted.get(key) != one})

    def write(self, path: Path) -> None:
        """Write it to a file. Raises ReplayError."""
        rows = [row_of(key, counter) for key, counter in self.counters.items()]
        document = {"format": _FORMAT, "at_ns": self.at_ns, "buckets": self.buckets, "counters": rows}
        try:
            path.write_text(json.dumps(document, separators=(",", ":")))
        except OSError as error:
            raise ReplayError(f"{path}: cannot be written: {(error.strerror or str(error)).lower()}") from None


def read_snapshot(path: Path) -> ReplaySnapshot:
    """Read a snapshot. Raises ReplayError with the file and the cause."""
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise ReplayError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from None
    except (ValueError, RecursionError):
        raise ReplayError(f"{path}: is not JSON; a snapshot is what GET /limits/snapshot returns") from None
    try:
        return _snapshot(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        cause = f"{type(error).__name__}: {error}"
        raise ReplayError(f"{path}: is no snapshot of limits: {cause:.200}") from None


def _snapshot(document: Any) -> ReplaySnapshot:
    if document["format"] != _FORMAT:
        raise ValueError(f"format: expected {_FORMAT}, got {document['format']!r:.100}")
    return ReplaySnapshot(
        _time(document["at_ns"]),
        {
            process: {key: _time(full_at_ns) for key, full_at_ns in buckets.items()}
            for process, buckets in document["buckets"].items()
        },
        dict(_counters(document["counters"])),
    )


def _counters(rows: Iterable[CounterRow]) -> Iterable[tuple[str, QuotaCounter]]:
    for row in rows:
        key, counter = counter_of(row)
        if not all(-MAX_WHOLE < value < MAX_WHOLE for value in row[2:] if isinstance(value, int)):
            raise ValueError(f"counter {key!r:.100}: a number is too large")
        yield key, counter


def _time(value: object) -> int:
    if type(value) is not int or not 0 <= value < MAX_WHOLE:
        raise ValueError(f"expected nanoseconds since the epoch, got {value!r:.100}")
    return value
