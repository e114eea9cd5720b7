"""Where the garbage collector must not run."""

import gc
import sys
import threading
from types import FrameType

import pytest

from api_gateway.system.collection import frames_of_threads


@pytest.mark.parametrize("is_enabled", [True, False])
def test_frames_of_threads_are_read_while_the_collector_is_paused(
    monkeypatch: pytest.MonkeyPatch,
    is_enabled: bool,  # noqa: FBT001
) -> None:
    """In CPython 3.11 a collection there lets a thread that starts another one wait for ever."""
    read, was_enabled, seen = sys._current_frames, gc.isenabled(), list[bool]()

    def noted() -> dict[int, FrameType]:
        seen.append(gc.isenabled())
        return read()

    monkeypatch.setattr(sys, "_current_frames", noted)
    try:
        gc.enable() if is_enabled else gc.disable()
        assert threading.get_ident() in frames_of_threads()
        assert gc.isenabled() == is_enabled
    finally:
        gc.enable() if was_enabled else gc.disable()
    assert seen == [False]
