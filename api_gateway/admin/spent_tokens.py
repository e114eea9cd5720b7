"""The requests that had spent the tokens of a limit, and how many tokens requests spent that the history has not kept.

Pure: the rows are the answers of the workers to the question `spent`, see `history_queries`. A bucket is followed from
one decision to the next: fewer tokens than what the former one left and the refill since then means that a request
between them is missing.
"""

from collections.abc import Sequence
from operator import itemgetter

from api_gateway.admin.history_queries import MAX_SPENDING, Members
from api_gateway.models import NANOSECONDS

_MIN_MISSING = 1e-3  # tokens; less may be due to rounding


def spent_by(rows: Sequence[Members], refused: Members) -> Members:
    """Return the requests back to the one that found the bucket full, newest first.

    `refused` describes the bucket at the decision that refused, with the members of a row that begin with `_`.
    """
    shown: list[Members] = []
    missing, is_complete, later = 0.0, False, refused
    for row in sorted(rows, key=itemgetter("_started"), reverse=True)[:MAX_SPENDING]:
        missing += _tokens_between(row, later)
        later = row
        shown.append({name: value for name, value in row.items() if not name.startswith("_")})
        if row["_full"]:
            is_complete = True
            break
    return {"requests": shown, "complete": is_complete and not missing, "missing_tokens": round(missing, 6)}


def _tokens_between(row: Members, later: Members) -> float:
    """Return the tokens that were spent between two decisions by requests without a row; 0 if that is not known."""
    before, left = later["_before"], row["_left"]
    if before is None or left is None or any(row[name] != later[name] for name in ("_rate", "_burst", "_source")):
        return 0.0
    refilled = row["_rate"] * (later["_at_ns"] - row["_at_ns"]) / NANOSECONDS
    expected = min(left + refilled, row["_burst"]) - row["_charged_later"]
    found: float = expected - before
    return found if found > _MIN_MISSING else 0.0
