"""Tests that go through a table of cases.

`each` is for tables of plain values: a test of its own for each case, as by `pytest.mark.parametrize`, costs ten
milliseconds in the processes of a whole run, most of them before and after the test.
"""

import inspect
from collections.abc import Callable, Collection, Iterable
from functools import wraps
from typing import Any

import pytest

TestFunction = Callable[..., None]


def each(
    names: str | Collection[str], values: Iterable[Any], *, ids: Callable[[Any], Any] | Iterable[Any] | None = None
) -> Callable[[TestFunction], TestFunction]:
    """Run one test for all these values; the arguments are those of `pytest.mark.parametrize`.

    Every case is run, and every failure shown with its case. Other arguments are fixtures, which the cases share.
    """
    keys = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    given = list(values)
    cases = [_values(value, len(keys)) for value in given]
    titles = list(map(str, ids)) if ids is not None and not callable(ids) else list(map(_title, given))
    assert cases, "a table without cases"

    def decorated(test: TestFunction) -> TestFunction:
        assert not inspect.iscoroutinefunction(test), "a coroutine would not be awaited: use asyncio.run in the test"

        @wraps(test)
        def run(**others: Any) -> None:
            failures: list[Exception] = []
            for title, case in zip(titles, cases, strict=True):
                try:
                    test(**dict(zip(keys, case, strict=True)), **others)
                except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - raised below
                    failure = error if isinstance(error, Exception) else AssertionError(str(error))
                    failure.add_note(f"in the case {title}")
                    failures.append(failure)
            if len(failures) == 1:
                raise failures[0]
            if failures:
                raise ExceptionGroup(f"{len(failures)} of {len(cases)} cases failed", failures)

        whole = inspect.signature(test)
        left = [parameter for name, parameter in whole.parameters.items() if name not in keys]
        run.__signature__ = whole.replace(parameters=left)  # type: ignore[attr-defined]  # which pytest reads
        return run

    return decorated


def _values(value: Any, width: int) -> tuple[Any, ...]:
    """Return the arguments of a case, which may be a `pytest.param`."""
    if hasattr(value, "marks"):
        assert not value.marks, "a case of a table has no marks"
        return tuple(value.values)
    return tuple(value) if width > 1 else (value,)


def _title(value: Any) -> str:
    return str(getattr(value, "id", None) or repr(value))
