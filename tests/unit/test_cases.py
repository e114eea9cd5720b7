"""A test that goes through a table runs every case and shows every failure."""

import inspect

import pytest

from tests.cases import each


def test_every_case_is_run_and_its_fixtures_are_left() -> None:
    seen: list[tuple[int, str, str]] = []

    @each(("one", "other"), [(1, "a"), (2, "b")])
    def table(one: int, other: str, fixture: str) -> None:
        seen.append((one, other, fixture))

    assert list(inspect.signature(table).parameters) == ["fixture"]
    table(fixture="x")
    assert seen == [(1, "a", "x"), (2, "b", "x")]


def test_failures_are_shown_with_their_cases_and_end_no_other() -> None:
    seen = []

    @each("other", "ab")
    @each("one", [0, 1, 2], ids=["none", "one", "two"])
    def table(one: int, other: str) -> None:
        seen.append((one, other))
        if one == 1:
            pytest.fail("one")
        assert not one or other == "a", "two"

    with pytest.raises(ExceptionGroup) as failed:
        table()
    assert len(seen) == 6
    first, second = failed.value.exceptions
    assert first.__notes__ == ["in the case one", "in the case 'a'"]
    assert isinstance(second, ExceptionGroup)
    assert [error.__notes__ for error in second.exceptions] == [["in the case one"], ["in the case two"]]


def test_a_table_without_cases_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="without cases"):
        each("one", [])


def test_a_case_may_be_a_param_with_an_id() -> None:
    seen = []

    @each(("one", "other"), [pytest.param(1, 2, id="first"), (3, 4)])
    @each("third", [pytest.param(5, id="fifth")])
    def table(one: int, other: int, third: int) -> None:
        seen.append((one, other, third))
        assert one > 1

    with pytest.raises(AssertionError) as failed:
        table()
    assert seen == [(1, 2, 5), (3, 4, 5)]
    assert failed.value.__notes__ == ["in the case fifth", "in the case first"]
