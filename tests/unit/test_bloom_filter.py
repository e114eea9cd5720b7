"""No added id is denied, few others match, and memory is limited."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api_gateway.clients.bloom_filter import BloomFilter
from tests.cases import each

IDS = st.lists(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=128), max_size=60)


@given(IDS, IDS, st.integers(0, 100))
def test_what_was_added_is_never_denied(some: list[str], others: list[str], limit: int) -> None:
    one, other = BloomFilter(limit), BloomFilter(limit)
    for client_id in some:
        one.add(client_id)
    for client_id in others:
        other.add(client_id)
    one.update(other)
    assert all(client_id in one for client_id in (*some, *others))
    assert all(client_id in other for client_id in others)


@each(("times", "share"), [(1, 0.001), (4, 0.01), (8, 0.05)])
def test_few_ids_are_mistaken_for_those_that_were_added(times: int, share: float) -> None:
    limit = 2_000
    ids = BloomFilter(limit)
    for number in range(times * limit):
        ids.add(f"client-{number}")
    mistaken = sum(f"stranger-{number}" in ids for number in range(20_000))
    assert mistaken / 20_000 < share


@each("limit", [0, 1, 1_000, 100_000])
def test_memory_is_bounded_by_the_limit(limit: int) -> None:
    ids = BloomFilter(limit)
    for number in range(1_000):
        ids.add(f"client-{number}")
    (size,) = (int(word[1:]) for word in repr(ids).split() if word.startswith("["))
    assert size <= max(16 * limit, 8)


def test_filters_for_different_limits_cannot_be_joined() -> None:
    with pytest.raises(ValueError, match="8 bytes cannot be added to one of 128"):
        BloomFilter(10).update(BloomFilter(1))
