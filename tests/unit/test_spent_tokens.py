"""Tokens that requests have spent which the history has not kept: told from what the kept ones found."""

from typing import Any

from api_gateway.admin.spent_tokens import spent_by
from tests.cases import each

BUCKET = {"_source": "memory", "_rate": 1.0, "_burst": 10.0}


def row(at: float, before: float | None, cost: float = 1.0, **more: Any) -> dict[str, Any]:
    left = None if before is None else before - cost
    own = {"request_id": str(at), "_started": at, "_at_ns": round(at * 1e9), "_before": before, "_left": left}
    return BUCKET | own | {"_full": before == 10.0, "_charged_later": 0.0} | more


REFUSED = BUCKET | {"_at_ns": 20_000_000_000, "_before": 0.5}


@each(
    ("rows", "missing", "is_complete"),
    [
        ([row(19.5, 1.0), row(11.0, 1.5, 9.0), row(10, 10.0, 9.5)], 0, True),
        ([row(19.5, 1.0), row(10, 10.0)], 9, False),  # it was full again, and was found with 1
        ([row(19.5, 3.0), row(19, 10.0, 7.5)], 2, False),  # 2.5 were left to the refused one, which found 0.5
        ([row(19.5, 1.0), row(18.0, 0.5)], 0, False),  # none is missing among them, but earlier ones
        ([row(19.5, None), row(18.0, 10.0)], 0, True),  # unknown
        ([row(19.5, 1.0, _source="store"), row(19, 10.0, 2)], 0, True),  # of different clocks
        ([row(19.5, 1.0), row(19, 10.0, 2, _charged_later=7.5)], 0, True),  # settled
        ([], 0, False),
    ],
)
def test_a_bucket_with_less_than_was_left_and_refilled_shows_that_requests_are_missing(
    rows: list[dict[str, Any]], missing: float, is_complete: object
) -> None:
    found = spent_by(rows, REFUSED)
    assert (found["missing_tokens"], found["complete"]) == (missing, is_complete)
    assert found["requests"] == [{"request_id": one["request_id"]} for one in rows]
