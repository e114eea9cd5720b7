"""The cache of the client store is limited, and never older than what it held before."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api_gateway.clients.cache import ClientCache
from api_gateway.clients.records import ClientRecord
from api_gateway.models import Client, Quota

FREE = Quota.per_second("FREE", 1, 10)


def resolve(record: ClientRecord) -> Client | None:
    return None if record.tier is None else Client(record.id, record.id, FREE, "registered")


@pytest.fixture
def copy() -> Callable[..., ClientCache]:
    def make(limit: int, *, is_complete: bool = False) -> ClientCache:
        made = ClientCache(limit, resolve)
        made.is_complete = is_complete
        return made

    return make


names = st.sampled_from("abcdefghijklmnop")
steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), names, st.sampled_from(["FREE", None])),
        st.tuples(st.just("absent"), names, st.none()),
        st.tuples(st.just("knows"), names, st.none()),
    ),
    max_size=60,
)


@given(st.integers(1, 12), st.booleans(), steps)
def test_it_is_bounded_and_what_it_says_is_so(
    limit: int,
    is_complete: bool,  # noqa: FBT001 - drawn
    steps: list[tuple[str, str, str | None]],
) -> None:
    copy = ClientCache(limit, resolve)
    copy.is_complete = is_complete
    truth: dict[str, str | None] = {}
    for version, (step, name, tier) in enumerate(steps, 1):
        if step == "put":
            assert copy.put(ClientRecord(name, tier, version=version))
            truth[name] = tier
        elif step == "absent" and truth.get(name) is None:
            copy.put_negative(name)
        elif step == "knows" and copy.knows(name):
            assert (name in copy.clients) == (truth.get(name) is not None)
        assert len(copy) <= limit
        assert all(truth[each] == "FREE" for each in copy.clients)


def test_removals_are_forgotten_once_nothing_older_can_come(copy: Callable[..., ClientCache]) -> None:
    complete, partial = copy(10, is_complete=True), copy(10)
    for one in (complete, partial):
        one.put(ClientRecord("a", None, version=1))
        one.put(ClientRecord("b", None, version=2))
        assert not one.put(ClientRecord("a", "FREE", version=1))
        one.forget_empty(1)
    assert (len(complete), len(partial)) == (1, 2)
    assert repr(partial) == "<ClientCache [2 records, 0 absent, partial]>"


def test_in_another_epoch_versions_count_anew(copy: Callable[..., ClientCache]) -> None:
    one = copy(10)
    one.put(ClientRecord("a", None, version=9))
    assert one.put(ClientRecord("a", "FREE", version=1), is_new_epoch=True)
    assert "a" in one.clients
