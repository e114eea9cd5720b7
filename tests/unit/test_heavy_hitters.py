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


def sketch_of(stream: list[str], size: int) -> HeavyHitters:
    sketch = HeavyHitters(size)
    for key in stream:
        sketch.add(key)
    return sketch


def assert_bounds(sketch: HeavyHitters, stream: list[str], size: int) -> None:
    true = Counter(stream)
    assert len(sketch) <= size
    for key in [*true, "never"]:
        found = sketch.estimate(key)
        assert found.count - found.error <= true[key] <= found.count
        assert found.error <= len(stream) / size
    held = {found.key for found in sketch.heaviest(size)}
    assert {key for key, count in true.items() if count > len(stream) / size} <= held
    counts = [found.count for found in sketch.heaviest(size)]
    assert counts == sorted(counts, reverse=True)
    assert sum(counts) <= len(stream)


@given(STREAMS, SIZES)
def test_counts_are_within_their_bounds_and_heavy_keys_are_held(stream: list[str], size: int) -> None:
    sketch = sketch_of(stream, size)
    assert_bounds(sketch, stream, size)
    assert sum(found.count for found in sketch.heaviest(size)) == len(stream)


@given(st.lists(STREAMS, min_size=2, max_size=4), SIZES, STREAMS)
def test_merging_keeps_the_bounds_also_for_what_is_counted_afterwards(
    streams: list[list[str]], size: int, more: list[str]
) -> None:
    merged = HeavyHitters(size)
    for stream in streams:
        merged.merge(json.loads(json.dumps(sketch_of(stream, size).state())))
    everything = [key for stream in streams for key in stream]
    assert_bounds(merged, everything, size)
    for key in more:
        merged.add(key)
    assert_bounds(merged, everything + more, size)


def test_what_fits_is_counted_exactly() -> None:
    sketch = sketch_of(["a", "b", "a"], 2)
    assert sketch.heaviest(9) == [Estimate("a", 2, 0), Estimate("b", 1, 0)]
    assert sketch.estimate("c") == Estimate("c", 1, 1)
    sketch.add("c")
    assert sketch.heaviest(1) == [Estimate("a", 2, 0)] or sketch.heaviest(1) == [Estimate("c", 2, 1)]
    assert repr(sketch) == "<HeavyHitters [2 of 2 counters]>"


def test_a_flood_of_invented_keys_hides_no_heavy_one_and_takes_no_memory() -> None:
    source, sketch = random.Random(7), HeavyHitters(100)
    for number in range(20_000):
        sketch.add(f"invented-{number}")
        if source.random() < 0.05:
            sketch.add("heavy")
    assert sketch.heaviest(1)[0].key == "heavy"
    assert len(sketch) == len(sketch._heap) == 100


@pytest.mark.parametrize("size", [0, -1])
def test_a_sketch_has_a_counter(size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        HeavyHitters(size)


def test_only_equals_are_merged() -> None:
    with pytest.raises(ValueError, match="of 3 counters"):
        HeavyHitters(2).merge(HeavyHitters(3).state())
