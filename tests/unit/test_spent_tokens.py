"""Tokens that requests have spent which the history has not kept: told from what the kept ones found."""

from typing import Any

from api_gateway.admin.spent_tokens import spent_by
from tests.cases import each

BUCKET = {"_source": "memory", "_share": None, "_rate": 1.0, "_burst": 10.0}


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


SHARE: dict[str, Any] = {"_source": "local_share", "_rate": 0.5, "_burst": 5.0}


def test_the_tokens_of_a_share_were_spent_in_its_own_process_and_by_what_the_whole_limit_was_charged() -> None:
    """Another process's share is another bucket: it has spent none of these tokens, and its figures say nothing."""
    rows = [
        row(19.0, 1.0, _share=1, **SHARE),
        row(18.5, 5.0, 5.0, _share=2, _full=True, **SHARE),
        row(18.0, 1.5, _share=1, **SHARE),
        row(5.0, 10.0, 7.0, _source="store"),
    ]
    refused = SHARE | {"_share": 1, "_at_ns": 20_000_000_000, "_before": 0.5}
    found = spent_by(rows, refused)
    assert [one["request_id"] for one in found["requests"]] == ["19.0", "18.0", "5.0"]
    assert (found["complete"], found["missing_tokens"]) == (True, 0)
    assert spent_by(rows, refused | {"_before": 0.25})["missing_tokens"] == 0.25


def test_what_a_share_had_says_nothing_of_the_whole_limit() -> None:
    """After an outage: the requests of all shares have spent tokens of the limit, but none found that full."""
    rows = [
        row(19.0, 5.0, 2.0, tokens_before=5.0, _share=1, **SHARE | {"_full": True}),
        row(18.5, 5.0, 2.0, tokens_before=5.0, _share=2, **SHARE | {"_full": True}),
        row(18.0, 10.0, tokens_before=10.0, _source="store"),
    ]
    found = spent_by(rows, REFUSED | {"_source": "store"})
    assert [one["tokens_before"] for one in found["requests"]] == [None, None, 10.0]
    assert (found["complete"], found["missing_tokens"]) == (True, 0)
