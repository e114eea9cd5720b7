"""The requests that had spent the tokens of a limit, and how many tokens requests spent that the history has not kept.

Pure: the rows are the answers of the workers to the question `spent`, see `history_queries`. The tokens before a
decision are compared with those after the previous one, plus the refill. If there are fewer, the record of a request
between the two is missing.
"""

from collections.abc import Sequence
from operator import itemgetter

from api_gateway.admin.history_queries import MAX_SPENDING, Members
from api_gateway.models import NANOSECONDS

_MIN_MISSING = 1e-3  # tokens; less may be due to rounding


def spent_by(rows: Sequence[Members], refused: Members) -> Members:
    """Return the requests back to the one that found the bucket full, newest first.

    `refused` describes the bucket at the decision that refused, with the members of a row that begin with `_`. The
    tokens of a share were spent by requests of its own process, and by those that were charged to the whole limit.
    """
    shown: list[Members] = []
    missing, is_complete, later = 0.0, False, refused
    is_share = refused["_source"] == "local_share"
    found = [row for row in rows if not is_share or row["_share"] in (None, refused["_share"])]
    for row in sorted(found, key=itemgetter("_started"), reverse=True)[:MAX_SPENDING]:
        missing += _tokens_between(row, later)
        later = row
        is_part = row["_share"] is not None and not is_share  # it found a part of the limit
        shown.append({name: value for name, value in row.items() if not name.startswith("_")})
        if is_part:
            shown[-1]["tokens_before"] = None
        if row["_full"] and not is_part:
            is_complete = True
            break
    return {"requests": shown, "complete": is_complete and not missing, "missing_tokens": round(missing, 6)}


def _tokens_between(row: Members, later: Members) -> float:
    """Return the tokens that were spent between two decisions by requests without a row; 0 if that is not known."""
    before, left = later["_before"], row["_left"]
    if (
        before is None
        or left is None
        or any(row[name] != later[name] for name in ("_rate", "_burst", "_source", "_share"))
    ):
        return 0.0
    refilled = row["_rate"] * (later["_at_ns"] - row["_at_ns"]) / NANOSECONDS
    expected = min(left + refilled, row["_burst"]) - row["_charged_later"]
    found: float = expected - before
    return found if found > _MIN_MISSING else 0.0
