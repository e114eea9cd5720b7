"""The edges between WebSocket frames are found, however the bytes arrive."""

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api_gateway.frames import GOING_AWAY, FrameEdges
from tests.test_websocket import BINARY, CLOSE, frame

FRAMES = st.lists(
    st.builds(
        lambda size, masked: frame(BINARY, bytes(size), masked=masked),
        st.one_of(st.integers(0, 130), st.sampled_from([65_535, 65_536, 70_000])),
        st.booleans(),
    ),
    min_size=1,
    max_size=8,
)


@given(FRAMES, st.data())
def test_a_stream_is_between_frames_exactly_at_their_ends(frames: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(frames)
    ends = {0, *accumulate(map(len, frames))}
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=12).map(sorted))
    edges = FrameEdges()
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        edges.feed(stream[start:end])
        assert edges.is_between == (end in ends)


@given(FRAMES, st.data())
def test_what_still_belongs_to_the_frame_that_has_begun_is_told_to_the_byte(
    frames: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(frames)
    ends = sorted({0, *accumulate(map(len, frames))})
    cut = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(cut, len(stream)))
    edges = FrameEdges()
    edges.feed(stream[:cut])
    following = next(end for end in ends if end >= cut)
    assert edges.rest(stream[cut:stop]) == (following - cut if following <= stop else None)


@pytest.mark.parametrize("at", range(1, 14))
def test_a_head_may_come_byte_by_byte(at: int) -> None:
    edges = FrameEdges()
    long = frame(BINARY, bytes(70_000), masked=True)
    edges.feed(long[:at])
    edges.feed(long[at:])
    assert edges.is_between


@given(FRAMES)
def test_a_close_frame_is_noticed_and_no_other_is_taken_for_one(frames: list[bytes]) -> None:
    edges = FrameEdges()
    for one in frames:
        edges.feed(one)
    assert not edges.has_closed
    edges.feed(frame(CLOSE))
    assert edges.has_closed


def test_the_frame_that_is_put_in_is_a_close_frame_that_says_going_away() -> None:
    assert frame(CLOSE, (1001).to_bytes(2, "big")) == GOING_AWAY
