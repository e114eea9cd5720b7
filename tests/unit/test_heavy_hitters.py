"""The most frequent keys of a stream: limited error, every frequent key held, limited memory, also merged."""

import json
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api_gateway.observability.heavy_hitters import Estimate, HeavyHitters

KEYS = st.integers(0, 30).map(str)
# Some keys come much more often than others, and in runs, as clients do.
STREAMS = st.lists(st.tuples(KEYS, st.integers(1, 12)), max_size=80).map(
    lambda runs: [key for key, times in runs for _ in range(times)]
)
SIZES = st.integers(1, 12)


def hitters_of(stream: list[str], size: int) -> HeavyHitters:
    hitters = HeavyHitters(size)
    for key in stream:
        hitters.add(key)
    return hitters


def assert_bounds(hitters: HeavyHitters, stream: list[str], size: int) -> None:
    true = Counter(stream)
    assert len(hitters) <= size
    for key in [*true, "never"]:
        found = hitters.estimate(key)
        assert found.count - found.error <= true[key] <= found.count
        assert found.error <= len(stream) / size
    held = {found.key for found in hitters.heaviest(size)}
    assert {key for key, count in true.items() if count > len(stream) / size} <= held
    counts = [found.count for found in hitters.heaviest(size)]
    assert counts == sorted(counts, reverse=True)
    assert sum(counts) <= len(stream)


@given(STREAMS, SIZES)
def test_counts_are_within_their_bounds_and_heavy_keys_are_held(stream: list[str], size: int) -> None:
    hitters = hitters_of(stream, size)
    assert_bounds(hitters, stream, size)
    assert sum(found.count for found in hitters.heaviest(size)) == len(stream)


@given(st.lists(STREAMS, min_size=2, max_size=4), SIZES, STREAMS)
def test_merging_keeps_the_bounds_also_for_what_is_counted_afterwards(
    streams: list[list[str]], size: int, more: list[str]
) -> None:
    merged = HeavyHitters(size)
    for stream in streams:
        merged.merge(json.loads(json.dumps(hitters_of(stream, size).state())))
    everything = [key for stream in streams for key in stream]
    assert_bounds(merged, everything, size)
    for key in more:
        merged.add(key)
    assert_bounds(merged, everything + more, size)


def test_what_fits_is_counted_exactly() -> None:
    hitters = hitters_of(["a", "b", "a"], 2)
    assert hitters.heaviest(9) == [Estimate("a", 2, 0), Estimate("b", 1, 0)]
    assert hitters.estimate("c") == Estimate("c", 1, 1)
    hitters.add("c")
    assert hitters.heaviest(1) == [Estimate("a", 2, 0)] or hitters.heaviest(1) == [Estimate("c", 2, 1)]
    assert repr(hitters) == "<HeavyHitters [2 of 2 counters]>"


def test_a_flood_of_invented_keys_hides_no_heavy_one_and_takes_no_memory() -> None:
    source, hitters = random.Random(7), HeavyHitters(100)
    for number in range(20_000):
        hitters.add(f"invented-{number}")
        if source.random() < 0.05:
            hitters.add("heavy")
    assert hitters.heaviest(1)[0].key == "heavy"
    assert len(hitters) == len(hitters._heap) == 100


@pytest.mark.parametrize("size", [0, -1])
def test_a_sketch_has_a_counter(size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        HeavyHitters(size)


def test_only_equals_are_merged() -> None:
    with pytest.raises(ValueError, match="of 3 counters"):
        HeavyHitters(2).merge(HeavyHitters(3).state())
